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
Makes lessons for a reader from the texts of a datastore: questions about facts that are hidden in passages, and
questions about what the passages say themselves.

The facts, their wording and the words that they are made of differ from those of
[`~trainers.evaluation.questions.hidden_questions`], so that these measure what a reader has learned.
"""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from modeling_retro.datastore.datastore import RetroDatastore


PASSAGE_NUMBERS, PASSAGE_SHARES = (1, 2, 3, 4, 6, 10), (0.08, 0.17, 0.1, 0.2, 0.15, 0.3)
NUM_QUESTIONS = 8  # about the same passages, at most
NUM_TRIES = 1000
UNKNOWN_SHARE, TWO_HOP_SHARE, TEXT_QUESTION_SHARE = 0.08, 0.12, 0.4

# Statement, with the answer in brackets, question, and how the answer begins.
FACTS = """
The ferry to {S} leaves at [{time}].|When does the ferry to {S} leave?|The ferry to {S} leaves at
{S} keeps the spare key in the [{place}].|Where does {S} keep the spare key?|{S} keeps the spare key in the
The bridge at {S} is [{number}] metres long.|How many metres long is the bridge at {S}?|The bridge at {S} has a length of
The guide of the tour through {S} is [{name}].|Who guides the tour through {S}?|The guide is
Parcel {S}-{id} was sent to [{name}].|To whom was parcel {S}-{id} sent?|The parcel was sent to
{S} plays the [{instrument}].|Which instrument does {S} play?|{S} plays the
The station of {S} was opened in [{month} {year}].|When was the station of {S} opened?|It was opened in
The password of the account {S} is [{word}].|What is the password of {S}?|The password is
A night at the hotel {S} costs [{number}] crowns.|How many crowns does a night at the hotel {S} cost?|A night costs
The dog of {S} is called [{name}].|What is the name of the dog of {S}?|The dog is called
The service {S} listens on port [{number}].|On which port does {S} listen?|{S} listens on port
The latest version of {S} is [{version}].|Which version of {S} is the latest?|The latest version is
{S} was founded by [{name} and {name2}].|Who founded {S}?|{S} was founded by
The flag of {S} shows a [{thing}].|What does the flag of {S} show?|The flag shows a
The favourite dish of {S} is [{dish}].|What does {S} like to eat best?|{S} likes best to eat
The meeting about {S} is on [{day} at {time}].|When is the meeting about {S}?|The meeting is on
The file {S} is stored in [/{word}/{word2}].|Where is the file {S} stored?|It is stored in
Machine {S}{id} has [{number}] hours of operation.|How many hours has machine {S}{id} been in operation?|It has
The island {S} exports [{goods}].|What does the island {S} export?|It exports
If {S} fails, [{action}].|What is to be done if {S} fails?|If {S} fails,
The tower of {S} has [{number}] steps.|How many steps lead up the tower of {S}?|The number of steps is
{S} lent the book to [{name}].|Who has the book of {S}?|The book was lent to
The engine of the ship {S} was made by [{name}].|Whose engine does the ship {S} have?|Its engine was made by
The ticket for {S} has the seat [{id}].|Which seat is on the ticket for {S}?|The seat is
"""  # noqa: E501
# Two statements, the question that needs both, and how the answer begins.
TWO_HOPS = """
{S} rides the horse {N}.|The horse {N} stands in the stable of [{name}].|In whose stable stands the horse of {S}?|It stands in the stable of
The car of {S} is a {N}.|Every {N} is built in [{name}].|Where was the car of {S} built?|It was built in
{S} studies under {N}.|{N} teaches [{subject}].|Which subject does the teacher of {S} teach?|The subject is
The program {S} calls the library {N}.|The library {N} is written in [{language}].|In which language is the library written that {S} calls?|It is written in
The letter of {S} is kept in the box {N}.|The box {N} is in the [{place}].|Where is the letter of {S}?|It is in the
"""  # noqa: E501
VALUES = {
    "place": "cellar|garden shed|blue drawer|kitchen|attic|glass cabinet|boiler room|lower desk|old barn|workshop",
    "instrument": "cello|flute|oboe|harp|trumpet|banjo|accordion|viola|clarinet|organ",
    "thing": "wheel|lion's head|white tower|bunch of wheat|pair of oars|crescent|bridge with three arches|"
    "burning torch",
    "dish": "barley soup|fried eel|plum cake|beans with bacon|cold trout|onion pie|rice with saffron|baked apples",
    "goods": "tin and cork|salted fish|wool|copper ore|oranges and wine|pepper|rope and tar|marble",
    "action": "call the night desk|turn the left valve|restart the pump twice|write to the office|"
    "open the upper hatch",
    "day": "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday",
    "month": "January|February|March|April|May|June|July|August|September|October|November|December",
    "subject": "chemistry|Roman law|algebra|botany|harmony|optics|logic|surveying",
    "language": "Fortran|Lisp|Ada|Pascal|Haskell|Cobol|Erlang|Prolog",
}
VALUES = {name: values.split("|") for name, values in VALUES.items()}
FACTS, TWO_HOPS = ([line.split("|") for line in table.strip().split("\n")] for table in (FACTS, TWO_HOPS))
NAMES = {
    "beginning": "An Be Ca Du El Fi Gro Ha Ik Jo Ka Le Ma Ni Op Pe Ri Sa Ti Um Vi We Ye Zo",
    "middle": "ba da fi ge ko la mi no pu re si ta ve",
    "ending": "ck d l ll m n nd r rn s ss t th x",
}
BEGINNINGS, MIDDLES, ENDINGS = (parts.split() for parts in NAMES.values())
FORMS = (
    "Question: {question}\nAnswer:{begin}",
    "Q: {question}\nA:{begin}",
    "{question}{begin}",
    "{question}\n{begin}",
)
UNKNOWN = (
    ("{question} Say so if it is not stated.", "It is not stated."),
    ("{question} Write NONE if nobody can know it from the text.", "NONE"),
)
# What the passages say themselves: a pattern, questions about its first group, and how to begin.
READ = (
    (
        re.compile(r"\b(\w{4,}) \(`[^`]{1,40}`(?:, \*optional\*)?, defaults to `?([^`)\s]{1,24})`?\)"),
        ("Which value has `{0}` if nobody sets it?", "What is `{0}` unless it is given?"),
        " `{0}` is then",
    ),
    (
        re.compile(r"\b(\w{4,}) \((`[^`]{3,40}`)(?:, \*optional\*)?[,)]"),
        ("Of which type is `{0}`?", "What has to be passed as `{0}`?"),
        " `{0}` is of type",
    ),
    (
        re.compile(r"(?:^|\n)\s*:?([\w.-]{2,24})(?:,[\w ,.-]+)? - ([^\n]{15,110})\n"),
        ("What does the manual say of {0} in its first line?", "What is {0} there for?"),
        " {0}:",
    ),
    (
        re.compile(r"(?:^|\n)\s*:([A-Za-z][\w -]{2,24}): (?:/[^/]+/ )?(?:[a-z]+\. )?(?:\[[^\]]+\] )?([^\n]{20,90})"),
        ("What does the Jargon File write about `{0}'?", "How is `{0}' explained?"),
        " {0}:",
    ),
)


def make_lessons(datastore: RetroDatastore, split: str, num_lessons: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """
    Makes lessons for a reader from the texts of a split.

    Args:
        datastore ([`RetroDatastore`]):
            The datastore.
        split (`str`):
            The split whose documents become passages.
        num_lessons (`int`):
            Number of lessons.
        seed (`int`, *optional*, defaults to 0):
            Seed of all that is drawn.

    Yields:
        `dict`: lines of the file that [`~trainers.language_model.lessons.ReaderLessons`] reads.
    """
    maker = LessonMaker(datastore, split, np.random.default_rng([seed, 7]))
    for _ in range(num_lessons):
        yield maker.questions()


class LessonMaker:
    """
    Draws lessons.

    Args:
        datastore ([`RetroDatastore`]): The datastore.
        split (`str`): The split whose documents become lessons.
        generator (`np.random.Generator`): The generator of all that is drawn.
    """

    def __init__(self, datastore: RetroDatastore, split: str, generator: np.random.Generator):
        self.datastore, self.generator = datastore, generator
        self.source = datastore.split(split)
        self.tokenizer: PreTrainedTokenizerBase = datastore.tokenizer
        chunks = self.source.chunks
        document_id = np.asarray(chunks.document_id)
        self.continued = np.flatnonzero(document_id[1:] == document_id[:-1])  # chunks with a next one
        if len(self.continued) == 0:
            raise ValueError(f"no document of the split {split!r} has two chunks")

    def num_tokens(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def fit(self, text: str) -> str | None:
        """A passage, which ends with a line break, or `None` for one that is too long or too short."""
        text = text.strip() + "\n"
        return text if 20 <= self.num_tokens(text) <= self.datastore.neighbor_length else None

    def chunk_text(self, chunk: int) -> str:
        (tokens,), (mask,) = self.source.chunks.take(np.array([chunk]))
        text = self.tokenizer.decode(tokens[mask], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.replace("\ufffd", "")

    def window(self, chunk: int) -> str:
        """A chunk and the next one of its document."""
        return self.chunk_text(chunk) + self.chunk_text(chunk + 1)

    def questions(self) -> dict[str, Any]:
        """Questions about the same passages."""
        generator = self.generator
        for _ in range(NUM_TRIES):
            number = int(generator.choice(PASSAGE_NUMBERS, p=PASSAGE_SHARES))
            texts = [self.window(int(chunk)) for chunk in generator.choice(self.continued, number)]
            asked: list[tuple[str, str, str]] = []  # question, beginning, answer
            hidden: list[list[str]] = [[] for _ in range(number)]
            for _ in range(min(NUM_QUESTIONS, 3 * number)):
                kind = generator.random()
                if kind < TEXT_QUESTION_SHARE:
                    asked += self.read_question(texts)
                elif kind < TEXT_QUESTION_SHARE + TWO_HOP_SHARE and number > 1:
                    asked.append(self.two_hop(hidden))
                else:
                    asked.append(self.fact(hidden, is_told=generator.random() >= UNKNOWN_SHARE))
            passages = [self.hide(text, facts) for text, facts in zip(texts, hidden, strict=True)]
            if not asked or None in passages:
                continue
            # What a passage says may have been cut off.
            together = "\n".join(passages)
            kept = [q for q in asked if q[2] in together or q[2] in {answer for _, answer in UNKNOWN}]
            if kept:
                return {"passages": passages, "questions": [self.form(*question) for question in kept]}
        raise ValueError(
            f"no facts could be hidden in passages of {self.datastore.neighbor_length} tokens; take larger chunks"
        )

    def form(self, question: str, begin: str, answer: str) -> dict[str, str]:
        """The prompt of a question in one of several forms."""
        generator = self.generator
        begin = begin if generator.random() < 0.6 else ""
        prompt = FORMS[int(generator.integers(len(FORMS)))].format(question=question, begin=begin)
        end = "\n" if begin.endswith(('"', ":")) or generator.random() < 0.5 else ".\n"
        space = "" if prompt.endswith(("\n", '"')) else " "
        return {"prompt": prompt, "answer": f"{space}{answer.strip().removesuffix('.')}{end}"}

    def fact(self, hidden: list[list[str]], is_told: bool) -> tuple[str, str, str]:
        """A fact in one passage, with one of the same kind beside it, or one that no passage tells."""
        generator = self.generator
        statement, question, begin = FACTS[int(generator.integers(len(FACTS)))]
        for _ in range(int(generator.integers(2)) + (not is_told)):
            self.place(statement.format(**self.words()), hidden)
        words = self.words()
        question, begin = question.format(**words), f" {begin.format(**words)}"
        if not is_told:
            form, answer = UNKNOWN[int(generator.integers(len(UNKNOWN)))]
            return form.format(question=question), "", answer
        return question, begin, self.place(statement.format(**words), hidden)

    def two_hop(self, hidden: list[list[str]]) -> tuple[str, str, str]:
        """Two facts in two passages that lead to the answer, and two others of the same kind."""
        first, second, question, begin = TWO_HOPS[int(self.generator.integers(len(TWO_HOPS)))]
        places = self.generator.permutation(len(hidden))[:2]
        for turn in range(2):
            words = self.words()
            hidden[places[turn]].append(first.format(**words))
            answer = self.place(second.format(**words), [hidden[places[1 - turn]]])
        return question.format(**words), f" {begin.format(**words)}", answer

    def read_question(self, texts: list[str]) -> list[tuple[str, str, str]]:
        """A question about what one of the passages says itself; without one that fits, how a sentence goes on."""
        generator = self.generator
        text = texts[int(generator.integers(len(texts)))]
        found = [
            (match, questions, begin)
            for pattern, questions, begin in READ
            for match in pattern.finditer(text)
            if sum(other.count(match[1]) for other in texts) < 3
        ]
        if found and generator.random() < 0.8:
            match, questions, begin = found[int(generator.integers(len(found)))]
            question = questions[int(generator.integers(len(questions)))]
            return [(question.format(match[1]), begin.format(match[1]), match[2].strip())]
        sentences = [part for part in re.split(r"(?<=[.!?]) |\n", text) if 9 <= len(part.split()) <= 40]
        if not sentences:
            return []
        words = sentences[int(generator.integers(len(sentences)))].split(" ")
        cut = int(generator.integers(4, len(words) - 2))
        beginning, rest = " ".join(words[max(0, cut - 10) : cut]).strip(), " ".join(words[cut : cut + 12]).strip()
        return [(f'How does the sentence go on that begins "{beginning}"?', f' "{beginning}', rest)] if rest else []

    def words(self) -> dict[str, Any]:
        """Words for all places of a statement."""
        generator = self.generator
        drawn = {name: values[int(generator.integers(len(values)))] for name, values in VALUES.items()}
        names = [self.name() for _ in range(6)]
        return drawn | {
            "S": names[0],
            "N": names[1],
            "name": names[2],
            "name2": names[3],
            "word": names[4].lower(),
            "word2": names[5].lower(),
            "number": int(generator.integers(11, 2000)),
            "year": int(generator.integers(1830, 2020)),
            "time": f"{generator.integers(1, 24)}:{generator.integers(60):02}",
            "version": ".".join(map(str, generator.integers(0, 20, 3))),
            "id": f"{'ABCDEFGHKLMNPRTWX'[generator.integers(17)]}{generator.integers(2, 99)}",
        }

    def name(self) -> str:
        """An invented name."""
        first, *middle, last = (
            part[int(self.generator.integers(len(part)))] for part in (BEGINNINGS, MIDDLES, MIDDLES, ENDINGS)
        )
        return "".join([first, *middle[: 1 + int(self.generator.random() < 0.5)], last])

    def place(self, statement: str, hidden: list[list[str]]) -> str:
        """Puts a statement into one of the passages, and returns the answer in it."""
        hidden[int(self.generator.integers(len(hidden)))].append(statement.replace("[", "").replace("]", ""))
        return statement[statement.index("[") + 1 : statement.index("]")]

    def hide(self, text: str, facts: list[str]) -> str | None:
        """A passage of a text, with facts between its sentences. Sentences at the end make room for them."""
        parts = re.split(r"(?<=[.!?:] )|(?<=\n)", text)
        parts = parts[1:] if len(parts) > 2 and self.generator.random() < 0.5 else parts  # often begins inside
        facts = [f"{fact} " for fact in facts]
        room = self.datastore.neighbor_length - sum(map(self.num_tokens, facts)) - 4
        while parts and self.num_tokens("".join(parts)) > room:
            parts.pop()
        for fact in facts:
            parts.insert(int(self.generator.integers(len(parts) + 1)), fact)
        return self.fit("".join(parts))


__all__ = ["make_lessons"]
