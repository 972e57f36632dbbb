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
"""Continues a prompt with a RETRO model and reports the neighbors of each chunk"""

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_prep.chunker import text_beginning
from modeling_retro import RetroJointForCausalLM
from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.datastore.documents import DocumentSource
from modeling_retro.retriever.retriever import RetrievedNeighbors, RetroRetriever


QUESTION = re.compile(r"\s*(?:(?:question|q|user):\s*)?(\S.*\?)", re.IGNORECASE | re.DOTALL)


@dataclass
class GeneratedChunk:
    """
    One chunk of a generated text and its neighbors.

    Args:
        text (`str`):
            Text of the chunk.
        neighbors (`list[str]`):
            Texts of the neighbors of the chunk with their continuations, best first. The tokens after the chunk see
            them.
        scores (`list[float]`):
            Scores of the neighbors.
        sources (`list[DocumentSource | None]`):
            Where the neighbors come from, `None` where the datastore does not say.
    """

    text: str
    neighbors: list[str]
    scores: list[float]
    sources: list[DocumentSource | None] = field(default_factory=list)


class GeneratedChunks(list[GeneratedChunk]):
    """
    The chunks of a generated text.

    Args:
        chunks (`Iterable[GeneratedChunk]`):
            The chunks, prompt and continuation.
        num_new_tokens (`int`):
            Number of tokens that were generated.
        num_steps (`int`):
            Number of forward passes that generated them, the one over the prompt included.
    """

    def __init__(self, chunks: Iterable[GeneratedChunk], num_new_tokens: int, num_steps: int):
        super().__init__(chunks)
        self.num_new_tokens, self.num_steps = num_new_tokens, num_steps


def short_question(prompt: str, tokenizer: PreTrainedTokenizerBase, chunk_size: int) -> str | None:
    """
    What a prompt asks, if it has a question mark and is too short for one of its chunks to be looked up. Words such as
    "Question:" in front, and what follows the last question mark, are no part of it: they would be looked up too.
    """
    asked = QUESTION.match(prompt)
    is_short = len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) < chunk_size
    return asked[1] if asked is not None and is_short else None


def look_up(retriever: RetroRetriever, query: str, num_neighbors: int) -> RetrievedNeighbors:
    """
    Looks up a question by its own text.

    Args:
        retriever ([`RetroRetriever`]):
            The retriever.
        query (`str`):
            Text to look up, of any length.
        num_neighbors (`int`):
            Number of passages to find.

    Returns:
        [`RetrievedNeighbors`]: the passages of one question.

    Raises:
        ValueError: If the text is empty, or if the datastore knows none of its words.
    """
    input_ids = _encode(retriever.datastore.tokenizer, query)
    return retriever.retrieve(input_ids, num_neighbors, attention_mask=torch.ones_like(input_ids))


def question_inputs(
    model: PreTrainedModel,
    retriever: RetroRetriever,
    input_ids: torch.LongTensor,
    found: RetrievedNeighbors,
    passages: str | None = None,
    before: Sequence[int] = (),
) -> dict[str, Any]:
    """
    The arguments of `generate()` for a question that has been looked up. In [`RetroJointForCausalLM`] the passages are
    in sight of the whole question and of its answer. In [`RetroForCausalLM`] they are the neighbors of a chunk that
    ends with the question (see [`RetroRetriever.close_chunks`]).

    Args:
        model ([`RetroForCausalLM`] or [`RetroJointForCausalLM`]):
            The model.
        retriever ([`RetroRetriever`]):
            The retriever.
        input_ids (`torch.LongTensor` of shape `(1, T)`):
            The prompt.
        found ([`RetrievedNeighbors`]):
            The passages of the question.
        passages (`str`, *optional*):
            How [`RetroJointForCausalLM`] reads passages: `"apart"`, or `"in_order"`, as one text. Defaults to the
            model's way.
        before (`Sequence[int]`, *optional*):
            Tokens of the prompt that stand before the passages, in front of `input_ids`.

    Returns:
        `dict`: arguments for `generate()`.

    Raises:
        ValueError: If a model with cross attention is to read passages in order.
    """
    if isinstance(model, RetroJointForCausalLM):
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "passage_input_ids": found.neighbor_input_ids,
            "passage_attention_mask": found.neighbor_attention_mask,
            "passages": passages or model.default_passages,
        }
        return inputs | ({"passage_prefix_input_ids": torch.tensor([list(before)])} if before else {})
    if passages == "in_order":
        raise ValueError(
            f"passages is {passages!r}, but a {type(model).__name__} encodes each neighbor by itself; passages in "
            "order are for joint reading"
        )
    inputs = retriever.close_chunks([[*before, *input_ids[0].tolist()]])
    num_chunks = inputs["input_ids"].shape[1] // retriever.datastore.chunk_size
    shape = (1, num_chunks, *found.neighbor_input_ids.shape[1:])  # [1, L, k, r]
    neighbors, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    neighbors[:, -1], mask[:, -1] = found.neighbor_input_ids, found.neighbor_attention_mask
    return {**inputs, "neighbor_input_ids": neighbors, "neighbor_attention_mask": mask}


@torch.inference_mode()
def generate_with_neighbors(
    model: PreTrainedModel,
    retriever: RetroRetriever,
    prompt: str | Sequence[int],
    found: RetrievedNeighbors | None = None,
    passages: str | None = None,
    before: Sequence[int] = (),
    allow_control_tokens: bool = False,
    **generate_kwargs,
) -> GeneratedChunks:
    """
    Continues a prompt with retrieval.

    Args:
        model ([`RetroForCausalLM`] or [`RetroJointForCausalLM`]):
            The model.
        retriever ([`RetroRetriever`]):
            The retriever that looks up the neighbors.
        prompt (`str` or `Sequence[int]`):
            Text to continue, or its tokens. It must not be empty.
        found ([`RetrievedNeighbors`], *optional*):
            The passages of a question, as [`look_up`] finds them. The chunks of the prompt are then not looked up, but
            those of the answer are.
        passages (`str`, *optional*):
            How the passages of a question are read (see [`question_inputs`]).
        before (`Sequence[int]`, *optional*):
            Tokens of the prompt that stand before the passages of a question, in front of `prompt`.
        allow_control_tokens (`bool`, *optional*, defaults to `False`):
            Whether text of the prompt that spells a special token, such as `<|im_start|>`, becomes that token.
        generate_kwargs:
            Passed to [`~RetroGenerationMixin.generate`].

    Returns:
        [`GeneratedChunks`]: prompt and continuation, chunk by chunk. An incomplete last chunk has no neighbors.

    Raises:
        ValueError: If the prompt is empty, or if the prompt of a question is too long for the model.
    """
    datastore, tokenizer = retriever.datastore, retriever.datastore.tokenizer
    if isinstance(prompt, str):
        input_ids = _encode(tokenizer, prompt, allow_control_tokens)
        if input_ids.shape[1] == 0:
            raise ValueError("the prompt is empty; give some text to continue")
        beginning = torch.tensor([text_beginning(tokenizer)], dtype=torch.long)
        input_ids = torch.cat([beginning, input_ids], dim=1)
    else:
        input_ids = torch.tensor([prompt])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if found is not None:
        inputs = question_inputs(model, retriever, input_ids, found, passages, before)
        _check_room(model, inputs, generate_kwargs.get("max_new_tokens") or 1)
    model.eval()  # nothing is retrieved in training mode
    model.set_retriever(retriever)
    output = model.generate(
        **{name: value.to(model.device) if torch.is_tensor(value) else value for name, value in inputs.items()},
        return_dict_in_generate=True,
        **generate_kwargs,
    )
    tokens = output.sequences[0].cpu()
    texts = [tokenizer.decode(chunk, skip_special_tokens=True) for chunk in tokens.split(datastore.chunk_size)]
    if "passage_prefix_input_ids" in inputs:
        texts[0] = tokenizer.decode(list(before), skip_special_tokens=True) + texts[0]
    chunks = [GeneratedChunk(text, [], []) for text in texts]
    for chunk, ids, scores in zip(
        chunks, output.get("retrieved_chunk_ids", [[]])[0], output.get("retrieved_scores", [[]])[0], strict=False
    ):
        is_found = ids >= 0
        neighbors, masks = datastore.take_neighbors(ids[is_found].numpy())
        chunk.neighbors = passage_texts(tokenizer, neighbors, masks)
        chunk.scores = scores[is_found].tolist()
        chunk.sources = datastore.sources(ids[is_found].numpy())
    num_new_tokens = len(tokens) - inputs["input_ids"].shape[1]
    return GeneratedChunks(chunks, num_new_tokens, output.get("num_steps", num_new_tokens))


def passage_texts(tokenizer: PreTrainedTokenizerBase, input_ids: Iterable, masks: Iterable) -> list[str]:
    """The texts of neighbors [n, r], without padding and special tokens."""
    return [tokenizer.decode(row[mask], skip_special_tokens=True) for row, mask in zip(input_ids, masks, strict=True)]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, allow_control_tokens: bool = False) -> torch.LongTensor:
    """The tokens [1, T] of a text. T may be 0."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=not allow_control_tokens)["input_ids"]
    return torch.tensor([ids], dtype=torch.long)


def _check_room(model: PreTrainedModel, inputs: dict[str, Any], max_new_tokens: int) -> None:
    """Raises a `ValueError` unless the passages, the prompt of a question and one answer fit into the model."""
    room = model.config.get_text_config().max_position_embeddings
    length = inputs["input_ids"].shape[1]
    in_front = 0
    if inputs.get("passages") == "in_order":
        in_front = int(inputs["passage_attention_mask"].sum())
    elif "passages" in inputs:
        in_front = inputs["passage_input_ids"].shape[-1]
    if "passage_prefix_input_ids" in inputs:
        in_front += inputs["passage_prefix_input_ids"].shape[1]
    if in_front + length + max_new_tokens > room:
        raise ValueError(
            f"the prompt of the question has {length} tokens, its passages take {in_front} positions and the answer "
            f"{max_new_tokens}, but the model has room for {room}; ask less, or for fewer passages or new tokens"
        )


def format_chunks(chunks: Sequence[GeneratedChunk], width: int = 100) -> str:
    """Formats the chunks for reading, with their neighbors indented below."""
    lines = []
    for number, chunk in enumerate(chunks):
        lines += [f"chunk {number}: {_shorten(chunk.text, 4 * width)}", *_format_neighbors("neighbor", chunk, width)]
    return "\n".join(lines)


def format_passages(datastore: RetroDatastore, found: RetrievedNeighbors, width: int = 100) -> str:
    """Formats the passages of a question for reading, with their sources."""
    is_found = found.chunk_ids[0] >= 0
    ids, masks = found.neighbor_input_ids[0, is_found].cpu(), found.neighbor_attention_mask[0, is_found].cpu()
    sources = datastore.sources(found.chunk_ids[0, is_found].tolist())
    texts = passage_texts(datastore.tokenizer, ids, masks)
    passages = GeneratedChunk("", texts, found.scores[0, is_found].tolist(), sources)
    return "\n".join(_format_neighbors("passage", passages, width))


def _format_neighbors(name: str, chunk: GeneratedChunk, width: int) -> list[str]:
    lines = []
    sources = chunk.sources or [None] * len(chunk.neighbors)
    for rank, (neighbor, score, source) in enumerate(
        zip(chunk.neighbors, chunk.scores, sources, strict=True), start=1
    ):
        place = "" if source is None else f" of {_shorten(str(source), width)}"
        lines.append(f"    {name} {rank}{place} ({score:.2f}): {_shorten(neighbor, 2 * width)}")
    return lines


def _shorten(text: str, width: int) -> str:
    return textwrap.shorten(text, width, placeholder=" …")
