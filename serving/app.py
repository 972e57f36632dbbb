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
"""The HTTP interface of the server: the API of OpenAI, health and metrics"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from modeling_retro.retriever.retriever import RetroRetriever

from .answers import Answer, error_body
from .decoding_batch import Row
from .engine import Completion, CompletionEvent, Engine, QueueFullError
from .metrics import Metrics
from .middleware import Guard
from .prompts import PromptEncoder
from .schema import ChatRequest, CompletionRequest


COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
COUNTED_PATHS = frozenset([COMPLETIONS, CHAT, "/v1/models", "/health", "/metrics"])


class RequestError(Exception):
    """A request that cannot be answered, with the error for the client."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.body = error_body(message, "invalid_request_error", param, code)


class CompletionError(Exception):
    """A completion that failed inside the server."""


@dataclass
class ServedModel:
    """
    The model that a server answers with.

    Args:
        name (`str`): Name of the model in requests.
        engine ([`Engine`]): Runs the model.
        prompts ([`PromptEncoder`]): Makes the prompts of the model.
        retriever ([`RetroRetriever`]): Looks up the chunks.
        num_neighbors (`int`): Number of neighbors of a chunk, unless a request names another.
        vocab_size (`int`): Size of the vocabulary.
        max_prompt_tokens (`int`): Largest number of tokens in a prompt.
        max_tokens (`int`): Largest number of tokens in a completion.
        context_length (`int`): Largest number of tokens in a prompt and its completion together.
    """

    name: str
    engine: Engine
    prompts: PromptEncoder
    retriever: RetroRetriever
    num_neighbors: int
    vocab_size: int
    max_prompt_tokens: int
    max_tokens: int
    context_length: int

    def encode(self, request: CompletionRequest | ChatRequest) -> list[list[int]]:
        """
        Tokenizes the prompts of a request.

        Raises:
            RequestError: If the request names another model, or if a prompt is empty, too long or has unknown tokens.
        """
        if request.model != self.name:
            message = f"the model {request.model!r} does not exist here; this server has {self.name!r}"
            raise RequestError(404, message, "model", "model_not_found")
        unknown = [token for token in request.logit_bias if not 0 <= token < self.vocab_size]
        if unknown:
            raise RequestError(
                400, f"token {unknown[0]} is not of the vocabulary, 0 to {self.vocab_size - 1}", "logit_bias"
            )
        param = "messages" if isinstance(request, ChatRequest) else "prompt"
        try:
            if isinstance(request, ChatRequest):
                messages = [{"role": message.role, "content": message.text} for message in request.messages]
                prompts = [self.prompts.encode_chat(messages)]
            else:
                prompts = [self._completion_prompt(prompt) for prompt in request.prompts]
            if not prompts:
                raise ValueError("there is no prompt; give at least one")
        except ValueError as error:
            raise RequestError(400, str(error), param) from error
        longest = max(len(self.make_row(request, prompt).tokens) for prompt in prompts)
        room = min(self.max_prompt_tokens, self.context_length - 1)
        if longest > room:
            message = f"a prompt has {longest} tokens, more than the {room} that this server takes"
            raise RequestError(400, message, param, "context_length_exceeded")
        return prompts

    def _completion_prompt(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return self.prompts.encode_text(prompt)
        if not prompt:
            raise ValueError("the prompt is empty; give some tokens to continue")
        unknown = [token for token in prompt if not 0 <= token < self.vocab_size]
        if unknown:
            raise ValueError(f"token {unknown[0]} of the prompt is not of the vocabulary, 0 to {self.vocab_size - 1}")
        return prompt

    def make_row(self, request: CompletionRequest | ChatRequest, prompt: list[int]) -> Row:
        """The row of a prompt, with its neighbors looked up as the request wants it."""
        num_neighbors = self.num_neighbors if request.num_neighbors is None else request.num_neighbors
        row = Row(list(prompt), num_neighbors if request.retrieval else 0)
        if request.pad_to_chunks:
            row.tokens = self.retriever.close_chunks([prompt])["input_ids"][0].tolist()
            row.num_hidden = len(row.tokens) - len(prompt)
        return row

    def max_new_tokens(self, request: CompletionRequest | ChatRequest, prompt_length: int) -> int:
        """
        Returns the largest number of tokens that may follow a prompt.

        Raises:
            RequestError: If the request asks for more.
        """
        room = min(self.max_tokens, self.context_length - prompt_length)
        if request.max_tokens is None or "max_tokens" not in request.model_fields_set:
            return min(request.max_tokens or room, room)
        if request.max_tokens > room:
            message = f"max_tokens is {request.max_tokens}, more than the {room} that this server gives such a prompt"
            raise RequestError(400, message, "max_tokens", "context_length_exceeded")
        return request.max_tokens


class Run:
    """
    The completions of one request, from their start to their last piece.

    Args:
        served ([`ServedModel`]): The model.
        metrics ([`Metrics`]): Counts the completions.
        request ([`CompletionRequest`] or [`ChatRequest`]): The request.
        prompts (`list[list[int]]`): Tokens of the prompts of the request.
    """

    def __init__(
        self, served: ServedModel, metrics: Metrics, request: CompletionRequest | ChatRequest, prompts: list[list[int]]
    ):
        self.metrics = metrics
        self.answer = Answer(request, served.prompts.tokenizer, [len(prompt) for prompt in prompts])
        self._events: asyncio.Queue[tuple[int, CompletionEvent]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._start_time = time.perf_counter()
        self.completions = []
        for index, prompt in enumerate(prompts):
            for number in range(request.n):
                row = served.make_row(request, prompt)
                max_tokens = served.max_new_tokens(request, len(row.tokens))
                emit = self._emitter(index * request.n + number)
                self.completions.append(Completion(row, max_tokens, request.sampling(number), request.stop, emit))
        served.engine.submit(self.completions)
        metrics.prompt_tokens.inc(sum(map(len, prompts)))

    def _emitter(self, index: int):
        def emit(event: CompletionEvent) -> None:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return emit

    async def events(self) -> AsyncIterator[tuple[int, CompletionEvent]]:
        """Yields the pieces of all completions as they come. When the consumer stops, their rows are freed."""
        left, is_first = len(self.completions), True
        try:
            while left > 0:
                index, event = await self._events.get()
                if is_first:
                    self.metrics.first_token.observe(time.perf_counter() - self._start_time)
                    is_first = False
                if event.error is not None:
                    raise CompletionError(f"{type(event.error).__name__}: {event.error}") from event.error
                self.metrics.retrieved_chunks.inc(len(event.retrieved))
                left -= event.finish_reason is not None
                self.answer.add(index, event)
                yield index, event
        finally:
            if left > 0:
                self.metrics.cancelled.inc()
            for completion in self.completions:
                completion.cancel()
            self.metrics.generated_tokens.inc(sum(completion.num_tokens for completion in self.completions))
            self.metrics.duration.observe(time.perf_counter() - self._start_time)

    async def whole(self) -> dict[str, Any]:
        """The whole answer, when all completions have ended."""
        async for _ in self.events():
            pass
        return self.answer.whole()

    async def stream(self) -> AsyncIterator[str]:
        """The answer piece by piece, as server-sent events."""
        try:
            async for index, event in self.events():
                if (piece := self.answer.piece(index, event)) is not None:
                    yield _server_sent(piece)
        except CompletionError as error:  # the status was already sent
            yield _server_sent(error_body(str(error), "server_error"))
            return
        if (piece := self.answer.last_piece()) is not None:
            yield _server_sent(piece)
        yield "data: [DONE]\n\n"


def _server_sent(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _until_disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def create_app(served: ServedModel, api_key: str | None = None) -> FastAPI:
    """
    Makes the server as an ASGI application.

    Args:
        served ([`ServedModel`]):
            The model that answers.
        api_key (`str`, *optional*):
            The key that requests under `/v1` must carry. Without it, no key is needed.

    Returns:
        `FastAPI`
    """
    metrics = Metrics(served.engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(served.engine.close)

    app = FastAPI(title="retro serve", docs_url=None, redoc_url=None, lifespan=lifespan)
    # A token in JSON is rarely longer than 32 bytes.
    max_body_bytes = 65536 + 32 * served.max_prompt_tokens
    app.add_middleware(Guard, metrics=metrics, api_key=api_key, max_body_bytes=max_body_bytes, paths=COUNTED_PATHS)
    _add_error_handlers(app)

    async def answer(body: CompletionRequest | ChatRequest, request: Request) -> Response:
        prompts = await run_in_threadpool(served.encode, body)
        run = Run(served, metrics, body, prompts)
        if body.stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(run.stream(), media_type="text/event-stream", headers=headers)
        whole = asyncio.ensure_future(run.whole())
        gone = asyncio.ensure_future(_until_disconnected(request))
        await asyncio.wait((whole, gone), return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not whole.done():
            whole.cancel()
            with suppress(asyncio.CancelledError):
                await whole
            return Response(status_code=499)  # the client has left
        return JSONResponse(whole.result())

    @app.post(COMPLETIONS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await answer(body, request)

    @app.post(CHAT)
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await answer(body, request)

    card = {"id": served.name, "object": "model", "created": int(time.time()), "owned_by": "retro"}
    card["max_model_len"] = served.context_length

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != served.name:
            message = f"the model {name!r} does not exist here; this server has {served.name!r}"
            raise RequestError(404, message, "model", "model_not_found")
        return card

    @app.get("/health")
    async def health() -> Response:
        is_well = served.engine.is_alive
        return JSONResponse({"status": "ok" if is_well else "stopped"}, 200 if is_well else 503)

    @app.get("/metrics")
    async def metrics_text() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def _add_error_handlers(app: FastAPI) -> None:
    """Reports all errors in the form of the API of OpenAI."""

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(QueueFullError)
    async def full(request: Request, error: QueueFullError) -> Response:
        return JSONResponse(error_body(str(error), "rate_limit_error", code="queue_full"), 429, {"Retry-After": "1"})

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        # A prompt may have several forms, and the errors for each form are listed. The first one is enough.
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        is_json = first["type"] != "json_invalid"
        message = f"{'.'.join(place)}: {first['msg']}" if is_json and place else f"invalid request: {first['msg']}"
        param = place[0] if is_json and place else None
        return JSONResponse(error_body(message, "invalid_request_error", param), 400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{error.detail}: {request.method} {request.url.path}"
        return JSONResponse(error_body(message, "invalid_request_error"), error.status_code, error.headers)

    @app.exception_handler(CompletionError)
    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return JSONResponse(error_body(str(error), "server_error"), 500)
