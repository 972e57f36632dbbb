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
"""Span corruption as T5 defines it, against a per-token reference written from its definition."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import BertTokenizer, ByT5Tokenizer, GPT2Tokenizer, T5Tokenizer

from trainers.span_corruption import DataCollatorForSpanCorruption


@pytest.fixture(scope="module")
def tokenizer():
    return ByT5Tokenizer()


def random_rows(rng, lengths):
    return [{"input_ids": rng.integers(3, 259, length).tolist()} for length in lengths]


def strip(batch, row):
    """Inputs and labels of a row without padding, as lists."""
    inputs = batch["input_ids"][row][batch["attention_mask"][row].bool()]
    labels = batch["labels"][row]
    return inputs.tolist(), labels[labels != -100].tolist()


def undo(inputs, labels, sentinels, eos):
    """The text that was corrupted: each sentinel of the inputs is replaced by what follows it in the labels."""
    assert inputs[-1] == labels[-1] == eos
    spans, current = {}, None
    for token in labels[:-1]:
        if token in sentinels:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    return list(itertools.chain.from_iterable(spans.get(token, [token]) for token in inputs[:-1])), spans


def test_example_worked_by_hand(tokenizer, monkeypatch):
    # "retrieval" with "tri" and "l" as noise: re 383 eva 382 | 383 tri 382 l, and EOS.
    spans = np.array([2]), np.array([2, 3]), np.array([3, 1])
    monkeypatch.setattr(DataCollatorForSpanCorruption, "draw_spans", lambda self, lengths, rng: spans)
    byte = {character: ord(character) + 3 for character in "retrieval"}
    batch = DataCollatorForSpanCorruption(tokenizer)([{"input_ids": [byte[c] for c in "retrieval"]}])
    assert batch["input_ids"].tolist() == [[byte["r"], byte["e"], 383, byte["e"], byte["v"], byte["a"], 382, 1]]
    assert batch["labels"].tolist() == [[383, byte["t"], byte["r"], byte["i"], 382, byte["l"], 1]]
    assert batch["attention_mask"].tolist() == [[1] * 8]


def test_padding_is_masked_in_inputs_and_ignored_in_labels(tokenizer):
    batch = DataCollatorForSpanCorruption(tokenizer)(random_rows(np.random.default_rng(0), [40, 9]))
    inputs, labels = strip(batch, 1)
    assert batch["input_ids"][1].tolist() == inputs + [tokenizer.pad_token_id] * (
        batch["input_ids"].shape[1] - len(inputs)
    )
    assert batch["labels"][1].tolist() == labels + [-100] * (batch["labels"].shape[1] - len(labels))
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_every_batch_can_be_undone_for_random_lengths_and_densities(tokenizer):
    rng = np.random.default_rng(1)
    sentinels = list(range(383, 258, -1))
    for _ in range(250):
        lengths = rng.integers(1, 200, 4)
        collator = DataCollatorForSpanCorruption(
            tokenizer,
            noise_density=rng.uniform(0.02, 0.5),
            mean_noise_span_length=rng.uniform(1.5, 6),
            input_length=202,
            target_length=202,
            sentinel_ids=sentinels,
        )
        rows = random_rows(rng, lengths)
        batch = collator(rows)
        for row, length in enumerate(lengths):
            inputs, labels = strip(batch, row)
            text, spans = undo(inputs, labels, sentinels, tokenizer.eos_token_id)
            assert text == rows[row]["input_ids"]
            used = [token for token in inputs if token in sentinels]
            if length == 1:
                assert spans == {383: []}
                continue
            # Each sentinel once, from the last id down, the same ones in inputs and labels.
            assert used == list(spans) == sentinels[: len(used)]
            assert inputs[0] not in sentinels
            assert inputs[-2] in sentinels
            assert all(spans.values())
            # The numbers that the paper's code asks for.
            noise = min(max(int(np.rint(np.float32(length) * np.float32(collator.noise_density))), 1), length - 1)
            assert sum(map(len, spans.values())) == noise
            asked = int(np.rint(np.float32(noise) / np.float32(collator.mean_noise_span_length)))
            assert len(spans) == min(max(asked, 1), length - noise)


def test_noise_share_and_span_length_are_the_requested_ones(tokenizer):
    rng = np.random.default_rng(2)
    for density, mean_length in [(0.15, 3.0), (0.3, 5.0), (0.5, 2.0)]:
        collator = DataCollatorForSpanCorruption(
            tokenizer, density, mean_length, input_length=2048, sentinel_ids=range(3000, 0, -1)
        )
        lengths = rng.integers(300, 2000, 200)
        spans, kept, noise = collator.draw_spans(lengths, rng)
        assert kept.sum() + noise.sum() == lengths.sum()
        assert noise.sum() / lengths.sum() == pytest.approx(density, rel=0.01)
        assert noise.mean() == pytest.approx(mean_length, rel=0.02)
        assert spans.sum() == len(noise)


def test_all_ways_to_cut_are_equally_likely(tokenizer):
    # 6 noise tokens in 3 spans among 14 kept ones: C(5, 2) * C(13, 2) = 10 * 78 ways.
    collator = DataCollatorForSpanCorruption(tokenizer, noise_density=0.3, mean_noise_span_length=2.0)
    _, kept, noise = collator.draw_spans(np.full(39_000, 20), np.random.default_rng(3))
    assert (kept.reshape(-1, 3).sum(axis=1) == 14).all()
    assert (noise.reshape(-1, 3).sum(axis=1) == 6).all()
    assert min(kept.min(), noise.min()) == 1
    ways = Counter(map(tuple, np.c_[kept.reshape(-1, 3), noise.reshape(-1, 3)].tolist()))
    assert len(ways) == 780
    # 50 expected of each; a Poisson count leaves [15, 95] about once in a million.
    assert min(ways.values()) > 15
    assert max(ways.values()) < 95


def reference_lengths(input_length, density, mean_length):
    """T5's random_spans_helper, but for the rounding of its counts, which is that of the mask."""

    def lengths(tokens):
        noise = min(max(int(np.rint(np.float32(tokens) * np.float32(density))), 1), tokens - 1)
        spans = max(int(np.rint(np.float32(noise) / np.float32(mean_length))), 1)
        return tokens - noise + spans + 1, noise + spans + 1

    tokens = 2
    while lengths(tokens + 1)[0] <= input_length:
        tokens += 1
    return tokens, lengths(tokens)[1]


def test_raw_length_fills_the_inputs(tokenizer):
    # The lengths that T5 was trained with.
    collator = DataCollatorForSpanCorruption(tokenizer, input_length=512)
    assert (collator.raw_length, collator.target_length) == (568, 114)
    rng = np.random.default_rng(4)
    for input_length, density, mean_length in [(64, 0.15, 3.0), (100, 0.5, 3.0), (333, 0.1, 20.0), (8, 0.4, 1.5)]:
        collator = DataCollatorForSpanCorruption(tokenizer, density, mean_length, input_length)
        expected = reference_lengths(input_length, density, mean_length)
        assert (collator.raw_length, collator.target_length) == expected
        batch = collator(random_rows(rng, [collator.raw_length] * 3))
        assert batch["input_ids"].shape == (3, input_length)
        assert batch["labels"].shape == (3, collator.target_length)
        assert batch["attention_mask"].all()
        assert (batch["labels"] != -100).all()


def test_longer_rows_are_cut_before_eos_as_in_t5(tokenizer):
    rows = random_rows(np.random.default_rng(5), [90])
    long = DataCollatorForSpanCorruption(tokenizer, input_length=200, target_length=200)(rows)
    short = DataCollatorForSpanCorruption(tokenizer, input_length=30, target_length=12)(rows)
    assert short["input_ids"][0].tolist() == long["input_ids"][0, :29].tolist() + [tokenizer.eos_token_id]
    assert short["labels"][0].tolist() == long["labels"][0, :11].tolist() + [tokenizer.eos_token_id]


def test_noise_depends_on_seed_and_batch_alone(tokenizer):
    rows = random_rows(np.random.default_rng(6), [60] * 16)

    def batches(seed, num_workers):
        collator = DataCollatorForSpanCorruption(tokenizer, seed=seed, input_length=64)
        loader = torch.utils.data.DataLoader(rows, batch_size=4, collate_fn=collator, num_workers=num_workers)
        return [batch["input_ids"] for batch in loader]

    alone = batches(0, num_workers=0)
    assert all(torch.equal(a, b) for a, b in zip(alone, batches(0, num_workers=2), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(alone, batches(1, num_workers=0), strict=True))
    # The same row in another batch draws other noise, so shuffled epochs differ.
    collator = DataCollatorForSpanCorruption(tokenizer, input_length=64)
    assert not torch.equal(collator(rows[:4])["input_ids"][0], collator([rows[0], *rows[4:7]])["input_ids"][0])


def test_sentencepiece_vocabularies_count_sentinels_from_the_last_id_down():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in "abcdefgh")]
    # As in the released vocabularies, <extra_id_0> is the last id.
    pieces += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(10))]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=10)
    tokens = tokenizer("a b c d e f g h", add_special_tokens=False).input_ids
    assert len(tokens) == 8
    batch = DataCollatorForSpanCorruption(tokenizer, noise_density=0.4, mean_noise_span_length=1.5, input_length=16)(
        [{"input_ids": tokens}]
    )
    first, second = tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_1>"])
    assert (first, second) == (len(tokenizer) - 1, len(tokenizer) - 2)
    inputs, labels = strip(batch, 0)
    assert [token for token in inputs if token > 10] == [token for token in labels if token > 10] == [first, second]
    assert undo(inputs, labels, [first, second], tokenizer.eos_token_id)[0] == tokens


def test_empty_and_one_token_rows_have_no_noise(tokenizer):
    collator = DataCollatorForSpanCorruption(tokenizer)
    batch = collator([{"input_ids": []}, {"input_ids": [70]}])
    assert [strip(batch, 0), strip(batch, 1)] == [([1], [1]), ([70, 1], [383, 1])]
    assert strip(collator([{"input_ids": []}]), 0) == ([1], [1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_density": 0.0}, "noise_density is 0.0"),
        ({"noise_density": 1.0}, "noise_density is 1.0"),
        ({"mean_noise_span_length": 0.5}, "mean_noise_span_length is 0.5"),
        ({"input_length": 2}, "input_length is 2"),
        ({"input_length": 4096}, "only 125 sentinels"),
        ({"sentinel_ids": [5, 5]}, "repeated"),
    ],
)
def test_impossible_options_are_refused(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        DataCollatorForSpanCorruption(tokenizer, **options)


def test_rows_with_more_spans_than_sentinels_are_refused(tokenizer):
    collator = DataCollatorForSpanCorruption(tokenizer, input_length=64)
    with pytest.raises(ValueError, match=f"126 spans.*125 sentinels.*raw_length={collator.raw_length}"):
        collator([{"input_ids": [70] * 2520}])


def test_text_that_holds_a_sentinel_is_refused(tokenizer):
    collator = DataCollatorForSpanCorruption(tokenizer)
    with pytest.raises(ValueError, match="token 259 of the text is a sentinel"):
        collator([{"input_ids": tokenizer("a <extra_id_0> b", add_special_tokens=False).input_ids}])
    collator(
        [{"input_ids": tokenizer("a <extra_id_0> b", add_special_tokens=False, split_special_tokens=True).input_ids}]
    )


def test_tokenizers_without_sentinels_or_eos_are_refused():
    no_eos = BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4})
    with pytest.raises(ValueError, match="eos_token=None"):
        DataCollatorForSpanCorruption(no_eos)
    no_sentinels = GPT2Tokenizer(vocab={"a": 0, "<|endoftext|>": 1}, merges=[], pad_token="<|endoftext|>")
    with pytest.raises(ValueError, match="no sentinels"):
        DataCollatorForSpanCorruption(no_sentinels)
