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
"""What a user of transformers does with a causal language model, done with RETRO."""

import copy

import pytest
import torch
from accelerate import init_empty_weights
from accelerate.utils import send_to_device
from safetensors.torch import load_file, save_file
from test_generation_retro import HashRetriever, left_padded, make_retro
from test_modeling_retro import CHUNK, VOCAB, assert_close, make_inputs, make_model
from transformers import AutoModel, AutoModelForCausalLM, CompileConfig, StaticCache, TextStreamer, pipeline
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_retro import RetroCache, RetroForCausalLM, RetroModel
from modeling_retro.modeling_retro import flash_sequence_lengths


def neighbor_inputs(batch_size=2, length=3 * CHUNK + 2):
    ids, neighbors, mask = make_inputs(batch_size, length)
    return {"input_ids": ids, "neighbor_input_ids": neighbors, "neighbor_attention_mask": mask}


@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings_serve_text_neighbors_and_head(tied):
    model = make_model(tie_word_embeddings=tied)
    inputs = neighbor_inputs()
    with torch.no_grad():
        before = model(**inputs).logits
        model.resize_token_embeddings(VOCAB + 7)
        after = model(**inputs).logits
        new = model(**inputs | {"neighbor_input_ids": inputs["neighbor_input_ids"] + 7}).logits
    assert after.shape[-1] == new.shape[-1] == VOCAB + 7
    assert_close(after[..., :VOCAB], before)
    assert model.config.vocab_size == VOCAB + 7 and new.isfinite().all()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_tied_head_and_embeddings_are_one_parameter_after_loading(tmp_path):
    model = make_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = RetroForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_loading_from_the_meta_device_restores_every_parameter_and_buffer(tmp_path):
    model = make_model(cross_attention_gate=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, RetroForCausalLM) and isinstance(base, RetroModel)
    for ours, restored in ((model, loaded), (model.model, base)):
        tensors = dict(restored.named_parameters()) | dict(restored.named_buffers())
        expected = dict(ours.named_parameters()) | dict(ours.named_buffers())
        assert tensors.keys() == expected.keys() and any("inv_freq" in name for name in tensors)
        for name, tensor in expected.items():
            assert_close(tensors[name].double(), tensor.double(), 1e-7)


def test_no_weights_are_allocated_under_init_empty_weights():
    config = make_model().config
    with init_empty_weights():
        model = RetroForCausalLM(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_weights_missing_from_a_checkpoint_are_initialised_as_in_a_new_model(tmp_path):
    fields = {"hidden_size": 64, "head_dim": 16, "qk_norm": True, "cross_attention_gate": True, "attention_bias": True}
    model = make_model(**fields, initializer_range=0.02).float()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({"model.norm.weight": weights["model.norm.weight"]}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = RetroForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)
    for name, parameter in loaded.named_parameters():
        if name.endswith((".gate", ".bias")):
            assert (parameter == 0).all(), name
        elif parameter.ndim == 1:
            assert name == "model.norm.weight" or (parameter == 1).all(), name
        else:
            assert 0.018 < parameter.std() < 0.022, name
    assert_close(loaded.model.neighbor_rotary_emb.inv_freq, model.model.neighbor_rotary_emb.inv_freq.float(), 1e-7)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_half_precision_is_close_to_single_precision(attn_implementation):
    model = make_model(attn_implementation=attn_implementation, initializer_range=0.1).float()
    inputs = neighbor_inputs()
    with torch.no_grad():
        expected = model(**inputs).logits
        off = model(inputs["input_ids"]).logits
        logits = model.bfloat16()(**inputs).logits
    assert logits.dtype == torch.bfloat16
    # 8 bits of mantissa: errors of a few percent, much less than what the neighbors change.
    error = (logits.float() - expected).abs().mean()
    assert error < 0.02 * expected.abs().mean() and error < 0.2 * (expected - off).abs().mean()


def test_generation_in_half_precision_scores_its_tokens_nearly_as_single_precision_does():
    model = make_retro(initializer_range=0.1).float()
    ids, mask = left_padded([2 * CHUNK + 1, CHUNK])
    reference = make_retro(initializer_range=0.1).float()
    output = model.bfloat16().generate(
        ids, attention_mask=mask, max_new_tokens=CHUNK + 2, do_sample=False, eos_token_id=None
    )
    longer = torch.cat([mask, torch.ones(2, CHUNK + 2, dtype=torch.long)], dim=1)
    with torch.no_grad():
        logits = reference(output, attention_mask=longer).logits[:, ids.shape[1] - 1 : -1]
    chosen = logits.gather(-1, output[:, ids.shape[1] :, None])[..., 0]
    assert (logits.amax(-1) - chosen).max() < 0.1 * logits.std()


def test_attentions_and_hidden_states_of_generation_are_the_decoders():
    model = make_retro(attn_implementation="eager")
    ids, mask = left_padded([2 * CHUNK, CHUNK])
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=CHUNK,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_attentions=True,
        output_hidden_states=True,
    )
    assert len(output.attentions) == len(output.hidden_states) == CHUNK
    for step in range(CHUNK):
        length, queries = 2 * CHUNK + step, 2 * CHUNK if step == 0 else 1
        assert [a.shape for a in output.attentions[step]] == [(2, 4, queries, length)] * 3
        assert [h.shape for h in output.hidden_states[step]] == [(2, queries, 16)] * 4


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_a_mask_of_four_dimensions_is_for_positions_that_count_on(attn_implementation):
    model = make_model(attn_implementation=attn_implementation)
    inputs = neighbor_inputs()
    length = inputs["input_ids"].shape[1]
    sees = torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(2, 1, length, length, dtype=torch.double).masked_fill(~sees, torch.finfo(torch.double).min)
    position_ids = torch.arange(length)[None]
    with torch.no_grad():
        assert_close(model(**inputs, attention_mask=mask, position_ids=position_ids).logits, model(**inputs).logits)
        # Two documents: the mask separates them as the positions do.
        cut = CHUNK + 1
        packed = torch.cat([torch.arange(cut), torch.arange(length - cut)])[None]
        apart = mask.clone()
        apart[..., cut:, :cut] = torch.finfo(torch.double).min
        expected = model(**inputs, position_ids=packed).logits
        assert_close(model(**inputs, attention_mask=apart, position_ids=packed).logits, expected)

        tree = position_ids.clone()
        tree[0, -1] = tree[0, -2]
        with pytest.raises(ValueError, match="position 12 follows 12 in row 0"):
            model(**inputs, attention_mask=mask, position_ids=tree)
        assert model(inputs["input_ids"], attention_mask=mask, position_ids=tree).logits.isfinite().all()


def test_a_compiled_training_step_equals_a_plain_one():
    """One graph, neighbors included: nothing in the forward pass reads the value of a tensor."""
    model = make_model().train()
    inputs = neighbor_inputs()
    gradients = []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        function(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient)


@pytest.mark.slow
def test_flex_attention_equals_sdpa():
    """Slow: flex attention is compiled."""
    fields = {"hidden_size": 64, "head_dim": 16}
    inputs = neighbor_inputs() | {"attention_mask": (torch.arange(3 * CHUNK + 2) >= torch.tensor([[0], [3]])).long()}
    with torch.no_grad():
        expected = make_model(**fields).float()(**inputs).logits
        logits = make_model(**fields, attn_implementation="flex_attention").float()(**inputs).logits
    is_token = inputs["attention_mask"].bool()
    assert_close(logits[is_token], expected[is_token], 1e-4)


def test_other_attention_functions_serve_the_decoder_and_sdpa_the_neighbors(monkeypatch):
    """So that flash attention, which knows no mask of neighbor tokens, can be used by the decoder."""
    called = []

    def spy(module, *args, **kwargs):
        called.append(type(module).__name__)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "spy", spy)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS, "spy", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model, inputs = make_model(), neighbor_inputs()
    with torch.no_grad():
        expected = model(**inputs).logits
        model.set_attn_implementation("spy")
        logits = model(**inputs).logits
    assert called == ["RetroSelfAttention"] * 3 and torch.equal(logits, expected)


def test_layers_may_be_on_several_devices():
    """As with `device_map`, whose hooks move the arguments of each block. The second device computes shapes only."""
    model, inputs = make_retro(), neighbor_inputs()
    blocks = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.neighbor_rotary_emb"), "cpu")
    blocks |= {"model.layers.0": "cpu", "model.layers.1": "meta", "model.layers.2": "meta"}
    blocks |= dict.fromkeys(("model.neighbor_encoder", "model.norm", "lm_head"), "meta")
    for name, device in blocks.items():

        def move(module, args, kwargs, device=device):
            skip_keys = model._skip_keys_device_placement
            return send_to_device(args, device), send_to_device(kwargs, device, skip_keys=skip_keys)

        model.get_submodule(name).to(device).register_forward_pre_hook(move, with_kwargs=True)

    def check(module, args, kwargs):
        hidden_states, neighbor_states, neighbors, _ = args
        fields = [
            field for value in vars(neighbors).values() for field in (value if type(value) is tuple else [value])
        ]
        tensors = [hidden_states, neighbor_states, *fields[1:], *vars(neighbors.layout).values()]
        assert {tensor.device.type for tensor in tensors if tensor is not None} == {"meta"}

    for layer in model.model.layers[1:]:
        layer.cross_attn.register_forward_pre_hook(check, with_kwargs=True)
    with torch.no_grad():
        outputs = model(**inputs)
        for length in (CHUNK + 1, 1):
            ids = inputs["input_ids"][:, :length]
            outputs = model(ids, past_key_values=outputs.past_key_values)
            assert outputs.logits.device.type == "meta" and outputs.logits.shape == (2, length, VOCAB)
    assert model.retriever.calls > 0


def slow_flash_attention(module, query, key, value, attention_mask, scaling, cu_seq_lens_q=None, **kwargs):
    """What the flash kernels compute for the arguments that transformers passes them."""
    (batch_size, heads, queries, _), keys = query.shape, key.shape[2]
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    is_seen = torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
    if cu_seq_lens_q is not None:
        cu_seq_lens_k = kwargs["cu_seq_lens_k"]
        assert attention_mask is None and len(cu_seq_lens_q) == len(cu_seq_lens_k)
        assert (kwargs["max_length_q"], kwargs["max_length_k"]) == (queries, keys)
        whole = torch.zeros(batch_size * queries, batch_size * keys, dtype=torch.bool)
        for sequence in range(len(cu_seq_lens_q) - 1):
            (first_q, end_q), (first_k, end_k) = (x[sequence : sequence + 2] for x in (cu_seq_lens_q, cu_seq_lens_k))
            # The last query of a sequence stands at its last key.
            places = torch.arange(end_q - first_q)[:, None] + (end_k - first_k) - (end_q - first_q)
            whole[first_q:end_q, first_k:end_k] = torch.arange(end_k - first_k) <= places
        whole = whole.unflatten(0, (batch_size, queries)).unflatten(2, (batch_size, keys))
        rows = torch.arange(batch_size)
        is_seen = whole[rows, :, rows][:, None]
        assert is_seen.sum() == whole.sum()  # no sequence reaches into another row
    elif attention_mask is not None:
        is_seen = is_seen & attention_mask.bool()[:, None, None]
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~is_seen, torch.finfo(query.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def test_lengths_for_flash_attention_of_packed_rows_that_continue_a_cache():
    """Documents that ended in the cache and padding are sequences without queries."""
    # Four cached tokens in each row. The first row continues its second document, the second row begins a third one.
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    lengths = flash_sequence_lengths(torch.tensor([[2, 0, 1], [0, 1, 2]]), mask)
    assert lengths["cu_seq_lens_k"].tolist() == [0, 2, 5, 7, 11, 14]
    assert lengths["cu_seq_lens_q"].tolist() == [0, 0, 1, 3, 3, 6]
    assert (lengths["max_length_q"], lengths["max_length_k"]) == (3, 7)
    assert lengths["cu_seq_lens_k"].dtype == lengths["cu_seq_lens_q"].dtype == torch.int32


def test_flash_attention_separates_packed_rows_that_continue_a_cache(monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", slow_flash_attention)
    model, flash = make_retro(), make_retro()
    flash.config._attn_implementation_internal = "flash_attention_2"
    ids = neighbor_inputs(length=4 * CHUNK)["input_ids"]
    packed = torch.cat([torch.arange(n) for n in (CHUNK + 3, CHUNK, 2 * CHUNK - 3)])
    positions = torch.stack([packed, torch.arange(4 * CHUNK)])
    left = torch.stack([torch.arange(4 * CHUNK) >= 3, torch.ones(4 * CHUNK, dtype=torch.bool)]).long()
    padded = torch.stack([torch.cat([torch.zeros(3, dtype=torch.long), packed[:-3]]), positions[1]])
    # The first row lacks the first token of its document, and padding stands in its place.
    short, lacking = left.clone(), positions.clone()
    short[0, :3], lacking[0] = torch.tensor([0, 1, 1]), torch.arange(4 * CHUNK)
    for mask, position_ids in ((None, positions), (left, padded), (short, lacking)):
        logits = {}
        for candidate in (model, flash):
            cache, parts, start = RetroCache(), [], 0
            for end in (CHUNK + 5, 3 * CHUNK, 3 * CHUNK + 1, 4 * CHUNK):
                with torch.no_grad():
                    outputs = candidate(
                        ids[:, start:end],
                        attention_mask=None if mask is None else mask[:, :end],
                        position_ids=position_ids[:, start:end],
                        past_key_values=cache,
                    )
                parts.append(outputs.logits)
                start = end
            logits[candidate] = torch.cat(parts, dim=1)
        is_token = torch.ones(2, 4 * CHUNK, dtype=torch.bool) if mask is None else mask.bool()
        assert_close(logits[flash][is_token], logits[model][is_token], 1e-7)
    holes = torch.ones(2, 4, dtype=torch.long)
    holes[0, 2] = 0
    with pytest.raises(ValueError, match="continues behind padding.*'sdpa'"):
        flash(ids[:, :4], attention_mask=holes, position_ids=holes.cumsum(-1) - 1)


def test_flash_attention_is_told_of_padding_and_of_documents_in_every_row(monkeypatch):
    """The kernels want a GPU; what they are asked to compute does not."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", slow_flash_attention)
    model, flash = make_retro(), make_retro()
    flash.config._attn_implementation_internal = "flash_attention_2"
    inputs = neighbor_inputs(length=4 * CHUNK)
    left, right = (torch.arange(4 * CHUNK) >= 3).long(), (torch.arange(4 * CHUNK) < 4 * CHUNK - 3).long()
    one, two = torch.arange(4 * CHUNK), torch.arange(2 * CHUNK).repeat(2)
    padded_two = torch.cat([torch.zeros(3, dtype=torch.long), two[:-3]])
    for mask, positions in (
        (torch.stack([left, right]), None),
        (None, torch.stack([one, two])),
        (None, two[None]),
        (torch.stack([left, torch.ones_like(left)]), torch.stack([padded_two, two])),
    ):
        given = inputs | {"attention_mask": mask, "position_ids": positions}
        with torch.no_grad():
            expected, logits = model(**given).logits, flash(**given).logits
        is_token = torch.ones(2, 4 * CHUNK, dtype=torch.bool) if mask is None else mask.bool()
        assert_close(logits[is_token], expected[is_token], 1e-7)
    ids, mask = left_padded([2 * CHUNK + 1, 2])
    arguments = {"max_new_tokens": CHUNK + 2, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, attention_mask=mask, **arguments)
    assert torch.equal(flash.generate(ids, attention_mask=mask, **arguments), expected)


def test_static_cache_generates_as_the_dynamic_one_without_retrieval():
    """Compiled too, in one graph. A static cache of transformers is refused by name with retrieval."""
    model = make_retro()
    ids, mask = left_padded([2 * CHUNK + 1, CHUNK])
    arguments = {"max_new_tokens": CHUNK, "do_sample": False, "eos_token_id": None, "attention_mask": mask}
    with model.retrieval(False):
        expected = model.generate(ids, **arguments)
        static = model.generate(ids, **arguments, cache_implementation="static", disable_compile=True)
        compile_config = CompileConfig(fullgraph=True, backend="eager", mode=None)
        compile_config._compile_all_devices = True
        compiled = model.generate(ids, **arguments, cache_implementation="static", compile_config=compile_config)
    assert torch.equal(static, expected) and torch.equal(compiled, expected)
    with pytest.raises(ValueError, match="StaticCache.*RetroCache"):
        model.generate(ids, **arguments, past_key_values=StaticCache(config=model.config, max_cache_len=64))


def test_pipeline_and_streamer_retrieve_like_generate(tiny_tokenizer, capsys):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    model = make_retro(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id).float()
    arguments = {"do_sample": False, "max_new_tokens": 2 * CHUNK, "eos_token_id": None}
    prompts = ["retro looks things up", "a δέλτα"]
    expected = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        expected.append(tokenizer.decode(model.generate(**inputs, **arguments)[0]))
    chunks = set(model.retriever.chunks)
    assert len(chunks) > 2

    model.set_retriever(HashRetriever())
    tokenizer.padding_side = "left"
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu", batch_size=2)
    texts = [rows[0]["generated_text"] for rows in generator(prompts, **arguments)]
    assert texts == expected and set(model.retriever.chunks) == chunks

    inputs = tokenizer(prompts[0], return_tensors="pt", return_token_type_ids=False)
    capsys.readouterr()
    model.generate(**inputs, **arguments, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out.rstrip("\n") == expected[0].rstrip("\n")


def test_generating_on_from_a_cache_takes_the_same_neighbors_of_the_prompt_again():
    """Neighbors belong to the chunks of the prompt, those that are already in the cache included."""
    model = make_model()
    ids, neighbors, neighbor_mask = make_inputs(2, 4 * CHUNK)
    mask = (torch.arange(4 * CHUNK) >= torch.tensor([[0], [CHUNK + 1]])).long()
    neighbor_mask[1, 2:] = False  # the second row has only two whole chunks
    arguments = {
        "neighbor_input_ids": neighbors,
        "neighbor_attention_mask": neighbor_mask,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    whole = model.generate(ids, attention_mask=mask, max_new_tokens=3, **arguments)
    for cached in (1, 2 * CHUNK - 1, 3 * CHUNK, 4 * CHUNK - 1):
        slots = min(cached // CHUNK, neighbors.shape[1])
        with torch.no_grad():
            cache = model(
                ids[:, :cached],
                attention_mask=mask[:, :cached],
                neighbor_input_ids=neighbors[:, :slots],
                neighbor_attention_mask=neighbor_mask[:, :slots],
                use_cache=True,
            ).past_key_values
        output = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=3, **arguments)
        assert torch.equal(output.sequences, whole.sequences)
        assert_close(torch.stack(output.logits), torch.stack(whole.logits), 1e-6)


def test_a_question_padded_to_chunks_is_looked_up_with_itself(tiny_datastore_dir):
    from modeling_retro import RetroRetriever

    retriever = RetroRetriever.from_pretrained(tiny_datastore_dir)
    tokenizer, chunk_size = retriever.datastore.tokenizer, retriever.datastore.chunk_size
    model = make_model(chunk_size=chunk_size, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id).float()
    question = tokenizer("retro looks", add_special_tokens=False)["input_ids"]
    assert len(question) % chunk_size != 0
    prompt = retriever.close_chunks([question])["input_ids"]
    asked = []

    class Recorder:
        def retrieve(self, chunk_input_ids, k):
            asked.append(chunk_input_ids)
            return retriever.retrieve(chunk_input_ids, k)

    model.set_retriever(Recorder())
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),  # the pads are real tokens
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    # The question's last chunk is looked up before the first token, whose logits it changes.
    assert asked[0][-1].tolist() == prompt[0, -chunk_size:].tolist()
    text = tokenizer.decode(asked[0][-1], skip_special_tokens=True)
    assert text and "retro looks".endswith(text)
    found = retriever.retrieve(asked[0], 2)
    assert output.retrieved_chunk_ids[0].tolist() == found.chunk_ids.tolist()
    with torch.no_grad(), model.retrieval(False):
        inputs = {
            "neighbor_input_ids": found.neighbor_input_ids[None],
            "neighbor_attention_mask": found.neighbor_attention_mask[None],
        }
        assert_close(output.logits[0], model(prompt, **inputs).logits[:, -1], 1e-5)
        assert (output.logits[0] - model(prompt).logits[:, -1]).abs().max() > 1e-3
