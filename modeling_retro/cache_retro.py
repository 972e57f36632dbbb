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
"""Caches of RETRO decoders, which hold the keys and values of the decoder and the state of its retrieval"""

from collections.abc import Callable, Sequence

import torch
from transformers.cache_utils import DynamicCache
from transformers.configuration_utils import PreTrainedConfig

from .neighbors_retro import Neighbors, pad_to_shape


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


def _insert_zeros(tensor: torch.Tensor, dim: int, index: int, number: int) -> torch.Tensor:
    """Inserts `number` zeros at `index` of a dimension."""
    shape = list(tensor.shape)
    shape[dim] = number
    before, after = tensor.split([index, tensor.shape[dim] - index], dim)
    return torch.cat([before, tensor.new_zeros(shape), after], dim)


def _stack_rows(tensors: Sequence[torch.Tensor | None], sizes: Sequence[int]) -> torch.Tensor | None:
    """
    Concatenates tensors `(sizes[i], ...)` along the rows, and pads them with zeros at the end to the largest shape. A
    `None` becomes rows of zeros. If all are `None`, so is the result.
    """
    known = [tensor for tensor in tensors if tensor is not None]
    if not known:
        return None
    shape = [0, *(max(lengths) for lengths in zip(*(tensor.shape[1:] for tensor in known)))]
    empty = [(size, *shape[1:]) for size in sizes]
    return torch.cat(
        [
            known[0].new_zeros(zeros) if tensor is None else pad_to_shape(tensor, shape)
            for tensor, zeros in zip(tensors, empty)
        ]
    )


class RetrievalCache(DynamicCache):
    """
    A [`~transformers.DynamicCache`] that also holds the state of retrieval, which every kind of RETRO model needs from
    earlier calls. It has a layer for each layer of the decoder, and it can be reordered, cropped, repeated and indexed
    like any other cache. All layers keep the whole row, because a crop may need tokens that have left a sliding
    window. Such windows are applied by the mask.

    Attributes:
        input_ids (`torch.LongTensor` of shape `(batch_size, past_length)`, *optional*):
            The cached tokens, which become the query when their chunk is complete. -1 where only embeddings were
            given.
        neighbor_input_ids (`torch.LongTensor` of shape `(batch_size, num_slots, k, neighbor_length)`, *optional*):
            Neighbors of each chunk, in the order of the chunks of the row.
        neighbor_attention_mask (`torch.BoolTensor` of the same shape, *optional*):
            True for real tokens.
    """

    _row_tensors = ("input_ids", "neighbor_input_ids", "neighbor_attention_mask")
    # The attributes among these with a column for each token of the row.
    _column_tensors = ("input_ids",)

    def __init__(self, config: PreTrainedConfig | None = None, **kwargs):
        super().__init__(**kwargs)  # with a config, layers would drop tokens outside a sliding window
        self._reset_retrieval()

    @property
    def front_length(self) -> int:
        """`int`: Number of keys in front of those of the row's tokens."""
        return 0

    def _reset_retrieval(self) -> None:
        self.input_ids: torch.LongTensor | None = None
        self.neighbor_input_ids: torch.LongTensor | None = None
        self.neighbor_attention_mask: torch.BoolTensor | None = None

    def update_input_ids(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """Appends tokens `(batch_size, seq_len)` and returns all of them, `(batch_size, past_length + seq_len)`."""
        self.input_ids = input_ids if self.input_ids is None else torch.cat([self.input_ids, input_ids], dim=1)
        return self.input_ids

    def update_neighbors(self, neighbors: Neighbors | None, first_slot: torch.LongTensor, max_slots: int) -> None:
        """
        Records the neighbors of the chunks that a call completes.

        Args:
            neighbors ([`Neighbors`], *optional*):
                Neighbors of the completed chunks, `None` if the call has none.
            first_slot (`torch.LongTensor` of shape `(batch_size,)`):
                The slot of the first chunk that this call completes, for each row.
            max_slots (`int`):
                Number of slots that a row can have after this call.
        """
        if self.neighbor_attention_mask is not None:
            # A crop does not remove neighbors, so those of the new chunks may be outdated.
            slots = torch.arange(self.neighbor_attention_mask.shape[1], device=first_slot.device)
            self.neighbor_attention_mask &= (slots < first_slot[:, None])[:, :, None, None]
        if neighbors is None:
            return
        batch_size, num_slots, k, neighbor_length = neighbors.input_ids.shape
        if self.neighbor_input_ids is not None:
            k = max(k, self.neighbor_input_ids.shape[2])
            neighbor_length = max(neighbor_length, self.neighbor_input_ids.shape[3])
        else:
            self.neighbor_input_ids = neighbors.input_ids.new_zeros(batch_size, 0, k, neighbor_length)
            self.neighbor_attention_mask = neighbors.attention_mask.new_zeros(batch_size, 0, k, neighbor_length)
        # If a row completes fewer chunks than others, its masked slots may lie beyond its last possible chunk.
        shape = (batch_size, max_slots + num_slots, k, neighbor_length)
        rows = torch.arange(batch_size, device=first_slot.device)[:, None]
        slots = first_slot[:, None] + torch.arange(num_slots, device=first_slot.device)  # [B, L]
        self.neighbor_input_ids = pad_to_shape(self.neighbor_input_ids, shape)
        self.neighbor_attention_mask = pad_to_shape(self.neighbor_attention_mask, shape)
        shape = (batch_size, num_slots, k, neighbor_length)
        self.neighbor_input_ids[rows, slots] = pad_to_shape(neighbors.input_ids, shape)
        self.neighbor_attention_mask[rows, slots] = pad_to_shape(neighbors.attention_mask, shape)

    @property
    def neighbors(self) -> Neighbors | None:
        """[`Neighbors`] or `None`: the neighbors of all chunks of the rows."""
        if self.neighbor_input_ids is None:
            return None
        return Neighbors(self.neighbor_input_ids, self.neighbor_attention_mask)

    def _map_retrieval(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name in self._row_tensors:
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, function(tensor))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorders the rows for beam search."""
        super().reorder_cache(beam_idx)
        self._map_retrieval(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._map_retrieval(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices`."""
        super().batch_select_indices(indices)
        self._map_retrieval(lambda tensor: tensor[indices.to(tensor.device)])

    def add_rows(self, others: "Sequence[RetrievalCache]") -> None:
        """
        Appends the rows of other caches to those of this one, so that all continue in one batch. Rows are padded on
        the left to the length of the longest, and the attention mask of later calls must have zeros there.

        Args:
            others (`Sequence[RetrievalCache]`):
                Filled caches of the same model, from which no tokens were cropped since their last call.
        """
        caches = [self, *others]
        length = max(cache.get_seq_length() for cache in caches)
        front = max(cache.front_length for cache in caches)
        for layers in zip(*(cache.layers for cache in caches), strict=True):
            if not layers[0].is_initialized:  # in some decoders, layers share the keys of other layers
                continue
            for name in ("keys", "values"):
                # The padding of both stands between the keys in front and the row.
                padded = [
                    _insert_zeros(states, -2, cache.front_length, front + length - states.shape[-2])
                    for cache, states in zip(caches, (getattr(layer, name) for layer in layers))
                ]
                setattr(layers[0], name, torch.cat(padded))
        self._add_retrieval(others, length)

    def _add_retrieval(self, others: "Sequence[RetrievalCache]", length: int) -> None:
        caches = [self, *others]
        sizes = [cache.input_ids.shape[0] for cache in caches]
        for name in self._row_tensors:
            tensors = [getattr(cache, name) for cache in caches]
            if name in self._column_tensors:
                merged = torch.cat([_insert_zeros(tensor, 1, 0, length - tensor.shape[1]) for tensor in tensors])
            else:
                merged = _stack_rows(tensors, sizes)
            setattr(self, name, merged)

    def drop_columns(self, num_columns: int) -> None:
        """Removes the first columns of all rows, which must be padding."""
        for layer in self.layers:
            if layer.is_initialized and num_columns > 0:
                cut = self.front_length
                for name in ("keys", "values"):
                    states = getattr(layer, name)
                    kept = torch.cat([states[..., :cut, :], states[..., cut + num_columns :, :]], dim=-2)
                    setattr(layer, name, kept)
        for name in self._column_tensors:
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor[:, num_columns:])

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens (a negative number), across ends of chunks too."""
        super().crop(tokens_to_remove)
        if tokens_to_remove != 0 and self.input_ids is not None:
            self.input_ids = self.input_ids[:, :tokens_to_remove]

    def reset(self) -> None:
        """Removes everything from the cache."""
        super().reset()
        self._reset_retrieval()


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
                _stack_rows([cache.current_key_values.get(layer_idx, (None, None))[i] for cache in caches], sizes)
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


__all__ = ["RetrievalCache", "RetroCache"]
