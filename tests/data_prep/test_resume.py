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
"""Two processes that are killed again and again leave the bytes of one process that is not."""

import json
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from child_processes import run_processes
from conftest import TINY_CHUNK_SIZE, make_texts, write_jsonl

from data_prep.bm25_index import build_bm25_index
from data_prep.chunk import chunk_documents
from data_prep.prepare import prepare_datastore
from data_prep.stage_files import deal, directory_lock
from modeling_retro.datastore.datastore import RetroDatastore


def stage_of(output_dir: Path) -> str:
    """The first stage that the manifest does not hold whole."""
    if not (output_dir / "datastore.json").exists():
        return "begin"
    manifest = json.loads((output_dir / "datastore.json").read_text())
    splits = manifest["splits"]
    if any("fingerprint" not in splits.get(name, {}).get("chunks", {}) for name in ("train", "validation")):
        return "chunk"
    chunks = splits["train"]["chunks"]
    if "deduplicated" not in chunks:
        return "deduplicate"
    if any(len(s.get("embeddings", {}).get("shards", [])) < len(s["chunks"]["shards"]) for s in splits.values()):
        return "embed"
    return "index" if "index" not in manifest else "neighbors"


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def kill_until_done(
    make: Callable, folder: Path, kills: int, seed: int, compare: Callable = tree, stage_of: Callable = stage_of
) -> dict[str, int]:
    """
    Compares what `compare` tells of datastores whose two processes were killed at random moments with that of one
    process that was not; returns the kills of each stage.
    """
    generator = random.Random(seed)
    start = time.monotonic()
    run_processes(make, folder / "reference", world_size=1)
    duration = time.monotonic() - start
    expected = compare(folder / "reference")
    killed: dict[str, int] = {}
    trial = 0
    while sum(killed.values()) < kills:
        output_dir = folder / f"trial-{trial}"
        # Two processes have to find each other first: each kill comes later, so that a run gets somewhere.
        limit = duration
        while not run_processes(make, output_dir, seconds=generator.uniform(0.05, 0.7) * limit):
            stage = stage_of(output_dir)
            killed[stage] = killed.get(stage, 0) + 1
            limit *= 1.15
        run_processes(make, output_dir)
        assert compare(output_dir) == expected
        trial += 1
    print(f"kills by stage: {killed}")
    return killed


@pytest.fixture
def recipe(tmp_path, tiny_tokenizer, tiny_encoder_dir):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    texts = make_texts(60, seed=21, max_words=120)
    train = write_jsonl(tmp_path / "train.jsonl", texts)
    return {
        "tokenizer": str(tmp_path / "tokenizer"),
        "encoder": str(tiny_encoder_dir),
        "splits": {"train": str(train), "validation": str(write_jsonl(tmp_path / "validation.jsonl", texts[40:45]))},
        "chunk": {"chunk_size": TINY_CHUNK_SIZE, "shard_bytes": 4000, "on_bad_record": "skip"},
        "deduplicate": {"threshold": 0.8},
        "index": {"factory": "IVF8,SQ8"},
        "neighbors": {"num_neighbors": 2},
    }


def test_a_run_that_is_killed_ends_with_the_same_bytes(recipe, tmp_path):
    kill_until_done(partial(prepare_datastore, recipe), tmp_path, kills=3, seed=0)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_shards_are_dealt_evenly(number):
    generator = random.Random(number)
    sizes = [generator.randint(0, 100) for _ in range(30)]
    shards = generator.sample(range(30), 20)
    dealt = deal(shards, sizes, number)
    assert len(dealt) == number and sorted(sum(dealt, [])) == sorted(shards)
    loads = [sum(sizes[shard] for shard in part) for part in dealt]
    assert max(loads) - min(loads) <= max(sizes[shard] for shard in shards)


def lock_again(output_dir: Path) -> None:
    for _ in range(100):
        with directory_lock(output_dir):
            pass


def test_the_processes_of_a_run_take_the_lock_again_when_all_have_left_it(tmp_path):
    assert run_processes(lock_again, tmp_path / "datastore")


def all_but_the_graph(path: Path) -> tuple[dict[str, bytes], dict[str, float]]:
    """Chunks and embeddings, and the recall of the index in place of its bytes, which may differ."""
    datastore = RetroDatastore.from_pretrained(path)
    datastore.verify()
    assert datastore.index.ntotal == len(datastore.chunks)
    files = {name: content for name, content in tree(path).items() if "chunks/" in name or "embeddings/" in name}
    return files, datastore.manifest.index.recall


@pytest.mark.slow
def test_a_graph_whose_building_is_killed_has_the_same_recall(recipe, tmp_path):
    recipe["splits"]["train"] = str(write_jsonl(tmp_path / "train.jsonl", make_texts(300, seed=21, max_words=120)))
    recipe["index"] = {"factory": "HNSW8", "target_recall": 0.9}
    kill_until_done(partial(prepare_datastore, recipe), tmp_path, kills=10, seed=2, compare=all_but_the_graph)


@pytest.mark.slow
def test_a_run_that_is_killed_in_every_stage_ends_with_the_same_bytes(recipe, tmp_path):
    recipe["splits"]["train"] = str(write_jsonl(tmp_path / "train.jsonl", make_texts(300, seed=21, max_words=120)))
    killed = kill_until_done(partial(prepare_datastore, recipe), tmp_path, kills=40, seed=1)
    assert {"chunk", "deduplicate", "embed", "index", "neighbors"} <= set(killed), killed


@pytest.mark.slow
def test_an_index_on_the_disk_whose_building_is_killed_ends_with_the_same_bytes(recipe, tmp_path):
    recipe["splits"]["train"] = str(write_jsonl(tmp_path / "train.jsonl", make_texts(300, seed=21, max_words=120)))
    recipe["index"] = {"factory": "IVF8,PQ8x4fsr,Refine(SQfp16)", "on_disk": True}
    killed = kill_until_done(partial(prepare_datastore, recipe), tmp_path, kills=25, seed=4)
    assert "index" in killed, killed
    assert (tmp_path / "reference" / "index.refine").exists() and not list(tmp_path.glob("*/.index-*"))


def make_lexical(recipe: dict, output_dir: Path) -> None:
    with directory_lock(output_dir):  # one lock over both stages, as `prepare_datastore` has it
        chunk_documents(recipe["splits"]["train"], output_dir, recipe["tokenizer"], **recipe["chunk"])
        build_bm25_index(output_dir, terms="words")


def lexical_stage_of(output_dir: Path) -> str:
    """The first stage that the manifest of a datastore without an encoder does not hold whole."""
    file = output_dir / "datastore.json"
    splits = json.loads(file.read_text())["splits"] if file.exists() else {}
    return "bm25" if "fingerprint" in splits.get("train", {}).get("chunks", {}) else "chunk"


@pytest.mark.slow
def test_a_bm25_index_whose_building_is_killed_ends_with_the_same_bytes(recipe, tmp_path):
    recipe["splits"]["train"] = str(write_jsonl(tmp_path / "train.jsonl", make_texts(600, seed=21, max_words=120)))
    make = partial(make_lexical, recipe)
    killed = kill_until_done(make, tmp_path, kills=10, seed=3, stage_of=lexical_stage_of)
    assert "bm25" in killed, killed
    assert not list(tmp_path.glob("*/.bm25-*"))
