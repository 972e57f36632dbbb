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
"""Writes the texts of a data set, such as WikiText, as lines `{"text": ...}` in one file for each split"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from datasets import IterableDataset
from tqdm.auto import tqdm

from modeling_retro.durable_files_retro import whole


def write_texts(
    splits: Mapping[str, IterableDataset],
    output_dir: str | os.PathLike,
    name: str = "wikitext",
    text_column: str = "text",
    longer_than: int = 100,
) -> dict[str, int]:
    """
    Writes each split to `{output_dir}/{name}_{split}.jsonl`, row by row. A file appears when it is complete.

    Args:
        splits (`Mapping[str, IterableDataset]`):
            The texts by the name of the split, such as an `IterableDatasetDict`.
        output_dir (`str` or `os.PathLike`):
            Folder of the files. It is created if it does not exist.
        name (`str`, *optional*, defaults to `"wikitext"`):
            First part of the names of the files.
        text_column (`str`, *optional*, defaults to `"text"`):
            Column that holds the text.
        longer_than (`int`, *optional*, defaults to 100):
            Only rows with more characters are written.

    Returns:
        `dict[str, int]`: the number of rows written for each split.

    Raises:
        `ValueError`: if a row has no text in `text_column`.
    """
    written = {}
    for split, rows in splits.items():
        path = Path(output_dir, f"{name}_{split}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        written[split] = 0
        with whole(path) as part, part.open("w", encoding="utf-8") as file:
            for number, row in enumerate(tqdm(rows, desc=path.name, unit=" rows")):
                text = row.get(text_column)
                if not isinstance(text, str):
                    raise ValueError(
                        f"row {number} of split {split} has {text!r} in column {text_column!r}, expected text; its "
                        f"columns are {', '.join(row)}: choose one by --text_column"
                    )
                if len(text) > longer_than:
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                    written[split] += 1
    return written
