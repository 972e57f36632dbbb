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
"""Wraps any causal language model: its own attention reads the neighbors and the row, with one softmax for both"""

import copy
import inspect
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, is_peft_available

from .added_weights_retro import HUB_ARGUMENTS, RetroBaseModelMixin, checkpoint_sha256
from .cache_retro import RetroJointCache, prepend_slot
from .chunk_layout_retro import (
    TokenLocations,
    check_position_ids,
    default_position_ids,
    find_seen_slots,
    locate_tokens,
    token_mask,
)
from .configuration_retro_joint import RetroJointConfig
from .generation_retro import RetroGenerationMixin, check_neighbors
from .loss_retro import causal_lm_loss
from .model_hub_retro import RetroSharingMixin
from .neighbor_memory_retro import LayerStates, NeighborMemory
from .reader_adapters_retro import NEIGHBOR_ADAPTER, ROW_ADAPTER, ReaderAdapters, is_adapter_weight
from .readers_retro import Reader


# Number of neighbors that the decoder reads in one pass.
ENCODING_BATCH_SIZE = 32
MEMORY_BYTES = 1 << 30


class NeighborPrefix(Cache):
    """Stands in for the cache in a call without one: puts keys and values of neighbors in front, and keeps nothing."""

    def __init__(self, key_values: LayerStates):
        super().__init__(layers=[])
        self.key_values = key_values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the row `(B, Hkv, T, D)`, with those of the neighbors in front."""
        keys, values = self.key_values[layer_idx]
        keys, values = keys.to(key_states.dtype), values.to(value_states.dtype)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of cached tokens, which is 0."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the mask, which covers only the row."""
        return query_length, 0


@dataclass
class NeighborFront:
    """
    The neighbors in front of the rows of a call. They have F keys, which are ordered by slot.

    Args:
        key_values (`list`, *optional*):
            Keys and values `(B, Hkv, F, D)` for each layer. `None` if the cache already has them in front.
        mask (`torch.BoolTensor` of shape `(batch_size, F)`):
            True for the keys of real tokens.
        slots (`torch.LongTensor` of shape `(F,)`):
            The slot of each key.
    """

    key_values: LayerStates | None
    mask: torch.BoolTensor
    slots: torch.LongTensor

    def select(self, slot: torch.LongTensor) -> tuple[LayerStates, torch.BoolTensor]:
        """
        Keys and values of one slot for each row `(batch_size,)`, and their mask. A row without the slot gets none.
        Keys that no token may see are left out.
        """
        is_chosen = self.mask & (self.slots == slot[:, None])  # [B, F]
        width = int(is_chosen.sum(1).max())
        # Moves the chosen columns to the front and keeps their order.
        columns = is_chosen.int().argsort(dim=1, descending=True, stable=True)[:, :width]  # [B, W]
        mask = is_chosen.gather(1, columns)

        def gather(states: torch.Tensor) -> torch.Tensor:
            index = columns.to(states.device)[:, None, :, None]
            return states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3]))

        key_values = [None if pair is None else (gather(pair[0]), gather(pair[1])) for pair in self.key_values]
        return key_values, mask


@auto_docstring
class RetroJointPreTrainedModel(PreTrainedModel):
    config: RetroJointConfig
    base_model_prefix = "decoder"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True


@auto_docstring(
    custom_intro="""
    Any causal language model, wrapped so that it reads neighbors with its own attention. Neighbors pass through the
    decoder alone; the tokens of a chunk's successor attend, with one softmax, to their own document and to these
    neighbors, which stand in front of it. Nothing has to be trained; without neighbors the model is the decoder.
    """
)
class RetroJointForCausalLM(
    RetroGenerationMixin, RetroBaseModelMixin, RetroSharingMixin, RetroJointPreTrainedModel, GenerationMixin
):
    _auto_class = "AutoModelForCausalLM"  # saving copies the code along
    cache_class = RetroJointCache

    def __init__(self, config: RetroJointConfig, decoder: PreTrainedModel | None = None):
        r"""
        decoder (`PreTrainedModel`, *optional*):
            The causal language model to wrap. Defaults to a new one of `config.text_config`.
        """
        super().__init__(config)
        if decoder is None:
            decoder = AutoModelForCausalLM.from_config(config.text_config)
            config.text_config = decoder.config
        self.decoder = decoder
        self.decoder.loss_function = causal_lm_loss
        if (head := self.decoder.get_output_embeddings()) is not None:
            head.register_forward_pre_hook(make_contiguous)
        # CODEPATH: only readers that were trained to weigh neighbors differently from the decoder have this bias.
        self.neighbor_bias = nn.Parameter(torch.zeros(())) if config.neighbor_bias else None
        self.neighbor_memory = NeighborMemory(MEMORY_BYTES)
        self.set_retriever(None)
        self.adapters = ReaderAdapters()

        # Initialize weights and apply final processing
        self.post_init()
        # The adapters are added last, because PEFT initializes its layers itself.
        self.adapters.add_to(decoder, config.neighbor_adapter, config.row_adapter)

    @classmethod
    def from_decoder_pretrained(
        cls, name_or_path: str, *, retriever: Any = None, reader: str | None = None, **kwargs
    ) -> "RetroJointForCausalLM":
        """
        Wraps a pretrained causal language model, which then reads neighbors without any training.

        Args:
            name_or_path (`str`):
                Hub id or directory of any model that `AutoModelForCausalLM` loads and whose layers attend to keys with
                rotary positions or without positions. It may also be a PEFT adapter.
            retriever (*optional*):
                The object that looks up neighbors for the model.
            reader (`str`, *optional*):
                Adapters that were trained to read neighbors: the name of a reader of the package, or the folder or Hub
                id of a model that was saved with `retrofit_only=True`. Without a reader, nothing in the model is
                trained to read neighbors.
            kwargs:
                Fields of [`RetroJointConfig`] (`chunk_size`, `num_neighbors`, …) and arguments of
                [`~transformers.PreTrainedModel.from_pretrained`] (`dtype`, `revision`, `quantization_config`,
                `device_map`, `gguf_file`, `attn_implementation`, …).

        Raises:
            `ValueError`: for a model that cannot be wrapped, with the reason.
        """
        fields = {name: kwargs.pop(name) for name in list(kwargs) if name in RetroJointConfig.__annotations__}
        hub_arguments = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        gguf_file = kwargs.get("gguf_file")
        decoder = AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)
        return cls.from_decoder(
            decoder,
            retriever=retriever,
            reader=reader,
            base_model_name_or_path=str(name_or_path),
            base_model_revision=getattr(decoder.config, "_commit_hash", None) or kwargs.get("revision"),
            base_model_sha256=checkpoint_sha256(str(name_or_path), gguf_file, **hub_arguments),
            **fields,
        )

    @classmethod
    def from_decoder(
        cls, decoder: PreTrainedModel, *, retriever: Any = None, reader: str | None = None, **fields
    ) -> "RetroJointForCausalLM":
        """
        Wraps a causal language model that is already loaded, such as one that was quantised by hand or a `PeftModel`.
        The decoder is not copied.

        Args:
            decoder (`PreTrainedModel` or `PeftModel`):
                The model to wrap.
            retriever (*optional*):
                The object that looks up neighbors for the model.
            reader (`str`, *optional*):
                See [`~RetroJointForCausalLM.from_decoder_pretrained`].
            fields:
                Fields of [`RetroJointConfig`].

        Raises:
            `ValueError`: for a model that cannot be wrapped, with the reason.
        """
        if is_peft_available():
            from peft import PeftModel

            if isinstance(decoder, PeftModel):
                if decoder.active_peft_config.is_prompt_learning:
                    raise ValueError(
                        f"the PEFT model learns a prompt ({decoder.active_peft_config.peft_type}), which would stand "
                        "between a row and its neighbors; wrap one whose adapter changes layers, such as LoRA"
                    )
                decoder = decoder.get_base_model()
        if reader is not None:
            reader = Reader(reader)
            fields = {**reader.fields, **fields}
        config = RetroJointConfig(text_config=copy.deepcopy(decoder.config), **fields)
        check_decoder(decoder, config)
        model = cls._wrap(config, decoder)
        model._check_reading()
        if reader is not None:
            reader.load_into(model)
        model.set_retriever(retriever)
        return model

    @classmethod
    def _wrap(cls, config: RetroJointConfig, decoder: PreTrainedModel) -> "RetroJointForCausalLM":
        # The config is that of the decoder itself, so that changing the attention implementation reaches the decoder.
        config.text_config = decoder.config
        config.dtype = decoder.dtype
        config._attn_implementation = decoder.config._attn_implementation
        model = cls(config, decoder=decoder)
        model.generation_config = decoder.generation_config
        for name in ("hf_device_map", "hf_quantizer", "is_quantized", "quantization_method"):
            if hasattr(decoder, name):
                setattr(model, name, getattr(decoder, name))
        return model.eval()

    @classmethod
    def _from_base(cls, config: RetroJointConfig, name_or_path: str, **kwargs) -> "RetroJointForCausalLM":
        return cls._wrap(config, AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs))

    @staticmethod
    def is_added_weight(name: str) -> bool:
        """Whether a parameter was added to the decoder."""
        return not name.startswith("decoder.") or is_adapter_weight(name)

    def train(self, mode: bool = True) -> "RetroJointForCausalLM":
        """Sets the training mode. The adapters of the decoder are switched off until the next forward pass."""
        self.adapters.switch(None)
        return super().train(mode)

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's embedding of tokens."""
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Sets the decoder's embedding of tokens."""
        self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The decoder's head."""
        return self.decoder.get_output_embeddings()

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
    ) -> CausalLMOutputWithPast:
        r"""
        neighbor_input_ids (`torch.LongTensor` of shape `(batch_size, num_slots, k, neighbor_length)`, *optional*):
            Tokens of the neighbors of each whole chunk of a row, in the order of the chunks. An incomplete last chunk
            has no slot. If the cache is filled, these are the neighbors of the chunks that this call completes, and a
            row that completes fewer chunks has its last slots masked. Chunks beyond `num_slots` have no neighbors.
            Without this argument, a model that has a retriever and is not training looks up the neighbors by itself.
        neighbor_attention_mask (`torch.Tensor` of shape `(batch_size, num_slots, k, neighbor_length)`, *optional*):
            1 (or True) for real neighbor tokens, 0 for padding and absent neighbors. By default all tokens are real.

        Example:

        ```python
        >>> from modeling_retro import RetroJointForCausalLM, RetroRetriever
        >>> from transformers import AutoTokenizer

        >>> retriever = RetroRetriever.from_pretrained("path/to/datastore")
        >>> model = RetroJointForCausalLM.from_decoder_pretrained("HuggingFaceTB/SmolLM2-135M", retriever=retriever)
        >>> tokenizer = AutoTokenizer.from_pretrained("HuggingFaceTB/SmolLM2-135M")
        >>> inputs = tokenizer("The class wraps", return_tensors="pt")
        >>> print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
        ```"""
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if neighbor_input_ids is None and self.is_retrieving:
            neighbor_input_ids, neighbor_attention_mask = self.retrieve_neighbors(
                input_ids, attention_mask, position_ids, past_key_values
            )
        inputs = input_ids if input_ids is not None else inputs_embeds
        neighbor_input_ids, neighbor_attention_mask = check_neighbors(
            inputs,
            neighbor_input_ids,
            neighbor_attention_mask,
            position_ids,
            past_key_values,
            chunk_size=self.config.chunk_size,
            cache_class=RetroJointCache,
        )
        # In training every weight stays in the graph, because training on several processes needs that.
        if neighbor_input_ids is not None and not self.training and not neighbor_attention_mask.any():
            neighbor_input_ids, neighbor_attention_mask = None, None
        if use_cache is None:
            use_cache = getattr(self.config.text_config.get_text_config(), "use_cache", True) and not self.training
        if use_cache and past_key_values is None:
            past_key_values = RetroJointCache()

        cache = past_key_values if isinstance(past_key_values, RetroJointCache) else None
        decoder_inputs = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
        }
        front, next_slot = None, None
        has_previous_slot = cache is not None and cache.neighbor_input_ids is not None
        if (
            neighbor_input_ids is not None
            or has_previous_slot
            or self._is_packed(inputs, attention_mask, position_ids, past_key_values)
        ):
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            has_4d_mask = attention_mask is not None and attention_mask.ndim == 4
            if position_ids is None:
                position_ids = default_position_ids(inputs, attention_mask, past_length)
            position_ids = position_ids.expand(inputs.shape[0], -1)
            if has_4d_mask:
                check_position_ids(position_ids)
            mask = token_mask(attention_mask, position_ids, past_length)
            locations = locate_tokens(position_ids, mask, self.config.chunk_size)
            front = self._make_front(locations, neighbor_input_ids, neighbor_attention_mask, mask, cache)
            num_slots = int(has_previous_slot) + (neighbor_input_ids.shape[1] if neighbor_input_ids is not None else 0)
            slot, sees, next_slot = find_seen_slots(locations, self.config.chunk_size, num_slots, has_previous_slot)
            sees_front = sees[..., None] & (slot[..., None] == front.slots) & front.mask[:, None]  # [B, T, F]
            row_mask = attention_mask if has_4d_mask else None
            decoder_inputs["attention_mask"] = self._make_masks(sees_front, mask, position_ids, row_mask)
            decoder_inputs["position_ids"] = position_ids
            if cache is None and front.key_values:
                decoder_inputs["past_key_values"] = NeighborPrefix(front.key_values)
            elif cache is not None and front.key_values:
                cache.set_front(front.key_values, front.mask)
        if cache is not None:
            unknown = inputs.new_full(inputs.shape[:2], -1, dtype=torch.long)
            cache.update_input_ids(unknown if input_ids is None else input_ids)

        reads = front is not None and front.mask.shape[1] > 0
        with (
            self._reading_cache(decoder_inputs["past_key_values"]),
            self.adapters.active(
                ROW_ADAPTER if reads else None, sees_front.any(-1) if reads else None, keep=self.training
            ),
        ):
            outputs = self.decoder(
                **decoder_inputs, labels=labels, use_cache=use_cache, logits_to_keep=logits_to_keep, **kwargs
            )
        if cache is not None and reads:
            if front.key_values:
                cache.set_front(*front.select(next_slot))
            else:
                cache.front_mask = cache.front_mask & (next_slot == 0)[:, None]
        others = {name: value for name, value in outputs.items() if name != "past_key_values"}
        return type(outputs)(past_key_values=past_key_values, **others)

    def _is_packed(
        self,
        inputs: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None,
        past_key_values: Cache | None,
    ) -> bool:
        """Whether a row holds several documents. The decoder alone would not always keep these apart."""
        cache = past_key_values if isinstance(past_key_values, RetroJointCache) else None
        if cache is not None and cache.is_packed:
            return True
        if position_ids is None or position_ids.ndim != 2 or inputs.shape[1] == 1:
            return False
        if attention_mask is not None and attention_mask.ndim == 4:
            return False
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        position_ids = position_ids.expand(inputs.shape[0], -1)
        mask = token_mask(attention_mask, position_ids, past_length)
        starts = ((mask.cumsum(-1) - 1)[:, -inputs.shape[1] :] != position_ids) & mask[:, -inputs.shape[1] :]
        is_packed = bool(starts.any())
        if cache is not None:
            cache.is_packed = is_packed
        return is_packed

    def _make_front(
        self,
        locations: TokenLocations,
        neighbor_input_ids: torch.LongTensor | None,
        neighbor_attention_mask: torch.BoolTensor | None,
        mask: torch.BoolTensor,
        cache: RetroJointCache | None,
    ) -> NeighborFront:
        """Reads the neighbors of a call and puts them behind those that the cache already has in front."""
        first_slot = locations.first_slot[:, 0]
        num_previous = 0
        if cache is not None:
            has_previous_slot = cache.neighbor_input_ids is not None
            cache.update_neighbors(
                neighbor_input_ids, neighbor_attention_mask, first_slot, mask.shape[1] // self.config.chunk_size
            )
            if has_previous_slot and cache.front_mask is None:
                # After a crop, the neighbors of the last complete chunk are put in front again.
                ids, present = cache.get_neighbors(first_slot - 1)  # [B, k, r]
                neighbor_input_ids = prepend_slot(ids, neighbor_input_ids, dim=(2, 3))  # [B, 1 + L, k, r]
                neighbor_attention_mask = prepend_slot(present, neighbor_attention_mask, dim=(2, 3))
            num_previous = cache.front_length
        device = mask.device
        slots = torch.zeros(num_previous, dtype=torch.long, device=device)
        front_mask = cache.front_mask if num_previous > 0 else mask.new_zeros(mask.shape[0], 0)
        if neighbor_input_ids is None:
            return NeighborFront(None, front_mask, slots)
        key_values = self.read_neighbors(neighbor_input_ids, neighbor_attention_mask)
        # The row does not see the first real tokens of a neighbor, though the rest of the neighbor does.
        place = neighbor_attention_mask.cumsum(-1)  # [B, L, k, r], from 1
        is_seen = neighbor_attention_mask & (place > self.config.hidden_neighbor_tokens)
        if num_previous > 0:
            key_values = cache.get_front(key_values)
        num_slots, width = neighbor_input_ids.shape[1], neighbor_input_ids[0, 0].numel()
        new_slots = torch.arange(num_slots, device=device).repeat_interleave(width) + int(num_previous > 0)
        return NeighborFront(
            key_values,
            torch.cat([front_mask, is_seen.flatten(1)], dim=1),
            torch.cat([slots, new_slots]),
        )

    def read_neighbors(
        self, neighbor_input_ids: torch.LongTensor, neighbor_attention_mask: torch.BoolTensor
    ) -> LayerStates:
        """
        Computes the keys and values of neighbors in each layer of the decoder. The decoder reads each neighbor by
        itself, at the positions -r to -1 in front of a document. A neighbor that was read before is taken from
        `neighbor_memory`, unless gradients are needed.

        Args:
            neighbor_input_ids (`torch.LongTensor` of shape `(batch_size, num_slots, k, neighbor_length)`):
                Tokens of the neighbors.
            neighbor_attention_mask (`torch.BoolTensor` of the same shape):
                True for real tokens.

        Returns:
            `list`: for each layer keys and values of shape `(batch_size, num_key_value_heads, num_slots * k *
            neighbor_length, head_dim)`, or `None` for a layer without keys and values of its own.
        """
        needs_gradient = torch.is_grad_enabled() and any(
            parameter.requires_grad for parameter in self._neighbor_parameters()
        )
        with torch.set_grad_enabled(needs_gradient):
            states = self.neighbor_memory.read(
                neighbor_input_ids,
                neighbor_attention_mask,
                self._encode_neighbors,
                version=None if needs_gradient else self._weights_version(),
            )
            return states.gather()

    def _neighbor_parameters(self) -> list[nn.Parameter]:
        """The weights that the states of neighbors depend on."""
        named = self.decoder.named_parameters()
        return [parameter for name, parameter in named if not is_adapter_weight(name, ROW_ADAPTER)]

    def _weights_version(self) -> tuple:
        """A value that changes whenever a weight is changed in place or replaced."""
        device_type = self.device.type
        autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        parameters = tuple(
            (id(parameter), 0 if parameter.is_inference() else parameter._version)
            for parameter in self._neighbor_parameters()
        )
        return (hash(parameters), self.decoder.dtype, self.device, autocast, self.training)

    def _encode_neighbors(
        self, neighbor_input_ids: torch.LongTensor, neighbor_attention_mask: torch.BoolTensor
    ) -> LayerStates:
        """Keys and values `(n, Hkv, r, D)` of neighbors `(n, r)` in each layer."""
        length = neighbor_input_ids.shape[1]
        positions = torch.arange(-length, 0, device=neighbor_input_ids.device)
        parts = []
        for ids, mask in zip(
            neighbor_input_ids.split(ENCODING_BATCH_SIZE), neighbor_attention_mask.split(ENCODING_BATCH_SIZE)
        ):
            # The causal mask hides padding behind a neighbor from the tokens in front of it, and no row reads it.
            is_padded_behind = bool((mask[:, 1:] <= mask[:, :-1]).all())
            cache = DynamicCache()
            with self._without_checkpointing(), self.adapters.active(NEIGHBOR_ADAPTER):
                outputs = self.decoder.base_model(
                    input_ids=ids,
                    attention_mask=None if is_padded_behind else mask.long(),
                    position_ids=positions.expand(len(ids), -1),
                    past_key_values=cache,
                    use_cache=True,
                )
            layers = [(layer.keys, layer.values) if layer.is_initialized else None for layer in cache.layers]
            if torch.is_grad_enabled() and NEIGHBOR_ADAPTER in self.adapters.names:
                # The output of the last layer for neighbors is not used, but its adapter must stay in the graph.
                keys, values = layers[0]
                layers[0] = keys, values + 0 * outputs.last_hidden_state.sum()
            parts.append(layers)
        return [
            None if layer[0] is None else tuple(torch.cat([part[i] for part in layer]) for i in (0, 1))
            for layer in zip(*parts)
        ]

    def _make_masks(
        self,
        sees_front: torch.BoolTensor,
        mask: torch.BoolTensor,
        position_ids: torch.LongTensor,
        row_mask: torch.Tensor | None,
    ) -> torch.Tensor | BlockMask | dict[str, torch.Tensor | BlockMask] | None:
        """
        Makes the masks over the neighbors in front and the row, in the form that the attention of the decoder takes.
        If the decoder has several types of layers, there is a mask for each. A sliding window counts only the tokens
        of the row.
        """
        seq_len, total_length = position_ids.shape[1], mask.shape[1]
        columns = torch.arange(total_length, device=mask.device)
        distance = columns[-seq_len:, None] - columns  # [T, N]
        if row_mask is None:
            row_index = mask.cumsum(-1) - 1  # [B, N]
            document_start = row_index[:, -seq_len:] - position_ids  # [B, T]
            row_mask = mask[:, None] & (distance >= 0) & (row_index[:, None] >= document_start[..., None])
            # A softmax needs at least one key, so padding sees itself.
            row_mask = row_mask | (distance == 0)  # [B, T, N]
        else:
            row_mask = row_mask[:, 0] if row_mask.dtype == torch.bool else row_mask[:, 0] >= 0
        masks = {}
        for layer_type, window in layer_windows(self.config.text_config).items():
            seen = row_mask if window is None else row_mask & (distance < window)
            seen = torch.cat([sees_front, seen], dim=-1)[:, None]  # [B, 1, T, F + N]
            if window is None and self._needs_no_mask(seen):
                return None
            masks[layer_type] = self._convert_mask(seen, num_neighbor_tokens=sees_front.shape[-1])
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _needs_no_mask(self, seen: torch.BoolTensor) -> bool:
        """
        Whether the token of a decoding step sees every key. Without a mask SDPA need not repeat the keys for the heads
        of a group. On a GPU this is not looked up, because the CPU would have to wait for the answer.
        """
        implementation = self.decoder.config._attn_implementation
        return (
            seen.shape[2] == 1
            and seen.device.type == "cpu"
            and len(layer_windows(self.config.text_config)) == 1
            and self.neighbor_bias is None
            and implementation == "sdpa"
            # Some other decoders make a mask of their own if they are given none.
            and self.decoder._supports_attention_backend
            and self.decoder._can_compile_fullgraph
            and not torch.compiler.is_compiling()
            and bool(seen.all())
        )

    def _convert_mask(self, mask: torch.BoolTensor, num_neighbor_tokens: int = 0) -> torch.Tensor | BlockMask:
        implementation = self.decoder.config._attn_implementation
        has_bias = self.neighbor_bias is not None and num_neighbor_tokens > 0
        if implementation == "sdpa" and not has_bias:
            return mask
        if implementation == "flex_attention" and not has_bias:
            batch_size, _, query_length, key_length = mask.shape

            def sees(batch_idx: int, head_idx: int, q_idx: int, kv_idx: int) -> torch.BoolTensor:
                return mask[batch_idx, 0, q_idx, kv_idx]

            return create_block_mask(sees, batch_size, None, query_length, key_length, device=mask.device)
        if implementation not in ("sdpa", "eager", "flex_attention"):
            raise ValueError(
                f"the decoder's attention is {implementation!r}, which takes no mask over neighbors and row; load it "
                "with `attn_implementation` 'sdpa', 'flex_attention' or 'eager'"
            )
        dtype = self.decoder.dtype
        scores = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        if has_bias:
            is_neighbor = torch.arange(mask.shape[-1], device=mask.device) < num_neighbor_tokens
            scores = torch.where(is_neighbor, self.neighbor_bias.to(scores), scores)
        return scores.masked_fill(~mask, torch.finfo(dtype).min)

    @contextmanager
    def _without_checkpointing(self):
        """Switches off checkpointing of activations, which would drop the cache that the states of neighbors go to."""
        layers = [m for m in self.decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
        before = [layer.gradient_checkpointing for layer in layers]
        for layer in layers:
            layer.gradient_checkpointing = False
        try:
            yield
        finally:
            for layer, value in zip(layers, before):
                layer.gradient_checkpointing = value

    @contextmanager
    def _reading_cache(self, past_key_values: Cache | None):
        """Lets checkpointed layers keep a cache that they only read, both when they run and when they run again."""
        layers = []
        if self.training and isinstance(past_key_values, NeighborPrefix):
            layers = [m for m in self.decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
        for layer in layers:
            layer._can_checkpoint_with_cache = True
        try:
            yield
        finally:
            for layer in layers:
                layer._can_checkpoint_with_cache = False

    @torch.no_grad()
    def _check_reading(self) -> None:
        """
        Compares the logits of a short row that reads a neighbor with those of one sequence of both. They differ for
        decoders whose positions are absolute, or whose layers keep other states than keys and values.

        Raises:
            ValueError: If the two differ.
        """
        generator = torch.Generator().manual_seed(0)
        row_length, length = self.config.chunk_size + min(4, self.config.chunk_size - 1), 4
        tokens = torch.randint(0, self.config.vocab_size, (1, length + row_length), generator=generator)
        tokens = tokens.to(self.decoder.get_input_embeddings().weight.device)
        neighbor, row = tokens[:, None, None, :length], tokens[:, length:]
        positions = torch.arange(row_length, device=tokens.device)[None]
        is_seen = torch.arange(length, device=tokens.device) >= self.config.hidden_neighbor_tokens
        sees_front = (positions >= self.config.chunk_size - 1)[..., None] & is_seen  # [1, T, length]
        whole = torch.ones(length + row_length, length + row_length, dtype=torch.bool, device=tokens.device).tril()
        try:
            # The last token is a decoding step, for which decoders prepare their attention in a way of its own.
            cache, first = RetroJointCache(), max(1, row_length - 1)
            found = self(input_ids=row[:, :first], neighbor_input_ids=neighbor, past_key_values=cache).logits
            if first < row_length:
                last = self(input_ids=row[:, first:], past_key_values=cache).logits
                found = torch.cat([found, last], dim=1)
            whole[length:, :length] = sees_front[0]
            masks = {}
            for layer_type, window in layer_windows(self.config.text_config).items():
                seen = whole.clone()
                distance = positions[0, :, None] - positions[0]
                seen[length:, length:] &= distance < (window or row_length)
                masks[layer_type] = self._convert_mask(seen[None, None])
            expected = self.decoder(
                input_ids=tokens,
                attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
                position_ids=torch.cat([torch.arange(-length, 0, device=tokens.device)[None], positions], dim=1),
                use_cache=False,
            ).logits[:, length:]
            shifted = self.decoder(input_ids=row, position_ids=positions + 3, use_cache=False).logits
            plain = self.decoder(input_ids=row, position_ids=positions, use_cache=False).logits
        except (IndexError, RuntimeError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"a {self.config.text_config.model_type!r} model cannot read neighbors with its own attention: "
                f"{type(error).__name__}: {error}"
            ) from error
        tolerance = 1e-3 if self.decoder.dtype in (torch.float32, torch.float64) else 0.1
        for name, left, right in (
            ("its positions are absolute, so that keys in front of a row cannot be read", shifted, plain),
            ("its layers keep more of a sequence than keys and values", found, expected),
        ):
            difference = (left - right).double().norm() / right.double().norm()
            if not difference < tolerance:
                raise ValueError(
                    f"a {self.config.text_config.model_type!r} model cannot read neighbors with its own attention: "
                    f"{name} (relative difference of logits {float(difference):.2g})"
                )


def make_contiguous(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """
    Lets a head read a copy of the last states of the rows, which `logits_to_keep` cuts out of all states. For such a
    part of a tensor PyTorch copies the weights of a frozen head once for each row.
    """
    return (args[0].contiguous(), *args[1:])


def layer_windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """The length of the sliding window for each type of layers of a decoder, `None` for full attention."""
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        layer_types = ["full_attention" if window is None else "sliding_attention"]
    return {
        layer_type: window if layer_type == "sliding_attention" else None for layer_type in sorted(set(layer_types))
    }


def check_decoder(decoder: PreTrainedModel, config: RetroJointConfig) -> None:
    """
    Refuses decoders that cannot read neighbors with their own attention.

    Args:
        decoder (`PreTrainedModel`): The decoder.
        config ([`RetroJointConfig`]): Config of the model that will wrap it.

    Raises:
        ValueError: If the decoder cannot be wrapped. The message gives the reason.
    """
    base = decoder.config.get_text_config()
    windows = layer_windows(base)
    parameters = inspect.signature(decoder.forward).parameters
    reasons = []
    if decoder.config.is_encoder_decoder:
        reasons.append("it has an encoder of its own")
    if decoder._is_stateful or set(windows) - {"full_attention", "sliding_attention"}:
        kinds = sorted(set(windows) - {"full_attention", "sliding_attention"}) or "recurrent layers"
        reasons.append(f"not all of its layers are attention over keys and values ({kinds})")
    if "position_ids" not in parameters or "past_key_values" not in parameters:
        reasons.append("its forward takes no `position_ids` or no `past_key_values` (absolute or no positions)")
    window = min((window for window in windows.values() if window is not None), default=None)
    # CODEPATH: decoders with sliding windows, such as Mistral and Gemma, also read neighbors through them.
    if window is not None and window < config.neighbor_length:
        reasons.append(
            f"its sliding window ({window}) is shorter than a neighbor ({config.neighbor_length} tokens); take a "
            "smaller `chunk_size` or `continuation_chunks`"
        )
    if reasons:
        raise ValueError(
            f"a {decoder.config.model_type!r} model cannot read neighbors with its own attention: {'; '.join(reasons)}"
        )


__all__ = ["RetroJointForCausalLM", "RetroJointPreTrainedModel"]
