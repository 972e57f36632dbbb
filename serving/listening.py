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
"""Listens for requests until a signal comes or the engine stops"""

import asyncio
import socket

import uvicorn
from fastapi import FastAPI

from .engine import CompletionEngine


# Seconds in which answers that were cut reach their clients.
_LAST_SECONDS = 5


def bind(host: str, port: int) -> socket.socket:
    """
    Takes a port, before a model is loaded for long.

    Raises:
        ValueError: If the address is not of this machine, or the port is taken.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ValueError(f"cannot listen on {host}, port {port}: {error}; choose another --host or --port") from error
    return listener


class Server(uvicorn.Server):
    """
    A server that tells its address when it listens. When it is told to end, running answers may take some seconds
    more. Those that are not finished then end with an error. If its engine stops, it ends too.

    Args:
        app (`FastAPI`): The application.
        engine ([`CompletionEngine`]): The engine of the application.
        name (`str`): Name of the model.
        grace_period (`float`): Seconds for running answers.

    Attributes:
        has_failed (`bool`): Whether it ended because its engine stopped.
    """

    def __init__(self, app: FastAPI, engine: CompletionEngine, name: str, grace_period: float):
        last = grace_period + _LAST_SECONDS
        super().__init__(uvicorn.Config(app, log_level="warning", use_colors=False, timeout_graceful_shutdown=last))
        self.engine = engine
        self.name = name
        self.grace_period = grace_period
        self.has_failed = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = sockets[0].getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        print(f"serving {self.name!r} on http://{host}:{port}/v1; Ctrl-C ends it", flush=True)

    async def on_tick(self, counter: int) -> bool:
        self.has_failed = not self.engine.is_alive
        return await super().on_tick(counter) or self.has_failed

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        cut = asyncio.get_running_loop().call_later(self.grace_period, self.engine.stop)
        await super().shutdown(sockets)
        cut.cancel()
