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
"""What the connector tells vLLM, and what it does to its cache. Stubs stand for the modules of vLLM."""

import sys
from enum import Enum
from types import ModuleType, SimpleNamespace

import pytest
import torch

from serving.vllm.connector.retro_states import Rotation
from serving.vllm.processes import CONNECTOR_DIR


BLOCK, HEADS, WIDTH = 4, 2, 8
STATUS = Enum(
    "RequestStatus", ["WAITING", "RUNNING", "FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED", "FINISHED_ABORTED"]
)
ROLE = Enum("KVConnectorRole", ["SCHEDULER", "WORKER"])


class Base:
    def __init__(self, vllm_config, role, kv_cache_config):
        self._kv_transfer_config = SimpleNamespace(get_from_extra_config=lambda name, default: default)
        self._kv_cache_manager = SimpleNamespace(get_block_ids=lambda request_id: (BLOCKS[request_id],))

    def bind_connector_metadata(self, metadata):
        self._metadata = metadata

    def _get_connector_metadata(self):
        return self._metadata


class Layer:
    """A layer of attention whose blocks are plain."""

    num_kv_heads, head_size = HEADS, WIDTH

    def __init__(self):
        self.kv_cache = torch.randn(40, BLOCK, 2, HEADS, WIDTH)
        self.impl = self

    def do_kv_cache_update(self, layer, keys, values, cache, slots):
        cache.view(-1, 2, HEADS, WIDTH)[slots] = torch.stack([keys, values], 1)


LAYERS = {"layers.0": Layer(), "layers.1": Layer()}
BLOCKS = {}
STUBS = {
    "vllm": {},
    "vllm.config": {"get_layers_from_vllm_config": lambda config, kind: LAYERS},
    "vllm.distributed.kv_transfer.kv_connector.v1.base": {
        "KVConnectorBase_V1": Base,
        "KVConnectorMetadata": object,
        "KVConnectorRole": ROLE,
        "KVConnectorWorkerMetadata": object,
    },
    "vllm.logger": {"init_logger": lambda name: None},
    "vllm.model_executor.layers.attention": {"Attention": Layer},
    "vllm.model_executor.models.utils": {"extract_layer_index": lambda name: int(name[-1])},
    "vllm.v1.request": {"RequestStatus": STATUS},
}


@pytest.fixture
def connector(monkeypatch):
    """Makes a connector for a role, in an engine whose config differs."""
    for name, contents in STUBS.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(CONNECTOR_DIR)
    import retro_connector

    spec = SimpleNamespace(page_size_bytes=BLOCK, sliding_window=None)
    caches = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec, layer_names=list(LAYERS))])
    rope = {"rope_type": "default", "rope_theta": 100.0}
    text_config = SimpleNamespace(rope_parameters=rope, head_dim=WIDTH, num_hidden_layers=2)
    cache = {"block_size": BLOCK, "enable_prefix_caching": False, "cache_dtype": "auto"}

    def make(role, speculative_config=None, data_parallel_size=1, **cache_changes):
        config = SimpleNamespace(
            cache_config=SimpleNamespace(**cache | cache_changes),
            speculative_config=speculative_config,
            parallel_config=SimpleNamespace(data_parallel_size=data_parallel_size),
            scheduler_config=SimpleNamespace(long_prefill_token_threshold=0),
            model_config=SimpleNamespace(hf_text_config=text_config),
        )
        return retro_connector.RetroConnector(config, ROLE[role], caches)

    yield make
    del sys.modules["retro_connector"], sys.modules["retro_states"]


# A row of 9 tokens. The first three see nothing, and the next three and the last see a text of four tokens each.
STRETCHES = [
    {"length": 3, "texts": [], "load": 0, "keep": 3},
    {"length": 10, "texts": [["a", 0, 4, -4]], "load": 3, "keep": 6},
    {"length": 13, "texts": [["b", 0, 4, -4]], "load": 6, "keep": 11, "writes": True},
]


def make_requests():
    params = {"row": "row", "stretches": STRETCHES}
    BLOCKS.clear()
    requests = []
    for number, stretch in enumerate(STRETCHES):
        request = SimpleNamespace(
            request_id=str(number), prompt_token_ids=[5] * stretch["length"], kv_transfer_params=params, max_tokens=3
        )
        request.status, request.num_computed_tokens, request.lora_request = STATUS.WAITING, 0, None
        BLOCKS[request.request_id] = list(range(10 * number + 1, 10 * number + 5))
        requests.append(request)
    return requests


def admit(scheduler, request):
    """What the scheduler of vLLM does with a request that it admits."""
    num_known, _ = scheduler.get_num_new_matched_tokens(request, 0)
    if num_known is None:
        return None
    blocks = SimpleNamespace(get_block_ids=lambda: (BLOCKS[request.request_id],))
    scheduler.update_state_after_alloc(request, blocks, num_known)
    request.status, request.num_computed_tokens = STATUS.RUNNING, num_known
    return num_known


def planned(scheduler, requests):
    left = {one.request_id: len(one.prompt_token_ids) - one.num_computed_tokens for one in requests}
    return scheduler.build_connector_meta(SimpleNamespace(num_scheduled_tokens=left))


def holding_texts(connector):
    scheduler = connector("SCHEDULER")
    for key in "ab":
        scheduler.directory.put(("text", key), 4)
    return scheduler


def test_stretches_begin_together_and_in_their_order(connector):
    scheduler, requests = holding_texts(connector), make_requests()
    for request in requests[:2]:
        scheduler.on_new_request(request)
        assert admit(scheduler, request) is None  # not all of them have come
    scheduler.on_new_request(requests[2])
    assert [one.max_tokens for one in requests] == [1, 1, 3]
    assert admit(scheduler, requests[1]) is None  # the one before it is not in the step
    assert [admit(scheduler, request) for request in requests] == [0, 4 + 3, 4 + 6]
    metadata = planned(scheduler, requests)
    assert metadata.invalid == set()
    assert [(load.length, len(load.rest)) for load in metadata.loads] == [(0, 1), (0, 2)]
    for request in requests:
        request.status, request.num_computed_tokens = STATUS.FINISHED_LENGTH_CAPPED, len(request.prompt_token_ids)
        scheduler.request_finished(request, BLOCKS[request.request_id])
    assert scheduler.rows == {} and scheduler.directory.length(("row", "row")) == 9


def test_what_comes_behind_a_stretch_that_fails_fails_with_it(connector):
    scheduler, requests = holding_texts(connector), make_requests()
    scheduler.directory.drop(("text", "a"))
    for request in requests:
        scheduler.on_new_request(request)
    for request in requests:
        admit(scheduler, request)
    assert planned(scheduler, requests).invalid == {BLOCKS["1"][0], BLOCKS["2"][0]}


def test_a_stretch_behind_one_that_is_cut_fails(connector):
    scheduler, requests = holding_texts(connector), make_requests()
    for request in requests:
        scheduler.on_new_request(request)
    for request in requests:
        admit(scheduler, request)
    cut = SimpleNamespace(num_scheduled_tokens={"0": 3, "1": 2, "2": 3})
    assert scheduler.build_connector_meta(cut).invalid == {BLOCKS["2"][0]}


def test_a_row_that_was_dropped_meanwhile_is_kept_whole(connector):
    scheduler, request = holding_texts(connector), make_requests()[2]
    request.kv_transfer_params = {"row": "row", "stretches": STRETCHES[2:]}
    scheduler.directory.put(("row", "row"), 6)
    scheduler.on_new_request(request)
    assert admit(scheduler, request) == 4 + 6
    planned(scheduler, [request])
    scheduler.directory.drop(("row", "row"))
    request.status, request.num_computed_tokens = STATUS.FINISHED_LENGTH_CAPPED, 15
    scheduler.request_finished(request, BLOCKS["2"])
    (save,) = planned(scheduler, []).changes
    assert (save.first, save.last, save.start) == (4, 4 + 11, 0)


def test_the_cache_of_a_stretch_has_the_row_that_others_compute(connector):
    scheduler, worker, requests = holding_texts(connector), connector("WORKER"), make_requests()
    rotation = Rotation(100.0 ** (-torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH))
    import retro_connector

    for key in "ab":  # for positions 0 to 3
        states = {name: torch.randn(4, 2, HEADS, WIDTH) for name in LAYERS}
        worker.states["text", key] = [retro_connector.Piece(0, states)]
    for request in requests:
        scheduler.on_new_request(request)
    for request in requests:
        admit(scheduler, request)
    worker.bind_connector_metadata(planned(scheduler, requests))
    worker.start_load_kv(None)
    for name, layer in LAYERS.items():
        tokens = {key: layer.kv_cache[blocks].flatten(0, 1).clone() for key, blocks in BLOCKS.items()}
        worker.wait_for_layer_load(name)
        found = layer.kv_cache[BLOCKS["2"]].flatten(0, 1)
        expected = torch.cat([worker.states["text", "b"][0].states[name], tokens["0"][:3], tokens["1"][7:10]])
        expected[4:7, 0] = rotation.move(tokens["0"][:3, 0], 4)  # there they have positions 0 to 2
        torch.testing.assert_close(found[:10], expected)
        torch.testing.assert_close(found[10:], tokens["2"][10:])
    worker.bind_connector_metadata(planned(scheduler, []))
    assert worker.copies is None  # a step without loads copies nothing


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"enable_prefix_caching": True}, "--no-enable-prefix-caching"),
        ({"cache_dtype": "fp8"}, "keys of type fp8 cannot be moved"),
        ({"data_parallel_size": 2}, "a row stays with one engine"),
        ({"speculative_config": SimpleNamespace(method="eagle")}, "drafts of the kind eagle were not tried"),
    ],
)
def test_engines_that_cannot_be_exact_are_refused(connector, changes, why):
    with pytest.raises(ValueError, match=why):
        connector("SCHEDULER", **changes)
    connector("SCHEDULER", speculative_config=SimpleNamespace(method="ngram"))
