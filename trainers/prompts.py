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
"""Turns prompts into tokens. Only the chat template of the server can add control tokens"""

import re
import secrets
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from data_prep.chunker import DocumentChunker

from .chat_template import ChatTemplate


class PromptEncoder:
    """
    Tokenizes prompts and conversations. Text of a user that spells a control token, such as `<|im_end|>`, is tokenized
    as ordinary text, like that of documents.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            A fast tokenizer. Conversations need one with a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer)
        self._plain = DocumentChunker(tokenizer, chunk_size=1)
        control = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._control_ids = set(control)
        # If one spelling begins with another, the longer one counts. Without spellings, the pattern matches nothing.
        spellings = sorted(control.values(), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, spellings)) or r"(?!)")

    def encode_text(self, text: str) -> list[int]:
        """
        Tokenizes the beginning of a document.

        Args:
            text (`str`): The text.

        Returns:
            `list[int]`: the ids, with a BOS token in front if the tokenizer adds one.

        Raises:
            ValueError: If the text has no tokens.
        """
        ids = [*self._plain.prefix, *self._plain.encode(text).tolist()]
        if not ids:
            raise ValueError("the prompt is empty; give some text to continue")
        return ids

    def encode_query(self, text: str) -> list[int]:
        """Tokenizes a text that is to be looked up. It may have no tokens."""
        return self._plain.encode(text).tolist()

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """
        Tokenizes a conversation in the chat template of the tokenizer, up to the beginning of the next answer.

        Args:
            messages (`Sequence[Mapping[str, str]]`): The messages, each with a `role` and a `content`.

        Returns:
            `list[int]`: the ids.

        Raises:
            ValueError: If the tokenizer has no chat template, or the template refuses the messages or does not end.
        """
        # Text that spells a control token is replaced by a random word while the template is applied.
        word, spelled = secrets.token_hex(16), []

        def hide(match: re.Match) -> str:
            spelled.append(match[0])
            return f"{word}{len(spelled) - 1}."

        hidden = [{**message, "content": self._control.sub(hide, message["content"])} for message in messages]
        text = self.template.render(hidden)
        ids = []
        for number, piece in enumerate(re.split(rf"{word}(\d+)\.", text)):
            if number % 2:
                ids += self._plain.encode(spelled[int(piece)]).tolist()
            else:
                ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        # A normalizer may turn text that does not spell a control token into one.
        if sum(id in self._control_ids for id in ids) != len(self._control.findall(text)):
            raise ValueError("a message makes a control token of the model's tokenizer; leave such text out")
        return ids
