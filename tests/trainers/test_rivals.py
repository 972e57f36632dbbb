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
"""kNN-LM and in-context retrieval beside RETRO on the same tokens."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from tiny_models import SIZES, tiny_llama
from transformers import LlamaForCausalLM

from modeling_retro import RetroConfig, RetroDatastore, RetroForCausalLM, RetroJointForCausalLM
from modeling_retro.datastore.manifest import read_manifest
from modeling_retro.sharing.model_card import evaluation_tables
from trainers.cli import main
from trainers.evaluation import knn_lm
from trainers.evaluation.evaluate import evaluate_retro, token_bits
from trainers.evaluation.in_front import in_front_bits
from trainers.evaluation.knn_lm import (
    NeighborDistribution,
    build_knn_store,
    neighbor_distribution,
    neighbor_probabilities,
)
from trainers.evaluation.rivals import datastore_bytes, evaluate_rivals
from trainers.evaluation.windows import document_offsets, document_windows


OPTIONS = {"window_chunks": 4, "stride_chunks": 2, "batch_size": 3, "show_progress": False}


@pytest.fixture(scope="module")
def models(datastore):
    torch.manual_seed(0)
    vocab_size = len(datastore.tokenizer)
    retro = RetroConfig(
        vocab_size=vocab_size,
        initializer_range=0.5,
        **SIZES,
        chunk_size=datastore.chunk_size,
        cross_attention_layers=[1],
        neighbor_encoder_num_hidden_layers=1,
    )
    joint = RetroJointForCausalLM.from_decoder(
        tiny_llama(vocab_size, initializer_range=0.5),
        chunk_size=datastore.chunk_size,
        continuation_chunks=datastore.continuation_chunks,
    )
    return {"retro": RetroForCausalLM(retro).eval(), "joint": joint.eval()}


@pytest.fixture(params=["retro", "joint"])
def model(request, models):
    return models[request.param]


def reference_contexts(model, chunks, window, stride):
    """State in front of each token of the documents, the token, its chunk and its place, from the head's input."""
    caught = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    rows = []
    for start, end, first in document_windows(document_offsets(chunks.document_id), window, stride):
        tokens, mask = chunks.take(np.arange(start, end))
        places = [(start + c, m) for c, m in zip(*np.nonzero(mask), strict=True)]
        with torch.no_grad(), model.retrieval(False):
            model(input_ids=torch.from_numpy(tokens[mask])[None])
        states = caught.pop()[0].numpy()
        rows += [
            (states[n - 1], int(tokens[mask][n]), *places[n]) for n in range(1, len(places)) if places[n][0] >= first
        ]
    handle.remove()
    return rows


def test_knn_lm_equals_the_formula(model, datastore, tmp_path):
    store = build_knn_store(model, datastore, tmp_path, "Flat", window_chunks=4, batch_size=3, show_progress=False)
    split, neighbors = datastore.split("validation"), 20
    windows = document_windows(document_offsets(split.chunks.document_id), 4, 2)
    found = neighbor_distribution(model, split, windows, store, 3, neighbors)
    bits, counted = token_bits(model, datastore, split, windows, None, 3)

    # Windows of 4 chunks overlap by 1.
    keys = reference_contexts(model, datastore.chunks, 4, 3)
    key_states = np.stack([row[0] for row in keys]).astype(np.float16).astype(np.float64)
    values = np.array([row[1] for row in keys])
    assert sorted(store.values) == sorted(values)
    queries = reference_contexts(model, split.chunks, 4, 2)
    assert found.found.sum() == len(queries)
    temperature, weight = 3, 0.3
    mixed = found.mixed_bits(bits, weight, temperature)
    for state, token, chunk, place in queries:
        distances = np.square(key_states - state.astype(np.float64)).sum(-1)
        nearest = np.argsort(distances, kind="stable")[:neighbors]
        weights = np.exp(-distances[nearest] / found.temperatures[temperature])
        probability = weights[values[nearest] == token].sum() / weights.sum()
        assert math.isclose(found.probabilities[chunk, place, temperature], probability, rel_tol=2e-3, abs_tol=1e-4)
        expected = -math.log2(weight * probability + (1 - weight) * 2 ** -bits[chunk, place])
        assert math.isclose(mixed[chunk, place], expected, rel_tol=1e-3, abs_tol=1e-3)
    # Tokens without a context keep their bits, and padding has none.
    assert (mixed[~found.found] == bits[~found.found]).all()
    assert (mixed[~counted] == 0).all()


def test_probabilities_of_the_neighbors_sum_to_one_and_ignore_absent_ones():
    generator = np.random.default_rng(0)
    distances = generator.random((5, 6))
    distances[:, 4:] = np.inf
    values = generator.integers(3, size=(5, 6))
    tokens = np.repeat(np.arange(3)[:, None], 5, axis=1)
    found = np.stack([neighbor_probabilities(distances, values, row, [0.1, 2.0]) for row in tokens])
    assert np.allclose(found.sum(0), 1, rtol=1e-12)
    for n, temperature in enumerate([0.1, 2.0]):
        weights = np.exp(-distances / temperature)
        expected = [(weights * (values == token)).sum(1) / weights.sum(1) for token in range(3)]
        assert np.allclose(found[..., n], expected, rtol=1e-10)
    # Where no key was found, no token is known.
    assert (neighbor_probabilities(np.full((5, 6), np.inf), values, values[:, 0], [0.1, 2.0]) == 0).all()


def test_tuning_finds_the_best_of_the_grid_on_the_chunks_given():
    generator = np.random.default_rng(0)
    shape = (12, 4)
    bits = generator.uniform(0.1, 8, size=shape)
    found = NeighborDistribution(
        generator.random((*shape, 3)), generator.random(shape) < 0.8, [1.0, 2.0, 4.0], np.zeros(2), np.zeros(2)
    )
    chunks = generator.random(12) < 0.5
    weight, temperature = found.tune(bits, chunks)
    sums = {}
    for candidate in knn_lm.WEIGHTS:
        for n in range(3):
            total = 0.0
            for place in zip(*np.nonzero(found.found & chunks[:, None]), strict=True):
                total -= math.log2(candidate * found.probabilities[*place, n] + (1 - candidate) * 2 ** -bits[place])
            sums[candidate, n] = total
    assert min(sums, key=sums.get) == (weight, temperature)


def test_an_interrupted_run_goes_on_and_has_the_same_keys(models, datastore, tmp_path, monkeypatch, dies_at):
    model = models["joint"]
    monkeypatch.setattr(knn_lm, "_BLOCK_CHUNKS", 20)
    options = {"factory": "IVF4,SQfp16", "window_chunks": 4, "show_progress": False}
    whole = build_knn_store(model, datastore, tmp_path / "whole", **options)
    dies_at(4, knn_lm, "_keys_and_values")
    with pytest.raises(KeyboardInterrupt):
        build_knn_store(model, datastore, tmp_path / "resumed", **options)
    done = sorted(path.name for path in (tmp_path / "resumed" / "keys").iterdir())
    assert 0 < len(done) < len(list((tmp_path / "whole" / "keys").iterdir()))
    resumed = build_knn_store(model, datastore, tmp_path / "resumed", **options)
    assert resumed.record == whole.record
    for kind in ("keys", "values"):
        for file in (tmp_path / "whole" / kind).iterdir():
            assert (tmp_path / "resumed" / kind / file.name).read_bytes() == file.read_bytes()
    # Nothing is computed again.
    monkeypatch.setattr(knn_lm, "_keys_and_values", None)
    again = build_knn_store(model, datastore, tmp_path / "resumed", **options)
    assert again.index.ntotal == len(again.values) == resumed.record["index"]["ntotal"]
    assert again.num_bytes > again.index.ntotal * (2 * 2 * 16 + 4)
    assert again.operations_per_search <= 2 * 16 * (4 + again.index.ntotal)


def test_keys_of_another_base_or_datastore_are_refused(models, datastore, tmp_path):
    options = {"window_chunks": 4, "show_progress": False}
    build_knn_store(models["joint"], datastore, tmp_path / "keys", **options)
    with pytest.raises(ValueError, match="base_sha256 .*choose another folder or delete"):
        build_knn_store(models["retro"], datastore, tmp_path / "keys", **options)
    with pytest.raises(ValueError, match="window_chunks 4, expected 3"):
        build_knn_store(models["joint"], datastore, tmp_path / "keys", window_chunks=3, show_progress=False)
    copy = shutil.copytree(datastore.path, tmp_path / "copy")
    manifest = read_manifest(copy)
    manifest.train.chunk_shards[0].sha256 = "0" * 64
    other = RetroDatastore(copy, manifest)
    with pytest.raises(ValueError, match="datastore_fingerprint .*, expected"):
        build_knn_store(models["joint"], other, tmp_path / "keys", **options)
    with pytest.raises(ValueError, match="'HNSW8', expected a flat index or an inverted file"):
        build_knn_store(models["joint"], datastore, tmp_path / "other", "HNSW8", **options)


def test_a_reader_does_not_change_the_fingerprint_of_its_base(models, datastore):
    base = models["joint"].decoder
    plain = knn_lm.base_fingerprint(models["joint"])
    fields = {"chunk_size": datastore.chunk_size, "continuation_chunks": datastore.continuation_chunks}
    copy = LlamaForCausalLM(base.config)
    copy.load_state_dict(base.state_dict())
    adapted = RetroJointForCausalLM.from_decoder(copy, **fields, neighbor_adapter={"r": 2}, row_adapter={"r": 2})
    assert len(adapted.state_dict()) > len(models["joint"].state_dict())
    assert knn_lm.base_fingerprint(adapted) == plain


def test_rivals_are_measured_on_the_same_documents(model, datastore, tmp_path):
    split = datastore.split("validation")
    evaluation = evaluate_rivals(
        model, datastore, split, ["in_context", "knn_lm"], tmp_path / "keys", num_neighbors=[1, 2], **OPTIONS
    )
    plain = evaluate_retro(model, datastore, split, num_neighbors=[1, 2], **OPTIONS)
    names = ["off", "random k=1", "random k=2", "on k=1", "on k=2", "in_context k=1", "in_context k=2"]
    mixed = ["knn_lm", "on k=1 + knn_lm", "on k=2 + knn_lm"]
    assert list(evaluation.chunk_bits) == list(evaluation.rivals) == names + mixed

    [left_out] = set(plain.document_bits("off")) - set(evaluation.document_bits("off"))
    documents = plain.document_bits("off") != left_out
    assert evaluation.knn_lm["tuning_documents"] == 1 == (~documents).sum()
    for name in names[:5]:
        assert np.array_equal(evaluation.document_bits(name), plain.document_bits(name)[documents])
    windows = document_windows(document_offsets(split.chunks.document_id), 4, 2)
    chunks = np.repeat(documents, np.diff(plain.document_offsets))
    for number in (1, 2):
        bits, tokens = in_front_bits(model, datastore, split, windows, split.neighbor_ids[:, :number], 3)
        assert np.array_equal(evaluation.chunk_bits[f"in_context k={number}"], bits[chunks])
        assert evaluation.num_tokens == tokens[chunks].sum()


def test_the_report_says_what_each_way_costs(models, datastore, tmp_path):
    split, model = datastore.split("validation"), models["joint"]
    evaluation = evaluate_rivals(
        model, datastore, split, ["in_context", "knn_lm"], tmp_path / "keys", num_neighbors=1, **OPTIONS
    )
    evaluation.save(tmp_path / "report")
    saved = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    rivals = saved["rivals"]
    assert list(rivals) == ["off", "random", "on", "in_context", "knn_lm", "on + knn_lm"]
    for name, row in rivals.items():
        assert row["low"] <= row["bits_per_byte"] <= row["high"]
        assert row["bits_per_byte"] == saved["bits_per_byte"][name]
        assert min(row["operations_per_token"], row["milliseconds_per_token"]) > 0
    operations = {name: row["operations_per_token"] for name, row in rivals.items()}
    search = 2 * 16 * saved["knn_lm"]["index"]["ntotal"]
    assert operations["off"] < operations["on"] < operations["in_context"]
    assert operations["knn_lm"] - operations["off"] == search
    assert operations["on + knn_lm"] == operations["on"] + operations["off"] + search
    storage = {name: row["storage_bytes"] for name, row in rivals.items()}
    datastore_size = datastore_bytes(datastore, "dense")
    assert datastore_size > (datastore.path / "index.faiss").stat().st_size
    keys_size = sum(path.stat().st_size for path in (tmp_path / "keys").rglob("*.[nf]*") if path.is_file())
    assert (storage["off"], storage["on"], storage["in_context"]) == (0, datastore_size, datastore_size)
    assert storage["knn_lm"] == keys_size
    assert storage["on + knn_lm"] == datastore_size + keys_size
    table = (tmp_path / "report" / "evaluation.md").read_text()
    assert table == evaluation_tables(saved)
    assert "| on + knn_lm |" in table[table.index("GFLOPs a token") :]
    assert (tmp_path / "report" / "rivals.svg").stat().st_size > 1000


def test_the_command_measures_rivals(models, datastore, tmp_path, capsys):
    models["joint"].save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--datastore", str(datastore.path), "--num_neighbors", "1"]
    options += ["--window_chunks", "4", "--stride_chunks", "2", "--batch_size", "3", "--max_documents", "3"]
    options += ["--baselines", "in_context", "knn_lm", "--output_dir", str(tmp_path / "out")]
    main(["evaluate", *options])
    expected = evaluate_rivals(
        models["joint"],
        datastore,
        datastore.split("validation"),
        ["in_context", "knn_lm"],
        tmp_path / "out" / "knn_lm",  # the keys that the command has left
        num_neighbors=1,
        max_documents=3,
        **OPTIONS,
    )
    saved = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert saved["num_documents"] == 2
    for name in ("off", "on", "in_context", "knn_lm", "on + knn_lm"):
        assert saved["rivals"][name]["bits_per_byte"] == pytest.approx(expected.bits_per_byte(name), rel=1e-6)
    assert "| on + knn_lm |" in capsys.readouterr().out
    assert "| on + knn_lm |" in (tmp_path / "model" / "README.md").read_text()
    with pytest.raises(SystemExit):
        main(["evaluate", *options, "--baseline", str(tmp_path / "model")])
    assert "in a run of its own" in capsys.readouterr().err
    again = ["--modes", "off", "on", "--reread_tokens", "4", "--output_dir", str(tmp_path / "again")]
    main(["evaluate", *options[:10], *again])
    found = json.loads((tmp_path / "again" / "evaluation.json").read_text())["bits_per_byte"]
    joint, split = models["joint"], datastore.split("validation")
    once = evaluate_retro(joint, datastore, split, num_neighbors=1, **OPTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint.config, "reread_tokens", 4)
        expected = evaluate_retro(joint, datastore, split, num_neighbors=1, **OPTIONS)
    assert found["on"] == pytest.approx(expected.bits_per_byte("on"), rel=1e-6)
    assert found["on"] != pytest.approx(once.bits_per_byte("on"), rel=1e-5)
    models["retro"].save_pretrained(tmp_path / "retro")
    with pytest.raises(SystemExit):
        main(["evaluate", "--model", str(tmp_path / "retro"), *options[2:10], *again])
    assert "and no tokens again" in capsys.readouterr().err


def test_unusable_baselines_are_refused(models, datastore, tmp_path):
    split, model = datastore.split("validation"), models["joint"]
    with pytest.raises(ValueError, match="unknown baselines bm25; expected some of in_context, knn_lm"):
        evaluate_rivals(model, datastore, split, ["bm25"], **OPTIONS)
    with pytest.raises(ValueError, match="knn_folder None.*expected a folder"):
        evaluate_rivals(model, datastore, split, ["knn_lm"], **OPTIONS)
    with pytest.raises(ValueError, match="off among the modes"):
        evaluate_rivals(model, datastore, split, ["knn_lm"], tmp_path, modes=["on"], **OPTIONS)
    with pytest.raises(ValueError, match="datastore_shares is .*expected 1"):
        evaluate_rivals(model, datastore, split, ["in_context"], datastore_shares=[0.5], **OPTIONS)
    with pytest.raises(ValueError, match="there is only one"):
        evaluate_rivals(model, datastore, split, ["knn_lm"], tmp_path, max_documents=1, **OPTIONS)
