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
import sys
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch
from test_modeling_retro import CHUNK, LENGTH, VOCAB, assert_close, make_inputs, slow_logits
from test_modeling_retro import make_model as make_cross_model
from tiny_joint import make_joint, slow_joint_logits
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache


make_model = make_cross_model


@pytest.fixture(autouse=True, params=["cross", "joint", "joint-reread"])
def kind_of_model(request, monkeypatch):
    """All ways of reading neighbors generate alike: each test runs with a model of each."""
    maker = make_cross_model if request.param == "cross" else make_joint
    if request.param == "joint-reread":
        maker = partial(make_joint, reread_tokens=CHUNK)
    monkeypatch.setattr(sys.modules[__name__], "make_model", maker)
    return request.param


class HashRetriever:
    """Neighbors, ids and scores that depend on the tokens of the chunk alone; counts its calls."""

    def __init__(self):
        self.chunks, self.calls = [], 0

    def retrieve(self, chunk_input_ids, k):
        self.calls += 1
        rows = []
        for chunk in chunk_input_ids.tolist():
            self.chunks.append(tuple(chunk))
            generator = torch.Generator().manual_seed(hash(tuple(chunk)) % 2**31)
            ids = torch.randint(0, VOCAB, (k, LENGTH), generator=generator)
            mask = torch.arange(LENGTH) < torch.randint(0, LENGTH + 1, (k, 1), generator=generator)
            chunk_ids = torch.randint(0, 1000, (k,), generator=generator)
            rows.append((ids, mask, chunk_ids, chunk_ids // 10, chunk_ids.float()))
        return Retrieved(*map(torch.stack, zip(*rows)))


class Retrieved:
    def __init__(self, neighbor_input_ids, neighbor_attention_mask, chunk_ids, document_ids, scores):
        self.neighbor_input_ids, self.neighbor_attention_mask = neighbor_input_ids, neighbor_attention_mask
        self.chunk_ids, self.document_ids, self.scores = chunk_ids, document_ids, scores


def make_retro(**fields):
    model = make_model(**fields)
    model.set_retriever(HashRetriever())
    model.generation_config.pad_token_id = 0
    return model


def left_padded(lengths, seed=3):
    total = max(lengths)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (len(lengths), total), generator=generator)
    mask = (torch.arange(total) >= total - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def uncached_logits(model, ids, mask):
    """Logits of rows without padding and without a cache, with neighbors looked up chunk by chunk."""
    logits = []
    for row_ids, row_mask in zip(ids, mask):
        own = row_ids[row_mask.bool()][None]
        inputs = {}
        if own.shape[1] >= CHUNK:
            chunks = own[0, : own.shape[1] // CHUNK * CHUNK].view(-1, CHUNK)
            found = HashRetriever().retrieve(chunks, model.config.num_neighbors)
            inputs["neighbor_input_ids"] = found.neighbor_input_ids[None]
            inputs["neighbor_attention_mask"] = found.neighbor_attention_mask[None]
        with torch.no_grad(), model.retrieval(False):
            logits.append(model(own, **inputs).logits[0])
    return logits


def test_plain_forward_retrieves_by_itself():
    model = make_retro()
    ids, mask = left_padded([3 * CHUNK + 1, 2 * CHUNK, CHUNK - 1])
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    assert model.retriever.calls == 1
    for row, expected in enumerate(uncached_logits(model, ids, mask)):
        assert_close(logits[row, mask[row].bool()], expected)


def test_nothing_is_retrieved_off_in_training_or_when_neighbors_are_given():
    model = make_retro()
    ids, neighbors, _ = make_inputs(1, 2 * CHUNK)
    off = make_model()
    with torch.no_grad():
        with model.retrieval(False):
            assert torch.equal(model(ids).logits, off(ids).logits)
        model(ids, neighbor_input_ids=neighbors)
        model.train()
        model(ids)
        model.eval()
        model.config.num_neighbors = 0
        assert torch.equal(model(ids).logits, off(ids).logits)
    assert model.retriever.calls == 0


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("step", [1, 2, 3, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_cached_equals_uncached_at_every_position(step, attn_implementation, kind_of_model):
    if kind_of_model != "cross" and attn_implementation == "eager":
        pytest.skip("transformers' eager attention has a softmax in float32; padding is NaN to float64 models")
    model = make_retro(attn_implementation=attn_implementation)
    ids, mask = left_padded([4 * CHUNK + 1, 3 * CHUNK, 2 * CHUNK - 1, 2])
    total = ids.shape[1]
    cache, logits = model.cache_class(config=model.config), []
    with torch.no_grad():
        for start in range(0, total, step):
            end = min(total, start + step)
            outputs = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
            logits.append(outputs.logits)
    logits = torch.cat(logits, dim=1)
    for row, expected in enumerate(uncached_logits(model, ids, mask)):
        assert_close(logits[row, mask[row].bool()], expected)
    # Every chunk of the rows was retrieved once.
    assert len(model.retriever.chunks) == len(set(model.retriever.chunks)) == 4 + 3 + 1


def test_padding_between_cached_and_new_tokens_is_not_part_of_a_chunk():
    model = make_retro()
    ids = torch.randint(1, VOCAB, (2, 3 * CHUNK))
    mask = torch.ones_like(ids)
    mask[0, 5:7] = 0  # a right-padded prompt, then more text
    cache = model.cache_class(config=model.config)
    with torch.no_grad():
        first = model(ids[:, :7], attention_mask=mask[:, :7], past_key_values=cache).logits
        second = model(ids[:, 7:], attention_mask=mask, past_key_values=cache).logits
    logits = torch.cat([first, second], dim=1)
    for row, expected in enumerate(uncached_logits(model, ids, mask)):
        assert_close(logits[row, mask[row].bool()], expected)


@pytest.mark.parametrize("removed", [1, 2, CHUNK, CHUNK + 1, 2 * CHUNK + 1])
def test_cropped_cache_equals_a_cache_that_never_saw_the_tokens(removed):
    model = make_retro()
    ids, mask = left_padded([3 * CHUNK + 1, 2 * CHUNK + 2])
    kept = ids.shape[1] - removed
    other = torch.cat([ids[:, :kept], (ids[:, kept:] + 1) % VOCAB, ids], dim=1)
    other_mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    cache = model.cache_class(config=model.config)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        cache.crop(-removed)
        logits = [
            model(other[:, kept : kept + 1], attention_mask=other_mask[:, : kept + 1], past_key_values=cache).logits
        ]
        logits.append(model(other[:, kept + 1 :], attention_mask=other_mask, past_key_values=cache).logits)
    logits = torch.cat(logits, dim=1)
    for row, expected in enumerate(uncached_logits(model, other, other_mask)):
        assert_close(logits[row, -logits.shape[1] :], expected[-logits.shape[1] :])


def test_reordered_repeated_and_selected_rows_keep_their_neighbors():
    model = make_retro()
    ids, mask = left_padded([2 * CHUNK + 1, 2 * CHUNK + 3, CHUNK + 1])
    more = torch.randint(1, VOCAB, (3, CHUNK))
    for order, change in [
        (torch.tensor([2, 0, 1]), lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1]))),
        (torch.tensor([0, 0, 1, 1, 2, 2]), lambda cache: cache.batch_repeat_interleave(2)),
        (torch.tensor([2, 1]), lambda cache: cache.batch_select_indices(torch.tensor([2, 1]))),
    ]:
        cache = model.cache_class(config=model.config)
        new = more[: len(order)] if len(order) <= 3 else more.repeat(2, 1)
        new_mask = torch.cat([mask[order], torch.ones_like(new)], dim=1)
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
            change(cache)
            logits = model(new, attention_mask=new_mask, past_key_values=cache).logits
        for row, expected in enumerate(uncached_logits(model, torch.cat([ids[order], new], dim=1), new_mask)):
            assert_close(logits[row], expected[-CHUNK:])


def slow_greedy(model, row_ids, num_tokens):
    for _ in range(num_tokens):
        logits = uncached_logits(model, row_ids[None], torch.ones_like(row_ids[None]))[0]
        row_ids = torch.cat([row_ids, logits[-1:].argmax(-1)])
    return row_ids


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation_of_a_batch_equals_slow_generation_of_each_row(use_cache):
    model = make_retro()
    ids, mask = left_padded([2 * CHUNK + 1, CHUNK, 1])
    new = 2 * CHUNK + 2
    output = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, use_cache=use_cache)
    for row in range(3):
        expected = slow_greedy(model, ids[row, mask[row].bool()], new)
        assert output[row, ids.shape[1] - mask[row].sum() :].tolist() == expected.tolist()


@pytest.mark.parametrize("use_cache", [True, False])
def test_each_chunk_is_retrieved_once_and_one_call_serves_a_step(use_cache):
    model = make_retro()
    ids, mask = left_padded([2 * CHUNK, 2 * CHUNK, CHUNK])
    model.generate(ids, attention_mask=mask, max_new_tokens=2 * CHUNK + 1, do_sample=False, use_cache=use_cache)
    # The prompt, and each time all three rows complete a chunk together; the last token's step is never computed.
    assert model.retriever.calls == 3
    assert len(model.retriever.chunks) == len(set(model.retriever.chunks))


def test_each_chunk_is_encoded_once(kind_of_model):
    if kind_of_model != "cross":
        pytest.skip("it counts neighbors, not chunks: see test_a_neighbor_that_comes_again_is_read_once")
    model = make_retro()
    encoded = []
    model.model.neighbor_encoder.register_forward_hook(lambda module, args, output: encoded.append(args[0].shape[:2]))
    ids, mask = left_padded([2 * CHUNK, CHUNK])
    model.generate(ids, attention_mask=mask, max_new_tokens=2 * CHUNK + 1, do_sample=False)
    # Of each row of the batch as many slots as a call completes chunks: a row with fewer chunks has masked slots.
    assert encoded == [(2, 2), (2, 1), (2, 1)]


def slow_beam_search(model, prompt, num_beams, num_tokens):
    beams = [(0.0, prompt)]
    for _ in range(num_tokens):
        candidates = []
        for score, ids in beams:
            log_probs = uncached_logits(model, ids[None], torch.ones_like(ids[None]))[0][-1].log_softmax(-1)
            candidates += [
                (score + log_probs[token].item(), torch.cat([ids, torch.tensor([token])])) for token in range(VOCAB)
            ]
        beams = sorted(candidates, key=lambda beam: -beam[0])[:num_beams]
    return beams


@pytest.mark.parametrize("use_cache", [True, False])
def test_beam_search_equals_a_slow_reference(use_cache):
    model = make_retro()
    ids, mask = left_padded([CHUNK + 2, CHUNK - 1])
    new = CHUNK + 3
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new,
        num_beams=3,
        num_return_sequences=3,
        do_sample=False,
        eos_token_id=None,
        use_cache=use_cache,
    )
    for row in range(2):
        expected = slow_beam_search(model, ids[row, mask[row].bool()], 3, new)
        for n, (_, beam) in enumerate(expected):
            assert output[3 * row + n, ids.shape[1] - mask[row].sum() :].tolist() == beam.tolist()


def test_sampling_with_several_sequences_follows_the_uncached_distribution():
    """The same random numbers and the same logits give the same samples."""
    model = make_retro()
    ids, mask = left_padded([CHUNK + 1, 2])
    samples = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        samples.append(
            model.generate(
                ids, attention_mask=mask, max_new_tokens=9, do_sample=True, num_return_sequences=2, use_cache=use_cache
            )
        )
    assert samples[0].shape == (4, CHUNK + 10) and torch.equal(samples[0], samples[1])


def closed_chunks(lengths, seed=4):
    """Rows whose padding, which is counted but hidden, makes them end with a chunk; and the rows alone."""
    total = max(-(-length // CHUNK) * CHUNK for length in lengths)
    ids, mask = left_padded([*lengths, total], seed)
    ids, mask = ids[:-1], mask[:-1]
    missing = torch.tensor([-length % CHUNK for length in lengths])[:, None]
    return ids, mask, ((mask.cumsum(-1) - 1 + missing) * mask), missing[:, 0].tolist()


def slow_closed_logits(model, row_ids, missing):
    """The reference for a row `(T,)` that lacks its first tokens, with neighbors looked up for the padded chunks."""
    padded = torch.cat([torch.zeros(missing, dtype=torch.long), row_ids])
    chunks = padded[: len(padded) // CHUNK * CHUNK].view(-1, CHUNK)
    found = HashRetriever().retrieve(chunks, model.config.num_neighbors)
    slow = slow_joint_logits if hasattr(model, "decoder") else slow_logits
    with torch.no_grad():
        return slow(model, row_ids, found.neighbor_input_ids, found.neighbor_attention_mask, first=missing)


def test_rows_that_lack_their_first_tokens_equal_the_slow_reference(kind_of_model):
    model = make_retro()
    tolerance = 1e-5 if kind_of_model == "cross" else 1e-7  # the reference computes angles in another precision
    ids, mask, positions, missing = closed_chunks([2, 2 * CHUNK - 1, CHUNK, CHUNK + 1])
    more = torch.randint(1, VOCAB, (4, CHUNK + 1))
    ids, mask = torch.cat([ids, more], dim=1), torch.cat([mask, torch.ones_like(more)], dim=1)
    later = positions[:, -1:] + torch.arange(1, CHUNK + 2)
    positions = torch.cat([positions, later], dim=1)
    expected = [slow_closed_logits(model, ids[n, mask[n].bool()], missing[n]) for n in range(4)]
    for step in (1, 3, 2 * CHUNK, ids.shape[1]):
        cache, logits = model.cache_class(config=model.config), []
        for start in range(0, ids.shape[1], step):
            end = min(start + step, ids.shape[1])
            with torch.no_grad():
                outputs = model(
                    ids[:, start:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, start:end],
                    past_key_values=cache,
                )
            logits.append(outputs.logits)
        logits = torch.cat(logits, dim=1)
        for row in range(4):
            assert_close(logits[row, mask[row].bool()], expected[row], tolerance)
    with torch.no_grad(), model.retrieval(False):  # without neighbors, the padding changes nothing
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        for row in range(4):
            alone = model(ids[row, mask[row].bool()][None]).logits[0]
            assert_close(logits[row, mask[row].bool()], alone, 1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_batch_of_closed_chunks_generates_like_each_row_alone(use_cache, num_beams):
    model = make_retro()
    lengths = [2, 2 * CHUNK - 1, CHUNK]
    ids, mask, positions, _ = closed_chunks(lengths)
    arguments = {"max_new_tokens": CHUNK + 2, "do_sample": False, "eos_token_id": None, "num_beams": num_beams}
    arguments |= {"use_cache": use_cache, "return_dict_in_generate": True}
    output = model.generate(ids, attention_mask=mask, position_ids=positions, **arguments)
    for row, length in enumerate(lengths):
        own = slice(-(-length // CHUNK) * -CHUNK, None)
        given = {"attention_mask": mask[row : row + 1, own], "position_ids": positions[row : row + 1, own]}
        alone = model.generate(ids[row : row + 1, own], **given, **arguments)
        new = output.sequences[row, ids.shape[1] :]
        assert torch.equal(new, alone.sequences[0, alone.sequences.shape[1] - len(new) :])
        chunks = alone.sequences[0, : -(CHUNK + 2)].view(-1, CHUNK)
        found = HashRetriever().retrieve(torch.cat([chunks, new[None, :CHUNK]]), 2)
        num_chunks = len(found.chunk_ids)
        assert torch.equal(alone.retrieved_chunk_ids[0], found.chunk_ids)
        assert torch.equal(output.retrieved_chunk_ids[row, :num_chunks], found.chunk_ids)


def test_a_first_chunk_without_its_padding_is_not_looked_up():
    model = make_retro()
    ids = torch.randint(1, VOCAB, (1, CHUNK + 2))
    with torch.no_grad():
        model(ids, position_ids=torch.arange(CHUNK - 2, 2 * CHUNK)[None])
    # The second chunk is whole.
    assert model.retriever.chunks == [tuple(ids[0, 2:].tolist())]


def test_continuing_from_a_returned_cache_equals_generating_in_one_go():
    model = make_retro()
    ids, mask = left_padded([2 * CHUNK + 1, CHUNK + 2])
    arguments = {"do_sample": False, "return_dict_in_generate": True, "eos_token_id": None}
    whole = model.generate(ids, attention_mask=mask, max_new_tokens=3 * CHUNK, **arguments)
    first = model.generate(ids, attention_mask=mask, max_new_tokens=CHUNK + 1, **arguments)
    longer_mask = torch.cat([mask, torch.ones(2, CHUNK + 1, dtype=torch.long)], dim=1)
    second = model.generate(
        first.sequences,
        attention_mask=longer_mask,
        past_key_values=first.past_key_values,
        max_new_tokens=2 * CHUNK - 1,
        **arguments,
    )
    assert torch.equal(second.sequences, whole.sequences)


@pytest.mark.parametrize("kind", ["prompt_lookup", "assistant"])
def test_assisted_decoding_equals_greedy_decoding(kind):
    model = make_retro()
    ids = torch.randint(1, VOCAB, (1, 3)).repeat(1, 4)
    greedy = model.generate(ids, max_new_tokens=4 * CHUNK, do_sample=False, eos_token_id=None)
    if kind == "assistant":
        # A slightly perturbed model proposes tokens that are often, but not always, right.
        assistant = make_retro()
        with torch.no_grad():
            for parameter in assistant.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
        arguments = {"assistant_model": assistant}
    else:
        arguments = {"prompt_lookup_num_tokens": 3}
    output = model.generate(ids, max_new_tokens=4 * CHUNK, do_sample=False, eos_token_id=None, **arguments)
    assert torch.equal(output, greedy)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_provenance_names_what_each_row_retrieved(num_beams):
    model = make_retro()
    ids, mask = left_padded([2 * CHUNK + 1, CHUNK])
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=CHUNK,
        do_sample=False,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    assert output.retrieved_chunk_ids.shape == (2 * num_beams, 3, 2)
    assert output.retrieved_document_ids.dtype == torch.int64 and output.retrieved_scores.dtype == torch.float32
    for row, sequence in enumerate(output.sequences):
        own = sequence[ids.shape[1] - mask[row // num_beams].sum() :]
        # The last token is chosen and never read, so a chunk that it completes is not looked up.
        chunks = [own[n * CHUNK : (n + 1) * CHUNK] for n in range((len(own) - 1) // CHUNK)]
        for n, chunk in enumerate(chunks):
            found = HashRetriever().retrieve(chunk[None], 2)
            assert output.retrieved_chunk_ids[row, n].tolist() == found.chunk_ids[0].tolist()
            assert output.retrieved_document_ids[row, n].tolist() == found.document_ids[0].tolist()
            assert output.retrieved_scores[row, n].tolist() == found.scores[0].tolist()
        assert (output.retrieved_chunk_ids[row, len(chunks) :] == -1).all()
        assert output.retrieved_scores[row, len(chunks) :].isnan().all()


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("has_retriever", [True, False])
def test_given_neighbors_belong_to_the_prompt(use_cache, has_retriever):
    model = make_retro()
    retriever = model.retriever if has_retriever else None
    model.set_retriever(retriever)
    ids, neighbors, mask = make_inputs(1, 2 * CHUNK + 1)
    new = 2 * CHUNK + 1
    output = model.generate(
        ids,
        neighbor_input_ids=neighbors,
        neighbor_attention_mask=mask,
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        use_cache=use_cache,
    )
    own = ids
    for _ in range(new):
        later = own[0, 2 * CHUNK : own.shape[1] // CHUNK * CHUNK].view(-1, CHUNK)
        all_neighbors, all_mask = neighbors, mask
        if has_retriever and len(later):
            found = HashRetriever().retrieve(later, 2)
            all_neighbors = torch.cat([neighbors, found.neighbor_input_ids[None]], dim=1)
            all_mask = torch.cat([mask, found.neighbor_attention_mask[None]], dim=1)
        with torch.no_grad(), model.retrieval(False):
            logits = model(own, neighbor_input_ids=all_neighbors, neighbor_attention_mask=all_mask).logits
        own = torch.cat([own, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(output, own)


def test_embeddings_as_prompt_generate_without_neighbors_for_the_prompt():
    """Their tokens are unknown, so nothing can be looked up with them."""
    model = make_retro()
    ids = torch.randint(1, VOCAB, (1, CHUNK + 1))
    embeds = model.get_input_embeddings()(ids)
    output = model.generate(inputs_embeds=embeds, max_new_tokens=2 * CHUNK, do_sample=False, eos_token_id=None)
    assert output.shape == (1, 2 * CHUNK)
    assert all(len(set(chunk) & {-1}) == 0 for chunk in model.retriever.chunks)
    # The second chunk begins in the prompt, the third is generated.
    assert model.retriever.chunks == [tuple(output[0, CHUNK - 1 : 2 * CHUNK - 1].tolist())]


def test_a_cache_without_room_for_retrieval_is_refused_only_when_retrieving():
    model = make_retro()
    ids = torch.randint(1, VOCAB, (1, CHUNK))
    with pytest.raises(ValueError, match=f"DynamicCache.*{model.cache_class.__name__}"):
        model.generate(ids, past_key_values=DynamicCache(config=model.config), max_new_tokens=2)
    with model.retrieval(False):
        model.generate(ids, past_key_values=DynamicCache(config=model.config), max_new_tokens=2)


def test_a_retriever_that_returns_a_wrong_shape_is_named():
    model = make_model()
    ids = torch.randint(1, VOCAB, (1, CHUNK))

    class Broken:
        def retrieve(self, chunk_input_ids, k):
            return Retrieved(torch.zeros(2, k, LENGTH), torch.zeros(2, k, LENGTH), None, None, None)

    model.set_retriever(Broken())
    with pytest.raises(ValueError, match=r"for 1 chunks, expected \(1, k"):
        model(ids)


def test_a_retriever_that_knows_no_provenance_will_do():
    model = make_model()

    class Bare:
        def retrieve(self, chunk_input_ids, k):
            found = HashRetriever().retrieve(chunk_input_ids, k)
            del found.chunk_ids, found.document_ids, found.scores
            return found

    model.set_retriever(Bare())
    ids = torch.randint(1, VOCAB, (1, CHUNK))
    output = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert "retrieved_chunk_ids" not in output


def test_from_pretrained_takes_the_retriever_itself(tmp_path):
    model = make_retro()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, retriever=model.retriever)
    assert loaded.retriever is model.retriever


class HostReads(TorchDispatchMode):
    """The functions of this package that make the CPU wait for values of the device."""

    def __init__(self):
        super().__init__()
        self.readers: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"):
            frames = [frame for frame in traceback.extract_stack()[:-1] if "/torch/" not in frame.filename]
            if "modeling_retro" in Path(frames[-1].filename).parts[:-1] and "tests" not in frames[-1].filename:
                self.readers.append(frames[-1].name)
        return func(*args, **(kwargs or {}))


def test_steps_that_complete_no_chunk_do_not_wait_for_the_device(kind_of_model, monkeypatch):
    model = make_retro()
    if kind_of_model != "cross":
        # On a CPU it looks whether a mask is needed.
        monkeypatch.setattr(type(model), "_needs_no_mask", lambda self, seen: False)
    lengths = [2 * CHUNK + 1, CHUNK + 1]  # both rows complete chunks at the same steps
    ids, mask = left_padded(lengths)

    def readers(num_new_tokens):
        with HostReads() as reads:
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=num_new_tokens,
                min_new_tokens=num_new_tokens,
                do_sample=False,
                eos_token_id=VOCAB - 1,
            )
        return reads.readers

    readers(2)  # the second model keeps neighbors that it has read
    # The tokens 1 to CHUNK - 1 that are generated do not complete a chunk once they are read.
    few, many = readers(2), readers(CHUNK - 1)
    assert few == many and few  # the prompt completes chunks, and its padding is read once
    assert len(readers(CHUNK + 1)) > len(many)
    # Rows with other padding complete their chunks at other steps, and none is missed.
    ids, mask = left_padded([2 * CHUNK + 1, CHUNK + 3, CHUNK - 2])
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=3 * CHUNK, do_sample=False, eos_token_id=None)
    found = set(model.retriever.chunks)
    for row, row_mask in zip(generated, mask):
        own = row[torch.count_nonzero(row_mask == 0) : -1]  # the last token is not read
        for chunk in own[: len(own) // CHUNK * CHUNK].view(-1, CHUNK).tolist():
            assert tuple(chunk) in found


@pytest.mark.parametrize("arguments", [{}, {"use_cache": False}])
@pytest.mark.parametrize("retrieval", [True, False])
@pytest.mark.parametrize("make", [make_cross_model, make_joint])
def test_a_prompt_that_is_padded_on_the_right_is_refused(make, retrieval, arguments):
    model = make()
    model.set_retriever(HashRetriever())
    ids, mask = torch.randint(3, VOCAB, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    arguments = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **arguments}
    with model.retrieval(retrieval), pytest.raises(ValueError, match="padded on the right"):
        model.generate(ids, attention_mask=mask, **arguments)
    with model.retrieval(retrieval), pytest.raises(ValueError, match="padded on the right"):
        model.generate(ids * mask, **arguments)  # transformers finds the padding by its token
    with model.retrieval(retrieval):
        left = model.generate(ids, attention_mask=mask.flip(1), **arguments)
        alone = model.generate(ids[1:, 3:], attention_mask=torch.ones(1, 4, dtype=torch.long), **arguments)
    assert left[1, 7:].tolist() == alone[0, 4:].tolist()


@pytest.mark.parametrize("make", [make_cross_model, make_joint])
def test_a_compiled_forward_pass_looks_up_by_itself(make):
    class Search(HashRetriever):
        is_traced = False

        def retrieve(self, chunks, k):
            # An error would not be seen: Dynamo runs what it cannot compile as it stands.
            self.is_traced = self.is_traced or torch.compiler.is_compiling()
            return super().retrieve(chunks, k)

    model = make()
    model.set_retriever(Search())
    ids = torch.randint(3, VOCAB, (2, 3 * CHUNK + 1))
    with torch.no_grad():
        expected = model(ids).logits
        torch._dynamo.reset()
        found = torch.compile(model, backend="eager")(ids).logits
    assert model.retriever.calls >= 2 and not model.retriever.is_traced
    assert_close(found, expected, 1e-6)
    with torch.no_grad(), model.retrieval(False):
        assert (model(ids).logits - expected).abs().max() > 1e-3
