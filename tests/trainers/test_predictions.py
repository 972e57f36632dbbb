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
"""Logits in blocks equal those of one forward pass, and the head never sees a whole batch."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from array_datastore import random_datastore
from child_processes import run_processes


sys.path.append(str(Path(__file__).parents[1] / "modeling_retro"))
from tiny_joint import CHUNK, FAMILIES, LENGTH, VOCAB, make_joint

from modeling_retro import RetroConfig, RetroForCausalLM
from trainers.evaluation import predictions as module
from trainers.evaluation.evaluate import evaluate_retro
from trainers.evaluation.predictions import predictions, token_nats


# Families that change logits behind their head.
AFTER_THE_HEAD = {
    "gemma2": {"final_logit_softcapping": 2.0},
    "gemma3": {"final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.3},
}
MODELS = ["retro", "reading again", *FAMILIES, "cohere"]


def make_model(name):
    if name == "retro":
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        options = {"cross_attention_layers": [1], "logits_scaling": 3.0, "initializer_range": 0.3}
        return RetroForCausalLM(RetroConfig(vocab_size=VOCAB, chunk_size=CHUNK, **sizes, **options)).double().eval()
    if name == "reading again":
        model = make_joint("llama")
        model.config.reread_tokens = CHUNK
        return model
    return make_joint(name, **AFTER_THE_HEAD.get(name, {}))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "CPU_BLOCK_SIZE", 7 * VOCAB)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_equal_one_forward_pass(name, small_blocks, monkeypatch):
    monkeypatch.setitem(FAMILIES, "cohere", ("cohere", {}))
    model = make_model(name)
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "input_ids": torch.randint(VOCAB, (3, 3 * CHUNK + 2), generator=generator),
        "neighbor_input_ids": torch.randint(VOCAB, (3, 3, 2, LENGTH), generator=generator),
    }
    with torch.no_grad():
        # Another model, because the first forward pass of one may try its decoder.
        whole = make_model(name)(**inputs, use_cache=False).logits
    rows, columns = (torch.rand(inputs["input_ids"].shape, generator=generator) < 0.7).nonzero(as_tuple=True)
    sizes = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, output: sizes.append(output.numel()))
    found, order = torch.empty(len(rows), VOCAB, dtype=torch.float64), []
    for places, logits in predictions(model, inputs, rows, columns):
        found[places] = logits
        order += places.tolist()
    assert order == list(range(len(rows)))
    assert len(sizes) > len(rows) // 7 > 2
    assert max(sizes[-len(rows) // 7 :]) == 7 * VOCAB
    torch.testing.assert_close(found, whole[rows, columns], rtol=1e-12, atol=1e-12)
    if name in AFTER_THE_HEAD:  # so the model changes what its head returns
        head = model.get_output_embeddings()(module.head_inputs(model, **inputs)[rows, columns])
        assert (head - found).abs().max() > 0.1


def test_nats_are_those_of_the_softmax_over_whole_logits(small_blocks):
    model = make_model("gemma2")
    ids = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    rows, columns = torch.tensor([0, 1, 1]), torch.tensor([3, 1, 8])
    with torch.no_grad():
        log_probabilities = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    found = token_nats(model, {"input_ids": ids}, rows, columns)
    for row, column, nats in zip(rows, columns, found, strict=True):
        assert math.isclose(nats, -log_probabilities[row, column - 1, ids[row, column]], rel_tol=1e-12)
    assert token_nats(model, {"input_ids": ids}, rows[:0], columns[:0]).shape == (0,)


def test_the_head_is_as_before_after_an_error(small_blocks):
    model = make_model("llama")
    ids = torch.randint(VOCAB, (2, 9))
    with pytest.raises(IndexError):
        list(predictions(model, {"input_ids": ids}, torch.tensor([5]), torch.tensor([0])))
    next(predictions(model, {"input_ids": ids}, torch.tensor([0]), torch.tensor([0])))
    assert model(input_ids=ids, use_cache=False).logits.shape == (2, 9, VOCAB)


def evaluate_in_small_blocks(output_dir):
    """Evaluates as one of some processes, and writes the bits and how often this process ran its model."""
    state = PartialState(cpu=True)
    module.CPU_BLOCK_SIZE = 7 * VOCAB
    datastore = random_datastore(seed=0, vocab_size=VOCAB, chunk_size=CHUNK, num_documents=9, num_neighbors=2)
    model, runs = make_model("llama"), []
    model.register_forward_hook(lambda *_: runs.append(1))
    options = {"modes": ["on", "in_front"], "window_chunks": 3, "stride_chunks": 2, "batch_size": 2}
    evaluation = evaluate_retro(model, datastore, datastore, show_progress=False, **options)
    np.savez(output_dir / f"bits-{state.process_index}.npz", runs=len(runs), **evaluation.chunk_bits)


def test_processes_run_a_model_equally_often_and_find_the_bits_of_one(tmp_path):
    (tmp_path / "two").mkdir()
    run_processes(evaluate_in_small_blocks, tmp_path / "two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CPU_BLOCK_SIZE", 7 * VOCAB)
        evaluate_in_small_blocks(tmp_path)
    first, second = (np.load(tmp_path / "two" / f"bits-{rank}.npz") for rank in (0, 1))
    one = np.load(tmp_path / "bits-0.npz")
    assert first["runs"] == second["runs"] < one["runs"]
    for name in ("on", "in_front"):
        np.testing.assert_allclose(first[name], one[name], rtol=1e-12)
        np.testing.assert_array_equal(first[name], second[name])
