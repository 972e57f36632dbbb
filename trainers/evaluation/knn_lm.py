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
kNN-LM (Khandelwal et al. 2020, arXiv 1911.00172), a rival of RETRO: a language model whose prediction is mixed with
the tokens that followed the most similar states in the datastore.

A key is the last hidden state of the base, after its final norm, and its value is the token that came next. (The paper
takes the input of the last feed-forward layer, which has no common name among the decoders of Transformers.)
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from data_prep.faiss_index import make_index, recall_at, suggest_factory, tune, write_index
from data_prep.stage_files import directory_lock
from modeling_retro.datastore.datastore import RetroDatastore, faiss, read_index
from modeling_retro.datastore.manifest import chunks_fingerprint
from modeling_retro.datastore.splits import DatastoreSplit
from modeling_retro.durable_files_retro import make_folder, whole, write_json
from modeling_retro.encoder.chunk_encoder import tensors_fingerprint

from .operations import read_clocks
from .predictions import head_inputs
from .windows import document_offsets, document_windows, summed_over_processes, window_batches


MANIFEST, INDEX = "knn_lm.json", "index.faiss"
# Temperatures to choose from, as shares of the median squared distance of a key to its nearest other key.
TEMPERATURES = tuple(2.0**n for n in range(-7, 3))
# Weights of the neighbors' distribution to choose from. 0 leaves the model as it is.
WEIGHTS = tuple(n / 40 for n in range(40))
_BLOCK_CHUNKS = 1024
_ADDED_AT_ONCE = 1 << 16
# faiss wants at least 39 vectors for each list of an inverted file.
_TRAINING_VECTORS_PER_LIST = 64
_RECALL_QUERIES = 256
_TARGET_RECALL = 0.95


class KnnStore:
    """
    The keys and values of a kNN-LM, and the index over the keys. Opened by [`build_knn_store`].

    Args:
        folder (`Path`): Folder with `knn_lm.json`, `index.faiss`, `keys` and `values`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.record = _read_manifest(folder)
        self.index = read_index(folder / INDEX)
        for name, value in self.record["index"]["search_parameters"].items():
            faiss.ParameterSpace().set_index_parameter(self.index, name, value)
        self.values = np.concatenate([np.load(file, allow_pickle=False) for file in _files(folder, "values")])

    def search(self, states: np.ndarray, num_neighbors: int) -> tuple[np.ndarray, np.ndarray]:
        """
        Finds the nearest keys of states.

        Args:
            states (`np.ndarray`): float32 `[n, d]`.
            num_neighbors (`int`): Number of keys to find for each.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: squared distances float32, infinite where fewer keys were found, and
            values int32, both `[n, num_neighbors]`.
        """
        distances, ids = self.index.search(states, min(num_neighbors, self.index.ntotal))
        return np.where(ids >= 0, distances, np.inf), self.values[ids]

    @property
    def num_bytes(self) -> int:
        """Size on the disk of keys, values and index."""
        files = [self.folder / INDEX, *_files(self.folder, "keys"), *_files(self.folder, "values")]
        return sum(file.stat().st_size for file in files)

    @property
    def operations_per_search(self) -> float:
        """
        Operations for one search, which are two for each dimension of each vector that a state is compared with. In an
        inverted file, these are all centroids and an average share of the keys.
        """
        ivf = faiss.try_extract_index_ivf(self.index)
        compared = self.index.ntotal if ivf is None else ivf.nlist + self.index.ntotal * ivf.nprobe / ivf.nlist
        return 2.0 * self.index.d * compared


def base_fingerprint(model: PreTrainedModel) -> str:
    """The sha256 of the names and values of the weights that a RETRO model uses without retrieval."""
    base = getattr(model, "decoder", model)
    weights = {
        name.replace(".base_layer.", "."): value for name, value in base.state_dict().items() if ".lora_" not in name
    }
    return tensors_fingerprint(weights)


def build_knn_store(
    model: PreTrainedModel,
    datastore: RetroDatastore,
    folder: str | Path,
    factory: str = "auto",
    window_chunks: int = 32,
    batch_size: int = 8,
    seed: int = 0,
    show_progress: bool = True,
) -> KnnStore:
    """
    Writes a key and a value for each token of a datastore that has a token in front of it, or opens those that are
    there. The documents are read in windows that overlap by an eighth. An interrupted run goes on with the block of
    chunks at which it stopped.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A RETRO model, which is run without retrieval.
        datastore ([`RetroDatastore`]):
            The datastore whose tokens become values.
        folder (`str` or `Path`):
            Folder for keys, values and index.
        factory (`str`, *optional*, defaults to `"auto"`):
            A faiss factory string, of a flat index or an inverted file. `"auto"` chooses one by the number of keys.
        window_chunks (`int`, *optional*, defaults to 32):
            Length of a window in chunks, at least 2.
        batch_size (`int`, *optional*, defaults to 8):
            Number of windows in a forward pass.
        seed (`int`, *optional*, defaults to 0):
            Seed of the vectors that the index is trained on and measured with.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        [`KnnStore`]

    Raises:
        ValueError: If the folder holds keys of another base, of another datastore or of other options, if removed
            documents are still in the datastore, if the datastore has no two tokens in a row, or if faiss does not
            know the factory.
    """
    datastore.check_compact("a kNN-LM")
    folder = Path(folder)
    facts = {
        "base_sha256": base_fingerprint(model),
        "datastore_fingerprint": chunks_fingerprint(datastore.manifest.train.chunk_shards),
        "factory": factory,
        "window_chunks": window_chunks,
        "seed": seed,
    }
    with directory_lock(folder):
        if PartialState().is_main_process:
            _claim(folder, facts)
            if "index" not in _read_manifest(folder):
                _write_blocks(model, datastore, folder, window_chunks, batch_size, show_progress)
                record = _write_index(folder, factory, seed)
                write_json(folder / MANIFEST, {**facts, "index": record})
        PartialState().wait_for_everyone()
    return KnnStore(folder)


def _claim(folder: Path, facts: dict[str, Any]) -> None:
    """Refuses a folder that holds the keys of something else."""
    if (folder / MANIFEST).exists():
        found = _read_manifest(folder)
        for name, value in facts.items():
            if found.get(name) != value:
                raise ValueError(
                    f"{folder} holds the keys of a kNN-LM with {name} {found.get(name)}, expected {value}; choose "
                    "another folder or delete this one"
                )
    else:
        write_json(folder / MANIFEST, facts)


def _read_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def _files(folder: Path, kind: str) -> list[Path]:
    return sorted((folder / kind).glob("block-*.npy"))


def _write_blocks(
    model: PreTrainedModel,
    datastore: RetroDatastore,
    folder: Path,
    window_chunks: int,
    batch_size: int,
    show_progress: bool,
) -> None:
    stride = window_chunks - max(1, window_chunks // 8)
    windows = np.array(document_windows(document_offsets(datastore.chunks.document_id), window_chunks, stride))
    blocks = np.cumsum(windows[:, 1] - windows[:, 2]) // _BLOCK_CHUNKS
    make_folder(folder / "keys")
    make_folder(folder / "values")
    for number in tqdm(np.unique(blocks), desc="Keys of the kNN-LM", disable=not show_progress):
        keys_file, values_file = (folder / kind / f"block-{number:06d}.npy" for kind in ("keys", "values"))
        if keys_file.exists():  # It is written after the values.
            continue
        chosen = windows[blocks == number]
        found = [
            _keys_and_values(model, datastore, batch)
            for batch in np.split(chosen, range(batch_size, len(chosen), batch_size))
        ]
        keys, values = (np.concatenate(parts) for parts in zip(*found, strict=True))
        if not np.isfinite(keys).all():
            raise ValueError("some hidden states of the base are too large for float16, in which keys are stored")
        for file, array in ((values_file, values), (keys_file, keys)):
            with whole(file) as temporary:
                np.save(temporary, array, allow_pickle=False)


def _keys_and_values(
    model: PreTrainedModel, datastore: RetroDatastore, windows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Keys float16 `[n, d]` and values int32 `[n]` of the counted chunks of some windows."""
    start, end, first = windows.T[..., None]
    chunk_ids = start + np.arange((end - start).max())
    chunk_ids = np.where(chunk_ids < end, chunk_ids, -1)
    states, tokens, has_key = context_states(model, datastore, chunk_ids, first)
    return states[has_key].astype(np.float16), tokens[has_key].astype(np.int32)


def context_states(
    model: PreTrainedModel, chunks: RetroDatastore | DatastoreSplit, chunk_ids: np.ndarray, first_counted: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    The last hidden states from which the base predicts the tokens of some windows.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A RETRO model, which is run without retrieval.
        chunks ([`RetroDatastore`] or [`DatastoreSplit`]):
            The chunks.
        chunk_ids (`np.ndarray`):
            Chunk ids of the windows int64 `[B, L]`, -1 for absent ones.
        first_counted (`np.ndarray`):
            First chunk of each window that counts, int64 `[B, 1]`.

    Returns:
        `tuple[np.ndarray, np.ndarray, np.ndarray]`: the states float32 `[B, L, m, d]`, the tokens that they predict
        int64 `[B, L, m]`, and where there are both, bool `[B, L, m]`.
    """
    input_ids, mask = chunks.chunks.take(chunk_ids)  # [B, L, m]
    tokens = torch.from_numpy(input_ids.reshape(len(chunk_ids), -1)).to(model.device)
    with _in_evaluation(model):
        states = head_inputs(model, input_ids=tokens).float().cpu().numpy()
    states = np.concatenate([np.zeros_like(states[:, :1]), states[:, :-1]], axis=1)
    has_key = mask & (chunk_ids >= first_counted)[..., None]
    has_key[:, 0, 0] = False
    return states.reshape(*input_ids.shape, -1), input_ids, has_key


@contextmanager
def _in_evaluation(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _write_index(folder: Path, factory: str, seed: int) -> dict[str, Any]:
    """Builds the index over the keys, and sets nprobe by its recall among the keys of a sample."""
    blocks = [np.load(file, mmap_mode="r", allow_pickle=False) for file in _files(folder, "keys")]
    ends = np.cumsum([len(block) for block in blocks])
    total, dim = int(ends[-1]) if len(ends) else 0, blocks[0].shape[1] if blocks else 0
    if total == 0:
        raise ValueError("the datastore has no two tokens in a row, which a kNN-LM needs")

    def gather(ids: np.ndarray) -> np.ndarray:
        number = np.searchsorted(ends, ids, side="right")
        starts = ends - [len(block) for block in blocks]
        keys = np.empty((*ids.shape, dim), dtype=np.float32)
        for n in np.unique(number):
            keys[number == n] = blocks[n][ids[number == n] - starts[n]]
        return keys

    factory = suggest_factory(total, dim) if factory == "auto" else factory
    index = make_index(factory, dim, "l2")
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is None and "Flat" not in factory:
        raise ValueError(f"the factory of a kNN-LM is {factory!r}, expected a flat index or an inverted file (IVF…)")
    generator = np.random.default_rng(seed)
    if not index.is_trained:
        wanted = min(total, _TRAINING_VECTORS_PER_LIST * (ivf.nlist if ivf is not None else 256))
        sample = gather(np.sort(generator.choice(total, wanted, replace=False)))
        try:
            index.train(sample)
        except RuntimeError as error:
            raise ValueError(f"faiss cannot train {factory!r} on {wanted} keys of this datastore: {error}") from error
    for block in blocks:
        for start in range(0, len(block), _ADDED_AT_ONCE):
            index.add(np.asarray(block[start : start + _ADDED_AT_ONCE], dtype=np.float32))

    drawn = np.sort(generator.choice(total, min(total, _RECALL_QUERIES), replace=False))
    queries = gather(drawn)
    exact = _exact_distances(queries, drawn, blocks)

    def recall_now() -> dict[str, float]:
        ids = index.search(queries, 11)[1]
        order = np.argsort((ids == drawn[:, None]) | (ids < 0), axis=1, kind="stable")[:, :10]
        ids = np.take_along_axis(ids, order, axis=1)
        distances = np.square(gather(np.maximum(ids, 0)) - queries[:, None]).sum(-1)
        found = np.where((ids >= 0) & (ids != drawn[:, None]), -distances, -np.inf)
        return recall_at(found.astype(np.float32), -exact)

    parameters, recall = tune(index, recall_now, _TARGET_RECALL)
    with whole(folder / INDEX) as temporary:
        write_index(index, temporary)
    nearest = exact[:, 0][np.isfinite(exact[:, 0])]
    scale = float(np.median(nearest)) if len(nearest) else 1.0
    return {
        "factory": factory,
        "ntotal": total,
        "search_parameters": parameters,
        "recall": recall,
        "distance_scale": scale if scale > 0 else 1.0,
    }


def _exact_distances(queries: np.ndarray, own: np.ndarray, blocks: Sequence[np.ndarray]) -> np.ndarray:
    """Squared distances of the ten nearest keys except the query's own, float32 `[q, 10]`, infinite where missing."""
    found, offset = np.full((len(queries), 10), np.inf, dtype=np.float32), 0
    for block in blocks:
        distances, ids = faiss.knn(queries, np.asarray(block, dtype=np.float32), min(11, len(block)))
        distances[ids + offset == own[:, None]] = np.inf
        found = np.sort(np.concatenate([found, distances], axis=1), axis=1)[:, :10]
        offset += len(block)
    return found


def neighbor_probabilities(
    distances: np.ndarray, values: np.ndarray, tokens: np.ndarray, temperatures: Sequence[float]
) -> np.ndarray:
    """
    The probability of tokens in the distribution of the nearest keys, in which a value has the weight
    `exp(-distance / temperature)`.

    Args:
        distances (`np.ndarray`): Squared distances of the keys `[n, k]`, infinite for absent ones.
        values (`np.ndarray`): Their values int `[n, k]`.
        tokens (`np.ndarray`): The tokens int `[n]`.
        temperatures (`Sequence[float]`): Each is computed.

    Returns:
        `np.ndarray`: float64 `[n, temperatures]`.
    """
    nearest = distances.min(axis=1, keepdims=True)
    less_nearest = distances.astype(np.float64) - np.where(np.isfinite(nearest), nearest, 0)
    matches = values == tokens[:, None]
    found = np.empty((len(tokens), len(temperatures)))
    for n, temperature in enumerate(temperatures):
        weights = np.exp(-less_nearest / temperature)
        # A search that probes only empty lists of an inverted file finds no key, and then knows no token.
        found[:, n] = (weights * matches).sum(axis=1) / np.maximum(weights.sum(axis=1), 1)
    return found


@dataclass
class NeighborDistribution:
    """
    What the keys say about the tokens of a split.

    Args:
        probabilities (`np.ndarray`):
            Probability of each token, float64 `[chunks, m, temperatures]`.
        found (`np.ndarray`):
            Which tokens have a context and so a distribution, bool `[chunks, m]`.
        temperatures (`list[float]`):
            The temperatures.
        state_seconds (`np.ndarray`), search_seconds (`np.ndarray`):
            Wall-clock time and processor time in which the states of the base were computed and the keys searched,
            float64 `[2]`.
    """

    probabilities: np.ndarray
    found: np.ndarray
    temperatures: list[float]
    state_seconds: np.ndarray
    search_seconds: np.ndarray

    def mixed_bits(self, bits: np.ndarray, weight: float, temperature: int) -> np.ndarray:
        """
        The bits of tokens when a model's distribution is mixed with this one.

        Args:
            bits (`np.ndarray`): The model's bits for each token, float64 `[chunks, m]`.
            weight (`float`): Weight λ of this distribution.
            temperature (`int`): Number of the temperature.

        Returns:
            `np.ndarray`: float64 `[chunks, m]`. Tokens without a context keep their bits.
        """
        with np.errstate(divide="ignore"):
            mixed = -np.log2(weight * self.probabilities[..., temperature] + (1 - weight) * np.exp2(-bits))
        return np.where(self.found, mixed, bits)

    def tune(self, bits: np.ndarray, chunks: np.ndarray) -> tuple[float, int]:
        """
        Chooses the weight and the temperature with which some chunks need the fewest bits.

        Args:
            bits (`np.ndarray`): The model's bits for each token, float64 `[chunks, m]`.
            chunks (`np.ndarray`): Which chunks to look at, bool `[chunks]`.

        Returns:
            `tuple[float, int]`: the weight λ and the number of the temperature.
        """
        part = NeighborDistribution(
            self.probabilities[chunks], self.found[chunks], self.temperatures, self.state_seconds, self.search_seconds
        )
        choices = [(weight, n) for weight in WEIGHTS for n in range(len(self.temperatures))]
        return min(choices, key=lambda choice: part.mixed_bits(bits[chunks], *choice).sum())


def neighbor_distribution(
    model: PreTrainedModel,
    split: DatastoreSplit,
    windows: Sequence[tuple[int, int, int]],
    store: KnnStore,
    batch_size: int,
    num_neighbors: int = 1024,
    description: str | None = None,
) -> NeighborDistribution:
    """
    Searches the keys for the context of each token of a split. The context is that of
    [`~trainers.evaluation.evaluate.token_bits`].

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model that the store was made with.
        split ([`DatastoreSplit`]):
            The chunks to measure.
        windows (`Sequence[tuple[int, int, int]]`):
            First chunk, end and first counted chunk of each window.
        store ([`KnnStore`]):
            Keys and values.
        batch_size (`int`):
            Number of windows in a forward pass.
        num_neighbors (`int`, *optional*, defaults to 1024):
            Number of keys to find for each token, as in the paper.
        description (`str`, *optional*):
            Label of the progress bar. Without it there is no bar.

    Returns:
        [`NeighborDistribution`]
    """
    temperatures = [share * store.record["index"]["distance_scale"] for share in TEMPERATURES]
    shape = (max(end for _, end, _ in windows), model.config.chunk_size)
    probabilities = np.zeros((*shape, len(temperatures)))
    found = np.zeros(shape)
    seconds = np.zeros((2, 2))
    for chunk_ids, first_counted, is_own in window_batches(model, windows, batch_size, description):
        clock = read_clocks()
        states, tokens, has_key = context_states(model, split, chunk_ids, first_counted)
        seconds[0] += read_clocks() - clock
        if not is_own:
            continue
        clock = read_clocks()
        distances, values = store.search(states[has_key], num_neighbors)
        chosen = np.broadcast_to(chunk_ids[..., None], has_key.shape)[has_key], np.nonzero(has_key)[2]
        probabilities[chosen] = neighbor_probabilities(distances, values, tokens[has_key], temperatures)
        found[chosen] = 1
        seconds[1] += read_clocks() - clock
    return NeighborDistribution(
        summed_over_processes(probabilities), summed_over_processes(found) > 0, temperatures, seconds[0], seconds[1]
    )


__all__ = ["KnnStore", "NeighborDistribution", "build_knn_store", "neighbor_distribution", "neighbor_probabilities"]
