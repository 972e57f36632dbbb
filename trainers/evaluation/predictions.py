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
"""The predictions of a model in blocks of tokens, so that the logits of a whole batch never exist"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather
from transformers import PreTrainedModel


# Number of logits in a block. In float32 these are 64 MiB on a CPU and 512 MiB on an accelerator.
CPU_BLOCK_SIZE, BLOCK_SIZE = 1 << 24, 1 << 27


@torch.inference_mode()
def head_inputs(model: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    """
    Computes the states from which the head of a model makes its logits. The head itself computes one column only.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A RETRO model. It does not look up neighbors, but reads those that it is given.
        inputs:
            The arguments of `forward`.

    Returns:
        `torch.Tensor`: the states `[B, T, d]`.
    """
    states = []

    def keep(found: torch.Tensor) -> torch.Tensor:
        states.append(found)
        return found[:, :1]

    with _into_head(model, keep):
        model(**inputs, use_cache=False)
    return states[0]


@contextmanager
def _into_head(model: PreTrainedModel, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Changes the states that enter the head in a forward pass without retrieval."""
    depth = 0

    def begin(*args: Any) -> None:
        nonlocal depth
        depth += 1

    def end(*args: Any) -> None:
        nonlocal depth
        depth -= 1

    def enter(head: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        # A model that tries its decoder runs itself inside of its forward pass, and must find all of its logits.
        return (change(args[0]), *args[1:]) if depth == 1 else None

    handles = [
        model.register_forward_pre_hook(begin),
        model.register_forward_hook(end, always_call=True),
        model.get_output_embeddings().register_forward_pre_hook(enter),
    ]
    try:
        with model.retrieval(False):
            yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def predictions(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    rows: torch.LongTensor,
    columns: torch.LongTensor,
    in_step: bool = False,
) -> Iterator[tuple[torch.LongTensor, torch.Tensor]]:
    """
    Computes the logits of some tokens of a batch, block by block. All that a model does after its head, such as
    scaling or capping of logits, is done by the model's own forward pass, which is given the states of a block in the
    place of those of a single token. So the logits equal those of one forward pass, whatever the model.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A RETRO model in evaluation mode.
        inputs (`dict[str, torch.Tensor]`):
            The arguments of `forward`, with `input_ids` `[B, T]`.
        rows (`torch.LongTensor`), columns (`torch.LongTensor`):
            The row and the column of each token whose logits are wanted, both `[N]`.
        in_step (`bool`, *optional*, defaults to `False`):
            Whether all processes call this function together, as they must if the weights are sharded. They then all
            run the model equally often.

    Yields:
        `tuple[torch.LongTensor, torch.Tensor]`: the places `[n]` among the N tokens, and their logits `[n, V]` in
        float32 or better.
    """
    states = head_inputs(model, **inputs)[rows, columns]  # [N, d]
    size = CPU_BLOCK_SIZE if model.device.type == "cpu" else BLOCK_SIZE
    blocks = torch.arange(len(states), device=states.device).split(max(1, size // model.config.vocab_size))
    for number in range(_most_of_processes(len(blocks)) if in_step else len(blocks)):
        places = blocks[min(number, len(blocks) - 1)]
        block = states[places][None]  # [1, n, d]
        with _into_head(model, lambda _, block=block: block):
            logits = model(input_ids=inputs["input_ids"][:1, :1], use_cache=False).logits[0]
        if number < len(blocks):
            yield places, logits.to(torch.promote_types(logits.dtype, torch.float32))


def token_nats(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    rows: torch.LongTensor,
    columns: torch.LongTensor,
    in_step: bool = False,
) -> torch.Tensor:
    """
    Computes the nats that a model needs for some tokens of a batch.

    Args:
        model, inputs, in_step:
            See [`predictions`].
        rows (`torch.LongTensor`), columns (`torch.LongTensor`):
            The row and the column of each token, both `[N]`. The first column has nothing that predicts it.

    Returns:
        `torch.Tensor`: float64 `[N]`, on the CPU.
    """
    tokens = inputs["input_ids"][rows, columns]
    nats = torch.empty(len(tokens), dtype=torch.float64)
    for places, logits in predictions(model, inputs, rows, columns - 1, in_step):
        nats[places.cpu()] = F.cross_entropy(logits, tokens[places], reduction="none").double().cpu()
    return nats


def _most_of_processes(number: int) -> int:
    """The largest of the numbers of all processes."""
    state = PartialState()
    return int(gather(torch.tensor([number], device=state.device)).max())


__all__ = ["head_inputs", "predictions", "token_nats"]
