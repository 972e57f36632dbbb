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
Datastores whose chunks and embeddings are in Milvus or in PostgreSQL, where `retro export` wrote them.

```python
from modeling_retro import RetroRetriever

retriever = RetroRetriever.from_pretrained("milvus://localhost:19530/?collection=articles")
retriever = RetroRetriever.from_pretrained("postgresql://reader@localhost/texts?collection=articles&tenant=press")
```
"""

import base64
import json
import re
import tempfile
import time
import zlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .chunk_encoder_retro import ChunkEncoder
from .datastore_manifest_retro import FORMAT_VERSION
from .datastore_retro import ChunkTable, RetroDatastore, faiss


SCHEMES = ("milvus", "postgresql")
COLUMNS = ("document_id", "length", "num_bytes", "input_ids")

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")
_TENANT = re.compile(r"[A-Za-z0-9_.-]{1,100}")
_CACHED_CHUNKS = 1 << 16
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
                raise ValueError(f"{self.address} refused {what}: {_first_line(error)}") from error
            time.sleep(0.2 * 2**number)
        raise ConnectionError(
            f"{what} failed at {self.address} after {_TRIES} tries of at most {self.timeout:g} s: {_first_line(last)} "
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


def open_engine(url: str) -> Engine:
    """Opens the database of a URL (see [`Engine`])."""
    scheme = url.partition("://")[0]
    if scheme == "milvus":
        from .engine_milvus_retro import MilvusEngine

        return MilvusEngine(url)
    if scheme == "postgresql":
        from .engine_postgresql_retro import PostgresqlEngine

        return PostgresqlEngine(url)
    raise ValueError(f"{url!r} is no address of a database, expected {' or '.join(f'{s}://…' for s in SCHEMES)}")


class RemoteIndex:
    """
    The index of a database, searched like a faiss index.

    Args:
        engine ([`Engine`]): The database.
        ntotal (`int`): Number of chunks.
        dim (`int`): Number of dimensions of the embeddings.
        metric (`str`): `"inner_product"` or `"l2"`.
        index (`str`): `"hnsw"` or `"flat"`.
    """

    def __init__(self, engine: Engine, ntotal: int, dim: int, metric: str, index: str):
        self.engine, self.ntotal, self.d = engine, ntotal, dim
        self.metric, self.kind = metric, index
        self.metric_type = faiss.METRIC_INNER_PRODUCT if metric == "inner_product" else faiss.METRIC_L2

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest chunks of queries float32 [n, dim]: scores float32 [n, k] and ids int64 [n, k]."""
        if queries.ndim != 2 or queries.shape[1] != self.d:
            raise ValueError(f"queries have shape {list(queries.shape)}, expected [n, {self.d}]")
        return self.engine.search(queries, k, self.metric, self.kind)


class RemoteChunks(ChunkTable):
    """
    The chunks in a database. Chunks that were read are kept for later, at most 65,536 of them.

    Args:
        engine ([`Engine`]): The database.
        number (`int`): Number of chunks.
        chunk_size (`int`): Number m of tokens in a chunk.
    """

    def __init__(self, engine: Engine, number: int, chunk_size: int):
        self.engine, self.number, self.chunk_size = engine, number, chunk_size
        self._rows: OrderedDict[int, tuple] = OrderedDict()

    def __len__(self) -> int:
        return self.number

    def __repr__(self) -> str:
        return f"RemoteChunks({self.number} chunks of {self.chunk_size} tokens in {self.engine.address})"

    def gather(self, column: str, chunk_ids: np.ndarray) -> np.ndarray:
        flat = np.asarray(chunk_ids, dtype=np.int64).reshape(-1)
        if flat.size and (flat.max() >= len(self) or flat.min() < -1):
            raise ValueError(f"chunk ids must lie in [-1, {len(self) - 1}], got {flat.min()} to {flat.max()}")
        unique, inverse = np.unique(flat, return_inverse=True)
        place, shape = COLUMNS.index(column), (self.chunk_size,) if column == "input_ids" else ()
        values = np.zeros((len(unique), *shape), dtype=np.int64)
        wanted = unique[unique >= 0]
        missing = np.array([i for i in wanted.tolist() if i not in self._rows], dtype=np.int64)
        if len(missing):
            rows = self.engine.fetch(missing)
            absent = [i for i in missing.tolist() if i not in rows]
            if absent:
                raise ValueError(f"{self.engine.address} lacks chunk {absent[0]}; run `retro export --force`")
            self._rows.update(rows)
        for row, chunk in zip(np.flatnonzero(unique >= 0), wanted.tolist(), strict=True):
            values[row] = self._rows[chunk][place]
            self._rows.move_to_end(chunk)
        while len(self._rows) > _CACHED_CHUNKS:
            self._rows.popitem(last=False)
        return values[inverse].reshape((*np.shape(chunk_ids), *shape))

    def shard(self, index: int) -> dict[str, np.ndarray]:
        raise ValueError(f"the chunks in {self.engine.address} can be searched, but not read one after the other")

    def _column(self, name: str) -> np.ndarray:
        return self.gather(name, np.arange(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {"engine": self.engine.url, "number": self.number, "chunk_size": self.chunk_size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state | {"engine": open_engine(state["engine"])})


class RemoteDatastore(RetroDatastore):
    """
    A datastore in a database. It can be searched with `dense` and `rerank`, by [`RetroRetriever`], `generate`, `retro
    generate` and `retro serve`. Training and evaluation need the datastore itself.

    Args:
        url (`str`): Where `retro export` wrote it (see [`Engine`]).

    Raises:
        ValueError: If nothing was exported there, or the export has not finished.
        ConnectionError: If the database does not answer.
    """

    def __init__(self, url: str):
        self.engine = open_engine(url)
        self.state = self.engine.read_state()
        if self.state is None:
            raise ValueError(f"there is no datastore at {self.engine.address}; `retro export` writes one")
        if self.state["format_version"] > FORMAT_VERSION:
            raise ValueError(
                f"{self.engine.address} has format version {self.state['format_version']}, this package reads up to "
                f"{FORMAT_VERSION}; install a newer one"
            )
        if not self.state["complete"]:
            raise ValueError(f"the export to {self.engine.address} has not finished; run `retro export` again")
        self.header = self.engine.read_header(self.state)
        super().__init__(Path(self.engine.address), self.header["manifest"])
        # `Path` would join the two slashes of the address.
        self.path = self.engine.address
        self.num_chunks: int = self.manifest["splits"]["train"]["chunks"]["num_chunks"]

    def reopen(self) -> "RemoteDatastore":
        return RemoteDatastore(self.engine.url)

    def is_current(self) -> bool:
        return self.engine.read_state() == self.state

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.engine.url}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        with tempfile.TemporaryDirectory() as folder:
            for name, text in self.header["tokenizer"].items():
                (Path(folder) / Path(name).name).write_text(text, encoding="utf-8")
            tokenizer = AutoTokenizer.from_pretrained(folder)
        self.check_tokenizer(tokenizer)
        return tokenizer

    @cached_property
    def chunks(self) -> RemoteChunks:
        return RemoteChunks(self.engine, self.num_chunks, self.chunk_size)

    @cached_property
    def index(self) -> RemoteIndex:
        dim, metric = self.manifest["encoder"]["dim"], self.header["metric"]
        return RemoteIndex(self.engine, self.num_chunks, dim, metric, self.state["index"])

    @property
    def bm25(self) -> Any:
        raise ValueError(f"{self.path} has no BM25 index; search it with the retriever dense or rerank")

    @property
    def retriever(self) -> str:
        return "dense"

    def split(self, name: str) -> Any:
        raise ValueError(
            f"{self.path} can be searched, but has no splits to read; open the datastore that was exported for "
            "training and evaluation"
        )

    def is_removed(self, chunk_ids: Any) -> np.ndarray:
        return np.zeros(np.shape(chunk_ids), dtype=bool)

    def encoder_source(self) -> tuple[str, str | None]:
        if self.engine.encoder is not None:
            return self.engine.encoder, None
        return self.manifest["encoder"]["name"], self.manifest["encoder"]["revision"]

    def open_encoder(
        self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
    ) -> ChunkEncoder:
        try:
            return super().open_encoder(device, dtype)
        except OSError as error:
            raise ValueError(
                f"the encoder of {self.path}, {self.encoder_source()[0]}, cannot be loaded here: {_first_line(error)} "
                "Add &encoder=FOLDER to the address, with a folder that holds it."
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


__all__ = ["Engine", "RemoteChunks", "RemoteDatastore", "RemoteIndex", "open_engine"]
