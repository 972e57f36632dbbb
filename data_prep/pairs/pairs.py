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
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import xxhash
from datasets import Dataset, Features, IterableDataset, Value
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Part of the fingerprints of cached tables. Raise it when the functions below make other rows from the same files.
_SCHEMA_VERSION = 1

_TEXT_COLUMN = re.compile(r"(anchor|positive|negative_[1-9][0-9]*)(_input_ids)?")


def pair_columns(column_names: Sequence[str]) -> list[str]:
    """
    Returns the columns of a pair set that hold texts or their tokens.

    Args:
        column_names (`Sequence[str]`):
            All columns.

    Returns:
        `list[str]`: anchor, positive and hard negatives, in this order, such as `["anchor", "positive", "negative_1"]`
        or `["anchor_input_ids", "positive_input_ids"]`.

    Raises:
        `ValueError`: if a column is missing, or if only some of them are tokenized.
    """
    matches = [match for match in map(_TEXT_COLUMN.fullmatch, column_names) if match]
    suffixes = {match[2] or "" for match in matches}
    names = {match[1] for match in matches}
    expected = ["anchor", "positive", *(f"negative_{number}" for number in range(1, len(names) - 1))]
    if names != set(expected) or len(suffixes) != 1:
        raise ValueError(
            f"the columns are {', '.join(column_names)}; expected `anchor`, `positive` and, without a gap, "
            "`negative_1`, `negative_2`, …, or all of these tokenized: `anchor_input_ids`, …"
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
# Records of files and of datasets with other columns
# ---------------------------------------------------------------------------------------------------------------------


def _form(record: Any) -> str:
    """The name of the form of a record, by which a file is checked to have only one form."""
    if isinstance(record, list):
        return "list"
    if isinstance(record, dict):
        for form in ({"set"}, {"query", "pos"}, {"anchor", "positive"}, {"questions", "is_duplicate"}):
            if form <= record.keys():
                return "/".join(sorted(form))
    raise ValueError(
        'expected ["a", "b"], {"set": […]}, {"query": …, "pos": […], "neg": […]}, {"anchor": …, "positive": …} or '
        f'{{"questions": …, "is_duplicate": …}}, got {json.dumps(record, ensure_ascii=False)[:80]}'
    )


def _texts_of(record: Any) -> tuple[list[tuple[str, str]], list[str]]:
    """The pairs (anchor, positive) and the hard negatives of a record of any form."""
    form = _form(record)
    if form == "list":
        if len(record) < 2:
            raise ValueError(f"expected an anchor and a positive, got a list of {len(record)}")
        return [(record[0], record[1])], list(record[2:])
    if form == "set":
        # All pairs share the first text, so that no text of the set becomes a negative of another.
        if len(record["set"]) < 2:
            raise ValueError(f"expected a set of at least 2 texts, got {len(record['set'])}")
        return [(record["set"][0], other) for other in record["set"][1:]], []
    if form == "pos/query":
        positives, negatives = record["pos"], record.get("neg", [])
        positives = [positives] if isinstance(positives, str) else positives
        return [(record["query"], positive) for positive in positives], (
            [negatives] if isinstance(negatives, str) else list(negatives)
        )
    if form == "is_duplicate/questions":
        questions = record["questions"]
        texts = questions["text"] if isinstance(questions, dict) else questions
        return ([(texts[0], texts[1])] if int(record["is_duplicate"]) else []), []
    names = [name for name in record if name.startswith("negative")]
    names.sort(key=lambda name: int(name.rpartition("_")[2]) if "_" in name else 0)
    return [(record["anchor"], record["positive"])], [record[name] for name in names]


def _rows_of(record: Any, num_negatives: int) -> Iterator[dict[str, str]]:
    pairs, negatives = _texts_of(record)
    if pairs and len(negatives) < num_negatives:
        raise ValueError(
            f"expected {num_negatives} hard negatives as in the first record, got {len(negatives)}; set num_negatives "
            "to the smallest number there is"
        )
    for anchor, positive in pairs:
        texts = [anchor, positive, *negatives[:num_negatives]]
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"expected a text that is not empty, got {text!r}")
        names = ["anchor", "positive", *(f"negative_{number}" for number in range(1, num_negatives + 1))]
        yield dict(zip(names, texts, strict=True))


def _read_lines(path: str) -> Iterator[tuple[int, str]]:
    opener = gzip.open if path.endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}:{number + 1}: {error}") from error


def _read_rows(files: Sequence[str], num_negatives: int, skip_bad_lines: bool, **stamps: Any) -> Iterator[dict]:
    """Yields the rows of jsonl files. `stamps` are not read: they distinguish states of the files in the cache."""
    for path in files:
        form = None
        for number, line in _read_lines(path):
            try:
                record = json.loads(line)
                form = form or _form(record)
                if _form(record) != form:
                    raise ValueError(f"this record has the form {_form(record)}, the ones before have {form}")
                rows = list(_rows_of(record, num_negatives))
            except (ValueError, KeyError, TypeError, IndexError) as error:
                message = f"{path}:{number}: not a pair: {error}"
                if not skip_bad_lines:
                    raise ValueError(message) from error
                logger.warning("skipped %s", message)
                continue
            yield from rows


def _count_negatives(path: str, skip_bad_lines: bool) -> int:
    """Number of hard negatives of the first record of a file."""
    for number, line in _read_lines(path):
        try:
            return len(_texts_of(json.loads(line))[1])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            if not skip_bad_lines:
                raise ValueError(f"{path}:{number}: not a pair: {error}") from error
    raise ValueError(f"{path} holds no pairs")


def _as_pairs(dataset: Dataset | IterableDataset, columns: Sequence[str] | None, num_negatives: int | None):
    """Turns a dataset into a pair set, by renaming its columns or by reading its records."""
    names = list(dataset.column_names)
    if columns is not None:
        if len(columns) < 2 or not set(columns) <= set(names):
            raise ValueError(
                f"columns are {', '.join(columns)}; expected an anchor, a positive and hard negatives out of "
                f"{', '.join(names)}"
            )
        new_names = ["anchor", "positive", *(f"negative_{number}" for number in range(1, len(columns) - 1))]
        return dataset.select_columns(list(columns)).rename_columns(dict(zip(columns, new_names, strict=True)))
    if any(_TEXT_COLUMN.fullmatch(name) for name in names) and "negative" not in names:
        documents = [name for name in names if name.endswith(("_document_id", "_attention_mask"))]
        return dataset.select_columns(pair_columns(names) + documents)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("the dataset has no rows")
    try:
        num_negatives = len(_texts_of(first)[1]) if num_negatives is None else num_negatives
    except ValueError as error:
        raise ValueError(
            f"the dataset has the columns {', '.join(names)}; say which hold anchor, positive and hard negatives "
            "(`columns`)"
        ) from error
    return dataset.map(
        _rows_of_batch,
        batched=True,
        remove_columns=names,
        fn_kwargs={"num_negatives": num_negatives, "version": _SCHEMA_VERSION},
    )


def _rows_of_batch(batch: Mapping[str, list], num_negatives: int, version: int) -> dict[str, list[str]]:
    records = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    rows = [row for record in records for row in _rows_of(record, num_negatives)]
    names = ["anchor", "positive", *(f"negative_{number}" for number in range(1, num_negatives + 1))]
    return {name: [row[name] for row in rows] for name in names}


def load_pairs(
    source: str | Path | Sequence[str | Path],
    columns: Sequence[str] | None = None,
    split: str = "train",
    revision: str | None = None,
    num_negatives: int | None = None,
    skip_bad_lines: bool = False,
    num_proc: int | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """
    Reads a pair set.

    Args:
        source (`str` or `Sequence[str]`):
            Files `.jsonl` or `.jsonl.gz`, one folder of `save_to_disk`, or one dataset that `load_dataset` knows and
            that has columns of these names. All lines of a file have the same form: `["anchor", "positive"(,
            "negative", …)]`, `{"set": […]}`, `{"query": …, "pos": […], "neg": […]}`, `{"anchor": …, "positive": …,
            "negative": …}`, or `{"questions": …, "is_duplicate": …}`, of which only the duplicates are kept.
        columns (`Sequence[str]`, *optional*):
            Names of the columns of the anchor, the positive and the hard negatives, for datasets with other names.
        split (`str`, *optional*, defaults to `"train"`), revision (`str`, *optional*):
            Passed to `load_dataset`.
        num_negatives (`int`, *optional*):
            Number of hard negatives. Defaults to that of the first record. A record with fewer is an error.
        skip_bad_lines (`bool`, *optional*, defaults to `False`):
            Whether to leave out malformed lines, with a warning for each.
        num_proc (`int`, *optional*):
            Number of processes that read files.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to return a `datasets.IterableDataset`. The workers of a `DataLoader` share its files.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: columns `anchor`, `positive`, `negative_1`, …

    Raises:
        `ValueError`: if a line is not a pair. The message names the file and the line.
    """
    sources = [str(source)] if isinstance(source, (str, Path)) else [str(item) for item in source]
    if not any(item.endswith((".jsonl", ".jsonl.gz")) for item in sources):
        if len(sources) != 1:
            raise ValueError(f"expected one dataset or files .jsonl or .jsonl.gz, got {', '.join(sources)}")
        if (Path(sources[0]) / "state.json").is_file():
            dataset = datasets.load_from_disk(sources[0])
        else:
            dataset = datasets.load_dataset(sources[0], split=split, revision=revision, streaming=streaming)
        return _as_pairs(dataset, columns, num_negatives)

    for path in sources:
        if not path.endswith((".jsonl", ".jsonl.gz")) or not Path(path).is_file():
            raise ValueError(f"{path} is not a file .jsonl or .jsonl.gz")
    if num_negatives is None:
        num_negatives = _count_negatives(sources[0], skip_bad_lines)
    names = ["anchor", "positive", *(f"negative_{number}" for number in range(1, num_negatives + 1))]
    features = Features({name: Value("string") for name in names})
    states = [Path(path).stat() for path in sources]
    arguments = {
        "files": sources,
        "num_negatives": num_negatives,
        "skip_bad_lines": skip_bad_lines,
        # Only a part of the fingerprint. These are tuples, because lists would be distributed over the workers.
        "states": tuple((state.st_size, state.st_mtime_ns) for state in states),
        "version": _SCHEMA_VERSION,
    }
    if streaming:
        return IterableDataset.from_generator(_read_rows, features=features, gen_kwargs=arguments)
    try:
        return Dataset.from_generator(
            _read_rows,
            features=features,
            gen_kwargs=arguments,
            num_proc=min(num_proc or 1, len(sources)) if len(sources) > 1 else None,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(str(error.__cause__ or error)) from error


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
