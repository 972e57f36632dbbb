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
"""A row that is decoded among others computes what it computes alone, whoever joins and leaves."""

import random
import threading

import pytest
import torch
from test_generation_retro import HashRetriever
from test_modeling_retro import CHUNK, VOCAB, assert_close, make_model
from test_questions_retro import QuestionRetriever
from tiny_joint import make_joint
from tiny_models import letter_tokenizer

from modeling_retro.retriever.retriever import QuestionError
from serving import decoding_batch
from serving.decoding_batch import DecodingBatch, Row
from serving.engine import Completion, Engine, QueueFullError
from serving.sampling import SamplingParameters


MAKERS = {
    "cross": make_model,
    "joint": make_joint,
    "joint-reread": lambda: make_joint(reread_tokens=CHUNK),
    "joint-sliding": lambda: make_joint("gemma3"),
}


class TopRetriever(HashRetriever):
    """Finds the same first neighbors however many are asked for, as a search does."""

    def retrieve(self, chunk_input_ids, k):
        found = super().retrieve(chunk_input_ids, 3)
        for name, value in vars(found).items():
            setattr(found, name, value[:, :k])
        return found


def make_prompt(length, seed):
    return random.Random(seed).choices(range(1, VOCAB), k=length)


def logits_alone(model, row):
    """Logits after each token of a row by one uncached forward pass, with its neighbors looked up chunk by chunk."""
    inputs = {}
    if row.num_hidden > 0:
        columns = torch.arange(len(row.tokens))[None]
        inputs["attention_mask"] = (columns >= row.num_hidden).long()
        inputs["position_ids"] = columns * inputs["attention_mask"]
    chunks = torch.tensor(row.tokens[: len(row.tokens) // CHUNK * CHUNK]).view(-1, CHUNK)
    if row.num_neighbors > 0 and len(chunks) > 0:
        found = TopRetriever().retrieve(chunks, row.num_neighbors)
        inputs["neighbor_input_ids"] = found.neighbor_input_ids[None]
        inputs["neighbor_attention_mask"] = found.neighbor_attention_mask[None]
    with torch.no_grad():
        return model(torch.tensor([row.tokens]), **inputs).logits[0].float()


class BrokenRetriever(TopRetriever):
    """Fails if one of the chunks holds token 1."""

    def retrieve(self, chunk_input_ids, k):
        if (chunk_input_ids == 1).any():
            raise OSError("the index cannot be read")
        return super().retrieve(chunk_input_ids, k)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("num_broken", [1, 3])
def test_a_lookup_that_fails_is_the_failure_of_its_row(kind, num_broken):
    model = MAKERS[kind]()
    batch = DecodingBatch(model, BrokenRetriever(), draft_tokens=0)
    rows = [Row(make_prompt(2 * CHUNK - 1, n), k) for n, k in enumerate((2, 1, 3))]
    rows.append(Row(make_prompt(CHUNK - 2, 3), 2))
    for row in rows:
        row.tokens = [max(token, 2) for token in row.tokens]
    batch.add(rows)
    for n, row in enumerate(rows):
        row.tokens.append(1 if n < num_broken else 7)
    logits = batch.step()[:, 0]
    assert [str(row.failure) for row in rows] == ["the index cannot be read"] * num_broken + ["None"] * (
        4 - num_broken
    )
    for row, found in list(zip(rows, logits, strict=True))[num_broken:]:
        assert_close(found, logits_alone(model, row)[-1])
    assert [len(row.retrieved) for row in rows] == [1] * num_broken + [2] * (3 - num_broken) + [0]


@pytest.mark.parametrize("kind", MAKERS)
def test_rows_that_join_and_leave_compute_what_they_compute_alone(kind):
    model = MAKERS[kind]()
    batch = DecodingBatch(model, TopRetriever(), draft_tokens=0)
    generator = random.Random(0)
    # (step at which a row joins, length of its prompt, its neighbors, tokens until it leaves)
    plans = [(0, 3, 2, 9), (0, 2 * CHUNK, 2, 30), (0, 5, 0, 20), (2, 21, 1, 6), (2, 1, 3, 26), (11, 7, 2, 14)]
    plans += [(12, 4 * CHUNK - 1, 2, 3), (40, 6, 2, 5)]  # the last one comes to an empty batch
    rows = [Row(make_prompt(length, n), k) for n, (_, length, k, _) in enumerate(plans)]
    rows[1].num_hidden, rows[4].tokens, rows[4].num_hidden = 3, make_prompt(CHUNK, 4), CHUNK - 1
    rows[6].num_hidden = 1
    prompts = [list(row.tokens) for row in rows]
    seen = [[] for _ in rows]
    left = [plan[3] for plan in plans]

    def advance(numbers, logits):
        for n, row_logits in zip(numbers, logits, strict=True):
            seen[n].append(row_logits)
            rows[n].tokens.append(generator.randrange(1, VOCAB))
            left[n] -= 1

    for step in range(50):
        active = [rows.index(row) for row in batch.rows]
        kept = [i for i, n in enumerate(active) if left[n] > 0]
        if len(kept) < len(active):
            batch.keep(kept)
        if batch.rows:
            logits = batch.step()[:, 0]
            advance([rows.index(row) for row in batch.rows], logits)
        joining = [n for n, plan in enumerate(plans) if plan[0] == step]
        if joining:
            advance(joining, batch.add([rows[n] for n in joining]))
    assert not batch.rows and all(n == 0 for n in left)
    for row, prompt, found, plan in zip(rows, prompts, seen, plans, strict=True):
        assert len(found) == plan[3]
        expected = logits_alone(model, row)[len(prompt) - 1 : -1]
        assert_close(torch.stack(found), expected, 1e-6)
        read = (len(row.tokens) - 1) // CHUNK  # the last token was never read
        assert [chunk.index for chunk in row.retrieved] == (list(range(read)) if row.num_neighbors else [])


@pytest.mark.parametrize("kind", MAKERS)
def test_greedy_rows_equal_generate_in_single_precision(kind):
    model = MAKERS[kind]().float()
    model.set_retriever(TopRetriever())
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    rows = [Row(make_prompt(length, length), 2) for length in (2, 9, 17, 4)]
    rows.append(Row(make_prompt(2 * CHUNK, 5), 2, num_hidden=CHUNK - 2))
    expected = []
    for row in rows:
        columns = torch.arange(len(row.tokens))[None]
        mask = (columns >= row.num_hidden).long()
        inputs = {"input_ids": torch.tensor([row.tokens]), "attention_mask": mask, "position_ids": columns * mask}
        output = model.generate(**inputs, max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
        expected.append((output.sequences[0].tolist(), output.retrieved_chunk_ids[0].tolist()))
    batch = DecodingBatch(model, TopRetriever(), draft_tokens=0)
    logits = batch.add(rows)
    for step in range(20):
        for row, best in zip(rows, logits.argmax(-1).tolist(), strict=True):
            row.tokens.append(best)
        if step < 19:
            logits = batch.step()[:, 0]
    for row, (tokens, chunk_ids) in zip(rows, expected, strict=True):
        assert row.tokens == tokens
        for chunk, ids in zip(row.retrieved, chunk_ids[: len(row.retrieved)], strict=True):
            assert set(chunk.chunk_ids) <= set(ids)


def test_rows_with_questions_equal_generate():
    model = make_joint().float()
    model.set_retriever(QuestionRetriever())
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    k = model.config.num_neighbors
    rows = [
        Row(make_prompt(2 * CHUNK + 1, 1), k, query=make_prompt(5, 2)),
        Row(make_prompt(CHUNK - 2, 3), k, query=make_prompt(CHUNK + 3, 4), passages="in_order"),
        Row(make_prompt(2 * CHUNK, 5), k),
    ]
    expected = []
    for row in rows:
        question = {} if row.query is None else {"question_input_ids": torch.tensor([row.query])}
        arguments = {"passages": row.passages, **question, "max_new_tokens": 20, "do_sample": False}
        arguments = arguments if question else {"max_new_tokens": 20, "do_sample": False}
        expected.append(model.generate(torch.tensor([row.tokens]), **arguments)[0].tolist())
    batch = DecodingBatch(model, QuestionRetriever(), draft_tokens=0)
    num_prompt = [len(row.tokens) for row in rows]
    logits = batch.add(rows)
    for step in range(20):
        for row, best in zip(rows, logits.argmax(-1).tolist(), strict=True):
            row.tokens.append(best)
        if step < 19:
            logits = batch.step()[:, 0]
    assert [row.tokens for row in rows] == expected
    for row, length in zip(rows, num_prompt, strict=True):
        first = [None] if row.query else list(range(length // CHUNK))
        assert [each.index for each in row.retrieved] == [
            *first,
            *range(length // CHUNK, (len(row.tokens) - 1) // CHUNK),
        ]

    # A question that nothing can be looked up with is an error, or else no question.
    class KnowsNothing(TopRetriever):
        def retrieve(self, chunk_input_ids, k, attention_mask=None):
            if attention_mask is not None:
                raise QuestionError("unknown words")
            return super().retrieve(chunk_input_ids, k)

    batch = DecodingBatch(model, KnowsNothing())
    with pytest.raises(QuestionError, match="unknown words"):
        batch.add([Row(make_prompt(CHUNK, 1), k, query=[3], must_find=True)])
    asked, plain = Row(make_prompt(CHUNK, 1), k, query=[3]), Row(make_prompt(CHUNK, 1), k)
    logits = batch.add([asked, plain])
    assert torch.equal(logits[0], logits[1]) and asked.retrieved == plain.retrieved


def test_one_call_of_the_retriever_serves_all_rows():
    model = make_joint()
    retriever = TopRetriever()
    batch = DecodingBatch(model, retriever)
    batch.add([Row(make_prompt(2 * CHUNK - 1, n), 2) for n in range(3)])
    assert retriever.calls == 1 and len(retriever.chunks) == 3
    for row in batch.rows:
        row.tokens.append(1)
    batch.step()
    assert retriever.calls == 2 and len(retriever.chunks) == 6


@pytest.mark.parametrize("kind", MAKERS)
def test_a_batch_is_as_wide_as_its_longest_row(kind):
    batch = DecodingBatch(MAKERS[kind](), TopRetriever())
    batch.add([Row(make_prompt(length, length), 2) for length in (30, 3, 7)])
    cache = batch._cache
    assert cache.get_seq_length() == 30
    batch.keep([1, 2])
    assert cache.get_seq_length() == 7 and cache.input_ids.shape == (2, 7)
    batch.keep([])
    assert batch._cache is None and batch.rows == []


class Guesses:
    """Drafts that often say what comes next in one of some texts, and are often wrong."""

    def __init__(self):
        self.texts, self.generator, self.num_made = {}, random.Random(0), 0

    def __call__(self, texts, row, length):
        text = self.texts[tuple(row[:3].tolist())]
        rest = text[len(row) : len(row) + self.generator.randint(0, length)]
        self.num_made += len(rest)
        return [token if self.generator.random() < 0.8 else (token + 1) % VOCAB for token in rest]


class TopQuestions(QuestionRetriever, TopRetriever):
    """Finds the same first neighbors and passages however many are asked for."""


def run(model, plans, draft_tokens, parameters):
    """The events of completions, of which `plans` gives step at which each joins, prompt, number of tokens and k."""
    batch, events = DecodingBatch(model, TopQuestions(), draft_tokens), [[] for _ in plans]
    letters = letter_tokenizer(VOCAB)
    completions = [
        Completion(
            Row(list(prompt), k, query=prompt if n % 5 == 4 and hasattr(model, "decoder") else None),
            max_tokens,
            parameters(n),
            (chr(ord("A") + n),) if n % 3 == 0 else (),
            events[n].append,
        )
        for n, (_, prompt, max_tokens, k) in enumerate(plans)
    ]
    running, step = [], 0
    while running or step <= max(plan[0] for plan in plans):
        joining = [one for one, plan in zip(completions, plans, strict=True) if plan[0] == step]
        if joining:
            logits = batch.add([one.row for one in joining])[:, None]
            running += joining
            for completion, row_logits in zip(joining, logits, strict=True):
                completion.advance(row_logits, (0,), letters)
        kept = [n for n, completion in enumerate(running) if not completion.is_finished]
        batch.keep(kept)
        running = [running[n] for n in kept]
        if running:
            for completion, row_logits in zip(running, batch.step(), strict=True):
                completion.advance(row_logits, (0,), letters)
        kept = [n for n, completion in enumerate(running) if not completion.is_finished]
        batch.keep(kept)
        running = [running[n] for n in kept]
        step += 1
    return completions, events


@pytest.mark.parametrize("max_holes", [0, 3])
@pytest.mark.parametrize("kind", MAKERS)
def test_completions_are_equal_with_drafts_and_without(kind, max_holes, monkeypatch):
    model, guesses, generator = MAKERS[kind](), Guesses(), random.Random(1)
    monkeypatch.setattr(decoding_batch, "find_draft", guesses)
    if kind != "joint-sliding":
        monkeypatch.setattr(decoding_batch, "MAX_HOLES", max_holes)
    plans = [
        (n // 4 * 2, make_prompt(generator.randint(3, 3 * CHUNK), n), generator.randint(1, 5 * CHUNK), n % 3)
        for n in range(36)
    ]

    def parameters(n):
        options = {"temperature": 0.0 if n % 4 == 0 else 0.9, "top_p": 0.9, "seed": n, "num_logprobs": 2}
        return SamplingParameters(**options, presence_penalty=n % 2, frequency_penalty=0.1, logit_bias={3: 1.0})

    plain, plain_events = run(model, plans, 0, parameters)
    assert guesses.num_made == 0 and all(one.num_steps == one.num_tokens for one in plain)
    guesses.texts = {tuple(one.row.tokens[:3]): one.row.tokens for one in plain}
    drafted, events = run(model, plans, 8, parameters)
    for one, other in zip(drafted, plain, strict=True):
        assert one.row.tokens == other.row.tokens and one.num_tokens == other.num_tokens
        assert one.row.retrieved == other.row.retrieved
    assert sum(one.num_steps for one in drafted) < 0.9 * sum(one.num_tokens for one in drafted)
    assert 0.3 < sum(one.num_confirmed for one in drafted) / sum(one.num_drafted for one in drafted) < 0.9
    for own, others in zip(events, plain_events, strict=True):
        assert [event.text for event in own] == [event.text for event in others]
        assert [event.finish_reason for event in own] == [event.finish_reason for event in others]
        for event, other in zip(own, others, strict=True):
            for token, other_token in zip(event.tokens, other.tokens, strict=True):
                assert (token.chosen.id, token.offset) == (other_token.chosen.id, other_token.offset)
                assert abs(token.chosen.logprob - other_token.chosen.logprob) < 1e-5


def test_a_completion_that_has_its_answer_takes_no_place():
    # A client that has read its answer may ask at once, while the thread of the engine still has the old row.
    tokenizer = letter_tokenizer(VOCAB)
    engine = Engine(DecodingBatch(make_joint(), TopRetriever()), tokenizer, (), max_batch_size=2, max_waiting=1)
    refused, finished, is_over = [], [], threading.Event()

    def make(number, then):
        def emit(event):
            if event.finish_reason is not None:
                then()

        return Completion(Row(make_prompt(5, number), 1), 3, SamplingParameters(temperature=0), (), emit)

    def count():
        finished.append(1)
        if len(finished) == engine.capacity:
            is_over.set()

    def ask_again():
        for number in (engine.capacity + 1, engine.capacity):
            try:
                engine.submit([make(n, count) for n in range(number)])
            except QueueFullError as error:
                refused.append(str(error))
        if len(refused) > 1:
            is_over.set()

    engine.submit([make(9, ask_again)])
    assert is_over.wait(60)
    engine.close()
    assert refused == ["0 completions run and 0 wait already; try again later"]
