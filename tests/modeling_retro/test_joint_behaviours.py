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
"""What people run: adapters, quantised bases, half precision, compiled steps, pipelines, sharing"""

import copy

import pytest
import torch
from test_generation_retro import HashRetriever, left_padded
from test_modeling_retro import CHUNK, VOCAB, assert_close, make_inputs
from tiny_joint import make_decoder, make_joint
from transformers import LlamaConfig, LlamaForCausalLM, TextStreamer, pipeline

from modeling_retro import RetroJointCache, RetroJointConfig, RetroJointForCausalLM
from modeling_retro.sharing.model_card import save_model_card


def on_and_off(model, ids, neighbors, mask):
    with torch.no_grad():
        on = model(ids, neighbor_input_ids=neighbors, neighbor_attention_mask=mask).logits
        return on, model(ids).logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_half_precision_is_close_to_single_precision(dtype, attn_implementation):
    model = make_joint(attn_implementation=attn_implementation, initializer_range=0.1).float()
    inputs = make_inputs(2, 3 * CHUNK)
    expected, _ = on_and_off(model, *inputs)
    half = make_joint(attn_implementation=attn_implementation, initializer_range=0.1).to(dtype)
    on, off = on_and_off(half, *inputs)
    assert on.dtype == dtype
    assert_close(on.float(), expected, 0.05)
    decoder = make_decoder(attn_implementation=attn_implementation, initializer_range=0.1).to(dtype)
    with torch.no_grad():
        assert torch.equal(off, decoder(inputs[0]).logits)


def test_a_change_of_the_attention_reaches_the_decoder(tmp_path):
    model = make_joint()
    model.save_pretrained(tmp_path)
    for model in (model, RetroJointForCausalLM.from_pretrained(tmp_path)):
        assert model.config.text_config is model.decoder.config
        model.set_attn_implementation("eager")
        assert model.decoder.config._attn_implementation == "eager"


def test_autocast_reads_neighbors_in_its_own_precision():
    model = make_joint(initializer_range=0.1).float()
    ids, neighbors, mask = make_inputs(2, 3 * CHUNK)
    expected, _ = on_and_off(model, ids, neighbors, mask)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = on_and_off(model, ids, neighbors, mask)
    again, _ = on_and_off(model, ids, neighbors, mask)
    assert_close(found.float(), expected, 0.05)
    assert torch.equal(again, expected)  # nothing of bfloat16 was kept


def test_a_peft_model_is_wrapped_with_its_adapter():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(make_decoder(), config).double().eval()
    model = RetroJointForCausalLM.from_decoder(adapted, chunk_size=CHUNK)
    ids, neighbors, mask = make_inputs(2, 3 * CHUNK)
    on, off = on_and_off(model, ids, neighbors, mask)
    plain, _ = on_and_off(make_joint(), ids, neighbors, mask)
    with torch.no_grad():
        assert torch.equal(off, adapted(ids).logits)
    merged = RetroJointForCausalLM.from_decoder(adapted.merge_and_unload(), chunk_size=CHUNK)
    assert_close(on, on_and_off(merged, ids, neighbors, mask)[0], 1e-7)
    assert (on - plain).abs().max() > 1e-3
    prompt = peft.get_peft_model(make_decoder(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="prompt"):
        RetroJointForCausalLM.from_decoder(prompt, chunk_size=CHUNK)


def test_a_compiled_decoding_step_equals_a_plain_one():
    model = make_joint().float()
    ids, neighbors, _ = make_inputs(1, 2 * CHUNK)
    logits = []
    for compiled in (False, True):
        step = torch.compile(model, backend="eager", dynamic=True) if compiled else model
        cache = RetroJointCache()
        with torch.no_grad():
            model(ids[:, :CHUNK], neighbor_input_ids=neighbors[:, :1], past_key_values=cache)
            logits.append([step(ids[:, t : t + 1], past_key_values=cache).logits for t in range(CHUNK, 2 * CHUNK - 1)])
    for plain, compiled in zip(*logits, strict=True):
        assert_close(compiled, plain, 1e-5)


def test_flex_attention_equals_sdpa():
    ids, neighbors, mask = make_inputs(2, 3 * CHUNK)
    logits = []
    # The fused kernel for CPUs of torch 2.13 fails on masks that are read from a tensor, so the unfused one is run.
    with torch.compiler.set_stance("force_eager"):
        for attn_implementation in ("sdpa", "flex_attention"):
            decoder = make_decoder(hidden_size=64, head_dim=16).float()
            model = RetroJointForCausalLM.from_decoder(decoder, chunk_size=CHUNK)
            model.set_attn_implementation(attn_implementation)
            logits.append(on_and_off(model, ids, neighbors, mask))
    for sdpa, flex in zip(*logits, strict=True):
        assert_close(flex, sdpa, 5e-5)


def test_pipeline_and_streamer_retrieve_like_generate(tiny_tokenizer, capsys):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    model = make_joint(vocab_size=len(tokenizer)).float()
    model.set_retriever(HashRetriever())
    arguments = {"do_sample": False, "max_new_tokens": 2 * CHUNK, "eos_token_id": None}
    prompts = ["retro looks things up", "a δέλτα"]
    expected = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        expected.append(tokenizer.decode(model.generate(**inputs, **arguments)[0]))
    tokenizer.padding_side = "left"
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu", batch_size=2)
    assert [rows[0]["generated_text"] for rows in generator(prompts, **arguments)] == expected
    inputs = tokenizer(prompts[0], return_tensors="pt", return_token_type_ids=False)
    capsys.readouterr()
    model.generate(**inputs, **arguments, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out.rstrip("\n") == expected[0].rstrip("\n")


def test_the_card_says_who_reads_the_neighbors(tmp_path):
    make_joint().save_pretrained(tmp_path)
    save_model_card(tmp_path, name="alice/model")
    card = (tmp_path / "README.md").read_text()
    assert "the decoder's own attention (llama)" in card and "3 layers of width 16" in card


def test_a_datastore_of_another_tokenizer_is_refused():
    model = make_joint()

    class Other:
        def check_model(self, config):
            if config.vocab_size != VOCAB + 1:
                raise ValueError("another tokenizer")

    with pytest.raises(ValueError, match="another tokenizer"):
        model.set_retriever(Other())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_decoder_reads_neighbors(kind):
    quantization = pytest.importorskip("torchao.quantization")
    decoder = make_decoder(hidden_size=64, intermediate_size=128, head_dim=16, initializer_range=0.05).to(
        torch.bfloat16
    )
    config = quantization.Int8WeightOnlyConfig() if kind == "int8" else quantization.IntxWeightOnlyConfig(torch.int4)
    quantization.quantize_(decoder, config)
    model = RetroJointForCausalLM.from_decoder(decoder, chunk_size=CHUNK)
    on, off = on_and_off(model, *make_inputs(2, 3 * CHUNK))
    ids, mask = left_padded([CHUNK + 2, 3])
    with torch.no_grad():
        assert torch.equal(off, decoder(make_inputs(2, 3 * CHUNK)[0]).logits)
    assert (on - off).abs().max() > 0
    model.set_retriever(HashRetriever())
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=2 * CHUNK, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] <= ids.shape[1] + 2 * CHUNK


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", [{}, {"pad_to_multiple_of": 64}])
def test_tokens_are_added_as_to_the_decoder_alone(tied, options):
    def make():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=100, tie_word_embeddings=tied, **sizes)).eval()

    base, model = make(), RetroJointForCausalLM.from_decoder(make())
    for one in (base, model):
        torch.manual_seed(1)
        one.resize_token_embeddings(104, mean_resizing=False, **options)
    rows = base.get_input_embeddings().weight.shape[0]
    assert model.config.vocab_size == model.decoder.config.vocab_size == rows
    ids = torch.tensor([[99, 101, 103, 5]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits[..., :100], base(ids).logits[..., :100])
    assert model(ids).logits.shape[-1] == rows
    tie = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tie == tied


def test_the_size_of_the_vocabulary_can_be_set():
    config = RetroJointConfig(text_config=LlamaConfig(vocab_size=100))
    config.vocab_size = 104
    assert config.text_config.vocab_size == config.vocab_size == config.to_dict()["text_config"]["vocab_size"] == 104
