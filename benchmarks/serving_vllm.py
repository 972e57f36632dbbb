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
Completions by vLLM with neighbors, beside plain vLLM without any and beside our own engine, in one run.

    python benchmarks/serving_vllm.py --model HuggingFaceTB/SmolLM2-135M --python vllm-env/bin/python

Neighbors are drawn, so that no search is timed. The ways to compute take turns, and each line is the median of
`--repeats` turns. *Cold* neighbors are read for the first time, *warm* ones were read before.
"""

import argparse
import random
import statistics
import threading
import time

import torch
from transformers import AutoTokenizer

from modeling_retro import RetrievedNeighbors, RetroJointForCausalLM
from serving.decoding_batch import DecodingBatch, Row
from serving.engine import Completion, Engine
from serving.sampling import SamplingParameters
from serving.vllm.engine import VllmEngine
from serving.vllm.processes import EngineProcess


class DrawnNeighbors:
    """Neighbors of whole length, drawn with the chunk and a number as a seed. Another number makes them cold."""

    def __init__(self, vocab_size, length):
        self.vocab_size, self.length, self.number = vocab_size, length, 0

    def retrieve(self, chunks, k, attention_mask=None):
        drawn = [random.Random(f"{self.number} {chunk}") for chunk in chunks.tolist()]
        ids = [[one.choices(range(self.vocab_size), k=self.length) for _ in range(k)] for one in drawn]
        ids = torch.tensor(ids)
        return RetrievedNeighbors(neighbor_input_ids=ids, neighbor_attention_mask=torch.ones_like(ids).bool())


def run(engine, prompts, num_neighbors, max_tokens):
    """Tokens a second of completions that begin together, and the median of the seconds to their first tokens."""
    ended, firsts, errors = threading.Semaphore(0), {}, []
    start_time = time.perf_counter()

    def emitter(number):
        def emit(event):
            firsts.setdefault(number, time.perf_counter() - start_time)
            if event.error is not None:
                errors.append(event.error)
            if event.error is not None or event.finish_reason is not None:
                ended.release()

        return emit

    parameters = SamplingParameters(temperature=0)
    rows = [Row(list(ids), num_neighbors) for ids in prompts]
    engine.submit([Completion(row, max_tokens, parameters, (), emitter(n)) for n, row in enumerate(rows)])
    for _ in prompts:
        ended.acquire()
    if errors:
        raise errors[0]
    return len(prompts) * max_tokens / (time.perf_counter() - start_time), statistics.median(firsts.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--python", required=True, help="the Python of an environment with vLLM")
    parser.add_argument("--arguments", default="--enforce-eager --block-size 32 --max-model-len 2048")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--num_neighbors", type=int, default=2)
    parser.add_argument("--max_tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    model = RetroJointForCausalLM.from_decoder_pretrained(
        arguments.model, num_neighbors=arguments.num_neighbors, dtype=torch.float32
    ).eval()
    vocab_size, most = model.config.vocab_size, max(arguments.streams)
    retriever = DrawnNeighbors(vocab_size, model.config.neighbor_length)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    process = EngineProcess(arguments.python, arguments.model, "float32", 4.0, arguments.arguments.split())
    theirs = VllmEngine(
        [process.url], model.config, retriever, tokenizer, (), processes=[process], max_batch_size=most
    )
    ours = Engine(DecodingBatch(model, retriever, draft_tokens=0), tokenizer, (), max_batch_size=most)
    k = arguments.num_neighbors
    ways = {
        "vLLM, no neighbors": (theirs, 0, False),
        "vLLM, cold": (theirs, k, True),
        "vLLM, warm": (theirs, k, False),
        "own engine, no neighbors": (ours, 0, False),
        "own engine, cold": (ours, k, True),
        "own engine, warm": (ours, k, False),
    }

    def measure(what, count, length, max_tokens, value):
        prompts = [random.Random(n).choices(range(vocab_size), k=length) for n in range(count)]
        found = {name: [] for name in ways}
        for _ in range(arguments.repeats):
            for name, (engine, num_neighbors, is_cold) in ways.items():
                retriever.number += is_cold
                found[name].append(run(engine, prompts, num_neighbors, max_tokens)[value])
        base = statistics.median(found["vLLM, no neighbors"])
        for name, values in found.items():
            middle = statistics.median(values)
            spread = f"{min(values):.2f} … {max(values):.2f}"
            print(f"| {what} | {name} | {middle:.2f} | {spread} | {middle / base:.2f} |", flush=True)

    run(theirs, [[1] * 70], k, 8)
    print("| measured | way | median | from … to | of vLLM without neighbors |\n|---|---|---|---|---|")
    for count in arguments.streams:
        measure(f"tokens/s, {count} streams", count, 64, arguments.max_tokens, 0)
    for length in arguments.prompts:
        measure(f"seconds to the first token of {length}", 1, length, 1, 1)
    ours.close()
    theirs.close()


if __name__ == "__main__":
    main()
