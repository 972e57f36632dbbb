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
"""The cache of joint attention, in which the keys and values of neighbors stand in front of those of the row"""

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache

from .attention_retro import Blocks
from .cache_retro import RetrievalCache, StaticCacheMixin
from .neighbor_memory_retro import LayerStates, compress
from .neighbors_retro import pad_to_shape


class RetroJointCache(RetrievalCache):
    """
    The cache of [`RetroJointForCausalLM`]. In every layer the keys and values of neighbors stand in front of those of
    the row, so that the decoder's own attention reads both.

    Attributes:
        front_mask (`torch.BoolTensor` of shape `(batch_size, front_length)`, *optional*):
            True for the keys of real neighbor tokens. `None` if there are no keys in front.
        front_stays (`torch.BoolTensor` of shape `(batch_size, front_length)`, *optional*):
            True for the keys of the passages of a question, which stay in sight of all that follows.
        front_slot (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            The slot of the neighbors in front, counted from the first chunk of the row; -1 if there are none.
        is_packed (`bool`):
            Whether some row holds several documents.
        uncropped_length (`int`):
            Number of tokens before those crops that no call has followed. If these have removed the end of a chunk,
            the next call puts the neighbors of the last complete chunk in front again.
    """

    _row_tensors = (*RetrievalCache._row_tensors, "front_mask", "front_stays", "front_slot")

    def _reset_retrieval(self) -> None:
        super()._reset_retrieval()
        self.front_mask: torch.BoolTensor | None = None
        self.front_stays: torch.BoolTensor | None = None
        self.front_slot: torch.LongTensor | None = None
        self.is_packed = False
        self.uncropped_length = 0

    @property
    def front_length(self) -> int:
        """`int`: Number of keys of neighbors in front of the row."""
        return 0 if self.front_mask is None else self.front_mask.shape[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of cached tokens of the row."""
        return max(0, super().get_seq_length(layer_idx) - self.front_length)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the mask, which covers only the row."""
        return self.get_seq_length(layer_idx) + query_length, 0

    def set_front(
        self,
        key_values: list[tuple[torch.Tensor, torch.Tensor] | None],
        front_mask: torch.BoolTensor,
        front_stays: torch.BoolTensor,
    ) -> None:
        """
        Replaces the keys and values in front of the row.

        Args:
            key_values (`list`):
                Keys and values `(batch_size, num_key_value_heads, front_length, head_dim)` for each layer, or `None`
                for a layer without keys and values of its own. With an empty list, nothing stands in front.
            front_mask (`torch.BoolTensor` of shape `(batch_size, front_length)`):
                True for the keys of real neighbor tokens.
            front_stays (`torch.BoolTensor` of shape `(batch_size, front_length)`):
                True for the keys that stay in sight of all that follows.
        """
        for layer, states in zip(self.layers, key_values):
            if states is None:
                continue
            keys, values = states
            layer.keys = torch.cat([keys.to(layer.keys.device), layer.keys[..., self.front_length :, :]], dim=-2)
            layer.values = torch.cat(
                [values.to(layer.values.device), layer.values[..., self.front_length :, :]], dim=-2
            )
        self.front_mask, self.front_stays = front_mask, front_stays

    def add_front(
        self, key_values: list[tuple[torch.Tensor, torch.Tensor] | None], front_mask: torch.BoolTensor
    ) -> None:
        """Puts more keys and values in front of the row. Those in front that no row sees any longer are dropped."""
        length = self.front_length
        joined = [
            None
            if states is None
            else tuple(
                torch.cat([old[..., :length, :].to(new.device), new], dim=-2)
                for old, new in zip((layer.keys, layer.values), states)
            )
            for layer, states in zip(self.layers, key_values)
        ]
        mask = torch.cat([self.front_mask, front_mask], dim=1)
        stays = torch.cat([self.front_stays, torch.zeros_like(front_mask)], dim=1)
        self.set_front(*compress(joined, mask, stays))

    def leave_chunk(self, leaves: torch.BoolTensor) -> None:
        """Hides the neighbors of the last chunk in the rows `(batch_size,)` that leave what follows it."""
        self.front_mask = self.front_mask & (self.front_stays | ~leaves[:, None])

    def num_columns(self, length: int) -> int:
        """Number of keys of a row of `length` tokens."""
        return length

    def keep_states(self, final: Blocks) -> None:
        """Keeps some of the cached states, which are then those of the row in its order."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys = final.take(layer.keys.transpose(1, 2))
                layer.values = final.take(layer.values.transpose(1, 2))

    def replace_columns(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        layer_idx: int,
        rows: torch.LongTensor,
        columns: torch.LongTensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Replaces the keys and values of some tokens of some rows.

        Args:
            keys, values (`torch.Tensor` of shape `(n, num_key_value_heads, b, head_dim)`):
                The new ones.
            layer_idx (`int`):
                The layer.
            rows (`torch.LongTensor` of shape `(n,)`), columns (`torch.LongTensor` of shape `(n, b)`):
                The rows, and the columns of the tokens in them. The same column may come twice, with equal states.

        Returns:
            `tuple`: all keys and values of these rows with what stands in front of them.
        """
        layer = self.layers[layer_idx]
        rows, columns = rows.to(keys.device), columns.to(keys.device) + self.front_length
        for name, new in (("keys", keys), ("values", values)):
            states = getattr(layer, name).transpose(1, 2)  # [B, F + N, Hkv, D]
            states = states.index_put((rows[:, None], columns), new.transpose(1, 2).to(states.dtype))
            setattr(layer, name, states.transpose(1, 2))
        return layer.keys[rows], layer.values[rows]

    def _add_retrieval(self, others: "Sequence[RetroJointCache]", length: int) -> None:
        super()._add_retrieval(others, length)
        self.is_packed = any(cache.is_packed for cache in (self, *others))

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens (a negative number), across ends of chunks too."""
        if tokens_to_remove != 0:
            self.uncropped_length = max(self.uncropped_length, self.get_seq_length())
        super().crop(tokens_to_remove)


class RetroJointStaticCache(StaticCacheMixin, RetroJointCache):
    """
    A [`RetroJointCache`] of fixed shapes. In every layer there is room for the keys that stand in front and, behind
    it, for those of the row.
    """

    def num_columns(self, length: int) -> int:
        """Number of keys of a row, with the room for later ones."""
        return self.max_length

    def load(self, cache: RetroJointCache) -> None:
        """
        Takes over what the prompt has left in another cache.

        Raises:
            ValueError: If there is no room for it.
        """
        self._load_layers(cache, self.front_room)
        self.is_packed = cache.is_packed
        nothing = self.input_ids.new_zeros(len(self.input_ids), 0, dtype=torch.bool)
        self._set_front_masks(
            nothing if self.front_mask is None else self.front_mask,
            nothing if self.front_stays is None else self.front_stays,
        )

    def _set_front_masks(self, front_mask: torch.BoolTensor, front_stays: torch.BoolTensor) -> None:
        shape = (len(front_mask), self.front_room)
        self.front_mask, self.front_stays = pad_to_shape(front_mask, shape), pad_to_shape(front_stays, shape)

    def set_front(
        self,
        key_values: list[tuple[torch.Tensor, torch.Tensor] | None],
        front_mask: torch.BoolTensor,
        front_stays: torch.BoolTensor,
    ) -> None:
        """
        Replaces the keys and values in front of the row, in place (see [`RetroJointCache.set_front`]).

        Raises:
            ValueError: If there is no room for them.
        """
        length = front_mask.shape[1]
        self.check_room(self.get_seq_length(), length)
        for layer, states in zip(self.layers, key_values):
            if states is not None:
                layer.keys[..., :length, :] = states[0]
                layer.values[..., :length, :] = states[1]
        self._set_front_masks(front_mask, front_stays)

    def replace_columns(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        layer_idx: int,
        rows: torch.LongTensor,
        columns: torch.LongTensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Replaces the keys and values of some tokens in place (see [`RetroJointCache.replace_columns`])."""
        layer = self.layers[layer_idx]
        rows, columns = rows.to(keys.device), columns.to(keys.device) + self.front_room
        for states, new in ((layer.keys, keys), (layer.values, values)):
            states.transpose(1, 2)[rows[:, None], columns] = new.transpose(1, 2).to(states.dtype)
        return layer.keys[rows], layer.values[rows]


class NeighborPrefix(Cache):
    """
    Stands in for an empty cache: puts keys and values of neighbors in front of those of the row, and keeps only the
    latter, in the cache that it stands for.
    """

    def __init__(self, key_values: LayerStates, cache: Cache | None):
        super().__init__(layers=[])
        self.key_values, self.cache = key_values, cache

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the row `(B, Hkv, T, D)`, with those of the neighbors in front."""
        if self.cache is not None:
            key_states, value_states = self.cache.update(key_states, value_states, layer_idx, *args, **kwargs)
        keys, values = (x.to(key_states.device, key_states.dtype) for x in self.key_values[layer_idx])
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of cached tokens, which is 0."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the mask, which covers only the row."""
        return query_length, 0


class RereadTokens(Cache):
    """
    Stands in for a filled cache while some tokens of some rows are read again: their keys and values replace those
    that the cache has.
    """

    def __init__(self, cache: RetroJointCache, rows: torch.LongTensor, columns: torch.LongTensor):
        super().__init__(layers=[])
        self.cache, self.rows, self.columns = cache, rows, columns

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of neighbors and row `(n, Hkv, F + N, D)` for the n rows that are read again."""
        return self.cache.replace_columns(key_states, value_states, layer_idx, self.rows, self.columns)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of cached tokens."""
        return self.cache.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the mask, which covers only the row."""
        return self.cache.get_seq_length(layer_idx), 0


__all__ = ["NeighborPrefix", "RereadTokens", "RetroJointCache", "RetroJointStaticCache"]
