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
"""Symbolic links in a datastore. One that leads out of it would let a stranger's datastore name the user's files."""

import os
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants


def outward_links(path: Path) -> Iterator[tuple[Path, Path]]:
    """
    Finds the symbolic links of a datastore that lead out of it. A download in the cache of the Hub consists of links
    to the files of that cache, which are no such links.

    Args:
        path (`Path`): The datastore.

    Returns:
        `Iterator[tuple[Path, Path]]`: each link and where it leads, as they are found.
    """
    folder = path.resolve()
    if folder.is_relative_to(Path(constants.HF_ASSETS_CACHE).resolve()):
        return  # made by `download_datastore`, which verified each file
    inside = folder
    if folder.name == ".next":  # the version that is being made shares the files of the current one
        inside = folder.parent
    elif folder.parent.name == "snapshots":
        inside = folder.parent.parent
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            link = Path(root, name)
            if link.is_symlink() and not (target := link.resolve()).is_relative_to(inside):
                yield path / link.relative_to(folder), target


def check_links(path: Path) -> None:
    """Raises a `ValueError` that names the first symbolic link of a datastore that leads out of it."""
    for link, target in outward_links(path):
        raise ValueError(
            f"{link} is a symbolic link to {target}, outside the datastore; put the files there, or remove it"
        )


__all__ = ["check_links", "outward_links"]
