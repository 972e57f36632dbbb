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
import io
import os
import threading

import pytest
from tqdm.auto import tqdm

from data_prep import heartbeat
from data_prep.arguments import run_command
from data_prep.heartbeat import Heartbeat, end_heartbeat, step
from data_prep.terminal import printable_output


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set, and a heartbeat that beats only when they say so."""
    now = [0.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Heartbeat, "run", lambda self: None)
    return now


@pytest.fixture
def terminals(monkeypatch):
    """A function that makes the standard output and error terminals. pytest itself sets both when a test begins."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def use():
        out, err = Terminal(), Terminal()
        monkeypatch.setattr("sys.stdout", out)
        monkeypatch.setattr("sys.stderr", err)
        return out, err

    return use


def test_a_silent_command_counts_the_seconds_and_the_next_output_erases_them(terminals, clock):
    out, err = terminals()
    with printable_output():
        print("begun")
        heartbeat._running.beat()
        assert err.getvalue() == ""  # it has just printed
        clock[0] = 3.0
        with step("index"):
            heartbeat._running.beat()
        assert err.getvalue() == "\r\x1b[Kindex: 3 s"
        clock[0] = 4.0
        heartbeat._running.beat()
        assert err.getvalue().endswith("\r\x1b[Kworking: 4 s")
        print("done")
        assert err.getvalue().endswith("4 s\r\x1b[K") and out.getvalue() == "begun\ndone\n"
        clock[0] = 4.5
        heartbeat._running.beat()
        assert err.getvalue().endswith("4 s\r\x1b[K")


def test_a_line_that_is_not_ended_is_left_alone(terminals, clock):
    err = terminals()[1]
    with printable_output():
        print("The model is", end="", flush=True)
        clock[0] = 9.0
        heartbeat._running.beat()
        assert err.getvalue() == ""
        print(" a")
        clock[0] = 19.0
        heartbeat._running.beat()
        assert "working: 10 s" in err.getvalue()


def test_bars_are_redrawn(terminals, clock):
    err = terminals()[1]
    with printable_output(), tqdm(total=3, desc="Embedding", mininterval=100) as bar:
        bar.update(2)
        before = err.getvalue()
        clock[0] = 5.0
        heartbeat._running.beat()
        drawn = err.getvalue()[len(before) :]
        assert "2/3" in drawn and "working" not in drawn


@pytest.mark.parametrize("change", [{"RANK": "1"}, {"TERM": "dumb"}])
def test_other_processes_and_simple_terminals_show_none(terminals, clock, monkeypatch, change):
    terminals()
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    with printable_output():
        assert heartbeat._running is None


def test_a_server_that_waits_and_a_command_that_ended_show_none(terminals, clock):
    err = terminals()[1]
    with printable_output():
        beats = heartbeat._running
        clock[0] = 3.0
        beats.beat()
        end_heartbeat()
        ended = err.getvalue()
        assert ended.endswith("\x1b[K")
        clock[0] = 6.0
        beats.beat()
        assert err.getvalue() == ended
    with printable_output():
        beats = heartbeat._running
    clock[0] = 9.0
    beats.beat()
    assert err.getvalue() == ended and heartbeat._running is None


def test_a_command_beats_by_itself(terminals, monkeypatch):
    err = terminals()[1]
    monkeypatch.setattr(heartbeat, "_SECONDS", 0.01)
    beaten, beat = threading.Event(), Heartbeat.beat

    def watched(self):
        beat(self)
        if "working" in err.getvalue():
            beaten.set()

    monkeypatch.setattr(Heartbeat, "beat", watched)
    seen = []
    run_command(lambda: seen.append(beaten.wait(60)))
    assert seen == [True] and err.getvalue().endswith("\r\x1b[K")


def test_a_process_is_not_forked_within_a_beat():
    with heartbeat._beating:
        forked = []
        thread = threading.Thread(target=lambda: forked.append(_fork_and_wait()))
        thread.start()
        thread.join(0.2)
        assert not forked
    thread.join(60)
    assert forked == [0]


def _fork_and_wait():
    pid = os.fork()
    if pid == 0:
        os._exit(1 if heartbeat._beating.locked() else 0)  # the child's lock is free
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
