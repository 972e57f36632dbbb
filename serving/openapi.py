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
"""What the server declares of itself at `/openapi.json`: its requests and its answers"""

from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from .schema import ChatRequest, CompletionRequest, EmbeddingRequest


class Answered(BaseModel):
    """An answer without other fields than those that are declared."""

    model_config = ConfigDict(extra="forbid")


class Neighbor(Answered):
    """A neighbor of a chunk. An id that the retriever does not know is -1."""

    text: str
    document_id: int
    chunk_id: int
    score: float | None


class ChunkNeighbors(Answered):
    """The neighbors of one chunk of a prompt and its answer, or the passages of the question, which has no number."""

    chunk: int | None
    neighbors: list[Neighbor]


class Source(Answered):
    """Where a document of the neighbors comes from: what the datastore knows of it."""

    document_id: int
    path: str | None = None
    line: int | None = None
    title: str | None = None
    id: str | None = None
    fields: dict[str, Any] = {}


class Choice(Answered):
    """One of the answers to a prompt."""

    index: int
    finish_reason: Literal["stop", "length"]
    neighbors: list[ChunkNeighbors] = []
    sources: list[Source] = []


class TokenLogprobs(Answered):
    """The tokens of a completion; the first token of an echoed prompt has no probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Choice):
    """A completion."""

    text: str
    logprobs: TokenLogprobs | None


class ChatToken(Answered):
    """A token of an answer in a conversation. Parts of a character have no bytes."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenChatToken(ChatToken):
    """A token that was chosen, with the most probable ones at its place."""

    top_logprobs: list[ChatToken]


class ChatLogprobs(Answered):
    """The tokens of an answer in a conversation."""

    content: list[ChosenChatToken]
    refusal: None


class AnswerMessage(Answered):
    """An answer in a conversation."""

    role: Literal["assistant"]
    content: str


class ChatChoice(Choice):
    """An answer in a conversation."""

    message: AnswerMessage
    logprobs: ChatLogprobs | None


class Usage(Answered):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionAnswer(Answered):
    """The answer of `/v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ChatAnswer(Answered):
    """The answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Embedding(Answered):
    """The embedding of one text: its numbers, or in base64 the bytes of its numbers in float32, little-endian."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Answered):
    """Numbers of tokens of the encoder."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingAnswer(Answered):
    """The answer of `/v1/embeddings`."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Failure(Answered):
    """What went wrong."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class FailureAnswer(Answered):
    """The answer to a request that is refused, or fails."""

    error: Failure


class ModelCard(Answered):
    """The served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Answered):
    """The answer of `/v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(Answered):
    """The answer of `/health`."""

    status: Literal["ok", "stopped"]
    engine_restarts: int


_FAILURES = {
    "4XX": {"model": FailureAnswer, "description": "The request is refused."},
    "5XX": {"model": FailureAnswer, "description": "The server failed."},
}
_ANSWERS = {CompletionRequest: CompletionAnswer, ChatRequest: ChatAnswer, EmbeddingRequest: EmbeddingAnswer}

MODELS = {"responses": {200: {"model": ModelList}, **_FAILURES}}
MODEL = {"responses": {200: {"model": ModelCard}, **_FAILURES}}
HEALTH = {"responses": {200: {"model": Health}, 503: {"model": Health, "description": "The engine has stopped."}}}


def declare(kind: type[BaseModel]) -> dict[str, Any]:
    """The declaration of a path that takes requests of a kind."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    # For a request with `stream: true`; the schema is that of an event, whose data are a piece of the answer in JSON.
    event = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
    stream = {"text/event-stream": {"schema": event}}
    return {
        "responses": {
            200: {"model": _ANSWERS[kind], "content": stream if "stream" in kind.model_fields else {}},
            **_FAILURES,
        },
        "openapi_extra": {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}},
    }


def declare_requests(app: FastAPI) -> None:
    """Adds the schemas of requests, which the application reads by itself, to what it declares."""
    _, schemas = models_json_schema(
        [(kind, "validation") for kind in _ANSWERS], ref_template="#/components/schemas/{model}"
    )
    app.openapi()["components"]["schemas"].update(schemas["$defs"])
