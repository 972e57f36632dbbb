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
"""Where the documents of a datastore come from: the tables in its folder `documents/`"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


# The columns of a table: one row for each document that has chunks. Tables of before have the first three.
SCHEMA = pa.schema(
    {
        "document_id": pa.int64(),
        "id": pa.string(),
        "chunks": pa.int64(),
        "path": pa.string(),
        "line": pa.int64(),
        "title": pa.string(),
        "encoding": pa.string(),
        "fields": pa.string(),  # JSON
    }
)


@dataclass(frozen=True)
class DocumentSource:
    """
    Where a document comes from.

    Args:
        path (`str`, *optional*):
            Its file, relative to the folder of the file or folder that was named as an input.
        line (`int`, *optional*): Its line or row, from 1, in a file of records.
        title (`str`, *optional*): Its title.
        id (`str`, *optional*): The user's own id of it.
        fields (`dict`, *optional*): The values of the keys that `keep_columns` named.
    """

    path: str | None = None
    line: int | None = None
    title: str | None = None
    id: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        place = self.id or (self.path if self.line is None else f"{self.path}:{self.line}") or "?"
        return f"{self.title} ({place})" if self.title else place

    def to_dict(self) -> dict[str, Any]:
        """The values that are known, for JSON."""
        return {name: value for name, value in asdict(self).items() if value not in (None, {})}


class DocumentTable:
    """
    The tables of the documents of a split, one for each shard of chunks. A shard may have none.

    Args:
        files (`Sequence[Path]`): The tables.
    """

    def __init__(self, files: Sequence[Path]):
        self._files = files
        self._read = lru_cache(maxsize=8)(_read_table)

    def sources(self, shards: Sequence[int], document_ids: Sequence[int]) -> list[DocumentSource | None]:
        """
        The sources of some documents.

        Args:
            shards (`Sequence[int]`): The shard of each document, -1 for none.
            document_ids (`Sequence[int]`): The document ids.

        Returns:
            `list[DocumentSource | None]`: `None` where nothing is known.
        """
        return [
            None if shard < 0 else self._source(self._files[shard], int(document))
            for shard, document in zip(shards, document_ids, strict=True)
        ]

    def _source(self, file: Path, document: int) -> DocumentSource | None:
        numbers, table = self._read(file)
        row = int(np.searchsorted(numbers, document))  # ascending within a shard
        if row == len(numbers) or numbers[row] != document:
            return None
        values = table.slice(row, 1).to_pylist()[0]
        fields = json.loads(values.get("fields") or "{}")
        found = {name: values.get(name) for name in ("path", "line", "title", "id")}
        return DocumentSource(**found, fields=fields) if any(found.values()) or fields else None


def _read_table(file: Path) -> tuple[np.ndarray, pa.Table]:
    if not file.is_file():
        return np.zeros(0, dtype=np.int64), SCHEMA.empty_table()
    try:
        table = pq.read_table(file)
    except pa.ArrowException as error:
        raise ValueError(f"{file} is damaged: {error}; `retro verify` names the way to remake it") from error
    return table["document_id"].to_numpy(), table
