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
"""Retrieval at the ends of chunks, inside `generate()` and inside a plain forward pass"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from transformers.cache_utils import Cache
from transformers.generation import (
    CompileConfig,
    GenerationConfig,
    GenerationMode,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.utils import logging

from .cache_retro import RetrievalCache, StaticCacheMixin
from .chunk_layout_retro import completed_between, completed_chunks, default_position_ids, locate_call, locate_tokens
from .drafts_retro import DRAFT_TOKENS, DrawInTurn, NeighborDrafts, why_no_drafts
from .neighbors_retro import Neighbors, pad_to_shape


logger = logging.get_logger(__name__)


@dataclass
class LookedUpChunks:
    """
    The neighbors that a call of `generate()` has retrieved so far, found by the tokens of their chunk. With it no
    chunk is retrieved twice, even if beam search reorders rows, if candidates are rejected, or if a prefix is computed
    again without a cache.
    """

    prompt_length: int
    continues_cache: bool = True
    prompt_positions: torch.Tensor | None = None
    prompt_mask: torch.Tensor | None = None
    chunks: dict[bytes, dict[str, torch.Tensor]] = field(default_factory=dict)
    missing: list[int] | None = None
    draft_tokens: int | None = None
    drafts: NeighborDrafts | None = None

    def completes_no_chunk(self, past_length: int, seq_len: int, chunk_size: int) -> bool:
        """
        Whether it is known that the generated tokens of a call complete no chunk. This follows from their number, and
        from the positions or the padding of the prompt, which are read once. Any other way would wait for the device
        at every token.
        """
        if self.continues_cache or past_length < self.prompt_length:
            return False
        if self.missing is None:
            if self.prompt_positions is not None:
                missing = self.prompt_length - 1 - self.prompt_positions[:, -1]
            else:
                missing = torch.zeros(1) if self.prompt_mask is None else (self.prompt_mask == 0).sum(-1)
            self.missing = missing.long().unique().tolist()
        grown = past_length + seq_len
        return not any(completed_between(past_length - n, grown - n, chunk_size) for n in self.missing)


# One for each thread and task. Contexts nest, because an assistant model generates inside another generation.
_looked_up: ContextVar[LookedUpChunks | None] = ContextVar("looked_up_chunks", default=None)

PROVENANCE_FIELDS = {"chunk_ids": -1, "document_ids": -1, "scores": float("nan")}


def check_cache(past_key_values: Cache | None, cache_class: type[RetrievalCache]) -> None:
    """Raises a `ValueError` for a cache that cannot hold the state of retrieval."""
    if past_key_values is not None and not isinstance(past_key_values, cache_class):
        raise ValueError(
            f"`past_key_values` is a {type(past_key_values).__name__}, which cannot hold the state of retrieval: "
            f"pass a `{cache_class.__name__}`, or none, or switch retrieval off."
        )


def check_neighbors(
    inputs: torch.Tensor,
    neighbor_input_ids: torch.LongTensor | None,
    neighbor_attention_mask: torch.Tensor | None,
    position_ids: torch.LongTensor | None,
    past_key_values: Cache | None,
    chunk_size: int,
    cache_class: type[RetrievalCache],
) -> Neighbors | None:
    """
    Checks the shapes of the neighbors of a forward pass. No slots, no neighbors and `None` mean the same.

    Args:
        inputs (`torch.Tensor` of shape `(batch_size, seq_len, ...)`):
            Tokens or embeddings of the call.
        neighbor_input_ids (`torch.LongTensor` of shape `(batch_size, num_slots, k, neighbor_length)`, *optional*):
            Tokens of the neighbors.
        neighbor_attention_mask (`torch.Tensor` of the same shape, *optional*):
            1 (or True) for real tokens. By default all tokens are real.
        position_ids (`torch.LongTensor` of shape `(batch_size, seq_len)`, *optional*):
            Index of each token in its document.
        past_key_values (`Cache`, *optional*):
            Cache of the call.
        chunk_size (`int`):
            Number of tokens in a chunk.
        cache_class (`type`):
            Class of the caches that can hold the state of retrieval.

    Returns:
        [`Neighbors`] or `None`: the neighbors.

    Raises:
        ValueError: For other shapes, for more slots than chunks that the call can complete, and for caches of another
            class.
    """
    if neighbor_input_ids is None:
        return None
    batch_size, seq_len = inputs.shape[:2]
    if neighbor_input_ids.ndim != 4 or neighbor_input_ids.shape[0] != batch_size:
        raise ValueError(
            f"`neighbor_input_ids` has shape {tuple(neighbor_input_ids.shape)}, expected (batch_size, num_slots, "
            f"k, neighbor_length) with batch_size {batch_size}."
        )
    if neighbor_attention_mask is None:
        neighbor_attention_mask = torch.ones_like(neighbor_input_ids)
    if neighbor_attention_mask.shape != neighbor_input_ids.shape:
        raise ValueError(
            f"`neighbor_attention_mask` has shape {tuple(neighbor_attention_mask.shape)}, expected that of "
            f"`neighbor_input_ids`, {tuple(neighbor_input_ids.shape)}."
        )
    num_slots = neighbor_input_ids.shape[1]
    # With positions or a filled cache, the first tokens of the call may complete a chunk that began before them.
    is_filled = isinstance(past_key_values, cache_class) and past_key_values.get_seq_length() > 0
    max_slots = -(-seq_len // chunk_size) if is_filled or position_ids is not None else seq_len // chunk_size
    if num_slots > max_slots:
        raise ValueError(
            f"`neighbor_input_ids` has {num_slots} slots, but {seq_len} tokens complete at most {max_slots} "
            f"chunks of {chunk_size}."
        )
    if neighbor_input_ids.numel() == 0:
        return None
    check_cache(past_key_values, cache_class)
    return Neighbors(neighbor_input_ids, neighbor_attention_mask.bool())


class RetroGenerationMixin:
    """
    Makes a RETRO model look up neighbors by itself. Its retriever is any object with a method
    `retrieve(chunk_input_ids, k)`, which takes a `torch.LongTensor` of shape `(n, chunk_size)`. The method returns an
    object with `neighbor_input_ids` (`torch.LongTensor` of shape `(n, k, neighbor_length)`) and
    `neighbor_attention_mask` of the same shape. If they are known, the object also has `scores`, `chunk_ids` and
    `document_ids` of shape `(n, k)`. The retriever may have a method `check_model(config)` that raises a `ValueError`
    for a model that cannot use it. A model names its classes of caches.
    """

    cache_class: type[RetrievalCache]
    static_cache_class: type[StaticCacheMixin]

    @classmethod
    def from_pretrained(cls, *args, retriever: Any = None, **kwargs) -> Self:
        """
        Loads a model as [`~transformers.PreTrainedModel.from_pretrained`] does.

        Args:
            retriever (*optional*):
                The object that looks up neighbors for the model (see [`~RetroGenerationMixin.set_retriever`]).
                `"auto"` opens the datastore that the configuration names, which needs `datasets` and `faiss`.

        Raises:
            ValueError: If the retriever is `"auto"` and the configuration names no datastore.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(retriever, str):
            hub_arguments = {
                name: kwargs[name] for name in ("token", "cache_dir", "local_files_only") if name in kwargs
            }
            retriever = model.open_retriever(retriever, **hub_arguments)
        model.set_retriever(retriever)
        return loaded

    def open_retriever(self, retriever: str = "auto", **hub_kwargs) -> Any:
        """
        The retriever over the datastore that the configuration names. `hub_kwargs`, such as `token`, go to the Hub.
        """
        if retriever != "auto":
            raise ValueError(f"`retriever` is {retriever!r}, expected a retriever or 'auto'.")
        if self.config.datastore_name_or_path is None:
            raise ValueError(
                "The model names no datastore for retriever='auto': pass a retriever, or set "
                "`config.datastore_name_or_path`."
            )
        # A saved model brings its own code, but not that of retrieval.
        try:
            from modeling_retro.datastore.datastore import RetroDatastore
            from modeling_retro.retriever.retriever import RetroRetriever
        except ImportError as error:
            raise ImportError(
                f"retriever='auto' needs the package ({error}): `pip install retro-transformers[cpu]`"
            ) from error

        name, revision = self.config.datastore_name_or_path, self.config.datastore_revision
        if "://" in name:
            raise ValueError(
                f"The model names the address {name!r} as its datastore, and a model may name only a folder or an id "
                "on the Hub. If you trust the address, pass `retriever=RetroRetriever.from_pretrained(address)`."
            )
        logger.warning(f"opening the datastore {name!r}, which the model names")
        return RetroRetriever(RetroDatastore.from_pretrained(name, revision=revision, **hub_kwargs))

    def set_retriever(self, retriever: Any) -> None:
        """
        Sets the object that looks up neighbors. With `None` the model runs without retrieval (OFF).

        Raises:
            ValueError: If the retriever cannot serve the model, such as a [`RetroRetriever`] over a datastore of
                another tokenizer or chunk size.
        """
        check = getattr(retriever, "check_model", None)  # simple retrievers have none
        if check is not None:
            check(self.config)
        self.retriever = retriever
        self.retrieval_enabled = True

    @contextmanager
    def retrieval(self, enabled: bool) -> Iterator[None]:
        """Switches retrieval on or off inside a `with` block; `with model.retrieval(False):` is RETRO OFF."""
        before = self.retrieval_enabled
        self.retrieval_enabled = enabled
        try:
            yield
        finally:
            self.retrieval_enabled = before

    @property
    def default_passages(self) -> str:
        """`str`: How the passages of a question are read by default, which is each apart."""
        return "apart"

    @property
    def is_retrieving(self) -> bool:
        """`bool`: Whether a forward pass without neighbors looks them up. In training it never does."""
        return (
            self.retriever is not None
            and self.retrieval_enabled
            and not self.training
            and self.config.num_neighbors > 0
        )

    @staticmethod
    def prompt_length(default: int) -> int:
        """Number of tokens of the prompt inside `generate()`; outside of it, `default`."""
        memory = _looked_up.get()
        return default if memory is None else memory.prompt_length

    @torch.no_grad()
    def retrieve_neighbors(
        self,
        input_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        first_column: int = 0,
    ) -> Neighbors | None:
        """
        Looks up the neighbors of the chunks that these tokens complete, with at most one call of the retriever.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, seq_len)`, *optional*):
                Tokens of this call. With `None`, as in a call with embeddings, nothing is retrieved.
            attention_mask (`torch.Tensor` of shape `(batch_size, past_length + seq_len)`, *optional*):
                0 for padding.
            position_ids (`torch.LongTensor` of shape `(batch_size, seq_len)`, *optional*):
                Index of each token in its document.
            past_key_values ([`RetrievalCache`], *optional*):
                Cache with the earlier tokens.
            first_column (`int`, *optional*, defaults to 0):
                Chunks that end before this column, counted from the first cached one, get no neighbors.

        Returns:
            [`Neighbors`] or `None`: the neighbors for `forward`.
        """
        if input_ids is None:
            return None
        check_cache(past_key_values, self.cache_class)
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        memory = _looked_up.get()
        if memory is not None and memory.completes_no_chunk(past_length, input_ids.shape[1], self.config.chunk_size):
            return None
        locations = locate_call(input_ids, attention_mask, position_ids, past_length, self.config.chunk_size)
        rows, slots, columns = completed_chunks(locations, self.config.chunk_size)
        if past_length > 0:
            input_ids = torch.cat([past_key_values.input_ids, input_ids], dim=1)
        chunks = input_ids[rows[:, None], columns.clamp(min=0)]  # [n, m]
        wanted = ((chunks >= 0) & (columns >= 0)).all(-1) & (columns[:, -1] >= first_column)
        rows, slots, chunks = rows[wanted], slots[wanted], chunks[wanted]
        if rows.shape[0] == 0:
            return None

        found = self._look_up(chunks.cpu())
        neighbor_input_ids = torch.stack([chunk["neighbor_input_ids"] for chunk in found])  # [n, k, r]
        neighbor_attention_mask = torch.stack([chunk["neighbor_attention_mask"] for chunk in found])
        shape = (input_ids.shape[0], int(slots.max()) + 1, *neighbor_input_ids.shape[1:])
        all_ids = input_ids.new_zeros(shape)
        all_masks = torch.zeros(shape, dtype=torch.bool, device=input_ids.device)
        all_ids[rows, slots] = neighbor_input_ids.to(all_ids)
        all_masks[rows, slots] = neighbor_attention_mask.to(all_masks)
        return Neighbors(all_ids, all_masks)

    @torch.compiler.disable  # a search is no part of a graph
    def _look_up(self, chunks: torch.LongTensor) -> list[dict[str, torch.Tensor]]:
        """The neighbors of each of `chunks` `(n, m)`. Chunks that the memory knows are not retrieved again."""
        memory = _looked_up.get()
        known = memory.chunks if memory is not None else {}
        keys = [chunk.tobytes() for chunk in chunks.numpy()]
        missing = {key: row for row, key in enumerate(keys) if key not in known}
        if missing:
            retrieved = self.retriever.retrieve(chunks[list(missing.values())], self.config.num_neighbors)
            shape = retrieved.neighbor_input_ids.shape
            if len(shape) != 3 or shape[0] != len(missing) or retrieved.neighbor_attention_mask.shape != shape:
                raise ValueError(
                    f"The retriever returned `neighbor_input_ids` of shape {tuple(shape)} and "
                    f"`neighbor_attention_mask` of shape {tuple(retrieved.neighbor_attention_mask.shape)} for "
                    f"{len(missing)} chunks, expected ({len(missing)}, k, neighbor_length) twice."
                )
            # A retriever need not know where its neighbors come from.
            fields = {name: getattr(retrieved, name, None) for name in PROVENANCE_FIELDS}
            fields |= {name: getattr(retrieved, name) for name in ("neighbor_input_ids", "neighbor_attention_mask")}
            for row, key in enumerate(missing):
                known[key] = {name: value[row] for name, value in fields.items() if value is not None}
        return [known[key] for key in keys]

    def generate(self, *args, draft_tokens: int | None = None, **kwargs) -> Any:
        """
        Generates as [`~transformers.GenerationMixin.generate`] does. Whenever a row completes a chunk, the neighbors
        of the chunk are looked up, and the token that completed the chunk already uses them. If `neighbor_input_ids`
        is given, it holds the neighbors of the chunks of the prompt. The neighbors of later chunks come from the
        retriever, if there is one.

        Args:
            draft_tokens (`int`, *optional*):
                Largest number of tokens that are drafted from the neighbors and the row, and confirmed by one step.
                Drafts change no token of greedy search, and none that a seed draws. With 0 there are none. By default
                there are up to 16 where they can be had: for one row with neighbors, without beams, and in float32 or
                float64, because in 16 bits a step of several tokens may round differently.

        Returns:
            With `return_dict_in_generate=True` and a retriever that knows them, the output also has
            `retrieved_chunk_ids`, `retrieved_document_ids` (`torch.LongTensor`, -1 where absent) and
            `retrieved_scores` (`torch.FloatTensor`, NaN where absent) of shape `(num_sequences, num_chunks, k)`. If
            there were drafts, it has `num_steps`, the number of forward passes.

        Raises:
            ValueError: If a row of the prompt is padded on the right, and if `draft_tokens` is given where there can
                be no drafts.
        """
        if draft_tokens is not None and draft_tokens < 0:
            raise ValueError(f"`draft_tokens` is {draft_tokens}, expected a number of tokens, 0 for no drafts")
        prompt = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        memory = LookedUpChunks(
            prompt_length=prompt.shape[1] if prompt is not None else 0,
            continues_cache=prompt is None or kwargs.get("past_key_values") is not None,
            prompt_positions=kwargs.get("position_ids"),
            draft_tokens=draft_tokens,
        )
        token = _looked_up.set(memory)
        try:
            outputs = super().generate(*args, **kwargs)
        finally:
            _looked_up.reset(token)
        if not isinstance(outputs, torch.Tensor) and prompt is not None:
            self._add_provenance(outputs, memory)
        if not isinstance(outputs, torch.Tensor) and memory.drafts is not None:
            outputs["num_steps"] = memory.drafts.num_steps
        return outputs

    def _sample(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        **kwargs,
    ) -> Any:
        """Greedy search and sampling, with drafts where these can be had."""
        memory, arguments = _looked_up.get(), (input_ids, logits_processor, stopping_criteria, generation_config)
        wanted = None if memory is None else memory.draft_tokens
        obstacle = why_no_drafts(*arguments, synced_gpus, kwargs)
        if wanted and obstacle is not None:
            raise ValueError(f"`draft_tokens` is {wanted}, but there can be no drafts: {obstacle}")
        passages = kwargs.get("passage_input_ids")
        if wanted is None:
            reads = self.is_retrieving or kwargs.get("neighbor_input_ids") is not None or passages is not None
            wanted = DRAFT_TOKENS if reads and memory is not None and self.dtype.itemsize >= 4 else 0
        if not wanted or obstacle is not None:
            return super()._sample(*arguments, synced_gpus=synced_gpus, **kwargs)
        memory.drafts = NeighborDrafts(
            kwargs["past_key_values"],
            self.config.chunk_size,
            num_missing=input_ids.shape[1] - 1 - int(kwargs["position_ids"][0, -1]),
            max_length=generation_config.max_length,
            longest=wanted,
            stopping_criteria=stopping_criteria,
            passages=passages,
            passage_mask=kwargs.get("passage_attention_mask"),
        )
        if generation_config.do_sample:
            # The last processor draws, and the library takes what it has drawn.
            logits_processor = LogitsProcessorList([*logits_processor, DrawInTurn()])
            generation_config = copy.copy(generation_config)
            generation_config.do_sample = False
        return self._assisted_decoding(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)

    def _get_candidate_generator(self, *args, **kwargs) -> CandidateGenerator:
        memory = _looked_up.get()
        if memory is not None and memory.drafts is not None:
            return memory.drafts
        return super()._get_candidate_generator(*args, **kwargs)

    def _add_provenance(self, outputs: Any, memory: LookedUpChunks) -> None:
        sequences = outputs.sequences.cpu()
        num_sequences, length = sequences.shape

        def of_prompt(values: torch.Tensor) -> torch.Tensor:
            # Each row of the prompt is repeated for its beams.
            return values.cpu()[torch.arange(num_sequences) * values.shape[0] // num_sequences]

        mask = torch.ones(num_sequences, length, dtype=torch.bool)
        if memory.prompt_mask is not None:
            mask[:, : memory.prompt_length] = of_prompt(memory.prompt_mask).bool()
        position_ids = default_position_ids(sequences, mask, 0)
        if memory.prompt_positions is not None:
            given = of_prompt(memory.prompt_positions)
            later = given[:, -1:] + torch.arange(1, length - given.shape[1] + 1)
            position_ids = torch.cat([given, later], dim=1)
        chunk_size = self.config.chunk_size
        rows, slots, columns = completed_chunks(locate_tokens(position_ids, mask, chunk_size), chunk_size)
        keys = [chunk.tobytes() for chunk in sequences[rows[:, None], columns.clamp(min=0)].numpy()]
        for name, absent in PROVENANCE_FIELDS.items():
            known = [(n, memory.chunks[key][name]) for n, key in enumerate(keys) if name in memory.chunks.get(key, {})]
            if not known:
                continue
            index = torch.tensor([n for n, _ in known])
            values = torch.stack([value.cpu() for _, value in known])  # [n, k]
            shape = (num_sequences, int(slots.max()) + 1, values.shape[1])
            provenance = torch.full(shape, absent, dtype=values.dtype)
            provenance[rows[index], slots[index]] = values
            outputs[f"retrieved_{name}"] = provenance

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        neighbor_input_ids: torch.LongTensor | None = None,
        neighbor_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> dict[str, Any]:
        """Gives forward the neighbors of the prompt's chunks. It looks up those of later chunks by itself."""
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        memory = _looked_up.get()
        if memory is not None and memory.prompt_mask is None and attention_mask is not None:
            if attention_mask.ndim == 2 and not attention_mask[:, -1].all():
                raise ValueError(
                    "The prompt is padded on the right, so that its next token would be predicted from padding: pad "
                    "on the left, as with `padding_side='left'` of the tokenizer."
                )
            memory.prompt_mask = attention_mask[:, : memory.prompt_length]
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            # The cache has the passages of a question.
            model_inputs = {name: value for name, value in model_inputs.items() if not name.startswith("passage_")}
        if neighbor_input_ids is None or not (is_first_iteration or past_key_values is None):
            return model_inputs

        if neighbor_attention_mask is None:
            neighbor_attention_mask = torch.ones_like(neighbor_input_ids)
        neighbors = Neighbors(neighbor_input_ids, neighbor_attention_mask.bool())
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            neighbors = self._skip_cached_chunks(neighbors, model_inputs)
        if self.is_retrieving:
            # The call may also hold later chunks: those of candidates, or all of them if there is no cache.
            later = self.retrieve_neighbors(
                model_inputs["input_ids"],
                attention_mask,
                model_inputs.get("position_ids"),
                past_key_values,
                first_column=memory.prompt_length if memory is not None else input_ids.shape[1],
            )
            if later is not None:
                shape = [max(sizes) for sizes in zip(later.input_ids.shape, neighbors.input_ids.shape)]
                (ids, mask), (later_ids, later_mask) = (
                    (pad_to_shape(value.input_ids, shape), pad_to_shape(value.attention_mask, shape))
                    for value in (neighbors, later)
                )
                is_later = later_mask.any(-1, keepdim=True).any(-2, keepdim=True)
                neighbors = Neighbors(torch.where(is_later, later_ids, ids), torch.where(is_later, later_mask, mask))
        model_inputs["neighbor_input_ids"] = neighbors.input_ids
        model_inputs["neighbor_attention_mask"] = neighbors.attention_mask
        return model_inputs

    def _skip_cached_chunks(self, neighbors: Neighbors, model_inputs: dict[str, Any]) -> Neighbors:
        """Drops the neighbors of chunks that the cache already holds, if a prompt continues a cache."""
        tokens = model_inputs.get("input_ids")
        tokens = model_inputs["inputs_embeds"] if tokens is None else tokens
        past_length, chunk_size = model_inputs["past_key_values"].get_seq_length(), self.config.chunk_size
        locations = locate_call(
            tokens, model_inputs.get("attention_mask"), model_inputs.get("position_ids"), past_length, chunk_size
        )
        slots = range(-(-tokens.shape[1] // chunk_size))
        kept = [neighbors.take(locations.first_slot[:, 0] + slot) for slot in slots]
        return Neighbors(
            torch.cat([one.input_ids for one in kept], dim=1), torch.cat([one.attention_mask for one in kept], dim=1)
        )

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ) -> None:
        memory, modes = _looked_up.get(), (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        if memory is not None and memory.draft_tokens and generation_mode not in modes:
            raise ValueError(
                f"`draft_tokens` is {memory.draft_tokens}, but drafts are for greedy search and sampling, and this is "
                f"{generation_mode.value.replace('_', ' ')}"
            )
        is_given = model_kwargs.get("past_key_values") is not None
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        if is_given or model_kwargs.get("past_key_values") is None:
            return
        implementation = generation_config.cache_implementation
        if implementation in (None, "dynamic", "offloaded"):
            offloading = implementation == "offloaded"
            model_kwargs["past_key_values"] = self.cache_class(config=self.config, offloading=offloading)
        kinds = ("neighbor", "passage", "passage_prefix")
        neighbors, passages, prefix = (model_kwargs.get(f"{kind}_input_ids") for kind in kinds)
        room = self.config.num_neighbors * self.config.neighbor_length if self.is_retrieving else 0
        room = max(room, 0 if neighbors is None else neighbors.shape[2] * neighbors.shape[3])
        room += 0 if passages is None else passages.shape[1] * passages.shape[2]
        room += 0 if prefix is None else prefix.shape[1]
        if implementation != "static" or room == 0:
            return
        wanted, compile_config = generation_config.compile_config, None
        compiles_here = self.device.type != "cpu" or (wanted is not None and wanted._compile_all_devices)
        if compiles_here and not generation_config.disable_compile:
            compile_config = wanted or CompileConfig()
        max_length = max(max_cache_length, generation_config.max_cache_len or 0)
        model_kwargs["past_key_values"] = self.static_cache_class(room, max_length, compile_config)


__all__ = ["RetroGenerationMixin"]
