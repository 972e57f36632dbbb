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
"""Counts the operations of a model for a token, without retrieval, with it, and with the neighbors in front"""

import time
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel


@torch.inference_mode()
def operations_per_token(
    model: PreTrainedModel, num_neighbors: int, window_chunks: int, modes: tuple[str, ...] = ("off", "on", "in_front")
) -> dict[str, float]:
    """
    Counts the operations for one token of the last chunk of a full window, on average over the chunk. Earlier tokens
    are in the cache. With neighbors, those of the chunk are read, and then its own tokens again, if the model does so.
    But if neighbors stand in front of the window, the whole window is read again whenever they change, and only the
    tokens of the chunk are predicted.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A RETRO model of either kind.
        num_neighbors (`int`):
            Number of neighbors of a chunk. None of them was read before.
        window_chunks (`int`):
            Length of the window in chunks, at least 2.
        modes (`tuple[str, ...]`, *optional*):
            Some of `"off"`, `"on"` and `"in_front"`.

    Returns:
        `dict[str, float]`: operations (two for a multiplication with an addition) for each mode.
    """
    size, length = model.config.chunk_size, model.config.neighbor_length
    # The counter does not see the operations of SDPA's kernel for CPUs.
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")

    def draw(*shape: int) -> torch.LongTensor:
        return torch.randint(model.config.vocab_size, shape, device=model.device)

    def read(num_chunks: int, is_on: bool, **inputs: Any) -> None:
        if is_on:
            inputs["neighbor_input_ids"] = draw(1, num_chunks, num_neighbors, length)
        model(input_ids=draw(1, num_chunks * size), **inputs)

    operations = {}
    with model.retrieval(False):
        for mode in modes:
            if mode == "in_front":
                row = draw(1, window_chunks * size + num_neighbors * length)
                with FlopCounterMode(display=False) as counter:
                    model(input_ids=row, use_cache=False, logits_to_keep=size)
            else:
                cache = model.cache_class(config=model.config)
                read(window_chunks - 1, mode == "on", past_key_values=cache, logits_to_keep=1)
                with FlopCounterMode(display=False) as counter:
                    read(1, mode == "on", past_key_values=cache)
            operations[mode] = counter.get_total_flops() / size
    model.set_attn_implementation(implementation)
    return operations


def read_clocks() -> np.ndarray:
    """Wall-clock time and processor time of this process in seconds, float64 `[2]`."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time()])
