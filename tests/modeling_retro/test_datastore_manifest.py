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
"""A manifest is compared with its schema as a whole before any file that it names is asked for."""

import copy
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError

from data_prep.upkeep.verify import verify_datastore
from modeling_retro import RetroDatastore
from modeling_retro.datastore import manifest as manifest_module
from modeling_retro.datastore.manifest import MANIFEST_NAME, Manifest, read_manifest


STORED = Path(__file__).parents[1] / "stored"


def set_value(manifest, path, value):
    *parents, last = path
    for key in parents:
        manifest = manifest[key]
    manifest[last] = value


TRAIN = ("splits", "train")


@pytest.mark.hostile(
    "a manifest with `num_chunks: -5`, with text in place of a number, with a list in place of an object, …",
    "refused on loading; the error names the field",
)
@pytest.mark.hostile(
    "shards, splits or files of a manifest whose names lead out of the folder",
    "refused before the file system is asked; the error names them",
)
@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((*TRAIN, "chunks", "num_chunks"), -5, r"splits.train.chunks.num_chunks is -5"),
        ((*TRAIN, "chunks", "num_documents"), "many", r"num_documents is 'many'"),
        ((*TRAIN, "chunks", "shards", 0, "rows"), True, r"shards\[0\].rows is True"),
        ((*TRAIN, "chunks", "shards", 0, "name"), "../../elsewhere", r"shards\[0\].name is '../../elsewhere'"),
        ((*TRAIN, "neighbors", "shards", 0, "name"), "/etc", r"neighbors.shards\[0\].name is '/etc'"),
        ((*TRAIN, "embeddings", "shards", 0, "name"), "a\\b", r"embeddings.shards\[0\].name"),
        (("splits", "../validation"), {}, r"splits has '../validation', expected a name without a path"),
        (("splits",), [], r"splits is \[\]"),
        (("chunk_size",), 0, r"chunk_size is 0, expected a whole number from 1"),
        (("continuation_chunks",), 1.5, r"continuation_chunks is 1.5"),
        (("index", "ntotal"), None, r"index.ntotal is None"),
        (("index", "sha256"), {"../index.faiss": "0"}, r"'../index.faiss'"),
        (("tokenizer",), "SmolLM2", r"tokenizer is 'SmolLM2'"),
        (("format_version",), -1, r"its format_version is -1"),
        (("format_version",), "1", r"its format_version is '1'"),
        (("allow_control_tokens",), "no", r"allow_control_tokens is 'no', expected true or false"),
        ((*TRAIN, "chunks", "shards"), {}, r"chunks.shards is \{\}, expected a list"),
        ((*TRAIN, "chunks", "deduplicated"), {"run": "../x"}, r"deduplicated"),
        (("index", "sha256"), {"index.faiss": 3}, r"index.sha256.index.faiss is 3, expected a sha256"),
        (("files",), {"/etc/passwd": "0" * 64}, r"files has '/etc/passwd', expected a path inside"),
    ],
)
def test_an_altered_manifest_is_refused_with_the_field_named(tiny_datastore_dir, tmp_path, path, value, message):
    folder = tmp_path / "datastore"
    shutil.copytree(tiny_datastore_dir, folder)
    file = folder / "datastore.json"
    manifest = json.loads(file.read_text())
    set_value(manifest, path, value)
    file.write_text(json.dumps(manifest))
    # Before the file system is asked for any shard.
    shutil.rmtree(folder / "chunks")
    with pytest.raises(ValueError, match=message):
        RetroDatastore.from_pretrained(folder)


# What stages note for themselves or for the reader; each stage checks its options when it goes on.
FREE = {"options", "recall"}


def leaves(value, path=()):
    """The places of all single values of a manifest but the free ones."""
    if isinstance(value, (dict, list)):
        for key, element in value.items() if isinstance(value, dict) else enumerate(value):
            if key not in FREE or path == ():
                yield from leaves(element, (*path, key))
    else:
        yield path


@pytest.mark.hostile(
    "a manifest in which one value is replaced by −5 or by an object, for every value in turn",
    "refused; the error names the field",
)
def test_every_value_of_a_manifest_has_a_type_and_a_range(tiny_datastore_dir, tmp_path):
    manifest = json.loads((tiny_datastore_dir / MANIFEST_NAME).read_text())
    places = list(leaves(manifest))
    assert len(places) > 100
    for place in places:
        for value in (-5, {"a": 1}):
            altered = copy.deepcopy(manifest)
            set_value(altered, place, value)
            (tmp_path / MANIFEST_NAME).write_text(json.dumps(altered))
            with pytest.raises(ValueError, match=rf"{place[-1] if isinstance(place[-1], str) else place[-2]}"):
                read_manifest(tmp_path)


@pytest.mark.hostile(
    "a manifest of a newer format",
    "refused; the error names both versions",
)
def test_a_newer_format_is_refused_and_an_older_one_is_read(tiny_datastore_dir, tmp_path, monkeypatch):
    manifest = json.loads((tiny_datastore_dir / MANIFEST_NAME).read_text())
    del manifest["sha256"]
    assert manifest["format_version"] == 1  # of one that was never changed, so that older code reads it too
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(manifest | {"format_version": 3}))
    with pytest.raises(ValueError, match="has format version 3, this code reads versions up to 2.*install that"):
        read_manifest(tmp_path)
    monkeypatch.setattr(manifest_module, "FORMAT_VERSION", 4)
    assert read_manifest(tmp_path).format_version == 3
    # Fields may be added without a new version.
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(manifest | {"mood": "good"}))
    assert read_manifest(tmp_path).given["mood"] == "good"


@pytest.mark.hostile(
    "a manifest that consists of 100,000 open brackets, is other JSON, or is not UTF-8",
    "refused with an error of one sentence",
)
@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{}", "null", '{"format_version": 1}', "\udcff"])
def test_what_is_no_manifest_is_refused_in_one_sentence(tmp_path, text):
    (tmp_path / MANIFEST_NAME).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=MANIFEST_NAME):
        read_manifest(tmp_path)


@pytest.fixture
def stored(tmp_path):
    """A datastore with every kind of field, made before manifests had attributes and a checksum."""
    folder = tmp_path / "stored"
    with tarfile.open(STORED / "files.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    shutil.copy(STORED / MANIFEST_NAME, folder)
    return folder


def test_a_datastore_of_before_opens_and_its_manifest_is_written_as_it_was(stored):
    datastore = RetroDatastore.from_pretrained(stored)
    datastore.verify()
    assert [str(finding) for finding in verify_datastore(stored) if not finding.unchecked] == []
    assert datastore.removed_documents.tolist() == [1] and len(datastore.chunks) == datastore.index.ntotal == 18
    assert datastore.manifest.encoder.prompt == "" and datastore.manifest.sha256 is None
    assert (datastore.manifest.train.chunks.options["id_column"], datastore.retriever) == ("id", "dense")
    shards = datastore.manifest.train.neighbor_shards
    assert datastore.manifest.train.chunks.fingerprint == shards[1].chunks_fingerprint != shards[0].chunks_fingerprint
    datastore.manifest.write(stored)
    assert (stored / MANIFEST_NAME).read_bytes() == (STORED / MANIFEST_NAME).read_bytes()


def test_unknown_keys_and_values_that_are_defaults_are_written_again(tiny_datastore_dir, tmp_path):
    values = json.loads((tiny_datastore_dir / MANIFEST_NAME).read_text())
    values |= {"mood": "good", "version": 0, "allow_control_tokens": True}
    values["splits"]["train"]["chunks"]["shards"][0]["mood"] = None
    values["splits"]["train"]["neighbors"]["shards"][0]["index"] = None
    manifest = Manifest.from_dict(values)
    assert manifest.version == 0 and manifest.train.neighbor_shards[0].chunks_fingerprint is None
    assert manifest.to_dict() == values
    manifest.version = 1
    assert manifest.to_dict() == values | {"version": 1}
    with pytest.raises(StrictDataclassFieldValidationError, match="'rows'"):
        manifest.train.chunk_shards[0].rows = "many"


def all_leaves(value, path=()):
    if isinstance(value, (dict, list)):
        for key, element in value.items() if isinstance(value, dict) else enumerate(value):
            yield from all_leaves(element, (*path, key))
    else:
        yield path, value


def another(value):
    """A value of the same type that the rules of a manifest cannot tell from the right one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value[:-1] + ("0" if value[-1:] != "0" else "1")
    return 7


@pytest.mark.hostile(
    "a manifest in which one field differs from what was written, for every field in turn: `continuation_chunks`, the "
    "pooling of the encoder, nprobe, …",
    "refused on opening, and found by `retro verify`. A datastore that was made before manifests had a checksum of "
    "their fields can be altered where no other check sees it; a forger can renew the checksum",
)
def test_every_altered_field_of_a_manifest_is_found(tiny_datastore_dir, tmp_path):
    values = json.loads((tiny_datastore_dir / MANIFEST_NAME).read_text())
    places = list(all_leaves(values))
    assert len(places) > 150
    for path, value in places:
        altered = copy.deepcopy(values)
        set_value(altered, path, another(value))
        (tmp_path / MANIFEST_NAME).write_text(json.dumps(altered))
        with pytest.raises(ValueError, match=f"was altered after it was written|{path[-1]}"):
            read_manifest(tmp_path)
    folder = shutil.copytree(tiny_datastore_dir, tmp_path / "datastore")
    (folder / MANIFEST_NAME).write_text(json.dumps(values | {"continuation_chunks": 2}))
    with pytest.raises(ValueError, match="was altered after it was written"):
        RetroDatastore.from_pretrained(folder)
    assert [finding.where for finding in verify_datastore(folder)] == [MANIFEST_NAME]
