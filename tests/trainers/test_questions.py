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
"""Questions have their answers in the gold passages and nowhere else, and answers are scored as SQuAD does."""

import copy
import re

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trainers.evaluation.questions import (
    KINDS,
    REFUSALS,
    encode_passages,
    exact_match,
    f1,
    hidden_questions,
    normalize_answer,
    score_no_answer,
    score_question,
)


TEXTS = [
    " ".join(f"Sentence {n} of text {m} tells that the port {1000 + 7 * n} is open." for n in range(60))
    for m in range(3)
]


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer that takes words, signs and line breaks for tokens, so that tokens can be counted by hand."""
    words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


def count_words(text):
    return len(re.findall(r"\w+|[^\w\s]+", text))


@pytest.mark.parametrize("num_passages", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_gold_passages_and_no_others_hold_the_answer(tokenizer, kind, num_passages):
    questions = hidden_questions(kind, TEXTS, tokenizer, num_passages, num_questions=30, max_tokens=64)
    assert len(questions) == 30
    for asked in questions:
        passages = asked["passages"]
        assert len(passages) == num_passages and all(32 <= count_words(passage) <= 64 for passage in passages)
        assert all(passage.endswith("\n") and passage.count("\n") == 1 for passage in passages)
        assert all(re.search(r"Sentence \d+ of text \d", passage) for passage in passages)
        holds = [[part in passage for passage in passages] for parts in asked["answers"] for part in parts]
        if kind == "no_answer":
            assert asked["gold"] == [] and not any(map(any, holds))
            continue
        # Every part of the answer stands in one passage, and a passage with a part is gold.
        assert all(sum(row) == 1 for row in holds)
        assert {rank for row in holds for rank in range(num_passages) if row[rank]} <= set(asked["gold"])
        assert len(asked["gold"]) == (1 if kind in ("one_key", "several_keys") else min(2, num_passages))
    ranks = {rank for asked in questions for rank in asked["gold"]}
    assert ranks == (set() if kind == "no_answer" else set(range(num_passages)))


def test_facts_lead_to_the_answers(tokenizer):
    def ask(kind, num_passages=3):
        return hidden_questions(kind, TEXTS, tokenizer, num_passages, num_questions=10, max_tokens=64)

    told = re.compile(r"The secret code of the (\w+ \w+) is (\d{4})\.")
    for kind, facts_in_a_passage in (("one_key", None), ("several_keys", 2), ("several_values", None)):
        for asked in ask(kind):
            codes = [told.findall(passage) for passage in asked["passages"]]
            key = re.search(r"of the (\w+ \w+)\?", asked["question"])[1]
            found = [code for row in codes for name, code in row if name == key]
            assert sorted(found) == sorted(asked["answers"][0])
            for rank, row in enumerate(codes):
                expected = facts_in_a_passage or 0
                assert len(row) == expected + (rank in asked["gold"])
    for asked in ask("bridge"):
        text = " ".join(asked["passages"])
        person = re.search(r"that (\w+) works for", asked["question"])[1]
        firm = re.search(rf"{person} works for the firm (\w+)\.", text)[1]
        assert re.search(rf"The firm {firm} lies in the town (\w+)\.", text)[1] == asked["answers"][0][0]
    for asked in ask("comparison"):
        text = " ".join(asked["passages"])
        people = re.search(r"of (\w+) and (\w+) born", asked["question"]).groups()
        years = [int(re.search(rf"{person} was born in the year (\d+)\.", text)[1]) for person in people]
        assert asked["answers"] == [[str(min(years))]]
        assert text.count("was born in the year") == 3
    for asked in ask("no_answer"):
        key = re.search(r"of the (\w+ \w+)\?", asked["question"])[1]
        told_of = [told.findall(passage) for passage in asked["passages"]]
        assert [len(row) for row in told_of] == [3, 3, 3]
        assert key not in [name for row in told_of for name, _ in row]


def test_questions_follow_from_the_seed(tokenizer):
    first = hidden_questions("several_keys", TEXTS, tokenizer, 2, num_questions=4, max_tokens=64)
    assert hidden_questions("several_keys", TEXTS, tokenizer, 2, num_questions=4, max_tokens=64) == first
    assert hidden_questions("several_keys", TEXTS, tokenizer, 2, num_questions=2, max_tokens=64) == first[:2]
    other = hidden_questions("several_keys", TEXTS, tokenizer, 2, num_questions=4, seed=1, max_tokens=64)
    assert not any(asked in first for asked in other)
    # The first question with the default seed stays the same from version to version.
    assert first[0]["question"] == "What is the secret code of the lilac gecko?"
    assert (first[0]["answers"], first[0]["gold"]) == ([["6151"]], [0])


def test_questions_that_cannot_be_made_are_refused(tokenizer):
    with pytest.raises(ValueError, match="'two_keys', expected one of one_key, "):
        hidden_questions("two_keys", TEXTS, tokenizer, 1)
    with pytest.raises(ValueError, match="200 questions with 0 passages"):
        hidden_questions("one_key", TEXTS, tokenizer, 0)
    with pytest.raises(ValueError, match="no texts"):
        hidden_questions("one_key", [], tokenizer, 1)
    with pytest.raises(ValueError, match="take 10 tokens, but a passage has 9 at most"):
        hidden_questions("one_key", TEXTS, tokenizer, 1, max_tokens=9)
    with pytest.raises(ValueError, match="no passage of 32 to 64 tokens was found in 1 texts"):
        hidden_questions("one_key", ["Too short."], tokenizer, 1, max_tokens=64)


def test_passages_are_encoded_in_their_ranks(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([f"w{n}" for n in range(5)])
    input_ids, mask = encode_passages(tokenizer, [["w0 w1 w2", "w3"], ["w4 w4"]], 3)
    ids = tokenizer.convert_tokens_to_ids([f"w{n}" for n in range(5)])
    assert input_ids.shape == mask.shape == (2, 2, 3)
    rows = [[input_ids[b, rank][mask[b, rank]].tolist() for rank in range(2)] for b in range(2)]
    assert rows == [[ids[:3], ids[3:4]], [[ids[4], ids[4]], []]]
    with pytest.raises(ValueError, match="passage 1 of question 0 has 4 tokens, but a neighbor has 3 at most.*'w3 w3"):
        encode_passages(tokenizer, [["w0", "w3 w3 w3 w3"]], 3)
    with pytest.raises(ValueError, match="there are no passages"):
        encode_passages(tokenizer, [[], []], 3)


def test_answers_are_normalised_as_squad_does():
    assert normalize_answer("  The Cat,\n sat on AN anthem -- a mat.") == "cat sat on anthem mat"
    assert exact_match("It is the 4,711.", [["4711"]]) == 1
    assert exact_match("It is 4712.", [["4711"], ["4713"]]) == 0
    assert exact_match("It is 4713.", [["4711"], ["4713"]]) == 1
    # Of an answer with two parts, both must be named.
    assert exact_match("12 and 34", [["34", "12"]]) == 1
    assert exact_match("12 and 35", [["34", "12"]]) == 0


def test_f1_counts_shared_words():
    assert f1("the red cat", [["red cat"]]) == 1
    # Two of three words are in the answer of four words: precision 2/3, recall 1/2.
    assert f1("red cat runs", [["a cat that is red"]]) == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
    assert f1("cat cat", [["cat"]]) == pytest.approx(2 / 3)
    assert f1("dog", [["cat"], ["dog dog dog"]]) == pytest.approx(0.5)
    assert f1("34 12", [["12", "34"]]) == 1
    assert f1("dog", [["cat"]]) == 0 and f1("the", [["cat"]]) == 0


def test_the_first_line_of_an_answer_is_scored():
    doc = {"answers": [["4711"]]}
    assert score_question(doc, ["\n 4711\n4712"]) == {"exact_match": 1.0, "f1": 1.0}
    assert score_question(doc, ["4712\n4711"]) == {"exact_match": 0.0, "f1": 0.0}
    refusals = {"answers": [[refusal] for refusal in REFUSALS]}
    assert score_no_answer(refusals, [" It is Unknown."]) == {"invented": 0.0}
    assert score_no_answer(refusals, [" 4711"]) == {"invented": 1.0}
