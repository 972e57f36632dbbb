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
An encoder behind an address: text-embeddings-inference (`/embed`), or a server with the API of OpenAI
(`/v1/embeddings`), such as vLLM or `retro serve`

```python
from modeling_retro import ChunkEncoder

encoder = ChunkEncoder.from_pretrained("http://127.0.0.1:8080/embed")
encoder = ChunkEncoder.from_pretrained("https://host/v1/embeddings?model=BAAI/bge-base-en-v1.5&parallel=16")
```
"""

import base64
import hashlib
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np

from .chunk_encoder import ChunkEncoder, kept_dimensions


# A datastore does not say where its encoder is. The user does, in the first of these variables of the environment.
ADDRESS, KEY = "RETRO_ENCODER", "RETRO_ENCODER_API_KEY"
# The vectors of these texts tell a model from others. The texts never change, because datastores hold their vectors.
PROBES = (
    "A datastore holds documents, and a model reads its neighbors.",
    "def area(radius):\n    return math.pi * radius ** 2",
    "Wie weit ist es von Zürich nach 東京?",
    "RETRO 2022: 7.5 B parameters, 2 T tokens (see arXiv 2112.04426, table 1).",
)
# Largest distance of the vectors of a probe, as a share of their length. The same weights in bfloat16 and float32
# differ by 0.01; noise of 1 % of the standard deviation of each weight makes 0.03 (all-MiniLM-L6-v2).
TOLERANCE = 0.02

_TRIES = 5
_LONGEST_PAUSE = 60.0
_RETRIED = (408, 425, 429, 500, 502, 503, 504)


class EndpointEncoder(ChunkEncoder):
    """
    Embeds texts with the model that a server holds. The first of [`PROBES`] goes with each request, so that a server
    that changes its model meanwhile, or whose replicas differ, is noticed.

    Args:
        address (`str`):
            `http(s)://HOST:PORT/embed` (text-embeddings-inference) or `http(s)://HOST:PORT/v1/embeddings?model=NAME`
            (OpenAI). Its query may hold `model`, `batch` (most texts in a request, 32 by default), `parallel`
            (requests at the same time, 4) and `timeout` in seconds (30). A key is read from the environment variable
            `RETRO_ENCODER_API_KEY`, and stands nowhere else.
        normalize (`bool`, *optional*, defaults to `True`): Whether embeddings get length 1.
        truncate_dim (`int`, *optional*): Number of leading dimensions that are kept, for Matryoshka encoders.

    Raises:
        ValueError: If the address cannot be understood, or the server refuses a request or answers something else.
        ConnectionError: If the server does not answer, or is too busy, at each of five tries.
    """

    def __init__(self, address: str, normalize: bool = True, truncate_dim: int | None = None):
        parts = urlsplit(address)
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path}"
        self.is_openai = parts.path.endswith("/v1/embeddings")
        if parts.scheme not in ("http", "https") or not (self.is_openai or parts.path.endswith("/embed")):
            raise ValueError(
                f"{self.url!r} is no address of an encoder, expected http(s)://HOST:PORT/embed "
                "(text-embeddings-inference) or http(s)://HOST:PORT/v1/embeddings?model=NAME (OpenAI)"
            )
        if "@" in parts.netloc:
            raise ValueError(f"the address of an encoder must hold no key or password; set {KEY} instead")
        options = dict(parse_qsl(parts.query))
        self.served_name = options.pop("model", None)
        self.batch = int(_number(options, "batch", "32", least=2))
        self.parallel = int(_number(options, "parallel", "4"))
        self.timeout = _number(options, "timeout", "30")
        if options:
            raise ValueError(f"{self.url} has no option {min(options)!r}, only model, batch, parallel and timeout")
        if self.is_openai and self.served_name is None:
            raise ValueError(f"{self.url} needs the name of the model that it serves: {self.url}?model=NAME")
        self._client, self._process = None, None
        self.model = self.tokenizer = self.max_length = None  # the server has them
        self.pooling, self.prompt = "endpoint", ""
        self.normalize, self.truncate_dim = normalize, truncate_dim
        self.served_dim: int | None = None
        self.name, self.revision = self.served_name, None
        if not self.is_openai:
            info = self._send("GET", self.url.removesuffix("embed") + "info")
            self.name = self.served_name or str(info.get("model_id") or "text-embeddings-inference")
            self.revision = info.get("model_sha") if isinstance(info.get("model_sha"), str) else None
        parts = [list(PROBES[start : start + self.batch]) for start in range(0, len(PROBES), self.batch)]
        vectors = np.concatenate([self._request(part) for part in parts])
        self.dim = kept_dimensions(vectors.shape[1], truncate_dim)
        self.probes = self._finish(vectors)
        recorded = np.clip(self.probes, *_FLOAT16).astype("<f2").tobytes()
        self.recorded_probes = base64.b64encode(recorded).decode()
        self.sha256 = hashlib.sha256(f"{self.name} {self.recorded_probes}".encode()).hexdigest()

    @property
    def folder(self) -> None:
        return None

    def describe(self) -> dict[str, Any]:
        """The record for the manifest: the name of the model and its vectors of [`PROBES`], but not the address."""
        return super().describe() | {"probes": self.recorded_probes}

    def encode(
        self,
        texts: Sequence[str],
        tokens_per_batch: int = 4096,
        window: int = 8192,
        advance: Callable[[int], Any] | None = None,
    ) -> np.ndarray:
        """
        Embeds texts.

        Args:
            texts (`Sequence[str]`): The texts. The server cuts or refuses those that are too long for its model.
            tokens_per_batch (`int`, *optional*, defaults to 4096): Not used; `batch` in the address counts texts.
            window (`int`, *optional*, defaults to 8192): Not used.
            advance (`Callable`, *optional*): Called with the number of texts of each batch that is embedded.

        Returns:
            `np.ndarray`: float32 [n, dim], in the order of `texts`. A text of nothing but white space has zeros.

        Raises:
            ValueError: If the server refuses a text, answers something else than a vector for each, or now serves
                another model.
            ConnectionError: If it does not answer, or is too busy, at each of five tries.
        """
        embeddings = np.zeros((len(texts), self.dim), dtype=np.float32)
        rows = np.array([row for row, text in enumerate(texts) if text.strip()], dtype=np.int64)
        batches = [rows[start : start + self.batch - 1] for start in range(0, len(rows), self.batch - 1)]

        def embed(batch: np.ndarray) -> None:
            vectors = self._finish(self._request([PROBES[0], *(texts[row] for row in batch)]))
            if not (distance := _distance(vectors[:1], self.probes[:1])) <= TOLERANCE:
                raise ValueError(
                    f"{self.url} serves another model than before, or another revision: its vector of the text "
                    f"{PROBES[0]!r} is now {distance:.3f} of its length away, expected at most {TOLERANCE}"
                )
            embeddings[batch] = vectors[1:]

        if len(batches) < 2:
            for batch in batches:
                embed(batch)
            return embeddings
        with ThreadPoolExecutor(self.parallel) as pool:
            try:
                for batch, _ in zip(batches, pool.map(embed, batches), strict=True):
                    if advance is not None:
                        advance(len(batch))
            except BaseException:
                pool.shutdown(cancel_futures=True)  # or each would have its five tries first
                raise
        return embeddings

    def _finish(self, vectors: np.ndarray) -> np.ndarray:
        vectors = vectors[:, : self.dim]
        if self.normalize:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors

    def _request(self, texts: list[str]) -> np.ndarray:
        """The vectors of a few texts as the server sends them, float32 [n, dim of the server]."""
        if self.is_openai:
            body = {"model": self.served_name, "input": texts, "encoding_format": "base64"}
        else:
            body = {"inputs": texts, "truncate": True, "normalize": self.normalize}
        answer = self._send("POST", self.url, body)
        try:
            if self.is_openai:
                rows = sorted(answer["data"], key=lambda row: row["index"])
                if [row["index"] for row in rows] != list(range(len(texts))):
                    raise ValueError("it has not one vector for each text")
                vectors = [_vector(row["embedding"]) for row in rows]
            else:
                vectors = [_vector(row) for row in answer]
            vectors = np.array(vectors, dtype=np.float32)
            if vectors.ndim != 2 or len(vectors) != len(texts):
                raise ValueError(f"it has the shape {list(vectors.shape)}, expected [{len(texts)}, dimensions]")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.url} answered no embeddings of {len(texts)} texts: {error!r:.200}") from error
        self.served_dim = self.served_dim or vectors.shape[1]
        if vectors.shape[1] != self.served_dim:
            raise ValueError(
                f"{self.url} now answers vectors of {vectors.shape[1]} dimensions, before it was {self.served_dim}"
            )
        if not np.isfinite(vectors).all():
            row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
            raise ValueError(f"{self.url} answered a vector that is not finite for the text {texts[row][:80]!r}")
        return vectors

    def _send(self, method: str, url: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that the server answers. A request is sent again, after a pause, if another try may succeed."""
        import httpx2  # it comes with huggingface_hub; encoders that are here need none

        key = _key()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        for number in range(_TRIES):
            pause = 0.5 * 2**number
            try:
                response = self._http(httpx2).request(method, url, json=body, headers=headers)
            except httpx2.TransportError as error:
                problem = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            else:
                if response.status_code == 200:
                    try:
                        return response.json()
                    except ValueError as error:
                        raise ValueError(f"{url} answered something else than JSON: {response.text[:80]!r}") from error
                said = " ".join(response.text.split())[:300]
                problem = f"status {response.status_code}: {said.replace(key, '…') if key else said}"
                if response.status_code not in _RETRIED:
                    hint = f" (the key is read from {KEY})" if response.status_code in (401, 403) else ""
                    raise ValueError(f"{url} refused a request with {problem}{hint}")
                asked = response.headers.get("Retry-After", "")
                pause = min(max(pause, float(asked)), _LONGEST_PAUSE) if re.fullmatch(r"\d{1,9}", asked) else pause
            if number < _TRIES - 1:
                time.sleep(pause)
        raise ConnectionError(
            f"{url} did not answer a request in {_TRIES} tries of at most {self.timeout:g} s; the last problem was "
            f"{problem}"
        )

    def _http(self, httpx2: Any) -> Any:
        """The connections of this process, which cannot be shared with a process that was forked from it."""
        if self._process != os.getpid():
            limits = httpx2.Limits(max_connections=max(self.parallel, 16))
            self._client = httpx2.Client(timeout=self.timeout, limits=limits, follow_redirects=False)
            self._process = os.getpid()
        return self._client

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_client": None, "_process": None}


_FLOAT16 = (-float(np.finfo(np.float16).max), float(np.finfo(np.float16).max))


def check_probes(recorded: str, dim: int, encoder: ChunkEncoder, datastore: str) -> None:
    """
    Raises a `ValueError` unless an encoder, behind an endpoint or here, gives the vectors of [`PROBES`] that a
    datastore recorded.

    Args:
        recorded (`str`): The vectors in the manifest.
        dim (`int`): Number of dimensions in the manifest.
        encoder ([`ChunkEncoder`]): The encoder.
        datastore (`str`): Name of the datastore in the error.
    """
    values = base64.b64decode(recorded)
    if len(values) != 2 * len(PROBES) * dim:
        raise ValueError(
            f"{datastore} records {len(values)} bytes of probes of its encoder, expected 2 × {len(PROBES)} × {dim}"
        )
    if encoder.dim != dim:
        raise ValueError(f"the encoder {encoder.name} is not that of {datastore}: its dim is {encoder.dim}, not {dim}")
    found = encoder.probes if isinstance(encoder, EndpointEncoder) else encoder.encode(PROBES)
    expected = np.frombuffer(values, dtype="<f2").astype(np.float32).reshape(-1, dim)
    if not (distance := _distance(found, expected)) <= TOLERANCE:
        raise ValueError(
            f"the encoder {encoder.name} is not that of {datastore}, or of another revision: its vector of one of "
            f"{len(PROBES)} fixed texts is {distance:.3f} of its length away from the recorded one, expected at most "
            f"{TOLERANCE}"
        )


def _distance(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest distance of two vectors of a text, as a share of the length of the expected one."""
    lengths = np.linalg.norm(expected, axis=1).clip(min=1e-12)
    return float((np.linalg.norm(found - expected, axis=1) / lengths).max())


def _vector(value: Any) -> np.ndarray:
    """A vector from a list of numbers, or from the base64 of its float32 values, which is a third as long."""
    if isinstance(value, str):
        return np.frombuffer(base64.b64decode(value, validate=True), dtype="<f4")
    return np.array(value, dtype=np.float32)


def _number(options: dict[str, str], name: str, default: str, least: int = 0) -> float:
    value = options.pop(name, default)
    pattern = r"\d{1,6}(\.\d{1,6})?" if name == "timeout" else r"\d{1,6}"
    if not re.fullmatch(pattern, value) or not max(float(value), 0) or float(value) < least:
        raise ValueError(f"{name} in the address of an encoder is {value!r}, expected a number from {max(least, 1)}")
    return float(value)


def _key() -> str:
    key = os.environ.get(KEY, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"{KEY} holds white space or unprintable characters, which no request can carry")
    return key


__all__ = ["ADDRESS", "KEY", "PROBES", "TOLERANCE", "EndpointEncoder", "check_probes"]
