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
"""What the documentation tells people to type exists: options are parsed, Python is compiled, the first call runs."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from trainers.cli import COMMANDS


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands():
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while "&&" in words:
                    words = words[words.index("&&") + 1 :]
                if words[:1] == ["retro"]:
                    yield pytest.param(words[1:], id=f"{page.name}: {' '.join(words)}")


class Parsed(Exception):
    pass


@pytest.mark.parametrize("words", list(commands()))
def test_command_of_the_documentation_has_valid_options(words, monkeypatch):
    command, *options = words
    if command == "--help":
        return
    module = importlib.import_module(COMMANDS[command][0])
    parse_arguments = module.parse_arguments

    def parse_only(*args, **kwargs):
        parse_arguments(*args, **kwargs)
        raise Parsed

    monkeypatch.setattr(module, "parse_arguments", parse_only)
    with pytest.raises(Parsed):
        module.main(options)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_the_documentation_compiles(page):
    for number, block in enumerate(blocks(page, "python")):
        compile(block, f"{page.name}, Python block {number}", "exec")


def test_the_first_call_of_the_readme_runs():
    namespace = {}
    exec(blocks(ROOT / "README.md", "python")[0], namespace)
    assert namespace["outputs"].logits.shape == (1, 512, 32000)
    assert all(parameter.grad is not None for parameter in namespace["model"].parameters())


def test_every_command_of_the_readme_table_exists_and_none_is_missing():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("## Commands") : text.index("## Layout")]
    named = set(re.findall(r"`([a-z-]+)`", table))
    assert named == set(COMMANDS)
