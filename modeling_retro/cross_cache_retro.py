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
"""Caches of chunked cross attention, which also hold the keys and values of the neighbors in sight"""

from collections.abc import Callable, Sequence

import torch

from .cache_retro import RetrievalCache, StaticCacheMixin, stack_rows
from .neighbors_retro import pad_to_shape


def prepend_slot(first: torch.Tensor, others: torch.Tensor | None, dim: tuple[int, ...]) -> torch.Tensor:
    """
    Puts `first` `(B, ...)` in front of `others` `(B, L, ...)`. The dimensions `dim`, in which the two may differ, are
    padded with zeros.
    """
    first = first.unsqueeze(1)
    if others is None:
        return first
    length = [max(sizes) if i in dim else 0 for i, sizes in enumerate(zip(first.shape, others.shape))]
    return torch.cat([pad_to_shape(first, length), pad_to_shape(others, length)], dim=1)


class RetroCache(RetrievalCache):
    """
    The cache of [`RetroForCausalLM`].

    Attributes:
        chunk_states (`torch.Tensor` of shape `(batch_size, past_length, hidden_size)`, *optional*):
            Activations at the first layer with chunked cross attention, which the neighbor encoder attends to.
        current_attention_mask (`torch.BoolTensor` of shape `(batch_size, k * neighbor_length)`, *optional*):
            True for the real neighbor tokens of the last complete chunk of each row.
        current_key_values (`dict[int, tuple[torch.Tensor, torch.Tensor]]`):
            Keys and values of these neighbors for each layer with chunked cross attention, each of shape
            `(batch_size, num_key_value_heads, k * neighbor_length, head_dim)`.
        current_slot (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            The slot of these neighbors.
        is_cropped (`bool`):
            Whether no call has followed the last crop. If that has removed the chunk of the current neighbors, the
            next call encodes those of the last complete chunk again.
    """

    _row_tensors = (*RetrievalCache._row_tensors, "chunk_states", "current_attention_mask", "current_slot")
    _column_tensors = (*RetrievalCache._column_tensors, "chunk_states")

    def _reset_retrieval(self) -> None:
        super()._reset_retrieval()
        self.chunk_states: torch.Tensor | None = None
        self.current_attention_mask: torch.BoolTensor | None = None
        self.current_key_values: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.current_slot: torch.LongTensor | None = None
        self.is_cropped = False

    def drop_outdated(self, last_slot: torch.LongTensor) -> None:
        """After a crop: drops the current neighbors, unless they are those of `last_slot` `(batch_size,)`."""
        if self.is_cropped and self.current_key_values and not torch.equal(self.current_slot, last_slot):
            self.current_attention_mask, self.current_key_values = None, {}
        self.is_cropped = False

    def update_chunk_states(self, states: torch.Tensor) -> torch.Tensor:
        """Appends activations `(batch_size, seq_len, hidden_size)` and returns all of them."""
        self.chunk_states = states if self.chunk_states is None else torch.cat([self.chunk_states, states], dim=1)
        return self.chunk_states

    def update_current_mask(
        self, attention_mask: torch.BoolTensor | None, next_slot: torch.LongTensor
    ) -> torch.BoolTensor:
        """
        Puts the mask of the current neighbors in front of the mask of new slots, `(batch_size, num_new, K)` or `None`,
        and returns the result. The mask of `next_slot` `(batch_size,)` becomes that of the current neighbors. Rows
        whose `next_slot` is none of these slots have no current neighbors.
        """
        if self.current_key_values:
            attention_mask = prepend_slot(self.current_attention_mask, attention_mask, dim=(2,))
        rows = torch.arange(next_slot.shape[0], device=next_slot.device)
        known = (next_slot >= 0) & (next_slot < attention_mask.shape[1])
        self.current_attention_mask = attention_mask[rows, torch.where(known, next_slot, 0)] & known[:, None]
        return attention_mask

    def update_current(
        self,
        keys: torch.Tensor | None,
        values: torch.Tensor | None,
        next_slot: torch.LongTensor,
        layer_idx: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Puts the keys and values of the current neighbors in front of those of new slots, each of shape `(batch_size,
        num_new, num_key_value_heads, K, head_dim)` or `None`, and returns the result. Those of `next_slot` become the
        keys and values of the current neighbors.
        """
        if layer_idx in self.current_key_values:
            current_keys, current_values = self.current_key_values[layer_idx]
            if keys is None:
                return current_keys.unsqueeze(1), current_values.unsqueeze(1)
            keys, values = prepend_slot(current_keys, keys, dim=(3,)), prepend_slot(current_values, values, dim=(3,))
        rows = torch.arange(next_slot.shape[0], device=keys.device)
        slots = next_slot.to(keys.device).clamp(0, keys.shape[1] - 1)
        self.current_key_values[layer_idx] = (keys[rows, slots], values[rows, slots])
        return keys, values

    def _map_retrieval(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._map_retrieval(function)
        self.current_key_values = {
            layer_idx: (function(keys), function(values))
            for layer_idx, (keys, values) in self.current_key_values.items()
        }

    def _add_retrieval(self, others: "Sequence[RetroCache]", length: int) -> None:
        caches = [self, *others]
        sizes = [cache.input_ids.shape[0] for cache in caches]
        super()._add_retrieval(others, length)
        layers = {layer_idx: None for cache in caches for layer_idx in cache.current_key_values}
        self.current_key_values = {
            layer_idx: tuple(
                stack_rows([cache.current_key_values.get(layer_idx, (None, None))[i] for cache in caches], sizes)
                for i in (0, 1)
            )
            for layer_idx in layers
        }

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens (a negative number), across ends of chunks too."""
        super().crop(tokens_to_remove)
        if tokens_to_remove == 0:
            return
        self.chunk_states = self.chunk_states[:, :tokens_to_remove] if self.chunk_states is not None else None
        self.is_cropped = True


class RetroStaticCache(StaticCacheMixin, RetroCache):
    """
    A [`RetroCache`] of fixed shapes. Layers with chunked cross attention have room for the keys of the neighbors in
    sight, which are absent at first.
    """

    def load(self, cache: RetroCache, cross_attention_layers: Sequence[int]) -> None:
        """
        Takes over what the prompt has left in another cache.

        Args:
            cache ([`RetroCache`]): The other cache.
            cross_attention_layers (`Sequence[int]`): The layers with chunked cross attention.

        Raises:
            ValueError: If there is no room for it.
        """
        mask = cache.current_attention_mask
        self.check_room(cache.get_seq_length(), 0 if mask is None else mask.shape[1])
        self._load_layers(cache, 0)
        batch_size = len(self.input_ids)
        if self.neighbor_input_ids is None:
            self.neighbor_input_ids = self.input_ids.new_zeros(batch_size, 0, 1, 1)
            self.neighbor_attention_mask = self.neighbor_input_ids.bool()
            self.current_attention_mask = self.neighbor_attention_mask.new_zeros(batch_size, 0)
        self.current_attention_mask = pad_to_shape(self.current_attention_mask, (batch_size, self.front_room))
        self.chunk_states = _fixed(self.chunk_states, 1, self.max_length)
        for layer_idx in cross_attention_layers:
            nothing = [states[:, :, :0] for states in (cache.layers[layer_idx].keys, cache.layers[layer_idx].values)]
            states = cache.current_key_values.get(layer_idx, nothing)
            self.current_key_values[layer_idx] = tuple(_fixed(x, 2, self.front_room) for x in states)

    def update_chunk_states(self, states: torch.Tensor) -> torch.Tensor:
        """Writes activations `(batch_size, seq_len, hidden_size)` behind the others, and returns all with the room."""
        # The first layer with cross attention has the keys of these tokens already.
        end = self.layers[next(iter(self.current_key_values))].cumulative_length
        columns = end - states.shape[1] + torch.arange(states.shape[1], device=states.device)
        return self.chunk_states.index_copy_(1, columns, states)

    def update_current_mask(
        self, attention_mask: torch.BoolTensor | None, next_slot: torch.LongTensor
    ) -> torch.BoolTensor:
        """
        Records the masks of new neighbors (see [`RetroCache.update_current_mask`]).

        Raises:
            ValueError: If there is no room for their keys.
        """
        if attention_mask is not None:
            self.check_room(self.get_seq_length(), attention_mask.shape[2])
        return super().update_current_mask(attention_mask, next_slot)

    def update_current(
        self,
        keys: torch.Tensor | None,
        values: torch.Tensor | None,
        next_slot: torch.LongTensor,
        layer_idx: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Replaces the current keys and values in place (see [`RetroCache.update_current`])."""
        current = self.current_key_values[layer_idx]
        found = super().update_current(keys, values, next_slot, layer_idx)
        if keys is not None:
            for fixed, states in zip(current, self.current_key_values[layer_idx]):
                fixed.copy_(states)
            self.current_key_values[layer_idx] = current
        return found


def _fixed(states: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """A copy of states with room for `size` in a dimension, at an address that stays."""
    shape = [size if i == dim else length for i, length in enumerate(states.shape)]
    states = pad_to_shape(states.clone(), shape)
    torch._dynamo.mark_static_address(states)
    return states


__all__ = ["RetroCache", "RetroStaticCache"]
