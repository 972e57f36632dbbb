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
"""Chooses the next token"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch


# The logarithm of the probability 0, which is no number of JSON.
LOWEST_LOGPROB = -9999.0
# Number of tokens of a prompt whose probabilities are computed at once.
_TOKENS_AT_ONCE = 256


@dataclass(frozen=True)
class SamplingParameters:
    """
    How the tokens of a completion are chosen.

    Args:
        temperature (`float`, *optional*, defaults to 1.0):
            Divides the logits. 0 takes the most probable token.
        top_p (`float`, *optional*, defaults to 1.0):
            Share of the probability to sample from.
        seed (`int`, *optional*):
            Seed of the sampling. Defaults to a random one.
        presence_penalty (`float`, *optional*, defaults to 0.0):
            Subtracted from the logit of each token that was generated before.
        frequency_penalty (`float`, *optional*, defaults to 0.0):
            Subtracted from the logit of a token for each time that it was generated before.
        logit_bias (`Mapping[int, float]`, *optional*):
            Added to the logits of some tokens.
        num_logprobs (`int`, *optional*):
            Number of most probable tokens that are reported with each token. By default not even the probability of
            the token itself need be known.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    num_logprobs: int | None = None


@dataclass
class ChosenToken:
    """
    A token and its probability, before temperature, penalties and biases.

    Args:
        id (`int`):
            The token.
        logprob (`float`, *optional*):
            The natural logarithm of its probability, at least -9999; `None` for a token that was not predicted, or if
            nobody asked.
        top (`list[tuple[int, float]]`):
            The most probable tokens with the logarithms of their probabilities, best first.
    """

    id: int
    logprob: float | None
    top: list[tuple[int, float]]


class Sampler:
    """
    Chooses the tokens of one completion, one after another. Its random choices depend only on its seed.

    Args:
        parameters ([`SamplingParameters`]): How the tokens are chosen.
    """

    def __init__(self, parameters: SamplingParameters):
        self.parameters = parameters
        self._counts: Counter[int] = Counter()
        self._generator = torch.Generator()
        if parameters.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(parameters.seed)

    def choose(self, logits: torch.Tensor, logprobs: torch.Tensor) -> ChosenToken:
        """
        Chooses a token.

        Args:
            logits (`torch.FloatTensor` of shape `(vocab_size,)`): The logits of the model, on the CPU.
            logprobs (`torch.FloatTensor` of shape `(vocab_size,)`): Their log softmax.

        Raises:
            ValueError: If the logits contain NaN or infinity, or only minus infinity.
        """
        if not logits.max().isfinite():
            raise ValueError(f"the largest logit of the model is {float(logits.max())}, expected a finite number")
        parameters = self.parameters
        changes = dict(parameters.logit_bias)
        if parameters.presence_penalty or parameters.frequency_penalty:
            for token, count in self._counts.items():
                penalty = parameters.presence_penalty + count * parameters.frequency_penalty
                changes[token] = changes.get(token, 0.0) - penalty
        if changes:
            logits = logits.clone()
            logits[list(changes)] += torch.tensor(list(changes.values()))
        token = int(logits.argmax()) if parameters.temperature == 0 else self._draw(logits)
        self._counts[token] += 1
        top = torch.topk(logprobs, parameters.num_logprobs or 0)
        best = list(zip(top.indices.tolist(), map(_finite, top.values.tolist())))
        return ChosenToken(token, _finite(float(logprobs[token])), best)

    def _draw(self, logits: torch.Tensor) -> int:
        # In double precision, and with 0 as the largest logit, no temperature and no share is too small.
        logits = logits.double()
        probabilities = ((logits - logits.max()) / self.parameters.temperature).softmax(-1)
        if self.parameters.top_p < 1:
            values, order = probabilities.sort(descending=True)
            # The token that reaches the share is still included.
            values[values.cumsum(-1) - values >= self.parameters.top_p] = 0
            return int(order[torch.multinomial(values, 1, generator=self._generator)])
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def score_tokens(logits: torch.Tensor, ids: torch.Tensor, num_logprobs: int) -> list[ChosenToken]:
    """
    The probabilities of given tokens.

    Args:
        logits (`torch.FloatTensor` of shape `(length - 1, vocab_size)`): The logits that predict all but the first.
        ids (`torch.LongTensor` of shape `(length,)`): The tokens.
        num_logprobs (`int`): Number of most probable tokens that are reported with each token.
    """
    scored = [ChosenToken(int(ids[0]), None, [])]
    for some_logits, some_ids in zip(logits.split(_TOKENS_AT_ONCE), ids[1:].split(_TOKENS_AT_ONCE), strict=True):
        logprobs = some_logits.float().log_softmax(-1)
        own = logprobs.gather(-1, some_ids[:, None])[:, 0].tolist()
        top = torch.topk(logprobs, num_logprobs)
        for id, logprob, best, best_logprobs in zip(
            some_ids.tolist(), own, top.indices.tolist(), top.values.tolist(), strict=True
        ):
            scored.append(ChosenToken(id, _finite(logprob), list(zip(best, map(_finite, best_logprobs)))))
    return scored


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
