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
"""How a joint model reads: what a call computes, and what it leaves in the cache"""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .chunk_layout_retro import TokenLocations, completes_chunk, seen_chunk, take_columns, token_mask
from .joint_attention_retro import gather_gradients, layer_windows
from .joint_cache_retro import RereadTokens, RetroJointCache
from .joint_call_retro import Front, JointCall
from .joint_layout_retro import RowStates, make_row_mask, plan_states
from .neighbor_memory_retro import LayerStates, NeighborStates
from .neighbors_retro import Neighbors
from .reader_adapters_retro import NEIGHBOR_ADAPTER, ROW_ADAPTER, is_adapter_weight


# Number of neighbors that the decoder reads in one pass.
ENCODING_BATCH_SIZE = 32


class JointReadingMixin:
    """
    Reads rows and neighbors in a [`RetroJointForCausalLM`]: a call without cached tokens at once, and one with cached
    tokens piece by piece, as the neighbors in sight change.
    """

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
            tokens = {"input_ids": None, "inputs_embeds": gather_gradients(fronts, embeds)}
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
        """Reads the passages of a question, which all tokens see, or all but the first of the document."""
        passages = call.passages
        sees = locations.is_token & passages.seen.flatten(1).any(-1, keepdim=True)
        if not passages.by_first:
            sees &= (locations.document_index > 0) & (locations.row_index > 0)
        sees = sees.gather(1, states.columns) & ~states.is_filler
        return Front(self.read_neighbors(passages.texts), passages.seen, torch.where(sees, 0, 1))

    def _keep_in_sight(
        self, cache: RetroJointCache, fronts: list[Front], has_passages: bool, next_slot: torch.LongTensor
    ) -> None:
        """Puts in front of the cached row what its next token sees."""
        nothing = next_slot.new_zeros(len(next_slot), 0, dtype=torch.bool)
        cache.set_front([], nothing, nothing)
        cache.front_slot = next_slot
        if has_passages:
            key_values, mask = fronts[0].read.take(torch.zeros_like(next_slot), fronts[0].seen)
            cache.set_front(key_values, mask, torch.ones_like(mask))
        if len(fronts) > int(has_passages):
            cache.add_front(*fronts[-1].read.take(next_slot, fronts[-1].seen))

    def _continue(self, call: JointCall, neighbors: Neighbors | None) -> CausalLMOutputWithPast:
        """
        A call with cached tokens, of which some have seen neighbors or will. It is cut where the neighbors in sight
        change.
        """
        length, size = call.inputs.shape[1], self.config.chunk_size
        reads_again = neighbors is not None or call.cache.uncropped_length > 0
        if call.given_mask is not None and reads_again and self.config.reread_tokens > 1:
            raise ValueError(
                f"the attention mask of shape {tuple(call.given_mask.shape)} says nothing of what cached tokens see, "
                "but those of a chunk are read again: give a mask of two dimensions, or set `reread_tokens` to 0"
            )
        if length == 1:
            return self._step(call, neighbors)
        locations = call.locate(size)
        index = locations.document_index
        completes = locations.is_token & completes_chunk(index, size)  # [B, T]
        cuts = (completes | (locations.is_token & (index == 0))).any(0)
        # CODEPATH: models that read chunks again do so as soon as a chunk is complete.
        if self.config.reread_tokens > 1:
            cuts[1:] |= (completes[:, :-1] & locations.is_token[:, 1:]).any(0)
        starts = sorted({0, *cuts.nonzero()[:, 0].tolist()})
        slots = locations.document_slot + seen_chunk(index, size) - locations.first_slot  # [B, T]
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
        completes = is_token & completes_chunk(index, size)  # [B]
        if cache.front_mask is None or cache.uncropped_length > 0:
            self._restore_front(call, locations)
        cache.update_neighbors(neighbors, locations.first_slot[:, 0], locations.mask.shape[1] // size)
        cache.leave_chunk(completes | (is_token & (index == 0)))
        slot = torch.where(index + 1 >= size, locations.document_slot[:, 0] + seen_chunk(index, size), -1)
        cache.front_slot = torch.where(is_token, slot, cache.front_slot)
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
            attention_mask=self._make_masks(
                locations, call.given_mask, front, num_columns=cache.num_columns(locations.mask.shape[1])
            ),
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
        # A row that lacks the first tokens of its document may begin with the last of a chunk: nothing is before that.
        start = (locations.first_row_index - locations.first_document_index)[:, 0].clamp(min=0)
        rows = (completes & (locations.row_index[:, 0] > start)).nonzero()[:, 0]
        if len(rows) == 0:
            return
        back = torch.arange(self.config.reread_tokens - 1, -1, -1, device=rows.device)
        again = self._read_again(call, locations, rows, locations.row_index[rows, :1] - back)
        logits = outputs.logits.clone()
        column = logits.shape[1] - call.inputs.shape[1]  # of the first token, behind which these rows have padding
        if column >= 0:
            logits[rows, column] = again.logits[:, -1].to(logits)
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
                        nn.functional.pad(
                            make_row_mask(mask, positions, columns, window),
                            (0, cache.num_columns(mask.shape[1]) - mask.shape[1]),
                        ),
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
        After a crop of the end of a chunk: puts the neighbors of the last complete chunk in front again. If tokens of
        the incomplete one had been read again, they go back to the state in which they were written.
        """
        cache, size = call.cache, self.config.chunk_size
        removed = max(0, cache.uncropped_length - cache.get_seq_length())
        cache.uncropped_length = 0
        index = locations.first_document_index[:, 0]
        slot = torch.where(index >= size, locations.first_slot[:, 0] - 1, -1)
        if cache.front_mask is None:
            cache.set_front([], locations.mask[:, :0], locations.mask[:, :0])
            cache.front_slot = torch.full_like(slot, -1)
        if cache.neighbors is None or bool((cache.front_slot == slot).all()):
            return
        cache.front_slot = slot
        cache.leave_chunk(torch.ones_like(index, dtype=torch.bool))
        neighbors = cache.neighbors.take(slot)
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
        encode = self._encode_part
        if torch.is_grad_enabled() and self._checkpoints_layers():
            # The cache of its states does not outlive a checkpointed layer, so a whole pass is what runs again.
            encode = partial(checkpoint, encode, use_reentrant=False)
        parts = [
            encode(ids, mask)
            for ids, mask in zip(
                neighbor_input_ids.split(ENCODING_BATCH_SIZE), neighbor_attention_mask.split(ENCODING_BATCH_SIZE)
            )
        ]
        return [
            None if layer[0] is None else tuple(torch.cat([part[i] for part in layer]) for i in (0, 1))
            for layer in zip(*parts)
        ]

    def _encode_part(self, input_ids: torch.LongTensor, attention_mask: torch.BoolTensor) -> LayerStates:
        """Keys and values of the neighbors of one pass."""
        positions = torch.arange(-input_ids.shape[1], 0, device=input_ids.device)
        # The causal mask hides padding behind a neighbor from the tokens in front of it, and no row reads it.
        is_padded_behind = bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())
        cache = DynamicCache()
        inputs = {"attention_mask": None if is_padded_behind else attention_mask.long(), "past_key_values": cache}
        if torch.is_grad_enabled() and is_padded_behind and self._attends_in_parts():
            inputs |= self._causal_inputs(input_ids.device)
        with (
            self._switched_attention(inputs),
            self._without_checkpointing(),
            self.adapters.active(NEIGHBOR_ADAPTER),
        ):
            outputs = self.decoder.base_model(
                input_ids=input_ids, position_ids=positions.expand(len(input_ids), -1), use_cache=True, **inputs
            )
        layers = [(layer.keys, layer.values) if layer.is_initialized else None for layer in cache.layers]
        if torch.is_grad_enabled() and NEIGHBOR_ADAPTER in self.adapters.names:
            # The output of the last layer for neighbors is not used, but its adapter must stay in the graph.
            keys, values = layers[0]
            layers[0] = keys, values + 0 * outputs.last_hidden_state.sum()
        return layers


__all__ = ["JointReadingMixin"]
