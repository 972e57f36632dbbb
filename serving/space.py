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
"""Writes the page of `retro demo` as a Space of the Hub"""

import shutil
from importlib.metadata import metadata, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from data_prep.shipped_models import find_model
from modeling_retro.datastore.datastore import RetroDatastore
from trainers.load_model import load_retro_model


PACKAGES = ("modeling_retro", "data_prep", "trainers", "serving")
DISTRIBUTION = "retro-transformers"

APP = '''"""What looking up is worth, as a page."""

from serving.demo import Demo, create_page
from serving.load import load_model


MODEL, DATASTORE = "{model}", "{datastore}"
page = create_page(Demo(load_model(MODEL, DATASTORE, reader={reader!r}), MODEL, DATASTORE))

if __name__ == "__main__":
    page.queue(default_concurrency_limit=1).launch()
'''

README = """---
title: What looking up is worth
emoji: 🔎
colorFrom: blue
colorTo: indigo
sdk: gradio
sdk_version: {gradio}
python_version: "3.11"
app_file: app.py
license: {license}
short_description: A language model with retrieval, beside without
{links}---

# What looking up is worth

A language model reads the neighbors of each chunk in a datastore while it predicts the next one. This page continues a
prompt with neighbors and without, and colors each token by the bits that its neighbors saved. It was written by
`retro demo --export`; `python app.py` runs it on your machine, with what `requirements.txt` names.
"""


def export_space(folder: str | Path, model: str, datastore: str, reader: str | None = None) -> str:
    """
    Writes the page as a folder that runs by itself. It contains the code, and the model and the datastore if they are
    folders of this machine. A model or datastore on the Hub is loaded from there.

    Args:
        folder (`str` or `Path`): Folder to write to, which must be new or empty.
        model (`str`): Folder or Hub id of the model.
        datastore (`str`): Folder or Hub id of the datastore.
        reader (`str`, *optional*): Adapters that were trained to read neighbors, as `load_model` takes them.

    Returns:
        `str`: a summary of the folder, and how to upload it.

    Raises:
        ValueError: If the folder is not empty, or the model does not fit the datastore.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and not empty; choose a new folder for --export")
    opened = RetroDatastore.from_pretrained(datastore)
    model = find_model(model)
    loaded = load_retro_model(model, opened, reader=reader)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    links = ""
    if Path(model).is_dir():
        # The whole model is saved, because the Space could not load a base that only this machine has.
        loaded.save_pretrained(partial / "model")
        opened.tokenizer.save_pretrained(partial / "model")
        model, reader = "model", None  # it has the adapters now
    else:
        links += f"models:\n- {model}\n"
    if Path(datastore).is_dir():
        shutil.copytree(datastore, partial / "datastore")
        datastore = "datastore"
    else:
        links += f"datasets:\n- {datastore}\n"
    for package in PACKAGES:
        source = Path(__file__).parents[1] / package
        shutil.copytree(source, partial / package, ignore=shutil.ignore_patterns("__pycache__", "retro_tiny"))
    (partial / "app.py").write_text(APP.format(model=model, datastore=datastore, reader=reader), encoding="utf-8")
    (partial / "requirements.txt").write_text("\n".join(_requirements()) + "\n", encoding="utf-8")
    license = metadata(DISTRIBUTION).get("License-Expression") or metadata(DISTRIBUTION).get("License")
    card = README.format(gradio=version("gradio"), license=license.lower(), links=links)
    (partial / "README.md").write_text(card, encoding="utf-8")
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
    return (
        f"wrote {folder}; `python app.py` in it shows the page, and this makes a Space of it:\n"
        f"    hf upload NAME/SPACE {folder} . --repo-type space"
    )


def _requirements() -> list[str]:
    """The requirements of the page, pinned to the installed versions. gradio comes with the Space."""
    needed = {}
    for line in requires(DISTRIBUTION):
        requirement = Requirement(line)
        is_needed = requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in ("", "demo")
        )
        if is_needed and requirement.name != "gradio":
            needed[requirement.name] = f"{requirement.name}=={version(requirement.name).split('+')[0]}"
    return sorted(needed.values())
