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
How others answer questions from passages whose keys and values are stored: parallel context windows (arXiv
2212.10947), APE (2502.05431), CacheBlend (2405.16444) and the LegoLink of EPIC (2410.15332), by their formulas over
one cache, one question at a time. They run the layers of decoders of the Llama family one by one.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache


RIVALS = ("in_front", "pcw", "ape", "cacheblend_15", "legolink_16", "legolink_32")
APE_TEMPERATURE = APE_SCALE = 0.9
BLEND_SHARE, BLEND_LAYER = 0.15, 1
ATTENTION = "retro_rivals"


@dataclass
class RivalAnswer:
    """
    An answer and what it took.

    Args:
        tokens (`list[int]`): The tokens of the answer, without that of its end.
        logits (`torch.Tensor` of shape `(vocab_size,)`): The predictions behind the question.
        stored_operations (`float`): Operations for what is stored and used again for other questions.
        operations (`float`): All other operations. A multiplication with an addition counts as two.
        stored_bytes (`int`): Size of the keys and values that are stored.
    """

    tokens: list[int]
    logits: torch.Tensor
    stored_operations: float
    operations: float
    stored_bytes: int


@torch.inference_mode()
def answer_by_rival(
    decoder: PreTrainedModel,
    passages: list[list[int]],
    question: list[int],
    rival: str,
    max_new_tokens: int,
    prefix: list[int] | None = None,
) -> RivalAnswer:
    """
    Answers a question as a rival does, by the most probable tokens.

    Args:
        decoder ([`~transformers.PreTrainedModel`]):
            A causal language model of the Llama family.
        passages (`list[list[int]]`):
            Tokens of the passages.
        question (`list[int]`):
            Tokens of the prompt behind the passages.
        rival (`str`):
            `"in_front"`, all is one text; `"pcw"`, passages are read apart, at the same positions; `"ape"`, so too,
            behind a prefix that all share, and the attention to them has a temperature and a scale; `"cacheblend_15"`,
            passages are read apart, and the 15 % of their tokens whose keys change most are read again in their
            context; `"legolink_16"` and `"legolink_32"`, the first tokens of each passage are read again.
        max_new_tokens (`int`):
            Largest number of tokens of the answer.
        prefix (`list[int]`, *optional*):
            The prefix of APE.

    Returns:
        [`RivalAnswer`]

    Raises:
        ValueError: If the rival is unknown, nothing is asked, or the decoder is of another family.
    """
    if rival not in RIVALS:
        raise ValueError(f"the rival is {rival!r}, expected one of {', '.join(RIVALS)}")
    if not question or not passages or not all(passages):
        raise ValueError("a question and passages are expected, none of them empty")
    rope_parts = ("embed_tokens", "layers", "rotary_emb", "norm")
    if not all(part in dict(decoder.base_model.named_children()) for part in rope_parts):
        raise ValueError(
            f"a {decoder.config.model_type!r} model has no {rope_parts}: expected one of the Llama family"
        )
    blocks = [prefix or [], *passages] if rival == "ape" else [[], *passages]
    reading = Reading(decoder, blocks, question, max_new_tokens, same_positions=rival in ("pcw", "ape"))
    front = torch.arange(reading.front)
    with _own_attention(decoder):
        with FlopCounterMode(display=False) as stored:
            if rival != "in_front":
                reading.read(front, apart=True)
        with FlopCounterMode(display=False) as counter:
            if rival == "in_front":
                reading.read(front)
            elif rival == "cacheblend_15":
                reading.blend(front)
            elif rival.startswith("legolink"):
                number = int(rival.split("_")[1])
                reading.read(front[(reading.place[: reading.front] < number) & (reading.block[: reading.front] > 1)])
            logits, tokens = reading.answer(max_new_tokens, is_ape=rival == "ape")
    stored_bytes = 0 if rival == "in_front" else reading.front_bytes
    return RivalAnswer(tokens, logits, stored.get_total_flops(), counter.get_total_flops(), stored_bytes)


class Reading(Cache):
    """
    The keys and values of one row, in the columns of its tokens: prefix, passages, question and answer.

    Args:
        decoder ([`~transformers.PreTrainedModel`]): The decoder.
        blocks (`list[list[int]]`): Tokens of a prefix, which may be empty, and of the passages.
        question (`list[int]`): Tokens of the question.
        max_new_tokens (`int`): Room for the answer.
        same_positions (`bool`): Whether all passages stand at the same positions behind the prefix.
    """

    def __init__(
        self,
        decoder: PreTrainedModel,
        blocks: list[list[int]],
        question: list[int],
        max_new_tokens: int,
        same_positions: bool,
    ):
        super().__init__(layers=[])
        self.model, self.head = decoder.base_model, decoder.get_output_embeddings()
        self.config = decoder.config
        self.front = sum(map(len, blocks))
        self.prefix_length, self.length = len(blocks[0]), self.front + len(question)
        room = self.length + max_new_tokens
        self.tokens = torch.tensor([token for block in [*blocks, question] for token in block] + [0] * max_new_tokens)
        self.block = torch.tensor([n for n, block in enumerate(blocks) for _ in block] + [-1] * (room - self.front))
        self.place = torch.tensor([n for block in blocks for n in range(len(block))] + [0] * (room - self.front))
        self.position = torch.arange(room)
        if same_positions:
            self.position[: self.front] = self.place[: self.front] + self.prefix_length * (
                self.block[: self.front] > 0
            )
            longest = self.prefix_length + max(map(len, blocks[1:]))
            self.position[self.front :] = longest + torch.arange(room - self.front)
        heads, size = self.config.num_key_value_heads, self.config.head_dim
        shape = (self.config.num_hidden_layers, 2, 1, heads, room, size)
        self.states = torch.zeros(shape, dtype=decoder.dtype)  # keys and values of each layer
        self.columns, self.end = torch.arange(0), 0

    @property
    def front_bytes(self) -> int:
        """`int`: Size of the keys and values of prefix and passages."""
        return self.states[..., : self.front, :].nbytes

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts keys and values into the columns that are read, and returns all up to the last of them."""
        self.states[layer_idx, 0][:, :, self.columns] = key_states
        self.states[layer_idx, 1][:, :, self.columns] = value_states
        return tuple(self.states[layer_idx, :, :, :, : self.end])

    def read(
        self,
        columns: torch.LongTensor,
        apart: bool = False,
        hidden: torch.Tensor | None = None,
        layers: slice = slice(None),
        **options,
    ) -> torch.Tensor:
        """
        Computes tokens in some layers, and puts their keys and values into the cache.

        Args:
            columns (`torch.LongTensor` of shape `(n,)`):
                Columns of the tokens. Each sees all columns up to itself.
            apart (`bool`, *optional*, defaults to `False`):
                Whether a token sees only its own passage and the prefix.
            hidden (`torch.Tensor` of shape `(1, n, hidden_size)`, *optional*):
                What enters the first of these layers. Defaults to the embeddings of the tokens.
            layers (`slice`, *optional*):
                The layers. Defaults to all.
            options:
                Passed to the attention.

        Returns:
            `torch.Tensor`: what leaves the last of these layers.
        """
        if len(columns) == 0:
            return self.states.new_zeros(1, 0, self.config.hidden_size)
        self.columns, self.end = columns, int(columns.max()) + 1
        keys = torch.arange(self.end)
        seen = keys <= columns[:, None]  # [n, end]
        if apart:
            seen &= (self.block[keys] == self.block[columns, None]) | (self.block[keys] == 0)
        dtype = self.states.dtype
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[None, None]
        hidden = self.model.embed_tokens(self.tokens[columns][None]) if hidden is None else hidden
        position_ids = self.position[columns][None]
        rotary = self.model.rotary_emb(hidden, position_ids=position_ids)
        for layer in self.model.layers[layers]:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=position_ids,
                position_embeddings=rotary,
                past_key_values=self,
                use_cache=True,
                **options,
            )
        return hidden

    def blend(self, columns: torch.LongTensor) -> None:
        """Reads all in the first layers, and in the others those whose keys changed most in the last of the first."""
        before = self.states[BLEND_LAYER, 0].clone()
        hidden = self.read(columns, layers=slice(BLEND_LAYER + 1))
        changes = (self.states[BLEND_LAYER, 0] - before)[0, :, columns].float().square().sum((0, 2))  # [n]
        number = max(1, round(BLEND_SHARE * len(columns)))
        chosen = changes.topk(number).indices.sort().values
        self.read(columns[chosen], hidden=hidden[:, chosen], layers=slice(BLEND_LAYER + 1, None))

    def answer(self, max_new_tokens: int, is_ape: bool) -> tuple[torch.Tensor, list[int]]:
        """The predictions behind the question, and the most probable tokens of an answer."""
        options = {"context": (self.prefix_length, self.front)} if is_ape else {}
        ends = self.config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        columns = torch.arange(self.front, self.length)
        found: list[int] = []
        first = None
        while True:
            hidden = self.read(columns, **options)[:, -1:]
            logits = self.head(self.model.norm(hidden))[0, 0]
            first = logits if first is None else first
            token = int(logits.argmax())
            if token in ends:
                return first, found
            found.append(token)
            if len(found) == max_new_tokens:
                return first, found
            columns = columns[-1:] + 1
            self.tokens[columns] = token


def rival_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    context: tuple[int, int] | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Attention `(B, H, n, D)` by its formula. With a `context`, the first and the end of the columns of passages, it is
    that of APE: their scores are divided by a temperature T, and the sum of their exponentials is taken to the power
    of S · T, with the scale S.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling + attention_mask  # [B, H, n, N]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if context is None:
        output = scores.softmax(-1).to(value.dtype) @ value
    else:
        is_context = torch.zeros(scores.shape[-1], dtype=torch.bool)
        is_context[slice(*context)] = True
        own, rest = scores[..., is_context] / APE_TEMPERATURE, scores[..., ~is_context]
        weight = APE_SCALE * APE_TEMPERATURE * own.logsumexp(-1, keepdim=True) - rest.logsumexp(-1, keepdim=True)
        weight = weight.sigmoid().to(value.dtype)
        output = weight * (own.softmax(-1).to(value.dtype) @ value[:, :, is_context])
        output = output + (1 - weight) * (rest.softmax(-1).to(value.dtype) @ value[:, :, ~is_context])
    return output.transpose(1, 2).contiguous(), None


@contextmanager
def _own_attention(decoder: PreTrainedModel):
    """Lets a decoder attend by formula, whose operations PyTorch's counter sees."""
    AttentionInterface.register(ATTENTION, rival_attention)
    before = decoder.config._attn_implementation
    decoder.config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        decoder.config._attn_implementation = before


__all__ = ["RIVALS", "RivalAnswer", "answer_by_rival"]
