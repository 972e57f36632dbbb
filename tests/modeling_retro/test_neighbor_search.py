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
"""BM25, rank fusion and reranking against slow formulas, and what finds no neighbor."""

import math
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY_CHUNK_SIZE, edit_manifest, write_jsonl

from data_prep.bm25_index import build_bm25_index
from data_prep.chunk import chunk_documents
from data_prep.embed import embed_chunks
from data_prep.index import build_index
from data_prep.neighbors import find_neighbors
from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.retriever.ranking import fuse, longest_common_substring, rerank
from modeling_retro.retriever.retriever import RetroRetriever
from modeling_retro.retriever.search import DEPTH, NeighborSearch, other_document_filter


K1, B = 1.2, 0.6


@pytest.fixture(scope="module")
def folders(tiny_datastore_dir, tmp_path_factory):
    """The tiny datastore with a BM25 index of tokens, and with one of words."""
    folders = {}
    for terms in ("tokens", "words"):
        folders[terms] = shutil.copytree(tiny_datastore_dir, tmp_path_factory.mktemp(terms) / "datastore")
        build_bm25_index(folders[terms], terms, k1=K1, b=B)
    return folders


@pytest.fixture(scope="module")
def datastore(folders):
    return RetroDatastore.from_pretrained(folders["tokens"])


@pytest.fixture
def copy(folders, tmp_path):
    return shutil.copytree(folders["tokens"], tmp_path / "copy")


def terms_of(datastore, chunks, kind):
    """The terms of each chunk, one by one."""
    found = []
    for tokens, mask in zip(*chunks, strict=True):
        tokens = [token for token in tokens[mask].tolist() if token not in datastore.tokenizer.all_special_ids]
        found.append(tokens if kind == "tokens" else re.findall(r"\w+", datastore.tokenizer.decode(tokens).lower()))
    return found


def bm25_score(query, chunk, chunks):
    """
    The formula of Lucene's variant, without its factor k1 + 1:
    sum over the query's terms of log(1 + (N - n + 1/2) / (n + 1/2)) f / (f + k1 (1 - b + b length / mean length)).
    """
    mean_length = sum(map(len, chunks)) / len(chunks)
    score = 0.0
    for term in query:
        n, f = sum(term in other for other in chunks), chunk.count(term)
        norm = K1 * (1 - B + B * len(chunk) / mean_length)
        score += math.log(1 + (len(chunks) - n + 0.5) / (n + 0.5)) * f / (f + norm)
    return score


@pytest.mark.parametrize("kind", ["tokens", "words"])
def test_scores_are_those_of_the_formula(folders, kind):
    datastore = RetroDatastore.from_pretrained(folders[kind])
    chunks = terms_of(datastore, datastore.chunks.take(np.arange(len(datastore.chunks))), kind)
    queries = datastore.split("validation").chunks.take(np.arange(0, 20, 4))
    scores, ids = datastore.bm25.search(datastore.bm25.queries(*queries, datastore.tokenizer), 30)
    for query, found_scores, found in zip(terms_of(datastore, queries, kind), scores, ids, strict=True):
        expected = [bm25_score(query, chunk, chunks) for chunk in chunks]
        order = sorted(range(len(chunks)), key=lambda i: (-np.float32(expected[i]), i))
        np.testing.assert_allclose(found_scores, np.maximum([expected[i] for i in order[:30]], 0), rtol=1e-5)
        np.testing.assert_allclose([expected[i] if i >= 0 else 0 for i in found], found_scores, rtol=1e-5)
        assert ((found >= 0) == (found_scores > 0)).all()


def test_equal_scores_come_in_the_order_of_ids(datastore):
    queries = datastore.bm25.queries(*datastore.chunks.take(np.arange(60)), datastore.tokenizer)
    all_scores, all_ids = datastore.bm25.search(queries, len(datastore.chunks))
    equal = (np.diff(all_scores, axis=1) == 0) & (all_ids[:, 1:] >= 0)
    assert equal.any() and (np.diff(all_ids, axis=1)[equal] > 0).all()
    for k in (1, 7):  # also where equal ones are cut off
        scores, ids = datastore.bm25.search(queries, k)
        assert (ids == all_ids[:, :k]).all() and (scores == all_scores[:, :k]).all()


def test_the_index_stays_on_the_disk(datastore):
    assert all(isinstance(datastore.bm25._bm25.scores[name], np.memmap) for name in ("data", "indices", "indptr"))
    assert pickle.loads(pickle.dumps(datastore)).bm25.ntotal == len(datastore.chunks)


def slow_fusion(first, second, k):
    scores = {}
    for ranked in (first, second):
        for place, neighbor in enumerate(ranked, start=1):
            if neighbor >= 0:
                scores[neighbor] = scores.get(neighbor, 0) + 1 / (60 + place)
    best = sorted(scores, key=lambda i: (-scores[i], i))[:k]
    return best + [-1] * (k - len(best)), [scores[i] for i in best] + [0] * (k - len(best))


def test_fusion_is_that_of_the_formula():
    generator = np.random.default_rng(0)
    lists = np.stack([[generator.permutation(9)[:6] for _ in range(200)] for _ in range(2)])
    lists[np.arange(6) >= generator.integers(0, 7, (2, 200, 1))] = -1
    ids, scores = fuse(*lists, 5)
    expected = [slow_fusion(*pair, 5) for pair in zip(*lists.tolist(), strict=True)]
    assert ids.tolist() == [row for row, _ in expected]
    np.testing.assert_allclose(scores, [row for _, row in expected], rtol=1e-6)


def slow_run(first, second):
    runs = {tuple(first[i:j]) for i in range(len(first)) for j in range(i + 1, len(first) + 1)}
    others = {tuple(second[i:j]) for i in range(len(second)) for j in range(i + 1, len(second) + 1)}
    return max(map(len, runs & others), default=0)


def test_reranking_orders_by_the_longest_run_and_keeps_the_order_of_equal_ones(datastore):
    generator = np.random.default_rng(0)
    input_ids, mask = datastore.split("validation").chunks.take(np.arange(20))
    ids = np.stack([generator.permutation(len(datastore.chunks))[:30] for _ in range(20)])
    ids[3, 10:], ids[4] = -1, -1
    found, runs = rerank(datastore.chunks, input_ids.astype(np.uint16), mask, ids, 6)
    for row in range(20):
        known = [i for i in ids[row].tolist() if i >= 0]
        tokens = {i: datastore.chunks.take(i)[0][datastore.chunks.take(i)[1]].tolist() for i in known}
        length = {i: slow_run(input_ids[row][mask[row]].tolist(), tokens[i]) for i in known}
        best = sorted(known, key=lambda i: -length[i])[:6]
        assert found[row].tolist() == best + [-1] * (6 - len(best))
        assert runs[row].tolist() == [length[i] for i in best] + [0] * (6 - len(best))


def searched(datastore, retriever, rows, k=4, documents=None):
    """Neighbors of searched chunks, as (ids, scores, counts)."""
    files = sorted((datastore.path / "embeddings").glob("*.npy"))
    embeddings = np.concatenate([np.load(file) for file in files]).astype(np.float32)[rows]
    unwanted = {} if documents is None else {"own_document": other_document_filter(datastore.chunks, documents)}
    search = NeighborSearch(datastore, retriever)
    return search(*datastore.chunks.take(rows), embeddings if search.needs_embeddings else None, k, unwanted)


def test_hybrid_and_rerank_are_made_of_the_first_64(datastore):
    rows = np.arange(0, len(datastore.chunks), 9)
    documents = datastore.chunks.document_id[rows]
    dense, bm25 = (searched(datastore, name, rows, DEPTH, documents)[0] for name in ("dense", "bm25"))
    hybrid = searched(datastore, "hybrid", rows, 4, documents)[0]
    assert hybrid.tolist() == [slow_fusion(*pair, 4)[0] for pair in zip(dense.tolist(), bm25.tolist(), strict=True)]
    tokens, mask = datastore.chunks.take(rows)
    mask &= ~np.isin(tokens, datastore.tokenizer.all_special_ids)
    reranked, runs, _ = searched(datastore, "rerank", rows, 4, documents)
    assert (reranked == rerank(datastore.chunks, tokens, mask, dense, 4)[0]).all()
    own = datastore.chunks.take(reranked)
    again = longest_common_substring(np.where(mask, tokens, -1)[:, None], np.where(own[1], own[0], -2))
    assert (again == runs).all() and (np.diff(runs, axis=1) <= 0).all()


@pytest.mark.parametrize("retriever", ["dense", "bm25", "hybrid", "rerank"])
def test_neighbors_are_of_other_documents_and_the_same_in_a_batch_and_alone(datastore, retriever):
    rows = np.arange(5, len(datastore.chunks), 31)
    documents = datastore.chunks.document_id[rows]
    ids, scores, counts = searched(datastore, retriever, rows, 4, documents)
    assert (ids >= 0).any() and (datastore.chunks.document_id[ids] != documents[:, None])[ids >= 0].all()
    assert counts["own_document"] > 0 and counts["short"] == (ids[:, -1] < 0).sum()
    for place, row in enumerate(rows):
        alone = searched(datastore, retriever, rows[place : place + 1], 4, documents[place : place + 1])
        assert (alone[0][0] == ids[place]).all(), row
        np.testing.assert_allclose(alone[1][0], scores[place], rtol=1e-5)
    unfiltered = searched(datastore, retriever, rows)[0]
    assert (unfiltered == rows[:, None]).any(axis=1).mean() > 0.5  # most chunks find themselves


@pytest.mark.parametrize("retriever", ["bm25", "hybrid", "rerank"])
def test_stored_neighbors_are_those_that_the_retriever_finds(copy, retriever):
    for split in ("train", "validation"):
        stage = find_neighbors(copy, 4, split, retriever, force=True)
        assert stage.options["retriever"] == retriever
    datastore = RetroDatastore.from_pretrained(copy)
    assert datastore.retriever == retriever
    opened = RetroRetriever(datastore, device="cpu")
    assert opened.neighbor_search.retriever == retriever and (opened.encoder is None) == (retriever == "bm25")
    rows = np.flatnonzero(datastore.chunks.length == TINY_CHUNK_SIZE)[::9]
    documents = datastore.chunks.document_id[rows]
    found = opened.retrieve(torch.from_numpy(datastore.chunks.take(rows)[0]), 4, documents)
    if retriever == "bm25":
        assert (found.chunk_ids.numpy() == datastore.neighbor_ids[rows]).all()
    else:  # stored embeddings are float16, which may exchange near ones
        assert (found.chunk_ids.numpy() == datastore.neighbor_ids[rows]).mean() > 0.9
    assert (found.document_ids.numpy() != documents[:, None]).all()
    with pytest.raises(ValueError, match=f"begun with retriever='{retriever}', not 'dense'"):
        find_neighbors(copy, 4)


def test_what_has_no_known_term_has_no_neighbor(tmp_path, tiny_tokenizer):
    """A datastore without any embeddings; queries of pads, and of tokens that no chunk has."""
    texts = ["retro looks up", "things in a datastore", ""]
    path = tmp_path / "datastore"
    options = {"chunk_size": 8, "on_bad_record": "skip"}
    chunk_documents(write_jsonl(tmp_path / "a.jsonl", texts), path, tiny_tokenizer, **options)
    held_out = write_jsonl(tmp_path / "b.jsonl", ["漢字", "retro"])
    chunk_documents(held_out, path, tiny_tokenizer, split="validation", **options)
    build_bm25_index(path)
    retriever = RetroRetriever.from_pretrained(path)
    assert retriever.neighbor_search.retriever == "bm25" and retriever.encoder is None
    datastore = retriever.datastore
    pads = torch.full((1, 8), tiny_tokenizer.pad_token_id)
    found = retriever.retrieve(pads, 2)
    assert found.chunk_ids.tolist() == [[-1, -1]] and found.scores.tolist() == [[0, 0]]
    assert not found.neighbor_attention_mask.any()
    find_neighbors(path, 2, "validation", "bm25")
    split = RetroDatastore.from_pretrained(path).split("validation")
    assert split.neighbor_ids.tolist() == [[-1, -1], [0, -1]] and split.record.neighbors.counts["short"] == 2
    unknown = np.array([[len(tiny_tokenizer) - 1] * 8])
    queries = datastore.bm25.queries(unknown, unknown >= 0, tiny_tokenizer)
    assert datastore.bm25.search(queries, 2)[1].tolist() == [[-1, -1]]


def test_an_index_of_other_chunks_is_refused(copy):
    edit_manifest(copy, lambda manifest: manifest["bm25"].update(fingerprint="0" * 64))
    with pytest.raises(ValueError, match="BM25 index of .* belongs to other chunks .* --kind bm25 --force"):
        _ = RetroDatastore.from_pretrained(copy).bm25
    with pytest.raises(ValueError, match="belongs to other chunks"):
        find_neighbors(copy, 4, retriever="hybrid", force=True)


def test_an_index_that_is_missing_or_does_not_fit_is_named(copy, tiny_datastore_dir):
    with pytest.raises(ValueError, match="has no BM25 index; run `retro index --kind bm25`"):
        NeighborSearch(RetroDatastore.from_pretrained(tiny_datastore_dir), "bm25").open()
    with pytest.raises(ValueError, match="retriever is 'sparse', expected one of dense, bm25, hybrid, rerank"):
        NeighborSearch(RetroDatastore.from_pretrained(copy), "sparse")
    np.save(copy / "bm25" / "data.csc.index.npy", np.ones(3, dtype=np.float32))
    with pytest.raises(ValueError, match=r"holds \(chunks, terms, scores, rows\)"):
        _ = RetroDatastore.from_pretrained(copy).bm25
    (copy / "bm25" / "params.index.json").unlink()
    with pytest.raises(ValueError, match="cannot read .*bm25.*--kind bm25 --force"):
        _ = RetroDatastore.from_pretrained(copy).bm25


QUESTIONS = [
    "retro looks up",
    "what is a datastore of chunks and where do the neighbors of its documents come from?",
    "a",
]


@pytest.mark.parametrize("retriever", ["dense", "bm25", "hybrid", "rerank"])
def test_question_of_any_length_finds_what_its_tokens_and_its_embedding_find(datastore, retriever):
    """A question alone, from the definitions of the ways: no padding, no special tokens."""
    opened = RetroRetriever(datastore, device="cpu", retriever=retriever)
    ids, scores = opened.find(QUESTIONS, 5)
    stored = np.concatenate([np.load(file) for file in sorted((datastore.path / "embeddings").glob("*.npy"))])
    for row, question in enumerate(QUESTIONS):
        tokens = np.array([datastore.tokenizer(question, add_special_tokens=False)["input_ids"]])
        dense = bm25 = None
        if retriever != "bm25":
            similarity = stored.astype(np.float32) @ opened.encoder.encode([question])[0]
            dense = np.argsort(-similarity, kind="stable")[None, :DEPTH]
        if retriever in ("bm25", "hybrid"):
            bm25 = datastore.bm25.search(tokens, DEPTH)[1]
        expected = {
            "dense": lambda: dense[0, :5],
            "bm25": lambda: bm25[0, :5],
            "hybrid": lambda: fuse(dense, bm25, 5)[0][0],
            "rerank": lambda: rerank(datastore.chunks, tokens, tokens >= 0, dense, 5)[0][0],
        }[retriever]()
        assert ids[row].tolist() == expected.tolist()
    found = opened.search(QUESTIONS[0], k=3)
    chunk_ids = [passage.chunk_id for passage in found]
    assert chunk_ids == ids[0, :3].tolist()
    assert [passage.document_id for passage in found] == datastore.chunks.document_id[chunk_ids].tolist()
    assert [passage.score for passage in found] == pytest.approx(scores[0, :3].tolist(), rel=1e-5)
    for passage in found:
        tokens, mask = datastore.chunks.take([passage.chunk_id])
        assert passage.text == datastore.tokenizer.decode(tokens[0][mask[0]], skip_special_tokens=True)
    assert [passage.text for passage in opened.search(QUESTIONS, k=3)[0]] == [passage.text for passage in found]
    with pytest.raises(ValueError, match="text 1 is empty"):
        opened.search(["a", "  "])


@pytest.mark.parametrize(
    ("indexes", "stored", "named", "chunks", "questions"),
    [
        ("index", "dense", None, "dense", "dense"),
        ("index", "rerank", None, "rerank", "dense"),
        ("index bm25", "hybrid", None, "hybrid", "dense"),
        ("index bm25", "rerank", None, "rerank", "dense"),
        ("index bm25", "bm25", None, "bm25", "bm25"),
        ("index bm25", "rerank", "rerank", "rerank", "rerank"),
        ("index bm25", "hybrid", "dense", "dense", "dense"),
        ("bm25", "bm25", None, "bm25", "bm25"),
    ],
)
def test_questions_have_their_own_way_unless_one_is_named(copy, indexes, stored, named, chunks, questions):
    find_neighbors(copy, 4, "train", stored, force=True)

    def change(manifest):
        for name in {"index", "bm25"} - set(indexes.split()):
            del manifest[name]

    edit_manifest(copy, change)
    retriever = RetroRetriever.from_pretrained(copy, device="cpu", retriever=named)
    assert retriever.neighbor_search.retriever == chunks
    assert retriever.question_search.retriever == questions
    found = retriever.find(QUESTIONS[:1], 3)[0]
    tokens = torch.tensor([retriever.datastore.tokenizer(QUESTIONS[0])["input_ids"]])
    again = retriever.retrieve(tokens, 3, attention_mask=torch.ones_like(tokens)).chunk_ids
    assert again.tolist() == found.tolist()


def test_passages_of_the_same_text_count_once(tmp_path, tiny_tokenizer, tiny_encoder_dir):
    texts = ["retro looks up chunks"] * 30 + ["retro", "neighbors of a chunk"]
    path = tmp_path / "datastore"
    chunk_documents(write_jsonl(tmp_path / "a.jsonl", texts), path, tiny_tokenizer, chunk_size=32)
    embed_chunks(path, tiny_encoder_dir)
    build_index(path)
    retriever = RetroRetriever.from_pretrained(path, device="cpu")
    found = retriever.search("retro looks up chunks", k=3)
    assert sorted(passage.text for passage in found) == sorted(set(texts))
    assert found[0].text == texts[0] and found[0].document_id == 0
    assert len(retriever.search("retro", k=9)) == 3
