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
A sign of life in a terminal. A command that has printed nothing for a second redraws its progress bars, or counts the
seconds in a line that its next output erases: `index: 12 s`.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO


_SECONDS = 1.0
_ERASE = "\r\x1b[K"

_step = "working"
_running: "Heartbeat | None" = None

# A process is not forked while the heartbeat holds the lock of tqdm, which would stay locked in the child.
_beating = threading.Lock()
os.register_at_fork(before=_beating.acquire, after_in_parent=_beating.release, after_in_child=_beating.release)


class Heartbeat:
    """
    Watches what a command writes to its terminal.

    Args:
        terminal (`TextIO`): The stream to which it writes its own line.
    """

    def __init__(self, terminal: TextIO):
        self._terminal = terminal
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._last_output = time.monotonic()
        self._shows_line = False
        self._line_is_free = True

    @contextlib.contextmanager
    def pausing(self, text: str) -> Iterator[None]:
        """Erases the line of the heartbeat before the block writes `text` to the terminal."""
        with self._lock:
            self._erase()
            yield
            if text:
                self._line_is_free = text.endswith(("\n", "\r"))
                self._last_output = time.monotonic()

    def beat(self) -> None:
        """Shows that the command works, if it has been silent."""
        with _beating:
            silence = time.monotonic() - self._last_output
            if silence < _SECONDS or self._ended.is_set():
                return
            bars = _open_bars()
            for bar in bars:
                bar.refresh()
            with self._lock:
                if not bars and self._line_is_free and not self._ended.is_set():
                    self._terminal.write(f"{_ERASE}{_step}: {silence:.0f} s")
                    self._terminal.flush()
                    self._shows_line = True

    def run(self) -> None:
        """Beats once a second until the end."""
        while not self._ended.wait(_SECONDS):
            self.beat()

    def end(self) -> None:
        """Ends the heartbeat and erases its line."""
        self._ended.set()
        with self._lock:
            self._erase()

    def _erase(self) -> None:
        if self._shows_line:
            self._terminal.write(_ERASE)
            self._terminal.flush()
            self._shows_line = False


def _open_bars() -> list[Any]:
    """The bars of tqdm that are on the screen."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if tqdm is None:  # not imported yet
        return []
    with tqdm.get_lock():
        return list(tqdm._instances)


@contextlib.contextmanager
def heartbeat(terminal: TextIO) -> Iterator[Heartbeat | None]:
    """
    Starts a heartbeat for the block, if the stream is a terminal and this process is the first of its run. Yields None
    otherwise.
    """
    global _running
    if not terminal.isatty() or os.environ.get("TERM", "dumb") == "dumb" or os.environ.get("RANK", "0") != "0":
        yield None
        return
    _running = beats = Heartbeat(terminal)
    threading.Thread(target=beats.run, name="heartbeat", daemon=True).start()
    try:
        yield beats
    finally:
        end_heartbeat()


def end_heartbeat() -> None:
    """Ends the heartbeat of this process, which will wait for others, as a server does for requests."""
    global _running
    if _running is not None:
        _running.end()
        _running = None


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Names what the command does inside the block, for the line of the heartbeat."""
    global _step
    before, _step = _step, name
    try:
        yield
    finally:
        _step = before
