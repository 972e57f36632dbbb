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
retriever.search("how are rows counted?", k=3)[0].text  # the passage that answers best
```
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..configuration_retro import RetroConfig
from ..datastore.datastore import RetroDatastore  # if faiss is missing, this import names the extras
from ..datastore.documents import DocumentSource
from ..encoder.chunk_encoder import ChunkEncoder, decode_chunks
from .search import NeighborSearch, other_document_filter, removed_filter


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


def open_datastore(name_or_path: str | Path, revision: str | None = None) -> RetroDatastore:
    """Opens the datastore of a user's choice: a folder, a Hub id or the address of a database."""
    if "://" not in str(name_or_path):
        return RetroDatastore.from_pretrained(name_or_path, revision=revision)
    from ..engines.remote import RemoteDatastore

    return RemoteDatastore(str(name_or_path))


class QuestionError(ValueError):
    """A question that nothing can be looked up with. The message is for the one who asked."""


@dataclass(frozen=True)
class FoundText:
    """
    A passage that [`RetroRetriever.search`] found.

    Args:
        text (`str`): The text of the chunk.
        score (`float`): Its score, higher is better; see [`NeighborSearch`].
        chunk_id (`int`): Its number in the datastore.
        document_id (`int`): The number of its document.
        source ([`DocumentSource`], *optional*): Where its document comes from, if the datastore says so.
    """

    text: str
    score: float
    chunk_id: int
    document_id: int
    source: DocumentSource | None = None


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
            How neighbors are found: `"dense"`, `"bm25"`, `"hybrid"` or `"rerank"` (see [`NeighborSearch`]). For chunks
            it defaults to the way in which the stored neighbors were found, and for questions to
            [`RetroDatastore.question_retriever`]. `"bm25"` needs no encoder.
    """

    def __init__(
        self,
        datastore: RetroDatastore,
        encoder: ChunkEncoder | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        retriever: str | None = None,
    ):
        self.neighbor_search = NeighborSearch(datastore, retriever)
        self.question_search = self._search_for_questions(datastore, retriever)
        if not self.neighbor_search.needs_embeddings:
            encoder = None
        else:
            if encoder is None:
                encoder = datastore.open_encoder(device, dtype)
            datastore.check_encoder(encoder)
        self.datastore = datastore
        self.encoder = encoder

    def _search_for_questions(self, datastore: RetroDatastore, retriever: str | None) -> NeighborSearch:
        if retriever is None and self.neighbor_search.needs_embeddings:
            retriever = datastore.question_retriever
        # Without embeddings of chunks there are none of questions.
        return NeighborSearch(datastore, retriever or self.neighbor_search.retriever)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, revision: str | None = None, **kwargs) -> "RetroRetriever":
        """
        Opens a datastore and its encoder.

        Args:
            name_or_path (`str` or `Path`):
                A folder or Hub id (see [`RetroDatastore.from_pretrained`]), or the address of a database that
                `retro export` wrote to (`milvus://…`, `postgresql://…`).
            revision (`str`, *optional*): Branch, tag or commit of a repository.
            kwargs: Arguments of the constructor.
        """
        return cls(open_datastore(name_or_path, revision), **kwargs)

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
        search = NeighborSearch(datastore, self.neighbor_search.retriever)
        search.open()
        questions = NeighborSearch(datastore, self.question_search.retriever)
        questions.open()
        self.datastore, self.neighbor_search, self.question_search = datastore, search, questions
        return True

    def check_model(self, config: RetroConfig) -> None:
        """Raises a `ValueError` unless a model of this configuration can read the retrieved neighbors."""
        self.datastore.check_model(config)

    def retrieve(
        self,
        chunk_input_ids: torch.Tensor,
        k: int,
        exclude_document_ids: Any | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> RetrievedNeighbors:
        """
        Looks up whole chunks, or questions of any length.

        Args:
            chunk_input_ids (`torch.LongTensor`):
                [n, m] token ids. Special tokens are dropped from the text of the query.
            k (`int`): Number of neighbors of a chunk.
            exclude_document_ids (`torch.LongTensor` or `np.ndarray`, *optional*):
                [n] a document that must not be returned for each chunk, -1 for none.
            attention_mask (`torch.Tensor`, *optional*):
                [n, m], 0 or False at padding. With it the rows are questions and need not have the length of a chunk.

        Returns:
            [`RetrievedNeighbors`]: on the device of `chunk_input_ids`.

        Raises:
            ValueError: If chunks have another length than those of the datastore.
            QuestionError: If a question holds no text, or no word that the datastore can look up.
        """
        is_question = attention_mask is not None
        if chunk_input_ids.ndim != 2 or (not is_question and chunk_input_ids.shape[1] != self.datastore.chunk_size):
            raise ValueError(
                f"chunk_input_ids must have shape [n, {self.datastore.chunk_size}], got {list(chunk_input_ids.shape)}"
            )
        input_ids = chunk_input_ids.cpu().numpy()
        mask = np.ones_like(input_ids, dtype=bool) if not is_question else attention_mask.cpu().numpy().astype(bool)
        embeddings = None
        if self.encoder is not None:
            embeddings = self.encoder.encode_chunks(input_ids, mask, self.datastore.tokenizer)
        search = self.question_search if is_question else self.neighbor_search  # `refresh` may replace it meanwhile
        datastore = search.datastore
        unwanted = removed_filter(datastore)
        if exclude_document_ids is not None:
            excluded = np.asarray(exclude_document_ids)
            unwanted["own_document"] = other_document_filter(datastore.chunks, excluded)
        if is_question:
            self._check_questions(search, input_ids, mask, embeddings)
        ids, scores, _ = search(input_ids, mask, embeddings, k, unwanted)
        neighbors, neighbor_mask = datastore.take_neighbors(ids)
        documents = np.where(ids >= 0, datastore.chunks.gather("document_id", ids), -1)
        arrays = (neighbors, neighbor_mask, scores, ids, documents)
        return RetrievedNeighbors(*(torch.from_numpy(array).to(chunk_input_ids.device) for array in arrays))

    def _check_questions(
        self, search: NeighborSearch, input_ids: np.ndarray, mask: np.ndarray, embeddings: np.ndarray | None
    ) -> None:
        """Raises a [`QuestionError`] for a question [n, m] that nothing can be found with, and names it."""
        datastore = search.datastore
        if search.needs_embeddings:
            is_known = embeddings.any(axis=1)  # a text without known tokens has zeros
        else:
            is_known = (datastore.bm25.queries(input_ids, mask, datastore.tokenizer) >= 0).any(axis=1)
        for row, text in enumerate(decode_chunks(input_ids, mask, datastore.tokenizer)):
            if not text.strip():
                raise QuestionError(f"question {row} is empty, expected some text to look up")
            if not is_known[row]:
                raise QuestionError(
                    f"question {row}, {text[:80]!r}, has no word that the datastore knows; ask in other words, or "
                    "answer without retrieval"
                )

    def search(self, texts: str | Sequence[str], k: int = 4) -> list[FoundText] | list[list[FoundText]]:
        """
        Looks up questions or other texts of any length. Passages of the same text count once.

        Args:
            texts (`str` or `Sequence[str]`): One text or several.
            k (`int`, *optional*, defaults to 4): Number of passages for each text.

        Returns:
            `list[FoundText]`: at most k passages, best first; for several texts a list of these.

        Raises:
            ValueError: If a text is empty.
        """
        queries = [texts] if isinstance(texts, str) else list(texts)
        total, width = len(self.datastore.chunks), 2 * k
        while True:
            width = min(width, total)
            ids, scores = self.find(queries, width)
            found = [self._distinct(*row, k) for row in zip(ids, scores, strict=True)]
            # A list ends where nothing more is found.
            if width == total or all(len(part) == k or row[-1] < 0 for part, row in zip(found, ids, strict=True)):
                return found[0] if isinstance(texts, str) else found
            width *= 4

    def _distinct(self, ids: np.ndarray, scores: np.ndarray, k: int) -> list[FoundText]:
        """The first k passages of a list that differ in their text."""
        ids, scores = ids[ids >= 0], scores[ids >= 0]
        texts = decode_chunks(*self.datastore.chunks.take(ids), self.datastore.tokenizer)
        documents = self.datastore.chunks.gather("document_id", ids)
        found = {}
        for text, *rest in zip(texts, scores.tolist(), ids.tolist(), documents.tolist(), strict=True):
            found.setdefault(text.strip(), FoundText(text, *rest))
        found = list(found.values())[:k]
        sources = self.datastore.sources([passage.chunk_id for passage in found])
        return [replace(passage, source=source) for passage, source in zip(found, sources, strict=True)]

    def find(self, texts: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """
        Finds the chunks that answer questions or other texts of any length.

        Args:
            texts (`Sequence[str]`): n texts.
            k (`int`): Number of chunks for each.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: ids int64 and scores float32, both [n, k], as [`NeighborSearch`] returns
            them.

        Raises:
            ValueError: If a text is empty.
        """
        for number, text in enumerate(texts):
            if not text.strip():
                raise ValueError(f"text {number} is empty, expected a question or another text to look up")
        search = self.question_search
        # Text that spells a special token is looked up as text.
        options = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
        rows = search.datastore.tokenizer(list(texts), **options)["input_ids"]
        lengths = np.array([len(row) for row in rows])
        mask = np.arange(max(lengths.max(initial=0), 1)) < lengths[:, None]  # [n, longest]
        input_ids = np.zeros(mask.shape, dtype=np.int64)
        input_ids[mask] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
        embeddings = None if self.encoder is None else self.encoder.encode(list(texts))
        ids, scores, _ = search(input_ids, mask, embeddings, k, removed_filter(search.datastore))
        return ids, scores

    def close_chunks(self, prompts: Sequence[Sequence[int] | torch.Tensor]) -> dict[str, torch.LongTensor]:
        """
        Makes a batch of prompts that all end where a chunk ends, so that their ends are looked up at once. This is how
        a [`RetroForCausalLM`] is asked questions, which reads neighbors one chunk later. The padding in front of the
        prompts is hidden from the model and left out of the queries, but the positions count it.

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
