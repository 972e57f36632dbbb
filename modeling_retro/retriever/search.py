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
"""Searches the index of a datastore: by vectors, by words, by both, or by vectors with exact scores"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from ..datastore.chunks import ChunkTable
from ..datastore.datastore import RetroDatastore, faiss  # if faiss is missing, this import names the extras
from ..datastore.manifest import INDEXES
from ..encoder.chunk_encoder import text_mask
from .ranking import fuse, rerank


# Number of results of each search that `hybrid` joins, or that `rerank` reorders.
DEPTH = 64
# The largest number of results of a query that a GPU index can return.
_MOST_ON_GPU = 2048


def search(
    index: faiss.Index,
    queries: np.ndarray,
    k: int,
    unwanted: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] | None = None,
    fetch: int | None = None,
    wide_index: faiss.Index | None = None,
    max_results: int = 1 << 22,
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """
    Searches for k wanted results. It fetches more and more results until they are found or the index is exhausted.

    Args:
        index (`faiss.Index` or [`~modeling_retro.datastore.bm25.Bm25Index`]): The index.
        queries (`np.ndarray`): float32 [n, dim], or int64 [n, terms] for BM25.
        k (`int`): Number of results of a query.
        unwanted (`Mapping[str, Callable]`, *optional*):
            Functions (rows of queries [q], ids [q, width]) -> bool [q, width], True for results that must not be
            returned. The names are the reasons under which these results are counted.
        fetch (`int`, *optional*):
            Number of results of the first fetch. Defaults to 2 k + 8, or to k if no results are unwanted.
        wide_index (`faiss.Index`, *optional*): Index to search if a GPU index cannot return enough results.
        max_results (`int`, *optional*, defaults to 4,194,304): Largest number of results in memory.

    Returns:
        `tuple`: ids int64 [n, k] (best first, equal scores by id, -1 if absent), scores float32 [n, k] (0 if absent),
        and counts: `refetched` queries, `short` queries with fewer than k results, and results dropped for each
        reason.
    """
    unwanted = unwanted or {}
    ids = np.full((len(queries), k), -1, dtype=np.int64)
    scores = np.zeros((len(queries), k), dtype=np.float32)
    counts = {"refetched": 0, "short": 0, **dict.fromkeys(unwanted, 0)}
    pending = np.arange(len(queries) if k and index.ntotal else 0)
    width, factor = min(fetch or (2 * k + 8 if unwanted else k), index.ntotal), 1
    while len(pending):
        used = wide_index if wide_index is not None and width > _MOST_ON_GPU else index
        short = []
        with _probing(used, factor) as (all_lists, candidates):
            block = max(1, max_results // math.ceil(candidates * width))
            for start in range(0, len(pending), block):
                rows = pending[start : start + block]
                ids[rows], scores[rows], dropped, ended = _search_block(used, queries, rows, k, width, unwanted)
                done = (ids[rows, -1] >= 0) | (all_lists & (ended | (width == index.ntotal)))
                for reason, number in dropped.items():
                    counts[reason] += int(number[done].sum())
                short.append(rows[~done])
        pending = np.concatenate(short)
        counts["refetched"] += len(pending)
        width, factor = min(4 * width, index.ntotal), 4 * factor
    counts["short"] = int((ids[:, k - 1 :] < 0).any(axis=1).sum())
    return ids, scores, counts


@contextmanager
def _probing(index: faiss.Index, factor: int) -> Iterator[tuple[bool, float]]:
    """
    Multiplies nprobe of an inverted file inside the context, and yields whether the whole index is then searched, and
    the number of results that an index with refined codes scores for each that it returns. If `factor` times as many
    are returned, this number falls to 4 at least.
    """
    ivf = faiss.try_extract_index_ivf(index) if isinstance(index, faiss.Index) else None
    refined = faiss.downcast_index(index) if isinstance(index, faiss.Index) else None
    refined = refined if isinstance(refined, faiss.IndexRefine) else None
    candidates = 1.0 if refined is None else refined.k_factor
    nprobe = None if ivf is None else ivf.nprobe
    if ivf is not None:
        ivf.nprobe = min(factor * nprobe, ivf.nlist)
    if refined is not None:
        refined.k_factor = min(candidates, max(4.0, candidates / factor))
    try:
        yield ivf is None or ivf.nprobe == ivf.nlist, 1.0 if refined is None else refined.k_factor
    finally:
        if ivf is not None:
            ivf.nprobe = nprobe
        if refined is not None:
            refined.k_factor = candidates


def _search_block(
    index: faiss.Index,
    queries: np.ndarray,
    rows: np.ndarray,
    k: int,
    width: int,
    unwanted: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """
    The first k wanted ids and scores [q, k] of `width` results, how many were dropped for each reason [q], and whether
    there was nothing more to find [q].
    """
    found_scores, found = index.search(np.ascontiguousarray(queries[rows]), width)
    ended = found[:, -1] < 0
    wanted = found >= 0
    dropped = {}
    for reason, function in unwanted.items():
        drop = wanted & function(rows, found)
        dropped[reason] = drop.sum(axis=1)
        wanted &= ~drop
    sign = -1 if index.metric_type == faiss.METRIC_INNER_PRODUCT else 1
    order = np.lexsort((found, sign * found_scores, ~wanted), axis=-1)[:, :k]
    found = np.take_along_axis(np.where(wanted, found, -1), order, axis=1)
    found_scores = np.where(found >= 0, np.take_along_axis(found_scores, order, axis=1), 0)
    missing = ((0, 0), (0, k - found.shape[1]))
    return np.pad(found, missing, constant_values=-1), np.pad(found_scores, missing), dropped, ended


def other_document_filter(chunks: ChunkTable, documents: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """
    A filter for [`search`] that drops results of the query's own document.

    Args:
        chunks ([`ChunkTable`]): The searched chunks.
        documents (`np.ndarray`): int64 [n], the document of each query, -1 for a text outside the datastore.

    Returns:
        `Callable`: (rows [q], ids [q, width]) -> bool [q, width].
    """

    def is_own(rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        return (chunks.gather("document_id", ids) == documents[rows, None]) & (ids >= 0)

    return is_own


def removed_filter(datastore: RetroDatastore) -> dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]:
    """
    Makes filters for [`search`] that drop the chunks of removed documents. Without any, there are no filters.

    Args:
        datastore ([`RetroDatastore`]): The searched datastore.

    Returns:
        `dict[str, Callable]`: (rows [q], ids [q, width]) -> bool [q, width], under the reason `"removed"`.
    """
    return {"removed": lambda _, ids: datastore.is_removed(ids)} if datastore.manifest.removed is not None else {}


class NeighborSearch:
    """
    One way to find the neighbors of chunks in a datastore.

    | retriever | finds |
    |---|---|
    | `dense` | the chunks with the nearest embeddings |
    | `bm25` | the chunks that share the most and the rarest terms with the chunk |
    | `hybrid` | the chunks that are high in both lists, by reciprocal rank fusion of the first 64 of each |
    | `rerank` | among the 64 nearest by embedding, the chunks that share the longest run of tokens with the chunk |

    Args:
        datastore ([`RetroDatastore`]): The datastore to search.
        retriever (`str`, *optional*): One of these names. Defaults to `datastore.retriever`.
        index (`faiss.Index`, *optional*): Index to search in place of that of the datastore, such as a copy on GPUs.

    Raises:
        ValueError: If there is no such retriever, or the datastore lacks the index it needs.
    """

    def __init__(self, datastore: RetroDatastore, retriever: str | None = None, index: faiss.Index | None = None):
        retriever = retriever or datastore.retriever
        if retriever not in INDEXES:
            raise ValueError(f"retriever is {retriever!r}, expected one of {', '.join(INDEXES)}")
        self.datastore = datastore
        self.retriever = retriever
        self.needs_embeddings = "index" in INDEXES[retriever]
        self._index = index

    def open(self) -> None:
        """Opens the indexes before the first search. Raises a `ValueError` if one is missing or outdated."""
        for name in INDEXES[self.retriever]:
            getattr(self.datastore, name)

    def __call__(
        self,
        input_ids: np.ndarray,
        mask: np.ndarray,
        embeddings: np.ndarray | None,
        k: int,
        unwanted: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] | None = None,
        fetch: int | None = None,
        nearest: Callable[[int], tuple[np.ndarray, np.ndarray, dict[str, int]]] | None = None,
    ) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        """
        Finds the neighbors of chunks.

        Args:
            input_ids (`np.ndarray`): Integers [n, m], the tokens of the chunks.
            mask (`np.ndarray`): bool [n, m], False at padding.
            embeddings (`np.ndarray`): float32 [n, dim], the embeddings of the chunks; None for `"bm25"`.
            k (`int`): Number of neighbors of a chunk.
            unwanted (`Mapping[str, Callable]`, *optional*): Filters, as [`search`] takes them.
            fetch (`int`, *optional*): Results of the first fetch, as [`search`] takes it.
            nearest (`Callable`, *optional*):
                Finds so many of the nearest embeddings, as [`search`] returns them. Defaults to a search in the index.

        Returns:
            `tuple`: ids int64 [n, k] (-1 absent; best first), scores float32 [n, k] (0 where absent), and counts, as
            [`search`] returns them. Scores are those of the index for `dense` and `bm25`, of the fusion for `hybrid`,
            and the tokens of the longest common run for `rerank`.
        """
        datastore, tokenizer = self.datastore, self.datastore.tokenizer
        number = k if self.retriever in ("dense", "bm25") else max(k, DEPTH)
        found = []
        if nearest is not None:
            found.append(nearest(number))
        elif self.needs_embeddings:
            index = datastore.index if self._index is None else self._index
            found.append(search(index, embeddings, number, unwanted, fetch, datastore.index))
        if "bm25" in INDEXES[self.retriever]:
            queries = datastore.bm25.queries(input_ids, mask, tokenizer)
            found.append(search(datastore.bm25, queries, number, unwanted, fetch))
        ids, scores, counts = found[0]
        if self.retriever == "hybrid":
            ids, scores = fuse(ids, found[1][0], k)
            counts = {name: value + found[1][2][name] for name, value in counts.items()}
        elif self.retriever == "rerank":
            ids, scores = rerank(datastore.chunks, input_ids, text_mask(input_ids, mask, tokenizer), ids, k)
        counts["short"] = int((ids[:, k - 1 :] < 0).any(axis=1).sum())
        return ids, scores, counts
