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
"""Property tests of datastores: any text, any manifest, any flipped bit."""

import copy
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import make_texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.bm25_index import build_bm25_index
from data_prep.chunk import chunk_documents
from data_prep.chunker import DocumentChunker
from data_prep.documents import Document
from data_prep.embed import embed_chunks
from data_prep.index import build_index
from data_prep.neighbors import find_neighbors
from data_prep.upkeep.changes import remove_documents
from data_prep.upkeep.verify import verify_datastore
from modeling_retro.datastore.manifest import MANIFEST_NAME, Manifest, read_manifest


STORED = json.loads((Path(__file__).parents[1] / "stored" / MANIFEST_NAME).read_text())
# Files that decide nothing that is read from a datastore: a lock, hashes of inputs, bad records, removed duplicates.
UNCHECKED = (".lock", ".inputs.json", "quarantine", "duplicates.jsonl")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=60), min_size=1, max_size=4), chunk_size=st.integers(1, 9))
def test_any_text_is_cut_into_chunks_that_give_it_back(tiny_tokenizer, texts, chunk_size):
    documents = [Document(text, number) for number, text in enumerate(texts)]
    columns, chunks = DocumentChunker(tiny_tokenizer, chunk_size).chunk(documents)
    assert chunks.sum() == len(columns["length"])
    is_token = np.arange(chunk_size) < columns["length"][:, None]
    for number, text in enumerate(texts):
        rows = columns["document_id"] == number
        tokens = columns["input_ids"][rows][is_token[rows]]
        assert tiny_tokenizer.decode(tokens[:-1]) == text and (not text or tokens[-1] == tiny_tokenizer.eos_token_id)
        assert columns["num_bytes"][rows].sum() == len(text.encode())


@pytest.mark.hostile(
    "records of documents that are any JSON, with half of a surrogate pair among their texts",
    "chunked or set aside in `quarantine/`; never half written",
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.characters(), max_size=20) | st.none() | st.integers(), min_size=1, max_size=4))
def test_any_record_is_chunked_or_set_aside(tmp_path_factory, tiny_tokenizer, texts):
    folder = tmp_path_factory.mktemp("any")
    lines = [json.dumps({"text": text}) for text in ["a text", *texts]]
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    stage = chunk_documents(folder / "a.jsonl", folder / "d", tiny_tokenizer, chunk_size=8, on_bad_record="skip")
    assert stage.num_documents + stage.dropped["bad_records"] == len(lines)
    assert verify_datastore(folder / "d") == []


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8) | st.just("0" * 64),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


def mutate(values, data):
    """Replaces, removes or adds one value somewhere in JSON. Returns the keys that lead to it."""
    path, place = [], values
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        path.append(data.draw(st.sampled_from(keys)))
        inner = place[path[-1]]
        if not isinstance(inner, (dict, list)) or not inner or data.draw(st.integers(0, 3)) == 0:
            break
        place = inner
    if data.draw(st.booleans()):
        place[path[-1]] = data.draw(VALUES)
    elif data.draw(st.booleans()):
        del place[path[-1]]
    elif isinstance(place, dict):
        place[data.draw(st.text(max_size=5))] = data.draw(VALUES)
    return path


@pytest.mark.hostile(
    "a manifest in which a random value is replaced by random JSON, removed or added",
    "refused, or its attributes say the very same as the file; with a checksum every change is refused",
)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_manifest_is_refused_or_means_what_it_says(tmp_path, data):
    values = copy.deepcopy(STORED)
    mutate(values, data)
    sealed = values | {"sha256": Manifest.from_dict(STORED).checksum()}
    for given_values in (values, sealed):
        (tmp_path / MANIFEST_NAME).write_text(json.dumps(given_values))
        try:
            found = read_manifest(tmp_path)
        except ValueError as error:
            assert MANIFEST_NAME in str(error) and "\n" not in str(error)
            continue
        assert json.dumps(found.to_dict(), sort_keys=True) == json.dumps(given_values, sort_keys=True)
        assert given_values is values or json.dumps(values, sort_keys=True) == json.dumps(STORED, sort_keys=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_tokenizer, tiny_encoder_dir):
    """A small datastore with every kind of file."""
    folder = tmp_path_factory.mktemp("whole")
    for split, number in (("train", 5), ("validation", 1)):
        records = [{"id": f"{split} {i}", "text": text} for i, text in enumerate(make_texts(number, seed=number))]
        file = folder / f"{split}.jsonl"
        file.write_text(
            "".join(json.dumps(record) + "\n" for record in records) + ("{}\n" if split == "train" else "")
        )
        options = {"chunk_size": 8, "id_column": "id", "on_bad_record": "skip"}
        chunk_documents(file, folder / "d", tiny_tokenizer, split=split, **options)
        embed_chunks(folder / "d", tiny_encoder_dir, split=split)
    build_index(folder / "d", factory="Flat")
    build_bm25_index(folder / "d")
    for split in ("train", "validation"):
        find_neighbors(folder / "d", 2, split)
    remove_documents(folder / "d", ["train 1"])
    assert verify_datastore(folder / "d") == []
    return folder / "d"


@pytest.mark.hostile(
    "one bit of any file of a datastore that is another, at random places",
    "found by `retro verify`, in every file but `.lock`, `.inputs.json`, `quarantine/` and `duplicates.jsonl`, which "
    "decide nothing that is read",
)
def test_a_flipped_bit_in_any_file_is_found(whole, tmp_path):
    path = shutil.copytree(whole, tmp_path / "copy")
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    names = {file.relative_to(path).parts[0] for file in files}
    assert {
        "documents",
        "bm25",
        "index.faiss",
        "removed-1.npy",
        "tokenizer",
        "encoder",
        "splits",
        "quarantine",
    } <= names
    drawn = random.Random(0)
    for file in files:
        if file.relative_to(path).parts[0] in UNCHECKED or not file.stat().st_size:
            continue
        data = file.read_bytes()
        altered = bytearray(data)
        altered[drawn.randrange(len(data))] ^= 1 << drawn.randrange(8)
        file.write_bytes(altered)
        assert [finding for finding in verify_datastore(path) if not finding.unchecked], file
        file.write_bytes(data)
    assert verify_datastore(path) == []
