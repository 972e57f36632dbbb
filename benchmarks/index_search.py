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
Searching an index against exact search, with the same threads and batches, by queries that the index does not hold.

```bash
retro index --datastore datastore   # after retro embed of the training side and of a validation split
python benchmarks/index_search.py --datastore datastore --factories IVF2048,Flat HNSW32 IVF2048,SQ8
```

Queries are the chunks of a held-out split. The parameters of each index are set as `retro index` sets them, on other
queries than those that are timed and whose recall is shown.
"""

import argparse
import statistics
import time
from pathlib import Path

import faiss
import numpy as np

from data_prep.faiss_index import make_index, recall_at, tune, write_index
from data_prep.index import read_embeddings
from modeling_retro.datastore.datastore import read_index
from modeling_retro.datastore.manifest import TRAIN_SPLIT, read_manifest
from modeling_retro.datastore.splits import split_path


K = 10
BATCH = 1024


def load(datastore: Path, split: str) -> np.ndarray:
    """Embeddings of a split, float32 [n, dim]."""
    arrays = read_embeddings(split_path(datastore, split), split, read_manifest(datastore), verify=False)
    return np.concatenate(arrays).astype(np.float32)


def search(index: faiss.Index, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Scores and ids [n, K], and the seconds it took."""
    begin = time.perf_counter()
    parts = [index.search(queries[start : start + BATCH], K) for start in range(0, len(queries), BATCH)]
    seconds = time.perf_counter() - begin
    scores, ids = (np.concatenate(part) for part in zip(*parts, strict=True))
    return scores, ids, seconds


def true_scores(vectors: np.ndarray, queries: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Inner products of what was found [n, K]; an index may know its vectors only roughly."""
    return np.where(ids >= 0, np.einsum("qd,qnd->qn", queries, vectors[np.maximum(ids, 0)]), -np.inf)


def build(factory: str, vectors: np.ndarray, file: Path) -> float:
    """Builds an index into a file, unless it is there; returns the seconds it took."""
    if file.exists():
        return float("nan")
    begin = time.perf_counter()
    index = make_index(factory, vectors.shape[1], "inner_product")
    index.train(vectors)
    index.add(vectors)
    write_index(index, file)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datastore", type=Path, required=True)
    parser.add_argument("--split", default="validation", help="The held-out split whose chunks are the queries.")
    parser.add_argument("--factories", nargs="*", default=[], help="Built beside the index of the datastore.")
    parser.add_argument("--folder", type=Path, default=Path("."), help="Where the built indexes are kept.")
    parser.add_argument("--target_recall", type=float, default=0.95)
    parser.add_argument("--queries", type=int, default=4096, help="Queries that are timed.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--build_only", action="store_true", help="Build the indexes and measure nothing.")
    arguments = parser.parse_args()
    vectors, queries = load(arguments.datastore, TRAIN_SPLIT), load(arguments.datastore, arguments.split)
    queries = queries[np.random.default_rng(0).permutation(len(queries))]
    tuning, queries = queries[:1000], queries[1000 : 1000 + arguments.queries]

    files = {"datastore": arguments.datastore / "index.faiss"}
    for factory in arguments.factories:
        files[factory] = arguments.folder / f"{factory.replace(',', '-')}.faiss"
        print(f"{factory}: built in {build(factory, vectors, files[factory]):.0f} s", flush=True)
    if arguments.build_only:
        return

    exact = faiss.IndexFlatIP(vectors.shape[1])
    exact.add(vectors)
    indexes, parameters = {}, {}
    nearest = search(exact, tuning)[0]
    for name, file in files.items():
        index = indexes[name] = read_index(file)

        def recall_now(index=index) -> dict[str, float]:
            return recall_at(true_scores(vectors, tuning, search(index, tuning)[1]), nearest)

        parameters[name], _ = tune(index, recall_now, arguments.target_recall)
    seconds = {name: [] for name in ["exact", *indexes]}
    for _ in range(arguments.repeats):
        nearest, _, taken = search(exact, queries)
        seconds["exact"].append(taken)
        for name, index in indexes.items():
            seconds[name].append(search(index, queries)[2])

    rates = {name: len(queries) / statistics.median(taken) for name, taken in seconds.items()}
    print(f"{len(vectors)} vectors of {vectors.shape[1]}, {faiss.omp_get_max_threads()} threads, batches of {BATCH}")
    print(f"{'index':<24}{'MB':>8}{'parameters':>28}{'recall@10':>11}{'queries/s':>11}{'x exact':>9}")
    print(f"{'exact':<24}{vectors.nbytes / 1e6:>8.0f}{'':>28}{1:>11.3f}{rates['exact']:>11.0f}{1:>9.1f}")
    for name, index in indexes.items():
        recall = recall_at(true_scores(vectors, queries, search(index, queries)[1]), nearest)["recall@10"]
        setting = ", ".join(f"{key} {value}" for key, value in parameters[name].items())
        size = files[name].stat().st_size / 1e6
        ratio = rates[name] / rates["exact"]
        print(f"{name:<24}{size:>8.0f}{setting:>28}{recall:>11.3f}{rates[name]:>11.0f}{ratio:>9.1f}")


if __name__ == "__main__":
    main()
