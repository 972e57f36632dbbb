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
"""The inputs: files, folders, globs, datasets, and streams that are copied to a file first"""

import glob
import itertools
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import xxhash
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset, load_dataset, load_from_disk

from data_prep.file_types import file_type, suffix_of
from data_prep.shares import Follower
from data_prep.stage_files import process_state
from data_prep.tables import is_json_in_one_piece
from modeling_retro.datastore.manifest import SourceRecord
from modeling_retro.durable_files_retro import whole, write_json


# Prefix of the names of copied streams.
SPOOL = ".stream-"
_KNOWN = ".inputs.json"


@dataclass(frozen=True)
class Filter:
    """
    A condition on a key of a record.

    Args:
        expression (`str`): `KEY == JSON`, `KEY != JSON` or `KEY in JSON`, such as `meta.set == "Wikipedia (en)"`.
    """

    expression: str

    def __post_init__(self) -> None:
        self._parse()

    def __str__(self) -> str:
        return self.expression

    @property
    def key(self) -> str:
        """The key that the condition tests."""
        return self._parse()[0]

    def keeps(self, record: dict[str, Any]) -> bool:
        """Whether the condition holds for a record. A missing key counts as null."""
        key, operator, value = self._parse()
        found = lookup(record, key)[1]
        return found in value if operator == "in" else (found == value) == (operator == "==")

    @cache
    def _parse(self) -> tuple[str, str, Any]:
        for operator in ("==", "!=", " in "):
            key, separator, value = self.expression.partition(operator)
            if separator:
                try:
                    parsed = json.loads(value)
                except ValueError:
                    break
                if operator != " in " or isinstance(parsed, list):
                    return key.strip(), operator.strip(), parsed
        raise ValueError(
            'filter must look like `meta.set == "Wikipedia (en)"` or `meta.set in ["a", "b"]` (values in JSON), '
            f"got {self.expression!r}"
        )


def lookup(record: Any, key: str) -> tuple[bool, Any]:
    if isinstance(record, dict) and key in record:
        return True, record[key]
    head, dot, rest = key.partition(".")
    if dot and isinstance(record, dict) and head in record:
        return lookup(record[head], rest)
    return False, None


@dataclass(frozen=True)
class Source:
    """
    One file of records, or a list of text files that hold one document each.

    Args:
        kind (`str`): `"jsonl"`, `"json"`, `"csv"`, `"parquet"`, `"text"` or `"dataset"`.
        path (`str`): The file, or the name of a dataset in messages.
        files (`tuple[str, ...]`, *optional*): The files of a `"text"` source.
        dataset (`datasets.Dataset`, *optional*): The data of a `"dataset"` source.
        filter ([`Filter`], *optional*): Condition of the records to keep.
        folder (`str`, *optional*): Folder of this machine that paths in the manifest leave out.
        is_found (`bool`, *optional*, defaults to `False`):
            Whether the files were found in a folder or by a glob, and not named.
    """

    kind: str
    path: str
    files: tuple[str, ...] = ()
    dataset: Dataset | None = field(default=None, compare=False, repr=False)
    filter: "Filter | None" = None
    folder: str | None = field(default=None, compare=False)
    is_found: bool = field(default=False, compare=False)

    def public(self, path: str) -> str:
        """A path of this source, relative to the folder that is left out."""
        return path if self.folder is None else os.path.relpath(path, self.folder)

    def public_name(self, path: str) -> str | None:
        """A path that the datastore keeps. A copied stream and a dataset have none."""
        is_nameless = self.kind == "dataset" or Path(self.path).name.startswith(SPOOL)
        return None if is_nameless else self.public(path)

    def describe(self, known: dict[str, list] | None = None) -> SourceRecord:
        """
        The record for the manifest, by which a later run recognizes the input.

        Args:
            known (`dict`, *optional*):
                Hashes of files that were read before (see [`describe_sources`]), to which new ones are added.
        """
        if self.kind == "dataset":
            size = self.dataset.data.nbytes
        else:
            size = sum(Path(file).stat().st_size for file in self.files or (self.path,))
        # A copied stream is in the datastore, whose path may change.
        path = "-" if Path(self.path).name.startswith(SPOOL) else self.public(self.path)
        condition = self.filter and str(self.filter)
        record = {"kind": self.kind, "path": path, "bytes": size, "filter": condition}
        if self.kind != "dataset":  # whose name holds its fingerprint
            record["xxh3"] = self._hash({} if known is None else known)
        return SourceRecord.from_dict(record)

    def _hash(self, known: dict[str, list]) -> str:
        found = []
        for file in self.files or (self.path,):
            status = os.stat(file)
            state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
            key = xxhash.xxh3_128_hexdigest(os.path.abspath(file).encode())  # the datastore names no folders
            if known.get(key, [None])[:-1] != state:
                known[key] = [*state, _hash_of_file(file)]
            found.append(known[key][-1])
        return found[0] if len(found) == 1 else xxhash.xxh3_128_hexdigest(" ".join(found).encode())

    @property
    def seekable(self) -> bool:
        """Whether reading can start at any record without reading those before it."""
        return self.kind not in ("csv", "json") and not (self.kind == "jsonl" and file_type(self.path)[1] is not None)


def _hash_of_file(file: str) -> str:
    """A fast hash of the contents of a file: it tells edits apart, not forgeries."""
    digest = xxhash.xxh3_128()
    with open(file, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def describe_sources(sources: Sequence[Source], folder: Path) -> list[SourceRecord]:
    """
    Describes sources in the main process. A file is read, for its hash, once: `.inputs.json` in the datastore
    says what it was, until its size, its inode or the time of its last change is another.

    Args:
        sources (`Sequence[Source]`): The sources.
        folder (`Path`): The datastore.
    """
    records, state = [], process_state()
    if state.is_main_process or isinstance(state, Follower):
        file = (folder.parent if folder.name == ".next" else folder) / _KNOWN
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        before = dict(known)
        records = [source.describe(known).to_dict() for source in sources]
        if known != before and state.is_main_process:
            write_json(file, known)
    return [SourceRecord.from_dict(record) for record in broadcast_object_list([records])[0]]


def find_sources(
    inputs: str | Path | Dataset | Mapping[str, Any] | Sequence[str | Path | Dataset | Mapping[str, Any]],
    filter: str | None = None,
) -> list[Source]:
    """
    Finds the files of the inputs, in the order of the inputs. Within a folder or a glob they are sorted by path.

    Args:
        inputs (`str`, `Path`, `Dataset`, `Mapping` or a sequence of them):
            The inputs that the user named. A mapping has `path`, or the keys that [`open_dataset`] takes, and may have
            its own `filter`.
        filter (`str`, *optional*): The [`Filter`] of inputs that have none of their own.

    Raises:
        ValueError: If an input does not exist or holds no files.
    """
    if isinstance(inputs, (str, Path, Dataset, Mapping)):
        inputs = [inputs]
    sources: list[Source] = []
    for entry in inputs:
        condition = filter
        if isinstance(entry, Mapping):
            condition = entry.get("filter", filter)
            entry = entry["path"] if "path" in entry else open_dataset(entry)
        condition = None if condition is None else Filter(condition)
        if not isinstance(entry, Dataset) and (Path(entry) / "state.json").exists():
            entry = load_from_disk(str(entry))
        if isinstance(entry, Dataset):
            sources.append(Source("dataset", f"dataset {entry._fingerprint}", dataset=entry, filter=condition))
        else:
            sources += [replace(source, filter=condition) for source in _find_files(entry)]
    if not sources:
        raise ValueError("no inputs given")
    return sources


def open_dataset(entry: Mapping[str, Any]) -> Dataset | IterableDataset:
    """
    Loads a dataset from the Hub or from a folder.

    Args:
        entry (`Mapping`): `dataset` (name or path), and optionally `config`, `split` (`"train"`) and `streaming`.
    """
    known = {"dataset", "config", "split", "streaming", "filter"}
    if "dataset" not in entry or set(entry) - known:
        raise ValueError(f"an input must have `path` or `dataset`, and {', '.join(sorted(known))}; got {dict(entry)}")
    return load_dataset(
        entry["dataset"],
        entry.get("config"),
        split=entry.get("split", "train"),
        streaming=entry.get("streaming", False),
    )


def spool_streams(inputs: Any, folder: Path, name: str) -> Any:
    """
    Copies the inputs that can be read only once to files in `folder`, unless an interrupted run has already copied
    them.

    Args:
        inputs (`Any`): The inputs, as [`find_sources`] takes them. `"-"` is standard input (jsonl).
        folder (`Path`): The folder to copy to.
        name (`str`): Part of the names of the files.

    Returns:
        The inputs with these files in place of the streams.
    """
    entries = [inputs] if isinstance(inputs, (str, Path, Dataset, IterableDataset, Mapping)) else list(inputs)
    for number, entry in enumerate(entries):
        spool = folder / f"{SPOOL}{name}-{number}.jsonl"
        condition = entry.get("filter") if isinstance(entry, Mapping) else None
        if isinstance(entry, Mapping) and entry.get("streaming"):
            entry = open_dataset(entry)
        if not (entry == "-" or isinstance(entry, IterableDataset)):
            continue
        state = process_state()
        if state.is_main_process and not spool.exists():
            with whole(spool) as temporary, temporary.open("wb") as file:
                if entry == "-":
                    shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
                else:
                    for record in entry:
                        file.write(json.dumps(record, default=str).encode() + b"\n")
        state.wait_for_everyone()
        entries[number] = {"path": spool} if condition is None else {"path": spool, "filter": condition}
    return entries


def _find_files(entry: str | Path) -> list[Source]:
    path = Path(entry)
    # Paths in the manifest begin with the file or folder that was named, or with the first folder of a glob.
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    folder = os.path.dirname(os.path.abspath(Path(*fixed)))
    is_found = not path.is_file()
    if not is_found:
        files = [path]
    elif path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path))]
    else:
        files = [Path(name) for name in glob.glob(str(entry), recursive=True) if Path(name).is_file()]
    if not files:
        what = "no files in it" if path.is_dir() else "no such file, folder or glob"
        raise ValueError(f"input {entry}: {what}")
    sources, texts = [], []
    for file in sorted(files):
        kind = file_type(file)[0]
        if kind == "jsonl" and suffix_of(file) == ".json" and is_json_in_one_piece(str(file)):
            kind = "json"
        if kind == "text":
            texts.append(str(file))
        else:
            sources.append(Source(kind, str(file), folder=folder, is_found=is_found))
    if texts:
        sources.append(Source("text", str(entry), tuple(texts), folder=folder, is_found=is_found))
    return sources


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
