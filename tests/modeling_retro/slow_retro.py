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
"""RETRO written as slowly as its equations: one token, one head, one neighbor at a time. The tests compare with it."""

import math

import torch


def rms_norm(x, weight, eps):
    return weight * x / torch.sqrt((x * x).mean() + eps)


def rotate(x, position, theta):
    """Rotates the pairs (x_j, x_{j + D/2}) of a head by the angle position * theta^(-2j/D)."""
    half = x.shape[0] // 2
    rotated = torch.empty_like(x)
    for j in range(half):
        angle = position * theta ** (-2 * j / (2 * half))
        cos, sin = math.cos(angle), math.sin(angle)
        rotated[j] = x[j] * cos - x[j + half] * sin
        rotated[j + half] = x[j + half] * cos + x[j] * sin
    return rotated


class SlowRetro:
    """Reads the weights of a `RetroForCausalLM` and computes its logits for one row."""

    def __init__(self, model):
        self.config = model.config
        self.weights = dict(model.named_parameters(remove_duplicate=False))

    def linear(self, name, x):
        y = self.weights[f"{name}.weight"] @ x
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def norm(self, name, x):
        return rms_norm(x, self.weights[f"{name}.weight"], self.config.rms_norm_eps)

    def heads(self, name, norm_name, x):
        heads = self.linear(name, x).split(self.config.head_dim)
        return [self.norm(norm_name, h) for h in heads] if f"{norm_name}.weight" in self.weights else heads

    def attention(self, name, query, query_position, sources, source_positions, theta):
        """One query vector attends to a list of source vectors."""
        queries = self.heads(f"{name}.q_proj", f"{name}.q_norm", query)
        keys = [self.heads(f"{name}.k_proj", f"{name}.k_norm", source) for source in sources]
        values = [self.linear(f"{name}.v_proj", source).split(self.config.head_dim) for source in sources]
        outputs = []
        for h, head_query in enumerate(queries):
            kv_head = h * len(keys[0]) // len(queries)
            rotated = rotate(head_query, query_position, theta)
            scores = torch.stack(
                [
                    rotated @ rotate(key[kv_head], position, theta) / math.sqrt(self.config.head_dim)
                    for key, position in zip(keys, source_positions)
                ]
            )
            weights = scores.softmax(0)
            outputs.append(sum(w * value[kv_head] for w, value in zip(weights, values)))
        return self.linear(f"{name}.o_proj", torch.cat(outputs))

    def mlp(self, name, x):
        gate = torch.nn.functional.silu(self.linear(f"{name}.gate_proj", x))
        return self.linear(f"{name}.down_proj", gate * self.linear(f"{name}.up_proj", x))

    def encode_neighbor(self, tokens, mask, chunk):
        """Algorithm 1 of arXiv 2112.04426: a bidirectional encoder of one neighbor that looks at the chunk."""
        encoder, theta = "model.neighbor_encoder", self.config.neighbor_rope_theta
        embeddings = [self.weights["model.embed_tokens.weight"][token] for token in tokens]
        if f"{encoder}.embed_projection.weight" in self.weights:
            embeddings = [self.linear(f"{encoder}.embed_projection", e) for e in embeddings]
        states = {j: embeddings[j] for j in range(len(tokens)) if mask[j]}
        chunk = [self.norm(f"{encoder}.chunk_layernorm", state) for state in chunk]
        for n in range(self.config.neighbor_encoder_num_hidden_layers):
            layer = f"{encoder}.layers.{n}"
            normed = {j: self.norm(f"{layer}.input_layernorm", state) for j, state in states.items()}
            states = {
                j: state
                + self.attention(f"{layer}.self_attn", normed[j], j, list(normed.values()), list(normed), theta)
                for j, state in states.items()
            }
            if n in self.config.neighbor_encoder_cross_attention_layers:
                for j, state in states.items():
                    query = self.norm(f"{layer}.chunk_attn_layernorm", state)
                    states[j] = state + self.attention(
                        f"{layer}.chunk_attn", query, j, chunk, range(len(chunk)), theta
                    )
            for j, state in states.items():
                states[j] = state + self.mlp(f"{layer}.mlp", self.norm(f"{layer}.post_attention_layernorm", state))
        return {j: self.norm(f"{encoder}.norm", state) for j, state in states.items()}

    def document_logits(self, tokens, neighbors, first=0):
        """
        Logits `(T, V)` of one document without padding. `neighbors[u]` is a list of (token ids, mask) of the neighbors
        retrieved with its chunk u; missing chunks have none. The document lacks its tokens before position `first`, in
        whose place the encoder looks at copies of the first one that it has.
        """
        config, m = self.config, self.config.chunk_size
        theta = config.rope_parameters["rope_theta"]
        h = [self.weights["model.embed_tokens.weight"][token] for token in tokens]
        encoded = None
        for n in range(config.num_hidden_layers):
            layer = f"model.layers.{n}"
            normed = [self.norm(f"{layer}.input_layernorm", x) for x in h]
            places = range(first, first + len(h))
            h = [
                x + self.attention(f"{layer}.self_attn", normed[i], places[i], normed[: i + 1], places[: i + 1], theta)
                for i, x in enumerate(h)
            ]
            if n == config.cross_attention_layers[0]:
                whole = [h[0]] * first + h
                encoded = [
                    [self.encode_neighbor(ids, mask, whole[u * m : (u + 1) * m]) for ids, mask in neighbors.get(u, [])]
                    for u in range(len(whole) // m)
                ]
            if n in config.cross_attention_layers:
                for i in range(len(h)):
                    u = (first + i + 1) // m - 1
                    sources = [(j, state) for one in (encoded[u] if u >= 0 else []) for j, state in one.items()]
                    if not sources:
                        continue
                    query = self.norm(f"{layer}.cross_attn_layernorm", h[i])
                    output = self.attention(
                        f"{layer}.cross_attn",
                        query,
                        first + i - u * m,
                        [state for _, state in sources],
                        [j for j, _ in sources],
                        config.neighbor_rope_theta,
                    )
                    if f"{layer}.cross_attn.gate" in self.weights:
                        output = output * torch.tanh(self.weights[f"{layer}.cross_attn.gate"])
                    h[i] = h[i] + output
            h = [x + self.mlp(f"{layer}.mlp", self.norm(f"{layer}.post_attention_layernorm", x)) for x in h]
        return torch.stack([self.linear("lm_head", self.norm("model.norm", x)) for x in h])
