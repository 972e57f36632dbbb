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
import pytest
import torch
from tiny_models import tiny_llama
from transformers import LlamaForCausalLM

from modeling_retro import RetroForCausalLM, RetroJointForCausalLM
from trainers.scripts.retrofit import main


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_tokenizer):
    path = tmp_path_factory.mktemp("base")
    fields = {"num_hidden_layers": 3, "num_key_value_heads": 1, "eos_token_id": tiny_tokenizer.eos_token_id}
    tiny_llama(len(tiny_tokenizer), **fields).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("retrofit_only", ["true", "false"])
def test_the_command_makes_a_model_that_equals_its_base(base, tmp_path, retrofit_only):
    options = ["--cross-attention-layers", "1", "2", "--chunk-size", "4", "--retrofit-only", retrofit_only]
    main(["--base", str(base), "--output-dir", str(tmp_path / "model"), *options])
    model = RetroForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert (tmp_path / "model" / "tokenizer.json").exists()
    assert (tmp_path / "model" / "model.safetensors").exists() == (retrofit_only == "false")
    assert model.config.cross_attention_layers == [1, 2] and model.config.chunk_size == 4
    ids = torch.randint(0, model.config.vocab_size, (1, 9))
    neighbors = torch.randint(0, model.config.vocab_size, (1, 2, 2, 8))
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(base).eval()(ids).logits
        assert torch.equal(model(ids, neighbor_input_ids=neighbors).logits, expected)


@pytest.mark.parametrize("retrofit_only", ["true", "false"])
def test_the_command_wraps_a_model_that_reads_neighbors_untrained(base, tmp_path, retrofit_only):
    options = ["--attention", "joint", "--chunk-size", "4", "--retrofit-only", retrofit_only]
    main(["--base", str(base), "--output-dir", str(tmp_path / "model"), *options])
    model = RetroJointForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert (tmp_path / "model" / "tokenizer.json").exists() and model.config.tokenizer_sha256 is not None
    assert (tmp_path / "model" / "model.safetensors").exists() == (retrofit_only == "false")
    ids = torch.randint(0, model.config.vocab_size, (1, 9))
    neighbors = torch.randint(0, model.config.vocab_size, (1, 2, 2, 8))
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(base).eval()(ids).logits
        assert torch.equal(model(ids).logits, expected)
        assert not torch.equal(model(ids, neighbor_input_ids=neighbors).logits, expected)


def test_a_folder_that_holds_something_is_left_alone(base, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="not empty"):
        main(["--base", str(base), "--output-dir", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
