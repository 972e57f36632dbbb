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
Tokens per second of one stream and of eight that run together, with drafts and without, in one run.

    python benchmarks/serving_streams.py --model retro-quickstart/model --datastore retro-quickstart/datastore

Each prompt is a held-out text of its own. What neighbors the model has read before is forgotten before each line.
"""

import argparse
import threading
import time

from modeling_retro.drafts_retro import DRAFT_TOKENS
from serving.decoding_batch import DecodingBatch, Row
from serving.engine import Completion, Engine
from serving.load import load_model
from serving.sampling import SamplingParameters


def run(engine, prompts, num_neighbors, max_tokens):
    """Seconds until all completions are there, and the number of their steps."""
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
    completions = [Completion(Row(list(ids), num_neighbors), max_tokens, parameters, (), emit) for ids in prompts]
    engine.submit(completions)
    done.wait()
    return time.perf_counter() - start_time, sum(one.num_steps for one in completions)


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
    batch = DecodingBatch(loaded.model, loaded.retriever)
    engine = Engine(batch, loaded.retriever.datastore.tokenizer, ())
    run(engine, prompts[:1], 0, 8)
    print("| neighbors | drafts | streams | tokens/s | ratio | tokens a step |\n|---|---|---|---|---|---|")
    k = loaded.model.config.num_neighbors
    for num_neighbors, draft_tokens in ((0, 0), (k, 0), (k, DRAFT_TOKENS)):
        batch.draft_tokens, speeds = draft_tokens, []
        for count in (1, len(prompts)):
            if hasattr(loaded.model, "neighbor_memory"):
                loaded.model.neighbor_memory.clear()
            seconds, num_steps = run(engine, prompts[:count], num_neighbors, arguments.max_tokens)
            speeds.append(count * arguments.max_tokens / seconds)
            columns = (num_neighbors, draft_tokens, count, f"{speeds[-1]:.1f}", f"{speeds[-1] / speeds[0]:.2f}")
            per_step = count * arguments.max_tokens / num_steps
            print("|", *(f"{column} |" for column in columns), f"{per_step:.2f} |", flush=True)
    engine.close()


if __name__ == "__main__":
    main()
