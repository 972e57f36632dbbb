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
Tokens per second of one stream and of eight that run together, in one run.

    python benchmarks/serving_streams.py --model retro-quickstart/model --datastore retro-quickstart/datastore

Each prompt is a held-out text of its own. What neighbors the model has read before is forgotten before each line.
"""

import argparse
import threading
import time

from serving.decoding_batch import DecodingBatch, Row
from serving.engine import Completion, Engine
from serving.load import load_model
from serving.sampling import SamplingParameters


def run(engine, prompts, num_neighbors, max_tokens):
    """Seconds until all completions are there."""
    left, done = [len(prompts)], threading.Event()

    def emit(event):
        if event.error is not None:
            raise event.error
        if event.finish_reason is not None:
            left[0] -= 1
            if left[0] == 0:
                done.set()

    start_time = time.perf_counter()
    parameters = SamplingParameters(temperature=0)
    engine.submit([Completion(Row(list(ids), num_neighbors), max_tokens, parameters, (), emit) for ids in prompts])
    done.wait()
    return time.perf_counter() - start_time


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--datastore", required=True)
    parser.add_argument("--max_tokens", type=int, default=128)
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--num_streams", type=int, default=8)
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    loaded = load_model(arguments.model, arguments.datastore, arguments.dtype)
    chunks = loaded.retriever.datastore.split("validation").chunks
    starts = [i for i in range(len(chunks)) if chunks.length[i] == chunks.chunk_size][: arguments.num_streams]
    prompts = [chunks.take([i])[0][0].tolist()[: arguments.prompt_tokens] for i in starts]
    engine = Engine(DecodingBatch(loaded.model, loaded.retriever), loaded.retriever.datastore.tokenizer, ())
    run(engine, prompts[:1], 0, 8)
    print("| neighbors | streams | tokens/s | ratio |\n|---|---|---|---|")
    for num_neighbors in (0, loaded.model.config.num_neighbors):
        speeds = []
        for count in (1, len(prompts)):
            if hasattr(loaded.model, "neighbor_memory"):
                loaded.model.neighbor_memory.clear()
            speeds.append(
                count * arguments.max_tokens / run(engine, prompts[:count], num_neighbors, arguments.max_tokens)
            )
            ratio = f"{speeds[-1] / speeds[0]:.2f}"
            print(f"| {num_neighbors} | {count} | {speeds[-1]:.1f} | {ratio} |", flush=True)
    engine.close()


if __name__ == "__main__":
    main()
