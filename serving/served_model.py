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
"""What a server answers with: checks requests and turns them into the rows of a model"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from pydantic import ValidationError

from modeling_retro import RetroRetriever
from modeling_retro.datastore.documents import DocumentSource
from trainers.prompts import PromptEncoder, split_beginning

from .answers import error_body
from .decoding_batch import RetrievedChunk, Row
from .engine import CompletionEngine
from .schema import ChatRequest, CompletionRequest, EmbeddingRequest


AnyRequest = TypeVar("AnyRequest", CompletionRequest, ChatRequest, EmbeddingRequest)


class RequestError(Exception):
    """A request that cannot be answered, with the error for the client."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.body = error_body(message, "invalid_request_error", param, code)


@dataclass
class PreparedRequest:
    """
    A request that can be answered.

    Args:
        request ([`CompletionRequest`] or [`ChatRequest`]): The request.
        rows (`list[Row]`): A row for each prompt.
        max_tokens (`list[int]`): Largest number of tokens that may follow each prompt.
    """

    request: CompletionRequest | ChatRequest
    rows: list[Row]
    max_tokens: list[int]


@dataclass
class ServedModel:
    """
    The model that a server answers with.

    Args:
        name (`str`): Name of the model in requests.
        engine ([`CompletionEngine`]): Runs the model.
        prompts ([`PromptEncoder`]): Makes the prompts of the model.
        retriever ([`RetroRetriever`]): Looks up the chunks.
        num_neighbors (`int`): Number of neighbors of a chunk, unless a request names another.
        vocab_size (`int`): Size of the vocabulary.
        max_prompt_tokens (`int`): Largest number of tokens in a prompt.
        max_tokens (`int`): Largest number of tokens in a completion.
        context_length (`int`): Largest number of tokens in a prompt and its completion together.
        reads_jointly (`bool`): Whether the model has the passages of a question in sight of the whole prompt.
    """

    name: str
    engine: CompletionEngine
    prompts: PromptEncoder
    retriever: RetroRetriever
    num_neighbors: int
    vocab_size: int
    max_prompt_tokens: int
    max_tokens: int
    context_length: int
    reads_jointly: bool

    def find_sources(self, chunk: RetrievedChunk) -> list[DocumentSource | None]:
        """The sources of the neighbors of a chunk. A version of the datastore that has other chunks does not say."""
        datastore, unknown = self.retriever.datastore, [None] * len(chunk.chunk_ids)
        if max(chunk.chunk_ids, default=-1) >= len(datastore.chunks):
            return unknown
        documents = datastore.chunks.gather("document_id", np.array(chunk.chunk_ids, dtype=np.int64)).tolist()
        is_same = all(
            found == document or chunk_id < 0
            for found, document, chunk_id in zip(documents, chunk.document_ids, chunk.chunk_ids, strict=True)
        )
        return datastore.sources(chunk.chunk_ids) if is_same else unknown

    def read(self, kind: type[AnyRequest], body: bytes) -> AnyRequest:
        """Reads a request of a kind in JSON. Raises a [`RequestError`] if it is none, or names another model."""
        try:
            request = kind.model_validate_json(body)
        except ValidationError as error:
            raise _invalid(error) from error
        if request.model != self.name:
            message = f"the model {request.model[:100]!r} does not exist here; this server has {self.name!r}"
            raise RequestError(404, message, "model", "model_not_found")
        return request

    def prepare(self, kind: type[CompletionRequest] | type[ChatRequest], body: bytes) -> PreparedRequest:
        """
        Reads a request. This may take long, so that it has no place on the event loop.

        Args:
            kind (`type`): The kind of the request.
            body (`bytes`): The request in JSON.

        Raises:
            RequestError: If the request does not follow its schema, names another model, asks for too many completions
                or too many tokens, or if a prompt is empty, too long or has unknown tokens.
        """
        request = self.read(kind, body)
        self._check_numbers(request)
        rows = [self._make_row(request, *parts) for parts in self._encode(request)]
        in_front = self._positions_in_front(rows[0])
        room = min(self.max_prompt_tokens, self.context_length - 1 - in_front)
        longest = max(max(len(row.before) + len(row.tokens), len(row.query or ())) for row in rows)
        if longest > room:
            what = "a prompt or its question" if in_front else "a prompt"
            message = f"{what} has {longest} tokens, more than the {room} that this server takes"
            raise RequestError(400, message, _param(request), "context_length_exceeded")
        lengths = [in_front + len(row.before) + len(row.tokens) for row in rows]
        return PreparedRequest(request, rows, [self._max_new_tokens(request, length) for length in lengths])

    def _check_numbers(self, request: CompletionRequest | ChatRequest) -> None:
        num_prompts = 1 if isinstance(request, ChatRequest) else len(request.prompts)
        if num_prompts * request.n > self.engine.capacity:
            message = (
                f"{num_prompts} prompts with n {request.n} ask for {num_prompts * request.n} completions, more than "
                f"the {self.engine.capacity} that this server takes at once"
            )
            raise RequestError(400, message, "n" if num_prompts == 1 else "prompt", "too_many_completions")
        if request.max_tokens == 0 and not request.echoes:
            raise RequestError(400, "max_tokens is 0, expected at least 1 without echo", "max_tokens")
        unknown = [token for token in request.logit_bias if not 0 <= token < self.vocab_size]
        if unknown:
            message = f"token {unknown[0]} is not of the vocabulary, 0 to {self.vocab_size - 1}"
            raise RequestError(400, message, "logit_bias")

    def _encode(self, request: CompletionRequest | ChatRequest) -> list[tuple[list[int], list[int]]]:
        """The tokens of each prompt before the passages of its question and behind them."""
        try:
            if isinstance(request, ChatRequest):
                messages = [{"role": message.role, "content": message.text} for message in request.messages]
                if self.reads_jointly and self._num_neighbors(request) > 0 and request.question.strip():
                    return [self.prompts.encode_question(messages)]
                return [([], self.prompts.encode_chat(messages))]
            prompts = [([], self._encode_prompt(prompt)) for prompt in request.prompts]
            if not prompts:
                raise ValueError("there is no prompt; give at least one")
            return prompts
        except ValueError as error:
            raise RequestError(400, str(error), _param(request)) from error

    def _encode_prompt(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return self.prompts.encode_text(prompt)
        if not prompt:
            raise ValueError("the prompt is empty; give some tokens to continue")
        unknown = [token for token in prompt if not 0 <= token < self.vocab_size]
        if unknown:
            raise ValueError(f"token {unknown[0]} of the prompt is not of the vocabulary, 0 to {self.vocab_size - 1}")
        return prompt

    def _num_neighbors(self, request: CompletionRequest | ChatRequest) -> int:
        if not request.retrieval:
            return 0
        return self.num_neighbors if request.num_neighbors is None else request.num_neighbors

    def _make_row(self, request: CompletionRequest | ChatRequest, before: list[int], prompt: list[int]) -> Row:
        row = Row(list(prompt), self._num_neighbors(request), before=before, passages=request.passages)
        if request.question is not None and row.num_neighbors > 0:
            row.query = self.prompts.encode_query(request.question)
            # A message such as "Thanks!" may have no known words.
            row.must_find = isinstance(request, CompletionRequest)
            if self.reads_jointly and not before:
                row.before, row.tokens = split_beginning(prompt, self.prompts.tokenizer.bos_token_id)
            if not self.reads_jointly:
                if row.passages == "in_order":
                    raise RequestError(400, "the model of this server reads passages apart only", "passages")
                row.tokens = self.retriever.close_chunks([prompt])["input_ids"][0].tolist()
                row.num_hidden = len(row.tokens) - len(prompt)
        if request.echoes and request.logprobs is not None:
            row.num_scored = request.num_logprobs
        return row

    def _positions_in_front(self, row: Row) -> int:
        """The number of positions that the passages of a question can take in front of the prompt."""
        if row.query is None or not self.reads_jointly:
            return 0
        length = self.retriever.datastore.neighbor_length
        return length if row.passages == "apart" else length * row.num_neighbors

    def _max_new_tokens(self, request: CompletionRequest | ChatRequest, prompt_length: int) -> int:
        room = min(self.max_tokens, self.context_length - prompt_length)
        if request.max_tokens is None or "max_tokens" not in request.model_fields_set:
            return room if request.max_tokens is None else min(request.max_tokens, room)
        if request.max_tokens > room:
            message = f"max_tokens is {request.max_tokens}, more than the {room} that this server gives such a prompt"
            raise RequestError(400, message, "max_tokens", "context_length_exceeded")
        return request.max_tokens


def _param(request: CompletionRequest | ChatRequest) -> str:
    return "messages" if isinstance(request, ChatRequest) else "prompt"


def _invalid(error: ValidationError) -> RequestError:
    """Names the first mistake of a request."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = [str(part) for part in first["loc"]]
    message = f"{'.'.join(place)}: {first['msg']}" if place else f"invalid request: {first['msg']}"
    return RequestError(400, message[:1000], place[0][:100] if place else None)
