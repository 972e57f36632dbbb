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
"""Turns tokens into text while they are generated, up to a stop sequence"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from .sampling import ChosenToken


@dataclass
class TextToken:
    """
    A token and the place of its text in the completion.

    Args:
        chosen ([`ChosenToken`]): The token.
        offset (`int`): Number of characters of the completion in front of its text.
    """

    chosen: ChosenToken
    offset: int


class TextStream:
    """
    Turns the tokens of one completion into text. A character of several tokens is returned when it is complete. Text
    that may be the beginning of a stop sequence is held back until this is decided. Control tokens, such as
    `<|im_end|>`, are not part of the text, but a stop sequence may spell them.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A fast tokenizer.
        stop (`Sequence[str]`, *optional*): Sequences that end the completion and are not part of it.
        offset (`int`, *optional*, defaults to 0): Number of characters in front of the text.

    Attributes:
        is_stopped (`bool`): Whether a stop sequence was found.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), offset: int = 0):
        self.is_stopped = False
        self._backend = tokenizer.backend_tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._pending: list[int] = []  # tokens whose text is not decoded yet
        self._length = offset  # number of characters up to the end of what was returned
        self._held = ""
        self._tokens: list[TextToken] = []
        self._stop = list(stop)
        # A control token that is spelled in a stop sequence is held as half a surrogate pair, which no text has.
        self._marks: dict[int, str] = {}
        if stop:
            self._mark_control_tokens(tokenizer)

    def _mark_control_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        control = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        spelled = {
            spelling: id for spelling, id in control.items() if any(spelling in sequence for sequence in self._stop)
        }
        if spelled:
            marks = {spelling: chr(0xD800 + n) for n, spelling in enumerate(spelled)}
            self._marks = {id: marks[spelling] for spelling, id in spelled.items()}
            # If one spelling begins with another, the longer one counts.
            pattern = re.compile("|".join(map(re.escape, sorted(spelled, key=len, reverse=True))))
            self._stop += [pattern.sub(lambda match: marks[match[0]], sequence) for sequence in self._stop]

    def push(self, token: ChosenToken) -> tuple[str, list[TextToken]]:
        """Adds the next token, and returns the text that is certain now, with its tokens."""
        self._tokens.append(TextToken(token, self._length + len(self._visible(self._held))))
        self._held += self._marks.get(token.id, "") + self._decode(token.id)
        return self._release(is_last=False)

    def finish(self) -> tuple[str, list[TextToken]]:
        """Returns the rest of the text after the last token."""
        if self.is_stopped:
            return "", []
        # What is left are bytes of a character that has not been completed.
        self._held += self._backend.decode(self._pending, skip_special_tokens=True)
        return self._release(is_last=True)

    def _decode(self, id: int) -> str:
        self._pending.append(id)
        try:
            text = self._decoder.step(self._backend, id)
        except Exception as error:  # tokenizers has no other class for it
            if "Invalid prefix" not in str(error):
                raise
            # With single bytes as tokens, bytes that are no character change the meaning of bytes before them, whose
            # text is already out. What follows is decoded for itself.
            self._decoder = DecodeStream(skip_special_tokens=True)
            pending, self._pending = self._pending, []
            return "".join(map(self._decode, pending))
        if text is None:
            return ""
        self._pending = []
        return text

    def _visible(self, text: str) -> str:
        return "".join(character for character in text if character not in self._marks.values())

    def _release(self, is_last: bool) -> tuple[str, list[TextToken]]:
        found = [place for sequence in self._stop if (place := self._held.find(sequence)) >= 0]
        self.is_stopped = bool(found)
        certain = len(self._held)
        if found:
            certain = min(found)
        elif not is_last:
            certain -= max((_overlap(self._held, sequence) for sequence in self._stop), default=0)
        text, self._held = self._visible(self._held[:certain]), self._held[certain:]
        self._length += len(text)
        released = [
            token for token in self._tokens if token.offset < self._length or (is_last and not self.is_stopped)
        ]
        self._tokens = self._tokens[len(released) :]
        return text, released


def _overlap(text: str, sequence: str) -> int:
    """Length of the longest end of `text` with which `sequence`, which is longer, begins."""
    longest = min(len(text), len(sequence) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(sequence[:n])), 0)
