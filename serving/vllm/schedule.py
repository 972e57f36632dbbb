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
A row as a sequence of stretches, each of which sees the same texts, for an engine that reads one stretch in one
request. They follow from the places at which the texts in sight change (see docs/semantics.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Text:
    """
    A text that the model reads by itself, and that a row sees.

    Args:
        tokens (`tuple[int, ...]`): Its tokens.
        start (`int`): Position of its first token, counted from the first token of the row, so below 0.
        num_hidden (`int`, *optional*, defaults to 0): Number of tokens at its start that the row does not see.
    """

    tokens: tuple[int, ...]
    start: int
    num_hidden: int = 0

    @property
    def num_seen(self) -> int:
        """`int`: Number of its tokens that the row sees."""
        return len(self.tokens) - self.num_hidden


@dataclass(frozen=True)
class Stretch:
    """Tokens `start` to `end` of a row, which see `texts` and all tokens of the row up to themselves."""

    start: int
    end: int
    texts: tuple[Text, ...]

    @property
    def num_seen(self) -> int:
        """`int`: Number of tokens of the texts that it sees."""
        return sum(text.num_seen for text in self.texts)


def neighbor_texts(neighbors: Sequence[Sequence[int]], neighbor_length: int, num_hidden: int) -> tuple[Text, ...]:
    """
    The texts of the neighbors of a chunk.

    Args:
        neighbors (`Sequence[Sequence[int]]`): Their tokens without padding.
        neighbor_length (`int`): Their length with padding, which stands behind them.
        num_hidden (`int`): Number of tokens at the start of each that a row does not see.
    """
    texts = (Text(tuple(tokens), -neighbor_length, num_hidden) for tokens in neighbors)
    return tuple(text for text in texts if text.num_seen > 0)


def passage_texts(
    passages: Sequence[Sequence[int]], before: Sequence[int], how: str, neighbor_length: int, num_hidden: int
) -> tuple[Text, ...]:
    """
    The texts of the passages of a question.

    Args:
        passages (`Sequence[Sequence[int]]`): Their tokens without padding.
        before (`Sequence[int]`): Tokens of the prompt that stand before them.
        how (`str`): `"apart"`, or `"in_order"`, as one text.
        neighbor_length (`int`): Length of a passage with padding, which stands behind it.
        num_hidden (`int`): Number of tokens at the start of each passage that the row does not see, if it stands apart
            with nothing before it.
    """
    if how == "in_order":
        tokens = (*before, *(token for passage in passages for token in passage))
        return (Text(tokens, -len(tokens)),) if tokens else ()
    if not before:
        return neighbor_texts(passages, neighbor_length, num_hidden)
    start = -(len(before) + neighbor_length)
    # All texts begin with the same tokens, in the same states, and the row sees these once.
    return tuple(
        Text((*before, *passage), start, len(before) if number > 0 else 0)
        for number, passage in enumerate(passages or [()])
    )


@dataclass
class RowPlan:
    """
    What decides the stretches of a row.

    Args:
        chunk_size (`int`): Number m of tokens in a chunk.
        reread_tokens (`int`): Number of tokens at the end of a chunk that are read again when it has neighbors.
        passages (`tuple[Text, ...]`, *optional*): The passages of a question.
        seen_by_first (`bool`, *optional*, defaults to `False`): Whether the first token of the row sees them too.
        first_chunk (`int`, *optional*, defaults to 0): The first chunk that is looked up.
        neighbors (`dict[int, tuple[Text, ...]]`): The texts of each chunk that was looked up.
    """

    chunk_size: int
    reread_tokens: int
    passages: tuple[Text, ...] = ()
    seen_by_first: bool = False
    first_chunk: int = 0
    neighbors: Mapping[int, tuple[Text, ...]] = field(default_factory=dict)

    def missing_chunks(self, num_tokens: int) -> range:
        """The whole chunks of a row of `num_tokens` tokens that must still be looked up."""
        return range(max(self.first_chunk, max(self.neighbors, default=-1) + 1), num_tokens // self.chunk_size)

    def room(self, num_tokens: int) -> int:
        """How many tokens may be written behind `num_tokens` until the texts in sight change."""
        if self.passages and not self.seen_by_first and num_tokens == 1:
            return 1
        return self.chunk_size - num_tokens % self.chunk_size

    def stretches(self, num_tokens: int) -> list[Stretch]:
        """The stretches of a row of `num_tokens` tokens. The next tokens belong to the last of them."""
        starts: list[tuple[int, tuple[Text, ...]]] = [(0, self.passages if self.seen_by_first else ())]
        if self.passages and not self.seen_by_first:
            starts.append((1, self.passages))
        for chunk in range(self.first_chunk, num_tokens // self.chunk_size):
            texts, last = self.neighbors[chunk], (chunk + 1) * self.chunk_size - 1
            if texts and self.reread_tokens > 1:
                # The first token of a document sees no neighbors.
                starts.append((max(1, last + 1 - self.reread_tokens), self.passages + texts))
            else:
                starts.append((last, self.passages + texts))
        ends = [start for start, _ in starts[1:]] + [num_tokens]
        found: list[Stretch] = []
        for (start, texts), end in zip(starts, ends, strict=True):
            if found and found[-1].texts == texts:
                found[-1] = Stretch(found[-1].start, end, texts)
            elif start < end:
                found.append(Stretch(start, end, texts))
        return found
