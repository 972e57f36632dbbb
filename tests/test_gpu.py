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
What only a GPU can tell: its kernels compute what the CPU computes. `pytest -m gpu` and `benchmarks/gpu.py` run it.
"""

import copy
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY_CHUNK_SIZE
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import is_flash_attn_2_available

from data_prep.embed import embed_chunks
from data_prep.index import build_index
from data_prep.neighbors import find_neighbors
from modeling_retro import RetroCache, RetroConfig, RetroForCausalLM, RetroJointForCausalLM
from modeling_retro.datastore.datastore import RetroDatastore, faiss
from modeling_retro.encoder.chunk_encoder import ChunkEncoder


DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_flash = pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs flash-attn and a CUDA device")
needs_faiss_gpu = pytest.mark.skipif(
    not hasattr(faiss, "StandardGpuResources"), reason="needs faiss with CUDA and a CUDA device"
)

VOCAB, CHUNK = 300, TINY_CHUNK_SIZE
# Heads of 32, because flex and flash attention want at least 16 and a multiple of 8.
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
KINDS = ("retro", "joint")
# Relative differences of norms.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def make_model(kind, dtype=torch.float32, device=DEVICE, attn_implementation="sdpa"):
    torch.manual_seed(0)
    if kind == "retro":
        model = RetroForCausalLM(RetroConfig(**SHAPE, chunk_size=CHUNK, cross_attention_layers=[1, 2]))
        model.set_attn_implementation(attn_implementation)
    else:
        decoder = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation=attn_implementation))
        # The check of the decoder runs on the device on which flex attention can be compiled.
        model = RetroJointForCausalLM.from_decoder(decoder.to(device), chunk_size=CHUNK)
    return model.to(device, dtype).eval()


def make_inputs(batch_size=2, length=4 * CHUNK + 3, device=DEVICE):
    generator = torch.Generator().manual_seed(1)
    shape = (batch_size, length // CHUNK, 2, 2 * CHUNK)
    inputs = {
        "input_ids": torch.randint(VOCAB, (batch_size, length), generator=generator),
        "neighbor_input_ids": torch.randint(VOCAB, shape, generator=generator),
        "neighbor_attention_mask": torch.rand(shape, generator=generator) < 0.9,
    }
    return {name: value.to(device) for name, value in inputs.items()}


def packed_positions(device=DEVICE):
    """Positions `(2, 4 * CHUNK)`: three documents in the first row, one in the second."""
    packed = torch.cat([torch.arange(n) for n in (CHUNK + 3, CHUNK, 2 * CHUNK - 3)])
    return torch.stack([packed, torch.arange(4 * CHUNK)]).to(device)


def check(found, expected, dtype):
    found, expected = found.double().cpu(), expected.double().cpu()
    assert (found - expected).norm() / expected.norm() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_the_cpu(kind, dtype):
    reference, model = make_model(kind, device="cpu"), make_model(kind, dtype)
    for candidate, device in ((reference, "cpu"), (model, DEVICE)):
        inputs = make_inputs(device=device)
        candidate(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    with torch.no_grad():
        check(model(**make_inputs()).logits, reference(**make_inputs(device="cpu")).logits, dtype)
    gradients = [torch.cat([p.grad.flatten().cpu().float() for p in m.parameters()]) for m in (model, reference)]
    check(*gradients, dtype)


@pytest.mark.parametrize("attn_implementation", ["eager", "flex_attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_other_attentions_compute_what_sdpa_computes(kind, dtype, attn_implementation):
    inputs = make_inputs(length=4 * CHUNK) | {"position_ids": packed_positions()}
    with torch.no_grad():
        expected = make_model(kind, dtype)(**inputs).logits
        found = make_model(kind, dtype, attn_implementation=attn_implementation)(**inputs).logits
    check(found, expected, dtype)


@needs_flash
def test_flash_attention_separates_packed_rows_with_an_empty_and_a_filled_cache():
    inputs, positions = make_inputs(length=4 * CHUNK), packed_positions()
    logits = {}
    for implementation in ("sdpa", "flash_attention_2"):
        model, cache, parts = make_model("retro", torch.bfloat16, attn_implementation=implementation), RetroCache(), []
        # The second part continues a document and begins another, and the third is a single token.
        for start, end in ((0, CHUNK + 5), (CHUNK + 5, 4 * CHUNK - 1), (4 * CHUNK - 1, 4 * CHUNK)):
            with torch.no_grad():
                ids, position_ids = inputs["input_ids"][:, start:end], positions[:, start:end]
                parts.append(model(ids, position_ids=position_ids, past_key_values=cache).logits)
        logits[implementation] = torch.cat(parts, dim=1)
    check(logits["flash_attention_2"], logits["sdpa"], torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_with_a_cache_computes_what_one_pass_computes(kind):
    model, inputs = make_model(kind), make_inputs()
    with torch.no_grad():
        expected = model(**inputs).logits
        ids, first = inputs["input_ids"], 3 * CHUNK
        neighbors, mask = inputs["neighbor_input_ids"], inputs["neighbor_attention_mask"]
        outputs = model(
            ids[:, :first], neighbor_input_ids=neighbors[:, :3], neighbor_attention_mask=mask[:, :3], use_cache=True
        )
        parts = [outputs.logits]
        for column in range(first, ids.shape[1]):
            ends_chunk = (column + 1) % CHUNK == 0
            new = (
                {"neighbor_input_ids": neighbors[:, 3:], "neighbor_attention_mask": mask[:, 3:]} if ends_chunk else {}
            )
            outputs = model(ids[:, column : column + 1], past_key_values=outputs.past_key_values, **new)
            parts.append(outputs.logits)
    check(torch.cat(parts, dim=1), expected, torch.float32)


def test_compiled_model_computes_what_the_model_computes():
    model, inputs = make_model("retro"), make_inputs()
    compiled = torch.compile(copy.deepcopy(model))
    with torch.no_grad():
        check(compiled(**inputs, use_cache=False).logits, model(**inputs, use_cache=False).logits, torch.float32)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    compiled.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in compiled._orig_mod.named_parameters():
        check(parameter.grad, model.get_parameter(name).grad, torch.float32)


def test_static_cache_generates_compiled_what_the_dynamic_one_generates():
    model = make_model("retro")
    ids = make_inputs()["input_ids"][:, : 2 * CHUNK + 1]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 2 * CHUNK, "do_sample": False}
    options["eos_token_id"] = None
    expected = model.generate(ids, **options)
    static = model.generate(ids, **options, cache_implementation="static", compile_config=CompileConfig(mode=None))
    assert torch.equal(static, expected)


def test_chunks_are_embedded_as_on_the_cpu(tiny_datastore_dir, tiny_encoder_dir):
    texts = ["retro looks things up", "δέλτα in a datastore", "a"]
    vectors = [
        ChunkEncoder.from_pretrained(tiny_encoder_dir, device=device).encode(texts) for device in (DEVICE, "cpu")
    ]
    np.testing.assert_allclose(*vectors, atol=1e-5)


@needs_faiss_gpu
@pytest.mark.parametrize("shard_index", [False, True])
@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "IVF4,PQ4"])
def test_index_is_trained_filled_and_searched_on_gpus(
    factory, shard_index, tiny_datastore_dir, tiny_encoder_dir, tmp_path
):
    """With the exact index the neighbors are those of the CPU; the others reach a recall as good."""
    neighbors, recall = {}, {}
    for use_gpus in (False, True):
        folder = tmp_path / str(use_gpus)
        shutil.copytree(tiny_datastore_dir, folder)
        options = {"use_gpus": use_gpus, "shard_index": use_gpus and shard_index, "force": True}
        embed_chunks(folder, tiny_encoder_dir)
        record = build_index(folder, factory=factory, **options)
        find_neighbors(folder, num_neighbors=4, **options)
        neighbors[use_gpus] = np.asarray(RetroDatastore.from_pretrained(folder).neighbor_ids)
        recall[use_gpus] = record.recall["recall@10"]
    assert recall[True] == pytest.approx(recall[False], abs=0.1)
    if factory == "Flat":
        # Distances on a GPU are rounded differently, so that the order of equal ones may differ.
        same = [len(set(found) & set(expected)) for found, expected in zip(neighbors[True], neighbors[False])]
        assert np.mean(same) > 0.98 * neighbors[False].shape[1]
