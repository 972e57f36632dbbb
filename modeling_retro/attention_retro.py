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
Attention in parts: one softmax over keys that lie in several places, at a cost that grows with the keys that are seen

Each part is an attention of its own and returns its logsumexp besides its output. The outputs of all parts are merged
by them, which gives the softmax over the keys of all parts. The backward pass is exact as well: given the merged
output and the merged logsumexp, the backward kernel of each part computes its share of the gradients (as in ring
attention, https://huggingface.co/papers/2310.01889).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .neighbor_memory_retro import LayerStates


aten = torch.ops.aten
# What stands in front of the name of the base's attention while a decoder attends in parts.
PREFIX = "retro_"
# Arguments with which a layer asks its attention to change scores.
CHANGES_OF_SCORES = ("softcap", "s_aux", "position_bias")
# For at most so many keys the backward kernel of a CPU is faster in float32 than in half precision.
LONGEST_WIDENED = 256


def has_kernels(states: torch.Tensor) -> bool:
    """Whether there are kernels that return a logsumexp for tensors of this device and dtype."""
    return states.device.type == "cpu" or (states.device.type == "cuda" and states.dtype != torch.float64)


def _uses_flash(query: torch.Tensor, mask: torch.Tensor | None) -> bool:
    return mask is None and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] % 8 == 0


def _aligned_bias(mask: torch.Tensor | None, query: torch.Tensor, length: int) -> torch.Tensor | None:
    """The kernel with a bias wants rows of it that begin at multiples of 16 elements."""
    if mask is None:
        return None
    mask = nn.functional.pad(mask, (0, -length % 16))[..., :length]
    return mask.expand(*query.shape[:3], length)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, tuple]:
    """
    Attention that also returns the logsumexp of its scores.

    Args:
        query (`torch.Tensor` of shape `(batch_size, num_heads, query_length, head_dim)`):
            Queries.
        key, value (`torch.Tensor` of shape `(batch_size, num_heads, key_length, head_dim)`):
            Keys and values.
        mask (`torch.Tensor`, *optional*):
            Added to the scores; it can be broadcast to `(batch_size, num_heads, query_length, key_length)`.
        is_causal (`bool`):
            Whether query n sees only the keys up to n.
        scale (`float`):
            Factor of the scores.

    Returns:
        `tuple`: output of the shape of `query`, logsumexp `(batch_size, num_heads, query_length)` in float32 or
        better, and what [`attend_backward`] needs besides.
    """
    if query.device.type == "cpu":
        kernel = aten._scaled_dot_product_flash_attention_for_cpu
        return *kernel(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale), ()
    if _uses_flash(query, mask):
        out, lse, *state = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)
        return out, lse, tuple(state[:6])
    bias = _aligned_bias(mask, query, key.shape[2])
    kernel = aten._scaled_dot_product_efficient_attention
    out, lse, *state = kernel(query, key, value, bias, True, 0.0, is_causal, scale=scale)
    return out, lse[..., : query.shape[2]], tuple(state)


def attend_backward(
    query: torch.Tensor,
    grad: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    state: tuple,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Gradients of queries, keys and values of [`attend`]. `out` and `lse` may be those of a softmax over more keys. A
    query whose `lse` is infinite gives no gradient.
    """
    if query.device.type == "cpu":
        kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward
        states, dtype = (grad, query, key, value, out), query.dtype
        if dtype in (torch.float16, torch.bfloat16) and key.shape[2] <= LONGEST_WIDENED:
            states, mask = (x.float() for x in states), None if mask is None else mask.float()
        grads = kernel(*states, lse, 0.0, is_causal, attn_mask=mask, scale=scale)
        return tuple(x.to(dtype) for x in grads)
    if _uses_flash(query, mask):
        kernel = aten._scaled_dot_product_flash_attention_backward
        cum_q, cum_k, max_q, max_k, seed, offset = state
        return kernel(
            *(grad, query, key, value, out, lse.contiguous()),
            *(cum_q, cum_k, max_q, max_k, 0.0, is_causal, seed, offset),
            scale=scale,
        )
    bias = _aligned_bias(mask, query, key.shape[2])
    # This kernel wants a logsumexp that is padded to a multiple of 32.
    lse = nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf)
    kernel = aten._scaled_dot_product_efficient_attention_backward
    wanted = [True, True, True, False]
    grads = kernel(grad, query, key, value, bias, out, lse, *state, 0.0, wanted, is_causal, scale=scale)
    return grads[:3]


@dataclass
class Blocks:
    """
    Some of the W columns of each row, in M blocks of G. A column stands in at most one place.

    Args:
        columns (`torch.LongTensor` of shape `(batch_size, M, G)`):
            The column in each place. Any, if the place is empty.
        places (`torch.LongTensor` of shape `(batch_size, W)`):
            The place of each column among the M · G. M · G, if the column stands in none.
    """

    columns: torch.LongTensor
    places: torch.LongTensor
    _rows: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def _row(self, name: str, num_heads: int) -> torch.LongTensor:
        """Row numbers for copying at once; they are the same in every layer."""
        key = f"{name} {num_heads}"
        if key not in self._rows:
            (batch_size, num_blocks, size), width = self.columns.shape, self.places.shape[1]
            heads = torch.arange(num_heads, device=self.columns.device)
            batch = torch.arange(batch_size, device=self.columns.device)[:, None, None]
            if name == "take":  # [B, M, H, G] rows of (B W H)
                rows = (self.columns + batch * width)[:, :, None] * num_heads + heads[:, None]
            else:  # [B, W, H] rows of (B M H G)
                places = self.places.clamp(max=num_blocks * size - 1)
                blocks = batch[..., 0] * num_blocks + places // size
                rows = (blocks[..., None] * num_heads + heads) * size + (places % size)[..., None]
            self._rows[key] = rows.flatten()
        return self._rows[key]

    def take(self, states: torch.Tensor) -> torch.Tensor:
        """The blocks of `states` `(B, W, H, ...)`: `(B M, H, G, ...)`."""
        num_heads = states.shape[2]
        blocks = states.flatten(0, 2).index_select(0, self._row("take", num_heads))
        return blocks.unflatten(0, (-1, num_heads, self.columns.shape[2]))

    def put(self, blocks: torch.Tensor, absent: float | None = 0.0) -> torch.Tensor:
        """
        Puts blocks `(B M, H, G, ...)` back where they were taken, `(B, W, H, ...)`. Columns that stand in no place get
        the value `absent`; with `None` they get any.
        """
        num_heads, num_places = blocks.shape[1], self.columns[0].numel()
        states = blocks.flatten(0, 2).index_select(0, self._row("put", num_heads))
        states = states.unflatten(0, (*self.places.shape, num_heads))
        if absent is None:
            return states
        is_absent = self.places == num_places
        return states.masked_fill(is_absent.view(*self.places.shape, *(1,) * (states.ndim - 2)), absent)

    def is_empty(self) -> torch.BoolTensor:
        """Whether a place is empty, `(B M, G)`."""
        if "empty" not in self._rows:
            num_places = self.columns[0].numel()
            filled = self.places.new_zeros(len(self.places), num_places + 1).scatter(1, self.places, 1)
            self._rows["empty"] = filled[:, :num_places].reshape(-1, self.columns.shape[2]) == 0
        return self._rows["empty"]

    def to(self, device: torch.device) -> "Blocks":
        """Moves the tensors."""
        return Blocks(self.columns.to(device), self.places.to(device))


def group_columns(group: torch.LongTensor, num_groups: int, size: int) -> tuple[Blocks, torch.LongTensor]:
    """
    Puts the columns of the same group into blocks.

    Args:
        group (`torch.LongTensor` of shape `(batch_size, W)`):
            The group of each column; `num_groups` if it has none.
        num_groups (`int`):
            Number of groups.
        size (`int`):
            Number G of places in a block. A group with more columns has several blocks.

    Returns:
        `tuple`: the blocks, and the group of each block `(batch_size, M)`. Blocks that a row lacks belong to group 0.
    """
    batch_size, width = group.shape
    order = group.argsort(dim=1, stable=True)  # [B, W]
    counts = group.new_zeros(batch_size, num_groups + 1).scatter_add(1, group, torch.ones_like(group))[:, :-1]
    num_blocks = -(-counts // size)  # [B, groups]
    last_block, last = num_blocks.cumsum(1), counts.cumsum(1)
    total = max(1, int(last_block[:, -1].max()))
    # The place of a column follows from its rank in its group and from the first block of the group.
    rank = torch.empty_like(order).scatter(1, order, torch.arange(width, device=group.device).expand_as(order))
    of_group = group.clamp(max=num_groups - 1)
    rank = rank - (last - counts).gather(1, of_group)
    places = (last_block - num_blocks).gather(1, of_group) * size + rank
    places = torch.where(group < num_groups, places, total * size)
    columns = group.new_zeros(batch_size, total * size + 1)
    columns = columns.scatter(1, places, torch.arange(width, device=group.device).expand_as(places))
    blocks = torch.arange(total, device=group.device).expand(batch_size, -1).contiguous()
    block_group = torch.searchsorted(last_block, blocks, right=True)  # [B, M]
    block_group = torch.where(block_group < num_groups, block_group, 0)
    return Blocks(columns[:, :-1].view(batch_size, total, size), places), block_group


@dataclass
class AttentionPart:
    """
    Queries of a call and keys that they see.

    Args:
        queries ([`Blocks`], *optional*):
            The queries in M blocks. By default every column is a query, in one block.
        keys ([`Blocks`], *optional*):
            Which columns of the row are keys, in as many blocks. By default all columns.
        neighbors (`torch.LongTensor` of shape `(batch_size, M, k)`, *optional*):
            The numbers of the neighbors whose tokens are the keys of each block, instead of columns of the row.
        source (`int`, *optional*, defaults to 0):
            Which of the lists of neighbors these numbers count.
        mask (`torch.BoolTensor`, *optional*):
            True for the keys that a query sees, broadcastable to `(batch_size * M, 1, G, K)`.
        is_causal (`bool`, *optional*, defaults to `False`):
            Whether the query in place n of a block sees the keys of this block up to place n.
        slices (`list[tuple[int, int]]`, *optional*):
            Where the keys that a block sees begin and end, if all blocks see parts of one block of keys.
        slice_masks (`list`, *optional*):
            For each of these the mask `(batch_size, 1, G, length)`, or `None`.
    """

    queries: Blocks | None = None
    keys: Blocks | None = None
    neighbors: torch.LongTensor | None = None
    source: int = 0
    mask: torch.BoolTensor | None = None
    is_causal: bool = False
    slices: list[tuple[int, int]] | None = None
    slice_masks: list[torch.BoolTensor | None] | None = None
    _biases: dict = field(default_factory=dict, repr=False)

    def to(self, device: torch.device) -> "AttentionPart":
        """Moves the tensors."""
        masks = self.slice_masks
        return AttentionPart(
            *(None if value is None else value.to(device) for value in (self.queries, self.keys, self.neighbors)),
            source=self.source,
            mask=None if self.mask is None else self.mask.to(device),
            is_causal=self.is_causal,
            slices=self.slices,
            slice_masks=masks and [None if mask is None else mask.to(device) for mask in masks],
        )

    def _bias(self, dtype: torch.dtype, number: int | None, repeats: int) -> torch.Tensor | None:
        """A mask as numbers that are added to scores. It is the same in every layer, so it is made once."""
        mask = self.mask if number is None else self.slice_masks[number]
        if mask is None:
            return None
        if (number, dtype) not in self._biases:
            bias = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
            self._biases[number, dtype] = bias if bias.shape[2] == 1 else bias.repeat_interleave(repeats, dim=2)
        return self._biases[number, dtype]

    def _take_queries(self, states: torch.Tensor, groups: int) -> torch.Tensor:
        """
        Queries, or what belongs to them, `(B, W, H, ...)` in blocks. If heads share keys, their queries become more
        queries of one head: `(B M, H / groups, G groups, ...)`.
        """
        if self.queries is None:
            return states.transpose(1, 2)
        shape = states.shape
        blocks = self.queries.take(states.reshape(*shape[:2], shape[2] // groups, -1))  # [B M, Hkv, G, groups ...]
        return blocks.unflatten(3, (groups, *shape[3:])).flatten(2, 3)

    def _put_queries(self, blocks: torch.Tensor, groups: int, absent: float | None) -> torch.Tensor:
        """Puts such blocks back: `(B, W, H, ...)` (see [`Blocks.put`])."""
        if self.queries is None:
            return blocks.transpose(1, 2)
        rest = blocks.shape[3:]
        states = self.queries.put(blocks.unflatten(2, (-1, groups)).flatten(3), absent)  # [B, W, Hkv, groups ...]
        return states.unflatten(3, (groups, *rest)).flatten(2, 3)

    def _take_keys(self, states: torch.Tensor) -> torch.Tensor:
        """Keys or values in blocks `(B M, Hkv, K, D)`, of a row `(B, W, Hkv, D)` or of neighbors `(U, Hkv, r, D)`."""
        if self.neighbors is None:
            return states.transpose(1, 2) if self.keys is None else self.keys.take(states)
        num_heads, k = states.shape[1], self.neighbors.shape[2]
        heads = torch.arange(num_heads, device=states.device)[:, None]
        rows = self.neighbors[:, :, None] * num_heads + heads  # [B, M, Hkv, k]
        states = states.flatten(0, 1).index_select(0, rows.flatten())  # [B M Hkv k, r, D]
        return states.unflatten(0, (-1, num_heads, k)).flatten(2, 3)

    def _put_keys(self, blocks: torch.Tensor, num_neighbors: int) -> torch.Tensor:
        """Adds up gradients of what [`AttentionPart._take_keys`] has taken."""
        if self.neighbors is None:
            return blocks.transpose(1, 2) if self.keys is None else self.keys.put(blocks)
        blocks = blocks.unflatten(2, (self.neighbors.shape[2], -1)).transpose(1, 2).flatten(0, 1)
        total = blocks.new_zeros(num_neighbors, *blocks.shape[1:])
        return total.index_add(0, self.neighbors.flatten(), blocks)

    def _calls(self, *blocks: torch.Tensor) -> Iterator[tuple[int | None, slice, list[torch.Tensor]]]:
        """The calls of a kernel: the number of a slice of keys, the slice, and what belongs to its queries."""
        if self.slices is None:
            yield None, slice(None), list(blocks)
            return
        apart = [states.unflatten(0, (-1, len(self.slices))) for states in blocks]
        for number, (start, end) in enumerate(self.slices):
            yield number, slice(start, end), [states[:, number] for states in apart]

    def _groups(self, query: torch.Tensor, key: torch.Tensor) -> tuple[int, int]:
        """
        How many heads become one with more queries, because they share keys, and how often keys are repeated instead:
        in causal attention, and so that no mask of many queries is repeated.
        """
        num_groups = query.shape[2] // (key.shape[2] if self.neighbors is None else key.shape[1])
        is_small = self.mask is None or self.mask.shape[2] == 1
        folds = self.queries is not None and not self.is_causal and is_small
        return (num_groups, 1) if folds else (1, num_groups)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, list]:
        """
        Output `(B, W, H, D)` and logsumexp `(B, W, H)` of this part, which is -inf for columns without a query.
        `query` is `(B, W, H, D)`; keys and values are those of a row, `(B, W, Hkv, D)`, or of neighbors, `(U, Hkv, r,
        D)`.
        """
        groups, repeats = self._groups(query, key)
        query = self._take_queries(query, groups)
        key, value = (repeat_kv(self._take_keys(states), repeats) for states in (key, value))
        found = []
        for number, keys, (one,) in self._calls(query):
            bias = self._bias(query.dtype, number, groups)
            found.append(attend(one, key[:, :, keys], value[:, :, keys], bias, self.is_causal, scale))
        out, lse, states = (list(values) for values in zip(*found))
        out, lse = (x[0] if self.slices is None else torch.stack(x, dim=1).flatten(0, 1) for x in (out, lse))
        return self._put_queries(out, groups, None), self._put_queries(lse, groups, -torch.inf), states

    def attend_backward(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        scale: float,
        states: list,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The share of this part in the gradients, given the output and the logsumexp of all parts together."""
        num_neighbors = len(key)
        groups, repeats = self._groups(query, key)
        key, value = (repeat_kv(self._take_keys(x), repeats) for x in (key, value))
        query, grad, out, lse = (self._take_queries(x, groups) for x in (query, grad, out, lse))
        if self.queries is not None:
            is_empty = self.queries.is_empty().repeat_interleave(groups, dim=1)[:, None]  # [B M, 1, G groups]
            lse = lse.masked_fill(is_empty, torch.inf)
        grad_query, grad_key, grad_value = [], torch.zeros_like(key), torch.zeros_like(value)
        for (number, keys, blocks), state in zip(self._calls(query, grad, out, lse), states):
            bias = self._bias(query.dtype, number, groups)
            one = attend_backward(*blocks, key[:, :, keys], value[:, :, keys], bias, self.is_causal, scale, state)
            grad_query.append(one[0])
            grad_key[:, :, keys] += one[1]
            grad_value[:, :, keys] += one[2]
        grad_query = grad_query[0] if self.slices is None else torch.stack(grad_query, dim=1).flatten(0, 1)
        if repeats > 1:
            grad_key, grad_value = (x.unflatten(1, (-1, repeats)).sum(2) for x in (grad_key, grad_value))
        grads = (self._put_keys(x, num_neighbors) for x in (grad_key, grad_value))
        return self._put_queries(grad_query, groups, 0.0), *grads


class MergedAttention(torch.autograd.Function):
    """
    One softmax over the keys of all parts.

    Args:
        parts (`list[AttentionPart]`):
            The parts. Every query stands in at least one with a key that it sees.
        scale (`float`):
            Factor of the scores.
        bias (`torch.Tensor`, *optional*):
            A number that is added to the scores of all neighbors.
        query (`torch.Tensor` of shape `(batch_size, W, num_heads, head_dim)`):
            Queries.
        states (`torch.Tensor`):
            Keys and values of the row `(batch_size, W, num_key_value_heads, head_dim)`, then keys and values `(U,
            num_key_value_heads, r, head_dim)` of the neighbors of each source.

    Returns:
        `torch.Tensor` of the shape of `query`.
    """

    @staticmethod
    def forward(ctx, parts: list[AttentionPart], scale: float, bias: torch.Tensor | None, query, *states):
        out, lse, ctx.states = None, None, []
        for part in parts:
            first = 2 * part.source
            own, score, state = part.attend(query, states[first], states[first + 1], scale)
            if bias is not None and part.source > 0:
                score = score + bias.to(score)
            ctx.states.append(state)
            if out is None:
                out, lse = own, score
                continue
            # A query that stands in none of the parts so far has no share.
            share = (score - lse).sigmoid().nan_to_num(0.0)  # [B, W, H]
            out, lse = out.lerp(own, share[..., None].to(own.dtype)), torch.logaddexp(lse, score)
        ctx.parts, ctx.scale = parts, scale
        ctx.save_for_backward(bias, query, out, lse, *states)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        bias, query, out, lse, *states = ctx.saved_tensors
        grad = grad.contiguous()
        grad_query, grad_bias = torch.zeros_like(query), None
        grad_states = [None] * len(states)
        if bias is not None:
            grad_bias = torch.zeros_like(bias)
        for part, state in zip(ctx.parts, ctx.states):
            first = 2 * part.source
            shift = 0 if bias is None or part.source == 0 else bias.to(lse)
            key, value = states[first], states[first + 1]
            grads = part.attend_backward(grad, query, key, value, out, lse - shift, ctx.scale, state)
            grad_query += grads[0]
            if bias is not None and part.source > 0:
                # The derivative by the bias is that by all scores of the part: those of q·k sum to q · dq.
                own, own_lse, _ = part.attend(query, key, value, ctx.scale)
                weight = (own_lse + shift - lse).exp()  # [B, W, H]
                grad_bias += (weight * ((own - out) * grad).sum(-1)).sum().to(bias)
            for index, value in ((first, grads[1]), (first + 1, grads[2])):
                grad_states[index] = value if grad_states[index] is None else grad_states[index] + value
        return None, None, grad_bias, grad_query, *grad_states


@dataclass
class AttentionLayout:
    """
    The attention of one call of a decoder, which travels to its layers as a keyword argument.

    Args:
        parts (`dict[int | None, list[AttentionPart]]`):
            The parts for each length of a sliding window, `None` for layers without one.
        windows (`list[int | None]`):
            The length of the sliding window of each layer.
        key_values (`list`):
            For each source of neighbors: keys and values `(U, num_key_value_heads, r, head_dim)` of each layer.
        bias (`torch.Tensor`, *optional*):
            A number that is added to the scores of all neighbors.
    """

    parts: dict[int | None, list[AttentionPart]]
    windows: list[int | None]
    key_values: list[LayerStates]
    bias: torch.Tensor | None = None

    def to(self, device: torch.device, *args, **kwargs) -> "AttentionLayout":
        """Moves the tensors but the neighbors; accelerate calls it if the layers of a model are on several devices."""
        parts = {window: [part.to(device) for part in parts] for window, parts in self.parts.items()}
        return AttentionLayout(parts, self.windows, self.key_values, self.bias)

    def attend(
        self, layer_idx: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Output `(B, W, H, D)` for queries `(B, H, W, D)` and the keys and values `(B, Hkv, W, D)` of their rows."""
        dtype = value.dtype
        if torch.is_autocast_enabled(query.device.type):
            dtype = torch.get_autocast_dtype(query.device.type)
        states = [key.transpose(1, 2), value.transpose(1, 2)]
        for key_values in self.key_values:
            states += key_values[layer_idx]
        states = [x.to(query.device, dtype) for x in states]
        query = query.transpose(1, 2).to(dtype)
        return MergedAttention.apply(self.parts[self.windows[layer_idx]], scale, self.bias, query, *states)


def _attention(
    base: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    retro_attention: AttentionLayout | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    has_4d_mask = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4
    changes = [name for name in CHANGES_OF_SCORES if kwargs.get(name) is not None]
    if changes and (retro_attention is not None or (has_4d_mask and base != "sdpa")):
        raise ValueError(
            f"the decoder changes the scores of its attention ({', '.join(changes)}), which {base!r} does by itself: "
            "load it with attn_implementation='eager' to read neighbors"
        )
    if retro_attention is None:
        # A kernel that takes no mask of this kind leaves the call to SDPA.
        attention = ALL_ATTENTION_FUNCTIONS["sdpa" if has_4d_mask else base]
        return attention(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return retro_attention.attend(module.layer_idx, query, key, value, scale), None


def register_attention(base: str) -> str:
    """
    Registers the attention of a decoder whose own attention is `base`. It attends in parts if a call gives an
    [`AttentionLayout`] as `retro_attention`, and otherwise calls the decoder's own attention.

    Args:
        base (`str`): Name of an attention of transformers, such as `"sdpa"`.

    Returns:
        `str`: the name of the registered attention.
    """
    name = PREFIX + base
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, partial(_attention, base))
        mask_function: Callable | None = ALL_MASK_ATTENTION_FUNCTIONS.get(base)
        if mask_function is not None:
            AttentionMaskInterface.register(name, mask_function)
    return name


__all__ = ["AttentionLayout", "AttentionPart", "Blocks", "MergedAttention", "group_columns", "register_attention"]
