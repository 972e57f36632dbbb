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
"""The chunks of a datastore: token ids, lengths and documents, in Arrow files"""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from .record import PLAIN_NAME


class ChunkTable:
    """
    The chunks of one split, read-only. They are zero-copy views of the Arrow files of its shards, which are opened on
    first use.

    Args:
        folders (`Sequence[Path]`): Folders written by `datasets.Dataset.save_to_disk`, in the order of the chunk ids.
        rows (`Sequence[int]`): Number of chunks in each folder.
        chunk_size (`int`): Number m of tokens in a chunk.
    """

    def __init__(self, folders: Sequence[Path], rows: Sequence[int], chunk_size: int):
        self.folders = list(folders)
        self.chunk_size = chunk_size
        self.offsets = np.concatenate([[0], np.cumsum(np.asarray(rows, dtype=np.int64))]).astype(np.int64)
        # Each mapped file needs a file descriptor, and a large datastore has more shards than a process may open
        # files.
        self._shard = lru_cache(maxsize=256)(self._open)
        self._columns: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __repr__(self) -> str:
        return f"ChunkTable({len(self)} chunks of {self.chunk_size} tokens in {len(self.folders)} shards)"

    def __getstate__(self) -> dict[str, Any]:
        return {"folders": self.folders, "rows": np.diff(self.offsets).tolist(), "chunk_size": self.chunk_size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    @property
    def length(self) -> np.ndarray:
        """`np.ndarray` int32 [N]: Number of real tokens in each chunk. The rest of a chunk is padding."""
        return self._column("length")

    @property
    def document_id(self) -> np.ndarray:
        """`np.ndarray` int64 [N]: Document of each chunk, ascending. The chunks of a document are consecutive."""
        return self._column("document_id")

    @property
    def num_bytes(self) -> np.ndarray:
        """`np.ndarray` int64 [N]: Number of UTF-8 bytes of the source text that the tokens of each chunk cover."""
        return self._column("num_bytes")

    def take(self, chunk_ids: Any) -> tuple[np.ndarray, np.ndarray]:
        """
        Gathers chunks.

        Args:
            chunk_ids (`np.ndarray`): Integers of any shape [...]; -1 stands for an absent chunk.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: token ids int64 [..., m] (0 where masked) and mask bool [..., m].
        """
        chunk_ids = np.asarray(chunk_ids, dtype=np.int64)
        length = self.gather("length", chunk_ids)
        mask = np.arange(self.chunk_size) < length[..., None]
        return self.gather("input_ids", chunk_ids).astype(np.int64) * mask, mask

    def gather(self, column: str, chunk_ids: np.ndarray) -> np.ndarray:
        """
        Gathers the values of a column for chunks of any shape [...]. Absent chunks (-1) get zeros.

        Args:
            column (`str`): `"input_ids"`, `"length"`, `"document_id"` or `"num_bytes"`.
            chunk_ids (`np.ndarray`): int64 [...].

        Returns:
            `np.ndarray`: [...], or [..., m] for the token ids.
        """
        flat = np.asarray(chunk_ids, dtype=np.int64).reshape(-1)
        if flat.size and (flat.max() >= len(self) or flat.min() < -1):
            raise ValueError(f"chunk ids must lie in [-1, {len(self) - 1}], got {flat.min()} to {flat.max()}")
        shards = np.searchsorted(self.offsets, flat, side="right") - 1
        order = np.argsort(shards, kind="stable")
        order = order[np.count_nonzero(shards < 0) :]
        first = self._shard(0)[column]
        values = np.zeros((len(flat), *first.shape[1:]), dtype=first.dtype)
        bounds = np.flatnonzero(np.diff(shards[order])) + 1
        for positions in np.split(order, bounds) if order.size else []:
            shard = int(shards[positions[0]])
            values[positions] = self._shard(shard)[column][flat[positions] - self.offsets[shard]]
        return values.reshape((*np.shape(chunk_ids), *first.shape[1:]))

    def shard(self, index: int) -> dict[str, np.ndarray]:
        """
        The columns of one shard as views of its file: `input_ids` [n, m], `length`, `document_id`, `num_bytes` [n].
        """
        return self._shard(index)

    def _column(self, name: str) -> np.ndarray:
        if name not in self._columns:
            parts = [self._shard(index)[name] for index in range(len(self.folders))]
            self._columns[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return self._columns[name]

    def _open(self, index: int) -> dict[str, np.ndarray]:
        columns = read_columns(self.folders[index])
        rows, width = columns["input_ids"].shape
        expected = int(self.offsets[index + 1] - self.offsets[index])
        if width != self.chunk_size:
            raise ValueError(
                f"{self.folders[index]} holds chunks of {width} tokens, the manifest says {self.chunk_size}"
            )
        if rows != expected:
            raise ValueError(f"{self.folders[index]} holds {rows} chunks, the manifest says {expected}")
        return columns


def load_shard(folder: Path) -> datasets.Dataset:
    """Opens a shard as a memory-mapped dataset. Raises a `ValueError` if its list of files leads out of its folder."""
    for file in json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]:
        if not PLAIN_NAME.fullmatch(file["filename"]):
            raise ValueError(f"{folder / 'state.json'} names {file['filename']!r}, expected a name without a path")
    return datasets.load_from_disk(str(folder))


def read_columns(folder: Path) -> dict[str, np.ndarray]:
    """
    Reads the columns of a folder that `datasets.Dataset.save_to_disk` wrote, as zero-copy views of its memory-mapped
    file.

    Args:
        folder (`Path`): The folder. If its file has several record batches, they are copied into one array.

    Returns:
        `dict[str, np.ndarray]`: [n] for scalar columns, [n, width] for fixed-size lists.
    """
    try:
        table = load_shard(folder).data
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot read the shard {folder}: {error}") from error
    columns = {}
    for name in table.column_names:
        pieces = []
        for piece in table.column(name).chunks:
            if pa.types.is_fixed_size_list(piece.type):
                pieces.append(piece.flatten().to_numpy(zero_copy_only=True).reshape(-1, piece.type.list_size))
            else:
                pieces.append(piece.to_numpy(zero_copy_only=True))
        columns[name] = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return columns
