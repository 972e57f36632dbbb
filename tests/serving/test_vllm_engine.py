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
"""Completions through the client of vLLM equal those of `generate()`. A fake of vLLM computes in this process."""

import itertools
import random
import threading

import pytest
import torch
from fake_vllm import FakeVllm
from tiny_models import letter_tokenizer, tiny_llama

from modeling_retro import RetrievedNeighbors, RetroJointForCausalLM
from serving.decoding_batch import Row
from serving.engine import Completion, CompletionError
from serving.sampling import SamplingParameters
from serving.vllm.connector.retro_states import Directory, Rotation, is_moved
from serving.vllm.engine import VllmEngine


M, VOCAB = 8, 40
DECODER = {"initializer_range": 0.3, "num_hidden_layers": 3, "num_key_value_heads": 1, "head_dim": 16}
DECODER |= {"hidden_size": 32, "max_position_embeddings": 1024}


class DrawnNeighbors:
    """Neighbors that are drawn with the chunk as a seed: whole ones, short ones, and for some chunks none."""

    def __init__(self, vocab_size, chunk_size):
        self.vocab_size, self.chunk_size = vocab_size, chunk_size

    def retrieve(self, chunks, k, attention_mask=None):
        ids, mask, whole = [], [], 2 * self.chunk_size
        for chunk in chunks.tolist():
            drawn = random.Random(str(chunk))
            ids.append([drawn.choices(range(self.vocab_size), k=whole) for _ in range(k)])
            lengths = drawn.choices([whole, self.chunk_size + 3, 1], weights=[6, 3, 1], k=k)
            lengths = [0] * k if drawn.random() < 0.2 else lengths
            mask.append([[j < length for j in range(whole)] for length in lengths])
        return RetrievedNeighbors(neighbor_input_ids=torch.tensor(ids), neighbor_attention_mask=torch.tensor(mask))


def make_model(decoder=None, chunk_size=M, **fields):
    decoder = decoder or tiny_llama(VOCAB, **DECODER)
    model = RetroJointForCausalLM.from_decoder(decoder, chunk_size=chunk_size, **fields)
    model.set_retriever(DrawnNeighbors(model.config.vocab_size, chunk_size))
    return model


def draw_row(length, k, seed=0, **fields):
    drawn = random.Random(seed * 1000 + length)
    return Row(drawn.choices(range(VOCAB), k=length), k, **fields)


def draw_query(model):
    """A question for which there are passages."""
    for number in range(100):
        query = [number, 1, 2]
        if model.retriever.retrieve(torch.tensor([query]), 2).neighbor_attention_mask[..., 1].all():
            return query


def generate(model, row, num_new):
    """The tokens that `generate()` gives, one for one."""
    return generate_with_gaps(model, row, num_new)[0]


def generate_with_gaps(model, row, num_new):
    """The same, and by how much the best logit of each new token exceeds the second."""
    ids, question = torch.tensor([row.tokens]), {}
    if row.query is not None and row.num_neighbors > 0:
        found = model.retriever.retrieve(torch.tensor([row.query]), row.num_neighbors)
        question = {"passage_input_ids": found.neighbor_input_ids, "passages": row.passages}
        question["passage_attention_mask"] = found.neighbor_attention_mask
        if row.before:
            question["passage_prefix_input_ids"] = torch.tensor([row.before])
    model.config.num_neighbors = row.num_neighbors
    options = {"max_new_tokens": num_new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True, "draft_tokens": 0}
    with model.retrieval(row.num_neighbors > 0):
        outputs = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, **question)
    best = torch.stack(outputs.logits)[:, 0].topk(2).values
    return outputs.sequences[0].tolist(), (best[:, 0] - best[:, 1]).tolist()


def engine_for(model, *servers, **options):
    tokenizer = letter_tokenizer(model.config.vocab_size)
    urls = [server.url for server in servers]
    return VllmEngine(urls, model.config, model.retriever, tokenizer, (), **options)


def complete(engine, rows, num_new, parameters=None):
    """Runs rows to their ends and returns the errors among these."""
    ended, errors = threading.Semaphore(0), []

    def emit(event):
        if event.error is not None:
            errors.append(event.error)
        if event.error is not None or event.finish_reason is not None:
            ended.release()

    parameters = parameters or SamplingParameters(temperature=0)
    engine.submit([Completion(row, num_new, parameters, (), emit) for row in rows])
    for _ in rows:
        assert ended.acquire(timeout=600)
    return errors


@pytest.mark.parametrize("reread_tokens", [0, 3, M])
@pytest.mark.parametrize("num_hidden", [0, 1])
@pytest.mark.parametrize("k", [0, 1, 2, 4])
def test_rows_equal_generate(k, num_hidden, reread_tokens):
    model = make_model(hidden_neighbor_tokens=num_hidden, reread_tokens=reread_tokens)
    rows = [draw_row(length, k) for length in (1, 2, M - 1, M, M + 1, 2 * M, 5 * M + 3)]
    wanted = [generate(model, row, 3 * M + 2) for row in rows]
    with FakeVllm(model.decoder) as fake:
        engine = engine_for(model, fake)
        assert complete(engine, rows, 3 * M + 2) == []
        engine.close()
    assert [row.tokens for row in rows] == wanted
    if k == 0:
        assert all("kv_transfer_params" not in body for body in fake.requests[2:])  # the first two are probes


@pytest.mark.parametrize("passages", ["apart", "in_order"])
@pytest.mark.parametrize("num_before", [0, 5])
@pytest.mark.parametrize("reread_tokens", [0, M])
def test_questions_equal_generate(passages, num_before, reread_tokens):
    model = make_model(reread_tokens=reread_tokens)
    rows = [draw_row(length, 2, passages=passages) for length in (1, M - 1, M, M + 1, 3 * M)]
    for row in rows:
        row.query = draw_query(model)
        row.before = draw_row(num_before, 0, seed=1).tokens
    wanted = [generate(model, row, 3 * M) for row in rows]
    with FakeVllm(model.decoder) as fake:
        engine = engine_for(model, fake)
        assert complete(engine, rows, 3 * M) == []
        engine.close()
    assert [row.tokens for row in rows] == wanted


def test_nothing_is_read_twice_but_what_is_read_again():
    model = make_model(reread_tokens=3)
    rows = [draw_row(5 * M + 3, 2)]
    with FakeVllm(model.decoder) as fake:
        engine = engine_for(model, fake)
        complete(engine, rows, 2 * M)
        engine.close()
    retrieved = [chunk for chunk in rows[0].retrieved if any(len(ids) > 1 for ids in chunk.input_ids)]
    texts = {tuple(ids) for chunk in retrieved for ids in chunk.input_ids if len(ids) > 1}
    written = [chunk for chunk in retrieved if chunk.index >= 5]
    probes = 16 + 1
    # The last token of a row is written and not read. Chunks that are complete in the prompt are read once.
    expected = probes + sum(map(len, texts)) + len(rows[0].tokens) - 1 + sum(3 - 1 for _ in written)
    assert fake.num_computed == expected
    said = [body.get("kv_transfer_params", {}) for body in fake.requests]
    batches = [len(params["stretches"]) for params in said if "stretches" in params]
    assert batches[0] >= 4, batches  # stretches of a prompt are one request


def test_lost_states_are_read_again():
    model = make_model()
    rows = [draw_row(length, 2) for length in (3, M, 3 * M + 1)]
    wanted = [generate(model, row, 4 * M) for row in rows]
    calls = itertools.count()
    with FakeVllm(model.decoder, fail=lambda body: next(calls) in (5, 12, 13, 40, 70) and "error") as fake:
        engine = engine_for(model, fake)
        assert complete(engine, rows, 4 * M) == []
        engine.close()
    assert [row.tokens for row in rows] == wanted


def test_an_engine_that_goes_and_comes_back_changes_nothing():
    model = make_model()
    rows = [draw_row(length, 2) for length in (3, M, 3 * M + 1)]
    wanted = [generate(model, row, 4 * M) for row in rows]
    calls = itertools.count()
    with FakeVllm(model.decoder) as fake:
        engine = engine_for(model, fake)
        fake.fail = lambda body: next(calls) in (5, 12, 13, 40, 70) and "gone"
        assert complete(engine, rows, 4 * M) == []
        assert engine.num_restarts > 0
        engine.close()
    assert [row.tokens for row in rows] == wanted


def test_memory_is_bounded_and_what_fell_out_is_read_again():
    model = make_model()
    rows = [draw_row(length, 2, seed=n) for n, length in enumerate((3, M, 3 * M + 1, 2 * M))]
    wanted = [generate(model, row, 3 * M) for row in rows]
    with FakeVllm(model.decoder, max_tokens_held=150) as fake:
        engine = engine_for(model, fake, max_batch_size=2)
        assert complete(engine, rows, 3 * M) == []
        assert 0 < engine.state_bytes <= 150
        assert fake.directory.num_dropped > 0
        engine.close()
    assert [row.tokens for row in rows] == wanted


def test_what_can_never_be_held_is_told():
    model = make_model()
    with FakeVllm(model.decoder, max_tokens_held=20) as fake:
        engine = engine_for(model, fake)
        (error,) = complete(engine, [draw_row(3 * M, 2)], 1)
        assert error.status == 503
        engine.close()


def test_a_row_stays_with_one_of_several_engines():
    model = make_model()
    rows = [draw_row(length, 2) for length in (3, M, 3 * M + 1, 2 * M)]
    wanted = [generate(model, row, 3 * M) for row in rows]
    with FakeVllm(model.decoder) as one, FakeVllm(model.decoder) as other:
        engine = engine_for(model, one, other)
        assert complete(engine, rows, 3 * M) == []
        engine.close()
    assert [row.tokens for row in rows] == wanted
    names = [
        {body["kv_transfer_params"]["row"] for body in fake.requests if "row" in body.get("kv_transfer_params", {})}
        for fake in (one, other)
    ]
    assert names[0] and names[1] and not names[0] & names[1]


def test_logprobs_are_those_of_the_model():
    model = make_model()
    row = draw_row(M + 1, 2)
    events, ended = [], threading.Event()

    def emit(event):
        events.append(event)
        if event.finish_reason is not None:
            ended.set()

    parameters = SamplingParameters(temperature=0, num_logprobs=2)
    with FakeVllm(model.decoder) as fake:
        engine = engine_for(model, fake)
        engine.submit([Completion(row, 5, parameters, (), emit)])
        assert ended.wait(60)
        engine.close()
    tokens = [token.chosen for event in events for token in event.tokens]
    ids = torch.tensor([row.tokens])
    model.config.num_neighbors = 2
    for number, token in enumerate(tokens):
        with torch.no_grad():  # a prompt, which is read again as the row was
            logits = model(ids[:, : M + 1 + number], logits_to_keep=1).logits[0, -1]
        best = logits.log_softmax(-1).topk(2)
        assert token.logprob == pytest.approx(float(best.values[0]), abs=1e-4)
        assert [id for id, _ in token.top] == best.indices.tolist()


def test_what_vllm_cannot_do_is_refused():
    model = make_model()
    with FakeVllm(model.decoder) as fake:
        engine = engine_for(model, fake)
        cases = [
            (draw_row(4, 2, num_scored=0), SamplingParameters(), 4),
            (draw_row(4, 2), SamplingParameters(presence_penalty=1.0), 4),
            (draw_row(4, 2), SamplingParameters(), 4096),
        ]
        for row, parameters, max_tokens in cases:
            with pytest.raises(CompletionError) as refusal:
                engine.submit([Completion(row, max_tokens, parameters, (), print)])
            assert refusal.value.status == 400
        engine.close()


def test_a_client_that_leaves_frees_its_row():
    model = make_model()
    with FakeVllm(model.decoder) as fake:
        engine = engine_for(model, fake, max_batch_size=1)
        begun = threading.Event()
        left = Completion(draw_row(M, 2), 500, SamplingParameters(temperature=0), (), lambda event: begun.set())
        engine.submit([left])
        assert begun.wait(60)
        left.cancel()
        assert complete(engine, [draw_row(4, 2)], 2) == []
        assert left.num_tokens < 500
        engine.close()


def test_the_directory_drops_what_was_not_used_for_longest():
    directory = Directory(10)
    assert directory.put(("text", "a"), 4) == []
    assert directory.put(("text", "b"), 4) == []
    assert directory.length(("text", "a")) == 4
    assert directory.put(("row", "c"), 5) == [("text", "b")]
    assert (directory.num_tokens, directory.num_dropped, len(directory)) == (9, 1, 2)
    assert directory.put(("text", "huge"), 11) == [("text", "a"), ("row", "c"), ("text", "huge")]
    assert directory.num_tokens == 0


@pytest.mark.parametrize("is_neox_style", [True, False])
@pytest.mark.parametrize("width", [8, 4])
def test_a_moved_key_is_that_of_the_other_position(is_neox_style, width):
    frequencies = 100.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    keys = torch.randn(5, 2, 8, dtype=torch.float64).float()

    def at(position):  # by complex numbers, from the definition
        turn = torch.polar(torch.ones_like(frequencies), position * frequencies)
        part = keys[..., :width].double()
        pairs = torch.stack(part.chunk(2, -1), -1) if is_neox_style else part.unflatten(-1, (-1, 2))
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
        turned = torch.cat(turned.unbind(-1), -1) if is_neox_style else turned.flatten(-2)
        return torch.cat([turned.float(), keys[..., width:]], -1)

    rotation = Rotation(frequencies, is_neox_style)
    torch.testing.assert_close(rotation.move(at(3), -10), at(-7))
    equal = keys[:1].expand(20, -1, -1)
    assert is_moved(rotation.move(equal, torch.arange(20)), rotation)
    assert not is_moved(rotation.move(equal, torch.arange(20)), None)
    assert is_moved(equal, None) and not is_moved(equal, rotation)
