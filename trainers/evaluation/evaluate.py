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
Measures the gain from retrieval: bits per byte and perplexity over held-out documents without neighbors, with random
ones and with the retrieved ones, and the share of the gain that comes from copying.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from data_prep.chunker import MANY_UNKNOWN, unknown_tokens
from data_prep.index import read_embeddings
from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.datastore.manifest import TRAIN_SPLIT
from modeling_retro.datastore.splits import DatastoreSplit
from modeling_retro.retriever.ranking import longest_common_substring
from modeling_retro.retriever.search import NeighborSearch, other_document_filter, removed_filter
from modeling_retro.sharing.model_card import Way

from .in_front import in_front_bits
from .operations import read_clocks
from .options import EvaluationOptions
from .predictions import token_nats
from .report import RetroEvaluation
from .windows import document_offsets, document_windows, summed_over_processes, window_batches


logger = logging.get_logger(__name__)

_BLOCK = 1 << 14  # chunks


# The paper measures overlap with the ten nearest neighbors (arXiv:2112.04426, section 2.6).
OVERLAP_NEIGHBORS = 10


def evaluate_retro(
    model: PreTrainedModel,
    datastore: RetroDatastore,
    split: DatastoreSplit,
    options: EvaluationOptions | None = None,
    **fields: Any,
) -> RetroEvaluation:
    """
    Measures a RETRO model on whole held-out documents, in sliding windows. Every token is counted once. This includes
    the end of a document, which has no bytes. A first token without any context costs `log2(vocab_size)` bits, unless
    it is the BOS token, which is known. The bits are therefore those of a complete code of the text. Works on all
    processes of a distributed launch.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A [`RetroForCausalLM`] or [`RetroJointForCausalLM`].
        datastore ([`RetroDatastore`]):
            The datastore of the neighbors.
        split ([`DatastoreSplit`]):
            The held-out documents, with stored neighbors.
        options ([`~trainers.evaluation.options.EvaluationOptions`], *optional*):
            What to measure.
        fields:
            Fields of the options, such as `modes`, which override those of `options`.

    Returns:
        [`RetroEvaluation`]

    Raises:
        `ValueError`: if an option is out of range, if the model has another chunk size than the datastore, if fewer
            neighbors are stored, if the split has no documents, or if the tokenizer does not know most of its tokens.
    """
    options = replace(options or EvaluationOptions(), **fields)
    datastore.check_chunk_size(model.config.chunk_size)
    offsets = document_offsets(split.chunks.document_id, options.max_documents)
    num_documents, num_chunks = len(offsets) - 1, int(offsets[-1])
    if num_documents == 0:
        raise ValueError("the split has no documents to evaluate on")
    if options.domains is not None and len(options.domains) != num_documents:
        raise ValueError(
            f"there are {len(options.domains)} domains for {num_documents} documents; expected one for each"
        )
    unknown = _count_unknown(datastore, split, num_chunks, options.allow_unknown_tokens)
    retrieved = _retrieved(datastore, split, num_chunks, options)
    overlap = None
    if options.measure_overlap:
        found_anew = None if _reads_stored(split, options) else retrieved[max(retrieved)]
        overlap = neighbor_overlap(datastore, split, num_chunks, found_anew)
    drawn = _drawn(datastore, num_chunks, max(options.numbers), options.seed)

    windows = document_windows(offsets, options.window_chunks, options.stride_chunks)
    bits, bits_of_tokens, seconds = {}, {}, {}
    for way, number, share in _ways(options):
        name, neighbors = str(way), None
        run = options.batch_size, f"Evaluating ({name})" if options.show_progress else None
        neighbor_ids = (drawn if way.mode == "random" else retrieved[share])[:, :number]
        clock = read_clocks()
        if way.mode == "in_front":
            found = in_front_bits(model, datastore, split, windows, neighbor_ids, *run)
            bits[name], num_tokens = map(summed_over_processes, found)
        else:
            if way.mode != "off":
                neighbors = NeighborSource(datastore, neighbor_ids, way.mode, options.seed)
            found, counted = token_bits(model, datastore, split, windows, neighbors, *run)
            bits[name], num_tokens = found.sum(-1), counted.sum(-1)
            if options.keep_token_bits:
                bits_of_tokens[name] = found
        seconds[name] = read_clocks() - clock
    return RetroEvaluation(
        chunk_bits=bits,
        chunk_bytes=np.asarray(split.chunks.num_bytes[:num_chunks]),
        document_offsets=offsets,
        num_tokens=int(num_tokens.sum()),
        num_neighbors=options.numbers,
        overlap=overlap,
        domains=None if options.domains is None else list(options.domains),
        seed=options.seed,
        chunk_tokens=num_tokens,
        unknown_tokens=unknown,
        token_bits=bits_of_tokens,
        seconds=seconds,
    )


def _count_unknown(datastore: RetroDatastore, split: DatastoreSplit, num_chunks: int, allows_most: bool) -> np.ndarray:
    """Unknown tokens int64 `[chunks]`. Warns if they are many, and refuses more than half, unless that is allowed."""
    counts, total = [np.zeros(0, dtype=np.int64)], 0
    for start in range(0, num_chunks, _BLOCK):
        input_ids, mask = split.chunks.take(np.arange(start, min(start + _BLOCK, num_chunks)))
        counts.append(unknown_tokens(datastore.tokenizer, input_ids, mask.sum(axis=1)))
        total += int(mask.sum())
    found = np.concatenate(counts)
    if found.sum() > MANY_UNKNOWN * total:
        problem = (
            f"{found.sum() / total:.1%} of the tokens are unknown to the tokenizer: it cannot tell these texts apart, "
            "so the bits per byte are too low to mean anything"
        )
        if 2 * found.sum() > total and not allows_most:
            raise ValueError(f"{problem}; evaluate other texts, or pass allow_unknown_tokens")
        logger.warning(problem)
    return found


def _ways(options: EvaluationOptions) -> Iterator[tuple[Way, int, float]]:
    """Each measurement, with its number of neighbors and its share of the datastore, which a name need not have."""
    numbers, shares = options.numbers, options.datastore_shares
    for mode in options.modes:
        for number in numbers[:1] if mode == "off" else numbers:
            for share in shares[:1] if mode in ("off", "random") else shares:
                has_number = mode != "off" and len(numbers) > 1
                has_share = mode not in ("off", "random") and tuple(shares) != (1.0,)
                yield Way(mode, number if has_number else None, share if has_share else None), number, share


def _reads_stored(split: DatastoreSplit, options: EvaluationOptions) -> bool:
    """Whether neighbors are found in the way in which the stored ones were found."""
    return options.retriever in (None, stored_retriever(split))


def _retrieved(
    datastore: RetroDatastore, split: DatastoreSplit, num_chunks: int, options: EvaluationOptions
) -> dict[float, np.ndarray]:
    """Neighbors int64 `[chunks, K]` for each share of the datastore: those that are stored, or found anew."""
    is_stored = _reads_stored(split, options)
    width, most = max(options.numbers), split.neighbor_ids.shape[1] if is_stored else len(datastore.chunks)
    if width > most:
        remedy = "neighbors of a chunk that are stored; run `retro neighbors` for more" if is_stored else "chunks"
        raise ValueError(f"num_neighbors is {options.num_neighbors}, expected numbers from 1 to the {most} {remedy}")
    if options.measure_overlap and not is_stored:
        width = max(width, min(OVERLAP_NEIGHBORS, most))
    return {
        share: split.neighbor_ids[:num_chunks]
        if share == 1 and is_stored
        else neighbors_in_share(datastore, split, num_chunks, width, share, options.seed, options.retriever)
        for share in options.datastore_shares
    }


def _drawn(datastore: RetroDatastore, num_chunks: int, num_neighbors: int, seed: int) -> np.ndarray:
    """Random chunks of the datastore in place of neighbors, int64 `[chunks, k]`."""
    drawn = np.random.default_rng(seed).integers(len(datastore.chunks), size=(num_chunks, num_neighbors))
    if datastore.manifest.removed is not None:
        living = np.flatnonzero(~datastore.is_removed(np.arange(len(datastore.chunks))))
        drawn = living[drawn % len(living)]
    return drawn


def stored_retriever(split: DatastoreSplit) -> str:
    """The way in which the stored neighbors of a split were found."""
    neighbors = split.record.neighbors
    return "dense" if neighbors is None else neighbors.options.get("retriever", "dense")


def neighbors_in_share(
    datastore: RetroDatastore,
    split: DatastoreSplit,
    num_chunks: int,
    num_neighbors: int,
    share: float,
    seed: int = 0,
    retriever: str | None = None,
) -> np.ndarray:
    """
    Finds the nearest neighbors among a random share of the datastore's documents. A larger share contains the smaller
    ones.

    Args:
        datastore ([`RetroDatastore`]):
            The datastore to search.
        split ([`DatastoreSplit`]):
            The queries: chunks with their embeddings (`retro embed`), which the retriever `"bm25"` does not need.
        num_chunks (`int`):
            Number of queries, from the beginning of the split.
        num_neighbors (`int`):
            Number of neighbors of a chunk.
        share (`float`):
            Share of the documents.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draw.
        retriever (`str`, *optional*):
            How neighbors are found. Defaults to the way in which the stored ones of the split were found.

    Returns:
        `np.ndarray`: global chunk ids int64 `[num_chunks, num_neighbors]`, -1 for absent ones.
    """
    document_id = datastore.chunks.document_id
    left_out = np.random.default_rng(seed).random(int(document_id[-1]) + 1) >= share

    def is_left_out(rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        return left_out[datastore.chunks.gather("document_id", ids)] & (ids >= 0)

    unwanted = {"left_out": is_left_out, **removed_filter(datastore)}
    if split.searched:
        unwanted["own_document"] = other_document_filter(datastore.chunks, split.chunks.document_id[:num_chunks])
    search = NeighborSearch(datastore, retriever or stored_retriever(split))
    embeddings = None
    if search.needs_embeddings:
        name = TRAIN_SPLIT if split.searched else split.path.name
        embeddings = np.concatenate(read_embeddings(split.path, name, datastore.manifest))[:num_chunks]
        embeddings = embeddings.astype(np.float32)
    input_ids, mask = split.chunks.take(np.arange(num_chunks))
    fetch = math.ceil((2 * num_neighbors + 8) / share)
    return search(input_ids, mask, embeddings, num_neighbors, unwanted, fetch)[0]


class NeighborSource:
    """
    The neighbors that chunks see in one mode of [`evaluate_retro`].

    Args:
        datastore ([`RetroDatastore`]):
            The datastore of the neighbors.
        neighbor_ids (`np.ndarray`):
            Global chunk ids of the neighbors of each chunk, int64 `[chunks, k]`.
        mode (`str`, *optional*, defaults to `"on"`):
            The mode, which selects the parts of the neighbors that are seen.
        seed (`int`, *optional*, defaults to 0):
            Seed of the shuffling.
    """

    def __init__(self, datastore: RetroDatastore, neighbor_ids: np.ndarray, mode: str = "on", seed: int = 0):
        self.datastore = datastore
        self.neighbor_ids = neighbor_ids
        self.mode = mode
        self.seed = seed

    def take(self, chunk_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        Neighbors of chunks.

        Args:
            chunk_ids (`np.ndarray`):
                Chunk ids int64 `[B, L]`, -1 for absent ones.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: token ids int64 and mask bool, both `[B, L, k, r]`.
        """
        ids = np.where((chunk_ids >= 0)[..., None], self.neighbor_ids[chunk_ids], -1)  # [B, L, k]
        tokens, mask = self.datastore.take_neighbors(ids)
        if self.mode == "neighbor":
            mask = mask & (np.arange(mask.shape[-1]) < self.datastore.chunk_size)
        elif self.mode == "continuation":
            mask = mask & (np.arange(mask.shape[-1]) >= self.datastore.chunk_size)
        elif self.mode == "shuffled":
            # Real tokens stay in front of padding. The order depends on the chunks and not on the process.
            generator = np.random.default_rng([self.seed, int(chunk_ids.max())])
            order = np.argsort(generator.random(mask.shape) + ~mask, axis=-1)
            tokens = np.take_along_axis(tokens, order, axis=-1)
        return tokens, mask


def token_bits(
    model: PreTrainedModel,
    datastore: RetroDatastore,
    split: DatastoreSplit,
    windows: Sequence[tuple[int, int, int]],
    neighbors: NeighborSource | None,
    batch_size: int,
    description: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Computes the bits that the model needs for each token.

    Args:
        model ([`~transformers.PreTrainedModel`]), datastore ([`RetroDatastore`]), split ([`DatastoreSplit`]):
            See [`evaluate_retro`].
        windows (`Sequence[tuple[int, int, int]]`):
            First chunk, end and first counted chunk of each window, as chunk ids of the split.
        neighbors ([`NeighborSource`], *optional*):
            The neighbors that chunks see. `None` evaluates without retrieval.
        batch_size (`int`):
            Number of windows in a forward pass.
        description (`str`, *optional*):
            Label of the progress bar. Without it there is no bar.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: bits float64, 0 for tokens that do not count, and whether each token
        counts, bool, both `[chunks, m]`.
    """
    shape = (max(end for _, end, _ in windows), model.config.chunk_size)
    bits, is_counted = np.zeros(shape), np.zeros(shape, dtype=np.int64)
    was_training = model.training
    model.eval()
    for chunk_ids, first_counted, is_own in window_batches(model, windows, batch_size, description):
        nats, counted = _window_nats(model, datastore, split, chunk_ids, first_counted, neighbors)  # [B, L, m]
        if is_own:
            chosen = chunk_ids >= first_counted
            bits[chunk_ids[chosen]] = nats[chosen] / math.log(2)
            is_counted[chunk_ids[chosen]] = counted[chosen]
    model.train(was_training)
    return summed_over_processes(bits), summed_over_processes(is_counted) > 0


def _window_nats(
    model: PreTrainedModel,
    datastore: RetroDatastore,
    split: DatastoreSplit,
    chunk_ids: np.ndarray,
    first_counted: np.ndarray,
    neighbors: NeighborSource | None,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Nats (float64) of the tokens in windows of chunk ids `[B, L]`, 0 for those that do not count, and whether they do,
    both `[B, L, m]`.
    """
    input_ids, counted = split.chunks.take(chunk_ids)  # [B, L, m]
    counted &= (chunk_ids >= first_counted)[..., None]
    bos_token_id = datastore.tokenizer.bos_token_id
    if bos_token_id is not None:
        counted[:, 0, 0] &= input_ids[:, 0, 0] != bos_token_id
    # Padding is on the right, where causal attention of real tokens does not look, so no mask is needed.
    inputs = {"input_ids": torch.from_numpy(input_ids.reshape(len(chunk_ids), -1))}  # [B, T]
    if neighbors is not None:
        neighbor_input_ids, neighbor_mask = neighbors.take(chunk_ids)  # [B, L, k, r]
        inputs["neighbor_input_ids"] = torch.from_numpy(neighbor_input_ids)
        inputs["neighbor_attention_mask"] = torch.from_numpy(neighbor_mask)
    inputs = {name: values.to(model.device) for name, values in inputs.items()}

    nats = np.where(counted, math.log(model.config.vocab_size), 0.0)
    has_context = counted.copy()
    has_context[:, 0, 0] = False
    rows, columns = torch.from_numpy(has_context.reshape(len(chunk_ids), -1)).to(model.device).nonzero(as_tuple=True)
    nats[has_context] = token_nats(model, inputs, rows, columns, in_step=True).numpy()
    return nats, counted


def neighbor_overlap(
    datastore: RetroDatastore, split: DatastoreSplit, num_chunks: int, neighbor_ids: np.ndarray | None = None
) -> np.ndarray:
    """
    Measures the longest token substring that each chunk shares with one of its ten nearest neighbors or their
    continuations, as a share of the chunk size (arXiv:2112.04426, section 2.6).

    Args:
        datastore ([`RetroDatastore`]):
            The datastore of the neighbors.
        split ([`DatastoreSplit`]):
            The chunks.
        num_chunks (`int`):
            Number of chunks to measure, from the beginning of the split.
        neighbor_ids (`np.ndarray`, *optional*):
            Their neighbors, int64 `[num_chunks, K]`. Defaults to the stored ones.

    Returns:
        `np.ndarray`: float64 `[num_chunks]`, from 0 to 1.
    """
    neighbor_ids = split.neighbor_ids if neighbor_ids is None else neighbor_ids
    overlap = np.zeros(num_chunks)
    for start in range(0, num_chunks, 1024):
        chunk_ids = np.arange(start, min(start + 1024, num_chunks))
        tokens, mask = split.chunks.take(chunk_ids)
        neighbors, neighbor_mask = datastore.take_neighbors(neighbor_ids[chunk_ids, :OVERLAP_NEIGHBORS])
        # Padding must not equal any token.
        tokens = np.where(mask, tokens, -1)[:, None]
        neighbors = np.where(neighbor_mask, neighbors, -2)
        overlap[chunk_ids] = longest_common_substring(tokens, neighbors).max(-1) / datastore.chunk_size
    return overlap
