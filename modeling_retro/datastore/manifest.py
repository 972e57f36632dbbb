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
"""The manifest of a datastore: its schema, and checks of its values"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..configuration_retro import RetroConfig
from ..durable_files_retro import public_name


MANIFEST_NAME = "datastore.json"
# The latest version that this code reads. It reads every version up to this one and refuses later ones. A field may be
# added without a new version if older code can do without the field. The version increases when older code would
# misread the new format. A datastore is written with the first version that can describe it, so that older code can
# read most datastores.
FORMAT_VERSION = 2
FIRST_FORMAT_VERSION = 1
# The version of a datastore that was changed. Older code would return the documents that were removed.
CHANGED_FORMAT_VERSION = 2
TRAIN_SPLIT = "train"
# Ways to find neighbors, and the indexes that each needs.
INDEXES = {"dense": ("index",), "bm25": ("bm25",), "hybrid": ("index", "bm25"), "rerank": ("index",)}

PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# A rule returns a description of the expected value if a value breaks it, and None otherwise. A mapping has a rule for
# each key, or a pair of one rule for all names and one for all values. A key with a question mark may be missing, and
# unknown keys are allowed. A list has one rule for all elements.
Rule = Callable[[Any], str | None] | dict[str, "Rule"] | tuple["Rule", "Rule"] | list["Rule"]


def _number_from(lowest: int) -> Rule:
    def check(value: Any) -> str | None:
        is_number = isinstance(value, int) and not isinstance(value, bool) and value >= lowest
        return None if is_number else f"a whole number from {lowest}"

    return check


def _matching(pattern: str, expected: str) -> Rule:
    compiled = re.compile(pattern)
    return lambda value: None if isinstance(value, str) and compiled.fullmatch(value) else expected


def _any_of(*types: type) -> Rule:
    names = " or ".join({str: "text", bool: "true or false", dict: "fields", type(None): "null"}[t] for t in types)
    return lambda value: None if isinstance(value, types) else names


def _inside(value: Any) -> str | None:
    is_inside = isinstance(value, str) and "\\" not in value and not {"", ".", ".."} & set(value.split("/"))
    return None if is_inside else "a path inside the datastore"


_COUNT, _SIZE = _number_from(0), _number_from(1)
_TEXT, _TEXT_OR_NULL, _BOOL, _FIELDS = _any_of(str), _any_of(str, type(None)), _any_of(bool), _any_of(dict)
_NAME = _matching(PLAIN_NAME.pattern, "a name without a path")
_SHA256 = _matching("[0-9a-f]{64}", "a sha256 of 64 hexadecimal digits")
_COUNTS = (_TEXT, _COUNT)
_FILE = {"name": _NAME, "sha256": _SHA256}
_SHARD = {**_FILE, "rows": _COUNT}

SCHEMA: Rule = {
    "format_version": _SIZE,
    "version?": _COUNT,  # number of times that documents were added, removed or compacted
    "chunk_size": _SIZE,
    "continuation_chunks": _COUNT,
    "allow_control_tokens?": _BOOL,
    "tokenizer": {"name": _TEXT, "vocab_size": _SIZE, "sha256": _SHA256},
    "encoder?": {
        "name": _TEXT,
        "revision": _TEXT_OR_NULL,
        "pooling": _TEXT,
        "normalize": _BOOL,
        "dim": _SIZE,
        "sha256": _SHA256,
    },
    "splits": (
        _NAME,
        {
            "searched?": _BOOL,
            "chunks?": {
                "options": _FIELDS,
                "sources": [{"kind": _TEXT, "path": _TEXT, "bytes?": _COUNT, "filter?": _TEXT_OR_NULL}],
                "parts": [
                    {
                        "source": _COUNT,
                        "start": _COUNT,
                        "stop": _COUNT,
                        "offset": _COUNT,
                        "first_document_id": _COUNT,
                        "broken": _TEXT_OR_NULL,
                    }
                ],
                "shards": [
                    {
                        **_SHARD,
                        "documents": _COUNT,
                        "tokens": _COUNT,
                        "bytes": _COUNT,
                        "dropped": _COUNTS,
                        "last?": _BOOL,
                    }
                ],
                "fingerprint?": _SHA256,
                "num_chunks?": _COUNT,
                "num_documents?": _COUNT,
                "num_tokens?": _COUNT,
                "num_bytes?": _COUNT,
                "dropped?": _COUNTS,
                "deduplicated?": {
                    "options": _FIELDS,
                    "run": _matching("[0-9a-f]+", "hexadecimal digits"),
                    "shards": _COUNT,
                    "documents": _COUNT,
                    "chunks": _COUNT,
                },
            },
            "embeddings?": {"options": _FIELDS, "shards": [{**_SHARD, "chunks_sha256": _SHA256}]},
            "neighbors?": {
                "options": {"num_neighbors": _SIZE, "retriever?": _matching("|".join(INDEXES), " or ".join(INDEXES))},
                "shards": [
                    {
                        **_SHARD,
                        "folder?": _NAME,
                        "chunks_sha256": _SHA256,
                        "counts": _COUNTS,
                        "removed?": _SHA256,  # of the removed documents that were left out
                    }
                ],
                "counts?": _COUNTS,
            },
        },
    ),
    "index?": {
        "options": _FIELDS,
        "factory": _TEXT,
        "metric": _matching("inner_product|l2", "inner_product or l2"),
        "ntotal": _COUNT,
        "shards": _COUNT,
        "encoder_sha256": _SHA256,
        "search_parameters": (_TEXT, _SIZE),
        "fingerprint": _SHA256,
        "sha256": (_NAME, _SHA256),
    },
    "bm25?": {
        "options": {"terms": _matching("tokens|words", "tokens or words")},
        "folder": _NAME,
        "ntotal": _COUNT,
        "num_terms": _COUNT,
        "shards": _COUNT,
        "fingerprint": _SHA256,
        "sha256": (_NAME, _SHA256),
    },
    "removed?": {**_FILE, "documents": _COUNT, "chunks": _COUNT},  # their chunks are still in the files
    "compacted?": {**_FILE, "documents": _COUNT},  # their chunks are no longer in the files
    "extends?": (_NAME, _SHA256),
    "files?": (_inside, _SHA256),
}


def read_manifest(path: Path, name: str = MANIFEST_NAME) -> dict[str, Any]:
    """
    Reads `datastore.json` of a folder and compares it with its schema, before any file that it names is opened.

    Args:
        path (`Path`): The folder.
        name (`str`, *optional*, defaults to `"datastore.json"`): Name of the file, for those of earlier versions.

    Raises:
        ValueError: If the file is missing, is not JSON, was made by newer code, or holds an impossible value. The
            message names the field.
    """
    file = path / name
    if not file.is_file():
        raise ValueError(f"{path} is not a datastore: it has no {name}")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if _SIZE(version):
        raise ValueError(f"{file} is no manifest of a datastore: its format_version is {version!r}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {version}, this code reads versions up to {FORMAT_VERSION}: the datastore was "
            "made by a newer release of retro-transformers, install that"
        )
    for name, problem in _problems(manifest, SCHEMA, ""):
        raise ValueError(f"{file} is damaged or was altered: {name} {problem}; make or download the datastore again")
    return manifest


def index_name(manifest: Mapping[str, Any]) -> str:
    """Name of the file of the index of the version that the manifest describes."""
    return next((name for name in manifest["index"]["sha256"] if name.endswith(".faiss")), "index.faiss")


def neighbors_folder(shard: Mapping[str, Any]) -> str:
    """
    Name of the folder of a shard of neighbors. If they were searched again, it differs from that of their chunks.
    """
    return shard.get("folder", shard["name"])


def files_of(manifest: Mapping[str, Any]) -> set[str]:
    """
    Lists the files and folders of a version of a datastore, without those that all versions share, relative to the
    datastore. Some may not exist, because a datastore need not have ids of its documents or bad records.

    Args:
        manifest (`Mapping`): The contents of `datastore.json`.
    """
    names = set(manifest.get("index", {}).get("sha256", {}))
    names |= {manifest[key]["name"] for key in ("removed", "compacted") if key in manifest}
    names |= {manifest["bm25"]["folder"]} if "bm25" in manifest else set()
    for split, record in manifest["splits"].items():
        root = "" if split == TRAIN_SPLIT else f"splits/{split}/"
        for shard in record.get("chunks", {}).get("shards", []):
            names |= {f"{root}chunks/{shard['name']}", f"{root}documents/{shard['name']}.parquet"}
            names.add(f"{root}quarantine/{shard['name']}.jsonl")
        for shard in record.get("embeddings", {}).get("shards", []):
            names.add(f"{root}embeddings/{shard['name']}.npy")
        for shard in record.get("neighbors", {}).get("shards", []):
            names.add(f"{root}neighbors/{neighbors_folder(shard)}")
    return names


def check_split_name(split: str) -> None:
    """Raises a `ValueError` unless `split` can be the name of a folder of the datastore."""
    if expected := _NAME(split):
        raise ValueError(f"the name of a split must be {expected} (letters, digits, '.', '_' and '-'), got {split!r}")


def _problems(value: Any, rule: Rule, name: str) -> Iterator[tuple[str, str]]:
    """Yields the fields of a manifest that break their rules, with a description of the problem."""
    if callable(rule):
        if expected := rule(value):
            yield name, f"is {value!r:.80}, expected {expected}"
    elif isinstance(rule, list):
        if not isinstance(value, list):
            yield name, f"is {value!r:.80}, expected a list"
            return
        for number, element in enumerate(value):
            yield from _problems(element, rule[0], f"{name}[{number}]")
    elif not isinstance(value, dict):
        yield name, f"is {value!r:.80}, expected fields"
    elif isinstance(rule, tuple):
        for key, element in value.items():
            if expected := rule[0](key):
                yield name, f"has {key!r:.80}, expected {expected}"
            yield from _problems(element, rule[1], f"{name}.{key}")
    else:
        for key, inner in rule.items():
            key, optional = key.removesuffix("?"), key.endswith("?")
            field = f"{name}.{key}" if name else key
            if key in value:
                yield from _problems(value[key], inner, field)
            elif not optional:
                yield field, "is missing"


def check_model(manifest: Mapping[str, Any], name: str | Path, config: RetroConfig) -> None:
    """
    Checks that a model can read the tokens of a datastore.

    Args:
        manifest (`Mapping`): The contents of `datastore.json`.
        name (`str` or `Path`): Name of the datastore in errors.
        config ([`RetroConfig`]):
            Config of the model. If it names its tokenizer (`tokenizer_sha256`), that is compared too.

    Raises:
        ValueError: If the chunk size or the tokenizer differs.
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
    Whether text that spells a special token became that token when the datastore was made. A datastore without a
    record of this was made before there was a choice, and allowed it.
    """
    return manifest.get("allow_control_tokens", True)


def describe_datastore(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """
    Describes a datastore for a report: its sizes and origin, without the folders of this machine.

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
    if "bm25" in manifest:
        facts["bm25"] = manifest["bm25"]["options"]
    if manifest.get("version"):
        facts["version"] = manifest["version"]
    if "removed" in manifest:
        facts["removed_documents"] = manifest["removed"]["documents"]
    return facts
