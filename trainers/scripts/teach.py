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
Stores the predictions of a model with the neighbor in front of its window, as a teacher for a model that reads
neighbors.

    retro teach --datastore datastore --model HuggingFaceTB/SmolLM2-135M --row_chunks 8 --output_dir teacher
    retro train --datastore datastore --model HuggingFaceTB/SmolLM2-135M --neighbor_adapter_rank 16 \\
        --freeze_decoder true --retrofit_only true --teacher teacher --row_chunks 8 --output_dir reader
    accelerate launch -m trainers.scripts.teach --datastore datastore --model model --output_dir teacher

The same command resumes an interrupted run. The teacher may be any causal language model with the tokenizer of the
datastore.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.arguments import parse_arguments, run_command


@dataclass
class TeachArguments:
    """Arguments of `retro teach`."""

    datastore: str = field(metadata={"help": "Folder or Hub id of the datastore, with neighbors."})
    model: str = field(
        metadata={"help": "Folder or Hub id of the teacher: a RETRO model or any causal one, or smollm2."}
    )
    output_dir: str = field(metadata={"help": "Folder to write to."})
    split: str = field(default="train", metadata={"help": "Split of the datastore for training."})
    row_chunks: int = field(default=8, metadata={"help": "Chunks in a row of the training: its `--row_chunks`."})
    num_neighbors: int = field(default=1, metadata={"help": "Number of neighbors in front of the window."})
    top_tokens: int = field(default=50, metadata={"help": "Number of most probable tokens stored for each position."})
    batch_size: int = field(default=8, metadata={"help": "Number of chunks in a forward pass."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Torch dtype of the weights.", "choices": ["float32", "bfloat16", "float16"]},
    )


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(TeachArguments, argv=argv, description=__doc__, prog="retro teach")
    import torch
    from accelerate import PartialState

    from data_prep.memory import keep_freed_memory
    from modeling_retro.datastore.datastore import RetroDatastore
    from trainers.language_model.teacher import teach

    from ..load_model import load_retro_model

    keep_freed_memory()
    datastore = RetroDatastore.from_pretrained(arguments.datastore)
    model = load_retro_model(arguments.model, datastore, dtype=getattr(torch, arguments.dtype))
    teach(
        arguments.datastore,
        model.to(PartialState().device),
        arguments.output_dir,
        split=arguments.split,
        row_chunks=arguments.row_chunks,
        num_neighbors=arguments.num_neighbors,
        top_tokens=arguments.top_tokens,
        batch_size=arguments.batch_size,
    )


if __name__ == "__main__":
    run_command(main)
