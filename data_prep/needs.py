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
"""What the inputs of a datastore need of the machine: a library that reads them, and room on the disk"""

import importlib.util
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.extraction import FORMATS
from data_prep.file_types import file_type, suffix_of
from data_prep.plan import human_bytes, plan_datastore
from data_prep.sources import Source


# Rather too few tokens than too many: a datastore that would fit is not refused.
_BYTES_PER_TOKEN = 5
_UNPACKED = 3  # bytes of text in a packed byte
_UNKNOWN_DIM = 64


def check_readers(sources: Sequence[Source]) -> None:
    """Raises an `ImportError` if files need the library that reads documents such as PDF, and it is missing."""
    files = [file for source in sources for file in source.files if suffix_of(file) in FORMATS]
    if files and importlib.util.find_spec("kreuzberg") is None:
        others = f" and {len(files) - 1} other files" if len(files) > 1 else ""
        raise ImportError(
            f"{files[0]}{others} cannot be read without the extra `documents`: "
            '`pip install "retro-transformers[documents]"`; or name inputs without them'
        )


def check_disk(
    sources: Sequence[Source], folder: Path, recipe: Mapping[str, Any], vocab_size: int, dim: int | None
) -> None:
    """
    Compares the size of a datastore, as `retro plan` estimates it from the size of its inputs, with the free space of
    the disk. Inputs whose text may be much smaller than the file, such as PDF or a filtered one, are not counted.

    Args:
        sources (`Sequence[Source]`): The inputs.
        folder (`Path`): The datastore. What it holds already is taken off.
        recipe (`Mapping`): The recipe.
        vocab_size (`int`): Size of the vocabulary.
        dim (`int`, *optional*): Dimensions of the embeddings, if they are known.

    Raises:
        ValueError: If the disk is too small.
    """
    counted = [source for source in sources if source.kind != "dataset" and source.filter is None]
    files = [file for source in counted for file in source.files or (source.path,) if suffix_of(file) not in FORMATS]
    size = sum(os.path.getsize(file) * (1 if file_type(file)[1] is None else _UNPACKED) for file in files)
    tokens = max(1, size // _BYTES_PER_TOKEN)
    chunk, index = recipe.get("chunk", {}), recipe.get("index", {})
    given = {
        "chunk_size": chunk.get("chunk_size"),
        "num_neighbors": recipe.get("neighbors", {}).get("num_neighbors"),
        "factory": None if dim is None else index.get("factory"),
        "max_index_memory": index.get("max_index_memory"),
    }
    options = {name: value for name, value in given.items() if value is not None}
    plan = plan_datastore(tokens, dim=dim or _UNKNOWN_DIM, vocab_size=vocab_size, **options)
    if chunk.get("max_chunks") is not None:
        chunks = min(plan["chunks"], chunk["max_chunks"] * len(recipe["splits"]))
        plan = {name: value * chunks // plan["chunks"] for name, value in plan.items() if isinstance(value, int)}
    # The index is written twice: in parts and merged.
    needed = sum(plan[f"{name}_bytes"] for name in ("chunks", "embeddings", "neighbors", "index", "index"))
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    disk = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(disk).free
    if needed - there > free:
        raise ValueError(
            f"{folder} will hold about {plan['chunks']:,} chunks and need {human_bytes(needed)} on the disk, of which "
            f"{human_bytes(there)} are there, and {human_bytes(free)} are free; choose another disk, fewer documents "
            "or an index with smaller codes (see `retro plan`), or --no_check_disk if the inputs hold less text than "
            "their sizes say"
        )
