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
Runs all stages of a datastore from one recipe: chunk, deduplicate, embed, index, neighbors.

```bash
retro prepare --recipe own_documents.yaml --output-dir datastore
accelerate launch --num_processes 8 -m data_prep.scripts.prepare --recipe massive_open_text.yaml --output-dir datastore
```

A recipe is your own YAML file, or the name of a recipe that comes with the package (see `data_prep/recipes`). The same
command resumes an interrupted run. If inputs were added to a recipe, `--append` adds them to the datastore.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.arguments import parse_arguments, run_command
from data_prep.memory import keep_freed_memory


@dataclass
class PrepareArguments:
    """Options of `retro prepare`."""

    recipe: str = field(metadata={"help": "A YAML file, or the name of a recipe of the package."})
    output_dir: str = field(metadata={"help": "The datastore."})
    data_dir: str = field(default=".", metadata={"help": "Folder of the inputs of the recipe with relative paths."})
    append: bool = field(default=False, metadata={"help": "Add the inputs that the datastore does not hold yet."})
    force: bool = field(default=False, metadata={"help": "Rebuild everything."})
    check_disk: bool = field(
        default=True, metadata={"help": "Compare the estimated size of the datastore with the free space first."}
    )


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(PrepareArguments, argv=argv, description=__doc__, prog="retro prepare")
    from data_prep.prepare import prepare_datastore
    from data_prep.results import bm25_in_words, chunks_in_words, index_in_words, neighbors_in_words
    from data_prep.stage_files import process_state

    keep_freed_memory()
    manifest = prepare_datastore(**vars(arguments))
    if process_state().is_main_process:
        for name, record in manifest.splits.items():
            print(f"{name}:")
            print(textwrap.indent(chunks_in_words(record.chunks), "  "))
            if record.neighbors is not None:
                print(textwrap.indent(neighbors_in_words(record.neighbors), "  "))
        if manifest.index is not None:
            print(index_in_words(manifest.index))
        if manifest.bm25 is not None:
            print(bm25_in_words(manifest.bm25))


if __name__ == "__main__":
    run_command(main)
