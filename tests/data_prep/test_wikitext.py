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
"""Texts of any data set as files of JSON lines, each whole or absent."""

import json

import pytest
from datasets import IterableDataset, IterableDatasetDict

from data_prep.scripts.wikitext import main
from data_prep.span_corruption.wikitext import write_texts


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_split_of_a_local_text_set_is_written(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    rows = {split: [f"{split} {'é' * i}" for i in range(80, 110)] for split in ("train", "validation", "test")}
    for split, lines in rows.items():
        (texts / f"wiki.{split}.txt").write_text("\n".join(["= Heading =", "", *lines]), encoding="utf-8")
    main(["--source", str(texts), "--output_dir", str(tmp_path / "out")])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"wikitext_{split}.jsonl" for split in ("test", "train", "validation")
    ]
    for split, lines in rows.items():
        expected = [{"text": line} for line in lines if len(line) > 100]
        assert 0 < len(expected) < 30
        assert read(tmp_path / "out" / f"wikitext_{split}.jsonl") == expected


def test_columns_splits_and_names_can_be_chosen(tmp_path):
    source = tmp_path / "set.jsonl"
    source.write_text("".join(json.dumps({"body": "x" * i, "id": i}) + "\n" for i in (2, 3, 4)))
    options = ["--source", str(source), "--text_column", "body", "--longer_than", "3", "--name", "mine"]
    main([*options, "--output_dir", str(tmp_path), "--splits", "train"])
    assert read(tmp_path / "mine_train.jsonl") == [{"text": "xxxx"}]


def test_an_interrupted_split_keeps_the_old_file(tmp_path):
    def broken():
        yield {"text": "a" * 200}
        raise OSError("connection lost")

    splits = IterableDatasetDict(
        {
            "train": IterableDataset.from_generator(lambda: iter([{"text": "b" * 200}])),
            "test": IterableDataset.from_generator(broken),
        }
    )
    for old in ("train", "test"):
        (tmp_path / f"wikitext_{old}.jsonl").write_text("old")
    with pytest.raises(OSError, match="connection lost"):
        write_texts(splits, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wikitext_test.jsonl", "wikitext_train.jsonl"]
    assert read(tmp_path / "wikitext_train.jsonl") == [{"text": "b" * 200}]
    assert (tmp_path / "wikitext_test.jsonl").read_text() == "old"


def test_missing_columns_and_splits_are_named(tmp_path):
    source = tmp_path / "set.jsonl"
    source.write_text('{"body": "x"}\n')
    with pytest.raises(ValueError, match="row 0 of split train.*'text'.*columns are body"):
        main(["--source", str(source), "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="no split test; it has train"):
        main(["--source", str(source), "--output_dir", str(tmp_path), "--splits", "test"])
