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
Hundreds of requests on the loopback, many of whose clients leave: every answer is the one that its prompt gets alone,
and the memory of the process stays what it was.
"""

import os
import random
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from tiny_server import retriever_of, running, save_model

from serving.load import load_served_model
from trainers.load_model import load_retro_model


WORDS = ["retro", "looks", "things", "up", "in", "a", "datastore", "naïve", "δέλτα", "日本語"]
MAX_TOKENS = 24


def resident_megabytes():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def make_requests(number, seed=0):
    generator = random.Random(seed)
    prompts = [" ".join(generator.choices(WORDS, k=generator.randint(1, 25))) for _ in range(20)]
    for _ in range(number):
        yield (
            generator.choice(prompts),
            generator.random() < 0.7,
            generator.choice(["whole", "stream", "leave", "cut"]),
        )


class Soak:
    def __init__(self, address, expected):
        self.expected = expected
        self.clients = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=20, timeout=120)

    def ask(self, request):
        """Whether the answer is the expected one; `None` for a client that left."""
        prompt, retrieval, manner = request
        arguments = {"model": "tiny", "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0}
        arguments["extra_body"] = {"retrieval": retrieval}
        if manner == "whole":
            return self.clients.completions.create(**arguments).choices[0].text == self.expected[prompt, retrieval]
        if manner == "cut":  # a client that gives up on a whole answer
            try:
                self.clients.with_options(timeout=0.05, max_retries=0).completions.create(**arguments)
            except (openai.APITimeoutError, openai.RateLimitError):
                return None
            return True
        with self.clients.completions.create(**arguments, stream=True) as stream:
            text = ""
            for piece in stream:
                text += piece.choices[0].text
                if manner == "leave" and len(text) > 5:
                    return None if self.expected[prompt, retrieval].startswith(text) else False
        return text == self.expected[prompt, retrieval]


@pytest.mark.parametrize("number", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_answers_of_a_soak_are_those_of_each_prompt_alone(number, tiny_datastore_dir, tmp_path):
    folder = save_model("joint", tiny_datastore_dir, tmp_path / "tiny")
    retriever = retriever_of(tiny_datastore_dir)
    model = load_retro_model(str(folder), retriever.datastore)
    model.set_retriever(retriever)
    served = load_served_model(str(folder), str(tiny_datastore_dir), max_batch_size=8)
    requests = list(make_requests(number))
    expected = {}
    for prompt, retrieval, _ in requests:
        if (prompt, retrieval) not in expected:
            ids = torch.tensor([served.prompts.encode_text(prompt)])
            with model.retrieval(retrieval), torch.no_grad():
                output = model.generate(
                    ids, max_new_tokens=MAX_TOKENS, do_sample=False, eos_token_id=0, pad_token_id=1
                )
            expected[prompt, retrieval] = served.prompts.tokenizer.decode(
                output[0, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
    with running(served) as address:
        soak = Soak(address, expected)
        outcomes, memory = [], []
        with ThreadPoolExecutor(12) as pool:
            for start in range(0, number, max(20, number // 10)):
                outcomes += pool.map(soak.ask, requests[start : start + max(20, number // 10)])
                memory.append(resident_megabytes())
        assert False not in outcomes
        assert outcomes.count(True) > number / 4 and outcomes.count(None) > number / 10
        if number >= 500:
            print("\nresident megabytes:", [round(value) for value in memory])
            assert memory[-1] - memory[2] < 20
    assert served.engine.num_running == served.engine.num_waiting == 0
