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
"""`retro verify` finds what was altered, names what makes it anew, and makes just that."""

import json
import os
import re
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import TINY_CHUNK_SIZE, make_texts, write_jsonl
from safetensors.torch import load_file, save_file
from tiny_models import SIZES, tiny_llama

from data_prep.chunk import chunk_documents, chunk_features
from data_prep.deduplicate import deduplicate_documents
from data_prep.embed import embed_chunks
from data_prep.index import build_index
from data_prep.neighbors import find_neighbors, neighbor_features
from data_prep.scripts.verify import main
from data_prep.stage_files import save_shard
from data_prep.upkeep.verify import repair_datastore, verify, verify_datastore
from modeling_retro import RetroConfig, RetroForCausalLM, RetroJointForCausalLM
from modeling_retro.datastore.checksums import checksum
from modeling_retro.datastore.chunks import read_columns
from modeling_retro.datastore.manifest import ChunkShard, Manifest, chunks_fingerprint, read_manifest


@pytest.fixture
def datastore(tiny_datastore_dir, tmp_path):
    return shutil.copytree(tiny_datastore_dir, tmp_path / "datastore")


def flip_a_byte(file, position=-1):
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def the_files(datastore):
    return {str(p.relative_to(datastore)): p.read_bytes() for p in datastore.rglob("*") if p.is_file()}


def test_nothing_is_found_in_a_whole_datastore_and_nothing_is_written(datastore):
    before = the_files(datastore)
    assert verify(datastore) == []
    assert the_files(datastore) == before


ALTERED = {
    "chunks": "chunks/shard-00001/data-00000-of-00001.arrow",
    "state of chunks": "chunks/shard-00000/state.json",
    "embeddings": "embeddings/shard-00001.npy",
    "index": "index.faiss",
    "neighbors": "neighbors/shard-00000/data-00000-of-00001.arrow",
    "chunks of validation": "splits/validation/chunks/shard-00000/data-00000-of-00001.arrow",
    "embeddings of validation": "splits/validation/embeddings/shard-00000.npy",
    "neighbors of validation": "splits/validation/neighbors/shard-00000/data-00000-of-00001.arrow",
}


@pytest.mark.hostile(
    "one altered bit, a missing file or a truncated file, among chunks, embeddings, index and neighbors",
    "found by `retro verify`; `--repair` remakes only the damaged part, byte for byte",
)
@pytest.mark.parametrize("what", ALTERED)
@pytest.mark.parametrize("way", ["altered", "missing", "cut"])
def test_a_damaged_file_is_found_and_made_anew_and_nothing_else_is(datastore, tiny_datastore_dir, what, way):
    file = datastore / ALTERED[what]
    before = the_files(datastore)
    times = {path: path.stat().st_mtime_ns for path in datastore.rglob("*") if path.is_file()}
    if way == "altered":
        flip_a_byte(file, len(file.read_bytes()) // 2)
    elif way == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:100])
    findings = verify_datastore(datastore)
    stage = what.split()[0] if what != "state of chunks" else "chunks"
    assert {finding.stage for finding in findings} == {stage}
    folder = file.parent if file.suffix in (".arrow", ".json") else file
    assert {finding.where for finding in findings} == {folder.relative_to(datastore).as_posix()}
    assert f"retro {stage.replace('embeddings', 'embed').replace('chunks', 'chunk')}" in str(findings[0])

    inputs = tiny_datastore_dir.parent
    assert repair_datastore(datastore, [inputs / "train.jsonl", inputs / "validation.jsonl"]) == []
    after = the_files(datastore)
    assert {name: data for name, data in after.items() if name != "datastore.json"} == {
        name: data for name, data in before.items() if name != "datastore.json"
    }
    assert json.loads(after["datastore.json"]) == json.loads(before["datastore.json"])
    touched = {path for path, time in times.items() if path.stat().st_mtime_ns != time}
    allowed = folder if folder.is_dir() else file
    assert all(path == allowed or allowed in path.parents or path.name == "datastore.json" for path in touched)


def rewrite(datastore, stage, split, change):
    """Alters the columns of the first shard of a stage and makes all checksums right again, as a forger would."""
    manifest = json.loads((datastore / "datastore.json").read_text())
    record = manifest["splits"][split][stage]
    root = datastore if split == "train" else datastore / "splits" / split
    shard = record["shards"][0]
    folder = root / stage / shard["name"]
    columns = {name: np.array(column) for name, column in read_columns(folder).items()}
    change(columns)
    shutil.rmtree(folder)
    if stage == "chunks":
        features = chunk_features(TINY_CHUNK_SIZE, manifest["tokenizer"]["vocab_size"])
    else:
        features = neighbor_features(4)
    save_shard(folder, columns, features)
    shard["sha256"] = checksum(folder)
    if stage == "chunks":
        record["fingerprint"] = chunks_fingerprint([ChunkShard.from_dict(shard) for shard in record["shards"]])
        for other in ("embeddings", "neighbors"):
            manifest["splits"][split][other]["shards"][0]["chunks_sha256"] = shard["sha256"]
        manifest["index"]["fingerprint"] = manifest["splits"]["train"]["chunks"]["fingerprint"]
    Manifest.from_dict(manifest).seal().write(datastore)


def at(name, place, value):
    def change(columns):
        columns[name][place] = value

    return change


FORGED = {
    "token ids": ("chunks", at("input_ids", (0, 0), 300), "token ids from .* to 300, the vocabulary 300 tokens"),
    "length": ("chunks", at("length", 0, 9), "lengths from .* to 9, expected 1 to 8"),
    "no length": ("chunks", at("length", 0, 0), "lengths from 0"),
    "short": ("chunks", at("length", 0, 3), "(not full before the last|tokens after the length)"),
    "documents": ("chunks", at("document_id", 0, 99), "document ids that do not ascend"),
    "bytes": ("chunks", at("num_bytes", 0, -1), "negative numbers of bytes"),
    "control token": ("chunks", at("input_ids", (0, 3), 0), "1 control tokens inside documents"),
    "count": ("chunks", at("num_bytes", 0, 10_000), "says .* bytes, the shard holds"),
    "ids": ("neighbors", at("neighbor_ids", (0, 1), 100_000), "ids from .* to 100000"),
    "twice": ("neighbors", at("neighbor_ids", (0, slice(None)), 60), "the same neighbor twice"),
    "own": ("neighbors", at("neighbor_ids", (0, 0), 0), "neighbors in the chunk's own document"),
    "absent": ("neighbors", at("neighbor_ids", (0, 0), -1), "a neighbor after an absent one"),
    "scores": ("neighbors", at("neighbor_scores", (0, 0), np.nan), "scores that are not finite"),
}


@pytest.mark.hostile(
    "forged shards with right checksums: unknown token ids, impossible lengths, documents out of order, neighbors "
    "that do not exist or belong to the document of the query, …",
    "found by `retro verify`",
)
@pytest.mark.parametrize("what", FORGED)
def test_what_is_wrong_behind_right_checksums_is_found(datastore, what):
    stage, change, problem = FORGED[what]
    rewrite(datastore, stage, "train", change)
    findings = verify_datastore(datastore)
    assert findings
    assert any(re.search(problem, str(finding)) for finding in findings), findings


@pytest.mark.hostile(
    "embeddings that are infinite, of another shape, or a pickle",
    "found by `retro verify`; no pickle is opened",
)
def test_embeddings_and_index_behind_right_checksums(datastore):
    file = datastore / "embeddings" / "shard-00000.npy"
    vectors = np.load(file)
    vectors[0, 0] = np.inf
    manifest = read_manifest(datastore)

    def found(array):
        np.save(file, array)
        manifest.train.embedding_shards[0].sha256 = checksum(file)
        manifest.write(datastore)
        return " ".join(map(str, verify_datastore(datastore)))

    assert "holds values that are not finite" in found(vectors)
    assert "expected float16" in found(vectors.astype(np.float32))
    assert "expected float16" in found(vectors[:-1])
    assert "cannot be read" in found(np.array({"a": 1}, dtype=object))  # a pickle, which is not opened


@pytest.mark.hostile(
    "checksums, counts and sizes in a manifest that differ from those of the files",
    "found by `retro verify`",
)
@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("splits", "train", "chunks", "num_chunks"), -5, "num_chunks is -5, expected a whole number from 0"),
        (("splits", "train", "chunks", "num_chunks"), 5, "num_chunks is 5, its shards say"),
        (("splits", "train", "chunks", "fingerprint"), "0" * 64, "fingerprint is not that of its shards"),
        (("index", "ntotal"), 3, "index.ntotal is 3, there are"),
        (("index", "encoder_sha256"), "0" * 64, "is that of another encoder"),
        (("index", "fingerprint"), "0" * 64, "is of other chunks"),
        (("tokenizer", "sha256"), "0" * 64, "tokenizer has the sha256"),
        (("tokenizer", "vocab_size"), 299, "tokenizer has the vocab_size 300, the manifest says 299"),
        (("encoder", "sha256"), "0" * 64, "encoder is not what was embedded with"),
        (("encoder", "dim"), 8, "expected float16"),
        (("chunk_size",), 16, "has chunks of 8 tokens, the manifest says 16"),
    ],
)
def test_an_altered_field_of_the_manifest_is_found(datastore, path, value, problem):
    manifest = json.loads((datastore / "datastore.json").read_text())
    *parents, last = path
    record = manifest
    for key in parents:
        record = record[key]
    record[last] = value
    (datastore / "datastore.json").write_text(json.dumps(manifest))
    assert problem in " | ".join(map(str, verify_datastore(datastore)))


def test_counts_are_counted_anew(datastore):
    before = json.loads((datastore / "datastore.json").read_text())
    manifest = json.loads((datastore / "datastore.json").read_text())
    manifest["splits"]["train"]["chunks"]["num_chunks"] = 5
    manifest["splits"]["validation"]["chunks"]["shards"][0]["tokens"] = 5
    (datastore / "datastore.json").write_text(json.dumps(manifest))
    assert repair_datastore(datastore) == []
    assert json.loads((datastore / "datastore.json").read_text()) == before


@pytest.mark.hostile(
    "`--repair` with an input that has changed",
    "refused; the damaged shard stays as it is",
)
def test_chunks_are_made_of_the_very_input_or_not_at_all(datastore, tiny_datastore_dir, tmp_path):
    file = datastore / "chunks" / "shard-00000" / "data-00000-of-00001.arrow"
    flip_a_byte(file)
    damaged = file.read_bytes()
    with pytest.raises(ValueError, match=r"is made from train.jsonl \(\d+ bytes\); pass it as an input, as it was"):
        repair_datastore(datastore)
    other = tmp_path / "train.jsonl"
    text = (tiny_datastore_dir.parent / "train.jsonl").read_text()
    other.write_text(text.replace("retro", "RETRO"))
    with pytest.raises(ValueError, match="pass it as an input, as it was"):
        repair_datastore(datastore, other)
    manifest = read_manifest(datastore)
    manifest.train.chunks.sources[0].xxh3 = None  # one of before
    manifest.write(datastore)
    with pytest.raises(ValueError, match="no longer gives the chunks"):
        repair_datastore(datastore, other)
    assert file.read_bytes() == damaged
    other.write_text(text)
    assert repair_datastore(datastore, other) == []


def test_shards_of_filtered_capped_and_deduplicated_splits_are_made_anew(tmp_path, tiny_tokenizer):
    texts = make_texts(60, seed=5, max_words=40)
    lines = [json.dumps({"text": text, "id": number, "good": number % 5 > 0}) for number, text in enumerate(texts)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    write_jsonl(tmp_path / "validation.jsonl", [texts[7], texts[33]])
    path, options = tmp_path / "datastore", {"chunk_size": 8, "shard_bytes": 4000}
    filtered = {"filter": "good == true", "id_column": "id", **options}
    chunk_documents(tmp_path / "train.jsonl", path, tiny_tokenizer, **filtered)
    chunk_documents(tmp_path / "validation.jsonl", path, tiny_tokenizer, split="validation", max_chunks=20, **options)
    assert deduplicate_documents(path, ngram=4).documents >= 1
    assert verify_datastore(path) == []
    before = the_files(path)
    for shard in path.rglob("*.arrow"):
        flip_a_byte(shard)
    assert len(verify_datastore(path)) >= 3
    assert repair_datastore(path, [tmp_path / "train.jsonl", tmp_path / "validation.jsonl"]) == []
    assert the_files(path) == before


def test_tokenizer_and_encoder_are_written_again_by_their_stages(datastore, tiny_tokenizer, tiny_encoder_dir):
    (datastore / "tokenizer" / "tokenizer.json").write_text("{}")
    flip_a_byte(datastore / "encoder" / "model.safetensors")
    found = {finding.where: str(finding) for finding in verify_datastore(datastore)}
    assert "`retro chunk` with the same inputs and tokenizer" in found["tokenizer"]
    assert "`retro embed` with the same encoder" in found["encoder"]
    inputs = datastore.parent / "train.jsonl"
    manifest = json.loads((datastore / "datastore.json").read_text())
    write_jsonl(inputs, make_texts(40, seed=2))
    chunk_documents(inputs, datastore, tiny_tokenizer, chunk_size=8, shard_bytes=4000)
    embed_chunks(datastore, tiny_encoder_dir)
    assert verify_datastore(datastore) == []
    assert json.loads((datastore / "datastore.json").read_text()) == manifest


def test_an_index_that_grew_is_made_anew_with_its_options(datastore, tmp_path, tiny_tokenizer, tiny_encoder_dir):
    more = write_jsonl(tmp_path / "more.jsonl", make_texts(20, seed=9))
    inputs = write_jsonl(tmp_path / "train.jsonl", make_texts(40, seed=2))
    chunk_documents([inputs, more], datastore, tiny_tokenizer, chunk_size=8, shard_bytes=4000, append=True)
    assert any("belongs" in str(f) or "fewer" in str(f) for f in verify_datastore(datastore))
    assert repair_datastore(datastore) == []
    flip_a_byte(datastore / "index.faiss")
    assert {finding.stage for finding in verify_datastore(datastore)} == {"index"}
    assert repair_datastore(datastore) == []


@pytest.mark.hostile(
    "a shard whose `state.json` names a file outside of it",
    "refused; the error names the file",
)
def test_a_shard_whose_own_list_of_files_leads_out_is_refused(datastore, tiny_datastore_dir):
    state = datastore / "chunks" / "shard-00000" / "state.json"
    content = json.loads(state.read_text())
    content["_data_files"][0]["filename"] = "../../elsewhere.arrow"
    state.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="names '../../elsewhere.arrow', expected a name without a path"):
        read_columns(state.parent)
    assert "elsewhere.arrow" in " ".join(map(str, verify_datastore(datastore)))


@pytest.mark.hostile(
    "random bytes in place of an Arrow file",
    "found by `retro verify`",
)
def test_garbage_in_an_arrow_file_is_a_finding(datastore):
    file = datastore / "neighbors" / "shard-00000" / "data-00000-of-00001.arrow"
    with pa.OSFile(str(file), "wb") as sink:
        sink.write(os.urandom(1000))
    (finding, second) = verify_datastore(datastore)
    assert "was altered" in str(finding) and "cannot be read" in str(second)


def test_the_command_says_what_is_wrong_and_ends_with_1(datastore, tiny_datastore_dir, capsys):
    main([str(datastore)])
    assert "nothing is wrong" in capsys.readouterr().out
    flip_a_byte(datastore / "chunks" / "shard-00000" / "data-00000-of-00001.arrow")
    with pytest.raises(SystemExit) as exit:
        main([str(datastore)])
    assert exit.value.code == 1
    assert "chunks/shard-00000 was altered: its checksum is not" in capsys.readouterr().out
    main(["--path", str(datastore), "--repair", "--input", str(tiny_datastore_dir.parent / "train.jsonl")])
    assert "nothing is wrong" in capsys.readouterr().out
    with pytest.raises(ValueError, match="neither a datastore"):
        main([str(tiny_datastore_dir.parent)])


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_tokenizer):
    """Folders of a model of each kind, whole and without its base."""
    folder = tmp_path_factory.mktemp("models")
    tiny_llama(300, tie_word_embeddings=True).save_pretrained(folder / "base")
    base, fields = str(folder / "base"), {"chunk_size": 8}
    RetroForCausalLM(RetroConfig(vocab_size=300, cross_attention_layers=[1], **fields, **SIZES)).save_pretrained(
        folder / "scratch", max_shard_size="20KB"
    )
    cross = RetroForCausalLM.from_decoder_pretrained(base, cross_attention_layers=[1], **fields)
    joint = RetroJointForCausalLM.from_decoder_pretrained(base, **fields)
    for name, model in {"cross": cross, "joint": joint}.items():
        model.freeze_decoder()
        model.save_pretrained(folder / name)
        model.save_pretrained(folder / f"{name}-retrofit", retrofit_only=True)
    return folder


@pytest.mark.parametrize("name", ["scratch", "cross", "joint", "cross-retrofit", "joint-retrofit"])
def test_nothing_is_found_in_a_whole_model(models, name):
    assert verify(models / name) == []


@pytest.mark.hostile(
    "a model with a truncated file, with NaN, with missing, unknown or misshapen weights, with an index of weights "
    "that leads out of the folder, or with another base",
    "found by `retro verify`",
)
def test_damaged_models(models, tmp_path):
    def copy(name):
        return shutil.copytree(models / name, tmp_path / f"{len(list(tmp_path.iterdir()))}-{name}")

    def found(path):
        return " | ".join(map(str, verify(path)))

    cut = copy("cross")
    file = cut / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert "model.safetensors cannot be read" in found(cut)

    nan = copy("cross")
    weights = load_file(nan / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, nan / "model.safetensors")
    assert "not finite in model.norm.weight" in found(nan)

    other = copy("cross")
    weights.pop("model.norm.weight")
    weights["mood"] = torch.zeros(1)
    weights["model.layers.0.input_layernorm.weight"] = torch.zeros(3)
    save_file(weights, other / "model.safetensors")
    assert "lack model.norm.weight (1 in all)" in found(other)
    assert "have the unknown mood" in found(other) and "another shape" in found(other)

    shards = copy("scratch")
    names = sorted(file.name for file in shards.glob("*.safetensors"))
    (shards / names[0]).unlink()
    assert f"{names[0]} is missing" in found(shards)
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    assert "names '../../secret.safetensors'" in found(shards)

    config = copy("scratch")
    (config / "config.json").write_text('{"model_type": "gpt2"}')
    assert "config.json is not that of a RETRO model" in found(config)

    empty = copy("cross")
    (empty / "model.safetensors").unlink()
    assert "has no weights in safetensors files" in found(empty)

    stranger = copy("cross-retrofit")
    content = json.loads((stranger / "config.json").read_text()) | {"base_model_name_or_path": str(models / "base")}
    (stranger / "config.json").write_text(json.dumps(content | {"base_model_sha256": "0" * 64}))
    assert "expected 000000000000" in found(stranger)
    (stranger / "config.json").write_text(json.dumps(content | {"base_model_name_or_path": str(tmp_path / "gone")}))
    assert "cannot be read" in found(stranger)

    measured = copy("cross")
    (measured / "evaluation.json").write_text('{"weights_sha256": "of others"}')
    assert "evaluation.json is of other weights; measure these with `retro evaluate`" in found(measured)


def test_weights_of_an_earlier_save_in_other_shards_go(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = RetroForCausalLM(RetroConfig(vocab_size=300, cross_attention_layers=[0], chunk_size=8, **sizes))
    for size in ("20KB", "1GB", "20KB"):
        model.save_pretrained(tmp_path / "model", max_shard_size=size)
        assert verify(tmp_path / "model") == []


def test_neighbors_and_index_can_be_made_from_python_alone(tmp_path, tiny_tokenizer, tiny_encoder_dir):
    """An unfinished datastore is no damage; a stage that stopped halfway is."""
    path = tmp_path / "datastore"
    inputs = write_jsonl(tmp_path / "a.jsonl", make_texts(30))
    chunk_documents(inputs, path, tiny_tokenizer, chunk_size=8, shard_bytes=2000)
    assert verify(path) == []
    embed_chunks(path, tiny_encoder_dir)
    build_index(path, factory="Flat")
    assert verify(path) == []
    find_neighbors(path, num_neighbors=2)
    manifest = read_manifest(path)
    manifest.train.neighbor_shards.pop()
    manifest.write(path)
    assert "is not made yet" in str(verify(path)[0])
    assert repair_datastore(path) == []
