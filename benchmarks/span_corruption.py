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
Span corruption by whole arrays against a loop over tokens; both cut a batch into the same number of spans.

    python benchmarks/span_corruption.py
"""

import random
import time

import numpy as np
import torch
from transformers import ByT5Tokenizer

from trainers.span_corruption import DataCollatorForSpanCorruption


def cut(items: int, segments: int) -> list[int]:
    """Lengths of `segments` random segments of `items` things: begins are shuffled, then counted."""
    begins = [i < segments - 1 for i in range(items - 1)]
    random.shuffle(begins)
    lengths = [1]
    for begin in begins:
        if begin:
            lengths.append(1)
        else:
            lengths[-1] += 1
    return lengths


def corrupt_by_loop(
    row: list[int], density: float, mean_length: float, first_sentinel: int, eos: int
) -> tuple[list[int], list[int]]:
    """The definition, one token at a time."""
    noise = round(len(row) * density)
    spans = round(noise / mean_length)
    mask = []
    for kept_length, noise_length in zip(cut(len(row) - noise, spans), cut(noise, spans), strict=True):
        mask += [False] * kept_length + [True] * noise_length
    inputs, labels = [], []
    previous, sentinel = False, first_sentinel
    for token, is_noise in zip(row, mask, strict=True):
        if is_noise and not previous:
            inputs.append(sentinel)
            labels.append(sentinel)
            sentinel -= 1
        (labels if is_noise else inputs).append(token)
        previous = is_noise
    return [*inputs, eos], [*labels, eos]


def fastest(function, repeats: int = 30) -> float:
    """Seconds of the fastest of some calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def main():
    torch.set_num_threads(1)
    tokenizer = ByT5Tokenizer()
    collator = DataCollatorForSpanCorruption(tokenizer)
    rng = np.random.default_rng(0)
    print(
        f"rows of {collator.raw_length} tokens, inputs of {collator.input_length}, labels of {collator.target_length}"
    )
    print("batch   loop ms   arrays ms   times faster")
    for batch_size in (8, 32, 128):
        rows = rng.integers(3, 259, (batch_size, collator.raw_length))
        lists = rows.tolist()
        features = [{"input_ids": row} for row in rows]

        def by_loop(lists=lists):
            pairs = [corrupt_by_loop(row, 0.15, 3.0, len(tokenizer) - 1, tokenizer.eos_token_id) for row in lists]
            return torch.tensor([inputs for inputs, _ in pairs]), torch.tensor([labels for _, labels in pairs])

        loop, arrays = fastest(by_loop), fastest(lambda features=features: collator(features))
        print(f"{batch_size:5d}{loop * 1e3:10.2f}{arrays * 1e3:12.2f}{loop / arrays:15.1f}")


if __name__ == "__main__":
    main()
