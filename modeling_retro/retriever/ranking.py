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
"""Joins lists of neighbors or reorders them"""

import numpy as np

from ..datastore.chunks import ChunkTable


# Place p of a list, counted from 1, has the score 1 / (60 + p) (Cormack, Clarke and Buettcher, 2009).
_FUSION = 60
_PAIRS = 4096


def fuse(first: np.ndarray, second: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Joins two ranked lists by reciprocal rank fusion: an id gets the score 1 / (60 + place) for each list that holds
    it.

    Args:
        first (`np.ndarray`), second (`np.ndarray`): int64 [n, w], distinct ids, best first, -1 for absent ones.
        k (`int`): Number of results.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: ids int64 (equal scores by id, -1 if absent) and scores float32, both [n, k].
    """
    ids = np.concatenate([first, second], axis=1)
    worth = np.concatenate([1 / (_FUSION + 1 + np.arange(part.shape[1])) for part in (first, second)])
    order = np.argsort(ids, axis=1, kind="stable")
    ids, scores = np.take_along_axis(ids, order, axis=1), worth[order]
    again = np.zeros(ids.shape, dtype=bool)
    again[:, 1:] = ids[:, 1:] == ids[:, :-1]  # an id occurs at most twice
    scores[:, :-1] += np.where(again[:, 1:], scores[:, 1:], 0)
    return _best(np.where(again, -1, ids), scores, k)


def rerank(
    chunks: ChunkTable, input_ids: np.ndarray, mask: np.ndarray, ids: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """
    Orders results by the longest run of tokens that they share with the query. Equal results keep their order.

    Args:
        chunks ([`ChunkTable`]): The searched chunks.
        input_ids (`np.ndarray`): Integers [n, m], the tokens of the queries.
        mask (`np.ndarray`): bool [n, m], False at padding.
        ids (`np.ndarray`): int64 [n, w], the results, best first, -1 for absent ones.
        k (`int`): Number of results that are kept.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: ids int64 (-1 if absent) and scores float32 (number of tokens of the run),
        both [n, k].
    """
    queries = np.where(mask, input_ids.astype(np.int64), -1)
    runs = np.zeros(ids.shape, dtype=np.float32)
    rows = max(1, _PAIRS // max(ids.shape[1], 1))
    for start in range(0, len(ids), rows):
        part = slice(start, start + rows)
        tokens, real = chunks.take(ids[part])
        runs[part] = longest_common_substring(queries[part, None], np.where(real, tokens, -2))
    return _best(ids, runs, k)


def _best(ids: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k ids with the highest scores, with absent ones last. Equal scores keep their order."""
    order = np.lexsort((-scores, ids < 0), axis=-1)[:, :k]
    ids = np.take_along_axis(ids, order, axis=1)
    return ids, np.where(ids >= 0, np.take_along_axis(scores, order, axis=1), 0).astype(np.float32)


def longest_common_substring(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """
    Computes the length of the longest run of tokens that two sequences share.

    Args:
        first (`np.ndarray`): Token ids [..., n].
        second (`np.ndarray`): Token ids [..., p], with the same or broadcastable leading dimensions.

    Returns:
        `np.ndarray`: int64 [...].
    """
    shape = np.broadcast_shapes(first.shape[:-1], second.shape[:-1])
    # run[..., j] is the length of the common run that ends at the current token of `first` and token j - 1 of
    # `second`.
    run = np.zeros((*shape, second.shape[-1] + 1), dtype=np.int16)
    longest = np.zeros(shape, dtype=np.int64)
    for i in range(first.shape[-1]):
        run[..., 1:] = np.where(first[..., i, None] == second, run[..., :-1] + 1, 0)
        longest = np.maximum(longest, run.max(-1))
    return longest
