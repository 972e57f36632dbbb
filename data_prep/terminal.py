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
What commands print. Documents, the names of files and the answers of models come from strangers, and a terminal takes
some of their characters for commands.
"""

import contextlib
import re
import sys
from collections.abc import Iterable, Iterator
from typing import TextIO

from data_prep.heartbeat import Heartbeat, heartbeat


# Line breaks and tabs stay. Marks of writing direction reorder what stands beside them.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# What tqdm writes to reach the lines of other bars.
_TO_OTHER_BARS = re.compile(r"(\x1b\[A)+")


def printable(text: str) -> str:
    """Writes control characters of a text out, such as the escape that begins a command to a terminal as `\\x1b`."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


class _Printable:
    """
    A stream that writes [`printable`] text. `shows_bars` says that bars of tqdm may move in it, and `beats` is the
    heartbeat of the terminal, if it is one.
    """

    def __init__(self, stream: TextIO, shows_bars: bool, beats: Heartbeat | None):
        self._stream = stream
        self._shows_bars = shows_bars
        self._beats = beats if stream.isatty() else None

    def write(self, text: str) -> int:
        with contextlib.nullcontext() if self._beats is None else self._beats.pausing(text):
            return self._write(text)

    def _write(self, text: str) -> int:
        if self._shows_bars and _TO_OTHER_BARS.fullmatch(text):
            self._stream.write(text)
        elif self._shows_bars and text.startswith("\r"):  # a bar begins its line again
            self._stream.write("\r" + printable(text[1:]))
        else:
            self._stream.write(printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


@contextlib.contextmanager
def printable_output() -> Iterator[None]:
    """
    Makes all text [`printable`] that is printed inside the block: results, errors, warnings, logs of all libraries and
    the descriptions of progress bars. A terminal gets a [`heartbeat`].
    """
    with (
        heartbeat(sys.stderr) as beats,
        contextlib.redirect_stdout(_Printable(sys.stdout, False, beats)),
        contextlib.redirect_stderr(_Printable(sys.stderr, True, beats)),
    ):
        yield
