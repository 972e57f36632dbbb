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
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY_CHUNK_SIZE, make_texts, write_jsonl

from data_prep.chunk import DocumentChunker, chunk_documents
from data_prep.documents import Document
from data_prep.embed import embed_chunks
from data_prep.index import build_index
from data_prep.living_datastore import add_documents, compact_datastore, remove_documents
from data_prep.neighbors import find_neighbors
from data_prep.verify import verify_datastore
from modeling_retro.chunk_encoder_retro import ChunkEncoder
from modeling_retro.datastore_retro import RetroDatastore
from modeling_retro.retriever_retro import RetroRetriever


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
    assert manifest["version"] == 1 and manifest == after.manifest
    documents = after.chunks.document_id
    new = documents[len(before.chunks) :]
    assert np.unique(new).tolist() == list(range(before.chunks.document_id[-1] + 1, new[-1] + 1))
    tokens, mask = after.chunks.take(np.flatnonzero(documents == new[-1]))
    assert after.tokenizer.decode(tokens[mask], skip_special_tokens=True) == texts[-1]
    assert set(new.tolist()) <= found_documents(datastore_dir, k=len(documents))
    assert after.neighbor_ids.shape == (len(documents), 4)
    assert verify_datastore(datastore_dir) == []


def test_removed_documents_are_never_returned(datastore_dir):
    opened = RetroDatastore.from_pretrained(datastore_dir)
    remove = np.unique(opened.chunks.document_id)[::3].tolist()
    assert set(remove) <= found_documents(datastore_dir, k=457)
    assert np.isin(opened.chunks.document_id[opened.neighbor_ids], remove).any()
    manifest = remove_documents(datastore_dir, remove)
    assert manifest["removed"]["documents"] == len(remove)
    assert manifest["removed"]["chunks"] == np.isin(opened.chunks.document_id, remove).sum()
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
    assert "removed" not in manifest and manifest["compacted"]["documents"] == 6
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
        texts = make_texts(number, seed=generator.random(), max_words=20)
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
    removed = datastore.manifest.get("removed", {"documents": 0})["documents"]
    assert len(np.unique(datastore.chunks.document_id)) - removed == len(living)
    assert verify_datastore(folder) == []
