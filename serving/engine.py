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
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from .decoding_batch import DecodingBatch, RetrievedChunk, Row
from .sampling import Sampler, SamplingParameters
from .text_stream import TextStream, TextToken


logger = logging.getLogger(__name__)


class QueueFullError(Exception):
    """Too many completions are waiting."""


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
        error (`Exception`, *optional*): The error that ended the completion.
    """

    text: str = ""
    tokens: list[TextToken] = field(default_factory=list)
    retrieved: list[RetrievedChunk] = field(default_factory=list)
    num_tokens: int = 0
    finish_reason: str | None = None
    error: Exception | None = None


class Completion:
    """
    A completion that is waiting or running.

    Args:
        row ([`Row`]): The prompt and the number of neighbors to look up.
        max_tokens (`int`): Largest number of tokens to generate.
        parameters ([`SamplingParameters`]): How the tokens are chosen.
        stop (`Sequence[str]`): Sequences that end the text.
        emit (`Callable[[CompletionEvent], None]`): Called with each piece, in the thread of the engine.
    """

    def __init__(
        self,
        row: Row,
        max_tokens: int,
        parameters: SamplingParameters,
        stop: Sequence[str],
        emit: Callable[[CompletionEvent], None],
    ):
        self.row = row
        self.max_tokens = max_tokens
        self.parameters = parameters
        self.stop = stop
        self.emit = emit
        self.is_cancelled = False
        self.is_finished = False
        self.num_tokens = 0
        self._sampler = Sampler(parameters)
        self._num_retrieved = 0

    def cancel(self) -> None:
        """Frees the row as soon as the running forward pass has ended."""
        self.is_cancelled = True

    def start(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Prepares the completion when its row joins the batch."""
        self._text = TextStream(tokenizer, self.stop)

    def advance(self, logits: torch.Tensor, logprobs: torch.Tensor, end_tokens: Collection[int]) -> None:
        """Chooses the next token from logits `(vocab_size,)` and sends the text that is certain."""
        chosen = self._sampler.choose(logits, logprobs)
        self.num_tokens += 1
        event = CompletionEvent(num_tokens=self.num_tokens)
        event.retrieved = self.row.retrieved[self._num_retrieved :]
        self._num_retrieved = len(self.row.retrieved)
        if chosen.id in end_tokens:
            event.finish_reason = "stop"
        else:
            self.row.tokens.append(chosen.id)
            event.text, event.tokens = self._text.push(chosen)
            if self._text.is_stopped:
                event.finish_reason = "stop"
            elif self.num_tokens == self.max_tokens:
                event.finish_reason = "length"
        if event.finish_reason is not None:
            text, tokens = self._text.finish()
            event.text, event.tokens = event.text + text, event.tokens + tokens
            if self._text.is_stopped:
                event.finish_reason = "stop"
        self.send(event)

    def send(self, event: CompletionEvent) -> None:
        """Passes a piece on. If that fails, the client has left."""
        self.is_finished = event.finish_reason is not None or event.error is not None
        try:
            self.emit(event)
        except Exception:
            self.cancel()


class Engine:
    """
    Runs completions on a model in its own thread. After each token, waiting completions join the running ones. The
    result of a completion does not depend on the others.

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
        self._batch = batch
        self._running: list[Completion] = []
        self._waiting: deque[Completion] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._refused: str | None = None
        self._thread = threading.Thread(target=self._run, name="retro-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """`bool`: Whether the engine accepts completions."""
        return self._thread.is_alive() and not self._is_closed

    @property
    def num_running(self) -> int:
        """`int`: Number of running completions."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """`int`: Number of waiting completions."""
        return len(self._waiting)

    def submit(self, completions: Sequence[Completion]) -> None:
        """
        Accepts all of the completions, or none.

        Raises:
            QueueFullError: If too many completions are waiting.
        """
        with self._changed:
            if self._is_closed:
                raise QueueFullError("the server is shutting down")
            self._waiting = deque(one for one in self._waiting if not one.is_cancelled)
            free = self.max_batch_size - len(self._running) + self.max_waiting - len(self._waiting)
            if len(completions) > free:
                raise QueueFullError(f"{len(self._waiting)} completions wait already; try again later")
            self._waiting.extend(completions)
            self._changed.notify()

    def close(self) -> None:
        """Ends the thread. Running and waiting completions end with an error."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._is_closed):
                    self._changed.wait()
                if self._is_closed:
                    break
                joining = self._take_waiting()
            self._refresh()
            self._try(joining, self._join)
            self._let_go()
            self._try(self._running, self._step)
            self._let_go()
        for completion in (*self._running, *self._waiting):
            completion.send(CompletionEvent(error=RuntimeError("the server is shutting down")))

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

    def _try(self, completions: list[Completion], function: Callable[[list[Completion]], None]) -> None:
        """Runs a function on completions. An error ends only these, and the others continue."""
        try:
            if completions:
                function(completions)
        except Exception as error:
            logger.exception("completions failed")
            for completion in completions:
                if not completion.is_finished:
                    completion.send(CompletionEvent(num_tokens=completion.num_tokens, error=error))

    def _join(self, joining: list[Completion]) -> None:
        for completion in joining:
            completion.start(self.tokenizer)
        logits = self._batch.add([completion.row for completion in joining])
        self._running += joining
        self._advance(joining, logits)

    def _step(self, running: list[Completion]) -> None:
        self._advance(running, self._batch.step())

    def _advance(self, completions: Sequence[Completion], logits: torch.Tensor) -> None:
        logits = logits.cpu()
        logprobs = logits.log_softmax(-1)
        for completion, row_logits, row_logprobs in zip(completions, logits, logprobs, strict=True):
            if not completion.is_cancelled:
                completion.advance(row_logits, row_logprobs, self.end_tokens)

    def _let_go(self) -> None:
        kept = [
            n for n, completion in enumerate(self._running) if not (completion.is_cancelled or completion.is_finished)
        ]
        if len(kept) < len(self._running):
            self._batch.keep(kept)
            self._running = [self._running[n] for n in kept]
