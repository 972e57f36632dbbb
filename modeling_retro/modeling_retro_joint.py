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
from .attention_retro import PREFIX, AttentionLayout, has_kernels, register_attention
from .chunk_layout_retro import TokenLocations, locate_call, take_columns, token_mask
from .configuration_retro_joint import RetroJointConfig
from .generation_retro import PROVENANCE_FIELDS, RetroGenerationMixin, check_cache, check_neighbors
from .joint_cache_retro import RetroJointCache
from .joint_layout_retro import (
    RowStates,
    make_neighbor_part,
    make_row_mask,
    make_row_parts,
    mask_of_states,
    plan_states,
)
from .loss_retro import causal_lm_loss
from .model_hub_retro import RetroSharingMixin
from .neighbor_memory_retro import LayerStates, NeighborMemory, NeighborStates
from .neighbors_retro import Neighbors
from .reader_adapters_retro import NEIGHBOR_ADAPTER, ROW_ADAPTER, ReaderAdapters, is_adapter_weight


# Number of neighbors that the decoder reads in one pass.
ENCODING_BATCH_SIZE = 32
MEMORY_BYTES = 1 << 30


class NeighborPrefix(Cache):
    """
    Stands in for an empty cache: puts keys and values of neighbors in front of those of the row, and keeps only the
    latter, in the cache that it stands for.
    """

    def __init__(self, key_values: LayerStates, cache: Cache | None):
        super().__init__(layers=[])
        self.key_values, self.cache = key_values, cache

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the row `(B, Hkv, T, D)`, with those of the neighbors in front."""
        if self.cache is not None:
            key_states, value_states = self.cache.update(key_states, value_states, layer_idx, *args, **kwargs)
        keys, values = (x.to(key_states.device, key_states.dtype) for x in self.key_values[layer_idx])
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of cached tokens, which is 0."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the mask, which covers only the row."""
        return query_length, 0


class RereadTokens(Cache):
    """
    Stands in for a filled cache while some tokens of some rows are read again: their keys and values replace those
    that the cache has.
    """

    def __init__(self, cache: RetroJointCache, rows: torch.LongTensor, columns: torch.LongTensor):
        super().__init__(layers=[])
        self.cache, self.rows, self.columns = cache, rows, columns

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of neighbors and row `(n, Hkv, F + N, D)` for the n rows that are read again."""
        return self.cache.replace_columns(key_states, value_states, layer_idx, self.rows, self.columns)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of cached tokens."""
        return self.cache.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the mask, which covers only the row."""
        return self.cache.get_seq_length(layer_idx), 0


class _Gradients(torch.autograd.Function):
    """Passes the embeddings of the row on; the gradients that the states of neighbors have gathered go back."""

    @staticmethod
    def forward(ctx, leaves: list[torch.Tensor], embeds: torch.Tensor, *states: torch.Tensor) -> torch.Tensor:
        ctx.leaves = leaves
        return embeds.clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return None, grad, *(leaf.grad for leaf in ctx.leaves)


@dataclass
class Front:
    """
    Neighbors that have been read, and who sees them.

    Args:
        read ([`NeighborStates`]):
            Their keys and values, in slots.
        seen (`torch.BoolTensor` of shape `(batch_size, num_slots, k, neighbor_length)`):
            True for the tokens that a row may see.
        slot (`torch.LongTensor` of shape `(batch_size, W)`):
            The slot that each state of a call sees; `num_slots` if it sees none.
    """

    read: NeighborStates
    seen: torch.BoolTensor
    slot: torch.LongTensor

    def sees(self) -> torch.BoolTensor:
        """Which states see which tokens, `(B, W, S k r)`."""
        slots = torch.arange(self.seen.shape[1], device=self.seen.device)
        slots = slots.repeat_interleave(self.seen[0, 0].numel())
        return (self.slot[..., None] == slots) & self.seen.flatten(1)[:, None]


@dataclass
class JointCall:
    """The arguments of a forward pass."""

    input_ids: torch.LongTensor | None  # [B, T]
    inputs_embeds: torch.Tensor | None  # [B, T, d]
    attention_mask: torch.Tensor | None  # [B, N] or [B, 1, T, N]
    position_ids: torch.LongTensor | None  # [B, T]
    past_key_values: Cache | None
    labels: torch.LongTensor | None  # [B, T]
    logits_to_keep: int | torch.Tensor
    options: dict[str, Any]
    passages: Neighbors | None = None  # [B, 1, k, r], of a question
    in_order: bool = False  # whether the passages are one text

    @property
    def inputs(self) -> torch.Tensor:
        """`torch.Tensor`: the tokens, or their embeddings if only these are known."""
        return self.input_ids if self.input_ids is not None else self.inputs_embeds

    @property
    def cache(self) -> RetroJointCache | None:
        """[`RetroJointCache`] or `None`: the cache, if it can hold the state of retrieval."""
        return self.past_key_values if isinstance(self.past_key_values, RetroJointCache) else None

    @property
    def past_length(self) -> int:
        """`int`: Number of cached tokens."""
        return self.past_key_values.get_seq_length() if self.past_key_values is not None else 0

    @property
    def given_mask(self) -> torch.Tensor | None:
        """`torch.Tensor` or `None`: a mask over queries and keys `(B, 1, T, N)` that the caller made."""
        return self.attention_mask if self.attention_mask is not None and self.attention_mask.ndim == 4 else None

    @property
    def is_prompt(self) -> bool:
        """`bool`: Whether nothing is predicted but the next token."""
        return self.labels is None and isinstance(self.logits_to_keep, int) and self.logits_to_keep == 1

    def locate(self, chunk_size: int) -> TokenLocations:
        """Finds the places of the tokens in their documents and rows."""
        return locate_call(self.inputs, self.attention_mask, self.position_ids, self.past_length, chunk_size)

    def record_tokens(self) -> None:
        """Appends the tokens to the cache."""
        if self.cache is not None:
            unknown = self.inputs.new_full(self.inputs.shape[:2], -1, dtype=torch.long)
            self.cache.update_input_ids(unknown if self.input_ids is None else self.input_ids)

    def cut(self, start: int, end: int) -> "JointCall":
        """The call for the tokens from `start` to `end`, if those before it are cached. It has no labels."""
        length = self.inputs.shape[1]
        mask, kept = self.attention_mask, 0
        if mask is not None:
            mask = mask[..., : mask.shape[-1] - length + end]
            mask = mask[:, :, start:end] if mask.ndim == 4 else mask
        if isinstance(self.logits_to_keep, int) and self.logits_to_keep > 0 and self.labels is None:
            kept = max(1, end - max(start, length - self.logits_to_keep))
        return JointCall(
            input_ids=None if self.input_ids is None else self.input_ids[:, start:end],
            inputs_embeds=None if self.inputs_embeds is None else self.inputs_embeds[:, start:end],
            attention_mask=mask,
            position_ids=None if self.position_ids is None else self.position_ids[:, start:end],
            past_key_values=self.past_key_values,
            labels=None,
            logits_to_keep=kept,
            options=self.options,
        )


@auto_docstring
class RetroJointPreTrainedModel(PreTrainedModel):
    config: RetroJointConfig
    base_model_prefix = "decoder"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
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
        self._parts_work: bool | None = None  # not known before the decoder was tried

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
            try:
                from modeling_retro.sharing.readers import Reader
            except ImportError as error:
                raise ImportError(f"`reader` needs the package ({error}): `pip install retro-transformers`") from error
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

    def generate(
        self,
        *args,
        question_input_ids: torch.LongTensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
        num_passages: int | None = None,
        **kwargs,
    ):
        """
        Generates as [`~RetroGenerationMixin.generate`] does, and answers questions: a question is looked up by its own
        text, and what is found stays in sight of the whole prompt and of its answer. The chunks of the answer are
        looked up as ever; those of the prompt are not.

        Args:
            question_input_ids (`torch.LongTensor` of shape `(batch_size, question_length)`, *optional*):
                The text to look up, of any length. The prompt is `input_ids`, as always.
            question_attention_mask (`torch.Tensor` of the same shape, *optional*):
                1 (or True) for real tokens. By default all tokens are real.
            num_passages (`int`, *optional*):
                Number of passages of a question. Defaults to `num_neighbors` of the configuration.
            kwargs:
                Also `passages` (`"apart"` or `"in_order"`), see [`~RetroJointForCausalLM.forward`]. A caller that has
                looked up the question itself passes `passage_input_ids` and `passage_attention_mask`.

        Returns:
            With `return_dict_in_generate=True` and a retriever that knows them, the output also has
            `passage_chunk_ids`, `passage_document_ids` and `passage_scores` of shape `(num_sequences, k)`.

        Raises:
            ValueError: If a question is given to a model that looks up nothing.
        """
        if question_input_ids is None:
            return super().generate(*args, **kwargs)
        if not self.is_retrieving:
            raise ValueError("a question is to be looked up, but the model has no retriever, or it is switched off")
        if question_attention_mask is None:
            question_attention_mask = torch.ones_like(question_input_ids)
        number = self.config.num_neighbors if num_passages is None else num_passages
        found = self.retriever.retrieve(question_input_ids, number, attention_mask=question_attention_mask)
        kwargs["passage_input_ids"] = found.neighbor_input_ids.to(self.device)
        kwargs["passage_attention_mask"] = found.neighbor_attention_mask.to(self.device)
        outputs = super().generate(*args, **kwargs)
        if not isinstance(outputs, torch.Tensor):
            repeats = len(outputs.sequences) // len(question_input_ids)
            for name in PROVENANCE_FIELDS:
                if (values := getattr(found, name, None)) is not None:
                    outputs[f"passage_{name}"] = values.repeat_interleave(repeats, dim=0)
        return outputs

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
        passage_input_ids: torch.LongTensor | None = None,
        passage_attention_mask: torch.Tensor | None = None,
        passages: str = "apart",
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
        passage_input_ids (`torch.LongTensor` of shape `(batch_size, k, passage_length)`, *optional*):
            Tokens of the passages of a question, of at most `neighbor_length` tokens each. They are in sight of the
            whole row, but for the first token of the document, and of all that follows in the cache, beside the
            neighbors of its chunks. The chunks of such a row are looked up only from the end of a prompt on.
        passage_attention_mask (`torch.Tensor` of the same shape, *optional*):
            1 (or True) for real tokens of passages. By default all tokens are real.
        passages (`str`, *optional*, defaults to `"apart"`):
            How passages are read: `"apart"`, each by itself like a neighbor, or `"in_order"`, as one text. The model
            then computes what its decoder computes with the passages in front of the row, whose first token sees them
            too.

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
        if use_cache is None:
            use_cache = getattr(self.config.text_config.get_text_config(), "use_cache", True) and not self.training
        call = JointCall(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=RetroJointCache() if use_cache and past_key_values is None else past_key_values,
            labels=labels,
            logits_to_keep=logits_to_keep,
            options={"use_cache": use_cache, **kwargs},
            passages=check_passages(passage_input_ids, passage_attention_mask, passages, self.config.neighbor_length),
            in_order=passages == "in_order",
        )
        neighbors = self._find_neighbors(call, neighbor_input_ids, neighbor_attention_mask)
        cache = call.cache
        has_seen = cache is not None and (cache.neighbors is not None or cache.front_length > 0)
        if call.past_length > 0 and (neighbors is not None or has_seen):
            outputs = self._continue(call, neighbors)
        elif neighbors is not None or call.passages is not None:
            outputs = self._begin(call, neighbors)
        else:
            outputs = self._read_alone(call)
        others = {name: value for name, value in outputs.items() if name != "past_key_values"}
        return type(outputs)(past_key_values=call.past_key_values, **others)

    def _find_neighbors(
        self,
        call: JointCall,
        neighbor_input_ids: torch.LongTensor | None,
        neighbor_attention_mask: torch.Tensor | None,
    ) -> Neighbors | None:
        """The neighbors of a forward pass: those that are given, or else those that the model looks up."""
        if call.passages is not None:
            self._check_place_of_passages(call)
        if neighbor_input_ids is None and self.is_retrieving:
            found = self.retrieve_neighbors(
                call.input_ids,
                call.attention_mask,
                call.position_ids,
                call.past_key_values,
                # The question itself was looked up, and not the chunks of its prompt.
                first_column=0 if call.passages is None else self.prompt_length(call.inputs.shape[1]),
            )
            if found is not None:
                neighbor_input_ids, neighbor_attention_mask = found.input_ids, found.attention_mask
        neighbors = check_neighbors(
            call.inputs,
            neighbor_input_ids,
            neighbor_attention_mask,
            call.position_ids,
            call.past_key_values,
            chunk_size=self.config.chunk_size,
            cache_class=RetroJointCache,
        )
        # In training every weight stays in the graph, because training on several processes needs that.
        if neighbors is not None and not self.training and not neighbors.attention_mask.any():
            return None
        return neighbors

    def _check_place_of_passages(self, call: JointCall) -> None:
        """Raises a `ValueError` for passages that do not stand in front of one document."""
        batch_size = call.inputs.shape[0]
        if call.passages.input_ids.shape[0] != batch_size:
            raise ValueError(
                f"`passage_input_ids` has {call.passages.input_ids.shape[0]} rows, expected those of the call, "
                f"{batch_size}"
            )
        if call.past_length > 0:
            raise ValueError(
                f"passages stand in front of a row, but {call.past_length} of its tokens are cached: give them in the "
                "first call, after which the cache keeps them in sight"
            )
        check_cache(call.past_key_values, RetroJointCache)
        if self._is_packed(call.inputs, call.attention_mask, call.position_ids, call.past_key_values):
            raise ValueError("passages belong to one question, but the row holds several documents: give one each")

    def _read_alone(self, call: JointCall) -> CausalLMOutputWithPast:
        """A call without neighbors, which is that of the decoder."""
        attention_mask, position_ids = call.attention_mask, call.position_ids
        if self._is_packed(call.inputs, attention_mask, position_ids, call.past_key_values):
            locations = call.locate(self.config.chunk_size)
            attention_mask, position_ids = self._make_masks(locations, call.given_mask), locations.document_index
        call.record_tokens()
        return self._decode(
            input_ids=call.input_ids,
            inputs_embeds=call.inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=call.past_key_values,
            labels=call.labels,
            logits_to_keep=call.logits_to_keep,
            **call.options,
        )

    def _begin(self, call: JointCall, neighbors: Neighbors | None) -> CausalLMOutputWithPast:
        """A call with neighbors or passages and without cached tokens."""
        locations, cache, size = call.locate(self.config.chunk_size), call.cache, self.config.chunk_size
        fronts = []
        present = locations.mask.new_zeros(len(locations.mask), 0)
        if neighbors is not None:
            seen = neighbors.seen(self.config.hidden_neighbor_tokens)  # [B, S, k, r]
            present = seen.flatten(2).any(-1)
        states = plan_states(locations, present, size, self.config.reread_tokens, call.is_prompt)
        if call.passages is not None:
            fronts.append(self._read_passages(call, locations, states))
        if neighbors is not None:
            fronts.append(Front(self.read_neighbors(neighbors), seen, states.slot))
        tokens = {"input_ids": call.input_ids, "inputs_embeds": call.inputs_embeds}
        if self._checkpoints_layers() and any(front.read.requires_grad for front in fronts):
            embeds = call.inputs_embeds if call.input_ids is None else self.get_input_embeddings()(call.input_ids)
            tokens = {"input_ids": None, "inputs_embeds": _gather_gradients(fronts, embeds)}
        keep = call.logits_to_keep
        if states.num_again > 0:
            tokens = {name: None if x is None else take_columns(x, states.columns) for name, x in tokens.items()}
            # The states of tokens that are read again stand in front and predict nothing.
            keep = keep + states.num_again if isinstance(keep, torch.Tensor) else keep or call.inputs.shape[1]
        call.record_tokens()
        outputs = self._decode(
            **tokens,
            **self._attention_inputs(call, locations, states, fronts),
            position_ids=locations.document_index.gather(1, states.columns),
            labels=call.labels,
            logits_to_keep=keep,
            gate=torch.stack([front.slot < front.seen.shape[1] for front in fronts]).any(0),
            **call.options,
        )
        if cache is not None:
            cache.uncropped_length = 0
            if states.num_again > 0:
                cache.keep_states(states.final)
            cache.update_neighbors(neighbors, locations.first_slot[:, 0], locations.mask.shape[1] // size)
            self._keep_in_sight(cache, fronts, call.passages is not None, states.next_slot)
        if states.num_again > 0 and outputs.hidden_states is not None:
            outputs.hidden_states = tuple(x[:, states.num_again :] for x in outputs.hidden_states)
        return outputs

    def _read_passages(self, call: JointCall, locations: TokenLocations, states: RowStates) -> Front:
        """Reads the passages of a question, which all tokens see but the first of the document."""
        passages = call.passages.in_order() if call.in_order else call.passages
        seen = passages.seen(0 if call.in_order else self.config.hidden_neighbor_tokens)  # [B, 1, k, r]
        sees = locations.is_token & seen.flatten(1).any(-1, keepdim=True)
        if not call.in_order:
            sees &= (locations.document_index > 0) & (locations.row_index > 0)
        sees = sees.gather(1, states.columns) & ~states.is_filler
        return Front(self.read_neighbors(passages), seen, torch.where(sees, 0, 1))

    def _keep_in_sight(
        self, cache: RetroJointCache, fronts: list[Front], has_passages: bool, next_slot: torch.LongTensor
    ) -> None:
        """Puts in front of the cached row what its next token sees."""
        nothing = next_slot.new_zeros(len(next_slot), 0, dtype=torch.bool)
        cache.set_front([], nothing, nothing)
        if has_passages:
            key_values, mask = fronts[0].read.take(torch.zeros_like(next_slot), fronts[0].seen)
            cache.set_front(key_values, mask, torch.ones_like(mask))
        if len(fronts) > int(has_passages):
            cache.add_front(*fronts[-1].read.take(next_slot, fronts[-1].seen))

    def _attention_inputs(
        self, call: JointCall, locations: TokenLocations, states: RowStates, fronts: list[Front]
    ) -> dict[str, Any]:
        """What the attention of the decoder needs in a call without cached tokens: in parts, or one mask."""
        if not self._attends_in_parts():
            sees_front = torch.cat([front.sees() for front in fronts], dim=-1)  # [B, W, F]
            masks = self._make_masks(locations, call.given_mask, sees_front, states)
            layers = zip(*(front.read.gather() for front in fronts))
            key_values = [
                None if layer[0] is None else tuple(torch.cat([pair[i] for pair in layer], dim=-2) for i in (0, 1))
                for layer in layers
            ]
            return {"attention_mask": masks, "past_key_values": NeighborPrefix(key_values, call.past_key_values)}
        config = self.config.text_config
        is_plain = call.given_mask is None and (call.attention_mask is None or bool(call.attention_mask.all()))
        if call.position_ids is not None:
            is_plain = is_plain and not bool((locations.row_index > locations.document_index).any())
        neighbor_parts = [
            make_neighbor_part(front.slot, front.read.index, front.seen, self.config.chunk_size, source)
            for source, front in enumerate(fronts, start=1)
        ]
        parts, seq_len = {}, locations.document_index.shape[1]
        for window in set(layer_windows(config).values()):
            row_mask = None
            if not is_plain or (window is not None and window < seq_len):
                row_mask = self._row_mask(locations, window, call.given_mask)
            parts[window] = make_row_parts(states, row_mask, fronts[-1].seen.shape[1]) + neighbor_parts
        key_values = [front.read.key_values for front in fronts]
        layout = AttentionLayout(parts, windows_of_layers(config), key_values, self.neighbor_bias)
        # The mask is not used. One that is prepared keeps the decoder from making its own.
        prepared = locations.mask.new_ones(1, 1, 1, 1)
        return {"attention_mask": prepared, "past_key_values": call.past_key_values, "retro_attention": layout}

    def _continue(self, call: JointCall, neighbors: Neighbors | None) -> CausalLMOutputWithPast:
        """
        A call with cached tokens, of which some have seen neighbors or will. It is cut where the neighbors in sight
        change.
        """
        length, size = call.inputs.shape[1], self.config.chunk_size
        if length == 1:
            return self._step(call, neighbors)
        locations = call.locate(size)
        index = locations.document_index
        completes = locations.is_token & ((index + 1) % size == 0)  # [B, T]
        cuts = (completes | (locations.is_token & (index == 0))).any(0)
        # CODEPATH: models that read chunks again do so as soon as a chunk is complete.
        if self.config.reread_tokens > 1:
            cuts[1:] |= completes.any(0)[:-1]
        starts = sorted({0, *cuts.nonzero()[:, 0].tolist()})
        slots = locations.document_slot + (index + 1) // size - 1 - locations.first_slot  # [B, T]
        pieces = []
        for start, end in zip(starts, [*starts[1:], length]):
            own = None
            if neighbors is not None:
                own = neighbors.take(torch.where(completes[:, start], slots[:, start], -1))
                own = own if self.training or bool(own.attention_mask.any()) else None
            pieces.append(self._step(call.cut(start, end), own))
        logits = torch.cat([piece.logits for piece in pieces], dim=1)
        kept = call.logits_to_keep
        if call.labels is None and (isinstance(kept, torch.Tensor) or kept > 0):
            logits = logits[:, kept if isinstance(kept, torch.Tensor) else slice(-kept, None)]
        loss = None
        if call.labels is not None:
            vocab_size = self.config.vocab_size
            loss = self.decoder.loss_function(logits=logits, labels=call.labels, vocab_size=vocab_size, **call.options)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def _step(self, call: JointCall, neighbors: Neighbors | None) -> CausalLMOutputWithPast:
        """
        A call with cached tokens in which the neighbors in sight change at most at the first token. `neighbors` are
        those of the chunks that this token completes, with one slot.
        """
        locations, cache, size = call.locate(self.config.chunk_size), call.cache, self.config.chunk_size
        index, is_token = locations.document_index[:, 0], locations.is_token[:, 0]
        completes = is_token & ((index + 1) % size == 0)  # [B]
        if cache.front_mask is None or cache.uncropped_length > 0:
            self._restore_front(call, locations)
        cache.update_neighbors(neighbors, locations.first_slot[:, 0], locations.mask.shape[1] // size)
        cache.leave_chunk(completes | (is_token & (index == 0)))
        if neighbors is not None:
            seen = neighbors.seen(self.config.hidden_neighbor_tokens) & completes[:, None, None, None]
            read = self.read_neighbors(
                Neighbors(neighbors.input_ids, neighbors.attention_mask & seen.any(-1)[..., None])
            )
            cache.add_front(*read.take(torch.zeros_like(index), seen))
        call.record_tokens()
        front = cache.front_mask[:, None] & locations.is_token[..., None]  # [B, T, F]
        outputs = self._decode(
            input_ids=call.input_ids,
            inputs_embeds=call.inputs_embeds,
            attention_mask=self._make_masks(locations, call.given_mask, front),
            position_ids=locations.document_index,
            past_key_values=cache,
            labels=call.labels,
            logits_to_keep=call.logits_to_keep,
            gate=front.any(-1) if front.shape[2] > 0 else None,
            **call.options,
        )
        # CODEPATH: as above.
        if neighbors is not None and self.config.reread_tokens > 1:
            self._complete_chunks(call, locations, seen.flatten(1).any(-1), outputs)
        return outputs

    def _complete_chunks(
        self,
        call: JointCall,
        locations: TokenLocations,
        completes: torch.BoolTensor,
        outputs: CausalLMOutputWithPast,
    ) -> None:
        """
        Reads the last tokens of chunks again, in the rows `(B,)` that have just completed one. What follows is
        predicted from the state that the last of them has then, so it replaces that in `outputs`.
        """
        rows = completes.nonzero()[:, 0]
        if len(rows) == 0:
            return
        back = torch.arange(self.config.reread_tokens - 1, -1, -1, device=rows.device)
        again = self._read_again(call, locations, rows, locations.row_index[rows, :1] - back)
        logits = outputs.logits.clone()
        logits[rows, -1] = again.logits[:, -1].to(logits)
        outputs.logits = logits

    def _read_again(
        self, call: JointCall, locations: TokenLocations, rows: torch.LongTensor, row_index: torch.LongTensor
    ) -> CausalLMOutputWithPast:
        """
        Reads tokens of some rows again, with the neighbors that the cache has in front, and replaces their states.

        Args:
            call ([`JointCall`]), locations ([`TokenLocations`]):
                The call and its places.
            rows (`torch.LongTensor` of shape `(n,)`):
                The rows.
            row_index (`torch.LongTensor` of shape `(n, b)`):
                Index of each token in its row, counted without padding. Those before the second token of the document
                become the second.
        """
        cache = call.cache
        if call.given_mask is not None:
            raise ValueError(
                "a 4-D mask says nothing of cached tokens, which are read again: set `reread_tokens` to 0"
            )
        index, first = locations.first_document_index[rows], locations.first_row_index[rows]
        row_index = torch.maximum(row_index, (first - index).clamp(min=0) + 1)
        columns = locations.column_of[rows].gather(1, row_index)  # [n, b]
        tokens = cache.input_ids[rows[:, None], columns]
        if (tokens < 0).any():
            raise ValueError(
                "tokens of a chunk that are known only as embeddings cannot be read again: give `input_ids`, or set "
                "`reread_tokens` to 0"
            )
        positions = index + row_index - first
        mask = locations.mask[rows, : cache.get_seq_length()]
        masks = {
            layer_type: self._convert_mask(
                torch.cat(
                    [
                        cache.front_mask[rows, None].expand(-1, columns.shape[1], -1),
                        make_row_mask(mask, positions, columns, window),
                    ],
                    dim=-1,
                )[:, None],
                cache.front_length,
            )
            for layer_type, window in layer_windows(self.config.text_config).items()
        }
        return self._decode(
            input_ids=tokens,
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            position_ids=positions,
            past_key_values=RereadTokens(cache, rows, columns),
            use_cache=True,
            logits_to_keep=1,
            gate=torch.ones_like(columns, dtype=torch.bool),
        )

    def _restore_front(self, call: JointCall, locations: TokenLocations) -> None:
        """
        After a crop: puts the neighbors of the last complete chunk in front again. If tokens of the incomplete one had
        been read again, they go back to the state in which they were written.
        """
        cache, size = call.cache, self.config.chunk_size
        removed = max(0, cache.uncropped_length - cache.get_seq_length())
        cache.uncropped_length = 0
        if cache.front_mask is None:
            cache.set_front([], locations.mask[:, :0], locations.mask[:, :0])
        if cache.neighbors is None:
            return
        index = locations.first_document_index[:, 0]
        cache.leave_chunk(torch.ones_like(index, dtype=torch.bool))
        neighbors = cache.neighbors.take(torch.where(index >= size, locations.first_slot[:, 0] - 1, -1))
        seen = neighbors.seen(self.config.hidden_neighbor_tokens)
        cache.add_front(*self.read_neighbors(neighbors).take(torch.zeros_like(index), seen))
        written, missing = index % size, size - index % size
        # The first token of a document was never read again.
        start = (locations.first_row_index[:, 0] - index).clamp(min=0)
        is_read = (written > 0) & (missing <= removed) & (locations.first_row_index[:, 0] - 1 > start)
        rows = is_read.nonzero()[:, 0]
        # CODEPATH: as above.
        if self.config.reread_tokens <= 1 or len(rows) == 0:
            return
        first = locations.first_row_index[rows]  # [n, 1]
        count = int(written[rows].max())
        back = torch.minimum(torch.arange(count, 0, -1, device=rows.device), written[rows, None])
        self._read_again(call, locations, rows, first - back)

    def _decode(self, gate: torch.BoolTensor | None = None, **inputs) -> CausalLMOutputWithPast:
        """
        Runs the decoder.

        Args:
            gate (`torch.BoolTensor` of shape `(batch_size, W)`, *optional*):
                Which tokens see neighbors. `None` if none does.
            inputs:
                The arguments of the decoder.
        """
        with (
            self._switched_attention(inputs),
            self._reading_cache(inputs["past_key_values"]),
            self.adapters.active(ROW_ADAPTER if gate is not None else None, gate, keep=self.training),
        ):
            return self.decoder(**inputs)

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

    def read_neighbors(self, neighbors: Neighbors) -> NeighborStates:
        """
        Computes the keys and values of neighbors in each layer of the decoder. The decoder reads each neighbor by
        itself, at the positions -r to -1 in front of a document. A neighbor that was read before is taken from
        `neighbor_memory`, unless gradients are needed.

        Args:
            neighbors ([`Neighbors`]): The neighbors, `(batch_size, num_slots, k, neighbor_length)`.

        Returns:
            [`NeighborStates`]: the keys and values of the different ones among them.
        """
        needs_gradient = torch.is_grad_enabled() and any(
            parameter.requires_grad for parameter in self._neighbor_parameters()
        )
        with torch.set_grad_enabled(needs_gradient):
            return self.neighbor_memory.read(
                neighbors.input_ids,
                neighbors.attention_mask,
                self._encode_neighbors,
                version=None if needs_gradient else self._weights_version(),
            )

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

    def _row_mask(self, locations: TokenLocations, window: int | None, given: torch.Tensor | None) -> torch.BoolTensor:
        """Which tokens of the row those of a call see, `(B, T, N)`."""
        batch_size, seq_len = locations.document_index.shape
        total_length = locations.mask.shape[1]
        columns = torch.arange(total_length - seq_len, total_length, device=locations.mask.device)
        columns = columns.expand(batch_size, -1)
        return make_row_mask(locations.mask, locations.document_index, columns, window, given)

    def _make_masks(
        self,
        locations: TokenLocations,
        given: torch.Tensor | None,
        sees_front: torch.BoolTensor | None = None,
        states: RowStates | None = None,
    ) -> torch.Tensor | BlockMask | dict[str, torch.Tensor | BlockMask] | None:
        """
        Makes the masks over the neighbors in front and the row, in the form that the attention of the decoder takes.
        If the decoder has several types of layers, there is a mask for each. A sliding window counts only the tokens
        of the row. `sees_front` is `(B, W, F)`.
        """
        masks = {}
        for layer_type, window in layer_windows(self.config.text_config).items():
            seen = self._row_mask(locations, window, given)
            if states is not None:
                seen = mask_of_states(states, seen)
            if sees_front is not None:
                seen = torch.cat([sees_front, seen], dim=-1)  # [B, W, F + N]
            seen = seen[:, None]
            if window is None and self._needs_no_mask(seen):
                return None
            masks[layer_type] = self._convert_mask(seen, 0 if sees_front is None else sees_front.shape[-1])
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _needs_no_mask(self, seen: torch.BoolTensor) -> bool:
        """
        Whether the token of a decoding step sees every key. Without a mask SDPA need not repeat the keys for the heads
        of a group. On a GPU this is not looked up, because the CPU would have to wait for the answer.
        """
        return (
            seen.shape[2] == 1
            and seen.device.type == "cpu"
            and len(layer_windows(self.config.text_config)) == 1
            and self.neighbor_bias is None
            and self.base_attention == "sdpa"
            # Some other decoders make a mask of their own if they are given none.
            and self.decoder._supports_attention_backend
            and self.decoder._can_compile_fullgraph
            and not torch.compiler.is_compiling()
            and bool(seen.all())
        )

    def _convert_mask(self, mask: torch.BoolTensor, num_neighbor_tokens: int = 0) -> torch.Tensor | BlockMask:
        implementation = self.base_attention
        has_bias = self.neighbor_bias is not None and num_neighbor_tokens > 0
        if implementation == "flex_attention" and not has_bias:
            batch_size, _, query_length, key_length = mask.shape

            def sees(batch_idx: int, head_idx: int, q_idx: int, kv_idx: int) -> torch.BoolTensor:
                return mask[batch_idx, 0, q_idx, kv_idx]

            return create_block_mask(sees, batch_size, None, query_length, key_length, device=mask.device)
        if implementation not in ("eager", "flex_attention") and not has_bias:
            return mask
        dtype = self.decoder.dtype
        scores = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        if has_bias:
            is_neighbor = torch.arange(mask.shape[-1], device=mask.device) < num_neighbor_tokens
            scores = torch.where(is_neighbor, self.neighbor_bias.to(scores), scores)
        return scores.masked_fill(~mask, torch.finfo(dtype).min)

    @property
    def base_attention(self) -> str:
        """`str`: Name of the decoder's own attention."""
        return self.decoder.config._attn_implementation.removeprefix(PREFIX)

    def _attends_in_parts(self) -> bool:
        """Whether the attention of the decoder can be put together from parts. The decoder is tried once."""
        if self.base_attention in ("eager", "flex_attention"):
            return False
        # CODEPATH: decoders with dropout in their attention, whose kernels know it, are trained through a mask.
        if self.training and getattr(self.config.text_config.get_text_config(), "attention_dropout", 0.0) > 0:
            return False
        if self._parts_work is None and not torch.compiler.is_compiling():
            self._parts_work = has_kernels(self.get_input_embeddings().weight) and self._try_parts()
        return bool(self._parts_work)

    @torch.no_grad()
    def _try_parts(self) -> bool:
        """
        Compares the last states of a short row in both ways, and those of its first tokens, which see no neighbor,
        with those of the decoder. They differ if layers change scores or do not pass on what their attention needs.
        """
        length, size = 4, self.config.chunk_size
        device = self.get_input_embeddings().weight.device
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, self.config.vocab_size, (1, length + 2 * size), generator=generator).to(device)
        row, neighbor = tokens[:, length:], tokens[:, None, None, :length]
        neighbors = Neighbors(neighbor, torch.ones_like(neighbor, dtype=torch.bool))
        call = JointCall(row, None, None, None, None, None, 0, {})
        locations, seen = call.locate(size), neighbors.seen(self.config.hidden_neighbor_tokens)
        states = plan_states(locations, seen.flatten(2).any(-1), size, self.config.reread_tokens, is_prompt=False)
        front = Front(self.read_neighbors(neighbors), seen, states.slot)

        def read(in_parts: bool | None) -> torch.Tensor:
            inputs = {"input_ids": row, "attention_mask": None, "past_key_values": None}
            if in_parts is not None:
                self._parts_work = in_parts
                inputs = self._attention_inputs(call, locations, states, [front])
                inputs |= {
                    "input_ids": take_columns(row, states.columns),
                    "position_ids": locations.document_index.gather(1, states.columns),
                }
            # The same units drop out.
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(0)
                with self._switched_attention(inputs), self._without_checkpointing():
                    hidden_states = self.decoder.base_model(**inputs, use_cache=False).last_hidden_state
            return hidden_states[:, -2 * size :].double()

        masked, plain = read(False), read(None)
        try:
            found = read(True)
        except (IndexError, RuntimeError, TypeError, KeyError, ValueError, AttributeError):
            return False
        pairs = [(found, masked), (found[:, : size - 1], plain[:, : size - 1])]
        largest = tolerance(self.decoder.dtype)
        return all(bool((one - other).norm() <= largest * other.norm()) for one, other in pairs)

    @contextmanager
    def _switched_attention(self, inputs: dict[str, Any]):
        """
        Lets the decoder attend in parts if the call has any. Other kernels than SDPA's take no mask over neighbors and
        row, so such a mask goes to SDPA. In training nothing is switched back, because checkpointed layers run again
        in the backward pass; without parts the registered attention is the decoder's own.
        """
        config, base = self.decoder.config, self.base_attention
        mask = inputs["attention_mask"]
        has_mask = isinstance(mask, dict) or (isinstance(mask, torch.Tensor) and mask.ndim == 4)
        is_other = base not in ("eager", "sdpa", "flex_attention")
        switches = "retro_attention" in inputs or (is_other and has_mask)
        if switches:
            config._attn_implementation = register_attention(base)
        try:
            yield
        finally:
            if switches and not self.training:
                config._attn_implementation = base

    def _checkpoints_layers(self) -> bool:
        return self.training and any(
            layer.gradient_checkpointing
            for layer in self.decoder.modules()
            if isinstance(layer, GradientCheckpointingLayer)
        )

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
        reread_tokens, self.config.reread_tokens = self.config.reread_tokens, 0
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
        finally:
            self.config.reread_tokens = reread_tokens
        for name, left, right in (
            ("its positions are absolute, so that keys in front of a row cannot be read", shifted, plain),
            ("its layers keep more of a sequence than keys and values", found, expected),
        ):
            difference = (left - right).double().norm() / right.double().norm()
            if not difference < tolerance(self.decoder.dtype):
                raise ValueError(
                    f"a {self.config.text_config.model_type!r} model cannot read neighbors with its own attention: "
                    f"{name} (relative difference of logits {float(difference):.2g})"
                )


def check_passages(
    input_ids: torch.LongTensor | None, attention_mask: torch.Tensor | None, passages: str, neighbor_length: int
) -> Neighbors | None:
    """
    Checks the passages of a question `(batch_size, k, passage_length)`.

    Raises:
        ValueError: For other shapes, for passages longer than a neighbor, and for an unknown way to read them.
    """
    if passages not in ("apart", "in_order"):
        raise ValueError(f"`passages` is {passages!r}, expected 'apart' or 'in_order'")
    if input_ids is None:
        return None
    if input_ids.ndim != 3 or input_ids.shape[2] > neighbor_length:
        raise ValueError(
            f"`passage_input_ids` has shape {tuple(input_ids.shape)}, expected (batch_size, k, passage_length) with "
            f"at most {neighbor_length} tokens in a passage, the length of a neighbor: give longer ones in parts"
        )
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`passage_attention_mask` has shape {tuple(attention_mask.shape)}, expected that of `passage_input_ids`, "
            f"{tuple(input_ids.shape)}"
        )
    if input_ids.numel() == 0 or not attention_mask.any():
        return None
    return Neighbors(input_ids[:, None], attention_mask[:, None].bool())


def _gather_gradients(fronts: list[Front], embeds: torch.Tensor) -> torch.Tensor:
    """
    Cuts the states of neighbors from their graph, so that checkpointed layers do not walk through it again in the
    backward pass of each. The gradients that all layers leave there go back at once, with those of the embeddings.
    """
    all_states, all_leaves = [], []
    for front in fronts:
        states = [x for pair in front.read.key_values if pair is not None for x in pair]
        leaves = [x.detach().requires_grad_() for x in states]
        pairs = iter(zip(leaves[::2], leaves[1::2]))
        key_values = [None if pair is None else next(pairs) for pair in front.read.key_values]
        front.read = NeighborStates(key_values, front.read.index)
        all_states += states
        all_leaves += leaves
    return _Gradients.apply(all_leaves, embeds, *all_states)


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


def windows_of_layers(config: PreTrainedConfig) -> list[int | None]:
    """The length of the sliding window of each layer of a decoder, `None` for full attention."""
    config = config.get_text_config()
    windows = layer_windows(config)
    layer_types = getattr(config, "layer_types", None) or list(windows) * config.num_hidden_layers
    return [windows[layer_type] for layer_type in layer_types]


def tolerance(dtype: torch.dtype) -> float:
    """The relative difference of logits below which two computations count as equal."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 0.1


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
