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
"""Rows that a model continues together, with the same result as for each row alone"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from modeling_retro import RetroJointForCausalLM
from modeling_retro.chunk_layout_retro import completed_between
from modeling_retro.drafts_retro import DRAFT_TOKENS, DraftLength, find_draft, join_texts
from modeling_retro.joint_attention_retro import layer_windows
from modeling_retro.retriever.retriever import QuestionError

from .sampling import ChosenToken, score_tokens


# Drafts of all rows together have about so many tokens: more of them make a step on one core noticeably slower.
DRAFTED_AT_ONCE = 16
# Columns of tokens that were not confirmed are masked, and moved out of the cache when there are so many.
MAX_HOLES = 64


@dataclass
class RetrievedChunk:
    """
    The neighbors of one chunk of a row, or the passages of its question.

    Args:
        index (`int`, *optional*):
            Number of the chunk in its row. A question has none.
        input_ids (`list[list[int]]`):
            Tokens of the neighbors with their continuations, best first, without padding.
        scores (`list[float]`):
            Scores of the neighbors.
        document_ids (`list[int]`):
            Ids of their documents, -1 if the retriever does not know them.
        chunk_ids (`list[int]`):
            Their global chunk ids, -1 if the retriever does not know them.
    """

    index: int | None
    input_ids: list[list[int]]
    scores: list[float]
    document_ids: list[int]
    chunk_ids: list[int]


@dataclass
class Row:
    """
    A document that is being generated.

    Args:
        tokens (`list[int]`):
            Tokens of the prompt, at least one, and of the continuation.
        num_neighbors (`int`):
            Number of neighbors that are looked up for each chunk. 0 switches retrieval off.
        num_hidden (`int`, *optional*, defaults to 0):
            Number of tokens at the start of the prompt that are padding, fewer than those of a chunk. The model does
            not see them, but chunks and positions count them (see [`RetroRetriever.close_chunks`]).
        num_scored (`int`, *optional*):
            Number of most probable tokens that are reported with each token of the prompt. By default, the tokens of
            the prompt are not scored.
        query (`list[int]`, *optional*):
            Tokens of the question, which are looked up in place of the chunks of the prompt. A joint model has the
            passages in sight of the whole prompt and its answer. For one with cross attention the prompt must end
            where a chunk ends, and they are the neighbors of this chunk.
        must_find (`bool`, *optional*, defaults to `False`):
            Whether a question that nothing can be looked up with is an error. By default the chunks of the prompt are
            looked up then.
        before (`list[int]`):
            Tokens of the prompt that stand before the passages of a question, in a joint model. They are none of
            `tokens`.
        passages (`str`, *optional*):
            How a joint model reads the passages: `"apart"`, or `"in_order"`, as one text. Defaults to the model's way.
        retrieved (`list[RetrievedChunk]`):
            The passages of the question, if there is one, and the neighbors of each whole chunk.
        scored (`list[ChosenToken]`):
            The tokens of the prompt that are not hidden, with their probabilities.
        failure (`Exception`, *optional*):
            Why its last chunk could not be looked up. The logits of the step mean nothing then.
        draft (`list[int]`):
            What the last step read behind the last token, and which the caller confirms as far as it chooses the same
            tokens.
    """

    tokens: list[int]
    num_neighbors: int
    num_hidden: int = 0
    num_scored: int | None = None
    query: list[int] | None = None
    must_find: bool = False
    before: list[int] = field(default_factory=list)
    passages: str | None = None
    retrieved: list[RetrievedChunk] = field(default_factory=list)
    scored: list[ChosenToken] = field(default_factory=list)
    failure: Exception | None = None
    draft: list[int] = field(default_factory=list)


def draft_of(row: Row, chunk_size: int, longest: int) -> list[int]:
    """The draft of a row, of at most `longest` tokens, which does not reach the last token of a chunk."""
    index = len(row.tokens) % chunk_size
    longest = min(longest, chunk_size - 1 - index)
    if longest < 1 or index == 0:
        return []
    texts = join_texts(text for chunk in row.retrieved for text in chunk.input_ids)
    return find_draft(texts, np.array(row.tokens), longest)


class DecodingBatch:
    """
    Rows of a RETRO model that are decoded together, with one forward pass for each token, or for several that were
    drafted. A row joins after the model has read its prompt alone, and it can leave at any time. Its result does not
    depend on the other rows.

    Args:
        model ([`RetroForCausalLM`] or [`RetroJointForCausalLM`]):
            The model, in evaluation mode.
        retriever:
            Looks up neighbors (see [`RetroGenerationMixin`]).
        draft_tokens (`int`, *optional*):
            Largest number of tokens in the draft of a row (see [`~RetroGenerationMixin.generate`]); 0 for no drafts.
            Defaults to 16 in float32 and float64, and to 0 in 16 bits.
    """

    def __init__(self, model: PreTrainedModel, retriever: Any, draft_tokens: int | None = None):
        self.model = model
        self.retriever = retriever
        if draft_tokens is None:
            draft_tokens = DRAFT_TOKENS if model.dtype.itemsize >= 4 else 0
        self.draft_tokens = draft_tokens
        self.rows: list[Row] = []
        self._lengths: list[DraftLength] = []
        self._cache = None
        self._mask: torch.BoolTensor | None = None  # of the tokens in the cache: rows have padding and holes
        windows = layer_windows(model.config.get_text_config()).values()
        self._max_holes = MAX_HOLES if all(window is None for window in windows) else 0  # windows count columns

    @torch.inference_mode()
    def add(self, rows: Sequence[Row]) -> torch.Tensor:
        """
        Reads the prompts of new rows and adds the rows to the batch.

        Args:
            rows (`Sequence[Row]`): The rows, each with at least one token.

        Returns:
            `torch.FloatTensor` of shape `(len(rows), vocab_size)`: logits of the next token of each row.
        """
        self._settle()
        caches, logits = [], []
        for row, inputs in zip(rows, self._prompt_inputs(rows), strict=True):
            caches.append(self.model.cache_class(config=self.model.config))
            kept = 1 if row.num_scored is None else 0  # 0 keeps all
            with self.model.retrieval(False):
                outputs = self.model(**inputs, past_key_values=caches[-1], use_cache=True, logits_to_keep=kept)
            logits.append(outputs.logits[:, -1].clone())
            if row.num_scored is not None:
                seen = inputs["input_ids"][0, row.num_hidden :]
                row.scored = score_tokens(outputs.logits[0, row.num_hidden : -1], seen, row.num_scored)
        if self._cache is not None:
            caches.insert(0, self._cache)
        try:
            caches[0].add_rows(caches[1:])
        except Exception:
            self.clear()  # a part of the layers may have the new rows already
            raise
        self._cache = caches[0]
        self.rows += rows
        self._lengths += [DraftLength(self.draft_tokens) for _ in rows]
        self._mask = self._join_masks(rows)
        return torch.cat(logits).float()

    @torch.inference_mode()
    def score(self, row: Row) -> list[float]:
        """
        Computes the bits that the model needs for each token of a row except the first. The row does not join the
        batch.

        Args:
            row ([`Row`]): The row, with at least one token and no hidden ones.

        Returns:
            `list[float]`: the bits of `len(row.tokens) - 1` tokens.
        """
        (inputs,) = self._prompt_inputs([row])
        with self.model.retrieval(False):
            logits = self.model(**inputs, use_cache=False).logits[0, :-1].float()
        nats = F.cross_entropy(logits, inputs["input_ids"][0, 1:], reduction="none")
        return (nats / math.log(2)).tolist()

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        """
        Reads the last token of each row, which was appended after the previous call, and a draft behind it,
        `row.draft`, which may be empty. The caller chooses the tokens of a row one after the other and appends them to
        `row.tokens`, as long as they are those of the draft, and one more.

        Returns:
            `torch.FloatTensor` of shape `(len(self.rows), n, vocab_size)`: logits of the next token of each row and of
            those that follow each token of its draft. Rows with shorter drafts have meaningless ones at the end.
        """
        self._settle()
        longest = DRAFTED_AT_ONCE // len(self.rows)
        for row, length in zip(self.rows, self._lengths, strict=True):
            row.draft = draft_of(row, self.model.config.chunk_size, min(longest, length.current, self.draft_tokens))
        return self._read()

    def _read(self) -> torch.Tensor:
        """Logits `(B, 1 + longest draft, vocab_size)` of the last token of each row and of its draft."""
        device = self.model.device
        chunks = [chunk for n, row in enumerate(self.rows) for chunk in self._completed(n, row, len(row.tokens) - 1)]
        neighbors = {}
        chunks, found_ids, found_mask = self._look_up_apart(chunks)
        if chunks:
            shape, owners = (len(self.rows), 1, *found_ids.shape[1:]), [n for n, _, _ in chunks]
            all_ids, all_masks = found_ids.new_zeros(shape), found_mask.new_zeros(shape)
            all_ids[owners, 0], all_masks[owners, 0] = found_ids, found_mask
            neighbors = {"neighbor_input_ids": all_ids, "neighbor_attention_mask": all_masks}
        num_read = torch.tensor([1 + len(row.draft) for row in self.rows], device=device)
        columns = torch.arange(int(num_read.max()), device=device)
        tokens = [(row.tokens[-1:] + row.draft + [0] * len(columns))[: len(columns)] for row in self.rows]
        positions = torch.tensor([len(row.tokens) - 1 for row in self.rows], device=device)[:, None] + columns
        self._mask = torch.cat([self._mask, columns < num_read[:, None]], dim=1)
        with self.model.retrieval(False):
            outputs = self.model(
                input_ids=torch.tensor(tokens, device=device),
                attention_mask=self._mask.long(),
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                **neighbors,
            )
        self._num_read = [len(row.tokens) + len(row.draft) for row in self.rows]
        return outputs.logits.float()

    def _settle(self) -> None:
        """Takes what was drafted and not confirmed out of the cache."""
        drafts = [len(row.draft) for row in self.rows]
        if not any(drafts):
            return
        width, refused = 1 + max(drafts), []
        for row, length, num_drafted, num_read in zip(self.rows, self._lengths, drafts, self._num_read, strict=True):
            refused.append(min(num_drafted, max(0, num_read - len(row.tokens) + 1)))
            if num_drafted > 0:
                length.update(num_drafted, num_drafted - refused[-1])
            row.draft = []
        kept = [1 + num_drafted - n for num_drafted, n in zip(drafts, refused, strict=True)]
        device = self._mask.device
        is_kept = torch.arange(width, device=device) < torch.tensor(kept, device=device)[:, None]
        self._mask = torch.cat([self._mask[:, :-width], self._mask[:, -width:] & is_kept], dim=1)
        if (removed := width - max(kept)) > 0:
            self._cache.crop(-removed)
            self._mask = self._mask[:, :-removed]
        num_tokens = self._mask.sum(-1)
        if int(((self._mask.cumsum(-1) > 0).sum(-1) - num_tokens).max()) > self._max_holes:
            # Those of tokens come last, in their order.
            columns = self._mask.int().argsort(dim=1, stable=True)[:, -int(num_tokens.max()) :]
            self._cache.take_columns(columns)
            self._mask = self._mask.gather(1, columns)

    def _join_masks(self, rows: Sequence[Row]) -> torch.BoolTensor:
        """The mask of the rows so far and of new ones, which are padded on the left as in the cache."""
        length = self._cache.get_seq_length()
        columns = torch.arange(length, device=self.model.device)
        new = [(columns >= length - len(row.tokens) + row.num_hidden)[None] for row in rows]
        old = [] if self._mask is None else [F.pad(self._mask, (length - self._mask.shape[1], 0))]
        return torch.cat([*old, *new])

    @torch.inference_mode()
    def keep(self, indices: Sequence[int]) -> None:
        """Keeps the rows `indices` and removes the others, together with padding that is no longer needed."""
        self._settle()
        self.rows = [self.rows[n] for n in indices]
        self._lengths = [self._lengths[n] for n in indices]
        if not self.rows:
            self.clear()
            return
        indices = torch.tensor(indices, device=self.model.device)
        self._cache.batch_select_indices(indices)
        self._mask = self._mask[indices]
        num_columns = int(self._mask.any(0).int().argmax())
        self._cache.drop_columns(num_columns)
        self._mask = self._mask[:, num_columns:]

    def clear(self) -> None:
        """Removes all rows, whatever state an error has left them in."""
        self.rows, self._lengths, self._cache, self._mask = [], [], None, None

    def _prompt_inputs(self, rows: Sequence[Row]) -> list[dict[str, torch.Tensor]]:
        """Makes the inputs of a forward pass over each row alone. The chunks of all rows are looked up together."""
        device = self.model.device
        questions = [self._question_inputs(row) for row in rows]
        chunks = [chunk for n, row in enumerate(rows) if not questions[n] for chunk in self._completed(n, row, 0)]
        found_ids, found_mask = self._look_up(rows, chunks)
        inputs = [{"input_ids": torch.tensor([row.tokens], device=device)} for row in rows]
        for n, row in enumerate(rows):
            if row.num_hidden > 0:
                positions = torch.arange(len(row.tokens), device=device)[None]
                mask = (positions >= row.num_hidden).long()
                inputs[n] |= {"attention_mask": mask, "position_ids": positions * mask}
            inputs[n] |= questions[n]
            own = [i for i, (owner, _, _) in enumerate(chunks) if owner == n]
            if own:
                # Other rows may ask for more neighbors, which this row would not have alone.
                inputs[n]["neighbor_input_ids"] = found_ids[own][None, :, : row.num_neighbors]
                inputs[n]["neighbor_attention_mask"] = found_mask[own][None, :, : row.num_neighbors]
        return inputs

    def _question_inputs(self, row: Row) -> dict[str, Any]:
        """Looks up the question of a row, and makes the inputs of a forward pass that reads its passages, if any."""
        if row.query is None or row.num_neighbors == 0:
            return {}
        query, device = torch.tensor([row.query], dtype=torch.long), self.model.device
        try:
            found = self.retriever.retrieve(query, row.num_neighbors, attention_mask=torch.ones_like(query))
        except QuestionError:
            if row.must_find:
                raise
            row.tokens, row.before = row.before + row.tokens, []
            return {}
        ids, mask = found.neighbor_input_ids.to(device), found.neighbor_attention_mask.bool().to(device)  # [1, k, r]
        row.retrieved.append(retrieved_chunk(None, found, 0, mask[0].cpu()))
        if isinstance(self.model, RetroJointForCausalLM):
            before = {"passage_prefix_input_ids": torch.tensor([row.before], device=device)} if row.before else {}
            how = row.passages or self.model.default_passages
            return {"passage_input_ids": ids, "passage_attention_mask": mask, "passages": how, **before}
        shape = (1, len(row.tokens) // self.model.config.chunk_size, *ids.shape[1:])  # [1, L, k, r]
        neighbor_ids, neighbor_mask = ids.new_zeros(shape), mask.new_zeros(shape)
        neighbor_ids[:, -1], neighbor_mask[:, -1] = ids, mask
        return {"neighbor_input_ids": neighbor_ids, "neighbor_attention_mask": neighbor_mask}

    def _completed(self, n: int, row: Row, before: int) -> list[tuple[int, int, list[int]]]:
        """The chunks that row `n` completed since it had `before` tokens: the row, the number of the chunk, tokens."""
        size = self.model.config.chunk_size
        numbers = completed_between(before, len(row.tokens), size) if row.num_neighbors > 0 else ()
        return [(n, u, row.tokens[u * size : (u + 1) * size]) for u in numbers]

    def _look_up_apart(
        self, chunks: list[tuple[int, int, list[int]]]
    ) -> tuple[list[tuple[int, int, list[int]]], torch.LongTensor | None, torch.BoolTensor | None]:
        """
        Looks up chunks of the running rows together, or each alone if that fails. A row for which it fails alone gets
        a `failure`. Returns the other chunks with what was found.
        """
        try:
            return chunks, *self._look_up(self.rows, chunks)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if len(chunks) == 1:
                self.rows[chunks[0][0]].failure = error
                return [], None, None
        found = [one for chunk in chunks if (one := self._look_up_apart([chunk]))[0]]
        if not found:
            return [], None, None
        k = max(ids.shape[1] for _, ids, _ in found)
        pads = [(0, 0, 0, k - ids.shape[1]) for _, ids, _ in found]  # [1, k of the row, r] -> [1, k, r]
        ids = torch.cat([F.pad(ids, pad) for (_, ids, _), pad in zip(found, pads, strict=True)])
        masks = torch.cat([F.pad(mask, pad) for (_, _, mask), pad in zip(found, pads, strict=True)])
        return [chunk for one, _, _ in found for chunk in one], ids, masks

    def _look_up(
        self, rows: Sequence[Row], chunks: Sequence[tuple[int, int, list[int]]]
    ) -> tuple[torch.LongTensor | None, torch.BoolTensor | None]:
        """
        Looks up chunks, which are given with the numbers of their rows, with one call of the retriever. Returns the
        neighbors `(len(chunks), k, neighbor_length)` and their mask. Neighbors beyond the number of a row are masked.
        """
        if not chunks:
            return None, None
        k = max(rows[n].num_neighbors for n, _, _ in chunks)
        found = self.retriever.retrieve(torch.tensor([chunk for _, _, chunk in chunks]), k)
        ids, mask = found.neighbor_input_ids, found.neighbor_attention_mask.bool().clone()
        for i, (n, index, _) in enumerate(chunks):
            mask[i, rows[n].num_neighbors :] = False
            rows[n].retrieved.append(retrieved_chunk(index, found, i, mask[i]))
        return ids.to(self.model.device), mask.to(self.model.device)


def retrieved_chunk(index: int | None, found: Any, row: int, mask: torch.BoolTensor) -> RetrievedChunk:
    """The neighbors of one row of what a retriever found, of which those with a mask `(k, r)` are present."""
    present = mask.any(-1).nonzero()[:, 0].tolist()
    values = [getattr(found, name, None) for name in ("scores", "document_ids", "chunk_ids")]
    known = [[-1] * len(present) if value is None else value[row, present].tolist() for value in values]
    neighbors = [found.neighbor_input_ids[row, j, mask[j]].tolist() for j in present]
    return RetrievedChunk(index, neighbors, *known)
