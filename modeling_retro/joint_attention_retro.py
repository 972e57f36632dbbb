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
"""The attention of a decoder that reads neighbors and row with one softmax"""

from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .attention_retro import PREFIX, AttentionLayout, AttentionPart, has_kernels, register_attention
from .chunk_layout_retro import TokenLocations, take_columns
from .joint_cache_retro import NeighborPrefix, RetroJointStaticCache
from .joint_call_retro import Front, JointCall
from .joint_layout_retro import (
    RowStates,
    make_neighbor_part,
    make_row_mask,
    make_row_parts,
    mask_of_states,
    plan_states,
)
from .neighbor_memory_retro import NeighborStates
from .neighbors_retro import Neighbors
from .reader_adapters_retro import ROW_ADAPTER


class _Gradients(torch.autograd.Function):
    """Passes the embeddings of the row on; the gradients that the states of neighbors have gathered go back."""

    @staticmethod
    def forward(ctx, leaves: list[torch.Tensor], embeds: torch.Tensor, *states: torch.Tensor) -> torch.Tensor:
        ctx.leaves = leaves
        return embeds.clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return None, grad, *(leaf.grad for leaf in ctx.leaves)


def gather_gradients(fronts: list[Front], embeds: torch.Tensor) -> torch.Tensor:
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


class JointAttentionMixin:
    """
    Runs the decoder of a [`RetroJointForCausalLM`] so that its attention reads neighbors too: in parts, or through one
    mask if the decoder's attention cannot be put together from parts.
    """

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
            cache = inputs["past_key_values"]
            if not isinstance(cache, RetroJointStaticCache):
                return self.decoder(**inputs)
            # The decoder sees the layers alone, because all else in the cache changes from step to step.
            inputs["past_key_values"] = Cache(layers=cache.layers)
            if cache.compile_config is None or inputs["input_ids"] is None or inputs["input_ids"].shape[1] > 1:
                return self.decoder(**inputs)
            return self.decoder.get_compiled_call(cache.compile_config)(**inputs)

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

    def _causal_inputs(self, device: torch.device) -> dict[str, Any]:
        """What neighbors are read with for a gradient: one part, whose backward kernel is that of parts of a row."""
        windows = windows_of_layers(self.config.text_config)  # none is shorter than a neighbor
        layout = AttentionLayout({window: [AttentionPart(is_causal=True)] for window in windows}, windows, [])
        prepared = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)  # as above
        return {"attention_mask": prepared, "retro_attention": layout}

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
        num_columns: int | None = None,
    ) -> torch.Tensor | BlockMask | dict[str, torch.Tensor | BlockMask] | None:
        """
        Makes the masks over the neighbors in front and the row, in the form that the attention of the decoder takes.
        If the decoder has several types of layers, there is a mask for each. A sliding window counts only the tokens
        of the row. `sees_front` is `(B, W, F)`. If keys of a row have room for `num_columns`, the rest is hidden.
        """
        masks = {}
        for layer_type, window in layer_windows(self.config.text_config).items():
            seen = self._row_mask(locations, window, given)
            if states is not None:
                seen = mask_of_states(states, seen)
            is_dynamic = num_columns is None or num_columns == seen.shape[-1]
            if not is_dynamic:
                seen = nn.functional.pad(seen, (0, num_columns - seen.shape[-1]))
            if sees_front is not None:
                seen = torch.cat([sees_front, seen], dim=-1)  # [B, W, F + N]
            seen = seen[:, None]
            if window is None and is_dynamic and self._needs_no_mask(seen):
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


__all__ = ["JointAttentionMixin", "gather_gradients", "layer_windows", "tolerance", "windows_of_layers"]
