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
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .configuration_retro import RetroConfig


MANIFEST_NAME = "datastore.json"
FORMAT_VERSION = 1
TRAIN_SPLIT = "train"

PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
COUNTS = ("rows", "tokens", "bytes", "documents", "ntotal", "dim")


def read_manifest(path: Path) -> dict[str, Any]:
    """
    Reads `datastore.json` of a folder.

    Raises:
        ValueError: If the file is missing, is not JSON, has a format version this code does not know, or holds a value
            that no datastore has.
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
    for name, problem in _problems(manifest):
        raise ValueError(f"{file} is damaged or was altered: {name} {problem}; make or download the datastore again")
    return manifest


def _problems(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The fields of a manifest that hold what no datastore has, and what is wrong with each."""
    for name, lowest in (("chunk_size", 1), ("continuation_chunks", 0)):
        if name in manifest and not _is_count(manifest[name], lowest):
            yield name, f"is {manifest[name]!r}, expected a whole number from {lowest}"
    splits = manifest.get("splits", {})
    for name, expected in (("splits", dict), ("tokenizer", dict), ("encoder", dict), ("index", dict)):
        if not isinstance(manifest.get(name, {}), expected):
            yield name, f"is {manifest[name]!r}, expected fields"
            return
    for split, stages in splits.items():
        if not PLAIN_NAME.fullmatch(split):
            yield "splits", f"has the split {split!r}, whose name leads out of the folder"
        if not isinstance(stages, dict):
            yield f"splits.{split}", f"is {stages!r}, expected fields"
            return
    yield from _problems_inside(manifest, "")
    for file in manifest.get("index", {}).get("sha256") or {}:
        if not PLAIN_NAME.fullmatch(file):
            yield "index.sha256", f"names the file {file!r}, which leads out of the folder"


def _problems_inside(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Counts that are none, and shards whose names lead out of their folder, anywhere in a manifest."""
    if isinstance(value, list):
        for number, element in enumerate(value):
            yield from _problems_inside(element, f"{name}[{number}]")
    elif isinstance(value, dict):
        for key, element in value.items():
            field = f"{name}.{key}" if name else str(key)
            if key == "options":  # what a stage was told, which it checks itself
                continue
            is_count = str(key).startswith("num_") or (key in COUNTS and not isinstance(element, dict))
            if is_count and not _is_count(element, 0):
                yield field, f"is {element!r}, expected a whole number from 0"
            if key == "shards" and isinstance(element, list):
                for number, shard in enumerate(element):
                    shard_name = shard.get("name") if isinstance(shard, dict) else shard
                    if not isinstance(shard_name, str) or not PLAIN_NAME.fullmatch(shard_name):
                        yield f"{field}[{number}].name", f"is {shard_name!r}, expected a name without a path"
            yield from _problems_inside(element, field)


def _is_count(value: Any, lowest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= lowest


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


def allows_control_tokens(manifest: Mapping[str, Any]) -> bool:
    """
    Whether text that spells a special token became that token when the datastore was made. Datastores that do not say
    were made before there was a choice, and allow it.
    """
    return manifest.get("allow_control_tokens", True)


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
