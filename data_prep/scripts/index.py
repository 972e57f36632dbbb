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
Builds an index over the chunks of a datastore: a faiss index of their embeddings, or a BM25 index of their terms.

```bash
retro index --datastore datastore
retro index --datastore datastore --factory IVF131072,PQ32 --target-recall 0.9 --use-gpus
retro index --datastore datastore --kind bm25
```

A faiss index is trained on a sample, filled shard by shard, merged and measured. The command always reports recall@1
and recall@10 against exact search, and writes them into the manifest with the nprobe (efSearch for HNSW) that reaches
the target. A BM25 index needs no embeddings. A datastore may hold both kinds. Many processes can share the shards:
`accelerate launch -m data_prep.scripts.index ...`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from data_prep.arguments import parse_arguments, run_command


@dataclass
class IndexArguments:
    """Options of `retro index`."""

    datastore: str = field(metadata={"help": "The datastore."})
    kind: str = field(
        default="faiss",
        metadata={"help": "faiss indexes the embeddings, bm25 the terms.", "choices": ["faiss", "bm25"]},
    )
    factory: str = field(default="auto", metadata={"help": "A faiss factory string, or auto by number of chunks."})
    metric: str = field(
        default="inner_product", metadata={"help": "Similarity of embeddings.", "choices": ["inner_product", "l2"]}
    )
    max_index_memory: float | None = field(
        default=None, metadata={"help": "In GB. auto compresses to fit; larger indexes are merged on disk."}
    )
    max_training_vectors: int = field(default=1_000_000, metadata={"help": "Size of the random training sample."})
    target_recall: float = field(default=0.95, metadata={"help": "The recall@10 for which nprobe or efSearch is set."})
    recall_queries: int = field(default=1000, metadata={"help": "Number of queries to measure the recall with."})
    seed: int = field(default=0, metadata={"help": "Seed of the samples."})
    use_gpus: bool = field(default=False, metadata={"help": "Train and fill the index on GPUs."})
    shard_index: bool = field(default=False, metadata={"help": "Split the index over GPUs instead of copying it."})
    on_disk: bool = field(
        default=False,
        metadata={"help": "Memory holds short codes; the vectors that score results again stay on the disk."},
    )
    terms: str = field(
        default="tokens",
        metadata={"help": "bm25: the tokens of the datastore, or words.", "choices": ["tokens", "words"]},
    )
    k1: float = field(default=1.5, metadata={"help": "bm25: weight of repeated terms of a chunk."})
    b: float = field(default=0.75, metadata={"help": "bm25: penalty for long chunks, from 0 to 1."})
    force: bool = field(default=False, metadata={"help": "Build the index again."})


_BM25_OPTIONS = ("terms", "k1", "b")


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(IndexArguments, argv=argv, description=__doc__, prog="retro index")
    options = {"datastore": arguments.datastore, "force": arguments.force}
    for option in fields(IndexArguments):
        name, value = option.name, getattr(arguments, option.name)
        if name in ("datastore", "kind", "force"):
            continue
        if (name in _BM25_OPTIONS) == (arguments.kind == "bm25"):
            options[name] = value
        elif value != option.default:
            raise ValueError(f"--{name} is {value!r}, but no option of --kind {arguments.kind}; leave it out")
    from data_prep.results import bm25_in_words, index_in_words
    from data_prep.stage_files import process_state

    if arguments.kind == "bm25":
        from data_prep.bm25_index import build_bm25_index

        record = build_bm25_index(**options)
        if process_state().is_main_process:
            print(bm25_in_words(record))
        return
    from data_prep.index import build_index

    record = build_index(**options)
    if process_state().is_main_process:
        print(index_in_words(record))


if __name__ == "__main__":
    run_command(main)
