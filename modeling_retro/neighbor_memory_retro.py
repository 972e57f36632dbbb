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
"""Keys and values of neighbors that a decoder has read, kept for the next time that they are retrieved"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


# Keys and values of one or more neighbors in each layer; None for a layer without keys and values of its own.
LayerStates = Sequence[tuple[torch.Tensor, torch.Tensor] | None]


def compress(
    key_values: LayerStates, mask: torch.BoolTensor, *others: torch.Tensor
) -> tuple[LayerStates, torch.BoolTensor]:
    """
    Leaves out the keys and values `(B, Hkv, F, D)` that no row needs: moves those where the mask `(B, F)` is True to
    the front, in their order. `others` `(B, F)` are moved with them.
    """
    width = int(mask.sum(1).max())
    columns = mask.int().argsort(dim=1, descending=True, stable=True)[:, :width]  # [B, F']

    def gather(states: torch.Tensor) -> torch.Tensor:
        index = columns.to(states.device)[:, None, :, None]
        return states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3]))

    key_values = [None if pair is None else (gather(pair[0]), gather(pair[1])) for pair in key_values]
    return key_values, *(tensor.gather(1, columns) for tensor in (mask, *others))


class _Stacked(Sequence):
    """
    The states of several neighbors. Those of a layer are stacked when it asks for them, because copies of all layers
    at once would have left the processor's cache before they are read.
    """

    def __init__(self, neighbors: list[LayerStates]):
        self.neighbors = neighbors

    def __len__(self) -> int:
        return len(self.neighbors[0])

    def __getitem__(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        pairs = [states[layer_idx] for states in self.neighbors]
        return None if pairs[0] is None else tuple(map(torch.stack, zip(*pairs)))


@dataclass
class NeighborStates:
    """
    The keys and values of the neighbors of a call in each layer of a decoder.

    Args:
        key_values (`Sequence`):
            Keys and values `(U, num_key_value_heads, neighbor_length, head_dim)` of the U different neighbors of the
            call, for each layer.
        index (`torch.LongTensor` of shape `(batch_size, num_slots, k)`):
            The number of each neighbor among these U. Absent neighbors may have any number.
    """

    key_values: LayerStates
    index: torch.LongTensor

    @property
    def requires_grad(self) -> bool:
        """`bool`: Whether the states have gradients."""
        return any(pair[0].requires_grad for pair in self.key_values if pair is not None)

    def gather(self) -> LayerStates:
        """Keys and values `(batch_size, num_key_value_heads, num_slots * k * neighbor_length, D)` for each layer."""
        batch_size = self.index.shape[0]

        def gather_rows(states: torch.Tensor) -> torch.Tensor:
            rows = states.index_select(0, self.index.flatten().to(states.device))  # [B S k, H, r, D]
            return rows.unflatten(0, (batch_size, -1)).transpose(1, 2).flatten(2, 3)  # [B, H, S k r, D]

        return [None if pair is None else (gather_rows(pair[0]), gather_rows(pair[1])) for pair in self.key_values]

    def take(self, slots: torch.LongTensor, seen: torch.BoolTensor) -> tuple[LayerStates, torch.BoolTensor]:
        """
        Keys and values of one slot for each row.

        Args:
            slots (`torch.LongTensor` of shape `(batch_size,)`):
                The slots. A row gets nothing for one that does not exist.
            seen (`torch.BoolTensor` of shape `(batch_size, num_slots, k, neighbor_length)`):
                True for the tokens that a row may see. Others are left out.

        Returns:
            `tuple`: for each layer keys and values `(batch_size, num_key_value_heads, F, head_dim)`, and the mask
            `(batch_size, F)` of those that a row has.
        """
        known = (slots >= 0) & (slots < seen.shape[1])
        rows, slots = torch.arange(len(slots), device=slots.device), torch.where(known, slots, 0)
        mask = seen[rows, slots].flatten(1) & known[:, None]  # [B, k r]
        states, numbers = self.key_values, self.index[rows, slots][:, None]  # [B, 1, k]
        if isinstance(states, _Stacked):
            states = _Stacked([states.neighbors[number] for number in numbers.flatten().tolist()])
            numbers = torch.arange(numbers.numel(), device=numbers.device).view_as(numbers)
        return compress(NeighborStates(states, numbers).gather(), mask)


class NeighborMemory:
    """
    Keeps the keys and values of neighbors that were read, up to a number of bytes. When there is no room, it drops the
    neighbors that were not used for the longest time.

    Args:
        max_bytes (`int`): Largest number of bytes to keep.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.version: tuple | None = None
        self._states: OrderedDict[bytes, LayerStates] = OrderedDict()

    def __len__(self) -> int:
        return len(self._states)

    def clear(self) -> None:
        """Drops all neighbors."""
        self._states.clear()
        self.num_bytes = 0

    def read(
        self,
        neighbor_input_ids: torch.LongTensor,
        neighbor_attention_mask: torch.BoolTensor,
        encode: Callable[[torch.LongTensor, torch.BoolTensor], LayerStates],
        version: tuple | None,
    ) -> NeighborStates:
        """
        Returns the states of neighbors. Those that are not kept are encoded, each of them once.

        Args:
            neighbor_input_ids (`torch.LongTensor` of shape `(batch_size, num_slots, k, neighbor_length)`):
                Tokens of the neighbors.
            neighbor_attention_mask (`torch.BoolTensor` of the same shape):
                True for real tokens.
            encode (`Callable`):
                Computes the states of neighbors from their tokens and mask `(n, neighbor_length)`.
            version (`tuple`, *optional*):
                A value on which the states depend besides the tokens, such as the versions of the weights. States of
                another version are dropped. With `None`, states are neither kept nor reused, because gradients need
                new ones.
        """
        shape = neighbor_input_ids.shape
        mask = neighbor_attention_mask.flatten(0, 2)  # [N, r]
        ids = neighbor_input_ids.flatten(0, 2).masked_fill(~mask, 0)
        keys = [bytes(row) for row in torch.where(mask, ids, -1).cpu().numpy()]
        absent = bytes(torch.full(shape[3:], -1).numpy())
        first_rows = {key: row for row, key in reversed(list(enumerate(keys))) if key != absent}
        # If there is nothing to read, one absent neighbor is read, so that all weights stay in the graph.
        first_rows = first_rows or {keys[0]: 0}
        order = {key: number for number, key in enumerate(first_rows)}
        index = torch.tensor([order.get(key, 0) for key in keys], device=ids.device).view(shape[:3])
        if version is None:
            rows = torch.tensor(list(first_rows.values()), device=ids.device)
            return NeighborStates(encode(ids[rows], mask[rows]), index)

        if version != self.version:
            self.clear()
            self.version = version
        missing = [key for key in first_rows if key not in self._states]
        found = {key: self._states[key] for key in first_rows if key in self._states}
        if missing:
            rows = torch.tensor([first_rows[key] for key in missing], device=ids.device)
            encoded = encode(ids[rows], mask[rows])
            found |= {key: _take_one(encoded, row) for row, key in enumerate(missing)}
        for key in first_rows:
            self._keep(key, found[key])
        return NeighborStates(_Stacked([found[key] for key in first_rows]), index)

    def _keep(self, key: bytes, states: LayerStates) -> None:
        if key in self._states:
            self._states.move_to_end(key)
            return
        self._states[key] = states
        self.num_bytes += _num_bytes(states)
        while self.num_bytes > self.max_bytes and self._states:
            _, dropped = self._states.popitem(last=False)
            self.num_bytes -= _num_bytes(dropped)


def _take_one(states: LayerStates, row: int) -> LayerStates:
    """Copies the states of one neighbor. A view would keep the states of all others in memory."""
    return [None if pair is None else (pair[0][row].clone(), pair[1][row].clone()) for pair in states]


def _num_bytes(states: LayerStates) -> int:
    return sum(tensor.nbytes for pair in states if pair is not None for tensor in pair)


__all__ = ["NeighborMemory", "NeighborStates", "compress"]
