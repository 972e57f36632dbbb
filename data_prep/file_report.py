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
"""A table of what was read: by suffix, the files that were taken, and those that were left out and why"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import pyarrow.parquet as pq

from data_prep.file_types import suffix_of
from modeling_retro.datastore.manifest import SplitRecord
from modeling_retro.datastore.splits import split_path


_REASONS_SHOWN = 3


def format_files(
    taken: Iterable[tuple[str | None, str | None]], left_out: Iterable[tuple[str, str]], listed_in: str
) -> str | None:
    """
    Formats the table.

    Args:
        taken (`Iterable[tuple[str | None, str | None]]`):
            File and encoding, `None` for UTF-8, of each document. A document without a file does not count.
        left_out (`Iterable[tuple[str, str]]`): File and reason of each file or record that was left out.
        listed_in (`str`): Where each of these is listed.

    Returns:
        `str`: the table, or None if it would say nothing: one suffix, in UTF-8, and nothing left out.
    """
    files: dict[str, dict[str, str | None]] = defaultdict(dict)
    documents: Counter[str] = Counter()
    for file, encoding in taken:
        if file is not None:
            suffix = suffix_of(file) or "(none)"
            files[suffix][file] = encoding
            documents[suffix] += 1
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for file, reason in left_out:
        reasons[suffix_of(file) or "(none)"][reason] += 1
    encodings = {
        suffix: Counter(name for name in of_files.values() if name is not None) for suffix, of_files in files.items()
    }
    if len(files) < 2 and not reasons and not any(encodings.values()):
        return None
    lines = [f"{'suffix':<10}{'files':>8}{'documents':>11}{'left out':>10}"]
    for suffix in sorted({*files, *reasons}):
        why = reasons[suffix]
        line = f"{suffix:<10}{len(files[suffix]):>8}{documents[suffix]:>11}{why.total():>10}"
        found = encodings.get(suffix, Counter()).most_common()
        notes = [f"{number} {name.replace('_', '-')}" for name, number in found]
        notes += [f"{number} × {reason[:100]}" for reason, number in why.most_common(_REASONS_SHOWN)]
        notes += ["…"] if len(why) > _REASONS_SHOWN else []
        lines.append(f"{line}  {'; '.join(notes)}".rstrip())
    if reasons:
        lines.append(f"What was left out is listed in {listed_in}.")
    return "\n".join(lines)


def files_of_split(path: Path, split: str, record: SplitRecord) -> str | None:
    """The table of a split of a datastore, from the tables of its documents and from its quarantine."""
    root = split_path(path, split)
    taken, left_out = [], []
    for shard in record.chunk_shards:
        table = root / "documents" / f"{shard.name}.parquet"
        if table.is_file() and {"path", "encoding"} <= set(pq.read_schema(table).names):
            columns = pq.read_table(table, columns=["path", "encoding"]).to_pydict()
            taken += zip(columns["path"], columns["encoding"], strict=True)
        quarantine = root / "quarantine" / f"{shard.name}.jsonl"
        if quarantine.is_file():
            bad = [json.loads(line) for line in quarantine.read_text(encoding="utf-8").splitlines()]
            left_out += [(record["file"], record["reason"]) for record in bad]
    return format_files(taken, left_out, f"{root / 'quarantine'}")
