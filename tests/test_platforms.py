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
"""What other systems lack is named at import, or replaced by something as safe."""

import os
import subprocess
import sys

import pytest

from modeling_retro import durable_files_retro
from modeling_retro.durable_files_retro import replace


@pytest.mark.parametrize("package", ["data_prep", "trainers", "serving"])
def test_windows_is_refused_by_name(package):
    program = f"import sys; sys.platform = 'win32'; import {package}"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 1
    assert f"ImportError: {package} needs Linux or macOS" in ended.stderr and "Subsystem for Linux" in ended.stderr


def test_models_are_read_without_the_calls_of_linux():
    program = (
        "import sys, os, datasets, faiss, torch, transformers\n"
        "sys.modules['fcntl'] = None\n"
        "del os.uname\n"
        "from modeling_retro import RetroConfig, RetroDatastore, RetroForCausalLM, RetroRetriever\n"
        "print(RetroConfig().model_type)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "retro\n"


def test_a_folder_takes_the_place_of_another_where_names_cannot_be_exchanged(tmp_path, monkeypatch):
    class OtherSystem:
        """The C library of a system without `renameat2`."""

        def __init__(self, *_, **__):
            pass

    monkeypatch.setattr(durable_files_retro.ctypes, "CDLL", OtherSystem)
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    replace(tmp_path / "new", tmp_path / "old")
    assert sorted(os.listdir(tmp_path)) == ["old"] and (tmp_path / "old" / "file").read_text() == "new"
