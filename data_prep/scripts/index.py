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
The faiss index over the embeddings of a datastore: trained on a sample, filled shard by shard, merged, measured.

```bash
retro index --datastore datastore
retro index --datastore datastore --factory IVF131072,PQ32 --target-recall 0.9 --use-gpus
```

Always reports recall@1 and recall@10 against exact search, and writes it into the manifest with the nprobe (efSearch
for HNSW) that reaches the target. Many processes fill shards: `accelerate launch -m data_prep.scripts.index ...`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.arguments import parse_arguments, run_command


@dataclass
class IndexArguments:
    """Options of `retro index`."""

    datastore: str = field(metadata={"help": "The datastore."})
    factory: str = field(default="auto", metadata={"help": "A faiss factory string, or auto by number of chunks."})
    metric: str = field(
        default="inner_product", metadata={"help": "What is compared.", "choices": ["inner_product", "l2"]}
    )
    max_index_memory: float | None = field(
        default=None, metadata={"help": "GB; auto compresses to fit, larger indexes are merged on disk."}
    )
    max_training_vectors: int = field(default=1_000_000, metadata={"help": "Vectors of the random training sample."})
    target_recall: float = field(default=0.95, metadata={"help": "recall@10 that nprobe or efSearch is set for."})
    recall_queries: int = field(default=1000, metadata={"help": "Held-out queries that recall is measured with."})
    seed: int = field(default=0, metadata={"help": "Seed of the samples."})
    use_gpus: bool = field(default=False, metadata={"help": "Train and fill on GPUs."})
    shard_index: bool = field(default=False, metadata={"help": "Split the index over GPUs instead of copying it."})
    force: bool = field(default=False, metadata={"help": "Build the index anew."})


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(IndexArguments, argv=argv, description=__doc__, prog="retro index")
    from data_prep.index import build_index
    from data_prep.stage_files import process_state

    record = build_index(**vars(arguments))
    if process_state().is_main_process:
        recall = ", ".join(f"{name} {value:.3f}" for name, value in record["recall"].items() if "@" in name)
        parameters = ", ".join(f"{name} {value}" for name, value in record["search_parameters"].items()) or "exact"
        print(f"{record['factory']} over {record['ntotal']} chunks ({parameters}): {recall}")


if __name__ == "__main__":
    run_command(main)
