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
Pairs per second of RetrieverTrainer and of sentence-transformers' trainer, with the same encoder, batches and lengths.

    OMP_NUM_THREADS=1 python benchmarks/retriever_speed.py --encoder sentence-transformers/all-MiniLM-L6-v2
    OMP_NUM_THREADS=1 python benchmarks/retriever_speed.py --encoder … --pairs train.jsonl.gz

The two take turns in one process. Without `--pairs`, all texts have `--length` tokens, so that nobody saves padding.
Seconds are those of the processor on the CPU, which other load does not change, and those of the clock on a GPU.
"""

import argparse
import statistics
import tempfile
import time

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)
from transformers import AutoTokenizer, TrainerCallback

from data_prep.pairs.pairs import load_pairs
from modeling_retro.encoder.chunk_encoder import load_text_encoder
from trainers.retriever.config import RetrieverTrainingArguments
from trainers.retriever.trainer import RetrieverTrainer


class StepTimes(TrainerCallback):
    """Seconds of each step but the first, which starts up."""

    def __init__(self, clock):
        self.clock = clock
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(self.clock())

    def median(self):
        return statistics.median(end - start for start, end in zip(self.ends, self.ends[1:], strict=False))


def make_pairs(tokenizer, rows, length):
    """Random texts of `length` tokens with the special ones, no two alike."""
    generator = torch.Generator().manual_seed(0)
    words = [token for token in tokenizer.get_vocab() if token.isascii() and token.isalpha() and len(token) > 2]
    words = [word for word in words if len(tokenizer.tokenize(word)) == 1]
    length -= tokenizer.num_special_tokens_to_add()
    choice = torch.randint(len(words), (2, rows, length), generator=generator).tolist()
    texts = [[" ".join(words[number] for number in row) for row in column] for column in choice]
    return Dataset.from_dict({"anchor": texts[0], "positive": texts[1]})


def run_ours(encoder, tokenizer, pairs, options, times, max_length):
    trainer = RetrieverTrainer(
        model=load_text_encoder(encoder),
        args=RetrieverTrainingArguments(**options, max_length=max_length),
        processing_class=tokenizer,
        train_dataset=pairs,
        callbacks=[times],
    )
    trainer.train()


def run_theirs(encoder, tokenizer, pairs, options, times, max_length):
    model = SentenceTransformer(encoder)
    model.max_seq_length = max_length
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**options),
        train_dataset=pairs,
        loss=losses.MultipleNegativesRankingLoss(model),
        callbacks=[times],
    )
    trainer.train()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--pairs", help="pair set; random texts without it")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.encoder)
    rows = arguments.batch_size * arguments.steps
    if arguments.pairs is None:
        pairs = make_pairs(tokenizer, rows, arguments.length)
    else:
        pairs = load_pairs(arguments.pairs).shuffle(seed=0).select(range(rows))
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    seconds = {run_ours: [], run_theirs: []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.rounds):
            options = {
                "output_dir": folder,
                "per_device_train_batch_size": arguments.batch_size,
                "max_steps": arguments.steps,
                "learning_rate": 2e-5,
                "warmup_steps": 0,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "seed": seed,
            }
            for run in seconds:
                times = StepTimes(clock)
                run(arguments.encoder, tokenizer, pairs, options, times, arguments.length)
                seconds[run].append(times.median())
    rates = {run: [arguments.batch_size / second for second in rounds] for run, rounds in seconds.items()}
    for run, name in ((run_ours, "RetrieverTrainer"), (run_theirs, "sentence-transformers")):
        print(
            f"{name:<24} {statistics.median(rates[run]):8.1f} pairs/s  (rounds: {[round(r, 1) for r in rates[run]]})"
        )
    ratios = [ours / theirs for ours, theirs in zip(rates[run_ours], rates[run_theirs], strict=True)]
    print(
        f"ratio                    {statistics.median(ratios):8.2f}          (rounds: {[round(r, 2) for r in ratios]})"
    )


if __name__ == "__main__":
    main()
