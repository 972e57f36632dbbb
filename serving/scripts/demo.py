# Copyright 2026 The RETRO for Hugging Face authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Shows in a browser what retrieval is worth. The page continues a prompt with neighbors and without, side by side. The
color of a token shows how much its neighbors helped, and the page shows the neighbors too. After `retro quickstart` it
takes one command:

    retro demo
    retro demo --model model --datastore datastore --port 7870
    retro demo --export space

The last command writes the page as a Space of the Hub, with the model and the datastore.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.arguments import parse_arguments, run_command
from data_prep.heartbeat import end_heartbeat


@dataclass
class DemoArguments:
    """
    Arguments of `retro demo`.
    """

    folder: str = field(
        default="retro-quickstart", metadata={"help": "Output folder of `retro quickstart`, with model and datastore."}
    )
    model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of another model than the one in --folder, or smollm2."}
    )
    datastore: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of another datastore than the one in --folder."}
    )
    reader: str | None = field(
        default=None,
        metadata={
            "help": "Adapters that were trained to read neighbors, for a model that is wrapped: the name of some that "
            "come with the package, or folder or Hub id."
        },
    )
    export: str | None = field(
        default=None, metadata={"help": "Write a Space of the Hub to this new folder, instead of showing the page."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 for all."})
    port: int = field(default=7860, metadata={"help": "Port to listen on."})


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(DemoArguments, argv=argv, description=__doc__, prog="retro demo")
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError("`retro demo` needs gradio: `pip install retro-transformers[demo]`") from error
    from ..demo import Demo, create_page
    from ..load import load_model
    from ..space import export_space

    model, datastore = arguments.model, arguments.datastore
    if model is None or datastore is None:
        folder = Path(arguments.folder)
        if not (folder / "datastore").is_dir() or not (folder / "model").is_dir():
            raise ValueError(
                f"{folder} holds no model and datastore: run `retro quickstart` first, or give --folder its "
                "--output_dir, or --model and --datastore"
            )
        model, datastore = model or str(folder / "model"), datastore or str(folder / "datastore")
    if arguments.export is not None:
        print(export_space(arguments.export, model, datastore, arguments.reader))
        return
    page = create_page(Demo(load_model(model, datastore, reader=arguments.reader), model, datastore))
    end_heartbeat()
    page.queue(default_concurrency_limit=1).launch(server_name=arguments.host, server_port=arguments.port)


if __name__ == "__main__":
    run_command(main)
