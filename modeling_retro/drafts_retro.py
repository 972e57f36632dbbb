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
"""Drafts: tokens of the neighbors or of the row that may come next, several of which one step confirms"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from transformers.generation import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    logits_process,
)
from transformers.generation.candidate_generator import CandidateGenerator

from .cache_retro import RetrievalCache
from .neighbors_retro import Neighbors


DRAFT_TOKENS, SHORTEST_DRAFT = 16, 4  # in float32, a CPU reads two or three tokens in more time than five
SHORTEST_RUN, LONGEST_RUN = 2, 8


def join_texts(texts: Iterable[Sequence[int]]) -> np.ndarray:
    """Texts one after the other, as [`find_draft`] takes them: `(n,)`, with a -1 behind each."""
    return np.array([token for text in texts for token in (*text, -1)], dtype=np.int64)


def find_draft(texts: np.ndarray, row: np.ndarray, length: int) -> list[int]:
    """
    Finds what may come next: what followed the longest run of the last tokens of a row in other texts or in the row.

    Args:
        texts (`np.ndarray` of shape `(n,)`): Other texts (see [`join_texts`]).
        row (`np.ndarray` of shape `(t,)`): Tokens of the row.
        length (`int`): Largest number of tokens to find.

    Returns:
        `list[int]`: the tokens, none if no run of two tokens is found. Of several equally long runs the last counts,
        and those in the row come after those in other texts.
    """
    pool = np.concatenate([texts, row])
    ends = np.flatnonzero((pool[:-1] == row[-1]) & (pool[1:] >= 0))
    run = 1
    while run < min(LONGEST_RUN, len(row)):
        longer = ends[ends >= run]
        longer = longer[pool[longer - run] == row[-1 - run]]
        if len(longer) == 0:
            break
        ends, run = longer, run + 1
    if run < SHORTEST_RUN or len(ends) == 0:
        return []
    draft = pool[ends[-1] + 1 : ends[-1] + 1 + length].tolist()
    return draft[: draft.index(-1)] if -1 in draft else draft


class DraftLength:
    """
    The length of drafts, which grows while they are confirmed whole, and shrinks to what was confirmed of the last,
    but not below four tokens.

    Args:
        longest (`int`): Largest number of tokens in a draft.
    """

    def __init__(self, longest: int):
        self.longest = longest
        self.current = min(longest, SHORTEST_DRAFT)

    def update(self, num_drafted: int, num_confirmed: int) -> None:
        """Learns from a draft of `num_drafted` tokens, at least one."""
        whole = num_confirmed == num_drafted
        self.current = min(self.longest, 2 * self.current if whole else max(SHORTEST_DRAFT, num_confirmed))


class NeighborDrafts(CandidateGenerator):
    """
    Drafts for `generate()` with one row, from the neighbors and passages in sight and from the row itself. What a
    draft says is only a guess, which the model confirms or corrects, so it changes no token.

    No draft has the last token of a chunk: the neighbors that the chunk finds are not known before it is complete.

    Args:
        cache ([`RetrievalCache`]): The cache of the generation.
        chunk_size (`int`): Number of tokens in a chunk.
        num_missing (`int`): Number of columns in front of the first token of the document.
        max_length (`int`): Largest number of tokens of prompt and continuation.
        longest (`int`): Largest number of tokens in a draft.
        stopping_criteria (`StoppingCriteriaList`): What ends the text.
        passages (`torch.LongTensor` of shape `(1, k, r)`, *optional*):
            The passages of a question.
        passage_mask (`torch.Tensor` of the same shape, *optional*):
            1 (or True) for their real tokens. By default all are real.

    Attributes:
        num_steps (`int`): Number of forward passes so far.
    """

    def __init__(
        self,
        cache: RetrievalCache,
        chunk_size: int,
        num_missing: int,
        max_length: int,
        longest: int,
        stopping_criteria: StoppingCriteriaList,
        passages: torch.LongTensor | None = None,
        passage_mask: torch.Tensor | None = None,
    ):
        self.cache, self.chunk_size, self.num_missing, self.max_length = cache, chunk_size, num_missing, max_length
        self.length = DraftLength(longest)
        self.stopping_criteria = [
            criterion
            for criterion in stopping_criteria
            if isinstance(criterion, EosTokenCriteria | StopStringCriteria)
        ]
        self.passages = []
        if passages is not None:
            passage_mask = torch.ones_like(passages) if passage_mask is None else passage_mask
            self.passages = _texts(Neighbors(passages, passage_mask.bool()))
        self.num_steps = 0
        self._chunk: int | None = None
        self._num_drafted = 0

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs) -> tuple[torch.LongTensor, None]:
        """The tokens `(1, t)` with a draft behind them, if there is one."""
        self.num_steps += 1
        self._num_drafted = 0
        length = input_ids.shape[1]
        chunk, index = divmod(length - self.num_missing, self.chunk_size)
        room = min(self.chunk_size - 1 - index, self.max_length - length - 1, self.length.current)
        # A prompt is read alone, and so is the last token of a chunk.
        if room < 1 or index == 0 or self.cache.get_seq_length() == 0:
            return input_ids, None
        if chunk != self._chunk:
            neighbors = [] if self.cache.neighbors is None else _texts(self.cache.neighbors)
            self._joined, self._chunk = join_texts([*neighbors, *self.passages]), chunk
        draft = input_ids.new_tensor([find_draft(self._joined, input_ids[0].numpy(force=True), room)])
        for number in range(1, draft.shape[1] + 1):
            grown = torch.cat([input_ids, draft[:, :number].to(input_ids)], dim=1)
            if any(bool(criterion(grown, None).any()) for criterion in self.stopping_criteria):
                draft = draft[:, : number - 1]  # what ends the text comes last in a step, where it is checked
                break
        self._num_drafted = draft.shape[1]
        return torch.cat([input_ids, draft.to(input_ids)], dim=1), None

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int) -> None:
        """Adapts the length of drafts to the number of tokens that were confirmed."""
        if self._num_drafted > 0:
            self.length.update(self._num_drafted, num_matches)


def _texts(neighbors: Neighbors) -> list[list[int]]:
    """The texts of the neighbors `(…, r)` of one row, without padding."""
    ids, masks = neighbors.input_ids.flatten(0, -2).cpu(), neighbors.attention_mask.flatten(0, -2).cpu()
    return [text[mask].tolist() for text, mask in zip(ids, masks) if mask.any()]


class DrawInTurn(LogitsProcessor):
    """
    Draws one token after the other, as sampling without drafts does, from scores that all other processors have seen.
    The token that was drawn keeps a score of 0 and all others get -inf. Nothing is drawn behind a token that differs
    from the draft, so that the same seed gives the same text with drafts and without.
    """

    def __init__(self):
        self._length = 0
        self._drawn: int | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores `(1, vocab_size)` of the token that follows `input_ids` `(1, t)`."""
        length = input_ids.shape[1]
        if self._drawn is not None and (length != self._length or int(input_ids[0, -1]) != self._drawn):
            return scores  # behind a token that was not confirmed
        token = torch.multinomial(scores.softmax(-1), num_samples=1)
        self._length, self._drawn = length + 1, int(token)
        return torch.full_like(scores, -float("inf")).scatter(1, token, 0.0)


def why_no_drafts(
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool,
    model_kwargs: dict[str, Any],
) -> str | None:
    """The reason why a generation cannot have drafts, or `None` if it can."""
    cache, config = model_kwargs.get("past_key_values"), generation_config
    known = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)
    is_stateless = all(
        type(processor).__module__ == logits_process.__name__
        and not isinstance(processor, PrefixConstrainedLogitsProcessor)
        for processor in logits_processor
    )
    reasons = {
        "there are several rows": len(input_ids) > 1,
        "only embeddings of the prompt are known": input_ids.shape[1] == 0,
        "there is no cache that tokens can be taken out of": not isinstance(cache, RetrievalCache)
        or not model_kwargs["use_cache"]
        or config.cache_implementation not in (None, "dynamic", "offloaded"),
        "the cache is filled": isinstance(cache, RetrievalCache) and cache.get_seq_length() > 0,
        "a logits processor may depend on each call": not is_stateless
        or config.guidance_scale not in (None, 1)
        or config.watermarking_config is not None,
        "a stopping criterion is unknown": not all(isinstance(one, known) for one in stopping_criteria),
        "attentions or hidden states are asked for": config.output_attentions or config.output_hidden_states,
        "the scores of sampled tokens are asked for": config.do_sample and config.output_scores,
        "several processes generate together": synced_gpus,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


__all__ = ["DRAFT_TOKENS", "DraftLength", "DrawInTurn", "NeighborDrafts", "find_draft", "join_texts", "why_no_drafts"]
