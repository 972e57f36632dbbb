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
"""A saved model carries its code: it loads where this package is not installed, and its classes win where it is."""

import json
import os
import subprocess
import sys

import pytest
import torch
from test_modeling_retro import CHUNK, VOCAB, assert_close, make_model
from tiny_joint import make_joint
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from modeling_retro import RetrievedNeighbors, RetroConfig, RetroForCausalLM, RetroModel


# Refuses to import the package and what only retrieval needs, as where they are not installed.
WITHOUT_PACKAGE = """
import json, sys

HIDDEN = {"modeling_retro", "data_prep", "trainers", "faiss", "datasets", "pyarrow", "sentence_transformers"}

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

folder, copy, ids = sys.argv[1], sys.argv[2], torch.tensor(json.loads(sys.argv[3]))
arguments = {"trust_remote_code": True, "dtype": torch.float64}
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
has_base = "AutoModel" in config.auto_map  # a wrapped decoder is its own base
base = AutoModel.from_pretrained(folder, **arguments).eval() if has_base else None
model = AutoModelForCausalLM.from_pretrained(folder, **arguments).eval()
with torch.no_grad():
    logits, states = model(ids).logits, base(ids).last_hidden_state if has_base else model(ids).logits
tokens = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
model.save_pretrained(copy)

# A retriever is any object with `retrieve`; the one over a datastore needs the package.
class Neighbors:
    def retrieve(self, chunks, k):
        self.neighbor_input_ids = ids[:1, None, :4].expand(len(chunks), k, 4)
        self.neighbor_attention_mask = torch.ones_like(self.neighbor_input_ids)
        return self

model.set_retriever(Neighbors())
with_neighbors = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
model.config.datastore_name_or_path = "datastore"
try:
    model.open_retriever("auto")
except ImportError as error:
    refusal = str(error)
classes = [type(thing).__name__ for thing in (config, base, model)]
modules = [type(thing).__module__.split(".")[0] for thing in (config, base, model)]
imported = sorted(HIDDEN & {name.split(".")[0] for name in sys.modules})
numbers = [logits.tolist(), states.tolist(), tokens.tolist(), with_neighbors.tolist()]
print(json.dumps([classes, modules, *numbers, imported, refusal]))
"""


class SameNeighbors:
    """Gives every chunk the same neighbors."""

    def __init__(self, tokens):
        self.tokens = tokens

    def retrieve(self, chunks, k):
        neighbors = self.tokens.expand(len(chunks), k, -1)
        return RetrievedNeighbors(neighbors, torch.ones_like(neighbors))


# The files of code in a saved model. Whoever loads one with `trust_remote_code` reads these and no others.
SHIPPED_BY_BOTH = {
    "added_weights_retro.py",
    "cache_retro.py",
    "chunk_layout_retro.py",
    "drafts_retro.py",
    "durable_files_retro.py",
    "generation_retro.py",
    "lora_targets_retro.py",
    "loss_retro.py",
    "model_hub_retro.py",
    "neighbors_retro.py",
}
SHIPPED_BY_RETRO = SHIPPED_BY_BOTH | {
    "configuration_retro.py",
    "cross_cache_retro.py",
    "modeling_retro.py",
    "retrofit_retro.py",
}
SHIPPED_BY_JOINT = SHIPPED_BY_BOTH | {
    "attention_retro.py",
    "configuration_retro_joint.py",
    "joint_attention_retro.py",
    "joint_cache_retro.py",
    "joint_call_retro.py",
    "joint_layout_retro.py",
    "joint_reading_retro.py",
    "modeling_retro_joint.py",
    "neighbor_memory_retro.py",
    "reader_adapters_retro.py",
}


@pytest.mark.parametrize(
    ("make", "shipped", "most_lines"),
    [(make_model, SHIPPED_BY_RETRO, 4000), (make_joint, SHIPPED_BY_JOINT, 5420)],
    ids=["RetroForCausalLM", "RetroJointForCausalLM"],
)
def test_what_ships_with_a_saved_model(tmp_path, make, shipped, most_lines):
    make().save_pretrained(tmp_path)
    files = {file.name: len(file.read_text().splitlines()) for file in tmp_path.glob("*.py")}
    assert files.keys() == shipped
    assert sum(files.values()) <= most_lines, files


def run_without_package(tmp_path, folder, copy, ids):
    arguments = [str(folder), str(copy), json.dumps(ids.tolist())]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT_PACKAGE, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize("saved_class", ["RetroForCausalLM", "RetroModel"])
def test_all_auto_classes_are_named_in_a_saved_model(tmp_path, saved_class):
    model = make_model()
    (model if saved_class == "RetroForCausalLM" else model.model).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_retro.RetroConfig",
        "AutoModel": "modeling_retro.RetroModel",
        "AutoModelForCausalLM": "modeling_retro.RetroForCausalLM",
    }


def test_loads_without_the_package_and_gives_the_same_logits_and_generation(tmp_path):
    model = make_model(cross_attention_gate=True, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "saved")
    ids = torch.randint(1, VOCAB, (2, 2 * CHUNK + 1))
    classes, modules, logits, states, tokens, with_neighbors, imported, refusal = run_without_package(
        tmp_path, tmp_path / "saved", tmp_path / "copy", ids
    )
    assert classes == ["RetroConfig", "RetroModel", "RetroForCausalLM"]
    assert modules == ["transformers_modules"] * 3 and imported == []
    with torch.no_grad():
        assert_close(torch.tensor(logits, dtype=torch.float64), model(ids).logits)
        assert_close(torch.tensor(states, dtype=torch.float64), model.model(ids).last_hidden_state)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert tokens == expected.tolist()
    assert "pip install retro-transformers" in refusal
    model.set_retriever(SameNeighbors(ids[0, :4]))
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert with_neighbors == expected.tolist() != tokens
    model.set_retriever(None)
    # What was saved there is as complete as what was loaded.
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {
        path.name for path in (tmp_path / "saved").iterdir()
    }
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    with torch.no_grad():
        assert_close(again.eval()(ids).logits, model(ids).logits)


def test_a_wrapped_decoder_loads_without_the_package(tmp_path):
    model = make_joint()
    model.save_pretrained(tmp_path / "saved")
    ids = torch.randint(1, VOCAB, (2, 2 * CHUNK + 1))
    classes, modules, logits, _, tokens, with_neighbors, imported, refusal = run_without_package(
        tmp_path, tmp_path / "saved", tmp_path / "copy", ids
    )
    assert classes == ["RetroJointConfig", "NoneType", "RetroJointForCausalLM"] and imported == []
    assert modules[0] == modules[2] == "transformers_modules"
    with torch.no_grad():
        assert_close(torch.tensor(logits, dtype=torch.float64), model(ids).logits)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert tokens == expected.tolist()
    assert "pip install retro-transformers" in refusal
    model.set_retriever(SameNeighbors(ids[0, :4]))
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert with_neighbors == expected.tolist() != tokens
    model.set_retriever(None)
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {
        path.name for path in (tmp_path / "saved").iterdir()
    }


def test_installed_classes_win_over_the_code_of_the_model(tmp_path):
    make_model().save_pretrained(tmp_path)
    for trust_remote_code in (None, True):
        arguments = {"trust_remote_code": trust_remote_code}
        assert type(AutoConfig.from_pretrained(tmp_path, **arguments)) is RetroConfig
        assert type(AutoModel.from_pretrained(tmp_path, **arguments)) is RetroModel
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path, **arguments)) is RetroForCausalLM
