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
"""Searches an index whose vectors lie on the disk, and reads those of many results at once"""

import ctypes
import mmap
from typing import Any

import faiss
import numpy as np


# Results whose vectors are asked for at once, and which are then scored.
_RESULTS = 1 << 15


class IndexRefineOnDisk(faiss.IndexRefine):
    """
    An `IndexRefine` that asks the operating system for the vectors of many results before it scores the first of them.
    faiss scores one result after another, and waits for the disk each time.

    Args:
        base_index (`faiss.Index`): The index of codes.
        refine_index (`faiss.Index`):
            The memory-mapped vectors. If they are neither 16- nor 32-bit floats, faiss searches as always.
    """

    # faiss lets an object have no other attributes than its class.
    _vectors: np.ndarray | None = None
    _advise: Any = None

    def __init__(self, base_index: faiss.Index, refine_index: faiss.Index):
        super().__init__(base_index, refine_index)
        dtype = _dtype(refine_index)
        if dtype is not None and refine_index.ntotal and hasattr(mmap, "MADV_WILLNEED"):
            data = faiss.rev_swig_ptr(refine_index.codes.data(), refine_index.codes.size())
            self._vectors = data.view(dtype).reshape(refine_index.ntotal, refine_index.d)
            self._advise = ctypes.CDLL(None).madvise
            self._advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
            first = self._vectors.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
            self._advise(first, data.nbytes, mmap.MADV_RANDOM)  # pages beside those of results are not read

    def search(self, x: np.ndarray, k: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """Distances float32 [n, k] and ids int64 [n, k] of the nearest vectors, as faiss returns them."""
        if self._vectors is None or options:
            return super().search(x, k, **options)
        width = min(int(k * self.k_factor), self.ntotal)
        step = max(1, _RESULTS // width)
        distances, ids = np.empty((len(x), k), dtype=np.float32), np.full((len(x), k), -1, dtype=np.int64)
        waiting: list[tuple[slice, np.ndarray]] = []
        for start in range(0, len(x), step):
            rows = slice(start, start + step)
            waiting.append((rows, self.base_index.search(x[rows], width)[1]))
            self._read(waiting[-1][1])
            if len(waiting) > 1:  # while their vectors were read, the next results were searched
                self._score(x, *waiting.pop(0), distances, ids)
        for rows, found in waiting:
            self._score(x, rows, found, distances, ids)
        return distances, ids

    def _read(self, found: np.ndarray) -> None:
        """Asks for the pages of the vectors, in their order on the disk."""
        size = self._vectors.strides[0]
        first = self._vectors.ctypes.data + np.unique(found[found >= 0]) * size
        pages = np.unique(np.concatenate([first, first + size - 1]) // mmap.PAGESIZE)
        starts = np.flatnonzero(np.diff(pages, prepend=-2) != 1)
        lengths = np.diff(starts, append=len(pages))
        for page, length in zip(pages[starts].tolist(), lengths.tolist(), strict=True):
            self._advise(page * mmap.PAGESIZE, length * mmap.PAGESIZE, mmap.MADV_WILLNEED)

    def _score(self, x: np.ndarray, rows: slice, found: np.ndarray, distances: np.ndarray, ids: np.ndarray) -> None:
        sign = -1 if self.metric_type == faiss.METRIC_INNER_PRODUCT else 1
        for row, result in enumerate(found, rows.start):
            result = result[result >= 0]
            vectors = self._vectors[result].astype(np.float32)
            score = vectors @ x[row] if sign < 0 else ((vectors - x[row]) ** 2).sum(axis=1)
            order = np.argsort(sign * score, kind="stable")[: ids.shape[1]]
            ids[row, : len(order)], distances[row, : len(order)] = result[order], score[order]
            distances[row, len(order) :] = sign * np.finfo(np.float32).max


def _dtype(index: faiss.Index) -> type | None:
    if isinstance(index, faiss.IndexScalarQuantizer) and index.sq.qtype == faiss.ScalarQuantizer.QT_fp16:
        return np.float16
    return np.float32 if isinstance(index, faiss.IndexFlat) else None
