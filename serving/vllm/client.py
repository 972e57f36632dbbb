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
"""One vLLM process behind an address: which texts it has read, and requests that read and write stretches of a row"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import aiohttp

from ..sampling import LOWEST_LOGPROB, ChosenToken, SamplingParameters
from .connector.retro_states import PROBE_LENGTH, text_key
from .schedule import Stretch, Text


# Texts and stretches are read this many in one request.
TEXTS_AT_ONCE = 64
STRETCHES_AT_ONCE = 16
# Texts that are known to have been read. What the engine has dropped since is told by an error.
MAX_KNOWN = 1 << 16


class EngineError(Exception):
    """A request to vLLM that failed. What it needed must be read again."""


class EngineGoneError(EngineError):
    """There is no engine at the address."""


class EngineClient:
    """
    A client of one vLLM process that was started with the connector.

    Args:
        url (`str`): Its address, such as `http://127.0.0.1:8100`.
        session (`aiohttp.ClientSession`): The session of requests.
        probe_token (`int`): A token whose states are not zero, as those of padding can be.
        reader (`str`, *optional*): Name of the adapter with which texts are read.

    Attributes:
        num_rows (`int`): Number of rows that run there.
        is_connected (`bool`): Whether it answered when it was asked last.
        connecting (`asyncio.Lock`): Held by the row that waits for it to come back.
        turn (`asyncio.Lock`): Held by a row that is read again.
        states (`dict`): What the connector holds, as it said last.
    """

    def __init__(self, url: str, session: aiohttp.ClientSession, probe_token: int, reader: str | None = None):
        self.url = url.rstrip("/")
        self.session = session
        self.probe_token = probe_token
        self.reader = reader
        self.num_rows = 0
        self.states: dict[str, Any] = {}
        self.max_model_len = 0
        self.is_connected = False
        self.connecting = asyncio.Lock()
        self.turn = asyncio.Lock()
        self._model = ""
        self._read: dict[str, asyncio.Future[None]] = {}
        self._unneeded: set[str] = set()

    async def connect(self) -> None:
        """
        Asks which model the engine has, and whether its connector works.

        Raises:
            EngineGoneError: If nobody answers.
            ValueError: If the engine has no connector, or one that cannot move the keys of its model.
        """
        self._read.clear()
        async with self._sending("GET", "/v1/models") as answer:
            models = {model["id"]: model for model in (await answer.json())["data"]}
        base = next((model for model in models.values() if not model.get("parent")), None)
        if base is None or (self.reader is not None and self.reader not in models):
            raise ValueError(f"the engine at {self.url} has the models {sorted(models)}, expected {self.reader!r} too")
        self._model, self.max_model_len = base["id"], base["max_model_len"]
        params = {"store": True}
        states = await self._complete([[self.probe_token] * PROBE_LENGTH], 1, params, self._model)
        # What the probe says is known when the step after it has run.
        states = await self._complete([[self.probe_token]], 1, params, self._model) if states else None
        if not states:
            raise ValueError(f"the engine at {self.url} was started without the connector; see docs/serving_vllm.md")
        if "refusal" in states:
            raise ValueError(f"the engine at {self.url} cannot serve this model: {states['refusal']}")
        self.is_connected = True

    async def read_texts(self, stretches: Sequence[Stretch]) -> None:
        """Lets the engine read the texts of stretches, each by itself, which it has not read yet."""
        wanted = {self.key(text): (text, stretch) for stretch in stretches for text in stretch.texts}
        missing = {key: pair for key, pair in wanted.items() if key not in self._read}
        if missing:
            reading = asyncio.ensure_future(self._read_all(missing.values()))
            for key in missing:
                self._read[key] = reading
            reading.add_done_callback(lambda done: self._forget_failed(done, missing))
        readings = {key: self._read.pop(key) for key in wanted}
        self._read |= readings  # what was used last is forgotten last
        # Another row may be the one that asked for them, and may be cancelled meanwhile.
        await asyncio.gather(*map(asyncio.shield, set(readings.values())))
        while len(self._read) > MAX_KNOWN:
            del self._read[next(iter(self._read))]

    async def _read_all(self, pairs: Iterable[tuple[Text, Stretch]]) -> None:
        groups: dict[int, list[list[int]]] = {}
        for text, stretch in pairs:
            # Most often a text is seen from the same distance again, so that its keys need not be moved again.
            groups.setdefault(stretch.num_seen + text.start, []).append(list(text.tokens))
        for position, texts in groups.items():
            params = {"store": True, "position": position}
            for start in range(0, len(texts), TEXTS_AT_ONCE):
                await self._complete(texts[start : start + TEXTS_AT_ONCE], 1, params, self.reader or self._model)

    def _forget_failed(self, done: asyncio.Future[None], keys: Sequence[str]) -> None:
        if done.cancelled() or done.exception() is not None:
            self._forget(keys)

    def key(self, text: Text) -> str:
        """The name of a text in the engine."""
        return text_key(text.tokens, self.reader or "")

    def forget(self, texts: Sequence[Text]) -> None:
        """Lets texts be read again when they are needed next, because the engine may have dropped them."""
        self._forget([self.key(text) for text in texts])

    def _forget(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._read.pop(key, None)

    def drop_row(self, row: str) -> None:
        """Lets the engine drop the states of a row with the next request."""
        self._unneeded.add(row)

    async def write(
        self,
        row: str | None,
        tokens: Sequence[int],
        stretches: Sequence[Stretch],
        max_tokens: int,
        keep: int,
        sampling: dict[str, Any],
    ) -> AsyncIterator[ChosenToken]:
        """
        Reads stretches, and writes on.

        Args:
            row (`str`, *optional*): Name of the row. Without one, nothing is loaded or kept.
            tokens (`Sequence[int]`): The row so far.
            stretches (`Sequence[Stretch]`): Its last stretches. All but the last of them are read whole.
            max_tokens (`int`): Largest number of tokens to write.
            keep (`int`): Number of tokens of the row whose states are kept.
            sampling (`dict`): How tokens are chosen (see [`sampling_fields`]).
        """
        prompts, params = [list(tokens)], {}
        if row is not None:
            *others, (prompts, described) = self._batches(tokens, stretches, keep)
            for batch, said in others:
                await self._complete(batch, 1, self._row_params(row, said), self._model)
            described[-1]["writes"] = True
            params = {"kv_transfer_params": self._row_params(row, described)}
        body = {"prompt": prompts, "max_tokens": max_tokens, "stream": True, **sampling}
        body |= {"model": self._model, "return_token_ids": True}
        async with self._sending("POST", "/v1/completions", json=body | params) as answer:
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                piece = json.loads(line[6:])
                if "error" in piece:
                    raise EngineError(f"vLLM at {self.url} failed: {piece['error']}")
                (choice,) = piece["choices"]
                for chosen in _chosen(choice) if choice["index"] == len(prompts) - 1 else ():
                    yield chosen

    def _batches(
        self, tokens: Sequence[int], stretches: Sequence[Stretch], keep: int
    ) -> list[tuple[list[list[int]], list[dict[str, Any]]]]:
        """Prompts that are sent together, and what the connector is told about each of them."""
        batches: list[tuple[list[list[int]], list[dict[str, Any]]]] = [([], [])]
        for stretch in stretches:
            kept = keep if stretch is stretches[-1] else stretch.end
            prompt, description = self._prompt(tokens[: stretch.end], stretch, kept)
            # The connector tells the prompts of a request apart by their lengths.
            is_known = any(len(other) == len(prompt) for other in batches[-1][0])
            if is_known or len(batches[-1][0]) == STRETCHES_AT_ONCE:
                batches.append(([], []))
            batches[-1][0].append(prompt)
            batches[-1][1].append(description)
        return batches

    def _prompt(self, tokens: Sequence[int], stretch: Stretch, keep: int) -> tuple[list[int], dict[str, Any]]:
        """The prompt of a stretch that ends with `tokens`, and what the connector is told about it."""
        texts = [(self.key(text), text.num_hidden, len(text.tokens), text.start) for text in stretch.texts]
        # Nothing is computed of tokens in sight, but drafts by n-grams are found in them.
        seen = [token for text in stretch.texts for token in text.tokens[text.num_hidden :]]
        prompt = seen + list(tokens)
        return prompt, {"length": len(prompt), "texts": texts, "load": stretch.start, "keep": keep}

    def _row_params(self, row: str, stretches: list[dict[str, Any]]) -> dict[str, Any]:
        params = {"row": row, "stretches": stretches, "drop": list(self._unneeded)}
        self._unneeded.clear()
        return params

    async def _complete(
        self, prompts: list[list[int]], max_tokens: int, params: dict[str, Any], model: str
    ) -> dict[str, Any] | None:
        body = {"model": model, "prompt": prompts, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        async with self._sending("POST", "/v1/completions", json=body | {"kv_transfer_params": params}) as answer:
            states = (await answer.json()).get("kv_transfer_params")
        self.states = states or self.states
        return states

    def _sending(self, method: str, path: str, **options: Any) -> "_Sending":
        return _Sending(self.session.request(method, self.url + path, **options), self.url)


class _Sending:
    """A request whose failures are [`EngineError`]s."""

    def __init__(self, request: Any, url: str):
        self._request, self._url = request, url

    async def __aenter__(self) -> aiohttp.ClientResponse:
        try:
            answer = await self._request.__aenter__()
        except (aiohttp.ClientConnectionError, OSError) as error:
            raise EngineGoneError(f"vLLM at {self._url} does not answer: {error}") from error
        if answer.status >= 300:
            text = await answer.text()
            await self._request.__aexit__(None, None, None)
            raise EngineError(f"vLLM at {self._url} answered with status {answer.status}: {text[:500]}")
        return answer

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        await self._request.__aexit__(kind, error, trace)
        if isinstance(error, (aiohttp.ClientError, OSError)):
            raise EngineGoneError(f"vLLM at {self._url} broke off: {error}") from error


def sampling_fields(parameters: SamplingParameters, end_tokens: Sequence[int], seed: int | None) -> dict[str, Any]:
    """
    The fields of a request that say how tokens are chosen. Those that the generation config of a model could set are
    all given.

    Args:
        parameters ([`SamplingParameters`]): How tokens are chosen.
        end_tokens (`Sequence[int]`): Tokens that end a text.
        seed (`int`, *optional*): The seed of this request.
    """
    fields: dict[str, Any] = {
        "temperature": parameters.temperature,
        "top_p": parameters.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": seed,
        "logit_bias": {str(token): bias for token, bias in parameters.logit_bias.items()},
        "logprobs": parameters.num_logprobs,  # None asks for none, which saves a pass over the vocabulary
        "return_tokens_as_token_ids": True,
        "ignore_eos": True,
        "stop_token_ids": sorted(end_tokens),
    }
    return fields


def _chosen(choice: dict[str, Any]) -> list[ChosenToken]:
    """The tokens of one piece of a stream."""
    tokens, logprobs, chosen = choice.get("token_ids") or [], choice.get("logprobs"), []
    if logprobs is None:
        return [ChosenToken(token, None, []) for token in tokens]
    for number, token in enumerate(tokens):
        own = logprobs["token_logprobs"][number]
        top = [(_token_id(name), _finite(value)) for name, value in (logprobs["top_logprobs"][number] or {}).items()]
        chosen.append(ChosenToken(token, _finite(own), sorted(top, key=lambda pair: -pair[1])))
    return chosen


def _token_id(name: str) -> int:
    return int(name.removeprefix("token_id:"))


def _finite(logprob: float | None) -> float:
    return LOWEST_LOGPROB if logprob is None else max(logprob, LOWEST_LOGPROB)
