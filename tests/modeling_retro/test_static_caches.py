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
"""Static shapes: one compiled decoding step serves a generation with retrieval"""

import pytest
import torch
from test_generation_retro import left_padded, make_retro
from test_modeling_retro import CHUNK, LENGTH, VOCAB, assert_close, make_inputs
from test_questions_retro import QuestionRetriever, passage_inputs
from tiny_joint import make_joint
from transformers import CompileConfig

from modeling_retro.cross_cache_retro import RetroStaticCache


GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def check_static_equals_dynamic(model, lengths, **options):
    ids, mask = left_padded(lengths)
    arguments = {"attention_mask": mask, "max_new_tokens": 3 * CHUNK, **GREEDY, **options}
    arguments |= {"return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(ids, **arguments)
    found = model.generate(ids, **arguments, cache_implementation="static")
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    return found


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-sliding"])
@pytest.mark.parametrize("reread_tokens", [0, CHUNK])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"passages": "in_order"}])
def test_a_static_cache_generates_what_the_dynamic_one_generates(family, reread_tokens, options):
    model = make_joint(family, reread_tokens=reread_tokens)
    model.set_retriever(QuestionRetriever())
    if "passages" in options:
        options = options | passage_inputs(3, options["passages"])
    check_static_equals_dynamic(model, [2 * CHUNK + 1, CHUNK, 2], **options)


@pytest.mark.parametrize("fields", [{}, {"sliding_window": 5}, {"attn_implementation": "eager"}])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"positions": True}])
def test_cross_attention_in_a_static_cache_gives_what_it_gives_in_the_dynamic_one(fields, options):
    model = make_retro(**fields)
    if options.pop("positions", False):
        _, mask = left_padded([2 * CHUNK + 1, CHUNK, 2])
        options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    found = check_static_equals_dynamic(model, [2 * CHUNK + 1, CHUNK, 2], **options)
    assert isinstance(found.past_key_values, RetroStaticCache)
    keys, _ = found.past_key_values.current_key_values[model.config.cross_attention_layers[0]]
    assert keys.shape[2] == model.config.num_neighbors * model.config.neighbor_length


def test_given_neighbors_and_several_tokens_in_a_static_cache():
    model = make_retro()
    model.set_retriever(None)
    ids, neighbors, mask = make_inputs(2, 4 * CHUNK)
    with torch.no_grad():
        expected = model(ids, neighbor_input_ids=neighbors, neighbor_attention_mask=mask).logits
        cache = RetroStaticCache(front_room=2 * LENGTH, max_length=5 * CHUNK)
        parts, start = [], 0
        for end in (2 * CHUNK + 1, 3 * CHUNK - 1, 3 * CHUNK, 4 * CHUNK):
            own = slice(start // CHUNK, end // CHUNK)
            given = {"neighbor_input_ids": neighbors[:, own], "neighbor_attention_mask": mask[:, own]}
            parts.append(model(ids[:, start:end], past_key_values=cache, **given).logits)
            start = end
    assert_close(torch.cat(parts, dim=1), expected, 1e-10)


def test_what_has_no_room_in_a_static_cache_is_refused():
    model = make_retro()
    model.set_retriever(None)
    ids, neighbors, mask = make_inputs(1, 2 * CHUNK)
    given = {"neighbor_input_ids": neighbors, "neighbor_attention_mask": mask}
    with torch.no_grad():
        for room, length in ((2 * LENGTH - 1, 2 * CHUNK), (2 * LENGTH, 2 * CHUNK - 1)):
            with pytest.raises(ValueError, match=f"room for {length} tokens and {room} keys of neighbors"):
                model(ids, past_key_values=RetroStaticCache(room, length), **given)
        cache = RetroStaticCache(2 * LENGTH - 1, 2 * CHUNK)
        model(ids[:, : CHUNK + 1], past_key_values=cache)
        with pytest.raises(ValueError, match="room for"):
            model(ids[:, CHUNK + 1 :], past_key_values=cache, **{name: x[:, 1:] for name, x in given.items()})
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)


def count_graphs(model, **options):
    """Generates with a compiled step, and returns what it gave and the number of graphs."""
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    config = CompileConfig(fullgraph=True, backend=count, mode=None, dynamic=False)
    config._compile_all_devices = True
    ids, mask = left_padded([2 * CHUNK + 1, CHUNK])
    arguments = {"attention_mask": mask, "max_new_tokens": 3 * CHUNK, **GREEDY, **options}
    expected = model.generate(ids, **arguments)
    found = model.generate(ids, **arguments, cache_implementation="static", compile_config=config)
    assert torch.equal(found, expected)
    return len(compiled)


@pytest.mark.parametrize("reread_tokens", [0, CHUNK])
def test_one_compiled_decoding_step_serves_a_whole_generation(reread_tokens):
    model = make_joint(reread_tokens=reread_tokens)
    model.set_retriever(QuestionRetriever())
    assert count_graphs(model) == 1


def test_one_compiled_decoding_step_with_cross_attention_serves_a_whole_generation():
    model = make_retro()
    assert count_graphs(model) == 1
    # Before the first chunk is complete, the same step runs with absent neighbors.
    model.generation_config.compile_config = None
    ids = torch.randint(1, VOCAB, (1, 2))
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    config = CompileConfig(fullgraph=True, backend=count, mode=None, dynamic=False)
    config._compile_all_devices = True
    arguments = {"max_new_tokens": 3 * CHUNK, **GREEDY}
    found = model.generate(ids, **arguments, cache_implementation="static", compile_config=config)
    assert torch.equal(found, model.generate(ids, **arguments)) and len(compiled) == 1
