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
"""Retrofits of quantised decoders: without neighbors they are the quantised decoder, what is added stays plain."""

import numpy as np
import pytest
import torch
from test_generation_retro import HashRetriever
from test_retrofit_retro import RETRO, SHAPE, make_inputs, save_base
from transformers import AutoModelForCausalLM, LlamaConfig, TorchAoConfig, Trainer, TrainingArguments

from modeling_retro import RetroForCausalLM, RetroJointForCausalLM


CONFIG = LlamaConfig(**SHAPE | {"hidden_size": 64, "intermediate_size": 96}, tie_word_embeddings=True)


def torchao_config(kind):
    quantization = pytest.importorskip("torchao.quantization")
    if kind == "int8":
        return TorchAoConfig(quantization.Int8WeightOnlyConfig())
    from torchao.quantization.granularity import PerGroup

    return TorchAoConfig(quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))


def assert_starts_as(model, base):
    ids, neighbors = make_inputs()
    with torch.no_grad():
        expected = base.eval()(ids).logits
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model(ids, neighbor_input_ids=neighbors).logits, expected)
    return expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_retrofit_of_a_quantised_decoder_starts_as_exactly_it_and_only_what_is_added_learns(kind, dtype, tmp_path):
    save_base(tmp_path, CONFIG)
    arguments = {"quantization_config": torchao_config(kind), "dtype": dtype}
    base = AutoModelForCausalLM.from_pretrained(tmp_path, **arguments)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    model = RetroForCausalLM.from_decoder_pretrained(tmp_path, **RETRO, **arguments)
    off = assert_starts_as(model, base)
    ids, neighbors = make_inputs()
    assert not torch.equal(plain(ids).logits, off)
    for name, parameter in model.named_parameters():
        is_quantized = type(parameter.data) is not torch.Tensor
        is_layer = name.endswith("_proj.weight") and not model.is_added_weight(name)
        assert is_quantized == is_layer and parameter.dtype == dtype, name
    # A warm start copies what the quantised layer computes.
    layer = model.model.layers[3]
    states = torch.randn(5, 64, dtype=dtype)
    torch.testing.assert_close(layer.cross_attn.q_proj(states), layer.self_attn.q_proj(states), rtol=0.05, atol=0.05)

    model.freeze_decoder()
    trainer = Trainer(
        model.train(),
        TrainingArguments(str(tmp_path), use_cpu=True, save_strategy="no", max_steps=5, learning_rate=1e-2),
        train_dataset=[{"input_ids": ids[0], "labels": ids[0], "neighbor_input_ids": neighbors[0]}] * 2,
    )
    trainer.train()
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, off)
        on = model(ids, neighbor_input_ids=neighbors).logits
        assert (on - off).abs().max() > 1e-3
        model.set_retriever(HashRetriever())
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False)

    with pytest.raises(ValueError, match="retrofit_only=True"):
        model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "added", retrofit_only=True)
    loaded = RetroForCausalLM.from_pretrained(tmp_path / "added", retriever=HashRetriever(), **arguments)
    with torch.no_grad():
        assert torch.equal(loaded(ids, neighbor_input_ids=neighbors).logits, on)
        assert torch.equal(loaded.generate(ids, max_new_tokens=8, do_sample=False), tokens)


def test_a_decoder_that_was_saved_quantised_is_taken_as_it_is(tmp_path):
    save_base(tmp_path / "plain", CONFIG)
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=torchao_config("int8"))
    quantized.save_pretrained(tmp_path / "int8")
    assert_starts_as(RetroForCausalLM.from_decoder_pretrained(tmp_path / "int8", **RETRO), quantized)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["cross", "joint"])
@pytest.mark.parametrize("retrofit_only", [True, False])
def test_a_loaded_model_can_be_quantised_by_hand(kind, tied, retrofit_only, tmp_path):
    """Its weights may be tied, and lie in the file that they were loaded from."""
    quantization = pytest.importorskip("torchao.quantization")
    config = LlamaConfig(**CONFIG.to_dict() | {"tie_word_embeddings": tied})
    save_base(tmp_path / "base", config)
    loader, fields = (RetroForCausalLM, RETRO) if kind == "cross" else (RetroJointForCausalLM, {"chunk_size": 4})
    model = loader.from_decoder_pretrained(tmp_path / "base", **fields)
    model.freeze_decoder()
    model.save_pretrained(tmp_path / "model", retrofit_only=retrofit_only)
    model = loader.from_pretrained(tmp_path / "model", retriever=HashRetriever())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    for each in (model, base):
        quantization.quantize_(each, quantization.Int8WeightOnlyConfig())
    ids = make_inputs()[0]
    with torch.no_grad(), model.retrieval(False):
        assert torch.equal(model(ids).logits, base(ids).logits)
    assert model.generate(ids, max_new_tokens=8, do_sample=False).shape[1] > ids.shape[1]


def write_gguf(path, config):
    """A random Llama in GGUF, its linear layers in 8-bit blocks of 32."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    generator = np.random.default_rng(0)

    def add(name, *shape):
        weight = generator.normal(size=shape).astype(np.float32) * (0.2 if len(shape) == 2 else 1.0)
        if len(shape) == 1 or name == "token_embd":
            writer.add_tensor(f"{name}.weight", weight)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)

    size, inner = config.hidden_size, config.intermediate_size
    key_value_size = config.num_key_value_heads * config.head_dim
    add("token_embd", config.vocab_size, size)
    add("output_norm", size)
    add("output", config.vocab_size, size)
    for n in range(config.num_hidden_layers):
        for name, *shape in (
            ("attn_norm", size),
            ("attn_q", size, size),
            ("attn_k", key_value_size, size),
            ("attn_v", key_value_size, size),
            ("attn_output", size, size),
            ("ffn_norm", size),
            ("ffn_gate", inner, size),
            ("ffn_up", inner, size),
            ("ffn_down", size, inner),
        ):
            add(f"blk.{n}.{name}", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_retrofit_of_a_gguf_file_is_saved_as_a_reference_to_it(tmp_path):
    write_gguf(tmp_path / "base.gguf", CONFIG)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="base.gguf")
    model = RetroForCausalLM.from_decoder_pretrained(tmp_path, gguf_file="base.gguf", **RETRO)
    off = assert_starts_as(model, base)
    model.freeze_decoder()
    with torch.no_grad():
        model.model.layers[1].cross_attn.gate.fill_(0.5)
    model.save_pretrained(tmp_path / "added", retrofit_only=True)
    loaded = RetroForCausalLM.from_pretrained(tmp_path / "added", gguf_file="base.gguf")
    ids, neighbors = make_inputs()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, off)
        on = model(ids, neighbor_input_ids=neighbors).logits
        assert (on - off).abs().max() > 1e-3
        assert torch.equal(loaded(ids, neighbor_input_ids=neighbors).logits, on)
        # Its weights are plain ones: the whole model can be saved as well.
        loaded.save_pretrained(tmp_path / "whole")
        assert torch.equal(RetroForCausalLM.from_pretrained(tmp_path / "whole")(ids).logits, off)
