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
Reads pairs of texts for training the retriever from jsonl files, the Hub, public collections or a datastore.

A pair set is a `datasets.Dataset` with the columns `anchor` and `positive`. It may have hard negatives `negative_1`,
`negative_2`, …, of which all rows have the same number. All of these may be tokenized, with names such as
`anchor_input_ids`. The columns `anchor_document_id`, `positive_document_id`, … are optional: with them, texts of one
document are not used as negatives of each other.
"""

import bisect
import csv
import io
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
import xxhash
from datasets import Dataset, Features, IterableDataset, Value
from transformers.utils import logging

from data_prep.file_types import file_type, open_file
from data_prep.pairs.records import EMPTY, LABELLED, MALFORMED, PairFormat


logger = logging.get_logger(__name__)

# Part of the fingerprints of cached tables. Raise it when the functions below make other rows from the same files.
_SCHEMA_VERSION = 2

_TEXT_COLUMN = re.compile(r"(anchor|positive|negative_[1-9][0-9]*)(_input_ids)?")
_OTHER_COLUMN = re.compile(r"(attention_mask|document_id)_.+|.+_(attention_mask|document_id)")

# What the column `left_out` of the rows of a file means
_REASONS = (None, LABELLED, EMPTY, MALFORMED)
_LEFT_OUT = {"left_out": Value("int8"), "file": Value("int32")}


def pair_columns(column_names: Sequence[str]) -> list[str]:
    """
    Returns the columns of a pair set that hold texts or their tokens.

    Args:
        column_names (`Sequence[str]`):
            All columns.

    Returns:
        `list[str]`: anchor, positive and hard negatives, in this order, such as `["anchor", "positive", "negative_1"]`
        or `["anchor_input_ids", "positive_input_ids"]`. Columns `input_ids_q1`, `input_ids_q2`, … with any suffixes
        mean the same in the order in which they come.

    Raises:
        `ValueError`: if a column is missing, or if only some of them are tokenized.
    """
    suffixed = [name for name in column_names if name.startswith("input_ids_")]
    if len(suffixed) > 1 and not any(map(_TEXT_COLUMN.fullmatch, column_names)):
        return suffixed
    matches = [match for match in map(_TEXT_COLUMN.fullmatch, column_names) if match]
    suffixes = {match[2] or "" for match in matches}
    names = {match[1] for match in matches}
    expected = ["anchor", "positive", *(f"negative_{number}" for number in range(1, len(names) - 1))]
    if names != set(expected) or len(suffixes) != 1:
        raise ValueError(
            f"the columns are {', '.join(column_names)}; expected `anchor`, `positive` and, without a gap, "
            "`negative_1`, `negative_2`, …, or all of these tokenized: `anchor_input_ids`, …, or two or more columns "
            "`input_ids_q1`, `input_ids_q2`, …"
        )
    suffix = suffixes.pop()
    return [name + suffix for name in expected]


def hash_texts(texts: Sequence[str | Sequence[int]]) -> np.ndarray:
    """
    Hashes texts or sequences of tokens. The hashes are the same in every process.

    Args:
        texts (`Sequence[str]` or `Sequence[Sequence[int]]`):
            Texts or token ids.

    Returns:
        `np.ndarray`: int64 `[len(texts)]`. Equal texts have equal hashes, and different texts with probability 2⁻⁶⁴.
    """
    data = (
        text.encode("utf-8", "surrogatepass") if isinstance(text, str) else np.asarray(text, dtype=np.int64).tobytes()
        for text in texts
    )
    return np.fromiter(map(xxhash.xxh3_64_intdigest, data), dtype=np.uint64, count=len(texts)).view(np.int64)


def _hash_batch(batch: Mapping[str, list], version: int) -> dict[str, np.ndarray]:
    return {name: hash_texts(texts) for name, texts in batch.items()}


def hash_pairs(dataset: Dataset, num_proc: int | None = None) -> np.ndarray:
    """
    Hashes the texts of a pair set with [`hash_texts`].

    Args:
        dataset (`datasets.Dataset`):
            A pair set.
        num_proc (`int`, *optional*):
            Number of worker processes.

    Returns:
        `np.ndarray`: int64 `[rows, columns]`.
    """
    columns = pair_columns(dataset.column_names)
    hashes = dataset.select_columns(columns).map(
        _hash_batch,
        batched=True,
        batch_size=10_000,
        features=Features({name: Value("int64") for name in columns}),
        fn_kwargs={"version": _SCHEMA_VERSION},
        num_proc=num_proc,
        desc="Hashing texts",
    )
    return np.stack([hashes.data.column(name).to_numpy() for name in columns], axis=1)


# ---------------------------------------------------------------------------------------------------------------------
# Files, and datasets with other columns
# ---------------------------------------------------------------------------------------------------------------------


def _pair_features(num_negatives: int) -> Features:
    names = ["anchor", "positive", *(f"negative_{number}" for number in range(1, num_negatives + 1))]
    return Features({name: Value("string") for name in names})


def _rows_of(record: Any, record_format: PairFormat, num_negatives: int) -> list[dict[str, Any]]:
    """The rows of a record: its pairs, or one row with the reason why there is none."""
    pairs, negatives, reason = record_format.read(record)
    names = list(_pair_features(num_negatives))
    if reason is not None:
        return [{**dict.fromkeys(names, ""), "left_out": _REASONS.index(reason)}]
    if len(negatives) < num_negatives:
        raise ValueError(
            f"expected {num_negatives} hard negatives as in the first record, got {len(negatives)}; set num_negatives "
            "to the smallest number there is"
        )
    rows = []
    for anchor, positive in pairs:
        texts = [anchor, positive, *negatives[:num_negatives]]
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"expected a text that is not empty, got {text!r}")
        rows.append({**dict(zip(names, texts, strict=True)), "left_out": 0})
    return rows


def _read_records(path: str, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Any]]:
    """Yields the number, from 1, and the bytes of each line of a part of a file, or each row of a table as `dict`."""
    number = start
    try:
        with open_file(path) as file:
            if file_type(path)[0] == "csv":
                tab = ".tsv" in (suffix.lower() for suffix in Path(path).suffixes)
                rows = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter="\t" if tab else ",")
                for row in rows:
                    number = rows.line_num
                    yield number, row
                return
            for number, line in enumerate(itertools.islice(file, start, stop), start=start + 1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}:{number + 1}: {error}") from error


def _parse(record: Any) -> Any:
    if isinstance(record, dict) and None in record:
        raise ValueError(f"the row has {len(record[None])} cells more than there are columns")
    return json.loads(record) if isinstance(record, bytes) else record


def _read_rows(
    parts: Sequence[tuple], record_format: PairFormat, num_negatives: int, skip_bad_lines: bool, **stamps: Any
) -> Iterator[dict]:
    """
    Yields the rows of parts (number of the file, path, first line, end, form) of files. `stamps` are not read: they
    distinguish states of the files in the cache.
    """
    for file, path, start, stop, form in parts:
        for number, record in _read_records(path, start, stop):
            try:
                record = _parse(record)
                found = record_format.form(record)
                if found != form:
                    raise ValueError(f"this record has the form {_named(found)}, the ones before have {_named(form)}")
                rows = _rows_of(record, record_format, num_negatives)
            except (ValueError, KeyError, TypeError, IndexError) as error:
                message = f"{path}:{number}: not a pair: {error}"
                if not skip_bad_lines:
                    raise ValueError(message) from error
                logger.warning("skipped %s", message)
                malformed = _REASONS.index(MALFORMED)
                rows = [{**dict.fromkeys(_pair_features(num_negatives), ""), "left_out": malformed}]
            for row in rows:
                yield {**row, "file": file}


def _named(form: tuple[tuple[str, ...], str | None]) -> str:
    keys, label = form
    return "/".join(sorted(keys)) + (f" with {label}" if label else "")


def _stream_rows(parts: Sequence[tuple], **options: Any) -> Iterator[dict]:
    """Yields the pairs of whole files, and counts the records without any at the end of each file."""
    for part in parts:
        counts = np.zeros(len(_REASONS), dtype=np.int64)
        for row in _read_rows([part], **options):
            left_out = row.pop("left_out")
            counts[left_out] += 1
            if not left_out:
                del row["file"]
                yield row
        _report_left_out(counts, part[1])


def _report_left_out(counts: np.ndarray, source: str) -> None:
    """Says how many records of a source gave no pair. Raises a `ValueError` if none gave one."""
    found = [f"{number} {reason}" for number, reason in zip(counts, _REASONS, strict=True) if reason and number]
    if not counts[0]:
        raise ValueError(f"{source} holds no pair: of its records, {', '.join(found) or '0 could be read'}")
    if found:
        logger.warning("%s gives %d pairs; left out: %s", source, counts[0], ", ".join(found))


def _without_left_out(dataset: Dataset, sources: Sequence[str]) -> Dataset:
    """Removes the rows that are no pairs, and says how many there were in each source."""
    left_out, files = (dataset.data.column(name).to_numpy() for name in ("left_out", "file"))
    counts = np.zeros((len(sources), len(_REASONS)), dtype=np.int64)
    np.add.at(counts, (files, left_out), 1)
    for source, numbers in zip(sources, counts, strict=True):
        _report_left_out(numbers, source)
    dataset = dataset.remove_columns(["left_out", "file"])
    return dataset.select(np.flatnonzero(left_out == 0)) if left_out.any() else dataset


def _first_record(path: str, record_format: PairFormat, skip_bad_lines: bool) -> tuple[tuple, int]:
    """The form of the first record of a file, and the number of its hard negatives."""
    for number, record in _read_records(path):
        try:
            record = _parse(record)
            return record_format.form(record), len(record_format.read(record)[1])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            if not skip_bad_lines:
                raise ValueError(f"{path}:{number}: not a pair: {error}") from error
    raise ValueError(f"{path} holds no pair")


def keep_positives(dataset: Dataset | IterableDataset, record_format: PairFormat | None = None):
    """
    Removes the rows of a pair set whose label says that their texts do not belong together. A warning counts them.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            A pair set, which may have a label (see [`~data_prep.pairs.records.PairFormat`]).
        record_format ([`~data_prep.pairs.records.PairFormat`], *optional*):
            Says which column is the label, and what it means.

    Returns:
        A dataset of the same kind. Without a label it is `dataset`.

    Raises:
        `ValueError`: if a label is unclear, or no row is left.
    """
    record_format = record_format or PairFormat()
    label = record_format.label_of(dataset.column_names)
    if label is None:
        return dataset
    kept = dataset.filter(
        _is_positive, input_columns=[label], fn_kwargs={"record_format": record_format, "name": label}
    )
    if isinstance(dataset, Dataset):
        _report_left_out(np.array([len(kept), len(dataset) - len(kept), 0, 0]), "the dataset")
    return kept


def _is_positive(value: Any, record_format: PairFormat, name: str) -> bool:
    return record_format.is_positive(value, name)


def _as_pairs(dataset: Dataset | IterableDataset, record_format: PairFormat, num_negatives: int | None):
    """Turns a dataset into a pair set, by renaming its columns or by reading its records."""
    names, columns = list(dataset.column_names), record_format.columns
    if columns is not None:
        if len(columns) < 2 or not set(columns) <= set(names):
            raise ValueError(
                f"columns are {', '.join(columns)}; expected an anchor, a positive and hard negatives out of "
                f"{', '.join(names)}"
            )
        new_names = list(_pair_features(len(columns) - 2))
        dataset = keep_positives(dataset, record_format).select_columns(list(columns))
        return dataset.rename_columns(dict(zip(columns, new_names, strict=True)))
    is_tokenized = any(name.startswith("input_ids_") for name in names)
    if is_tokenized or any(map(_TEXT_COLUMN.fullmatch, names)) and {"anchor", "negative"} - set(names):
        others = [name for name in names if _OTHER_COLUMN.fullmatch(name)]
        return keep_positives(dataset, record_format).select_columns(pair_columns(names) + others)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("the dataset has no rows")
    try:
        num_negatives = len(record_format.read(first)[1]) if num_negatives is None else num_negatives
    except ValueError as error:
        raise ValueError(
            f"the dataset has the columns {', '.join(names)}; say which hold anchor, positive and hard negatives "
            f"(`columns`): {error}"
        ) from error
    is_stream = isinstance(dataset, IterableDataset)
    features = _pair_features(num_negatives)
    dataset = dataset.map(
        _rows_of_batch,
        batched=True,
        remove_columns=names,
        features=features if is_stream else Features(features | _LEFT_OUT),
        fn_kwargs={
            "record_format": record_format,
            "num_negatives": num_negatives,
            "keep_left_out": not is_stream,
            "version": _SCHEMA_VERSION,
        },
    )
    return dataset if is_stream else _without_left_out(dataset, ["the dataset"])


def _rows_of_batch(
    batch: Mapping[str, list], record_format: PairFormat, num_negatives: int, keep_left_out: bool, version: int
) -> dict[str, list]:
    records = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    rows = [row for record in records for row in _rows_of(record, record_format, num_negatives)]
    if keep_left_out:
        return {name: [row[name] for row in rows] for name in rows[0]} | {"file": [0] * len(rows)}
    return {name: [row[name] for row in rows if not row["left_out"]] for name in _pair_features(num_negatives)}


def _parts(path: str, number: int) -> list[tuple[int, int | None]]:
    """Cuts the lines of a file into equal parts (first line, end). A table is one part."""
    if number == 1 or file_type(path)[0] != "jsonl":
        return [(0, None)]
    with open_file(path) as file:
        lines = sum(1 for _ in file)
    bounds = [lines * part // number for part in range(number + 1)]
    return [(start, stop) for start, stop in itertools.pairwise(bounds) if stop > start]


def load_pairs(
    source: str | Path | Sequence[str | Path],
    columns: Sequence[str] | None = None,
    split: str = "train",
    revision: str | None = None,
    num_negatives: int | None = None,
    skip_bad_lines: bool = False,
    num_proc: int | None = None,
    streaming: bool = False,
    label_column: str | None = None,
    min_score: float | None = None,
) -> Dataset | IterableDataset:
    """
    Reads a pair set. Records that give no pair (a label of 0, no positive) are left out, and a warning counts them.

    Args:
        source (`str` or `Sequence[str]`):
            Files of records `.jsonl`, `.json`, `.ndjson`, `.csv` or `.tsv`, packed (`.gz`, `.zst`) or not; or one
            folder of `save_to_disk`, or one dataset that `load_dataset` knows. All records of a file have the same
            form: `["anchor", "positive"(, "negative", …)]`, `{"set": […]}`, `{"query": …, "pos": […], "neg": […]}`,
            `{"anchor": …, "positive": …, "negative": …}`, or one of the other names of two texts, such as
            `sentence1` and `sentence2`. Each may have a label: `label`, `labels`, `is_duplicate`, `score` or `scores`.
        columns (`Sequence[str]`, *optional*):
            Names of the columns of the anchor, the positive and the hard negatives, for records with other names.
        split (`str`, *optional*, defaults to `"train"`), revision (`str`, *optional*):
            Passed to `load_dataset`.
        num_negatives (`int`, *optional*):
            Number of hard negatives. Defaults to that of the first record. A record with fewer is an error.
        skip_bad_lines (`bool`, *optional*, defaults to `False`):
            Whether to leave out malformed lines, with a warning for each.
        num_proc (`int`, *optional*):
            Number of processes that read files. They share the lines of each file.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to return a `datasets.IterableDataset`. The workers of a `DataLoader` share its files.
        label_column (`str`, *optional*):
            Name of the label, if it has another one.
        min_score (`float`, *optional*):
            The lowest label or score of two texts that belong together. By default a label must be 0 or 1, and a
            graded score is refused.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: columns `anchor`, `positive`, `negative_1`, …

    Raises:
        `ValueError`: if a record is not a pair or has an unclear label. The message names the file and the line. Or if
            a file holds no pair at all.
    """
    sources = [str(source)] if isinstance(source, (str, Path)) else [str(item) for item in source]
    record_format = PairFormat(None if columns is None else tuple(columns), label_column, min_score)
    if not any(_is_file_of_records(item) for item in sources):
        if len(sources) != 1:
            raise ValueError(f"expected one dataset or files of records such as .jsonl, got {', '.join(sources)}")
        if (Path(sources[0]) / "state.json").is_file():
            dataset = datasets.load_from_disk(sources[0])
        else:
            dataset = datasets.load_dataset(sources[0], split=split, revision=revision, streaming=streaming)
        return _as_pairs(dataset, record_format, num_negatives)

    for path in sources:
        if not _is_file_of_records(path) or not Path(path).is_file():
            raise ValueError(f"{path} is not a file of records: .jsonl, .json, .ndjson, .csv or .tsv, or one of .gz")
    firsts = [_first_record(path, record_format, skip_bad_lines) for path in sources]
    num_negatives = firsts[0][1] if num_negatives is None else num_negatives
    features = _pair_features(num_negatives)
    workers = 1 if streaming else num_proc or 1
    states = [Path(path).stat() for path in sources]
    arguments = {
        # The list is distributed over the workers.
        "parts": [
            (number, path, *part, form)
            for number, (path, (form, _)) in enumerate(zip(sources, firsts, strict=True))
            for part in _parts(path, workers)
        ],
        "record_format": record_format,
        "num_negatives": num_negatives,
        "skip_bad_lines": skip_bad_lines,
        # Only a part of the fingerprint. These are tuples, because lists would be distributed over the workers.
        "states": tuple((state.st_size, state.st_mtime_ns) for state in states),
        "version": _SCHEMA_VERSION,
    }
    if streaming:
        return IterableDataset.from_generator(_stream_rows, features=features, gen_kwargs=arguments)
    workers = min(workers, len(arguments["parts"]))
    try:
        dataset = Dataset.from_generator(
            _read_rows,
            features=Features(features | _LEFT_OUT),
            gen_kwargs=arguments,
            num_proc=workers if workers > 1 else None,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(str(error.__cause__ or error)) from error
    return _without_left_out(dataset, sources)


def _is_file_of_records(path: str) -> bool:
    return file_type(path)[0] in ("jsonl", "csv")


class PairMixture(torch.utils.data.Dataset):
    """
    Joins several pair sets, for batches that each come from one set ([`NoDuplicatesBatchSampler`]).

    Args:
        sets (`dict[str, datasets.Dataset]`):
            The pair sets by name. The numbers of their hard negatives may differ.
        weights (`dict[str, float]`, *optional*):
            Relative numbers of batches of the sets. Defaults to their numbers of pairs.
    """

    def __init__(self, sets: Mapping[str, Dataset], weights: Mapping[str, float] | None = None):
        weights = {name: float(len(pairs)) for name, pairs in sets.items()} if weights is None else dict(weights)
        if not sets or weights.keys() != sets.keys() or min(weights.values()) <= 0:
            raise ValueError(f"expected a positive weight for each of the sets {sorted(sets)}, got {weights}")
        self.sets = dict(sets)
        total = sum(weights.values())
        self.weights = [weights[name] / total for name in self.sets]
        self.offsets = [0, *itertools.accumulate(len(pairs) for pairs in self.sets.values())]

    def __len__(self) -> int:
        return self.offsets[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        number = bisect.bisect_right(self.offsets, indices[0]) - 1
        offset = self.offsets[number]
        pairs = list(self.sets.values())[number]
        return pairs.__getitems__([index - offset for index in indices])
