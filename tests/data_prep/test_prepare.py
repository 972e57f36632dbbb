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
"""Recipes run all stages; the ones of the package run on miniatures of their data."""

import fcntl
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import yaml
from conftest import TINY_CHUNK_SIZE, make_texts, write_jsonl

from data_prep import needs
from data_prep.plan import plan_datastore
from data_prep.prepare import prepare_datastore, read_recipe
from data_prep.scripts.prepare import main
from data_prep.sources import find_sources
from data_prep.stage_files import directory_lock, save_shard
from modeling_retro.datastore.datastore import RetroDatastore


@pytest.fixture
def tiny_recipe(tmp_path, tiny_tokenizer, tiny_encoder_dir):
    """Changes a recipe of the package to the tiny tokenizer, encoder and sizes of the tests."""
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")

    def change(recipe, **options):
        recipe |= {"tokenizer": str(tmp_path / "tokenizer"), "encoder": str(tiny_encoder_dir)}
        recipe.setdefault("chunk", {})["chunk_size"] = TINY_CHUNK_SIZE
        for stage, values in options.items():
            recipe.setdefault(stage, {}).update(values)
        return recipe

    return change


def write_pile(path, texts, sets):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"text": text, "meta": {"pile_set_name": sets[i % len(sets)]}} for i, text in enumerate(texts)]
    with pa.output_stream(str(path), compression="zstd") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines).encode())


def test_massive_open_text_runs_on_a_miniature(tmp_path, tiny_recipe):
    sets = ["Books3", "Github", "Wikipedia (en)", "Pile-CC", "ArXiv"]
    for shard in range(3):
        write_pile(tmp_path / f"pile/train/{shard:02d}.jsonl.zst", make_texts(10, seed=shard), sets)
    write_pile(tmp_path / "pile/val.jsonl.zst", make_texts(10, seed=7), sets)
    for name, seed in (("train/0.jsonl", 8), ("val.jsonl", 9)):
        (tmp_path / "realnews" / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / "realnews" / name, make_texts(5, seed=seed))
    recipe = tiny_recipe(read_recipe("massive_open_text"), index={"factory": "IVF4,PQ4x4"}, embed={"dtype": "float32"})
    manifest = prepare_datastore(recipe, tmp_path / "out", data_dir=tmp_path)
    train, validation = manifest.train.chunks, manifest.splits["validation"].chunks
    assert train.num_documents == 3 * 8 + 5 and train.dropped["filtered"] == 6
    assert validation.num_documents == 8 + 5 and validation.dropped["filtered"] == 2
    assert manifest.train.neighbors is not None and manifest.splits["validation"].neighbors is None

    searched = RetroDatastore.from_pretrained(tmp_path / "out" / "search_all" / "validation")
    base = RetroDatastore.from_pretrained(tmp_path / "out")
    assert len(searched.chunks) == train.num_chunks + validation.num_chunks == searched.index.ntotal
    ids = np.arange(len(base.chunks))
    np.testing.assert_array_equal(searched.chunks.take(ids)[0], base.chunks.take(ids)[0])
    split = searched.split("validation")
    own = np.arange(len(base.chunks), len(searched.chunks))
    np.testing.assert_array_equal(searched.chunks.take(own)[0], base.split("validation").chunks.take(own - own[0])[0])
    np.testing.assert_array_equal(searched.chunks.document_id[own], split.chunks.document_id)
    assert (np.diff(searched.chunks.document_id) >= 0).all()
    documents = searched.chunks.document_id[split.neighbor_ids]
    assert (documents != split.chunks.document_id[:, None]).all()
    assert (split.neighbor_ids >= len(base.chunks)).any() and (split.neighbor_ids < len(base.chunks)).any()
    searched.verify()
    base.verify()


@pytest.mark.parametrize("name", ["wikitext", "own_documents", "retro_tiny"])
def test_recipes_of_the_package_run(tmp_path, tiny_recipe, name):
    recipe = tiny_recipe(read_recipe(name))
    for split, inputs in recipe["splits"].items():
        for entry in [inputs] if isinstance(inputs, str) else inputs:
            file = tmp_path / entry.replace("**/*", "a")
            file.parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(file, make_texts(8, seed=len(split)))
    manifest = prepare_datastore(recipe, tmp_path / "out", data_dir=tmp_path)
    for split in recipe["splits"]:
        record = manifest.splits[split]
        neighbors = RetroDatastore.from_pretrained(tmp_path / "out").split(split).neighbor_ids
        assert len(neighbors) == record.chunks.num_chunks > 0
    assert manifest.index.factory == "Flat" and manifest.index.recall["recall@10"] == 1


def tree(path):
    return {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_what_is_added_later_is_what_would_have_been_there(tmp_path, tiny_recipe, capsys):
    files = [write_jsonl(tmp_path / f"{name}.jsonl", make_texts(8, seed=i)) for i, name in enumerate("abc")]
    recipe = tiny_recipe(
        {"splits": {"train": [files[0].name], "validation": files[2].name}}, index={"factory": "Flat"}
    )
    recipe_file = tmp_path / "recipe.yaml"
    options = ["--recipe", str(recipe_file), "--output_dir", str(tmp_path / "out"), "--data_dir", str(tmp_path)]
    recipe_file.write_text(yaml.safe_dump(recipe))
    main(options)
    before = tree(tmp_path / "out")
    main(options)
    assert tree(tmp_path / "out") == before  # nothing is done twice
    recipe["splits"]["train"].append(files[1].name)
    recipe_file.write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match="use --append"):
        main(options)
    main([*options, "--append"])
    after = tree(tmp_path / "out")
    changed = {str(name) for name in before if after[name] != before[name]}
    assert changed == {"datastore.json", "index.faiss", ".inputs.json"}
    assert "recall@10 1.000" in capsys.readouterr().out
    recipe_file.write_text(yaml.safe_dump(recipe))
    main(["--recipe", str(recipe_file), "--output_dir", str(tmp_path / "both"), "--data_dir", str(tmp_path)])
    added, both = (RetroDatastore.from_pretrained(tmp_path / name) for name in ("out", "both"))
    ids = np.arange(len(both.chunks))
    np.testing.assert_array_equal(added.chunks.take(ids)[0], both.chunks.take(ids)[0])
    first_new = json.loads(before[Path("datastore.json")])["splits"]["train"]["chunks"]["num_chunks"]
    np.testing.assert_array_equal(added.neighbor_ids[first_new:], both.neighbor_ids[first_new:])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"encoder": "nobody/none"}, OSError, "the encoder 'nobody/none' is no folder here"),
        ({"tokenizer": "nobody/none"}, OSError, "the tokenizer 'nobody/none' is no folder here"),
        ({"splits": {"train": "a.jsonl", "validation": "nowhere.jsonl"}}, ValueError, "nowhere.jsonl: no such file"),
    ],
)
def test_what_a_later_stage_lacks_is_named_before_the_first(tmp_path, tiny_recipe, change, error, message):
    write_jsonl(tmp_path / "a.jsonl", make_texts(4))
    recipe = tiny_recipe({"splits": {"train": "a.jsonl"}}) | change
    with pytest.raises(error, match=message):
        prepare_datastore(recipe, tmp_path / "out", data_dir=tmp_path)
    assert not (tmp_path / "out").exists()


def test_two_runs_cannot_write_to_one_directory(tmp_path, tiny_recipe):
    recipe = tiny_recipe({"splits": {"train": str(write_jsonl(tmp_path / "a.jsonl", ["abc"]))}})
    (tmp_path / "out").mkdir()
    other_run = os.open(tmp_path / "out" / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(other_run, fcntl.LOCK_SH)
    with pytest.raises(ValueError, match="another run is writing to"):
        prepare_datastore(recipe, tmp_path / "out")
    os.close(other_run)
    with directory_lock(tmp_path / "out"), directory_lock(tmp_path / "out"):
        pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- a", "must be a mapping with tokenizer, encoder and splits"),
        ("{tokenizer: a, encoder: b, splits: {train: c}, indx: {}}", "unknown keys indx"),
        ("{tokenizer: a, encoder: b, splits: {validation: c}}", "has no split 'train'"),
    ],
)
def test_a_bad_recipe_is_named(tmp_path, content, message):
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(ValueError, match="there is no recipe nothing; give a file, or one of .*wikitext.yaml"):
        read_recipe("nothing")


def test_a_full_disk_is_named_and_leaves_nothing_that_looks_whole(tmp_path, tiny_recipe, monkeypatch):
    """Stands in for the small file system of the slow test: the write of the second shard fails."""
    recipe = tiny_recipe({"splits": {"train": str(write_jsonl(tmp_path / "a.jsonl", make_texts(20)))}})
    recipe["chunk"]["shard_bytes"] = 2000

    def full(path, *args):
        if "shard-00001" in path.name:
            raise OSError(28, "No space left on device", str(path))
        save_shard(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.shard_writer.save_shard", full)
        with pytest.raises(OSError, match="No space left on device"):
            prepare_datastore(recipe, tmp_path / "out")
    with pytest.raises(ValueError, match="has no finished chunks"):
        RetroDatastore.from_pretrained(tmp_path / "out").chunks
    prepare_datastore(recipe, tmp_path / "out")
    RetroDatastore.from_pretrained(tmp_path / "out").verify()


def recipe_of(folder, tiny_recipe, **options):
    write_jsonl(folder / "train.jsonl", make_texts(50, seed=1))
    return tiny_recipe({"splits": {"train": ["train.jsonl"]}}, **options)


def test_a_full_disk_is_noticed_before_the_first_stage(tmp_path, tiny_recipe, monkeypatch):
    recipe = recipe_of(tmp_path, tiny_recipe)
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(
        ValueError, match=r"out will hold about [\d,]+ chunks and need .* 10 kB are free; .*no_check_disk"
    ):
        prepare_datastore(recipe, tmp_path / "out", data_dir=tmp_path)
    assert not (tmp_path / "out").exists()
    options = ["--output_dir", str(tmp_path / "out"), "--data_dir", str(tmp_path)]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    main(["--recipe", str(tmp_path / "recipe.yaml"), *options, "--no_check_disk"])
    # What is there already needs no room.
    estimate = []
    monkeypatch.setattr(
        needs, "plan_datastore", lambda *a, **k: estimate.append(plan_datastore(*a, **k)) or estimate[-1]
    )
    prepare_datastore(recipe, tmp_path / "out", data_dir=tmp_path)
    parts = ("chunks", "embeddings", "neighbors", "index", "index")
    needed = sum(estimate[0][f"{name}_bytes"] for name in parts)
    assert (
        10_000 < needed < 10_000 + sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())
    )


def test_the_estimate_counts_what_is_read_and_no_more(tmp_path, tiny_recipe, monkeypatch):
    found = []
    monkeypatch.setattr(
        needs, "plan_datastore", lambda tokens, **k: found.append(tokens) or plan_datastore(tokens, **k)
    )

    def tokens(*inputs, **chunk):
        recipe = tiny_recipe({"splits": {"train": list(inputs)}}, chunk=chunk)
        needs.check_disk(find_sources(list(inputs)), tmp_path / "out", recipe, 1000, 16)
        return found.pop()

    inputs = tmp_path / "inputs"
    inputs.mkdir()
    plain, packed = inputs / "a.txt", inputs / "b.jsonl.gz"
    plain.write_text("x" * 5000)
    packed.write_bytes(b"y" * 5000)
    (inputs / "c.pdf").write_bytes(b"z" * 5000)
    assert tokens(str(plain)) == 1000 and tokens(str(packed)) == 3000
    assert tokens({"path": str(packed), "filter": "a == 1"}) == 1  # nobody knows how much passes
    assert tokens(str(inputs)) == 4000  # the PDF is not counted
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda path: SimpleNamespace(free=5_000))
    with pytest.raises(ValueError, match="will hold"):
        tokens(str(plain))
    tokens(str(plain), max_chunks=10)  # of 8 tokens each


def test_files_that_need_a_missing_library_are_named_before_the_first_stage(tmp_path, tiny_recipe, monkeypatch):
    recipe = recipe_of(tmp_path, tiny_recipe)
    recipe["splits"]["train"] = ["documents"]
    (tmp_path / "documents").mkdir()
    for name in ("a.PDF", "b.docx", "c.txt"):
        (tmp_path / "documents" / name).write_bytes(b"some text")
    monkeypatch.setattr(needs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"a\.PDF and 1 other files cannot be read without the extra `documents`"):
        prepare_datastore(recipe, tmp_path / "out", data_dir=tmp_path)
    assert not (tmp_path / "out").exists()
    (tmp_path / "documents" / "a.PDF").unlink()
    (tmp_path / "documents" / "b.docx").unlink()
    needs.check_readers(find_sources(str(tmp_path / "documents")))
