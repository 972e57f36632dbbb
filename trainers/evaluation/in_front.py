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
"""The usual alternative to RETRO: a language model that reads the neighbors in front of its window"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import PartialState
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.datastore.splits import DatastoreSplit

from .predictions import token_nats


def in_front_bits(
    model: PreTrainedModel,
    datastore: RetroDatastore,
    split: DatastoreSplit,
    windows: Sequence[tuple[int, int, int]],
    neighbor_ids: np.ndarray,
    batch_size: int,
    description: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Computes the bits that a model without retrieval needs for each chunk, when the neighbors of the chunk before it
    stand in front of its window (in-context retrieval, arXiv 2302.00083). The neighbors change with each chunk, so the
    model reads the window again for each. A chunk sees the same neighbors and the same context as in
    [`~trainers.evaluation.evaluate.token_bits`], except that its last token does not see its own neighbors.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A RETRO model, which is run without retrieval, or any causal language model.
        datastore ([`RetroDatastore`]):
            The datastore of the neighbors.
        split ([`DatastoreSplit`]):
            The chunks to measure.
        windows (`Sequence[tuple[int, int, int]]`):
            First chunk, end and first counted chunk of each window, as chunk ids of the split.
        neighbor_ids (`np.ndarray`):
            Global chunk ids of the neighbors of each chunk, int64 `[chunks, k]`, -1 for absent ones.
        batch_size (`int`):
            Number of chunks in a forward pass.
        description (`str`, *optional*):
            Label of the progress bar. Without it there is no bar.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: bits float64 and number of counted tokens int64, both `[chunks]`.
    """
    state = PartialState()
    tp_size = getattr(model, "tp_size", None) or 1
    num_workers, worker = state.num_processes // tp_size, state.process_index // tp_size
    jobs = sorted(
        ((chunk, start) for start, end, first in windows for chunk in range(first, end)),
        key=lambda job: job[0] - job[1],
    )
    batches = [jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)]
    bits = np.zeros(max(end for _, end, _ in windows))
    num_tokens = np.zeros(len(bits), dtype=np.int64)
    was_training = model.training
    model.eval()
    rounds = range(-(-len(batches) // num_workers))
    for i in tqdm(rounds, desc=description, disable=description is None or not state.is_main_process):
        i = i * num_workers + worker
        found, counted = _batch_bits(model, datastore, split, batches[i % len(batches)], neighbor_ids)
        if i < len(batches) and state.process_index % tp_size == 0:
            chunks = [chunk for chunk, _ in batches[i]]
            bits[chunks], num_tokens[chunks] = found, counted
    model.train(was_training)
    return bits, num_tokens


@dataclass
class FrontRows:
    """
    Rows in which neighbors stand in front of windows, and the tokens that are predicted in them.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, T)`):
            Tokens of the rows, with padding behind them.
        rows (`torch.LongTensor` of shape `(N,)`), columns (`torch.LongTensor` of shape `(N,)`):
            Row and column of each predicted token: all tokens of the last chunk of a row, except a first token of a
            row, which has no context.
        places (`torch.LongTensor` of shape `(N,)`):
            Place of each predicted token in its chunk.
    """

    input_ids: torch.LongTensor
    rows: torch.LongTensor
    columns: torch.LongTensor
    places: torch.LongTensor


def rows_in_front(
    datastore: RetroDatastore,
    split: DatastoreSplit,
    jobs: Sequence[tuple[int, int]],
    neighbor_ids: np.ndarray,
    device: torch.device,
) -> FrontRows:
    """
    Puts the neighbors of the chunk before in front of the window of each of some chunks.

    Args:
        datastore ([`RetroDatastore`]), split ([`DatastoreSplit`]):
            See [`in_front_bits`].
        jobs (`Sequence[tuple[int, int]]`):
            Pairs of a chunk and the first chunk of its window. The first chunk of a window has no neighbors.
        neighbor_ids (`np.ndarray`):
            Global chunk ids of the neighbors of each chunk, int64 `[chunks, k]`, -1 for absent ones.
        device (`torch.device`):
            Where to put the tensors.

    Returns:
        [`FrontRows`]
    """
    rows, begins, ends = [], [], []
    for chunk, start in jobs:
        tokens, mask = split.chunks.take(np.arange(start, chunk + 1))
        row = tokens[mask]
        if chunk > start:
            neighbors, neighbor_mask = datastore.take_neighbors(neighbor_ids[chunk - 1])
            row = np.concatenate([neighbors[neighbor_mask], row])
        rows.append(torch.from_numpy(row))
        begins.append(len(row) - int(mask[-1].sum()))
        ends.append(len(row))
    input_ids = pad_sequence(rows, batch_first=True)
    begins, ends, columns = (
        torch.tensor(begins)[:, None],
        torch.tensor(ends)[:, None],
        torch.arange(input_ids.shape[1]),
    )
    is_predicted = (columns >= begins.clamp(min=1)) & (columns < ends)
    rows, columns = is_predicted.nonzero(as_tuple=True)
    tensors = input_ids, rows, columns, columns - begins[rows, 0]
    return FrontRows(*(tensor.to(device) for tensor in tensors))


def _batch_bits(
    model: PreTrainedModel,
    datastore: RetroDatastore,
    split: DatastoreSplit,
    jobs: Sequence[tuple[int, int]],
    neighbor_ids: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Bits and numbers of counted tokens of some chunks. Each chunk is given with the first chunk of its window."""
    front = rows_in_front(datastore, split, jobs, neighbor_ids, model.device)
    nats = token_nats(model, {"input_ids": front.input_ids}, front.rows, front.columns, in_step=True).numpy()
    rows = front.rows.cpu().numpy()
    found = np.bincount(rows, nats, minlength=len(jobs)) / math.log(2)
    counted = np.bincount(rows, minlength=len(jobs))
    for n, (chunk, start) in enumerate(jobs):
        # The first token of a window has no context, but a BOS token is known.
        first_token = split.chunks.take(np.array([start]))[0][0, 0]
        if chunk == start and first_token != datastore.tokenizer.bos_token_id:
            found[n] += math.log2(model.config.vocab_size)
            counted[n] += 1
    return found, counted


__all__ = ["FrontRows", "in_front_bits", "rows_in_front"]
