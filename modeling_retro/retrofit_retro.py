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
"""Makes RETRO models from pretrained decoders of the Llama family"""

import os
from typing import Any, Self

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig

from .added_weights_retro import HUB_ARGUMENTS, RetroBaseModelMixin, checkpoint_sha256
from .configuration_retro import RetroConfig


RETROFIT_MODULES = ("cross_attn", "cross_attn_layernorm", "neighbor_encoder")

# Values that the code of each family fixes and that are fields of RetroConfig.
FAMILIES = {
    "granite": {},
    "llama": {},
    "mistral": {"attention_bias": False, "mlp_bias": False},
    "qwen2": {"attention_bias": True, "attention_output_bias": False, "mlp_bias": False},
    "qwen3": {"qk_norm": True, "mlp_bias": False},
    "smollm3": {},
}
# Fields that only some families have, and the values for the others.
FAMILY_FIELDS = {
    "sliding_window": None,
    "no_rope_layers": None,
    "attention_multiplier": None,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}
SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
)


def decoder_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """
    Returns the fields of a [`RetroConfig`] whose decoder is the model of `config`.

    Raises:
        `ValueError`: if the decoder has a property that the decoder of RETRO lacks. The message names the field.
    """
    refusal = (
        "`RetroJointForCausalLM.from_decoder_pretrained` reads neighbors with any causal language model, and without "
        "training."
    )
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"`model_type` is {config.model_type!r}; chunked cross attention can be added to "
            f"{', '.join(sorted(FAMILIES))}. {refusal}"
        )
    layer_types = set(getattr(config, "layer_types", None) or [])
    refused = {
        "layer_types": sorted(layer_types - {"full_attention"}) or None,
        "rope_parameters.partial_rotary_factor": config.rope_parameters.get("partial_rotary_factor"),
    }
    for name, value in refused.items():
        if value is not None and not (name.endswith("partial_rotary_factor") and value == 1.0):
            raise ValueError(
                f"`{name}` of this {config.model_type} model is {value!r}, which the decoder of a RETRO model does "
                f"not have. {refusal}"
            )

    fields = {name: getattr(config, name) for name in SHARED_FIELDS}
    fields |= {name: getattr(config, name, default) for name, default in FAMILY_FIELDS.items()}
    if layer_types:  # all layers have full attention, so the window is not used
        fields["sliding_window"] = None
    fields["head_dim"] = getattr(config, "head_dim", None)
    if config.model_type in ("granite", "llama", "qwen3", "smollm3"):
        fields["attention_bias"] = fields["attention_output_bias"] = config.attention_bias
    if config.model_type in ("granite", "llama", "smollm3"):
        fields["mlp_bias"] = config.mlp_bias
    return fields | FAMILIES[config.model_type]


def plain_state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """
    Returns the weights of a module of the decoder. Those of quantised layers become plain tensors.

    Raises:
        `ValueError`: if weights have a quantisation that PyTorch has no dtype for.
    """
    state = module.state_dict()
    for name, weight in state.items():
        if type(weight.data) is not torch.Tensor and hasattr(weight, "dequantize"):
            state[name] = weight = weight.dequantize()
        if not weight.is_floating_point():
            raise ValueError(
                f"the decoder's {name!r} is quantised to {weight.dtype}, which a warm start cannot copy: pass "
                "`warm_start=False`"
            )
    return state


class RetroRetrofitMixin(RetroBaseModelMixin):
    """Makes a RETRO model from a pretrained decoder."""

    @classmethod
    def from_decoder_pretrained(
        cls, name_or_path: str, *, warm_start: bool = True, retriever: Any = None, **kwargs
    ) -> Self:
        """
        Makes a RETRO model from a pretrained decoder. A scalar that starts at zero gates its chunked cross attention,
        so at first the model computes exactly what the decoder computes, with neighbors and without.

        Args:
            name_or_path (`str`):
                Hub id or directory of a model of type `llama`, `mistral`, `qwen2`, `qwen3`, `smollm3` or `granite`.
            warm_start (`bool`, *optional*, defaults to `True`):
                Whether chunked cross attention starts as a copy of the self-attention of its layer, and the neighbor
                encoder as a copy of the first layers of the decoder. The decoder has learned to copy from its context,
                and with these copies it can copy from neighbors as soon as the gates open. The attention of the
                encoder to the chunk starts with output zero. `False` initialises all of them at random.
            retriever (*optional*):
                The object that looks up neighbors for the model.
            kwargs:
                Fields of [`RetroConfig`] that the decoder does not fix (`cross_attention_layers`, `chunk_size`,
                `neighbor_encoder_num_hidden_layers`, …) and arguments of
                [`~transformers.PreTrainedModel.from_pretrained`] (`dtype`, `revision`, `attn_implementation`,
                `quantization_config`, `gguf_file`, …). The new weights of a quantised decoder have the data type in
                which the decoder computes. `sliding_window=None` gives full attention to a decoder with a window. With
                a warm start, `neighbor_rope_theta` defaults to the base of the decoder.

        Raises:
            `ValueError`: if RETRO cannot represent the decoder. The message names the field.
        """
        opens_window = "sliding_window" in kwargs and kwargs["sliding_window"] is None
        window = {"sliding_window": kwargs.pop("sliding_window")} if opens_window else {}
        retro_fields = {name: kwargs.pop(name) for name in list(kwargs) if name in RetroConfig.__annotations__}
        hub_arguments = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        gguf_file = kwargs.get("gguf_file")
        trust = {"trust_remote_code": kwargs.setdefault("trust_remote_code", False)}
        base_config = AutoConfig.from_pretrained(name_or_path, gguf_file=gguf_file, **window, **hub_arguments, **trust)
        fields = decoder_fields(base_config)
        fixed = sorted(set(retro_fields) & set(fields))
        if fixed:
            raise ValueError(f"`{fixed[0]}` is fixed by the decoder {name_or_path} and cannot be changed.")
        if warm_start:
            retro_fields.setdefault("neighbor_rope_theta", base_config.rope_parameters["rope_theta"])
        config = RetroConfig(
            **fields,
            **{"cross_attention_gate": True} | retro_fields,
            base_model_name_or_path=str(name_or_path),
            base_model_revision=getattr(base_config, "_commit_hash", None) or kwargs.get("revision"),
            base_model_sha256=checkpoint_sha256(name_or_path, gguf_file, **hub_arguments),
        )
        model = cls._from_base(config, name_or_path, **kwargs)
        if warm_start:
            model._warm_start()
        model.set_retriever(retriever)
        return model

    @classmethod
    def _from_base(cls, config: RetroConfig, name_or_path: str, **kwargs) -> "RetroRetrofitMixin":
        """
        Makes a model from the layers of the base, which may be quantised, and new weights for the layers of RETRO.
        """
        base = AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)
        model = cls._from_config(config, dtype=base.dtype, attn_implementation=base.config._attn_implementation)
        own = {name for name in model.state_dict() if not cls.is_added_weight(name)}
        found = set(base.state_dict())
        # Some quantisers, such as that of GGUF, have done their work when the model is loaded.
        is_quantized = getattr(base, "hf_quantizer", None) is not None and any(
            type(weight) is not torch.Tensor or not weight.is_floating_point() for weight in base.state_dict().values()
        )
        missing, unexpected = sorted(own - found), sorted(found - own)
        if missing or (unexpected and not is_quantized):  # quantised layers may have additional tensors
            raise ValueError(f"{name_or_path} lacks the weights {missing} and has {unexpected}, which RETRO does not.")
        for name, module in base.named_modules():
            if isinstance(module, (nn.Embedding, nn.Linear)):
                model.set_submodule(name, module)
            elif not any(module.children()) and module.state_dict():
                model.get_submodule(name).load_state_dict(module.state_dict())
        if is_quantized:
            model.hf_quantizer = base.hf_quantizer
        model.generation_config = base.generation_config
        return model.to(base.device).eval()

    @torch.no_grad()
    def _warm_start(self) -> None:
        config = self.config
        widths = (config.neighbor_encoder_hidden_size, config.neighbor_encoder_intermediate_size)
        heads = (config.neighbor_encoder_num_attention_heads, config.neighbor_encoder_num_key_value_heads)
        if widths != (config.hidden_size, config.intermediate_size) or heads != (
            config.num_attention_heads,
            config.num_key_value_heads,
        ):
            raise ValueError(
                "A warm start copies layers of the decoder into the neighbor encoder, which needs its shape: "
                f"`neighbor_encoder_hidden_size` {config.hidden_size} (not {widths[0]}), its MLP and its heads. Pass "
                "`warm_start=False` for an encoder of another shape."
            )
        if config.neighbor_encoder_num_hidden_layers > config.num_hidden_layers:
            raise ValueError(
                f"`neighbor_encoder_num_hidden_layers` ({config.neighbor_encoder_num_hidden_layers}) exceeds the "
                f"{config.num_hidden_layers} layers of the decoder that a warm start copies."
            )
        decoder, encoder = self.model.layers, self.model.neighbor_encoder
        for target, source in zip(encoder.layers, decoder):
            for name in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"):
                getattr(target, name).load_state_dict(plain_state_dict(getattr(source, name)))
            if target.attends_to_chunk:
                for parameter in target.chunk_attn.o_proj.parameters():
                    parameter.zero_()
        for layer_idx in config.cross_attention_layers:
            layer = decoder[layer_idx]
            layer.cross_attn.load_state_dict(plain_state_dict(layer.self_attn), strict=False)
            layer.cross_attn_layernorm.load_state_dict(layer.input_layernorm.state_dict())
            # Self-attention computes keys and values after the norm of the layer, and cross attention after that of
            # the encoder, whose weight is one. The weight of the layer's norm is therefore moved into the projections.
            for projection in (layer.cross_attn.k_proj, layer.cross_attn.v_proj):
                projection.weight.mul_(layer.input_layernorm.weight)

    def save_pretrained(self, save_directory: str | os.PathLike, retrofit_only: bool = False, **kwargs) -> None:
        """
        Saves the model (see [`RetroBaseModelMixin.save_pretrained`]). If its decoder is quantised, only the added
        weights can be saved.

        Raises:
            `ValueError`: if the whole model is to be saved but its decoder is quantised.
        """
        if not retrofit_only and getattr(self, "hf_quantizer", None) is not None:
            raise ValueError(
                "the decoder is quantised, so that the model cannot be saved as a whole: `freeze_decoder()` and "
                "`save_pretrained(..., retrofit_only=True)` save the added weights"
            )
        super().save_pretrained(save_directory, retrofit_only=retrofit_only, **kwargs)

    @staticmethod
    def is_added_weight(name: str) -> bool:
        """Whether RETRO adds a parameter to the decoder."""
        return any(part in RETROFIT_MODULES for part in name.split("."))


__all__ = ["RetroRetrofitMixin"]
