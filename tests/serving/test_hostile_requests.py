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
"""Requests that mean harm, errors inside the server, and the end of the server, on the loopback."""

import json
import logging
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from tiny_server import TEMPLATE, running, save_model

from serving.app import create_app
from serving.listening import Server, bind
from serving.load import load_served_model
from serving.sampling import Sampler, SamplingParameters
from serving.schema import ChatRequest
from serving.scripts import serve
from trainers.chat_template import ChatTemplate


NO_END = {"logit_bias": {"0": -100}}
PROMPT = {"model": "tiny", "prompt": "retro looks"}
ENDLESS = "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4


@pytest.fixture(scope="module")
def folder(tiny_datastore_dir, tmp_path_factory):
    return save_model("joint", tiny_datastore_dir, tmp_path_factory.mktemp("hostile") / "tiny")


def load(folder, datastore):
    served = load_served_model(str(folder), str(datastore), max_prompt_tokens=120, max_batch_size=4, max_waiting=4)
    served.prompts.tokenizer.chat_template = TEMPLATE
    return served


@pytest.fixture(scope="module")
def served(folder, tiny_datastore_dir):
    return load(folder, tiny_datastore_dir)


@pytest.fixture(scope="module")
def address(served):
    with running(served) as address:
        yield address


@pytest.fixture
def own(folder, tiny_datastore_dir):
    """A server for a test that breaks it."""
    served = load(folder, tiny_datastore_dir)
    with running(served) as address:
        yield served, address


def post(address, path="completions", **body):
    return httpx.post(f"{address}/v1/{path}", json={**PROMPT, **body} if path == "completions" else body, timeout=120)


def together(served, step):
    """A step that waits until there are two completions."""
    has_begun = threading.Event()

    def waiting_step():
        while not has_begun.is_set() and served.engine.num_running + served.engine.num_waiting < 2:
            time.sleep(0.01)
        has_begun.set()
        return step()

    return waiting_step


def texts(response):
    assert response.status_code == 200, response.text
    return [choice["text"] for choice in response.json()["choices"]]


@pytest.mark.hostile(
    "a request with temperature 1e-37 and a negative frequency penalty, beside three others",
    "it is answered, and each of the others gets the answer that it gets alone",
)
def test_the_smallest_temperature_spares_the_others(address):
    others = [{"prompt": "retro " * n, "max_tokens": 40, "seed": n, **NO_END} for n in (1, 2, 3)]
    alone = [texts(post(address, **other)) for other in others]
    hostile = {"max_tokens": 40, "temperature": 1e-37, "frequency_penalty": -2, **NO_END}
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(post, address, **body) for body in (hostile, *others)]
    assert found[0].result().status_code == 200
    assert [texts(future.result()) for future in found[1:]] == alone


@pytest.mark.parametrize("temperature", [5e-324, 1e-37, 1e-3, 0.7, 2])
@pytest.mark.parametrize("top_p", [5e-324, 1e-9, 0.5, 1])
def test_choices_follow_the_formula_for_any_temperature_and_share(temperature, top_p):
    logits = torch.tensor([300.0, 299.0, -500.0, 299.5, float("-inf")])
    exponents = [(float(logit) - 300) / temperature for logit in logits]
    probabilities = torch.tensor(exponents, dtype=torch.float64).softmax(-1)
    kept = [
        int((probabilities > p).nonzero().shape[0] == 0 or probabilities[probabilities > p].sum() < top_p)
        for p in probabilities
    ]
    expected = (probabilities * torch.tensor(kept)) / (probabilities * torch.tensor(kept)).sum()
    sampler = Sampler(SamplingParameters(temperature, top_p, seed=1))
    drawn = [sampler.choose(logits, logits.log_softmax(-1)).id for _ in range(500)]
    shares = torch.bincount(torch.tensor(drawn), minlength=5) / len(drawn)
    assert (shares - expected).abs().max() < 0.1
    assert (shares[expected == 0] == 0).all()


@pytest.mark.hostile(
    "scores of the model that are NaN or infinite for one of two completions",
    "this one ends with an error, and the other is answered",
)
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_end_their_own_row(address, served, monkeypatch, broken):
    step = together(served, served.engine._batch.step)

    def step_with_broken_row():
        logits = step().clone()
        for row, one in zip(logits, served.engine._running, strict=True):
            if one.parameters.seed == 13 and len(logits) == 2:
                row[:] = broken
        return logits

    with ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(served.engine._batch, "step", step_with_broken_row)
        bad, good = [pool.submit(post, address, max_tokens=20, seed=seed, **NO_END) for seed in (13, 7)]
        assert bad.result().status_code == 500 and bad.result().json()["error"]["type"] == "server_error"
        monkeypatch.undo()
    assert good.result().json()["usage"]["completion_tokens"] == 20
    assert served.engine.num_restarts == 0


@pytest.mark.hostile(
    "a body of 25 kB that asks for 5,000 prompts with n 128",
    "refused by its number of completions before a prompt is tokenized",
)
def test_too_many_completions_are_counted_before_they_are_made(address, served, monkeypatch):
    made = []
    monkeypatch.setattr(served.prompts, "encode_text", made.append)
    for prompts, n in ((5000, 128), (1000, 1), (1, 9), (9, 1)):
        response = post(address, prompt=["a"] * prompts, n=n, max_tokens=1)
        assert response.status_code == 400 and response.json()["error"]["code"] == "too_many_completions"
        assert str(prompts * n) in response.json()["error"]["message"]
    assert made == []


@pytest.mark.hostile(
    "a prompt that takes long to tokenize",
    "`/health` answers meanwhile",
)
def test_health_answers_while_a_request_is_prepared(address, served, monkeypatch):
    is_entered, release = threading.Event(), threading.Event()
    encode = served.prompts.encode_text

    def slow(text):
        is_entered.set()
        release.wait(120)
        return encode(text)

    monkeypatch.setattr(served.prompts, "encode_text", slow)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(post, address, max_tokens=1)
        try:
            assert is_entered.wait(60)
            assert httpx.get(f"{address}/health", timeout=60).status_code == 200
            assert not future.done()
        finally:
            release.set()
        assert future.result().status_code == 200


@pytest.mark.hostile(
    "neighbors of an answer that take long to decode",
    "`/health` answers meanwhile",
)
@pytest.mark.parametrize("stream", [False, True])
def test_health_answers_while_neighbors_are_decoded(address, served, monkeypatch, stream):
    from serving.answers import Answer

    is_entered, release = threading.Event(), threading.Event()
    decode = Answer._neighbors

    def slow(self, chunk):
        is_entered.set()
        release.wait(120)
        return decode(self, chunk)

    monkeypatch.setattr(Answer, "_neighbors", slow)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(post, address, prompt="retro looks things up in a datastore", max_tokens=1, stream=stream)
        try:
            assert is_entered.wait(60)
            assert httpx.get(f"{address}/health", timeout=60).status_code == 200
            assert not future.done()
        finally:
            release.set()
        assert future.result().status_code == 200


@pytest.mark.hostile(
    "a chat template that does not end",
    "`/health` answers meanwhile; the template ends with its process after some seconds, and the request is refused",
)
def test_a_chat_template_that_loops_is_ended(own):
    served, address = own
    template = served.prompts.template
    template.seconds = 600  # the test ends it
    served.prompts.tokenizer.chat_template = ENDLESS
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "up"}]}
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(post, address, "chat/completions", **chat)
        try:
            while template._process is None:
                assert not future.done()
            assert httpx.get(f"{address}/health", timeout=60).status_code == 200
            assert post(address, max_tokens=1).status_code == 200
            assert not future.done()
        finally:
            template._process.kill()
        assert future.result().status_code == 400 and "did not end" in future.result().json()["error"]["message"]
    template.seconds = 0.2
    response = post(address, "chat/completions", **chat)
    assert response.status_code == 400 and "within 0.2 seconds" in response.json()["error"]["message"]
    template.seconds = 60
    served.prompts.tokenizer.chat_template = TEMPLATE
    assert post(address, "chat/completions", **chat, max_tokens=1).status_code == 200


@pytest.mark.hostile(
    "a chat template that takes 100 GB of memory, or fails in other ways",
    "refused; the process of the template has 2 GB of address space",
)
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 'a' * (messages | length * 100000000000) }}", "too much memory"),
        ("{{ 'a' * (messages | length * 20000000) }}", "writes 20000000 characters"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ raise_exception('only one speaks') }}", "only one speaks"),
        ("{% for", "expected"),
    ],
)
def test_a_chat_template_that_fails_is_refused(tiny_tokenizer, source, message):
    tokenizer = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<eos>")
    tokenizer.chat_template = source
    template = ChatTemplate(tokenizer, seconds=60)
    with pytest.raises(ValueError, match=message):
        template.render([{"role": "user", "content": "up"}])
    template.close()


def test_a_chat_template_writes_what_transformers_writes(tiny_tokenizer):
    tokenizer = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<eos>")
    template = ChatTemplate(tokenizer, seconds=60)
    messages = [{"role": "system", "content": "naïve\n{{ 1 }}"}, {"role": "user", "content": "日本語 \x1b\u2028"}]
    for source in (TEMPLATE, "{{ messages | tojson }}{{ eos_token }}{% if add_generation_prompt %}!{% endif %}\n"):
        tokenizer.chat_template = source
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert template.render(messages) == expected
    template.close()


@pytest.mark.hostile(
    "a page whose name was made to point at 127.0.0.1 (DNS rebinding)",
    "refused by the host that it names, unless `--allowed_hosts` names it",
)
def test_other_hosts_are_refused(address, served):
    def ask(address, host):
        return httpx.get(f"{address}/v1/models", headers={"Host": host}).status_code

    for host in ("localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]:8000", "192.168.0.7"):
        assert ask(address, host) == 200, host
    for host in (
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "[",
        "a b",
        "x@localhost.evil",
    ):
        assert ask(address, host) == 421, host
    with running_app(served, allowed_hosts=["Retro.example"]) as other:
        assert ask(other, "retro.example:443") == 200 and ask(other, "evil.example") == 421


@pytest.mark.hostile(
    "a page of another origin in a browser",
    "it gets no answer that it may read and none to JSON that it may send, unless `--allow_origins` names it",
)
def test_pages_of_other_origins_are_refused(address, served):
    preflight = {
        "Origin": "http://page.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    url = "v1/chat/completions"
    refused = httpx.options(f"{address}/{url}", headers=preflight)
    assert refused.status_code == 405 and "access-control-allow-origin" not in refused.headers
    # Without being asked, a browser sends a form or plain text.
    plain = httpx.post(f"{address}/v1/completions", content=json.dumps(PROMPT), headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415
    with running_app(served, allow_origins=["http://page.example"], api_key="key") as other:
        taken = httpx.options(f"{other}/{url}", headers=preflight)
        assert taken.status_code == 200 and taken.headers["access-control-allow-origin"] == "http://page.example"
        answer = httpx.get(f"{other}/v1/models", headers={"Origin": "http://page.example"})  # without the key
        assert answer.status_code == 401 and answer.headers["access-control-allow-origin"] == "http://page.example"
        preflight["Origin"] = "http://evil.example"
        assert httpx.options(f"{other}/{url}", headers=preflight).status_code == 400


def running_app(served, **options):
    """A second server of the same model, which leaves the engine alone when it ends."""

    class Shared:
        def __getattr__(self, name):
            return getattr(served.engine, name)

        def close(self):
            pass

    import dataclasses

    return running(dataclasses.replace(served, engine=Shared()), **options)


@pytest.mark.hostile(
    "an error in the thread of the engine while rows leave the batch, such as running out of memory",
    "all clients get an error, `/health` counts it, and later requests are answered",
)
def test_after_an_error_the_engine_starts_again(own, monkeypatch):
    served, address = own
    batch = served.engine._batch
    expected = texts(post(address, max_tokens=8, temperature=0))
    for error in (torch.OutOfMemoryError("no memory"), RuntimeError("x")):
        for name in ("keep", "step"):
            function = getattr(batch, name)

            def failing(*arguments, function=function, error=error):
                if len(batch.rows) == 2:
                    raise error
                return function(*arguments)

            with ThreadPoolExecutor(2) as pool:
                monkeypatch.setattr(batch, "step", together(served, batch.step))
                monkeypatch.setattr(batch, name, failing if name == "keep" else together(served, failing))
                long, short = [pool.submit(post, address, max_tokens=n, **NO_END) for n in (50, 4)]
                assert long.result().status_code == 500
                assert short.result().status_code == (200 if name == "keep" else 500)
                monkeypatch.undo()
    health = httpx.get(f"{address}/health").json()
    assert health["status"] == "ok" and health["engine_restarts"] == 4
    assert texts(post(address, max_tokens=8, temperature=0)) == expected


@pytest.mark.hostile(
    "one of two prompts that join together cannot be read",
    "only this one ends with an error",
)
def test_a_prompt_that_fails_spares_those_that_join_with_it(own, monkeypatch):
    served, address = own
    batch, expected = served.engine._batch, texts(post(address, max_tokens=8, temperature=0))
    inputs = batch._prompt_inputs
    bad = served.prompts.encode_text("bad bad")

    def failing(rows):
        if any(row.tokens == bad for row in rows):
            raise torch.OutOfMemoryError("no memory")
        return inputs(rows)

    monkeypatch.setattr(batch, "_prompt_inputs", failing)
    is_held, release = threading.Event(), threading.Event()
    step = batch.step

    def held_step():
        is_held.set()
        release.wait(120)
        return step()

    monkeypatch.setattr(batch, "step", held_step)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(post, address, max_tokens=20, **NO_END)
        assert is_held.wait(60)
        others = [
            pool.submit(post, address, prompt=prompt, max_tokens=8, temperature=0)
            for prompt in ("bad bad", "retro looks")
        ]
        while served.engine.num_waiting < 2:
            pass
        release.set()
        assert first.result().status_code == 200
        assert others[0].result().status_code == 500
        assert texts(others[1].result()) == expected
    assert served.engine.num_restarts == 0


@pytest.mark.hostile(
    "a chunk of one of the running completions that cannot be looked up",
    "only this one ends with an error; the text of the error stands in the log and not in the answer",
)
def test_a_lookup_that_fails_spares_the_others(own, monkeypatch, caplog):
    served, address = own
    batch, expected = (
        served.engine._batch,
        texts(post(address, prompt="retro looks", max_tokens=20, temperature=0, **NO_END)),
    )
    bad = torch.tensor(served.prompts.encode_text("bad bad"))
    retrieve, step, is_held, release = batch.retriever.retrieve, batch.step, threading.Event(), threading.Event()

    def failing(chunks, *args, **kwargs):
        if (chunks[:, : len(bad)] == bad).all(-1).any():
            raise OSError("/home/secret cannot be read")
        return retrieve(chunks, *args, **kwargs)

    def held_step():
        is_held.set()
        release.wait(120)
        return step()

    monkeypatch.setattr(batch.retriever, "retrieve", failing)
    monkeypatch.setattr(batch, "step", held_step)
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(post, address, prompt="retro looks", max_tokens=20, temperature=0, **NO_END)
        assert is_held.wait(60)
        broken = pool.submit(post, address, prompt="bad bad", max_tokens=20, **NO_END)
        while served.engine.num_waiting < 1:
            pass
        release.set()
        assert broken.result().status_code == 500 and "secret" not in broken.result().text
        assert texts(other.result()) == expected
    assert served.engine.num_restarts == 0 and "/home/secret cannot be read" in caplog.text


@pytest.mark.hostile(
    "an error after which the device of the model cannot be used",
    "all clients get an error, `/health` says that the engine has stopped, and the server ends",
)
def test_a_server_whose_engine_stops_ends(folder, tiny_datastore_dir, monkeypatch, capsys):
    served = load(folder, tiny_datastore_dir)

    def lost():
        raise torch.AcceleratorError("device lost", 0)

    monkeypatch.setattr(served.engine._batch, "step", lost)
    with running(served) as address:
        assert post(address, max_tokens=5, **NO_END).status_code == 503
        assert post(address, max_tokens=5).status_code == 503
        health = httpx.get(f"{address}/health")
        assert health.status_code == 503 and health.json()["status"] == "stopped"
    served = load(folder, tiny_datastore_dir)
    monkeypatch.setattr(served.engine._batch, "step", lost)
    with serving_server(served, grace_period=60) as (server, address, thread):
        assert post(address, max_tokens=5, **NO_END).status_code == 503
        thread.join(60)
        assert not thread.is_alive() and server.has_failed


class serving_server:
    """`retro serve` in a thread."""

    def __init__(self, served, grace_period):
        self.listener = bind("127.0.0.1", 0)
        self.server = Server(create_app(served), served.engine, served.name, grace_period)
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],), daemon=True)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
        return self.server, f"http://127.0.0.1:{self.listener.getsockname()[1]}", self.thread

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join()
        self.listener.close()


@pytest.mark.hostile(
    "SIGTERM while streams run for longer than `--grace_period`",
    "each stream ends with an error that says so",
)
def test_a_stream_that_is_cut_says_so(folder, tiny_datastore_dir, monkeypatch, capsys):
    served = load(folder, tiny_datastore_dir)
    step, release = served.engine._batch.step, threading.Event()
    calls = []

    def slow_step():
        calls.append(None)
        if len(calls) > 3:
            release.wait(120)
        return step()

    monkeypatch.setattr(served.engine._batch, "step", slow_step)
    body = {**PROMPT, "max_tokens": 60, "stream": True, **NO_END}
    with serving_server(served, grace_period=0.2) as (server, address, thread):
        assert re.search(rf"serving 'tiny' on {address}/v1", capsys.readouterr().out)
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=120) as response:
            lines = response.iter_lines()
            next(lines)
            server.should_exit = True
            rest = [line for line in lines if line]
        release.set()
        thread.join(120)
    error = json.loads(rest[-1].removeprefix("data: "))["error"]
    assert error["message"] == "the server is shutting down" and not server.has_failed


def test_a_taken_port_is_refused_before_anything_is_loaded(tmp_path):
    with bind("127.0.0.1", 0) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1, port {port}: .*in use"):
            serve.main(["--model", "none", "--datastore", str(tmp_path), "--port", str(port)])
    with pytest.raises(ValueError, match="cannot listen"):
        bind("203.0.113.1", 8000)
    with pytest.raises(ValueError, match="cannot listen"):
        bind("127.0.0.1", 70000)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.hostile(
    "a key that was read from a file with a newline at its end, or has white space inside",
    "the newline does not belong to the key; other white space is refused when the server starts",
)
def test_a_key_ends_before_its_newline(monkeypatch, served):
    for value, key in (("secret\n", "secret"), ("clé", "clé"), ("", None)):
        monkeypatch.setenv(serve.API_KEY, value)
        assert serve._api_key() == key
    for value in ("\n", "two words", "a\nb", "a\x1bb"):
        monkeypatch.setenv(serve.API_KEY, value)
        with pytest.raises(ValueError, match=serve.API_KEY):
            serve._api_key()
    with running_app(served, api_key="clé") as address:
        for key, status in (("clé", 200), ("cle", 401), ("clé2", 401)):
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert httpx.get(f"{address}/v1/models", headers=headers).status_code == status


BAD_BODIES = [
    b'{"model": "tiny", "prompt": "\\ud800"}',
    b'{"model": "tiny", "prompt": "a\\udfff b", "temperature": 0}',
    b'{"model": "tiny", "prompt": "a", "stop": "\\ud800"}',
    b'{"model": "\\ud800", "prompt": "a"}',
    b'{"model": "tiny", "prompt": "\xff"}',
    b"[" * 100_000 if False else b"[" * 50_000,
    b'{"a":' * 10_000,
    b'{"model": "tiny", "prompt": "a", "temperature": Infinity}',
    b'{"model": "tiny", "prompt": "a", "seed": 1e400}',
    b'{"model": "tiny", "prompt": "a", "n": 99999999999999999999999999}',
    b'{"model": "tiny", "prompt": [99999999999999999999999999]}',
    b'{"model": "tiny", "prompt": [1e30]}',
    b'{"model": "tiny", "prompt": "a", "logit_bias": {"-1": 1}}',
    b'{"model": "tiny", "prompt": "a", "logit_bias": {"99999999999999999999999": 1}}',
    b'{"model": "tiny", "prompt": "a", "max_tokens": 0}',
    b'{"model": "tiny", "prompt": {"a": 1}}',
    b'{"model": "tiny", "prompt": [["a"], 1]}',
    b'{"model": "tiny", "prompt": [{}, {}, {}]}',
    b"null",
    b"",
]


@pytest.mark.hostile(
    "half a surrogate pair, 50,000 open brackets, numbers beyond all bounds, and other broken requests",
    "status 400 with an error that says what is wrong",
)
@pytest.mark.parametrize("body", BAD_BODIES)
def test_broken_requests_are_refused(address, body):
    response = httpx.post(f"{address}/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 404), response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.hostile(
    "temperatures and shares of 1e-300 and 5e-324",
    "answered with the most probable tokens",
)
@pytest.mark.parametrize("field", ["temperature", "top_p"])
@pytest.mark.parametrize("value", [5e-324, 1e-300, 1e-37, 1e-9])
def test_tiny_numbers_are_answered(address, field, value):
    greedy = texts(post(address, max_tokens=12, temperature=0, **NO_END))
    assert texts(post(address, max_tokens=12, **{field: value}, **NO_END)) == greedy


@pytest.mark.hostile(
    "a datastore in which nothing is found for a chunk",
    "answered, with an empty list of neighbors",
)
@pytest.mark.parametrize("stream", [False, True])
def test_nothing_found_is_an_empty_list(address, served, monkeypatch, stream):
    class Empty:
        def retrieve(self, chunks, k):
            found = served.retriever.retrieve(chunks, k)
            found.neighbor_attention_mask = torch.zeros_like(found.neighbor_attention_mask)
            return found

    monkeypatch.setattr(served.engine._batch, "retriever", Empty())
    response = post(address, prompt="retro looks things up in a datastore", max_tokens=2, stream=stream)
    assert response.status_code == 200
    whole = json.loads(response.text.partition("\n")[0].removeprefix("data: ")) if stream else response.json()
    assert all(chunk["neighbors"] == [] for chunk in whole["choices"][0]["neighbors"])
    assert whole["choices"][0]["neighbors"] and (not stream or response.text.endswith("data: [DONE]\n\n"))


@pytest.mark.hostile(
    "an error inside the server whose text names folders of the machine",
    "the client gets an id and not the text; the log has both",
)
@pytest.mark.parametrize("place", ["retriever", "answer", "stream", "prepare"])
def test_errors_inside_tell_an_id(address, served, monkeypatch, caplog, place):
    from serving.answers import Answer

    def fail(*_):
        raise OSError("/secret/folder is gone")

    if place == "retriever":
        monkeypatch.setattr(served.engine._batch, "_look_up", fail)
    elif place == "prepare":
        monkeypatch.setattr(served, "prepare", fail)
    else:
        monkeypatch.setattr(Answer, "_neighbors", fail)
    with caplog.at_level(logging.ERROR):
        response = post(address, prompt="retro looks things up in a datastore", max_tokens=2, stream=place == "stream")
    assert response.status_code == (200 if place == "stream" else 500)
    assert "server_error" in response.text and "secret" not in response.text and "OSError" not in response.text
    (failure,) = re.findall(r"under ([0-9a-f]{12})", response.text)
    record = next(record for record in caplog.records if failure in record.getMessage())
    assert "/secret/folder is gone" in str(record.exc_info[1])
    assert "secret" not in httpx.get(f"{address}/health").text


def test_fields_that_ask_for_nothing_are_taken_and_others_refused(address):
    hello = {"role": "user", "content": "up"}
    for message in ({"name": "ann"}, {"type": "text"}, {"tool_calls": []}, {"annotations": []}, {"refusal": None}):
        body = {"messages": [{**hello, **message}], "model": "tiny", "max_tokens": 1}
        assert post(address, "chat/completions", **body).status_code == 200, message
    for field in (
        {"response_format": {"type": "text"}},
        {"tools": []},
        {"tool_choice": "none"},
        {"store": False},
        {"metadata": {"a": "b"}},
        {"modalities": ["text"]},
        {"parallel_tool_calls": True},
        {"service_tier": "auto"},
    ):
        body = {"messages": [hello], "model": "tiny", "max_tokens": 1, **field}
        assert post(address, "chat/completions", **body).status_code == 200, field
    for field in (
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function"}]},
        {"tool_choice": "required"},
        {"store": True},
        {"modalities": ["audio"]},
    ):
        body = {"messages": [hello], "model": "tiny", "max_tokens": 1, **field}
        response = post(address, "chat/completions", **body)
        assert response.status_code == 400 and response.json()["error"]["param"] == next(iter(field)), field
    for field, status in (
        ({"best_of": 1}, 200),
        ({"best_of": 2, "n": 2}, 200),
        ({"best_of": 2}, 400),
        ({"suffix": ""}, 200),
    ):
        assert post(address, max_tokens=1, **field).status_code == status, field
    assert "echo" not in ChatRequest.model_fields
