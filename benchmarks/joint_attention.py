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
What reading neighbors with a decoder's own attention costs, as ratios in one run. Generation with retrieval at every
chunk is compared with the decoder itself through plain transformers, with the wrapped decoder without retrieval, and
with the neighbor in front of a window that is read again at every chunk; prefill, decoding step and training step with
neighbors are compared with the same without, beside the ratio that the operations predict.

    python benchmarks/joint_attention.py --model HuggingFaceTB/SmolLM2-135M --new_tokens 448 --repeats 3

Neighbors are random tokens, a new one for every chunk, so that none is kept from before. Searching is not measured.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from data_prep.arguments import parse_arguments, run_command
from data_prep.memory import keep_freed_memory
from modeling_retro import RetroJointCache, RetroJointForCausalLM
from trainers.evaluation.operations import operations_per_token


@dataclass
class JointAttentionArguments:
    """Arguments of this benchmark."""

    model: str = field(metadata={"help": "Folder or Hub id of the decoder."})
    prompt_tokens: int = field(default=64, metadata={"help": "Tokens of the prompt."})
    new_tokens: int = field(default=448, metadata={"help": "Tokens to generate."})
    num_neighbors: int = field(default=1, metadata={"help": "Neighbors of a chunk."})
    window_chunks: int = field(default=8, metadata={"help": "Chunks in prefill, training and in the window."})
    repeats: int = field(default=3, metadata={"help": "Runs of each measurement, of which the median counts."})
    dtype: str = field(default="float32", metadata={"help": "Torch dtype of the weights."})
    threads: int = field(default=1, metadata={"help": "Threads."})


class RandomRetriever:
    """New random neighbors at every call."""

    def __init__(self, vocab_size: int, length: int):
        self.vocab_size, self.length = vocab_size, length

    def retrieve(self, chunk_input_ids: torch.LongTensor, k: int) -> "RandomRetriever":
        shape = (len(chunk_input_ids), k, self.length)
        self.neighbor_input_ids = torch.randint(self.vocab_size, shape)
        self.neighbor_attention_mask = torch.ones(shape, dtype=torch.bool)
        return self


def median_seconds(functions: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """
    Median seconds of the processor for each function. The functions take turns, so that all see the same machine.
    Time in which other programs had the processor does not count.
    """
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start_time = time.process_time()
            function()
            seconds[name].append(time.process_time() - start_time)
    return {name: statistics.median(values) for name, values in seconds.items()}


@torch.inference_mode()
def generate_in_front(
    model: RetroJointForCausalLM, prompt: torch.LongTensor, arguments: JointAttentionArguments
) -> None:
    """Greedy generation in which new neighbors stand in front of the window, read again at every chunk."""
    size, length = model.config.chunk_size, model.config.neighbor_length * arguments.num_neighbors
    tokens = prompt
    for _ in range(0, arguments.new_tokens, size):
        neighbors = torch.randint(model.config.vocab_size, (1, length))
        window = tokens[:, -arguments.window_chunks * size :]
        inputs = torch.cat([neighbors, window], dim=1)
        output = model.decoder.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=size, min_new_tokens=size, do_sample=False
        )
        tokens = torch.cat([tokens, output[:, -size:]], dim=1)


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(JointAttentionArguments, argv=argv, description=__doc__)
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    model = RetroJointForCausalLM.from_decoder_pretrained(
        arguments.model, num_neighbors=arguments.num_neighbors, dtype=dtype
    )
    config = model.config
    model.set_retriever(RandomRetriever(config.vocab_size, config.neighbor_length))
    prompt = torch.randint(config.vocab_size, (1, arguments.prompt_tokens))
    options = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": arguments.new_tokens,
        "min_new_tokens": arguments.new_tokens,
        "do_sample": False,
    }

    def generate(wrapped: bool, is_on: bool = False) -> None:
        with model.retrieval(is_on):
            (model if wrapped else model.decoder).generate(prompt, **options)

    generation = median_seconds(
        {
            "plain transformers": lambda: generate(wrapped=False),
            "OFF": lambda: generate(wrapped=True),
            "ON": lambda: generate(wrapped=True, is_on=True),
            "neighbor in front": lambda: generate_in_front(model, prompt, arguments),
        },
        arguments.repeats,
    )
    window = arguments.window_chunks * config.chunk_size
    row = torch.randint(config.vocab_size, (1, window))
    shape = (1, arguments.window_chunks, arguments.num_neighbors, config.neighbor_length)

    def forward(is_on: bool, train: bool = False) -> None:
        inputs = {"neighbor_input_ids": torch.randint(config.vocab_size, shape)} if is_on else {}
        if train:
            model(row, labels=row, use_cache=False, **inputs).loss.backward()
            model.zero_grad()
        else:
            with torch.inference_mode():
                model(row, logits_to_keep=1, **inputs)

    caches = {}
    with torch.inference_mode(), model.retrieval(False):
        for is_on in (False, True):
            inputs = {"neighbor_input_ids": torch.randint(config.vocab_size, shape)} if is_on else {}
            caches[is_on] = model(row, past_key_values=RetroJointCache(), **inputs).past_key_values

    def step(is_on: bool) -> None:
        with torch.inference_mode(), model.retrieval(False):
            for _ in range(20):
                model(row[:, :1], past_key_values=caches[is_on])

    with model.retrieval(False):
        parts = {
            "prefill": median_seconds({"OFF": lambda: forward(False), "ON": lambda: forward(True)}, arguments.repeats),
            "20 decoding steps": median_seconds(
                {"OFF": lambda: step(False), "ON": lambda: step(True)}, arguments.repeats
            ),
            "training step": median_seconds(
                {"OFF": lambda: forward(False, True), "ON": lambda: forward(True, True)}, arguments.repeats
            ),
        }
    operations = operations_per_token(model, arguments.num_neighbors, arguments.window_chunks)

    print(f"| {arguments.new_tokens} tokens after {arguments.prompt_tokens} | seconds | × plain transformers |")
    print("|---|---|---|")
    for name, seconds in generation.items():
        print(f"| {name} | {seconds:.2f} | {seconds / generation['plain transformers']:.3f} |")
    print(f"\nneighbor in front / ON: {generation['neighbor in front'] / generation['ON']:.2f}")
    print(f"ON / OFF of generation: {generation['ON'] / generation['OFF']:.3f}\n")
    print("| | OFF (s) | ON (s) | ON / OFF |\n|---|---|---|---|")
    for name, seconds in parts.items():
        print(f"| {name} | {seconds['OFF']:.3f} | {seconds['ON']:.3f} | {seconds['ON'] / seconds['OFF']:.2f} |")
    print(f"| operations for a token of a full window | | | {operations['on'] / operations['off']:.2f} |")
    print(f"\noperations of the neighbor in front / ON: {operations['in_front'] / operations['on']:.2f}")


if __name__ == "__main__":
    run_command(main)
