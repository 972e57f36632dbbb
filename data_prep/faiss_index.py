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
"""faiss indexes: choosing, making, writing, merging and tuning them"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data_prep.stage_files import (
    process_state,
)
from modeling_retro.datastore.datastore import faiss, read_index  # if faiss is missing, this import names the extras
from modeling_retro.durable_files_retro import remove, whole


RECALL_AT = (1, 10)
# Number of results that an index with refined codes (…,RFlat) scores exactly for each wanted result: with codes of 2
# bits for each dimension or less, and with longer ones.
_REFINED, _REFINED_OF_LONG = 16, 4
# Indexes with refined codes are filled by one process, which takes minutes up to this number of vectors.
REFINED_UP_TO = 10_000_000
# Up to this number, an exact search takes milliseconds for a query and needs no tuning.
EXACT_UP_TO = 50_000


def make_index(factory: str, dim: int, metric: str) -> faiss.Index:
    """Makes an empty index from a faiss factory string. Raises a `ValueError` if faiss does not know it."""
    try:
        return faiss.index_factory(dim, factory, metric_type(metric))
    except RuntimeError as error:
        raise ValueError(f"faiss knows no factory {factory!r} for {dim} dimensions: {last_line(error)}") from error


def suggest_factory(
    rows: int, dim: int, max_bytes: float | None = None, for_gpus: bool = False, on_disk: bool = False
) -> str:
    """
    Chooses a factory for a number of vectors. Up to 50,000 vectors are searched exactly. Up to ten million get an
    inverted file of about 4 sqrt(rows) lists. They hold codes of 2 bits for each dimension, which are scanned in the
    registers of the processor, and the vectors beside them score the best results again. This is about six times as
    fast as lists of vectors with the same recall. More vectors, those that GPUs search, and those for which the memory
    is too small, get about 8 sqrt(rows) lists of codes that are as precise as the memory allows.

    Args:
        rows (`int`): Number of vectors.
        dim (`int`): Dimension of the vectors.
        max_bytes (`float`, *optional*): Largest size of the index in memory. Defaults to no limit.
        for_gpus (`bool`, *optional*, defaults to `False`):
            Whether GPUs search the index, for which faiss cannot refine codes.
        on_disk (`bool`, *optional*, defaults to `False`):
            Whether the vectors beside the codes stay on the disk, so that only codes and ids take memory. The index is
            then of that kind, whatever the number of vectors. Its codes have 4 bits for each dimension if the memory
            allows, so that a quarter as many vectors must be read.

    Returns:
        `str`: The factory string.
    """
    if not on_disk and rows <= EXACT_UP_TO and (max_bytes is None or 4 * dim * rows <= max_bytes):
        return "Flat"
    codes = [(2 * dim, "SQfp16"), (dim, "SQ8")]
    refined, long = (f"PQ{count}x4fsr,Refine(SQfp16)" for count in (dim // 2, dim))
    if rows <= REFINED_UP_TO and dim % 2 == 0 and not for_gpus:
        codes.insert(0, (dim // 4 + 2 * dim, refined))
    if on_disk:
        codes = [(dim // 2, long), (dim // 4, refined)] if dim % 2 == 0 else []
    else:
        codes += [(m, f"PQ{m}") for m in (128, 96, 64, 48, 32, 16, 8) if m < dim and dim % m == 0]
    for size, code in codes:
        wanted = (4 if code in (refined, long) else 8) * math.sqrt(rows)  # scanning costs less than choosing the lists
        lists = 1 << round(math.log2(max(16, min(wanted, rows / 39))))
        quantizer = f"IVF{lists}" if lists < 1 << 16 else f"IVF{lists}_HNSW32"
        if max_bytes is None or (size + 8) * rows + 4 * dim * lists <= max_bytes:
            prefix = f"OPQ{size}," if code == f"PQ{size}" else ""
            return f"{prefix}{quantizer},{code}"
    raise ValueError(f"no index of {rows} vectors fits into {max_bytes / 1e9:g} GB; allow more memory")


def index_bytes(factory: str, rows: int, dim: int, on_disk: bool = False) -> int:
    """
    Size of an index in bytes, with its codes, its ids, and the centroids of an inverted file or the links of a graph.
    If vectors that score results again are on the disk, this is what memory holds, without them.
    """
    index = make_index(factory.replace("_HNSW32", ""), dim, "inner_product")
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        inner = faiss.downcast_index(index)
        refined = inner.refine_index.sa_code_size() if isinstance(inner, faiss.IndexRefine) else 0
        return rows * (ivf.code_size + (0 if on_disk else refined) + 8) + 4 * ivf.nlist * ivf.d
    graph = faiss.downcast_index(index)
    if isinstance(graph, faiss.IndexHNSW):
        # Beside its links in the lowest level, each vector has its level and the place of its links.
        return rows * (graph.storage.sa_code_size() + 4 * graph.hnsw.nb_neighbors(0) + 12)
    return rows * index.sa_code_size()


def write_index(index: faiss.Index, path: Path) -> None:
    """Writes an index. Raises an `OSError` that names the file if that fails, for example on a full disk."""
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        raise OSError(f"cannot write {path}: {last_line(error)}") from error


def merge_on_disk(index: faiss.Index, files: Sequence[Path], data: Path) -> None:
    """
    Fills an empty inverted file with the lists of other indexes. These lists and the result stay on the disk.

    Args:
        index (`faiss.Index`): The trained index, which will read its lists from the file `data`.
        files (`Sequence[Path]`): Indexes with the same training.
        data (`Path`): The file of the lists, which must be in the same folder as the index.
    """
    remove(data)
    ivf = faiss.extract_index_ivf(index)
    parts = [read_index(file) for file in files]
    vector = faiss.InvertedListsPtrVector()
    for part in parts:
        vector.push_back(faiss.extract_index_ivf(part).invlists)
    lists = faiss.OnDiskInvertedLists(ivf.nlist, ivf.code_size, str(data))
    index.ntotal = ivf.ntotal = lists.merge_from_multiple(vector.data(), vector.size())
    lists.filename = data.name  # relative to the index, so that both can be moved
    ivf.replace_invlists(lists, True)
    lists.this.disown()


def write_refined(index: faiss.Index, path: Path) -> None:
    """
    Writes an index with refined codes as two files: the codes, and beside them in a file `.refine` the vectors, which
    readers leave on the disk.
    """
    refined = faiss.downcast_index(index)
    with whole(path.with_suffix(".refine")) as temporary:
        write_index(refined.refine_index, temporary)
    with whole(path) as temporary:
        write_index(refined.base_index, temporary)


def read_to_add(path: Path) -> faiss.Index:
    """Reads an index of one or two files into memory, so that vectors can be added."""
    index, vectors = faiss.read_index(str(path)), path.with_suffix(".refine")
    return faiss.IndexRefine(index, faiss.read_index(str(vectors))) if vectors.exists() else index


def empty_copy(path: Path) -> faiss.Index:
    """Reads the trained index of a file, without its vectors."""
    index = read_index(path)
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is None or isinstance(faiss.downcast_index(index), faiss.IndexRefine):
        index = read_to_add(path)
        index.reset()
        return index
    lists = faiss.ArrayInvertedLists(ivf.nlist, ivf.code_size)
    ivf.replace_invlists(lists, True)
    lists.this.disown()
    index.ntotal = ivf.ntotal = 0
    return index


def to_gpus(index: faiss.Index, shard: bool) -> faiss.Index:
    """
    Moves an index to GPUs: to all of them if there is only one process, or else to the GPU of this process.

    Args:
        index (`faiss.Index`): The index.
        shard (`bool`): Whether to split it over the GPUs rather than to copy it to each.

    Raises:
        ValueError: If faiss has no such index for GPUs, as for refined codes.
    """
    state = process_state()
    options = faiss.GpuMultipleClonerOptions()
    options.useFloat16 = True
    options.shard = shard
    gpus = None if state.num_processes == 1 else [state.local_process_index]
    try:
        return faiss.index_cpu_to_gpus_list(index, options, gpus)
    except RuntimeError as error:
        raise ValueError(
            f"faiss cannot move this index to GPUs ({last_line(error)}); build it with a factory such as "
            "IVF4096,SQfp16 and --force, or search without use_gpus"
        ) from error


def without(ids: np.ndarray, excluded: np.ndarray) -> np.ndarray:
    """The first ten ids of each row without the excluded one, -1 if there are fewer."""
    wanted = (ids != excluded[:, None]) & (ids >= 0)
    order = np.argsort(~wanted, axis=1, kind="stable")[:, : RECALL_AT[-1]]
    return np.take_along_axis(np.where(wanted, ids, -1), order, axis=1)


def recall_at(found: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """
    Computes recall@n: the share of the first n results that are among the n nearest. Equally near results count as
    equal.

    Args:
        found (`np.ndarray`): float32 [q, 10], exact scores of the results in their order, -inf if absent.
        exact (`np.ndarray`): float32 [q, 10], scores of the nearest, best first, -inf if absent.
    """
    recall = {}
    for n in RECALL_AT:
        present = np.isfinite(exact[:, :n])
        last = np.where(present, exact[:, :n], np.inf).min(axis=1, keepdims=True)  # score of the nth nearest
        hits = np.isfinite(found[:, :n]) & (found[:, :n] >= last - 1e-5 * np.abs(last))
        recall[f"recall@{n}"] = round(float(hits.sum() / max(1, present.sum())), 4)
    return recall


def tune(
    index: faiss.Index, recall_now: Callable[[], dict[str, float]], target: float
) -> tuple[dict[str, int], dict[str, float]]:
    """
    Finds the smallest nprobe (efSearch for HNSW), to about 1/16, whose recall@10 reaches the target, or else the best
    one.

    Args:
        index (`faiss.Index`): The index.
        recall_now (`Callable`): Measures the recall of the index with its current parameters.
        target (`float`): The recall@10 to reach.

    Returns:
        `tuple[dict, dict]`: the search parameters and their recall.
    """
    ivf = faiss.try_extract_index_ivf(index)
    inner = faiss.downcast_index(index)
    fixed = {}
    if isinstance(inner, faiss.IndexRefine):
        is_long = ivf is not None and 4 * ivf.code_size > index.d
        fixed["k_factor_rf"] = _REFINED_OF_LONG if is_long else _REFINED
        faiss.ParameterSpace().set_index_parameter(index, "k_factor_rf", fixed["k_factor_rf"])
    if isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    if ivf is not None:
        name, value, limit = "nprobe", 1, ivf.nlist
    elif isinstance(inner, faiss.IndexHNSW):
        name, value, limit = "efSearch", 16, 4096
    else:
        return fixed, recall_now()
    found: dict[int, dict[str, float]] = {}

    def reaches(value: int) -> bool:
        faiss.ParameterSpace().set_index_parameter(index, name, value)
        found[value] = recall_now()
        return found[value][f"recall@{RECALL_AT[-1]}"] >= target

    below = 0
    while not reaches(value) and value < limit:
        below, value = value, min(2 * value, limit)
    while below and value - below > max(1, value // 16):
        middle = (below + value) // 2
        below, value = (below, middle) if reaches(middle) else (middle, value)
    best = max(found, key=lambda value: (min(found[value][f"recall@{RECALL_AT[-1]}"], target), -value))
    faiss.ParameterSpace().set_index_parameter(index, name, best)
    return fixed | {name: best}, found[best]


def metric_type(metric: str) -> int:
    """The number that faiss has for a metric. Raises a `ValueError` for other names."""
    if metric not in ("inner_product", "l2"):
        raise ValueError(f"metric must be 'inner_product' or 'l2', got {metric!r}")
    return faiss.METRIC_INNER_PRODUCT if metric == "inner_product" else faiss.METRIC_L2


def last_line(error: Exception) -> str:
    """What an error of faiss says, without the place in its code."""
    return str(error).rsplit(": ", 1)[-1].strip()
