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

    python benchmarks/serving_vllm.py --model HuggingFaceTB/SmolLM2-135M-Instruct --python vllm-env/bin/python

Neighbors are drawn, so that no search is timed. The ways to compute take turns, and each line is the median of
`--repeats` turns. *Cold* neighbors are read for the first time, *warm* ones were read before. A number behind a way,
as in `vLLM-warm:16`, says how many tokens of a chunk are read again; the whole chunk without one, as in `retro serve`.
Both engines compute with `--threads` threads. All cases take an hour or more on two cores; `--streams`, `--prompts`
and `--ways` choose some.
"""

import argparse
import os
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
    """
    Neighbors of whole length. Warm ones are texts of a small pool, which engines read before anything is measured, so
    that they stay warm if a row is written otherwise. Cold ones are new each time.
    """

    POOL_SIZE = 60

    def __init__(self, vocab_size, length):
        self.drawn = random.Random(0)
        self.draw = lambda: self.drawn.choices(range(vocab_size), k=length)
        self.pool = [self.draw() for _ in range(self.POOL_SIZE)]
        self.unread, self.is_cold = [], False

    def retrieve(self, chunks, k, attention_mask=None):
        ids = torch.tensor([self.choose(str(chunk), k) for chunk in chunks.tolist()])
        return RetrievedNeighbors(neighbor_input_ids=ids, neighbor_attention_mask=torch.ones_like(ids).bool())

    def choose(self, seed, k):
        if self.is_cold:
            return [self.draw() for _ in range(k)]
        if self.unread:
            return [self.unread.pop() for _ in range(k)]
        return random.Random(seed).sample(self.pool, k)


# Each way by its name: whether vLLM computes, whether rows have neighbors, and whether these are new.
WAYS = {
    "vLLM-off": (True, False, False),
    "vLLM-cold": (True, True, True),
    "vLLM-warm": (True, True, False),
    "own-off": (False, False, False),
    "own-cold": (False, True, True),
    "own-warm": (False, True, False),
}


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
    parser.add_argument("--python", help="the Python of an environment with vLLM")
    parser.add_argument("--arguments", default="--enforce-eager --block-size 32 --max-model-len 2048")
    parser.add_argument("--engine_url", help="the address of a vLLM that runs already, in place of --python")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), help=", ".join(WAYS))
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--prompts", type=int, nargs="*", default=[64, 512])
    parser.add_argument("--num_neighbors", type=int, default=2)
    parser.add_argument("--max_tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if unknown := [way for way in arguments.ways if way.partition(":")[0] not in WAYS]:
        parser.error(f"--ways has {' '.join(unknown)}, expected some of {', '.join(WAYS)}")
    torch.set_num_threads(arguments.threads)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, range(arguments.threads)))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # gibibytes
    model = RetroJointForCausalLM.from_decoder_pretrained(
        arguments.model, num_neighbors=arguments.num_neighbors, dtype=torch.float32
    ).eval()
    chunk_size = model.config.chunk_size
    cases = {way: (*WAYS[way.partition(":")[0]], int(way.partition(":")[2] or chunk_size)) for way in arguments.ways}
    vocab_size, most = model.config.vocab_size, max([1, *arguments.streams])
    retriever = DrawnNeighbors(vocab_size, model.config.neighbor_length)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    processes = []
    if arguments.engine_url is None:
        processes.append(EngineProcess(arguments.python, arguments.model, "float32", 4.0, arguments.arguments.split()))
    urls = [arguments.engine_url] if arguments.engine_url else [process.url for process in processes]
    theirs = VllmEngine(urls, model.config, retriever, tokenizer, (), processes=processes, max_batch_size=most)
    ours = Engine(DecodingBatch(model, retriever, draft_tokens=0), tokenizer, (), max_batch_size=most)
    k = arguments.num_neighbors

    def measure(what, count, length, max_tokens, value):
        prompts = [random.Random(n).choices(range(vocab_size), k=length) for n in range(count)]
        found = {way: [] for way in cases}
        for _ in range(arguments.repeats):
            for way, (is_theirs, is_on, is_cold, reread_tokens) in cases.items():
                retriever.is_cold = is_cold
                model.config.reread_tokens = reread_tokens
                engine = theirs if is_theirs else ours
                found[way].append(run(engine, prompts, k * is_on, max_tokens)[value])
        base = statistics.median(found[arguments.ways[0]])
        for way, values in found.items():
            middle = statistics.median(values)
            spread = f"{min(values):.2f} … {max(values):.2f}"
            print(f"| {what} | {way} | {middle:.2f} | {spread} | {middle / base:.2f} |", flush=True)

    chunks = [random.Random(-n).choices(range(vocab_size), k=chunk_size) for n in range(retriever.POOL_SIZE // k)]
    for engine in {theirs if is_theirs else ours for is_theirs, *_ in cases.values()}:
        retriever.unread = list(retriever.pool)
        run(engine, chunks, k, 1)
    print("| measured | way | median | from … to | of the first |\n|---|---|---|---|---|")
    for count in arguments.streams:
        measure(f"tokens/s, {count} streams", count, 64, arguments.max_tokens, 0)
    for length in arguments.prompts:
        measure(f"seconds to the first token of {length}", 1, length, 1, 1)
    ours.close()
    theirs.close()


if __name__ == "__main__":
    main()
