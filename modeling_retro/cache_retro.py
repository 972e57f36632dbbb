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
"""What the caches of all RETRO models share: keys and values of the decoder, and the state of its retrieval"""

from collections.abc import Callable, Sequence

import torch
from transformers.cache_utils import DynamicCache, StaticLayer
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import CompileConfig

from .chunk_layout_retro import take_columns
from .neighbors_retro import Neighbors, pad_to_shape


def _insert_zeros(tensor: torch.Tensor, dim: int, index: int, number: int) -> torch.Tensor:
    """Inserts `number` zeros at `index` of a dimension."""
    shape = list(tensor.shape)
    shape[dim] = number
    before, after = tensor.split([index, tensor.shape[dim] - index], dim)
    return torch.cat([before, tensor.new_zeros(shape), after], dim)


def stack_rows(tensors: Sequence[torch.Tensor | None], sizes: Sequence[int]) -> torch.Tensor | None:
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
                Filled caches of the same model, from which no tokens were cropped since their last call. (From this
                one tokens may have been cropped that complete no chunk.)
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
                merged = stack_rows(tensors, sizes)
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

    def take_columns(self, columns: torch.LongTensor) -> None:
        """
        Keeps some columns of each row, `(batch_size, n)`. Those that are left out must be padding or the last tokens,
        and complete no chunk.
        """
        for layer in self.layers:
            if layer.is_initialized:
                rows = columns.to(layer.keys.device)[:, None, :, None]
                for name in ("keys", "values"):
                    front, row = getattr(layer, name).tensor_split([self.front_length], dim=-2)
                    row = row.gather(2, rows.expand(-1, row.shape[1], -1, row.shape[3]))
                    setattr(layer, name, torch.cat([front, row], dim=-2))
        for name in self._column_tensors:
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, take_columns(tensor, columns.to(tensor.device)))

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens (a negative number), across ends of chunks too."""
        super().crop(tokens_to_remove)
        if tokens_to_remove != 0 and self.input_ids is not None:
            self.input_ids = self.input_ids[:, :tokens_to_remove]

    def reset(self) -> None:
        """Removes everything from the cache."""
        super().reset()
        self._reset_retrieval()


class StaticCacheMixin:
    """
    Fixed shapes for a [`RetrievalCache`], for which one compiled decoding step serves a whole generation. A prompt is
    read with a cache that grows, from which this one takes over what the prompt has left.

    Args:
        front_room (`int`):
            Largest number of keys of neighbors and passages in sight.
        max_length (`int`):
            Largest number of tokens of a row.
        compile_config (`CompileConfig`, *optional*):
            How decoding steps are compiled. By default they are not.
    """

    def __init__(self, front_room: int, max_length: int, compile_config: CompileConfig | None = None):
        super().__init__()
        self.front_room, self.max_length, self.compile_config = front_room, max_length, compile_config

    @property
    def is_compileable(self) -> bool:
        """`bool`: False, because `generate()` must compile the step of the decoder and not what looks up neighbors."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of cached tokens of the row."""
        return 0 if self.input_ids is None else self.input_ids.shape[1]

    def check_room(self, num_tokens: int, num_keys: int) -> None:
        """Raises a `ValueError` if a row of so many tokens, with so many keys of neighbors in sight, has no room."""
        if num_tokens > self.max_length or num_keys > self.front_room:
            raise ValueError(
                f"the static cache has room for {self.max_length} tokens and {self.front_room} keys of neighbors, but "
                f"there are {num_tokens} and {num_keys}: give it more, or generate with a dynamic one"
            )

    def _load_layers(self, cache: RetrievalCache, room: int) -> None:
        """Takes over the layers of another cache, with room for so many keys in front of the row."""
        length, front = cache.get_seq_length(), cache.front_length
        self.check_room(length, front)
        for layer in cache.layers:
            fixed = StaticLayer(room + self.max_length)
            if layer.is_initialized:
                fixed.lazy_initialization(layer.keys, layer.values)
                for target, states in ((fixed.keys, layer.keys), (fixed.values, layer.values)):
                    target[..., :front, :] = states[..., :front, :]
                    target[..., room : room + length, :] = states[..., front:, :]
                fixed.cumulative_length.fill_(room + length)
            self.layers.append(fixed)
        for name in cache._row_tensors:
            setattr(self, name, getattr(cache, name))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what is written behind a row cannot be taken back."""
        raise ValueError("a static cache cannot be cropped; generate with a dynamic one")


__all__ = ["RetrievalCache", "StaticCacheMixin", "stack_rows"]
