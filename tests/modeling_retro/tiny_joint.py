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
"""Tiny random decoders of every family, wrapped in RetroJointForCausalLM, and what they should compute."""

import torch
from test_modeling_retro import CHUNK, LENGTH, VOCAB
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_retro import RetroJointForCausalLM


TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 512,
}
MIXED_LAYERS = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
FAMILIES = {
    "llama": ("llama", {}),
    "llama-rope-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-rope-yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-sliding": ("mistral", {"sliding_window": 9}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3-moe": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "decoder_sparse_step": 1},
    ),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 4, **MIXED_LAYERS}),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 4, **MIXED_LAYERS}),
    "olmo2": ("olmo2", {}),
    "phi3": ("phi3", {"sliding_window": None}),
    "granite": ("granite", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5}),
}


def make_decoder(family="llama", seed=0, attn_implementation="sdpa", **fields):
    model_type, family_fields = FAMILIES[family]
    if family == "gemma2":  # its capped scores are for eager attention alone
        attn_implementation = "eager"
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **(TINY | family_fields | fields))
    # Grouped matrix products of experts know no float64.
    options = {"attn_implementation": attn_implementation, "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_config(config, **options).double().eval()


def make_joint(family="llama", seed=0, attn_implementation="sdpa", num_neighbors=2, **fields):
    decoder = make_decoder(family, seed, attn_implementation, **fields)
    return RetroJointForCausalLM.from_decoder(decoder, chunk_size=CHUNK, num_neighbors=num_neighbors)


def slow_joint_logits(model, ids, neighbors, mask, first=0):
    """
    Logits of one document `(T,)` by the plain decoder, on one sequence [all neighbors | document] with a 4-D mask from
    the definition: token t sees the document up to t (within the window, in layers that have one) and the real tokens
    of the neighbors of chunk (t + 1) // m - 1, all but the first of each; a neighbor's tokens see those before them in
    the same neighbor. The document lacks its tokens before position `first`.
    """
    pieces = [
        (u, neighbors[u, n, mask[u, n]], torch.arange(LENGTH)[mask[u, n]] - LENGTH)
        for u in range(neighbors.shape[0])
        for n in range(neighbors.shape[1])
    ]
    sequence = torch.cat([tokens for _, tokens, _ in pieces] + [ids])
    position_ids = torch.cat([positions for *_, positions in pieces] + [torch.arange(first, first + len(ids))])
    front = len(sequence) - len(ids)
    config = model.decoder.config
    hidden = model.config.hidden_neighbor_tokens
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"]
    masks = {}
    for layer_type in set(layer_types):
        seen = torch.zeros(len(sequence), len(sequence), dtype=torch.bool)
        start = 0
        for u, tokens, _ in pieces:
            end = start + len(tokens)
            seen[start:end, start:end] = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
            for t in range(len(ids)):
                seen[front + t, start + hidden : end] = (first + t + 1) // CHUNK - 1 == u
            start = end
        for t in range(len(ids)):
            oldest = max(0, t - window + 1) if layer_type == "sliding_attention" else 0
            seen[front + t, front + oldest : front + t + 1] = True
        masks[layer_type] = torch.zeros(1, 1, *seen.shape, dtype=torch.float64).masked_fill(~seen, -1e300)
    return model.decoder(
        input_ids=sequence[None],
        attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
        position_ids=position_ids[None],
        use_cache=False,
    ).logits[0, front:]
