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
"""Command lines: what is shown when, and options of two kinds of dataclasses."""

import os
import pty
import select
import subprocess
import sys
import termios
from dataclasses import dataclass, field

import pytest

from data_prep.arguments import parse_arguments


WITH_BARS = """
from data_prep.arguments import run_command
def main():
    from tqdm.auto import tqdm
    for _ in tqdm(range(3), desc="work"):
        pass
    print("done")
run_command(main)
"""


@dataclass
class Options:
    name: str = field(metadata={"help": "A name."})
    fsdp_size: int = field(default=1, metadata={"help": "A size."})


@dataclass
class TrainingOptions:
    learning_rate: float = field(default=0.5, metadata={"help": "The learning rate."})


@dataclass
class Training(TrainingOptions):
    fsdp: str = field(default="", metadata={"help": "Not shown by --help."})

    def __post_init__(self):
        if self.learning_rate < 0:
            raise ValueError("learning_rate is negative")


def parse(*words):
    return parse_arguments(
        Options,
        argv=list(words),
        prog="test",
        training_options=TrainingOptions,
        training_arguments="test_arguments:Training",
    )


@pytest.fixture(autouse=True)
def this_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "test_arguments", sys.modules[__name__])


def test_training_arguments_are_parsed_with_the_others():
    options, training = parse("--name", "x", "--fsdp", "full", "--learning_rate", "2")
    assert options == Options("x") and training == Training(2.0, "full")


def test_help_shows_own_options_and_names_the_others(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse("--help")
    text = capsys.readouterr().out
    assert exit_info.value.code == 0
    assert "--learning_rate" in text and "--fsdp_size" in text and "--fsdp " not in text
    assert "transformers.TrainingArguments" in text


@pytest.mark.parametrize(
    "words", [["--learning_rate", "high", "--name", "x"], [], ["--name", "x", "--fsdp_size", "a"]]
)
def test_mistakes_are_found_before_the_training_arguments_are_imported(monkeypatch, words):
    monkeypatch.setitem(sys.modules, "test_arguments", None)
    with pytest.raises(SystemExit):
        parse(*words)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="--nonsense"):
        parse("--name", "x", "--nonsense", "1")


def test_a_config_file_holds_options_of_every_kind(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("name: x\nfsdp: full\nlearning_rate: 1e-3\n")
    options, training = parse("--config", str(file), "--learning_rate", "2")
    assert options == Options("x") and training == Training(2.0, "full")
    file.write_text("name: x\nnonsense: 1\n")
    with pytest.raises(SystemExit):
        parse("--config", str(file))


def test_short_work_shows_no_bar_where_there_is_no_terminal():
    process = subprocess.run([sys.executable, "-c", WITH_BARS], capture_output=True, text=True)
    assert process.stdout == "done\n" and process.stderr == ""


def test_a_terminal_shows_bars():
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    # Commands that ran in the process of the tests, where there is no terminal, have asked for rare bars.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TQDM_")}
    process = subprocess.run(
        [sys.executable, "-c", WITH_BARS], stdout=subprocess.DEVNULL, stderr=terminal, env=environment
    )
    # What was written may be lost once the terminal is closed.
    shown = os.read(controller, 10_000).decode() if select.select([controller], [], [], 10)[0] else ""
    os.close(terminal)
    os.close(controller)
    assert process.returncode == 0 and "work: 100%" in shown


@dataclass
class Switches:
    keep_it: bool = field(default=True, metadata={"help": "Keep the thing."})


def test_an_option_that_switches_off_says_so(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(Switches, argv=["--help"])
    text = capsys.readouterr().out
    assert text.count("Keep the thing.") == 1 and "Switch --keep_it off." in text


@dataclass
class OnADatastore:
    """The datastore may stand first."""

    datastore: str = field(metadata={"help": "The datastore."})
    name: str | None = field(default=None, metadata={"help": "A name."})


def test_the_datastore_may_stand_first_and_no_default_is_no_news(capsys):
    assert parse_arguments(OnADatastore, argv=["a/folder", "--name", "x"])[0] == OnADatastore("a/folder", "x")
    assert parse_arguments(OnADatastore, argv=["--name", "x", "--datastore", "b"])[0] == OnADatastore("b", "x")
    with pytest.raises(SystemExit):
        parse_arguments(OnADatastore, argv=["--help"])
    assert "default: None" not in capsys.readouterr().out


RUN = "from data_prep.arguments import run_command\n"


def test_a_broken_pipe_is_no_traceback():
    program = RUN + "run_command(lambda: [print('line') for _ in range(100_000)])"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"line\n"
    process.stdout.close()
    assert process.wait(60) == 141 and process.stderr.read() == b""


def test_a_missing_extra_is_named_as_pip_finds_it_in_a_clone():
    program = (
        RUN
        + "def main():\n    raise ImportError('needs x: `pip install retro-transformers[bm25]`')\nrun_command(main)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 1 and '`pip install ".[bm25]"` (in a clone' in ended.stderr
