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
"""Documents come and go in a datastore; those who read it keep their version, and nobody finds what was removed."""

import json
import os
import random
import shutil
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch
from child_processes import CHILDREN, run_processes
from conftest import TINY_CHUNK_SIZE, make_texts, write_jsonl
from datasets import Dataset

from data_prep.bm25_index import build_bm25_index
from data_prep.chunk import chunk_documents
from data_prep.chunker import DocumentChunker
from data_prep.deduplicate import deduplicate_documents
from data_prep.documents import Document
from data_prep.embed import embed_chunks
from data_prep.index import build_index
from data_prep.neighbors import find_neighbors, is_stale
from data_prep.prepare import extend_datastore
from data_prep.upkeep import next_version
from data_prep.upkeep.changes import (
    add_documents,
    compact_datastore,
    describe_version,
    remove_documents,
    update_documents,
)
from data_prep.upkeep.verify import repair_datastore, verify_datastore
from modeling_retro import durable_files_retro
from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.datastore.versions import remove_unread
from modeling_retro.encoder.chunk_encoder import ChunkEncoder
from modeling_retro.retriever.retriever import RetroRetriever


@pytest.fixture
def datastore_dir(tiny_datastore_dir, tmp_path):
    return shutil.copytree(tiny_datastore_dir, tmp_path / "datastore")


@pytest.fixture(scope="module")
def encoder(tiny_encoder_dir):
    return ChunkEncoder.from_pretrained(tiny_encoder_dir, device="cpu")


def write_records(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def found_documents(datastore_dir, k=400):
    """All documents that a retriever can return."""
    retriever = RetroRetriever.from_pretrained(datastore_dir, device="cpu")
    found = retriever.retrieve(torch.zeros((1, TINY_CHUNK_SIZE), dtype=torch.long) + 5, k=k)
    return set(found.document_ids.flatten().tolist()) - {-1}


def test_added_documents_are_found(datastore_dir, tmp_path):
    before = RetroDatastore.from_pretrained(datastore_dir)
    texts = make_texts(5, seed=31)
    manifest = add_documents(datastore_dir, write_jsonl(tmp_path / "more.jsonl", texts))
    after = RetroDatastore.from_pretrained(datastore_dir)
    assert manifest.version == 1 and manifest == after.manifest
    documents = after.chunks.document_id
    new = documents[len(before.chunks) :]
    assert np.unique(new).tolist() == list(range(before.chunks.document_id[-1] + 1, new[-1] + 1))
    tokens, mask = after.chunks.take(np.flatnonzero(documents == new[-1]))
    assert after.tokenizer.decode(tokens[mask], skip_special_tokens=True) == texts[-1]
    assert set(new.tolist()) <= found_documents(datastore_dir, k=len(documents))
    assert after.neighbor_ids.shape == (len(documents), 4)
    assert verify_datastore(datastore_dir) == []


def test_datasets_and_streams_are_added_too(articles_dir):
    for number, name in enumerate(("x", "y", "y")):
        rows = Dataset.from_dict({"name": [name], "text": [f"text {number}"]})
        update_documents(articles_dir, rows if number == 0 else rows.to_iterable_dataset())
    assert list(living_texts(articles_dir).values())[12:] == ["text 0", "text 2"]
    assert verify_datastore(articles_dir) == []


def test_removed_documents_are_never_returned(datastore_dir):
    opened = RetroDatastore.from_pretrained(datastore_dir)
    remove = np.unique(opened.chunks.document_id)[::3].tolist()
    assert set(remove) <= found_documents(datastore_dir, k=457)
    assert np.isin(opened.chunks.document_id[opened.neighbor_ids], remove).any()
    manifest = remove_documents(datastore_dir, remove)
    assert manifest.removed.documents == len(remove)
    assert manifest.removed.chunks == np.isin(opened.chunks.document_id, remove).sum()
    assert not set(remove) & found_documents(datastore_dir, k=457)
    after = RetroDatastore.from_pretrained(datastore_dir)
    for split in ("train", "validation"):
        ids, scores = after.split(split).neighbor_ids, after.split(split).neighbor_scores
        assert not np.isin(after.chunks.document_id[ids[ids >= 0]], remove).any()
        assert (np.sort(ids < 0, axis=1) == (ids < 0)).all() and (scores[ids < 0] == 0).all()
    assert verify_datastore(datastore_dir) == []


def test_compacting_keeps_what_is_found(datastore_dir, encoder):
    remove_documents(datastore_dir, [0, 1, 2, 3, 11, 39])
    before = RetroDatastore.from_pretrained(datastore_dir)
    living = np.flatnonzero(~before.is_removed(np.arange(len(before.chunks))))
    manifest = compact_datastore(datastore_dir)
    after = RetroDatastore.from_pretrained(datastore_dir)
    assert manifest.removed is None and manifest.compacted.documents == 6
    assert (after.chunks.document_id == before.chunks.document_id[living]).all()
    assert (after.chunks.take(np.arange(len(living)))[0] == before.chunks.take(living)[0]).all()
    assert after.index.ntotal == len(living)
    # The stored neighbors are the same chunks under their new numbers.
    for split, rows in (("train", living), ("validation", slice(None))):
        old, new = before.split(split).neighbor_ids[rows], after.split(split).neighbor_ids
        assert (np.where(new >= 0, living[new], -1) == old).all()
        assert (before.split(split).neighbor_scores[rows] == after.split(split).neighbor_scores).all()
    assert verify_datastore(datastore_dir) == []
    assert compact_datastore(datastore_dir) == manifest  # nothing to do


def test_who_reads_a_version_keeps_its_files(datastore_dir, tmp_path):
    held = RetroDatastore.from_pretrained(datastore_dir)
    files = {file: file.read_bytes() for file in datastore_dir.rglob("*") if file.is_file() and file.name[0] != "."}
    remove_documents(datastore_dir, [0, 5])
    assert not held.is_current()
    add_documents(datastore_dir, write_jsonl(tmp_path / "more.jsonl", make_texts(3, seed=32)), refresh_neighbors=True)
    middle = RetroDatastore.from_pretrained(datastore_dir)
    compact_datastore(datastore_dir)
    changed = [file for file in files if file.name != "datastore.json" and file.read_bytes() != files[file]]
    assert changed == []
    # Nothing of them was read before.
    held.verify()
    assert len(held.neighbor_ids) == len(held.chunks) == held.index.ntotal == 457
    assert not held.removed_documents.size and middle.removed_documents.tolist() == [0, 5]
    del held
    remove_documents(datastore_dir, [7])
    assert not (datastore_dir / "index.faiss").exists() and (datastore_dir / "chunks" / "shard-00000").exists()
    middle.verify()
    assert len(middle.neighbor_ids) == len(middle.chunks)
    del middle
    remove_documents(datastore_dir, [8])
    assert not (datastore_dir / "chunks" / "shard-00000").exists()
    assert [file.name for file in datastore_dir.glob("index*")] == ["index-3.faiss"]
    assert verify_datastore(datastore_dir) == []


def articles(folder, changes=None):
    """Records with ids of their own, of which some have another text."""
    texts = {f"a{number}": text for number, text in enumerate(make_texts(12, seed=41))}
    records = [{"name": name, "text": text} for name, text in (texts | (changes or {})).items()]
    return write_records(folder / "articles.jsonl", records)


@pytest.fixture
def articles_dir(tmp_path, tiny_tokenizer, tiny_encoder_dir):
    folder = tmp_path / "articles"
    chunk_documents(articles(tmp_path), folder, tiny_tokenizer, chunk_size=TINY_CHUNK_SIZE, id_column="name")
    embed_chunks(folder, tiny_encoder_dir)
    build_index(folder, factory="Flat")
    find_neighbors(folder, num_neighbors=2)
    return folder


def living_texts(datastore_dir):
    """Number and text of each document that was not removed."""
    datastore = RetroDatastore.from_pretrained(datastore_dir)
    documents, texts = datastore.chunks.document_id, {}
    for number in np.setdiff1d(documents, datastore.removed_documents).tolist():
        tokens, mask = datastore.chunks.take(np.flatnonzero(documents == number))
        texts[number] = datastore.tokenizer.decode(tokens[mask], skip_special_tokens=True)
    return texts


def test_update_takes_what_changed_and_leaves_the_rest(articles_dir, tmp_path):
    before = living_texts(articles_dir)
    manifest = update_documents(articles_dir, articles(tmp_path))
    assert manifest.version == 0 and not (articles_dir / ".next").exists()  # nothing is new
    shards = RetroDatastore.from_pretrained(articles_dir).manifest.train.chunk_shards
    update_documents(articles_dir, articles(tmp_path, {"a3": "retro looks up", "a12": "a datastore"}))
    after = living_texts(articles_dir)
    assert {number for number in before if number not in after} == {3}
    assert {number: after[number] for number in before if number != 3} == {n: t for n, t in before.items() if n != 3}
    assert sorted(text for number, text in after.items() if number not in before) == ["a datastore", "retro looks up"]
    datastore = RetroDatastore.from_pretrained(articles_dir)
    new = datastore.manifest.train.chunk_shards[len(shards) :]
    assert [(shard.documents, shard.dropped["filtered"]) for shard in new] == [(2, 11)]
    # Of two with one id in the same input, the last one counts.
    twice = write_records(tmp_path / "twice.jsonl", [{"name": "a5", "text": t} for t in ("things", "things in a")])
    update_documents(articles_dir, twice)
    added = [text for number, text in living_texts(articles_dir).items() if number not in after]
    assert added == ["things in a"] and 5 not in living_texts(articles_dir)
    assert verify_datastore(articles_dir) == []


def test_documents_are_removed_by_the_ids_of_the_user(articles_dir):
    remove_documents(articles_dir, ["a3", "a7"])
    assert set(living_texts(articles_dir)) == set(range(12)) - {3, 7}
    remove_documents(articles_dir, [1])
    assert set(living_texts(articles_dir)) == set(range(12)) - {1, 3, 7}
    compact_datastore(articles_dir)
    assert set(living_texts(articles_dir)) == set(range(12)) - {1, 3, 7}
    with pytest.raises(ValueError, match="no document with the id 'a3'"):
        remove_documents(articles_dir, ["a3"])


def test_damaged_shards_are_restored_after_changes(articles_dir, tmp_path):
    remove_documents(articles_dir, ["a3"])
    compact_datastore(articles_dir)
    changed = articles(tmp_path, {"a4": "retro"}).rename(tmp_path / "changed.jsonl")
    update_documents(articles_dir, changed)
    shards = RetroDatastore.from_pretrained(articles_dir).manifest.train.chunk_shards
    assert [shard.name for shard in shards] == ["shard-00000-v2", "shard-00001-v3"]
    for shard in shards:
        shutil.rmtree(articles_dir / "chunks" / shard.name)
    assert {finding.stage for finding in verify_datastore(articles_dir)} == {"chunks"}
    assert repair_datastore(articles_dir, [articles(tmp_path), changed]) == []


def test_added_documents_that_equal_held_out_ones_are_left_out(tmp_path, tiny_tokenizer, tiny_encoder_dir):
    folder, texts = tmp_path / "datastore", [f"text {text}" for text in make_texts(9, seed=51)]
    for split, own in (("train", texts[:4]), ("validation", texts[4:6])):
        file = write_jsonl(tmp_path / f"{split}.jsonl", own)
        chunk_documents(file, folder, tiny_tokenizer, split=split, chunk_size=TINY_CHUNK_SIZE)
    deduplicate_documents(folder)
    embed_chunks(folder, tiny_encoder_dir)
    build_index(folder, factory="Flat")
    add_documents(folder, write_jsonl(tmp_path / "more.jsonl", texts[5:]))
    assert list(living_texts(folder).values()) == texts[:4] + texts[6:]
    assert verify_datastore(folder) == []


def test_stale_neighbors_are_marked_until_they_are_refreshed(datastore_dir, tmp_path):
    def stale():
        manifest = RetroDatastore.from_pretrained(datastore_dir).manifest
        shards = [shard for record in manifest.splits.values() for shard in record.neighbor_shards]
        return sum(is_stale(shard, manifest) for shard in shards), len(shards)

    assert stale() == (0, 5)
    manifest = add_documents(datastore_dir, write_jsonl(tmp_path / "more.jsonl", make_texts(3, seed=61)))
    assert stale() == (5, 6)
    assert "the neighbors of 5 of 6 shards were found in an earlier version" in describe_version(manifest)
    remove_documents(datastore_dir, [3])
    assert stale() == (6, 6)
    compact_datastore(datastore_dir)
    assert stale() == (6, 6)
    remove_documents(datastore_dir, [4], refresh_neighbors=True)
    assert stale() == (0, 6)
    refreshed = RetroDatastore.from_pretrained(datastore_dir)
    compact_datastore(datastore_dir)
    assert stale() == (0, 6)  # nothing was nearer
    kept = ~refreshed.is_removed(np.arange(len(refreshed.chunks)))
    ids, scores = refreshed.neighbor_ids[kept], refreshed.neighbor_scores[kept]
    find_neighbors(datastore_dir, num_neighbors=4, force=True)
    anew = RetroDatastore.from_pretrained(datastore_dir)
    np.testing.assert_allclose(anew.neighbor_scores, scores, rtol=1e-5)
    assert (ids >= 0).all()


def test_bm25_goes_with_the_documents(datastore_dir, tmp_path):
    pytest.importorskip("bm25s")
    build_bm25_index(datastore_dir)
    add_documents(datastore_dir, write_jsonl(tmp_path / "more.jsonl", ["zebra " * 20, "retro zebra"]))
    retriever = RetroRetriever.from_pretrained(datastore_dir, retriever="bm25")
    tokens = retriever.datastore.tokenizer(" zebra zebra zebra zebra")["input_ids"][:TINY_CHUNK_SIZE]
    query = torch.tensor([tokens])
    assert query.shape == (1, TINY_CHUNK_SIZE)
    assert set(retriever.retrieve(query, k=2).document_ids.flatten().tolist()) == {40}
    remove_documents(datastore_dir, [40])
    assert retriever.refresh() and retriever.retrieve(query, k=1).document_ids.tolist() == [[41]]
    compact_datastore(datastore_dir)
    assert retriever.refresh() and retriever.retrieve(query, k=1).document_ids.tolist() == [[41]]
    assert verify_datastore(datastore_dir) == []


def test_what_cannot_be_changed_is_named(datastore_dir, tmp_path, tiny_tokenizer):
    more = write_jsonl(tmp_path / "more.jsonl", make_texts(2))
    before = found_documents(datastore_dir)
    for function, argument, message in (
        (remove_documents, [999], "has no document 999"),
        (remove_documents, ["a1"], "was chunked without --id_column"),
        (remove_documents, list(range(40)), "no document of .* would be left"),
        (update_documents, more, "was chunked without --id_column"),
        (add_documents, write_jsonl(tmp_path / "empty.jsonl", []), "hold no documents"),
        (add_documents, write_records(tmp_path / "bad.jsonl", [{"words": "a"}]), "bad.jsonl:1: no 'text'"),
        (add_documents, tmp_path / "missing.jsonl", "no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            function(datastore_dir, argument)
    datastore = RetroDatastore.from_pretrained(datastore_dir)
    assert datastore.manifest.version == 0 and found_documents(datastore_dir) == before
    manifest = remove_documents(datastore_dir, [3])
    assert remove_documents(datastore_dir, [3]) == manifest  # once is enough
    opened = RetroDatastore.from_pretrained(datastore_dir)
    for use in (opened.as_dataset, lambda: extend_datastore(datastore_dir, "validation", tmp_path / "extended")):
        with pytest.raises(ValueError, match="run `retro compact` first"):
            use()
    chunk_documents(more, tmp_path / "cut", tiny_tokenizer, chunk_size=TINY_CHUNK_SIZE, max_chunks=60)
    with pytest.raises(ValueError, match="was cut by max_chunks"):
        add_documents(tmp_path / "cut", more)


@pytest.mark.hostile(
    "a list of removed documents that was altered or is missing, so that they would come back",
    "the datastore cannot be searched, and `retro verify` finds it",
)
def test_the_list_of_removed_documents_cannot_be_altered(datastore_dir):
    manifest = remove_documents(datastore_dir, [3, 4])
    file = datastore_dir / manifest.removed.name
    np.save(file, np.zeros(0, dtype=np.int64))
    with pytest.raises(ValueError, match="was altered"):
        found_documents(datastore_dir)
    assert [finding.where for finding in verify_datastore(datastore_dir)] == [file.name]
    file.unlink()
    with pytest.raises(ValueError, match="is missing"):
        found_documents(datastore_dir)
    assert [finding.where for finding in verify_datastore(datastore_dir)] == [file.name]


@pytest.mark.parametrize("number", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_brute_force_agrees_after_changes(tmp_path, tiny_tokenizer, tiny_encoder_dir, encoder, number):
    generator = random.Random(0)
    chunker = DocumentChunker(tiny_tokenizer, TINY_CHUNK_SIZE)
    folder = tmp_path / "datastore"
    living = {}  # number of a document -> its chunks and their vectors
    count = 0

    def note(texts):
        nonlocal count
        for text in texts:
            columns = chunker.chunk([Document(text, count)])[0]
            mask = np.arange(TINY_CHUNK_SIZE) < columns["length"][:, None]
            vectors = encoder.encode_chunks(columns["input_ids"], mask, tiny_tokenizer)
            living[count] = columns["input_ids"], vectors.astype(np.float16).astype(np.float32)
            count += 1

    def new_documents(number):
        texts = [f"text {text}" for text in make_texts(number, seed=generator.random(), max_words=20)]
        note(texts)
        return write_jsonl(tmp_path / "new.jsonl", texts)

    chunk_documents(new_documents(10), folder, tiny_tokenizer, chunk_size=TINY_CHUNK_SIZE)
    embed_chunks(folder, tiny_encoder_dir)
    build_index(folder, factory="Flat")
    find_neighbors(folder, num_neighbors=2)
    k = 5
    for step in range(number):
        change = generator.choices(["add", "remove", "compact"], [5, 5, 1])[0]
        if change == "remove" and len(living) > 5:
            gone = generator.sample(sorted(living), generator.randint(1, 3))
            for number in gone:
                del living[number]
            remove_documents(folder, gone, refresh_neighbors=step % 4 == 0)
        elif change == "compact":
            compact_datastore(folder, refresh_neighbors=step % 4 == 0)
        else:
            add_documents(folder, new_documents(generator.randint(1, 3)), refresh_neighbors=step % 4 == 0)
        retriever = RetroRetriever(RetroDatastore.from_pretrained(folder), encoder)
        queries = np.concatenate([living[number][0] for number in generator.sample(sorted(living), 3)])[:8]
        found = retriever.retrieve(torch.from_numpy(queries.astype(np.int64)), k)
        vectors = encoder.encode_chunks(queries, np.ones_like(queries, dtype=bool), tiny_tokenizer)
        scores = {number: vectors @ own[1].T for number, own in living.items()}
        best = -np.sort(-np.concatenate(list(scores.values()), axis=1), axis=1)[:, :k]
        np.testing.assert_allclose(found.scores.numpy()[:, : best.shape[1]], best, rtol=1e-3, atol=1e-3)
        for query, document, neighbor, score in zip(
            np.repeat(np.arange(len(queries)), k),
            found.document_ids.flatten().tolist(),
            found.neighbor_input_ids.flatten(0, 1).numpy(),
            found.scores.flatten().tolist(),
            strict=True,
        ):
            if document >= 0:
                same = (living[document][0] == neighbor[:TINY_CHUNK_SIZE]).all(axis=1)
                assert np.abs(scores[document][query][same] - score).min() < 1e-3 * max(1, abs(score))
    datastore = RetroDatastore.from_pretrained(folder)
    removed = datastore.manifest.removed.documents if datastore.manifest.removed is not None else 0
    assert len(np.unique(datastore.chunks.document_id)) - removed == len(living)
    assert verify_datastore(folder) == []


def chunk_texts(datastore):
    """Tokens of the chunks that can be found, with their document."""
    living = np.flatnonzero(~datastore.is_removed(np.arange(len(datastore.chunks))))
    tokens = datastore.chunks.take(living)[0]
    return [(number, *row) for number, row in zip(datastore.chunks.document_id[living].tolist(), tokens.tolist())]


def check_whole(path, states):
    """Whoever opens the datastore now finds one of the versions, whole; returns its number."""
    datastore = RetroDatastore.from_pretrained(path)
    datastore.verify()
    assert chunk_texts(datastore) == states[datastore.manifest.version]
    assert datastore.index.ntotal == len(datastore.chunks) == len(datastore.neighbor_ids)
    assert not datastore.is_removed(datastore.neighbor_ids).any()
    return datastore.manifest.version


def in_child(function, *args, seconds=600):
    """Runs a function in a process that is killed after some seconds; returns whether it ended by itself."""
    process = CHILDREN.Process(target=function, args=args)
    process.start()
    process.join(seconds)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


def changes_of(folder):
    """Changes of every kind, one after the other."""
    more = folder.parent / "more.jsonl"
    write_jsonl(more, make_texts(4, seed=71))
    return [
        partial(add_documents, inputs=more),
        partial(remove_documents, documents=[2, 3, 17, 41]),
        partial(add_documents, inputs=more, refresh_neighbors=True),
        compact_datastore,
        partial(remove_documents, documents=[5], refresh_neighbors=True),
    ]


@pytest.fixture
def changed(datastore_dir, tmp_path):
    """What stands in the folder after all changes, and the chunks of each version."""
    folder = shutil.copytree(datastore_dir, tmp_path / "reference")
    states = [chunk_texts(RetroDatastore.from_pretrained(folder))]
    for change in changes_of(datastore_dir):
        change(folder)
        states.append(chunk_texts(RetroDatastore.from_pretrained(folder)))
    return files_in(folder), states


def files_in(path):
    files = (file for file in sorted(path.rglob("*")) if file.is_file() and file.name not in (".lock", ".inputs.json"))
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def make_with_kills(path, change, version, states, kill_after):
    """Makes a change, however often it is killed on the way."""
    kills = 0
    while not in_child(change, path, seconds=kill_after(kills)) and check_whole(path, states) == version:
        kills += 1
    return kills


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_change_that_is_killed_at_any_time_leaves_a_whole_version(datastore_dir, tmp_path, changed, rounds):
    expected, states = changed
    generator = random.Random(0)
    for number in range(rounds):
        path, kills = shutil.copytree(datastore_dir, tmp_path / f"round-{number}"), 0
        for version, change in enumerate(changes_of(datastore_dir)):
            # A change that was killed after it took its place may have left links to files that are gone.
            shutil.copytree(path, tmp_path / "timed", symlinks=True)
            start = time.monotonic()
            assert in_child(change, tmp_path / "timed")
            duration = time.monotonic() - start
            shutil.rmtree(tmp_path / "timed")
            kills += make_with_kills(
                path, change, version, states, lambda n: generator.uniform(0.1, 1) * duration * 1.2**n
            )
            assert check_whole(path, states) == version + 1
        assert kills > 0
        next_version.finish_change(path)  # removes what the last kill left
        remove_unread(path, RetroDatastore.from_pretrained(path).manifest)
        assert files_in(path) == expected


def die_while_publishing(allowed, function, *args):
    """Runs a function in this process, which is killed after some steps on the disk that publish a version."""
    publish = next_version._publish

    def publish_and_die(path):
        steps = iter(range(allowed))
        for module, name in ((os, "replace"), (os, "link"), (os, "unlink"), (durable_files_retro, "_exchange")):

            def step(*args, original=getattr(module, name), **kwargs):
                # A folder counts as one step, and what is not there as none.
                if "dir_fd" not in kwargs and os.path.lexists(args[0]) and next(steps, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            setattr(module, name, step)
        publish(path)

    next_version._publish = publish_and_die
    function(*args)


def test_a_change_that_is_killed_while_it_takes_its_place_is_finished_by_the_next(datastore_dir, changed):
    expected, states = changed
    path, kills, allowed = datastore_dir, 0, 1
    for version, change in enumerate(changes_of(datastore_dir)):
        while not in_child(die_while_publishing, allowed, change, path) and check_whole(path, states) == version:
            kills, allowed = kills + 1, 1 + allowed % 4
        while not in_child(die_while_publishing, allowed, next_version.finish_change, path):
            kills, allowed = kills + 1, 1 + allowed % 4
            assert check_whole(path, states) == version + 1
        assert check_whole(path, states) == version + 1 and not (path / ".next").exists()
    assert kills > 10
    remove_unread(path, RetroDatastore.from_pretrained(path).manifest)
    assert files_in(path) == expected


def change_all(path):
    for change in changes_of(path):
        change(path)


def test_readers_find_a_whole_version_at_every_moment(datastore_dir, changed):
    _, states = changed
    process = CHILDREN.Process(target=change_all, args=(datastore_dir,))
    process.start()
    seen = []
    while process.is_alive():
        seen.append(check_whole(datastore_dir, states))
    process.join()
    assert process.exitcode == 0 and seen == sorted(seen) and len(set(seen)) > 2
    assert check_whole(datastore_dir, states) == len(states) - 1


@pytest.mark.slow
def test_two_processes_make_the_versions_that_one_makes(datastore_dir, changed):
    expected, _ = changed
    assert run_processes(change_all, datastore_dir)
    assert files_in(datastore_dir) == expected
