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


def make_joint(family="llama", seed=0, attn_implementation="sdpa", num_neighbors=2, reread_tokens=0, **fields):
    decoder = make_decoder(family, seed, attn_implementation, **fields)
    return RetroJointForCausalLM.from_decoder(
        decoder, chunk_size=CHUNK, num_neighbors=num_neighbors, reread_tokens=reread_tokens
    )


def slow_joint_logits(model, ids, neighbors, mask, first=0):
    """
    Logits of one document `(T,)` by the plain decoder, on one sequence [all neighbors | tokens that are read again |
    document] with a 4-D mask from the definition. A token that is written sees the tokens of its chunk as they were
    written, those of earlier chunks as they were read last, and the real tokens of the neighbors of the chunk that is
    complete, all but the first of each. A token that is read again sees all tokens as they were read last, up to
    itself, and the neighbors of its chunk. A window holds in the layers that have one. A neighbor's tokens see those
    before them in the same neighbor. The document lacks its tokens before position `first`.
    """
    pieces = [
        (u, neighbors[u, n, mask[u, n]], torch.arange(LENGTH)[mask[u, n]] - LENGTH)
        for u in range(neighbors.shape[0])
        for n in range(neighbors.shape[1])
    ]
    hidden, num_again = model.config.hidden_neighbor_tokens, model.config.reread_tokens
    length = len(ids)
    again = [
        t
        for t in range(1, length)
        if CHUNK - num_again <= (first + t) % CHUNK < CHUNK
        and (u := (first + t) // CHUNK) < len(neighbors)
        and (u + 1) * CHUNK <= first + length
        and (mask[u].sum(-1) > hidden).any()
    ]
    sequence = torch.cat([tokens for _, tokens, _ in pieces] + [ids[again], ids])
    positions = torch.arange(first, first + length)
    position_ids = torch.cat([positions for *_, positions in pieces] + [positions[again], positions])
    read, written = len(sequence) - length - len(again), len(sequence) - length
    states = [(t, True, read + n) for n, t in enumerate(again)] + [(t, False, written + t) for t in range(length)]

    def sees(query, key):
        (t, is_read, _), (other, other_is_read, _) = query, key
        is_last_state = other_is_read or other not in again
        in_chunk = (first + t) // CHUNK == (first + other) // CHUNK
        if other > t:
            return False
        return is_last_state if is_read or not in_chunk else not other_is_read

    config = model.decoder.config
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"]
    masks = {}
    for layer_type in set(layer_types):
        seen = torch.zeros(len(sequence), len(sequence), dtype=torch.bool)
        start = 0
        for u, tokens, _ in pieces:
            end = start + len(tokens)
            seen[start:end, start:end] = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
            for t, is_read, place in states:
                completed = (first + t) // CHUNK if is_read else (first + t + 1) // CHUNK - 1
                seen[place, start + hidden : end] = completed == u
            start = end
        for query in states:
            for key in states:
                is_near = layer_type != "sliding_attention" or query[0] - key[0] < window
                seen[query[2], key[2]] = is_near and sees(query, key)
        masks[layer_type] = torch.zeros(1, 1, *seen.shape, dtype=torch.float64).masked_fill(~seen, -1e300)
    logits = model.decoder(
        input_ids=sequence[None],
        attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
        position_ids=position_ids[None],
        use_cache=False,
    ).logits[0]
    # What follows a chunk is predicted by its last token as it was read last.
    places = {t: place for t, _, place in states[len(again) :]}
    places |= {t: place for t, _, place in states[: len(again)] if (first + t + 1) % CHUNK == 0}
    return logits[[places[t] for t in range(length)]]
