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
"""The BM25 index as a stage: resumed, extended, refused, verified, repaired, and built from a recipe."""

import shutil

import bm25s
import numpy as np
import pytest
from conftest import TINY_CHUNK_SIZE, make_texts, write_jsonl

from data_prep import bm25_index
from data_prep.bm25_index import build_bm25_index
from data_prep.chunk import chunk_documents
from data_prep.index import build_index
from data_prep.neighbors import find_neighbors
from data_prep.prepare import prepare_datastore, read_recipe
from data_prep.scripts.index import main
from data_prep.upkeep.verify import repair_datastore, verify_datastore
from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.datastore.manifest import read_manifest


@pytest.fixture
def copy(tiny_datastore_dir, tmp_path):
    return shutil.copytree(tiny_datastore_dir, tmp_path / "copy")


def files_of(path):
    return {file.name: file.read_bytes() for file in sorted((path / "bm25").iterdir())}


@pytest.mark.parametrize("terms", ["tokens", "words"])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(copy, tmp_path, dies_at, terms):
    whole = shutil.copytree(copy, tmp_path / "whole")
    record = build_bm25_index(whole, terms)
    counted = dies_at(3, bm25_index, "count_terms")
    with pytest.raises(KeyboardInterrupt):
        build_bm25_index(copy, terms)
    assert read_manifest(copy).bm25 is None and record.shards > 3
    assert build_bm25_index(copy, terms) == record
    assert len(counted) == 1 + record.shards  # the third one twice
    assert files_of(copy) == files_of(whole) and not list(copy.glob(".bm25-*"))
    assert read_manifest(copy).index == read_manifest(whole).index  # both kinds in one datastore


def test_what_the_library_builds_of_the_same_terms_is_the_same(copy):
    build_bm25_index(copy)
    datastore = RetroDatastore.from_pretrained(copy)
    rows = datastore.bm25.queries(*datastore.chunks.take(np.arange(len(datastore.chunks))), datastore.tokenizer)
    theirs = bm25s.BM25(method="lucene")
    vocabulary = {str(term): term for term in range(rows.max() + 1)}
    theirs.index(([row[row >= 0].tolist() for row in rows], vocabulary), show_progress=False)
    for name in ("indptr", "indices"):
        assert (theirs.scores[name] == datastore.bm25._bm25.scores[name]).all()
    np.testing.assert_allclose(theirs.scores["data"], datastore.bm25._bm25.scores["data"], rtol=1e-5)


def test_a_finished_index_is_left_alone_and_other_options_are_refused(copy):
    record = build_bm25_index(copy)
    times = {file: file.stat().st_mtime_ns for file in (copy / "bm25").iterdir()}
    assert build_bm25_index(copy) == record
    assert times == {file: file.stat().st_mtime_ns for file in (copy / "bm25").iterdir()}
    for work in (copy / ".bm25-0123", copy / ".index-0123"):  # as a run leaves them that is killed after its last step
        work.mkdir()
    build_bm25_index(copy)
    build_index(copy, factory="Flat")
    assert not list(copy.glob(".bm25-*")) and not list(copy.glob(".index-*"))
    with pytest.raises(ValueError, match="begun with terms='tokens', not 'words'"):
        build_bm25_index(copy, "words")
    with pytest.raises(ValueError, match="terms is 'stems', expected one of tokens, words"):
        build_bm25_index(copy, "stems")
    with pytest.raises(ValueError, match="k1 is 1.5 and b is 2, expected"):
        build_bm25_index(copy, b=2)


def test_neighbors_go_with_the_index_that_found_them(copy):
    build_bm25_index(copy)
    find_neighbors(copy, 4, "validation", "bm25", force=True)
    build_index(copy, factory="Flat", force=True)
    splits = read_manifest(copy).splits
    assert splits["train"].neighbors is None and splits["validation"].neighbors is not None
    find_neighbors(copy, 4)
    build_bm25_index(copy, b=0.5, force=True)
    splits = read_manifest(copy).splits
    assert splits["train"].neighbors is not None and splits["validation"].neighbors is None
    assert not (copy / "splits" / "validation" / "neighbors").exists()


def test_chunks_that_are_added_later_are_named_and_indexed(tmp_path, tiny_tokenizer):
    path, texts = tmp_path / "datastore", make_texts(20, seed=2)
    first = write_jsonl(tmp_path / "a.jsonl", texts[:12])
    second = write_jsonl(tmp_path / "b.jsonl", texts[12:])
    options = {"tokenizer": tiny_tokenizer, "chunk_size": TINY_CHUNK_SIZE}
    chunk_documents(first, path, **options)
    build_bm25_index(path)
    chunk_documents([first, second], path, append=True, **options)
    with pytest.raises(ValueError, match="BM25 index of .* lacks chunks that were added later"):
        find_neighbors(path, 2, retriever="bm25")
    build_bm25_index(path)
    find_neighbors(path, 2, retriever="bm25")
    at_once = tmp_path / "at_once"
    chunk_documents([first, second], at_once, **options)
    build_bm25_index(at_once)
    assert files_of(path) == files_of(at_once)
    chunk_documents(second, path, force=True, **options)
    assert read_manifest(path).bm25 is None and not (path / "bm25").exists()


@pytest.mark.parametrize("way", ["altered", "missing"])
def test_a_damaged_index_is_found_and_made_anew(copy, way):
    build_bm25_index(copy)
    find_neighbors(copy, 4, retriever="hybrid", force=True)
    assert verify_datastore(copy) == []
    before, file = files_of(copy), copy / "bm25" / "indices.csc.index.npy"
    if way == "missing":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    with pytest.raises(ValueError, match="indices.csc.index.npy"):
        RetroDatastore.from_pretrained(copy).verify()
    (finding,) = verify_datastore(copy)
    assert finding.where == "bm25/indices.csc.index.npy" and "retro index --kind bm25 --force" in str(finding)
    assert repair_datastore(copy) == []
    assert files_of(copy) == before
    assert read_manifest(copy).train.neighbors is not None


def test_an_index_with_right_checksums_and_wrong_rows_is_found(copy):
    build_bm25_index(copy)
    datastore = RetroDatastore.from_pretrained(copy)
    rows = np.array(datastore.bm25._bm25.scores["indices"])
    rows[0] = len(datastore.chunks)
    np.save(copy / "bm25" / "indices.csc.index.npy", rows)
    with pytest.raises(ValueError, match=f"expected 0 to {len(datastore.chunks) - 1}"):
        RetroDatastore.from_pretrained(copy).bm25.check()


def test_a_recipe_searches_by_terms_without_an_encoder(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    recipe = {
        "tokenizer": str(tmp_path / "tokenizer"),
        "splits": {
            "train": str(write_jsonl(tmp_path / "a.jsonl", make_texts(12, seed=2))),
            "validation": str(write_jsonl(tmp_path / "b.jsonl", make_texts(3, seed=3))),
        },
        "chunk": {"chunk_size": TINY_CHUNK_SIZE},
        "bm25": {"terms": "words"},
        "neighbors": {"num_neighbors": 2, "retriever": "bm25"},
        "search_all": True,
    }
    manifest = prepare_datastore(recipe, tmp_path / "datastore")
    assert manifest.index is None and manifest.bm25.options["terms"] == "words"
    searched = RetroDatastore.from_pretrained(tmp_path / "datastore" / "search_all" / "validation")
    split = searched.split("validation")
    assert (split.neighbor_ids[:, 0] >= 0).all() and searched.bm25.ntotal == len(searched.chunks)
    found = searched.chunks.gather("document_id", split.neighbor_ids)
    assert (found != split.chunks.document_id[:, None])[split.neighbor_ids >= 0].all()
    assert verify_datastore(tmp_path / "datastore") == []
    file = tmp_path / "recipe.yaml"
    file.write_text("tokenizer: t\nsplits: {train: a.jsonl}\nneighbors: {retriever: hybrid}\n")
    with pytest.raises(ValueError, match="must have an encoder"):
        read_recipe(file)
    with pytest.raises(ValueError, match="retriever of the recipe is 'sparse', expected one of dense"):
        prepare_datastore(recipe | {"neighbors": {"retriever": "sparse"}}, tmp_path / "other")


def test_options_of_the_other_kind_are_refused(copy, capsys):
    main(["--datastore", str(copy), "--kind", "bm25", "--k1", "0.9"])
    assert "BM25 index over 457 chunks" in capsys.readouterr().out
    assert read_manifest(copy).bm25.options == {"terms": "tokens", "k1": 0.9, "b": 0.75}
    with pytest.raises(ValueError, match="--factory is 'Flat', but no option of --kind bm25"):
        main(["--datastore", str(copy), "--kind", "bm25", "--factory", "Flat"])
    with pytest.raises(ValueError, match="--b is 0.5, but no option of --kind faiss"):
        main(["--datastore", str(copy), "--b", "0.5"])
