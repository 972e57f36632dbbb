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
Keeps track of the versions of a datastore that are being read.

A reader of a datastore keeps its `datastore.json` open, with a shared lock on it. A change replaces this file. The old
file gets another name in `versions/`, and the files that it names are kept as long as any reader holds it. A lock ends
with the process that holds it.
"""

import contextlib
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

from ..durable_files_retro import make_folder, remove, sync_file
from .manifest import MANIFEST_NAME, Manifest, read_manifest


try:
    import fcntl
except ImportError:  # on Windows, the files of earlier versions are not removed
    fcntl = None

VERSIONS = "versions"


class HeldVersion:
    """
    A version of a datastore that is being read. Its files are kept as long as this object exists. A copy of the object
    in another process holds nothing.

    Args:
        path (`Path`): The datastore.
        handle (`int`): File descriptor of its `datastore.json`.
    """

    def __init__(self, path: Path, handle: int):
        self._path = path
        self._handle = handle
        weakref.finalize(self, os.close, handle)

    def is_current(self) -> bool:
        """Whether this is still the current version of the datastore."""
        return _is_current(self._path, self._handle)

    def __reduce__(self) -> tuple[type, tuple]:
        return type(None), ()


def open_version(path: Path) -> tuple[Manifest, HeldVersion]:
    """
    Opens the current version of a datastore and holds it.

    Args:
        path (`Path`): The datastore.

    Returns:
        `tuple[Manifest, HeldVersion]`: the manifest, and the object that holds the version.

    Raises:
        ValueError: For the reasons of [`~modeling_retro.datastore.manifest.read_manifest`].
    """
    if not (path / MANIFEST_NAME).is_file():
        read_manifest(path)  # raises an error that says that there is no datastore
    while True:
        handle = os.open(path / MANIFEST_NAME, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # without locks in the file system, nothing is removed
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
    Context in which `datastore.json` is replaced. The old file is kept in `versions/` if it is being read.

    Args:
        path (`Path`): The datastore.
        keep (`bool`, *optional*, defaults to `False`):
            Whether it is kept in any case, so that [`remove_unread`] finds the files that only it names.
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
            remove(kept)  # left by a change that was interrupted here
            with contextlib.suppress(OSError):  # without links in the file system, nothing is removed
                os.link(file, kept)
                sync_file(kept.parent)
        yield  # a reader that opens the old file waits for the lock, and then notices that it is old
    finally:
        os.close(handle)


def remove_unread(path: Path, manifest: Manifest) -> None:
    """
    Removes the files of earlier versions that are no longer read.

    Args:
        path (`Path`): The datastore. No other process may write to it.
        manifest ([`Manifest`]): The current manifest.
    """
    needed, unread = manifest.own_files(), []
    current = os.stat(path / MANIFEST_NAME)
    for file in sorted((path / VERSIONS).glob("*.json")):
        handle = os.open(file, os.O_RDONLY)
        try:
            earlier = read_manifest(file.parent, file.name).own_files()
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
    """Whether another descriptor holds the file, or this is unknown. If not, `handle` holds it until it is closed."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, AttributeError):
        return True
    return False


__all__ = ["VERSIONS", "HeldVersion", "open_version", "remove_unread", "superseding"]
