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
"""Files of other implementations, made by their formulas, become the datastore that the same documents give here."""

import json

import numpy as np
import pytest
from conftest import make_texts, write_jsonl
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

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
    for number, record in enumerate(original.manifest.train.chunk_shards):
        columns = original.chunks.shard(number)
        rows = slice(int(original.chunks.offsets[number]), int(original.chunks.offsets[number + 1]))
        documents = columns["document_id"] - columns["document_id"][0]
        arrays = {
            "chunks": columns["input_ids"].astype(np.uint16),
            "chunk2seq": documents.astype(np.int32),
            "seq2chunk": np.flatnonzero(np.diff(documents, prepend=-1)).astype(np.int64),
            "embeddings": np.load(original.path / "embeddings" / f"{record.name}.npy"),
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
    for record in imported.manifest.train.embedding_shards:
        name = f"embeddings/{record.name}.npy"
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


def words_tokenizer(special, template):
    """Words `w4`, `w5`, … with their numbers as ids, and special tokens with the ids of the other implementation."""
    vocabulary = {f"w{i}": i for i in range(110) if i not in special.values()} | special
    backend = Tokenizer(models.WordLevel(vocabulary, next(name for name in special if "unk" in name.lower())))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = [(name, number) for name, number in special.items() if name in template]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
    return backend


@pytest.fixture(scope="module")
def bert_tokenizer():
    backend = words_tokenizer({"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102}, "[CLS] $A [SEP]")
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.fixture(scope="module")
def t5_tokenizer():
    backend = words_tokenizer({"<pad>": 0, "</s>": 1, "<unk>": 2}, "$A </s>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def documents_of_words(lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [" ".join(f"w{number}" for number in generator.integers(3, 100, size=length)) for length in lengths]


def write_retro_pytorch(folder, texts, tokenizer, k, seq_len=32, max_chunks=100, train=False):
    """
    What `TrainingWrapper` leaves in its folder. A document is its tokens with [CLS] and [SEP], padded with zeros to a
    multiple of the chunk size and one more; the first token of the next chunk is repeated at the end of each. The maps
    of chunks and documents are allocated for `max_chunks`. Neighbors of the own document become -1 and go last.
    """
    memory = {
        name: np.memmap(folder / f"train.{name}.dat", dtype=np.int32, mode="w+", shape=shape)
        for name, shape in (("chunks", (max_chunks, M + 1)), ("seq", (max_chunks,)), ("doc_ids", (max_chunks,)))
    }
    total, seqs = 0, 0
    for document, text in enumerate(texts):
        ids = np.array(tokenizer(text)["input_ids"])
        ids = np.pad(ids, (0, M - (len(ids) - 1) % M))
        rows = ids[:-1].reshape(-1, M)
        following = np.append(rows[1:, 0], ids[-1])
        memory["chunks"][total : total + len(rows)] = np.column_stack([rows, following])
        memory["doc_ids"][total : total + len(rows)] = document
        starts = np.arange(0, len(rows), seq_len // M)
        memory["seq"][seqs : seqs + len(starts)] = starts + total
        total, seqs = total + len(rows), seqs + len(starts)
    vectors = np.random.default_rng(1).normal(size=(total, 4))
    distances = ((vectors[:, None] - vectors) ** 2).sum(-1)
    order = np.argsort(distances, axis=1)[:, 1 : k + 11]
    owners = np.array(memory["doc_ids"][:total])
    own = owners[order] == owners[:, None]
    near = np.where(own, 1e3, np.take_along_axis(distances, order, axis=1))
    knn = np.take_along_axis(np.where(own, -1, order), np.argsort(near, axis=1, kind="stable"), axis=1)[:, :k]
    np.memmap(folder / "train.chunks.knn.dat", dtype=np.int32, mode="w+", shape=knn.shape)[:] = knn
    (folder / "processed-stats.json").write_text(json.dumps({"chunks": total, "docs": len(texts), "seqs": seqs}))
    if train:  # the dataset of the training opens the neighbors with rows for padding, which makes the file longer
        np.memmap(folder / "train.chunks.knn.dat", dtype=np.int32, shape=(total + seq_len // M, k))
    return knn


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("k", "lengths"), [(2, [5, 6, 7, 30, 1, 15, 14]), (4, [50, 9]), (1, [20, 21, 22])])
def test_command_imports_what_retro_pytorch_writes(tmp_path, bert_tokenizer, k, lengths, train):
    bert_tokenizer.save_pretrained(tmp_path / "tokenizer")
    texts = documents_of_words(lengths)
    knn = write_retro_pytorch(tmp_path, texts, bert_tokenizer, k, train=train)
    assert ((tmp_path / "train.chunks.knn.dat").stat().st_size > knn.size * 4) == train
    options = ["--format", "retro_pytorch", "--chunk_size", str(M), "--tokenizer", str(tmp_path / "tokenizer")]
    main(["--source", str(tmp_path / "train.chunks.dat"), "--output_dir", str(tmp_path / "out"), *options])
    imported = RetroDatastore.from_pretrained(tmp_path / "out")
    input_ids, mask = imported.chunks.take(np.arange(len(imported.chunks)))
    owners = imported.chunks.document_id
    for document, text in enumerate(texts):
        tokens = input_ids[owners == document][mask[owners == document]]
        assert tokens.tolist() == bert_tokenizer(text)["input_ids"]
    np.testing.assert_array_equal(imported.neighbor_ids, knn)
    imported.verify()


def test_stats_of_retro_pytorch_that_are_missing_or_broken_are_named(tmp_path, bert_tokenizer):
    write_retro_pytorch(tmp_path, documents_of_words([20, 20]), bert_tokenizer, 2)
    (tmp_path / "processed-stats.json").write_text("{}")
    arguments = ("retro_pytorch", tmp_path / "train.chunks.dat", tmp_path / "out", bert_tokenizer)
    with pytest.raises(ValueError, match=r"processed-stats.json: expected \{\"chunks\": …"):
        import_datastore(*arguments, chunk_size=M)
    (tmp_path / "processed-stats.json").unlink()
    with pytest.raises(ValueError, match="processed-stats.json is missing"):
        import_datastore(*arguments, chunk_size=M)


def write_norlund(folder, shards, tokenizer, encoder_dir):
    """
    Steps 1 and 2: the tokens of a document, padded to a multiple of the chunk size, and embeddings of the decoded
    chunks. Returns the entries of the spec file of the index.
    """
    model = SentenceTransformer(str(encoder_dir), device="cpu")
    index = []
    for name, texts in shards.items():
        rows = [
            np.array(tokenizer(text, padding=True, pad_to_multiple_of=M)["input_ids"]).reshape(-1, M) for text in texts
        ]
        sizes = [len(each) for each in rows]
        chunks = np.concatenate(rows).astype(np.uint16)
        decoded = [tokenizer.decode(chunk, skip_special_tokens=True) for chunk in chunks]
        arrays = {
            "chunks": chunks,
            "seq2chunk": np.cumsum([0, *sizes[:-1]], dtype=np.int64),
            "chunk2seq": np.repeat(np.arange(len(texts)), sizes).astype(np.int32),
            "embeddings": model.encode(decoded, normalize_embeddings=True).astype(np.float16),
        }
        for key, array in arrays.items():
            np.save(folder / f"{name}.{key}.npy", array)
        index.append({key: f"{name}.{key}.npy" for key in arrays})
    return index


def write_norlund_neighbours(folder, entries, searched, k=2):
    """
    Steps 3 to 6: a search among all shards with four results more than needed, of which those of the own document
    become -1 and go last. Returns the shards of the spec file of the data.
    """
    vectors = np.concatenate([np.load(folder / entry["embeddings"]) for entry in searched]).astype(np.float32)
    shards = []
    for entry in entries:
        queries = np.load(folder / entry["embeddings"]).astype(np.float32)
        found = np.argsort(-queries @ vectors.T, axis=1, kind="stable")[:, : k + 4]
        if entry in searched:
            offset = sum(len(np.load(folder / e["chunks"])) for e in searched[: searched.index(entry)])
            owners = np.load(folder / entry["chunk2seq"])
            inside = (found >= offset) & (found < offset + len(owners))
            own = inside & (owners[np.where(inside, found - offset, 0)] == owners[:, None])
            found = np.take_along_axis(np.where(own, -1, found), np.argsort(own, axis=1, kind="stable"), axis=1)
        name = entry["chunks"].replace("chunks", "neighbours")
        np.save(folder / name, found[:, :k])
        shards.append({key: entry[key] for key in ("chunks", "seq2chunk", "chunk2seq")} | {"neighbours": name})
    return shards


def test_both_spec_files_of_norlund_give_chunks_embeddings_and_neighbors(tmp_path, t5_tokenizer, tiny_encoder_dir):
    t5_tokenizer.save_pretrained(tmp_path / "tokenizer")
    texts = {"a": documents_of_words([3, 20, 7]), "b": documents_of_words([8, 30], 1), "v": documents_of_words([9], 2)}
    index = write_norlund(tmp_path, texts, t5_tokenizer, tiny_encoder_dir)
    neighbours = {"faiss_index": "data.index", "index_spec": "index.spec.json"}
    (tmp_path / "index.spec.json").write_text(json.dumps(index[:2]))
    for name, entries in (("data", index[:2]), ("val", index[2:])):
        shards = write_norlund_neighbours(tmp_path, entries, index[:2])
        (tmp_path / f"{name}.spec.json").write_text(json.dumps({"shards": shards, "neighbours": neighbours}))
    command = [
        "--format",
        "norlund",
        "--output_dir",
        str(tmp_path / "out"),
        "--tokenizer",
        str(tmp_path / "tokenizer"),
    ]
    with pytest.raises(
        ValueError, match="neighbors of .*val.spec.json are chunks of .*index.spec.json, which lists o"
    ):
        main([*command, "--source", str(tmp_path / "val.spec.json")])
    main([*command, "--source", str(tmp_path / "data.spec.json"), "--encoder", str(tiny_encoder_dir)])
    main([*command, "--source", str(tmp_path / "val.spec.json"), "--split", "validation"])

    imported = RetroDatastore.from_pretrained(tmp_path / "out")
    for split, names in (("train", "ab"), ("validation", "v")):
        part = imported.split(split)
        input_ids, mask = part.chunks.take(np.arange(len(part.chunks)))
        documents = [part.chunks.document_id == number for number in np.unique(part.chunks.document_id)]
        expected = [t5_tokenizer(text)["input_ids"] for name in names for text in texts[name]]
        assert [input_ids[rows][mask[rows]].tolist() for rows in documents] == expected
        found = np.concatenate([np.load(tmp_path / f"{name}.neighbours.npy") for name in names])
        np.testing.assert_array_equal(part.neighbor_ids, found)
    for number, name in enumerate("ab"):
        stored = np.load(imported.path / "embeddings" / f"shard-{number:05d}.npy")
        np.testing.assert_array_equal(stored, np.load(tmp_path / index[number]["embeddings"]))
    imported.verify()

    # Neighbors among other chunks than those of the datastore
    (tmp_path / "index.spec.json").write_text(json.dumps(index[:1]))
    with pytest.raises(ValueError, match="were searched among 5 chunks, and the split 'train' has 11"):
        main([*command, "--source", str(tmp_path / "val.spec.json"), "--split", "test"])
