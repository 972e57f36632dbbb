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
What reading neighbors with a decoder's own attention costs, as ratios in one run.

Prefill: rows of growing length, whose neighbors were read before, against the same rows without neighbors. Training: a
step forward and backward, in which neighbors are read too, beside the ratio that the operations predict. Generation:
greedy, with a new random neighbor for every chunk, against the decoder through plain transformers, without retrieval,
and with the neighbor in front of a window that is read again at every chunk.

    python benchmarks/joint_scaling.py --model HuggingFaceTB/SmolLM2-135M-Instruct

With `--reader_rank`, only the training of a reader is measured: adapters of this rank, in bfloat16, with attention in
parts and with one mask over neighbors and row.

    python benchmarks/joint_scaling.py --model HuggingFaceTB/SmolLM2-135M-Instruct --reader_rank 16 --num_neighbors 1

With `--cross_attention`, the same decoder is retrofitted with the cross attention of the paper, and only prefill is
measured. It encodes the neighbors of every row anew; the table says which share its parts have.

Neighbors are random tokens. Searching is not measured.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from data_prep.arguments import parse_arguments, run_command
from data_prep.memory import keep_freed_memory
from modeling_retro import RetroForCausalLM, RetroJointForCausalLM


@dataclass
class JointScalingArguments:
    """Arguments of this benchmark."""

    model: str = field(metadata={"help": "Folder or Hub id of the decoder."})
    prefill: list[int] = field(
        default_factory=lambda: [512, 1024, 2048, 4096, 8192], metadata={"help": "Lengths of the rows of prefill."}
    )
    training: list[int] = field(
        default_factory=lambda: [512, 2048], metadata={"help": "Lengths of the rows of a training step."}
    )
    num_neighbors: int = field(default=2, metadata={"help": "Neighbors of a chunk in prefill and training."})
    prompt_tokens: int = field(default=64, metadata={"help": "Tokens of the prompt of a generation."})
    new_tokens: int = field(default=448, metadata={"help": "Tokens to generate. 0 leaves generation out."})
    window_chunks: int = field(default=8, metadata={"help": "Chunks in the window that is read again."})
    repeats: int = field(default=3, metadata={"help": "Runs of each measurement, of which the median counts."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Train with checkpoints: a step then reads everything twice, and keeps less."}
    )
    reader_rank: int = field(default=0, metadata={"help": "Measure the training of a reader of this rank, if not 0."})
    cross_attention: bool = field(default=False, metadata={"help": "Measure the cross attention of the paper."})
    dtype: str = field(default="bfloat16", metadata={"help": "Torch dtype of the weights in prefill and generation."})
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


def print_ratios(title: str, rows: dict[int, dict[str, float]]) -> None:
    """Prints a table with a row for each length, whose entries are divided by that of `OFF`."""
    names = [name for name in next(iter(rows.values())) if name != "OFF"]
    print(f"\n| {title} | OFF (s) | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}")
    for length, seconds in rows.items():
        ratios = [f"{seconds[name] / seconds['OFF']:.2f}" for name in names]
        print(f"| {length} | {seconds['OFF']:.3f} | {' | '.join(ratios)} |", flush=True)


def random_neighbors(model: RetroJointForCausalLM, num_tokens: int, k: int) -> dict[str, torch.LongTensor]:
    """New neighbors of each chunk of one row."""
    config = model.config
    shape = (1, num_tokens // config.chunk_size, k, config.neighbor_length)
    return {"neighbor_input_ids": torch.randint(config.vocab_size, shape)}


def set_reread(model: RetroJointForCausalLM, reads_again: bool) -> None:
    """Lets the model read whole chunks again, or none."""
    model.config.reread_tokens = model.config.chunk_size if reads_again else 0


def measure_prefill(model: RetroJointForCausalLM, arguments: JointScalingArguments) -> None:
    """Rows whose neighbors are in memory. The next token is all that is predicted, or every token."""
    model.neighbor_memory.max_bytes = 1 << 33
    rows = {}
    for length in arguments.prefill:
        row = torch.randint(model.config.vocab_size, (1, length))
        neighbors = random_neighbors(model, length, arguments.num_neighbors)

        def read(reads_again: bool, keep: int, row=row, **neighbors: torch.LongTensor) -> None:
            set_reread(model, reads_again)
            with torch.inference_mode():
                model(row, logits_to_keep=keep, use_cache=False, **neighbors)

        read(False, 1, **neighbors)
        # Two logits are a row in which something is predicted: both states of each token are computed.
        functions = {
            "OFF": lambda read=read: read(False, 1),
            "ON": lambda read=read, neighbors=neighbors: read(False, 1, **neighbors),
            "read again, as a prompt": lambda read=read, neighbors=neighbors: read(True, 1, **neighbors),
            "read again, as a row": lambda read=read, neighbors=neighbors: read(True, 2, **neighbors),
        }
        rows[length] = median_seconds(functions, arguments.repeats)
        print_ratios("prefill of tokens", {length: rows[length]})
        model.neighbor_memory.clear()
    print_ratios("prefill of tokens", rows)


class Clock:
    """Seconds of the processor inside some modules, which do not contain each other."""

    def __init__(self, modules: Sequence[torch.nn.Module]):
        self.seconds, self._start_time = 0.0, 0.0
        for module in modules:
            module.register_forward_pre_hook(self._start)
            module.register_forward_hook(self._stop)

    def _start(self, *_) -> None:
        self._start_time = time.process_time()

    def _stop(self, *_) -> None:
        self.seconds += time.process_time() - self._start_time


def measure_cross_attention(arguments: JointScalingArguments) -> None:
    """Rows whose neighbors are encoded, and of which the next token alone is predicted."""
    model = RetroForCausalLM.from_decoder_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
    clocks = {
        "in the encoder": Clock([model.model.neighbor_encoder]),
        "in cross attention": Clock([layer.cross_attn for layer in model.model.layers if layer.has_cross_attention]),
    }
    rows = {}
    for length in arguments.prefill:
        row = torch.randint(model.config.vocab_size, (1, length))
        neighbors = random_neighbors(model, length, arguments.num_neighbors)

        def read(row=row, **neighbors: torch.LongTensor) -> None:
            with torch.inference_mode():
                model(row, logits_to_keep=1, use_cache=False, **neighbors)

        for clock in clocks.values():
            clock.seconds = 0.0
        functions = {"OFF": read, "ON": lambda read=read, neighbors=neighbors: read(**neighbors)}
        rows[length] = median_seconds(functions, arguments.repeats)
        rows[length] |= {name: clock.seconds / arguments.repeats for name, clock in clocks.items()}
        print_ratios("prefill of tokens", {length: rows[length]})
    print_ratios("prefill of tokens", rows)


def predicted_ratio(model: RetroJointForCausalLM, length: int, arguments: JointScalingArguments, reads: int) -> float:
    """
    The operations of a row with neighbors as a share of those without. A token costs its weights, and two products
    with each key that it sees. `reads` is how often a token of the row is read.
    """
    config = model.decoder.config
    head = model.get_output_embeddings().weight.numel()
    weights = sum(
        weight.numel() for name, weight in model.decoder.named_parameters() if "embed" not in name and weight.ndim > 1
    )
    weights -= head if not config.tie_word_embeddings else 0
    neighbor_length, k = model.config.neighbor_length, arguments.num_neighbors
    per_key = 2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    row = length * (weights + per_key * length / 2)
    read_neighbors = length / model.config.chunk_size * k * neighbor_length * (weights + per_key * neighbor_length / 2)
    seen = length * per_key * k * neighbor_length
    # Checkpoints are read forward twice, which counts a third of a step. The head has none.
    layers = 4 / 3 if arguments.gradient_checkpointing else 1
    return (layers * (reads * (row + seen) + read_neighbors) + length * head) / (layers * row + length * head)


def measure_training(model: RetroJointForCausalLM, arguments: JointScalingArguments) -> None:
    """Steps forward and backward over one row, in which all neighbors are read."""
    model.float().train()
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    rows = {}
    for length in arguments.training:
        row = torch.randint(model.config.vocab_size, (1, length))

        def step(is_on: bool, reads_again: bool = False, row=row, length=length) -> None:
            set_reread(model, reads_again)
            neighbors = random_neighbors(model, length, arguments.num_neighbors) if is_on else {}
            model(row, labels=row, use_cache=False, **neighbors).loss.backward()
            model.zero_grad()

        functions = {
            "OFF": lambda step=step: step(False),
            "ON": lambda step=step: step(True),
            "read again": lambda step=step: step(True, True),
        }
        rows[length] = median_seconds(functions, arguments.repeats)
        for name, reads in (("operations of ON", 1), ("operations of reading again", 2)):
            rows[length][name] = predicted_ratio(model, length, arguments, reads) * rows[length]["OFF"]
        print_ratios("training step of tokens", {length: rows[length]})
    print_ratios("training step of tokens", rows)


def measure_reader_training(arguments: JointScalingArguments) -> None:
    """Tokens of a row a second in steps that train the adapters of a frozen decoder."""
    adapter = {"r": arguments.reader_rank, "target_modules": "all-linear"}
    model = RetroJointForCausalLM.from_decoder_pretrained(
        arguments.model, dtype=torch.bfloat16, neighbor_adapter=adapter
    )
    model.freeze_decoder()
    model.train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    print("\nThe training of a reader, in tokens a second:\n")
    print("| tokens of a row | one mask | in parts | ratio | in parts, read again |\n|---|---|---|---|---|")
    for length in arguments.training:
        row = torch.randint(model.config.vocab_size, (1, length))

        def step(in_parts: bool, reads_again: bool = False, row=row, length=length) -> None:
            model._parts_work = in_parts
            set_reread(model, reads_again)
            with torch.autocast("cpu", torch.bfloat16):
                neighbors = random_neighbors(model, length, arguments.num_neighbors)
                model(row, labels=row, use_cache=False, **neighbors).loss.backward()
            model.zero_grad()

        step(True)  # memory is taken from the system for the first time
        functions = {
            "mask": lambda step=step: step(False),
            "parts": lambda step=step: step(True),
            "again": lambda step=step: step(True, True),
        }
        seconds = median_seconds(functions, arguments.repeats)
        mask, parts, again = (length / seconds[name] for name in functions)
        print(f"| {length} | {mask:.0f} | {parts:.0f} | {parts / mask:.2f} | {again:.0f} |", flush=True)


@torch.inference_mode()
def generate_in_front(
    model: RetroJointForCausalLM, prompt: torch.LongTensor, arguments: JointScalingArguments
) -> None:
    """Greedy generation in which new neighbors stand in front of the window, read again at every chunk."""
    size, length = model.config.chunk_size, model.config.neighbor_length
    tokens = prompt
    for _ in range(0, arguments.new_tokens, size):
        neighbors = torch.randint(model.config.vocab_size, (1, length))
        window = tokens[:, -arguments.window_chunks * size :]
        inputs = torch.cat([neighbors, window], dim=1)
        output = model.decoder.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=size, min_new_tokens=size, do_sample=False
        )
        tokens = torch.cat([tokens, output[:, -size:]], dim=1)


def measure_generation(model: RetroJointForCausalLM, arguments: JointScalingArguments) -> None:
    """Greedy generation with one neighbor for each chunk, which is new."""
    model.config.num_neighbors = 1
    model.set_retriever(RandomRetriever(model.config.vocab_size, model.config.neighbor_length))
    prompt = torch.randint(model.config.vocab_size, (1, arguments.prompt_tokens))
    options = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": arguments.new_tokens,
        "min_new_tokens": arguments.new_tokens,
        "do_sample": False,
    }

    def generate(wrapped: bool, is_on: bool = False, reads_again: bool = False) -> None:
        set_reread(model, reads_again)
        with model.retrieval(is_on):
            (model if wrapped else model.decoder).generate(prompt, **options)

    functions = {
        "OFF": lambda: generate(True),
        "plain transformers": lambda: generate(False),
        "ON": lambda: generate(True, True),
        "read again": lambda: generate(True, True, True),
        "neighbor in front": lambda: generate_in_front(model, prompt, arguments),
    }
    print_ratios("generation of tokens", {arguments.new_tokens: median_seconds(functions, arguments.repeats)})


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(JointScalingArguments, argv=argv, description=__doc__)
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.cross_attention:
        measure_cross_attention(arguments)
        return
    if arguments.reader_rank > 0:
        measure_reader_training(arguments)
        return
    model = RetroJointForCausalLM.from_decoder_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    measure_prefill(model, arguments)
    if arguments.new_tokens > 0:
        measure_generation(model, arguments)
    measure_training(model, arguments)


if __name__ == "__main__":
    run_command(main)
