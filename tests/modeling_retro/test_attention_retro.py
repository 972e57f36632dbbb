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
"""Attention in parts against one masked attention, and what its memory grows with"""

import pytest
import torch
from test_generation_retro import HashRetriever, left_padded
from test_modeling_retro import CHUNK, VOCAB, assert_close, make_inputs, make_model
from tiny_joint import FAMILIES, make_joint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_retro import RetroJointForCausalLM, attention_retro
from modeling_retro.attention_retro import AttentionPart, MergedAttention, group_columns


ROWS, WIDTH, HEADS, KV_HEADS, DIM, K, LENGTH, UNIQUE, SLOTS = 2, 13, 6, 2, 8, 2, 8, 7, 3


def make_case(device="cpu", dtype=torch.float64):
    """Queries, keys and values of rows and neighbors, the slot that each query sees, and the tokens seen in each."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()

    row = [rand(ROWS, WIDTH, HEADS, DIM), rand(ROWS, WIDTH, KV_HEADS, DIM), rand(ROWS, WIDTH, KV_HEADS, DIM)]
    neighbors = [rand(UNIQUE, KV_HEADS, LENGTH, DIM), rand(UNIQUE, KV_HEADS, LENGTH, DIM)]
    bias = torch.tensor(0.7, device=device, dtype=dtype, requires_grad=True)
    slot = ((torch.arange(WIDTH) + 1) // CHUNK - 1).expand(ROWS, -1).clone()
    slot[1] -= 1
    index = torch.randint(0, UNIQUE, (ROWS, SLOTS, K), generator=generator)
    seen = torch.rand(ROWS, SLOTS, K, LENGTH, generator=generator) < 0.6
    seen[1, 1] = False
    present = seen.flatten(2).any(-1).gather(1, slot.clamp(min=0)) & (slot >= 0)
    slot = torch.where(present, slot, SLOTS)
    return row, neighbors, bias, slot.to(device), index.to(device), seen.to(device)


def in_parts(row, neighbors, bias, slot, index, seen, row_mask=None):
    blocks, slots = group_columns(slot, SLOTS, 3)
    mask = seen.flatten(2).gather(1, slots[..., None].expand(-1, -1, K * LENGTH)).flatten(0, 1)
    mask = mask | ~mask.any(-1, keepdim=True)
    own = index.gather(1, slots[..., None].expand(-1, -1, K))
    parts = [
        AttentionPart(mask=row_mask, is_causal=row_mask is None),
        AttentionPart(queries=blocks, neighbors=own, source=1, mask=mask[:, None, None]),
    ]
    return MergedAttention.apply(parts, 0.3, bias, *row, *neighbors)


def masked(row, neighbors, bias, slot, index, seen, row_mask=None):
    query, key, value = row
    front = [states[index].transpose(3, 4).reshape(ROWS, SLOTS * K * LENGTH, KV_HEADS, DIM) for states in neighbors]
    key, value = (torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(front, (key, value)))
    key, value = (states.repeat_interleave(HEADS // KV_HEADS, dim=1) for states in (key, value))
    slots = torch.arange(SLOTS, device=slot.device).repeat_interleave(K * LENGTH)
    sees_front = (slot[..., None] == slots) & seen.flatten(1)[:, None]
    if row_mask is None:
        row_mask = torch.ones(ROWS, 1, WIDTH, WIDTH, dtype=torch.bool, device=slot.device).tril()
    sees = torch.cat([sees_front[:, None], row_mask], dim=-1)
    scores = torch.where(torch.arange(sees.shape[-1], device=slot.device) < len(slots), bias, 0.0)
    scores = scores.masked_fill(~sees, -torch.inf)
    attention = torch.nn.functional.scaled_dot_product_attention
    return attention(query.transpose(1, 2), key, value, attn_mask=scores, scale=0.3).transpose(1, 2)


def compare(case, tolerance, row_mask=None):
    row, neighbors, bias, *_ = case
    found, expected = in_parts(*case, row_mask), masked(*case, row_mask)
    assert_close(found, expected, tolerance)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found)
    inputs = [*row, *neighbors, bias]
    for own, reference in zip(
        torch.autograd.grad((found * weight).sum(), inputs), torch.autograd.grad((expected * weight).sum(), inputs)
    ):
        assert reference.abs().max() > 0.01
        assert_close(own, reference, tolerance * 10)


@pytest.mark.parametrize("is_masked", [False, True])
def test_output_and_all_gradients_equal_one_masked_attention(is_masked):
    distance = torch.arange(WIDTH)[:, None] - torch.arange(WIDTH)
    row_mask = ((distance >= 0) & (distance < 5)).expand(ROWS, 1, -1, -1) if is_masked else None
    compare(make_case(), 5e-15, row_mask)


@pytest.mark.parametrize("longest", [0, LENGTH - 1, WIDTH])
def test_gradients_in_half_precision_on_a_cpu_equal_one_masked_attention(monkeypatch, longest):
    monkeypatch.setattr(attention_retro, "LONGEST_WIDENED", longest)
    compare(make_case(dtype=torch.bfloat16), 0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("is_masked", [False, True])
def test_kernels_of_a_gpu_equal_one_masked_attention(dtype, tolerance, is_masked):
    row_mask = torch.ones(ROWS, 1, WIDTH, WIDTH, dtype=torch.bool, device="cuda").tril(0).triu(-5)
    compare(make_case("cuda", dtype), tolerance, row_mask if is_masked else None)


def logits_of_both_ways(model, **inputs):
    found = []
    for model._parts_work in (True, False):
        with torch.no_grad():
            found.append(model(**inputs).logits)
    model._parts_work = True
    return found


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gemma2"])
@pytest.mark.parametrize("reread_tokens", [0, 3, CHUNK])
def test_parts_equal_one_mask_in_rows_with_padding_and_of_several_documents(family, reread_tokens):
    model = make_joint(family, reread_tokens=reread_tokens)
    assert model._parts_work
    ids, neighbors, neighbor_mask = make_inputs(2, 5 * CHUNK)
    given = {"input_ids": ids, "neighbor_input_ids": neighbors, "neighbor_attention_mask": neighbor_mask}
    _, padding = left_padded([5 * CHUNK, 3 * CHUNK + 1])
    documents = torch.cat([torch.arange(2 * CHUNK), torch.arange(3 * CHUNK)]).expand(2, -1)
    for inputs in ({}, {"attention_mask": padding}, {"position_ids": documents}):
        parts, mask = logits_of_both_ways(model, **given, **inputs)
        kept = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        assert_close(parts[kept], mask[kept], 1e-10)


def test_families_that_change_scores_are_found_out_and_read_through_a_mask():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt_oss",
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=64,
        initializer_range=0.3,
    )
    decoder = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model = RetroJointForCausalLM.from_decoder(decoder, chunk_size=CHUNK)
    decoder.config._attn_implementation = "sdpa"  # as if its kernel took sinks
    assert not model._attends_in_parts()


class Shapes(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


@pytest.mark.parametrize("reread_tokens", [0, CHUNK])
def test_nothing_grows_with_tokens_times_neighbors(reread_tokens):
    model = make_joint(num_hidden_layers=1, reread_tokens=reread_tokens)
    length = 24 * CHUNK
    ids, neighbors, mask = make_inputs(1, length)
    largest = []
    for model._parts_work in (True, False):
        with torch.no_grad(), Shapes() as shapes:
            model(ids, neighbor_input_ids=neighbors, neighbor_attention_mask=mask, use_cache=False)
        largest.append(shapes.largest)
    tokens_of_neighbors = neighbors.numel()
    assert largest[0] < length * tokens_of_neighbors // 2 <= largest[1]


def test_no_tensor_of_cross_attention_grows_faster_than_the_row():
    model, largest = make_model(), []
    for length in (12 * CHUNK, 24 * CHUNK):
        ids, neighbors, mask = make_inputs(1, length)
        with torch.no_grad(), Shapes() as shapes:
            model(ids, neighbor_input_ids=neighbors, neighbor_attention_mask=mask, use_cache=False)
        largest.append(shapes.largest)
    assert largest[1] == 2 * largest[0]


def slow_attend(query, key, value, mask, is_causal, scale):
    scores = query @ key.mT * scale
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    scores = scores if mask is None else scores + mask
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ value, lse, ()


def flash_in_name(module, query, key, value, attention_mask, **kwargs):
    """Takes what flash attention takes: a mask of padding, or none."""
    if attention_mask is not None:
        assert attention_mask.ndim == 2
        size, total = query.shape[2], key.shape[2]
        causal = torch.ones(size, total, dtype=torch.bool).tril(total - size)
        attention_mask = (causal & attention_mask[:, None].bool() | torch.eye(size, total, dtype=torch.bool))[:, None]
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)


@pytest.mark.parametrize("reread_tokens", [0, CHUNK])
def test_flash_attention_reads_neighbors(monkeypatch, reread_tokens):
    """Its kernels are replaced, because they run on a GPU only."""
    AttentionInterface.register("flash_in_name", flash_in_name)
    AttentionMaskInterface.register("flash_in_name", flash_attention_mask)
    model, flash = make_joint(reread_tokens=reread_tokens), make_joint(reread_tokens=reread_tokens)
    calls = []

    def attend(*args):
        calls.append(args[0].shape)
        return slow_attend(*args)

    flash.decoder.config._attn_implementation = "flash_in_name"
    ids, mask = left_padded([3 * CHUNK + 1, 2 * CHUNK])
    arguments = {"max_new_tokens": 2 * CHUNK, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    generated = []
    for one in (model, flash):
        one.set_retriever(HashRetriever())
        generated.append(one.generate(ids, attention_mask=mask, **arguments))
        monkeypatch.setattr(attention_retro, "attend", attend)
    assert torch.equal(*generated) and calls
    assert flash.decoder.config._attn_implementation == "flash_in_name"


def test_layers_on_several_devices_get_the_layout_moved():
    """accelerate moves what it passes to a layer by its method `to`."""
    model = make_joint()
    ids, neighbors, mask = make_inputs(1, 3 * CHUNK)
    moved = []
    for layer in model.decoder.model.layers:

        def move(module, args, kwargs):
            if "retro_attention" in kwargs:  # and not while neighbors are encoded
                kwargs["retro_attention"] = kwargs["retro_attention"].to(torch.device("cpu"))
                moved.append(kwargs["retro_attention"])
            return args, kwargs

        layer.register_forward_pre_hook(move, with_kwargs=True)
    plain = make_joint()
    with torch.no_grad():
        found, expected = (
            one(ids, neighbor_input_ids=neighbors, neighbor_attention_mask=mask).logits for one in (model, plain)
        )
    assert len(moved) == 3 and torch.equal(found, expected)
