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
Embedding chunks with `ChunkEncoder` against `encode` of sentence-transformers: same encoder, same texts, same threads.

```bash
python benchmarks/embedding.py --datastore datastore
python benchmarks/embedding.py --datastore datastore --agreement --chunks 8192
```

`--agreement` tells instead how many of the 10 nearest of a chunk stay the same when all are embedded in bf16.
"""

import argparse
import statistics
import time

import faiss
import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from modeling_retro.chunk_encoder_retro import ChunkEncoder, decode_chunks
from modeling_retro.datastore_retro import RetroDatastore


def sample_texts(datastore: RetroDatastore, number: int) -> list[str]:
    """Texts of random chunks, in random order, as `retro embed` sees them."""
    rows = np.random.default_rng(0).choice(len(datastore.chunks), number, replace=False)
    return decode_chunks(*datastore.chunks.take(rows), datastore.tokenizer)


def nearest(vectors: np.ndarray) -> np.ndarray:
    """Ids [n, 10] of the nearest other vectors, as stored: in float16."""
    vectors = vectors.astype(np.float16).astype(np.float32)
    ids = faiss.knn(vectors, vectors, 11, metric=faiss.METRIC_INNER_PRODUCT)[1]
    order = np.argsort(ids == np.arange(len(ids))[:, None], axis=1, kind="stable")[:, :10]
    return np.take_along_axis(ids, order, axis=1)


def print_agreement(encoder: str, texts: list[str]) -> None:
    """Share of the 10 nearest in float32 that are among the 10 nearest in bfloat16."""
    found = {
        dtype: nearest(ChunkEncoder.from_pretrained(encoder, dtype=dtype).encode(texts))
        for dtype in ("float32", "bfloat16")
    }
    same = [len(np.intersect1d(*rows)) for rows in zip(found["float32"], found["bfloat16"], strict=True)]
    print(f"{np.mean(same) / 10:.4f} of the 10 nearest among {len(texts)} chunks are the same in bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datastore", required=True)
    parser.add_argument("--chunks", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--agreement", action="store_true")
    arguments = parser.parse_args()
    datastore = RetroDatastore.from_pretrained(arguments.datastore)
    encoder, _ = datastore.encoder_source()
    texts = sample_texts(datastore, arguments.chunks)
    if arguments.agreement:
        print_agreement(encoder, texts)
        return
    programs = {}
    for dtype in ("float32", "bfloat16"):
        peer = SentenceTransformer(encoder, model_kwargs={"dtype": dtype})
        ours = ChunkEncoder.from_pretrained(encoder, dtype=dtype)
        programs[f"sentence-transformers {dtype}"] = lambda peer=peer: peer.encode(texts, show_progress_bar=False)
        programs[f"ChunkEncoder {dtype}"] = lambda ours=ours: ours.encode(texts)
    vectors, seconds = {}, {name: [] for name in programs}
    for _ in range(arguments.repeats):
        for name, program in programs.items():
            begin = time.perf_counter()
            vectors[name] = program()
            seconds[name].append(time.perf_counter() - begin)
    reference = np.asarray(vectors["sentence-transformers float32"], dtype=np.float32)
    base = statistics.median(seconds["sentence-transformers float32"])
    print(f"{len(texts)} chunks, {torch.get_num_threads()} threads, median of {arguments.repeats}")
    for name, taken in seconds.items():
        median = statistics.median(taken)
        difference = np.abs(np.asarray(vectors[name], dtype=np.float32) - reference).max()
        print(
            f"{name:<34}{len(texts) / median:8.1f} chunks/s {base / median:6.2f} x   difference {difference:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
