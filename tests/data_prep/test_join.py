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
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import edit_manifest

import data_prep.join
import data_prep.neighbors
import modeling_retro.retriever.search
from data_prep.bm25_index import build_bm25_index
from data_prep.index import build_index
from data_prep.join import ListJoin, _Pass, can_join
from data_prep.neighbors import find_neighbors
from data_prep.object_store import push_datastore, run_on_store, run_share_on_store
from data_prep.shares import run_share
from data_prep.upkeep.changes import remove_documents
from modeling_retro.datastore.datastore import RetroDatastore, faiss


@pytest.fixture
def datastore_dir(tiny_datastore_dir, tmp_path, monkeypatch):
    """An index of Flat lists, of which all are probed, so that the search query by query is exact."""
    path = shutil.copytree(tiny_datastore_dir, tmp_path / "datastore")
    probe_all_lists(path, "IVF8,Flat")
    # Any processor multiplies bytes, though not all do it fast; and small blocks cut lists and queries.
    monkeypatch.setattr(data_prep.join, "_multiplies_bytes", lambda: True)
    monkeypatch.setattr(data_prep.join, "_QUERIES_OF_A_LIST", 1)
    monkeypatch.setattr(data_prep.join, "_PRODUCTS", 1 << 10)
    # Vectors of 16 dimensions, many of which are nearly alike, in 8 bits.
    monkeypatch.setattr(data_prep.join, "_SPARE", 32)
    return path


def probe_all_lists(path, factory):
    build_index(path, factory=factory, force=True)
    edit_manifest(path, lambda manifest: manifest["index"]["search_parameters"].update(nprobe=8))


@pytest.fixture
def query_by_query(monkeypatch):
    """Makes `find_neighbors` search query by query."""

    def switch():
        monkeypatch.setattr(data_prep.neighbors, "can_join", lambda *_: False)

    return switch


def stored(path):
    datastore = RetroDatastore.from_pretrained(path)
    return datastore.neighbor_ids.copy(), datastore.neighbor_scores.copy(), datastore


def assert_exact(path, ids, scores):
    """The nearest chunks of other, present documents, computed from the stored embeddings."""
    datastore = RetroDatastore.from_pretrained(path)
    vectors = np.concatenate([np.load(file) for file in sorted((path / "embeddings").glob("*.npy"))])
    vectors = vectors.astype(np.float64)
    assert (ids[~vectors.any(axis=1)] == -1).all()  # chunks without a known word are near to none
    products = vectors @ vectors.T
    documents = datastore.chunks.document_id
    products[documents[:, None] == documents] = -np.inf
    products[:, datastore.is_removed(np.arange(len(vectors)))] = -np.inf
    products, ids, scores = (part[vectors.any(axis=1)] for part in (products, ids, scores))
    best = -np.sort(-products, axis=1)[:, : ids.shape[1]]
    np.testing.assert_allclose(scores, best, rtol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(products, ids, axis=1), best, rtol=1e-5)


@pytest.mark.parametrize("factory", ["IVF8,Flat", "IVF8,SQfp16", "IVF8,PQ8x4fsr,Refine(SQfp16)"])
@pytest.mark.parametrize("threads", [1, 3])
def test_all_lists_hold_the_nearest_chunks_of_other_documents(datastore_dir, monkeypatch, factory, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    probe_all_lists(datastore_dir, factory)
    stage = find_neighbors(datastore_dir, num_neighbors=4)
    ids, scores, datastore = stored(datastore_dir)
    assert can_join(datastore, "dense", stage.shards[0].rows)
    assert_exact(datastore_dir, ids, scores)
    assert stage.counts["own_document"] > 0
    assert not list(datastore_dir.glob(".join-*"))


def test_results_equal_those_of_the_search_query_by_query(datastore_dir, query_by_query):
    joined = {}
    for split in ("train", "validation"):
        find_neighbors(datastore_dir, num_neighbors=3, split=split, force=True)
        joined[split] = RetroDatastore.from_pretrained(datastore_dir).split(split).neighbor_scores.copy()
    query_by_query()
    for split, scores in joined.items():
        find_neighbors(datastore_dir, num_neighbors=3, split=split, force=True)
        searched = RetroDatastore.from_pretrained(datastore_dir).split(split).neighbor_scores
        has_length = (scores != 0).any(axis=1)
        assert has_length.mean() > 0.9
        np.testing.assert_allclose(scores[has_length], searched[has_length], rtol=1e-5)


@pytest.mark.parametrize("retriever", ["rerank", "hybrid"])
def test_other_ways_take_their_nearest_embeddings_list_by_list(datastore_dir, monkeypatch, query_by_query, retriever):
    if retriever == "hybrid":
        pytest.importorskip("bm25s")
        build_bm25_index(datastore_dir)
    monkeypatch.setattr(modeling_retro.retriever.search, "DEPTH", 16)
    joined = []
    call = ListJoin.__call__
    monkeypatch.setattr(ListJoin, "__call__", lambda *args, **options: joined.append(args) or call(*args, **options))
    find_neighbors(datastore_dir, num_neighbors=4, retriever=retriever)
    ids, scores, datastore = stored(datastore_dir)
    assert [k for *_, k in joined] == [16] * len(datastore.manifest.train.chunk_shards)
    query_by_query()
    find_neighbors(datastore_dir, num_neighbors=4, retriever=retriever, force=True)
    # Nearly equal embeddings may stand in another order, and a query without length has no nearest here.
    assert (scores == stored(datastore_dir)[1]).all(axis=1).mean() > 0.9
    assert (ids == stored(datastore_dir)[0]).mean() > 0.9


def test_removed_documents_and_near_duplicates_are_not_found(datastore_dir, query_by_query):
    documents = RetroDatastore.from_pretrained(datastore_dir).chunks.document_id
    remove_documents(datastore_dir, documents=[int(documents[100]), int(documents[-1])])
    find_neighbors(datastore_dir, num_neighbors=4, force=True)
    ids, scores, datastore = stored(datastore_dir)
    assert not datastore.is_removed(ids).any()
    assert_exact(datastore_dir, ids, scores)
    # Where many results are near duplicates, the query is searched further.
    stage = find_neighbors(datastore_dir, num_neighbors=4, drop_near_duplicates=0.4, force=True)
    _, joined, _ = stored(datastore_dir)
    assert stage.counts["near_duplicates"] > 0 and stage.counts["refetched"] > 0
    query_by_query()
    find_neighbors(datastore_dir, num_neighbors=4, drop_near_duplicates=0.4, force=True)
    has_length = (joined != 0).any(axis=1)
    np.testing.assert_allclose(joined[has_length], stored(datastore_dir)[1][has_length], rtol=1e-5)


def test_a_query_without_length_has_no_neighbors(datastore_dir):
    datastore = RetroDatastore.from_pretrained(datastore_dir)
    embeddings = [np.load(file) for file in sorted((datastore_dir / "embeddings").glob("*.npy"))]
    queries = embeddings[0][:5].astype(np.float32)
    queries[2] = 0
    ids, scores, counts = ListJoin(datastore, embeddings)(queries, np.full(5, -1), 2, unwanted={})
    assert (ids[2] == -1).all() and (scores[2] == 0).all() and counts["short"] == 1
    np.testing.assert_array_equal(ids[[0, 1, 3, 4], 0], [0, 1, 3, 4])  # no document: each chunk finds itself


def test_an_interrupted_join_goes_on_and_ends_the_same(datastore_dir, tmp_path, dies_at):
    other = shutil.copytree(datastore_dir, tmp_path / "other")
    find_neighbors(other, num_neighbors=4)
    dies_at(3, data_prep.neighbors, "save_shard")
    with pytest.raises(KeyboardInterrupt):
        find_neighbors(datastore_dir, num_neighbors=4)
    assert list(datastore_dir.glob(".join-*"))
    find_neighbors(datastore_dir, num_neighbors=4)
    files = sorted(path.relative_to(other) for path in (other / "neighbors").rglob("*") if path.is_file())
    assert files and all((datastore_dir / name).read_bytes() == (other / name).read_bytes() for name in files)
    assert sorted(path.name for path in datastore_dir.iterdir()) == sorted(path.name for path in other.iterdir())


def test_shards_that_are_made_need_no_copy_to_be_published(datastore_dir, monkeypatch):
    run_share(partial(find_neighbors, datastore_dir, num_neighbors=4), 0, 1)
    shutil.rmtree(*datastore_dir.glob(".join-*"))
    monkeypatch.setattr(data_prep.neighbors, "ListJoin", None)  # no copy is made
    find_neighbors(datastore_dir, num_neighbors=4)
    assert_exact(datastore_dir, *stored(datastore_dir)[:2])


def test_a_task_with_a_store_leaves_no_copy(datastore_dir, tmp_path):
    store = f"file://{tmp_path / 'store'}"
    push_datastore(datastore_dir, store)
    for index in range(2):
        folder = tmp_path / f"copy-{index}"
        run_share_on_store(partial(find_neighbors, folder, num_neighbors=4), folder, store, index, 2)
        assert (folder / "neighbors").exists() and not list(folder.glob(".join-*"))
    run_on_store(partial(find_neighbors, datastore_dir, num_neighbors=4), datastore_dir, store)
    assert_exact(datastore_dir, *stored(datastore_dir)[:2])


def test_few_directions_find_nearly_all_and_score_exactly(datastore_dir, monkeypatch):
    monkeypatch.setattr(data_prep.join, "_DIRECTIONS", 4)
    monkeypatch.setattr(data_prep.join, "_VARIANCE", 0.93)
    datastore = RetroDatastore.from_pretrained(datastore_dir)
    embeddings = [np.load(file) for file in sorted((datastore_dir / "embeddings").glob("*.npy"))]
    vectors = np.concatenate(embeddings).astype(np.float32)
    join = ListJoin(datastore, embeddings)
    assert join.vectors.shape[1] < vectors.shape[1]
    ids, scores, _ = join(vectors, np.full(len(vectors), -1), 2, unwanted={})
    np.testing.assert_allclose(scores, (vectors[:, None] * vectors[ids]).sum(axis=-1) * (ids >= 0), rtol=1e-5)
    has_length = vectors.any(axis=1)
    best = np.sort(vectors @ vectors.T, axis=1)[:, -2:].min(axis=1)
    assert (scores[has_length] >= best[has_length, None] - 1e-5).mean() > 0.9


def test_the_chosen_lists_are_the_nearest(datastore_dir):
    build_index(datastore_dir, factory="IVF32,Flat", force=True)
    datastore = RetroDatastore.from_pretrained(datastore_dir)
    embeddings = [np.load(file) for file in sorted((datastore_dir / "embeddings").glob("*.npy"))]
    join = ListJoin(datastore, embeddings)
    queries = torch.randint(-127, 128, (100, join.vectors.shape[1]), dtype=torch.int8)
    products = queries.int().numpy() @ join.centroids.int().numpy().T
    for nprobe in (1, 3, 32):
        join.ivf.nprobe = nprobe
        (_, nearest), (rows, lists) = _Pass(join, queries, np.full(100, -1), 4).choose_lists()
        for row in range(100):
            chosen = [nearest[row], *lists[rows == row]]
            assert len(set(chosen)) == len(chosen) >= nprobe
            np.testing.assert_array_equal(
                np.sort(products[row, chosen]), np.sort(products[row])[-len(chosen) :], err_msg=f"{nprobe} {row}"
            )


@pytest.mark.parametrize("factory", ["Flat", "HNSW8", "OPQ4_8,IVF4,PQ4x4"])
def test_other_indexes_and_few_queries_are_searched_query_by_query(datastore_dir, monkeypatch, factory):
    monkeypatch.setattr(data_prep.join, "_QUERIES_OF_A_LIST", 64)
    datastore = RetroDatastore.from_pretrained(datastore_dir)
    assert can_join(datastore, "hybrid", 1000) and not can_join(datastore, "bm25", 1000)
    assert not can_join(datastore, "dense", 8)
    assert isinstance(faiss.downcast_index(datastore.index), faiss.IndexIVF)
    datastore.manifest.train.embeddings = None  # as a datastore comes from the Hub
    assert not can_join(datastore, "dense", 1000)
    build_index(datastore_dir, factory=factory, force=True)
    assert not can_join(RetroDatastore.from_pretrained(datastore_dir), "dense", 100_000)
