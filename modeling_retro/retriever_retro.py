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
Searches in a datastore, with a retriever that joins the datastore and the encoder of its chunks.

```python
from modeling_retro import RetroDatastore, RetroRetriever

datastore = RetroDatastore.from_pretrained("datastore")
retriever = RetroRetriever(datastore)
chunks = torch.from_numpy(datastore.chunks.take([0, 1])[0])  # int64 [2, 64]
neighbors = retriever.retrieve(chunks, k=2, exclude_document_ids=datastore.chunks.document_id[:2])
neighbors.neighbor_input_ids.shape  # [2, 2, 128]
```
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .chunk_encoder_retro import ChunkEncoder, text_mask
from .configuration_retro import RetroConfig
from .datastore_manifest_retro import INDEXES
from .datastore_retro import (  # if faiss is missing, this import names the extras
    ChunkTable,
    RetroDatastore,
    faiss,
)
from .ranking_retro import fuse, rerank


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
        index (`faiss.Index` or [`~modeling_retro.bm25_retro.Bm25Index`]): The index.
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
    return {"removed": lambda _, ids: datastore.is_removed(ids)} if "removed" in datastore.manifest else {}


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

        Returns:
            `tuple`: ids int64 [n, k] (-1 absent; best first), scores float32 [n, k] (0 where absent), and counts, as
            [`search`] returns them. Scores are those of the index for `dense` and `bm25`, of the fusion for `hybrid`,
            and the tokens of the longest common run for `rerank`.
        """
        datastore, tokenizer = self.datastore, self.datastore.tokenizer
        number = k if self.retriever in ("dense", "bm25") else max(k, DEPTH)
        found = []
        if self.needs_embeddings:
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


@dataclass
class RetrievedNeighbors:
    """
    The result of a retriever for n chunks.

    Args:
        neighbor_input_ids (`torch.LongTensor`): [n, k, r] token ids of each neighbor and its continuation.
        neighbor_attention_mask (`torch.BoolTensor`): [n, k, r], False at padding and absent neighbors.
        scores (`torch.FloatTensor`, *optional*): [n, k] in the metric of the index.
        chunk_ids (`torch.LongTensor`, *optional*): [n, k] global chunk ids, -1 for absent neighbors.
        document_ids (`torch.LongTensor`, *optional*): [n, k], -1 for absent neighbors.
    """

    neighbor_input_ids: torch.Tensor
    neighbor_attention_mask: torch.Tensor
    scores: torch.Tensor | None = None
    chunk_ids: torch.Tensor | None = None
    document_ids: torch.Tensor | None = None


class RetroRetriever:
    """
    Looks up chunks in a datastore, for data preparation, evaluation and generation.

    Args:
        datastore ([`RetroDatastore`]): The datastore to search.
        encoder ([`ChunkEncoder`], *optional*): Defaults to the encoder of the datastore.
        device (`str` or `torch.device`, *optional*):
            Device of the encoder. Defaults to the first GPU, or else the CPU.
        dtype (`str` or `torch.dtype`, *optional*): Computing type of the encoder.
        retriever (`str`, *optional*):
            How neighbors are found: `"dense"`, `"bm25"`, `"hybrid"` or `"rerank"` (see [`NeighborSearch`]). Defaults
            to the way in which the stored neighbors were found. `"bm25"` needs no encoder.
    """

    def __init__(
        self,
        datastore: RetroDatastore,
        encoder: ChunkEncoder | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        retriever: str | None = None,
    ):
        self.search = NeighborSearch(datastore, retriever)
        if not self.search.needs_embeddings:
            encoder = None
        else:
            if encoder is None:
                encoder = datastore.open_encoder(device, dtype)
            datastore.check_encoder(encoder)
        self.datastore = datastore
        self.encoder = encoder

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, revision: str | None = None, **kwargs) -> "RetroRetriever":
        """
        Opens a datastore (see [`RetroDatastore.from_pretrained`]) and its encoder. `kwargs` go to the constructor.
        """
        return cls(RetroDatastore.from_pretrained(name_or_path, revision=revision), **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RetroRetriever":
        # transformers deep-copies keyword arguments, but an index must be shared and not copied.
        return self

    def refresh(self) -> bool:
        """
        Switches to the current version of the datastore, if its folder holds another version than the searched one.

        Returns:
            `bool`: Whether the version was switched.

        Raises:
            ValueError: If this retriever cannot search the current version. The retriever then keeps the earlier one.
        """
        if self.datastore.is_current():
            return False
        datastore = self.datastore.reopen()
        if self.encoder is not None:
            datastore.check_encoder(self.encoder)
        datastore.check_tokenizer(self.datastore.tokenizer)
        datastore.check_chunk_size(self.datastore.chunk_size)
        search = NeighborSearch(datastore, self.search.retriever)
        search.open()
        self.datastore, self.search = datastore, search
        return True

    def check_model(self, config: RetroConfig) -> None:
        """Raises a `ValueError` unless a model of this configuration can read the retrieved neighbors."""
        self.datastore.check_model(config)

    def retrieve(
        self, chunk_input_ids: torch.Tensor, k: int, exclude_document_ids: Any | None = None
    ) -> RetrievedNeighbors:
        """
        Looks up whole chunks.

        Args:
            chunk_input_ids (`torch.LongTensor`):
                [n, m] token ids. Special tokens are dropped from the text of the query.
            k (`int`): Number of neighbors of a chunk.
            exclude_document_ids (`torch.LongTensor` or `np.ndarray`, *optional*):
                [n] a document that must not be returned for each chunk, -1 for none.

        Returns:
            [`RetrievedNeighbors`]: on the device of `chunk_input_ids`.
        """
        if chunk_input_ids.ndim != 2 or chunk_input_ids.shape[1] != self.datastore.chunk_size:
            raise ValueError(
                f"chunk_input_ids must have shape [n, {self.datastore.chunk_size}], got {list(chunk_input_ids.shape)}"
            )
        input_ids = chunk_input_ids.cpu().numpy()
        mask = np.ones_like(input_ids, dtype=bool)
        embeddings = None
        if self.encoder is not None:
            embeddings = self.encoder.encode_chunks(input_ids, mask, self.datastore.tokenizer)
        search = self.search  # `refresh` may replace it meanwhile
        datastore = search.datastore
        unwanted = removed_filter(datastore)
        if exclude_document_ids is not None:
            excluded = np.asarray(exclude_document_ids)
            unwanted["own_document"] = other_document_filter(datastore.chunks, excluded)
        ids, scores, _ = search(input_ids, mask, embeddings, k, unwanted)
        neighbors, neighbor_mask = datastore.take_neighbors(ids)
        documents = np.where(ids >= 0, datastore.chunks.gather("document_id", ids), -1)
        arrays = (neighbors, neighbor_mask, scores, ids, documents)
        return RetrievedNeighbors(*(torch.from_numpy(array).to(chunk_input_ids.device) for array in arrays))

    def pad_to_chunks(self, prompt_ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """
        Pads a prompt on the left to whole chunks. The prompt then ends where a chunk ends, and is looked up at once.

        Only the text of the query leaves the padding out. With an attention mask of 1 the model reads the padding like
        other tokens, and a model that was not trained with such prompts does not ignore it.
        [`RetroRetriever.close_chunks`] hides it.

        Args:
            prompt_ids (`Sequence[int]` or `torch.LongTensor`): Token ids [T] or [B, T].

        Returns:
            `torch.LongTensor`: [T'] or [B, T'], where T' is the next multiple of the chunk size.
        """
        prompt_ids = torch.as_tensor(prompt_ids, dtype=torch.long)
        missing = -prompt_ids.shape[-1] % self.datastore.chunk_size
        return torch.nn.functional.pad(prompt_ids, (missing, 0), value=self._pad_token_id)

    def close_chunks(self, prompts: Sequence[Sequence[int] | torch.Tensor]) -> dict[str, torch.LongTensor]:
        """
        Makes a batch of prompts that all end where a chunk ends, so that their ends are looked up at once. The padding
        in front of them is hidden from the model and left out of the queries, but the positions count it.

        Args:
            prompts (`Sequence[Sequence[int]]`): Token ids of each prompt.

        Returns:
            `dict[str, torch.LongTensor]`: `input_ids`, `attention_mask` and `position_ids` for `generate` or
            `forward`, each [B, T], where T is a multiple of the chunk size.

        Raises:
            ValueError: If a prompt is empty.
        """
        rows = [torch.as_tensor(prompt, dtype=torch.long) for prompt in prompts]
        lengths = torch.tensor([len(row) for row in rows])
        if not lengths.all():
            raise ValueError(f"prompt {int(lengths.argmin())} of the batch is empty, expected at least one token")
        num_columns = -(-lengths // self.datastore.chunk_size) * self.datastore.chunk_size
        columns = torch.arange(int(num_columns.max()))
        mask = columns >= len(columns) - lengths[:, None]  # [B, T]
        input_ids = torch.full(mask.shape, self._pad_token_id)
        input_ids[mask] = torch.cat(rows)
        position_ids = (columns - len(columns) + num_columns[:, None]) * mask
        return {"input_ids": input_ids, "attention_mask": mask.long(), "position_ids": position_ids}

    @property
    def _pad_token_id(self) -> int:
        tokenizer = self.datastore.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None:
            raise ValueError("the tokenizer of the datastore has neither a pad nor an EOS token to pad a prompt with")
        return pad
