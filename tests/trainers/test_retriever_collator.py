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
import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_prep.pairs.pairs import PairMixture, hash_pairs
from trainers.retriever.collator import SiameseDataCollator, stack_columns
from trainers.retriever.trainer import NoDuplicatesBatchSampler


@pytest.fixture
def tokenizer():
    """`w7` has id 7; 0 pads."""
    backend = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, 40)}}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


def test_columns_are_stacked_anchors_first_and_padded_to_the_longest(tokenizer):
    rows = [
        {"positive": "w4 w5 w6", "anchor": "w2", "negative_1": "w7"},
        {"positive": "w8", "anchor": "w2 w3", "negative_1": "w4 w5 w6"},
    ]
    batch = SiameseDataCollator(tokenizer)(rows)
    expected = [[2, 0, 0], [2, 3, 0], [4, 5, 6], [8, 0, 0], [7, 0, 0], [4, 5, 6]]
    assert batch["input_ids"].tolist() == expected
    assert batch["attention_mask"].tolist() == [[int(token > 0) for token in row] for row in expected]
    ids = batch["text_ids"]
    assert ids.shape == (3, 2)
    assert ids[1, 0] == ids[2, 1]
    assert ids.unique().numel() == 5
    assert "document_ids" not in batch


def test_tokenized_columns_give_the_same_batch_as_texts(tokenizer):
    texts = [{"anchor": "w2 w3 w4", "positive": "w5"}, {"anchor": "w6", "positive": "w7 w8 w9 w10"}]
    tokens = [
        {f"{name}_{key}": value for name, text in row.items() for key, value in tokenizer(text).items()}
        for row in texts
    ]
    for collator in (SiameseDataCollator(tokenizer), SiameseDataCollator(tokenizer, max_length=2)):
        from_texts, from_tokens = collator(texts), collator(tokens)
        assert torch.equal(from_texts["input_ids"], from_tokens["input_ids"])
        assert torch.equal(from_texts["attention_mask"], from_tokens["attention_mask"])
    assert from_texts["input_ids"].shape == (4, 2)


NOTEBOOK = [
    {
        "input_ids_q1": [2, 3],
        "attention_mask_q1": [1, 1],
        "input_ids_q2": [4, 5, 6],
        "attention_mask_q2": [1, 1, 1],
        "labels": 1,
    },
    {"input_ids_q1": [7], "attention_mask_q1": [1], "input_ids_q2": [8], "attention_mask_q2": [1], "labels": 0},
]


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_features_of_a_notebook_come_back_as_separate_padded_tensors(tokenizer, kind):
    rows = [{name: value if name == "labels" else kind(value) for name, value in row.items()} for row in NOTEBOOK]
    batch = SiameseDataCollator(tokenizer, separate=True)(rows)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids_q1": [[2, 3], [7, 0]],
        "attention_mask_q1": [[1, 1], [1, 0]],
        "input_ids_q2": [[4, 5, 6], [8, 0, 0]],
        "attention_mask_q2": [[1, 1, 1], [1, 0, 0]],
        "labels": [1, 0],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_features_of_a_notebook_are_stacked_like_anchors_and_positives(tokenizer):
    rows = [{**row, "labels": 1} for row in NOTEBOOK]
    batch = SiameseDataCollator(tokenizer)(rows)
    assert batch["input_ids"].tolist() == [[2, 3, 0], [7, 0, 0], [4, 5, 6], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0]]
    assert list(batch) == ["input_ids", "attention_mask", "text_ids"]
    named = [
        {f"{name}_input_ids": row[f"input_ids_{key}"] for name, key in (("anchor", "q1"), ("positive", "q2"))}
        for row in rows
    ]
    for name, tensor in SiameseDataCollator(tokenizer)(named).items():
        assert torch.equal(tensor, batch[name])
    with pytest.raises(ValueError, match="labels of row 1 of the batch is 0: its texts do not .*; .*keep"):
        SiameseDataCollator(tokenizer)(NOTEBOOK)


def test_any_suffixes_without_masks_and_with_types_and_documents(tokenizer):
    rows = [
        {
            "input_ids_query": [2],
            "input_ids_right": [3, 4],
            "input_ids_wrong": [5, 6, 7],
            "document_id_right": 9,
            "label": 0.5,
        }
    ]
    separate = SiameseDataCollator(tokenizer, separate=True, max_length=2)(rows)
    assert separate["input_ids_wrong"].tolist() == [[5, 6]]
    assert separate["attention_mask_right"].tolist() == [[1, 1]]
    assert separate["labels"].tolist() == [0.5]
    del rows[0]["label"]
    stacked = SiameseDataCollator(tokenizer)(rows)
    assert stacked["input_ids"].tolist() == [[2, 0, 0], [3, 4, 0], [5, 6, 7]]
    assert stacked["document_ids"].tolist() == [[-1], [9], [-1]]
    typed = {f"{key}_{side}": [0, 1] for key in ("input_ids", "token_type_ids") for side in ("a", "b")}
    assert SiameseDataCollator(tokenizer, separate=True)([typed])["token_type_ids_b"].tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="the columns are input_ids_a; expected"):
        SiameseDataCollator(tokenizer)([{"input_ids_a": [2]}])


def test_texts_as_separate_tensors_have_the_names_of_sentence_transformers(tokenizer):
    batch = SiameseDataCollator(tokenizer, separate=True)(
        [{"anchor": "w2", "positive": "w3 w4", "label": 1}, {"anchor": "w5 w6", "positive": "w7", "label": 0}]
    )
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "anchor_input_ids": [[2, 0], [5, 6]],
        "anchor_attention_mask": [[1, 0], [1, 1]],
        "positive_input_ids": [[3, 4], [7, 0]],
        "positive_attention_mask": [[1, 1], [1, 0]],
        "labels": [1, 0],
    }


@pytest.mark.parametrize("rows", [[{**row, "labels": 1} for row in NOTEBOOK], [{"anchor": "w2", "positive": "w3 w4"}]])
def test_separate_tensors_stack_to_the_batch_of_one_pass(tokenizer, rows):
    stacked = stack_columns(SiameseDataCollator(tokenizer, separate=True)(rows))
    expected = SiameseDataCollator(tokenizer)(rows)
    assert torch.equal(stacked["input_ids"], expected["input_ids"])
    assert torch.equal(stacked["attention_mask"], expected["attention_mask"])
    assert stacked["text_ids"].shape == expected["text_ids"].shape


def test_separate_tensors_that_are_no_pairs_are_refused(tokenizer):
    batch = SiameseDataCollator(tokenizer, separate=True)(NOTEBOOK)
    with pytest.raises(ValueError, match=r"the labels of a batch are \[1, 0\], expected 1"):
        stack_columns(batch)
    del batch["labels"], batch["attention_mask_q2"]
    with pytest.raises(ValueError, match="input_ids_q2 has no mask attention_mask_q2"):
        stack_columns(batch)


def test_document_ids_go_along_and_missing_ones_are_unknown(tokenizer):
    rows = [{"anchor": "w2", "positive": "w3", "anchor_document_id": 5}] * 2
    assert SiameseDataCollator(tokenizer)(rows)["document_ids"].tolist() == [[5, 5], [-1, -1]]


@pytest.mark.parametrize(
    ("second_row", "message"),
    [
        ({"anchor": " ", "positive": "w3", "negative_1": "w4"}, "anchor of row 1 of the batch is ' '"),
        ({"anchor": "w2", "positive": "w3", "negative_1": None}, "negative_1 of row 1 of the batch is None"),
        ({"anchor": "w2", "positive": "w3"}, "negative_1 is in some rows only"),
        ({"anchor": "w2"}, "expected `anchor`, `positive`"),
    ],
)
def test_rows_that_are_no_pairs_are_refused(tokenizer, second_row, message):
    with pytest.raises(ValueError, match=message):
        SiameseDataCollator(tokenizer)([{"anchor": "w2", "positive": "w3", "negative_1": "w4"}, second_row])


def test_one_column_is_refused(tokenizer):
    with pytest.raises(ValueError, match="the columns are anchor; expected"):
        SiameseDataCollator(tokenizer)([{"anchor": "w2"}])


def test_tokenizer_without_padding_token_is_refused(tokenizer):
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        SiameseDataCollator(tokenizer)


def random_text_ids(rows, distinct, seed=0):
    return np.random.default_rng(seed).integers(distinct, size=(rows, 2))


def steps_of(sampler):
    batches = list(sampler)
    size = sampler.num_processes
    return [sum(batches[start : start + size], []) for start in range(0, len(batches), size)]


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_no_text_appears_twice_in_what_the_processes_take_together(num_processes):
    text_ids = random_text_ids(300, 200)
    sampler = NoDuplicatesBatchSampler([text_ids], batch_size=4, num_processes=num_processes, seed=1)
    steps = steps_of(sampler)
    assert len(list(sampler)) == len(sampler) == len(steps) * num_processes
    assert len(steps) == 300 // (4 * num_processes)
    for step in steps:
        assert len(step) == 4 * num_processes
        texts = [text for row in step for text in set(text_ids[row].tolist())]
        assert len(texts) == len(set(texts))


def test_two_processes_see_together_what_one_sees():
    text_ids = random_text_ids(200, 150)
    one = NoDuplicatesBatchSampler([text_ids], batch_size=8, seed=2)
    two = NoDuplicatesBatchSampler([text_ids], batch_size=4, num_processes=2, seed=2)
    assert steps_of(one) == steps_of(two)


def test_without_duplicates_an_epoch_is_every_row_once():
    sampler = NoDuplicatesBatchSampler([np.arange(128).reshape(64, 2)], batch_size=8)
    assert sorted(row for batch in sampler for row in batch) == list(range(64))


def test_order_depends_on_seed_and_epoch_only():
    def order(seed, epoch):
        sampler = NoDuplicatesBatchSampler([random_text_ids(100, 90)], batch_size=4, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 0) != order(0, 1) != order(1, 1)


def test_each_step_of_a_mixture_comes_from_one_set_drawn_by_weight():
    sizes = [60, 4000, 500]
    text_ids = [np.arange(2 * size).reshape(size, 2) for size in sizes]
    sampler = NoDuplicatesBatchSampler(text_ids, batch_size=2, num_processes=2, weights=[0.5, 0.3, 0.2])
    bounds = np.cumsum([0, *sizes])
    sets = []
    for step in steps_of(sampler):
        numbers = {int(np.searchsorted(bounds, row, side="right")) - 1 for row in step}
        assert len(numbers) == 1
        sets += numbers
    shares = np.bincount(sets) / len(sets)  # of 1,140 steps: standard error below 0.015
    assert np.abs(shares - [0.5, 0.3, 0.2]).max() < 0.06


def test_set_that_cannot_fill_a_step_is_refused():
    same_anchor = np.stack([np.zeros(50, dtype=np.int64), np.arange(1, 51)], axis=1)
    with pytest.raises(ValueError, match="training set 0 has 50 pairs, too few without a common text"):
        list(NoDuplicatesBatchSampler([same_anchor], batch_size=4))


def test_batch_of_a_single_pair_is_refused():
    with pytest.raises(ValueError, match="single pair"):
        NoDuplicatesBatchSampler([random_text_ids(10, 10)], batch_size=1)


def test_fewer_pairs_than_a_step_are_refused():
    with pytest.raises(ValueError, match="10 pairs do not fill one step of 8 pairs on 2 process"):
        NoDuplicatesBatchSampler([random_text_ids(10, 10)], batch_size=8, num_processes=2)


def test_mixture_hands_out_rows_of_its_sets_by_their_running_number():
    sets = {
        "a": Dataset.from_dict({"anchor": ["w2", "w3"], "positive": ["w4", "w5"]}),
        "b": Dataset.from_dict({"anchor": ["w6", "w7"], "positive": ["w8", "w9"], "negative_1": ["w10", "w11"]}),
    }
    mixture = PairMixture(sets, {"a": 3, "b": 1})
    assert len(mixture) == 4
    assert mixture.weights == [0.75, 0.25]
    assert [mixture[row] for row in range(4)] == [*sets["a"], *sets["b"]]
    assert mixture.__getitems__([3, 2]) == [sets["b"][1], sets["b"][0]]
    with pytest.raises(ValueError, match="positive weight for each of the sets"):
        PairMixture(sets, {"a": 1.0})


def test_equal_texts_have_equal_ids_in_all_columns(tokenizer):
    pairs = Dataset.from_dict({"anchor": ["w2", "w3"], "positive": ["w3", "w2"], "other": [1, 2]})
    ids = hash_pairs(pairs)
    assert ids.shape == (2, 2)
    assert ids[0, 0] == ids[1, 1]
    assert ids[0, 1] == ids[1, 0]
    assert ids[0, 0] != ids[0, 1]
    batch = SiameseDataCollator(tokenizer)([{name: row[name] for name in ("anchor", "positive")} for row in pairs])
    assert np.array_equal(batch["text_ids"].numpy().T, ids)
