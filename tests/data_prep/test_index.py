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
"""Every kind of index finds what exact search finds, as often as it says."""

import importlib
import shutil
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
from conftest import edit_manifest

import modeling_retro.datastore.refined
from data_prep import stage_files
from data_prep.faiss_index import recall_at, suggest_factory, tune, write_refined
from data_prep.index import build_index
from data_prep.neighbors import find_neighbors
from data_prep.stage_files import run_shards
from modeling_retro.datastore.datastore import RetroDatastore, read_index
from modeling_retro.datastore.manifest import read_manifest


@pytest.fixture
def embedded(tiny_datastore_dir, tmp_path):
    """The tiny datastore before its index was built."""
    path = shutil.copytree(tiny_datastore_dir, tmp_path / "datastore")
    manifest = read_manifest(path)
    manifest.index = None
    for split in manifest.splits.values():
        split.neighbors = None
    manifest.write(path)
    (path / "index.faiss").unlink()
    return path


def embeddings_of(path):
    return np.concatenate([np.load(file) for file in sorted((path / "embeddings").glob("*.npy"))]).astype(np.float32)


FACTORIES = [
    "Flat",
    "IVF8,Flat",
    "IVF4_HNSW8,SQ8",
    "OPQ4_8,IVF4,PQ4x4",
    "SQ8",
    "PCA8,Flat",
    "HNSW8",
    "IVF4,Flat,RFlat",
    "IVF4,PQ8x4fs,RFlat",
    "IVF4,PQ8x4fsr,Refine(SQfp16)",
]


@pytest.mark.parametrize("factory", FACTORIES)
def test_recall_in_the_manifest_is_the_recall_of_the_index(embedded, factory):
    record = build_index(embedded, factory=factory, target_recall=0.9)
    datastore = RetroDatastore.from_pretrained(embedded)
    keys = embeddings_of(embedded)
    queries = embeddings_of(embedded / "splits" / "validation")
    assert datastore.index.ntotal == len(keys) == record.ntotal
    scores = queries @ keys.T
    tenth = np.sort(scores, axis=1)[:, -10]
    found = datastore.index.search(queries, 10)[1]
    hits = np.mean([(row[ids] >= last - 1e-5).sum() / 10 for row, ids, last in zip(scores, found, tenth, strict=True)])
    # Recall is measured on 11 results; what is refined depends a little on their number.
    assert record.recall["recall@10"] == pytest.approx(hits, abs=0.01 if "PQ8x4fs" in factory else 0.002)
    assert record.recall["source"] == "validation" and record.recall["queries"] == len(queries)
    if not any(codec in factory for codec in ("PQ", "PCA")):
        assert hits >= 0.9


def test_recall_is_the_share_of_the_exact_neighbors_that_are_found():
    exact = np.linspace(1, 0.1, 10)[None].repeat(3, 0)
    found = np.full((3, 10), 0.01)
    found[0, :5] = exact[0, :5]
    found[1] = exact[1, [1, 0, 2, 3, 4, 5, 6, 7, 8, 9]]
    found[1, 9] = -np.inf
    exact[2, 2:] = found[2, 2:] = -np.inf  # only two chunks exist
    found[2, :2] = exact[2, :2]
    assert recall_at(found, exact) == {"recall@1": round(2 / 3, 4), "recall@10": round((5 + 9 + 2) / 22, 4)}


def test_of_equally_near_neighbors_any_will_do():
    exact = np.array([[1.0] + [0.5] * 9])
    assert recall_at(np.array([[1.0] + [0.5] * 9]), exact) == {"recall@1": 1.0, "recall@10": 1.0}


def test_without_held_out_queries_training_chunks_search_without_themselves(embedded):
    edit_manifest(embedded, lambda manifest: manifest["splits"].pop("validation"))
    record = build_index(embedded, factory="Flat", recall_queries=50)
    assert record.recall == {
        "recall@1": 1.0,
        "recall@10": 1.0,
        "queries": 50,
        "source": "train, each without itself",
    }


def test_nprobe_grows_with_the_target(embedded):
    recalls = []
    for target in (0.3, 0.7, 1.0):
        record = build_index(embedded, factory="IVF32,Flat", target_recall=target, force=True)
        assert record.recall["recall@10"] >= target
        recalls.append(record.search_parameters["nprobe"])
    assert recalls[0] < recalls[1] < recalls[2]
    index = RetroDatastore.from_pretrained(embedded).index
    assert faiss.extract_index_ivf(index).nprobe == recalls[-1]


@pytest.mark.parametrize("needed", [1, 2, 3, 37, 640, 1000, 2000])
def test_tuning_finds_the_smallest_nprobe_to_a_sixteenth(needed):
    index = faiss.index_factory(4, "IVF1000,Flat")
    parameters, recall = tune(index, lambda: {"recall@10": min(1.0, index.nprobe / needed)}, target=1.0)
    nprobe = parameters["nprobe"]
    assert recall["recall@10"] == min(1.0, nprobe / needed) and index.nprobe == nprobe
    assert min(needed, 1000) <= nprobe <= 1000
    assert nprobe - max(1, nprobe // 16) < needed


def test_an_index_over_its_memory_limit_is_merged_on_disk_and_can_be_moved(embedded, tmp_path):
    in_memory = build_index(embedded, factory="IVF8,Flat")
    expected = find_neighbors(embedded, num_neighbors=3)
    ids = RetroDatastore.from_pretrained(embedded).neighbor_ids.copy()
    on_disk = build_index(embedded, factory="IVF8,Flat", max_index_memory=1e-6, force=True)
    assert set(in_memory.sha256) == {"index.faiss"} and set(on_disk.sha256) == {"index.faiss", "index.ivfdata"}
    moved = tmp_path / "moved"
    embedded.rename(moved)
    assert find_neighbors(moved, num_neighbors=3).counts == expected.counts
    np.testing.assert_array_equal(RetroDatastore.from_pretrained(moved).neighbor_ids, ids)
    RetroDatastore.from_pretrained(moved).verify()


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "HNSW8", "IVF8,PQ8x4fsr,Refine(SQfp16)"])
@pytest.mark.parametrize("memory", [None, 1e-6])
def test_shards_that_are_added_later_are_added_to_the_index(embedded, factory, memory):
    whole, partial = read_manifest(embedded), read_manifest(embedded)
    for stage in (partial.train.chunks, partial.train.embeddings):
        stage.shards = stage.shards[:2]
    partial.write(embedded)
    options = {"factory": factory, "target_recall": 0.99, "max_index_memory": memory, "on_disk": "Refine" in factory}
    before = build_index(embedded, **options)
    whole.index = read_manifest(embedded).index
    whole.write(embedded)
    with pytest.raises(ValueError, match="lacks chunks that were added later"):
        RetroDatastore.from_pretrained(embedded).index
    after = build_index(embedded, **options)
    rows = [shard.rows for shard in whole.train.chunk_shards]
    assert (before.ntotal, after.ntotal) == (sum(rows[:2]), sum(rows))
    assert after.recall["recall@10"] >= 0.99


def test_an_index_on_disk_finds_the_same_and_maps_its_vectors(embedded, tmp_path):
    whole = shutil.copytree(embedded, tmp_path / "whole")
    factory = "IVF4,PQ8x4fsr,Refine(SQfp16)"
    build_index(whole, factory=factory)
    record = build_index(embedded, factory=factory, on_disk=True)
    assert sorted(record.sha256) == ["index.faiss", "index.refine"] and record.file_name == "index.faiss"
    moved = shutil.move(embedded, tmp_path / "moved")
    datastore = RetroDatastore.from_pretrained(moved)
    datastore.verify()
    queries = embeddings_of(moved)[:50]
    scores, ids = RetroDatastore.from_pretrained(whole).index.search(queries, 5)
    found_scores, found = datastore.index.search(queries, 5)
    np.testing.assert_allclose(found_scores, scores, rtol=1e-6)
    assert (found == ids).mean() > 0.7  # equal scores may stand in another order
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(moved / "index.refine") in maps.read_text()
    assert not maps.exists() or str(moved / "index.faiss") not in maps.read_text()  # codes are in memory, once
    with pytest.raises(ValueError, match="`index` was begun with on_disk=True, not False"):
        build_index(moved, factory=factory)
    (moved / "index.refine").write_bytes((moved / "index.faiss").read_bytes())
    with pytest.raises(ValueError, match="index.refine"):
        RetroDatastore.from_pretrained(moved).verify()
    build_index(moved, factory="Flat", force=True)
    assert not (moved / "index.refine").exists()


@pytest.mark.parametrize("metric", [faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2])
@pytest.mark.parametrize("code", ["SQfp16", "Flat", "SQ8"])
@pytest.mark.parametrize("k", [1, 5, 200])
def test_vectors_on_disk_score_as_faiss_does(tmp_path, monkeypatch, metric, code, k):
    vectors = np.random.default_rng(0).standard_normal((700, 16)).astype(np.float32)
    index = faiss.index_factory(16, f"IVF16,PQ8x4fsr,Refine({code})", metric)
    index.train(vectors)
    index.add(vectors)
    write_refined(index, tmp_path / "index.faiss")
    opened = read_index(tmp_path / "index.faiss")
    asked = []
    if opened._advise is not None:  # codes of 8 bits are left to faiss
        monkeypatch.setattr(opened, "_advise", lambda start, size, _: asked.append((start, start + size)))
    monkeypatch.setattr(modeling_retro.datastore.refined, "_RESULTS", 300)
    for index_of in (index, opened):
        faiss.ParameterSpace().set_index_parameter(index_of, "nprobe", 3)  # too few results for the largest k
        faiss.ParameterSpace().set_index_parameter(index_of, "k_factor_rf", 4)
    expected_scores, expected = index.search(vectors[:90], k)
    scores, ids = opened.search(vectors[:90], k)
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-4, atol=1e-5)
    if code != "SQ8":
        places = opened._vectors.ctypes.data + ids[ids >= 0] * opened._vectors.strides[0]
        starts, ends = np.array(asked).T
        last = places[:, None] + opened._vectors.strides[0] - 1
        assert ((starts <= places[:, None]) & (places[:, None] < ends)).any(axis=1).all()
        assert ((starts <= last) & (last < ends)).any(axis=1).all()


def test_on_disk_chooses_codes_that_fit_and_refuses_others(embedded):
    assert suggest_factory(30_000_000, 256, on_disk=True).endswith(",PQ256x4fsr,Refine(SQfp16)")
    assert suggest_factory(1000, 256, on_disk=True) == "IVF32,PQ256x4fsr,Refine(SQfp16)"
    # Only codes, ids and centroids take memory: (128 + 8) or (64 + 8) bytes of a vector.
    assert suggest_factory(1_000_000, 256, 0.15e9, on_disk=True) == "IVF4096,PQ256x4fsr,Refine(SQfp16)"
    assert suggest_factory(1_000_000, 256, 0.08e9, on_disk=True) == "IVF4096,PQ128x4fsr,Refine(SQfp16)"
    with pytest.raises(ValueError, match="no index of 1000000 vectors fits into 0.07 GB"):
        suggest_factory(1_000_000, 256, 0.07e9, on_disk=True)
    with pytest.raises(ValueError, match="on_disk needs a factory whose results are scored again, got 'IVF8,Flat'"):
        build_index(embedded, factory="IVF8,Flat", on_disk=True)


@pytest.mark.parametrize("bits, scored", [(2, 16), (4, 4)])
def test_fewer_results_of_longer_codes_are_scored_again(embedded, bits, scored):
    dim = embeddings_of(embedded).shape[1]
    record = build_index(embedded, factory=f"IVF4,PQ{dim * bits // 4}x4fsr,Refine(SQfp16)")
    assert record.search_parameters["k_factor_rf"] == scored


def test_a_finished_index_is_left_alone(embedded):
    record = build_index(embedded, factory="IVF8,Flat")
    before = (embedded / "index.faiss").stat().st_mtime_ns
    assert build_index(embedded, factory="IVF8,Flat") == record
    assert (embedded / "index.faiss").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="`index` was begun with factory='IVF8,Flat', not 'Flat'"):
        build_index(embedded, factory="Flat")


@pytest.mark.parametrize("factory", ["IVF8,Flat", "HNSW8", "IVF8,PQ8x4fsr,Refine(SQfp16)"])
@pytest.mark.parametrize("step", ["train", "fill", "merge", "measure", "publish"])
def test_an_interrupted_build_goes_on_and_ends_the_same(embedded, tmp_path, monkeypatch, factory, step):
    other = shutil.copytree(embedded, tmp_path / "other")
    expected = build_index(other, factory=factory)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"data_prep.index._IndexBuild.{step}", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_index(embedded, factory=factory)
    assert build_index(embedded, factory=factory) == expected
    assert (embedded / "index.faiss").read_bytes() == (other / "index.faiss").read_bytes()
    assert (embedded / "datastore.json").read_bytes() == (other / "datastore.json").read_bytes()
    assert sorted(path.name for path in embedded.iterdir()) == sorted(path.name for path in other.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factory": "IVF8,Flatt"}, "faiss knows no factory 'IVF8,Flatt' for 16 dimensions"),
        ({"factory": "IVF4096,Flat"}, "cannot train 'IVF4096,Flat' on 457 vectors"),
        ({"metric": "cosine"}, "'inner_product' or 'l2', got 'cosine'"),
        ({"use_gpus": True}, "sees no GPU"),
    ],
)
def test_bad_options_are_named(embedded, options, message):
    with pytest.raises(ValueError, match=message):
        build_index(embedded, **options)
    assert not (embedded / "index.faiss").exists()


def test_without_faiss_the_error_names_the_extras(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    for name in ("data_prep.index", "modeling_retro.datastore.datastore"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"\[cpu\].*\[gpu\]"):
        importlib.import_module("data_prep.index")


def test_damaged_embeddings_are_named(embedded):
    file = embedded / "embeddings" / "shard-00001.npy"
    content = file.read_bytes()
    file.write_bytes(content[:-2] + b"xx")
    with pytest.raises(ValueError, match="shard-00001.npy was altered"):
        build_index(embedded)
    file.unlink()
    with pytest.raises(ValueError, match="shard-00001.npy is missing"):
        build_index(embedded)


def test_the_suggested_factory_fits_the_memory():
    assert suggest_factory(40_000, 384) == "Flat"
    assert suggest_factory(1_000_000, 384) == "IVF4096,PQ192x4fsr,Refine(SQfp16)"
    assert suggest_factory(1_000_000, 383) == suggest_factory(1_000_000, 384, for_gpus=True) == "IVF8192,SQfp16"
    assert suggest_factory(1_000_000, 384, 0.8e9) == "IVF8192,SQfp16"
    assert suggest_factory(11_000_000, 384) == "IVF32768,SQfp16"
    assert suggest_factory(1_000_000, 384, 0.5e9) == "IVF8192,SQ8"
    assert suggest_factory(27_000_000_000, 384, 2e12) == "OPQ64,IVF1048576_HNSW32,PQ64"
    with pytest.raises(ValueError, match="no index of 1000000 vectors fits into 0.001 GB"):
        suggest_factory(1_000_000, 384, 1e6)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_the_bar_of_a_stage_counts_what_its_shards_hold(tmp_path, monkeypatch, num_proc):
    class Bar:
        def __init__(self, total, desc, unit, disable):
            self.total, self.unit, self.counts = total, unit, []

        def __enter__(self):
            return self

        def __exit__(self, *_):
            bars.append(self)

        def update(self, number):
            self.counts.append(number)

    bars, sizes = [], [5, 0, 4, 7]
    monkeypatch.setattr(stage_files, "tqdm", Bar)

    def make(index, path, advance):
        path.write_text(str(index))
        for _ in range(3):
            advance(2)  # 6 of each shard: more than there are, or less
        return {"rows": sizes[index]}

    names = [f"shard-{index:05d}" for index in range(4)]
    run_shards(tmp_path, [], names[:1], make, sizes=sizes[:1], num_proc=num_proc)
    run_shards(tmp_path, [], names, make, sizes=sizes, num_proc=num_proc)
    assert [(bar.total, sum(bar.counts), bar.unit) for bar in bars] == [(5, 5, " chunks"), (11, 11, " chunks")]
    if num_proc == 1:
        assert bars[0].counts[:3] == [2, 2, 1]  # the bar moves inside the shard


def test_shards_are_made_once(tmp_path):
    made = []

    def make(index, path, advance):
        made.append(index)
        path.write_text(str(index))
        if len(made) == 2:
            raise KeyboardInterrupt
        return {"rows": index}

    names = [f"shard-{index:05d}" for index in range(4)]
    with pytest.raises(KeyboardInterrupt):
        run_shards(tmp_path, [], names, make)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["shard-00000"]
    records = run_shards(tmp_path, [], names, make)
    assert made == [0, 1, 1, 2, 3] and [record["rows"] for record in records] == [0, 1, 2, 3]
