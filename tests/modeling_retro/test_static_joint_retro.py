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
from test_generation_retro import left_padded
from test_modeling_retro import CHUNK
from test_questions_retro import QuestionRetriever, passage_inputs
from tiny_joint import make_joint
from transformers import CompileConfig


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-sliding"])
@pytest.mark.parametrize("reread_tokens", [0, CHUNK])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"passages": "in_order"}])
def test_a_static_cache_generates_what_the_dynamic_one_generates(family, reread_tokens, options):
    model = make_joint(family, reread_tokens=reread_tokens)
    model.set_retriever(QuestionRetriever())
    ids, mask = left_padded([2 * CHUNK + 1, CHUNK, 2])
    arguments = {"attention_mask": mask, "max_new_tokens": 3 * CHUNK, "do_sample": False, "eos_token_id": None}
    arguments |= {"pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True, **options}
    if "passages" in options:
        arguments |= passage_inputs(3, options["passages"])
    expected = model.generate(ids, **arguments)
    found = model.generate(ids, **arguments, cache_implementation="static")
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("reread_tokens", [0, CHUNK])
def test_one_compiled_decoding_step_serves_a_whole_generation(reread_tokens):
    model = make_joint(reread_tokens=reread_tokens)
    model.set_retriever(QuestionRetriever())
    ids, mask = left_padded([2 * CHUNK + 1, CHUNK])
    arguments = {"attention_mask": mask, "max_new_tokens": 3 * CHUNK, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **arguments, pad_token_id=0)
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    config = CompileConfig(fullgraph=True, backend=count, mode=None, dynamic=False)
    config._compile_all_devices = True
    found = model.generate(ids, **arguments, pad_token_id=0, cache_implementation="static", compile_config=config)
    assert torch.equal(found, expected)
    assert len(compiled) == 1
