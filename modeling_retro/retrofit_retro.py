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
"""Retrofit: a pretrained decoder of the Llama family becomes a RETRO model (section 4.2 of arXiv 2112.04426)"""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging
from transformers.utils.hub import get_checkpoint_shard_files

from .configuration_retro import RetroConfig


logger = logging.get_logger(__name__)

RETROFIT_WEIGHTS_NAME = "retrofit.safetensors"
RETROFIT_MODULES = ("cross_attn", "cross_attn_layernorm", "neighbor_encoder")
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")

# What each family fixes in its code and RetroConfig has as a field.
FAMILIES = {
    "llama": {},
    "mistral": {"attention_bias": False, "mlp_bias": False},
    "qwen2": {"attention_bias": True, "attention_output_bias": False, "mlp_bias": False},
    "qwen3": {"qk_norm": True, "mlp_bias": False},
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
    The fields of a [`RetroConfig`] whose decoder is the model of `config`.

    Raises:
        `ValueError`: if the decoder has something that RETRO's cannot represent; the message names the field.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"`model_type` is {config.model_type!r}; a RETRO model can be made from {', '.join(sorted(FAMILIES))}."
        )
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    refused = {
        "sliding_window": getattr(config, "sliding_window", None),
        "layer_types": sorted(layer_types - {"full_attention"}) or None,
        "quantization_config": getattr(config, "quantization_config", None),
        "rope_parameters.partial_rotary_factor": config.rope_parameters.get("partial_rotary_factor"),
    }
    for name, value in refused.items():
        if value is not None and not (name.endswith("partial_rotary_factor") and value == 1.0):
            raise ValueError(f"`{name}` is {value!r}, which the decoder of a RETRO model does not have.")

    fields = {name: getattr(config, name) for name in SHARED_FIELDS}
    fields["head_dim"] = getattr(config, "head_dim", None)
    if config.model_type in ("llama", "qwen3"):
        fields["attention_bias"] = fields["attention_output_bias"] = config.attention_bias
    if config.model_type == "llama":
        fields["mlp_bias"] = config.mlp_bias
    return fields | FAMILIES[config.model_type]


def checkpoint_sha256(name_or_path: str, **hub_arguments) -> str:
    """Checksum of the safetensors files of a checkpoint: of the file, or of the checksums of the shards in order."""
    arguments = hub_arguments | {"_raise_exceptions_for_missing_entries": False}
    single = cached_file(name_or_path, SAFE_WEIGHTS_NAME, **arguments)
    if single is not None:
        return _file_sha256(single)
    index = cached_file(name_or_path, SAFE_WEIGHTS_INDEX_NAME, **arguments)
    if index is None:
        raise ValueError(
            f"{name_or_path} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}; a RETRO model is made "
            "from weights in safetensors files. Load the model with transformers and save it to get them."
        )
    shards, _ = get_checkpoint_shard_files(name_or_path, index, **hub_arguments)
    return hashlib.sha256("".join(_file_sha256(shard) for shard in shards).encode()).hexdigest()


def _file_sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RetroRetrofitMixin:
    """Makes a RETRO model of a pretrained decoder, and stores only what it adds to it."""

    @classmethod
    def from_decoder_pretrained(
        cls, name_or_path: str, *, warm_start: bool = True, retriever: Any = None, **kwargs
    ) -> "RetroRetrofitMixin":
        """
        Makes a RETRO model of a pretrained decoder. Its chunked cross attention is gated by a scalar that starts at
        zero, so that at first the model computes exactly what the decoder does, with neighbors and without.

        Args:
            name_or_path (`str`):
                Hub id or directory of a model of type `llama`, `mistral` (without sliding window), `qwen2` or `qwen3`.
            warm_start (`bool`, *optional*, defaults to `True`):
                Whether chunked cross attention starts as a copy of the self-attention of its layer and the layers of
                the neighbor encoder as copies of the decoder's first ones, so that what the decoder has learned about
                copying from its context works on neighbors as soon as the gates open. The encoder's attention to the
                chunk starts with output zero. `False` initialises all of them at random.
            retriever (*optional*):
                What the model looks up its neighbors with.
            kwargs:
                Fields of [`RetroConfig`] that the decoder does not fix (`cross_attention_layers`, `chunk_size`,
                `neighbor_encoder_num_hidden_layers`, …) and arguments of
                [`~transformers.PreTrainedModel.from_pretrained`] (`dtype`, `revision`, `attn_implementation`, …). With
                a warm start `neighbor_rope_theta` defaults to the decoder's.

        Raises:
            `ValueError`: for a decoder that RETRO cannot represent, with the name of the field.
        """
        retro_fields = {name: kwargs.pop(name) for name in list(kwargs) if name in RetroConfig.__annotations__}
        hub_arguments = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        base_config = AutoConfig.from_pretrained(name_or_path, **hub_arguments)
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
            base_model_sha256=checkpoint_sha256(name_or_path, **hub_arguments),
        )
        model = cls._from_base(config, name_or_path, **kwargs)
        if warm_start:
            model._warm_start()
        model.set_retriever(retriever)
        return model

    @classmethod
    def _from_base(cls, config: RetroConfig, name_or_path: str, **kwargs) -> "RetroRetrofitMixin":
        """A model with the weights of the base and fresh weights of what RETRO adds."""
        base = AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)
        model = cls._from_config(config, dtype=base.dtype, attn_implementation=base.config._attn_implementation)
        missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
        missing = [name for name in missing if not is_retrofit_weight(name)]
        if missing or unexpected:
            raise ValueError(f"{name_or_path} lacks the weights {missing} and has {unexpected}, which RETRO does not.")
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
                getattr(target, name).load_state_dict(getattr(source, name).state_dict())
            if target.attends_to_chunk:
                for parameter in target.chunk_attn.o_proj.parameters():
                    parameter.zero_()
        for layer_idx in config.cross_attention_layers:
            layer = decoder[layer_idx]
            layer.cross_attn.load_state_dict(layer.self_attn.state_dict(), strict=False)
            layer.cross_attn_layernorm.load_state_dict(layer.input_layernorm.state_dict())
            # Self-attention reads its keys and values behind the layer's norm, cross attention behind the encoder's,
            # whose weight is one: the layer's goes into the projections.
            for projection in (layer.cross_attn.k_proj, layer.cross_attn.v_proj):
                projection.weight.mul_(layer.input_layernorm.weight)

    def freeze_decoder(self) -> None:
        """Leaves only what RETRO adds to the decoder trainable: chunked cross attention and the neighbor encoder."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_retrofit_weight(name))

    def save_pretrained(self, save_directory: str | os.PathLike, retrofit_only: bool = False, **kwargs) -> None:
        """
        Saves the model as [`~transformers.PreTrainedModel.save_pretrained`] does.

        Args:
            save_directory (`str` or `os.PathLike`):
                Directory to save to; created if it does not exist.
            retrofit_only (`bool`, *optional*, defaults to `False`):
                Whether to save only what RETRO adds to the decoder it was made from, with the name, the revision and
                the checksum of that decoder. `from_pretrained` puts the two together and refuses another decoder. The
                decoder must have been frozen (see `freeze_decoder`).
        """
        if not retrofit_only:
            super().save_pretrained(save_directory, **kwargs)
            return
        if self.config.base_model_sha256 is None:
            raise ValueError("`retrofit_only=True` is for models made by `from_decoder_pretrained`; this one was not.")
        trainable = [
            name
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and not is_retrofit_weight(name)
        ]
        if trainable:
            raise ValueError(
                f"`retrofit_only=True` leaves out the decoder, but its weights were trainable ({trainable[0]}, …) and "
                "may have changed: call `freeze_decoder()` before training, or save the whole model."
            )
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        custom_object_save(self, directory, config=self.config)
        self.generation_config.save_pretrained(directory)
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(directory)
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items() if is_retrofit_weight(name)}
        partial = directory / f"{RETROFIT_WEIGHTS_NAME}.partial"
        save_file(weights, partial, metadata={"format": "pt"})
        partial.replace(directory / RETROFIT_WEIGHTS_NAME)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *args,
        base_model_name_or_path: str | None = None,
        **kwargs,
    ):
        """
        Loads a model as [`~transformers.PreTrainedModel.from_pretrained`] does. One that was saved with
        `retrofit_only=True` is put together with its base, and its decoder is frozen.

        Args:
            base_model_name_or_path (`str`, *optional*):
                Where the base of a model saved with `retrofit_only=True` is, if not where it was.

        Raises:
            `ValueError`: if the base is not the one that the model was made from.
        """
        hub_arguments = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        weights = None
        if pretrained_model_name_or_path is not None:
            weights = cached_file(
                pretrained_model_name_or_path,
                RETROFIT_WEIGHTS_NAME,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                **hub_arguments,
            )
        if weights is None:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

        config = kwargs.pop("config", None)
        if config is None:
            config = RetroConfig.from_pretrained(pretrained_model_name_or_path, **hub_arguments)
        # What names a file of this repository does not hold for the base.
        for name in ("revision", "subfolder", "_commit_hash", "trust_remote_code", "code_revision"):
            kwargs.pop(name, None)
        base = base_model_name_or_path or config.base_model_name_or_path
        if base_model_name_or_path is None and config.base_model_revision is not None:
            kwargs["revision"] = config.base_model_revision
        found = checkpoint_sha256(base, **{name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs})
        if found != config.base_model_sha256:
            raise ValueError(
                f"{pretrained_model_name_or_path} was made from {config.base_model_name_or_path} with weights of "
                f"sha256 {config.base_model_sha256}, but those of {base} have {found}. Pass `base_model_name_or_path` "
                "with the right one."
            )
        model = cls._from_base(config, base, **kwargs)
        retrofit = load_file(weights)
        _, unexpected = model.load_state_dict(retrofit, strict=False)
        missing = [name for name in model.state_dict() if is_retrofit_weight(name) and name not in retrofit]
        if missing or unexpected:
            raise ValueError(f"{weights} lacks the weights {missing} and has the unknown {unexpected}.")
        model.freeze_decoder()
        return model


def is_retrofit_weight(name: str) -> bool:
    """Whether a parameter belongs to what RETRO adds to the decoder."""
    return any(part in RETROFIT_MODULES for part in name.split("."))


__all__ = ["RetroRetrofitMixin"]
