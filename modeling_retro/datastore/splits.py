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
"""A split of a datastore: its chunks and their neighbors, without removed documents"""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .checksums import verify_file
from .chunks import ChunkTable, read_columns
from .documents import DocumentSource, DocumentTable
from .manifest import TRAIN_SPLIT, SplitRecord
from .versions import HeldVersion


def split_path(path: Path, split: str) -> Path:
    """Folder of a split. The training split is in the folder of the datastore itself, others are in `splits/NAME`."""
    return path if split == TRAIN_SPLIT else path / "splits" / split


class DatastoreSplit:
    """
    The chunks of one split, and their neighbors among the searched chunks.

    Args:
        path (`Path`): Folder of the split: the datastore itself, or `splits/NAME` in it.
        record ([`SplitRecord`]): The record of the split in the manifest.
        chunk_size (`int`): Number m of tokens in a chunk.
        searched (`bool`): Whether these chunks are also searched, so that a chunk must not find its own document.
    """

    def __init__(self, path: Path, record: SplitRecord, chunk_size: int, searched: bool):
        self.path = path
        self._held: HeldVersion | None = None
        self._is_removed: RemovedChunks | None = None
        self.record = record
        self.searched = searched
        if not record.is_chunked:
            raise ValueError(f"{path} has no finished chunks; run `retro chunk` (again)")
        shards = record.chunk_shards
        folders = [path / "chunks" / shard.name for shard in shards]
        missing = [str(folder) for folder in folders if not folder.is_dir()]
        if missing:
            raise ValueError(f"the shard {missing[0]} is missing ({len(missing)} of {len(shards)} shards are)")
        self.chunks = ChunkTable(folders, [shard.rows for shard in shards], chunk_size)

    @cached_property
    def _documents(self) -> DocumentTable:
        return DocumentTable([self.path / "documents" / f"{shard.name}.parquet" for shard in self.record.chunk_shards])

    def sources(self, chunk_ids: Any) -> list[DocumentSource | None]:
        """
        Says which documents chunks are from.

        Args:
            chunk_ids (`np.ndarray`): Integers [n], ids of chunks of this split; -1 stands for an absent chunk.

        Returns:
            `list[DocumentSource | None]`: `None` where nothing is known, as in a datastore of the Hub or of before.
        """
        chunk_ids = np.asarray(chunk_ids, dtype=np.int64)
        shards = np.searchsorted(self.chunks.offsets, chunk_ids, side="right") - 1  # -1 for -1
        return self._documents.sources(shards.tolist(), self.chunks.gather("document_id", chunk_ids).tolist())

    @cached_property
    def _neighbors(self) -> dict[str, np.ndarray]:
        shards, number = self.record.neighbor_shards, len(self.record.chunk_shards)
        if len(shards) < number:
            raise ValueError(
                f"{self.path} has neighbors for {len(shards)} of {number} shards of chunks; run `retro neighbors`"
            )
        self.record.check_made_of_chunks("neighbors", "run `retro neighbors --force`")
        parts = [read_columns(self.path / "neighbors" / shard.folder_name) for shard in shards]
        columns = {
            name: parts[0][name] if len(parts) == 1 else np.concatenate([part[name] for part in parts])
            for name in ("neighbor_ids", "neighbor_scores")
        }
        return columns if self._is_removed is None else drop_neighbors(columns, self._is_removed)

    @property
    def neighbor_ids(self) -> np.ndarray:
        """
        `np.ndarray` int64 [n, K]: Global ids of the searched chunks, best first. -1 if there are fewer, for example
        because a neighbor was removed.
        """
        return self._neighbors["neighbor_ids"]

    @property
    def neighbor_scores(self) -> np.ndarray:
        """`np.ndarray` float32 [n, K]: Scores of `neighbor_ids` in the metric of the index."""
        return self._neighbors["neighbor_scores"]


def drop_neighbors(
    columns: Mapping[str, np.ndarray], is_dropped: Callable[[np.ndarray], np.ndarray]
) -> dict[str, np.ndarray]:
    """
    Drops some of the stored neighbors. Those behind move up, and the places at the end become empty.

    Args:
        columns (`Mapping[str, np.ndarray]`): `neighbor_ids` int64 [n, K] and `neighbor_scores` float32 [n, K].
        is_dropped (`Callable`): Maps ids [n, K] to bool [n, K], True for those to drop.
    """
    ids = columns["neighbor_ids"]
    kept = (ids >= 0) & ~is_dropped(ids)
    order = np.argsort(~kept, axis=1, kind="stable")
    kept = np.take_along_axis(kept, order, axis=1)
    empty = {"neighbor_ids": -1, "neighbor_scores": 0}
    return {
        name: np.where(kept, np.take_along_axis(columns[name], order, axis=1), value).astype(columns[name].dtype)
        for name, value in empty.items()
    }


class RemovedChunks:
    """Says of chunk ids [...] which are of removed documents, whose numbers a file lists."""

    def __init__(self, chunks: ChunkTable, file: Path, sha256: str):
        self.chunks = chunks
        self.file = file
        self.sha256 = sha256

    @cached_property
    def documents(self) -> np.ndarray:
        return np.load(verify_file(self.file, self.sha256), allow_pickle=False)

    def __call__(self, chunk_ids: np.ndarray) -> np.ndarray:
        return np.isin(self.chunks.gather("document_id", chunk_ids), self.documents) & (chunk_ids >= 0)
