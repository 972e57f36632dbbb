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
"""Checksums of files and tokenizers, and tokenizers without code of strangers"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..encoder.own_code import no_code_of
from .manifest import MANIFEST_NAME


def checksum(path: Path) -> str:
    """The sha256 of a file, or of the names and contents of all files in a folder."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            if file != path:
                digest.update(str(file.relative_to(path)).encode())
            with file.open("rb") as handle:
                while block := handle.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def verify_file(path: Path, sha256: str) -> Path:
    """Returns `path`, or raises a `ValueError` if the file or folder is missing or its [`checksum`] differs."""
    if not path.exists():
        raise ValueError(f"{path} is missing")
    if checksum(path) != sha256:
        raise ValueError(f"{path} was altered: its checksum is not the one in {MANIFEST_NAME}")
    return path


def file_checksums(folder: Path, but: str | None = None) -> dict[str, str]:
    """
    The checksums of all files of a folder, by their names relative to it.

    Args:
        folder (`Path`): The folder.
        but (`str`, *optional*): Suffix of the files that are left out.
    """
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix != but)
    return {file.relative_to(folder).as_posix(): checksum(file) for file in files}


def verify_files(folder: Path, files: Mapping[str, str] | None, but: str | None = None) -> None:
    """
    Compares the files of a folder with their checksums. Raises a `ValueError` that names the first file that is
    missing, was altered or was added.

    Args:
        folder (`Path`): The folder.
        files (`Mapping[str, str]`, *optional*): The checksums. Those made before there were any have none.
        but (`str`, *optional*): Suffix of the files that are left out.
    """
    if files is None:
        return
    for name, sha256 in files.items():
        verify_file(folder / name, sha256)
    for name in file_checksums(folder, but).keys() - files.keys():
        raise ValueError(f"{folder / name} is not one of the files that {MANIFEST_NAME} names; remove it")


def load_tokenizer(
    name_or_path: str | Path, files: Mapping[str, str] | None = None, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """
    Loads a tokenizer. Code that comes with it is never run, and no question is asked.

    Args:
        name_or_path (`str` or `Path`): Folder or Hub id of the tokenizer.
        files (`Mapping[str, str]`, *optional*): Checksums of the files in its folder.
        revision (`str`, *optional*): Revision on the Hub.

    Raises:
        ValueError: If the tokenizer needs code of its own, or a file was altered.
    """
    if files is not None:
        verify_files(Path(name_or_path), files)
    with no_code_of(f"the tokenizer {name_or_path}"):
        return AutoTokenizer.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """
    Computes the identity of a tokenizer. It is equal for two tokenizers that give every text the same ids.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A fast tokenizer.

    Returns:
        `dict`: `vocab_size`, with added tokens, and `sha256` of the serialised tokenizer without padding and
        truncation.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is a slow tokenizer; the datastore needs a fast one (tokenizer.json)"
        )
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return {"vocab_size": len(tokenizer), "sha256": hashlib.sha256(backend.to_str().encode()).hexdigest()}
