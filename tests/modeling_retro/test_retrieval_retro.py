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
"""Reading a datastore, embedding chunks and looking them up."""

import copy
import json
import pickle
import shutil

import faiss
import numpy as np
import pytest
import torch
from conftest import TINY_CHUNK_SIZE, make_texts, write_jsonl
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from data_prep.chunk import chunk_documents
from data_prep.embed import embed_chunks
from data_prep.index import build_index
from data_prep.neighbors import find_neighbors
from modeling_retro.encoder_retro import ChunkEncoder, decode_chunks
from modeling_retro.retrieval_retro import RetroDatastore, RetroRetriever, other_document_filter, search


@pytest.fixture(scope="module")
def datastore(tiny_datastore_dir):
    return RetroDatastore.from_pretrained(tiny_datastore_dir)


@pytest.fixture(scope="module")
def retriever(datastore):
    return RetroRetriever(datastore, device="cpu")


@pytest.fixture
def datastore_copy(tiny_datastore_dir, tmp_path):
    return shutil.copytree(tiny_datastore_dir, tmp_path / "datastore")


def edit_manifest(path, edit):
    manifest = json.loads((path / "datastore.json").read_text())
    edit(manifest)
    (path / "datastore.json").write_text(json.dumps(manifest))


def test_take_gathers_rows_of_any_shape_and_masks_absent_ones(datastore):
    chunks = datastore.chunks
    everything = np.concatenate([chunks.shard(index)["input_ids"] for index in range(len(chunks.folders))])
    assert len(chunks.folders) > 1 and len(everything) == len(chunks)
    ids = np.random.default_rng(0).integers(-1, len(chunks), (3, 5, 2))
    input_ids, mask = chunks.take(ids)
    assert input_ids.dtype == np.int64 and mask.dtype == bool and input_ids.shape == (3, 5, 2, TINY_CHUNK_SIZE)
    for place in np.ndindex(ids.shape):
        length = chunks.length[ids[place]] if ids[place] >= 0 else 0
        assert mask[place].tolist() == [j < length for j in range(TINY_CHUNK_SIZE)]
        assert (input_ids[place][:length] == everything[ids[place]][:length]).all()
        assert (input_ids[place][length:] == 0).all()


def test_take_refuses_ids_that_do_not_exist(datastore):
    with pytest.raises(ValueError, match="chunk ids must lie in"):
        datastore.chunks.take([len(datastore.chunks)])
    with pytest.raises(ValueError, match="got -2"):
        datastore.chunks.take([-2, 0])


def test_a_shard_is_read_without_a_copy(datastore):
    assert not datastore.chunks.shard(0)["input_ids"].flags.owndata
    assert not datastore.chunks.shard(0)["input_ids"].flags.writeable


def test_a_neighbor_goes_on_inside_its_document_only(datastore):
    chunks, m = datastore.chunks, TINY_CHUNK_SIZE
    ids = np.arange(-1, len(chunks)).reshape(1, -1)
    input_ids, mask = datastore.take_neighbors(ids)
    assert input_ids.shape == (1, len(chunks) + 1, 2 * m)
    for column, chunk in enumerate(ids[0]):
        first, first_mask = chunks.take(chunk)
        assert (input_ids[0, column, :m] == first).all() and (mask[0, column, :m] == first_mask).all()
        goes_on = 0 <= chunk < len(chunks) - 1 and chunks.document_id[chunk] == chunks.document_id[chunk + 1]
        second, second_mask = chunks.take(chunk + 1 if goes_on else -1)
        assert (input_ids[0, column, m:] == second).all() and (mask[0, column, m:] == second_mask).all()


def brute_force(queries, keys, key_documents, query_documents, k):
    rows = []
    for query, document in zip(queries, query_documents, strict=True):
        scores = [
            (-float(query @ key), other)
            for other, key in enumerate(keys)
            if document is None or key_documents[other] != document
        ]
        rows.append([other for _, other in sorted(scores)[:k]])
    return np.array(rows)


def embeddings_of(path):
    files = sorted((path / "embeddings").glob("*.npy"))
    return np.concatenate([np.load(file) for file in files]).astype(np.float32)


def test_neighbors_equal_brute_force_outside_the_own_document(datastore):
    keys, documents = embeddings_of(datastore.path), datastore.chunks.document_id
    assert datastore.neighbor_ids.shape == (len(datastore.chunks), 4)
    expected = brute_force(keys, keys, documents, documents, 4)
    scores = np.einsum("nd,nkd->nk", keys, keys[datastore.neighbor_ids])
    best = np.einsum("nd,nkd->nk", keys, keys[expected])
    np.testing.assert_allclose(scores, best, atol=1e-5)  # equal up to exchanges among equal scores
    np.testing.assert_allclose(datastore.neighbor_scores, scores, atol=1e-5)
    assert (documents[datastore.neighbor_ids] != documents[:, None]).all()


def test_validation_searches_the_training_chunks(datastore):
    split = datastore.split("validation")
    queries, keys = embeddings_of(split.path), embeddings_of(datastore.path)
    expected = brute_force(queries, keys, datastore.chunks.document_id, [None] * len(queries), 4)
    scores = np.einsum("nd,nkd->nk", queries, keys[split.neighbor_ids])
    np.testing.assert_allclose(scores, np.einsum("nd,nkd->nk", queries, keys[expected]), atol=1e-5)
    assert len(split.neighbor_ids) == len(split.chunks)


def test_embeddings_are_those_of_the_text_of_the_chunks(datastore, tiny_encoder_dir):
    """Mean over the tokens of the encoder's last layer, normalised, written out with transformers."""
    model = AutoModel.from_pretrained(tiny_encoder_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder_dir)
    keys = embeddings_of(datastore.path)
    for chunk in range(0, len(keys), 37):
        input_ids, mask = datastore.chunks.take(chunk)
        text = datastore.tokenizer.decode(input_ids[mask], skip_special_tokens=True)
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden.mean(0), dim=0)
        np.testing.assert_allclose(keys[chunk], expected, atol=2e-3)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_an_embedding_does_not_depend_on_its_batch(tiny_encoder_dir, pooling):
    encoder = ChunkEncoder.from_pretrained(tiny_encoder_dir, pooling=pooling, normalize=False, device="cpu")
    texts = make_texts(30, seed=7)
    together = encoder.encode(texts, tokens_per_batch=200, window=11)
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert together.dtype == np.float32 and together.shape == (30, 16)


def test_sentence_transformers_files_decide_pooling(tiny_encoder_dir, tmp_path):
    folder = shutil.copytree(tiny_encoder_dir, tmp_path / "encoder")
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling")]
    modules = [
        {"idx": i, "type": f"sentence_transformers.models.{kind}", "path": path}
        for i, (kind, path) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 17}))
    encoder = ChunkEncoder.from_pretrained(folder, device="cpu")
    assert (encoder.pooling, encoder.normalize, encoder.max_length) == ("cls", False, 17)
    pooling["pooling_mode_max_tokens"] = True
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    with pytest.raises(ValueError, match="only mean and cls"):
        ChunkEncoder.from_pretrained(folder)


def test_retrieve_finds_the_recorded_neighbors(datastore, retriever):
    ids = np.flatnonzero(datastore.chunks.length == TINY_CHUNK_SIZE)[:20]
    documents = datastore.chunks.document_id[ids]
    result = retriever.retrieve(torch.from_numpy(datastore.chunks.take(ids)[0]), 2, documents)
    np.testing.assert_allclose(result.scores.numpy(), datastore.neighbor_scores[ids, :2], atol=3e-3)
    assert (result.document_ids.numpy() != documents[:, None]).all()
    assert (datastore.chunks.document_id[result.chunk_ids.numpy()] == result.document_ids.numpy()).all()
    neighbors, mask = datastore.take_neighbors(result.chunk_ids.numpy())
    assert (result.neighbor_input_ids.numpy() == neighbors).all()
    assert (result.neighbor_attention_mask.numpy() == mask).all()
    assert result.neighbor_input_ids.dtype == torch.int64 and result.neighbor_attention_mask.dtype == torch.bool


def test_retrieve_without_exclusion_finds_the_chunk_itself(datastore, retriever):
    ids = np.flatnonzero(datastore.chunks.length == TINY_CHUNK_SIZE)[:20]
    result = retriever.retrieve(torch.from_numpy(datastore.chunks.take(ids)[0]), 1)
    np.testing.assert_allclose(result.scores.numpy(), 1, atol=3e-3)


def test_special_tokens_are_no_part_of_a_query(datastore, retriever):
    tokenizer = datastore.tokenizer
    words = tokenizer("retro in", add_special_tokens=False)["input_ids"][:TINY_CHUNK_SIZE]
    padded = retriever.pad_to_chunks(words)
    assert padded.shape == (TINY_CHUNK_SIZE,) and padded[-len(words) :].tolist() == words
    assert decode_chunks(padded[None], np.ones((1, TINY_CHUNK_SIZE)), tokenizer) == [tokenizer.decode(words)]
    batch = retriever.pad_to_chunks(torch.ones(3, TINY_CHUNK_SIZE + 1, dtype=torch.long))
    assert batch.shape == (3, 2 * TINY_CHUNK_SIZE)


def test_the_index_serves_as_the_faiss_index_of_a_dataset(datastore, retriever):
    dataset = datastore.as_dataset()
    texts = make_texts(5, seed=11)
    queries = retriever.encoder.encode(texts)
    found_scores, examples = dataset.get_nearest_examples_batch("embeddings", queries, k=3)
    files = sorted((datastore.path / "embeddings").glob("*.npy"))
    assert len(files) > 1
    scores = queries @ np.concatenate([np.load(file) for file in files]).astype(np.float32).T
    for row, found in enumerate(examples):
        nearest = np.argsort(-scores[row], kind="stable")[:3]
        np.testing.assert_array_equal(found["input_ids"], datastore.chunks.gather("input_ids", nearest))
        np.testing.assert_allclose(found_scores[row], scores[row, nearest], rtol=1e-5)


def test_the_file_of_the_index_is_what_datasets_loads(datastore, retriever):
    dataset = datastore.as_dataset()
    attached = dataset.search_batch("embeddings", queries := retriever.encoder.encode(make_texts(5, seed=11)), k=3)
    dataset.drop_index("embeddings")
    dataset.load_faiss_index("embeddings", str(datastore.path / "index.faiss"))
    np.testing.assert_array_equal(
        dataset.search_batch("embeddings", queries, k=3).total_indices, attached.total_indices
    )


def test_retrieve_refuses_other_shapes(retriever):
    with pytest.raises(ValueError, match=rf"\[n, {TINY_CHUNK_SIZE}\], got \[2, 3\]"):
        retriever.retrieve(torch.zeros(2, 3, dtype=torch.long), 1)


def test_a_retriever_is_shared_not_copied(retriever):
    assert copy.deepcopy({"retriever": retriever})["retriever"] is retriever


def test_a_datastore_can_go_to_another_process(datastore):
    other = pickle.loads(pickle.dumps(datastore))
    ids = np.arange(len(other.chunks))
    assert (other.chunks.take(ids)[0] == datastore.chunks.take(ids)[0]).all()


def test_one_document_that_fills_the_index_leaves_nothing_to_find(tmp_path, tiny_tokenizer, tiny_encoder_dir):
    """A document of many chunks, and two short ones: fewer than k neighbors, -1 and masked, never its own chunks."""
    texts = [" ".join(make_texts(40, seed=1)), "retro looks up", "things in a store"]
    path = tmp_path / "datastore"
    chunk_documents(write_jsonl(tmp_path / "a.jsonl", texts), path, tiny_tokenizer, chunk_size=8)
    embed_chunks(path, tiny_encoder_dir)
    build_index(path, factory="Flat")
    find_neighbors(path, num_neighbors=12)
    datastore = RetroDatastore.from_pretrained(path)
    documents = datastore.chunks.document_id
    others = int((documents > 0).sum())
    assert others < 12 < (documents == 0).sum()
    own = datastore.neighbor_ids[documents == 0]
    assert (np.sort(own[:, :others], axis=1) == np.flatnonzero(documents > 0)).all()
    assert (own[:, others:] == -1).all() and (datastore.neighbor_scores[documents == 0][:, others:] == 0).all()
    assert not datastore.take_neighbors(own[:, others:])[1].any()
    counts = datastore.manifest["splits"]["train"]["neighbors"]["counts"]
    assert counts["short"] == (documents == 0).sum() and counts["own_document"] > 0 and counts["refetched"] > 0


@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat", "HNSW16"])
def test_search_fetches_until_enough_is_found(factory):
    generator = np.random.default_rng(0)
    keys = generator.normal(size=(600, 8)).astype(np.float32)
    documents = np.repeat([0, 1, 2], [500, 60, 40])

    class Chunks:
        def gather(self, column, ids):
            return np.where(ids >= 0, documents[ids], 0)

    index = faiss.index_factory(8, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(keys)
    index.add(keys)
    unwanted = {"own_document": other_document_filter(Chunks(), documents[:50])}
    ids, scores, counts = search(index, keys[:50], 20, unwanted, fetch=4)
    assert (documents[ids] != 0).all() and counts["short"] == 0 and counts["refetched"] > 0
    assert (np.diff(scores, axis=1) <= 0).all()
    if factory == "Flat":
        assert (ids == brute_force(keys[:50], keys, documents, documents[:50], 20)).all()


def test_equal_scores_come_in_the_order_of_ids():
    keys = np.repeat(np.eye(4, dtype=np.float32), 5, axis=0)[::-1].copy()
    index = faiss.IndexFlatIP(4)
    index.add(keys)
    ids, _, _ = search(index, keys[:3], 20)
    scores = keys[:3] @ keys.T
    assert ids.tolist() == [sorted(range(20), key=lambda i: (-row[i], i)) for row in scores]


def test_another_tokenizer_chunk_size_or_encoder_is_refused_by_name(datastore, tiny_encoder_dir, tmp_path):
    other = PreTrainedTokenizerFast.from_pretrained(tiny_encoder_dir)
    datastore.check_tokenizer(other)
    other.add_tokens(["retrospective"])
    with pytest.raises(ValueError, match="tokenizer .* is not the tokenizer of"):
        datastore.check_tokenizer(other)
    datastore.check_chunk_size(TINY_CHUNK_SIZE)
    with pytest.raises(ValueError, match="chunk_size 64 is not the chunk size of .*: 8"):
        datastore.check_chunk_size(64)
    RetroRetriever(datastore, ChunkEncoder.from_pretrained(tiny_encoder_dir))
    with pytest.raises(ValueError, match="its pooling is cls, expected mean"):
        RetroRetriever(datastore, ChunkEncoder.from_pretrained(tiny_encoder_dir, pooling="cls"))
    BertModel(BertConfig.from_pretrained(tiny_encoder_dir)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_encoder_dir).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its sha256 is"):
        RetroRetriever(datastore, ChunkEncoder.from_pretrained(tmp_path))


def test_the_encoder_is_known_by_its_weights_whatever_the_dtype(datastore, tiny_encoder_dir):
    assert RetroRetriever(datastore, dtype="bfloat16").encoder.model.dtype == torch.bfloat16


def test_a_changed_tokenizer_folder_is_refused(datastore_copy, tiny_tokenizer):
    other = PreTrainedTokenizerFast.from_pretrained(datastore_copy / "tokenizer")
    other.add_tokens(["retrospective"])
    other.save_pretrained(datastore_copy / "tokenizer")
    with pytest.raises(ValueError, match="is not the tokenizer of"):
        RetroDatastore.from_pretrained(datastore_copy).tokenizer


def test_another_chunk_size_in_the_manifest_is_refused(datastore_copy):
    edit_manifest(datastore_copy, lambda manifest: manifest.update(chunk_size=64))
    with pytest.raises(ValueError, match="chunks of 8 tokens, the manifest says 64"):
        RetroDatastore.from_pretrained(datastore_copy).chunks.take([0])


def test_another_order_of_rows_is_refused(datastore_copy):
    edit_manifest(datastore_copy, lambda manifest: manifest["splits"]["train"]["chunks"]["shards"].reverse())
    datastore = RetroDatastore.from_pretrained(datastore_copy)
    with pytest.raises(ValueError, match="index .* belongs to other chunks or another order of rows"):
        datastore.index
    with pytest.raises(ValueError, match="neighbors of .* belong to other chunks or another order of rows"):
        datastore.neighbor_ids


def test_missing_parts_are_named_with_the_command_that_makes_them(datastore_copy):
    edit_manifest(
        datastore_copy, lambda manifest: [manifest.pop("index"), manifest["splits"]["train"].pop("neighbors")]
    )
    datastore = RetroDatastore.from_pretrained(datastore_copy)
    with pytest.raises(ValueError, match="run `retro index`"):
        datastore.index
    with pytest.raises(ValueError, match="run `retro neighbors`"):
        datastore.neighbor_ids
    with pytest.raises(ValueError, match="no split 'test', only train, validation"):
        datastore.split("test")
    shutil.rmtree(datastore_copy / "chunks" / "shard-00001")
    with pytest.raises(ValueError, match=r"shard-00001 is missing \(1 of \d+ shards are\)"):
        RetroDatastore.from_pretrained(datastore_copy).chunks


def test_what_is_no_datastore_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no datastore.json"):
        RetroDatastore.from_pretrained(tmp_path)
    (tmp_path / "datastore.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        RetroDatastore.from_pretrained(tmp_path)
    (tmp_path / "datastore.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="format version 99, this code reads version 1"):
        RetroDatastore.from_pretrained(tmp_path)


def test_a_read_only_datastore_can_be_searched(datastore_copy):
    for path in [datastore_copy, *datastore_copy.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted((path, path.stat().st_mtime_ns) for path in datastore_copy.rglob("*"))
    retriever = RetroRetriever.from_pretrained(datastore_copy, device="cpu")
    retriever.retrieve(torch.from_numpy(retriever.datastore.chunks.take([0])[0]), 2)
    assert sorted((path, path.stat().st_mtime_ns) for path in datastore_copy.rglob("*")) == before
    for path in [datastore_copy, *datastore_copy.rglob("*")]:
        path.chmod(0o755)
