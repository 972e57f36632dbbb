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
"""Which states of a row's tokens are computed in joint attention, and which keys each of them sees"""

from dataclasses import dataclass

import torch

from .attention_retro import AttentionPart, Blocks, group_columns
from .chunk_layout_retro import TokenLocations, completes_chunk, find_seen_slots


@dataclass
class RowStates:
    """
    The states that a call without cached tokens computes for each row, W in number. Every token has the state that it
    was read or written in. If the call also reads tokens again, these stand in front, in the order of the row.

    Args:
        columns (`torch.LongTensor` of shape `(batch_size, W)`):
            The column of the token of each state.
        slot (`torch.LongTensor` of shape `(batch_size, W)`):
            The slot whose neighbors the state sees; `num_slots` if it sees none.
        next_slot (`torch.LongTensor` of shape `(batch_size,)`):
            The slot that the next token of the row sees.
        num_again (`int`):
            Number of states in front for tokens that are read again.
        chunk (`torch.LongTensor` of shape `(batch_size, W)`):
            For both states of a token that is read again, the slot of its chunk; `num_slots` for all others.
        is_superseded (`torch.BoolTensor` of shape `(batch_size, W)`):
            Whether the token of this state is read again. Later chunks do not see this state.
        is_filler (`torch.BoolTensor` of shape `(batch_size, W)`):
            Whether the state is of no use, because the row reads fewer tokens again than another.
    """

    columns: torch.LongTensor
    slot: torch.LongTensor
    next_slot: torch.LongTensor
    num_again: int
    chunk: torch.LongTensor
    is_superseded: torch.BoolTensor
    is_filler: torch.BoolTensor

    @property
    def final(self) -> Blocks:
        """[`Blocks`]: the T states that stay, in the order of the row."""
        width = self.columns.shape[1]
        length = width - self.num_again
        places = torch.where(self.is_superseded | self.is_filler, length, self.columns)  # [B, W]
        states = torch.arange(width, device=places.device).expand_as(places)
        final = places.new_zeros(len(places), length + 1).scatter(1, places, states)
        return Blocks(final[:, None, :length], places)


def plan_states(
    locations: TokenLocations, present: torch.BoolTensor, chunk_size: int, reread_tokens: int, is_prompt: bool
) -> RowStates:
    """
    Plans the states of a call without cached tokens.

    A token sees the neighbors of the chunk that its document completed last. When a chunk is complete and has
    neighbors, its last tokens are read again with these in sight, all but the first token of the document. The state
    that they have then is the one that later chunks see. The last token of a chunk is read when its chunk is complete,
    so it needs no second state. If nothing is predicted inside the call, the first states are not needed either.

    Args:
        locations ([`TokenLocations`]):
            Places of the tokens.
        present (`torch.BoolTensor` of shape `(batch_size, num_slots)`):
            Whether a slot has a neighbor with a token that a row may see.
        chunk_size (`int`):
            Number m of tokens in a chunk.
        reread_tokens (`int`):
            Number of tokens at the end of each chunk that are read again.
        is_prompt (`bool`):
            Whether nothing is predicted in the call but what follows it.
    """
    index, num_slots, device = locations.document_index, present.shape[1], present.device
    batch_size, length = index.shape
    slot, sees, next_slot = find_seen_slots(locations, chunk_size, num_slots, has_previous_slot=False)
    padded = torch.nn.functional.pad(present, (0, 1))  # the slot behind the last is that of nothing
    slot = torch.where(sees, slot, num_slots)
    slot = torch.where(padded.gather(1, slot), slot, num_slots)
    columns = torch.arange(length, device=device).expand(batch_size, -1)
    nowhere = torch.full_like(slot, num_slots)
    chunk, again, num_again = nowhere, torch.zeros_like(sees), 0
    if reread_tokens > 1 and num_slots > 0:
        chunk = locations.document_slot + index // chunk_size
        again = _is_whole(locations, chunk_size) & (chunk >= 0) & (chunk < num_slots)
        chunk = torch.where(again, chunk, num_slots)
        again &= padded.gather(1, chunk) & (index % chunk_size >= chunk_size - reread_tokens)
        again &= (index > 0) & (locations.row_index > 0)
        if is_prompt:
            slot, again = torch.where(again, chunk, slot), torch.zeros_like(again)
        again = again & ~completes_chunk(index, chunk_size)
        chunk = torch.where(again, chunk, num_slots)
        num_again = int(again.sum(1).max())
    front = (~again).int().argsort(dim=1, stable=True)[:, :num_again]  # [B, R]
    is_filler = ~again.gather(1, front)
    front_chunk = torch.where(is_filler, num_slots, chunk.gather(1, front))
    return RowStates(
        columns=torch.cat([front, columns], dim=1),
        slot=torch.cat([front_chunk, slot], dim=1),
        next_slot=next_slot,
        num_again=num_again,
        chunk=torch.cat([front_chunk, chunk], dim=1),
        is_superseded=torch.cat([torch.zeros_like(is_filler), again], dim=1),
        is_filler=torch.cat([is_filler, torch.zeros_like(again)], dim=1),
    )


def _is_whole(locations: TokenLocations, chunk_size: int) -> torch.BoolTensor:
    """Whether the row also holds the last token of the chunk of each token, `(B, T)`."""
    index, row_index = locations.document_index, locations.row_index
    last = row_index + chunk_size - 1 - index % chunk_size
    num_tokens = locations.is_token.sum(1, keepdim=True)
    column = locations.column_of.gather(1, torch.minimum(last, num_tokens - 1).clamp(min=0))
    start = row_index - index
    return locations.is_token & (last < num_tokens) & (start.gather(1, column) == start)


def make_row_mask(
    mask: torch.BoolTensor,
    position_ids: torch.LongTensor,
    query_columns: torch.LongTensor,
    window: int | None,
    given: torch.Tensor | None = None,
) -> torch.BoolTensor:
    """
    Which tokens of the row the queries see: those of their document up to themselves.

    Args:
        mask (`torch.BoolTensor` of shape `(batch_size, N)`):
            False for padding.
        position_ids (`torch.LongTensor` of shape `(batch_size, Q)`):
            Index of each query in its document.
        query_columns (`torch.LongTensor` of shape `(batch_size, Q)`):
            Column of each query in the row.
        window (`int`, *optional*):
            Length of the sliding window of the layer.
        given (`torch.Tensor` of shape `(batch_size, 1, Q, N)`, *optional*):
            The caller's own mask, in the place of that of documents.

    Returns:
        `torch.BoolTensor` of shape `(batch_size, Q, N)`.
    """
    columns = torch.arange(mask.shape[1], device=mask.device)
    distance = query_columns[..., None] - columns  # [B, Q, N]
    if given is None:
        row_index = mask.cumsum(-1) - 1  # [B, N]
        document_start = row_index.gather(1, query_columns) - position_ids  # [B, Q]
        seen = mask[:, None] & (distance >= 0) & (row_index[:, None] >= document_start[..., None])
        # A softmax needs at least one key, so padding sees itself.
        seen = seen | (distance == 0)
    else:
        seen = given[:, 0] if given.dtype == torch.bool else given[:, 0] >= 0
    return seen if window is None else seen & (distance < window)


def mask_of_states(states: RowStates, row_mask: torch.BoolTensor) -> torch.BoolTensor:
    """
    Which states see which, `(B, W, W)`, from which tokens see which, `(B, T, T)`. A state that is superseded sees the
    final states of the tokens before those that are read again with it, and the superseded ones up to itself.
    """
    if states.num_again == 0:
        return row_mask
    columns, width = states.columns, states.columns.shape[1]
    seen = row_mask.gather(1, columns[..., None].expand(-1, -1, row_mask.shape[2]))
    seen = seen.gather(2, columns[:, None].expand(-1, width, -1))  # [B, W, W]
    by_superseded = states.is_superseded[..., None]
    same_chunk = states.chunk[..., None] == states.chunk[:, None]
    seen = seen & torch.where(states.is_superseded[:, None], by_superseded & same_chunk, ~by_superseded | ~same_chunk)
    own = torch.eye(width, dtype=torch.bool, device=seen.device)
    is_filler = states.is_filler
    return torch.where(is_filler[..., None], own, seen & ~is_filler[:, None])


def make_row_parts(states: RowStates, row_mask: torch.BoolTensor | None, num_slots: int) -> list[AttentionPart]:
    """
    The parts of the attention of a call without cached tokens whose keys are those of the row.

    Args:
        states ([`RowStates`]):
            The states and what they see.
        row_mask (`torch.BoolTensor` of shape `(batch_size, T, T)`, *optional*):
            Which tokens see which. By default each sees all up to itself.
        num_slots (`int`):
            Number of slots.
    """
    mask = None if row_mask is None else row_mask[:, None]
    final = states.final if states.num_again > 0 else None
    parts = [AttentionPart(queries=final, keys=final, mask=mask, is_causal=mask is None)]
    if states.num_again > 0:
        parts += _superseded_parts(states, row_mask, final, num_slots)
    return parts


def make_neighbor_part(
    slot: torch.LongTensor, neighbors: torch.LongTensor, seen: torch.BoolTensor, size: int, source: int
) -> AttentionPart:
    """
    The part of the attention whose keys are those of neighbors: blocks of states that see the same slot.

    Args:
        slot (`torch.LongTensor` of shape `(batch_size, W)`):
            The slot that each state sees; `num_slots` if it sees none.
        neighbors (`torch.LongTensor` of shape `(batch_size, num_slots, k)`):
            The number of each neighbor.
        seen (`torch.BoolTensor` of shape `(batch_size, num_slots, k, neighbor_length)`):
            True for the tokens of neighbors that a row may see.
        size (`int`):
            Number of states in a block.
        source (`int`):
            Which list of neighbors the numbers count.
    """
    num_slots, k = neighbors.shape[1:]
    blocks, slots = group_columns(slot, num_slots, size)
    mask = seen.flatten(2).gather(1, slots[..., None].expand(-1, -1, seen[0, 0].numel())).flatten(0, 1)
    # A softmax needs at least one key. No query reads the result.
    mask = mask | ~mask.any(-1, keepdim=True)
    neighbors = neighbors.gather(1, slots[..., None].expand(-1, -1, k))
    return AttentionPart(queries=blocks, neighbors=neighbors, source=source, mask=mask[:, None, None])


def _superseded_parts(
    states: RowStates, row_mask: torch.BoolTensor | None, final: Blocks, num_slots: int
) -> list[AttentionPart]:
    """The parts of the states that are superseded: what stands before those of their chunk, and these themselves."""
    group = torch.where(states.is_superseded, states.chunk, num_slots)
    size = int(torch.nn.functional.one_hot(group, num_slots + 1).sum(1)[:, :num_slots].max())
    before, _ = group_columns(group, num_slots, size)
    # Fillers have a softmax too, over themselves.
    own, _ = group_columns(torch.where(states.is_filler, num_slots, group + (group == num_slots)), num_slots + 1, size)
    is_empty = before.is_empty().unflatten(0, before.columns.shape[:2])  # [B, M, G]
    columns = states.columns.gather(1, before.columns.flatten(1)).view_as(before.columns)
    length = final.columns.shape[2]
    first = columns.masked_fill(is_empty, length).amin(-1)  # [B, M]
    slices, masks = [], []
    for n, (low, high) in enumerate(
        zip(first.amin(0).tolist(), first.masked_fill(first == length, 0).amax(0).tolist())
    ):
        if row_mask is None and low == high:
            slices.append((0, high))
            masks.append(None)
            continue
        keys = torch.arange(high, device=first.device)
        seen = keys < first[:, n, None, None]  # [B, 1, high]
        if row_mask is None:
            seen = seen.expand(-1, columns.shape[2], -1)
        else:
            seen = seen & row_mask[:, :, :high].gather(1, columns[:, n, :, None].expand(-1, -1, high))
        start = int(seen.any(1).any(0).int().argmax())
        seen = seen[..., start:]
        slices.append((start, high))
        masks.append((seen | ~seen.any(-1, keepdim=True))[:, None])
    return [
        AttentionPart(queries=before, keys=final, slices=slices, slice_masks=masks),
        AttentionPart(queries=own, keys=own, is_causal=True),
    ]


__all__ = ["RowStates", "make_neighbor_part", "make_row_mask", "make_row_parts", "mask_of_states", "plan_states"]
