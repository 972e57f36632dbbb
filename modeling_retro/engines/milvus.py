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
"""Datastores in Milvus, on a server or in a file (Milvus Lite)"""

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from .engine import Engine


try:
    from pymilvus import DataType, MilvusClient, MilvusException
except ImportError as error:
    raise ImportError("Milvus needs its client: `pip install retro-transformers[milvus]`") from error


_METRICS = {"inner_product": "IP", "l2": "L2"}
_MOST_RESULTS = 16_384  # of a search, and of the chunks of a request
_KEY, _TEXT = 200, 65_535


class MilvusEngine(Engine):
    """A collection of Milvus, and its header as another one. See [`Engine`]."""

    connection_errors = (MilvusException, OSError)

    def __init__(self, url: str):
        super().__init__(url)
        parts = self.parts
        self._arguments = {"timeout": self.timeout, **self.options}
        if parts.hostname is None:
            if importlib.util.find_spec("milvus_lite") is None:
                raise ImportError("a Milvus file needs Milvus Lite: `pip install retro-transformers[milvus]`")
            path = Path(unquote(parts.path))
            if path.suffix != ".db" or not path.parent.is_dir():
                raise ValueError(
                    f"{path} is no place for Milvus Lite, expected FOLDER/NAME.db in a folder that exists"
                )
            self._arguments["uri"] = str(path)
            # Milvus Lite lacks a request that the client makes for its statistics, and reports this as an error.
            logging.getLogger("grpc._server").setLevel(logging.CRITICAL)
        else:
            secure = self._arguments.pop("secure", "false") == "true"
            self._arguments["uri"] = f"{'https' if secure else 'http'}://{parts.hostname}:{parts.port or 19530}"
            self._arguments |= {"user": unquote(parts.username or ""), "password": unquote(parts.password or "")}
            if parts.path.strip("/"):
                self._arguments["db_name"] = parts.path.strip("/")
        self._open_client: MilvusClient | None = None
        self.attempt("connecting", lambda: self._client.list_collections())

    @property
    def _client(self) -> "MilvusClient":
        if self._open_client is None:
            self._open_client = MilvusClient(**self._arguments)
            # After a restart, a collection has to be loaded before it can be read.
            for name in (self.collection, f"{self.collection}_header"):
                if self._open_client.has_collection(name):
                    self._open_client.load_collection(name)
        return self._open_client

    def disconnect(self) -> None:
        if self._open_client is not None:
            self._open_client.close()
        self._open_client = None

    @property
    def _mine(self) -> str:
        return f'tenant == "{self.tenant}"'

    def create(self, dim: int, metric: str, index: str) -> None:
        def make(name: str, fields: dict[str, dict], dim: int, index: str) -> None:
            if self._client.has_collection(name):
                return
            schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
            schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=_KEY)
            schema.add_field("tenant", DataType.VARCHAR, max_length=_KEY)
            for field, options in fields.items():
                schema.add_field(field, **options)
            schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=dim)
            indexes = MilvusClient.prepare_index_params()
            params = {"M": 16, "efConstruction": 128} if index == "hnsw" else {}
            indexes.add_index("embedding", index_type=index.upper(), metric_type=_METRICS[metric], params=params)
            self._client.create_collection(name, schema=schema, index_params=indexes, consistency_level="Strong")

        chunk = {name: {"datatype": DataType.INT64} for name in ("chunk_id", "document_id", "length", "num_bytes")}
        # The capacity only bounds the chunk size.
        tokens = {"datatype": DataType.ARRAY, "element_type": DataType.INT32, "max_capacity": 4096}
        part = {"part": {"datatype": DataType.INT64}, "text": {"datatype": DataType.VARCHAR, "max_length": _TEXT}}
        self.attempt("making collections", lambda: make(self.collection, {**chunk, "input_ids": tokens}, dim, index))
        # Every collection of Milvus has vectors; those of the header mean nothing.
        self.attempt("making collections", lambda: make(f"{self.collection}_header", part, 2, "flat"))
        fields = self.attempt("reading the collection", lambda: self._client.describe_collection(self.collection))
        found = next(field["params"]["dim"] for field in fields["fields"] if field["name"] == "embedding")
        if int(found) != dim:
            raise ValueError(
                f"the collection {self.collection} at {self.address} holds embeddings of {found} dimensions, expected "
                f"{dim}; choose another ?collection="
            )

    def count(self) -> int:
        found = self.attempt(
            "counting chunks",
            lambda: self._client.query(self.collection, filter=self._mine, output_fields=["count(*)"]),
        )
        return found[0]["count(*)"]

    def insert(self, first_chunk: int, columns: Mapping[str, np.ndarray]) -> None:
        rows = [
            {
                "key": f"{self.tenant}/{first_chunk + i}",
                "tenant": self.tenant,
                "chunk_id": first_chunk + i,
                "document_id": int(columns["document_id"][i]),
                "length": int(columns["length"][i]),
                "num_bytes": int(columns["num_bytes"][i]),
                "input_ids": columns["input_ids"][i].tolist(),
                "embedding": columns["embedding"][i],
            }
            for i in range(len(columns["document_id"]))
        ]
        self.attempt("storing chunks", lambda: self._client.upsert(self.collection, rows))

    def finish(self, metric: str, index: str) -> None:
        self.attempt("building the index", lambda: self._client.flush(self.collection))

    def delete(self) -> None:
        for name in (f"{self.collection}_header", self.collection):
            self.attempt("deleting chunks", lambda name=name: self._client.delete(name, filter=self._mine))

    def read_texts(self, parts: list[int]) -> dict[int, str]:
        name = f"{self.collection}_header"

        def read() -> list[dict]:
            if not self._client.has_collection(name):
                return []
            wanted = f"{self._mine} and part in {parts}"
            return self._client.query(name, filter=wanted, output_fields=["part", "text"])

        return {row["part"]: row["text"] for row in self.attempt("reading the header", read)}

    def write_texts(self, texts: Mapping[int, str]) -> None:
        for part, text in texts.items():  # one at a time, because a message has at most 64 MB
            row = {"key": f"{self.tenant}/{part}", "tenant": self.tenant, "part": part, "text": text}
            row["embedding"] = [0.0, 0.0]
            self.attempt("writing the header", lambda row=row: self._client.upsert(f"{self.collection}_header", [row]))

    def fetch(self, chunk_ids: np.ndarray) -> dict[int, tuple]:
        names = ["chunk_id", "document_id", "length", "num_bytes", "input_ids"]
        rows = {}
        for start in range(0, len(chunk_ids), 1024):
            keys = [f"{self.tenant}/{i}" for i in chunk_ids[start : start + 1024]]
            found = self.attempt(
                "reading chunks", lambda keys=keys: self._client.get(self.collection, keys, output_fields=names)
            )
            rows |= {row["chunk_id"]: tuple(row[name] for name in names[1:]) for row in found}
        return rows

    def search(self, queries: np.ndarray, k: int, metric: str, index: str) -> tuple[np.ndarray, np.ndarray]:
        scores = np.zeros((len(queries), k), dtype=np.float32)
        ids = np.full((len(queries), k), -1, dtype=np.int64)
        limit = min(k, _MOST_RESULTS)
        params = {"ef": max(2 * limit, 128)} if index == "hnsw" else {}
        block = max(1, min(1024, _MOST_RESULTS // limit))
        for start in range(0, len(queries), block):
            part = np.ascontiguousarray(queries[start : start + block], dtype=np.float32)
            found = self.attempt(
                "a search",
                lambda part=part: self._client.search(
                    self.collection,
                    list(part),
                    filter=self._mine,
                    limit=limit,
                    output_fields=["chunk_id"],
                    search_params={"metric_type": _METRICS[metric], "params": params},
                ),
            )
            for row, hits in enumerate(found, start):
                ids[row, : len(hits)] = [hit["entity"]["chunk_id"] for hit in hits]
                scores[row, : len(hits)] = [hit["distance"] for hit in hits]
        return scores, ids


__all__ = ["MilvusEngine"]
