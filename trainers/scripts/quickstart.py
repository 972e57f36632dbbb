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
Makes a datastore from documents, lets a language model look things up in it, and measures the gain, in a few minutes
on two CPU cores.

    retro quickstart
    retro quickstart --data my_documents.jsonl --output_dir my_retro
    retro quickstart --model retro-tiny --output_dir my_retro_tiny
    retro quickstart --from-scratch --output_dir my_retro_from_scratch --max_steps 4000

The text is the docstrings of the installed `transformers`, or your own: a jsonl file with a key "text" on each line,
or a folder of text files. The model is SmolLM2-135M-Instruct, which reads the neighbors with its own attention, first
untrained and then with the adapters of this package. It is measured beside itself with the neighbor in front of its
window. `--model` takes any other causal language model, a folder or Hub id, which reads untrained, or retro-tiny, the
RETRO model that comes with this package and has seen none of the documents that it is measured on. With
`--from-scratch` a smaller RETRO model is trained first, in about ten minutes. The same command resumes an interrupted
run.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from data_prep.arguments import parse_arguments, run_command
from data_prep.memory import keep_freed_memory


@dataclass
class QuickstartArguments:
    """
    Arguments of `retro quickstart`.
    """

    output_dir: str = field(default="retro-quickstart", metadata={"help": "Folder for everything that is made."})
    data: str | None = field(
        default=None,
        metadata={
            "help": 'Jsonl file with a key "text", or folder of text files. Docstrings of transformers when unset.'
        },
    )
    model: str = field(
        default="smollm2", metadata={"help": "smollm2, retro-tiny, or folder or Hub id of a causal language model."}
    )
    from_scratch: bool = field(
        default=False, metadata={"help": "Train a tokenizer and a model on the documents instead of loading --model."}
    )
    max_steps: int | None = field(
        default=None,
        metadata={"help": "Training steps of 2,048 tokens, with --from-scratch. Defaults to 900."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the split, the weights and the order of the rows."})
    on_bad_record: str = field(
        default="error",
        metadata={"help": "What to do with lines of --data that are not documents.", "choices": ["error", "skip"]},
    )


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(QuickstartArguments, argv=argv, description=__doc__, prog="retro quickstart")
    from ..quickstart import quickstart

    keep_freed_memory()
    quickstart(**asdict(arguments))


if __name__ == "__main__":
    run_command(main)
