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
RETRO-pytorch 0.3.9 and this package's model at the same dimensions, for the benchmarks that compare the two.

The peer's retrieval module wants packages that no longer install beside current ones; its model and its sampler need
only constants of it, which stand in here. Install it with `pip install --no-deps retro-pytorch einops`.
"""

import statistics
import sys
import time
import types
from collections.abc import Callable

import torch

from modeling_retro import RetroConfig, RetroForCausalLM


CHUNK_SIZE, SEQ_LEN, NUM_NEIGHBORS, NEIGHBOR_LENGTH, BATCH_SIZE = 64, 512, 2, 128, 4
HIDDEN_SIZE, NUM_LAYERS, NUM_HEADS, VOCAB_SIZE = 512, 8, 8, 28996
CROSS_ATTENTION_LAYERS = [2, 5]


def load_peer() -> tuple[torch.nn.Module, type]:
    """The peer's model, and the class whose `generate` is its sampler."""
    retrieval = types.ModuleType("retro_pytorch.retrieval")
    retrieval.BERT_VOCAB_SIZE, retrieval.SOS_ID, retrieval.EOS_ID = VOCAB_SIZE, 101, -1
    retrieval.text_folder_to_chunks_ = retrieval.chunks_to_precalculated_knn_ = retrieval.bert_embed = None
    sys.modules["retro_pytorch.retrieval"] = retrieval
    try:
        from retro_pytorch import RETRO, TrainingWrapper
    except ImportError as error:
        raise SystemExit(f"{error}; install the peer with `pip install --no-deps retro-pytorch einops`") from error
    model = RETRO(
        num_tokens=VOCAB_SIZE,
        max_seq_len=SEQ_LEN,
        enc_dim=HIDDEN_SIZE,
        enc_depth=2,
        dec_dim=HIDDEN_SIZE,
        dec_depth=NUM_LAYERS,
        dec_cross_attn_layers=tuple(layer + 1 for layer in CROSS_ATTENTION_LAYERS),
        heads=NUM_HEADS,
        dim_head=HIDDEN_SIZE // NUM_HEADS,
        chunk_size=CHUNK_SIZE,
    )
    return model, TrainingWrapper


def make_model(**fields) -> RetroForCausalLM:
    """Our model with the peer's dimensions; a gated MLP of 1376 has as many weights as its plain one of 2048."""
    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 1376,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "chunk_size": CHUNK_SIZE,
        "num_neighbors": NUM_NEIGHBORS,
        "cross_attention_layers": CROSS_ATTENTION_LAYERS,
        "neighbor_encoder_num_hidden_layers": 2,
        "neighbor_encoder_cross_attention_layers": [0, 1],
        "max_position_embeddings": SEQ_LEN,
    } | fields
    return RetroForCausalLM(RetroConfig(**fields))


def count_parameters(model: torch.nn.Module) -> float:
    """Millions of parameters."""
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def median_seconds(functions: dict[str, Callable[[], object]], repeats: int, warm_up: bool = True) -> dict[str, float]:
    """Median seconds of each function, called in turns, so that all of them meet the same disturbances."""
    seconds = {name: [] for name in functions}
    for repeat in range(repeats + warm_up):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def matmul_peak(dtype: torch.dtype, size: int = 2048, repeats: int = 10) -> float:
    """Floating-point operations per second of a square matrix product: what the machine gives at best."""
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    return 2 * size**3 / median_seconds({"matmul": lambda: a @ b}, repeats)["matmul"]


def forward_flops(
    model: RetroForCausalLM, batch_size: int, seq_len: int, neighbors: bool = True, logits: bool = True
) -> float:
    """
    Operations of the matrix products of one forward pass: 2 for each weight and token, and 4 T_q T_k d for each
    attention (half of it where it is causal).
    """
    config = model.config
    d, m, k, r = config.hidden_size, config.chunk_size, config.num_neighbors, config.neighbor_length
    width, tokens = config.num_attention_heads * config.head_dim, batch_size * seq_len
    slots = batch_size * (seq_len // m)

    def weights(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim == 2)

    flops = 0.0
    for layer in model.model.layers:
        flops += 2 * tokens * (weights(layer.self_attn) + weights(layer.mlp)) + 2 * batch_size * seq_len**2 * width
        if layer.has_cross_attention and neighbors:
            queries = layer.cross_attn.q_proj.weight.numel() + layer.cross_attn.o_proj.weight.numel()
            keys = layer.cross_attn.k_proj.weight.numel() + layer.cross_attn.v_proj.weight.numel()
            flops += 2 * tokens * queries + 2 * slots * k * r * keys + 4 * slots * m * k * r * width
    if neighbors:
        encoder_width = config.neighbor_encoder_num_attention_heads * config.head_dim
        for layer in model.model.neighbor_encoder.layers:
            flops += 2 * slots * k * r * (weights(layer.self_attn) + weights(layer.mlp))
            flops += 4 * slots * k * r * r * encoder_width
            if layer.attends_to_chunk:
                queries = layer.chunk_attn.q_proj.weight.numel() + layer.chunk_attn.o_proj.weight.numel()
                keys = layer.chunk_attn.k_proj.weight.numel() + layer.chunk_attn.v_proj.weight.numel()
                flops += 2 * slots * (k * r * queries + m * keys) + 4 * slots * k * r * m * encoder_width
    return flops + (2 * tokens * d * config.vocab_size if logits else 0)
