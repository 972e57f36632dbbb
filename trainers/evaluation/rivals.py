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
"""RETRO beside its rivals on the same tokens: in-context retrieval and kNN-LM, with what each way costs"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.datastore.manifest import TRAIN_SPLIT
from modeling_retro.datastore.splits import DatastoreSplit

from .evaluate import evaluate_retro, stored_retriever
from .knn_lm import build_knn_store, neighbor_distribution
from .operations import operations_per_token
from .report import RetroEvaluation
from .windows import document_offsets, document_windows


BASELINES = ("in_context", "knn_lm")


def evaluate_rivals(
    model: PreTrainedModel,
    datastore: RetroDatastore,
    split: DatastoreSplit,
    baselines: Sequence[str],
    knn_folder: str | Path | None = None,
    knn_factory: str = "auto",
    knn_neighbors: int = 1024,
    modes: Sequence[str] = ("off", "random", "on"),
    num_neighbors: int | Sequence[int] = 2,
    datastore_shares: Sequence[float] = (1.0,),
    window_chunks: int = 32,
    stride_chunks: int = 16,
    batch_size: int = 8,
    max_documents: int | None = None,
    retriever: str | None = None,
    seed: int = 0,
    show_progress: bool = True,
    **kwargs: Any,
) -> RetroEvaluation:
    """
    Measures a RETRO model beside its rivals on the same tokens and windows: `in_context` is the mode `"in_front"` of
    [`~trainers.evaluate_retro`], and `knn_lm` mixes the predictions of the model without retrieval with
    those of the nearest keys (see `knn_lm`). `on + knn_lm` mixes the predictions with retrieval. The
    weight and the temperature of each mixture are chosen on a random tenth of the documents, which then count in no
    row.

    Each way has an entry in `rivals` with `operations_per_token` (those of finding neighbors of chunks are not
    counted, and those of finding keys are), `milliseconds_per_token` and `processor_milliseconds_per_token` (of this
    measurement, in which overlapping windows are read more than once), and `storage_bytes` (tokens and index of the
    datastore; keys, values and index of the kNN-LM).

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A [`RetroForCausalLM`] or [`RetroJointForCausalLM`].
        datastore ([`RetroDatastore`]):
            The datastore of the neighbors, and of the keys.
        split ([`DatastoreSplit`]):
            The held-out documents, with stored neighbors.
        baselines (`Sequence[str]`):
            Some of `"in_context"` and `"knn_lm"`.
        knn_folder (`str` or `Path`, *optional*):
            Folder for keys, values and index of the kNN-LM, which needs it.
        knn_factory (`str`, *optional*, defaults to `"auto"`):
            The faiss factory of its index.
        knn_neighbors (`int`, *optional*, defaults to 1024):
            Number of keys to find for each token.
        kwargs:
            All others are those of [`~trainers.evaluate_retro`].

    Returns:
        [`RetroEvaluation`]

    Raises:
        ValueError: If a baseline is unknown, if the kNN-LM has no folder, fewer than 2 documents or no `"off"` to
            start from, if shares of the datastore are asked for, or for the reasons of
            [`~trainers.evaluate_retro`] and [`~trainers.evaluation.knn_lm.build_knn_store`].
    """
    unknown = sorted(set(baselines) - set(BASELINES))
    if unknown:
        raise ValueError(f"unknown baselines {', '.join(unknown)}; expected some of {', '.join(BASELINES)}")
    if tuple(datastore_shares) != (1.0,):
        raise ValueError(
            f"datastore_shares is {list(datastore_shares)}, expected 1 with baselines; measure shares alone"
        )
    has_knn = "knn_lm" in baselines
    if has_knn and (knn_folder is None or "off" not in modes or knn_neighbors < 1):
        raise ValueError(
            f"the baseline knn_lm has knn_folder {knn_folder}, modes {', '.join(modes)} and knn_neighbors "
            f"{knn_neighbors}, expected a folder, off among the modes and at least 1"
        )
    if has_knn:
        num_documents = len(document_offsets(split.chunks.document_id, max_documents)) - 1
        if num_documents < 2:
            raise ValueError("the kNN-LM is tuned on some documents and measured on others; there is only one")
        store = build_knn_store(
            model, datastore, knn_folder, knn_factory, window_chunks, batch_size, seed, show_progress
        )
    modes = list(dict.fromkeys([*modes, *(["in_front"] if "in_context" in baselines else [])]))
    evaluation = evaluate_retro(
        model,
        datastore,
        split,
        modes,
        num_neighbors,
        window_chunks=window_chunks,
        stride_chunks=stride_chunks,
        batch_size=batch_size,
        max_documents=max_documents,
        retriever=retriever,
        seed=seed,
        keep_token_bits=has_knn,
        show_progress=show_progress,
        **kwargs,
    )
    num_tokens = evaluation.num_tokens
    storage = datastore_bytes(datastore, retriever or stored_retriever(split))
    ways: dict[str, tuple[float, np.ndarray, float]] = {}  # operations, seconds, stored bytes
    operations = _operations(model, evaluation, modes, window_chunks)
    for name, seconds in evaluation.seconds.items():
        ways[name] = operations[name], seconds, 0 if name == "off" else storage
    if has_knn:
        windows = document_windows(evaluation.document_offsets, window_chunks, stride_chunks)
        description = "Evaluating (knn_lm)" if show_progress else None
        found = neighbor_distribution(model, split, windows, store, batch_size, knn_neighbors, description)
        is_tuning = np.zeros(num_documents, dtype=bool)
        is_tuning[np.random.default_rng(seed).permutation(num_documents)[: max(1, num_documents // 10)]] = True
        tuning_chunks = np.repeat(is_tuning, np.diff(evaluation.document_offsets))
        settings = {}
        for name in [name for name in evaluation.token_bits if name.split()[0] in ("off", "on")]:
            bits = evaluation.token_bits[name]
            weight, temperature = found.tune(bits, tuning_chunks)
            mixed = "knn_lm" if name == "off" else f"{name} + knn_lm"
            evaluation.chunk_bits[mixed] = found.mixed_bits(bits, weight, temperature).sum(-1)
            settings[mixed] = {"weight": weight, "temperature": found.temperatures[temperature]}
            count, seconds, stored = ways[name]
            count += store.operations_per_search
            seconds = seconds + found.search_seconds
            if name != "off":  # The keys are found by the states of the base, which retrieval changes.
                count, seconds = count + operations["off"], seconds + found.state_seconds
            ways[mixed] = count, seconds, stored + store.num_bytes
        evaluation.knn_lm = {
            **store.record,
            "neighbors": knn_neighbors,
            "tuning_documents": int(is_tuning.sum()),
            "mixtures": settings,
        }
        evaluation = evaluation.only(~is_tuning)
    evaluation.rivals = {
        _public(name): {
            "operations_per_token": float(count),
            "milliseconds_per_token": float(seconds[0] * 1000 / num_tokens),
            "processor_milliseconds_per_token": float(seconds[1] * 1000 / num_tokens),
            "storage_bytes": int(stored),
        }
        for name, (count, seconds, stored) in ways.items()
    }
    return replace(
        evaluation,
        chunk_bits={_public(name): bits for name, bits in evaluation.chunk_bits.items()},
        seconds={_public(name): seconds for name, seconds in evaluation.seconds.items()},
    )


def _public(name: str) -> str:
    return name.replace("in_front", "in_context")


def _operations(
    model: PreTrainedModel, evaluation: RetroEvaluation, modes: Sequence[str], window_chunks: int
) -> dict[str, float]:
    counted = {}
    for number in evaluation.num_neighbors:
        wanted = ("off", "on", "in_front") if "in_front" in modes else ("off", "on")
        found = operations_per_token(model, number, window_chunks, wanted)
        words = f" k={number}" if len(evaluation.num_neighbors) > 1 else ""
        counted["off"] = found["off"]
        for mode in modes:
            if mode != "off":
                counted[mode + words] = found["in_front" if mode == "in_front" else "on"]
    return counted


def datastore_bytes(datastore: RetroDatastore, retriever: str) -> int:
    """
    Size on the disk of what a retriever needs at hand.

    Args:
        datastore ([`RetroDatastore`]):
            The datastore.
        retriever (`str`):
            `"dense"`, `"bm25"`, `"hybrid"` or `"rerank"`.

    Returns:
        `int`: the bytes of the tokens and of the index or indexes. A text encoder is not counted.
    """
    folders = [datastore.path / "chunks" / shard["name"] for shard in _shards(datastore)]
    if retriever in ("bm25", "hybrid"):
        folders.append(datastore.path / datastore.manifest["bm25"]["folder"])
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    if retriever != "bm25":
        files += [datastore.path / name for name in datastore.manifest.get("index", {}).get("sha256", {})]
    return sum(file.stat().st_size for file in files)


def _shards(datastore: RetroDatastore) -> list[dict[str, Any]]:
    return datastore.manifest["splits"][TRAIN_SPLIT]["chunks"]["shards"]


__all__ = ["datastore_bytes", "evaluate_rivals"]
