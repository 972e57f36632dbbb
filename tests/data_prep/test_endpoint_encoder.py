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
"""Encoders behind an endpoint: the same vectors, what is noticed and refused, and that nothing is left half done."""

import contextlib
import json
import pickle
import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import TINY_CHUNK_SIZE, make_texts, write_jsonl

from data_prep.chunk import chunk_documents
from data_prep.embed import embed_chunks
from data_prep.index import build_index
from data_prep.prepare import check_needs
from data_prep.upkeep.verify import verify_datastore
from modeling_retro import ChunkEncoder, RetroDatastore, RetroRetriever
from modeling_retro.datastore.manifest import read_manifest
from modeling_retro.encoder import endpoint
from modeling_retro.encoder.endpoint import ADDRESS, KEY, PROBES


TEXTS = ["retro looks things up", "", "naïve δέλτα", " \n", "日本語 in a datastore", *make_texts(70, seed=5)]


class FakeTei(ThreadingHTTPServer):
    """
    text-embeddings-inference as a test wants it. `answer` maps the texts of a request and its number to the JSON of
    the answer, or to a status, a JSON and headers. `requests` are the texts and headers of all requests.
    """

    def __init__(self, encoder):
        self.encoder, self.requests, self.lock = encoder, [], threading.Lock()
        self.info = {"model_id": "tiny/bert", "model_sha": "0123abcd", "max_client_batch_size": 32}
        self.answer = lambda texts, number: self.vectors(texts)
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_port}/embed"

    def vectors(self, texts):
        with self.lock:  # a tokenizer that threads share is not safe
            return self.encoder.encode(texts).tolist()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # header and body in one packet, or each answer waits 40 ms for the next

    def do_GET(self):
        self.send(200, self.server.info, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["truncate"] is True
        with self.server.lock:
            self.server.requests.append((body["inputs"], dict(self.headers)))
            number = len(self.server.requests)
        answer = self.server.answer(body["inputs"], number)
        self.send(*(answer if isinstance(answer, tuple) else (200, answer, {})))

    def send(self, status, content, headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def local(tiny_encoder_dir):
    return ChunkEncoder.from_pretrained(tiny_encoder_dir, device="cpu")


@pytest.fixture
def tei(local):
    server = FakeTei(local)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def pauses(monkeypatch):
    """The seconds that were waited before another try."""
    seconds = []
    monkeypatch.setattr(endpoint.time, "sleep", seconds.append)
    return seconds


@pytest.fixture
def chunked(tmp_path, tiny_tokenizer):
    path = tmp_path / "datastore"
    file = write_jsonl(tmp_path / "a.jsonl", make_texts(20))
    chunk_documents(file, path, tiny_tokenizer, chunk_size=TINY_CHUNK_SIZE, shard_bytes=2000)
    return path


def another(tiny_encoder_dir, noise):
    """The tiny encoder with other weights: each differs by a share of the standard deviation of its tensor."""
    import torch

    encoder = ChunkEncoder.from_pretrained(tiny_encoder_dir, device="cpu")
    torch.manual_seed(1)
    with torch.no_grad():
        for value in encoder.model.parameters():
            value.add_(torch.randn_like(value) * value.std() * noise)
    return encoder


def files_of(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("options", ["", "?batch=2&parallel=1", "?batch=7&parallel=5&timeout=9.5"])
def test_vectors_are_those_of_the_model_here_in_any_batches(tei, local, options):
    encoder = ChunkEncoder.from_pretrained(tei.address + options)
    found = encoder.encode(TEXTS)
    np.testing.assert_allclose(found, local.encode(TEXTS) * [[bool(t.strip())] for t in TEXTS], rtol=0, atol=1e-5)
    assert (found[[1, 3]] == 0).all() and encoder.dim == 16
    most = {"": 32, "?batch=2&parallel=1": 2}.get(options, 7)
    sent = [texts for texts, _ in tei.requests]
    assert max(map(len, sent)) <= most
    assert all(texts[0] == PROBES[0] for texts in sent if not set(texts) <= set(PROBES))
    assert encoder.describe()["name"] == "tiny/bert" and encoder.describe()["revision"] == "0123abcd"
    np.testing.assert_allclose(pickle.loads(pickle.dumps(encoder)).encode(TEXTS[:1]), found[:1], rtol=0, atol=1e-6)


def test_vectors_are_cut_to_their_leading_dimensions(tei, tiny_encoder_dir):
    found = ChunkEncoder.from_pretrained(tei.address, truncate_dim=5).encode(TEXTS[:1])
    expected = ChunkEncoder.from_pretrained(tiny_encoder_dir, device="cpu", truncate_dim=5).encode(TEXTS[:1])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="truncate_dim must lie between 1 and the 16"):
        ChunkEncoder.from_pretrained(tei.address, truncate_dim=17)


def test_the_same_model_here_searches_what_an_endpoint_embedded(chunked, tei, tiny_encoder_dir, monkeypatch):
    embed_chunks(chunked, tei.address)
    build_index(chunked, factory="Flat")
    monkeypatch.setenv(ADDRESS, str(tiny_encoder_dir))
    assert len(RetroRetriever.from_pretrained(chunked, device="cpu").search("retro")) == 4
    other = another(tiny_encoder_dir, 0.1)
    with pytest.raises(ValueError, match="is not that of .*, or of another revision: its vector of one of 4 fixed"):
        RetroRetriever(RetroDatastore.from_pretrained(chunked), encoder=other)


def test_another_revision_is_noticed_and_rounding_is_not(chunked, tei, tiny_encoder_dir, monkeypatch):
    embed_chunks(chunked, tei.address)
    build_index(chunked, factory="Flat")
    monkeypatch.setenv(ADDRESS, tei.address)
    tei.encoder = another(tiny_encoder_dir, 1e-4)
    retriever = RetroRetriever.from_pretrained(chunked)
    retriever.search("retro")
    tei.encoder = another(tiny_encoder_dir, 0.05)
    with pytest.raises(ValueError, match="serves another model than before, or another revision"):
        retriever.search("retro")
    with pytest.raises(ValueError, match="or of another revision"):
        RetroRetriever.from_pretrained(chunked)
    (finding,) = verify_datastore(chunked)
    assert "another revision" in str(finding)
    monkeypatch.delenv(ADDRESS)
    (finding,) = verify_datastore(chunked)
    assert finding.unchecked and ADDRESS in str(finding)


@pytest.mark.hostile(
    "an endpoint that embeds a datastore and meanwhile serves another model, or of which one replica does; answers "
    "another dimension, fewer vectors, NaN, text in place of JSON, a redirection; refuses, or is gone",
    "an error that names the endpoint and what it did. Finished shards stay, no shard is half written, and the same "
    "command goes on",
)
@pytest.mark.parametrize(
    "kind, error",
    [
        ("other model", "serves another model than before"),
        ("other dimension", "now answers vectors of 8 dimensions, before it was 16"),
        ("fewer", r"answered no embeddings of \d+ texts: .*shape"),
        ("ragged", r"answered no embeddings of \d+ texts"),
        ("nan", "a vector that is not finite for the text"),
        ("no json", "answered something else than JSON: 'hello'"),
        ("an object", r"answered no embeddings of \d+ texts"),
        ("redirection", "refused a request with status 302"),
        ("refusal", "refused a request with status 413: .*batch size 32 > maximum"),
        ("gone", "did not answer a request in 5 tries of at most 30 s; .*status 503"),
    ],
)
def test_a_failing_endpoint_is_named_and_leaves_nothing_half_done(
    chunked, tei, tiny_encoder_dir, tmp_path, pauses, kind, error
):
    whole = shutil.copytree(chunked, tmp_path / "whole")
    embed_chunks(whole, tei.address)
    tei.requests.clear()
    other = another(tiny_encoder_dir, 0.1)
    answers = {
        "other model": lambda good: other.encode(texts_of()).tolist(),
        "other dimension": lambda good: [row[:8] for row in good],
        "fewer": lambda good: good[1:],
        "ragged": lambda good: [good[0][:3], *good[1:]],
        "nan": lambda good: [good[0], *([float("nan")] * 16 for _ in good[1:])],
        "no json": lambda good: b"hello",
        "an object": lambda good: {"error": "x"},
        "redirection": lambda good: (302, {}, {"Location": "http://127.0.0.1:9/embed"}),
        "refusal": lambda good: (413, {"error": "batch size 32 > maximum allowed batch size 8"}, {}),
        "gone": lambda good: (503, {"error": "no replica"}, {}),
    }

    def texts_of():
        return tei.requests[-1][0]

    good = tei.answer
    second = 3  # the first request has the probes, the second is of the first shard
    tei.answer = lambda texts, number: good(texts, number) if number < second else answers[kind](good(texts, number))
    with pytest.raises((ValueError, ConnectionError), match=error) as raised:
        embed_chunks(chunked, f"{tei.address}?batch=512&parallel=1")
    assert tei.address in str(raised.value)
    assert pauses == ([0.5, 1, 2, 4] if kind == "gone" else [])
    finished = [file.name for file in (chunked / "embeddings").iterdir() if not file.name.startswith(".")]
    assert finished == ["shard-00000.npy"]
    assert read_manifest(chunked).train.embedding_shards == []
    tei.answer = good
    embed_chunks(chunked, tei.address)
    assert files_of(chunked) == files_of(whole)


def test_a_busy_endpoint_is_asked_again_after_the_pause_that_it_names(tei, local, pauses):
    encoder = ChunkEncoder.from_pretrained(tei.address)
    good, failures = tei.answer, [(429, {}, {"Retry-After": "7"}), (503, {}, {}), (429, {}, {"Retry-After": "9" * 9})]
    tei.answer = lambda texts, number: failures.pop(0) if failures else good(texts, number)
    np.testing.assert_allclose(encoder.encode(TEXTS[:1]), local.encode(TEXTS[:1]), rtol=0, atol=1e-5)
    assert pauses == [7, 1, 60]


def test_an_endpoint_that_hangs_or_is_not_there_is_named(tei, pauses):
    encoder = ChunkEncoder.from_pretrained(f"{tei.address}?timeout=0.1")
    release = threading.Event()
    tei.answer = lambda texts, number: release.wait(30) and []
    with pytest.raises(ConnectionError, match=r"did not answer a request in 5 tries of at most 0.1 s; .*ReadTimeout"):
        encoder.encode(TEXTS[:1])
    release.set()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ConnectionError, match=f"127.0.0.1:{port}/info did not answer.*ConnectError"):
        ChunkEncoder.from_pretrained(f"http://127.0.0.1:{port}/embed")


def test_after_a_refusal_the_other_requests_are_not_tried(tei, pauses):
    encoder = ChunkEncoder.from_pretrained(f"{tei.address}?batch=2&parallel=2")
    before = len(tei.requests)
    tei.answer = lambda texts, number: (422, {"error": "no"}, {})
    with pytest.raises(ValueError, match="status 422"):
        encoder.encode(["a"] * 200)
    assert len(tei.requests) - before <= 8


@pytest.mark.parametrize(
    "address, error",
    [
        ("http://127.0.0.1:9/", "is no address of an encoder, expected"),
        ("ftp://127.0.0.1:9/embed", "is no address of an encoder"),
        ("http://user:key@127.0.0.1:9/embed", "must hold no key or password; set RETRO_ENCODER_API_KEY"),
        ("http://127.0.0.1:9/v1/embeddings", r"needs the name of the model .*\?model=NAME"),
        ("http://127.0.0.1:9/embed?batch=1", "batch in the address of an encoder is '1', expected a number from 2"),
        ("http://127.0.0.1:9/embed?timeout=0", "timeout in the address of an encoder is '0'"),
        ("http://127.0.0.1:9/embed?api_key=x", "has no option 'api_key', only model, batch"),
    ],
)
def test_addresses_that_cannot_be_right_are_refused_before_anything_is_sent(address, error):
    with pytest.raises(ValueError, match=error):
        ChunkEncoder.from_pretrained(address)


def test_options_that_the_server_decides_are_refused(tei, monkeypatch):
    for option in ({"pooling": "cls"}, {"revision": "main"}):
        with pytest.raises(ValueError, match="the server of an encoder decides its"):
            ChunkEncoder.from_pretrained(tei.address, **option)
    monkeypatch.setenv(KEY, "two words")
    with pytest.raises(ValueError, match="RETRO_ENCODER_API_KEY holds white space"):
        ChunkEncoder.from_pretrained(tei.address)


def test_the_key_is_sent_to_the_address_and_stands_in_no_error(tei, monkeypatch):
    monkeypatch.setenv(KEY, "sk-123")
    encoder = ChunkEncoder.from_pretrained(tei.address)
    assert all(headers["Authorization"] == "Bearer sk-123" for _, headers in tei.requests)
    tei.answer = lambda texts, number: (401, {"error": "wrong key sk-123"}, {})
    with pytest.raises(ValueError, match="status 401: .*wrong key …") as raised:
        encoder.encode(["a"])
    assert "sk-123" not in str(raised.value)


@pytest.mark.hostile(
    "a datastore that names the address of a server as its encoder, or says that its encoder is behind an endpoint",
    "nothing is connected to: the address comes from the user, in a command or in the environment",
)
def test_a_datastore_cannot_make_a_client_connect(chunked, tei, monkeypatch):
    embed_chunks(chunked, tei.address)
    monkeypatch.delenv(ADDRESS, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        manifest = read_manifest(chunked)
        manifest.encoder.name = f"http://127.0.0.1:{listener.getsockname()[1]}/embed"
        manifest.write(chunked)
        with pytest.raises(ValueError, match="no datastore says where"):
            RetroDatastore.from_pretrained(chunked).open_encoder()
        manifest.encoder.probes = None
        manifest.write(chunked)
        with pytest.raises(ValueError, match="only an id on the Hub is opened"):
            RetroDatastore.from_pretrained(chunked).open_encoder()
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.parametrize("probes", ["", "AAAA", "not base64", 5])
def test_recorded_vectors_that_cannot_be_right_are_refused(chunked, tei, monkeypatch, probes):
    embed_chunks(chunked, tei.address)
    monkeypatch.setenv(ADDRESS, tei.address)
    file = chunked / "datastore.json"
    values = json.loads(file.read_text())
    values["encoder"]["probes"] = probes
    values.pop("sha256")
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="probes is|probes of its encoder, expected 2 × 4 × 16"):
        datastore = RetroDatastore.from_pretrained(chunked)
        datastore.check_encoder(datastore.open_encoder())


def test_an_endpoint_takes_the_place_of_an_encoder_that_was_copied(chunked, tei, tiny_encoder_dir):
    embed_chunks(chunked, tiny_encoder_dir)
    assert (chunked / "encoder").is_dir()
    with pytest.raises(ValueError, match="is not the encoder of"):
        embed_chunks(chunked, tei.address)
    embed_chunks(chunked, tei.address, force=True)
    assert not (chunked / "encoder").exists()
    embed_chunks(chunked, tiny_encoder_dir)  # has the same vectors, and is copied again
    assert verify_datastore(chunked) == []


def test_a_recipe_asks_its_endpoint_before_the_first_stage(tei, tmp_path, tiny_tokenizer, pauses):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    file = write_jsonl(tmp_path / "a.jsonl", ["abc"])
    recipe = {"tokenizer": str(tmp_path / "tokenizer"), "encoder": tei.address, "splits": {"train": str(file)}}
    check_needs(recipe, tmp_path, tmp_path / "datastore")
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        recipe["encoder"] = f"http://127.0.0.1:{free.getsockname()[1]}/embed?timeout=0.1"
        with pytest.raises(ConnectionError, match="did not answer"):
            check_needs(recipe, tmp_path, tmp_path / "datastore")
