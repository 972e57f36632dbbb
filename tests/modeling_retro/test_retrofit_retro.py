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
from test_generation_retro import HashRetriever
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from modeling_retro import RetroForCausalLM


SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "llama-biases-tied": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama-3-rope": LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=None, head_dim=12),
    "mistral-window": MistralConfig(**SHAPE, sliding_window=5),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "smollm3": SmolLM3Config(**SHAPE, no_rope_layers=[1, 0, 1, 0], attention_bias=True, sliding_window=5),
    "granite": GraniteConfig(
        **SHAPE, embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.3, logits_scaling=1.7
    ),
    "qwen3-yarn": Qwen3Config(
        **SHAPE,
        head_dim=16,
        attention_bias=True,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
}
LAYERS = r"layer_types` of this .*sliding_attention.*RetroJointForCausalLM"
RETRO = {"chunk_size": 4, "cross_attention_layers": [1, 3], "neighbor_encoder_num_hidden_layers": 2}


def save_base(path, config):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in base.parameters():  # norms and biases differ from their neutral starts
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    base.save_pretrained(path)
    return base.eval()


def make_inputs():
    torch.manual_seed(1)
    return torch.randint(3, 60, (2, 14)), torch.randint(3, 60, (2, 3, 2, 8))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    return path, save_base(path, FAMILIES["llama"])


@pytest.mark.parametrize("warm_start", [True, False])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_retrofitted_model_starts_as_exactly_its_base(family, attn_implementation, warm_start, tmp_path):
    save_base(tmp_path, FAMILIES[family])
    arguments = {"attn_implementation": attn_implementation}
    base = AutoModelForCausalLM.from_pretrained(tmp_path, **arguments).eval()
    model = RetroForCausalLM.from_decoder_pretrained(tmp_path, warm_start=warm_start, **RETRO, **arguments)
    ids, neighbors = make_inputs()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        for inputs in ({}, {"attention_mask": mask}):
            expected = base(ids, **inputs).logits
            if inputs:  # the base counts padding unless it is told the positions, RETRO does not
                positions = (mask.cumsum(-1) - 1).clamp(min=0)
                expected = base(ids, position_ids=positions, **inputs).logits
            real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
            assert torch.equal(model(ids, **inputs).logits[real], expected[real])
            on = model(ids, neighbor_input_ids=neighbors, **inputs).logits
            assert torch.equal(on[real], expected[real])
        generated = base.generate(ids, max_new_tokens=12, do_sample=False)
        model.set_retriever(HashRetriever())
        model.retriever.retrieve(ids[:, :4], 2)
        assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), generated)


@pytest.mark.parametrize("warm_start", [True, False])
def test_open_gates_let_neighbors_in(llama, warm_start):
    model = RetroForCausalLM.from_decoder_pretrained(llama[0], warm_start=warm_start, **RETRO)
    ids, neighbors = make_inputs()
    with torch.no_grad():
        before = model(ids, neighbor_input_ids=neighbors).logits
        for layer_idx in (1, 3):
            model.model.layers[layer_idx].cross_attn.gate.fill_(0.5)
        assert (model(ids, neighbor_input_ids=neighbors).logits - before).abs().max() > 1e-3


def test_off_stays_exactly_the_base_while_the_frozen_model_learns(llama):
    path, base = llama
    model = RetroForCausalLM.from_decoder_pretrained(path, **RETRO).train()
    model.freeze_decoder()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    ids, neighbors = make_inputs()
    losses = []
    for _ in range(20):
        loss = model(ids, labels=ids, neighbor_input_ids=neighbors).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    model.eval()
    with torch.no_grad():
        expected = base(ids).logits
        assert torch.equal(model(ids).logits, expected)
        assert (model(ids, neighbor_input_ids=neighbors).logits - expected).abs().max() > 1e-2


def test_warm_start_copies_the_decoder(tmp_path):
    save_base(tmp_path, FAMILIES["qwen3-yarn"])
    model = RetroForCausalLM.from_decoder_pretrained(tmp_path, **RETRO).model
    assert model.config.neighbor_rope_theta == 1e4
    for layer_idx in (1, 3):
        layer = model.layers[layer_idx]
        for name in ("q_proj", "o_proj", "q_norm", "k_norm"):
            for copied, own in zip(
                getattr(layer.cross_attn, name).parameters(), getattr(layer.self_attn, name).parameters()
            ):
                assert torch.equal(copied, own)
        for name in ("k_proj", "v_proj"):
            copied, own = getattr(layer.cross_attn, name), getattr(layer.self_attn, name)
            assert torch.equal(copied.weight, own.weight * layer.input_layernorm.weight)
            assert torch.equal(copied.bias, own.bias)
        assert torch.equal(layer.cross_attn_layernorm.weight, layer.input_layernorm.weight)
        assert layer.cross_attn.gate.item() == 0
    for n, layer in enumerate(model.neighbor_encoder.layers):
        for name in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"):
            own = getattr(model.layers[n], name).state_dict()
            assert all(torch.equal(tensor, own[key]) for key, tensor in getattr(layer, name).state_dict().items())
    assert model.neighbor_encoder.layers[0].chunk_attn.o_proj.weight.abs().max() == 0


def test_warm_cross_attention_reads_neighbors_as_self_attention_reads_its_context(llama):
    """Without the encoder's layers in between, keys and values are those of the decoder's self-attention."""
    model = RetroForCausalLM.from_decoder_pretrained(llama[0], **RETRO).model
    states = torch.randn(2, 5, 32)
    layer = model.layers[3]
    own_keys, own_values = layer.self_attn.project_keys_values(layer.input_layernorm(states))
    keys, values = layer.cross_attn.project_keys_values(model.neighbor_encoder.norm(states))
    torch.testing.assert_close(keys, own_keys)
    torch.testing.assert_close(values, own_values)


@pytest.mark.parametrize("auto", [False, True])
def test_retrofit_only_weights_are_put_together_with_their_base(llama, tmp_path, auto):
    path, base = llama
    model = RetroForCausalLM.from_decoder_pretrained(path, **RETRO)
    model.freeze_decoder()
    with torch.no_grad():
        model.model.layers[1].cross_attn.gate.fill_(0.3)
    model.save_pretrained(tmp_path, retrofit_only=True)
    assert not (tmp_path / "model.safetensors").exists()
    added = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert (tmp_path / "retrofit.safetensors").stat().st_size < 4 * added + 10_000
    retriever = HashRetriever()
    loaded = (AutoModelForCausalLM if auto else RetroForCausalLM).from_pretrained(tmp_path, retriever=retriever)
    assert isinstance(loaded, RetroForCausalLM)
    ids, neighbors = make_inputs()
    with torch.no_grad():
        expected = model(ids, neighbor_input_ids=neighbors).logits
        assert torch.equal(loaded(ids, neighbor_input_ids=neighbors).logits, expected)
        with loaded.retrieval(False):
            assert torch.equal(loaded(ids).logits, base(ids).logits)
    loaded.save_pretrained(tmp_path / "again", retrofit_only=True)
    loaded.save_pretrained(tmp_path / "whole")
    whole = RetroForCausalLM.from_pretrained(tmp_path / "whole")
    with torch.no_grad():
        assert torch.equal(whole(ids, neighbor_input_ids=neighbors).logits, expected)


def test_another_base_is_refused(llama, tmp_path):
    model = RetroForCausalLM.from_decoder_pretrained(llama[0], **RETRO)
    model.freeze_decoder()
    model.save_pretrained(tmp_path / "retrofit", retrofit_only=True)
    other = AutoModelForCausalLM.from_config(FAMILIES["llama"])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"sha256 .* but those of .*other"):
        RetroForCausalLM.from_pretrained(tmp_path / "retrofit", base_model_name_or_path=tmp_path / "other")
    llama[1].save_pretrained(tmp_path / "moved")
    RetroForCausalLM.from_pretrained(tmp_path / "retrofit", base_model_name_or_path=tmp_path / "moved")


def test_retrofit_only_is_refused_when_the_decoder_may_have_changed(llama, tmp_path):
    model = RetroForCausalLM.from_decoder_pretrained(llama[0], **RETRO)
    with pytest.raises(ValueError, match="freeze_decoder"):
        model.save_pretrained(tmp_path, retrofit_only=True)
    with pytest.raises(ValueError, match="from_decoder_pretrained"):
        RetroForCausalLM(model.config.__class__(**SHAPE)).save_pretrained(tmp_path, retrofit_only=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=2), {}, LAYERS),
        (SmolLM3Config(**SHAPE, use_sliding_window=True, sliding_window=8), {}, LAYERS),
        (FAMILIES["mistral"], {"sliding_window": 8}, "sliding_window"),
        (FAMILIES["llama"], {"no_rope_layers": [1, 0, 1, 0]}, "no_rope_layers"),
        (FAMILIES["llama"], {"hidden_size": 64}, "hidden_size"),
        (FAMILIES["llama"], {"neighbor_encoder_hidden_size": 16}, "neighbor_encoder_hidden_size"),
        (FAMILIES["llama"], {"neighbor_encoder_num_hidden_layers": 5}, "neighbor_encoder_num_hidden_layers"),
    ],
    ids=["qwen2-window", "smollm3-window", "other-window", "other-positions", "fixed", "narrow-warm", "deep-warm"],
)
def test_what_cannot_be_represented_is_refused_by_name(config, fields, message, tmp_path):
    save_base(tmp_path, config)
    with pytest.raises(ValueError, match=message):
        RetroForCausalLM.from_decoder_pretrained(tmp_path, **RETRO | fields)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma", "olmo2", "phi3"])
def test_other_model_types_are_refused_and_shown_the_way(model_type, tmp_path):
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"model_type` is '{model_type}'.*RetroJointForCausalLM"):
        RetroForCausalLM.from_decoder_pretrained(tmp_path)


def test_a_sliding_window_is_the_bases_in_packed_rows_and_with_a_cache(tmp_path):
    base = save_base(tmp_path, FAMILIES["mistral-window"])
    model = RetroForCausalLM.from_decoder_pretrained(tmp_path, **RETRO)
    assert model.config.sliding_window == 5
    ids = make_inputs()[0]
    positions = torch.cat([torch.arange(8), torch.arange(6)])[None].expand(2, -1)
    with torch.no_grad():
        alone = base(ids[:, 8:]).logits
        torch.testing.assert_close(model(ids, position_ids=positions).logits[:, 8:], alone, rtol=0, atol=1e-5)
        expected = base(ids).logits
        cache = model(ids[:, :9]).past_key_values
        steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(9, 14)]
        torch.testing.assert_close(torch.cat(steps, dim=1), expected[:, 9:], rtol=0, atol=1e-5)
        cache.crop(-9)  # further back than the window reaches
        again = model(ids[:, 5:], past_key_values=cache).logits
        torch.testing.assert_close(again, expected[:, 5:], rtol=0, atol=1e-5)
        unlimited = RetroForCausalLM.from_decoder_pretrained(tmp_path, sliding_window=None, **RETRO)
        assert unlimited.config.sliding_window is None
        opened = AutoModelForCausalLM.from_pretrained(tmp_path, sliding_window=None)
        assert torch.equal(unlimited(ids).logits, opened(ids).logits)
        assert (opened(ids).logits - expected).abs().max() > 1e-3


def test_neighbors_are_scaled_like_the_row(tmp_path):
    """In a Granite the embeddings of the neighbors and what the encoder's layers add are scaled too."""
    save_base(tmp_path, FAMILIES["granite"])
    model = RetroForCausalLM.from_decoder_pretrained(tmp_path, **RETRO).model
    ids, neighbors = make_inputs()
    seen = {}
    layer = model.neighbor_encoder.layers[0]
    layer.register_forward_pre_hook(lambda module, args: seen.update(embeds=args[0]))
    layer.mlp.register_forward_hook(lambda module, args, output: seen.update(mlp=output))
    layer.mlp.register_forward_pre_hook(lambda module, args: seen.update(normed=args[0]))
    layer.register_forward_hook(lambda module, args, output: seen.update(output=output))
    with torch.no_grad():
        model(ids, neighbor_input_ids=neighbors)
        embeds = 3.0 * model.embed_tokens(neighbors).flatten(0, 2)
        assert torch.equal(seen["embeds"], embeds)
        states = layer.input_layernorm(embeds)
        positions = model.neighbor_rotary_emb(embeds, torch.arange(8))
        before = embeds + 0.3 * layer.self_attn(states, states, positions, positions)
        torch.testing.assert_close(seen["normed"], layer.post_attention_layernorm(before))
        torch.testing.assert_close(seen["output"], before + 0.3 * seen["mlp"])
        assert layer.self_attn.scaling == 0.2
