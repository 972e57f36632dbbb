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
"""
A KV connector of vLLM for rows that read neighbors. It runs inside vLLM, and needs nothing but vLLM: put this folder
on the path of Python there, and start vLLM with

    --kv-transfer-config '{"kv_connector": "RetroConnector", "kv_connector_module_path": "retro_connector",
        "kv_role": "kv_both"}' --no-enable-prefix-caching

A row is a sequence of prompts, one for each stretch of its tokens that sees the same texts. A prompt is the tokens of
the texts in sight, of which vLLM computes nothing, and the row up to the end of the stretch. The connector fills in
what was computed before: the keys and values of the texts, and those of the row up to the stretch. A request has one
prompt, or several stretches of one row that follow each other. These are computed in one step: in each layer, what the
earlier ones have just computed is copied to the later ones, before attention. A request says so in
`kv_transfer_params`, which may hold

- `store`: true to keep the states of the prompts as texts, under their [`text_key`].
- `position`: the position of the first token of such a text in prompts that will see it, if it is known. Its keys are
  kept for this one. They can be moved to others.
- `row`: name of the row.
- `stretches`: for each prompt
  - `length`: number of its tokens, which tells the prompts of a request apart.
  - `texts`: the texts in sight, as lists of a key, the number of tokens at its start that the row does not see, the
    number of its tokens, and the position of its first token, counted from the start of the row.
  - `load`: number of tokens of the row that were read before.
  - `keep`: number of tokens of the row whose states are kept afterwards. 0 drops the row.
  - `writes`: true if the answer to the prompt is wanted. The others get one token, whatever the request says.
- `drop`: names of rows that are not needed any more.

An answer that is not a stream says in `kv_transfer_params` what is held. If a text or a part of the row is not held,
the request ends with an error, and what it needs has to be read again.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from retro_states import PROBE_LENGTH, Directory, Rotation, is_moved, text_key
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from vllm.config import get_layers_from_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.request import RequestStatus


logger = init_logger(f"vllm.{__name__}")

DEFAULT_GIB = 2.0
TEXT, ROW = "text", "row"
Name = tuple[str, str]


@dataclass
class Save:
    """
    States of tokens `first` to `last` of a request, to keep under a name behind the first `start` tokens there, with
    keys as if all positions were larger by `distance`.
    """

    name: Name
    block_ids: list[int]
    first: int
    last: int
    start: int
    distance: int = 0
    is_probe: bool = False


@dataclass
class Computing:
    """Tokens `first` to `last` of a request, which are computed in this step or were just before it."""

    block_ids: list[int]
    first: int
    last: int
    front: int


@dataclass
class Load:
    """
    The texts and the number of tokens of a row that a request needs in its blocks, and the requests that compute the
    tokens of the row behind these.
    """

    block_ids: list[int]
    texts: list[tuple[str, int, int, int]]
    row: str
    length: int
    rest: list[Computing]

    @property
    def front(self) -> int:
        """Number of tokens in sight of the row."""
        return sum(last - skip for _, skip, last, _ in self.texts)


@dataclass
class Metadata(KVConnectorMetadata):
    """What the workers do in a step: first what they keep and drop, in this order, and then what they load."""

    changes: list[Save | Name] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    invalid: set[int] = field(default_factory=set)


@dataclass
class Refusal(KVConnectorWorkerMetadata):
    """Why the keys of this model cannot be moved, if a worker found that out."""

    reason: str | None = None

    def aggregate(self, other: "Refusal") -> "Refusal":
        return self if self.reason else other


@dataclass
class Stretches:
    """The requests of vLLM for the stretches of a row, by their numbers of tokens, until they end."""

    requests: dict[int, Any] = field(default_factory=dict)
    num_come: int = 0
    has_failed: bool = False


@dataclass
class Copies:
    """Tokens that are copied in each layer: the blocks they are in, their places there, where to, and how far."""

    blocks: torch.LongTensor
    places: torch.LongTensor
    slots: torch.LongTensor
    moved: torch.LongTensor
    distances: torch.LongTensor


class RetroConnector(KVConnectorBase_V1):
    """
    Keeps the states of texts and rows, and puts them in front of what a request computes.

    `kv_connector_extra_config` may hold `max_gib`, the largest size of what is kept in gibibytes, which defaults to 2.
    """

    def __init__(self, vllm_config, role: KVConnectorRole, kv_cache_config):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        check_config(vllm_config, kv_cache_config)
        self.block_size = vllm_config.cache_config.block_size
        self.refusal: str | None = None
        if role == KVConnectorRole.SCHEDULER:
            (group,) = kv_cache_config.kv_cache_groups
            self.bytes_per_token = group.kv_cache_spec.page_size_bytes * len(group.layer_names) // self.block_size
            max_gib = float(self._kv_transfer_config.get_from_extra_config("max_gib", DEFAULT_GIB))
            self.directory = Directory(int(max_gib * 2**30) // self.bytes_per_token)
            self.metadata = Metadata()
            self.rows: dict[str, Stretches] = {}
            self.sources: list[tuple[int, list[Any]]] = []  # of this step: a first block, and requests before that one
            # Else a stretch may end a step without being whole, though there is room for the next one.
            self.is_cut_by_room_only = vllm_config.scheduler_config.long_prefill_token_threshold == 0
        else:
            self.layers = get_layers_from_vllm_config(vllm_config, Attention)
            self.rotations = find_rotations(vllm_config.model_config.hf_text_config, list(self.layers))
            self.states: dict[Name, list[Piece]] = {}
            self.places: dict[tuple, torch.LongTensor] = {}
            self.copies: Copies | None = None
            self.invalid: set[int] = set()

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """A graph of a whole step would leave out `wait_for_layer_load`."""
        return True

    # The scheduler decides. Its methods run between two steps.

    def on_new_request(self, request) -> None:
        stretch = stretch_of(request)
        if stretch is None:
            return
        stretches = self.rows.setdefault(request.kv_transfer_params["row"], Stretches())
        stretches.requests[stretch["length"]] = request
        stretches.num_come += 1
        if not stretch.get("writes"):
            request.max_tokens = 1

    def get_num_new_matched_tokens(self, request, num_computed_tokens: int) -> tuple[int | None, bool]:
        stretch = stretch_of(request)
        if stretch is None:
            return 0, False
        # All of them are computed in one step, so the first does not begin alone.
        num_expected = len(request.kv_transfer_params["stretches"])
        have_come = self.rows[request.kv_transfer_params["row"]].num_come >= num_expected
        if not have_come or not all(self._is_in_step(one) for one in self._unfinished_before(request)):
            return None, False  # ask again in the next step
        return min(num_seen(stretch) + stretch["load"], len(request.prompt_token_ids) - 1), False

    def _unfinished_before(self, request) -> list[Any]:
        """The requests for the stretches before that of a request which have not ended."""
        stretches, known = request.kv_transfer_params["stretches"], self.rows[request.kv_transfer_params["row"]]
        before = stretches[: stretches.index(stretch_of(request))]
        return [known.requests[one["length"]] for one in before if one["length"] in known.requests]

    def _is_in_step(self, request) -> bool:
        """Whether the step that is planned ends the prompt of a request, if there is room for a later one in it."""
        return self.is_cut_by_room_only and request.status == RequestStatus.RUNNING

    def update_state_after_alloc(self, request, blocks, num_external_tokens: int) -> None:
        stretch = stretch_of(request)
        if num_external_tokens == 0 or stretch is None:
            return
        (block_ids,) = blocks.get_block_ids()
        row, before = request.kv_transfer_params["row"], self._unfinished_before(request)
        length = stretch_of(before[0])["load"] if before else stretch["load"]
        is_held = self.directory.length((ROW, row)) >= length
        for key, _, last, _ in stretch["texts"]:
            is_held &= self.directory.length((TEXT, key)) >= last
        # What comes behind a stretch that fails must fail with it, before it gives a token.
        self.rows[row].has_failed |= not is_held or self.refusal is not None
        if self.rows[row].has_failed:
            self.metadata.invalid.add(block_ids[0])
            return
        texts, rest = [tuple(text) for text in stretch["texts"]], []
        for one in before:
            (theirs,) = self._kv_cache_manager.get_block_ids(one.request_id)
            front = num_seen(stretch_of(one))
            rest.append(Computing(theirs, front + stretch_of(one)["load"], len(one.prompt_token_ids), front))
        self.metadata.loads.append(Load(list(block_ids), texts, row, length, rest))
        self.sources.append((block_ids[0], before))

    def build_connector_meta(self, scheduler_output) -> Metadata:
        for block_id, requests in self.sources:
            for one in requests:
                num_computed = one.num_computed_tokens + scheduler_output.num_scheduled_tokens.get(one.request_id, 0)
                if num_computed < len(one.prompt_token_ids):
                    self.metadata.invalid.add(block_id)
        metadata, self.metadata, self.sources = self.metadata, Metadata(), []
        return metadata

    def request_finished(self, request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        params, stretch = request.kv_transfer_params or {}, stretch_of(request)
        if stretch is not None:
            stretches = self.rows[params["row"]]
            del stretches.requests[stretch["length"]]
            if not stretches.requests:
                del self.rows[params["row"]]
        for row in params.get("drop", ()):
            self._drop((ROW, row))
        is_done = request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)
        # A request that was preempted at its end has no blocks any more. What needs them will ask, and be refused.
        computed = min(request.num_computed_tokens, len(block_ids) * self.block_size)
        if is_done and params.get("store"):
            tokens = request.prompt_token_ids
            if computed >= len(tokens):
                adapter = "" if request.lora_request is None else request.lora_request.lora_name
                is_probe = len(tokens) >= PROBE_LENGTH and len(set(tokens)) == 1
                name, distance = (TEXT, text_key(tokens, adapter)), params.get("position", 0)
                self._save(Save(name, list(block_ids), 0, len(tokens), 0, distance, is_probe))
        elif is_done and stretch is not None:
            front, name = num_seen(stretch), (ROW, params["row"])
            # Its blocks have the whole row. What was dropped meanwhile is kept anew.
            start, last = min(stretch["load"], self.directory.length(name)), min(stretch["keep"], computed - front)
            if stretch["keep"] == 0:
                self._drop(name)
            elif last > start:
                self._save(Save(name, list(block_ids), front + start, front + last, start))
        if not params:
            return False, None
        held = self.directory
        report = {"num_states": len(held), "bytes": held.num_tokens * self.bytes_per_token}
        report |= {"max_bytes": held.max_tokens * self.bytes_per_token, "num_dropped": held.num_dropped}
        # Its blocks are read at the start of the next step, before anything else is written to them.
        return False, report if self.refusal is None else report | {"refusal": self.refusal}

    def update_connector_output(self, connector_output) -> None:
        refusal = connector_output.kv_connector_worker_meta
        if refusal is not None:
            self.refusal = refusal.reason

    def _save(self, save: Save) -> None:
        self.metadata.changes.append(save)
        self.metadata.changes += self.directory.put(save.name, save.start + save.last - save.first)

    def _drop(self, name: Name) -> None:
        self.directory.drop(name)
        self.metadata.changes.append(name)

    # The workers hold the states.

    def bind_connector_metadata(self, connector_metadata: Metadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        self.copies = None
        # Not in `start_load_kv`, which in a step without loads comes after the forward pass: by then that may have
        # written to the blocks that are read here.
        for change in connector_metadata.changes:
            if isinstance(change, Save):
                self._read_blocks(change)
            else:
                self.states.pop(change, None)

    @torch.inference_mode()
    def start_load_kv(self, forward_context, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        self.invalid = set(metadata.invalid)
        for load in metadata.loads:
            self._write_blocks(load)
        self.copies = self._plan_copies(metadata.loads)

    def get_block_ids_with_load_errors(self) -> set[int]:
        invalid, self.invalid = self.invalid, set()
        return invalid

    def build_connector_worker_meta(self) -> Refusal | None:
        return None if self.refusal is None else Refusal(self.refusal)

    @torch.inference_mode()
    def wait_for_layer_load(self, layer_name: str) -> None:
        # The keys and values of this step are in the cache of the layer already, and attention follows.
        if self.copies is not None and layer_name in self.rotations:
            self._copy(layer_name, self.copies)

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass

    @torch.inference_mode()
    def _read_blocks(self, save: Save) -> None:
        first, last = save.first // self.block_size, -(-save.last // self.block_size)
        begin = save.first - first * self.block_size
        blocks = torch.tensor(save.block_ids[first:last], device=self._device)
        found = {}
        for name in self.rotations:
            found[name] = self._states(name, blocks)[begin : begin + save.last - save.first].clone()
        if save.is_probe:
            self._check_probe(found)
        if save.distance != 0:
            for name, rotation in self.rotations.items():
                if rotation is not None:
                    found[name][:, 0] = rotation.move(found[name][:, 0], save.distance)
        pieces = cut(self.states.get(save.name, []), save.start)
        self.states[save.name] = join([*pieces, Piece(save.first - save.start + save.distance, found)])

    def _write_blocks(self, load: Load) -> None:
        front = load.front
        parts = []  # a piece and the distance by which its keys move
        for key, skip, last, position in load.texts:
            (text,) = self.states[TEXT, key]
            parts.append((text.between(skip, last), front + position - text.origin))
        row = self.states[ROW, load.row] if load.length > 0 else []
        parts += [(piece, front - piece.origin) for piece in cut(row, load.length)]
        if not parts:
            return
        slots = self._slots(load.block_ids)[: front + load.length]
        for name, rotation in self.rotations.items():
            layer, keys, values = self.layers[name], [], []
            for piece, distance in parts:
                piece_keys, piece_values = piece.states[name].unbind(1)
                keys.append(piece_keys if rotation is None else rotation.move(piece_keys, distance))
                values.append(piece_values)
            layer.impl.do_kv_cache_update(layer, torch.cat(keys), torch.cat(values), layer.kv_cache, slots)

    @property
    def _device(self) -> torch.device:
        return self.layers[next(iter(self.rotations))].kv_cache.device

    def _slots(self, block_ids: list[int]) -> torch.LongTensor:
        """The places of the tokens of blocks in the cache."""
        blocks = torch.tensor(block_ids, device=self._device)
        return (blocks[:, None] * self.block_size + torch.arange(self.block_size, device=self._device)).flatten()

    def _states(self, name: str, blocks: torch.LongTensor) -> torch.Tensor:
        """Keys and values of the tokens of blocks, of shape `(num_tokens, 2, num_kv_heads, head_dim)`."""
        layer = self.layers[name]
        # `index_select` takes a quarter of the time that indexing takes.
        found = layer.kv_cache.index_select(0, blocks).flatten(1).index_select(1, self._places(name))
        return found.view(-1, 2, layer.num_kv_heads, layer.head_size)

    def _plan_copies(self, loads: list[Load]) -> Copies | None:
        origins, targets, distances = [], [], []
        for load in loads:
            slots, start = self._slots(load.block_ids), load.front + load.length
            for one in load.rest:
                origins.append(self._slots(one.block_ids)[one.first : one.last])
                targets.append(slots[start : start + len(origins[-1])])
                distances.append(torch.full((len(origins[-1]),), load.front - one.front))
                start += len(origins[-1])
        if not origins:
            return None
        origin, distance = torch.cat(origins), torch.cat(distances)
        blocks, numbers = (origin // self.block_size).unique(return_inverse=True)
        (moved,) = distance.nonzero(as_tuple=True)
        places = numbers * self.block_size + origin % self.block_size
        return Copies(blocks, places, torch.cat(targets), moved.to(origin.device), distance[moved])

    def _copy(self, name: str, copies: Copies) -> None:
        layer, rotation = self.layers[name], self.rotations[name]
        keys, values = self._states(name, copies.blocks).index_select(0, copies.places).unbind(1)
        if rotation is not None and len(copies.moved) > 0:
            keys[copies.moved] = rotation.move(keys[copies.moved], copies.distances)
        layer.impl.do_kv_cache_update(layer, keys, values, layer.kv_cache, copies.slots)

    def _places(self, name: str) -> torch.LongTensor:
        """
        Where a block has the keys and values of its tokens, in the order of token, key or value, head and component.
        Attention kernels pack blocks in ways of their own, so a block of known numbers is written and looked at.
        """
        layer, cache = self.layers[name], self.layers[name].kv_cache
        kind = (cache.shape[1:], cache.dtype, type(layer.impl), getattr(layer, "isa", None))
        if kind in self.places:
            return self.places[kind]
        shape = (self.block_size, 2, layer.num_kv_heads, layer.head_size)
        numbers = torch.arange(torch.Size(shape).numel(), device=cache.device).view(shape)
        slots = torch.arange(self.block_size, device=cache.device)
        found, digit = torch.zeros(cache[0].numel(), dtype=torch.long, device=cache.device), 1
        while digit <= numbers.numel():
            digits = (numbers // digit % 256).to(cache.dtype)  # numbers up to 256 are exact in all types
            block = torch.zeros_like(cache[:1])
            layer.impl.do_kv_cache_update(layer, digits[:, 0].contiguous(), digits[:, 1].contiguous(), block, slots)
            found += block.flatten().long() * digit
            digit *= 256
        if not torch.equal(found.sort().values, numbers.flatten()):
            raise ValueError(f"the attention of {name} does not keep each key and value in one place of a block")
        self.places[kind] = found.argsort()
        return self.places[kind]

    def _check_probe(self, found: dict[str, torch.Tensor]) -> None:
        for name, rotation in self.rotations.items():
            if not is_moved(found[name][:, 0], rotation):
                self.refusal = f"the keys of {name} do not depend on positions as the config of the model says"
                logger.error(self.refusal)
                return


@dataclass
class Piece:
    """
    States of tokens that follow each other.

    Args:
        origin (`int`): Position of the first token of the text or row for which its keys were computed or moved.
        states (`dict[str, torch.Tensor]`): Keys and values `(num_tokens, 2, num_kv_heads, head_dim)` of each layer.
    """

    origin: int
    states: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.states.values())))

    def between(self, first: int, last: int) -> "Piece":
        """Some of its tokens, as a view."""
        return Piece(self.origin, {name: states[first:last] for name, states in self.states.items()})


def stretch_of(request) -> dict[str, Any] | None:
    """What a request says about its prompt, if that is a stretch of a row."""
    stretches = (request.kv_transfer_params or {}).get("stretches", ())
    return next((one for one in stretches if one["length"] == len(request.prompt_token_ids)), None)


def num_seen(stretch: dict[str, Any]) -> int:
    """Number of tokens of the texts in the prompt of a stretch."""
    return sum(last - skip for _, skip, last, _ in stretch["texts"])


def cut(pieces: list[Piece], length: int) -> list[Piece]:
    """The first `length` tokens of pieces."""
    kept = []
    for piece in pieces:
        if length > 0:
            kept.append(piece.between(0, length))
            length -= len(piece)
    return kept


def join(pieces: list[Piece]) -> list[Piece]:
    """Joins the last two pieces if their keys need no different moves."""
    if len(pieces) < 2 or pieces[-2].origin != pieces[-1].origin:
        return pieces
    left, right = pieces[-2:]
    states = {name: torch.cat([left.states[name], right.states[name]]) for name in left.states}
    return [*pieces[:-2], Piece(left.origin, states)]


def check_config(vllm_config, kv_cache_config) -> None:
    """Raises a `ValueError` for engines in which rows could see something else than the texts of their requests."""
    groups = kv_cache_config.kv_cache_groups
    reasons = []
    if vllm_config.cache_config.enable_prefix_caching:
        # It takes equal tokens for equal states, but those of a text are not what the prompt would have there.
        reasons.append("prefix caching would mistake a row for a plain prompt: start with --no-enable-prefix-caching")
    if len(groups) != 1 or getattr(groups[0].kv_cache_spec, "sliding_window", None) is not None:
        reasons.append("layers with sliding windows would count neighbors, and other states cannot be put together")
    if vllm_config.cache_config.cache_dtype not in ("auto", "float16", "bfloat16", "float32"):
        reasons.append(
            f"keys of type {vllm_config.cache_config.cache_dtype} cannot be moved: use --kv-cache-dtype auto"
        )
    if vllm_config.parallel_config.data_parallel_size > 1:
        # The prompts of a row would go to several of them.
        reasons.append("a row stays with one engine: start several ones without --data-parallel-size")
    drafts = vllm_config.speculative_config
    if drafts is not None and drafts.method != "ngram":
        reasons.append(f"drafts of the kind {drafts.method} were not tried: --speculative-config may have 'ngram'")
    if reasons:
        raise ValueError(f"RetroConnector cannot serve this engine: {'; '.join(reasons)}")


def find_rotations(config, layers: list[str]) -> dict[str, Rotation | None]:
    """How the keys of each layer move, by the config of the model."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kind = parameters.get("rope_type", "default")
    if kind in ("dynamic", "longrope") or "rope_theta" not in parameters:
        raise ValueError(f"RetroConnector cannot move the keys of {config.model_type}: its positions are {parameters}")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if kind == "default":
        width = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        frequencies = parameters["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    else:
        frequencies, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    rotation = Rotation(frequencies)
    has_rope = getattr(config, "no_rope_layers", None) or [1] * config.num_hidden_layers
    return {name: rotation if has_rope[extract_layer_index(name)] else None for name in layers}
