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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, is_peft_available

from .added_weights_retro import HUB_ARGUMENTS, RetroBaseModelMixin, checkpoint_sha256
from .configuration_retro_joint import RetroJointConfig
from .generation_retro import PROVENANCE_FIELDS, RetroGenerationMixin, check_cache, check_neighbors
from .joint_attention_retro import JointAttentionMixin, layer_windows, tolerance
from .joint_cache_retro import RetroJointCache, RetroJointStaticCache
from .joint_call_retro import JointCall, begin_before_passages, check_passages
from .joint_reading_retro import JointReadingMixin
from .loss_retro import causal_lm_loss
from .model_hub_retro import RetroSharingMixin
from .neighbor_memory_retro import NeighborMemory
from .neighbors_retro import Neighbors
from .reader_adapters_retro import ReaderAdapters, is_adapter_weight


MEMORY_BYTES = 1 << 30


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
    JointReadingMixin,
    JointAttentionMixin,
    RetroGenerationMixin,
    RetroBaseModelMixin,
    RetroSharingMixin,
    RetroJointPreTrainedModel,
    GenerationMixin,
):
    _auto_class = "AutoModelForCausalLM"  # saving copies the code along
    cache_class = RetroJointCache
    static_cache_class = RetroJointStaticCache

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
        kwargs.setdefault("trust_remote_code", False)
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
                Fields of [`RetroJointConfig`]. `reread_tokens` defaults to `chunk_size` here: whole chunks are read
                again.

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
        # Whole chunks are read again, unless the caller or the reader says otherwise.
        fields = {"reread_tokens": fields.get("chunk_size", RetroJointConfig.chunk_size), **fields}
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

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """Inside this context the model reads neighbors untrained, as before it had adapters or a bias."""
        bias, self.neighbor_bias = self.neighbor_bias, None
        try:
            with self.adapters.resting():
                yield
        finally:
            self.neighbor_bias = bias
            # What was read meanwhile must not be taken for what the adapters read.
            self.neighbor_memory.clear()

    @property
    def default_passages(self) -> str:
        """
        `str`: How the passages of a question are read by default: in order, or apart if adapters were trained to read
        neighbors, which stand apart.
        """
        # CODEPATH: readers, such as smollm2-135m-instruct, have adapters; pretrained decoders have none.
        return "in_order" if self.config.neighbor_adapter is None and self.config.row_adapter is None else "apart"

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
                Also `passages` (`"apart"` or `"in_order"`, by default [`~RetroJointForCausalLM.default_passages`]) and
                `passage_prefix_input_ids` (see [`~RetroJointForCausalLM.forward`]), which is by default the BOS token
                that the prompts of questions begin with, if they do. A caller that has looked up the question itself
                passes `passage_input_ids` and `passage_attention_mask`.

        Returns:
            With `return_dict_in_generate=True` and a retriever that knows them, the output also has
            `passage_chunk_ids`, `passage_document_ids` and `passage_scores` of shape `(num_sequences, k)`.

        Raises:
            ValueError: If a question is given to a model that looks up nothing.
        """
        is_question = question_input_ids is not None or kwargs.get("passage_input_ids") is not None
        if is_question and kwargs.get("passages") is None:
            kwargs["passages"] = self.default_passages
        given = ("passage_prefix_input_ids", "past_key_values", "position_ids")
        if is_question and all(kwargs.get(name) is None for name in given):
            prompt = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
            bos_token_id = getattr(self.config.get_text_config(), "bos_token_id", None)
            kwargs |= begin_before_passages(prompt, kwargs.get("attention_mask"), bos_token_id)
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

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Sets the decoder's head."""
        self.decoder.set_output_embeddings(new_embeddings)
        new_embeddings.register_forward_pre_hook(make_contiguous)

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
        passage_prefix_input_ids: torch.LongTensor | None = None,
        passage_prefix_attention_mask: torch.Tensor | None = None,
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
        passage_prefix_input_ids (`torch.LongTensor` of shape `(batch_size, prefix_length)`, *optional*):
            Tokens of the prompt that stand before its passages, such as those of a chat template before the text of a
            message. The row holds what follows the passages.
        passage_prefix_attention_mask (`torch.Tensor` of the same shape, *optional*):
            1 (or True) for real tokens. Padding stands on the left. By default all tokens are real.
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
            passages=check_passages(
                passage_input_ids,
                passage_attention_mask,
                (passage_prefix_input_ids, passage_prefix_attention_mask),
                passages,
                self.config,
            ),
        )
        neighbors = self._find_neighbors(call, neighbor_input_ids, neighbor_attention_mask)
        static = past_key_values if isinstance(past_key_values, RetroJointStaticCache) else None
        if static is not None and call.past_length == 0:
            call.past_key_values = RetroJointCache()  # a prompt of any length is read as ever
        cache = call.cache
        has_seen = cache is not None and (cache.neighbors is not None or cache.front_length > 0)
        if call.past_length > 0 and (neighbors is not None or has_seen):
            outputs = self._continue(call, neighbors)
        elif neighbors is not None or call.passages is not None:
            outputs = self._begin(call, neighbors)
        else:
            outputs = self._read_alone(call)
        if static is not None and cache is not static:
            static.load(cache)
            cache = static
        others = {name: value for name, value in outputs.items() if name != "past_key_values"}
        return type(outputs)(past_key_values=past_key_values if cache is None else cache, **others)

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
        """Raises a `ValueError` for passages that do not stand in front of one document, or leave it no room."""
        batch_size = call.inputs.shape[0]
        if len(call.passages.seen) != batch_size:
            raise ValueError(
                f"`passage_input_ids` has {len(call.passages.seen)} rows, expected those of the call, {batch_size}"
            )
        if call.past_length > 0:
            raise ValueError(
                f"passages stand in front of a row, but {call.past_length} of its tokens are cached: give them in the "
                "first call, after which the cache keeps them in sight"
            )
        check_cache(call.past_key_values, RetroJointCache)
        if self._is_packed(call.inputs, call.attention_mask, call.position_ids, call.past_key_values):
            raise ValueError("passages belong to one question, but the row holds several documents: give one each")
        length = torch.tensor([call.inputs.shape[1]])
        if call.attention_mask is not None and call.attention_mask.ndim == 2:
            length = call.attention_mask.sum(-1)
        in_front = call.passages.texts.attention_mask.sum(-1).flatten(1).amax(-1)  # [B]
        longest = int((in_front.to(length.device) + length).max())
        room = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if room is not None and longest > room:
            raise ValueError(
                f"a question and what is read in front of it have {longest} tokens, but there is room for {room}; "
                "ask less, pass fewer passages, or read them apart"
            )

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


def make_contiguous(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """
    Lets a head read a copy of the last states of the rows, which `logits_to_keep` cuts out of all states. For such a
    part of a tensor PyTorch copies the weights of a frozen head once for each row, and for a single row as well, which
    counts as contiguous.
    """
    states = args[0]
    return (states.flatten(0, -2).contiguous().unflatten(0, states.shape[:-1]), *args[1:])


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
