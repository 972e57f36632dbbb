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
"""RETRO model configuration"""

import os
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils import auto_docstring
from transformers.utils.type_validators import interval

from .lora_targets_retro import name_lora_targets


@auto_docstring(checkpoint="retro-transformers/retro-tiny")
@strict
class RetroConfig(PreTrainedConfig):
    r"""
    chunk_size (`int`, *optional*, defaults to 64):
        Number m of tokens in a chunk. Neighbors are looked up once for each whole chunk of a document.
    num_neighbors (`int`, *optional*, defaults to 2):
        Number k of neighbors that the model asks its retriever for. Neighbors given to `forward` may be any number.
    continuation_chunks (`int`, *optional*, defaults to 1):
        Number of chunks that follow a retrieved chunk in its document and are read with it. A neighbor has
        `chunk_size * (1 + continuation_chunks)` tokens.
    cross_attention_layers (`list[int]`, *optional*):
        Decoder layers (0-based) with chunked cross attention. Defaults to every third layer from the sixth, as in the
        paper (P = 6, 9, 12 of 12), or to the middle layer if the decoder has fewer than six layers.
    cross_attention_gate (`bool`, *optional*, defaults to `False`):
        Whether the output of each chunked cross attention is scaled by the tanh of a learned scalar that starts at
        zero. A retrofitted model has such gates, so that it first computes exactly what its base computes.
    attention_output_bias (`bool`, *optional*, defaults to `False`):
        Whether the output projections of the attentions have a bias.
    qk_norm (`bool`, *optional*, defaults to `False`):
        Whether queries and keys are normalised over the head dimension before they are rotated, as in Qwen3.
    hidden_dropout (`float`, *optional*, defaults to 0.0):
        Dropout on the output of each sublayer of the decoder.
    no_rope_layers (`list[int]`, *optional*):
        For each layer of the decoder 1 if its self-attention has rotary positions, 0 if it has none, as in SmolLM3.
        Defaults to positions in all layers.
    attention_multiplier (`float`, *optional*):
        Factor on the scores of all attentions, as in Granite. Defaults to `head_dim ** -0.5`.
    embedding_multiplier (`float`, *optional*, defaults to 1.0):
        Factor on the embeddings, as in Granite.
    residual_multiplier (`float`, *optional*, defaults to 1.0):
        Factor on the output of each sublayer, as in Granite.
    logits_scaling (`float`, *optional*, defaults to 1.0):
        Divisor of the logits, as in Granite.
    neighbor_rope_theta (`float`, *optional*, defaults to 10000.0):
        Base period of the rotary embedding that chunked cross attention and the neighbor encoder share.
    neighbor_encoder_num_hidden_layers (`int`, *optional*, defaults to 2):
        Number of layers of the neighbor encoder.
    neighbor_encoder_hidden_size (`int`, *optional*):
        Width of the neighbor encoder. Defaults to `hidden_size`; another width adds a projection of the embeddings.
    neighbor_encoder_intermediate_size (`int`, *optional*):
        Width of the MLP of the neighbor encoder. Defaults to `intermediate_size` scaled by the ratio of the widths.
    neighbor_encoder_num_attention_heads (`int`, *optional*):
        Number of attention heads of the neighbor encoder, each of `head_dim`. Defaults to `num_attention_heads` for
        equal widths, else to as many as fill the width.
    neighbor_encoder_num_key_value_heads (`int`, *optional*):
        Number of key and value heads of the neighbor encoder. Defaults to `num_key_value_heads` for equal widths, else
        to `neighbor_encoder_num_attention_heads`.
    neighbor_encoder_hidden_dropout (`float`, *optional*, defaults to 0.0):
        Dropout on the output of each sublayer of the neighbor encoder.
    neighbor_encoder_attention_dropout (`float`, *optional*, defaults to 0.0):
        Dropout on the attention weights of the neighbor encoder.
    neighbor_encoder_cross_attention_layers (`list[int]`, *optional*, defaults to `[0]`):
        Layers of the neighbor encoder (0-based) that attend to the decoder's activations of the chunk that retrieved
        the neighbors. With an empty list, the encodings of neighbors do not depend on the chunk.
    base_model_name_or_path (`str`, *optional*):
        Decoder that a retrofitted model was made from.
    base_model_revision (`str`, *optional*):
        Its revision.
    base_model_sha256 (`str`, *optional*):
        Checksum of its weights.
    tokenizer_sha256 (`str`, *optional*):
        Checksum of the tokenizer that the model was trained with, as the manifest of a datastore has it. A datastore
        of another tokenizer is then refused.
    datastore_name_or_path (`str`, *optional*):
        Datastore that `from_pretrained(..., retriever="auto")` opens.
    datastore_revision (`str`, *optional*):
        Its revision.

    Example:

    ```python
    >>> from modeling_retro import RetroConfig, RetroForCausalLM

    >>> config = RetroConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    >>> model = RetroForCausalLM(config)
    >>> config.neighbor_length
    128
    ```"""

    model_type = "retro"
    _auto_class = "AutoConfig"  # saving copies the code along
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.cross_attn.q_proj": "colwise",
        "layers.*.cross_attn.k_proj": "colwise",
        "layers.*.cross_attn.v_proj": "colwise",
        "layers.*.cross_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.cross_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.cross_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
        "neighbor_encoder.layers.*.self_attn.q_proj": "colwise",
        "neighbor_encoder.layers.*.self_attn.k_proj": "colwise",
        "neighbor_encoder.layers.*.self_attn.v_proj": "colwise",
        "neighbor_encoder.layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "neighbor_encoder.layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "neighbor_encoder.layers.*.self_attn.o_proj": "rowwise",
        "neighbor_encoder.layers.*.chunk_attn.q_proj": "colwise",
        "neighbor_encoder.layers.*.chunk_attn.k_proj": "colwise",
        "neighbor_encoder.layers.*.chunk_attn.v_proj": "colwise",
        "neighbor_encoder.layers.*.chunk_attn.q_norm": "replicated_with_grad_allreduce",
        "neighbor_encoder.layers.*.chunk_attn.k_norm": "replicated_with_grad_allreduce",
        "neighbor_encoder.layers.*.chunk_attn.o_proj": "rowwise",
        "neighbor_encoder.layers.*.mlp.gate_proj": "colwise",
        "neighbor_encoder.layers.*.mlp.up_proj": "colwise",
        "neighbor_encoder.layers.*.mlp.down_proj": "rowwise",
    }
    base_model_fsdp_plan = {
        "embed_tokens": "free_full_weight",
        "layers.*": "free_full_weight",
        "neighbor_encoder.layers.*": "free_full_weight",
        "norm": "keep_full_weight",
    }

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = interval(min=0.0, max=1.0)(default=0.02)
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_dropout: float | int = interval(min=0.0, max=1.0)(default=0.0)
    hidden_dropout: float | int = interval(min=0.0, max=1.0)(default=0.0)
    sliding_window: int | None = None
    no_rope_layers: list[int] | None = None
    attention_multiplier: float | int | None = None
    embedding_multiplier: float | int = 1.0
    residual_multiplier: float | int = 1.0
    logits_scaling: float | int = 1.0
    chunk_size: int = interval(min=1)(default=64)
    num_neighbors: int = interval(min=0)(default=2)
    continuation_chunks: int = interval(min=0)(default=1)
    cross_attention_layers: list[int] | None = None
    cross_attention_gate: bool = False
    neighbor_rope_theta: float | int = 10000.0
    neighbor_encoder_num_hidden_layers: int = interval(min=1)(default=2)
    neighbor_encoder_hidden_size: int | None = None
    neighbor_encoder_intermediate_size: int | None = None
    neighbor_encoder_num_attention_heads: int | None = None
    neighbor_encoder_num_key_value_heads: int | None = None
    neighbor_encoder_hidden_dropout: float | int = interval(min=0.0, max=1.0)(default=0.0)
    neighbor_encoder_attention_dropout: float | int = interval(min=0.0, max=1.0)(default=0.0)
    neighbor_encoder_cross_attention_layers: list[int] | None = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    base_model_sha256: str | None = None
    tokenizer_sha256: str | None = None
    datastore_name_or_path: str | None = None
    datastore_revision: str | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.cross_attention_layers is None:
            self.cross_attention_layers = list(range(5, self.num_hidden_layers, 3)) or [self.num_hidden_layers // 2]
        if self.neighbor_encoder_hidden_size is None:
            self.neighbor_encoder_hidden_size = self.hidden_size
        same_width = self.neighbor_encoder_hidden_size == self.hidden_size
        if self.neighbor_encoder_intermediate_size is None:
            self.neighbor_encoder_intermediate_size = (
                self.intermediate_size * self.neighbor_encoder_hidden_size // self.hidden_size
            )
        if self.neighbor_encoder_num_attention_heads is None:
            self.neighbor_encoder_num_attention_heads = (
                self.num_attention_heads if same_width else max(1, self.neighbor_encoder_hidden_size // self.head_dim)
            )
        if self.neighbor_encoder_num_key_value_heads is None:
            self.neighbor_encoder_num_key_value_heads = (
                self.num_key_value_heads
                if same_width and self.neighbor_encoder_num_attention_heads == self.num_attention_heads
                else self.neighbor_encoder_num_attention_heads
            )
        if self.neighbor_encoder_cross_attention_layers is None:
            self.neighbor_encoder_cross_attention_layers = [0]
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The fields, as [`~transformers.PreTrainedConfig.to_dict`] gives them. PEFT asks it for the model's type."""
        name_lora_targets(self.model_type, "llama")
        return super().to_dict()

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Saves the configuration as [`~transformers.PreTrainedConfig.save_pretrained`] does, for every Auto class."""
        # transformers would add only the class of the saved model.
        self.auto_map = {
            "AutoConfig": "configuration_retro.RetroConfig",
            "AutoModel": "modeling_retro.RetroModel",
            "AutoModelForCausalLM": "modeling_retro.RetroForCausalLM",
        }
        super().save_pretrained(save_directory, **kwargs)

    @property
    def neighbor_length(self) -> int:
        """`int`: Number r of tokens of a neighbor: the retrieved chunk and its continuation."""
        return self.chunk_size * (1 + self.continuation_chunks)

    def validate_architecture(self):
        """Part of `@strict`-powered validation. Validates the architecture of the config."""
        for name, heads, key_value_heads in (
            ("num_key_value_heads", self.num_attention_heads, self.num_key_value_heads),
            (
                "neighbor_encoder_num_key_value_heads",
                self.neighbor_encoder_num_attention_heads,
                self.neighbor_encoder_num_key_value_heads,
            ),
        ):
            if heads % key_value_heads != 0:
                raise ValueError(f"`{name}` ({key_value_heads}) must divide the number of attention heads ({heads}).")
        if self.head_dim % 2 != 0:
            raise ValueError(f"`head_dim` ({self.head_dim}) must be even for rotary embeddings.")
        if self.no_rope_layers is not None and len(self.no_rope_layers) != self.num_hidden_layers:
            raise ValueError(
                f"`no_rope_layers` ({self.no_rope_layers}) must have a 0 or 1 for each of the "
                f"{self.num_hidden_layers} layers there are."
            )
        for name, layers, num_layers in (
            ("cross_attention_layers", self.cross_attention_layers, self.num_hidden_layers),
            (
                "neighbor_encoder_cross_attention_layers",
                self.neighbor_encoder_cross_attention_layers,
                self.neighbor_encoder_num_hidden_layers,
            ),
        ):
            if layers != sorted(set(layers)) or any(not 0 <= layer < num_layers for layer in layers):
                raise ValueError(
                    f"`{name}` ({layers}) must be increasing 0-based numbers of the {num_layers} layers there are."
                )
        if not self.cross_attention_layers:
            raise ValueError("`cross_attention_layers` is empty: a RETRO decoder needs at least one.")


__all__ = ["RetroConfig"]
