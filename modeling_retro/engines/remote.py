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

import tempfile
from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..datastore.checksums import load_tokenizer
from ..datastore.chunks import ChunkTable
from ..datastore.datastore import RetroDatastore, faiss
from ..datastore.manifest import FORMAT_VERSION, TRAIN_SPLIT, Manifest
from ..encoder.chunk_encoder import ChunkEncoder
from .engine import COLUMNS, Engine, first_line


SCHEMES = ("milvus", "postgresql")
_CACHED_CHUNKS = 1 << 16


def open_engine(url: str) -> Engine:
    """Opens the database of a URL (see [`Engine`])."""
    scheme = url.partition("://")[0]
    if scheme == "milvus":
        from .milvus import MilvusEngine

        return MilvusEngine(url)
    if scheme == "postgresql":
        from .postgresql import PostgresqlEngine

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
        try:
            manifest = _read_manifest(self.header["manifest"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the header at {self.engine.address} is damaged or was altered: {error}") from error
        super().__init__(Path(self.engine.address), manifest)
        # `Path` would join the two slashes of the address.
        self.path = self.engine.address
        self.num_chunks: int = self.manifest.train.chunks.num_chunks

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
            tokenizer = load_tokenizer(Path(folder))
        self.check_tokenizer(tokenizer)
        return tokenizer

    @cached_property
    def chunks(self) -> RemoteChunks:
        return RemoteChunks(self.engine, self.num_chunks, self.chunk_size)

    @cached_property
    def index(self) -> RemoteIndex:
        dim, metric = self.manifest.encoder.dim, self.header["metric"]
        return RemoteIndex(self.engine, self.num_chunks, dim, metric, self.state["index"])

    @property
    def bm25(self) -> Any:
        raise ValueError(f"{self.path} has no BM25 index; search it with the retriever dense or rerank")

    @property
    def retriever(self) -> str:
        return "dense"

    @property
    def question_retriever(self) -> str:
        return "dense"

    def split(self, name: str) -> Any:
        raise ValueError(
            f"{self.path} can be searched, but has no splits to read; open the datastore that was exported for "
            "training and evaluation"
        )

    def sources(self, chunk_ids: Any) -> list[None]:
        return [None] * len(chunk_ids)  # databases hold none

    def is_removed(self, chunk_ids: Any) -> np.ndarray:
        return np.zeros(np.shape(chunk_ids), dtype=bool)

    def encoder_source(self) -> tuple[str, str | None]:
        if self.engine.encoder is not None:
            return self.engine.encoder, None
        return self._named_encoder()

    def open_encoder(
        self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
    ) -> ChunkEncoder:
        try:
            return super().open_encoder(device, dtype)
        except OSError as error:
            raise ValueError(
                f"the encoder of {self.path}, {self.encoder_source()[0]}, cannot be loaded here: {first_line(error)} "
                "Add &encoder=FOLDER to the address, with a folder that holds it."
            ) from error


def _read_manifest(values: dict[str, Any]) -> Manifest:
    """The manifest of an export, which has no shards, and of its chunks only the totals."""
    unsaid = {"options": {}, "sources": [], "parts": [], "shards": []}
    splits = {TRAIN_SPLIT: {"chunks": unsaid | values["splits"][TRAIN_SPLIT]["chunks"]}}
    return Manifest.from_dict(values | {"splits": splits})


__all__ = ["RemoteChunks", "RemoteDatastore", "RemoteIndex", "open_engine"]
