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
"""Public collections of pairs: a list of them, and a download that can be resumed"""

import csv
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import hf_hub_download


RECIPE_PATH = Path(__file__).parents[1] / "recipes" / "sentence_pairs.tsv"


def read_recipe(path: str | Path = RECIPE_PATH) -> dict[str, dict[str, str]]:
    """
    Reads a list of pair sets. It is a table with the tab-separated columns `name`, `pairs`, `weight` and `path`
    (dataset on the Hub and file).

    Args:
        path (`str`, *optional*):
            The list. Defaults to the one that comes with the package.

    Returns:
        `dict[str, dict[str, str]]`: the rows by name.
    """
    with open(path, encoding="utf-8", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file, delimiter="\t")}
    for name, row in rows.items():
        if None in row.values() or not row["path"].count("/") >= 2:
            raise ValueError(f"{path}: {name}: expected name, pairs, weight and path, separated by tabs, got {row}")
    return rows


def download_pairs(
    names: Sequence[str], output_dir: str | Path, recipe: str | Path = RECIPE_PATH, revision: str | None = None
) -> list[Path]:
    """
    Downloads pair sets. Existing files are not downloaded again, and an interrupted download is resumed.

    Args:
        names (`Sequence[str]`):
            Names from the recipe.
        output_dir (`str`):
            Folder for the files.
        recipe (`str`, *optional*):
            See [`read_recipe`].
        revision (`str`, *optional*):
            Revision of the dataset on the Hub.

    Returns:
        `list[Path]`: the files.
    """
    rows = read_recipe(recipe)
    unknown = sorted(set(names) - rows.keys())
    if unknown:
        raise ValueError(f"{recipe} has no set {', '.join(unknown)}; it has {', '.join(rows)}")
    files = []
    for name in names:
        owner, repository, filename = rows[name]["path"].split("/", 2)
        path = hf_hub_download(
            f"{owner}/{repository}", filename, repo_type="dataset", revision=revision, local_dir=output_dir
        )
        files.append(Path(path))
    return files
