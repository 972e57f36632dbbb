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
Questions whose answers stand in given passages and nowhere else: invented facts in passages of real texts. And the
scores of answers.
"""

import re
import string
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase


WORDS = {
    "color": "amber azure black bronze coral copper crimson golden green indigo ivory jade lilac orange pink silver",
    "animal": "badger beaver camel crane dolphin falcon ferret gecko heron jackal lemur otter panther raven spider",
    "syllable": "bel dra fen gor hal jun kel lor mar nev ost pra quil ros sel tor ulm vor wex yan",
}
# Countries and capitals that a small model knows as well.
CAPITALS = (
    "Argentina:Buenos Aires Austria:Vienna Belgium:Brussels Chile:Santiago Cuba:Havana Denmark:Copenhagen "
    "Egypt:Cairo Finland:Helsinki France:Paris Germany:Berlin Greece:Athens Hungary:Budapest Iran:Tehran "
    "Iraq:Baghdad Ireland:Dublin Italy:Rome Japan:Tokyo Kenya:Nairobi Lebanon:Beirut Norway:Oslo Peru:Lima "
    "Poland:Warsaw Portugal:Lisbon Russia:Moscow Spain:Madrid Sweden:Stockholm Syria:Damascus Thailand:Bangkok "
    "Turkey:Ankara Vietnam:Hanoi"
)
CAPITALS = re.findall(r"(\w+):([\w ]+?)(?= \w+:|$)", CAPITALS)
COLORS, ANIMALS, SYLLABLES = (words.split() for words in WORDS.values())
SENTENCE_END = re.compile(r"(?<=[.!?:]) ")
MAX_ANSWER_TOKENS = 12
NUM_TRIES = 1000  # to find a passage for some facts
# What counts as saying that the passages hold no answer. Normalised.
REFUSALS = ("unknown", "not mentioned", "does not say", "not given", "no answer")


@dataclass
class Facts:
    """
    What a question asks for, before it is hidden in passages.

    Args:
        question (`str`): The question.
        prefix (`str`): How the answer begins, as in RULER, so that models that follow no instructions answer too.
        answers (`list[list[str]]`): Right answers. Each lists the parts that must all be named.
        sentences (`list[list[str]]`): The sentences that each passage hides, the gold passages first.
        num_gold (`int`): Number of gold passages.
    """

    question: str
    prefix: str
    answers: list[list[str]]
    sentences: list[list[str]]
    num_gold: int = 1


def one_key(generator: np.random.Generator, num_passages: int) -> Facts:
    """One fact in one passage; the others hide none."""
    (key,), (code,) = _keys(generator, 1), _codes(generator, 1)
    return Facts(_ask(key), _begin(key), [[code]], [[_tell(key, code)]] + [[]] * (num_passages - 1))


def several_keys(generator: np.random.Generator, num_passages: int) -> Facts:
    """One fact, among two of other keys in each passage."""
    keys, codes = _keys(generator, 2 * num_passages + 1), _codes(generator, 2 * num_passages + 1)
    told = [_tell(key, code) for key, code in zip(keys, codes, strict=True)]
    sentences = [told[2 * n + 1 : 2 * n + 3] for n in range(num_passages)]
    place = int(generator.integers(3))
    sentences[0] = [*sentences[0][:place], told[0], *sentences[0][place:]]
    return Facts(_ask(keys[0]), _begin(keys[0]), [[codes[0]]], sentences)


def several_values(generator: np.random.Generator, num_passages: int) -> Facts:
    """Two facts of one key, in two passages if there are two. Both are asked for."""
    (key,), codes = _keys(generator, 1), _codes(generator, 2)
    told = [_tell(key, code) for code in codes]
    num_gold = min(2, num_passages)
    gold = [told] if num_gold == 1 else [told[:1], told[1:]]
    question, prefix = f"What are the two secret codes of the {key}?", f"The two secret codes of the {key} are"
    return Facts(question, prefix, [codes], gold + [[]] * (num_passages - num_gold), num_gold)


def bridge(generator: np.random.Generator, num_passages: int) -> Facts:
    """Two facts that lead to the answer, in two passages if there are two. The others tell of other persons."""
    num_people = max(2, num_passages)
    names = _names(generator, 3 * num_people)
    people, firms, towns = names[:num_people], names[num_people : 2 * num_people], names[2 * num_people :]
    works = [f"{person} works for the firm {firm}." for person, firm in zip(people, firms, strict=True)]
    lies = [f"The firm {firm} lies in the town {town}." for firm, town in zip(firms, towns, strict=True)]
    question = f"In which town lies the firm that {people[0]} works for?"
    prefix = f"The firm that {people[0]} works for lies in the town"
    if num_passages == 1:
        return Facts(question, prefix, [[towns[0]]], [[works[0], lies[1], lies[0]]])
    others = [[works[n] if n % 2 else lies[n]] for n in range(1, num_passages - 1)]
    return Facts(question, prefix, [[towns[0]]], [[works[0]], [lies[0]], *others], num_gold=2)


def comparison(generator: np.random.Generator, num_passages: int) -> Facts:
    """The earlier of two years, told in two passages if there are two. The others tell of other persons."""
    people = _names(generator, max(2, num_passages))
    years = generator.choice(np.arange(1700, 2000), len(people), replace=False).tolist()
    born = [f"{person} was born in the year {year}." for person, year in zip(people, years, strict=True)]
    question = f"In which year was the older one of {people[0]} and {people[1]} born?"
    prefix, answers = "The older one was born in the year", [[str(min(years[:2]))]]
    if num_passages == 1:
        return Facts(question, prefix, answers, [born])
    return Facts(question, prefix, answers, [[sentence] for sentence in born], num_gold=2)


def no_answer(generator: np.random.Generator, num_passages: int) -> Facts:
    """A key of which no passage tells. Each tells of three others."""
    keys, codes = _keys(generator, 3 * num_passages + 1), _codes(generator, 3 * num_passages)
    told = [_tell(key, code) for key, code in zip(keys[1:], codes, strict=True)]
    sentences = [told[3 * n : 3 * n + 3] for n in range(num_passages)]
    question = f"{_ask(keys[0])} If the text does not say it, answer: unknown."
    return Facts(question, _begin(keys[0]), [[refusal] for refusal in REFUSALS], sentences, num_gold=0)


def known(generator: np.random.Generator, num_passages: int) -> Facts:
    """A capital, which the model may know. The passages are about other things."""
    return _capital(generator, num_passages)[0]


def contradicted(generator: np.random.Generator, num_passages: int) -> Facts:
    """A capital, which the model may know. One passage names another city; the others are about other things."""
    facts, lie = _capital(generator, num_passages)
    facts.sentences[0] = [lie]
    return facts


def _capital(generator: np.random.Generator, num_passages: int) -> tuple[Facts, str]:
    (country, capital), (_, other) = (CAPITALS[n] for n in generator.choice(len(CAPITALS), 2, replace=False))
    prefix = f"The capital of {country} is"
    facts = Facts(f"What is the capital of {country}?", prefix, [[capital]], [[]] * num_passages, num_gold=0)
    return facts, f"{prefix} {other}."


KINDS: dict[str, Callable[[np.random.Generator, int], Facts]] = {
    make.__name__: make
    for make in (one_key, several_keys, several_values, bridge, comparison, no_answer, known, contradicted)
}


def hidden_questions(
    kind: str,
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    num_passages: int,
    num_questions: int = 200,
    seed: int = 0,
    max_tokens: int = 128,
) -> list[dict]:
    """
    Makes questions about invented facts that are hidden in passages of real texts, as the needles of RULER
    (arXiv 2404.06654) are.

    Args:
        kind (`str`):
            Kind of the questions, one of `KINDS`.
        texts (`Iterable[str]`):
            Real texts, from which passages are drawn.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer that measures passages.
        num_passages (`int`):
            Number of passages of each question.
        num_questions (`int`, *optional*, defaults to 200):
            Number of questions.
        seed (`int`, *optional*, defaults to 0):
            Seed of the facts, of the places where they are hidden and of the ranks of the gold passages.
        max_tokens (`int`, *optional*, defaults to 128):
            Largest number of tokens of a passage: the length of a neighbor.

    Returns:
        `list[dict]`: questions with `question`, `prefix`, `answers` (see [`Facts`]), `passages` (texts that end with a
        line break) and `gold` (the ranks of the passages that hold the answer, or the facts that lead to it).

    Raises:
        ValueError: If the kind is unknown, if a number is below 1, or if no text has room for a passage.
    """
    if kind not in KINDS:
        raise ValueError(f"the kind of questions is {kind!r}, expected one of {', '.join(KINDS)}")
    if num_passages < 1 or num_questions < 1:
        raise ValueError(f"{num_questions} questions with {num_passages} passages are asked for, expected 1 or more")
    generator = np.random.default_rng([seed, zlib.crc32(kind.encode()), num_passages])
    split = [SENTENCE_END.split(" ".join(text.split())) for text in texts]
    if not split:
        raise ValueError("there are no texts to hide facts in")
    questions = []
    for _ in range(num_questions):
        facts = KINDS[kind](generator, num_passages)
        unwanted = {part for parts in facts.answers for part in parts}
        passages = [
            _hide(sentences, split, unwanted, tokenizer, max_tokens, generator) for sentences in facts.sentences
        ]
        ranks = generator.permutation(num_passages)  # the passage at each rank
        gold = sorted(rank for rank, n in enumerate(ranks.tolist()) if n < facts.num_gold)
        questions.append(
            {
                "question": facts.question,
                "prefix": facts.prefix,
                "answers": facts.answers,
                "passages": [passages[n] for n in ranks],
                "gold": gold,
            }
        )
    return questions


def encode_passages(
    tokenizer: PreTrainedTokenizerBase, passages: Sequence[Sequence[str]], length: int
) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """
    Tokens of the passages of a batch of questions, as `generate()` of [`RetroJointForCausalLM`] takes them.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of the model. Text that spells a special token does not become one.
        passages (`Sequence[Sequence[str]]`):
            Texts of the passages of each question.
        length (`int`):
            Number of tokens of a neighbor, r.

    Returns:
        `tuple[torch.LongTensor, torch.BoolTensor]`: tokens and mask, both `[B, k, r]`. A question with fewer passages
        than another has empty ones.

    Raises:
        ValueError: If there are no passages, or if one is longer than a neighbor.
    """
    number = max(map(len, passages), default=0)
    if number == 0:
        raise ValueError("there are no passages to read; a question without passages needs none of this")
    input_ids = torch.full((len(passages), number, length), tokenizer.pad_token_id or 0)
    mask = torch.zeros(input_ids.shape, dtype=torch.bool)
    for row, texts in enumerate(passages):
        for rank, text in enumerate(texts):
            tokens = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            if len(tokens) > length:
                raise ValueError(
                    f"passage {rank} of question {row} has {len(tokens)} tokens, but a neighbor has {length} at most; "
                    f"give it in parts. It begins with {text[:60]!r}"
                )
            input_ids[row, rank, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            mask[row, rank, : len(tokens)] = True
    return input_ids, mask


def normalize_answer(text: str) -> str:
    """An answer in lower case, without punctuation, articles and additional white space, as SQuAD compares them."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answers: Iterable[Iterable[str]]) -> float:
    """
    Whether a prediction contains all parts of one of the right answers, after the normalisation of SQuAD (the "best
    subspan" of arXiv 2307.03172).
    """
    prediction = normalize_answer(prediction)
    return float(any(all(normalize_answer(part) in prediction for part in parts) for parts in answers))


def f1(prediction: str, answers: Iterable[Iterable[str]]) -> float:
    """The largest F1 between the words of a prediction and of a right answer, as SQuAD counts it."""
    found = normalize_answer(prediction).split()
    return max(_f1(found, normalize_answer(" ".join(parts)).split()) for parts in answers)


def score_question(doc: dict, results: list[str]) -> dict[str, float]:
    """Exact match and F1 of the first line of a generated answer."""
    prediction = results[0].strip().split("\n")[0]
    return {"exact_match": exact_match(prediction, doc["answers"]), "f1": f1(prediction, doc["answers"])}


def score_no_answer(doc: dict, results: list[str]) -> dict[str, float]:
    """Whether a generated answer invents something where the passages hold no answer."""
    return {"invented": 1.0 - score_question(doc, results)["exact_match"]}


def _f1(found: list[str], answer: list[str]) -> float:
    same = sum((Counter(found) & Counter(answer)).values())
    return 2 * same / (len(found) + len(answer)) if same else float(found == answer)


def _ask(key: str) -> str:
    return f"What is the secret code of the {key}?"


def _begin(key: str) -> str:
    return f"The secret code of the {key} is"


def _tell(key: str, code: str) -> str:
    return f"{_begin(key)} {code}."


def _keys(generator: np.random.Generator, number: int) -> list[str]:
    drawn = generator.choice(len(COLORS) * len(ANIMALS), number, replace=False)
    return [f"{COLORS[n // len(ANIMALS)]} {ANIMALS[n % len(ANIMALS)]}" for n in drawn]


def _codes(generator: np.random.Generator, number: int) -> list[str]:
    return [str(code) for code in generator.choice(np.arange(1000, 10000), number, replace=False)]


def _names(generator: np.random.Generator, number: int) -> list[str]:
    """Different invented names."""
    size = len(SYLLABLES)
    drawn = generator.choice(size**3, number, replace=False)
    return ["".join(SYLLABLES[n // size**place % size] for place in range(3)).capitalize() for n in drawn]


def _hide(
    sentences: list[str],
    texts: list[list[str]],
    unwanted: set[str],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    generator: np.random.Generator,
) -> str:
    """A passage of a text, drawn at random, with sentences hidden between its own. It names none of the answers."""

    def num_tokens(parts: list[str]) -> int:
        passage = " ".join(parts) + "\n"
        return len(tokenizer(passage, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    if num_tokens(sentences) > max_tokens:
        raise ValueError(
            f"the facts of a passage take {num_tokens(sentences)} tokens, but a passage has {max_tokens} at most"
        )
    for _ in range(NUM_TRIES):
        text = texts[int(generator.integers(len(texts)))]
        parts: list[str] = []
        for part in text[int(generator.integers(len(text))) :]:
            if num_tokens([*parts, *sentences, part]) > max_tokens:
                break
            parts.append(part)
        words = normalize_answer(" ".join(parts))
        places = np.sort(generator.integers(0, len(parts) + 1, len(sentences)))[::-1]
        for place, sentence in zip(places.tolist(), reversed(sentences), strict=True):
            parts.insert(place, sentence)
        is_whole = max_tokens // 2 <= num_tokens(parts) <= max_tokens
        if words and is_whole and not any(normalize_answer(answer) in words for answer in unwanted):
            return " ".join(parts) + "\n"
    raise ValueError(
        f"no passage of {max_tokens // 2} to {max_tokens} tokens was found in {len(texts)} texts; give longer texts"
    )


__all__ = [
    "KINDS",
    "MAX_ANSWER_TOKENS",
    "Facts",
    "encode_passages",
    "exact_match",
    "f1",
    "hidden_questions",
    "normalize_answer",
    "score_no_answer",
    "score_question",
]
