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

import json

import pytest
from loopback_hub import Repository, StoredFile, loopback_hub

from modeling_retro import RetroRetriever
from trainers.evaluation.public_questions import public_questions
from trainers.evaluation.questions import score_question


TITLES = [f"Town {n}" for n in range(12)]
SENTENCES = [[f"Town {n} lies on river {n}. ", "It is old."] for n in range(12)]
ROWS = {
    "hotpot": {
        "question": "On which river lies Town 11?",
        "answer": "river 11",
        "supporting_facts": {"title": ["Town 11", "Town 3"], "sent_id": [0, 1]},
        "context": {"title": TITLES, "sentences": SENTENCES},
    },
    "2wiki": {
        "question": "Which town is old?",
        "answer": "Town 3",
        "supporting_facts": [["Town 3", 1]],
        "context": [list(pair) for pair in zip(TITLES, SENTENCES, strict=True)],
    },
    "musique": {
        "question": "Who?",
        "answer": "nobody",
        "answer_aliases": ["no one"],
        "paragraphs": [
            {"title": title, "paragraph_text": "".join(text), "is_supporting": title in ("Town 11", "Town 3")}
            for title, text in zip(TITLES, SENTENCES, strict=True)
        ],
    },
    "nq_open": {"question": "where is it", "answer": ["here", "there"]},
    "trivia": {"question": "Where?", "answer": {"value": "Here", "aliases": ["Here", "There"], "type": "x"}},
    "popqa": {"question": "Where is it?", "possible_answers": json.dumps(["here", "there"]), "obj": "here"},
}
ANSWERS = {
    "hotpot": ["river 11"],
    "2wiki": ["Town 3"],
    "musique": ["nobody", "no one"],
    "nq_open": ["here", "there"],
    "trivia": ["Here", "There"],
    "popqa": ["here", "there"],
}
GOLD = {"hotpot": {"Town 3", "Town 11"}, "2wiki": {"Town 3"}, "musique": {"Town 3", "Town 11"}}


def write_rows(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.mark.parametrize("name", list(ROWS))
def test_rows_of_each_form_become_questions_with_ten_passages(name, tiny_tokenizer, tiny_datastore_dir, tmp_path):
    path = write_rows(tmp_path / name, [ROWS[name]] * 3)
    retriever = RetroRetriever.from_pretrained(tiny_datastore_dir, device="cpu")
    options = {"retriever": retriever, "num_questions": 2, "max_tokens": 24}
    first, second = public_questions(path, tiny_tokenizer, **options)
    assert first["question"] == ROWS[name]["question"]
    assert first["answers"] == [[answer] for answer in ANSWERS[name]]
    assert score_question(first, [f" It is {ANSWERS[name][-1]}.\n"])["exact_match"] == 1
    assert all(len(tiny_tokenizer(text)["input_ids"]) <= 24 and text.endswith("\n") for text in first["passages"])
    assert len(first["passages"]) == 10
    if name not in GOLD:
        assert first["gold"] == []
        tokens = tiny_tokenizer(first["question"], return_tensors="pt")
        found = retriever.retrieve(tokens["input_ids"], 10, attention_mask=tokens["attention_mask"])
        texts = tiny_tokenizer.batch_decode(found.neighbor_input_ids[0], skip_special_tokens=True)
        for text, passage in zip(texts, first["passages"], strict=True):
            assert " ".join(text.split()).startswith(passage.strip())
        with pytest.raises(ValueError, match="without passages: give a datastore"):
            public_questions(path, tiny_tokenizer)
        return
    assert {first["passages"][rank].split(":")[0] for rank in first["gold"]} == GOLD[name]
    assert len({text.split(":")[0] for text in first["passages"]}) == 10
    assert first["passages"] != second["passages"]  # other ranks
    (few,) = public_questions(path, tiny_tokenizer, num_passages=3, num_questions=1)
    assert len(few["passages"]) == 3
    assert {few["passages"][rank].split(":")[0] for rank in few["gold"]} == GOLD[name]
    assert any("lies on river" in text and "It is old." in text for text in few["passages"])


def test_rows_of_other_forms_are_refused(tiny_tokenizer, tmp_path):
    path = write_rows(tmp_path / "other", [{"query": "Who?", "answer": "you"}])
    with pytest.raises(ValueError, match="have the columns query, answer; expected `question`"):
        public_questions(path, tiny_tokenizer)


READ = """
import json, sys
from transformers import PreTrainedTokenizerFast
from trainers.evaluation.public_questions import public_questions

tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
print(json.dumps(public_questions("alice/hotpot", tokenizer, max_tokens=24)))
"""


def test_a_set_is_read_from_the_hub(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = write_rows(tmp_path / "hotpot", [ROWS["hotpot"]])
    with loopback_hub() as hub:
        repository = hub.repos["datasets", "alice/hotpot"] = Repository()
        data = (tmp_path / "hotpot" / "validation.jsonl").read_bytes()
        repository.commit("main", {"validation.jsonl": StoredFile(data, is_lfs=False)}, "Add the questions")
        output = hub.run(READ, str(tmp_path / "tokenizer"), home=tmp_path / "home").stdout
    assert json.loads(output.splitlines()[-1]) == public_questions(path, tiny_tokenizer, max_tokens=24)
