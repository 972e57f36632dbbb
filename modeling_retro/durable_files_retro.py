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
Writes files so that they survive a power cut, and not only a killed process.

A file gets its name only when its contents are on the disk: first the contents are flushed, then the file is renamed,
and then the folder that holds the new name is flushed. A folder that is replaced is exchanged with its successor in
one step, so that at every moment either the old folder or the new one is there.
"""

import contextlib
import ctypes
import errno
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


TEMPORARY = ".tmp-"
# Prefix of the name of a folder while its successor takes its place, if the two cannot be exchanged in one step.
REPLACED = ".old-"

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# Errors of file systems that cannot exchange two names or cannot flush a folder.
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """
    Yields the path of a temporary sibling of `path`, to which the caller writes a file or a folder. If no exception
    was raised, the sibling then takes the name `path`.

    Args:
        path (`Path`): Path of the finished file or folder. A file or folder that is already there is replaced.
    """
    make_folder(path.parent)
    recover(path)
    temporary = path.with_name(f"{TEMPORARY}{platform.node()}-{os.getpid()}-{path.name}")
    remove(temporary)
    try:
        yield temporary
        replace(temporary, path)
    finally:
        remove(temporary)


@contextlib.contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """
    Yields a temporary folder inside `folder`, to which the caller writes files. These files then replace the files of
    the same names in `folder`, one after another. Other files of `folder` stay. `folder` is created if it does not
    exist.
    """
    make_folder(folder)
    temporary = folder / f"{TEMPORARY}{platform.node()}-{os.getpid()}"
    remove(temporary)
    temporary.mkdir()
    try:
        yield temporary
        for source in sorted(temporary.iterdir()):
            replace(source, folder / source.name)
    finally:
        remove(temporary)


def write_text(path: Path, text: str) -> None:
    """Writes a text file completely or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON with sorted keys, completely or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def replace(source: Path, target: Path) -> None:
    """
    Flushes a file or folder and gives it the name `target`. A file or folder that had this name is removed afterwards.

    Args:
        source (`Path`): A file or a folder.
        target (`Path`): Its new name, on the same file system.
    """
    sync(source)
    if not target.is_dir() or target.is_symlink():
        os.replace(source, target)
        _sync_parents(source, target)
    elif _exchange(source, target):
        _sync_parents(source, target)
        remove(source)
    else:
        old = target.with_name(REPLACED + target.name)
        os.replace(target, old)
        _sync_parents(target, old)
        os.replace(source, target)
        _sync_parents(source, target)
        remove(old)


def recover(path: Path) -> None:
    """Gives a folder its name back if a power cut interrupted its replacement (see `replace`)."""
    old = path.with_name(REPLACED + path.name)
    if not old.is_dir():
        return
    if path.exists():
        remove(old)
    else:
        os.replace(old, path)
    _sync_parents(path, path)


def recover_all(folder: Path) -> None:
    """
    Removes temporary files of interrupted runs in a folder and recovers its folders. Only one process may write to it.
    """
    for leftover in list(folder.rglob(f"{TEMPORARY}*")):
        remove(leftover)
    for old in list(folder.rglob(f"{REPLACED}*")):
        recover(old.with_name(old.name.removeprefix(REPLACED)))


def remove(path: Path) -> None:
    """Removes a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Creates a folder and those above it. Their names are on the disk when the function returns."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_file(folder.parent)


def sync(path: Path) -> None:
    """Flushes a file, or all files and folders in a folder, to the disk."""
    if path.is_dir():
        for entry in path.iterdir():
            sync(entry)
    sync_file(path)


def sync_file(path: Path) -> None:
    """Flushes one file, or the names in a folder, which Windows flushes by itself."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems can flush files but not folders.
        if error.errno not in _UNSUPPORTED or not path.is_dir():
            raise
    finally:
        os.close(handle)


def _sync_parents(source: Path, target: Path) -> None:
    for folder in {source.parent, target.parent}:
        sync_file(folder)


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges the names of two files or folders in one step. Returns False where that is not possible."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old C library
        return False
    names = (os.fsencode(path) for path in (first, second))
    if renameat2(_AT_FDCWD, next(names), _AT_FDCWD, next(names), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(second))


def public_name(name: str) -> str:
    """A name on the Hub unchanged, or only the last part of the name of a folder."""
    is_folder = Path(name).is_absolute() or name[:1] in (".", "~") or Path(name).exists()
    return os.path.basename(os.path.abspath(name)) if is_folder and name else name


__all__ = ["whole", "whole_files", "write_json", "write_text"]
