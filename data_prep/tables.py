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
"""Reads the records of files with columns: comma- and tab-separated values, and a JSON array in one piece"""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from data_prep.extraction import Unreadable
from data_prep.file_types import open_file, suffix_of
from data_prep.text_files import encoding_of


_SAMPLE = 1 << 20
_BEGINNING = 1 << 16
_DELIMITERS = ",;\t|"
# A JSON array is read at once. This is its largest size, in sizes of a document.
_MAX_DOCUMENTS = 20


def read_csv(path: str, max_bytes: int, encoding: str | None = None) -> Iterator[dict[str, str]]:
    """
    Reads a file of separated values with the names of its columns in the first line.

    Args:
        path (`str`): The file. Values of `.tsv` are separated by tabs, others by what the first line has most of:
            commas, semicolons, tabs or bars.
        max_bytes (`int`): Largest number of characters of a value.
        encoding (`str`, *optional*): Encoding of a file that is not UTF-8. By default it is guessed.

    Yields:
        `dict[str, str]`: the values of a row by column.

    Raises:
        Unreadable: If the encoding is not known, or a value is too long. Rows before that were yielded.
    """
    with open_file(path) as file:
        sample = file.read(_SAMPLE)
    if not sample.strip():
        raise Unreadable("empty")
    if len(sample) == _SAMPLE:
        sample = sample[: sample.rfind(b"\n") + 1] or sample
    encoding = encoding_of(sample, encoding)
    csv.field_size_limit(max_bytes)
    options = {"encoding": "utf-8-sig" if encoding == "utf-8" else encoding, "newline": ""}
    header = sample.decode(options["encoding"], errors="replace").split("\n", 1)[0]
    delimiter = "\t" if suffix_of(path) == ".tsv" else max(_DELIMITERS, key=header.count)
    with io.TextIOWrapper(open_file(path), **options) as text:
        rows = csv.DictReader(text, delimiter=delimiter)
        try:
            for row in rows:
                row.pop(None, None)  # values beyond the last column
                yield row
        except UnicodeDecodeError as error:
            raise Unreadable(f"not valid {encoding} after line {rows.line_num}; --encoding names it") from error
        except csv.Error as error:
            raise Unreadable(f"cannot be read after line {rows.line_num}: {error}") from error


def is_json_in_one_piece(path: str) -> bool:
    """Whether a file is one JSON value over many lines, and not one object on each line."""
    try:
        with open_file(path) as file:
            beginning = file.read(_BEGINNING).removeprefix(b"\xef\xbb\xbf").lstrip()
    except (OSError, pa.ArrowException):
        return False
    line, is_cut, _ = beginning.partition(b"\n")
    if beginning.startswith(b"["):
        return True
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return beginning.startswith(b"{") and bool(is_cut)
    return False


def read_json(path: str, max_bytes: int) -> list[Any]:
    """
    Reads a JSON file in one piece. An object counts as an array of one.

    Args:
        path (`str`): The file.
        max_bytes (`int`): Largest size of a document, of which the file may have 20.

    Raises:
        Unreadable: If the file is too large or not JSON.
    """
    limit = _MAX_DOCUMENTS * max_bytes
    with open_file(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise Unreadable(f"JSON in one piece of over {limit} bytes; write one object on each line (.jsonl) instead")
    try:
        found = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"not valid JSON: {error}") from error
    return found if isinstance(found, list) else [found]
