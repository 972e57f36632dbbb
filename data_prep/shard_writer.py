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
"""Collects the chunks of a shard, and writes them with the table of their documents and the list of bad records"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, List, Value

from data_prep.chunker import DocumentChunker, unknown_tokens
from data_prep.documents import BadRecord, Document, Dropped, record_location
from data_prep.sources import Source
from data_prep.stage_files import save_shard
from modeling_retro.datastore.checksums import checksum
from modeling_retro.datastore.documents import SCHEMA
from modeling_retro.datastore.manifest import Part
from modeling_retro.durable_files_retro import whole


_BATCH_CHARACTERS = 1 << 20


def chunk_counts(columns: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The counts in the record of a shard of chunks, from its columns."""
    return {
        "rows": len(columns["length"]),
        "documents": len(np.unique(columns["document_id"])),
        "tokens": int(columns["length"].sum()),
        "bytes": int(columns["num_bytes"].sum()),
    }


class ShardWriter:
    """Collects the chunks of one shard and writes them, together with the ids of documents and the bad records."""

    def __init__(
        self,
        chunker: DocumentChunker,
        root: Path,
        name: str,
        part: Part,
        source: Source,
        dropped: Dropped,
        room: int | None,
        is_known: Callable[[Document, np.ndarray], bool] | None = None,
    ):
        self.is_known = is_known
        self.chunker = chunker
        self.root = root
        self.name = name
        self.part = part
        self.source = source
        self.dropped = dropped
        self.room = room
        self.last = False
        self.unknown = 0
        self.columns: list[dict[str, np.ndarray]] = []
        self.documents: list[tuple[Document, int]] = []

    def add(self, batch: list[Document]) -> bool:
        """Chunks a batch. Returns False if the shard has no room for all of it."""
        columns, chunks = self.chunker.chunk(batch)
        if self.is_known is not None:
            pieces = np.split(columns["input_ids"], np.cumsum(chunks)[:-1])
            is_new = [not self.is_known(*pair) for pair in zip(batch, pieces, strict=True)]
            columns = {name: column[np.repeat(is_new, chunks)] for name, column in columns.items()}
            batch, chunks = [document for document, keep in zip(batch, is_new, strict=True) if keep], chunks[is_new]
            self.dropped.filtered += is_new.count(False)
        if self.room is not None:
            fits = list(accumulate(chunks.tolist()))
            kept = sum(total <= self.room for total in fits)
            self.last = kept < len(batch)
            batch, chunks = batch[:kept], chunks[:kept]
            columns = {name: column[: int(chunks.sum())] for name, column in columns.items()}
            self.room -= int(chunks.sum())
        for document, number in zip(batch, chunks.tolist(), strict=True):
            if number:
                # The texts are no longer needed.
                self.documents.append((replace(document, text=""), number))
            else:
                record = document.document_id - self.part.first_document_id + self.part.start
                self.dropped.add(BadRecord(*record_location(self.source, record), "no tokens in the text"))
        self.columns.append(columns)
        unknown = unknown_tokens(self.chunker.tokenizer, columns["input_ids"], columns["length"])
        self.unknown += int(unknown.sum())
        return not self.last

    def save(self, temporary: Path, features: Features) -> dict[str, Any]:
        """Writes the shard to `temporary` and returns its record."""
        empty = {name: np.zeros((0, *_width(feature)), dtype=np.int64) for name, feature in features.items()}
        columns = {
            name: np.concatenate([part[name] for part in self.columns]) if self.columns else empty[name]
            for name in features
        }
        save_shard(temporary, columns, features)
        documents_sha256 = self._save_documents(self.root / "documents" / f"{self.name}.parquet")
        dropped, left_out = self.dropped, self.dropped.left_out
        if dropped.bad or left_out:
            with whole(self.root / "quarantine" / f"{self.name}.jsonl") as file:
                records = [{**asdict(bad), "file": self.source.public(bad.file)} for bad in (*dropped.bad, *left_out)]
                file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        counts = {"bad_records": len(dropped.bad), "filtered": dropped.filtered}
        return {
            **chunk_counts(columns),
            "dropped": counts | ({"left_out": len(left_out)} if left_out else {}),
            "last": self.last,
            "documents_sha256": documents_sha256,
            **({"unknown_tokens": self.unknown} if self.unknown else {}),
        }

    def _save_documents(self, file: Path) -> str:
        """Writes the table of the documents, unless the file holds it already. Returns its checksum."""
        buffer = io.BytesIO()
        pq.write_table(self._table(), buffer)
        sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
        if not file.is_file() or checksum(file) != sha256:
            with whole(file) as temporary:
                temporary.write_bytes(buffer.getvalue())
        return sha256

    def _table(self) -> pa.Table:
        rows = [
            {
                "document_id": document.document_id,
                "id": document.name,
                "chunks": number,
                "path": document.source.path,
                "line": document.source.line,
                "title": document.source.title,
                "encoding": document.encoding,
                "fields": json.dumps(document.source.fields, default=str) if document.source.fields else None,
            }
            for document, number in self.documents
        ]
        return pa.Table.from_pylist(rows, schema=SCHEMA)


def _width(feature: Value | List) -> tuple[int, ...]:
    return (feature.length,) if isinstance(feature, List) else ()


def in_batches(
    documents: Iterator[Document], advance: Callable[[int], Any] = lambda number: None
) -> Iterator[list[Document]]:
    """
    Groups documents into batches of about a million characters, which are tokenized in parallel. Calls `advance` with
    1 for each document that was read.
    """
    batch, characters = [], 0
    for document in documents:
        advance(1)
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
