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
Makes lessons in reading from the texts of a datastore: questions about passages, and text that is continued with its
neighbors in sight. A reader is trained on them by `retro train --lessons`.

    retro neighbors --datastore datastore --split lessons --num_neighbors 4
    retro lessons --datastore datastore --split lessons --num_lessons 2000 --output_file lessons.jsonl
    retro train --datastore datastore --lessons lessons.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct \\
        --neighbor_adapter_rank 16 --freeze_decoder true --retrofit_only true --output_dir reader
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.arguments import parse_arguments, run_command


@dataclass
class LessonsArguments:
    """Arguments of `retro lessons`."""

    datastore: str = field(metadata={"help": "Folder or Hub id of the datastore that is searched."})
    output_file: str = field(metadata={"help": "JSON lines file to write."})
    split: str = field(
        default="train", metadata={"help": "Split whose documents become lessons. It needs stored neighbors."}
    )
    num_lessons: int = field(default=2000, metadata={"help": "Number of lessons."})
    question_share: float = field(
        default=0.6, metadata={"help": "Share of lessons that are questions. The others are text that is continued."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of all that is drawn."})

    def __post_init__(self):
        if self.num_lessons < 1:
            raise ValueError(f"--num_lessons is {self.num_lessons}, expected at least 1")
        if not 0.0 <= self.question_share <= 1.0:
            raise ValueError(f"--question_share is {self.question_share}, expected a share between 0 and 1")


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(LessonsArguments, argv=argv, description=__doc__, prog="retro lessons")
    from modeling_retro import RetroDatastore
    from modeling_retro.durable_files_retro import write_text
    from trainers.language_model.make_lessons import make_lessons

    datastore = RetroDatastore.from_pretrained(arguments.datastore)
    lessons = make_lessons(datastore, arguments.split, arguments.num_lessons, arguments.question_share, arguments.seed)
    text = "".join(json.dumps(lesson, ensure_ascii=False) + "\n" for lesson in lessons)
    write_text(Path(arguments.output_file), text)


if __name__ == "__main__":
    run_command(main)
