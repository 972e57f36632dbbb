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
"""
Questions about what real texts say: definitions, and lookups in documentation. Each comes with the passage that holds
the answer, among passages of other texts.
"""

import re
import zlib
from collections.abc import Iterable, Iterator

import numpy as np
from transformers import PreTrainedTokenizerBase

from .questions import KINDS, NUM_TRIES, hidden_questions


ANSWER_WORDS = 5  # of an answer that is a sentence; more is rarely said word for word
# A term at the start of a line, and what it is said to be. Pronouns are no terms, because nobody knows what they mean.
DEFINITION = re.compile(
    r"^(?!(?:This|That|These|Those|It|They|There|Here|He|She|We|You|I|What|Who|Which)\b)"
    r"(?P<term>[A-Z][\w'’()-]*(?: [\w'’()-]+){0,5}) (?P<verb>is|are|was|were) (?P<text>[^.\n]{20,}\.)",
    re.MULTILINE,
)
# How documentation says something, how one asks for it, and how an answer begins.
TEXT_KINDS = {
    "definition": [(DEFINITION, "What does the text say about {term}?", "{term} {verb}")],
    "lookup": [
        (
            re.compile(
                r"^ *(?P<term>\w{3,}) ?: [^\n]{2,60}\bdefault ?(?:=|:|is)? ?(?P<text>[^\s,;)]{1,24})", re.MULTILINE
            ),
            "What is the default of the parameter {term}?",
            "The default of the parameter {term} is",
        ),
        (
            re.compile(
                r"The (?P<term>\w[\w.]{3,}\([^)\n]{0,20}\)) (?:function|interface|routine|method|macro) returns "
                r"(?P<text>[^.\n]{20,}\.)"
            ),
            "What does the function {term} return?",
            "The function {term} returns",
        ),
        (
            re.compile(r"^ *(?P<term>--[a-z][\w-]+)[^\n]{0,24}(?:\n| {2,}) *(?P<text>[A-Z][^.\n]{20,})", re.MULTILINE),
            "What does the option {term} do?",
            "The option {term}:",
        ),
    ],
}
# Values that one may guess.
GUESSES = {"none", "true", "false", "null"}
PART_END = re.compile(r"(?<=[.!?] )|(?<=\n)")


def text_questions(
    kind: str,
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    num_passages: int,
    num_questions: int = 200,
    seed: int = 0,
    max_tokens: int = 128,
) -> list[dict]:
    """
    Makes questions about what texts say, such as the default of a parameter.

    Args:
        kind (`str`):
            Kind of the questions, one of `TEXT_KINDS`.
        texts, tokenizer, num_passages, num_questions, seed, max_tokens:
            See [`~trainers.evaluation.questions.hidden_questions`].

    Returns:
        `list[dict]`: questions as those of [`~trainers.evaluation.questions.hidden_questions`], at most one a text and
        possibly fewer than were asked for. The answer is a value, or the first five words of a sentence.

    Raises:
        ValueError: If the kind is unknown or a number is below 1, or if the texts hold no answers or too few passages.
    """
    if kind not in TEXT_KINDS:
        raise ValueError(f"the kind of questions is {kind!r}, expected one of {', '.join(TEXT_KINDS)}")
    if num_passages < 1 or num_questions < 1:
        raise ValueError(f"{num_questions} questions with {num_passages} passages are asked for, expected 1 or more")
    generator = np.random.default_rng([seed, zlib.crc32(kind.encode()), num_passages])
    texts = list(texts)
    questions: list[dict] = []
    for n in generator.permutation(len(texts)).tolist():
        if len(questions) == num_questions:
            break
        found = list(_statements(kind, texts[n]))
        if not found:
            continue
        match, question, prefix = found[int(generator.integers(len(found)))]
        gold = _around(texts[n], *match.span(), tokenizer, max_tokens)
        if gold is None:
            continue
        passages = [gold, *_others(texts, n, match["term"], num_passages - 1, tokenizer, max_tokens, generator)]
        ranks = generator.permutation(num_passages)  # the passage at each rank
        questions.append(
            {
                "question": question.format(**match.groupdict()),
                "prefix": prefix.format(**match.groupdict()),
                "answers": [[_answer(match)]],
                "passages": [passages[rank] for rank in ranks],
                "gold": [int(np.flatnonzero(ranks == 0)[0])],
            }
        )
    if not questions:
        raise ValueError(f"the {len(texts)} texts hold nothing that a {kind} could be asked for")
    return questions


def make_questions(kind: str, *args, **kwargs) -> list[dict]:
    """Questions of any kind: those of `KINDS` are hidden in texts, and those of `TEXT_KINDS` are said by them."""
    return (hidden_questions if kind in KINDS else text_questions)(kind, *args, **kwargs)


def _statements(kind: str, text: str) -> Iterator[tuple[re.Match, str, str]]:
    """What a text says only once, how to ask for it, and how an answer begins."""
    for pattern, question, prefix in TEXT_KINDS[kind]:
        matches = list(pattern.finditer(text))
        terms = [match["term"] for match in matches]
        for match in matches:
            answer = _answer(match)
            if terms.count(match["term"]) == 1 and re.search(r"\w", answer) and answer.lower() not in GUESSES:
                yield match, question, prefix


def _answer(match: re.Match) -> str:
    """A value, or the first words of a sentence."""
    return " ".join(match["text"].strip(" `'\"").removesuffix(".").split()[:ANSWER_WORDS])


def _passage(parts: list[str]) -> str:
    return "".join(parts).strip() + "\n"


def _around(text: str, start: int, end: int, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> str | None:
    """A passage with a piece of a text and what stands around it, or `None` if the piece alone is too long."""
    parts = PART_END.split(text)
    places = np.cumsum([0, *map(len, parts)])
    first, last = (int(np.searchsorted(places, place, side=side)) for place, side in ((start, "right"), (end, "left")))
    first -= 1

    def fits(first: int, last: int) -> bool:
        return _num_tokens(_passage(parts[first:last]), tokenizer) <= max_tokens

    if not fits(first, last):
        return None
    grows = True
    while grows:
        grows = False
        if first > 0 and fits(first - 1, last):
            first, grows = first - 1, True
        if last < len(parts) and fits(first, last + 1):
            last, grows = last + 1, True
    return _passage(parts[first:last])


def _others(
    texts: list[str],
    own: int,
    term: str,
    number: int,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    generator: np.random.Generator,
) -> list[str]:
    """Passages of other texts, which do not name the term."""
    found: list[str] = []
    for _ in range(NUM_TRIES):
        if len(found) == number:
            return found
        n = int(generator.integers(len(texts)))
        start = int(generator.integers(max(1, len(texts[n]))))
        passage = None if n == own else _around(texts[n], start, start + 1, tokenizer, max_tokens)
        if passage is not None and passage.strip() and term not in passage:
            found.append(passage)
    raise ValueError(f"no {number} passages without {term!r} were found in {len(texts)} texts; give more texts")


def _num_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    return len(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


__all__ = ["ANSWER_WORDS", "DEFINITION", "TEXT_KINDS", "make_questions", "text_questions"]
