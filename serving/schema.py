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
"""The requests of the API of OpenAI, with the fields that retrieval adds"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from .sampling import SamplingParameters


NonEmpty = Annotated[str, StringConstraints(min_length=1)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Strict(BaseModel):
    """Refuses unknown fields, because ignoring one would answer another request."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, values: Any) -> Any:
        """Treats null as the default."""
        return (
            {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values
        )


class StreamOptions(Strict):
    """
    Options of a stream.

    Args:
        include_usage (`bool`, *optional*, defaults to `False`): Whether the last piece counts the tokens.
        include_obfuscation (`bool`, *optional*, defaults to `False`): Accepted, but without effect.
    """

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationRequest(Strict):
    """
    The fields that completions and conversations have in common: those of the API of OpenAI, and these four.

    Args:
        retrieval (`bool`, *optional*, defaults to `True`):
            Whether chunks are looked up.
        num_neighbors (`int`, *optional*):
            Number of neighbors of each chunk. Defaults to that of the model.
        pad_to_chunks (`bool`, *optional*, defaults to `False`, and to `True` in conversations):
            Whether the prompt is padded on the left to whole chunks, so that its end is looked up at once. The model
            does not see the padding.
        include_neighbors (`bool`, *optional*, defaults to `True`):
            Whether the answer contains the neighbors.
    """

    model: str
    n: int = Field(default=1, ge=1, le=128)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 129)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: dict[int, Bias] = Field(default_factory=dict, max_length=1024)
    stop: list[NonEmpty] = Field(default_factory=list, max_length=16)
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    user: str | None = None
    retrieval: bool = True
    num_neighbors: int | None = Field(default=None, ge=0, le=64)
    pad_to_chunks: bool = False
    include_neighbors: bool = True

    @field_validator("stop", mode="before")
    @classmethod
    def one_or_several(cls, value: Any) -> Any:
        """Accepts a single sequence without brackets."""
        return [value] if isinstance(value, str) else value

    @property
    def num_logprobs(self) -> int:
        """`int`: Number of most probable tokens to report with each token."""
        raise NotImplementedError

    def sampling(self, number: int) -> SamplingParameters:
        """The parameters of sampling completion `number` of a prompt. Each completion has another seed."""
        return SamplingParameters(
            temperature=self.temperature,
            top_p=self.top_p,
            seed=None if self.seed is None else self.seed + number,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            num_logprobs=self.num_logprobs,
        )


class CompletionRequest(GenerationRequest):
    """
    A request to `/v1/completions`.

    Args:
        prompt (`str`, `list[str]`, `list[int]` or `list[list[int]]`):
            One or several texts to continue, or their tokens.
        logprobs (`int`, *optional*):
            Number of most probable tokens to report with each token. With 0, only the token itself is reported.
    """

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=5)

    @property
    def num_logprobs(self) -> int:
        return self.logprobs or 0

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """`list`: The prompts as a list, even if there is only one."""
        is_one = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        return [self.prompt] if is_one else self.prompt


class TextPart(Strict):
    """A text part of a message. Other kinds are refused."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """
    A message of a conversation.

    Args:
        role (`str`): Role of the speaker.
        content (`str` or `list[TextPart]`): Text of the message.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] = ""

    @property
    def text(self) -> str:
        """`str`: The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    """
    A request to `/v1/chat/completions`.

    Args:
        messages (`list[Message]`): The conversation.
        max_completion_tokens (`int`, *optional*): The newer name of `max_tokens`.
        logprobs (`bool`, *optional*, defaults to `False`): Whether tokens are reported.
        top_logprobs (`int`, *optional*, defaults to 0): Number of most probable tokens to report with each token.
    """

    pad_to_chunks: bool = True
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)

    @model_validator(mode="after")
    def check(self) -> "ChatRequest":
        """Merges the two names of the same limit, and refuses `top_logprobs` without `logprobs`."""
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        self.max_tokens = self.max_completion_tokens or self.max_tokens
        return self

    @property
    def num_logprobs(self) -> int:
        return self.top_logprobs
