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
Finds the nearest neighbors of each chunk outside its own document.

Many processes can share the shards: `accelerate launch -m data_prep.scripts.neighbors ...`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Features, List, Value
from transformers.utils import logging

from data_prep.faiss_index import to_gpus
from data_prep.index import read_embeddings
from data_prep.join import QUERIES, ListJoin, can_join
from data_prep.shares import remove_shared_work
from data_prep.stage_files import (
    check_options,
    clear_records,
    directory_lock,
    discard,
    open_manifest,
    process_state,
    run_shards,
    save_shard,
    unfinished_shards,
    write_manifest,
)
from modeling_retro.datastore.chunks import ChunkTable
from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.datastore.manifest import TRAIN_SPLIT, Manifest, NeighborShard, NeighborsStage
from modeling_retro.datastore.splits import split_path
from modeling_retro.retriever.search import NeighborSearch, other_document_filter, removed_filter


logger = logging.get_logger(__name__)

_QUERIES = 4096
_PAIRS = 4096


def neighbor_features(num_neighbors: int) -> Features:
    """Types of the columns of a shard of neighbors."""
    return Features(
        {
            "neighbor_ids": List(Value("int64"), length=num_neighbors),
            "neighbor_scores": List(Value("float32"), length=num_neighbors),
        }
    )


def searched_version(manifest: Manifest) -> tuple[str, str | None]:
    """The identities of the searched chunks and of the removed documents."""
    return manifest.train.chunks.fingerprint, manifest.removed and manifest.removed.sha256


def is_stale(shard: NeighborShard, manifest: Manifest) -> bool:
    """
    Whether documents were added or removed after the neighbors of a shard were searched. Its neighbors are still
    right, except for removed documents, which readers leave out. But nearer neighbors may be missing.

    Args:
        shard ([`NeighborShard`]): The shard.
        manifest ([`Manifest`]): The manifest. Imported neighbors never become stale.
    """
    found = (shard.chunks_fingerprint, shard.removed)
    return shard.chunks_fingerprint is not None and found != searched_version(manifest)


def find_neighbors(
    datastore: str | Path,
    num_neighbors: int = 4,
    split: str = TRAIN_SPLIT,
    retriever: str = "dense",
    drop_near_duplicates: float | None = None,
    use_gpus: bool = False,
    shard_index: bool = False,
    force: bool = False,
) -> NeighborsStage:
    """
    Finds neighbors of every chunk of a split among the searched chunks, but never in the chunk's own document.

    More and more results are fetched until enough are left, and all dropped results are counted. If shards were added
    to the datastore, only the neighbors of their chunks are searched, and earlier ones stay as they are.

    Args:
        datastore (`str` or `Path`): The datastore.
        num_neighbors (`int`, *optional*, defaults to 4): Number K of neighbors of a chunk.
        split (`str`, *optional*, defaults to `"train"`): The split whose chunks are the queries.
        retriever (`str`, *optional*, defaults to `"dense"`):
            `"dense"`, `"bm25"`, `"hybrid"` or `"rerank"` (see [`~modeling_retro.retriever.search.NeighborSearch`]).
        drop_near_duplicates (`float`, *optional*):
            Neighbors that hold more than this share of the chunk's tokens, such as 0.9, are dropped.
        use_gpus (`bool`, *optional*, defaults to `False`): Whether to search on GPUs.
        shard_index (`bool`, *optional*, defaults to `False`):
            Whether to split the index over GPUs instead of copying it.
        force (`bool`, *optional*, defaults to `False`): Whether to search again.

    Returns:
        [`NeighborsStage`]: the record of the split's neighbors in the manifest, with counts of all dropped results.

    Raises:
        ValueError: If `num_neighbors` is not between 1 and the number of searched chunks, there is no such retriever,
            or a stage is missing.
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
        if drop_near_duplicates is not None and not 0 <= drop_near_duplicates < 1:
            raise ValueError(f"drop_near_duplicates must lie in [0, 1), got {drop_near_duplicates}")
        root = split_path(path, split)
        queries = opened.split(split)
        search = NeighborSearch(opened, retriever)
        embeddings = read_embeddings(root, split, manifest) if search.needs_embeddings else None
        record = manifest.splits[split]
        chunk_shards = record.chunk_shards
        options = {
            "num_neighbors": num_neighbors,
            "retriever": retriever,
            "drop_near_duplicates": drop_near_duplicates,
        }
        stage = record.neighbors = record.neighbors or NeighborsStage(options, shards=[])
        stage.options.setdefault("retriever", "dense")  # older manifests do not record it
        check_options("neighbors", options, stage.options)
        record.check_made_of_chunks("neighbors", f"run `retro neighbors --split {split} --force`")
        write_manifest(path, manifest)
        search.open()
        names = [shard.name for shard in chunk_shards]
        is_joined = [not use_gpus and can_join(opened, retriever, min(shard.rows, QUERIES)) for shard in chunk_shards]
        join = None
        if use_gpus and search.needs_embeddings:
            search = NeighborSearch(opened, retriever, to_gpus(opened.index, shard_index))
        elif any(is_joined[shard] for shard in unfinished_shards(root / "neighbors", stage.shards, names)):
            join = ListJoin(opened, read_embeddings(path, TRAIN_SPLIT, manifest, verify=split != TRAIN_SPLIT))
        features = neighbor_features(num_neighbors)

        def make(shard: int, temporary: Path, advance: Callable[[int], Any]) -> dict[str, Any]:
            parts, counts = [], {}
            vectors = None
            if embeddings is not None:
                vectors, embeddings[shard] = embeddings[shard], None  # so that the pages of the file are released
            block_size, rows = _QUERIES, chunk_shards[shard].rows
            if is_joined[shard]:
                block_size = -(-rows // max(1, round(rows / QUERIES)))  # passes of about the same size
            for start in range(0, rows, block_size):
                block = slice(start, start + block_size)
                columns = {name: part[block] for name, part in queries.chunks.shard(shard).items()}
                mask = np.arange(opened.chunk_size) < columns["length"][:, None]
                wanted = None if vectors is None else vectors[block].astype(np.float32)
                unwanted = _unwanted(opened, columns, mask, queries.searched, drop_near_duplicates)
                nearest = None
                if is_joined[shard]:
                    documents = columns["document_id"] if queries.searched else np.full(len(wanted), -1)
                    nearest = partial(join, wanted, documents, unwanted=unwanted)
                ids, scores, found = search(
                    columns["input_ids"], mask, wanted, num_neighbors, unwanted, nearest=nearest
                )
                parts.append((ids, scores))
                counts = {name: counts.get(name, 0) + number for name, number in found.items()}
                advance(len(ids))
            empty = (np.zeros((0, num_neighbors), dtype=np.int64), np.zeros((0, num_neighbors), dtype=np.float32))
            ids, scores = (np.concatenate(part) for part in zip(empty, *parts, strict=True))
            save_shard(temporary, {"neighbor_ids": ids, "neighbor_scores": scores}, features)
            return {
                "rows": len(ids),
                "counts": counts,
                "chunks_sha256": chunk_shards[shard].sha256,
                "index": fingerprint,
                **({"removed": removed} if removed is not None else {}),
                **({"folder": chunk_shards[shard].name + suffix} if suffix else {}),
            }

        fingerprint, removed = searched_version(manifest)
        # Readers of an earlier version of the datastore keep its neighbors.
        suffix = f".v{manifest.version}" if manifest.version else ""
        records = run_shards(
            root / "neighbors",
            stage.shards,
            names,
            make,
            suffix,
            f"Neighbors of {split}",
            sizes=[shard.rows for shard in chunk_shards],
        )
        if process_state().is_main_process:
            remove_shared_work(path)
        stage.shards = [NeighborShard.from_dict(record) for record in records]
        totals = [shard.counts for shard in stage.shards]
        stage.counts = {name: sum(total.get(name, 0) for total in totals) for name in sorted(set().union(*totals))}
        write_manifest(path, manifest)
        clear_records(root / "neighbors")
        return stage


def _unwanted(
    datastore: RetroDatastore,
    columns: dict[str, np.ndarray],
    mask: np.ndarray,
    searched: bool,
    threshold: float | None,
) -> dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]:
    """Makes the filters of a block of query chunks, which are given as columns of their shard."""
    unwanted = removed_filter(datastore)
    if searched:
        unwanted["own_document"] = other_document_filter(datastore.chunks, columns["document_id"])
    if threshold is not None:
        unwanted["near_duplicates"] = near_duplicate_filter(datastore.chunks, columns["input_ids"], mask, threshold)
    return unwanted


def near_duplicate_filter(
    chunks: ChunkTable, input_ids: np.ndarray, mask: np.ndarray, threshold: float
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """
    Makes a filter for `search` that drops results which hold more than a share of the tokens of the query chunk.

    Args:
        chunks ([`ChunkTable`]): The searched chunks.
        input_ids (`np.ndarray`): Integers [n, m], the tokens of the queries.
        mask (`np.ndarray`): bool [n, m], False at padding.
        threshold (`float`): The share.

    Returns:
        `Callable`: (rows [q], ids [q, width]) -> bool [q, width].
    """

    def is_near_duplicate(rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        flat, query = ids.reshape(-1), np.repeat(rows, ids.shape[1])
        share = np.zeros(len(flat))
        for start in range(0, len(flat), _PAIRS):
            part = slice(start, start + _PAIRS)
            other, other_mask = chunks.take(flat[part])
            own, own_mask = input_ids[query[part]], mask[query[part]]
            equal = (own[:, :, None] == other[:, None, :]) & other_mask[:, None, :]  # [pairs, m, m]
            share[part] = (equal.any(axis=2) & own_mask).sum(axis=1) / own_mask.sum(axis=1)
        return (share > threshold).reshape(ids.shape)

    return is_near_duplicate
