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
"""RETRO model: a Llama-like decoder with chunked cross attention to retrieved neighbors (arXiv 2112.04426)"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import CompileConfig, GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .chunk_layout_retro import (
    ChunkLayout,
    TokenLocations,
    compute_chunk_layout,
    default_position_ids,
    locate_call,
    take_columns,
    token_mask,
)
from .configuration_retro import RetroConfig
from .cross_cache_retro import RetroCache, RetroStaticCache
from .generation_retro import RetroGenerationMixin, check_neighbors
from .loss_retro import causal_lm_loss
from .model_hub_retro import RetroSharingMixin
from .neighbors_retro import Neighbors, pad_to_shape
from .retrofit_retro import RetroRetrofitMixin


class RetroRMSNorm(nn.Module):
    """Root mean square normalisation, in float32 or better."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.promote_types(input_dtype, torch.float32))
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)

    def extra_repr(self):
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class RetroRotaryEmbedding(nn.Module):
    """Rotary embedding of the decoder's self-attention, with the scaling that `config.rope_parameters` names."""

    def __init__(self, config: RetroConfig):
        super().__init__()
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: RetroConfig, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse frequencies `(head_dim // 2,)` of unscaled rotary embeddings, and the scale 1 of cos and sin."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
        freqs = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)  # [B, T, D/2]
        emb = torch.cat((freqs, freqs), dim=-1)  # [B, T, D]
        cos = emb.cos() * self.attention_scaling
        sin = emb.sin() * self.attention_scaling
        # The sign of a rotation's other half is in the table, so that `apply_rotary` need not negate states.
        sin = torch.cat((-sin[..., : sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2 :]), dim=-1)
        return cos.to(dtype=x.dtype), sin.to(dtype=x.dtype)


class RetroNeighborRotaryEmbedding(RetroRotaryEmbedding):
    """Unscaled rotary embedding of chunked cross attention and encoder, with positions from the chunk's start."""

    def __init__(self, config: RetroConfig):
        nn.Module.__init__(self)
        self.config = config
        self.rope_type = "default"
        inv_freq, self.attention_scaling = self.compute_default_rope_parameters(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: RetroConfig, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse frequencies `(head_dim // 2,)` for `neighbor_rope_theta`, and the scale 1 of cos and sin."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / (config.neighbor_rope_theta**exponents), 1.0


def apply_rotary(states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotates queries or keys `(..., length, head_dim)` by cos and signed sin that broadcast to that shape."""
    cos, sin = position_embeddings
    # Under autocast the tables are float32, the states are not.
    cos, sin = cos.to(states.dtype), sin.to(states.dtype)
    return states * cos + states.roll(states.shape[-1] // 2, dims=-1) * sin


class RetroMLP(nn.Module):
    def __init__(self, config: RetroConfig):
        super().__init__()
        hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class RetroNeighborMLP(RetroMLP):
    def __init__(self, config: RetroConfig):
        nn.Module.__init__(self)
        hidden_size, intermediate_size = config.neighbor_encoder_hidden_size, config.neighbor_encoder_intermediate_size
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]


def repeat_kv(hidden_states: torch.Tensor, n_rep: int) -> torch.Tensor:
    """Repeats each key/value head `n_rep` times: `(B, Hkv, L, D)` to `(B, Hkv * n_rep, L, D)`."""
    batch, num_key_value_heads, slen, head_dim = hidden_states.shape
    if n_rep == 1:
        return hidden_states
    hidden_states = hidden_states[:, :, None, :, :].expand(batch, num_key_value_heads, n_rep, slen, head_dim)
    return hidden_states.reshape(batch, num_key_value_heads * n_rep, slen, head_dim)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    key_states = repeat_kv(key, module.num_key_value_groups)
    value_states = repeat_kv(value, module.num_key_value_groups)

    attn_weights = torch.matmul(query, key_states.transpose(2, 3)) * scaling  # [B, H, Lq, Lk]
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask
    softmax_dtype = torch.promote_types(query.dtype, torch.float32)
    attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=softmax_dtype).to(query.dtype)
    attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.training)
    attn_output = torch.matmul(attn_weights, value_states).transpose(1, 2).contiguous()  # [B, Lq, H, D]
    return attn_output, attn_weights


def create_neighbor_mask(mask: torch.BoolTensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask of keys `(N, Lk)` as values to add to the scores of all queries, `(N, 1, 1, Lk)`."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    return bias[:, None, None, :]


def flash_sequence_lengths(position_ids: torch.LongTensor, mask: torch.BoolTensor) -> dict[str, torch.Tensor | int]:
    """
    The lengths of packed documents, as flash attention takes them in place of a mask. transformers finds these lengths
    only if there is one row and no cache. A sequence ends where the next position is not one higher. Each padding
    token is a sequence of its own, which no other token sees. Documents that ended in the cache are sequences without
    queries.

    Args:
        position_ids (`torch.LongTensor` of shape `(batch_size, seq_len)`):
            Index of each token of the call in its document.
        mask (`torch.BoolTensor` of shape `(batch_size, past_length + seq_len)`):
            False for padding.

    Raises:
        ValueError: If padding stands inside a document, because the kernels see whole sequences.
    """
    seq_len, total_length = position_ids.shape[1], mask.shape[1]
    past_length = total_length - seq_len
    row_index = mask.cumsum(-1) - 1  # [B, N]
    # Positions of cached tokens, counted from the start of the document that the call continues.
    start = row_index[:, past_length, None] - position_ids[:, :1]
    index = torch.cat([(row_index - start)[:, :past_length], position_ids], dim=1)  # [B, N]
    is_start = nn.functional.pad(index[:, 1:] != index[:, :-1] + 1, (1, 0), value=True) | (index == 0)
    # The first token of a row need not be the first of its document.
    is_start = is_start | (mask & (row_index == 0) & (index > 0))
    if (mask[:, 1:] & ~mask[:, :-1] & ~is_start[:, 1:] & (index[:, 1:] > 0)).any():
        raise ValueError(
            "a document continues behind padding, which flash attention cannot leave out; pad on the left, or set "
            "`attn_implementation` to 'sdpa'"
        )
    starts = is_start.flatten().nonzero()[:, 0]
    is_query = torch.arange(total_length, device=mask.device).expand_as(mask) >= past_length
    num_queries = nn.functional.pad(is_query.flatten().cumsum(0), (1, 0))  # queries in front of each key
    return {
        "cu_seq_lens_q": nn.functional.pad(num_queries[starts], (0, 1), value=position_ids.numel()).to(torch.int32),
        "cu_seq_lens_k": nn.functional.pad(starts, (0, 1), value=mask.numel()).to(torch.int32),
        "max_length_q": seq_len,
        "max_length_k": total_length,
    }


@dataclass
class NeighborInputs:
    """
    The neighbors that the tokens of a call see, prepared once for all layers. The call encodes the neighbors of L
    slots. The cache may hold one more slot in front of them, which makes S slots (see [`ChunkLayout`]).
    """

    layout: ChunkLayout
    input_ids: torch.LongTensor | None  # [B, L, k, r], None if the call encodes no neighbors
    attention_mask: torch.BoolTensor | None  # [B, L, k, r]
    chunk_columns: torch.LongTensor  # [B, L, m] columns of the tokens of the chunks that retrieved them
    positions: tuple[torch.Tensor, torch.Tensor]  # cos and sin [max(r, m), D] of positions from 0
    query_positions: tuple[torch.Tensor, torch.Tensor]  # [B, T, D] of the tokens, from the start of the chunk they see
    cross_attention_mask: torch.Tensor | None  # [B S, 1, 1, k r]
    has_neighbors: torch.BoolTensor  # [B, T] whether a token sees any neighbor

    def to(self, *args, **kwargs) -> "NeighborInputs":
        """Moves the tensors; accelerate calls it when the layers of a model are on several devices."""

        def move(value):
            if value is None:
                return None
            return tuple(map(move, value)) if isinstance(value, tuple) else value.to(*args, **kwargs)

        return NeighborInputs(**{name: move(value) for name, value in vars(self).items()})


class RetroAttention(nn.Module):
    """Base class of self-attention, chunked cross attention and the attentions of the neighbor encoder."""

    is_causal = False

    def _make_projections(
        self,
        config: RetroConfig,
        hidden_size: int,
        key_value_hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
    ) -> None:
        self.config = config
        self.head_dim = config.head_dim
        self.num_key_value_groups = num_attention_heads // num_key_value_heads
        # CODEPATH: models of the Granite kind have a scale of their own.
        self.scaling = self.head_dim**-0.5 if config.attention_multiplier is None else config.attention_multiplier
        query_size, key_value_size = num_attention_heads * self.head_dim, num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(key_value_hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(key_value_hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, hidden_size, bias=config.attention_output_bias)
        # CODEPATH: models of the Qwen3 kind normalise the queries and keys of each head, Llama-like ones do not.
        self.q_norm = RetroRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        # CODEPATH: as for the queries.
        self.k_norm = RetroRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def project_queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., length, hidden_size)` to `(..., length, num_attention_heads, head_dim)`."""
        return self.q_norm(self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim)))

    def project_keys_values(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(..., length, key_value_hidden_size)` to twice `(..., length, num_key_value_heads, head_dim)`."""
        keys = self.k_norm(self.k_proj(hidden_states).unflatten(-1, (-1, self.head_dim)))
        return keys, self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim))

    def attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Queries `(B, H, Lq, D)`, keys and values `(B, Hkv, Lk, D)` to `(B, Lq, H * D)` and the weights, if any."""
        implementation = self.config._attn_implementation
        if not self.is_causal and implementation != "eager":
            # Flash and flex attention serve only the self-attention of the decoder, because attentions to neighbors
            # are many and short, and have a mask over tokens. For such short ones SDPA on CPUs takes twice as long in
            # bf16 as its matrix products alone.
            is_slow = queries.device.type == "cpu" and queries.dtype == torch.bfloat16
            implementation = "eager" if is_slow else "sdpa"
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        attn_output, attn_weights = attention_interface(
            self,
            queries,
            keys,
            values,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return attn_output.flatten(-2), attn_weights


class RetroSelfAttention(RetroAttention):
    """Causal self-attention of the decoder."""

    is_causal = True

    def __init__(self, config: RetroConfig, layer_idx: int):
        super().__init__()
        self.attention_dropout = config.attention_dropout
        self._make_projections(
            config,
            hidden_size=config.hidden_size,
            key_value_hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
        )
        self.layer_idx = layer_idx
        self.sliding_window = config.sliding_window
        # CODEPATH: models of the SmolLM3 kind have layers without positions.
        self.use_rope = config.no_rope_layers is None or bool(config.no_rope_layers[layer_idx])

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        queries = self.project_queries(hidden_states).transpose(1, 2)  # [B, H, T, D]
        keys, values = self.project_keys_values(hidden_states)
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)  # [B, Hkv, T, D]
        if self.use_rope:
            queries, keys = apply_rotary(queries, position_embeddings), apply_rotary(keys, position_embeddings)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        attn_output, attn_weights = self.attend(
            queries, keys, values, attention_mask, sliding_window=self.sliding_window, **kwargs
        )
        return self.o_proj(attn_output), attn_weights


class RetroNeighborAttention(RetroAttention):
    """Bidirectional self-attention of the neighbor encoder."""

    def __init__(self, config: RetroConfig):
        super().__init__()
        self.attention_dropout = config.neighbor_encoder_attention_dropout
        self._make_projections(
            config,
            hidden_size=config.neighbor_encoder_hidden_size,
            key_value_hidden_size=config.neighbor_encoder_hidden_size,
            num_attention_heads=config.neighbor_encoder_num_attention_heads,
            num_key_value_heads=config.neighbor_encoder_num_key_value_heads,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        key_position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        queries = self.project_queries(hidden_states).transpose(1, 2)  # [N, H, Lq, D]
        keys, values = self.project_keys_values(key_value_states)
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)  # [N, Hkv, Lk, D]
        queries, keys = apply_rotary(queries, position_embeddings), apply_rotary(keys, key_position_embeddings)
        return self.o_proj(self.attend(queries, keys, values, attention_mask)[0])


class RetroNeighborChunkAttention(RetroNeighborAttention):
    """Attention of the neighbor encoder to the decoder's activations of the retrieving chunk."""

    def __init__(self, config: RetroConfig):
        nn.Module.__init__(self)
        self.attention_dropout = config.neighbor_encoder_attention_dropout
        self._make_projections(
            config,
            hidden_size=config.neighbor_encoder_hidden_size,
            key_value_hidden_size=config.hidden_size,
            num_attention_heads=config.neighbor_encoder_num_attention_heads,
            num_key_value_heads=config.neighbor_encoder_num_key_value_heads,
        )


class RetroCrossAttention(RetroAttention):
    """
    Chunked cross attention (section 2.4 of arXiv 2112.04426): each token attends to all tokens of all neighbors of the
    last complete chunk, with one softmax over them.
    """

    def __init__(self, config: RetroConfig, layer_idx: int):
        super().__init__()
        self.attention_dropout = config.attention_dropout
        self._make_projections(
            config,
            hidden_size=config.hidden_size,
            key_value_hidden_size=config.neighbor_encoder_hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
        )
        self.layer_idx = layer_idx
        # CODEPATH: retrofitted models have a gate that starts at zero, models trained from scratch have none.
        self.gate = nn.Parameter(torch.zeros(1)) if config.cross_attention_gate else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        neighbor_states: torch.Tensor | None,
        neighbors: NeighborInputs,
        past_key_values: Cache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        layout = neighbors.layout
        cos, sin = neighbors.query_positions
        queries = self.project_queries(hidden_states)  # [B, T, H, D]
        queries = apply_rotary(queries, (cos.unsqueeze(2), sin.unsqueeze(2)))
        keys, values = None, None
        if neighbor_states is not None:
            cos, sin = neighbors.positions
            length = neighbor_states.shape[3]
            keys, values = self.project_keys_values(neighbor_states)  # [B, L, k, r, Hkv, D]
            keys = apply_rotary(keys, (cos[:length].unsqueeze(1), sin[:length].unsqueeze(1)))
            keys = keys.flatten(2, 3).transpose(2, 3)  # [B, L, Hkv, k r, D]
            values = values.flatten(2, 3).transpose(2, 3)
        if past_key_values is not None:
            keys, values = past_key_values.update_current(keys, values, layout.next_slot, self.layer_idx)

        num_slots = keys.shape[1]
        queries = take_columns(queries, layout.query_columns)  # [B, S G, H, D]
        queries = queries.unflatten(1, (num_slots, -1)).flatten(0, 1).transpose(1, 2)  # [B S, H, G, D]
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)  # [B S, Hkv, k r, D]
        attn_output, attn_weights = self.attend(queries, keys, values, neighbors.cross_attention_mask)
        attn_output = attn_output.unflatten(0, (-1, num_slots)).flatten(1, 2)  # [B, S G, H D]
        attn_output = self.o_proj(take_columns(attn_output, layout.query_places))  # [B, T, d]
        if self.gate is not None:
            attn_output = attn_output * self.gate.tanh()
        # For tokens without neighbors the output is exactly zero, without the bias of the projection.
        return attn_output.masked_fill(~neighbors.has_neighbors[..., None], 0.0), attn_weights


class RetroSublayerOutput(nn.Dropout):
    """Dropout on the output of a sublayer, and the factor by which some families of models multiply it."""

    def __init__(self, p: float, multiplier: float):
        super().__init__(p)
        self.multiplier = multiplier

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = super().forward(input)
        # CODEPATH: models of the Granite kind scale the outputs of their sublayers.
        return output if self.multiplier == 1 else output * self.multiplier


class RetroNeighborEncoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: RetroConfig, layer_idx: int):
        super().__init__()
        hidden_size, eps = config.neighbor_encoder_hidden_size, config.rms_norm_eps
        self.self_attn = RetroNeighborAttention(config)
        self.input_layernorm = RetroRMSNorm(hidden_size, eps=eps)
        # CODEPATH: only some layers of the encoder see the chunk that retrieved the neighbors.
        self.attends_to_chunk = layer_idx in config.neighbor_encoder_cross_attention_layers
        if self.attends_to_chunk:
            self.chunk_attn = RetroNeighborChunkAttention(config)
            self.chunk_attn_layernorm = RetroRMSNorm(hidden_size, eps=eps)
        self.mlp = RetroNeighborMLP(config)
        self.post_attention_layernorm = RetroRMSNorm(hidden_size, eps=eps)
        self.dropout = RetroSublayerOutput(config.neighbor_encoder_hidden_dropout, config.residual_multiplier)

    def forward(
        self,
        hidden_states: torch.Tensor,
        chunk_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        batch_size, chunk_size = chunk_states.shape[:2]
        cos, sin = position_embeddings
        length = hidden_states.shape[1]
        own = (cos[:length], sin[:length])
        states = self.input_layernorm(hidden_states)  # [N k, r, E]
        states = self.self_attn(states, states, own, own, attention_mask)
        hidden_states = hidden_states + self.dropout(states)

        if self.attends_to_chunk:
            # The k neighbors of a chunk are joined into one query, so that its keys and values need not be repeated.
            states = self.chunk_attn_layernorm(hidden_states)
            num_neighbors = states.shape[0] // batch_size
            states = states.unflatten(0, (batch_size, num_neighbors)).flatten(1, 2)  # [N, k r, E]
            queries_at = (own[0].repeat(num_neighbors, 1), own[1].repeat(num_neighbors, 1))
            states = self.chunk_attn(states, chunk_states, queries_at, (cos[:chunk_size], sin[:chunk_size]))
            hidden_states = hidden_states + self.dropout(states.reshape_as(hidden_states))

        states = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.dropout(states)


class RetroNeighborEncoder(nn.Module):
    """
    Bidirectional encoder of the neighbors, conditioned on the decoder's activations of the chunk that retrieved them
    (section 2.4 and algorithm 1 of arXiv 2112.04426).
    """

    def __init__(self, config: RetroConfig):
        super().__init__()
        self.config = config
        hidden_size = config.neighbor_encoder_hidden_size
        self.embed_projection = nn.Identity()
        # CODEPATH: an encoder of another width than the decoder reads the decoder's embeddings through a projection.
        if hidden_size != config.hidden_size:
            self.embed_projection = nn.Linear(config.hidden_size, hidden_size, bias=False)
        self.chunk_layernorm = RetroRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(
            [
                RetroNeighborEncoderLayer(config, layer_idx)
                for layer_idx in range(config.neighbor_encoder_num_hidden_layers)
            ]
        )
        self.norm = RetroRMSNorm(hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        neighbor_embeds: torch.Tensor,
        neighbor_attention_mask: torch.BoolTensor,
        chunk_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        r"""
        Args:
            neighbor_embeds (`torch.Tensor` of shape `(..., k, neighbor_length, hidden_size)`):
                Embeddings of the neighbor tokens.
            neighbor_attention_mask (`torch.BoolTensor` of shape `(..., k, neighbor_length)`):
                True for real tokens, False for padding and absent neighbors.
            chunk_states (`torch.Tensor` of shape `(..., chunk_size, hidden_size)`):
                The decoder's activations of the chunks.
            position_embeddings (`tuple[torch.Tensor, torch.Tensor]`):
                Cos and sin `(length, head_dim)` of positions from 0.

        Returns:
            `torch.Tensor` of shape `(..., k, neighbor_length, neighbor_encoder_hidden_size)`.
        """
        hidden_states = self.embed_projection(neighbor_embeds).flatten(0, -3)  # [N k, r, E]
        mask = neighbor_attention_mask.flatten(0, -2)  # [N k, r]
        # A softmax needs at least one key, so absent neighbors attend to their padding. No token reads the result.
        mask = mask | ~mask.any(-1, keepdim=True)
        mask = create_neighbor_mask(mask, hidden_states.dtype)
        chunk_states = self.chunk_layernorm(chunk_states).flatten(0, -3)  # [N, m, d]
        for layer in self.layers:
            hidden_states = layer(hidden_states, chunk_states, mask, position_embeddings)
        return self.norm(hidden_states).unflatten(0, neighbor_embeds.shape[:-2])  # [..., k, r, E]


class RetroDecoderLayer(GradientCheckpointingLayer):
    """
    A layer of the decoder (algorithm 1 of arXiv 2112.04426): self-attention, in some layers chunked cross attention,
    and the MLP. The first layer with cross attention also encodes the neighbors, for itself and the later ones.
    """

    def __init__(self, config: RetroConfig, layer_idx: int):
        super().__init__()
        self.self_attn = RetroSelfAttention(config, layer_idx)
        self.input_layernorm = RetroRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # CODEPATH: only the layers that the config names have chunked cross attention.
        self.has_cross_attention = layer_idx in config.cross_attention_layers
        if self.has_cross_attention:
            self.cross_attn = RetroCrossAttention(config, layer_idx)
            self.cross_attn_layernorm = RetroRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = RetroMLP(config)
        self.post_attention_layernorm = RetroRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.dropout = RetroSublayerOutput(config.hidden_dropout, config.residual_multiplier)

    def forward(
        self,
        hidden_states: torch.Tensor,
        neighbor_states: torch.Tensor | None = None,
        neighbors: NeighborInputs | None = None,
        neighbor_encoder: RetroNeighborEncoder | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        r"""
        hidden_states (`torch.Tensor` of shape `(batch_size, seq_len, hidden_size)`):
            H of algorithm 1.
        neighbor_states (`torch.Tensor` of shape `(batch_size, num_slots, k, neighbor_length, ...)`, *optional*):
            The embeddings of the neighbors, or their encodings E after the layer that encodes them.
        neighbors (`NeighborInputs`, *optional*):
            The tokens that see each neighbor. Without it the layer computes the same as that of a plain decoder.
        neighbor_encoder (`RetroNeighborEncoder`, *optional*):
            The encoder. Only the first layer with cross attention receives it.
        """
        # H <- Attn(H)
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states, past_key_values=past_key_values, **kwargs)
        hidden_states = residual + self.dropout(hidden_states)  # [B, T, d]

        # E <- Encoder(Ret(C), H), once
        if neighbor_encoder is not None:
            row_states = hidden_states
            if isinstance(past_key_values, RetroCache):
                row_states = past_key_values.update_chunk_states(hidden_states)  # [B, past + T, d]
            if neighbor_states is not None:
                columns = neighbors.chunk_columns
                chunk_states = take_columns(row_states, columns.flatten(1)).unflatten(1, columns.shape[1:])
                neighbor_states = neighbor_encoder(
                    neighbor_states, neighbors.attention_mask, chunk_states, neighbors.positions
                ).to(hidden_states.device)  # [B, L, k, r, E]

        # H <- Cca(H, E)
        if self.has_cross_attention and neighbors is not None:
            residual = hidden_states
            hidden_states = self.cross_attn_layernorm(hidden_states)
            hidden_states, _ = self.cross_attn(hidden_states, neighbor_states, neighbors, past_key_values)
            hidden_states = residual + self.dropout(hidden_states)

        # H <- Ffw(H)
        residual = hidden_states
        hidden_states = self.mlp(self.post_attention_layernorm(hidden_states))
        return residual + self.dropout(hidden_states), neighbor_states


@auto_docstring
class RetroPreTrainedModel(PreTrainedModel):
    config: RetroConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RetroDecoderLayer", "RetroNeighborEncoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "neighbor_encoder"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": RetroDecoderLayer,
        "attentions": OutputRecorder(RetroSelfAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(RetroCrossAttention, index=1, layer_name="cross_attn"),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, RetroCrossAttention) and module.gate is not None:
            init.zeros_(module.gate)


@auto_docstring
class RetroModel(RetroPreTrainedModel):
    _auto_class = "AutoModel"  # saving copies the code along

    def __init__(self, config: RetroConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size

        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [RetroDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = RetroRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = RetroRotaryEmbedding(config)
        self.neighbor_encoder = RetroNeighborEncoder(config)
        self.neighbor_rotary_emb = RetroNeighborRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self._compiled_decode: tuple[CompileConfig, Callable] | None = None

        # Initialize weights and apply final processing
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        neighbor_input_ids: torch.LongTensor | None = None,
        neighbor_attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        r"""
        neighbor_input_ids (`torch.LongTensor` of shape `(batch_size, num_slots, k, neighbor_length)`, *optional*):
            Tokens of the neighbors of each whole chunk of a row, in the order of the chunks. An incomplete last chunk
            has no slot. If the cache is filled, these are the neighbors of the chunks that this call completes, and a
            row that completes fewer chunks has its last slots masked. Chunks beyond `num_slots` have no neighbors.
        neighbor_attention_mask (`torch.Tensor` of shape `(batch_size, num_slots, k, neighbor_length)`, *optional*):
            1 (or True) for real neighbor tokens, 0 for padding and absent neighbors. By default all tokens are real.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # [B, T, d]
        # CODEPATH: models of the Granite kind scale their embeddings.
        if self.config.embedding_multiplier != 1:
            inputs_embeds = inputs_embeds * self.config.embedding_multiplier
        if use_cache and past_key_values is None:
            past_key_values = RetroCache(config=self.config)
        cache = past_key_values if isinstance(past_key_values, RetroCache) else None
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        neighbors = check_neighbors(
            inputs_embeds,
            neighbor_input_ids,
            neighbor_attention_mask,
            position_ids,
            past_key_values,
            chunk_size=self.config.chunk_size,
            cache_class=RetroCache,
        )

        has_explicit_positions = position_ids is not None
        if position_ids is None:
            position_ids = default_position_ids(inputs_embeds, attention_mask, past_length)
        causal_mask = self._create_causal_mask(
            inputs_embeds, attention_mask, position_ids if has_explicit_positions else None, past_key_values
        )
        # A static cache has keys behind the row, and a single token needs only a mask over the keys.
        has_lengths = past_key_values is None or (
            cache is not None and (past_length == 0 or inputs_embeds.shape[1] > 1)
        )
        if has_explicit_positions and has_lengths and is_flash_attention_requested(self.config):
            row_positions = position_ids.expand(inputs_embeds.shape[0], -1)
            mask = token_mask(attention_mask, row_positions, past_length)
            causal_mask, kwargs = None, flash_sequence_lengths(row_positions, mask) | kwargs
        if neighbors is not None or (cache is not None and cache.neighbors is not None):
            locations = locate_call(inputs_embeds, attention_mask, position_ids, past_length, self.config.chunk_size)
            neighbors = self._prepare_neighbors(inputs_embeds, locations, neighbors, cache)
        if cache is not None:
            unknown = position_ids.new_full(inputs_embeds.shape[:2], -1)
            cache.update_input_ids(unknown if input_ids is None else input_ids)

        neighbor_states = None
        if neighbors is not None and neighbors.input_ids is not None:
            neighbor_states = self.embed_tokens(neighbors.input_ids)  # [B, L, k, r, d]
            # CODEPATH: as for the row.
            if self.config.embedding_multiplier != 1:
                neighbor_states = neighbor_states * self.config.embedding_multiplier
        decode = self._decode
        is_step = isinstance(cache, RetroStaticCache) and inputs_embeds.shape[1] == 1 and neighbor_states is None
        if is_step and cache.compile_config is not None:
            decode = self._compile(cache.compile_config)
        hidden_states = decode(
            inputs_embeds,
            neighbor_states,
            neighbors=neighbors,
            attention_mask=causal_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states, past_key_values=past_key_values
        )

    def _compile(self, config: CompileConfig) -> Callable:
        """The compiled layers for decoding steps of fixed shapes. Encoding neighbors is no part of them."""
        if self._compiled_decode is None or self._compiled_decode[0] != config:
            self._compiled_decode = config, torch.compile(self._decode, **config.to_dict())
        return self._compiled_decode[1]

    def _decode(
        self,
        hidden_states: torch.Tensor,
        neighbor_states: torch.Tensor | None,
        neighbors: NeighborInputs | None,
        position_ids: torch.LongTensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Embeddings `(batch_size, seq_len, hidden_size)` through all layers."""
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        position_embeddings = (position_embeddings[0].unsqueeze(1), position_embeddings[1].unsqueeze(1))
        for layer_idx, decoder_layer in enumerate(self.layers):
            is_first = layer_idx == self.config.cross_attention_layers[0]
            hidden_states, neighbor_states = decoder_layer(
                hidden_states,
                neighbor_states,
                neighbors=neighbors,
                neighbor_encoder=self.neighbor_encoder if is_first else None,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                **kwargs,
            )
        return self.norm(hidden_states)

    def _create_causal_mask(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None,
        past_key_values: Cache | None,
    ) -> torch.Tensor | None:
        """
        Causal mask in which the documents of a row do not see each other. transformers separates documents by their
        positions only if there is neither a mask nor a cache. This method adds the other cases. `position_ids` is
        `None` if the caller gave none.
        """
        # CODEPATH: models of the Mistral kind have a sliding window.
        create_mask = create_causal_mask if self.config.sliding_window is None else create_sliding_window_causal_mask
        is_dynamic = past_key_values is None or isinstance(past_key_values, RetroCache)
        past_length = past_key_values.get_seq_length() if past_key_values is not None and is_dynamic else 0
        mask_inputs = {
            "config": self.config,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "past_key_values": None if is_dynamic and past_length == 0 else past_key_values,
            "position_ids": position_ids,
            # Behind the row, a cache of fixed shapes has keys that no token sees.
            "allow_is_causal_skip": not isinstance(past_key_values, RetroStaticCache),
        }
        is_prepared = not is_dynamic or (attention_mask is not None and attention_mask.ndim == 4)
        if is_prepared or position_ids is None or (attention_mask is None and past_length == 0):
            return create_mask(**mask_inputs)

        seq_len = inputs_embeds.shape[1]
        position_ids = position_ids.expand(inputs_embeds.shape[0], -1)
        mask = token_mask(attention_mask, position_ids, past_length)
        row_index = mask.cumsum(-1) - 1  # [B, N]
        document_start = row_index[:, -seq_len:] - position_ids  # [B, T]
        if seq_len == 1:
            mask_inputs["attention_mask"] = mask & (row_index >= document_start)
            return create_mask(**mask_inputs)
        if isinstance(past_key_values, RetroStaticCache):
            row_index = pad_to_shape(row_index, (len(row_index), past_key_values.max_length))

        def same_document(batch_idx: int, head_idx: int, q_idx: int, kv_idx: int) -> torch.BoolTensor:
            return row_index[batch_idx, kv_idx] >= document_start[batch_idx, q_idx - past_length]

        return create_mask(**mask_inputs, and_mask_function=same_document)

    def _prepare_neighbors(
        self,
        inputs_embeds: torch.Tensor,
        locations: TokenLocations,
        neighbors: Neighbors | None,
        cache: RetroCache | None,
    ) -> NeighborInputs:
        """Determines the neighbors that each token sees and records them in the cache."""
        chunk_size = self.config.chunk_size
        has_previous_slot = cache is not None and cache.neighbors is not None
        num_slots = neighbors.num_slots if neighbors is not None else 0
        layout = compute_chunk_layout(locations, chunk_size, num_slots, has_previous_slot)
        if cache is not None:
            cache.update_neighbors(neighbors, layout.first_slot, locations.mask.shape[1] // chunk_size)
            cache.drop_outdated(layout.first_slot - 1)
            cache.current_slot = layout.first_slot - int(has_previous_slot) + layout.next_slot
        if has_previous_slot and not cache.current_key_values:
            # After a crop, the neighbors of the last complete chunk are encoded again.
            previous = cache.neighbors.take(layout.first_slot - 1)
            neighbors = previous if neighbors is None else neighbors.behind(previous)  # [B, 1 + L, k, r]
        num_slots, length = (0, 0) if neighbors is None else (neighbors.input_ids.shape[i] for i in (1, 3))

        slot_mask = neighbors.attention_mask.flatten(2) if neighbors is not None else None  # [B, L, k r]
        if cache is not None:
            slot_mask = cache.update_current_mask(slot_mask, layout.next_slot)  # [B, S, k r]
        group_size = layout.query_columns.shape[1] // slot_mask.shape[1]
        is_present = slot_mask.any(-1)  # [B, S]
        attendable = (slot_mask | ~is_present[:, :, None]).flatten(0, 1)  # [B S, k r]
        positions = torch.arange(max(length, chunk_size), device=inputs_embeds.device)
        return NeighborInputs(
            layout=layout,
            input_ids=neighbors.input_ids if neighbors is not None else None,
            attention_mask=neighbors.attention_mask if neighbors is not None else None,
            chunk_columns=layout.chunk_columns[:, layout.chunk_columns.shape[1] - num_slots :],
            positions=self.neighbor_rotary_emb(inputs_embeds, positions),
            query_positions=self.neighbor_rotary_emb(inputs_embeds, layout.query_positions),
            cross_attention_mask=create_neighbor_mask(attendable, inputs_embeds.dtype),
            has_neighbors=layout.sees & is_present.gather(1, layout.query_places // group_size),
        )


@auto_docstring
class RetroForCausalLM(
    RetroGenerationMixin, RetroRetrofitMixin, RetroSharingMixin, RetroPreTrainedModel, GenerationMixin
):
    _auto_class = "AutoModelForCausalLM"  # saving copies the code along
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    cache_class = RetroCache
    static_cache_class = RetroStaticCache

    def __init__(self, config: RetroConfig):
        super().__init__(config)
        self.model = RetroModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = causal_lm_loss
        self.set_retriever(None)

        # Initialize weights and apply final processing
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        neighbor_input_ids: torch.LongTensor | None = None,
        neighbor_attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithCrossAttentions:
        r"""
        neighbor_input_ids (`torch.LongTensor` of shape `(batch_size, num_slots, k, neighbor_length)`, *optional*):
            Tokens of the neighbors of each whole chunk of a row, in the order of the chunks (an incomplete last chunk
            has no slot). With a filled cache: of the chunks that this call completes; a row that completes fewer
            leaves its last slots masked. Chunks beyond `num_slots` have no neighbors. Without this argument, a model
            that has a retriever and is not training looks the neighbors up itself.
        neighbor_attention_mask (`torch.Tensor` of shape `(batch_size, num_slots, k, neighbor_length)`, *optional*):
            1 (or True) for real neighbor tokens, 0 for padding and absent neighbors. Defaults to all real.

        Example:

        ```python
        >>> from modeling_retro import RetroForCausalLM, RetroRetriever
        >>> from transformers import AutoTokenizer

        >>> retriever = RetroRetriever.from_pretrained("path/to/datastore")
        >>> model = RetroForCausalLM.from_pretrained("path/to/model", retriever=retriever)
        >>> tokenizer = AutoTokenizer.from_pretrained("path/to/model")
        >>> inputs = tokenizer("The class wraps", return_tensors="pt")
        >>> print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
        ```"""
        if neighbor_input_ids is None and self.is_retrieving:
            neighbors = self.retrieve_neighbors(input_ids, attention_mask, position_ids, past_key_values)
            if neighbors is not None:
                neighbor_input_ids, neighbor_attention_mask = neighbors.input_ids, neighbors.attention_mask
        static = past_key_values if isinstance(past_key_values, RetroStaticCache) else None
        is_prompt = static is not None and static.get_seq_length() == 0
        outputs: BaseModelOutputWithPastAndCrossAttentions = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=RetroCache(config=self.config) if is_prompt else past_key_values,
            inputs_embeds=inputs_embeds,
            neighbor_input_ids=neighbor_input_ids,
            neighbor_attention_mask=neighbor_attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        if is_prompt:
            static.load(outputs.past_key_values, self.config.cross_attention_layers)

        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = self.lm_head(hidden_states)  # [B, T, V]
        # CODEPATH: models of the Granite kind scale their logits.
        if self.config.logits_scaling != 1:
            logits = logits / self.config.logits_scaling

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)

        return CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,
            past_key_values=static if is_prompt else outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )


__all__ = ["RetroForCausalLM", "RetroModel", "RetroNeighborEncoder", "RetroPreTrainedModel"]
