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
"""The command `retro`."""

import importlib.util

import pytest

from trainers.cli import COMMANDS, GROUPS, accelerate_config_names, main


def test_help_lists_every_command_below_its_group(capsys):
    main(["--help"])
    paragraphs = capsys.readouterr().out.split("\n\n")
    assert set(COMMANDS) == {command for group in GROUPS.values() for command in group}
    for group, commands in GROUPS.items():
        [lines] = [paragraph.splitlines()[1:] for paragraph in paragraphs if paragraph.startswith(f"{group}:")]
        assert [line.split()[0] for line in lines] == list(commands)


def test_no_command_shows_the_help(capsys):
    main([])
    assert "usage: retro COMMAND" in capsys.readouterr().out


def test_unknown_command_names_the_known_ones(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["chunks"])
    assert exit_info.value.code != 0
    error = capsys.readouterr().err
    assert "'chunks'" in error
    assert all(command in error for command in COMMANDS)


@pytest.mark.parametrize(
    ("mistake", "meant"), [("generat", "generate"), ("train_retriever", "train-retriever"), ("evalute", "evaluate")]
)
def test_unknown_command_guesses_the_nearest(mistake, meant, capsys):
    with pytest.raises(SystemExit):
        main([mistake])
    assert f"did you mean {meant!r}?" in capsys.readouterr().err


def test_a_word_that_is_near_no_command_is_not_guessed(capsys):
    with pytest.raises(SystemExit):
        main(["xyzzy"])
    assert "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_module(command):
    assert importlib.util.find_spec(COMMANDS[command][0]) is not None


@pytest.mark.parametrize("command", ["train", "evaluate", "generate", "quickstart"])
def test_command_shows_its_own_help(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--help"])
    assert exit_info.value.code == 0
    assert f"usage: retro {command}" in capsys.readouterr().out


def test_mistake_of_the_user_is_one_line_and_a_failure(capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_info:
        main(["evaluate", "--model", "m", "--datastore", str(tmp_path), "--output_dir", str(tmp_path / "out")])
    assert exit_info.value.code == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1


def test_accelerate_configs_are_listed_and_readable(capsys):
    assert accelerate_config_names() == ["ddp", "fsdp2", "multi_node", "single"]
    main(["--help"])
    assert "ddp, fsdp2, multi_node, single" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "processes"), [("single", 1), ("ddp", 3), ("fsdp2", 3)])
def test_accelerate_config_launches_the_module_with_its_options(monkeypatch, name, processes):
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    main(["train", "--accelerate-config", name, "--num-processes", str(processes), "--output_dir", "out"])
    (arguments,) = launched
    assert arguments.config_file.endswith(f"{name}.yaml")
    assert arguments.num_processes == processes
    assert arguments.module
    assert [arguments.training_script, *arguments.training_script_args] == [
        "trainers.scripts.train_retro",
        "--output_dir",
        "out",
    ]


def test_unknown_accelerate_config_names_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--accelerate-config", "dpp"])
    assert "ddp, fsdp2, multi_node, single" in capsys.readouterr().err
