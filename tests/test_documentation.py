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
import runpy
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest

from trainers.cli import COMMANDS, GROUPS, accelerate_config_names


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PICTURES = runpy.run_path(str(ROOT / "docs" / "pictures.py"))["PICTURES"]


def fenced_blocks(page):
    """Language and text of the fenced blocks of a page, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def blocks(page, language):
    return [block for found, block in fenced_blocks(page) if found == language]


def commands_of(block):
    """The `retro` commands of a block of shell; launched modules as the commands that they are."""
    for line in block.replace("\\\n", " ").splitlines():
        command = re.sub(r"\s+", " ", line.split(" && ")[-1]).strip()
        launched = re.match(r"accelerate launch .*?-m (\S+) (.*)", command)
        if launched:
            [name] = [name for name, (module, _) in COMMANDS.items() if module == launched[1]]
            command = f"retro {name} {launched[2]}"
        if command.startswith("retro "):
            yield command


def all_commands(language="bash"):
    """Each command in blocks of a language, and the page it stands on."""
    for page in PAGES:
        for block in blocks(page, language):
            for command in commands_of(block):
                yield command, page


def parameters(language):
    for command, page in all_commands(language):
        yield pytest.param(shlex.split(command)[1:], id=f"{page.name}: {command}")


class Parsed(Exception):
    pass


@pytest.mark.parametrize("words", [*parameters("bash"), *parameters("text")])
def test_command_of_the_documentation_has_valid_options(words, monkeypatch):
    command, *options = words
    if command == "--help":
        return
    while options and options[0] in ("--accelerate-config", "--num-processes"):
        option, value, *options = options
        assert option == "--num-processes" or value in accelerate_config_names()
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
    for number, block in enumerate(blocks(page, "python") + blocks(page, "py")):
        compile(block, f"{page.name}, Python block {number}", "exec")


def test_the_api_page_says_what_the_docstrings_say():
    written = runpy.run_path(str(ROOT / "docs" / "api_page.py"))["api_page"]()
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == written, (
        "run python docs/api_page.py > docs/api.md"
    )


def test_the_security_page_says_what_the_tests_try():
    module = runpy.run_path(str(ROOT / "docs" / "security_page.py"))
    assert len(list(module["rows"]())) > 20
    assert (ROOT / "docs" / "security.md").read_text(encoding="utf-8") == module["security_page"](), (
        "run python docs/security_page.py > docs/security.md"
    )


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_shows_the_numbers_of_the_pages(name):
    drawn = PICTURES[name]()
    assert (ROOT / "docs" / "pictures" / f"{name}.svg").read_text(encoding="utf-8") == drawn, (
        "run python docs/pictures.py"
    )
    assert ElementTree.fromstring(drawn).tag == "{http://www.w3.org/2000/svg}svg"


def test_every_picture_is_drawn_and_shown():
    assert {path.stem for path in (ROOT / "docs" / "pictures").iterdir()} == set(PICTURES)
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert all(f"pictures/{name}.svg)" in text for name in PICTURES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_the_documentation_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", page.read_text(encoding="utf-8")):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor[1:] in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_lists_the_commands_in_the_groups_of_the_help():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("## Commands") : text.index("## Documentation")]
    rows = re.findall(r"^\| ([^|]+) \| (`[^|]+) \|$", table, re.MULTILINE)
    assert {group: re.findall(r"`([a-z-]+)`", commands) for group, commands in rows} == {
        group: list(commands) for group, commands in GROUPS.items()
    }


def test_every_recipe_of_the_package_is_on_its_page():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `([\w.]+)`", text, re.MULTILINE))
    recipes = {path.name.removesuffix(".yaml") for path in (ROOT / "data_prep" / "recipes").iterdir()}
    assert recipes <= named


SECOND_ARGUMENT = re.compile(r"[.:] \w+ \((?:`[A-Za-z][^)]*|\[`\w+`\](?:, \*optional\*)?)\):")


@pytest.mark.parametrize("package", ["modeling_retro", "data_prep", "trainers", "serving"])
def test_each_argument_of_a_docstring_begins_a_line(package):
    for path in sorted((ROOT / package).rglob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            assert not SECOND_ARGUMENT.search(line), f"{path.name}, line {number}: {line.strip()}"
