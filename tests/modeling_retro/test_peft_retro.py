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
"""PEFT on both kinds of RETRO model: LoRA that is trained, saved, loaded, merged and generated with."""

import pytest
import torch
from test_generation_retro import HashRetriever
from test_modeling_retro import CHUNK, make_inputs, make_model
from tiny_joint import make_decoder, make_joint

from modeling_retro import RetroForCausalLM, RetroJointForCausalLM


peft = pytest.importorskip("peft")

CROSS_ATTENTION = r".*cross_attn\.(q|k|v|o)_proj"
KINDS = {"cross": make_model, "joint": make_joint}


def make_base(kind, tmp_path):
    """A model that was loaded from a folder, which an adapter then names as its base."""
    KINDS[kind]().save_pretrained(tmp_path / "base")
    loader = RetroForCausalLM if kind == "cross" else RetroJointForCausalLM
    return loader.from_pretrained(tmp_path / "base", retriever=HashRetriever())


def add_lora(model, **fields):
    """LoRA whose matrices do something from the start."""
    torch.manual_seed(5)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **fields)).eval()


def adapted_layers(model):
    return {
        name.removeprefix("base_model.model.").split(".lora_A")[0]
        for name, _ in model.named_parameters()
        if "lora_A" in name
    }


@torch.no_grad()
def generate(model, ids):
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2 * CHUNK, do_sample=False, pad_token_id=0
    )


def test_lora_without_named_layers_adapts_queries_and_values_of_every_attention():
    layers = adapted_layers(add_lora(make_model()))
    attentions = [f"model.layers.{n}.self_attn" for n in range(3)] + [f"model.layers.{n}.cross_attn" for n in (1, 2)]
    attentions += [f"model.neighbor_encoder.layers.{n}.self_attn" for n in range(2)]
    attentions += ["model.neighbor_encoder.layers.0.chunk_attn"]
    assert layers == {f"{attention}.{name}" for attention in attentions for name in ("q_proj", "v_proj")}


def test_lora_without_named_layers_adapts_a_wrapped_decoder_where_it_adapts_the_decoder():
    for family, name in (("llama", "q_proj"), ("gpt_neox", "query_key_value"), ("llama", "v_proj")):
        alone = adapted_layers(add_lora(make_decoder(family)))
        assert alone and any(layer.endswith(name) for layer in alone)
        assert adapted_layers(add_lora(make_joint(family))) == {f"decoder.{layer}" for layer in alone}


@pytest.mark.parametrize(
    ("kind", "target"),
    [("cross", None), ("cross", "all-linear"), ("cross", CROSS_ATTENTION), ("joint", None), ("joint", "all-linear")],
)
def test_an_adapter_is_saved_loaded_merged_and_generated_with(kind, target, tmp_path):
    model = add_lora(make_base(kind, tmp_path), target_modules=target)
    ids, neighbors, mask = make_inputs(2, 3 * CHUNK + 1)
    inputs = {"input_ids": ids, "neighbor_input_ids": neighbors, "neighbor_attention_mask": mask}
    with torch.no_grad():
        on = model(**inputs).logits
        with model.disable_adapter():
            assert (model(**inputs).logits - on).abs().max() > 1e-3
    tokens = generate(model, ids)
    model.save_pretrained(tmp_path / "adapter")

    loaded = {
        "by PEFT": peft.PeftModel.from_pretrained(make_base(kind, tmp_path), tmp_path / "adapter").eval(),
        "by the model": type(model.get_base_model()).from_pretrained(tmp_path / "adapter", retriever=HashRetriever()),
    }
    for name, other in loaded.items():
        with torch.no_grad():
            assert torch.equal(other(**inputs).logits, on), name
        assert torch.equal(generate(other, ids), tokens), name

    merged = model.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, on, rtol=0, atol=1e-10)
    merged.save_pretrained(tmp_path / "merged")
    whole = type(merged).from_pretrained(tmp_path / "merged", retriever=HashRetriever())
    with torch.no_grad():
        assert torch.equal(whole(**inputs).logits, merged(**inputs).logits)
    assert torch.equal(generate(whole, ids), tokens)


def test_an_adapter_of_cross_attention_alone_leaves_the_model_without_neighbors_as_it_is():
    model = make_model()
    ids, neighbors, _ = make_inputs(2, 3 * CHUNK + 1)
    with torch.no_grad():
        off, on = model(ids).logits, model(ids, neighbor_input_ids=neighbors).logits
        adapted = add_lora(model, target_modules=CROSS_ATTENTION)
        assert torch.equal(adapted(input_ids=ids).logits, off)
        assert (adapted(input_ids=ids, neighbor_input_ids=neighbors).logits - on).abs().max() > 1e-3
