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
from test_generation_retro import HashRetriever, left_padded
from test_modeling_retro import CHUNK, LENGTH, VOCAB, assert_close, make_inputs
from tiny_joint import FAMILIES, make_decoder, make_joint, slow_joint_logits
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from modeling_retro import RetroJointCache, RetroJointForCausalLM


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("reread_tokens", [0, 2, CHUNK])
def test_reading_neighbors_equals_one_sequence_of_neighbors_and_row(family, attn_implementation, reread_tokens):
    model = make_joint(family, attn_implementation=attn_implementation, reread_tokens=reread_tokens)
    ids, neighbors, mask = make_inputs(2, 3 * CHUNK + 2)
    with torch.no_grad():
        logits = model(ids, neighbor_input_ids=neighbors, neighbor_attention_mask=mask).logits
        off = model(ids).logits
        expected = [slow_joint_logits(model, ids[row], neighbors[row], mask[row]) for row in range(2)]
    assert (logits - off).abs().max() > 1e-3
    # In eager attention the softmax is float32.
    tolerance = 1e-7 if model.decoder.config._attn_implementation == "sdpa" else 5e-6
    assert_close(logits, torch.stack(expected), tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_neighbors_the_model_is_its_decoder_to_the_bit(family):
    # In float64, transformers' eager attention makes padding NaN.
    model, decoder = make_joint(family, reread_tokens=CHUNK).float(), make_decoder(family).float()
    ids, mask = left_padded([3 * CHUNK + 2, CHUNK + 1])
    _, neighbors, _ = make_inputs(2, ids.shape[1])
    with torch.no_grad():
        for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask, "labels": ids}):
            expected = decoder(**inputs)
            masked = torch.zeros_like(neighbors, dtype=torch.bool)
            for given in (
                {},
                {"neighbor_input_ids": neighbors, "neighbor_attention_mask": masked},
                {"neighbor_input_ids": neighbors[:, :, :0]},
                {"neighbor_input_ids": neighbors[:, :0]},
            ):
                found = model(**inputs, **given)
                assert torch.equal(found.logits, expected.logits)
        if "labels" in inputs:
            assert_close(found.loss, expected.loss, 1e-5)
    arguments = {"attention_mask": mask, "max_new_tokens": 2 * CHUNK, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **arguments), decoder.generate(ids, **arguments))


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma3", "gpt_neox", "qwen3-moe"])
@pytest.mark.parametrize("step", [1, 3, CHUNK + 1])
@pytest.mark.parametrize("reread_tokens", [0, CHUNK])
def test_cached_equals_uncached_in_every_kind_of_layer(family, step, reread_tokens):
    model = make_joint(family, reread_tokens=reread_tokens)
    model.set_retriever(HashRetriever())
    ids, mask = left_padded([5 * CHUNK + 1, 3 * CHUNK, 2])
    cache, logits = RetroJointCache(), []
    with torch.no_grad():
        for start in range(0, ids.shape[1], step):
            end = min(ids.shape[1], start + step)
            logits.append(model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
        logits = torch.cat(logits, dim=1)
        for row in range(3):
            alone = model(ids[row, mask[row].bool()][None], use_cache=False).logits[0]
            assert_close(logits[row, mask[row].bool()], alone, 1e-7)


def test_order_of_neighbors_does_not_matter():
    model = make_joint()
    ids, neighbors, mask = make_inputs(2, 3 * CHUNK + 2, k=3)
    with torch.no_grad():
        logits = model(ids, neighbor_input_ids=neighbors, neighbor_attention_mask=mask).logits
        order = [2, 0, 1]
        other = model(ids, neighbor_input_ids=neighbors[:, :, order], neighbor_attention_mask=mask[:, :, order]).logits
    assert_close(logits, other)


def test_first_and_last_token_that_see_the_neighbors_of_a_chunk():
    model = make_joint(num_hidden_layers=1)
    ids, neighbors, _ = make_inputs(1, 3 * CHUNK)
    other = neighbors.clone()
    other[:, 1] = (other[:, 1] + 1) % VOCAB
    with torch.no_grad():
        changed = (model(ids, neighbor_input_ids=neighbors).logits != model(ids, neighbor_input_ids=other).logits).any(
            -1
        )
    # In one layer, only the tokens that see the second chunk's neighbors themselves change.
    assert changed[0].nonzero()[:, 0].tolist() == list(range(2 * CHUNK - 1, 3 * CHUNK - 1))


def test_what_masked_neighbor_tokens_hold_does_not_matter():
    model = make_joint()
    ids, neighbors, mask = make_inputs(2, 3 * CHUNK)
    for shape in (mask, mask.flip(-1)):  # padding behind, as datastores have it, and in front
        other = torch.where(shape, neighbors, (neighbors + 1) % VOCAB)
        with torch.no_grad():
            logits = [
                model(ids, neighbor_input_ids=given, neighbor_attention_mask=shape).logits
                for given in (neighbors, other)
            ]
        assert_close(*logits)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("reread_tokens", [0, CHUNK])
def test_packed_documents_equal_documents_alone(use_cache, reread_tokens):
    model = make_joint(reread_tokens=reread_tokens)
    ids, neighbors, mask = make_inputs(2, 5 * CHUNK)
    # Documents of two chunks, one and a half (padded to two), and one.
    position_ids = torch.cat([torch.arange(2 * CHUNK), torch.arange(2 * CHUNK), torch.arange(CHUNK)]).expand(2, -1)
    with torch.no_grad():
        for given in ({}, {"neighbor_input_ids": neighbors, "neighbor_attention_mask": mask}):
            logits = model(ids, position_ids=position_ids, use_cache=use_cache, **given).logits
            for start, end in ((0, 2), (2, 4), (4, 5)):
                own = {name: value[:, start:end] for name, value in given.items()}
                alone = model(ids[:, start * CHUNK : end * CHUNK], use_cache=False, **own).logits
                assert_close(logits[:, start * CHUNK : end * CHUNK], alone)


@pytest.mark.parametrize("reread_tokens", [0, CHUNK])
def test_a_second_call_keeps_packed_documents_apart(reread_tokens):
    model = make_joint(reread_tokens=reread_tokens)
    ids, neighbors, mask = make_inputs(1, 4 * CHUNK)
    position_ids = torch.cat([torch.arange(CHUNK), torch.arange(3 * CHUNK)])[None]
    cut = 2 * CHUNK + 1
    with torch.no_grad():
        for given in (False, True):
            cache, logits = RetroJointCache(), []
            for start, end, slots in ((0, cut, slice(0, 2)), (cut, cut + 1, slice(0, 0)), (cut + 1, 16, slice(2, 4))):
                neighbor_inputs = {}
                if given and slots.stop > slots.start:
                    neighbor_inputs = {
                        "neighbor_input_ids": neighbors[:, slots],
                        "neighbor_attention_mask": mask[:, slots],
                    }
                outputs = model(
                    ids[:, start:end],
                    position_ids=position_ids[:, start:end],
                    past_key_values=cache,
                    **neighbor_inputs,
                )
                logits.append(outputs.logits)
            own = {"neighbor_input_ids": neighbors[:, 1:], "neighbor_attention_mask": mask[:, 1:]} if given else {}
            alone = model(ids[:, CHUNK:], use_cache=False, **own).logits
            assert_close(torch.cat(logits, dim=1)[:, CHUNK:], alone)


@pytest.mark.parametrize("reread_tokens", [2, CHUNK])
def test_a_prompt_that_is_read_once_leaves_what_one_leaves_that_is_predicted(reread_tokens):
    model = make_joint(reread_tokens=reread_tokens)
    model.set_retriever(HashRetriever())
    ids, mask = left_padded([4 * CHUNK, 3 * CHUNK + 2, CHUNK - 1])
    caches, logits = [], []
    with torch.no_grad():
        for kept in (0, 1):
            caches.append(RetroJointCache())
            inputs = {"attention_mask": mask, "past_key_values": caches[-1], "logits_to_keep": kept}
            logits.append(model(ids, **inputs).logits[:, -1])
    assert_close(*logits)
    kept = torch.cat([caches[0].front_mask, mask.bool()], dim=1)[:, None, :, None]
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        assert_close(one.keys * kept, other.keys * kept)
        assert_close(one.values * kept, other.values * kept)


def test_what_reads_neighbors_is_never_told_what_it_predicts():
    """The neighbors of a chunk change no prediction inside it, though its tokens are read with them in sight."""
    model = make_joint(reread_tokens=CHUNK)
    ids, neighbors, _ = make_inputs(1, 3 * CHUNK)
    other = neighbors.clone()
    other[:, 1] = (other[:, 1] + 1) % VOCAB
    with torch.no_grad():
        before, after = (model(ids, neighbor_input_ids=given).logits for given in (neighbors, other))
    changed = (before - after).abs().amax(-1)[0] > 1e-9
    assert changed.nonzero()[:, 0].tolist() == list(range(2 * CHUNK - 1, 3 * CHUNK))


def count_read_neighbors(model):
    counts = []
    encode = model._encode_neighbors

    def counting(ids, mask):
        counts.append(len(ids))
        return encode(ids, mask)

    model._encode_neighbors = counting
    return counts


def test_a_neighbor_that_comes_again_is_read_once():
    model = make_joint()
    counts = count_read_neighbors(model)
    ids, neighbors, _ = make_inputs(2, 3 * CHUNK)
    neighbors[1] = neighbors[0]  # across rows
    neighbors[:, 2] = neighbors[:, 0].flip(1)  # across chunks
    with torch.no_grad():
        first = model(ids, neighbor_input_ids=neighbors).logits
        again = model(ids, neighbor_input_ids=neighbors).logits  # across calls
    assert counts == [4] and torch.equal(first, again)
    model.set_retriever(HashRetriever())
    prompt = ids[:1].repeat(2, 1)
    for _ in range(2):
        model.generate(prompt, max_new_tokens=2 * CHUNK, do_sample=False, eos_token_id=None, pad_token_id=0)
    # Two equal rows, of which each completes three chunks in the prompt and one later on that is used, twice.
    assert sum(counts) <= 4 + 2 * 4


def test_kept_states_are_bounded_by_bytes_and_forgotten_when_weights_change():
    model = make_joint()
    counts = count_read_neighbors(model)
    ids, neighbors, _ = make_inputs(1, 3 * CHUNK)
    with torch.no_grad():
        model(ids, neighbor_input_ids=neighbors)
        model.neighbor_memory.max_bytes = model.neighbor_memory.num_bytes // 2
        model(ids[:, :CHUNK], neighbor_input_ids=neighbors[:, :1] + 1 - 2 * (neighbors[:, :1] == VOCAB - 1))
        assert 0 < model.neighbor_memory.num_bytes <= model.neighbor_memory.max_bytes
        before = sum(counts)
        on = model(ids, neighbor_input_ids=neighbors).logits
        next(iter(model.decoder.model.layers)).self_attn.k_proj.weight.mul_(1.5)
        changed = model(ids, neighbor_input_ids=neighbors).logits
        model.neighbor_memory.clear()
        assert_close(changed, model(ids, neighbor_input_ids=neighbors).logits)
    assert sum(counts) > before and (on - changed).abs().max() > 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("reread_tokens", [0, 3, CHUNK])
@pytest.mark.parametrize("in_parts", [False, True])
def test_gradients_reach_the_decoder_through_row_and_neighbors(checkpointing, reread_tokens, in_parts):
    model = make_joint(reread_tokens=reread_tokens)
    model._parts_work = in_parts
    ids, neighbors, mask = make_inputs(2, 3 * CHUNK)
    inputs = {"neighbor_input_ids": neighbors, "neighbor_attention_mask": mask, "labels": ids}
    # Neighbors attend to each other in the first layer, whose queries get gradients through their states alone too.
    layers = model.decoder.model.layers
    weights = layers[1].self_attn.v_proj.weight, layers[0].self_attn.q_proj.weight
    logits = torch.stack([slow_joint_logits(model, ids[row], neighbors[row], mask[row]) for row in range(2)])
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    expected = torch.autograd.grad(loss, weights)
    for is_reentrant in (None, False, True, False) if checkpointing else (None,):
        if is_reentrant is not None:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
        model.zero_grad()
        model(ids, **inputs).loss.backward()
        for weight, gradient in zip(weights, expected):
            assert gradient.abs().max() > 1e-5
            assert_close(weight.grad, gradient, 1e-7)


def test_checkpointing_keeps_the_activations_of_neighbors_no_more_than_those_of_the_row():
    model, kept = make_joint().train(), {}
    ids, neighbors, _ = make_inputs(1, 3 * CHUNK)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for k in (1, 4):
            given = neighbors[:, :, :1].expand(-1, -1, k, -1) + torch.arange(k)[:, None]
            sizes = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
                model(ids, labels=ids, neighbor_input_ids=given % VOCAB)
            kept[checkpointing, k] = sum(sizes)
    growth = [kept[checkpointing, 4] - kept[checkpointing, 1] for checkpointing in (False, True)]
    assert growth[1] < growth[0] / 5


def test_saved_whole_or_as_a_reference_to_its_base(tmp_path):
    make_decoder().save_pretrained(tmp_path / "base")
    model = RetroJointForCausalLM.from_decoder_pretrained(tmp_path / "base", chunk_size=CHUNK, dtype=torch.float64)
    model.save_pretrained(tmp_path / "whole")
    model.freeze_decoder()
    model.save_pretrained(tmp_path / "reference", retrofit_only=True)
    assert not list((tmp_path / "reference").glob("model*.safetensors"))
    ids, neighbors, mask = make_inputs(2, 3 * CHUNK)
    inputs = {"neighbor_input_ids": neighbors, "neighbor_attention_mask": mask}
    for folder in ("whole", "reference"):
        for auto_class in (RetroJointForCausalLM, AutoModelForCausalLM):
            loaded = auto_class.from_pretrained(tmp_path / folder, dtype=torch.float64)
            assert type(loaded) is RetroJointForCausalLM
            with torch.no_grad():
                assert torch.equal(loaded(ids, **inputs).logits, model(ids, **inputs).logits)
    make_decoder(seed=1).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="sha256"):
        RetroJointForCausalLM.from_pretrained(tmp_path / "reference")


REFUSED = {
    "gpt2": ({"n_embd": 16, "n_layer": 2, "n_head": 2}, "absolute|positions|IndexError"),
    "opt": ({"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24}, "IndexError"),
    "bloom": ({"hidden_size": 16, "n_layer": 2, "n_head": 2}, "position_ids"),
    "mamba": ({"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}, "recurrent|past_key_values"),
    "mistral": ({**{"sliding_window": LENGTH - 1}}, "sliding window .7. is shorter than a neighbor"),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_decoders_that_cannot_read_neighbors_are_refused_by_name(model_type):
    fields, message = REFUSED[model_type]
    torch.manual_seed(0)
    tiny = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    fields = {"vocab_size": VOCAB, "num_key_value_heads": 2, **(tiny if model_type == "mistral" else {}), **fields}
    config = AutoConfig.for_model(model_type, pad_token_id=0, bos_token_id=1, eos_token_id=2, **fields)
    with pytest.raises(ValueError, match=f"(?s){model_type}.*({message})"):
        RetroJointForCausalLM.from_decoder(AutoModelForCausalLM.from_config(config).eval(), chunk_size=CHUNK)


def test_bad_input_is_named():
    model = make_joint()
    ids, neighbors, mask = make_inputs(1, 2 * CHUNK)
    for given, message in [
        ({"neighbor_input_ids": neighbors[0]}, "neighbor_input_ids"),
        ({"neighbor_input_ids": neighbors, "neighbor_attention_mask": mask[..., :-1]}, "neighbor_attention_mask"),
        ({"neighbor_input_ids": neighbors.repeat(1, 2, 1, 1)}, "4 slots, but 8 tokens complete at most 2"),
        ({"neighbor_input_ids": neighbors, "past_key_values": DynamicCache()}, "DynamicCache.*RetroJointCache"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(ids, **given)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_head_reads_the_last_states_of_a_batch_from_contiguous_memory(batch_size):
    """Otherwise PyTorch copies the weights of a frozen head once for each row."""
    model, read = make_joint(), []
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: read.append(args[0]))
    ids = torch.randint(0, 20, (batch_size, 2 * CHUNK))
    with torch.no_grad():
        last, whole = model(ids, logits_to_keep=1).logits, model(ids).logits
    assert read[0].shape[:2] == (batch_size, 1)
    assert read[0].stride() == torch.empty(read[0].shape).stride()  # a single row is contiguous with any stride
    torch.testing.assert_close(last, whole[:, -1:], rtol=0, atol=1e-10)
