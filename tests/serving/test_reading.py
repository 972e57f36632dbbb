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
"""What the page shows: bits of each token with neighbors and without, copied spans, and HTML that keeps its text."""

import math
import re

import pytest
import torch
from conftest import TINY_CHUNK_SIZE
from tiny_server import save_model

from modeling_retro import RetroJointForCausalLM
from modeling_retro.drafts_retro import DRAFT_TOKENS
from serving import decoding_batch
from serving.decoding_batch import DecodingBatch, Row
from serving.engine import Completion
from serving.load import load_model
from serving.page import plain_html, reading_html, steps_html
from serving.reading import (
    Neighbor,
    Piece,
    Reading,
    Stretch,
    continue_both_ways,
    copied_places,
    read_text,
    split_copied,
)
from serving.sampling import ChosenToken, SamplingParameters
from serving.text_stream import TextStream
from trainers.generation import look_up
from trainers.prompts import PromptEncoder


TEXT = "retro looks things up in a datastore naïve 日本語 👩‍👩‍👧 looks up in a datastore δέλτα retro looks"


@pytest.fixture(scope="module", params=["joint", "cross"])
def loaded(request, tiny_datastore_dir, tmp_path_factory):
    folder = save_model(request.param, tiny_datastore_dir, tmp_path_factory.mktemp(request.param))
    return load_model(str(folder), str(tiny_datastore_dir))


def bits(model, retriever, ids, retrieval):
    model.set_retriever(retriever)
    with torch.no_grad(), model.retrieval(retrieval):
        logits = model(torch.tensor([ids])).logits[0]
    model.set_retriever(None)
    return [-float(logits[i].log_softmax(-1)[token]) / math.log(2) for i, token in enumerate(ids[1:])]


def test_all_chunks_of_a_question_read_its_passages(loaded):
    if not isinstance(loaded.model, RetroJointForCausalLM):
        pytest.skip("a model with cross attention reads neighbors from the next chunk on")
    tokenizer = loaded.retriever.datastore.tokenizer
    ids, query = PromptEncoder(tokenizer).encode_text(TEXT), tokenizer("δέλτα up")["input_ids"]
    reading = read_text(loaded.model, loaded.retriever, ids, 2, query)
    found = look_up(loaded.retriever, "δέλτα up", 2)
    passages = {"passage_input_ids": found.neighbor_input_ids, "passage_attention_mask": found.neighbor_attention_mask}
    passages["passages"] = "in_order"
    with torch.no_grad():
        logprobs = loaded.model(torch.tensor([ids]), **passages).logits[0].log_softmax(-1)
    on = [-float(logprobs[n, token]) / math.log(2) for n, token in enumerate(ids[1:])]
    pieces = [piece for stretch in reading.stretches for piece in stretch.pieces]
    assert sum(piece.bits_on for piece in pieces) == pytest.approx(sum(on), abs=1e-2)
    assert [len(stretch.neighbors) for stretch in reading.stretches] == [2] * len(reading.stretches)
    assert "Chunk 1 read what was found for the question" in reading_html(reading)


def test_bits_of_a_text_are_those_of_the_model_with_neighbors_and_without(loaded):
    ids = PromptEncoder(loaded.retriever.datastore.tokenizer).encode_text(TEXT)
    reading = read_text(loaded.model, loaded.retriever, ids, loaded.model.config.num_neighbors)
    pieces = [piece for stretch in reading.stretches for piece in stretch.pieces]
    assert "".join(piece.text for piece in pieces) == TEXT
    on, off = (bits(loaded.model, loaded.retriever, ids, retrieval) for retrieval in (True, False))
    assert sum(piece.bits_on for piece in pieces) == pytest.approx(sum(on), abs=1e-2)
    assert sum(piece.bits_off for piece in pieces) == pytest.approx(sum(off), abs=1e-2)
    assert reading.bits_per_byte() == pytest.approx(
        (sum(on) / len(TEXT.encode()), sum(off) / len(TEXT.encode())), abs=1e-4
    )
    assert len(reading.stretches) == -(-len(ids) // TINY_CHUNK_SIZE)
    # Nothing was looked up before the first chunk, and each later one read what the chunk before it had found.
    assert all(abs(piece.worth) < 1e-4 for piece in reading.stretches[0].pieces)
    assert [bool(stretch.neighbors) for stretch in reading.stretches] == [False] + [True] * (
        len(reading.stretches) - 1
    )
    assert any(abs(piece.worth) > 1e-2 for piece in pieces)
    source = reading.stretches[1].neighbors[0].source
    pattern = r"train\.jsonl:(\d+) · document (\d+), chunk (\d+) of (\d+)$"
    line, number, first, end = map(int, re.match(pattern, source).groups())
    assert 0 <= number < 40 and 1 <= first <= end and line == number + 1


def test_a_prompt_is_continued_as_the_model_does_with_neighbors_and_without(loaded):
    tokenizer = loaded.retriever.datastore.tokenizer
    ids = PromptEncoder(tokenizer).encode_text("retro looks things")
    arguments = (loaded.model, loaded.retriever, ids, loaded.model.config.num_neighbors, 30)
    comparisons = list(continue_both_ways(*arguments, SamplingParameters(temperature=0), frozenset()))
    expected = {}
    for retrieval in (True, False):
        loaded.model.set_retriever(loaded.retriever)
        with torch.no_grad(), loaded.model.retrieval(retrieval):
            output = loaded.model.generate(
                torch.tensor([ids]), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=1
            )[0]
        expected[retrieval] = output.tolist()
    loaded.model.set_retriever(None)
    last = comparisons[-1]
    assert last.is_finished and len(comparisons) == 32
    whole = tokenizer.decode(expected[True], skip_special_tokens=True)
    text = "".join(piece.text for stretch in last.on.stretches for piece in stretch.pieces)
    assert whole.startswith(text) and len(whole) - len(text) < 4  # a character may be open
    off = tokenizer.decode(expected[False][len(ids) :], skip_special_tokens=True)
    assert off.startswith(last.off) and len(off) - len(last.off) < 4
    # What each generated token would have cost without neighbors is what the whole text says.
    on_bits, off_bits = (
        bits(loaded.model, loaded.retriever, expected[True], retrieval) for retrieval in (True, False)
    )
    num_tokens = len(last.on._ids)
    assert num_tokens == len(ids) + 30
    total = [sum(getattr(p, name) for s in last.on.stretches for p in s.pieces) for name in ("bits_on", "bits_off")]
    pending = last.on._pending
    assert total[0] + pending[0] == pytest.approx(sum(on_bits), abs=1e-2)
    assert total[1] + pending[1] == pytest.approx(sum(off_bits), abs=1e-2)


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_steps_are_counted_as_drafts_take_them(loaded, temperature, monkeypatch):
    ids = PromptEncoder(loaded.retriever.datastore.tokenizer).encode_text("retro looks things")
    k, sampling = loaded.model.config.num_neighbors, SamplingParameters(temperature=temperature, seed=3)
    *_, known = continue_both_ways(loaded.model, loaded.retriever, ids, k, 60, sampling, frozenset())

    def guess(texts, row, length):
        """What comes next, with a mistake at each seventh token."""
        coming = range(len(row), min(len(row) + length, len(known.on._ids)))
        return [0 if place % 7 == 0 else known.on._ids[place] for place in coming]

    monkeypatch.setattr(decoding_batch, "find_draft", guess)
    *_, last = continue_both_ways(loaded.model, loaded.retriever, ids, k, 60, sampling, frozenset())
    batch = DecodingBatch(loaded.model, loaded.retriever, draft_tokens=DRAFT_TOKENS)
    completion = Completion(Row(list(ids), k), 60, sampling, (), lambda event: None)
    logits = batch.add([completion.row])[:, None]
    while True:
        completion.advance(logits[0], (), loaded.retriever.datastore.tokenizer)
        if completion.is_finished:
            break
        logits = batch.step()
    assert last.on._ids == completion.row.tokens == known.on._ids
    assert (last.steps.num_tokens, last.steps.num_steps) == (60, completion.num_steps)
    assert 0.3 * completion.num_drafted < completion.num_confirmed < completion.num_drafted
    assert f"{completion.num_steps} steps" in steps_html(last.steps)


def test_runs_of_tokens_in_both_are_copied():
    places = copied_places([9, 1, 2, 3, 4, 5, 8, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6], length=4)
    assert places == [False] + [True] * 5 + [False] * 4
    assert split_copied([9, 1, 2, 8], [False, True, True, False]) == [([9], False), ([1, 2], True), ([8], False)]
    assert copied_places([1, 2], [1, 2]) == [False, False]


def test_html_keeps_text_as_text(loaded):
    evil = '<script>alert(1)</script> ${1+1} {{x}} "quoted" <eos> & end'
    reading = Reading(loaded.retriever)
    parts = [("<b>", False), (evil, True)]
    reading.stretches = [
        Stretch([Piece(evil, 1.0, 3.0)]),
        Stretch([Piece("a", 3.0, 1.0, is_given=False)], [Neighbor(parts, f"document 3 {evil}", 0.5)]),
    ]
    html = reading_html(reading)
    assert "<script" not in html and "<b>" not in html and "&lt;script&gt;" in html
    assert "+2.00 bits: 50.0 % with neighbors, 12.5 % without" in html and "-2.00 bits" in html
    assert html.count("<mark>") == 1 and 'class="generated"' in html
    assert "<script" not in plain_html(evil, evil)


@pytest.mark.parametrize("text", ["plain text", "naïve 日本語 👩‍👩‍👧 δέλτα", "e\u0301 \u00a0 x"])
def test_text_comes_in_whole_characters_and_is_all_there(tiny_tokenizer, text):
    stream = TextStream(tiny_tokenizer)
    ids = tiny_tokenizer(text)["input_ids"]
    pieces = [stream.push(ChosenToken(id, 0.0, []))[0] for id in ids] + [stream.finish()[0]]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    # Broken off inside of a character, what is there comes out.
    stream = TextStream(tiny_tokenizer)
    cut = tiny_tokenizer("日")["input_ids"][:1]
    assert stream.push(ChosenToken(cut[0], 0.0, []))[0] + stream.finish()[0] == tiny_tokenizer.decode(cut)


def test_a_stop_sequence_over_several_tokens_is_held_back(tiny_tokenizer):
    stream = TextStream(tiny_tokenizer, stop=["in a box", "STOP"])
    shown, ids = "", tiny_tokenizer("looks in a bag, in a box, and on")["input_ids"]
    for id in ids:
        shown += stream.push(ChosenToken(id, 0.0, []))[0]
        assert not shown.endswith(("in a b", "in a bo"))
        if stream.is_stopped:
            break
    assert stream.is_stopped and shown == "looks in a bag, " and stream.finish() == ("", [])
