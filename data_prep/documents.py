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

Inputs are files, folders and globs. Files of the types `.jsonl`, `.json`, `.csv`, `.tsv` and `.parquet` hold records
with a text column. Any other file is one document, as text or in one of the formats of `extraction.py`. Files that end
in `.gz` or `.zst` are unpacked while they are read. Capitals in these suffixes make no difference. Any `datasets`
dataset is an input too. An input that can be read only once (standard input, a streamed dataset) is first copied to a
file.

A file that was found in a folder or by a glob and cannot be read is left out and listed, because folders hold files of
all kinds. A file that was named, or a record, that cannot be read is an error, or is left out if the user says so.

A corpus is first *scanned* for the number and the sizes of its records, without parsing them. Then it is read in
parts. Several processes share the files of the scan and the parts. The id of a document is the position of its record
in the inputs.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from accelerate.utils import gather_object

from data_prep.extraction import Unreadable
from data_prep.file_types import open_file
from data_prep.sources import Source, lookup
from data_prep.stage_files import process_state
from data_prep.tables import read_csv, read_json
from data_prep.text_files import read_text_file
from modeling_retro.datastore.documents import DocumentSource
from modeling_retro.datastore.manifest import Part


_READ_SIZE = 1 << 16
_ROWS = 256
# Errors that are shown together, and the records that are read on to find them.
_MAX_ERRORS = 20
_MAX_RECORDS_FOR_ERRORS = 100_000


@dataclass(frozen=True)
class Document:
    """A document: its text, the value of its id column if there is one, where it is from, and its encoding."""

    text: str
    document_id: int
    name: str | None = None
    source: DocumentSource = field(default=DocumentSource(), compare=False)
    encoding: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class BadRecord:
    """A record that is not a document: its place and the reason."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class BadRecordsError(ValueError):
    """Records that are no documents, all those of a part together."""

    def __init__(self, records: Sequence[BadRecord]):
        self.records = list(records)
        shown = "\n".join(map(str, self.records[:_MAX_ERRORS]))
        more = f"\nand {len(self.records) - _MAX_ERRORS} more" if len(self.records) > _MAX_ERRORS else ""
        super().__init__(f"{shown}{more} (--on-bad-record skip leaves such records out)")

    def __reduce__(self) -> tuple[type, tuple]:  # it may come from another process
        return BadRecordsError, (self.records,)


@dataclass(frozen=True)
class RecordFormat:
    """
    Describes how a record becomes a document.

    Args:
        text_column (`str`, *optional*, defaults to `"text"`):
            Key or column of the text. `a.b` names the key `b` of the object `a`.
        id_column (`str`, *optional*):
            Key or column of the user's own id of a document. `path` is the path of the file, with the line in a file
            of records, where no such key is found.
        max_document_bytes (`int`, *optional*, defaults to 50,000,000): Longer records are bad records.
        keep_columns (`tuple[str, ...]`, *optional*): Further keys or columns that are kept, beside `title`.
        encoding (`str`, *optional*): Encoding of text files that are not UTF-8. By default it is guessed.
    """

    text_column: str = "text"
    id_column: str | None = None
    max_document_bytes: int = 50_000_000
    keep_columns: tuple[str, ...] = ()
    encoding: str | None = None

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "RecordFormat":
        """The format of the options of a split, of which older datastores lack some."""
        return cls(
            options["text_column"],
            options["id_column"],
            options["max_document_bytes"],
            tuple(options.get("keep_columns") or ()),
            options.get("encoding"),
        )

    def columns(self, source: Source) -> list[str]:
        """The top-level columns of a source that are read."""
        keys = [self.text_column, self.id_column, source.filter and source.filter.key, "title", *self.keep_columns]
        return sorted({part for key in keys if key for part in (key, key.split(".")[0])})

    def missing_column(self, names: Sequence[str]) -> str | None:
        """The reason why a file with columns of these names has no documents, if it has none."""
        if self.text_column in names or self.text_column.split(".")[0] in names:
            return None
        return (
            f"no column {self.text_column!r} (it has {', '.join(map(repr, names)) or 'none'}); "
            "--text_column names the one with the text"
        )

    def document(
        self, record: dict[str, Any], document_id: int, place: DocumentSource = DocumentSource()
    ) -> Document | str:
        """The document of a record, or the reason why the record is not a document. `place` has its path and line."""
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
        if name is None and self.id_column == "path" and place.path is not None:
            name = str(place)
        title = lookup(record, "title")[1]
        fields = {key: lookup(record, key)[1] for key in self.keep_columns}
        origin = replace(
            place,
            title=title if isinstance(title, str) and title.strip() else None,
            fields={key: value for key, value in fields.items() if value is not None},
        )
        return Document(text, document_id, None if name is None else str(name), origin)


def scan_source(source: Source, record_format: RecordFormat) -> Iterator[tuple[int, int] | BadRecord]:
    """
    Yields the offset and the size in bytes of each record without parsing it. Where a file is broken, it yields a
    [`BadRecord`] and ends. The sizes of rows of parquet files and datasets are averages.
    """
    limit = record_format.max_document_bytes
    try:
        missing = _columns_of(source, record_format)
        missing = None if missing is None else record_format.missing_column(missing)
        if missing is not None:
            yield BadRecord(source.path, 0, missing)
        elif source.kind == "jsonl":
            offset = 0
            for size, _ in _read_lines(source.path, 0, limit):
                yield offset, size
                offset += size
        elif source.kind in ("csv", "json"):
            for record in _read_items(source, 0, 0, record_format):
                yield 0, len(str(record))
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
    except Unreadable as error:
        yield BadRecord(source.path, 0, str(error))


def _columns_of(source: Source, record_format: RecordFormat) -> list[str] | None:
    """The columns of a file that has the same in all rows. For lines of JSON they are only known by looking."""
    if source.kind == "parquet":
        return pq.ParquetFile(source.path).schema_arrow.names
    if source.kind == "dataset":
        return source.dataset.column_names
    if source.kind == "csv" or source.is_found and source.kind in ("json", "jsonl"):
        for number, item in enumerate(_read_items(source, 0, 0, record_format)):
            record = _parse(source, number, item, record_format)
            if record is not None:
                return list(record) if isinstance(record, dict) else None
    return None


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
            document = self._document(source, number, item, part.first_document_id + number - part.start)
            if isinstance(document, Document):
                yield document
            elif isinstance(document, BadRecord):
                dropped.add(document, is_left_out=source.is_found and source.kind == "text")
            elif document == "filtered":
                dropped.filtered += 1
        if part.broken is not None:
            # Of a file that is broken somewhere, a part was read.
            is_whole = part.start == part.stop == 0
            line = 0 if is_whole else part.stop + 1
            dropped.add(BadRecord(source.path, line, part.broken), is_left_out=source.is_found and is_whole)
        dropped.raise_errors()

    def _document(self, source: Source, number: int, item: Any, document_id: int) -> Document | BadRecord | str | None:
        """The document of an item; `"filtered"`, or None for an empty line."""
        record = _parse(source, number, item, self.format)
        if record is None or isinstance(record, BadRecord):
            return record
        if source.filter is not None and not source.filter.keeps(record):
            return "filtered"
        file, line = record_location(source, number)
        is_file = source.kind == "text"
        place = DocumentSource(source.public_name(file), None if is_file else line)
        document = self.format.document(record, document_id, place)
        if isinstance(document, str):
            return BadRecord(file, line, document)
        return replace(document, encoding=record["encoding"]) if is_file else document

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
        on_bad_record (`str`):
            `"skip"` keeps bad records in `bad`, and `"error"` raises a `ValueError` with those of a part at its end.
            Files of a folder that cannot be read are in `left_out` and are no errors.
    """

    on_bad_record: str
    bad: list[BadRecord] = field(default_factory=list)
    left_out: list[BadRecord] = field(default_factory=list)
    filtered: int = 0

    def __post_init__(self) -> None:
        if self.on_bad_record not in ("error", "skip"):
            raise ValueError(f"on_bad_record must be 'error' or 'skip', got {self.on_bad_record!r}")

    def add(self, record: BadRecord, is_left_out: bool = False) -> None:
        """Keeps a bad record, or a file that is left out and no error."""
        (self.left_out if is_left_out else self.bad).append(record)
        if len(self.bad) == 10 * _MAX_ERRORS:
            self.raise_errors()

    def raise_errors(self) -> None:
        """Raises the errors so far, if bad records are errors."""
        if self.bad and self.on_bad_record == "error":
            raise BadRecordsError(self.bad)


def errors_of_parts(reader: RecordReader, parts: Sequence[Part], found: BadRecordsError) -> BadRecordsError:
    """Adds the errors of later parts to those that were found, so that all are shown together."""
    records, number = found.records, 0
    for part in parts:
        try:
            for _ in reader.documents(part, Dropped("error")):
                number += 1
        except BadRecordsError as error:
            records = records + error.records
        if len(records) > _MAX_ERRORS or number > _MAX_RECORDS_FOR_ERRORS:
            break
    return BadRecordsError(records)


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
        errors: list[BadRecord] = []
        for index in range(state.process_index, len(sources), state.num_processes):
            try:
                cut[index] = _cut_source(sources[index], index, record_format, part_bytes, on_bad_record)[0]
            except BadRecordsError as error:
                errors += error.records
        errors = [error for mine in gather_object([errors]) for error in mine]
        if errors:
            raise BadRecordsError(errors)
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
    for item in scan_source(source, record_format):
        if isinstance(item, BadRecord):
            if on_bad_record == "error" and not (source.is_found and number == 0):
                raise BadRecordsError([item])
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
    elif source.kind == "csv":
        yield from read_csv(source.path, record_format.max_document_bytes, record_format.encoding)
    elif source.kind == "json":
        yield from read_json(source.path, record_format.max_document_bytes)
    else:
        names = [name for name in record_format.columns(source) if name in source.dataset.column_names]
        rows = source.dataset.select_columns(names)
        for first in range(start, len(rows), _ROWS):
            yield from rows.select(range(first, min(first + _ROWS, len(rows)))).to_list()


def _parse(source: Source, number: int, item: Any, record_format: RecordFormat) -> dict[str, Any] | BadRecord | None:
    """The record of an item of `_read_items`; `None` for an empty line."""
    if source.kind == "text":
        try:
            read = read_text_file(item, record_format.max_document_bytes, record_format.encoding)
        except Unreadable as error:
            return BadRecord(item, 1, str(error))
        return {record_format.text_column: read.text, "title": read.title, "encoding": read.encoding}
    if source.kind == "json" and not isinstance(item, dict):
        return BadRecord(source.path, number + 1, f"expected a JSON object, got {type(item).__name__}")
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
