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
Keeps a datastore in an object store, such as S3, of which nodes without a common file system work on copies

A store has no locks and no names that are replaced. The contents of files are objects named by their sha256, which are
only ever added. A version is one object that lists the files of the datastore; it is created only if it does not exist
yet, and the highest version is the datastore. So nothing is ever half published, and of two that publish at once one
is refused.

    ADDRESS/objects/SHA256               the contents of a file
    ADDRESS/versions/00000003.json       {"files": {name: sha256}}
    ADDRESS/shares/00000003/00001.json   the same, of what a task made of that version
"""

import contextlib
import fcntl
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.callbacks import TqdmCallback
from fsspec.implementations.local import LocalFileSystem

from data_prep.shares import NotBegunError, remove_shared_work, run_share
from modeling_retro.datastore.checksums import checksum
from modeling_retro.datastore.links import check_links
from modeling_retro.datastore.manifest import MANIFEST_NAME
from modeling_retro.durable_files_retro import make_folder, remove, replace, sync, whole, write_json


_STATE, _INCOMING, _LOCK = ".store.json", ".store-incoming", ".store.lock"
# Names of files of a datastore, and the records of shards that are not published yet.
_NAME = re.compile(r"(?:[^./\\][^/\\]*/)*(?:[^./\\][^/\\]*|\.shard-[\w.-]+\.json)")
_SHA256 = re.compile("[0-9a-f]{64}")


class ObjectStore:
    """
    A datastore in an object store.

    Args:
        address (`str`):
            Address of its folder, as fsspec takes it, such as `s3://bucket/articles`. Keys come from where the client
            of the store looks for them, such as the environment, and stand in no address.

    Raises:
        ValueError: If this is no address.
        ImportError: If the client of the store is not installed.
        ConnectionError: If the store refuses a request or does not answer.
    """

    def __init__(self, address: str):
        if not re.fullmatch(r"[a-z][a-z0-9+]*://[^@]+", address):
            raise ValueError(
                f"{address!r} is no address of an object store, such as s3://bucket/articles, without keys"
            )
        self.address = address.rstrip("/")
        try:
            self.files, self.root = fsspec.url_to_fs(self.address, use_listings_cache=False)
            self.is_local = isinstance(self.files, LocalFileSystem)
        except ImportError as error:
            raise ImportError(f'{error}: for S3, pip install "retro-transformers[s3]"') from error

    @contextlib.contextmanager
    def _asked(self, what: str) -> Iterator[None]:
        """Names the store in what its client raises, which is of many kinds."""
        try:
            yield
        except (FileExistsError, ValueError):
            raise
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise ConnectionError(f"{self.address} did not {what}: {type(error).__name__} {reason}") from error

    def latest(self) -> int:
        """Number of the latest version; 0 if there is none."""
        with self._asked("list its versions"):
            numbers = [Path(name).stem for name in self._names("versions")]
        return max((int(number) for number in numbers if number.isdecimal()), default=0)

    def _names(self, folder: str) -> list[str]:
        try:
            return sorted(self.files.ls(f"{self.root}/{folder}", detail=False))
        except FileNotFoundError:
            return []

    def read_version(self, version: int) -> dict[str, str]:
        """The sha256 of each file of a version."""
        return self._read(f"versions/{version:08d}.json") if version else {}

    def read_shares(self, version: int) -> list[dict[str, str]]:
        """What each task made of a version."""
        with self._asked("list its shares"):
            names = self._names(f"shares/{version:08d}")
        return [self._read(f"shares/{version:08d}/{Path(name).name}") for name in names]

    def _read(self, name: str) -> dict[str, str]:
        with self._asked(f"give {name}"):
            content = self.files.cat_file(f"{self.root}/{name}")
        try:
            files = json.loads(content)["files"]
            wrong = [key for key, sha256 in files.items() if not (_NAME.fullmatch(key) and _SHA256.fullmatch(sha256))]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{self.address}/{name} does not list files: {error!r:.200}") from error
        if wrong:
            raise ValueError(f"{self.address}/{name} lists {wrong[0]!r:.200}, which is no file inside a datastore")
        return files

    def create_version(self, version: int, files: dict[str, str]) -> None:
        """Publishes a version. Raises a `FileExistsError` if there is one of this number."""
        name = f"{self.root}/versions/{version:08d}.json"
        with self._asked("take a version"):
            self._make_folder("versions")
            if self.is_local:  # whose files do not appear whole
                _link_new(Path(name), _listing(files))
                return
            self.files.pipe_file(name, _listing(files), mode="create")
            try:
                self.files.pipe_file(name, _listing(files), mode="create")
            except FileExistsError:
                return
        raise ValueError(
            f"{self.address} replaces objects that exist although it was asked not to; runs cannot be kept apart there"
        )

    def _make_folder(self, name: str) -> None:
        if self.is_local:  # other stores have none, and would make a bucket
            self.files.makedirs(f"{self.root}/{name}", exist_ok=True)

    def write_share(self, version: int, index: int, files: dict[str, str]) -> None:
        """Says what a task made. A task that runs again replaces what it said."""
        with self._asked("take a share"):
            self._make_folder(f"shares/{version:08d}")
            self.files.pipe_file(f"{self.root}/shares/{version:08d}/{index:05d}.json", _listing(files))

    def upload(self, folder: Path, files: dict[str, str]) -> None:
        """Uploads the contents of files that the store lacks. One that was cut off is uploaded again."""
        wanted = {sha256: folder / name for name, sha256 in files.items()}
        with self._asked("take files"):
            self._make_folder("objects")
            found = self.files.find(f"{self.root}/objects", detail=True)
            there = {Path(name).name: info["size"] for name, info in found.items()}
            missing = {s: path for s, path in wanted.items() if there.get(s) != path.stat().st_size}
            targets = [f"{self.root}/objects/{sha256}" for sha256 in missing]
            if missing:
                self.files.put([str(path) for path in missing.values()], targets, callback=_progress("Uploading"))

    def download(self, folder: Path, files: dict[str, str]) -> None:
        """Downloads files. Each gets its name when it is whole and its contents are those of its sha256."""
        incoming = folder / _INCOMING
        remove(incoming)
        make_folder(incoming)
        wanted = sorted(set(files.values()))
        with self._asked("give files"):
            if wanted:
                sources = [f"{self.root}/objects/{sha256}" for sha256 in wanted]
                targets = [str(incoming / sha256) for sha256 in wanted]
                self.files.get(sources, targets, callback=_progress("Downloading"))
        for sha256 in wanted:
            if checksum(incoming / sha256) != sha256:
                raise ValueError(f"{self.address}/objects/{sha256} is damaged: its contents have another sha256")
        names: dict[str, list[str]] = {}
        for name, sha256 in files.items():
            names.setdefault(sha256, []).append(name)
        for sha256, equal in names.items():
            for name in equal[1:]:
                with whole(folder / name) as temporary:
                    shutil.copyfile(incoming / sha256, temporary)
            make_folder((folder / equal[0]).parent)
            replace(incoming / sha256, folder / equal[0])
        remove(incoming)


def _link_new(path: Path, content: bytes) -> None:
    """Writes a file whole. Raises a `FileExistsError` if there is one of this name."""
    temporary = path.with_name(f".tmp-{platform.node()}-{os.getpid()}-{path.name}")
    temporary.write_bytes(content)
    try:
        sync(temporary)
        os.link(temporary, path)
    finally:
        remove(temporary)


def _listing(files: dict[str, str]) -> bytes:
    return json.dumps({"files": files}, sort_keys=True, indent=1).encode()


def _progress(label: str) -> TqdmCallback:
    return TqdmCallback(tqdm_kwargs={"desc": label, "unit": "file"})


class Copy:
    """
    A copy of the latest version of a store in a folder of this machine, on which one process works at a time.

    Args:
        store ([`ObjectStore`]): The store.
        folder (`Path`): The folder: a copy of before, or one that is empty or does not exist.
    """

    def __init__(self, store: ObjectStore, folder: Path):
        self.store, self.folder = store, folder
        self.version, self.listed, self._known = 0, {}, {}

    @contextlib.contextmanager
    def opened(self) -> Iterator["Copy"]:
        """
        Keeps other processes out of the folder.

        Raises:
            ValueError: If another process works there, or links lead out of it.
        """
        make_folder(self.folder)
        check_links(self.folder)
        handle = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another process works on the copy in {self.folder}; give each task of a machine its own folder"
                ) from None
            yield self
        finally:
            os.close(handle)

    def pull(self) -> None:
        """
        Brings the latest version. What the store does not hold is removed, unless it was made of that version.

        Raises:
            ValueError: If the folder holds something else, or an object is damaged.
        """
        state = self._read_state()
        if state is None:
            others = [entry.name for entry in self.folder.iterdir() if entry.name != _LOCK]
            if others:
                raise ValueError(
                    f"{self.folder} is no copy of {self.store.address} (it holds {others[0]}); choose another folder"
                )
            state = {"version": 0, "files": {}}
            self._write_state()
        self._known, self.version = state["files"], self.store.latest()
        self.listed = self.store.read_version(self.version)
        if state["version"] != self.version:
            for file in [path for path in self.folder.rglob("*") if path.is_file()]:
                name = file.relative_to(self.folder).as_posix()
                if name not in self.listed and not name.startswith("."):
                    remove(file)
        self.bring(self.listed)
        self._write_state()

    def check_unchanged(self) -> None:
        """Raises a `ValueError` if another version would remove changes that nobody pushed."""
        state = self._read_state()
        if state is None or not state["version"] or state["version"] == self.store.latest():
            return
        self._known = state["files"]
        found, listed = self.files(), self.store.read_version(state["version"])
        changed = [name for name in found.keys() | listed.keys() if found.get(name) != listed.get(name)]
        if changed:
            raise ValueError(
                f"{self.folder} holds changes that no version of {self.store.address} has, such as {min(changed)}; "
                "pull into another folder, or remove this one"
            )

    def bring(self, files: dict[str, str]) -> None:
        """Downloads the files that the copy lacks."""
        lacking = {
            name: sha256
            for name, sha256 in files.items()
            if not (self.folder / name).is_file() or self._sha256(name) != sha256
        }
        self.store.download(self.folder, lacking)
        for name, sha256 in lacking.items():
            self._known[name] = [sha256, *self._stamp(name)]

    def files(self, with_records: bool = False) -> dict[str, str]:
        """The sha256 of each file of the copy, without hidden ones, or with the records of unpublished shards."""
        names = [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]
        names = [name for name in sorted(names) if _NAME.fullmatch(name)]
        return {name: self._sha256(name) for name in names if with_records or "/." not in name}

    def push_beginning(self) -> None:
        """Publishes the beginning of a stage, if it is not published. Raises a `FileExistsError` as `push` does."""
        if self._sha256(MANIFEST_NAME) != self.listed.get(MANIFEST_NAME):
            self.push()

    def push(self) -> int:
        """
        Publishes the copy as the next version, if it differs from the one that was pulled.

        Returns:
            `int`: the number of the latest version.

        Raises:
            FileExistsError: If another version was published since.
        """
        files = self.files()
        if files != self.listed:
            self.store.upload(self.folder, files)
            self.store.create_version(self.version + 1, files)
            self.version, self.listed = self.version + 1, files
        self._write_state()
        return self.version

    def _sha256(self, name: str) -> str:
        """The sha256 of a file, which is read only if its size or the time of its last change is new."""
        stamp = self._stamp(name)
        if self._known.get(name, [None])[1:] != stamp:
            self._known[name] = [checksum(self.folder / name), *stamp]
        return self._known[name][0]

    def _stamp(self, name: str) -> list[int]:
        status = (self.folder / name).stat()
        return [status.st_size, status.st_mtime_ns, status.st_ino]

    def _read_state(self) -> dict[str, Any] | None:
        file = self.folder / _STATE
        state = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        if state is not None and state["address"] != self.store.address:
            raise ValueError(f"{self.folder} is a copy of {state['address']}, not of {self.store.address}")
        return state

    def _write_state(self) -> None:
        known = {name: entry for name, entry in self._known.items() if (self.folder / name).is_file()}
        state = {"address": self.store.address, "version": self.version, "files": known}
        write_json(self.folder / _STATE, state)


def pull_datastore(address: str, folder: str | Path) -> int:
    """
    Brings the latest version of a datastore in an object store to a folder of this machine.

    Args:
        address (`str`): The store (see [`ObjectStore`]).
        folder (`str` or `Path`): An earlier copy, of which only what changed is brought, or a new folder.

    Returns:
        `int`: the number of the version.

    Raises:
        ValueError: If the store has no datastore, the folder holds something else or changes that were not pushed, or
            an object is damaged.
        ConnectionError: If the store refuses a request or does not answer.
    """
    with Copy(ObjectStore(address), Path(folder)).opened() as copy:
        if copy.store.latest() == 0:
            raise ValueError(f"there is no datastore at {address}; `retro push` writes one")
        copy.check_unchanged()
        copy.pull()
        return copy.version


def push_datastore(folder: str | Path, address: str) -> int:
    """
    Publishes a datastore in an object store, or the next version of one that was pulled from there.

    Args:
        folder (`str` or `Path`): The datastore.
        address (`str`): The store (see [`ObjectStore`]).

    Returns:
        `int`: the number of the version.

    Raises:
        ValueError: If another version was published since the folder was pulled.
        ConnectionError: If the store refuses a request or does not answer.
    """
    with Copy(ObjectStore(address), Path(folder)).opened() as copy:
        state = copy._read_state() or {"version": 0, "files": {}}
        copy.version, copy._known = state["version"], state["files"]
        copy.listed = copy.store.read_version(copy.version)
        return _publish(copy)


def _publish(copy: Copy) -> int:
    try:
        return copy.push()
    except FileExistsError:
        raise ValueError(
            f"{copy.store.address} has a version {copy.version + 1} already, which is not in {copy.folder}; pull it "
            "into another folder, and run the stage there"
        ) from None


def run_on_store(stage: Callable[[], Any], folder: str | Path, address: str) -> Any:
    """
    Runs a stage on a copy of a datastore, with the shards that tasks made, and publishes the result.

    Args:
        stage (`Callable`): Runs the stage on `folder`, such as `partial(embed_chunks, folder, "encoder")`.
        folder (`str` or `Path`): Folder of the copy, on this machine.
        address (`str`): The store (see [`ObjectStore`]).

    Returns:
        what the stage returns.

    Raises:
        ValueError: As the stage, or if another version was published meanwhile.
        ConnectionError: If the store refuses a request or does not answer.
    """
    with Copy(ObjectStore(address), Path(folder)).opened() as copy:
        copy.pull()
        for files in copy.store.read_shares(copy.version):
            copy.bring(files)
        result = stage()
        _publish(copy)
        return result


def run_share_on_store(stage: Callable[[], Any], folder: str | Path, address: str, index: int, number: int) -> int:
    """
    Makes the share of one task on a copy of a datastore, and uploads it. Tasks need no common file system. The first
    one publishes the beginning of the stage.

    Args:
        stage (`Callable`): Runs the stage on `folder`.
        folder (`str` or `Path`): Folder of the copy, which no other task of this machine uses.
        address (`str`): The store (see [`ObjectStore`]).
        index (`int`): Number of the task, from 0.
        number (`int`): Number of tasks.

    Returns:
        `int`: the number of shards that were made.

    Raises:
        ValueError: As the stage.
        ConnectionError: If the store refuses a request or does not answer.
    """
    with Copy(ObjectStore(address), Path(folder)).opened() as copy:

        def begin() -> None:
            try:
                copy.push_beginning()
            except FileExistsError:
                raise NotBegunError from None  # another task was first; `attempt` pulls its version

        def attempt() -> Any:
            copy.pull()
            return stage()

        made = run_share(attempt, index, number, begin)
        remove_shared_work(copy.folder)  # other tasks have folders of their own
        files = {name: sha for name, sha in copy.files(with_records=True).items() if copy.listed.get(name) != sha}
        if files:
            copy.store.upload(copy.folder, files)
            copy.store.write_share(copy.version, index, files)
        copy._write_state()
        return made
