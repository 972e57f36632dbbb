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
"""Rows of streamed documents, their neighbors, and the position in the stream."""

import gzip
import itertools

import numpy as np
import pytest
import torch
from conftest import make_texts, write_jsonl

from data_prep.chunker import DocumentChunker
from modeling_retro.retriever.retriever import RetroRetriever
from trainers.language_model.collator import ChunkRows, DataCollatorForRetro
from trainers.language_model.config import RetroTrainingArguments
from trainers.language_model.streaming import RetroStreamTrainer, StreamCollator, StreamedRows, load_document_stream


@pytest.fixture(scope="module")
def open_rows(tiny_datastore_dir, datastore):
    def open_rows(file=tiny_datastore_dir.parent / "train.jsonl", row_chunks=5):
        chunker = DocumentChunker(datastore.tokenizer, datastore.chunk_size)
        return StreamedRows(load_document_stream(str(file)), chunker, row_chunks)

    return open_rows


def take(rows, number):
    return list(itertools.islice(rows, number))


def assert_same_row(found, expected):
    assert found.number == expected.number
    for name in ("input_ids", "length", "document_id"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_rows_hold_the_chunks_of_the_documents_in_order_and_begin_again(open_rows, datastore):
    num_chunks = len(datastore.chunks)
    rows = take(open_rows(row_chunks=7), 2 * num_chunks // 7)
    tokens, _ = datastore.chunks.take(np.arange(len(rows) * 7) % num_chunks)
    np.testing.assert_array_equal(np.concatenate([row.input_ids for row in rows]), tokens)
    length = np.asarray(datastore.chunks.length)[np.arange(len(rows) * 7) % num_chunks]
    np.testing.assert_array_equal(np.concatenate([row.length for row in rows]), length)
    new_document = np.diff(np.concatenate([row.document_id for row in rows]))
    expected = np.diff(np.tile(datastore.chunks.document_id, 2)[: len(rows) * 7]) != 0
    np.testing.assert_array_equal(new_document, expected.astype(int))


def test_stream_goes_on_from_the_position_of_any_row(open_rows, datastore):
    number = 2 * len(datastore.chunks) // 5
    rows = take(open_rows(), number)
    assert rows[-1].position["epoch"] == 1
    for i, row in enumerate(rows[:-2]):
        resumed = open_rows()
        resumed.position = row.position
        for found, expected in zip(take(resumed, 2), rows[i + 1 : i + 3], strict=True):
            assert_same_row(found, expected)


def test_batches_are_those_of_the_datastore_with_the_neighbors_looked_up(tiny_datastore_dir, datastore, open_rows):
    split, options = datastore.split("validation"), {"row_chunks": 4, "num_neighbors": [3]}
    retriever = RetroRetriever(datastore)
    collator = StreamCollator(retriever, options)
    number = len(split.chunks) // 4
    found = collator(take(open_rows(tiny_datastore_dir.parent / "validation.jsonl", row_chunks=4), number))
    rows = ChunkRows(len(split.chunks), 4)
    expected = DataCollatorForRetro(datastore, source=split, **options)([rows[i] for i in range(number)])
    for name in ("input_ids", "position_ids", "labels"):
        assert torch.equal(found[name], expected[name])
    whole = (np.asarray(split.chunks.length)[: number * 4] == datastore.chunk_size).reshape(number, 4)
    assert whole.any()
    assert not whole.all()
    for i in range(number):
        neighbors = retriever.retrieve(found["input_ids"][i].reshape(4, -1)[whole[i]], 3)
        assert torch.equal(found["neighbor_input_ids"][i][whole[i]], neighbors.neighbor_input_ids)
        assert torch.equal(found["neighbor_attention_mask"][i][whole[i]], neighbors.neighbor_attention_mask)
        # Nothing sees the neighbors of a document's last chunk if it is not whole.
        assert not found["neighbor_attention_mask"][i][~whole[i]].any()


def test_what_is_drawn_hangs_on_the_row_and_not_on_the_batch(datastore, open_rows):
    options = {"row_chunks": 5, "num_neighbors": [1, 2], "neighbor_dropout": 0.5, "copy_share": 0.5, "seed": 3}
    collator = StreamCollator(RetroRetriever(datastore), options)
    rows = take(open_rows(), 6)
    together = collator(rows)
    for i in (0, 3, 5):
        alone = collator([rows[i]])
        assert alone["stream_position"] != together["stream_position"] or i == 5
        for name in ("neighbor_input_ids", "neighbor_attention_mask"):
            assert torch.equal(alone[name][0], together[name][i])


def test_streams_of_text_files_and_compressed_lines_are_read(tmp_path):
    texts = make_texts(3, seed=9)
    (tmp_path / "one.txt").write_text("first line\nsecond line", encoding="utf-8")
    assert [example["text"] for example in load_document_stream(str(tmp_path / "*.txt"))] == [
        "first line\nsecond line"
    ]
    file = write_jsonl(tmp_path / "lines.jsonl", texts)
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
    assert [example["text"] for example in load_document_stream(str(tmp_path / "lines.jsonl.gz"))] == texts


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"text": "one two three"}\n{"text": null}\n', "document 1 of the stream has None"),
        ('{"text": ""}\n', "no document"),
    ],
)
def test_stream_without_text_is_refused(tmp_path, open_rows, lines, message):
    (tmp_path / "bad.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=message):
        take(open_rows(tmp_path / "bad.jsonl", row_chunks=50), 1)


def test_file_of_another_kind_is_refused_by_name(tmp_path):
    (tmp_path / "data.csv").write_text("text")
    with pytest.raises(ValueError, match="data.csv, expected a file of .jsonl"):
        load_document_stream(str(tmp_path / "data.csv"))


def test_training_without_a_number_of_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_steps is not set"):
        RetroStreamTrainer(None, RetroTrainingArguments(output_dir=str(tmp_path), use_cpu=True), None, None)
