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
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from .answers import Answer, error_body
from .embeddings import Embedder
from .engine import Completion, CompletionError, CompletionEvent, QueueFullError, log_failure
from .metrics import Metrics
from .middleware import Guard
from .openapi import HEALTH, MODEL, MODELS, declare, declare_requests
from .schema import ChatRequest, CompletionRequest, EmbeddingRequest
from .served_model import PreparedRequest, RequestError, ServedModel


COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
COUNTED_PATHS = frozenset([COMPLETIONS, CHAT, EMBEDDINGS, "/v1/models", "/health", "/metrics"])


class Run:
    """
    The completions of one request, from their start to their last piece.

    Args:
        served ([`ServedModel`]): The model.
        metrics ([`Metrics`]): Counts the completions.
        prepared ([`PreparedRequest`]): The request.
    """

    def __init__(self, served: ServedModel, metrics: Metrics, prepared: PreparedRequest):
        self.metrics = metrics
        request = prepared.request
        lengths = [len(row.before) + len(row.tokens) - row.num_hidden for row in prepared.rows]
        self.answer = Answer(request, served.prompts.tokenizer, lengths, served.find_sources)
        self._events: asyncio.Queue[tuple[int, CompletionEvent]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._start_time = time.perf_counter()
        self.completions = []
        for row, max_tokens in zip(prepared.rows, prepared.max_tokens, strict=True):
            for number in range(request.n):
                own = replace(row, tokens=list(row.tokens), retrieved=[], scored=[])
                emit = self._emitter(len(self.completions))
                self.completions.append(
                    Completion(own, max_tokens, request.sampling(number), request.stop, emit, request.echoes)
                )
        served.engine.submit(self.completions)
        metrics.prompt_tokens.inc(sum(lengths))

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
                    raise CompletionError(str(event.error), event.error.status)
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
            self.metrics.steps.inc(sum(completion.num_steps for completion in self.completions))
            self.metrics.drafted_tokens.inc(sum(completion.num_drafted for completion in self.completions))
            self.metrics.confirmed_tokens.inc(sum(completion.num_confirmed for completion in self.completions))
            self.metrics.duration.observe(time.perf_counter() - self._start_time)

    async def whole(self) -> Response:
        """The whole answer, when all completions have ended."""
        async for _ in self.events():
            pass
        # Many neighbors take long to decode.
        return await run_in_threadpool(lambda: JSONResponse(self.answer.whole()))

    async def stream(self) -> AsyncIterator[str]:
        """The answer piece by piece, as server-sent events."""
        try:
            async for index, event in self.events():
                decodes_neighbors = event.retrieved and self.answer.request.include_neighbors
                piece = (
                    await run_in_threadpool(self.answer.piece, index, event)
                    if decodes_neighbors
                    else self.answer.piece(index, event)
                )
                if piece is not None:
                    yield _server_sent(piece)
        except Exception as error:  # the status was already sent
            is_told = isinstance(error, CompletionError)
            message = str(error) if is_told else log_failure("the server failed while it answered")
            yield _server_sent(error_body(message, "server_error"))
            return
        if (piece := self.answer.last_piece()) is not None:
            yield _server_sent(piece)
        yield "data: [DONE]\n\n"


def _server_sent(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n"


async def _json_body(request: Request) -> bytes:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":  # a page of any origin may send other types without being asked
        raise RequestError(415, "send the request as JSON, with `Content-Type: application/json`")
    return await request.body()


async def _until_disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def create_app(
    served: ServedModel,
    api_key: str | None = None,
    allowed_hosts: Sequence[str] = (),
    allow_origins: Sequence[str] = (),
) -> FastAPI:
    """
    Makes the server as an ASGI application.

    Args:
        served ([`ServedModel`]):
            The model that answers.
        api_key (`str`, *optional*):
            The key that requests under `/v1` must carry. Without it, no key is needed.
        allowed_hosts (`Sequence[str]`, *optional*):
            Names of this server. Requests to other names are refused, except to `localhost` and to addresses.
        allow_origins (`Sequence[str]`, *optional*):
            Origins whose pages may use this server in a browser, such as `"https://example.org"`; `"*"` for all.

    Returns:
        `FastAPI`
    """
    metrics = Metrics(served.engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(served.engine.close)
        served.prompts.template.close()

    app = FastAPI(title="retro serve", docs_url=None, redoc_url=None, lifespan=lifespan)
    # A token in JSON is rarely longer than 32 bytes.
    max_body_bytes = 65536 + 32 * served.max_prompt_tokens
    app.add_middleware(
        Guard,
        metrics=metrics,
        api_key=api_key,
        allowed_hosts=allowed_hosts,
        max_body_bytes=max_body_bytes,
        paths=COUNTED_PATHS,
    )
    if allow_origins:
        methods = ["GET", "POST"]
        app.add_middleware(CORSMiddleware, allow_origins=allow_origins, allow_methods=methods, allow_headers=["*"])
    _add_error_handlers(app)
    _add_generation(app, served, metrics)
    _add_state(app, served, metrics)
    declare_requests(app)
    return app


def _add_generation(app: FastAPI, served: ServedModel, metrics: Metrics) -> None:
    async def answer(kind: type[CompletionRequest] | type[ChatRequest], request: Request) -> Response:
        body = await _json_body(request)
        run = Run(served, metrics, await run_in_threadpool(served.prepare, kind, body))
        if run.answer.request.stream:
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
        return whole.result()

    @app.post(COMPLETIONS, **declare(CompletionRequest))
    async def completions(request: Request) -> Response:
        return await answer(CompletionRequest, request)

    @app.post(CHAT, **declare(ChatRequest))
    async def chat(request: Request) -> Response:
        return await answer(ChatRequest, request)

    embedder = Embedder(served)

    @app.post(EMBEDDINGS, **declare(EmbeddingRequest))
    async def embeddings(request: Request) -> Response:
        return await embedder.answer(await _json_body(request))


def _add_state(app: FastAPI, served: ServedModel, metrics: Metrics) -> None:
    card = {"id": served.name, "object": "model", "created": int(time.time()), "owned_by": "retro"}
    card["max_model_len"] = served.context_length

    @app.get("/v1/models", **MODELS)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    @app.get("/v1/models/{name:path}", **MODEL)
    async def model(name: str) -> Response:
        if name != served.name:
            message = f"the model {name!r} does not exist here; this server has {served.name!r}"
            raise RequestError(404, message, "model", "model_not_found")
        return JSONResponse(card)

    @app.get("/health", **HEALTH)
    async def health() -> Response:
        is_well = served.engine.is_alive
        state = {"status": "ok" if is_well else "stopped", "engine_restarts": served.engine.num_restarts}
        return JSONResponse(state, 200 if is_well else 503)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics_text() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_error_handlers(app: FastAPI) -> None:
    """Reports all errors in the form of the API of OpenAI."""

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(QueueFullError)
    async def full(request: Request, error: QueueFullError) -> Response:
        return JSONResponse(error_body(str(error), "rate_limit_error", code="queue_full"), 429, {"Retry-After": "1"})

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{error.detail}: {request.method} {request.url.path}"
        return JSONResponse(error_body(message, "invalid_request_error"), error.status_code, error.headers)

    @app.exception_handler(CompletionError)
    async def failed(request: Request, error: CompletionError) -> Response:
        return JSONResponse(error_body(str(error), "server_error"), error.status)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return JSONResponse(error_body(log_failure("the server failed while it answered"), "server_error"), 500)
