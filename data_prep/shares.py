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
Lets independent tasks make the shards of a stage: the tasks of a job array (Slurm, Kubernetes, …), or of Ray.

A task runs the stage like any other process, but it makes only its share of the shards and publishes nothing: the
shards and their records stay beside one another until the stage is run without a share, which makes what is missing
and publishes all. A task may therefore be killed, or run twice, at any time. The first one begins the stage in the
manifest while the others wait, so that all have the same plan and the same options.
"""

import contextlib
import fcntl
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers.utils import logging

from modeling_retro.durable_files_retro import recover_all, remove


logger = logging.get_logger(__name__)

# Tasks share it, and a run that publishes has it alone.
TASKS_LOCK = ".tasks.lock"
# Folders in which a stage keeps what all its tasks read, until it is published.
SHARED_WORK = ".join-"
_PAUSE = 0.5  # seconds
_share: "Share | None" = None


def remove_shared_work(path: Path) -> None:
    """Removes what tasks or processes share in the folder of a datastore while a stage runs, also of a killed run."""
    for folder in path.glob(f"{SHARED_WORK}*"):
        remove(folder)


class ShareDone(Exception):
    """Ends the stage of a task whose shards are made. Its argument is their number."""


class NotBegunError(Exception):
    """The stage is not begun in the manifest, and this task may not begin it, because others run."""


class Share:
    """
    The shards `index`, `index + number`, … of a stage, which one task makes.

    Args:
        index (`int`): Number of the task, from 0.
        number (`int`): Number of tasks.
        on_begin (`Callable`, *optional*): Called when this task has begun the stage, before it makes shards.
    """

    def __init__(self, index: int, number: int, on_begin: Callable[[], Any] | None = None):
        if number < 1 or not 0 <= index < number:
            raise ValueError(f"task {index} of {number} does not exist; tasks are numbered from 0 to {number - 1}")
        self.index, self.number, self.on_begin = index, number, on_begin
        self.begins = False  # whether it may write to the manifest
        self._handle: int | None = None

    @contextlib.contextmanager
    def lock(self, path: Path) -> Iterator[None]:
        """Waits until nothing but other tasks writes to the folder. The first of them has it alone for a while."""
        self._handle = os.open(path / TASKS_LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            said = False
            while not self._try_lock():
                if not said:
                    logger.warning(f"task {self.index} waits for another run, which is writing to {path}")
                    said = True
                time.sleep(_PAUSE)
            if self.begins:
                recover_all(path)
            yield
        finally:
            os.close(self._handle)
            self.begins, self._handle = False, None

    def _try_lock(self) -> bool:
        for kind in (fcntl.LOCK_EX, fcntl.LOCK_SH):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._handle, kind | fcntl.LOCK_NB)
                self.begins = kind == fcntl.LOCK_EX
                return True
        return False

    def begin(self) -> None:
        """Lets the other tasks begin too, when the manifest and all that the shards are made of are there."""
        if self.begins and self.on_begin is not None:
            self.on_begin()
        fcntl.flock(self._handle, fcntl.LOCK_SH)
        self.begins = False

    def part(self, number: int) -> range:
        """The indices of its shards among `number` of them."""
        return range(self.index, number, self.number)


class Follower:
    """Stands for the processes of a run in a task that did not begin its stage. It is not the main process."""

    is_main_process, num_processes, process_index = False, 1, 0

    @property
    def device(self) -> Any:
        return PartialState().device

    def wait_for_everyone(self) -> None:
        """It waits for nobody."""


def current_share() -> Share | None:
    """The share of this process, if it is a task."""
    return _share


def run_share(stage: Callable[[], Any], index: int, number: int, on_begin: Callable[[], Any] | None = None) -> int:
    """
    Makes the share of one task of a stage. Nothing is published.

    Args:
        stage (`Callable`): Runs the stage, such as `partial(embed_chunks, "datastore", "encoder")`.
        index (`int`): Number of the task, from 0.
        number (`int`): Number of tasks.
        on_begin (`Callable`, *optional*): Called when this task has begun the stage, before it makes shards.

    Returns:
        `int`: the number of shards that were made.

    Raises:
        ValueError: If there is no such task, or the task consists of several processes.

    Example:

    ```python
    stage = partial(embed_chunks, "datastore", "encoder")
    for index in range(8):  # on as many machines, in any order
        run_share(stage, index, 8)
    stage()  # publishes
    ```
    """
    global _share
    share = Share(index, number, on_begin)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            "a task is one process, and this one was started by a launcher of several; start as many tasks instead"
        )
    while True:
        _share = share
        try:
            stage()
        except ShareDone as done:
            return done.args[0]
        except NotBegunError:
            time.sleep(_PAUSE * random.uniform(0.5, 1.5))
        else:
            return 0  # it was finished before
        finally:
            _share = None
