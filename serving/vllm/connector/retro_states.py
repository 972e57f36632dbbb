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
Which states of texts and rows a vLLM engine holds, and how keys move to other positions. Nothing here needs vLLM.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import torch


# Number of tokens of a text of equal tokens from which on it tells how keys move.
PROBE_LENGTH = 16


def text_key(token_ids: Sequence[int], adapter: str = "") -> str:
    """
    The name of the states of a text.

    Args:
        token_ids (`Sequence[int]`): The tokens of the text.
        adapter (`str`, *optional*, defaults to `""`): Name of the adapter that reads it.
    """
    return hashlib.sha256(f"{adapter}:{','.join(map(str, token_ids))}".encode()).hexdigest()[:32]


class Directory:
    """
    Which states are held, with their numbers of tokens. The scheduler of vLLM asks it, and its workers hold what it
    says. When there is no room, the states that were not used for the longest time are dropped.

    Args:
        max_tokens (`int`): Largest number of tokens to hold, of rows and texts together.

    Attributes:
        num_tokens (`int`): Number of tokens that are held.
        num_dropped (`int`): How many states were dropped so far because there was no room.
    """

    def __init__(self, max_tokens: int):
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self.num_dropped = 0
        self._lengths: OrderedDict[tuple[str, str], int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._lengths)

    def length(self, name: tuple[str, str]) -> int:
        """Number of tokens that are held under a name, which counts as a use of them."""
        if name in self._lengths:
            self._lengths.move_to_end(name)
        return self._lengths.get(name, 0)

    def put(self, name: tuple[str, str], length: int) -> list[tuple[str, str]]:
        """Notes that `length` tokens are held under a name now. Returns the names that must be dropped for them."""
        self.drop(name)
        self._lengths[name] = length
        self.num_tokens += length
        dropped = []
        while self.num_tokens > self.max_tokens:
            oldest = next(iter(self._lengths))
            self.drop(oldest)
            dropped.append(oldest)
        self.num_dropped += len(dropped)
        return dropped

    def drop(self, name: tuple[str, str]) -> None:
        """Forgets a name, if it is known."""
        self.num_tokens -= self._lengths.pop(name, 0)


class Rotation:
    """
    Moves keys with rotary positions. A key at position p + d is that at position p, rotated by d, whatever p is.

    Args:
        inverse_frequencies (`torch.DoubleTensor` of shape `(rotary_dim / 2,)`):
            Angles in radians for one position.
        is_neox_style (`bool`, *optional*, defaults to `True`):
            Whether the two halves of a head are rotated against each other, and not neighboring components.
    """

    def __init__(self, inverse_frequencies: torch.Tensor, is_neox_style: bool = True):
        self.inverse_frequencies = inverse_frequencies.double().cpu()
        self.is_neox_style = is_neox_style

    def move(self, keys: torch.Tensor, distance: int | torch.Tensor) -> torch.Tensor:
        """
        Moves keys by a distance in tokens.

        Args:
            keys (`torch.Tensor` of shape `(num_tokens, num_heads, head_dim)`): The keys.
            distance (`int` or `torch.LongTensor` of shape `(num_tokens,)`): Distance to their new positions.
        """
        if isinstance(distance, int) and distance == 0:
            return keys
        width = 2 * len(self.inverse_frequencies)
        angles = torch.as_tensor(distance).double().reshape(-1, 1, 1) * self.inverse_frequencies  # [n, 1, width / 2]
        cos, sin = (x.to(keys.device, torch.float32) for x in (angles.cos(), angles.sin()))
        turned, rest = keys[..., :width].float(), keys[..., width:]
        if self.is_neox_style:
            left, right = turned.chunk(2, dim=-1)
        else:
            left, right = turned[..., ::2], turned[..., 1::2]
        left, right = left * cos - right * sin, right * cos + left * sin
        turned = torch.cat([left, right], -1) if self.is_neox_style else torch.stack([left, right], -1).flatten(-2)
        return torch.cat([turned.to(keys.dtype), rest], dim=-1)


def is_moved(keys: torch.Tensor, rotation: Rotation | None) -> bool:
    """
    Whether the keys of a text of equal tokens are one another, moved. In such a text all values are equal, so that
    all tokens have the same states in every layer, whatever the weights are, and keys differ by position alone.

    Args:
        keys (`torch.Tensor` of shape `(num_tokens, num_heads, head_dim)`): The keys.
        rotation ([`Rotation`], *optional*): How keys move. `None` for a layer without positions.
    """
    first = keys[:1].expand_as(keys)
    expected = first if rotation is None else rotation.move(first, torch.arange(len(keys)))
    tolerance = 1e-3 if keys.dtype == torch.float32 else 3e-2
    difference = (keys.float() - expected.float()).norm() / expected.float().norm()
    return bool(difference < tolerance)
