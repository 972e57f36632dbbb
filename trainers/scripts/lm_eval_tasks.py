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
Makes tasks of the lm-evaluation-harness from the texts of a datastore.

    retro lm-eval-tasks --datastore datastore --output_dir tasks
    retro lm-eval --model model --datastore datastore --task_folder tasks --tasks retro_next_line --output_dir lines

`retro_next_line` asks for the next line of held-out documents, and `retro_definitions` for what a term is said to be
in a document of the datastore. Both report exact match and edit similarity.

The questions of the other tasks come with their passages, which are pieces of the datastore's documents.
`retro_definition_4` and `retro_lookup_4` ask for what one of four passages says: of a term, or of a parameter, a
function or an option. The others ask for invented facts that are hidden in the passages: `retro_one_key_4` for one
fact in one of four. These tasks report exact match and F1, or how often an answer is invented where there is none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.arguments import parse_arguments, run_command


@dataclass
class LMEvalTasksArguments:
    """
    Arguments of `retro lm-eval-tasks`.
    """

    datastore: str = field(metadata={"help": "Folder or Hub id of the datastore."})
    output_dir: str = field(metadata={"help": "Folder for the tasks and their questions."})
    split: str = field(default="validation", metadata={"help": "Split with the held-out documents."})
    num_questions: int = field(default=200, metadata={"help": "Largest number of questions of a task."})
    num_passages: list[int] = field(
        default_factory=lambda: [1, 2, 4, 10, 32],
        metadata={"help": "Numbers of passages of the questions that have passages."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the documents and of the places in them."})


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(LMEvalTasksArguments, argv=argv, description=__doc__, prog="retro lm-eval-tasks")
    from modeling_retro import RetroDatastore
    from trainers.evaluation.harness_tasks import write_tasks

    datastore = RetroDatastore.from_pretrained(arguments.datastore)
    written = write_tasks(
        datastore,
        arguments.output_dir,
        arguments.split,
        arguments.num_questions,
        arguments.seed,
        arguments.num_passages,
    )
    for name, number in written.items():
        print(f"{arguments.output_dir}/{name}.yaml: {number} questions")


if __name__ == "__main__":
    run_command(main)
