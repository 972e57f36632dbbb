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
"""Search against brute force, and the retriever."""

import copy

import faiss
import numpy as np
import pytest
import torch
from conftest import TINY_CHUNK_SIZE, make_texts, write_jsonl

from data_prep.bm25_index import build_bm25_index
from data_prep.chunk import chunk_documents
from data_prep.embed import embed_chunks
from data_prep.index import build_index
from data_prep.neighbors import find_neighbors
from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.encoder.chunk_encoder import decode_chunks
from modeling_retro.retriever.retriever import RetroRetriever
from modeling_retro.retriever.search import other_document_filter, search


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
    padded = retriever.close_chunks([words])["input_ids"]
    assert padded.shape == (1, TINY_CHUNK_SIZE) and padded[0, -len(words) :].tolist() == words
    assert decode_chunks(padded, np.ones((1, TINY_CHUNK_SIZE)), tokenizer) == [tokenizer.decode(words)]


def test_closed_chunks_end_with_their_prompts_and_hide_their_padding(retriever):
    size = TINY_CHUNK_SIZE
    prompts = [[5, 6, 7], torch.arange(2, 2 + size), list(range(2, 4 + size))]
    batch = retriever.close_chunks(prompts)
    assert {name: value.shape for name, value in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "position_ids"), (3, 2 * size)
    )
    for row, prompt in enumerate(prompts):
        kept = batch["attention_mask"][row].bool()
        assert kept.tolist() == [False] * (2 * size - len(prompt)) + [True] * len(prompt)
        assert batch["input_ids"][row, kept].tolist() == list(prompt)
        num_columns = -(-len(prompt) // size) * size
        missing = num_columns - len(prompt)
        padding = batch["input_ids"][row, 2 * size - num_columns : 2 * size - len(prompt)]
        assert padding.tolist() == [retriever.datastore.tokenizer.pad_token_id] * missing
        assert batch["position_ids"][row, kept].tolist() == list(range(missing, num_columns))
        assert not batch["position_ids"][row, ~kept].any()
    with pytest.raises(ValueError, match="prompt 1 of the batch is empty"):
        retriever.close_chunks([[1], []])


def test_retrieve_refuses_other_shapes(retriever):
    with pytest.raises(ValueError, match=rf"\[n, {TINY_CHUNK_SIZE}\], got \[2, 3\]"):
        retriever.retrieve(torch.zeros(2, 3, dtype=torch.long), 1)


def test_questions_of_any_length_are_looked_up_by_their_text(datastore, retriever):
    tokenizer = datastore.tokenizer
    texts = ["retro in", "looks things up in a datastore, looks things up naïve", "日本語"]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    length = max(map(len, rows))
    assert min(map(len, rows)) < TINY_CHUNK_SIZE < length
    input_ids = torch.tensor([[1] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    found = retriever.retrieve(input_ids, 3, attention_mask=mask)
    queries, keys = retriever.encoder.encode(texts), embeddings_of(datastore.path)
    expected = -np.sort(-queries @ keys.T)[:, :3]
    np.testing.assert_allclose(found.scores.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(np.einsum("nd,nkd->nk", queries, keys[found.chunk_ids.numpy()]), expected, atol=1e-5)
    assert found.neighbor_input_ids.shape == (3, 3, datastore.neighbor_length)
    # What is padded does not matter.
    other = retriever.retrieve(torch.where(mask == 1, input_ids, 7), 3, attention_mask=mask.bool())
    assert torch.equal(other.chunk_ids, found.chunk_ids)


def test_questions_that_nothing_can_be_found_with_are_named(tmp_path, tiny_tokenizer):
    write_jsonl(tmp_path / "documents.jsonl", ["The cat sat on the mat. " * 8, "A dog ran. " * 8])
    chunk_documents(tmp_path / "documents.jsonl", tmp_path / "datastore", tiny_tokenizer, chunk_size=TINY_CHUNK_SIZE)
    build_bm25_index(tmp_path / "datastore", "words")
    retriever = RetroRetriever.from_pretrained(tmp_path / "datastore", retriever="bm25")

    def ask(text):
        input_ids = torch.tensor([tiny_tokenizer(text)["input_ids"]])
        return retriever.retrieve(input_ids, 1, attention_mask=torch.ones_like(input_ids))

    assert "dog" in tiny_tokenizer.decode(ask("Which dog?").neighbor_input_ids[0, 0])
    with pytest.raises(ValueError, match="question 0, 'Whose zebra', has no word that the datastore knows"):
        ask("Whose zebra")
    with pytest.raises(ValueError, match="question 0 is empty, expected some text"):
        ask(" \n")
    input_ids = torch.tensor([tiny_tokenizer("dog")["input_ids"]])
    with pytest.raises(ValueError, match="question 0 is empty"):
        retriever.retrieve(input_ids, 1, attention_mask=torch.zeros_like(input_ids))


def test_a_retriever_is_shared_not_copied(retriever):
    assert copy.deepcopy({"retriever": retriever})["retriever"] is retriever


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
    counts = datastore.manifest.train.neighbors.counts
    assert counts["short"] == (documents == 0).sum() and counts["own_document"] > 0 and counts["refetched"] > 0


@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat", "HNSW16", "IVF16,PQ4x4fsr,Refine(SQfp16)"])
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
    if "Refine" in factory:
        faiss.ParameterSpace().set_index_parameter(index, "k_factor_rf", 16)
    unwanted = {"own_document": other_document_filter(Chunks(), documents[:50])}
    ids, scores, counts = search(index, keys[:50], 20, unwanted, fetch=4)
    assert "Refine" not in factory or faiss.downcast_index(index).k_factor == 16
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
