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
Makes pairs that teach an encoder which neighbors help: a language model scores how much each stored neighbor of a
chunk raises the log-probability of the next chunk (RPT, arXiv 2306.13421).

    retro neighbors --datastore datastore --num_neighbors 16 --force
    retro mine-neighbors --datastore datastore --model HuggingFaceTB/SmolLM2-135M --output_dir mined
    retro train-retriever --model_name_or_path encoder --pairs mined/pairs --output_dir better-encoder
    accelerate launch -m trainers.scripts.mine_neighbors --datastore datastore --model model --output_dir mined

The same command resumes an interrupted run. The model may be a RETRO model or any causal one with the tokenizer of the
datastore, and it is not trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.arguments import parse_arguments, run_command


@dataclass
class MineNeighborsArguments:
    """Arguments of `retro mine-neighbors`."""

    datastore: str = field(metadata={"help": "Folder or Hub id of the datastore, with neighbors."})
    model: str = field(metadata={"help": "Folder or Hub id of a RETRO model or of any causal one, or smollm2."})
    output_dir: str = field(metadata={"help": "Folder to write to: the scores, and the pairs in its folder `pairs`."})
    reader: str | None = field(
        default=None, metadata={"help": "Reader for a model that is no RETRO model: a name, a folder or a Hub id."}
    )
    num_candidates: int = field(default=16, metadata={"help": "Number of neighbors of a chunk that are scored."})
    num_positives: int = field(
        default=1, metadata={"help": "Largest number of pairs of a chunk, with one of the best neighbors each."}
    )
    num_negatives: int = field(
        default=1, metadata={"help": "Number of hard negatives of each pair: the neighbors that help least."}
    )
    min_gain: float = field(
        default=0.0,
        metadata={"help": "A positive raises the log-probability of the next chunk by more than this number of nats."},
    )
    context_chunks: int = field(
        default=1, metadata={"help": "Chunks that the model reads before the next one, the last with the neighbor."}
    )
    max_chunks: int | None = field(
        default=None, metadata={"help": "Largest number of chunks to score, a random sample. Defaults to all."}
    )
    min_tokens: int = field(default=16, metadata={"help": "Chunks whose next chunk is shorter are left out."})
    batch_size: int = field(default=32, metadata={"help": "Rows in a forward pass, each a chunk with one neighbor."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Torch dtype of the weights.", "choices": ["float32", "bfloat16", "float16"]},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the sample of chunks."})


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(MineNeighborsArguments, argv=argv, description=__doc__, prog="retro mine-neighbors")
    import torch
    from accelerate import PartialState

    from data_prep.memory import keep_freed_memory
    from modeling_retro.datastore.datastore import RetroDatastore
    from trainers.retriever.neighbor_preference import mine_neighbors

    from ..load_model import load_retro_model

    keep_freed_memory()
    options = dict(vars(arguments))
    name, reader, dtype = (options.pop(key) for key in ("model", "reader", "dtype"))
    datastore = RetroDatastore.from_pretrained(arguments.datastore)
    model = load_retro_model(name, datastore, reader=reader, dtype=getattr(torch, dtype))
    pairs = mine_neighbors(model=model.to(PartialState().device), **options)
    print(f"{len(pairs)} pairs in {arguments.output_dir}/pairs")


if __name__ == "__main__":
    run_command(main)
