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
"""The sliding windows in which held-out documents are read"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from tqdm.auto import tqdm
from transformers import PreTrainedModel


def sliding_windows(num_chunks: int, window_chunks: int, stride_chunks: int) -> list[tuple[int, int, int]]:
    """
    Makes windows over a document. Every chunk is counted in exactly one of them.

    Args:
        num_chunks (`int`):
            Length of the document in chunks.
        window_chunks (`int`), stride_chunks (`int`):
            Length of a window and step between windows, in chunks.

    Returns:
        `list[tuple[int, int, int]]`: start and end of each window, and the first chunk counted in it.
    """
    windows, counted = [], 0
    for start in range(0, num_chunks, stride_chunks):
        end = min(start + window_chunks, num_chunks)
        windows.append((start, end, counted))
        counted = end
        if end == num_chunks:
            break
    return windows


def document_windows(
    document_offsets: np.ndarray, window_chunks: int, stride_chunks: int
) -> list[tuple[int, int, int]]:
    """
    Makes windows over many documents.

    Args:
        document_offsets (`np.ndarray`):
            The first chunk of each document, and the end of the last one, int64 `[documents + 1]`.
        window_chunks (`int`), stride_chunks (`int`):
            Length of a window and step between windows, in chunks.

    Returns:
        `list[tuple[int, int, int]]`: first chunk, end and first counted chunk of each window.
    """
    return [
        (offset + start, offset + end, offset + first_counted)
        for offset, length in zip(document_offsets[:-1], np.diff(document_offsets), strict=True)
        for start, end, first_counted in sliding_windows(length, window_chunks, stride_chunks)
    ]


def document_offsets(document_id: np.ndarray, max_documents: int | None = None) -> np.ndarray:
    """The first chunk of each document, and the end of the last document, int64 `[documents + 1]`."""
    document_id = np.asarray(document_id)
    offsets = np.flatnonzero(np.diff(document_id, prepend=-1))
    offsets = np.append(offsets, len(document_id))
    return offsets if max_documents is None else offsets[: max_documents + 1]


def window_batches(
    model: PreTrainedModel, windows: Sequence[tuple[int, int, int]], batch_size: int, description: str | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """
    Gives each process its batches of windows of about the same length.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model. Processes that share its matrices (tensor parallelism) get the same windows.
        windows (`Sequence[tuple[int, int, int]]`):
            First chunk, end and first counted chunk of each window.
        batch_size (`int`):
            Number of windows in a batch.
        description (`str`, *optional*):
            Label of the progress bar. Without it there is no bar.

    Returns:
        `Iterator[tuple[np.ndarray, np.ndarray, bool]]`: chunk ids int64 `[B, L]`, -1 for absent ones, the first
        counted chunk of each window int64 `[B, 1]`, and whether this process counts the batch.
    """
    state = PartialState()
    # Processes that share matrices (tensor parallelism) compute the same windows together.
    tp_size = getattr(model, "tp_size", None) or 1
    num_workers, worker = state.num_processes // tp_size, state.process_index // tp_size
    ordered = np.array(sorted(windows, key=lambda window: window[1] - window[0]))
    batches = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    rounds = range(-(-len(batches) // num_workers))
    for i in tqdm(rounds, desc=description, disable=description is None or not state.is_main_process):
        # Sharded models need all processes in every forward pass, so a process without a batch repeats one of another.
        i = i * num_workers + worker
        start, end, first_counted = batches[i % len(batches)].T[..., None]
        chunk_ids = start + np.arange((end - start).max())  # [B, L]
        is_own = i < len(batches) and state.process_index % tp_size == 0
        yield np.where(chunk_ids < end, chunk_ids, -1), first_counted, is_own


def summed_over_processes(array: np.ndarray) -> np.ndarray:
    """The sum of an array over the processes of a distributed launch."""
    state = PartialState()
    if state.num_processes == 1:
        return array
    return reduce(torch.from_numpy(array).to(state.device), reduction="sum").cpu().numpy()


__all__ = ["document_offsets", "document_windows", "sliding_windows", "summed_over_processes", "window_batches"]
