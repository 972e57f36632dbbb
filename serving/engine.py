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
"""Continuous batching: completions that are requested at the same time run together"""

import logging
import threading
import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from modeling_retro.retriever.retriever import QuestionError

from .decoding_batch import DecodingBatch, RetrievedChunk, Row
from .sampling import ChosenToken, Sampler, SamplingParameters
from .text_stream import TextStream, TextToken


logger = logging.getLogger(__name__)


class QueueFullError(Exception):
    """Too many completions are waiting."""


class CompletionError(Exception):
    """
    What a client may know of a completion that failed.

    Args:
        message (`str`): The message for the client.
        status (`int`, *optional*, defaults to 500): The status of HTTP.
    """

    def __init__(self, message: str, status: int = 500):
        super().__init__(message)
        self.status = status


def log_failure(what: str, error: Exception | None = None) -> str:
    """
    Logs an exception, by default the one that is being handled, under a new id. Returns a message with this id for the
    client, without the text of the exception, which may name folders of the machine.
    """
    failure = uuid.uuid4().hex[:12]
    logger.error("%s (failure %s)", what, failure, exc_info=error or True)
    return f"{what}; the log of the server says more under {failure}"


@dataclass
class CompletionEvent:
    """
    A piece of a completion.

    Args:
        text (`str`): The new text.
        tokens (`list[TextToken]`): The tokens of this text.
        retrieved (`list[RetrievedChunk]`): Chunks that were looked up after the previous piece.
        num_tokens (`int`): Number of tokens that were generated so far, including a token that ends the text.
        finish_reason (`str`, *optional*): `"stop"` or `"length"` in the last piece.
        error ([`CompletionError`], *optional*): The error that ended the completion.
    """

    text: str = ""
    tokens: list[TextToken] = field(default_factory=list)
    retrieved: list[RetrievedChunk] = field(default_factory=list)
    num_tokens: int = 0
    finish_reason: str | None = None
    error: CompletionError | None = None


class Completion:
    """
    A completion that is waiting or running.

    Args:
        row ([`Row`]): The prompt and the number of neighbors to look up.
        max_tokens (`int`): Largest number of tokens to generate. With 0, the prompt is only read.
        parameters ([`SamplingParameters`]): How the tokens are chosen.
        stop (`Sequence[str]`): Sequences that end the text.
        emit (`Callable[[CompletionEvent], None]`): Called with each piece, in the thread of the engine.
        echo (`bool`, *optional*, defaults to `False`): Whether the text begins with that of the prompt.

    Attributes:
        num_tokens (`int`): Number of tokens so far.
        num_steps (`int`): Number of forward passes that chose them.
        num_drafted (`int`): Number of tokens that were drafted.
        num_confirmed (`int`): Number of these that were confirmed.
    """

    def __init__(
        self,
        row: Row,
        max_tokens: int,
        parameters: SamplingParameters,
        stop: Sequence[str],
        emit: Callable[[CompletionEvent], None],
        echo: bool = False,
    ):
        self.row = row
        self.max_tokens = max_tokens
        self.parameters = parameters
        self.stop = stop
        self.emit = emit
        self.echo = echo
        self.is_cancelled = False
        self.is_finished = False
        self.num_tokens = 0
        self.num_steps = 0
        self.num_drafted = 0
        self.num_confirmed = 0
        self._sampler = Sampler(parameters)
        self._num_retrieved = 0
        self._text: TextStream | None = None

    def cancel(self) -> None:
        """Frees the row as soon as the running forward pass has ended."""
        self.is_cancelled = True

    def advance(self, logits: torch.Tensor, end_tokens: Collection[int], tokenizer: PreTrainedTokenizerBase) -> None:
        """
        Chooses the next token, and as many more as the draft of the row says the same, from logits `(n, vocab_size)`
        that follow the last token and those of the draft. Sends the text that is certain.
        """
        draft = list(self.row.draft)
        self.num_steps += 1
        self.num_drafted += len(draft)
        for number, logits_of_token in enumerate(logits[: 1 + len(draft)]):
            self._advance_one(logits_of_token, logits_of_token.log_softmax(-1), end_tokens, tokenizer)
            if self.is_finished or self.is_cancelled or self.row.tokens[-1:] != draft[number : number + 1]:
                break
            self.num_confirmed += 1

    def _advance_one(
        self,
        logits: torch.Tensor,
        logprobs: torch.Tensor,
        end_tokens: Collection[int],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        chosen = self._sampler.choose(logits, logprobs) if self.max_tokens > 0 else None
        self.add(chosen, end_tokens, tokenizer)

    def add(self, chosen: ChosenToken | None, end_tokens: Collection[int], tokenizer: PreTrainedTokenizerBase) -> None:
        """
        Adds the next token, and sends the text that is certain. `None` ends a completion without tokens, whose prompt
        has been read.
        """
        event = CompletionEvent()
        if self._text is None:
            event.text, event.tokens = self._echoed(tokenizer) if self.echo else ("", [])
            self._text = TextStream(tokenizer, self.stop, offset=len(event.text))
        event.retrieved = self.row.retrieved[self._num_retrieved :]
        self._num_retrieved = len(self.row.retrieved)
        if chosen is None:
            event.finish_reason = "length"
        else:
            self._add_token(event, chosen, end_tokens)
        self.send(event)

    def _add_token(self, event: CompletionEvent, chosen: ChosenToken, end_tokens: Collection[int]) -> None:
        self.num_tokens += 1
        event.num_tokens = self.num_tokens
        if chosen.id in end_tokens:
            event.finish_reason = "stop"
        else:
            self.row.tokens.append(chosen.id)
            self._add(event, self._text.push(chosen))
            if self._text.is_stopped:
                event.finish_reason = "stop"
            elif self.num_tokens == self.max_tokens:
                event.finish_reason = "length"
        if event.finish_reason is not None:
            self._add(event, self._text.finish())
            if self._text.is_stopped:
                event.finish_reason = "stop"

    @staticmethod
    def _add(event: CompletionEvent, piece: tuple[str, list[TextToken]]) -> None:
        event.text, event.tokens = event.text + piece[0], event.tokens + piece[1]

    def _echoed(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[TextToken]]:
        """The text and the tokens of the prompt."""
        text, tokens = TextStream(tokenizer), CompletionEvent()
        seen = self.row.tokens[self.row.num_hidden :]
        for token in self.row.scored or [ChosenToken(id, None, []) for id in seen]:
            self._add(tokens, text.push(token))
        self._add(tokens, text.finish())
        return tokens.text, tokens.tokens

    def send(self, event: CompletionEvent) -> None:
        """Passes a piece on. If that fails, the client has left."""
        self.is_finished = event.finish_reason is not None or event.error is not None
        try:
            self.emit(event)
        except Exception:
            self.cancel()

    def fail(self, error: CompletionError) -> None:
        """Ends the completion with an error, unless it has ended."""
        if not self.is_finished:
            self.send(CompletionEvent(num_tokens=self.num_tokens, error=error))


class CompletionEngine(ABC):
    """
    What the server needs of an engine. Its completions are the same whatever computes them.

    Attributes:
        max_batch_size (`int`), max_waiting (`int`): Largest number of completions that run, and that wait.
        num_restarts (`int`): How often an error ended what was computed.
    """

    max_batch_size: int
    max_waiting: int
    num_restarts: int
    _thread: threading.Thread
    _stopped: CompletionError | None
    _running: Collection[Any]
    _joining: Collection[Completion] = ()
    _waiting: Collection[Completion]

    @property
    def is_alive(self) -> bool:
        """`bool`: Whether the engine accepts completions."""
        return self._thread.is_alive() and self._stopped is None

    @property
    def num_running(self) -> int:
        """`int`: Number of running completions."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """`int`: Number of waiting completions."""
        return len(self._waiting)

    @property
    def capacity(self) -> int:
        """`int`: Largest number of completions that can run and wait."""
        return self.max_batch_size + self.max_waiting

    @property
    @abstractmethod
    def state_bytes(self) -> int:
        """`int`: Size of the states of neighbors and rows that are kept for later."""

    @abstractmethod
    def submit(self, completions: Sequence[Completion]) -> None:
        """Accepts all of the completions, or none (see [`Engine.submit`])."""

    def _enqueue(self, completions: Sequence[Completion]) -> None:
        """
        Lets completions wait, with the lock of the engine held. One that has its answer takes no place any more, even
        if the thread of the engine has not let it go: its client may ask for the next at once.

        Raises:
            QueueFullError: If more would run and wait than may.
        """
        self._waiting = deque(one for one in self._waiting if not one.is_cancelled)
        started = dict.fromkeys([*self._running, *self._joining])
        num_running = sum(not (one.is_finished or one.is_cancelled) for one in started)
        if num_running + len(self._waiting) + len(completions) > self.capacity:
            raise QueueFullError(
                f"{num_running} completions run and {len(self._waiting)} wait already; try again later"
            )
        self._waiting.extend(completions)

    @abstractmethod
    def stop(self, error: CompletionError | None = None) -> None:
        """Ends running and waiting completions with an error at once."""

    @abstractmethod
    def close(self) -> None:
        """Stops the engine and waits for its end."""


class Engine(CompletionEngine):
    """
    Runs completions on a model in its own thread. After each step, waiting completions join the running ones. The
    result of a completion does not depend on the others, and an error in the computation of one row ends only this
    one. After any other error the engine starts again without rows. If the device of the model is lost, the engine
    stops.

    Args:
        batch ([`DecodingBatch`]):
            The model and its retriever.
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer of the model.
        end_tokens (`Collection[int]`):
            Tokens that end a text.
        max_batch_size (`int`, *optional*, defaults to 16):
            Largest number of completions that run at the same time.
        max_waiting (`int`, *optional*, defaults to 64):
            Largest number of completions that wait. Further ones are refused.
        refresh (`Callable`, *optional*):
            Called before each step, to switch to a new version of the datastore, such as [`RetroRetriever.refresh`].

    Attributes:
        num_restarts (`int`): How often an error ended all running completions.
    """

    def __init__(
        self,
        batch: DecodingBatch,
        tokenizer: PreTrainedTokenizerBase,
        end_tokens: Collection[int],
        max_batch_size: int = 16,
        max_waiting: int = 64,
        refresh: Callable[[], object] | None = None,
    ):
        self.refresh = refresh
        self.tokenizer = tokenizer
        self.end_tokens = frozenset(end_tokens)
        self.max_batch_size = max_batch_size
        self.max_waiting = max_waiting
        self.num_restarts = 0
        self._batch = batch
        self._running: list[Completion] = []
        self._joining: list[Completion] = []
        self._waiting: deque[Completion] = deque()
        self._changed = threading.Condition()
        self._stopped: CompletionError | None = None
        self._refused: str | None = None
        self._thread = threading.Thread(target=self._run, name="retro-engine", daemon=True)
        self._thread.start()

    @property
    def state_bytes(self) -> int:
        """`int`: Size of the states of neighbors that the model keeps."""
        memory = getattr(self._batch.model, "neighbor_memory", None)  # a model with cross attention has none
        return 0 if memory is None else memory.num_bytes

    def submit(self, completions: Sequence[Completion]) -> None:
        """
        Accepts all of the completions, or none.

        Raises:
            QueueFullError: If too many completions are waiting.
            CompletionError: If the engine has stopped.
        """
        with self._changed:
            if self._stopped is not None:
                raise CompletionError(str(self._stopped), self._stopped.status)
            self._enqueue(completions)
            self._changed.notify()

    def stop(self, error: CompletionError | None = None) -> None:
        """Ends running and waiting completions with an error at once, and the thread after its forward pass."""
        with self._changed:
            self._stopped = self._stopped or error or CompletionError("the server is shutting down", 503)
            self._changed.notify()
            unfinished = (*self._running, *self._joining, *self._waiting)
        for completion in unfinished:
            completion.fail(self._stopped)

    def close(self) -> None:
        """Stops the engine and waits for its thread."""
        self.stop()
        self._thread.join()

    def _run(self) -> None:
        error = None
        try:
            while True:
                with self._changed:
                    while not (self._waiting or self._running or self._stopped):
                        self._changed.wait()
                    if self._stopped is not None:
                        break
                    self._joining = self._take_waiting()
                self._advance_all()
        except BaseException:
            error = CompletionError(log_failure("the engine of the server has stopped"), 503)
        finally:
            self.stop(error)

    def _advance_all(self) -> None:
        self._refresh()
        try:
            if self._joining:
                self._join(self._joining)
            self._let_go()
            if self._running:
                self._advance(self._running, self._batch.step())
            self._let_go()
        except torch.AcceleratorError:  # nothing can be computed on this device any more
            raise
        except Exception:
            error = CompletionError(log_failure("the server failed while it computed completions"))
            for completion in (*self._running, *self._joining):
                completion.fail(error)
            self._batch.clear()
            self._running = []
            self.num_restarts += 1
        self._joining = []

    def _refresh(self) -> None:
        """Switches to a new version of the datastore, unless that is broken or half copied."""
        try:
            if self.refresh is not None:
                self.refresh()
        except Exception as error:
            if str(error) != self._refused:
                logger.warning(
                    "the new version of the datastore cannot be used, and the earlier one is kept: %s", error
                )
            self._refused = str(error)

    def _take_waiting(self) -> list[Completion]:
        joining = []
        while self._waiting and len(self._running) + len(joining) < self.max_batch_size:
            completion = self._waiting.popleft()
            if not completion.is_cancelled:
                joining.append(completion)
        return joining

    def _join(self, joining: list[Completion]) -> None:
        """Adds completions to the batch. If that fails, each of them is tried alone, so that others are spared."""
        try:
            logits = self._batch.add([completion.row for completion in joining])
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if len(self._batch.rows) < len(self._running):
                raise  # the rows that run are lost too
            if len(joining) == 1:
                is_told = isinstance(error, QuestionError)
                failed = CompletionError(str(error), 400) if is_told else None
                joining[0].fail(failed or CompletionError(log_failure("the server failed while it read a prompt")))
                return
            for completion in joining:
                completion.row.retrieved.clear()
                self._join([completion])
            return
        self._running += joining
        self._advance(joining, logits[:, None])

    def _advance(self, completions: Sequence[Completion], logits: torch.Tensor) -> None:
        for completion, row_logits in zip(completions, logits.cpu(), strict=True):
            if completion.is_cancelled:
                continue
            if (error := completion.row.failure) is not None:
                completion.fail(CompletionError(log_failure("the server failed while it looked up neighbors", error)))
                continue
            try:
                completion.advance(row_logits, self.end_tokens, self.tokenizer)
            except Exception:
                completion.fail(CompletionError(log_failure("the server failed while it chose a token")))

    def _let_go(self) -> None:
        kept = [
            n for n, completion in enumerate(self._running) if not (completion.is_cancelled or completion.is_finished)
        ]
        if len(kept) < len(self._running):
            self._batch.keep(kept)
            self._running = [self._running[n] for n in kept]
