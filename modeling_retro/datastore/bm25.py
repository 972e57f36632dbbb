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
The lexical index of a datastore: BM25 over its chunks, computed by the library bm25s and memory-mapped.

```python
from modeling_retro import RetroDatastore

datastore = RetroDatastore.from_pretrained("datastore")
index = datastore.bm25
queries = index.queries(*datastore.chunks.take([0, 1]), datastore.tokenizer)  # int64 [2, terms]
scores, ids = index.search(queries, 4)  # [2, 4], best first, -1 if no more chunks share a term
```
"""

import re
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..encoder.chunk_encoder import decode_chunks, text_mask
from .manifest import Bm25Record


try:
    import bm25s
except ImportError as error:
    raise ImportError("BM25 needs the library bm25s: `pip install retro-transformers[bm25]`") from error


# The terms of a chunk: its tokens, or the words of its text in lower case.
TERMS = ("tokens", "words")

_BLOCK = 1 << 20
_WORD = re.compile(r"\w+")


class Bm25Index:
    """
    BM25 scores of chunks, searched like a faiss index.

    Args:
        folder (`Path`): Folder that `retro index --kind bm25` wrote.
        record ([`Bm25Record`]): The record of the index in the manifest.
    """

    # Like `faiss.METRIC_INNER_PRODUCT`: a higher score is better.
    metric_type = 0

    def __init__(self, folder: Path, record: Bm25Record):
        self.terms: str = record.options["terms"]
        self.ntotal: int = record.ntotal
        try:
            self._bm25 = bm25s.BM25.load(folder, mmap=True, load_vocab=self.terms == "words", show_progress=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"cannot read {folder}: {error}; run `retro index --kind bm25 --force`") from error
        scores = self._bm25.scores
        self.num_terms = len(scores["indptr"]) - 1
        found = (scores["num_docs"], self.num_terms, len(scores["data"]), len(scores["indices"]))
        expected = (self.ntotal, record.num_terms, scores["indptr"][-1], scores["indptr"][-1])
        if found != expected:
            raise ValueError(
                f"{folder} holds (chunks, terms, scores, rows) {found}, expected {tuple(map(int, expected))}; run "
                "`retro index --kind bm25 --force`"
            )

    def check(self) -> None:
        """Reads the whole index, and raises a `ValueError` that names the first impossible value."""
        scores = self._bm25.scores
        if scores["indptr"][0] != 0 or (np.diff(scores["indptr"]) < 0).any():
            raise ValueError("the places of its terms do not ascend")
        for start in range(0, len(scores["data"]), _BLOCK):
            rows, data = (scores[name][start : start + _BLOCK] for name in ("indices", "data"))
            if rows.min() < 0 or rows.max() >= self.ntotal:
                raise ValueError(f"it has the chunks {rows.min()} to {rows.max()}, expected 0 to {self.ntotal - 1}")
            if not (np.isfinite(data) & (data > 0)).all():
                raise ValueError("it has scores that are not positive numbers")

    def queries(self, input_ids: Any, mask: Any, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        """
        Returns the terms of chunks that the index knows.

        Args:
            input_ids (`np.ndarray`): Integers [n, m], ids of `tokenizer`.
            mask (`np.ndarray`): bool [n, m], False at padding.
            tokenizer (`PreTrainedTokenizerBase`): The tokenizer of the chunks.

        Returns:
            `np.ndarray`: int64 [n, terms], -1 if a chunk has fewer. A term that occurs twice counts twice.
        """
        if self.terms == "tokens":
            terms = np.asarray(input_ids, dtype=np.int64)
            return np.where(text_mask(terms, mask, tokenizer) & (terms < self.num_terms), terms, -1)
        rows = [
            [self._bm25.vocab_dict[word] for word in words if word in self._bm25.vocab_dict]
            for words in words_of_chunks(input_ids, mask, tokenizer)
        ]
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        terms = np.full((len(rows), max(lengths.max(initial=0), 1)), -1, dtype=np.int64)
        terms[np.arange(terms.shape[1]) < lengths[:, None]] = np.fromiter(chain.from_iterable(rows), dtype=np.int64)
        return terms

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """
        Finds the chunks with the highest scores.

        Args:
            queries (`np.ndarray`): int64 [n, terms], as [`Bm25Index.queries`] returns them.
            k (`int`): Number of chunks, at most that of the index.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: scores float32 and ids int64, both [n, k], best first, equal scores by id.
            Chunks without a term of the query are not returned, and their places hold 0 and -1.
        """
        scores = np.zeros((len(queries), k), dtype=np.float32)
        ids = np.full((len(queries), k), -1, dtype=np.int64)
        for row, terms in enumerate(queries):
            terms = terms[terms >= 0]
            if not len(terms):
                continue
            found = self._bm25.get_scores_from_ids(terms)
            lowest = np.partition(found, self.ntotal - k)[self.ntotal - k]  # lowest score of the k best
            best = np.flatnonzero((found > 0) & (found >= lowest))
            best = best[np.argsort(-found[best], kind="stable")[:k]]
            scores[row, : len(best)], ids[row, : len(best)] = found[best], best
        return scores, ids


def inverse_document_frequency(num_chunks: np.ndarray, ntotal: int) -> np.ndarray:
    """log(1 + (N - n + 1/2) / (n + 1/2)) for terms that occur in n of N chunks (the variant of Lucene)."""
    return np.log1p((ntotal - num_chunks + 0.5) / (num_chunks + 0.5))


def words_of_chunks(input_ids: Any, mask: Any, tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    """The words of each of n chunks, in lower case."""
    return [_WORD.findall(text.lower()) for text in decode_chunks(input_ids, mask, tokenizer)]
