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
"""A vLLM process ends with the server that started it, even if that is killed. A sleeping module stands for vLLM."""

import fcntl
import signal
import subprocess
import sys
import time

import pytest


SLEEPING = """
import fcntl, subprocess, sys, time
held = open({lock!r}, "w")
fcntl.flock(held, fcntl.LOCK_EX)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], pass_fds=[held.fileno()])
print("started", flush=True)
time.sleep(600)
"""
SERVER = """
from serving.vllm.processes import EngineProcess
process = EngineProcess({python!r}, "model", "float32", 1.0)
process.ensure_running()
input()
process.stop()
"""


@pytest.mark.parametrize("is_killed", [True, False])
def test_a_process_ends_with_its_server(tmp_path, is_killed):
    lock = str(tmp_path / "lock")
    module = tmp_path / "vllm" / "entrypoints" / "openai" / "api_server.py"
    module.parent.mkdir(parents=True)
    module.write_text(SLEEPING.format(lock=lock))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{tmp_path}" exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    command = [sys.executable, "-c", SERVER.format(python=str(python))]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = iter(server.stderr.readline, "")
    assert "started\n" in lines  # it and a child of it hold the lock
    if is_killed:
        server.send_signal(signal.SIGKILL)
    server.communicate("\n" if not is_killed else None, timeout=60)
    deadline = time.monotonic() + 60
    with open(lock, "w") as free:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(free, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.1)
    pytest.fail("the process that stands for vLLM still runs")
