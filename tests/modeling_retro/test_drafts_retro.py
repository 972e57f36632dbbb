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
"""Drafts change no token: what a model writes with them is what it writes without."""

import random

import numpy as np
import pytest
import torch
from test_generation_retro import HashRetriever
from test_modeling_retro import CHUNK, VOCAB, make_model
from test_questions_retro import passage_inputs
from tiny_joint import make_joint
from tiny_models import letter_tokenizer
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, TextStreamer

from modeling_retro import drafts_retro
from modeling_retro.drafts_retro import DraftLength, find_draft, join_texts


MAKERS = {"cross": make_model, "joint": make_joint, "joint-reread": lambda: make_joint(reread_tokens=CHUNK)}


@pytest.fixture(params=MAKERS)
def model(request):
    model = MAKERS[request.param]()
    model.set_retriever(HashRetriever())
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


@pytest.fixture
def guesses(monkeypatch):
    """Drafts that often say what comes next in `guesses.text`, and are often wrong. Records those that were made."""

    class Guesses:
        text, made, generator = [], [], random.Random(0)

        def __call__(self, texts, row, length):
            rest = self.text[len(row) : len(row) + self.generator.randint(0, length)]
            draft = [token if self.generator.random() < 0.8 else (token + 1) % VOCAB for token in rest]
            self.made.append((len(row), draft))
            return draft

    guesses = Guesses()
    guesses.made = []
    monkeypatch.setattr(drafts_retro, "find_draft", guesses)
    return guesses


def make_prompt(length, seed=3):
    return torch.randint(1, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def both(model, guesses, prompt, **arguments):
    """The outputs without drafts and with them."""
    arguments = {"return_dict_in_generate": True, "max_new_tokens": 3 * CHUNK + 2, **arguments}
    streamer = arguments.pop("streamer", None)
    plain = model.generate(prompt, draft_tokens=0, **arguments)
    guesses.text = plain.sequences[0].tolist()
    return plain, model.generate(prompt, draft_tokens=CHUNK + 1, streamer=streamer, **arguments)


def slow_draft(texts, row, length):
    """Tries every place of every text, from the longest run on."""
    for run in range(8, 1, -1):
        if run > len(row):
            continue
        for text in [row, *reversed(texts)]:
            for end in range(len(text) - 1, run - 1, -1):
                if list(text[end - run : end]) == list(row[-run:]):
                    return list(text[end : end + length])
    return []


def test_a_draft_is_what_followed_the_longest_run():
    generator, found = random.Random(0), 0
    for _ in range(500):
        texts = [generator.choices(range(4), k=generator.randint(0, 9)) for _ in range(generator.randint(0, 3))]
        row = generator.choices(range(4), k=generator.randint(1, 12))
        length = generator.randint(1, 6)
        draft = find_draft(join_texts(texts), np.array(row), length)
        assert draft == slow_draft(texts, row, length)
        found += draft != []
    assert 100 < found < 500


def test_the_length_grows_with_what_is_confirmed():
    length = DraftLength(12)
    learned = ((4, 4, 8), (8, 8, 12), (12, 12, 12), (12, 7, 7), (7, 7, 12), (12, 0, 4))
    for num_drafted, num_confirmed, expected in learned:
        length.update(num_drafted, num_confirmed)
        assert length.current == expected
    length = DraftLength(2)
    for num_confirmed in (2, 1, 0):
        length.update(2, num_confirmed)
        assert length.current == 2


@pytest.mark.parametrize("length", range(1, 2 * CHUNK + 2))
def test_greedy_texts_are_equal_around_the_ends_of_chunks(model, guesses, length):
    plain, drafted = both(model, guesses, make_prompt(length), do_sample=False)
    assert torch.equal(drafted.sequences, plain.sequences)
    assert torch.equal(drafted.retrieved_chunk_ids, plain.retrieved_chunk_ids)
    assert drafted.num_steps < 3 * CHUNK + 2
    # Neither the last token of a chunk nor one behind it is ever drafted, and no other chunk is looked up.
    assert all(start % CHUNK + len(draft) < CHUNK for start, draft in guesses.made)
    whole = drafted.sequences[0, :-1].split(CHUNK)
    assert set(model.retriever.chunks) == {tuple(chunk.tolist()) for chunk in whole if len(chunk) == CHUNK}


def test_a_seed_draws_the_same_text(model, guesses):
    options = {"do_sample": True, "temperature": 0.7, "top_k": 9, "repetition_penalty": 1.2, "min_new_tokens": 3}
    texts = set()
    for seed in range(25):
        torch.manual_seed(seed)
        plain = model.generate(make_prompt(CHUNK - 1), draft_tokens=0, max_new_tokens=2 * CHUNK, **options)
        state = torch.get_rng_state()
        guesses.text = plain[0].tolist()
        torch.manual_seed(seed)
        drafted = model.generate(make_prompt(CHUNK - 1), draft_tokens=8, max_new_tokens=2 * CHUNK, **options)
        assert torch.equal(drafted, plain)
        assert torch.equal(torch.get_rng_state(), state)
        texts.add(tuple(plain[0].tolist()))
    assert len(texts) > 15


@pytest.mark.parametrize("passages", ["apart", "in_order"])
@pytest.mark.parametrize("reread_tokens", [0, CHUNK])
def test_answers_to_questions_are_equal(guesses, passages, reread_tokens):
    model = make_joint(reread_tokens=reread_tokens)
    model.set_retriever(HashRetriever())
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    for length in (2, CHUNK, CHUNK + 3):
        plain, drafted = both(model, guesses, make_prompt(length), do_sample=False, **passage_inputs(1, passages))
        assert torch.equal(drafted.sequences, plain.sequences) and drafted.num_steps < 3 * CHUNK + 2


def test_drafts_come_from_passages_neighbors_and_the_row(monkeypatch):
    model = make_joint()
    model.set_retriever(HashRetriever())
    seen = []
    monkeypatch.setattr(drafts_retro, "find_draft", lambda texts, row, length: seen.append((texts, len(row))) or [])
    inputs = passage_inputs(1)
    output = model.generate(make_prompt(2), max_new_tokens=4 * CHUNK, do_sample=False, eos_token_id=None, **inputs)
    passages = [
        ids[mask].tolist() for ids, mask in zip(inputs["passage_input_ids"][0], inputs["passage_attention_mask"][0])
    ]
    for texts, length in seen:
        chunks = output[0, : length // CHUNK * CHUNK].view(-1, CHUNK)
        neighbors = []
        if len(chunks) > 0:
            found = HashRetriever().retrieve(chunks, 2)
            ids, masks = found.neighbor_input_ids.flatten(0, 1), found.neighbor_attention_mask.flatten(0, 1)
            neighbors = [row[mask].tolist() for row, mask in zip(ids, masks) if mask.any()]
        assert texts.tolist() == join_texts([*neighbors, *passages]).tolist()
    assert len(seen) > CHUNK


@pytest.mark.parametrize("padding", [1, CHUNK, CHUNK + 2])
def test_texts_behind_padding_are_equal(model, guesses, padding):
    prompt = make_prompt(padding + CHUNK + 1)
    mask = (torch.arange(prompt.shape[1]) >= padding).long()[None]
    plain, drafted = both(model, guesses, prompt, attention_mask=mask, do_sample=False)
    assert torch.equal(drafted.sequences, plain.sequences) and drafted.num_steps < 3 * CHUNK + 2
    positions = (mask.cumsum(-1) - 1).clamp(min=0) + 3  # as in a prompt that was padded to whole chunks
    plain, drafted = both(model, guesses, prompt, attention_mask=mask, position_ids=positions, do_sample=False)
    assert torch.equal(drafted.sequences, plain.sequences) and drafted.num_steps < 3 * CHUNK + 2


def test_a_text_ends_where_it_ends_without_drafts(model, guesses):
    prompt = make_prompt(3)
    whole = model.generate(prompt, draft_tokens=0, do_sample=False, max_new_tokens=3 * CHUNK)[0].tolist()
    for new in range(1, 2 * CHUNK):
        plain, drafted = both(model, guesses, prompt, do_sample=False, max_new_tokens=new)
        assert torch.equal(drafted.sequences, plain.sequences)
        plain, drafted = both(model, guesses, prompt, do_sample=False, eos_token_id=whole[2 + new])
        assert torch.equal(drafted.sequences, plain.sequences)


@pytest.fixture(scope="module")
def letters():
    return letter_tokenizer(VOCAB)


def test_stop_strings_end_a_text_at_the_same_token(model, guesses, letters):
    prompt = make_prompt(3)
    whole = letters.decode(model.generate(prompt, draft_tokens=0, do_sample=False, max_new_tokens=3 * CHUNK)[0])
    for start in range(3, len(whole) - 1):
        plain, drafted = both(
            model, guesses, prompt, do_sample=False, stop_strings=[whole[start : start + 2]], tokenizer=letters
        )
        assert torch.equal(drafted.sequences, plain.sequences)


def test_a_streamer_gets_the_same_text(model, guesses, letters):
    class Collector(TextStreamer):
        text = ""

        def on_finalized_text(self, text, stream_end=False):
            self.text += text

    streamer = Collector(letters, skip_prompt=True)
    plain, _ = both(model, guesses, make_prompt(3), do_sample=False, streamer=streamer)
    assert streamer.text == letters.decode(plain.sequences[0, 3:])


def test_the_cache_can_be_continued(model, guesses):
    plain, drafted = both(model, guesses, make_prompt(3), do_sample=False)
    more = {"do_sample": False, "max_new_tokens": 2 * CHUNK}
    expected = model.generate(plain.sequences, past_key_values=plain.past_key_values, **more)
    assert torch.equal(model.generate(drafted.sequences, past_key_values=drafted.past_key_values, **more), expected)


def test_scores_are_those_without_drafts(model, guesses):
    plain, drafted = both(model, guesses, make_prompt(3), do_sample=False, output_scores=True, output_logits=True)
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.cat(drafted[name]), torch.cat(plain[name]), rtol=0, atol=1e-5)


class AnyProcessor(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


class AnyCriterion(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"inputs": make_prompt(3).expand(2, -1)}, "several rows"),
        ({"num_beams": 2}, "this is beam search"),
        ({"prompt_lookup_num_tokens": 3}, "this is assisted generation"),
        ({"use_cache": False}, "no cache"),
        ({"logits_processor": LogitsProcessorList([AnyProcessor()])}, "logits processor"),
        ({"prefix_allowed_tokens_fn": lambda row, ids: list(range(VOCAB))}, "logits processor"),
        ({"stopping_criteria": StoppingCriteriaList([AnyCriterion()])}, "stopping criterion"),
        ({"do_sample": True, "output_scores": True, "return_dict_in_generate": True}, "scores of sampled tokens"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "attentions"),
    ],
)
def test_drafts_that_cannot_be_had_are_refused_by_name_and_left_out_by_default(model, guesses, arguments, reason):
    arguments = {"inputs": make_prompt(3), "do_sample": False, "max_new_tokens": CHUNK, **arguments}
    if "output_attentions" in arguments:
        model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=reason):
        model.generate(**arguments, draft_tokens=4)
    model.generate(**arguments)
    assert guesses.made == []


def test_drafts_are_the_default_with_neighbors_in_single_precision(model, guesses):
    arguments = {"do_sample": False, "max_new_tokens": CHUNK}
    model.generate(make_prompt(3), **arguments)
    assert guesses.made.pop() and not guesses.made.clear()
    with model.retrieval(False):
        model.generate(make_prompt(3), **arguments)
    model.to(torch.bfloat16).generate(make_prompt(3), **arguments)
    assert guesses.made == []
    model.generate(make_prompt(3), draft_tokens=4, **arguments)
    assert guesses.made != []
    with pytest.raises(ValueError, match="`draft_tokens` is -1"):
        model.generate(make_prompt(3), draft_tokens=-1, **arguments)
