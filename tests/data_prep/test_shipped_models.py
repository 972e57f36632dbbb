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
"""Short names stand for models of pip packages, and an error of the Hub says how else a model can be had."""

import shutil

import pytest
from conftest import make_texts, write_jsonl
from tiny_models import tiny_llama

from data_prep import shipped_models
from data_prep.chunk import chunk_documents
from data_prep.embed import embed_chunks
from data_prep.shipped_models import find_model
from modeling_retro import RetroDatastore, RetroJointForCausalLM
from trainers.load_model import load_retro_model
from trainers.retriever.distillation import distill_encoder
from trainers.scripts import train_retriever, train_span_corruption


@pytest.fixture
def packages(tmp_path, tiny_tokenizer, tiny_encoder_dir, monkeypatch):
    """Tiny models in place of those of the packages."""
    decoder = tmp_path / "cache" / "smollm2"
    tiny_llama(len(tiny_tokenizer)).save_pretrained(decoder)
    tiny_tokenizer.save_pretrained(decoder)
    package = tmp_path / "site" / "fake_encoder"
    shutil.copytree(tiny_encoder_dir, package / "model")
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(shipped_models, "ENCODER_PACKAGE", "fake_encoder")
    checksum = shipped_models.checksum(package / "model" / "model.safetensors")
    monkeypatch.setattr(shipped_models, "ENCODER_SHA256", checksum)
    monkeypatch.setattr(shipped_models, "find_smollm2", lambda folder: str(decoder))
    return decoder, package / "model"


def test_short_names_work_in_every_stage(packages, tmp_path):
    decoder, encoder = packages
    assert (find_model("smollm2"), find_model("minilm")) == (str(decoder), str(encoder))
    path = tmp_path / "datastore"
    chunk_documents(write_jsonl(tmp_path / "a.jsonl", make_texts(5)), path, "smollm2", chunk_size=8)
    embed_chunks(path, "minilm")
    datastore = RetroDatastore.from_pretrained(path)
    datastore.check_encoder(datastore.open_encoder())
    model = load_retro_model("smollm2", datastore)
    assert isinstance(model, RetroJointForCausalLM)
    assert model.config.base_model_name_or_path == str(decoder)


def test_short_names_work_where_models_are_trained(packages, tmp_path):
    decoder, encoder = packages
    arguments = train_retriever.TrainRetrieverArguments(pairs=[], model_name_or_path="minilm")
    assert train_retriever._load_encoder(arguments, seed=0).name_or_path == str(encoder)
    arguments = train_span_corruption.SpanCorruptionArguments(
        tasks="", tokenizer_name_or_path="smollm2", model_config="d_model=8,d_ff=8,d_kv=4,num_layers=1,num_heads=2"
    )
    assert train_span_corruption.load_model(arguments)[1].name_or_path == str(decoder)
    distilled = distill_encoder("minilm", tmp_path / "static", dim=4)
    assert distilled.dim == 4


def test_a_folder_of_that_name_goes_first_and_without_packages_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped_models, "PACKAGE", "no_such_package")
    monkeypatch.setattr(shipped_models, "ENCODER_PACKAGE", "no_such_package")
    monkeypatch.setattr(shipped_models, "HF_HOME", str(tmp_path / "home"))
    assert find_model("smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert find_model("minilm") == "sentence-transformers/all-MiniLM-L6-v2"
    assert find_model("some/model") == "some/model"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert find_model("smollm2") == "smollm2"


def test_an_error_of_the_hub_names_what_was_looked_for_and_the_other_ways(tmp_path, tiny_tokenizer):
    data = write_jsonl(tmp_path / "a.jsonl", make_texts(3))
    with pytest.raises(OSError, match=r"the tokenizer 'nobody/none' is no folder here.*'smollm2', which pip brings"):
        chunk_documents(data, tmp_path / "d", "nobody/none")
    chunk_documents(data, tmp_path / "d", tiny_tokenizer, chunk_size=8)
    with pytest.raises(OSError, match=r"the encoder 'nobody/none' is no folder here.*'minilm', which pip brings"):
        embed_chunks(tmp_path / "d", "nobody/none")
    with pytest.raises(OSError, match=r"the model 'nobody/none' is no folder here"):
        load_retro_model("nobody/none", RetroDatastore.from_pretrained(tmp_path / "d"))


def test_a_folder_names_no_datastore(packages, tmp_path):
    model = RetroJointForCausalLM.from_decoder_pretrained(packages[0])
    with pytest.raises(ValueError, match="Pass it to `push_to_hub`"):
        model.save_pretrained(tmp_path / "model", datastore="me/datastore")
    assert not (tmp_path / "model").exists()
