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
"""Checks that come before every request: its host, the key, the length of the body; and the counting of requests"""

import ipaddress
import secrets
from collections.abc import Sequence
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answers import error_body
from .metrics import Metrics


class Guard:
    """
    Refuses requests to another host, requests under `/v1` without the key, and requests with too long a body, before
    reading them. A page whose name was made to point at this server sends its own name as the host. Addresses are
    therefore hosts of this server, and names only if they are given.

    Args:
        app (`ASGIApp`): The application that receives the accepted requests.
        metrics ([`Metrics`]): Counts the requests.
        api_key (`str`, *optional*): The key. Without it, no key is needed.
        allowed_hosts (`Sequence[str]`): Names of this server besides `localhost`.
        max_body_bytes (`int`): Largest size of a body.
        paths (`frozenset[str]`): Paths that are counted by their name.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        api_key: str | None,
        allowed_hosts: Sequence[str],
        max_body_bytes: int,
        paths: frozenset[str],
    ):
        self.app = app
        self.metrics = metrics
        self.api_key = api_key
        self.hosts = frozenset(["localhost", *(host.lower() for host in allowed_hosts)])
        self.max_body_bytes = max_body_bytes
        self.paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.paths else "other"

        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            await refusal(scope, receive, counting_send)
            return
        received = 0

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body_bytes:
                raise HTTPException(413, self._too_large())
            return message

        await self.app(scope, limited_receive, counting_send)

    def _refusal(self, path: str, headers: dict[str, str]) -> JSONResponse | None:
        if not self._is_own(headers.get("host", "localhost")):
            message = "the request names another host than this server; --allowed_hosts tells it more of its names"
            return JSONResponse(error_body(message, "invalid_request_error", code="wrong_host"), 421)
        if self.api_key is not None and path.startswith("/v1"):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            is_key = secrets.compare_digest(key.strip().encode("latin-1"), self.api_key.encode())
            if scheme.lower() != "bearer" or not is_key:
                message = "the API key is missing or wrong; send it as `Authorization: Bearer KEY`"
                body = error_body(message, "invalid_request_error", code="invalid_api_key")
                return JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.max_body_bytes:
            return JSONResponse(error_body(self._too_large(), "invalid_request_error", code="request_too_large"), 413)
        return None

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        try:
            return name in self.hosts or bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    def _too_large(self) -> str:
        return f"the body of the request is longer than {self.max_body_bytes} bytes"
