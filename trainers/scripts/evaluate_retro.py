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
Measures what retrieval buys a RETRO language model on held-out documents: bits per byte and perplexity.

    retro evaluate --model model --datastore datastore --output_dir evaluation
    accelerate launch -m trainers.scripts.evaluate_retro --model model --datastore datastore --output_dir evaluation
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate import PartialState

from data_prep.arguments import parse_arguments, run_command
from modeling_retro import RetroForCausalLM
from modeling_retro.retrieval_retro import RetroDatastore

from ..evaluation import MODES, evaluate_retro


@dataclass
class EvaluateRetroArguments:
    """
    Arguments of `retro evaluate`.
    """

    model: str = field(metadata={"help": "Folder or Hub id of a RETRO model."})
    datastore: str = field(metadata={"help": "Folder or Hub id of the datastore to search."})
    output_dir: str = field(metadata={"help": "Folder for evaluation.json, evaluation.md and evaluation.png."})
    split: str = field(default="validation", metadata={"help": "Split of the datastore to evaluate on."})
    modes: list[str] = field(default_factory=lambda: list(MODES), metadata={"help": f"Some of {', '.join(MODES)}."})
    num_neighbors: int = field(default=2, metadata={"help": "Number of neighbors of a chunk."})
    window_chunks: int = field(default=32, metadata={"help": "Length in chunks of the sliding windows."})
    stride_chunks: int = field(default=16, metadata={"help": "Step in chunks between two windows."})
    batch_size: int = field(default=8, metadata={"help": "Number of windows in a forward pass."})
    max_documents: int | None = field(default=None, metadata={"help": "Evaluate on the first documents only."})
    dtype: str = field(default="float32", metadata={"help": "Torch dtype of the model, such as bfloat16."})
    seed: int = field(default=0, metadata={"help": "Seed of the random neighbors and of the bootstrap."})


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(EvaluateRetroArguments, argv=argv, description=__doc__, prog="retro evaluate")
    state = PartialState()
    datastore = RetroDatastore.from_pretrained(arguments.datastore)
    model = RetroForCausalLM.from_pretrained(arguments.model, dtype=_torch_dtype(arguments.dtype)).to(state.device)
    evaluation = evaluate_retro(
        model,
        datastore,
        datastore.split(arguments.split),
        modes=arguments.modes,
        num_neighbors=arguments.num_neighbors,
        window_chunks=arguments.window_chunks,
        stride_chunks=arguments.stride_chunks,
        batch_size=arguments.batch_size,
        max_documents=arguments.max_documents,
        seed=arguments.seed,
    )
    if state.is_main_process:
        evaluation.save(arguments.output_dir)
        print(evaluation.to_markdown())


def _torch_dtype(name: str) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ValueError(f"--dtype is {name!r}, expected one of {', '.join(known)}")
    return known[name]


if __name__ == "__main__":
    run_command(main)
