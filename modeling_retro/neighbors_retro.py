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
"""The neighbors of a call, as one value"""

from dataclasses import dataclass

import torch
from torch import nn


def pad_to_shape(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Pads a tensor with zeros at the end of every dimension that is smaller than in `shape`."""
    missing = [max(0, wanted - size) for size, wanted in zip(tensor.shape, shape)]
    if not any(missing):
        return tensor
    return nn.functional.pad(tensor, [n for size in reversed(missing) for n in (0, size)])


@dataclass
class Neighbors:
    """
    Neighbors of the chunks of a batch.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, num_slots, k, neighbor_length)`):
            Tokens of the neighbors of each chunk, in the order of the chunks.
        attention_mask (`torch.BoolTensor` of the same shape):
            True for real tokens, False for padding and absent neighbors.
    """

    input_ids: torch.LongTensor
    attention_mask: torch.BoolTensor

    @property
    def num_slots(self) -> int:
        """`int`: Number of chunks."""
        return self.input_ids.shape[1]

    def seen(self, num_hidden: int) -> torch.BoolTensor:
        """The mask of the tokens that a row sees: all real ones but the first `num_hidden` of each neighbor."""
        # Padding may stand in front of a neighbor, so real tokens are counted.
        return self.attention_mask & (self.attention_mask.cumsum(-1) > num_hidden)

    def take(self, slots: torch.LongTensor) -> "Neighbors":
        """One slot for each row `(batch_size,)`, as neighbors of one chunk. A slot that does not exist is absent."""
        known = (slots >= 0) & (slots < self.num_slots)
        rows, slots = torch.arange(len(slots), device=slots.device), torch.where(known, slots, 0)
        mask = self.attention_mask[rows, slots] & known[:, None, None]
        return Neighbors(self.input_ids[rows, slots][:, None], mask[:, None])

    def in_order(self) -> "Neighbors":
        """The neighbors of each chunk as one text, `(batch_size, num_slots, 1, L)`, which ends without padding."""
        ids, mask = self.input_ids.flatten(2), self.attention_mask.flatten(2)  # [B, S, k r]
        length = max(1, int(mask.sum(-1).max()))
        order = mask.int().argsort(dim=-1, stable=True)[..., -length:]
        return Neighbors(ids.gather(-1, order)[:, :, None], mask.gather(-1, order)[:, :, None])

    def behind(self, first: "Neighbors") -> "Neighbors":
        """These neighbors behind those of `first`, which may be another number of other lengths."""
        shape = [max(sizes) for sizes in zip(first.input_ids.shape[2:], self.input_ids.shape[2:])]

        def join(*tensors: torch.Tensor) -> torch.Tensor:
            return torch.cat([pad_to_shape(tensor, (*tensor.shape[:2], *shape)) for tensor in tensors], dim=1)

        return Neighbors(join(first.input_ids, self.input_ids), join(first.attention_mask, self.attention_mask))


__all__ = ["Neighbors", "pad_to_shape"]
