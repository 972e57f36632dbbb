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
"""Full disks, folders in use, locks of killed runs, folders that cannot be written, and the order of writing."""

import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from child_processes import CHILDREN
from conftest import make_texts, write_jsonl

from data_prep.chunk import chunk_documents
from data_prep.deduplicate import deduplicate_documents
from data_prep.embed import embed_chunks
from data_prep.index import build_index
from data_prep.neighbors import find_neighbors
from data_prep.prepare import prepare_datastore
from data_prep.upkeep.verify import verify
from modeling_retro import RetroConfig, RetroDatastore, RetroForCausalLM, RetroRetriever


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_tokenizer, tiny_encoder_dir):
    folder = tmp_path_factory.mktemp("recipe")
    tiny_tokenizer.save_pretrained(folder / "tokenizer")
    texts = make_texts(150, seed=4)
    return {
        "tokenizer": str(folder / "tokenizer"),
        "encoder": str(tiny_encoder_dir),
        "splits": {
            "train": [str(write_jsonl(folder / "train.jsonl", [*texts, texts[0]]))],
            "validation": [str(write_jsonl(folder / "validation.jsonl", [*make_texts(40, seed=6), texts[3]]))],
        },
        "chunk": {"chunk_size": 8, "shard_bytes": 20_000},
        "deduplicate": {"ngram": 4},
        "index": {"factory": "IVF2,Flat"},
        "neighbors": {"num_neighbors": 2},
    }


@pytest.mark.hostile(
    "a power cut in any stage",
    "every file is on the disk before it gets its name, and no folder is missing at any moment (the order of the "
    "system calls is recorded)",
)
def test_every_stage_flushes_before_it_renames(recipe, tmp_path, disk_log):
    prepare_datastore(recipe, tmp_path / "datastore")
    assert disk_log.check() > 20
    prepare_datastore(recipe, tmp_path / "datastore", force=True)
    disk_log.check()


@pytest.mark.hostile(
    "a power cut while a model is saved",
    "each file has its old content or its new one",
)
def test_a_model_is_flushed_before_it_has_its_name(tmp_path, disk_log):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = RetroForCausalLM(RetroConfig(vocab_size=300, cross_attention_layers=[0], chunk_size=8, **sizes))
    for size in ("1GB", "20KB"):
        model.save_pretrained(tmp_path / "model", max_shard_size=size)
    assert disk_log.check() > 4


@contextmanager
def files_of_at_most(number):
    """Files grow to so many bytes and no further; Python and faiss see a failed write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def stages(recipe, path):
    """Each stage by its name."""
    train, validation = (recipe["splits"][split] for split in ("train", "validation"))
    yield "chunk", lambda: chunk_documents(train, path, recipe["tokenizer"], **recipe["chunk"])
    yield (
        "chunk validation",
        lambda: chunk_documents(validation, path, recipe["tokenizer"], "validation", **recipe["chunk"]),
    )
    yield "deduplicate", lambda: deduplicate_documents(path, **recipe["deduplicate"])
    yield "embed", lambda: embed_chunks(path, recipe["encoder"])
    yield "index", lambda: build_index(path, **recipe["index"])
    yield "neighbors", lambda: find_neighbors(path, **recipe["neighbors"])


@pytest.mark.hostile(
    "a full disk in each stage",
    "an error of one line that names the file; the same command resumes and ends with the same bytes",
)
def test_a_full_disk_stops_each_stage_and_the_same_command_goes_on(recipe, tmp_path):
    path, whole = tmp_path / "datastore", tmp_path / "whole"
    for _, run in stages(recipe, whole):
        run()
    for name, run in stages(recipe, path):
        # The manifest fits, at least one of the stage's own files does not.
        manifest = path / "datastore.json"
        before = manifest.read_bytes() if manifest.exists() else None
        with files_of_at_most(3000 if before is None else 10_000), pytest.raises(OSError, match="large|write"):
            run()
        if before is not None:
            json.loads(manifest.read_text())
        assert not list(path.rglob(".tmp-*")), name
        run()
    assert verify(path) == []
    assert {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()} == {
        p.relative_to(whole): p.read_bytes() for p in whole.rglob("*") if p.is_file()
    }


PREPARE = """
import json, sys
from data_prep.arguments import run_command
from data_prep import prepare, embed
from data_prep.prepare import prepare_datastore
if sys.argv[3] == "stop":
    def stop(*args, **kwargs):
        print("locked", flush=True)
        sys.stdin.read()
    prepare.embed_chunks = stop
run_command(lambda: prepare_datastore(json.load(open(sys.argv[1])), sys.argv[2]))
"""


@pytest.mark.hostile(
    "two runs of `retro prepare` on one folder",
    "the second is refused",
)
@pytest.mark.hostile(
    "the lock of a killed run",
    "it stops no later run",
)
def test_of_two_runs_one_is_refused_and_the_lock_of_a_killed_one_is_none(recipe, tmp_path):
    file, path = tmp_path / "recipe.json", tmp_path / "datastore"
    file.write_text(json.dumps(recipe))

    def start(what):
        command = [sys.executable, "-c", PREPARE, str(file), str(path), what]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    first = start("stop")
    while "locked" not in (line := first.stdout.readline()):
        assert line, first.stderr.read()
    second = start("run")
    errors = second.communicate()[1]
    assert second.returncode == 1
    assert f"error: another run is writing to {path}; wait for it to end or stop it" in errors
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert (path / ".lock").exists()
    prepare_datastore(recipe, path)
    assert verify(path) == []


def search_and_verify_only(path):
    """What a user who may only read the datastore can do."""
    if os.getuid() == 0:
        os.setuid(65534)
    datastore = RetroDatastore.from_pretrained(path)
    assert len(datastore.neighbor_ids) == len(datastore.chunks)
    assert datastore.index.ntotal == len(datastore.chunks)
    datastore.verify()
    with pytest.raises(PermissionError):
        find_neighbors(path, num_neighbors=1, force=True)


@pytest.mark.hostile(
    "a datastore in a folder without permission to write",
    "it can be searched and verified; a stage that would write ends with an error of one line",
)
def test_a_datastore_that_cannot_be_written_is_searched_and_verified_but_not_changed(recipe, tmp_path_factory):
    # Not below pytest's own folder, which others than its user may not enter.
    path = tmp_path_factory.mktemp("read_only") / "datastore"
    prepare_datastore(recipe, path)
    RetroRetriever(RetroDatastore.from_pretrained(path)).retrieve(torch.zeros(1, 8, dtype=torch.long), k=1)
    for entry in [path, *path.rglob("*")]:
        entry.chmod(0o555 if entry.is_dir() else 0o444)
    opened = [folder for folder in path.parents if "pytest-" in str(folder)]
    modes = {folder: folder.stat().st_mode for folder in opened}
    for folder in opened:
        folder.chmod(modes[folder] | 0o055)
    child = CHILDREN.Process(target=search_and_verify_only, args=(path,))
    try:
        child.start()
        child.join()
        assert child.exitcode == 0
    finally:
        for folder, mode in modes.items():
            folder.chmod(mode)
        for entry in [path, *path.rglob("*")]:
            entry.chmod(0o755)
