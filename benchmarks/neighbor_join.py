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
The neighbors of chunks list by list and query by query, in turn in one process: processor time of a query, and recall.

```bash
python benchmarks/neighbor_join.py --datastore datastore --num_neighbors 2
```

The queries are consecutive chunks from the middle of the datastore, and their own documents are left out. Recall is
the share of the nearest chunks that are found, for a sample of the queries.
"""

import argparse
import time
from pathlib import Path

import faiss
import numpy as np
import torch

from data_prep.index import read_embeddings
from data_prep.join import ListJoin, can_join
from data_prep.shares import remove_shared_work
from modeling_retro import RetroDatastore
from modeling_retro.datastore.manifest import TRAIN_SPLIT
from modeling_retro.retriever.search import other_document_filter, search


def nearest(embeddings: list[np.ndarray], queries: np.ndarray, own: np.ndarray, documents: np.ndarray, k: int):
    """Inner products float32 [n, k] of the nearest chunks of other documents."""
    best, first = np.full((len(queries), k), -np.inf, dtype=np.float32), 0
    for array in embeddings:
        for start in range(0, len(array), 1 << 14):
            products = queries @ array[start : start + (1 << 14)].astype(np.float32).T
            others = documents[first + start : first + start + products.shape[1]]
            products[own[:, None] == others] = -np.inf
            top = torch.from_numpy(np.concatenate([best, products], axis=1)).topk(k, dim=1)
            best = top.values.numpy()
        first += len(array)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datastore", type=Path, required=True)
    parser.add_argument("--num_neighbors", type=int, default=2)
    parser.add_argument("--queries", type=int, default=1 << 16, help="Queries of a repeat, list by list.")
    parser.add_argument("--searched", type=int, default=8192, help="Those that are also searched query by query.")
    parser.add_argument("--sample", type=int, default=1024, help="Those whose recall is measured.")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    datastore = RetroDatastore.from_pretrained(arguments.datastore)
    record, k = datastore.manifest.index, arguments.num_neighbors
    embeddings = read_embeddings(datastore.path, TRAIN_SPLIT, datastore.manifest, verify=False)
    documents, number = datastore.chunks.document_id, min(arguments.queries, len(datastore.chunks))
    first = (len(datastore.chunks) - number) // 2
    rows = np.arange(first, first + number)
    queries = np.concatenate(embeddings)[rows].astype(np.float32)
    print(f"{len(documents)} chunks, {record.factory}, {record.search_parameters}, {torch.get_num_threads()} threads")
    assert can_join(datastore, "dense", number), "this datastore is searched query by query"
    begin = time.process_time()
    join = ListJoin(datastore, embeddings)
    print(f"copy of the vectors: {time.process_time() - begin:.1f} s of processor time")
    unwanted = {"own_document": other_document_filter(datastore.chunks, documents[rows])}
    searched = min(arguments.searched, number)
    found, taken = {}, {"list by list": [], "query by query": []}
    for _ in range(arguments.repeats):
        begin = time.process_time()
        found["list by list"], _, joined = join(queries, documents[rows], k, unwanted=unwanted)
        taken["list by list"].append((time.process_time() - begin) / number * 1e6)
        begin, parts = time.process_time(), []
        for start in range(0, searched, 4096):
            part = rows[start : start + 4096]
            own = {"own_document": other_document_filter(datastore.chunks, documents[part])}
            parts.append(search(datastore.index, queries[start : start + 4096], k, own))
        found["query by query"] = np.concatenate([ids for ids, _, _ in parts])
        taken["query by query"].append((time.process_time() - begin) / searched * 1e6)
    remove_shared_work(datastore.path)
    sample = np.sort(np.random.default_rng(0).choice(searched, min(arguments.sample, searched), replace=False))
    sample = sample[queries[sample].any(axis=1)]
    best = nearest(embeddings, queries[sample], documents[rows[sample]], documents, k)
    refetched = {"list by list": joined["refetched"] / number}
    refetched["query by query"] = sum(counts["refetched"] for _, _, counts in parts) / searched
    vectors = np.concatenate(embeddings)
    for way, times in taken.items():
        ids = found[way][sample]
        scores = np.einsum("qd,qnd->qn", queries[sample], vectors[np.maximum(ids, 0)].astype(np.float32))
        hits = (np.where(ids >= 0, scores, -np.inf) >= best[:, -1:] - 1e-5).mean()
        runs = ", ".join(f"{time:.1f}" for time in times)
        print(f"{way}: {runs} microseconds of processor time for a query; recall@{k} {hits:.4f}; ", end="")
        print(f"{refetched[way]:.2%} fetched again")
    old, new = (min(taken[way]) for way in ("query by query", "list by list"))
    print(f"list by list is {old / new:.2f} times as fast; faiss uses {faiss.omp_get_max_threads()} threads")


if __name__ == "__main__":
    main()
