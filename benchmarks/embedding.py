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
python benchmarks/embedding.py --datastore datastore --static static-encoder
```

`--agreement` tells instead how many of the 10 nearest of a chunk stay the same when all are embedded in bf16.
`--static` compares the encoder of the datastore with a static one (`retro distill-encoder`), by the processor time of
one thread.
"""

import argparse
import statistics
import time

import faiss
import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.encoder.chunk_encoder import ChunkEncoder, decode_chunks


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


def print_static(encoder: str, static: str, datastore: RetroDatastore, chunks: int, repeats: int) -> None:
    """Chunks for a second of processor time. A static encoder is given 64 times as many, to have time to measure."""
    torch.set_num_threads(1)
    base = None
    for name, number, options in (
        (encoder, chunks, {"dtype": "bfloat16"}),
        (encoder, chunks, {"dtype": "float32"}),
        (static, 64 * chunks, {}),
    ):
        texts = sample_texts(datastore, min(number, len(datastore.chunks)))
        speeds = []
        for _ in range(repeats):
            # A static encoder keeps the words that it has seen, so each run begins with a new one.
            program = ChunkEncoder.from_pretrained(name, device="cpu", **options)
            program.encode(texts[:64])
            begin = time.process_time()
            program.encode(texts)
            speeds.append(len(texts) / (time.process_time() - begin))
        speed = statistics.median(speeds)
        base = base or speed
        print(f"{name} {options.get('dtype', '')}: {speed:.1f} chunks/s, {speed / base:.1f} x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datastore", required=True)
    parser.add_argument("--chunks", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--agreement", action="store_true")
    parser.add_argument("--static", help="Folder of a static encoder.")
    arguments = parser.parse_args()
    datastore = RetroDatastore.from_pretrained(arguments.datastore)
    encoder, _ = datastore.encoder_source()
    if arguments.static is not None:
        print_static(encoder, arguments.static, datastore, arguments.chunks, arguments.repeats)
        return
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
