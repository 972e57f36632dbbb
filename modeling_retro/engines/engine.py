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
"""The database that an exported datastore is in"""

import base64
import json
import re
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit

import numpy as np

from ..datastore.manifest import FORMAT_VERSION


COLUMNS = ("document_id", "length", "num_bytes", "input_ids")

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")
_TENANT = re.compile(r"[A-Za-z0-9_.-]{1,100}")
_PART = 60_000  # characters; a text of Milvus has at most 65,535 bytes
_TRIES = 3
T = TypeVar("T")


class Engine(ABC):
    """
    A collection in a database that searches vectors. Several datastores can share a collection: each belongs to a
    tenant, and one tenant never sees the chunks of another.

    Args:
        url (`str`):
            `milvus://HOST:PORT/DATABASE`, `milvus:///FOLDER/FILE.db` (Milvus Lite, inside this process) or
            `postgresql://USER:PASSWORD@HOST/DATABASE`. Its query may hold `collection` (defaults to `"retro"`),
            `tenant` (`"default"`), `timeout` in seconds (30), and `encoder`, the folder of the encoder if it is not on
            the Hub. Any other parameters are those of the client.

    Raises:
        ValueError: If the URL cannot be understood.
        ConnectionError: If the database does not answer, or refuses the user.
    """

    def __init__(self, url: str):
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query))
        self.url = url
        self.collection = options.pop("collection", "retro")
        self.tenant = options.pop("tenant", "default")
        self.encoder = options.pop("encoder", None)
        timeout = options.pop("timeout", "30")
        for name, value, pattern in (("collection", self.collection, _NAME), ("tenant", self.tenant, _TENANT)):
            if not pattern.fullmatch(value):
                raise ValueError(f"{name} is {value!r}, expected letters, digits and '_' ({pattern.pattern})")
        if not re.fullmatch(r"\d+(\.\d+)?", timeout) or float(timeout) == 0:
            raise ValueError(f"timeout is {timeout!r}, expected a number of seconds above 0")
        self.timeout = float(timeout)
        self.parts, self.options = parts, options
        host = parts.netloc.rpartition("@")[2]
        names = urlencode({"collection": self.collection, "tenant": self.tenant})
        self.address = f"{parts.scheme}://{host}{parts.path}?{names}"  # without user and password

    def attempt(self, what: str, function: Callable[[], T]) -> T:
        """
        Runs a request. If the connection fails, it tries twice again after a pause.

        Raises:
            ConnectionError: If all tries failed. It names the address and the last error.
            ValueError: If the database understood the request and refused it.
        """
        for number in range(_TRIES):
            try:
                return function()
            except self.connection_errors as error:
                self.disconnect()
                last = error
            except self.request_errors as error:
                raise ValueError(f"{self.address} refused {what}: {first_line(error)}") from error
            time.sleep(0.2 * 2**number)
        raise ConnectionError(
            f"{what} failed at {self.address} after {_TRIES} tries of at most {self.timeout:g} s: {first_line(last)} "
            "(check that the database runs there, and its user and password)"
        ) from last

    connection_errors: tuple[type[Exception], ...] = ()
    request_errors: tuple[type[Exception], ...] = ()

    @abstractmethod
    def disconnect(self) -> None:
        """Closes the connection. The next request opens another one."""

    @abstractmethod
    def create(self, dim: int, metric: str, index: str) -> None:
        """Makes the collection, unless it exists. `index` is `"hnsw"` or `"flat"`."""

    @abstractmethod
    def count(self) -> int:
        """The number of chunks that are stored for the tenant."""

    @abstractmethod
    def insert(self, first_chunk: int, columns: Mapping[str, np.ndarray]) -> None:
        """Stores consecutive chunks, with the columns of a [`ChunkTable`] and `embedding` float32 [n, dim]."""

    @abstractmethod
    def finish(self, metric: str, index: str) -> None:
        """Builds the index after the last chunk."""

    @abstractmethod
    def delete(self) -> None:
        """Deletes the chunks and the header of the tenant."""

    @abstractmethod
    def read_texts(self, parts: list[int]) -> dict[int, str]:
        """Reads parts of the header of the tenant. Absent ones are left out."""

    @abstractmethod
    def write_texts(self, texts: Mapping[int, str]) -> None:
        """Writes parts of the header of the tenant."""

    @abstractmethod
    def fetch(self, chunk_ids: np.ndarray) -> dict[int, tuple]:
        """The chunks with these ids: `document_id`, `length`, `num_bytes` and the token ids of each."""

    @abstractmethod
    def search(self, queries: np.ndarray, k: int, metric: str, index: str) -> tuple[np.ndarray, np.ndarray]:
        """
        The chunks of the tenant that are nearest to queries float32 [n, dim]: scores float32 and ids int64, both
        [n, k], 0 and -1 where there are fewer. Scores are inner products or squared distances, as in faiss.
        """

    def read_state(self) -> dict[str, Any] | None:
        """What was exported and whether it is complete, or None if nothing was."""
        found = self.read_texts([0])
        return json.loads(found[0]) if found else None

    def write_header(self, header: Mapping[str, Any], fingerprint: str, index: str) -> None:
        """Writes the header of an export that begins."""
        packed = base64.b64encode(zlib.compress(json.dumps(header).encode())).decode()
        texts = {1 + i: packed[start : start + _PART] for i, start in enumerate(range(0, len(packed), _PART))}
        self.write_texts(texts)
        state = {"complete": False, "parts": len(texts), "fingerprint": fingerprint, "index": index}
        self.write_texts({0: json.dumps({"format_version": FORMAT_VERSION, **state})})

    def mark_complete(self) -> None:
        """Marks an export as complete, which is its last step."""
        self.write_texts({0: json.dumps(self.read_state() | {"complete": True})})

    def read_header(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Reads the header: `manifest`, and `tokenizer`, the texts of its files."""
        numbers = list(range(1, 1 + state["parts"]))
        texts = self.read_texts(numbers)
        if sorted(texts) != numbers:
            raise ValueError(f"the header at {self.address} is incomplete; run `retro export --force`")
        return json.loads(zlib.decompress(base64.b64decode("".join(texts[i] for i in numbers))))


def first_line(error: Exception) -> str:
    """The first line of the message of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


__all__ = ["Engine"]
