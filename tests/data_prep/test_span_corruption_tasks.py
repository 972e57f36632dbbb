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
"""Tasks named in a file, their texts and their mixtures."""

import json
from collections import Counter
from itertools import islice

import pytest
import yaml
from transformers import ByT5Tokenizer

from data_prep.span_corruption.tasks import TextTask, load_mixture, open_texts, read_tasks


def drop_digits(text):
    return None if text.isdigit() else text


@pytest.fixture
def source(tmp_path):
    def write(name, texts):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return str(path)

    return write


@pytest.fixture(scope="module")
def tokenizer():
    return ByT5Tokenizer()


def write_yaml(path, content):
    path.write_text(yaml.safe_dump(content))
    return path


def texts_of(task):
    return [row["text"] for row in task.texts()]


def test_preprocessors_and_length_limit_make_the_texts(source):
    path = source("a", [" one ", "22", None, "three", " x "])
    assert texts_of(TextTask(path)) == [" one ", "22", "three", " x "]
    preprocessors = ["builtins:str.strip", f"{__name__}:drop_digits"]
    assert texts_of(TextTask(path, preprocessors=preprocessors)) == ["one", "three", "x"]
    assert texts_of(TextTask(path, preprocessors=preprocessors, longer_than=1)) == ["one", "three"]


def test_limits_and_repetition(source):
    path = source("a", "abcd")
    assert texts_of(TextTask(path, limit=3)) == ["a", "b", "c"]
    endless = TextTask(path, limit=2, repeat=True).texts()
    assert [row["text"] for row in islice(endless, 5)] == ["a", "b", "a", "b", "a"]


def test_texts_are_joined_and_split_to_rows(source, tokenizer):
    task = TextTask(source("a", ["abc", "<extra_id_0>", "é"]))
    rows = [row["input_ids"] for row in load_mixture({"a": task}, {"a": 1}, tokenizer, row_length=4)]
    # Bytes are ids less 3; a text that spells a sentinel is bytes as well.
    assert b"".join(bytes(token - 3 for token in row) for row in rows) == "abc<extra_id_0>é".encode()
    assert [len(row) for row in rows] == [4, 4, 4, 4, 1]


def test_every_row_of_a_finite_mixture_comes_once(source, tokenizer):
    tasks = {"a": TextTask(source("a", "a" * 50)), "b": TextTask(source("b", "b" * 5))}
    rows = load_mixture(tasks, {"a": 1, "b": 3}, tokenizer, row_length=1)
    assert Counter(row["input_ids"][0] - 3 for row in rows) == {ord("a"): 50, ord("b"): 5}


def test_tasks_are_mixed_by_their_shares(source, tokenizer):
    tasks = {name: TextTask(source(name, name * 10), repeat=True) for name in "ab"}
    rows = load_mixture(tasks, {"a": 3, "b": 1}, tokenizer, row_length=1, seed=1)
    drawn = [row["input_ids"][0] - 3 for row in islice(rows, 2000)]
    # Four standard deviations of a binomial: 0.04.
    assert abs(drawn.count(ord("a")) / len(drawn) - 0.75) < 0.04
    again = [row["input_ids"][0] - 3 for row in islice(rows, 2000)]
    assert drawn == again


def test_task_files_are_read(tmp_path):
    content = {
        "features": {"input_length": 64},
        "tasks": {"a": {"source": "x", "limit": 5}, "b": {"source": "y"}},
        "train": {"a": 1, "b": 0.5},
        "evaluation": ["b"],
    }
    file = read_tasks(write_yaml(tmp_path / "tasks.yaml", content))
    assert file.tasks == {"a": TextTask("x", limit=5), "b": TextTask("y")}
    assert (file.train, file.evaluation, file.features) == ({"a": 1, "b": 0.5}, ["b"], {"input_length": 64})


def test_the_shipped_task_file_is_valid():
    file = read_tasks("data_prep/recipes/span_corruption.yaml")
    assert file.tasks["wikitext_validation"].split == "validation"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "must be a mapping with keys out of evaluation, features, tasks, train"),
        ({"tasks": {"a": {"source": "x"}}}, "missing 1 required positional argument: 'train'"),
        ({"tasks": {"a": {"source": "x", "columns": 1}}, "train": {"a": 1}}, "task a has unknown keys columns"),
        ({"tasks": {"a": {"split": "train"}}, "train": {"a": 1}}, "task a.*'source'"),
        ({"tasks": {"a": {"source": "x"}}, "train": {"b": 1}}, "no task b; there are a"),
        ({"tasks": {"a": {"source": "x"}}, "train": {"a": 0}}, "positive share"),
        ({"tasks": {"a": {"source": "x"}}, "train": {}}, "at least one task"),
        ({"tasks": [], "train": {}}, "tasks must map names to tasks"),
    ],
)
def test_broken_task_files_are_refused(tmp_path, content, message):
    path = write_yaml(tmp_path / "tasks.yaml", content)
    with pytest.raises(ValueError, match=message) as caught:
        read_tasks(path)
    assert "tasks.yaml" in str(caught.value)


def test_broken_sources_are_refused(source):
    path = source("a", ["x"])
    for task, message in [
        (TextTask(path, split="test"), "no split 'test'; it has train"),
        (TextTask(path, text_column="body"), "no column 'body'; it has text"),
        (TextTask(path, preprocessors=["nowhere:function"]), "preprocessor 'nowhere:function' is not found"),
    ]:
        with pytest.raises(ValueError, match=message):
            texts_of(task)
    with pytest.raises(OSError, match="no_such/folder_or_set"):
        open_texts("no_such/folder_or_set")
