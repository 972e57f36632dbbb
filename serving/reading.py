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
"""Measures what the neighbors of a text were worth for each token, and finds text that was copied from them"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from modeling_retro import RetroJointForCausalLM
from modeling_retro.chunk_layout_retro import seen_chunk
from modeling_retro.drafts_retro import DRAFT_TOKENS, DraftLength
from modeling_retro.retriever.retriever import RetroRetriever
from trainers.prompts import split_beginning

from .decoding_batch import DecodingBatch, RetrievedChunk, Row, draft_of
from .sampling import ChosenToken, Sampler, SamplingParameters
from .text_stream import TextStream


# Number of consecutive tokens that count as copied if a neighbor and the text that read it share them.
COPIED_TOKENS = 4


@dataclass
class Piece:
    """
    A token, or the tokens of one character.

    Args:
        text (`str`): The text of the tokens.
        bits_on (`float`): Bits that the model needs for them with neighbors, 0 for a first token.
        bits_off (`float`): Bits that the model needs without neighbors.
        is_given (`bool`): Whether they are part of the prompt.
    """

    text: str
    bits_on: float
    bits_off: float
    is_given: bool = True

    @property
    def worth(self) -> float:
        """`float`: Bits that the neighbors saved: log2 p(ON) − log2 p(OFF)."""
        return self.bits_off - self.bits_on


@dataclass
class Neighbor:
    """
    A neighbor, in a form for people to read.

    Args:
        parts (`list[tuple[str, bool]]`): The text in parts, each with whether the text that read it has the part too.
        source (`str`): The document and the part of it that the neighbor comes from.
        score (`float`): Score of the neighbor.
    """

    parts: list[tuple[str, bool]]
    source: str
    score: float


@dataclass
class Stretch:
    """
    The tokens of one chunk, and the neighbors that were read while they were predicted, which are the passages of the
    question, if there is one, and the neighbors of the chunk before.

    Args:
        pieces (`list[Piece]`): The tokens of the chunk.
        neighbors (`list[Neighbor]`): The neighbors that were read.
    """

    pieces: list[Piece] = field(default_factory=list)
    neighbors: list[Neighbor] = field(default_factory=list)


class Reading:
    """
    A text that grows chunk by chunk, with the neighbors that each chunk read.

    Args:
        retriever ([`RetroRetriever`]): Looks up the chunks of the text.
    """

    def __init__(self, retriever: RetroRetriever):
        self.datastore = retriever.datastore
        self.stretches: list[Stretch] = []
        self.num_bytes = 0
        self._ids: list[int] = []
        self._retrieved: dict[int | None, RetrievedChunk] = {}  # by the number of the chunk; a question has None
        self._text = TextStream(self.datastore.tokenizer)
        self._pending = (0.0, 0.0)

    def add(self, token: int, bits_on: float, bits_off: float, is_given: bool) -> None:
        """Adds the next token with the bits that it needed."""
        if len(self._ids) % self.datastore.chunk_size == 0:
            self.stretches.append(Stretch())
        self._ids.append(token)
        on, off = self._pending
        text, _ = self._text.push(ChosenToken(token, 0.0, []))
        self._pending = (on + bits_on, off + bits_off)
        if text:
            self.stretches[-1].pieces.append(Piece(text, *self._pending, is_given))
            self._pending = (0.0, 0.0)
            self.num_bytes += len(text.encode())

    def look_up(self, retrieved: Sequence[RetrievedChunk]) -> None:
        """Adds the neighbors that were found so far for the chunks of the text."""
        self._retrieved = {chunk.index: chunk for chunk in retrieved}
        size = self.datastore.chunk_size
        for number, stretch in enumerate(self.stretches):
            # The last token of the chunk before predicts the first one of this chunk.
            seen = [n for n in (None, seen_chunk(number * size - 1, size)) if n in self._retrieved]
            is_open = number == len(self.stretches) - 1
            if is_open or not stretch.neighbors:
                reader = self._ids[number * size : (number + 1) * size]
                stretch.neighbors = [each for n in seen for each in self._describe(self._retrieved[n], reader)]

    @property
    def is_question(self) -> bool:
        """`bool`: Whether a question was looked up, whose passages all chunks read."""
        return None in self._retrieved

    def bits_per_byte(self) -> tuple[float, float]:
        """Bits per byte with neighbors and without. The first token costs nothing."""
        pieces = [piece for stretch in self.stretches for piece in stretch.pieces]
        num_bytes = max(1, self.num_bytes)
        return sum(piece.bits_on for piece in pieces) / num_bytes, sum(piece.bits_off for piece in pieces) / num_bytes

    def _describe(self, chunk: RetrievedChunk, reader: Sequence[int]) -> list[Neighbor]:
        neighbors = []
        for ids, score, document, chunk_id in zip(
            chunk.input_ids, chunk.scores, chunk.document_ids, chunk.chunk_ids, strict=True
        ):
            parts = [
                (self._decode(part), is_copied) for part, is_copied in split_copied(ids, copied_places(ids, reader))
            ]
            neighbors.append(Neighbor(parts, self._source(document, chunk_id), score))
        return neighbors

    def _source(self, document: int, chunk_id: int) -> str:
        """The number of the part and its document, and its source, or the beginning of the document."""
        if chunk_id < 0:
            return "from outside of the datastore"
        chunks = self.datastore.chunks
        first, end = (int(chunks.document_id.searchsorted(document, side)) for side in ("left", "right"))
        (source,) = self.datastore.sources([chunk_id])
        if source is not None:
            return f"{source} · document {document}, chunk {chunk_id - first + 1} of {end - first}"
        ids, mask = chunks.take([first])
        beginning = " ".join(self._decode(ids[0][mask[0]].tolist()).split())
        beginning = beginning if len(beginning) <= 60 else beginning[:60].rstrip() + "…"
        return f"document {document}, chunk {chunk_id - first + 1} of {end - first} · “{beginning}”"

    def _decode(self, ids: Sequence[int]) -> str:
        return self.datastore.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def copied_places(neighbor: Sequence[int], reader: Sequence[int], length: int = COPIED_TOKENS) -> list[bool]:
    """
    Finds the tokens of a neighbor that are in a run of at least `length` tokens that the text that read it has too.

    Args:
        neighbor (`Sequence[int]`): Tokens of the neighbor.
        reader (`Sequence[int]`): Tokens that were predicted while the neighbor was read.
        length (`int`, *optional*, defaults to 4): Number of tokens in the shortest run.
    """
    runs = {tuple(reader[start : start + length]) for start in range(len(reader) - length + 1)}
    copied = [False] * len(neighbor)
    for start in range(len(neighbor) - length + 1):
        if tuple(neighbor[start : start + length]) in runs:
            copied[start : start + length] = [True] * length
    return copied


def split_copied(ids: Sequence[int], copied: Sequence[bool]) -> list[tuple[list[int], bool]]:
    """Splits tokens into parts that are copied and parts that are not."""
    parts: list[tuple[list[int], bool]] = []
    for id, is_copied in zip(ids, copied, strict=True):
        if not parts or parts[-1][1] != is_copied:
            parts.append(([], is_copied))
        parts[-1][0].append(id)
    return parts


def make_row(
    model: PreTrainedModel, retriever: RetroRetriever, ids: Sequence[int], num_neighbors: int, query: list[int] | None
) -> Row:
    """A row of a text, or of a question, whose BOS token stands before its passages."""
    before, tokens = [], list(ids)
    if query is not None and isinstance(model, RetroJointForCausalLM):
        before, tokens = split_beginning(ids, retriever.datastore.tokenizer.bos_token_id)
    return Row(tokens, num_neighbors, query=query, before=before)


@torch.inference_mode()
def read_text(
    model: PreTrainedModel,
    retriever: RetroRetriever,
    ids: Sequence[int],
    num_neighbors: int,
    query: list[int] | None = None,
) -> Reading:
    """
    Measures a given text with neighbors and without.

    Args:
        model ([`RetroForCausalLM`] or [`RetroJointForCausalLM`]): The model.
        retriever ([`RetroRetriever`]): Looks up the chunks.
        ids (`Sequence[int]`): Tokens of the text, at least one.
        num_neighbors (`int`): Number of neighbors of each chunk.
        query (`list[int]`, *optional*): Tokens of a question, which are looked up in place of the chunks.

    Returns:
        [`Reading`]
    """
    row = make_row(model, retriever, ids, num_neighbors, query)
    on = DecodingBatch(model, retriever).score(row)
    off = DecodingBatch(model, retriever).score(Row(list(ids), 0))
    reading = Reading(retriever)
    off = off[len(row.before) :]
    for token, bits_on, bits_off in zip(row.tokens, [0.0, *on], [0.0, *off], strict=True):
        reading.add(token, bits_on, bits_off, is_given=True)
    reading.look_up(row.retrieved)
    return reading


class StepCounter:
    """
    Counts the steps in which drafts would write a text. They change no token, so the text itself says how much of each
    draft is confirmed.

    Args:
        row ([`~serving.decoding_batch.Row`]): The text, to which the caller appends each token that was counted.
        chunk_size (`int`): Number of tokens in a chunk.

    Attributes:
        num_tokens (`int`): Number of tokens so far.
        num_steps (`int`): Number of steps that write them, of which the first reads the prompt.
    """

    def __init__(self, row: Row, chunk_size: int):
        self.row, self.chunk_size = row, chunk_size
        self.num_tokens = self.num_steps = 0
        self._length = DraftLength(DRAFT_TOKENS)
        self._draft: list[int] | None = None  # of the step that is not over
        self._num_confirmed = 0

    def count(self, token: int) -> None:
        """Counts the next token of the text."""
        if self._draft is None:
            self._draft = draft_of(self.row, self.chunk_size, self._length.current) if self.num_steps else []
            self._num_confirmed = 0
            self.num_steps += 1
        self.num_tokens += 1
        if self._draft[self._num_confirmed : self._num_confirmed + 1] == [token]:
            self._num_confirmed += 1
            return
        if self._draft:
            self._length.update(len(self._draft), self._num_confirmed)
        self._draft = None


@dataclass
class Comparison:
    """
    The continuations of a prompt with neighbors and without.

    Args:
        on ([`Reading`]): The text with neighbors and the worth of each token.
        steps ([`StepCounter`]): In how many steps drafts write the continuation with neighbors.
        off (`str`): The continuation without neighbors.
        is_finished (`bool`): Whether the continuations are complete.
    """

    on: Reading
    steps: StepCounter
    off: str = ""
    is_finished: bool = False


@torch.inference_mode()
def continue_both_ways(
    model: PreTrainedModel,
    retriever: RetroRetriever,
    ids: Sequence[int],
    num_neighbors: int,
    max_tokens: int,
    sampling: SamplingParameters,
    end_tokens: Collection[int],
    query: list[int] | None = None,
) -> Iterator[Comparison]:
    """
    Continues a prompt with neighbors and without, side by side in one batch. A third row reads the tokens of the first
    row without neighbors. It tells how many bits each of these tokens would have cost without them.

    Args:
        model ([`RetroForCausalLM`] or [`RetroJointForCausalLM`]): The model.
        retriever ([`RetroRetriever`]): Looks up the chunks.
        ids (`Sequence[int]`): Tokens of the prompt, at least one.
        num_neighbors (`int`): Number of neighbors of each chunk.
        max_tokens (`int`): Largest number of tokens to generate.
        sampling ([`SamplingParameters`]): How the tokens are chosen, with the same seed for both.
        end_tokens (`Collection[int]`): Tokens that end a text.
        query (`list[int]`, *optional*): Tokens of a question, which are looked up in place of the prompt's chunks.

    Yields:
        [`Comparison`]: the same object, after each token.
    """
    on, follower, off = make_row(model, retriever, ids, num_neighbors, query), Row(list(ids), 0), Row(list(ids), 0)
    steps = StepCounter(on, model.config.chunk_size)
    comparison = Comparison(read_text(model, retriever, ids, num_neighbors, query), steps)
    yield comparison
    samplers = Sampler(sampling), Sampler(sampling)
    off_text = TextStream(retriever.datastore.tokenizer)
    batch = DecodingBatch(model, retriever, draft_tokens=0)
    logits = batch.add([on, follower, off])
    for number in range(max_tokens):
        logits = logits.cpu()
        logprobs = dict(zip(map(id, batch.rows), zip(logits, logits.log_softmax(-1)), strict=True))
        ended = []
        if id(on) in logprobs:
            chosen = samplers[0].choose(*logprobs[id(on)])
            steps.count(chosen.id)
            if chosen.id in end_tokens:
                ended += [on, follower]
            else:
                bits_off = -float(logprobs[id(follower)][1][chosen.id]) / math.log(2)
                comparison.on.add(chosen.id, -chosen.logprob / math.log(2), bits_off, is_given=False)
                comparison.on.look_up(on.retrieved)
                on.tokens.append(chosen.id)
                follower.tokens.append(chosen.id)
        if id(off) in logprobs:
            chosen = samplers[1].choose(*logprobs[id(off)])
            if chosen.id in end_tokens:
                ended.append(off)
            else:
                comparison.off += off_text.push(chosen)[0]
                off.tokens.append(chosen.id)
        yield comparison
        batch.keep([n for n, row in enumerate(batch.rows) if not any(row is one for one in ended)])
        if not batch.rows or number == max_tokens - 1:
            break
        logits = batch.step()[:, 0]
    comparison.is_finished = True
    yield comparison
