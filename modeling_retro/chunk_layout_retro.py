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
"""Computes the neighbors that each token sees, from its position and the padding of its row"""

from dataclasses import dataclass
from typing import TypeVar

import torch


Index = TypeVar("Index", int, torch.LongTensor)


def seen_chunk(index: Index, chunk_size: int) -> Index:
    """
    Finds the chunk of its document whose neighbors a token sees: the one that was completed last. The last token of a
    chunk is therefore the first that sees the neighbors retrieved with it (section 2.4 of arXiv 2112.04426).

    Args:
        index (`int` or `torch.LongTensor`): Index i of the token in its document.
        chunk_size (`int`): Number m of tokens in a chunk.

    Returns:
        `int` or `torch.LongTensor`: the number u = (i + 1) // m - 1 of the chunk, -1 if no chunk is complete.
    """
    return (index + 1) // chunk_size - 1


def completes_chunk(index: int | torch.LongTensor, chunk_size: int) -> bool | torch.BoolTensor:
    """Whether a token is the last of a chunk, from its index in its document: the first that sees its neighbors."""
    return (index + 1) % chunk_size == 0


def completed_between(before: int, after: int, chunk_size: int) -> range:
    """
    Finds the chunks that are completed while a document grows. Only whole chunks are looked up.

    Args:
        before (`int`), after (`int`): Number of tokens of the document before and after.
        chunk_size (`int`): Number m of tokens in a chunk.

    Returns:
        `range`: the numbers u of the chunks, which hold the tokens u m … u m + m - 1.
    """
    return range(seen_chunk(before - 1, chunk_size) + 1, seen_chunk(after - 1, chunk_size) + 1)


def default_position_ids(
    inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, past_length: int | torch.Tensor
) -> torch.LongTensor:
    """Index of each token in its row, counted without padding, `(batch_size, seq_len)`."""
    batch_size, seq_len = inputs_embeds.shape[:2]
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -seq_len:]
    position_ids = torch.arange(seq_len, device=inputs_embeds.device) + past_length
    return position_ids.expand(batch_size, -1)


def token_mask(
    attention_mask: torch.Tensor | None, position_ids: torch.LongTensor, past_length: int
) -> torch.BoolTensor:
    """The 2-D mask of the tokens of each row, including cached ones, `(batch_size, past_length + seq_len)`."""
    if attention_mask is not None and attention_mask.ndim == 2:
        return attention_mask.bool()
    batch_size, seq_len = position_ids.shape
    return position_ids.new_ones(batch_size, past_length + seq_len, dtype=torch.bool)


def check_position_ids(position_ids: torch.LongTensor) -> None:
    """
    Checks that each position `(batch_size, seq_len)` is one higher than the position before it, or 0. Chunks are found
    by these positions, but a mask can order tokens in other ways. The check reads the values of the tensor.

    Raises:
        ValueError: If the positions differ, such as those of a tree of candidates.
    """
    before, after = position_ids[:, :-1], position_ids[:, 1:]
    jumps = (after != before + 1) & (after != 0)
    if not torch.compiler.is_compiling() and jumps.any():
        row, column = jumps.nonzero()[0].tolist()
        raise ValueError(
            f"position {int(after[row, column])} follows {int(before[row, column])} in row {row} of `position_ids`, "
            "but with neighbors positions must count on or start again from 0: tokens of a document that share a "
            "position, as in a tree, have no chunks. Pass one row for each branch, or no neighbors."
        )


def take_columns(states: torch.Tensor, columns: torch.LongTensor) -> torch.Tensor:
    """Rows of `states` `(B, N, ...)` at `columns` `(B, M)`: `(B, M, ...)`."""
    batch_size, length = states.shape[:2]
    offsets = torch.arange(batch_size, device=columns.device)[:, None] * length
    return states.flatten(0, 1).index_select(0, (columns + offsets).flatten()).unflatten(0, columns.shape)


@dataclass
class TokenLocations:
    """Places of the tokens of a call in their documents and rows, and the number of chunks before the call."""

    document_index: torch.LongTensor  # [B, T] i: index of the token in its document
    row_index: torch.LongTensor  # [B, T] t': index of the token in its row, counted without padding
    document_slot: torch.LongTensor  # [B, T] (t' - i) / m: number of chunks of the row before the token's document
    is_token: torch.BoolTensor  # [B, T] False for padding
    mask: torch.BoolTensor  # [B, N] the same for cached tokens and those of the call
    column_of: torch.LongTensor  # [B, N + 1] column of the token with each row index
    first_document_index: torch.LongTensor  # [B, 1] i of the first token of the call
    first_row_index: torch.LongTensor  # [B, 1] t' of the first token of the call
    first_slot: torch.LongTensor  # [B, 1] number of chunks that the row completed before the call


def locate_tokens(position_ids: torch.LongTensor, attention_mask: torch.BoolTensor, chunk_size: int) -> TokenLocations:
    """
    Finds the places of the tokens of a call in their documents and rows. A row whose first token has a position above
    0 lacks the first tokens of its document. Its first chunk ends at position m - 1, as if these were there.

    Args:
        position_ids (`torch.LongTensor` of shape `(batch_size, seq_len)`):
            Index i of each token of the call in its document.
        attention_mask (`torch.BoolTensor` of shape `(batch_size, past_length + seq_len)`):
            False for padding.
        chunk_size (`int`):
            Number m of tokens in a chunk.
    """
    batch_size, seq_len = position_ids.shape
    total_length = attention_mask.shape[1]
    row_index = attention_mask.cumsum(-1) - 1  # [B, N]
    columns = torch.arange(total_length, device=position_ids.device).expand(batch_size, -1)
    column_of = columns.new_zeros(batch_size, total_length + 1)
    column_of = column_of.scatter(1, torch.where(attention_mask, row_index, total_length), columns)

    is_token, row_index = attention_mask[:, -seq_len:], row_index[:, -seq_len:]
    document_slot = torch.div(row_index - position_ids, chunk_size, rounding_mode="trunc")
    first = is_token.int().argmax(-1, keepdim=True)
    first_document_index = position_ids.gather(1, first)
    first_slot = document_slot.gather(1, first) + first_document_index // chunk_size
    if total_length == seq_len:
        first_slot = torch.zeros_like(first_slot)
    return TokenLocations(
        document_index=position_ids,
        row_index=row_index,
        document_slot=document_slot,
        is_token=is_token,
        mask=attention_mask,
        column_of=column_of,
        first_document_index=first_document_index,
        first_row_index=row_index.gather(1, first),
        first_slot=first_slot,
    )


def locate_call(
    inputs: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.LongTensor | None,
    past_length: int,
    chunk_size: int,
) -> TokenLocations:
    """
    Finds the places of the tokens of a forward pass, whose arguments these are (see [`locate_tokens`]).

    Raises:
        ValueError: If a 4-D mask comes with positions that do not count on.
    """
    if position_ids is None:
        position_ids = default_position_ids(inputs, attention_mask, past_length)
    position_ids = position_ids.expand(inputs.shape[0], -1)
    if attention_mask is not None and attention_mask.ndim == 4:
        check_position_ids(position_ids)
    return locate_tokens(position_ids, token_mask(attention_mask, position_ids, past_length), chunk_size)


def completed_chunks(
    locations: TokenLocations, chunk_size: int
) -> tuple[torch.LongTensor, torch.LongTensor, torch.LongTensor]:
    """
    Finds the chunks that a call completes. It reads the values of tensors, which retrieval moves to the CPU anyway.

    Returns:
        `tuple`: rows `(n,)`, slots `(n,)` counted from the first chunk that the call completes in the row, and columns
        `(n, chunk_size)` of the tokens of each chunk, counted from the first cached one. The tokens that a row lacks
        in its first chunk are in the columns in front of it, which are padding, or negative if there are not enough.
    """
    slots = locations.document_slot + seen_chunk(locations.document_index, chunk_size) - locations.first_slot
    closing = locations.is_token & completes_chunk(locations.document_index, chunk_size) & (slots >= 0)
    rows, closing_columns = closing.nonzero(as_tuple=True)
    back = torch.arange(chunk_size - 1, -1, -1, device=rows.device)
    row_index = locations.row_index[rows, closing_columns][:, None] - back  # [n, m]
    columns = locations.column_of[rows[:, None], row_index.clamp(min=0)] + row_index.clamp(max=0)
    return rows, slots[rows, closing_columns], columns


def find_seen_slots(
    locations: TokenLocations, chunk_size: int, num_slots: int, has_previous_slot: bool
) -> tuple[torch.LongTensor, torch.BoolTensor, torch.LongTensor]:
    """
    Finds the slot that each token sees. Let i be the index of a token in its document, and t' its index in the row,
    counted without padding. The token sees the neighbors of chunk u of its document (see [`seen_chunk`]), which is
    chunk (t' - i) / m + u of the row, where the quotient is rounded towards 0.

    The slots are the chunks that the call completes. If `has_previous_slot`, the last chunk that the row completed in
    earlier calls stands in front of them.

    Args:
        locations ([`TokenLocations`]):
            Places of the tokens.
        chunk_size (`int`):
            Number m of tokens in a chunk.
        num_slots (`int`):
            Number of slots, including the previous one.
        has_previous_slot (`bool`):
            Whether the first slot is the last chunk that the row completed before the call.

    Returns:
        `tuple`: the slot of each token `(batch_size, seq_len)`, whether the token sees a slot at all, and the slot
        `(batch_size,)` that the next token of the row sees. If that number is outside the range of the slots, the next
        token sees none of them.
    """
    i = locations.document_index
    before = int(has_previous_slot)
    slot = locations.document_slot + seen_chunk(i, chunk_size) - locations.first_slot + before  # [B, T]
    sees = locations.is_token & (i + 1 >= chunk_size) & (slot >= 0) & (slot < num_slots)
    last = i.shape[1] - 1 - locations.is_token.flip(-1).int().argmax(-1, keepdim=True)  # [B, 1]
    next_slot = locations.document_slot.gather(1, last) + seen_chunk(i.gather(1, last), chunk_size)
    next_slot = next_slot - locations.first_slot + before
    next_slot = torch.where(locations.is_token.any(-1, keepdim=True), next_slot, before - 1)
    return slot, sees, next_slot[:, 0]


@dataclass
class ChunkLayout:
    """
    The neighbors that each token of a call sees. A *slot* is a whole chunk of a row whose neighbors some token of the
    call may see. The S slots are the chunks that the call completes. If `has_previous_slot`, the last chunk that the
    row completed in earlier calls stands in front of them. At most G tokens of the call see the same slot.
    """

    first_slot: torch.LongTensor  # [B] number of chunks that the row completed before the call
    next_slot: torch.LongTensor  # [B] the slot that the next token of the row sees; none if not in 0 … S - 1
    chunk_columns: torch.LongTensor  # [B, S, m] columns of the tokens of each chunk, from the first cached one
    query_columns: torch.LongTensor  # [B, S G] columns in the call of the tokens that see each slot
    query_places: torch.LongTensor  # [B, T] place of each token among these S G
    sees: torch.BoolTensor  # [B, T] whether the token sees a slot at all
    query_positions: torch.LongTensor  # [B, T] position of each token counted from the start of the chunk it sees

    def to(self, *args, **kwargs) -> "ChunkLayout":
        """Moves the tensors; accelerate calls it when the layers of a model are on several devices."""
        return ChunkLayout(**{name: tensor.to(*args, **kwargs) for name, tensor in vars(self).items()})


def compute_chunk_layout(
    locations: TokenLocations, chunk_size: int, num_slots: int, has_previous_slot: bool
) -> ChunkLayout:
    """
    Maps tokens to the chunks whose neighbors they see (see [`find_seen_slots`]).

    Args:
        locations ([`TokenLocations`]):
            Places of the tokens.
        chunk_size (`int`):
            Number m of tokens in a chunk.
        num_slots (`int`):
            Number of slots for which the call has neighbors.
        has_previous_slot (`bool`):
            Whether one more slot stands in front: the last chunk that the row completed before the call.
    """
    i, t = locations.document_index, locations.row_index
    batch_size, seq_len = i.shape
    device = i.device
    before = int(has_previous_slot)
    num_slots = num_slots + before
    slot, sees, next_slot = find_seen_slots(locations, chunk_size, num_slots, has_previous_slot)
    offset = (i + 1) % chunk_size  # [B, T]
    closing = sees & (offset == 0)
    if has_previous_slot:
        # Only some of the tokens that see the previous slot are in this call, so count from the first of these.
        offset = torch.where(slot == 0, t - locations.first_row_index, offset)
        closing = closing & (slot > 0)

    group_size = min(chunk_size, seq_len)
    nowhere = num_slots * group_size
    places = torch.where(sees, slot * group_size + offset, nowhere)
    columns = torch.arange(seq_len, device=device).expand(batch_size, -1)
    query_columns = columns.new_zeros(batch_size, nowhere + 1).scatter(1, places, columns)[:, :-1]

    # All tokens of a chunk stand in front of its last token in the row. Those that a row lacks become its first one.
    closing_index = t.new_zeros(batch_size, num_slots + 1)
    closing_index = closing_index.scatter(1, torch.where(closing, slot, num_slots), t)[:, :-1]  # [B, S]
    if has_previous_slot:
        previous = locations.first_row_index - locations.first_document_index % chunk_size - 1
        closing_index = torch.cat([previous, closing_index[:, 1:]], dim=1)
    row_index = closing_index[:, :, None] - torch.arange(chunk_size - 1, -1, -1, device=device)  # [B, S, m]
    chunk_columns = locations.column_of.gather(1, row_index.clamp(min=0).flatten(1))

    return ChunkLayout(
        first_slot=locations.first_slot[:, 0],
        next_slot=next_slot,
        chunk_columns=chunk_columns.unflatten(1, (num_slots, chunk_size)),
        query_columns=query_columns,
        query_places=places.clamp(max=nowhere - 1),
        sees=sees,
        query_positions=chunk_size - 1 + (i + 1) % chunk_size,
    )
