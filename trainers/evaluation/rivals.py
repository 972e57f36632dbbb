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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.datastore.splits import DatastoreSplit
from modeling_retro.sharing.model_card import Way

from .evaluate import evaluate_retro, stored_retriever
from .knn_lm import KnnStore, build_knn_store, neighbor_distribution
from .operations import operations_per_token
from .options import EvaluationOptions
from .report import RetroEvaluation
from .windows import document_offsets, document_windows


# The command line and reports know the neighbors in front by this name of their literature.
IN_CONTEXT = "in_context"
BASELINES = (IN_CONTEXT, "knn_lm")


def evaluate_rivals(
    model: PreTrainedModel,
    datastore: RetroDatastore,
    split: DatastoreSplit,
    baselines: Sequence[str],
    knn_folder: str | Path | None = None,
    knn_factory: str = "auto",
    knn_neighbors: int = 1024,
    options: EvaluationOptions | None = None,
    **fields: Any,
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
        options ([`~trainers.EvaluationOptions`], *optional*):
            What to measure beside the rivals.
        fields:
            Fields of the options, which override those of `options`.

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
    options = replace(options or EvaluationOptions(), **fields)
    if tuple(options.datastore_shares) != (1.0,):
        raise ValueError(
            f"datastore_shares is {list(options.datastore_shares)}, expected 1 with baselines; measure shares alone"
        )
    has_knn = "knn_lm" in baselines
    if has_knn and (knn_folder is None or "off" not in options.modes or knn_neighbors < 1):
        raise ValueError(
            f"the baseline knn_lm has knn_folder {knn_folder}, modes {', '.join(options.modes)} and knn_neighbors "
            f"{knn_neighbors}, expected a folder, off among the modes and at least 1"
        )
    if has_knn:
        if len(document_offsets(split.chunks.document_id, options.max_documents)) < 3:
            raise ValueError("the kNN-LM is tuned on some documents and measured on others; there is only one")
        store = build_knn_store(
            model,
            datastore,
            knn_folder,
            knn_factory,
            options.window_chunks,
            options.batch_size,
            options.seed,
            options.show_progress,
        )
    modes = list(dict.fromkeys([*options.modes, *(["in_front"] if IN_CONTEXT in baselines else [])]))
    options = replace(options, modes=modes, keep_token_bits=has_knn)
    evaluation = evaluate_retro(model, datastore, split, options)
    num_tokens = evaluation.num_tokens
    storage = datastore_bytes(datastore, options.retriever or stored_retriever(split))
    operations = _operations(model, evaluation, options)
    costs = {
        name: Cost(operations[name], seconds, 0 if name == "off" else storage)
        for name, seconds in evaluation.seconds.items()
    }
    if has_knn:
        evaluation = _mix_with_knn_lm(model, split, evaluation, costs, store, knn_neighbors, options)
    evaluation.rivals = {
        _in_report(name): {
            "operations_per_token": float(cost.operations),
            "milliseconds_per_token": float(cost.seconds[0] * 1000 / num_tokens),
            "processor_milliseconds_per_token": float(cost.seconds[1] * 1000 / num_tokens),
            "storage_bytes": int(cost.storage),
        }
        for name, cost in costs.items()
    }
    return replace(
        evaluation,
        chunk_bits={_in_report(name): bits for name, bits in evaluation.chunk_bits.items()},
        seconds={_in_report(name): seconds for name, seconds in evaluation.seconds.items()},
    )


@dataclass
class Cost:
    """
    What a way to retrieve costs.

    Args:
        operations (`float`): Operations for a token.
        seconds (`np.ndarray`): Wall-clock time and processor time of the measurement, float64 `[2]`.
        storage (`int`): Stored bytes.
    """

    operations: float
    seconds: np.ndarray
    storage: int


def _in_report(name: str) -> str:
    """The name of a way in the report of rivals, where the mode `in_front` has the name of its baseline."""
    way = Way.parse(name)
    return str(replace(way, mode=IN_CONTEXT)) if way.mode == "in_front" else name


def _mix_with_knn_lm(
    model: PreTrainedModel,
    split: DatastoreSplit,
    evaluation: RetroEvaluation,
    costs: dict[str, Cost],
    store: KnnStore,
    num_neighbors: int,
    options: EvaluationOptions,
) -> RetroEvaluation:
    """Adds the mixtures and their costs, and leaves out the documents on which the mixtures were tuned."""
    windows = document_windows(evaluation.document_offsets, options.window_chunks, options.stride_chunks)
    description = "Evaluating (knn_lm)" if options.show_progress else None
    found = neighbor_distribution(model, split, windows, store, options.batch_size, num_neighbors, description)
    num_documents = len(evaluation.document_offsets) - 1
    is_tuning = np.zeros(num_documents, dtype=bool)
    is_tuning[np.random.default_rng(options.seed).permutation(num_documents)[: max(1, num_documents // 10)]] = True
    tuning_chunks = np.repeat(is_tuning, np.diff(evaluation.document_offsets))
    mixtures = {}
    for name, bits in evaluation.token_bits.items():
        way = Way.parse(name)
        if way.mode not in ("off", "on"):
            continue
        weight, temperature = found.tune(bits, tuning_chunks)
        mixed = str(Way("knn_lm") if way.mode == "off" else replace(way, has_knn_lm=True))
        evaluation.chunk_bits[mixed] = found.mixed_bits(bits, weight, temperature).sum(-1)
        mixtures[mixed] = {"weight": weight, "temperature": found.temperatures[temperature]}
        cost = costs[name]
        count, seconds = cost.operations + store.operations_per_search, cost.seconds + found.search_seconds
        if way.mode != "off":  # The keys are found by the states of the base, which retrieval changes.
            count, seconds = count + costs["off"].operations, seconds + found.state_seconds
        costs[mixed] = Cost(count, seconds, cost.storage + store.num_bytes)
    evaluation.knn_lm = {
        **store.record,
        "neighbors": num_neighbors,
        "tuning_documents": int(is_tuning.sum()),
        "mixtures": mixtures,
    }
    return evaluation.only(~is_tuning)


def _operations(model: PreTrainedModel, evaluation: RetroEvaluation, options: EvaluationOptions) -> dict[str, float]:
    """Operations for a token, for each way that was measured."""
    wanted = tuple(mode for mode in ("off", "on", "in_front") if mode != "in_front" or mode in options.modes)
    window = options.window_chunks
    counted = {number: operations_per_token(model, number, window, wanted) for number in options.numbers}
    found = {}
    for name in evaluation.chunk_bits:
        way = Way.parse(name)
        number = options.numbers[0] if way.num_neighbors is None else way.num_neighbors
        found[name] = counted[number][way.mode if way.mode in ("off", "in_front") else "on"]
    return found


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
    folders = [datastore.path / "chunks" / shard.name for shard in datastore.manifest.train.chunk_shards]
    if retriever in ("bm25", "hybrid"):
        folders.append(datastore.path / datastore.manifest.bm25.folder)
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    if retriever != "bm25" and datastore.manifest.index is not None:
        files += [datastore.path / name for name in datastore.manifest.index.sha256]
    return sum(file.stat().st_size for file in files)


__all__ = ["datastore_bytes", "evaluate_rivals"]
