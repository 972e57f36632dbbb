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
"""What kind of file a name says it is, and how its bytes are read"""

import io
from pathlib import Path

import pyarrow as pa


_KINDS = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
}
_PACKINGS = {".gz": "gzip", ".zst": "zstd"}
_READ_SIZE = 1 << 16


def file_type(path: str | Path) -> tuple[str, str | None]:
    """
    Reads the type of a file from the suffixes of its name, in capitals or not.

    Args:
        path (`str` or `Path`): The file, such as `"dump.JSON.gz"`.

    Returns:
        `tuple[str, str | None]`: the kind (`"jsonl"` for `.jsonl`, `.json` and `.ndjson`, `"csv"` for `.csv` and
        `.tsv`, `"parquet"`, or `"text"` for any other), and the packing (`"gzip"`, `"zstd"` or None).
    """
    return _KINDS.get(suffix_of(path), "text"), _PACKINGS.get(Path(path).suffix.lower())


def suffix_of(path: str | Path) -> str:
    """The last suffix of a file, in small letters and without that of its packing: `".rst"` for `"A.RST.gz"`."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in _PACKINGS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def bare_name(path: str | Path) -> str:
    """The name of a file without the suffixes that say its type: `"pairs"` for `"data/pairs.jsonl.gz"`."""
    name = Path(path).name
    for known in (_PACKINGS, _KINDS):
        if Path(name).suffix.lower() in known:
            name = Path(name).stem
    return name


def open_file(path: str, offset: int = 0) -> io.BufferedReader:
    """
    Opens a file for reading bytes, unpacked if its name says that it is packed.

    Args:
        path (`str`): The file.
        offset (`int`, *optional*, defaults to 0): Where to begin in a file that is not packed.
    """
    packing = file_type(path)[1]
    if packing is not None:
        return io.BufferedReader(pa.input_stream(path, compression=packing), _READ_SIZE)
    file = open(path, "rb", buffering=_READ_SIZE)  # noqa: SIM115 -- closed by the caller
    file.seek(offset)
    return file
