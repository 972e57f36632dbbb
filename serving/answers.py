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
"""The answers of the server: the JSON of the API of OpenAI, with the neighbors of each chunk"""

import math
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from modeling_retro.datastore.documents import DocumentSource

from .decoding_batch import RetrievedChunk
from .engine import CompletionEvent
from .schema import ChatRequest, CompletionRequest
from .text_stream import TextToken


class Answer:
    """
    The answer to one request, as a whole or piece by piece.

    Args:
        request ([`CompletionRequest`] or [`ChatRequest`]): The request.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer of the model.
        prompt_lengths (`Sequence[int]`): Number of tokens of each prompt.
        find_sources (`Callable`): Maps a [`RetrievedChunk`] to the sources of its neighbors.
    """

    def __init__(
        self,
        request: CompletionRequest | ChatRequest,
        tokenizer: PreTrainedTokenizerBase,
        prompt_lengths: Sequence[int],
        find_sources: Callable[[RetrievedChunk], list[DocumentSource | None]],
    ):
        self._find_sources = find_sources
        self.request = request
        self.tokenizer = tokenizer
        self.is_chat = isinstance(request, ChatRequest)
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._num_prompt_tokens = sum(prompt_lengths)
        num_choices = len(prompt_lengths) * request.n
        self._events = [CompletionEvent() for _ in range(num_choices)]
        self._has_started = [False] * num_choices

    def add(self, index: int, event: CompletionEvent) -> None:
        """Adds a piece to choice `index`."""
        whole = self._events[index]
        if not self.request.stream:
            whole.text += event.text
            whole.tokens += event.tokens
            whole.retrieved += event.retrieved
        whole.num_tokens, whole.finish_reason = event.num_tokens, event.finish_reason

    def usage(self) -> dict[str, int]:
        """The numbers of tokens of prompts and completions."""
        completion = sum(event.num_tokens for event in self._events)
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self._num_prompt_tokens + completion,
        }

    def whole(self) -> dict[str, Any]:
        """The whole answer, after all pieces were added."""
        choices = []
        for index, event in enumerate(self._events):
            content = (
                {"message": {"role": "assistant", "content": event.text}} if self.is_chat else {"text": event.text}
            )
            choices.append(self._choice(index, content, event))
        name = "chat.completion" if self.is_chat else "text_completion"
        return self._envelope(name, choices, usage=self.usage())

    def piece(self, index: int, event: CompletionEvent) -> dict[str, Any] | None:
        """A piece of a stream, or `None` if the piece is empty."""
        if not (event.text or event.tokens or event.retrieved or event.finish_reason):
            return None
        content = {"text": event.text}
        if self.is_chat:
            delta = {"content": event.text} if event.text or not self._has_started[index] else {}
            content = {"delta": delta if self._has_started[index] else {"role": "assistant", **delta}}
        self._has_started[index] = True
        return self._stream_envelope([self._choice(index, content, event)])

    def last_piece(self) -> dict[str, Any] | None:
        """The last piece of a stream, if it must count the tokens."""
        if not self.request.stream_options.include_usage:
            return None
        return self._stream_envelope([], usage=self.usage())

    def _stream_envelope(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return self._envelope("chat.completion.chunk" if self.is_chat else "text_completion", choices, **more)

    def _envelope(self, name: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {"id": self.id, "object": name, "created": self.created, "model": self.request.model}
        return {**head, "choices": choices, **more}

    def _choice(self, index: int, content: dict[str, Any], event: CompletionEvent) -> dict[str, Any]:
        choice = {"index": index, **content, "finish_reason": event.finish_reason}
        choice["logprobs"] = self._logprobs(event.tokens) if self.request.wants_logprobs else None
        if self.request.include_neighbors and (event.retrieved or not self.request.stream):
            choice["neighbors"] = [self._neighbors(chunk) for chunk in event.retrieved]
            choice["sources"] = self._sources(event.retrieved)
        return choice

    def _sources(self, retrieved: Sequence[RetrievedChunk]) -> list[dict[str, Any]]:
        """The documents of the neighbors, each once, that the datastore says something of."""
        found = {}
        for chunk in retrieved:
            for document, source in zip(chunk.document_ids, self._find_sources(chunk), strict=True):
                if source is not None:
                    found.setdefault(document, {"document_id": document, **source.to_dict()})
        return list(found.values())

    def _neighbors(self, chunk: RetrievedChunk) -> dict[str, Any]:
        texts = [
            self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for ids in chunk.input_ids
        ]
        scores = [score if math.isfinite(score) else None for score in chunk.scores]
        names = ("text", "document_id", "chunk_id", "score")
        values = zip(texts, chunk.document_ids, chunk.chunk_ids, scores, strict=True)
        return {"chunk": chunk.index, "neighbors": [dict(zip(names, value)) for value in values]}

    def _logprobs(self, tokens: Sequence[TextToken]) -> dict[str, Any]:
        if self.is_chat:
            content = [
                {
                    **self._chat_token(token.chosen.id, token.chosen.logprob),
                    "top_logprobs": [self._chat_token(*top) for top in token.chosen.top],
                }
                for token in tokens
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [self._token(token.chosen.id) for token in tokens],
            "token_logprobs": [token.chosen.logprob for token in tokens],
            "top_logprobs": [
                # Tokens that are parts of characters have the same text, so the likeliest of them stands for all.
                {self._token(id): logprob for id, logprob in reversed(token.chosen.top)} if token.chosen.top else None
                for token in tokens
            ],
            "text_offset": [token.offset for token in tokens],
        }

    def _chat_token(self, id: int, logprob: float) -> dict[str, Any]:
        text = self._token(id)
        # A part of a character is shown as a replacement character, whose bytes are not those of the part.
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

    def _token(self, id: int) -> str:
        return self.tokenizer.decode([id], clean_up_tokenization_spaces=False)


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in the form of the API of OpenAI."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
