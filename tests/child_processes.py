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
Child processes for tests.

They start from a server that has imported the libraries and has no threads. A fork of the tests' own process could
wait forever for a lock that a thread of another test (a gRPC server, a progress bar) held then.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState


CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(
    ["pytest", "transformers.models.bert.modeling_bert", "data_prep.prepare", "data_prep.upkeep.changes"]
)


def _work(rank: int, world_size: int, port: int, make: Callable, output_dir: Path, log: Path) -> None:
    """One process of a run, as `accelerate launch` would start it."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    make(output_dir)
    assert PartialState().num_processes == world_size


def run_processes(make: Callable, output_dir: Path, seconds: float | None = None, world_size: int = 2) -> bool:
    """Runs `make` in some processes; kills them after `seconds`. Returns whether they ended by themselves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = output_dir.with_suffix(".log")
    arguments = [(rank, world_size, port, make, output_dir, log) for rank in range(world_size)]
    processes = [CHILDREN.Process(target=_work, args=own) for own in arguments]
    for process in processes:
        process.start()
    deadline = time.monotonic() + (600 if seconds is None else seconds)
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.01)
    ended = all(process.exitcode == 0 for process in processes)
    # All stop before the first is killed, so that none is left to see the connection to another break.
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for process in processes:
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):  # it has ended since
                    os.kill(process.pid, number)
    for process in processes:
        process.join()
        if seconds is None:
            assert process.exitcode == 0, log.read_text()
        else:
            assert process.exitcode in (0, -signal.SIGKILL), log.read_text()
    return ended
