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
"""Files of other implementations become the datastore that the same documents give here."""

import json

import numpy as np
import pytest
from conftest import make_texts, write_jsonl

from data_prep.chunk import chunk_documents
from data_prep.embed import embed_chunks
from data_prep.index import build_index
from data_prep.neighbors import find_neighbors
from data_prep.scripts.convert import main
from data_prep.upkeep.import_others import import_datastore
from modeling_retro.datastore.datastore import RetroDatastore


M = 8


@pytest.fixture(scope="module")
def original(tmp_path_factory, tiny_tokenizer, tiny_encoder_dir):
    path = tmp_path_factory.mktemp("original")
    tiny_tokenizer.save_pretrained(path / "tokenizer")
    texts = write_jsonl(path / "a.jsonl", make_texts(20, seed=11))
    chunk_documents(texts, path / "datastore", tiny_tokenizer, chunk_size=M, shard_bytes=2000)
    embed_chunks(path / "datastore", tiny_encoder_dir)
    build_index(path / "datastore")
    find_neighbors(path / "datastore", num_neighbors=3)
    return RetroDatastore.from_pretrained(path / "datastore")


@pytest.fixture
def norlund(original, tmp_path):
    """The files of `index.spec.json` and `data.spec.json`, padded with 0 (the end of the tiny tokenizer is 0 too)."""
    entries = []
    for number, record in enumerate(original.manifest["splits"]["train"]["chunks"]["shards"]):
        columns = original.chunks.shard(number)
        rows = slice(int(original.chunks.offsets[number]), int(original.chunks.offsets[number + 1]))
        documents = columns["document_id"] - columns["document_id"][0]
        arrays = {
            "chunks": columns["input_ids"].astype(np.uint16),
            "chunk2seq": documents.astype(np.int32),
            "seq2chunk": np.flatnonzero(np.diff(documents, prepend=-1)).astype(np.int64),
            "embeddings": np.load(original.path / "embeddings" / f"{record['name']}.npy"),
            "neighbours": original.neighbor_ids[rows],
        }
        for name, array in arrays.items():
            np.save(tmp_path / f"{number}.{name}.npy", array)
        entries.append({name: f"{number}.{name}.npy" for name in arrays})
    index = [{key: value for key, value in entry.items() if key != "neighbours"} for entry in entries]
    (tmp_path / "index.spec.json").write_text(json.dumps(index))
    neighbours = {"faiss_index": "index.faiss", "index_spec": "index.spec.json"}
    (tmp_path / "data.spec.json").write_text(json.dumps({"shards": entries, "neighbours": neighbours}))
    return tmp_path


def assert_same_chunks(imported, original):
    ids = np.arange(len(original.chunks))
    assert len(imported.chunks) == len(ids)
    (input_ids, mask), (expected, expected_mask) = imported.chunks.take(ids), original.chunks.take(ids)
    # The end of a document may be told from padding only if its id is not 0.
    end = expected == original.tokenizer.eos_token_id
    np.testing.assert_array_equal(mask | end, expected_mask | end)
    np.testing.assert_array_equal(np.where(mask, input_ids, 0), np.where(expected_mask & mask, expected, 0))
    assert (np.diff(imported.chunks.document_id) > 0).sum() == (np.diff(original.chunks.document_id) > 0).sum()


def test_norlund_shards_bring_chunks_embeddings_and_neighbors(norlund, original, tmp_path, tiny_encoder_dir):
    imported_dir = tmp_path / "imported"
    options = ["--tokenizer", str(original.path / "tokenizer"), "--encoder", str(tiny_encoder_dir)]
    main(
        [
            "--format",
            "norlund",
            "--source",
            str(norlund / "data.spec.json"),
            "--output_dir",
            str(imported_dir),
            *options,
        ]
    )
    imported = RetroDatastore.from_pretrained(imported_dir)
    assert_same_chunks(imported, original)
    np.testing.assert_array_equal(imported.neighbor_ids, original.neighbor_ids)
    for record in imported.manifest["splits"]["train"]["embeddings"]["shards"]:
        name = f"embeddings/{record['name']}.npy"
        np.testing.assert_array_equal(np.load(imported.path / name), np.load(original.path / name))
    build_index(imported_dir)
    find_neighbors(imported_dir, num_neighbors=3, force=True)
    imported = RetroDatastore.from_pretrained(imported_dir)
    np.testing.assert_array_equal(imported.neighbor_ids, original.neighbor_ids)
    imported.verify()


def test_bytes_of_imported_chunks_are_those_of_their_text(norlund, original, tmp_path):
    import_datastore("norlund", norlund / "index.spec.json", tmp_path / "imported", original.path / "tokenizer")
    chunks = RetroDatastore.from_pretrained(tmp_path / "imported").chunks
    input_ids, mask = chunks.take(np.arange(len(chunks)))
    rows = [row[real] for row, real in zip(input_ids, mask, strict=True)]
    texts = [original.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    assert chunks.num_bytes.tolist() == [len(text.encode()) for text in texts]


def change(path, edit):
    np.save(path, edit(np.load(path)))


DAMAGE = {
    "disagree about where documents begin": lambda p: change(p / "0.seq2chunk.npy", lambda a: a + 1),
    r"0\.chunk2seq\.npy has shape .* expected 1 dimensions and \d+ rows": lambda p: change(
        p / "0.chunk2seq.npy", lambda a: a[:-1]
    ),
    r"1\.embeddings\.npy has shape": lambda p: change(p / "1.embeddings.npy", lambda a: a[1:]),
    "has 16|have 9 dimensions": lambda p: change(p / "1.embeddings.npy", lambda a: a[:, :9]),
    "are not those of .* median cosine": lambda p: change(p / "0.embeddings.npy", lambda a: a[::-1]),
    "median cosine of a sample is nan": lambda p: change(p / "0.embeddings.npy", lambda a: a * np.nan),
    r"0\.chunks\.npy has token ids from 0 to 40000; the tokenizer has 300": lambda p: change(
        p / "0.chunks.npy", lambda a: np.where(a == a.max(), 40000, a)
    ),
    r"1\.chunks\.npy has chunks of 4 tokens": lambda p: change(p / "1.chunks.npy", lambda a: a[:, :4]),
    r"neighbors of .*0\.chunks\.npy .* do not fit": lambda p: change(p / "0.neighbours.npy", lambda a: a + 10**6),
    r"cannot read .*0\.chunks\.npy": lambda p: (p / "0.chunks.npy").write_bytes(b"not npy"),
    "has no seq2chunk": lambda p: (p / "data.spec.json").write_text('[{"chunks": "0.chunks.npy"}]'),
    "neither a list of shards nor": lambda p: (p / "data.spec.json").write_text('{"shard": []}'),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_norlund_files_that_disagree_are_refused_by_name(norlund, original, tmp_path, tiny_encoder_dir, message):
    DAMAGE[message](norlund)
    with pytest.raises(ValueError, match=message):
        import_datastore(
            "norlund", norlund / "data.spec.json", tmp_path / "out", original.path / "tokenizer", tiny_encoder_dir
        )


@pytest.fixture
def retro_pytorch(original, tmp_path):
    """Headerless maps, allocated for more chunks than there are, each chunk with the first token of the next."""
    input_ids, _ = original.chunks.take(np.arange(len(original.chunks)))
    number = len(input_ids)
    chunks = np.zeros((number + 5, M + 1), dtype=np.int32)
    chunks[:number, :M] = input_ids
    chunks[: number - 1, M] = input_ids[1:, 0]
    doc_ids = np.zeros(number + 5, dtype=np.int32)
    doc_ids[:number] = original.chunks.document_id
    chunks.tofile(tmp_path / "train.chunks.dat")
    doc_ids.tofile(tmp_path / "train.doc_ids.dat")
    original.neighbor_ids.astype(np.int32).tofile(tmp_path / "train.chunks.knn.dat")
    (tmp_path / "train.stats.json").write_text(json.dumps({"chunks": number, "docs": 20, "seqs": 1}))
    return tmp_path


def test_retro_pytorch_maps_bring_chunks_and_neighbors(retro_pytorch, original, tmp_path):
    source = retro_pytorch / "train.chunks.dat"
    import_datastore("retro_pytorch", source, tmp_path / "out", original.path / "tokenizer", chunk_size=M)
    imported = RetroDatastore.from_pretrained(tmp_path / "out")
    assert_same_chunks(imported, original)
    np.testing.assert_array_equal(imported.neighbor_ids, original.neighbor_ids)


def test_retro_pytorch_maps_of_another_size_are_refused(retro_pytorch, original, tmp_path):
    source = retro_pytorch / "train.chunks.dat"
    with pytest.raises(ValueError, match="train.chunks.dat holds .* fewer than .* chunks of 65"):
        import_datastore("retro_pytorch", source, tmp_path / "out", original.path / "tokenizer")
    (retro_pytorch / "train.doc_ids.dat").unlink()
    with pytest.raises(ValueError, match="train.doc_ids.dat is missing"):
        import_datastore("retro_pytorch", source, tmp_path / "out", original.path / "tokenizer", chunk_size=M)
    with pytest.raises(ValueError, match="'norlund' or 'retro_pytorch', got 'megatron'"):
        import_datastore("megatron", source, tmp_path / "out", original.path / "tokenizer")
