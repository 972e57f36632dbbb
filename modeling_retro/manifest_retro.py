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
"""What the manifest of a datastore says"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .configuration_retro import RetroConfig


MANIFEST_NAME = "datastore.json"
FORMAT_VERSION = 1
TRAIN_SPLIT = "train"


def read_manifest(path: Path) -> dict[str, Any]:
    """
    Reads `datastore.json` of a folder.

    Raises:
        ValueError: If the file is missing, is not JSON, or has a format version this code does not know.
    """
    file = path / MANIFEST_NAME
    if not file.is_file():
        raise ValueError(f"{path} is not a datastore: it has no {MANIFEST_NAME}")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{file} has format version {version}, this code reads version {FORMAT_VERSION}")
    return manifest


def check_model(manifest: Mapping[str, Any], name: str | Path, config: RetroConfig) -> None:
    """
    Checks that a model can read the tokens of a datastore.

    Args:
        manifest (`Mapping`): The contents of `datastore.json`.
        name (`str` or `Path`): What errors call the datastore.
        config ([`RetroConfig`]): Of the model. If it knows its tokenizer (`tokenizer_sha256`), that is compared too.

    Raises:
        ValueError: If the chunk size or the tokenizer is another.
    """
    if config.chunk_size != manifest["chunk_size"]:
        raise ValueError(f"chunk_size {config.chunk_size} is not the chunk size of {name}: {manifest['chunk_size']}")
    tokenizer = manifest["tokenizer"]
    if tokenizer["vocab_size"] > config.vocab_size:
        raise ValueError(
            f"{name} was made with another tokenizer than the model: {tokenizer['name']} has "
            f"{tokenizer['vocab_size']} tokens, the model {config.vocab_size}"
        )
    if config.tokenizer_sha256 not in (None, tokenizer["sha256"]):
        raise ValueError(
            f"{name} was made with another tokenizer than the model: that of {tokenizer['name']} has the sha256 "
            f"{tokenizer['sha256'][:12]}, the model was trained with {config.tokenizer_sha256[:12]}"
        )


def describe_datastore(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """
    What a report says of a datastore: its sizes and what made it, without the folders of this machine.

    Args:
        manifest (`Mapping`): The contents of `datastore.json`.

    Returns:
        `dict`: ready for JSON.
    """
    train = manifest["splits"][TRAIN_SPLIT]["chunks"]
    facts = {
        "chunks": train["num_chunks"],
        "documents": train["num_documents"],
        "chunk_size": manifest["chunk_size"],
        "tokenizer": public_name(manifest["tokenizer"]["name"]),
        "fingerprint": train["fingerprint"],
    }
    if "encoder" in manifest:
        facts["encoder"] = public_name(manifest["encoder"]["name"])
    if "index" in manifest:
        facts["index"] = manifest["index"]["factory"]
    return facts


def public_name(name: str) -> str:
    """A name of the Hub as it is; of a folder of this machine only its last part."""
    return Path(name).name if Path(name).is_absolute() else name
