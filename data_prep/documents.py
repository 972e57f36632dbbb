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
Reads documents and handles bad records.

Inputs are files, folders and globs. Files of the types `.jsonl`, `.json` (one object on each line) and `.parquet` hold
records with a text column. Any other file is one document. Files that end in `.gz` or `.zst` are unpacked while they
are read. Capitals in these suffixes make no difference. Any `datasets` dataset is an input too. An input that can be
read only once (standard input, a streamed dataset) is first copied to a file.

A corpus is first *scanned* for the number and the sizes of its records, without parsing them. Then it is read in
parts. Several processes share the files of the scan and the parts. The id of a document is the position of its record
in the inputs.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from accelerate.utils import gather_object

from data_prep.file_types import open_file
from data_prep.sources import Source, lookup
from data_prep.stage_files import process_state
from modeling_retro.datastore.manifest import Part


_READ_SIZE = 1 << 16
_ROWS = 256


@dataclass(frozen=True)
class Document:
    """A document: its text and, if there is an id column, its value there."""

    text: str
    document_id: int
    name: str | None = None


@dataclass(frozen=True)
class BadRecord:
    """A record that is not a document: its place and the reason."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class RecordFormat:
    """
    Describes how a record becomes a document.

    Args:
        text_column (`str`, *optional*, defaults to `"text"`):
            Key or column of the text. `a.b` names the key `b` of the object `a`.
        id_column (`str`, *optional*): Key or column of the user's own id of a document.
        max_document_bytes (`int`, *optional*, defaults to 50,000,000): Longer records are bad records.
    """

    text_column: str = "text"
    id_column: str | None = None
    max_document_bytes: int = 50_000_000

    def columns(self, source: Source) -> list[str]:
        """The top-level columns of a source that are read."""
        keys = [self.text_column, self.id_column, source.filter and source.filter.key]
        return sorted({key.split(".")[0] for key in keys if key})

    def document(self, record: dict[str, Any], document_id: int) -> Document | str:
        """The document of a record, or the reason why the record is not a document."""
        found, text = lookup(record, self.text_column)
        if not found:
            return f"no {self.text_column!r} in the record (it has {', '.join(map(repr, record)) or 'nothing'})"
        if not isinstance(text, str):
            return f"{self.text_column!r} is {type(text).__name__}, expected a string"
        if not text.strip():
            return "no text"
        if not text.isascii():
            try:
                size = len(text.encode())
            except UnicodeEncodeError as error:
                return f"{self.text_column!r} holds half a surrogate pair at character {error.start}"
        else:
            size = len(text)
        if size > self.max_document_bytes:
            return f"a document of {size} bytes is over the limit of {self.max_document_bytes} (--max-document-bytes)"
        name = lookup(record, self.id_column)[1] if self.id_column else None
        return Document(text, document_id, None if name is None else str(name))


def scan_source(source: Source, max_document_bytes: int) -> Iterator[tuple[int, int] | BadRecord]:
    """
    Yields the offset and the size in bytes of each record without parsing it. Where a file is broken, it yields a
    [`BadRecord`] and ends. The sizes of rows of parquet files and datasets are averages.
    """
    try:
        if source.kind == "jsonl":
            offset = 0
            for size, _ in _read_lines(source.path, 0, max_document_bytes):
                yield offset, size
                offset += size
        elif source.kind == "text":
            for file in source.files:
                yield 0, Path(file).stat().st_size
        elif source.kind == "parquet":
            for rows, size in _row_groups(source.path):
                for _ in range(rows):
                    yield 0, size // max(rows, 1)
        else:
            rows = len(source.dataset)
            for _ in range(rows):
                yield 0, (source.dataset.data.nbytes or 0) // rows
    except (OSError, pa.ArrowException) as error:
        yield BadRecord(source.path, 0, f"cannot be read to its end: {error}")


class RecordReader:
    """
    Reads parts of sources. Consecutive parts of a compressed file are unpacked in one pass.

    Args:
        sources (`Sequence[Source]`): The sources.
        record_format ([`RecordFormat`]): How records become documents.
    """

    def __init__(self, sources: Sequence[Source], record_format: RecordFormat):
        self.sources = sources
        self.format = record_format
        self._source: int | None = None
        self._position = 0
        self._items: Iterator[Any] = iter(())

    def documents(self, part: Part, dropped: "Dropped") -> Iterator[Document]:
        """
        Yields the documents of a part.

        Args:
            part ([`Part`]): The part.
            dropped ([`Dropped`]): Collects the records that are left out.
        """
        source = self.sources[part.source]
        for number, item in zip(range(part.start, part.stop), self._seek(part)):
            self._position = number + 1
            record = _parse(source, number, item, self.format)
            if record is None:
                continue
            if not isinstance(record, BadRecord):
                if source.filter is not None and not source.filter.keeps(record):
                    dropped.filtered += 1
                    continue
                record = self.format.document(record, part.first_document_id + number - part.start)
            if isinstance(record, str):
                record = BadRecord(*record_location(source, number), record)
            if isinstance(record, BadRecord):
                dropped.add(record)
            else:
                yield record
        if part.broken is not None:
            dropped.add(BadRecord(source.path, part.stop + 1, part.broken))

    def _seek(self, part: Part) -> Iterator[Any]:
        source = self.sources[part.source]
        if self._source != part.source or self._position != part.start:
            if source.seekable or self._source != part.source or self._position > part.start:
                self._source = part.source
                self._position = part.start if source.seekable else 0
                self._items = _read_items(source, self._position, part.offset, self.format)
            # A compressed file is unpacked up to the part, but not parsed.
            for _ in zip(range(self._position, part.start), self._items):
                pass
        return self._items


@dataclass
class Dropped:
    """
    Collects the records that a reader leaves out.

    Args:
        on_bad_record (`str`): `"error"` raises a `ValueError` at the first bad record, `"skip"` keeps them in `bad`.
    """

    on_bad_record: str
    bad: list[BadRecord] = field(default_factory=list)
    filtered: int = 0

    def __post_init__(self) -> None:
        if self.on_bad_record not in ("error", "skip"):
            raise ValueError(f"on_bad_record must be 'error' or 'skip', got {self.on_bad_record!r}")

    def add(self, record: BadRecord) -> None:
        """Keeps a bad record, or raises an error, as `on_bad_record` says."""
        if self.on_bad_record == "error":
            raise ValueError(f"{record} (--on-bad-record skip leaves such records out)")
        self.bad.append(record)


def plan_parts(
    sources: Sequence[Source],
    record_format: RecordFormat,
    part_bytes: int,
    on_bad_record: str,
    first_document_id: int = 0,
    max_documents: int | None = None,
) -> list[Part]:
    """
    Cuts sources into parts of whole records, which are distributed over the processes.

    Args:
        sources (`Sequence[Source]`): The sources.
        record_format ([`RecordFormat`]): How records become documents.
        part_bytes (`int`): A part ends with the record that reaches this size.
        on_bad_record (`str`):
            For a file that cannot be read to its end: `"error"` raises an error, and `"skip"` leaves out the rest.
        first_document_id (`int`, *optional*, defaults to 0): Id of the first record.
        max_documents (`int`, *optional*):
            Largest number of documents. Bad and filtered records do not count.

    Returns:
        `list[Part]`: the parts, in order.
    """
    state = process_state()
    cut: dict[int, list[Part]] = {}
    if max_documents is None:
        # Each process scans its share of the sources.
        for index in range(state.process_index, len(sources), state.num_processes):
            cut[index] = _cut_source(sources[index], index, record_format, part_bytes, on_bad_record)[0]
        cut = {index: parts for mine in gather_object([cut]) for index, parts in mine.items()}
    else:
        for index, source in enumerate(sources):
            cut[index], documents = _cut_source(source, index, record_format, part_bytes, on_bad_record, max_documents)
            max_documents -= documents
            if max_documents == 0:
                break
    parts: list[Part] = []
    for index in sorted(cut):
        for part in cut[index]:
            parts.append(replace(part, first_document_id=first_document_id))
            first_document_id += part.stop - part.start
    return parts


def _cut_source(
    source: Source,
    index: int,
    record_format: RecordFormat,
    part_bytes: int,
    on_bad_record: str,
    max_documents: int | None = None,
) -> tuple[list[Part], int]:
    """The parts of one source, without document ids, and the number of its documents if `max_documents` is given."""
    parts: list[Part] = []
    documents, start, number, size, part_offset = 0, 0, 0, 0, 0
    broken = None
    # Only `max_documents` needs to know during the scan which records are documents.
    items = _read_items(source, 0, 0, record_format) if max_documents is not None else None
    for item in scan_source(source, record_format.max_document_bytes):
        if isinstance(item, BadRecord):
            Dropped(on_bad_record).add(item)
            broken = item.reason
            break
        if documents == max_documents:
            break
        if size >= part_bytes:
            parts.append(Part(index, start, number, part_offset, 0, None))
            start, size, part_offset = number, 0, item[0]
        if items is not None:
            documents += _is_document(source, number, next(items), record_format)
        number += 1
        size += item[1]
    if number > start or broken is not None:
        parts.append(Part(index, start, number, part_offset, 0, broken))
    return parts, documents


def _is_document(source: Source, number: int, item: Any, record_format: RecordFormat) -> bool:
    record = _parse(source, number, item, record_format)
    if not isinstance(record, dict) or source.filter is not None and not source.filter.keeps(record):
        return False
    return isinstance(record_format.document(record, 0), Document)


def record_location(source: Source, number: int) -> tuple[str, int]:
    """File and line of a record, or its row for parquet and datasets, counted from 1."""
    return (source.files[number], 1) if source.kind == "text" else (source.path, number + 1)


def _read_items(source: Source, start: int, offset: int, record_format: RecordFormat) -> Iterator[Any]:
    """Yields each record without parsing it: (size, line), the name of a text file, or a row."""
    if source.kind == "jsonl":
        yield from _read_lines(source.path, offset, record_format.max_document_bytes)
    elif source.kind == "text":
        yield from source.files[start:]
    elif source.kind == "parquet":
        yield from _read_parquet(source.path, start, record_format.columns(source))
    else:
        names = [name for name in record_format.columns(source) if name in source.dataset.column_names]
        rows = source.dataset.select_columns(names)
        for first in range(start, len(rows), _ROWS):
            yield from rows.select(range(first, min(first + _ROWS, len(rows)))).to_list()


def _parse(source: Source, number: int, item: Any, record_format: RecordFormat) -> dict[str, Any] | BadRecord | None:
    """The record of an item of `_read_items`; `None` for an empty line."""
    if source.kind == "text":
        return _read_text(item, record_format)
    if source.kind != "jsonl":
        return item
    size, line = item
    limit = record_format.max_document_bytes
    if line is None:
        reason = f"a line of {size} bytes is over the limit of {limit} (--max-document-bytes)"
        return BadRecord(source.path, number + 1, reason)
    return _parse_line(line, source.path, number + 1) if line.strip() else None


def _read_lines(path: str, offset: int, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Yields the size and the text of each line. The text is None if the line is longer than `limit`."""
    with open_file(path, offset) as file:
        while line := file.readline(limit + 1):
            size = len(line)
            if size <= limit:
                yield size, line
                continue
            while not line.endswith(b"\n") and (line := file.readline(_READ_SIZE)):
                size += len(line)
            yield size, None


def _parse_line(line: bytes, path: str, number: int) -> dict[str, Any] | BadRecord:
    try:
        record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return BadRecord(path, number, f"not valid UTF-8 at byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return BadRecord(path, number, f"not valid JSON: {error}")
    if not isinstance(record, dict):
        return BadRecord(path, number, f"expected a JSON object, got {type(record).__name__}")
    return record


def _read_text(file: str, record_format: RecordFormat) -> dict[str, Any] | BadRecord:
    limit = record_format.max_document_bytes
    try:
        with open_file(file) as handle:
            content = handle.read(limit + 1)
        if len(content) > limit:
            return BadRecord(file, 1, f"a document over the limit of {limit} bytes (--max-document-bytes)")
        return {record_format.text_column: content.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        return BadRecord(file, 1, f"not valid UTF-8 at byte {error.start}")
    except (OSError, pa.ArrowException) as error:
        return BadRecord(file, 1, f"cannot be read: {error}")


def _row_groups(path: str) -> list[tuple[int, int]]:
    metadata = pq.ParquetFile(path).metadata
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    return [(group.num_rows, group.total_byte_size) for group in groups]


def _read_parquet(path: str, start: int, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    file = pq.ParquetFile(path)
    names = [name for name in columns if name in file.schema_arrow.names]
    row = 0
    for index in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(index).num_rows
        if row + rows > start:
            for batch in file.iter_batches(batch_size=_ROWS, row_groups=[index], columns=names):
                records = batch.to_pylist()
                yield from records[max(0, start - row) :]
                row += len(records)
        else:
            row += rows
