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
"""A datastore names no folder of the machine that made it, and its stages go on all the same."""

import json
import os
import shutil

import pytest
from conftest import edit_manifest, make_texts, write_jsonl
from transformers import PreTrainedTokenizerFast

from data_prep.chunk import chunk_documents
from data_prep.embed import embed_chunks
from data_prep.index import build_index
from data_prep.neighbors import find_neighbors
from data_prep.sources import find_sources
from modeling_retro import RetroDatastore


def assert_nowhere(folder, secret):
    """No file below `folder` holds `secret`."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files
    holding = [str(file.relative_to(folder)) for file in files if str(secret).encode() in file.read_bytes()]
    assert not holding


@pytest.mark.hostile(
    "names of the folders of the machine in a datastore that is copied to another place",
    "they stand in no file, and all stages work on the copy",
)
def test_no_file_of_a_datastore_holds_a_path_and_every_stage_goes_on(tmp_path, tiny_tokenizer, tiny_encoder_dir):
    home = tmp_path / "home" / "jane"
    (home / "texts" / "more").mkdir(parents=True)
    shutil.copytree(tiny_encoder_dir, home / "encoder")
    tiny_tokenizer.save_pretrained(home / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(home / "tokenizer")
    write_jsonl(home / "texts" / "a.jsonl", make_texts(10))
    with (home / "texts" / "a.jsonl").open("a") as file:
        file.write("no json\n")
    write_jsonl(home / "texts" / "more" / "a.jsonl", make_texts(10, seed=1))
    (home / "texts" / "note.txt").write_text("a text of its own")
    path = tmp_path / "datastore"

    def run_all():
        chunk_documents(
            home / "texts", path, tokenizer, chunk_size=8, on_bad_record="skip", shard_bytes=2000, append=True
        )
        embed_chunks(path, home / "encoder")
        build_index(path, factory="Flat")
        find_neighbors(path, num_neighbors=2)

    run_all()
    assert_nowhere(path, tmp_path)
    manifest = json.loads((path / "datastore.json").read_text())
    sources = manifest["splits"]["train"]["chunks"]["sources"]
    assert [source["path"] for source in sources] == ["texts/a.jsonl", "texts/more/a.jsonl", "texts"]
    assert (manifest["tokenizer"]["name"], manifest["encoder"]["name"]) == ("tokenizer", "encoder")
    (quarantine,) = (path / "quarantine").glob("*")
    assert json.loads(quarantine.read_text())["file"] == "texts/a.jsonl"

    # Run again, nothing is made anew, also from another place; what is unfinished is finished.
    before = (path / "datastore.json").read_bytes()
    run_all()
    home = home.rename(tmp_path / "home" / "john")
    run_all()
    assert (path / "datastore.json").read_bytes() == before
    shutil.rmtree(path / "neighbors" / manifest["splits"]["train"]["neighbors"]["shards"][0]["name"])
    find_neighbors(path, num_neighbors=2, force=True)
    assert len(RetroDatastore.from_pretrained(path).neighbor_ids) == len(RetroDatastore.from_pretrained(path).chunks)


def test_datastores_of_before_whose_manifests_hold_paths_go_on(tmp_path, tiny_tokenizer):
    file = write_jsonl(tmp_path / "documents.jsonl", make_texts(5))
    path = tmp_path / "datastore"
    chunk_documents(file, path, tiny_tokenizer, chunk_size=8)
    manifest = json.loads((path / "datastore.json").read_text())
    edit_manifest(path, lambda manifest: manifest["splits"]["train"]["chunks"]["sources"][0].update(path=str(file)))
    stage = chunk_documents(file, path, tiny_tokenizer, chunk_size=8)
    assert [shard.to_dict() for shard in stage.shards] == manifest["splits"]["train"]["chunks"]["shards"]


def test_names_begin_with_what_was_named(tmp_path, monkeypatch):
    (tmp_path / "data" / "a").mkdir(parents=True)
    write_jsonl(tmp_path / "data" / "a" / "x.jsonl", ["text"])
    (tmp_path / "data" / "a" / "y.txt").write_text("text")

    def names(entry):
        return [source.describe().path for source in find_sources(entry)]

    assert names(tmp_path / "data") == ["data/a/x.jsonl", "data"]
    assert names(tmp_path / "data" / "a" / "x.jsonl") == ["x.jsonl"]
    assert names(str(tmp_path / "data" / "*" / "x.jsonl")) == ["data/a/x.jsonl"]
    assert names(str(tmp_path / "data" / "*" / "*.txt")) == ["data/*/*.txt"]
    monkeypatch.chdir(tmp_path / "data")
    assert names(os.path.join("..", "data", "a")) == ["a/x.jsonl", "a"]
    assert names("*/x.jsonl") == ["data/a/x.jsonl"]
