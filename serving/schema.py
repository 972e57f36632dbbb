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

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .sampling import SamplingParameters


MAX_NUMBER = 2**31 - 1

Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Token = Annotated[int, Field(ge=0, le=MAX_NUMBER)]
# A list with thousands of mistakes is refused for the first of them.
Tokens = Annotated[list[Token], Field(fail_fast=True)]


def _form(prompt: Any) -> str:
    """The form of a prompt by its first part. Trying all forms of a long list would take long."""
    first = prompt[0] if isinstance(prompt, list) and prompt else prompt
    if isinstance(first, list):
        return "lists_of_tokens"
    if isinstance(first, int):
        return "tokens"
    return "texts" if isinstance(prompt, list) else "text"


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Field(fail_fast=True), Tag("texts")]
    | Annotated[Tokens, Tag("tokens")]
    | Annotated[list[Tokens], Field(fail_fast=True), Tag("lists_of_tokens")],
    Discriminator(_form),
]


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


class TextFormat(Strict):
    """The only format of an answer."""

    type: Literal["text"] = "text"


class GenerationRequest(Strict):
    """
    The fields that completions and conversations have in common: those of the API of OpenAI, and these four. Fields
    that change nothing here, such as `user`, and fields that this server lacks are taken with a value that asks for
    nothing, such as `store: false`.

    Args:
        retrieval (`bool`, *optional*, defaults to `True`):
            Whether chunks are looked up.
        num_neighbors (`int`, *optional*):
            Number of neighbors of each chunk. Defaults to that of the model.
        passages (`str`, *optional*):
            How the passages of a question are read: `"apart"`, each by itself, or `"in_order"`, as one text. Defaults
            to the model's way.
        include_neighbors (`bool`, *optional*, defaults to `True`):
            Whether the answer contains the neighbors.
    """

    model: str
    n: int = Field(default=1, ge=1, le=128)
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_NUMBER)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 129)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: dict[int, Bias] = Field(default_factory=dict, max_length=1024)
    stop: list[Stop] = Field(default_factory=list, max_length=16)
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    user: str | None = None
    metadata: dict[str, str] = Field(default_factory=dict, max_length=16)
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default"] = "auto"
    store: Literal[False] = False
    retrieval: bool = True
    num_neighbors: int | None = Field(default=None, ge=0, le=64)
    passages: Literal["apart", "in_order"] | None = None
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

    @property
    def wants_logprobs(self) -> bool:
        """`bool`: Whether the answer has the probabilities of its tokens."""
        return self.logprobs is not None and self.logprobs is not False

    @property
    def echoes(self) -> bool:
        """`bool`: Whether the answer begins with the prompt."""
        return False

    @property
    def question(self) -> str | None:
        """`str`, *optional*: The text that is looked up in place of the chunks of the prompt."""
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
            num_logprobs=self.num_logprobs if self.wants_logprobs else None,
        )


class CompletionRequest(GenerationRequest):
    """
    A request to `/v1/completions`.

    Args:
        prompt (`str`, `list[str]`, `list[int]` or `list[list[int]]`):
            One or several texts to continue, or their tokens.
        logprobs (`int`, *optional*):
            Number of most probable tokens to report with each token. With 0, only the token itself is reported.
        query (`str`, *optional*):
            Text that is looked up in place of the chunks of the prompt. The prompt and its answer see what is found.
        echo (`bool`, *optional*, defaults to `False`):
            Whether the answer begins with the prompt. With `logprobs`, the tokens of the prompt are reported too.
    """

    prompt: Prompt
    query: str | None = Field(default=None, min_length=1)
    echo: bool = False
    max_tokens: int = Field(default=16, ge=0, le=MAX_NUMBER)
    logprobs: int | None = Field(default=None, ge=0, le=5)
    best_of: int | None = Field(default=None, ge=1, le=128)
    suffix: Literal[""] = ""

    @field_validator("best_of")
    @classmethod
    def is_not_a_choice(cls, value: int | None, info: ValidationInfo) -> int | None:
        """Refuses to generate more answers than are asked for."""
        if value is not None and value != info.data.get("n", value):
            raise ValueError("this server returns all answers that it generates; best_of must be n")
        return value

    @property
    def num_logprobs(self) -> int:
        return self.logprobs or 0

    @property
    def echoes(self) -> bool:
        return self.echo

    @property
    def question(self) -> str | None:
        return self.query

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """`list`: The prompts as a list, even if there is only one."""
        is_one = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        return [self.prompt] if is_one else self.prompt


class EmbeddingRequest(Strict):
    """
    A request to `/v1/embeddings`.

    Args:
        input (`str` or `list[str]`): One text, or at most 2048 of them.
        encoding_format (`str`, *optional*, defaults to `"float"`):
            `"float"`, a list of numbers, or `"base64"`, the bytes of these numbers in float32, little-endian.
    """

    model: str
    input: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[str], Field(min_length=1, max_length=2048, fail_fast=True), Tag("texts")],
        Discriminator(lambda texts: "texts" if isinstance(texts, list) else "text"),
    ]
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None

    @property
    def texts(self) -> list[str]:
        """`list`: The texts as a list, even if there is only one."""
        return [self.input] if isinstance(self.input, str) else self.input


Nothing = Annotated[list[Any], Field(max_length=0)]


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

    The other fields change nothing here.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[TextPart], Field(fail_fast=True), Tag("parts")],
        Discriminator(lambda content: "parts" if isinstance(content, list) else "text"),
    ] = ""
    name: str | None = None
    type: Literal["text", "message"] | None = None
    refusal: Literal[""] = ""
    tool_calls: Nothing = Field(default_factory=list)
    annotations: Nothing = Field(default_factory=list)

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

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_NUMBER)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)
    functions: Nothing = Field(default_factory=list)
    function_call: Literal["none", "auto"] = "none"
    modalities: list[Literal["text"]] = Field(default_factory=lambda: ["text"], max_length=1)
    parallel_tool_calls: bool = True
    response_format: TextFormat = Field(default_factory=TextFormat)
    tool_choice: Literal["none", "auto"] = "none"
    tools: Nothing = Field(default_factory=list)

    @model_validator(mode="after")
    def check(self) -> "ChatRequest":
        """Merges the two names of the same limit, and refuses `top_logprobs` without `logprobs`."""
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        self.max_tokens = self.max_completion_tokens or self.max_tokens
        return self

    @property
    def question(self) -> str:
        return self.messages[-1].text

    @property
    def num_logprobs(self) -> int:
        return self.top_logprobs
