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
"""The arguments of a forward pass of joint attention, and neighbors that it has read"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from .chunk_layout_retro import TokenLocations, locate_call
from .configuration_retro_joint import RetroJointConfig
from .joint_cache_retro import RetroJointCache
from .neighbor_memory_retro import NeighborStates
from .neighbors_retro import Neighbors


@dataclass
class Front:
    """
    Neighbors that have been read, and who sees them.

    Args:
        read ([`NeighborStates`]):
            Their keys and values, in slots.
        seen (`torch.BoolTensor` of shape `(batch_size, num_slots, k, neighbor_length)`):
            True for the tokens that a row may see.
        slot (`torch.LongTensor` of shape `(batch_size, W)`):
            The slot that each state of a call sees; `num_slots` if it sees none.
    """

    read: NeighborStates
    seen: torch.BoolTensor
    slot: torch.LongTensor

    def sees(self) -> torch.BoolTensor:
        """Which states see which tokens, `(B, W, S k r)`."""
        slots = torch.arange(self.seen.shape[1], device=self.seen.device)
        slots = slots.repeat_interleave(self.seen[0, 0].numel())
        return (self.slot[..., None] == slots) & self.seen.flatten(1)[:, None]


@dataclass
class Passages:
    """
    The passages of a question as they are read.

    Args:
        texts ([`Neighbors`]):
            The texts that are read, each by itself, `(batch_size, 1, n, L)`.
        seen (`torch.BoolTensor` of shape `(batch_size, 1, n, L)`):
            True for the tokens that the row sees.
        by_first (`bool`):
            Whether the first token of the row sees them too, because it continues the texts.
    """

    texts: Neighbors
    seen: torch.BoolTensor
    by_first: bool


@dataclass
class JointCall:
    """The arguments of a forward pass."""

    input_ids: torch.LongTensor | None  # [B, T]
    inputs_embeds: torch.Tensor | None  # [B, T, d]
    attention_mask: torch.Tensor | None  # [B, N] or [B, 1, T, N]
    position_ids: torch.LongTensor | None  # [B, T]
    past_key_values: Cache | None
    labels: torch.LongTensor | None  # [B, T]
    logits_to_keep: int | torch.Tensor
    options: dict[str, Any]
    passages: Passages | None = None  # of a question

    @property
    def inputs(self) -> torch.Tensor:
        """`torch.Tensor`: the tokens, or their embeddings if only these are known."""
        return self.input_ids if self.input_ids is not None else self.inputs_embeds

    @property
    def cache(self) -> RetroJointCache | None:
        """[`RetroJointCache`] or `None`: the cache, if it can hold the state of retrieval."""
        return self.past_key_values if isinstance(self.past_key_values, RetroJointCache) else None

    @property
    def past_length(self) -> int:
        """`int`: Number of cached tokens."""
        return self.past_key_values.get_seq_length() if self.past_key_values is not None else 0

    @property
    def given_mask(self) -> torch.Tensor | None:
        """`torch.Tensor` or `None`: a mask over queries and keys `(B, 1, T, N)` that the caller made."""
        return self.attention_mask if self.attention_mask is not None and self.attention_mask.ndim == 4 else None

    @property
    def is_prompt(self) -> bool:
        """`bool`: Whether nothing is predicted but the next token."""
        return self.labels is None and isinstance(self.logits_to_keep, int) and self.logits_to_keep == 1

    def locate(self, chunk_size: int) -> TokenLocations:
        """Finds the places of the tokens in their documents and rows."""
        return locate_call(self.inputs, self.attention_mask, self.position_ids, self.past_length, chunk_size)

    def record_tokens(self) -> None:
        """Appends the tokens to the cache."""
        if self.cache is not None:
            unknown = self.inputs.new_full(self.inputs.shape[:2], -1, dtype=torch.long)
            self.cache.update_input_ids(unknown if self.input_ids is None else self.input_ids)

    def cut(self, start: int, end: int) -> "JointCall":
        """The call for the tokens from `start` to `end`, if those before it are cached. It has no labels."""
        length = self.inputs.shape[1]
        mask, kept = self.attention_mask, 0
        if mask is not None:
            mask = mask[..., : mask.shape[-1] - length + end]
            mask = mask[:, :, start:end] if mask.ndim == 4 else mask
        if isinstance(self.logits_to_keep, int) and self.logits_to_keep > 0 and self.labels is None:
            kept = max(1, end - max(start, length - self.logits_to_keep))
        return JointCall(
            input_ids=None if self.input_ids is None else self.input_ids[:, start:end],
            inputs_embeds=None if self.inputs_embeds is None else self.inputs_embeds[:, start:end],
            attention_mask=mask,
            position_ids=None if self.position_ids is None else self.position_ids[:, start:end],
            past_key_values=self.past_key_values,
            labels=None,
            logits_to_keep=kept,
            options=self.options,
        )


def check_passages(
    input_ids: torch.LongTensor | None,
    attention_mask: torch.Tensor | None,
    before: tuple[torch.LongTensor | None, torch.Tensor | None],
    passages: str,
    config: RetroJointConfig,
) -> Passages | None:
    """
    Checks the passages of a question `(batch_size, k, passage_length)`, and arranges them as they are read: each by
    itself, or as one text. If tokens `(batch_size, P)` of the prompt stand before the passages, each passage is read
    behind these, and the row sees these once.

    Raises:
        ValueError: For other shapes, for passages longer than a neighbor, and for an unknown way to read them.
    """
    if passages not in ("apart", "in_order"):
        raise ValueError(f"`passages` is {passages!r}, expected 'apart' or 'in_order'")
    if input_ids is None:
        if before[0] is not None:
            raise ValueError("`passage_prefix_input_ids` are given without passages: make them the start of the row")
        return None
    if input_ids.ndim != 3 or input_ids.shape[2] > config.neighbor_length:
        raise ValueError(
            f"`passage_input_ids` has shape {tuple(input_ids.shape)}, expected (batch_size, k, passage_length) with "
            f"at most {config.neighbor_length} tokens in a passage, the length of a neighbor; split longer ones"
        )
    mask = _check_mask("passage", input_ids, attention_mask)[:, None]  # [B, 1, k, r]
    if before[0] is None:
        if not mask.any():
            return None
        texts = Neighbors(input_ids[:, None], mask)
        if passages == "in_order":
            texts = texts.in_order()
            return Passages(texts, texts.attention_mask, True)
        return Passages(texts, texts.seen(config.hidden_neighbor_tokens), False)
    if before[0].ndim != 2 or len(before[0]) != len(input_ids) or input_ids.numel() == 0:
        raise ValueError(
            f"`passage_prefix_input_ids` has shape {tuple(before[0].shape)} and `passage_input_ids` "
            f"{tuple(input_ids.shape)}, expected (batch_size, prefix_length) and (batch_size, k, passage_length)"
        )
    before_mask = _check_mask("passage_prefix", *before)
    if passages == "in_order":
        ids, mask = (
            torch.cat([before[0], input_ids.flatten(1)], dim=1),
            torch.cat([before_mask, mask.flatten(1)], dim=1),
        )
        texts = Neighbors(ids[:, None, None], mask[:, None, None]).in_order()
        return Passages(texts, texts.attention_mask, True)
    k = input_ids.shape[1]
    ids, before_mask = (x[:, None, None].expand(-1, -1, k, -1) for x in (before[0], before_mask))
    texts = Neighbors(torch.cat([ids, input_ids[:, None]], dim=-1), torch.cat([before_mask, mask], dim=-1))
    # Each passage has a copy of the tokens before it, and all copies have the same states.
    seen = texts.attention_mask.clone()
    seen[:, :, 1:, : ids.shape[-1]] = False
    return Passages(texts, seen, True)


def begin_before_passages(
    input_ids: torch.LongTensor | None, attention_mask: torch.Tensor | None, bos_token_id: int | None
) -> dict[str, torch.Tensor]:
    """
    Lets the BOS token of a question stand before its passages, as it stands before a text: models that were trained
    with one read badly what has none in front of it. In the row it becomes padding, so that no column moves.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): Tokens of the prompt.
        attention_mask (`torch.Tensor` of the same shape, *optional*): 1 (or True) for real ones, padded on the left.
        bos_token_id (`int`, *optional*): The BOS token of the model.

    Returns:
        `dict[str, torch.Tensor]`: `passage_prefix_input_ids` `(batch_size, 1)` and a new `attention_mask`. Nothing
        unless every row begins with a BOS token and has others. A token that comes again, such as the one that begins
        each message of some chat templates, is no BOS token.
    """
    if input_ids is None or input_ids.ndim != 2 or bos_token_id is None:
        return {}
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        return {}
    first = mask.long().argmax(-1, keepdim=True)  # [B, 1]
    begins = (input_ids.gather(1, first) == bos_token_id)[:, 0] & (mask.sum(-1) > 1)
    is_bos = (input_ids == bos_token_id) & mask.bool()
    if not bool((begins & (is_bos.sum(-1) == 1)).all()):
        return {}
    prefix = input_ids.new_full((len(input_ids), 1), bos_token_id)
    return {"passage_prefix_input_ids": prefix, "attention_mask": mask.scatter(1, first, 0)}


def _check_mask(name: str, input_ids: torch.LongTensor, mask: torch.Tensor | None) -> torch.BoolTensor:
    if mask is None:
        mask = torch.ones_like(input_ids)
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"`{name}_attention_mask` has shape {tuple(mask.shape)}, expected that of `{name}_input_ids`, "
            f"{tuple(input_ids.shape)}"
        )
    return mask.bool()


__all__ = ["Front", "JointCall", "Passages", "begin_before_passages", "check_passages"]
