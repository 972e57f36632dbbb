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

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel


@torch.inference_mode()
def operations_per_token(
    model: PreTrainedModel, num_neighbors: int, window_chunks: int, modes: tuple[str, ...] = ("off", "on", "in_front")
) -> dict[str, float]:
    """
    Counts the operations for one token at the end of a full window, on average over its chunk. Earlier tokens are in
    the cache. But if neighbors stand in front of the window, the whole window is read again whenever they change.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A RETRO model of either kind.
        num_neighbors (`int`):
            Number of neighbors of a chunk. None of them was read before.
        window_chunks (`int`):
            Length of the window in chunks.
        modes (`tuple[str, ...]`, *optional*):
            Some of `"off"`, `"on"` and `"in_front"`.

    Returns:
        `dict[str, float]`: operations (two for a multiplication with an addition) for each mode.
    """
    size, length = model.config.chunk_size, model.config.neighbor_length * num_neighbors
    # The counter does not see the operations of SDPA's kernel for CPUs.
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")

    def count(num_tokens: int, num_slots: int = 0) -> int:
        inputs = {}
        if num_slots > 0:
            shape = (1, num_slots, num_neighbors, model.config.neighbor_length)
            inputs["neighbor_input_ids"] = torch.randint(model.config.vocab_size, shape, device=model.device)
        tokens = torch.ones((1, num_tokens), dtype=torch.long, device=model.device)
        with FlopCounterMode(display=False) as counter, model.retrieval(False):
            model(input_ids=tokens, use_cache=False, **inputs)
        return counter.get_total_flops()

    window = window_chunks * size
    counted = {}
    if "off" in modes:
        counted["off"] = count(window) - count(window - size)
    if "on" in modes:
        counted["on"] = count(window, window_chunks) - count(window - size, window_chunks - 1)
    if "in_front" in modes:
        counted["in_front"] = count(window + length)
    model.set_attn_implementation(implementation)
    return {mode: operations / size for mode, operations in counted.items()}


def read_clocks() -> np.ndarray:
    """Wall-clock time and processor time of this process in seconds, float64 `[2]`."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time()])
