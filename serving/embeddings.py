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
"""The embeddings of texts by the encoder of the datastore"""

import base64

import numpy as np
from anyio import CapacityLimiter, to_thread
from fastapi.responses import JSONResponse
from tokenizers import Tokenizer

from .engine import QueueFullError
from .schema import EmbeddingRequest
from .served_model import RequestError, ServedModel


class Embedder:
    """
    Answers requests to `/v1/embeddings`, one after another, so that they leave processors to the model.

    Args:
        served ([`ServedModel`]): The model, whose retriever has the encoder.
    """

    def __init__(self, served: ServedModel):
        self.served = served
        self._one = CapacityLimiter(1)
        encoder = served.retriever.encoder
        self.encoder = encoder if encoder is not None and encoder.tokenizer is not None else None
        if self.encoder is not None:
            encoder.encode(["text"])  # sets the options of its tokenizer, before threads share it
            tokenizer = encoder.tokenizer
            tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer.backend_tokenizer
            self._counter = Tokenizer.from_str(tokenizer.to_str())
            self._counter.no_truncation()
            self._counter.no_padding()
            self._counter.encode_special_tokens = True  # as the encoder: such text is text
            self._room = min(served.max_prompt_tokens, encoder.max_length or served.max_prompt_tokens)

    async def answer(self, body: bytes) -> JSONResponse:
        """
        The answer to a request.

        Args:
            body (`bytes`): The request in JSON.

        Raises:
            RequestError: If the request does not follow its schema, the datastore has no encoder, or a text is empty
                or too long.
            QueueFullError: If as many requests wait already as completions may run and wait.
        """
        if (waiting := self._one.statistics().tasks_waiting) >= self.served.engine.capacity:
            raise QueueFullError(f"{waiting} requests for embeddings wait already; try again later")
        return await to_thread.run_sync(self._answer, body, limiter=self._one)

    def _answer(self, body: bytes) -> JSONResponse:
        request = self.served.read(EmbeddingRequest, body)
        if (encoder := self.encoder) is None:
            message = "the datastore of this server is searched without an encoder (BM25), so there are no embeddings"
            if self.served.retriever.encoder is not None:
                message = "the encoder of this datastore is behind another server; ask that one for embeddings"
            raise RequestError(400, message, "model", "no_encoder")
        texts = request.texts
        for number, text in enumerate(texts):
            if not text.strip():
                raise RequestError(400, f"text {number} is empty, expected some text to embed", "input")
        prompted = [encoder.prompt + text for text in texts]
        lengths = [len(encoding.ids) for encoding in self._counter.encode_batch(prompted)]
        longest = max(lengths)
        if longest > self._room:
            message = (
                f"text {lengths.index(longest)} has {longest} tokens, more than the {self._room} that are embedded"
            )
            raise RequestError(400, message, "input", "context_length_exceeded")
        data = [
            {"object": "embedding", "index": index, "embedding": _written(vector, request.encoding_format)}
            for index, vector in enumerate(encoder.encode(texts))
        ]
        usage = {"prompt_tokens": sum(lengths), "total_tokens": sum(lengths)}
        return JSONResponse({"object": "list", "data": data, "model": self.served.name, "usage": usage})


def _written(vector: np.ndarray, encoding_format: str) -> list[float] | str:
    if encoding_format == "float":
        return vector.tolist()
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
