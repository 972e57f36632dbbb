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
"""Estimates the chunks, the sizes of the files, the memory of the index and the hours of the encoder of a datastore"""

from data_prep.faiss_index import index_bytes, suggest_factory


_UNITS = {"k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}


def parse_number(text: str) -> int:
    """
    Parses a number with an optional unit (k, M, B or G, T). Raises a `ValueError` unless it is a positive number.
    """
    scale = _UNITS.get(text[-1:], 1)
    try:
        number = int(float(text[:-1] if text[-1:] in _UNITS else text) * scale)
    except (ValueError, OverflowError):
        number = 0
    if number < 1:
        raise ValueError(f"expected a positive number such as 1.75T, 40B or 10M, got {text!r}")
    return number


def plan_datastore(
    tokens: int,
    chunk_size: int = 64,
    dim: int = 384,
    vocab_size: int = 49152,
    tokens_per_document: int = 800,
    num_neighbors: int = 4,
    factory: str = "auto",
    max_index_memory: float | None = None,
    chunks_per_second: float = 4000.0,
    num_gpus: int = 1,
    on_disk: bool = False,
) -> dict[str, int | float | str]:
    """
    Estimates the sizes of a datastore before it is built.

    Args:
        tokens (`int`): Number of tokens of the corpus.
        chunk_size (`int`, *optional*, defaults to 64): Number m of tokens in a chunk.
        dim (`int`, *optional*, defaults to 384): Dimensions of the encoder.
        vocab_size (`int`, *optional*, defaults to 49152): Size of the vocabulary of the tokenizer.
        tokens_per_document (`int`, *optional*, defaults to 800):
            Mean length of a document. On average, half a chunk of each document is padding.
        num_neighbors (`int`, *optional*, defaults to 4): Number K of neighbors that are stored for each chunk.
        factory (`str`, *optional*, defaults to `"auto"`): A faiss factory string.
        max_index_memory (`float`, *optional*): Largest size of the index in GB, for `"auto"`.
        chunks_per_second (`float`, *optional*, defaults to 4000): Number of chunks that one GPU embeds in a second.
        num_gpus (`int`, *optional*, defaults to 1): Number of GPUs that embed.
        on_disk (`bool`, *optional*, defaults to `False`): Whether the index is built with `--on_disk`.

    Returns:
        `dict`: `chunks`, `factory`, bytes of `chunks_bytes`, `embeddings_bytes`, `index_bytes`,
        `index_memory_bytes` (chunks x (code + 8) + lists x 4 dim, and without `on_disk` also the vectors that score
        results again), `neighbors_bytes`, and `encoder_gpu_hours`, `encoder_hours`.
    """
    numbers = {
        "chunk_size": chunk_size,
        "dim": dim,
        "tokens_per_document": tokens_per_document,
        "num_neighbors": num_neighbors,
        "chunks_per_second": chunks_per_second,
        "num_gpus": num_gpus,
    }
    for name, number in numbers.items():
        if number <= 0:
            raise ValueError(f"{name} must be positive, got {number}")
    documents = -(-tokens // tokens_per_document)
    chunks = tokens // chunk_size + documents // 2 + 1
    if factory == "auto":
        max_bytes = None if max_index_memory is None else max_index_memory * 1e9
        factory = suggest_factory(chunks, dim, max_bytes, on_disk=on_disk)
    token_bytes = 2 if vocab_size <= 1 << 16 else 4
    hours = chunks / chunks_per_second / 3600
    return {
        "chunks": chunks,
        "factory": factory,
        "chunks_bytes": chunks * (chunk_size * token_bytes + 4 + 8 + 8),
        "embeddings_bytes": chunks * 2 * dim,
        "index_bytes": index_bytes(factory, chunks, dim),
        "index_memory_bytes": index_bytes(factory, chunks, dim, on_disk),
        "neighbors_bytes": chunks * num_neighbors * 12,
        "encoder_gpu_hours": hours,
        "encoder_hours": hours / num_gpus,
    }


def human_bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            return f"{number:.3g} {unit}"
        number /= 1000
    return ""
