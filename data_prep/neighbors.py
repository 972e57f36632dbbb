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
The nearest neighbors of each chunk outside its own document.

```bash
retro neighbors --datastore datastore --num-neighbors 4
retro neighbors --datastore datastore --num-neighbors 4 --split validation
```

Many processes share the shards: `accelerate launch -m data_prep.neighbors ...`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Features, List, Value
from transformers.utils import logging

from data_prep.arguments import parse_arguments, run_command
from data_prep.index import read_embeddings
from data_prep.manifest import (
    check_options,
    clear_records,
    directory_lock,
    discard,
    open_manifest,
    process_state,
    run_shards,
    save_shard,
    write_manifest,
)
from modeling_retro.retrieval_retro import TRAIN_SPLIT, RetroDatastore, other_document_filter, search, split_path


logger = logging.get_logger(__name__)

_QUERIES = 4096


@dataclass
class NeighborsArguments:
    """Options of `retro neighbors`."""

    datastore: str = field(metadata={"help": "The datastore."})
    num_neighbors: int = field(default=4, metadata={"help": "Neighbors of a chunk."})
    split: str = field(default=TRAIN_SPLIT, metadata={"help": "The split whose chunks are the queries."})
    force: bool = field(default=False, metadata={"help": "Search anew."})


def neighbor_features(num_neighbors: int) -> Features:
    """Types of the columns of a shard of neighbors."""
    return Features(
        {
            "neighbor_ids": List(Value("int64"), length=num_neighbors),
            "neighbor_scores": List(Value("float32"), length=num_neighbors),
        }
    )


def find_neighbors(
    datastore: str | Path, num_neighbors: int = 4, split: str = TRAIN_SPLIT, force: bool = False
) -> dict[str, Any]:
    """
    Finds neighbors of every chunk of a split among the searched chunks, never in the chunk's own document.

    Args:
        datastore (`str` or `Path`): The datastore.
        num_neighbors (`int`, *optional*, defaults to 4): Neighbors of a chunk, K.
        split (`str`, *optional*, defaults to `"train"`): The split whose chunks are the queries.
        force (`bool`, *optional*, defaults to `False`): Search anew.

    Returns:
        `dict`: what the manifest says of the split's neighbors, with counts of everything dropped.

    Raises:
        ValueError: If `num_neighbors` is not between 1 and the number of searched chunks, or a stage is missing.
    """
    path = Path(datastore)
    with directory_lock(path):
        manifest = open_manifest(path)
        opened = RetroDatastore(path, manifest)
        if not 1 <= num_neighbors <= len(opened.chunks):
            raise ValueError(
                f"num_neighbors must lie between 1 and the {len(opened.chunks)} searched chunks, got {num_neighbors}"
            )
        if force:
            discard(path, manifest, split, "neighbors")
        index = opened.index
        root = split_path(path, split)
        embeddings = read_embeddings(root, split, manifest)
        chunks = opened.split(split).chunks
        chunk_shards = manifest["splits"][split]["chunks"]["shards"]
        options = {"num_neighbors": num_neighbors}
        stage = manifest["splits"][split].setdefault("neighbors", {"options": options, "shards": []})
        check_options("neighbors", options, stage["options"])
        write_manifest(path, manifest)
        features = neighbor_features(num_neighbors)

        def make(shard: int, temporary: Path) -> dict[str, Any]:
            parts, counts = [], {}
            for start in range(0, len(embeddings[shard]), _QUERIES):
                queries = embeddings[shard][start : start + _QUERIES].astype(np.float32)
                unwanted = {}
                if split == TRAIN_SPLIT:
                    documents = chunks.shard(shard)["document_id"][start : start + _QUERIES]
                    unwanted["own_document"] = other_document_filter(opened.chunks, documents)
                ids, scores, found = search(index, queries, num_neighbors, unwanted)
                parts.append((ids, scores))
                counts = {name: counts.get(name, 0) + number for name, number in found.items()}
            ids, scores = (np.concatenate(part) for part in zip(*parts, strict=True))
            save_shard(temporary, {"neighbor_ids": ids, "neighbor_scores": scores}, features)
            return {"rows": len(ids), "counts": counts, "chunks_sha256": chunk_shards[shard]["sha256"]}

        names = [record["name"] for record in chunk_shards]
        stage["shards"] = run_shards(
            root / "neighbors", stage["shards"], names, make, description=f"Neighbors of {split}"
        )
        totals = [record["counts"] for record in stage["shards"]]
        stage["counts"] = {name: sum(total.get(name, 0) for total in totals) for name in sorted(set().union(*totals))}
        write_manifest(path, manifest)
        clear_records(root / "neighbors")
        return stage


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(NeighborsArguments, argv=argv, description=__doc__, prog="retro neighbors")
    stage = find_neighbors(**vars(arguments))
    if process_state().is_main_process:
        print(
            f"{stage['options']['num_neighbors']} neighbors of {sum(r['rows'] for r in stage['shards'])} chunks; "
            + ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in stage["counts"].items())
        )


if __name__ == "__main__":
    run_command(main)
