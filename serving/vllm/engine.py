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
"""The engine of a server whose completions vLLM computes. What is looked up and who sees it is decided here."""

import asyncio
import logging
import threading
import uuid
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, nullcontext, suppress
from dataclasses import replace
from typing import Any

import aiohttp
import torch
from transformers import PreTrainedTokenizerBase

from modeling_retro import RetroJointConfig
from modeling_retro.retriever.retriever import QuestionError

from ..decoding_batch import retrieved_chunk
from ..engine import Completion, CompletionEngine, CompletionError, log_failure
from .client import EngineClient, EngineError, EngineGoneError, sampling_fields
from .processes import EngineProcess
from .schedule import RowPlan, Stretch, neighbor_texts, passage_texts


logger = logging.getLogger(__name__)

# How often a stretch is tried, each time from the start of its row, before its completion fails.
MAX_TRIES = 8
# Size of the longest line of a stream in bytes. The first one tells the tokens of the prompt.
MAX_LINE = 1 << 24


class VllmEngine(CompletionEngine):
    """
    Runs completions on vLLM, with the interface of [`Engine`]. A completion is a row, and a row stays with one vLLM
    process. If that has lost what it computed for the row, or has gone and come back, the row is read there again
    from its start, up to the last token that it has, and goes on.

    Args:
        urls (`Sequence[str]`):
            Addresses of vLLM processes that were started with the connector.
        config ([`RetroJointConfig`]):
            Config of the model.
        retriever:
            Looks up neighbors (see [`RetroGenerationMixin`]).
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer of the model.
        end_tokens (`Collection[int]`):
            Tokens that end a text.
        default_passages (`str`, *optional*, defaults to `"in_order"`):
            How passages of questions are read unless a request says so.
        reader (`str`, *optional*):
            Name of the adapter of the engines with which texts are read.
        processes (`Sequence[EngineProcess]`, *optional*):
            Those of the processes that belong to this server. They are started again when they end, and end with it.
        max_batch_size (`int`, *optional*, defaults to 16):
            Largest number of completions that run at the same time.
        max_waiting (`int`, *optional*, defaults to 64):
            Largest number of completions that wait. Further ones are refused.
        refresh (`Callable`, *optional*):
            Called before each lookup, to switch to a new version of the datastore.
        patience (`float`, *optional*, defaults to 300.0):
            Seconds in which a process may come back before its completions fail.

    Attributes:
        num_restarts (`int`): How often a process had gone.
        max_model_len (`int`): Largest number of tokens of a row with the texts in its sight.
    """

    def __init__(
        self,
        urls: Sequence[str],
        config: RetroJointConfig,
        retriever: Any,
        tokenizer: PreTrainedTokenizerBase,
        end_tokens: Collection[int],
        default_passages: str = "in_order",
        reader: str | None = None,
        processes: Sequence[EngineProcess] = (),
        max_batch_size: int = 16,
        max_waiting: int = 64,
        refresh: Callable[[], object] | None = None,
        patience: float = 300.0,
    ):
        self.config = config
        self.retriever = retriever
        self.tokenizer = tokenizer
        self.end_tokens = frozenset(end_tokens)
        self.default_passages = default_passages
        self.processes = {process.url: process for process in processes}
        self.max_batch_size = max_batch_size
        self.max_waiting = max_waiting
        self.refresh = refresh
        self.patience = patience
        self.num_restarts = 0
        self.clients: list[EngineClient] = []
        self._waiting: deque[Completion] = deque()
        self._running: dict[Completion, asyncio.Task] = {}
        self._stopped: CompletionError | None = None
        self._lock = threading.Lock()
        # A retriever may be used by one thread at a time.
        self._lookups = ThreadPoolExecutor(1, "retro-lookups")
        self._session: aiohttp.ClientSession | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="retro-vllm", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._connect(urls, reader), self._loop).result()
        except BaseException:
            self.close()
            raise
        self.max_model_len = min(client.max_model_len for client in self.clients)

    async def _connect(self, urls: Sequence[str], reader: str | None) -> None:
        # A stream may pause for as long as other requests take.
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            connector=aiohttp.TCPConnector(limit=0),
            read_bufsize=MAX_LINE,
        )
        self.clients = [EngineClient(url, self._session, self.config.vocab_size // 2, reader) for url in urls]
        try:
            for client in self.clients:
                await self._wait_for(client)
        except CompletionError as error:
            raise ValueError(str(error)) from error

    @property
    def state_bytes(self) -> int:
        """`int`: Size of the states of texts and rows that the processes hold, as they said last."""
        return sum(client.states.get("bytes", 0) for client in self.clients)

    def submit(self, completions: Sequence[Completion]) -> None:
        """
        Accepts all of the completions, or none.

        Raises:
            QueueFullError: If too many completions are waiting.
            CompletionError: If the engine has stopped, or vLLM cannot compute what is asked for.
        """
        for completion in completions:
            self._check(completion)
        with self._lock:
            if self._stopped is not None:
                raise CompletionError(str(self._stopped), self._stopped.status)
            self._enqueue(completions)
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._start_waiting)

    def _check(self, completion: Completion) -> None:
        row, parameters = completion.row, completion.parameters
        if row.num_scored is not None:
            raise CompletionError("the engine of this server gives no log-probabilities of prompts (echo)", 400)
        if parameters.presence_penalty or parameters.frequency_penalty:
            raise CompletionError("the engine of this server has no presence_penalty and no frequency_penalty", 400)
        in_sight = row.num_neighbors * self.config.neighbor_length
        in_sight = in_sight if row.query is None else 2 * in_sight + len(row.before)
        needed = in_sight + len(row.tokens) + completion.max_tokens
        if needed > self.max_model_len:
            raise CompletionError(
                f"the prompt, its answer and what is in sight of them may have {needed} tokens together, more than "
                f"the {self.max_model_len} of this server; ask for fewer max_tokens or num_neighbors",
                400,
            )

    def stop(self, error: CompletionError | None = None) -> None:
        """Ends running and waiting completions with an error."""
        with self._lock:
            self._stopped = self._stopped or error or CompletionError("the server is shutting down", 503)
            unfinished = [*self._running, *self._waiting]
            self._waiting.clear()
        for completion in unfinished:
            completion.fail(self._stopped)
            completion.cancel()

    def close(self) -> None:
        """Stops the engine and the processes that belong to it."""
        self.stop()
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
        self._lookups.shutdown()
        for process in self.processes.values():
            process.stop()

    async def _end(self) -> None:
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def _start_waiting(self) -> None:
        while len(self._running) < self.max_batch_size:
            with self._lock:
                if not self._waiting:
                    return
                completion = self._waiting.popleft()
                if completion.is_cancelled:
                    continue
                task = self._running[completion] = self._loop.create_task(self._run(completion))
            task.add_done_callback(lambda _, one=completion: self._leave(one))

    def _leave(self, completion: Completion) -> None:
        del self._running[completion]
        self._start_waiting()

    async def _run(self, completion: Completion) -> None:
        client = min(self.clients, key=lambda one: one.num_rows)
        client.num_rows += 1
        try:
            await _RunningRow(self, client, completion).run()
        except asyncio.CancelledError:
            pass
        except CompletionError as error:
            completion.fail(error)
        except Exception:
            completion.fail(CompletionError(log_failure("the server failed while it computed a completion")))
        finally:
            client.num_rows -= 1

    async def look_up(self, tokens: Sequence[Sequence[int]], k: int) -> Any:
        """Looks up texts of equal length in the thread for that."""
        return await self._loop.run_in_executor(self._lookups, self._look_up, tokens, k)

    def _look_up(self, tokens: Sequence[Sequence[int]], k: int) -> Any:
        if self.refresh is not None:
            try:
                self.refresh()
            except Exception as error:
                logger.warning("the new version of the datastore cannot be used: %s", error)
        ids = torch.tensor(tokens)
        mask = {"attention_mask": torch.ones_like(ids)} if ids.shape[1] != self.config.chunk_size else {}
        return self.retriever.retrieve(ids, k, **mask)

    async def recover(self, client: EngineClient, error: EngineError) -> None:
        """
        After a failure: waits until the process answers again.

        Raises:
            CompletionError: If it does not.
        """
        logger.warning("a row is read again: %s", error)
        if isinstance(error, EngineGoneError):
            if client.is_connected:
                client.is_connected = False
                self.num_restarts += 1
            await self._wait_for(client)

    async def _wait_for(self, client: EngineClient) -> None:
        deadline = self._loop.time() + self.patience
        process = self.processes.get(client.url)
        async with client.connecting:  # one row asks for all
            while not client.is_connected:
                if process is not None and not process.ensure_running():
                    raise CompletionError("vLLM has ended before it could serve; what it wrote says why", 503)
                try:
                    await client.connect()
                except EngineError as error:
                    # A process that is starting may load a large model.
                    if process is None and self._loop.time() > deadline:
                        raise CompletionError(f"no engine: {error}", 503) from error
                    await asyncio.sleep(0.5)
            if process is not None:
                process.has_served = True


class _RunningRow:
    """One completion on one process."""

    def __init__(self, engine: VllmEngine, client: EngineClient, completion: Completion):
        self.engine, self.client, self.completion = engine, client, completion
        self.row = completion.row
        config = engine.config
        self.plan = RowPlan(config.chunk_size, min(config.reread_tokens, config.chunk_size), neighbors={})
        self.name = uuid.uuid4().hex
        self.num_held = 0  # tokens of the row whose states the process has
        self.num_requests = 0

    async def run(self) -> None:
        """Reads the prompt and writes the completion."""
        await self._look_up_question()
        num_tries, has_lost = 0, False
        try:
            while not (self.completion.is_finished or self.completion.is_cancelled):
                await self._look_up_chunks()
                if self.completion.max_tokens == 0:
                    self.completion.add(None, self.engine.end_tokens, self.engine.tokenizer)
                    return
                stretches, length = self._stretches(), len(self.row.tokens)
                try:
                    # Rows that have lost what they need go one by one, lest they take the room from each other.
                    async with self.client.turn if has_lost else nullcontext():
                        await self._go_on(stretches)
                    has_lost = False
                except EngineError as error:
                    num_tries = num_tries + 1 if len(self.row.tokens) == length else 1
                    has_lost = not isinstance(error, EngineGoneError)
                    if num_tries == MAX_TRIES:
                        message = "the engine of the server does not keep what a completion needs"
                        raise CompletionError(log_failure(message, error), 503) from error
                    self._begin_again(stretches)
                    await self.engine.recover(self.client, error)
        finally:
            self.client.drop_row(self.name)

    def _begin_again(self, stretches: Sequence[Stretch]) -> None:
        """Whatever the process has lost, it is told again. What has come so far is part of the row now."""
        self.client.forget([text for stretch in stretches for text in stretch.texts])
        self.client.drop_row(self.name)
        self.name, self.num_held = uuid.uuid4().hex, 0

    async def _look_up_question(self) -> None:
        row, config = self.row, self.engine.config
        if row.query is None or row.num_neighbors == 0:
            return
        try:
            found = await self.engine.look_up([row.query], row.num_neighbors)
        except QuestionError as error:
            if row.must_find:
                raise CompletionError(str(error), 400) from error
            row.tokens, row.before = row.before + row.tokens, []
            return
        passages = retrieved_chunk(None, found, 0, found.neighbor_attention_mask[0].bool())
        row.retrieved.append(passages)
        how = row.passages or self.engine.default_passages
        length = found.neighbor_input_ids.shape[-1]
        self.plan = replace(
            self.plan,
            passages=passage_texts(passages.input_ids, row.before, how, length, config.hidden_neighbor_tokens),
            seen_by_first=how == "in_order" or bool(row.before),
            # The question itself was looked up, and not the chunks of its prompt.
            first_chunk=len(row.tokens) // config.chunk_size,
        )

    async def _look_up_chunks(self) -> None:
        row, config = self.row, self.engine.config
        missing = self.plan.missing_chunks(len(row.tokens)) if row.num_neighbors > 0 else ()
        if not missing:
            return
        size = config.chunk_size
        try:
            found = await self.engine.look_up(
                [row.tokens[u * size : (u + 1) * size] for u in missing], row.num_neighbors
            )
        except Exception as error:
            message = log_failure("the server failed while it looked up neighbors", error)
            raise CompletionError(message) from error
        for place, chunk in enumerate(missing):
            row.retrieved.append(retrieved_chunk(chunk, found, place, found.neighbor_attention_mask[place].bool()))
            neighbors, length = row.retrieved[-1].input_ids, found.neighbor_input_ids.shape[-1]
            self.plan.neighbors[chunk] = neighbor_texts(neighbors, length, config.hidden_neighbor_tokens)

    async def _go_on(self, stretches: Sequence[Stretch]) -> None:
        """Reads what has not been read, and writes up to the end of a chunk."""
        # Texts in sight of stretches that were read need not be there any more.
        ahead = [stretch for stretch in stretches[:-1] if stretch.end > self.num_held]
        unread = [*ahead, stretches[-1]]
        await self.client.read_texts(unread)
        await self._write(unread)

    def _stretches(self) -> list[Stretch]:
        length = len(self.row.tokens)
        return self.plan.stretches(length) if self.row.num_neighbors > 0 else [Stretch(0, length, ())]

    async def _write(self, stretches: Sequence[Stretch]) -> None:
        completion, tokens = self.completion, self.row.tokens
        left, length = completion.max_tokens - completion.num_tokens, len(tokens)
        retrieves = self.row.num_neighbors > 0
        max_tokens = min(left, self.plan.room(len(tokens))) if retrieves else left
        keep = len(tokens) + max_tokens - 1 if max_tokens < left else 0
        parameters = completion.parameters
        seed = None if parameters.seed is None else (parameters.seed + 0x9E3779B9 * self.num_requests) % 2**63
        self.num_requests += 1
        sampling = sampling_fields(parameters, self.engine.end_tokens, seed)
        name = self.name if retrieves else None
        async with aclosing(self.client.write(name, list(tokens), stretches, max_tokens, keep, sampling)) as written:
            async for chosen in written:
                completion.num_steps += 1
                completion.add(
                    replace(chosen, top=chosen.top[: parameters.num_logprobs or 0]),
                    self.engine.end_tokens,
                    self.engine.tokenizer,
                )
                if completion.is_finished or completion.is_cancelled:
                    return
        if len(tokens) != length + max_tokens:
            raise EngineError(f"vLLM at {self.client.url} ended a stream too early")
        self.num_held = keep
