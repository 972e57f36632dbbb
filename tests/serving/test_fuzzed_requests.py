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
"""Requests made by chance: each is answered as the server declares, or refused; none is an error inside the server."""

import copy
import json

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import checks
from tiny_server import TEMPLATE, running, save_model

from serving.load import load_served_model
from serving.openapi import ChatAnswer, CompletionAnswer, EmbeddingAnswer, FailureAnswer
from serving.schema import ChatRequest, CompletionRequest, EmbeddingRequest


ANSWERS = {"completions": CompletionAnswer, "chat/completions": ChatAnswer, "embeddings": EmbeddingAnswer}
KINDS = {"completions": CompletionRequest, "chat/completions": ChatRequest, "embeddings": EmbeddingRequest}
COMMON = {"model": "tiny", "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["zz"], "n": 1}
BODIES = {
    "completions": {**COMMON, "prompt": "retro looks things up", "logprobs": 1, "logit_bias": {"0": -1.5}},
    "chat/completions": {
        **COMMON,
        "messages": [{"role": "user", "content": "up"}],
        "logprobs": True,
        "top_logprobs": 1,
    },
    "embeddings": {"model": "tiny", "input": ["retro", "looks things up"], "encoding_format": "float"},
}
# Also halves of surrogate pairs, NaN and infinity, which are no JSON but which json writes and some clients send.
TEXT = st.text(st.characters(exclude_categories=()), max_size=20)
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 1, 1e-300, 5e-324, 1e-37, 2**31, 2**63, 2**70, 1e308])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT | st.sampled_from(["<eos>", "text", "user", "tiny", ""]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
PATH = st.sampled_from(sorted(BODIES))
FUZZ = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def server(tiny_datastore_dir, tmp_path_factory):
    folder = save_model("joint", tiny_datastore_dir, tmp_path_factory.mktemp("fuzzed") / "tiny")
    served = load_served_model(
        str(folder), str(tiny_datastore_dir), max_prompt_tokens=60, max_tokens=8, max_batch_size=2
    )
    served.prompts.tokenizer.chat_template = TEMPLATE
    with running(served) as address:
        yield served, address


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=f"{server[1]}/v1", timeout=120) as client:
        yield client


@st.composite
def changed_bodies(draw, path):
    """A request some of whose fields have other values, are gone, or are unknown."""
    body = copy.deepcopy(BODIES[path])
    for _ in range(draw(st.integers(1, 3))):
        field = draw(st.sampled_from(sorted(KINDS[path].model_fields)) | TEXT)
        if draw(st.booleans()) and field in body and field != "model":
            del body[field]
        else:
            body[field] = draw(VALUES)
    return body


def check(response, path, is_stream=False):
    if response.status_code == 200:
        if not is_stream:
            ANSWERS[path].model_validate_json(response.content)
        else:
            *pieces, last, _ = response.text.split("\n\n")
            assert last == "data: [DONE]"
            assert all("error" not in json.loads(piece.removeprefix("data: ")) for piece in pieces)
    else:
        assert response.status_code in (400, 404), response.text
        FailureAnswer.model_validate_json(response.content)


@pytest.mark.hostile(
    "requests whose fields have values made by chance: any JSON, halves of characters, NaN, huge numbers",
    "each is answered in the declared form or refused with status 400 or 404; no status 500",
)
@FUZZ
@given(data=st.data())
def test_changed_requests_are_answered_or_refused(client, data):
    path = data.draw(PATH)
    body = data.draw(changed_bodies(path))
    response = client.post(f"/{path}", content=json.dumps(body), headers={"Content-Type": "application/json"})
    is_stream = response.headers["content-type"].startswith("text/event-stream")
    check(response, path, is_stream)


@pytest.mark.hostile(
    "requests some of whose bytes were changed by chance",
    "each is answered or refused; no status 500",
)
@FUZZ
@given(data=st.data())
def test_changed_bytes_are_answered_or_refused(client, data):
    path = data.draw(PATH)
    body = bytearray(json.dumps(BODIES[path]).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(body) - 1))
        body[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    check(client.post(f"/{path}", content=bytes(body), headers={"Content-Type": "application/json"}), path)


@FUZZ
@given(text=st.text(min_size=1, max_size=60))
def test_any_text_is_a_prompt_and_comes_back_as_an_echo(client, text):
    body = {"model": "tiny", "prompt": text, "echo": True, "max_tokens": 0}
    response = client.post("/completions", json=body)
    if response.status_code == 400:
        assert response.json()["error"]["code"] == "context_length_exceeded"
    else:
        assert response.json()["choices"][0]["text"] == text
    body["stream"] = True
    response = client.post("/completions", json=body)
    if response.status_code == 200:
        pieces = [line.removeprefix("data: ") for line in response.text.split("\n\n")][:-2]
        assert "".join(json.loads(piece)["choices"][0]["text"] for piece in pieces) == text


@pytest.mark.slow
def test_answers_are_those_that_the_server_declares(server):
    declared = schemathesis.openapi.from_url(f"{server[1]}/openapi.json")
    wanted = [
        checks.not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]
    statuses = {}
    for result in declared.get_all_operations():
        operation = result.ok()
        statuses[operation.path] = set()

        @settings(deadline=None, max_examples=200, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def answers_as_declared(case):
            if isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = "tiny"
            statuses[case.path].add(case.call_and_validate(checks=wanted).status_code)

        answers_as_declared()
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/models", "/health", "/metrics"):
        assert 200 in statuses[path], statuses
