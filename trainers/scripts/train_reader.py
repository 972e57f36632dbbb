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
Trains a reader for a causal language model on the texts of a datastore: adapters with which the model finds answers
among passages that were read apart, and continues text with its neighbors in sight.

    retro prepare --recipe documents --data_dir my_documents --output_dir datastore
    retro reader --datastore datastore --model HuggingFaceTB/SmolLM2-135M-Instruct --output_dir reader
    retro reader --datastore datastore --model Qwen/Qwen3-0.6B --num_lessons 100 --output_dir reader

It makes lessons (`retro lessons`) and trains on them and on rows of text (`retro train --lessons`), with options that
the reader of the package was trained with. The same command goes on with an interrupted run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.arguments import parse_arguments, run_command

from . import make_lessons, train_retro


LESSONS_OF_A_STEP = 4


@dataclass
class ReaderArguments:
    """Arguments of `retro reader`."""

    datastore: str = field(
        metadata={"help": "Folder or Hub id of a datastore of the model's tokens with stored neighbors."}
    )
    model: str = field(metadata={"help": "Folder or Hub id of the causal language model."})
    output_dir: str = field(metadata={"help": "Folder for the reader, the lessons and the checkpoints."})
    split: str = field(default="train", metadata={"help": "Split whose documents become lessons."})
    num_lessons: int = field(default=300, metadata={"help": "Number of lessons, each of which is read once."})
    row_share: float = field(
        default=0.55, metadata={"help": "Share of rows of text among the lessons. They come to those on top."}
    )
    reader: str | None = field(default=None, metadata={"help": "Reader to start from, in place of a new one."})
    rank: int = field(default=16, metadata={"help": "Rank of the adapters of a new reader."})
    learning_rate: float = field(default=8e-4, metadata={"help": "Largest learning rate. It falls to zero."})
    dtype: str = field(
        default="bfloat16",
        metadata={"help": "Data type that the model computes in.", "choices": ["float32", "bfloat16"]},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the lessons, and of the adapters."})


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(ReaderArguments, argv=argv, description=__doc__, prog="retro reader")
    if arguments.num_lessons < LESSONS_OF_A_STEP:
        raise ValueError(f"--num_lessons is {arguments.num_lessons}, expected at least those of a step, 4")
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lessons, again = folder / "lessons.jsonl", folder / "lessons-again.jsonl"
    options = {name: getattr(arguments, name) for name in ("datastore", "split", "num_lessons", "seed")}
    make_lessons.main([*_words(options), "--output_file", str(again)])
    if lessons.exists() and lessons.read_bytes() != again.read_bytes():
        again.unlink()
        raise ValueError(f"{lessons} has other lessons than this command makes; take a new --output_dir")
    again.replace(lessons)
    start = {"reader": arguments.reader}
    if arguments.reader is None:
        start = {"neighbor_adapter_rank": arguments.rank}
    if arguments.dtype == "bfloat16":
        start |= {"bf16": "true", "decoder_dtype": "bfloat16"}
    training = {
        "datastore": arguments.datastore,
        "model": arguments.model,
        "lessons": lessons,
        "output_dir": folder,
        "learning_rate": arguments.learning_rate,
        "num_train_epochs": 1,
        "gradient_accumulation_steps": LESSONS_OF_A_STEP,
        "per_device_train_batch_size": 1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 8,
        "weight_decay": 0,
        "freeze_decoder": "true",
        "retrofit_only": "true",
        "save_steps": 10,
        "save_total_limit": 2,
        "logging_steps": 10,
        "seed": arguments.seed,
    }
    if arguments.row_share > 0:
        training |= {
            "train_split": arguments.split,
            "row_share": arguments.row_share,
            "row_chunks": 8,
            "num_neighbors": 1,
            "neighbor_dropout": 0,
            "copy_share": 0.15,
            "random_share": 0.2,
        }
    train_retro.main(_words(training | start))


def _words(options: dict[str, object]) -> list[str]:
    """The words of a command line."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


if __name__ == "__main__":
    run_command(main)
