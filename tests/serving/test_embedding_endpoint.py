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
"""A datastore that is embedded and searched through the server of this package."""

import shutil

import numpy as np
import pytest
from conftest import TINY_CHUNK_SIZE, make_texts, write_jsonl
from tiny_server import running, save_model

from data_prep.chunk import chunk_documents
from data_prep.embed import embed_chunks
from data_prep.index import build_index
from data_prep.neighbors import find_neighbors
from data_prep.upkeep.verify import verify_datastore
from modeling_retro import RetroDatastore, RetroRetriever
from modeling_retro.datastore.manifest import read_manifest
from modeling_retro.encoder.endpoint import ADDRESS, KEY
from serving.load import load_served_model


def test_a_datastore_that_the_server_of_this_package_embeds(
    tmp_path, tiny_tokenizer, tiny_datastore_dir, tiny_encoder_dir, monkeypatch
):
    """All stages and the search, through `/v1/embeddings` of `retro serve`, equal those with the encoder here."""
    chunked = tmp_path / "datastore"
    file = write_jsonl(tmp_path / "a.jsonl", make_texts(20))
    chunk_documents(file, chunked, tiny_tokenizer, chunk_size=TINY_CHUNK_SIZE, shard_bytes=2000)
    here = shutil.copytree(chunked, tmp_path / "here")
    embed_chunks(here, tiny_encoder_dir)
    served = load_served_model(
        str(save_model("joint", tiny_datastore_dir, tmp_path / "tiny")), str(tiny_datastore_dir)
    )
    with running(served, api_key="a-secret") as server:
        address = f"{server}/v1/embeddings?model=tiny"
        with pytest.raises(ValueError, match="status 401.*the key is read from RETRO_ENCODER_API_KEY"):
            embed_chunks(chunked, address)
        monkeypatch.setenv(KEY, "a-secret\n")
        embed_chunks(chunked, address)
        for path in (chunked, here):
            build_index(path, factory="Flat")
            find_neighbors(path, num_neighbors=2)
        question = "how does retro look things up"
        with pytest.raises(ValueError, match=f"is behind an endpoint, and no datastore says where: set {ADDRESS}"):
            RetroRetriever.from_pretrained(chunked)
        monkeypatch.setenv(ADDRESS, address)
        asked = RetroRetriever.from_pretrained(chunked)
        expected = RetroRetriever.from_pretrained(here, device="cpu").search(question)
        found = asked.search(question)
        assert [one.text for one in found] == [one.text for one in expected]
        np.testing.assert_allclose([one.score for one in found], [one.score for one in expected], atol=1e-3)
        assert verify_datastore(chunked) == []
        embed_chunks(chunked)  # finds its work done
    for name, content in {file: file.read_bytes() for file in chunked.rglob("*") if file.is_file()}.items():
        assert b"a-secret" not in content and b"127.0.0.1" not in content, name
    for file in sorted((here / "embeddings").glob("*.npy")):
        np.testing.assert_allclose(
            np.load(chunked / "embeddings" / file.name).astype(np.float32), np.load(file), rtol=0, atol=1e-3
        )
    expected = RetroDatastore.from_pretrained(here).neighbor_ids
    assert (RetroDatastore.from_pretrained(chunked).neighbor_ids == expected).mean() > 0.95
    assert read_manifest(chunked).encoder.name == "tiny" and not (chunked / "encoder").exists()
