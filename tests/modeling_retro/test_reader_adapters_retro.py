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

import copy

import pytest
import torch
from test_modeling_retro import CHUNK, LENGTH, VOCAB
from tiny_joint import make_decoder, make_joint

from modeling_retro import RetroJointCache, RetroJointForCausalLM
from modeling_retro.reader_adapters_retro import NEIGHBOR_ADAPTER, ROW_ADAPTER, is_adapter_weight


LORA = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"}
NUM_TOKENS = 3 * CHUNK + 1


def make_reader(seed=0, attn_implementation="sdpa", **fields):
    """A reader whose adapters do something."""
    decoder = make_decoder(seed=seed, attn_implementation=attn_implementation)
    model = RetroJointForCausalLM.from_decoder(decoder, chunk_size=CHUNK, **fields).double()
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter_weight(name):
                parameter.normal_(std=0.3)
    return model.eval()


def make_inputs(seed=2, batch_size=2):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (batch_size, NUM_TOKENS), generator=generator)
    neighbors = torch.randint(3, VOCAB, (batch_size, NUM_TOKENS // CHUNK, 2, LENGTH), generator=generator)
    return ids, neighbors


@pytest.mark.parametrize(
    "fields", [{"neighbor_adapter": LORA}, {"row_adapter": LORA}, {"neighbor_adapter": LORA, "row_adapter": LORA}]
)
def test_without_neighbors_a_reader_is_its_decoder_to_the_bit(fields):
    ids, neighbors = make_inputs()
    expected = make_decoder()(ids).logits
    model = make_reader(**fields, neighbor_bias=True)
    assert torch.equal(model(ids).logits, expected)
    assert not torch.allclose(
        model(ids, neighbor_input_ids=neighbors).logits, make_joint()(ids, neighbor_input_ids=neighbors).logits
    )
    # Nor does anything stay switched on afterwards.
    assert torch.equal(model.decoder(ids).logits, expected)
    nothing = torch.zeros(neighbors.shape)
    assert torch.equal(model(ids, neighbor_input_ids=neighbors, neighbor_attention_mask=nothing).logits, expected)


def test_the_neighbor_adapter_changes_how_neighbors_are_encoded_and_nothing_else():
    ids, neighbors = make_inputs()
    model = make_reader(reread_tokens=0, neighbor_adapter=LORA)
    # The slow way: a second decoder with W + alpha / r * B A in place of W encodes, the first one reads.
    merged = make_joint()
    weights = dict(merged.decoder.named_parameters())
    with torch.no_grad():
        for name, module in model.decoder.named_modules():
            if NEIGHBOR_ADAPTER in getattr(module, "lora_A", {}):
                product = module.lora_B[NEIGHBOR_ADAPTER].weight @ module.lora_A[NEIGHBOR_ADAPTER].weight
                weights[f"{name}.weight"] += LORA["lora_alpha"] / LORA["r"] * product
    reference = make_joint()
    reference._encode_neighbors = merged._encode_neighbors
    expected = reference(ids, neighbor_input_ids=neighbors).logits
    torch.testing.assert_close(model(ids, neighbor_input_ids=neighbors).logits, expected, atol=1e-7, rtol=0)


def test_the_row_adapter_acts_on_tokens_that_see_neighbors_alone():
    ids, neighbors = make_inputs()
    model, plain = make_reader(row_adapter=LORA), make_joint()
    found, without = model(ids, neighbor_input_ids=neighbors).logits, plain(ids, neighbor_input_ids=neighbors).logits
    torch.testing.assert_close(found[:, : CHUNK - 1], without[:, : CHUNK - 1], atol=1e-9, rtol=0)
    assert (found - without)[:, CHUNK - 1 :].abs().amax(-1).min() > 1e-3
    mask = torch.ones(neighbors.shape, dtype=torch.bool)
    mask[1] = False  # the second row sees none, though the first does
    found = model(ids, neighbor_input_ids=neighbors, neighbor_attention_mask=mask).logits
    torch.testing.assert_close(found[1], plain(ids).logits[1], atol=1e-9, rtol=0)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_a_reader_with_everything_is_the_same_cached_and_uncached_alone_and_in_a_batch(attn_implementation):
    ids, neighbors = make_inputs()
    model = make_reader(
        attn_implementation=attn_implementation, neighbor_adapter=LORA, row_adapter=LORA, neighbor_bias=True
    )
    with torch.no_grad():
        model.neighbor_bias.fill_(0.7)
        whole = model(ids, neighbor_input_ids=neighbors).logits
        cache, parts = RetroJointCache(), []
        for t in range(NUM_TOKENS):
            ends = (t + 1) % CHUNK == 0
            slot = {"neighbor_input_ids": neighbors[:, (t + 1) // CHUNK - 1][:, None]} if ends else {}
            parts.append(model(ids[:, t : t + 1], past_key_values=cache, **slot).logits)
        # The softmax of eager attention is in float32.
        atol = 1e-7 if attn_implementation == "sdpa" else 5e-6
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=atol, rtol=0)
        alone = model(ids[1:], neighbor_input_ids=neighbors[1:]).logits
        torch.testing.assert_close(alone, whole[1:], atol=atol, rtol=0)


def test_the_bias_is_added_to_the_scores_of_neighbors():
    ids, neighbors = make_inputs()
    model, plain = make_reader(reread_tokens=0, neighbor_bias=True), make_joint()
    expected = plain(ids, neighbor_input_ids=neighbors).logits
    with torch.no_grad():
        torch.testing.assert_close(model(ids, neighbor_input_ids=neighbors).logits, expected, atol=1e-7, rtol=0)
        # log 2 gives every neighbor the weight of two, which is what a second copy of each does.
        model.neighbor_bias.fill_(torch.tensor(2.0).log())
        twice = plain(ids, neighbor_input_ids=torch.cat([neighbors, neighbors], dim=2)).logits
        torch.testing.assert_close(model(ids, neighbor_input_ids=neighbors).logits, twice, atol=1e-6, rtol=0)
        model.neighbor_bias.fill_(-1e4)
        off = model(ids).logits
        torch.testing.assert_close(model(ids, neighbor_input_ids=neighbors).logits, off, atol=1e-7, rtol=0)


def train_gradients(model, ids, neighbors):
    model.freeze_decoder()
    model.train()
    model(ids, labels=ids, neighbor_input_ids=neighbors).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_every_added_weight_and_no_other_gets_a_gradient_with_checkpointing_too():
    ids, neighbors = make_inputs()
    fields = {"neighbor_adapter": LORA, "row_adapter": LORA, "neighbor_bias": True}
    model = make_reader(**fields)
    other = copy.deepcopy(model)
    found = train_gradients(model, ids, neighbors)
    assert set(found) == {name for name, _ in model.named_parameters() if model.is_added_weight(name)}
    other.gradient_checkpointing_enable()
    for name, gradient in train_gradients(other, ids, neighbors).items():
        torch.testing.assert_close(gradient, found[name], atol=1e-9, rtol=0)
    assert torch.equal(model.eval().decoder(ids).logits, make_decoder()(ids).logits)


def test_neighbors_are_encoded_again_in_training_only_where_gradients_need_it():
    ids, neighbors = make_inputs()
    calls = {}
    for adapter in (NEIGHBOR_ADAPTER, ROW_ADAPTER):
        fields = {"neighbor_adapter" if adapter == NEIGHBOR_ADAPTER else "row_adapter": LORA}
        model = make_reader(**fields)
        model.freeze_decoder()
        encode, calls[adapter] = model._encode_neighbors, 0

        def count(*args, adapter=adapter, encode=encode):
            calls[adapter] += 1
            return encode(*args)

        model._encode_neighbors = count
        model.train()
        for _ in range(2):
            model(ids, labels=ids, neighbor_input_ids=neighbors).loss.backward()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if is_adapter_weight(name):
                        parameter += 0.01
    assert calls == {NEIGHBOR_ADAPTER: 2, ROW_ADAPTER: 1}


@pytest.mark.parametrize("retrofit_only", [True, False])
def test_a_reader_comes_back_from_disk(tmp_path, retrofit_only):
    ids, neighbors = make_inputs()
    make_decoder().save_pretrained(tmp_path / "base")
    fields = {"neighbor_adapter": LORA, "row_adapter": LORA, "neighbor_bias": True}
    model = RetroJointForCausalLM.from_decoder_pretrained(
        str(tmp_path / "base"), chunk_size=CHUNK, dtype=torch.float64, **fields
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if model.is_added_weight(name):
                parameter.fill_(0.1)
    model.freeze_decoder()
    model.save_pretrained(tmp_path / "reader", retrofit_only=retrofit_only)
    expected = model(ids, neighbor_input_ids=neighbors).logits
    loaded = RetroJointForCausalLM.from_pretrained(tmp_path / "reader", dtype=torch.float64)
    torch.testing.assert_close(loaded(ids, neighbor_input_ids=neighbors).logits, expected, atol=1e-7, rtol=0)


def test_an_adapter_without_layers_or_with_unknown_fields_is_refused():
    for fields in ({"r": 2, "target_modules": ["nowhere"]}, {"rank": 2}):
        with pytest.raises(ValueError, match="does not make an adapter of this decoder"):
            make_reader(neighbor_adapter=fields)
