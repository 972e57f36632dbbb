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

from collections.abc import Sequence
from dataclasses import dataclass

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
    that may be the beginning of a stop sequence is held back until this is decided.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        stop (`Sequence[str]`, *optional*): Sequences that end the completion and are not part of it.

    Attributes:
        is_stopped (`bool`): Whether a stop sequence was found.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.stop = stop
        self.is_stopped = False
        self._ids: list[int] = []
        self._start = self._end = 0  # range of the tokens whose text was returned last
        self._length = 0  # number of characters that were returned
        self._held = ""
        self._tokens: list[TextToken] = []

    def push(self, token: ChosenToken) -> tuple[str, list[TextToken]]:
        """Adds the next token, and returns the text that is certain now, with its tokens."""
        self._tokens.append(TextToken(token, self._length + len(self._held)))
        self._ids.append(token.id)
        # Tokens are decoded together with the one before them, because some tokenizers drop the first space of a text.
        before, text = self._decode(self._end), self._decode(len(self._ids))
        if not text.endswith("\ufffd"):
            self._held += text[len(before) :]
            self._start, self._end = self._end, len(self._ids)
        return self._release(is_last=False)

    def finish(self) -> tuple[str, list[TextToken]]:
        """Returns the rest of the text after the last token."""
        if self.is_stopped:
            return "", []
        self._held += self._decode(len(self._ids))[len(self._decode(self._end)) :]
        return self._release(is_last=True)

    def _decode(self, end: int) -> str:
        return self.tokenizer.decode(
            self._ids[self._start : end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _release(self, is_last: bool) -> tuple[str, list[TextToken]]:
        found = [place for sequence in self.stop if (place := self._held.find(sequence)) >= 0]
        self.is_stopped = bool(found)
        certain = len(self._held)
        if found:
            certain = min(found)
        elif not is_last:
            certain -= max((_overlap(self._held, sequence) for sequence in self.stop), default=0)
        text, self._held = self._held[:certain], self._held[certain:]
        self._length += certain
        released = [
            token for token in self._tokens if token.offset < self._length or (is_last and not self.is_stopped)
        ]
        self._tokens = self._tokens[len(released) :]
        return text, released


def _overlap(text: str, sequence: str) -> int:
    """Length of the longest end of `text` with which `sequence`, which is longer, begins."""
    longest = min(len(text), len(sequence) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(sequence[:n])), 0)
