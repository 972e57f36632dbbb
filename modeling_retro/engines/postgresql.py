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
"""Datastores in PostgreSQL with the extension pgvector"""

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode, urlunsplit

import numpy as np

from .engine import Engine


try:
    import psycopg
    from pgvector.psycopg import register_vector
except ImportError as error:
    raise ImportError("PostgreSQL needs psycopg and pgvector: `pip install retro-transformers[postgresql]`") from error


_MOST_INDEXED_DIMENSIONS = 2000  # of an HNSW index of pgvector
_OPERATORS = {"inner_product": ("<#>", "vector_ip_ops"), "l2": ("<->", "vector_l2_ops")}


class PostgresqlEngine(Engine):
    """A collection as a table, and its header as another one. See [`Engine`]."""

    connection_errors = (psycopg.OperationalError, psycopg.InterfaceError)
    request_errors = (psycopg.Error,)

    def __init__(self, url: str):
        super().__init__(url)
        query = {"connect_timeout": str(max(2, round(self.timeout))), **self.options}
        self._conninfo = urlunsplit(self.parts._replace(query=urlencode(query)))
        self._connection: psycopg.Connection | None = None
        self.attempt("connecting", self._connect)

    def _connect(self) -> "psycopg.Connection":
        if self._connection is None or self._connection.closed:
            self._connection = psycopg.connect(self._conninfo, autocommit=True)
            milliseconds = round(1000 * self.timeout)
            self._connection.execute(f"SET statement_timeout = {milliseconds}")
            if self._run("SELECT 1 FROM pg_type WHERE typname = 'vector'"):
                register_vector(self._connection)
        return self._connection

    def _run(self, statement: str, values: Any = None) -> list[tuple]:
        cursor = self._connect().execute(statement, values)
        return cursor.fetchall() if cursor.description else []

    def disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def create(self, dim: int, metric: str, index: str) -> None:
        if index == "hnsw" and dim > _MOST_INDEXED_DIMENSIONS:
            raise ValueError(
                f"the embeddings have {dim} dimensions, and pgvector indexes at most {_MOST_INDEXED_DIMENSIONS}; "
                "export with --index flat"
            )

        def make() -> None:
            self._run("CREATE EXTENSION IF NOT EXISTS vector")
            register_vector(self._connection)
            self._run(
                f"CREATE TABLE IF NOT EXISTS {self.collection} (tenant text, chunk_id bigint, document_id bigint, "
                f"length int, num_bytes bigint, input_ids int[], embedding vector({dim}), "
                "PRIMARY KEY (tenant, chunk_id))"
            )
            self._run(
                f"CREATE TABLE IF NOT EXISTS {self.collection}_header (tenant text, part int, text text, "
                "PRIMARY KEY (tenant, part))"
            )

        self.attempt("making the tables", make)
        found = self.attempt(
            "reading the table",
            lambda: self._run(
                "SELECT atttypmod FROM pg_attribute WHERE attrelid = %s::regclass AND attname = 'embedding'",
                (self.collection,),
            ),
        )
        if found != [(dim,)]:
            raise ValueError(
                f"the table {self.collection} at {self.address} holds other embeddings than {dim} dimensions; choose "
                "another ?collection="
            )

    def count(self) -> int:
        statement = f"SELECT count(*) FROM {self.collection} WHERE tenant = %s"
        return self.attempt("counting chunks", lambda: self._run(statement, (self.tenant,)))[0][0]

    def insert(self, first_chunk: int, columns: Mapping[str, np.ndarray]) -> None:
        names = "tenant, chunk_id, document_id, length, num_bytes, input_ids, embedding"
        number = len(columns["document_id"])
        chunk_ids = np.arange(first_chunk, first_chunk + number)

        def write() -> None:
            with self._connect().transaction(), self._connection.cursor() as cursor:
                cursor.execute(
                    f"DELETE FROM {self.collection} WHERE tenant = %s AND chunk_id BETWEEN %s AND %s",
                    (self.tenant, first_chunk, first_chunk + number - 1),
                )
                with cursor.copy(f"COPY {self.collection} ({names}) FROM STDIN WITH (FORMAT BINARY)") as copy:
                    copy.set_types(["text", "int8", "int8", "int4", "int8", "int4[]", "vector"])
                    for i in range(number):
                        copy.write_row(
                            (
                                self.tenant,
                                int(chunk_ids[i]),
                                int(columns["document_id"][i]),
                                int(columns["length"][i]),
                                int(columns["num_bytes"][i]),
                                columns["input_ids"][i].tolist(),
                                columns["embedding"][i],
                            )
                        )

        self.attempt("storing chunks", write)

    def finish(self, metric: str, index: str) -> None:
        if index != "hnsw":
            return
        operators = _OPERATORS[metric][1]

        def build() -> None:
            with self._connect().transaction():
                self._run("SET LOCAL statement_timeout = 0")
                self._run(
                    f"CREATE INDEX IF NOT EXISTS {self.collection}_{metric} ON {self.collection} USING hnsw "
                    f"(embedding {operators}) WITH (m = 16, ef_construction = 128)"
                )

        self.attempt("building the index", build)

    def delete(self) -> None:
        for table in (f"{self.collection}_header", self.collection):
            statement = f"DELETE FROM {table} WHERE tenant = %s"
            self.attempt("deleting chunks", lambda statement=statement: self._run(statement, (self.tenant,)))

    def read_texts(self, parts: list[int]) -> dict[int, str]:
        def read() -> list[tuple]:
            if self._run("SELECT to_regclass(%s)", (f"{self.collection}_header",)) == [(None,)]:
                return []
            statement = f"SELECT part, text FROM {self.collection}_header WHERE tenant = %s AND part = ANY(%s)"
            return self._run(statement, (self.tenant, parts))

        return dict(self.attempt("reading the header", read))

    def write_texts(self, texts: Mapping[int, str]) -> None:
        statement = (
            f"INSERT INTO {self.collection}_header VALUES (%s, %s, %s) "
            "ON CONFLICT (tenant, part) DO UPDATE SET text = excluded.text"
        )

        def write() -> None:
            with self._connect().transaction():
                for part, text in texts.items():
                    self._run(statement, (self.tenant, part, text))

        self.attempt("writing the header", write)

    def fetch(self, chunk_ids: np.ndarray) -> dict[int, tuple]:
        statement = (
            f"SELECT chunk_id, document_id, length, num_bytes, input_ids FROM {self.collection} "
            "WHERE tenant = %s AND chunk_id = ANY(%s)"
        )
        values = (self.tenant, np.asarray(chunk_ids).tolist())
        return {row[0]: row[1:] for row in self.attempt("reading chunks", lambda: self._run(statement, values))}

    def search(self, queries: np.ndarray, k: int, metric: str, index: str) -> tuple[np.ndarray, np.ndarray]:
        operator = _OPERATORS[metric][0]
        statement = (
            f"SELECT chunk_id, embedding {operator} %s AS distance FROM {self.collection} WHERE tenant = %s "
            "ORDER BY distance LIMIT %s"
        )
        values = [(query, self.tenant, k) for query in np.ascontiguousarray(queries, dtype=np.float32)]

        def run() -> list[list[tuple]]:
            with self._connect().transaction(), self._connection.cursor() as cursor:
                if index == "hnsw":
                    # With `strict_order` the index goes on until it has k chunks of the tenant.
                    cursor.execute(f"SET LOCAL hnsw.ef_search = {min(max(2 * k, 128), 1000)}")
                    cursor.execute("SET LOCAL hnsw.iterative_scan = strict_order")
                else:
                    cursor.execute("SET LOCAL enable_indexscan = off")
                cursor.executemany(statement, values, returning=True)
                found = [cursor.fetchall()]
                while cursor.nextset():
                    found.append(cursor.fetchall())
                return found

        scores = np.zeros((len(queries), k), dtype=np.float32)
        ids = np.full((len(queries), k), -1, dtype=np.int64)
        for row, found in enumerate(self.attempt("a search", run) if len(values) else []):
            if found:
                ids[row, : len(found)], distance = np.array(found).T
                scores[row, : len(found)] = -distance if metric == "inner_product" else distance**2
        return scores, ids


__all__ = ["PostgresqlEngine"]
