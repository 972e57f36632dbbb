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
The faiss index over the embeddings of a datastore.

```bash
retro index --datastore datastore
retro index --datastore datastore --factory IVF131072,PQ32 --target-recall 0.95
```
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from transformers.utils import logging

from data_prep.arguments import parse_arguments, run_command
from data_prep.manifest import (
    check_options,
    directory_lock,
    discard,
    open_manifest,
    process_state,
    verify_shard,
    whole,
    write_manifest,
)
from modeling_retro.retrieval_retro import TRAIN_SPLIT, chunks_fingerprint


logger = logging.get_logger(__name__)


@dataclass
class IndexArguments:
    """Options of `retro index`."""

    datastore: str = field(metadata={"help": "The datastore."})
    factory: str = field(default="auto", metadata={"help": "A faiss factory string, or auto by number of chunks."})
    metric: str = field(
        default="inner_product", metadata={"help": "What is compared.", "choices": ["inner_product", "l2"]}
    )
    max_training_vectors: int = field(default=1_000_000, metadata={"help": "Vectors of the random training sample."})
    seed: int = field(default=0, metadata={"help": "Seed of the sample."})
    force: bool = field(default=False, metadata={"help": "Build the index anew."})


def read_embeddings(path: Path, split: str, manifest: dict[str, Any], verify: bool = True) -> list[np.ndarray]:
    """
    Opens the embeddings of a split, memory-mapped.

    Args:
        path (`Path`): Folder of the split.
        split (`str`): Its name.
        manifest (`dict`): The manifest of the datastore.
        verify (`bool`, *optional*, defaults to `True`): Whether to compare checksums.

    Returns:
        `list[np.ndarray]`: float16 [chunks of the shard, dim].

    Raises:
        ValueError: If embeddings are missing, altered, or belong to other chunks or another order of rows.
    """
    shards = manifest["splits"][split]["chunks"]["shards"]
    records = manifest["splits"][split].get("embeddings", {}).get("shards", [])
    if len(records) < len(shards):
        raise ValueError(
            f"{split} has embeddings for {len(records)} of {len(shards)} shards of chunks; "
            f"run `retro embed --split {split}`"
        )
    arrays = []
    for record, chunks in zip(records, shards, strict=True):
        if record["chunks_sha256"] != chunks["sha256"]:
            raise ValueError(
                f"the embeddings of {record['name']} ({split}) belong to other chunks or another order of rows; "
                f"run `retro embed --split {split} --force`"
            )
        file = path / "embeddings" / f"{record['name']}.npy"
        if verify:
            verify_shard(file, record)
        arrays.append(np.load(file, mmap_mode="r", allow_pickle=False))
    return arrays


def build_index(
    datastore: str | Path,
    factory: str = "auto",
    metric: str = "inner_product",
    max_training_vectors: int = 1_000_000,
    seed: int = 0,
    force: bool = False,
) -> dict[str, Any]:
    """
    Trains a faiss index on a random sample of the embeddings and fills it.

    Args:
        datastore (`str` or `Path`): The datastore.
        factory (`str`, *optional*, defaults to `"auto"`): A faiss factory string; `"auto"` picks one by size.
        metric (`str`, *optional*, defaults to `"inner_product"`): `"inner_product"` or `"l2"`.
        max_training_vectors (`int`, *optional*, defaults to 1,000,000): Vectors of the training sample.
        seed (`int`, *optional*, defaults to 0): Seed of the sample.
        force (`bool`, *optional*, defaults to `False`): Build the index anew.

    Returns:
        `dict`: what the manifest says of the index.

    Raises:
        ValueError: If faiss does not know the factory, or embeddings are missing or belong to other chunks.
    """
    path = Path(datastore)
    with directory_lock(path):
        manifest = open_manifest(path)
        if force:
            discard(path, manifest, TRAIN_SPLIT, "index")
        shards = manifest["splits"][TRAIN_SPLIT]["chunks"]["shards"]
        fingerprint = chunks_fingerprint(shards)
        options = {"factory": factory, "metric": metric, "max_training_vectors": max_training_vectors, "seed": seed}
        record = manifest.get("index")
        if record is not None:
            check_options("index", options, record["options"])
            if record["fingerprint"] == fingerprint and (path / "index.faiss").exists():
                return record
        embeddings = read_embeddings(path, TRAIN_SPLIT, manifest)
        state = process_state()
        if state.is_main_process:
            index = _train(embeddings, factory, metric, max_training_vectors, seed)
            for vectors in embeddings:
                index.add(vectors.astype(np.float32))
            with whole(path / "index.faiss") as temporary:
                faiss.write_index(index, str(temporary))
        state.wait_for_everyone()
        manifest["index"] = {
            "options": options,
            "factory": _factory(factory, sum(map(len, embeddings))),
            "metric": metric,
            "ntotal": sum(map(len, embeddings)),
            "search_parameters": {},
            "fingerprint": fingerprint,
        }
        write_manifest(path, manifest)
        return manifest["index"]


def _factory(factory: str, rows: int) -> str:
    return "Flat" if factory == "auto" else factory


def _train(
    embeddings: list[np.ndarray], factory: str, metric: str, max_training_vectors: int, seed: int
) -> faiss.Index:
    rows, dim = sum(map(len, embeddings)), embeddings[0].shape[1]
    kind = faiss.METRIC_INNER_PRODUCT if metric == "inner_product" else faiss.METRIC_L2
    try:
        index = faiss.index_factory(dim, _factory(factory, rows), kind)
    except RuntimeError as error:
        raise ValueError(f"faiss knows no factory {factory!r} for {dim} dimensions: {error}") from error
    if not index.is_trained:
        index.train(np.concatenate(embeddings).astype(np.float32))
    return index


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(IndexArguments, argv=argv, description=__doc__, prog="retro index")
    record = build_index(**vars(arguments))
    if process_state().is_main_process:
        print(f"{record['factory']} over {record['ntotal']} chunks")


if __name__ == "__main__":
    run_command(main)
