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
Scores neighbors by what they do for the next chunk, and makes pairs of them from which an encoder learns to prefer the
neighbors that help (RPT, arXiv 2306.13421, section 3.2).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedModel

from data_prep.stage_files import directory_lock, process_state, run_shards, save_shard
from modeling_retro.datastore.chunks import ChunkTable, read_columns
from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.datastore.manifest import TRAIN_SPLIT
from modeling_retro.durable_files_retro import whole, write_json
from modeling_retro.encoder.chunk_encoder import decode_chunks
from trainers.evaluation.predictions import token_nats


MINED_NAME = "mined.json"
PAIRS_NAME = "pairs"
CHUNKS_PER_SHARD = 64  # a run that is killed loses at most one shard of each process


def mine_neighbors(
    datastore: str | Path,
    model: PreTrainedModel,
    output_dir: str | Path,
    num_candidates: int = 16,
    num_positives: int = 1,
    num_negatives: int = 1,
    min_gain: float = 0.0,
    context_chunks: int = 1,
    max_chunks: int | None = None,
    min_tokens: int = 16,
    batch_size: int = 32,
    seed: int = 0,
) -> Dataset:
    """
    Makes pairs for training the retriever. The anchor is a chunk, the positive is the stored neighbor that raises the
    log-probability of the next chunk most, and the hard negatives are the neighbors that raise it least or lower it.

    The scores are kept in `output_dir`, so that other pairs can be chosen from them without the model.

    Args:
        datastore (`str` or `Path`):
            The datastore, with at least `num_candidates` neighbors of each training chunk.
        model ([`~transformers.PreTrainedModel`]):
            A RETRO model of either kind, which is not trained.
        output_dir (`str` or `Path`):
            Folder to write to. If it holds an interrupted run, that run is resumed.
        num_candidates (`int`, *optional*, defaults to 16):
            Number of neighbors of a chunk that are scored.
        num_positives (`int`, *optional*, defaults to 1):
            Largest number of pairs of a chunk. Each has one of the best neighbors as its positive.
        num_negatives (`int`, *optional*, defaults to 1):
            Number of hard negatives of each pair. Chunks with fewer are left out.
        min_gain (`float`, *optional*, defaults to 0.0):
            A positive raises the log-probability of the next chunk by more than this number of nats.
        context_chunks (`int`, *optional*, defaults to 1):
            Number of chunks that the model reads before the next chunk, of which the last has the neighbor.
        max_chunks (`int`, *optional*):
            Largest number of chunks to score, which are a random sample. Defaults to all.
        min_tokens (`int`, *optional*, defaults to 16):
            Chunks whose next chunk is shorter are left out.
        batch_size (`int`, *optional*, defaults to 32):
            Number of rows in a forward pass. A row is a chunk with one of its neighbors.
        seed (`int`, *optional*, defaults to 0):
            Seed of the sample.

    Returns:
        `datasets.Dataset`: columns `anchor`, `positive`, `negative_1`, …, as in `output_dir/pairs`.

    Raises:
        `ValueError`: if a number is out of range, if the split has too few neighbors, if the folder holds scores that
            were made with other options, or if no neighbor helps.
    """
    opened, folder = RetroDatastore.from_pretrained(datastore), Path(output_dir)
    opened.check_model(model.config)
    opened.check_compact("mining")
    source = opened.split(TRAIN_SPLIT)
    most = source.neighbor_ids.shape[1]
    if not 1 <= num_candidates <= most:
        raise ValueError(
            f"num_candidates is {num_candidates}, expected 1 to the {most} neighbors of a chunk that are stored; run "
            f"`retro neighbors --num_neighbors {num_candidates} --force` for more"
        )
    if num_positives < 1 or num_negatives < 0 or num_positives + num_negatives > num_candidates:
        raise ValueError(
            f"num_positives is {num_positives} and num_negatives is {num_negatives}, expected at least 1 and 0, and "
            f"together at most num_candidates, {num_candidates}"
        )
    if context_chunks < 1 or batch_size < 1:
        raise ValueError(f"context_chunks is {context_chunks} and batch_size is {batch_size}, expected at least 1")
    chunk_ids = chunks_with_a_successor(source.chunks, min_tokens)
    if max_chunks is not None and max_chunks < len(chunk_ids):
        chunk_ids = np.sort(np.random.default_rng(seed).choice(chunk_ids, max_chunks, replace=False))
    if len(chunk_ids) == 0:
        raise ValueError(
            f"no chunk of {datastore} has a next chunk of {min_tokens} tokens; take a smaller min_tokens or longer "
            "documents"
        )
    options = {
        "chunks": source.record.chunks.fingerprint,
        "neighbors": [shard.sha256 for shard in source.record.neighbor_shards],
        "model": getattr(model.config, "base_model_sha256", None) or model.config.name_or_path,
        "num_candidates": num_candidates,
        "context_chunks": context_chunks,
        "max_chunks": max_chunks,
        "min_tokens": min_tokens,
        "seed": seed,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with directory_lock(folder):
        _check_options(folder, options)
        features = Features(
            {
                "chunk_id": Value("int64"),
                "neighbor_ids": List(Value("int64"), length=num_candidates),
                "gains": List(Value("float32"), length=num_candidates),
            }
        )

        def make(shard: int, temporary: Path, advance: Callable[[int], Any]) -> dict[str, Any]:
            rows = chunk_ids[shard * CHUNKS_PER_SHARD : (shard + 1) * CHUNKS_PER_SHARD]
            neighbor_ids = source.neighbor_ids[rows, :num_candidates]
            gains = neighbor_gains(model, opened, rows, neighbor_ids, context_chunks, batch_size, advance)
            save_shard(temporary, {"chunk_id": rows, "neighbor_ids": neighbor_ids, "gains": gains}, features)
            return {"rows": len(rows)}

        names = [f"shard-{number:05d}" for number in range(-(-len(chunk_ids) // CHUNKS_PER_SHARD))]
        scored = (source.neighbor_ids[chunk_ids, :num_candidates] >= 0).sum(axis=1)
        sizes = [int(scored[i * CHUNKS_PER_SHARD : (i + 1) * CHUNKS_PER_SHARD].sum()) for i in range(len(names))]
        shards = run_shards(folder, [], names, make, description="Scoring neighbors", sizes=sizes, unit="neighbors")
        columns = [read_columns(folder / shard["name"]) for shard in shards]
        scores = {name: np.concatenate([part[name] for part in columns]) for name in features}
        pairs = choose_pairs(
            opened, **scores, num_positives=num_positives, num_negatives=num_negatives, floor=min_gain
        )
        if process_state().is_main_process:
            with whole(folder / PAIRS_NAME) as temporary:
                pairs.save_to_disk(temporary)
        process_state().wait_for_everyone()
        return pairs


def _check_options(folder: Path, options: dict[str, Any]) -> None:
    """Records the options of a run, or compares them with those of the run that is resumed."""
    file = folder / MINED_NAME
    if file.exists():
        recorded = json.loads(file.read_text(encoding="utf-8"))
        for name, value in options.items():
            if recorded.get(name) != value:
                raise ValueError(
                    f"the scores in {folder} were made with another {name} than this run has; write to another folder"
                )
    # No process writes before all processes have read.
    process_state().wait_for_everyone()
    if process_state().is_main_process:
        write_json(file, options)
    process_state().wait_for_everyone()


def chunks_with_a_successor(chunks: ChunkTable, min_tokens: int = 1) -> np.ndarray:
    """
    Finds the chunks that are followed by a chunk of their document.

    Args:
        chunks ([`ChunkTable`]): The chunks.
        min_tokens (`int`, *optional*, defaults to 1): Smallest number of tokens of the chunk that follows.

    Returns:
        `np.ndarray`: chunk ids int64 `[n]`, ascending.
    """
    document_id, length = np.asarray(chunks.document_id), np.asarray(chunks.length)
    return np.flatnonzero((document_id[:-1] == document_id[1:]) & (length[1:] >= min_tokens))


def neighbor_gains(
    model: PreTrainedModel,
    datastore: RetroDatastore,
    chunk_ids: np.ndarray,
    neighbor_ids: np.ndarray,
    context_chunks: int = 1,
    batch_size: int = 32,
    advance: Callable[[int], Any] | None = None,
) -> np.ndarray:
    """
    Computes how much each neighbor of a chunk raises the log-probability of the next chunk. A joint model reads a
    neighbor once for all the chunks that have it, as long as its memory of neighbors has room.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A RETRO model of either kind.
        datastore ([`RetroDatastore`]):
            The datastore of the chunks and of their neighbors.
        chunk_ids (`np.ndarray`):
            Chunks of the training split that have a next chunk, int64 `[n]`.
        neighbor_ids (`np.ndarray`):
            Their neighbors, int64 `[n, K]`, -1 for absent ones.
        context_chunks (`int`, *optional*, defaults to 1):
            Number of chunks before the next chunk that the model reads, the chunk with the neighbor included. It
            reads fewer where the document begins.
        batch_size (`int`, *optional*, defaults to 32):
            Number of rows in a forward pass.
        advance (`Callable`, *optional*):
            Called with the number of neighbors of each forward pass.

    Returns:
        `np.ndarray`: float32 `[n, K]` in nats, NaN for absent neighbors.
    """
    chunks = datastore.chunks
    document_start = np.searchsorted(chunks.document_id, chunks.document_id[chunk_ids])
    first = np.maximum(chunk_ids - context_chunks + 1, document_start)
    # Each chunk is read once without a neighbor (column 0) and once with each neighbor (columns 1 … K).
    candidates = np.concatenate([np.full((len(chunk_ids), 1), -1), neighbor_ids], axis=1)
    rows, columns = np.nonzero(np.concatenate([np.ones((len(chunk_ids), 1)), neighbor_ids >= 0], axis=1))
    log_probs = np.full(candidates.shape, np.nan)
    was_training = model.training
    model.eval()
    lengths = chunk_ids[rows] - first[rows] + 1  # chunks of context
    for length in np.unique(lengths):
        same = np.flatnonzero(lengths == length)  # rows of one length need no padding in front
        for begin in range(0, len(same), batch_size):
            batch = same[begin : begin + batch_size]
            row, column = rows[batch], columns[batch]
            tokens, mask = chunks.take(first[row, None] + np.arange(length + 1))  # [B, L + 1, m]
            slots = np.full((len(batch), length, 1), -1)
            slots[:, -1, 0] = candidates[row, column]
            neighbors, neighbor_mask = datastore.take_neighbors(slots)  # [B, L, 1, r]
            log_probs[row, column] = _next_log_probs(model, tokens, mask[:, -1], neighbors, neighbor_mask)
            if advance is not None:
                advance(int(np.count_nonzero(column)))
    model.train(was_training)
    return (log_probs[:, 1:] - log_probs[:, :1]).astype(np.float32)


def _next_log_probs(
    model: PreTrainedModel,
    tokens: np.ndarray,
    counted: np.ndarray,
    neighbors: np.ndarray,
    neighbor_mask: np.ndarray,
) -> np.ndarray:
    """Log-probability float64 `[B]` of the last chunk of rows `[B, L + 1, m]`, over the tokens that are `counted`."""
    # Padding behind the last chunk is not seen by the tokens in front of it.
    inputs = {
        "input_ids": tokens.reshape(len(tokens), -1),
        "neighbor_input_ids": neighbors,
        "neighbor_attention_mask": neighbor_mask,
    }
    inputs = {name: torch.from_numpy(values).to(model.device) for name, values in inputs.items()}
    rows, places = np.nonzero(counted)
    columns = tokens[0, :-1].size + places
    nats = token_nats(model, inputs, *(torch.from_numpy(index).to(model.device) for index in (rows, columns)))
    return -np.bincount(rows, nats.numpy(), minlength=len(tokens))


def choose_pairs(
    datastore: RetroDatastore,
    chunk_id: np.ndarray,
    neighbor_ids: np.ndarray,
    gains: np.ndarray,
    num_positives: int = 1,
    num_negatives: int = 1,
    floor: float = 0.0,
) -> Dataset:
    """
    Chooses pairs by the gains of neighbors. Neighbors with the text of the chunk are no positives, and those with the
    text of the positive are no negatives.

    Args:
        datastore ([`RetroDatastore`]):
            The datastore.
        chunk_id (`np.ndarray`), neighbor_ids (`np.ndarray`), gains (`np.ndarray`):
            Chunks int64 `[n]`, their neighbors int64 `[n, K]` and what these gain, float32 `[n, K]`, NaN if absent.
        num_positives (`int`, *optional*, defaults to 1), num_negatives (`int`, *optional*, defaults to 1):
            See [`mine_neighbors`].
        floor (`float`, *optional*, defaults to 0.0):
            A positive gains more than this number of nats.

    Returns:
        `datasets.Dataset`: columns `anchor`, `positive`, `negative_1`, …, which hold texts as the encoder reads them.

    Raises:
        `ValueError`: if there is no pair.
    """
    names = ["anchor", "positive", *(f"negative_{number}" for number in range(1, num_negatives + 1))]
    found = []
    for chunk, neighbors, gain in zip(chunk_id, neighbor_ids, gains, strict=True):
        order = np.argsort(-gain, kind="stable")  # NaN comes last
        order = order[~np.isnan(gain[order])]
        text = {int(n): datastore.chunks.take(n)[0].tobytes() for n in (chunk, *neighbors[order])}
        positives = [n for n in order if gain[n] > floor and text[int(neighbors[n])] != text[int(chunk)]]
        positives = positives[:num_positives]
        chosen = {text[int(neighbors[n])] for n in positives}
        others = [n for n in order[::-1] if n not in positives and text[int(neighbors[n])] not in chosen]
        # A negative gains less than any positive, because the worst come first and positives are not among them.
        if positives and len(others) >= num_negatives:
            negatives = [neighbors[n] for n in others[:num_negatives]]
            found += [[chunk, neighbors[n], *negatives] for n in positives]
    if not found:
        raise ValueError(
            f"no neighbor of {len(chunk_id)} chunks raises the log-probability of the next chunk by more than {floor} "
            f"nats and leaves {num_negatives} others as negatives; take a smaller min_gain or num_negatives"
        )
    ids = np.array(found)  # [pairs, 2 + negatives]
    texts = [decode_chunks(*datastore.chunks.take(column), datastore.tokenizer) for column in ids.T]
    kept = [row for row in range(len(ids)) if all(column[row].strip() for column in texts)]
    return Dataset.from_dict(
        {name: [column[row] for row in kept] for name, column in zip(names, texts, strict=True)},
        features=Features({name: Value("string") for name in names}),
    )


__all__ = ["choose_pairs", "chunks_with_a_successor", "mine_neighbors", "neighbor_gains"]
