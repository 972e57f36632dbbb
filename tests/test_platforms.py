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
from conftest import make_texts, write_jsonl

from modeling_retro import durable_files_retro
from modeling_retro.durable_files_retro import replace


@pytest.mark.parametrize("package", ["data_prep", "trainers", "serving"])
def test_windows_is_refused_by_name(package):
    # Python 3.12's shutil asks for a module of Windows when it is imported.
    program = f"import shutil, sys; sys.platform = 'win32'; import {package}"
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


WITHOUT_LINUX = """
import ctypes, os, platform, resource, sys
import datasets, faiss, psutil, torch, transformers  # they choose their libraries by the real system

sys.platform = "darwin"
platform.libc_ver = lambda *_: ("", "")
for name in ("sched_getaffinity", "sched_setaffinity", "posix_fadvise", "posix_fallocate", "memfd_create",
             "copy_file_range", "splice", "pidfd_open", "getrandom", "eventfd", "setxattr", "getxattr"):
    if hasattr(os, name):
        delattr(os, name)
if hasattr(os, "process_cpu_count"):  # from Python 3.13 on, and on macOS the number of all processors
    os.process_cpu_count.__code__ = (lambda: cpu_count()).__code__


class SystemLibrary:
    def __init__(self, *_, **__):
        pass


def refuse(*_):
    raise ValueError("current limit exceeds maximum limit")


ctypes.CDLL, resource.setrlimit = SystemLibrary, refuse
"""


def test_a_datastore_is_built_and_changed_without_the_calls_of_linux(tmp_path, tiny_tokenizer, tiny_encoder_dir):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    for number, name in enumerate(("a", "b", "more")):
        write_jsonl(tmp_path / f"{name}.jsonl", make_texts(8, seed=number))
    program = f"""{WITHOUT_LINUX}
from data_prep.chunk import chunk_documents
from data_prep.embed import embed_chunks
from data_prep.index import build_index
from data_prep.neighbors import find_neighbors
from data_prep.memory import keep_freed_memory
from data_prep.upkeep.changes import add_documents, compact_datastore, remove_documents
from data_prep.upkeep.verify import verify
from modeling_retro import RetroRetriever
import serving, trainers.quickstart, trainers.chat_template

keep_freed_memory()
chunk_documents(["a.jsonl", "b.jsonl"], "ds", "tokenizer", chunk_size=8, shard_bytes=1000, num_proc=2)
embed_chunks("ds", {str(tiny_encoder_dir)!r})
build_index("ds")
find_neighbors("ds", num_neighbors=2)
add_documents("ds", "more.jsonl")
remove_documents("ds", [3])
compact_datastore("ds")
assert not verify("ds"), verify("ds")
retriever = RetroRetriever.from_pretrained("ds")
assert retriever.search("some text", 3)
print("searched")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.endswith("searched\n")


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
