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
"""Inputs are known by their contents, changes by their requests, and unknown tokens are counted."""

import json
import os
from pathlib import Path

import datasets
import pytest
from conftest import make_texts, write_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_prep.chunk import chunk_documents
from data_prep.sources import describe_sources, find_sources
from data_prep.upkeep import next_version
from data_prep.upkeep.changes import add_documents, remove_documents
from modeling_retro import RetroDatastore


def test_an_input_of_the_same_size_is_another_input(tmp_path, tiny_tokenizer):
    file = write_jsonl(tmp_path / "a.jsonl", ["old text"])
    path = tmp_path / "datastore"
    chunk_documents(file, path, tiny_tokenizer, chunk_size=8)
    moved = tmp_path / "elsewhere" / "a.jsonl"
    moved.parent.mkdir()
    file.rename(moved)
    chunk_documents(moved, path, tiny_tokenizer, chunk_size=8)  # the same contents in another folder
    write_jsonl(moved, ["new text"])
    os.utime(moved, ns=(0, 0))
    with pytest.raises(ValueError, match="was not made from a.jsonl as it is now"):
        chunk_documents(moved, path, tiny_tokenizer, chunk_size=8)
    assert chunk_documents(moved, path, tiny_tokenizer, chunk_size=8, append=True).num_documents == 2


def test_a_dataset_of_the_same_size_is_another_input(tmp_path, tiny_tokenizer):
    path = tmp_path / "datastore"
    chunk_documents(datasets.Dataset.from_dict({"text": ["old", "text"]}), path, tiny_tokenizer, chunk_size=8)
    with pytest.raises(ValueError, match="as it is now"):
        chunk_documents(datasets.Dataset.from_dict({"text": ["new", "text"]}), path, tiny_tokenizer, chunk_size=8)


def test_inputs_are_read_once_for_their_hash(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "a.jsonl", ["text"])
    (tmp_path / "folder").mkdir()
    for name in ("b.txt", "c.txt"):
        (tmp_path / "folder" / name).write_text(name)
    sources = find_sources([file, tmp_path / "folder"])
    first = describe_sources(sources, tmp_path)
    assert str(tmp_path) not in (tmp_path / ".inputs.json").read_text()
    read = []
    monkeypatch.setattr("data_prep.sources._hash_of_file", lambda file: read.append(Path(file).name) or "0" * 32)
    assert describe_sources(sources, tmp_path) == first and read == []
    (tmp_path / "folder" / "c.txt").write_text("C.txt")
    again = describe_sources(sources, tmp_path)
    assert read == ["c.txt"] and again[0] == first[0] and again[1].xxh3 != first[1].xxh3


def documents(path):
    return RetroDatastore.from_pretrained(path).manifest.train.chunks.num_documents


def test_a_change_that_was_made_is_not_made_again(tmp_path, tiny_tokenizer, monkeypatch):
    path = tmp_path / "datastore"
    chunk_documents(write_jsonl(tmp_path / "a.jsonl", make_texts(5)), path, tiny_tokenizer, chunk_size=8)
    more = write_jsonl(tmp_path / "more.jsonl", make_texts(2, seed=1))

    def killed(*_):
        raise KeyboardInterrupt

    # Killed when the new version is in its place, before the command has ended.
    with monkeypatch.context() as patch:
        patch.setattr(next_version, "remove_unread", killed)
        with pytest.raises(KeyboardInterrupt):
            add_documents(path, more)
    assert documents(path) == 7
    for _ in range(2):
        assert add_documents(path, more).version == 1 and documents(path) == 7
    assert add_documents(path, more, repeat=True).version == 2 and documents(path) == 9
    write_jsonl(more, make_texts(2, seed=2))
    assert add_documents(path, more).version == 3 and documents(path) == 11
    remove_documents(path, [0])
    assert add_documents(path, more).version == 5 and documents(path) == 13  # after another change it is a new one


def test_unknown_tokens_are_counted_and_warned_of(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr("data_prep.chunk.logger.warning", warnings.append)
    words = ["<eos>", "<unk>", "the", "keeper", "of", "port"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    known = write_jsonl(tmp_path / "known.jsonl", ["the keeper of port " * 20])
    stage = chunk_documents(known, tmp_path / "known", tokenizer, chunk_size=8)
    assert stage.num_unknown_tokens == 0 and "unknown_tokens" not in json.dumps(stage.to_dict())
    assert warnings == []
    mixed = write_jsonl(tmp_path / "mixed.jsonl", ["the harbour of port", "lighthouse"])
    stage = chunk_documents(mixed, tmp_path / "mixed", tokenizer, chunk_size=8)
    assert (stage.num_unknown_tokens, stage.num_tokens) == (2, 7)
    assert len(warnings) == 1 and warnings[0].startswith("28.6% of the tokens of train are unknown to the tokenizer")
    # GPT-2 calls the end of a text its unknown token too, but it knows all bytes.
    tokenizer.unk_token = "<eos>"
    assert chunk_documents(known, tmp_path / "other", tokenizer, chunk_size=8).num_unknown_tokens == 0
