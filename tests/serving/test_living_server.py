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
"""A server takes what is added to its datastore and removed from it, between two tokens and without a restart."""

import shutil

import httpx
import torch
from conftest import TINY_CHUNK_SIZE, make_texts, write_jsonl
from tiny_server import retriever_of, running, save_model

from data_prep.upkeep.changes import add_documents, compact_datastore, remove_documents
from serving.load import load_served_model


def test_a_server_takes_each_version_of_its_datastore(tiny_datastore_dir, tmp_path):
    path = shutil.copytree(tiny_datastore_dir, tmp_path / "datastore")
    model = save_model("joint", path, tmp_path / "tiny")
    served = load_served_model(str(model), str(path), max_prompt_tokens=120)
    prompt = "retro looks things up in a datastore naïve"
    ids = served.prompts.encode_text(prompt)[:TINY_CHUNK_SIZE]

    with running(served) as address:

        def found():
            body = {"model": "tiny", "prompt": ids, "max_tokens": 1, "num_neighbors": 8}
            answer = httpx.post(f"{address}/v1/completions", json=body, timeout=60).raise_for_status().json()
            (chunk,) = answer["choices"][0]["neighbors"]
            return [(neighbor["document_id"], neighbor["chunk_id"]) for neighbor in chunk["neighbors"]]

        def expected():
            neighbors = retriever_of(path).retrieve(torch.tensor([ids]), 8)
            return list(zip(neighbors.document_ids[0].tolist(), neighbors.chunk_ids[0].tolist(), strict=True))

        first = found()
        assert first == expected()
        gone = first[0][0]
        remove_documents(path, [gone])
        second = found()
        assert second == expected() and gone not in [document for document, _ in second]
        add_documents(path, write_jsonl(tmp_path / "more.jsonl", [*make_texts(3, seed=81), f"{prompt} {prompt}"]))
        assert found() == expected()
        compact_datastore(path)
        assert found() == expected()
        assert served.retriever.datastore.manifest.version == 3
        # One that cannot be read is not taken.
        manifest = (path / "datastore.json").read_text()
        last = found()
        (path / "new.json").write_text("{")
        (path / "new.json").replace(path / "datastore.json")
        assert found() == last
        (path / "new.json").write_text(manifest)
        (path / "new.json").replace(path / "datastore.json")
        remove_documents(path, [last[0][0]])
        assert found() == expected() != last
