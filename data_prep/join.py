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
Finds the neighbors of many queries at once, one inverted list after another instead of one query after another.

Each list is multiplied with all queries that probe it, as matrices of 8-bit integers, along those directions only in
which the vectors differ most. Of the products, only those are looked at that lie above the worst which a query has
kept so far. The few that each query keeps are scored again by the embeddings. `faiss.contrib.big_batch_search` goes
through the lists in the same way, with 32-bit floats and all results of a list.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch

from data_prep.shares import SHARED_WORK, Follower, NotBegunError, remove_shared_work
from data_prep.stage_files import process_state
from modeling_retro.datastore.datastore import RetroDatastore, faiss
from modeling_retro.datastore.manifest import INDEXES
from modeling_retro.durable_files_retro import make_folder, whole
from modeling_retro.retriever.search import search


Filter = Callable[[np.ndarray, np.ndarray], np.ndarray]

# Queries of one pass over the lists, or up to half as many again. Their probes, results and bytes are what a pass
# holds in memory.
QUERIES = 1 << 17
# Sizes of the groups of lists, when lists are chosen by the best of each group.
_GROUPS = (8, 4, 2)
# The directions of the copy hold this share of the variance. Their number is a multiple of what registers hold.
_VARIANCE, _DIRECTIONS = 0.93, 32
# With fewer queries for each list, the search query by query is as fast.
_QUERIES_OF_A_LIST = 64
# Products of one multiplication: few enough for the caches, and so many that the calls cost little.
_PRODUCTS = 1 << 19
# A multiple of so many vectors is multiplied in less time: a list takes the first of the next one with it.
_VECTORS = 16
# A query keeps 2 k results and these. They make up for near duplicates, and for what 8 bits put into another order.
_SPARE = 12
# Ends of the parts into which the lists of a pass are cut, in sixteenths. After each part the queries drop all but
# their best results, which are a high bar for the next, larger part.
_PARTS = (0, 1, 2, 4, 8, 16)
_EMPTY = np.iinfo(np.int32).min
# Rows of a sample, and those that are read at once to write the copy; and those that are scored at once.
_SAMPLE, _ROWS = 1 << 16, 512


def can_join(datastore: RetroDatastore, retriever: str, queries: int) -> bool:
    """
    Whether the neighbors of so many queries are found faster list by list. That needs an inverted file of inner
    products, the embeddings, enough queries for its lists, and a processor that multiplies 8-bit integers (AVX-512
    VNNI).

    Args:
        datastore ([`RetroDatastore`]): The searched datastore.
        retriever (`str`): The way to find neighbors, of which this is the part that searches embeddings.
        queries (`int`): Number of queries.
    """
    if "index" not in INDEXES[retriever] or not hasattr(torch, "_int_mm") or not _multiplies_bytes():
        return False
    train = datastore.manifest.train
    if len(train.embedding_shards) < len(train.chunk_shards):  # a datastore of the Hub has none
        return False
    index = faiss.downcast_index(datastore.index)
    inner = faiss.downcast_index(index.base_index) if isinstance(index, faiss.IndexRefine) else index
    if not isinstance(inner, faiss.IndexIVF) or inner.metric_type != faiss.METRIC_INNER_PRODUCT:
        return False
    return queries * inner.nprobe >= _QUERIES_OF_A_LIST * inner.nlist


def _multiplies_bytes() -> bool:
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not tell
    return bool(capabilities.get("avx512_vnni", False))


class ListJoin:
    """
    A copy of the embeddings in 8 bits, in the order of the lists of the index, and the search in it. All processes map
    the same copy, which one of them makes. Chunks of removed documents are left out.

    Args:
        datastore ([`RetroDatastore`]): The searched datastore, for which [`can_join`] holds.
        embeddings (`Sequence[np.ndarray]`): float16 [chunks of the shard, dim], the embeddings of its shards.
    """

    def __init__(self, datastore: RetroDatastore, embeddings: Sequence[np.ndarray]):
        self.datastore = datastore
        self.embeddings = embeddings
        self.offsets = np.concatenate([[0], np.cumsum([len(array) for array in embeddings])])
        self.ivf = faiss.extract_index_ivf(datastore.index)
        lists = [self._list(number) for number in range(self.ivf.nlist)]
        self.bounds = np.concatenate([[0], np.cumsum([len(ids) for ids in lists])])
        self.ids = np.concatenate(lists)
        self.documents = datastore.chunks.document_id[self.ids]
        centroids = self.ivf.quantizer.reconstruct_n(0, self.ivf.nlist)
        # Without it the products differ from those of the vectors by the same for all results of a query, and 8 bits
        # are enough where all vectors point in about the same direction.
        self.mean = centroids.mean(axis=0)
        removed = datastore.manifest.removed
        identity = repr((datastore.manifest.index.sha256, removed and removed.sha256, _VECTORS))
        self.folder = datastore.path / (SHARED_WORK + hashlib.sha256(identity.encode()).hexdigest()[:16])
        self._write_copy()
        self.directions = np.load(self.folder / "directions.npy", allow_pickle=False)
        self.centroids = torch.from_numpy(_to_bytes((centroids - self.mean) @ self.directions))
        self.vectors = torch.from_numpy(np.load(self.folder / "vectors.npy", mmap_mode="c", allow_pickle=False))
        self.pool = ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,))

    def __call__(
        self, queries: np.ndarray, documents: np.ndarray, k: int, *, unwanted: Mapping[str, Filter]
    ) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        """
        Finds the nearest chunks of other documents.

        Args:
            queries (`np.ndarray`): float32 [n, dim].
            documents (`np.ndarray`): int64 [n], the document of each query, -1 for a text outside the datastore.
            k (`int`): Number of results of a query.
            unwanted (`Mapping[str, Callable]`): Filters, as [`~modeling_retro.retriever.search.search`] takes them.

        Returns:
            `tuple`: ids int64 [n, k] (best first, equal scores by id, -1 if absent), scores float32 [n, k] (inner
            products of the embeddings, 0 if absent), and counts as those of `search`. The refetched queries are those
            for which filters left too little, so that `search` looked further. A query whose vector is zero is as near
            to any chunk as to another, and has no results.
        """
        positions, own = self._candidates(queries, documents, 2 * k + _SPARE)
        ids = np.where(positions >= 0, self.ids[positions], -1)
        counts = {"refetched": 0, "short": 0, **dict.fromkeys(unwanted, 0)}
        if "own_document" in counts:
            counts["own_document"] = own
        wanted = ids >= 0
        for reason, function in unwanted.items():
            drop = wanted & function(np.arange(len(ids)), ids)
            counts[reason] += int(drop.sum())
            wanted &= ~drop
        scores = self._exact_scores(queries, ids)
        order = np.lexsort((ids, -scores, ~wanted), axis=-1)[:, :k]
        ids = np.take_along_axis(np.where(wanted, ids, -1), order, axis=1)
        scores = np.where(ids >= 0, np.take_along_axis(scores, order, axis=1), 0)
        # What is kept last is the best of what 8 bits tell apart. Results that need it may lack better ones.
        is_sure = wanted[:, : -_SPARE // 2].sum(axis=1) >= k
        rows = np.flatnonzero(~is_sure & queries.any(axis=1))
        if len(rows):
            filters = {
                reason: lambda part, found, function=function: function(rows[part], found)
                for reason, function in unwanted.items()
            }
            ids[rows], scores[rows], further = search(self.datastore.index, queries[rows], k, filters)
            counts = {name: number + further[name] for name, number in counts.items()} | {"refetched": len(rows)}
        counts["short"] = int((ids < 0).any(axis=1).sum())
        return ids, scores, counts

    def _list(self, number: int) -> np.ndarray:
        """int64: The chunks of a list, without those of removed documents."""
        size = self.ivf.invlists.list_size(number)
        if not size:
            return np.zeros(0, dtype=np.int64)
        ids = faiss.rev_swig_ptr(self.ivf.invlists.get_ids(number), size).copy()
        return ids[~self.datastore.is_removed(ids)]

    def _write_copy(self) -> None:
        """Writes int8 [chunks, number], the vectors of the lists one after another, and their directions."""
        state = process_state()
        is_there = (self.folder / "directions.npy").exists()
        if isinstance(state, Follower) and not is_there:
            raise NotBegunError  # the task that was to write it has died; another one does
        if state.is_main_process and not is_there:
            remove_shared_work(self.datastore.path)  # of another index
            make_folder(self.folder)
            place = np.full(self.offsets[-1], -1, dtype=np.int64)
            place[self.ids] = np.arange(len(self.ids))
            step = max(1, int(self.offsets[-1]) // _SAMPLE)
            sample = np.concatenate([array[::step] for array in self.embeddings]).astype(np.float32)
            sample = sample[sample.any(axis=1)] - self.mean
            directions = _directions(sample)
            largest = np.abs(sample @ directions).max(initial=0)
            with whole(self.folder / "vectors.npy") as temporary:
                shape = (len(self.ids) + _VECTORS, directions.shape[1])
                vectors = np.lib.format.open_memmap(temporary, "w+", dtype=np.int8, shape=shape)
                for first, array in zip(self.offsets, self.embeddings, strict=False):
                    for start in range(0, len(array), _SAMPLE):
                        part = (array[start : start + _SAMPLE].astype(np.float32) - self.mean) @ directions
                        rows = place[first + start : first + start + len(part)]
                        vectors[rows[rows >= 0]] = _to_bytes(part, largest)[rows >= 0]
                vectors.flush()
            with whole(self.folder / "directions.npy") as temporary, temporary.open("wb") as file:
                np.save(file, directions)
        state.wait_for_everyone()

    def _candidates(self, queries: np.ndarray, documents: np.ndarray, number: int) -> tuple[np.ndarray, int]:
        """
        Places in `ids` of the results of other documents with the largest 8-bit products, int64 [n, number], -1 if
        absent, and how many products of the queries' own documents were among the largest.
        """
        rows = np.flatnonzero(queries.any(axis=1))
        turned = _to_bytes(queries[rows] @ self.directions, axis=1)
        join = _Pass(self, torch.from_numpy(turned), documents[rows], number)
        # The nearest list first: what a query finds there is a high bar for all others.
        for part in join.choose_lists():
            join.scan(*part)
        found = np.full((len(queries), number), -1, dtype=np.int64)
        found[rows] = join.found
        return found, join.own

    def _exact_scores(self, queries: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """float32 [n, width]: Inner products of the embeddings, of any value where ids are absent."""
        scores = torch.zeros(ids.shape, dtype=torch.float32)
        for start in range(0, len(ids), _ROWS):
            part = ids[start : start + _ROWS]
            vectors = np.zeros((*part.shape, queries.shape[1]), dtype=np.float16)
            shards = np.searchsorted(self.offsets, part, side="right") - 1
            for shard in np.unique(shards[shards >= 0]):
                here = np.nonzero(shards == shard)
                vectors[here] = self.embeddings[shard].take(part[here] - self.offsets[shard], axis=0)
            own = torch.from_numpy(queries[start : start + _ROWS, :, None])
            scores[start : start + _ROWS] = torch.bmm(torch.from_numpy(vectors).float(), own).squeeze(2)
        return scores.numpy()


class _Pass:
    """
    One pass of queries over the lists.

    Args:
        join ([`ListJoin`]): The lists.
        queries (`torch.Tensor`): int8 [n, directions].
        documents (`np.ndarray`): int64 [n].
        number (`int`): Number of results that a query keeps.
    """

    def __init__(self, join: ListJoin, queries: torch.Tensor, documents: np.ndarray, number: int):
        self.join = join
        self.queries = queries.numpy()
        self.documents = documents
        self.found = np.full((len(queries), number), -1, dtype=np.int64)
        self.products = np.full((len(queries), number), _EMPTY, dtype=np.int32)
        self.bar = np.full(len(queries), _EMPTY, dtype=np.int32)  # the last product of each query
        self.own = 0

    def choose_lists(self) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """
        Rows and lists, as integers: first the list with the nearest centroid of each row, then the next nearest. A row
        has an eighth more than the search of one query probes, since only the best of each group of lists are ordered.
        """
        number = len(self.join.centroids)
        nprobe = min(self.join.ivf.nprobe, number)
        group = next((size for size in _GROUPS if number % size == 0 and 3 * nprobe * size <= number), 1)
        dtype = np.uint16 if number <= 1 << 16 else np.int32  # 16 bits are sorted by radix
        step = max(64, _PRODUCTS // number)

        def choose(start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            products = torch._int_mm(torch.from_numpy(self.queries[start : start + step]), self.join.centroids.T)
            best = products.view(len(products), group, -1).amax(dim=1).numpy()
            bar = np.partition(best, -nprobe, axis=1)[:, -nprobe, None]
            products = products.numpy()
            nearest = products.argmax(axis=1)
            is_chosen = products >= bar
            is_chosen[np.arange(len(nearest)), nearest] = False
            row, lists = np.divmod(np.flatnonzero(is_chosen), number)
            return (start + row).astype(np.int32), lists.astype(dtype), nearest.astype(dtype)

        parts = list(self.join.pool.map(choose, range(0, len(self.queries), step)))
        rows, lists, nearest = (np.concatenate(part) for part in zip(*parts, strict=True))
        return (np.arange(len(nearest), dtype=np.int32), nearest), (rows, lists)

    def scan(self, rows: np.ndarray, lists: np.ndarray) -> None:
        """Multiplies each of the rows with one of the lists, and keeps the best. Both are integers [pairs]."""
        rows = rows[np.argsort(lists, kind="stable")]
        ends = np.cumsum(np.bincount(lists, minlength=self.join.ivf.nlist))
        work = [
            (number, rows[end - size : end])
            for number, (end, size) in enumerate(zip(ends, np.diff(ends, prepend=0), strict=True))
            if size and self.join.bounds[number + 1] > self.join.bounds[number]
        ]
        threads = self.join.pool._max_workers
        for start, end in pairwise(_PARTS):
            lists = [pair for place, pair in enumerate(work) if start <= place % _PARTS[-1] < end]
            cuts = [len(lists) * thread // threads for thread in range(threads + 1)]
            groups = [lists[cuts[thread] : cuts[thread + 1]] for thread in range(threads)]
            self._keep_best([found for group in self.join.pool.map(self._scan_lists, groups) for found in group])

    def _scan_lists(self, lists: Sequence[tuple[int, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Rows, places and products of what is better than what its query keeps."""
        found = []
        for number, rows in lists:
            first, last = self.join.bounds[number : number + 2]
            size = int(last - first)
            vectors = self.join.vectors[first : first + -(-size // _VECTORS) * _VECTORS].T
            step = max(1, _PRODUCTS // size)
            for start in range(0, len(rows), step):
                part = rows[start : start + step].astype(np.int64)  # which index faster
                queries = torch.from_numpy(self.queries.take(part, axis=0))
                products = torch._int_mm(queries, vectors)
                # Few queries find something in a list, and only they are looked at.
                best, products, bar = products.amax(dim=1).numpy(), products.numpy(), self.bar[part]
                hits = np.flatnonzero(best > bar)
                part, products, bar = part[hits], products[hits, :size], bar[hits]
                new = np.flatnonzero(bar == _EMPTY)
                if len(new):  # of what these queries find, their best results of other documents will do
                    of_new = products[new]
                    of_new[self.join.documents[first:last] == self.documents[part[new], None]] = _EMPTY
                    products[new] = of_new
                    worst = -min(self.found.shape[1], size)
                    bar[new] = np.maximum(np.partition(of_new, worst, axis=1)[:, worst], _EMPTY + 1) - 1
                row, place = np.divmod(np.flatnonzero(products > bar[:, None]), size)
                found.append((part[row], first + place, products[row, place]))
        return found

    def _keep_best(self, found: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
        """Joins new results to those that are kept, and keeps the best of each query."""
        if not found:
            return
        rows, places, products = (np.concatenate(part) for part in zip(*found, strict=True))
        is_own = self.documents[rows] == self.join.documents[places]
        wanted = ~is_own & (products > _EMPTY)
        self.own += int(is_own.sum())
        rows, places, products = rows[wanted], places[wanted], products[wanted]
        touched = np.flatnonzero(np.bincount(rows, minlength=len(self.found)))
        kept = np.nonzero(self.found[touched] >= 0)
        rows = np.concatenate([touched[kept[0]], rows])
        places = np.concatenate([self.found[touched][kept], places])
        products = np.concatenate([self.products[touched][kept], products])
        order = np.argsort((rows << 33) - products)  # by row, the largest product first
        rows, places, products = rows[order], places[order], products[order]
        starts = np.flatnonzero(np.diff(rows, prepend=-1))
        rank = np.arange(len(rows)) - np.repeat(starts, np.diff(starts, append=len(rows)))
        best = rank < self.found.shape[1]
        self.found[rows[best], rank[best]] = places[best]
        self.products[rows[best], rank[best]] = products[best]
        self.bar = self.products[:, -1].copy()


def _directions(vectors: np.ndarray) -> np.ndarray:
    """
    float32 [dim, number]: The directions in which centered vectors differ most. They are turned at random, so that
    none holds more than another, which 8 bits could not tell apart.
    """
    variance, directions = np.linalg.eigh(vectors.T @ vectors)  # the largest is last
    share = np.cumsum(variance[::-1]) / max(variance.sum(), 1e-30)
    number = int(np.searchsorted(share, _VARIANCE)) // _DIRECTIONS * _DIRECTIONS + _DIRECTIONS
    directions = directions[:, ::-1][:, :number]
    turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((directions.shape[1],) * 2))
    return (directions @ turn).astype(np.float32)


def _to_bytes(vectors: np.ndarray, largest: float | None = None, axis: int | None = None) -> np.ndarray:
    """Rounds vectors to int8, so that the largest absolute value, of all or along an axis, becomes 127."""
    if largest is None:
        largest = np.abs(vectors).max(axis=axis, keepdims=axis is not None, initial=1e-30)
    scaled = vectors * np.float32(127 / max(largest, 1e-30)) if axis is None else vectors * (127 / largest)
    return np.clip(np.rint(scaled, out=scaled), -127, 127, out=scaled).astype(np.int8)
