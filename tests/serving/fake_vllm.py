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
The part of vLLM's server that the client of `serving.vllm` uses, with the connector, computed by a decoder in this
process. It takes requests as they are: positions, loading and keeping follow `retro_connector`, and nothing here knows
of chunks.
"""

import asyncio
import json
import threading

import torch
from aiohttp import web
from transformers import DynamicCache

from serving.vllm.connector.retro_states import Directory, Rotation, text_key


class FakeVllm:
    """
    Serves a decoder inside a `with` block.

    Args:
        decoder (`PreTrainedModel`): The decoder.
        max_tokens_held (`int`, *optional*): Largest number of tokens whose states are held.
        fail (`Callable`, *optional*): Called with each request; a true value makes it fail in that way: `"error"`, or
            `"gone"`, which breaks the connection and forgets all states.
    """

    def __init__(self, decoder, max_tokens_held=1 << 20, fail=lambda body: None, port=0):
        self.decoder, self.fail, self.port = decoder, fail, port
        config = decoder.config
        width = config.head_dim
        theta = config.rope_parameters["rope_theta"]
        self.rotation = Rotation(theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width))
        self.directory = Directory(max_tokens_held)
        self.states = {}
        self.requests = []
        self.num_computed = 0

    def __enter__(self):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self.loop).result()
        return self

    def __exit__(self, *error):
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    async def _start(self):
        app = web.Application(client_max_size=1 << 24)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._completions)
        self.runner = web.AppRunner(app, shutdown_timeout=0)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self.runner.addresses[0][1]

    async def _models(self, request):
        return web.json_response({"data": [{"id": "decoder", "max_model_len": 4096, "parent": None}]})

    async def _completions(self, request):
        body = await request.json()
        self.requests.append(body)
        how = self.fail(body)
        if how == "gone":
            self.states.clear()
            self.directory = Directory(self.directory.max_tokens)
            request.transport.abort()
            return web.Response()
        if how == "error":
            return web.json_response({"error": {"message": "a load failed"}}, status=500)
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        params = body.get("kv_transfer_params", {})
        for row in params.get("drop", ()):
            self._drop(("row", row))
        by_length = {stretch["length"]: stretch for stretch in params.get("stretches", ())}
        assert len(by_length) == len(params.get("stretches", ()))
        said = [params | by_length.get(len(prompt), {}) for prompt in prompts]
        num_read = len(prompts) - bool(body.get("stream"))
        has_failed = False
        for prompt, params in zip(prompts[:num_read], said):
            written = self._run(prompt, params, body | {"max_tokens": 1})
            has_failed |= written is None or not list(written)
        if not body.get("stream"):
            if has_failed:
                return web.json_response({"error": {"message": "a load failed"}}, status=500)
            report = {"bytes": self.directory.num_tokens, "num_states": len(self.directory)}
            return web.json_response({"choices": [{"finish_reason": "length"}], "kv_transfer_params": report})
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        written = None if has_failed else self._run(prompts[-1], said[-1], body)
        if written is None:
            await answer.write(b'data: {"error": {"message": "a load failed"}}\n\n')
            return answer
        for choice in written:
            choice["index"] = num_read
            await answer.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
            if self.fail({"token": choice["token_ids"]}):
                request.transport.abort()
                return answer
        await answer.write(b"data: [DONE]\n\n")
        return answer

    def _drop(self, name):
        self.directory.drop(name)
        self.states.pop(name, None)

    def _run(self, prompt, params, body):
        """The pieces of a completion, or `None` if what it needs is not held."""
        texts, load = params.get("texts", []), params.get("load", 0)
        needed = [(("text", key), last) for key, _, last, _ in texts] + [(("row", params.get("row")), load)]
        if any(self.directory.length(name) < length for name, length in needed):
            return None
        return self._complete(prompt, params, body, texts, load)

    @torch.no_grad()
    def _complete(self, prompt, params, body, texts, load):
        front = sum(last - skip for _, skip, last, _ in texts)
        parts = [(self.states["text", key], skip, last, front + position) for key, skip, last, position in texts]
        if load:
            parts.append((self.states["row", params["row"]], 0, load, front))
        cache = DynamicCache()
        for layer in range(self.decoder.config.num_hidden_layers if parts else 0):
            keys = [self._move(states[layer][0][skip:last], shift) for states, skip, last, shift in parts]
            values = [states[layer][1][skip:last] for states, skip, last, _ in parts]
            joined = (torch.cat(x).transpose(0, 1)[None] for x in (keys, values))  # [1, H, n, D]
            cache.update(*joined, layer)
        row, left = prompt[front + load :], body["max_tokens"]
        assert row and front + load == cache.get_seq_length()
        ids, num_known = row, front + load
        while True:
            positions = torch.arange(num_known, num_known + len(ids))[None]
            self.num_computed += len(ids)
            outputs = self.decoder(input_ids=torch.tensor([ids]), position_ids=positions, past_key_values=cache)
            num_known += len(ids)
            logprobs = outputs.logits[0, -1].log_softmax(-1)
            token, left = int(logprobs.argmax()), left - 1
            stops = token in body.get("stop_token_ids", ())
            reason = "stop" if stops else "length" if left == 0 else None
            if reason is not None:
                self._keep(prompt, params, cache, front, load)
            top = logprobs.topk(5)
            best = dict(zip((f"token_id:{n}" for n in top.indices.tolist()), top.values.tolist()))
            logprobs = {"token_logprobs": [float(logprobs[token])], "top_logprobs": [best]}
            logprobs = None if body.get("logprobs") is None else logprobs
            yield {"token_ids": [token], "logprobs": logprobs, "finish_reason": reason}
            if reason is not None:
                return
            ids = [token]

    def _keep(self, prompt, params, cache, front, load):
        states = [(layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)) for layer in cache.layers]
        if params.get("store"):
            self._put(("text", text_key(prompt)), [(k[: len(prompt)], v[: len(prompt)]) for k, v in states])
        elif params.get("keep"):
            last = front + params["keep"]
            moved = [(self._move(k[front:last], -front), v[front:last]) for k, v in states]
            self._put(("row", params["row"]), moved)
        elif "row" in params:
            self._drop(("row", params["row"]))

    def _put(self, name, states):
        self.states[name] = states
        for dropped in self.directory.put(name, len(states[0][0])):
            self.states.pop(dropped)

    def _move(self, keys, distance):
        return self.rotation.move(keys, distance)
