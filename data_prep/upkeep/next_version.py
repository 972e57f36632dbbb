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
"""
Makes a new version of a datastore while others read the current one.

The new version is made in the folder `.next`, from links to the files that stay and from new files. When it is
finished, the new files are moved to their places, under names that no version had before, and `datastore.json` is
replaced. Until then the old version is complete, and from then on the new one is. A run that was killed is resumed
when the same command is run again.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace as altered
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers.utils import logging

from data_prep.stage_files import directory_lock, open_manifest, process_state
from modeling_retro.datastore.checksums import checksum
from modeling_retro.datastore.manifest import (
    CHANGED_FORMAT_VERSION,
    MANIFEST_NAME,
    Manifest,
    read_manifest,
)
from modeling_retro.datastore.versions import remove_unread, superseding
from modeling_retro.durable_files_retro import TEMPORARY, make_folder, remove, replace, write_json


logger = logging.get_logger(__name__)

_NEXT = ".next"
_REQUEST = "request.json"
_READY = "ready.json"
# Folders that all versions share. Deduplication adds lines to its report.
_SHARED = ("tokenizer", "encoder")
_REPORT = "duplicates.jsonl"


def change_datastore(
    path: Path, request: dict[str, Any], make: Callable[[Path], bool], repeat: bool = False
) -> Manifest:
    """
    Makes the next version of a datastore and puts it in the place of the current one.

    Args:
        path (`Path`): The datastore.
        request (`dict`): The requested change, in JSON. An interrupted run with the same request is resumed.
        make (`Callable`):
            Turns the given folder, which holds the current version, into the new version. Returns whether it changed
            anything.
        repeat (`bool`, *optional*, defaults to `False`):
            Whether to make the change once more if it made the current version. If not, nothing is changed: a run that
            was killed after its version was in place can be repeated.

    Returns:
        [`Manifest`]: the manifest of the new version, or of the current one if nothing changed.

    Raises:
        ValueError: If the datastore cannot be changed.
    """
    with directory_lock(path):
        if finish_change(path) == request:
            return open_manifest(path)
        manifest = open_manifest(path)
        check_changeable(path, manifest)
        if manifest.request == _identity(request) and not repeat:
            logger.warning(f"{path} is as this very change made it (version {manifest.version}); nothing is changed")
            return manifest
        begun = _begun(path)
        if begun is None or begun["request"] != request:
            _begin(path, manifest, request)
        is_changed = make(path / _NEXT)
        if process_state().is_main_process:
            if is_changed:
                write_json(path / _NEXT / _READY, {})
            else:
                _remove_next(path)
        process_state().wait_for_everyone()
        if is_changed:
            _publish(path)
        return open_manifest(path)


def finish_change(path: Path) -> dict[str, Any] | None:
    """Publishes a version that an interrupted run had finished, and returns the request of that run."""
    with directory_lock(path):
        begun = _begun(path)
        if begun is None or not begun["is_ready"]:
            return None
        _publish(path)
        return begun["request"]


def check_changeable(path: Path, manifest: Manifest) -> None:
    """Raises a `ValueError` if documents cannot be added to the datastore or removed from it."""
    if manifest.files is not None:
        raise ValueError(
            f"{path} was downloaded: it has no embeddings, and others may share it; change the datastore that was "
            "uploaded, and push it again"
        )
    if manifest.extends is not None:
        raise ValueError(f"{path} extends another datastore: change that one and remake this one with `retro prepare`")
    if (path / "search_all").exists():
        raise ValueError(
            f"{path / 'search_all'} holds copies of the datastore, which would keep removed documents; delete that "
            "folder first, and remake it with `retro prepare` if you need it"
        )
    if not manifest.train.is_chunked:
        raise ValueError(f"{path} has no finished chunks; run `retro chunk` (again)")


def _begun(path: Path) -> dict[str, Any] | None:
    """The request of an interrupted run, if the datastore is still the same. All processes get the same answer."""
    begun, folder = None, path / _NEXT
    if process_state().is_main_process and (folder / _REQUEST).is_file():
        begun = json.loads((folder / _REQUEST).read_text(encoding="utf-8"))
        begun["is_ready"] = (folder / _READY).is_file()
        # The version may already be in its place.
        is_there = begun["is_ready"] and read_manifest(folder) == read_manifest(path)
        if begun["manifest"] != checksum(path / MANIFEST_NAME) and not is_there:
            begun = None
    return broadcast_object_list([begun])[0]


def _identity(request: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _begin(path: Path, manifest: Manifest, request: dict[str, Any]) -> None:
    state = process_state()
    if state.is_main_process:
        folder = path / _NEXT
        remove(folder)
        for name in sorted({*manifest.own_files(), *_SHARED, _REPORT}):
            if (path / name).exists():
                link = folder / name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(os.path.relpath(path / name, link.parent))
        version = max(manifest.format_version, CHANGED_FORMAT_VERSION)
        altered(
            manifest, version=manifest.version + 1, format_version=version, request=_identity(request)
        ).seal().write(folder)
        write_json(folder / _REQUEST, {"request": request, "manifest": checksum(path / MANIFEST_NAME)})
    state.wait_for_everyone()


def _publish(path: Path) -> None:
    """Puts the finished version in its place, or completes this if an earlier run was interrupted at it."""
    state = process_state()
    if state.is_main_process:
        folder = path / _NEXT
        manifest, before = read_manifest(folder), read_manifest(path)
        if before != manifest:
            for name in sorted({*manifest.own_files() - before.own_files(), _REPORT}):
                source = folder / name
                if source.exists() and not source.is_symlink():
                    make_folder((path / name).parent)
                    replace(source, path / name)
            with superseding(path, keep=True):
                manifest.write(path)
        remove_unread(path, manifest)
        _remove_next(path)
    state.wait_for_everyone()


def _remove_next(path: Path) -> None:
    """Removes the folder `.next`. If this is interrupted, the next run removes the rest as a temporary file."""
    temporary = path / f"{TEMPORARY}next"
    os.replace(path / _NEXT, temporary)
    remove(temporary)
