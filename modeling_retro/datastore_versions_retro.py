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
Which versions of a datastore are being read.

Whoever opens a datastore keeps its `datastore.json` open, with a shared lock on it. A change puts a new file in its
place; the old one goes on under another name in `versions/`, and as long as anyone holds it, so do the files that it
names. The locks end with the processes that hold them.
"""

import contextlib
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .datastore_manifest_retro import MANIFEST_NAME, files_of, read_manifest
from .durable_files_retro import make_folder, remove, sync_file


try:
    import fcntl
except ImportError:  # not on Windows: there no files of earlier versions are removed
    fcntl = None

VERSIONS = "versions"


class HeldVersion:
    """
    A version of a datastore that is being read; its files stay as long as this object lives. A copy in another process
    holds nothing.

    Args:
        path (`Path`): The datastore.
        handle (`int`): File descriptor of its `datastore.json`.
    """

    def __init__(self, path: Path, handle: int):
        self._path = path
        self._handle = handle
        weakref.finalize(self, os.close, handle)

    def is_current(self) -> bool:
        """Whether it still is the datastore's current version."""
        return _is_current(self._path, self._handle)

    def __reduce__(self) -> tuple[type, tuple]:
        return type(None), ()


def open_version(path: Path) -> tuple[dict[str, Any], HeldVersion]:
    """
    Opens the version of a datastore that is current, and holds it.

    Args:
        path (`Path`): The datastore.

    Returns:
        `tuple[dict, HeldVersion]`: its manifest, and what holds it.

    Raises:
        ValueError: As [`~modeling_retro.datastore_manifest_retro.read_manifest`] does.
    """
    if not (path / MANIFEST_NAME).is_file():
        read_manifest(path)  # says that there is no datastore
    while True:
        handle = os.open(path / MANIFEST_NAME, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # a file system without locks; nothing is removed there
                if fcntl is not None:
                    fcntl.flock(handle, fcntl.LOCK_SH)
            manifest = read_manifest(path)
            if _is_current(path, handle):
                return manifest, HeldVersion(path, os.dup(handle))
        finally:
            os.close(handle)


def _is_current(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path / MANIFEST_NAME))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def superseding(path: Path, keep: bool = False) -> Iterator[None]:
    """
    Inside the block `datastore.json` is replaced. The old one goes on in `versions/` if anyone reads it.

    Args:
        path (`Path`): The datastore.
        keep (`bool`, *optional*, defaults to `False`):
            Whether it goes on there in any case, so that [`remove_unread`] finds what it leaves behind.
    """
    file = path / MANIFEST_NAME
    if not file.is_file():
        yield
        return
    handle = os.open(file, os.O_RDONLY)
    try:
        if keep or _is_held(handle):
            make_folder(path / VERSIONS)
            kept = path / VERSIONS / f"{os.fstat(handle).st_ino}.json"
            remove(kept)  # of a change that was interrupted here
            with contextlib.suppress(OSError):  # a file system without links; nothing is removed there
                os.link(file, kept)
                sync_file(kept.parent)
        yield  # whoever opens the old one now waits for the lock, and then finds that it is old
    finally:
        os.close(handle)


def remove_unread(path: Path, manifest: dict[str, Any]) -> None:
    """
    Removes the files of earlier versions that nobody reads any more.

    Args:
        path (`Path`): The datastore, which nobody else writes to.
        manifest (`dict`): Its current manifest.
    """
    needed, unread = files_of(manifest), []
    current = os.stat(path / MANIFEST_NAME)
    for file in sorted((path / VERSIONS).glob("*.json")):
        handle = os.open(file, os.O_RDONLY)
        try:
            earlier = files_of(read_manifest(file.parent, file.name))
            if os.path.samestat(os.fstat(handle), current) or _is_held(handle):
                needed |= earlier
            else:
                unread.append((file, earlier))
        finally:
            os.close(handle)
    for file, earlier in unread:
        for name in sorted(earlier - needed):
            remove(path / name)
        file.unlink()


def _is_held(handle: int) -> bool:
    """Whether another descriptor holds the file, or nobody can know. If not, this one does until it is closed."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, AttributeError):
        return True
    return False


__all__ = ["VERSIONS", "HeldVersion", "open_version", "remove_unread", "superseding"]
