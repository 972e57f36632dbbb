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

from data_prep.chunk import chunk_documents
from data_prep.pairs.corpus import pairs_from_datastore
from data_prep.pairs.pairs import load_pairs
from data_prep.scripts.pairs import main
from modeling_retro.datastore.datastore import RetroDatastore


TEXTS = [
    "= Brass instruments =\nthe horn of Ada Lovelace is here",
    "nothing in common with the others at all but words",
    "some words about Ada Lovelace and her engine, and load_dataset",
    "= Brass Instruments =\nfar more about trumpets than one would like",
    "one calls load_dataset for what Ada Lovelace wrote",
    "Common Name here and more and more words",
    "Common Name there and more words",
    "Common Name again and more words",
    "Common Name at last and more words",
]


@pytest.fixture
def datastore(tmp_path, tiny_tokenizer):
    """Each document is one chunk; nothing is embedded yet."""
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    chunk_documents(tmp_path / "documents.jsonl", tmp_path / "datastore", tiny_tokenizer, chunk_size=64)
    return RetroDatastore.from_pretrained(tmp_path / "datastore")


def pairs_of(datastore, **options):
    options = {"min_tokens": 4, "max_documents": 3} | options
    return {(row["anchor"], row["positive"]) for row in pairs_from_datastore(datastore, **options)}


def test_chunk_goes_with_one_of_another_document_that_shares_its_rarest_name(datastore):
    pairs = pairs_of(datastore, kinds=["entity"])
    by_identifier = {TEXTS[2], TEXTS[4]}  # load_dataset is in two documents, Ada Lovelace in three
    assert any(set(pair) == by_identifier for pair in pairs)
    assert {anchor for anchor, _ in pairs} <= {TEXTS[0], TEXTS[2], TEXTS[4]}
    assert all(anchor != positive for anchor, positive in pairs)
    assert (TEXTS[0], TEXTS[2]) in pairs or (TEXTS[0], TEXTS[4]) in pairs


def test_name_in_too_many_documents_makes_no_pair(datastore):
    common = set(TEXTS[5:])
    assert not any(common & set(pair) for pair in pairs_of(datastore, kinds=["entity"]))
    assert any(common & set(pair) for pair in pairs_of(datastore, kinds=["entity"], max_documents=4))


def test_chunks_under_the_same_title_go_together(datastore):
    assert pairs_of(datastore, kinds=["title"]) == {(TEXTS[0], TEXTS[3])}


def test_chunk_goes_with_its_continuation_and_never_with_the_next_document(tiny_datastore_dir):
    datastore = RetroDatastore.from_pretrained(tiny_datastore_dir)
    tokenizer, chunks = datastore.tokenizer, datastore.chunks
    pairs = pairs_from_datastore(datastore, kinds=["continuation"], min_tokens=6)
    expected = []
    for chunk in range(len(chunks) - 1):
        ids, mask = chunks.take([chunk, chunk + 1])
        same = chunks.document_id[chunk] == chunks.document_id[chunk + 1]
        texts = [
            tokenizer.decode(row[real], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for row, real in zip(ids, mask, strict=True)
        ]
        if same and mask.sum(1).min() >= 6 and all(text.strip() for text in texts):
            expected.append((*texts, int(chunks.document_id[chunk])))
    assert len(expected) > 10
    found = [(row["anchor"], row["positive"], row["anchor_document_id"]) for row in pairs]
    assert found == expected
    assert pairs["anchor_document_id"][:] == pairs["positive_document_id"][:]


def test_choice_depends_on_the_seed_only(datastore):
    options = {"kinds": ["entity"], "max_documents": 4}
    assert pairs_of(datastore, **options, seed=1) == pairs_of(datastore, **options, seed=1)
    assert len({frozenset(pairs_of(datastore, **options, seed=seed)) for seed in range(8)}) > 1


def test_datastore_without_pairs_and_unknown_kinds_are_refused(datastore):
    with pytest.raises(ValueError, match="has no pairs of the kinds continuation"):
        pairs_from_datastore(datastore, kinds=["continuation"], min_tokens=4)
    with pytest.raises(ValueError, match="expected some of continuation, entity, title"):
        pairs_from_datastore(datastore, kinds=["synonym"])


def test_command_keeps_the_documents_for_the_loss(tmp_path, tiny_datastore_dir):
    options = ["--kinds", "continuation", "--min_tokens", "4", "--output_dir", str(tmp_path / "pairs")]
    main(["--datastore", str(tiny_datastore_dir), *options])
    pairs = load_pairs(tmp_path / "pairs")
    assert pairs.column_names == ["anchor", "positive", "anchor_document_id", "positive_document_id"]
