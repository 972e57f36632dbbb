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

import re

import pytest

from trainers.evaluation.questions import KINDS, normalize_answer, score_question
from trainers.evaluation.text_questions import TEXT_KINDS, make_questions, text_questions


FILLER = "Nothing of interest is told in this line. "
TEXTS = [
    *(f"Parameters\n\nsize{n} : int, default={n + 40}\n    The size.\nother : str\n" for n in range(4)),
    *(FILLER * n + f"The open{n}() function returns the number of files in folder {n}. See there. " for n in range(4)),
    *(
        f"{FILLER}\n  --level{chr(97 + n)} N\n      Sets how many lines of part {n} are shown. More.\n"
        for n in range(4)
    ),
    *(f"{FILLER}\nGrebe {n} is a bird of the lakes of region {n} in the north. {FILLER}" for n in range(4)),
    FILLER * 30,
]
EXPECTED = {
    **{f"What is the default of the parameter size{n}?": str(n + 40) for n in range(4)},
    **{f"What does the function open{n}() return?": "the number of files in" for n in range(4)},
    **{f"What does the option --level{chr(97 + n)} do?": "Sets how many lines of" for n in range(4)},
    **{f"What does the text say about Grebe {n}?": "a bird of the lakes" for n in range(4)},
}


@pytest.mark.parametrize("num_passages", [1, 5])
def test_questions_are_answered_by_their_gold_passage_alone(num_passages, tiny_tokenizer):
    found = [
        question
        for kind in TEXT_KINDS
        for question in text_questions(kind, TEXTS, tiny_tokenizer, num_passages, max_tokens=80)
    ]
    assert {question["question"]: question["answers"] for question in found} == {
        question: [[answer]] for question, answer in EXPECTED.items()
    }
    ranks = set()
    for question in found:
        assert len(question["passages"]) == num_passages
        term = re.search(r"(size\d|open\d|--level\w|Grebe \d)", question["question"])[1]
        assert [rank for rank, text in enumerate(question["passages"]) if term in text] == question["gold"]
        (gold,) = question["gold"]
        assert normalize_answer(question["answers"][0][0]) in normalize_answer(question["passages"][gold])
        for text in question["passages"]:
            assert text.endswith("\n")
            assert len(tiny_tokenizer(text)["input_ids"]) <= 80
        assert score_question(question, [f" {question['answers'][0][0]} and more\nnot this"])["exact_match"] == 1
        assert score_question(question, [" something else"])["exact_match"] == 0
        ranks.add(gold)
    assert len(ranks) == (1 if num_passages == 1 else 5)


def test_questions_depend_on_the_seed_and_their_number_is_a_limit(tiny_tokenizer):
    first = text_questions("lookup", TEXTS, tiny_tokenizer, 2, num_questions=5)
    assert len(first) == 5
    assert first == text_questions("lookup", TEXTS, tiny_tokenizer, 2, num_questions=5)
    assert first != text_questions("lookup", TEXTS, tiny_tokenizer, 2, num_questions=5, seed=1)


def test_values_that_one_may_guess_and_terms_that_are_named_twice_are_not_asked_for(tiny_tokenizer):
    texts = ["axis : int, default=None\n", "size : int, default=4\nsize : int, default=5\n", FILLER]
    with pytest.raises(ValueError, match="the 3 texts hold nothing that a lookup could be asked for"):
        text_questions("lookup", texts, tiny_tokenizer, 1)


def test_numbers_and_kinds_that_cannot_be_are_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match="'riddle', expected one of definition, lookup"):
        make_questions("riddle", TEXTS, tiny_tokenizer, 1)
    with pytest.raises(ValueError, match="0 passages"):
        text_questions("lookup", TEXTS, tiny_tokenizer, 0)
    with pytest.raises(ValueError, match="no 1 passages without"):
        text_questions("lookup", TEXTS[:1], tiny_tokenizer, 2)
    assert make_questions("one_key", [FILLER * 9], tiny_tokenizer, 1, 2)[0]["prefix"].startswith("The secret code")
    assert not set(KINDS) & set(TEXT_KINDS)
