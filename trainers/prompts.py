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


def split_beginning(tokens: Sequence[int], bos_token_id: int | None) -> tuple[list[int], list[int]]:
    """
    The tokens of a question's prompt before its passages and behind them: a BOS token stands before them, as in
    [`~RetroJointForCausalLM.generate`].
    """
    begins = len(tokens) > 1 and tokens[0] == bos_token_id and bos_token_id not in tokens[1:]
    return list(tokens[:begins]), list(tokens[begins:])


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
        (ids,) = self._encode_chat(messages, None)
        return ids

    def encode_question(self, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], list[int]]:
        """
        Tokenizes a conversation as [`PromptEncoder.encode_chat`] does, in two parts. Between them is the place for
        passages: inside the last message, in front of its text, with a blank line behind them.

        Args:
            messages (`Sequence[Mapping[str, str]]`): The messages, each with a `role` and a `content`.

        Returns:
            `tuple[list[int], list[int]]`: the ids before the passages and behind them. The first part is empty if the
            template does not write the last message as it is.

        Raises:
            ValueError: If the tokenizer has no chat template, or the template refuses the messages or does not end.
        """
        place = secrets.token_hex(16)
        last = {**messages[-1], "content": f"{place}\n\n{messages[-1]['content'].lstrip()}"}
        parts = self._encode_chat([*messages[:-1], last], place)
        return tuple(parts) if len(parts) == 2 else ([], self.encode_chat(messages))

    def _encode_chat(self, messages: Sequence[Mapping[str, str]], place: str | None) -> list[list[int]]:
        """The ids of a conversation, in parts that `place` separates."""
        # Text that spells a control token is replaced by a random word while the template is applied.
        word, spelled = secrets.token_hex(16), []

        def hide(match: re.Match) -> str:
            spelled.append(match[0])
            return f"{word}{len(spelled) - 1}."

        hidden = [{**message, "content": self._control.sub(hide, message["content"])} for message in messages]
        text = self.template.render(hidden)
        parts = []
        for part in [text] if place is None else text.split(place):
            ids = []
            for number, piece in enumerate(re.split(rf"{word}(\d+)\.", part)):
                if number % 2:
                    ids += self._plain.encode(spelled[int(piece)]).tolist()
                else:
                    ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
            # A normalizer may turn text that does not spell a control token into one.
            if sum(id in self._control_ids for id in ids) != len(self._control.findall(part)):
                raise ValueError("a message makes a control token of the model's tokenizer; leave such text out")
            parts.append(ids)
        return parts
