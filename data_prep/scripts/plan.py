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
Estimates the chunks, the sizes of the files, the memory of the index and the hours of the encoder of a datastore.

```bash
retro plan --tokens 1.75T
retro plan --tokens 40M --max-index-memory 2 --chunks-per-second 100
```
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.arguments import parse_arguments, run_command


@dataclass
class PlanArguments:
    """Options of `retro plan`."""

    tokens: str = field(metadata={"help": "Number of tokens of the corpus, such as 1.75T, 40B, 10M."})
    chunk_size: int = field(default=64, metadata={"help": "Number of tokens in a chunk."})
    dim: int = field(default=384, metadata={"help": "Dimensions of the encoder."})
    vocab_size: int = field(
        default=49152, metadata={"help": "Size of the vocabulary. Above 65536, an id has 4 bytes."}
    )
    tokens_per_document: int = field(default=800, metadata={"help": "Mean length of a document."})
    num_neighbors: int = field(default=4, metadata={"help": "Neighbors stored for each chunk."})
    factory: str = field(default="auto", metadata={"help": "A faiss factory string, or auto."})
    max_index_memory: float | None = field(default=None, metadata={"help": "Largest size of the index in GB."})
    chunks_per_second: float = field(
        default=4000.0, metadata={"help": "Chunks that one GPU embeds in a second. Measure it with `retro embed`."}
    )
    num_gpus: int = field(default=1, metadata={"help": "Number of GPUs that embed."})
    on_disk: bool = field(default=False, metadata={"help": "The index is built with --on_disk."})


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(PlanArguments, argv=argv, description=__doc__, prog="retro plan")
    from data_prep.plan import human_bytes, parse_number, plan_datastore

    options = vars(arguments)
    plan = plan_datastore(parse_number(options.pop("tokens")), **options)
    print(f"{'chunks':<24}{plan['chunks']:,}")
    for name in ("chunks", "embeddings", "neighbors"):
        print(f"{name + '/':<24}{human_bytes(plan[f'{name}_bytes'])}")
    print(f"{'index.faiss':<24}{human_bytes(plan['index_bytes'])}   {plan['factory']}")
    if arguments.on_disk:
        memory = human_bytes(plan["index_memory_bytes"])
        print(f"{'index in memory':<24}{memory}   chunks x (bytes of a code + 8) + lists x 4 x dimensions")
    print(
        f"{'encoder':<24}{plan['encoder_gpu_hours']:,.1f} GPU-hours at {arguments.chunks_per_second:g} chunks/s, "
        f"{plan['encoder_hours']:,.1f} hours on {arguments.num_gpus}"
    )


if __name__ == "__main__":
    run_command(main)
