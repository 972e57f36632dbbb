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
"""Training documents that nearly equal a held-out document leave, and no others."""

import json
import random
import shutil

import numpy as np
import pytest
from conftest import write_jsonl

from data_prep.chunk import chunk_documents
from data_prep.deduplicate import NearDuplicates, deduplicate_documents
from data_prep.embed import embed_chunks
from data_prep.index import build_index
from data_prep.neighbors import find_neighbors
from modeling_retro import durable_files_retro
from modeling_retro.datastore.datastore import RetroDatastore


def jaccard(first, second, n=13):
    """From the definition, on sets of tuples."""
    sets = [{tuple(tokens[i : i + n]) for i in range(max(1, len(tokens) - n + 1))} for tokens in (first, second)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_finds_what_the_definition_finds():
    generator = np.random.default_rng(0)
    known = [generator.integers(0, 50, generator.integers(5, 600)) for _ in range(40)]
    detector = NearDuplicates()
    for key, tokens in enumerate(known):
        detector.add(key, tokens)
    found = 0
    for _ in range(300):
        tokens = known[generator.integers(len(known))].copy()
        changes = generator.integers(0, 4)
        tokens[generator.integers(0, len(tokens), changes)] = 50  # each spoils up to 13 n-grams
        similarities = [jaccard(tokens.tolist(), other.tolist()) for other in known]
        match = detector.find(tokens)
        if max(similarities) >= 0.8:
            found += 1
            assert match is not None and match[1] == pytest.approx(max(similarities))
        else:
            assert match is None
    assert 50 < found < 250


def make_corpus(folder, tokenizer, **options):
    generator = random.Random(0)
    texts = [" ".join(generator.choices([f"w{i}" for i in range(30)], k=200)) for _ in range(30)]
    held_out = texts[25:]
    nearly = held_out[2].replace("w7", "w8", 1) + " and a new end"
    training = [*texts[:10], held_out[0], *texts[10:25], nearly]
    datastore = folder / "datastore"
    chunk_documents(write_jsonl(folder / "train.jsonl", training), datastore, tokenizer, chunk_size=8, **options)
    chunk_documents(
        write_jsonl(folder / "validation.jsonl", held_out), datastore, tokenizer, chunk_size=8, split="validation"
    )
    return datastore, training


@pytest.mark.parametrize("shard_bytes", [2000, 10**9])
def test_near_duplicates_of_held_out_documents_leave_the_training_side(tmp_path, tiny_tokenizer, shard_bytes):
    datastore, training = make_corpus(tmp_path, tiny_tokenizer, shard_bytes=shard_bytes)
    before = RetroDatastore.from_pretrained(datastore).chunks
    document_id = before.document_id.copy()
    expected = before.take(np.flatnonzero(~np.isin(document_id, [10, 26])))[0]
    report = deduplicate_documents(datastore)
    after = RetroDatastore.from_pretrained(datastore)
    assert report.documents == 2 and report.chunks == len(document_id) - len(after.chunks)
    np.testing.assert_array_equal(after.chunks.take(np.arange(len(after.chunks)))[0], expected)
    assert after.manifest.train.chunks.num_documents == len(training) - 2
    lines = [json.loads(line) for line in (datastore / "duplicates.jsonl").read_text().splitlines()]
    assert [(line["document_id"], line["split"], line["of"]) for line in lines] == [
        (10, "validation", 0),
        (26, "validation", 2),
    ]
    assert lines[0]["jaccard"] == 1.0 and 0.8 <= lines[1]["jaccard"] < 1
    assert deduplicate_documents(datastore) == report  # the second time finds nothing to do


def test_a_kill_while_the_former_chunks_are_removed_loses_nothing(tmp_path, tiny_tokenizer, monkeypatch):
    datastore, _ = make_corpus(tmp_path, tiny_tokenizer, shard_bytes=2000)

    remove = durable_files_retro.remove

    def remove_half(path):
        if not path.name.startswith(".deduplicated-"):
            remove(path)
            return
        shutil.rmtree(min(path.glob("shard-*")))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(durable_files_retro, "remove", remove_half)
        with pytest.raises(KeyboardInterrupt):
            deduplicate_documents(datastore)
    deduplicate_documents(datastore)
    opened = RetroDatastore.from_pretrained(datastore)
    opened.verify()
    assert not list(datastore.glob(".deduplicat*")) and not list((datastore / "chunks").glob(".shard-*.json"))


def test_documents_that_are_added_later_are_looked_through(tmp_path, tiny_tokenizer):
    datastore, training = make_corpus(tmp_path, tiny_tokenizer)
    deduplicate_documents(datastore)
    more = write_jsonl(tmp_path / "more.jsonl", ["something new", training[10]])
    inputs = [tmp_path / "train.jsonl", more]
    chunk_documents(inputs, datastore, tiny_tokenizer, chunk_size=8, append=True)
    assert deduplicate_documents(datastore).documents == 3
    assert RetroDatastore.from_pretrained(datastore).chunks.document_id[-1] == len(training)
    assert len((datastore / "duplicates.jsonl").read_text().splitlines()) == 3


def test_chunks_that_are_embedded_are_not_changed_behind_their_back(tmp_path, tiny_tokenizer, tiny_encoder_dir):
    datastore, _ = make_corpus(tmp_path, tiny_tokenizer)
    embed_chunks(datastore, tiny_encoder_dir)
    with pytest.raises(ValueError, match="already embedded"):
        deduplicate_documents(datastore)
    deduplicate_documents(datastore, force=True)
    with pytest.raises(ValueError, match="run `retro index`"):
        RetroDatastore.from_pretrained(datastore).index


def test_a_shard_without_chunks_goes_through_all_stages(tmp_path, tiny_tokenizer, tiny_encoder_dir):
    """`max_chunks` ends at a document that does not fit, which may be the first of its shard."""
    file = write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three " * 99])
    stage = chunk_documents(file, tmp_path / "out", tiny_tokenizer, chunk_size=8, max_chunks=9, shard_bytes=1)
    assert [shard.rows for shard in stage.shards] == [1, 1, 0]
    chunk_documents(file, tmp_path / "out", tiny_tokenizer, chunk_size=8, split="validation", max_documents=1)
    assert deduplicate_documents(tmp_path / "out").documents == 1
    for split in ("train", "validation"):
        embed_chunks(tmp_path / "out", tiny_encoder_dir, split=split)
    assert build_index(tmp_path / "out").ntotal == 1
    for split in ("train", "validation"):
        find_neighbors(tmp_path / "out", num_neighbors=1, split=split)
    datastore = RetroDatastore.from_pretrained(tmp_path / "out")
    assert datastore.neighbor_ids.tolist() == [[-1]] and datastore.split("validation").neighbor_ids.tolist() == [[0]]


def test_nothing_to_compare_with_is_an_error(tmp_path, tiny_tokenizer):
    chunk_documents(write_jsonl(tmp_path / "a.jsonl", ["abc"]), tmp_path / "out", tiny_tokenizer)
    with pytest.raises(ValueError, match="no held-out split"):
        deduplicate_documents(tmp_path / "out")


def test_a_corpus_of_nothing_but_held_out_documents_is_an_error(tmp_path, tiny_tokenizer):
    file = write_jsonl(tmp_path / "a.jsonl", ["abc " * 20])
    for split in ("train", "validation"):
        chunk_documents(file, tmp_path / "out", tiny_tokenizer, split=split)
    with pytest.raises(ValueError, match="nothing would be left"):
        deduplicate_documents(tmp_path / "out")
