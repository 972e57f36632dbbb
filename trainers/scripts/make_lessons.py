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
Makes lessons in reading from the texts of a datastore: questions about passages. A reader is trained on them, and on
text with its neighbors, by `retro train --lessons`.

    retro lessons --datastore datastore --split lessons --num_lessons 1000 --output_file lessons.jsonl
    retro train --datastore datastore --lessons lessons.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct \\
        --train_split lessons --row_share 0.45 --row_chunks 8 --num_neighbors 1 --per_device_train_batch_size 1 \\
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

    datastore: str = field(metadata={"help": "Folder or Hub id of the datastore."})
    output_file: str = field(metadata={"help": "JSON lines file to write."})
    split: str = field(default="train", metadata={"help": "Split whose documents become lessons."})
    num_lessons: int = field(default=1000, metadata={"help": "Number of lessons."})
    seed: int = field(default=0, metadata={"help": "Seed of all that is drawn."})

    def __post_init__(self):
        if self.num_lessons < 1:
            raise ValueError(f"--num_lessons is {self.num_lessons}, expected at least 1")


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(LessonsArguments, argv=argv, description=__doc__, prog="retro lessons")
    from modeling_retro import RetroDatastore
    from modeling_retro.durable_files_retro import write_text
    from trainers.language_model.make_lessons import make_lessons

    datastore = RetroDatastore.from_pretrained(arguments.datastore)
    lessons = make_lessons(datastore, arguments.split, arguments.num_lessons, arguments.seed)
    text = "".join(json.dumps(lesson, ensure_ascii=False) + "\n" for lesson in lessons)
    write_text(Path(arguments.output_file), text)


if __name__ == "__main__":
    run_command(main)
