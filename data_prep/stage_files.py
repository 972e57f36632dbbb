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
Writes `datastore.json`, locks the datastore, and lets many processes make the shards of a stage.

A stage passes its shards to [`run_shards`], and each process makes some of them. A shard gets its name when it is
complete, and it is recorded with its checksum. A run that was killed can therefore be resumed and ends with the same
bytes.
"""

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm
from transformers.utils import logging

from data_prep.shares import TASKS_LOCK, Follower, NotBegunError, ShareDone, current_share
from modeling_retro.datastore.checksums import checksum
from modeling_retro.datastore.links import check_links
from modeling_retro.datastore.manifest import (
    FIRST_FORMAT_VERSION,
    INDEXES,
    MANIFEST_NAME,
    TRAIN_SPLIT,
    Manifest,
    Record,
    read_manifest,
)
from modeling_retro.datastore.splits import split_path
from modeling_retro.datastore.versions import superseding
from modeling_retro.durable_files_retro import make_folder, recover_all, remove, whole, write_json


logger = logging.get_logger(__name__)

STAGES = ("chunks", "embeddings", "neighbors")
# The stages that are made from a stage, and are removed with it.
_MADE_OF = {
    "chunks": ("embeddings", "index", "bm25"),
    "embeddings": ("index",),
    "index": (),
    "bm25": (),
    "neighbors": (),
}
_LOCK_NAME = ".lock"
_POLL_SECONDS = 0.5
_locks: dict[Path, int] = {}


def process_state() -> PartialState | Follower:
    """The processes of this run. Those that have finished wait for the slowest without a time limit."""
    share = current_share()
    if share is not None and not share.begins:
        return Follower()
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=30))


@contextlib.contextmanager
def directory_lock(path: Path) -> Iterator[None]:
    """
    Prevents other runs from writing to `path`. All processes of this run share the lock, which ends when they end.

    Args:
        path (`Path`): The directory. It is created if it does not exist.

    Raises:
        ValueError: If another run holds the lock, or a symbolic link leads out of the directory.
    """
    path = path.resolve()
    if path in _locks:
        yield
        return
    make_folder(path)
    check_links(path)
    if (share := current_share()) is not None:
        with share.lock(path):
            _locks[path] = 0
            try:
                yield
            finally:
                del _locks[path]
        return
    state = process_state()
    handle = os.open(path / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
    tasks = os.open(path / TASKS_LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if state.is_main_process:
            for lock in (handle, tasks):
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ValueError(f"another run is writing to {path}; wait for it to end or stop it") from None
            recover_all(path)
        state.wait_for_everyone()
        # From here on the lock is shared. While any process of this run lives, no other run gets the exclusive lock.
        fcntl.flock(handle, fcntl.LOCK_SH)
        state.wait_for_everyone()
        _locks[path] = handle
        yield
    finally:
        _locks.pop(path, None)
        os.close(handle)
        os.close(tasks)
    # The next stage of this run takes the exclusive lock only when no process holds the shared one any longer.
    state.wait_for_everyone()


def open_manifest(path: Path) -> Manifest:
    """
    Reads the manifest of a datastore in order to write to it.

    Args:
        path (`Path`): The folder.

    Raises:
        ValueError: If the folder holds something else than a datastore.
    """
    manifest = read_manifest(path)
    # No process writes before all processes have read.
    process_state().wait_for_everyone()
    return manifest


def open_or_begin(path: Path) -> Manifest | None:
    """
    Reads the manifest of a datastore in order to write to it, or returns None if the folder is empty.

    Raises:
        ValueError: If the folder holds something else than a datastore.
    """
    if (path / MANIFEST_NAME).exists():
        return open_manifest(path)
    others = [entry.name for entry in path.iterdir() if not entry.name.startswith(".")] if path.exists() else []
    if others:
        raise ValueError(f"{path} is not empty and not a datastore (it holds {others[0]}); choose another directory")
    process_state().wait_for_everyone()
    return None


def share_settings(manifest: Manifest | None, settings: Mapping[str, Any]) -> Manifest:
    """
    The manifest of a datastore whose first split begins.

    Args:
        manifest ([`Manifest`], *optional*): What is left of an earlier one without splits.
        settings (`Mapping`): The settings of all splits: `chunk_size`, `continuation_chunks`, …, `tokenizer`.
    """
    before = {"format_version": FIRST_FORMAT_VERSION} if manifest is None else manifest.to_dict()
    return Manifest.from_dict({**before, **settings, "splits": {}}).seal()


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes `datastore.json` in the main process, while the others wait."""
    state = process_state()
    if isinstance(state, Follower):
        is_begun = (path / MANIFEST_NAME).exists() and read_manifest(path).checksum() == manifest.checksum()
        if not is_begun:
            raise NotBegunError
    if state.is_main_process:
        with superseding(path):
            manifest.write(path)
    state.wait_for_everyone()


def check_options(stage: str, options: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
    """Raises a `ValueError` that names the first option of a stage that differs from the run that began it."""
    for name in sorted(options):
        if options[name] != recorded.get(name):
            raise ValueError(
                f"`{stage}` was begun with {name}={recorded.get(name)!r}, not {options[name]!r}; "
                "use the same value, or --force to rebuild"
            )


def discard(path: Path, manifest: Manifest, split: str, first_stage: str) -> None:
    """
    Removes a stage of a split, and the stages that were made from it, from the disk and from `manifest`. Neighbors are
    removed with the index that found them.

    Args:
        path (`Path`): The datastore.
        manifest ([`Manifest`]): Its manifest, which is changed in place and written.
        split (`str`): Name of the split.
        first_stage (`str`): `"chunks"`, `"embeddings"`, `"index"`, `"bm25"` or `"neighbors"`.
    """
    if current_share() is not None:
        raise ValueError(f"a task makes shards and removes nothing; run the stage {first_stage} with --force before")
    stages = {first_stage, *_MADE_OF[first_stage]}
    gone = []
    for name, record in manifest.splits.items():
        root = split_path(path, name)
        if name == split:
            gone += [root / stage for stage in stages & {"chunks", "embeddings"}]
            if "embeddings" in stages:
                record.embeddings = None
        elif split != TRAIN_SPLIT or first_stage == "neighbors":
            continue  # the neighbors of all splits are ids of the chunks of this split
        retriever = record.neighbors.options.get("retriever", "dense") if record.neighbors is not None else "dense"
        if first_stage in ("chunks", "neighbors") or stages & set(INDEXES[retriever]):
            record.neighbors = None
            gone.append(root / "neighbors")
    if split == TRAIN_SPLIT:
        if "index" in stages and manifest.index is not None:
            gone += [path / name for name in manifest.index.sha256]
            manifest.index = None
        if "bm25" in stages and manifest.bm25 is not None:
            gone.append(path / manifest.bm25.folder)
            manifest.bm25 = None
    if "chunks" in stages:
        manifest.splits.pop(split, None)
        if split == TRAIN_SPLIT:
            manifest.removed = manifest.compacted = None
    write_manifest(path, manifest)
    if process_state().is_main_process:
        for entry in gone:
            remove(entry)
    process_state().wait_for_everyone()


def deal(shards: Sequence[int], sizes: Sequence[int], number: int) -> list[list[int]]:
    """
    Deals shards to processes: the largest first, to the process that has the least so far.

    Args:
        shards (`Sequence[int]`): The shards.
        sizes (`Sequence[int]`): Sizes of all shards, also of others.
        number (`int`): Number of processes.

    Returns:
        `list[list[int]]`: the shards of each process, in their order.
    """
    dealt, loads = [[] for _ in range(number)], [0] * number
    for shard in sorted(shards, key=lambda shard: -sizes[shard]):
        process = loads.index(min(loads))
        loads[process] += sizes[shard]
        dealt[process].append(shard)
    return [sorted(part) for part in dealt]


def run_shards(
    folder: Path,
    records: Sequence[Record],
    names: Sequence[str],
    make: Callable[[int, Path, Callable[[int], Any]], dict[str, Any]],
    suffix: str = "",
    description: str = "",
    in_order: bool = False,
    num_proc: int = 1,
    sizes: Sequence[int] | None = None,
    unit: str = "chunks",
) -> list[dict[str, Any]]:
    """
    Makes the shards that are not finished yet. The processes share them.

    Args:
        folder (`Path`): Folder of the stage.
        records (`Sequence[Record]`): Records of finished shards, from the manifest.
        names (`Sequence[str]`): Names of all shards, in order.
        make (`Callable`):
            (index of the shard, path to write to, function to call with the number of chunks that were made since its
            last call) -> the record of the shard. What it leaves uncounted is counted at the end of the shard.
        suffix (`str`, *optional*): Suffix of a shard's file, such as `".npy"`.
        description (`str`, *optional*): Label of the progress bar.
        in_order (`bool`, *optional*, defaults to `False`):
            Whether one process makes all shards in order and stops after the first whose record says `last`.
        num_proc (`int`, *optional*, defaults to 1):
            Number of processes into which each process of the run divides for its shards, unless they are made in
            order. They are forked, so `make` must not use libraries whose threads have begun to work.
        sizes (`Sequence[int]`, *optional*): Number of chunks of each shard, or of another `unit`. Defaults to shards.
        unit (`str`, *optional*, defaults to `"chunks"`): What the progress bar counts.

    Returns:
        `list[dict]`: the records of all shards in order, with `name` and `sha256`.
    """
    state = process_state()
    done = {record.name: record.to_dict() for record in records}
    todo = unfinished_shards(folder, records, names)
    # One process decides, because others could see the folder while shards are being finished.
    todo = broadcast_object_list([todo])[0]
    if sizes is None:
        sizes, unit = [1] * len(names), "shards"
    share = current_share()
    if share is not None:
        if in_order:
            raise ValueError("the shards of a split with max_chunks are made in order; make them without tasks")
        share.begin()
        mine = sorted({*share.part(len(names))} & {*todo})
    elif in_order:
        ended = any(record.get("last") for record in finished_records(folder, names))
        mine = todo if state.is_main_process and not ended else []
    else:
        mine = deal(todo, sizes, state.num_processes)[state.process_index]

    def finish(index: int, advance: Callable[[int], Any]) -> dict[str, Any]:
        left = sizes[index]

        def count(number: int) -> None:
            nonlocal left
            number = min(number, left)
            left -= number
            advance(number)

        with whole(folder / (names[index] + suffix)) as temporary:
            record = make(index, temporary, count)
            record |= {"name": names[index], "sha256": checksum(temporary)}
        write_json(_record_path(folder, names[index]), record)
        advance(left)
        return record

    total = sum(sizes[index] for index in mine)
    is_silent = share is None and not state.is_main_process
    with tqdm(total=total, desc=description, unit=f" {unit}", disable=is_silent) as progress:
        if num_proc > 1 and len(mine) > 1 and not in_order:
            for number in _fork(finish, mine, num_proc):
                progress.update(number)
        else:
            for index in mine:
                record = finish(index, progress.update)
                if in_order and record["last"]:
                    break
    if share is not None:
        raise ShareDone(len(mine))
    state.wait_for_everyone()
    for record in finished_records(folder, names):
        done.setdefault(record["name"], record)
    return [done[name] for name in names if name in done]


def _fork(finish: Callable[[int, Callable[[int], Any]], Any], indices: Sequence[int], num_proc: int) -> Iterator[int]:
    """
    Calls a function for each index in forked processes, and yields what it counted meanwhile. If a process fails, the
    others end with the shard that they are making, and its error is raised. They end so as well if this process is
    killed.
    """
    context, parent = multiprocessing.get_context("fork"), os.getpid()

    def work(part: Sequence[int], sender: Connection, counter: Any) -> None:
        def count(number: int) -> None:
            counter.value += number  # this process alone writes it, so that no lock can outlive a killed one

        signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # Ctrl-C reaches the parent, which lets this process end its shard
        for index in part:
            if os.getppid() != parent or stop.is_set():
                return
            try:
                finish(index, count)
            except Exception as error:
                sender.send(error)
                return

    stop, processes, receivers, counters = context.Event(), [], [], []
    for start in range(min(num_proc, len(indices))):
        receiver, sender = context.Pipe(duplex=False)
        counters.append(context.RawValue("q", 0))
        processes.append(context.Process(target=work, args=(indices[start::num_proc], sender, counters[-1])))
        processes[-1].start()
        sender.close()  # the copy of the child stays open, so that its end is the end of the messages
        receivers.append(receiver)
    errors, counted = [], 0
    try:
        while receivers:
            for receiver in wait(receivers, timeout=_POLL_SECONDS):
                try:
                    errors.append(receiver.recv())
                    stop.set()
                except EOFError:
                    receivers.remove(receiver)
            total = sum(counter.value for counter in counters)
            yield total - counted
            counted = total
    finally:
        stop.set()
        for process in processes:
            process.join()
    if errors:
        raise errors[0]
    broken = [process.exitcode for process in processes if process.exitcode]
    if broken:
        raise RuntimeError(f"a process of --num_proc ended with exit code {broken[0]}; run the same command again")


def unfinished_shards(folder: Path, records: Sequence[Record], names: Sequence[str]) -> list[int]:
    """Indices of the named shards that are still to be made. The arguments are those of [`run_shards`]."""
    done = {record.name for record in records}
    return [i for i, name in enumerate(names) if name not in done and not _record_path(folder, name).exists()]


def finished_records(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Records of the named shards that were finished after the manifest was last written."""
    files = [_record_path(folder, name) for name in names]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]


def clear_records(folder: Path) -> None:
    """Removes the records of single shards, once the manifest holds them."""
    state = process_state()
    if state.is_main_process:
        for file in folder.glob(".shard-*.json"):
            file.unlink()
    state.wait_for_everyone()


def _record_path(folder: Path, name: str) -> Path:
    return folder / f".{name}.json"


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    was_quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not was_quiet:
            datasets.enable_progress_bars()


def save_shard(path: Path, columns: Mapping[str, Any], features: datasets.Features) -> None:
    """
    Writes arrays as a folder for `datasets.load_from_disk`, in one record batch, so that it is read as one view.

    Args:
        path (`Path`): The folder.
        columns (`Mapping[str, np.ndarray]`): [n] or [n, width] arrays.
        features (`datasets.Features`): Their types.
    """
    arrays = []
    for name, field in zip(features, features.arrow_schema, strict=True):
        values = columns[name]
        if values.ndim == 2:
            flat = pa.array(values.reshape(-1), type=field.type.value_type)
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=field.type))
        else:
            arrays.append(pa.array(values, type=field.type))
    schema = features.arrow_schema
    # `save_to_disk` writes batches of 1,000 rows. Here it makes the folder from one empty row; the data is written
    # below.
    row = pa.Table.from_arrays([pa.nulls(1, type=field.type) for field in schema], schema=schema)
    digest = hashlib.sha256()
    for name in features:
        digest.update(np.ascontiguousarray(columns[name]).data)
    with _quiet_datasets():
        datasets.Dataset(row, fingerprint=digest.hexdigest()[:16]).save_to_disk(str(path))
    (file,) = path.glob("*.arrow")
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
