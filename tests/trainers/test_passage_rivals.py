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

import math

import pytest
import torch
from tiny_models import tiny_llama
from torch.utils.flop_counter import FlopCounterMode

from trainers.evaluation.passage_rivals import APE_SCALE, APE_TEMPERATURE, BLEND_SHARE, RIVALS, answer_by_rival


PASSAGES = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15, 6, 17, 18, 19, 20, 3, 4, 9, 10]]
QUESTION, PREFIX = [21, 22, 23], [24, 25]


@pytest.fixture(scope="module")
def decoder():
    return tiny_llama(32, initializer_range=0.6, num_hidden_layers=4, eos_token_id=None).double()


def assert_close(found, expected):
    # The decoder computes its rotary positions in float32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def rotate(states, positions, base):
    """Rotary positions by complex numbers; the two halves of a head are real and imaginary parts."""
    half = states.shape[-1] // 2
    angles = positions.double()[:, None] * base ** -(torch.arange(half).double() / half)
    turned = torch.complex(states[..., :half], states[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


class SlowLayers:
    """The layers of a decoder one by one: each state is computed from given keys and values by the formula."""

    def __init__(self, decoder):
        self.decoder, self.config = decoder, decoder.config

    def project(self, layer, hidden, positions):
        """Queries, keys and values `(heads, n, D)`."""
        attention, hidden = layer.self_attn, layer.input_layernorm(hidden)
        base = self.config.rope_parameters["rope_theta"]
        split = [
            linear(hidden).view(len(hidden), -1, self.config.head_dim).transpose(0, 1)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        return rotate(split[0], positions, base), rotate(split[1], positions, base), split[2]

    def finish(self, layer, hidden, output):
        hidden = hidden + layer.self_attn.o_proj(output.transpose(0, 1).flatten(1))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    def attend(self, queries, keys, values, seen, context=None):
        groups = len(queries) // len(keys)
        keys, values = (x.repeat_interleave(groups, 0) for x in (keys, values))
        scores = queries @ keys.transpose(1, 2) / math.sqrt(self.config.head_dim)
        weights = scores.exp() * seen
        if context is None:
            return weights / weights.sum(-1, keepdim=True) @ values
        # The sum of APE's exponentials over the passages, to the power of scale times temperature.
        own = (scores / APE_TEMPERATURE).exp() * context
        rest = weights * ~context
        total = own.sum(-1, keepdim=True) ** (APE_SCALE * APE_TEMPERATURE)
        own = own / own.sum(-1, keepdim=True) * total
        return (own + rest) / (total + rest.sum(-1, keepdim=True)) @ values


def apart_mask(blocks, length):
    block = torch.tensor(
        [n for n, tokens in enumerate(blocks) for _ in tokens] + [-1] * (length - sum(map(len, blocks)))
    )
    seen = (block == block[:, None]) | (block == 0) | (block[:, None] == -1)
    return seen & torch.ones(length, length, dtype=torch.bool).tril()


@torch.no_grad()
def slow_logits(decoder, tokens, positions, seen, is_ape_query=None, context=None):
    """Logits of the last token of one sequence whose tokens see each other by a mask `(n, n)`."""
    layers = SlowLayers(decoder)
    hidden = decoder.model.embed_tokens(torch.tensor(tokens))
    for layer in decoder.model.layers:
        projected = layers.project(layer, hidden, positions)
        output = layers.attend(*projected, seen)
        if context is not None:
            output = torch.where(is_ape_query[:, None], layers.attend(*projected, seen, context), output)
        hidden = layers.finish(layer, hidden, output)
    return decoder.lm_head(decoder.model.norm(hidden))[-1]


def joined(*parts):
    return [token for part in parts for token in part]


def test_in_front_is_the_decoder_with_one_text(decoder):
    found = answer_by_rival(decoder, PASSAGES, QUESTION, "in_front", 4)
    tokens = torch.tensor([joined(*PASSAGES, QUESTION)])
    torch.testing.assert_close(found.logits, decoder(tokens).logits[0, -1])
    expected = decoder.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, tokens.shape[1] :]
    assert found.tokens == expected.tolist()
    assert (found.stored_operations, found.stored_bytes) == (0, 0)


def test_parallel_windows_stand_at_the_same_positions(decoder):
    tokens = joined(*PASSAGES, QUESTION)
    positions = [n for passage in PASSAGES for n in range(len(passage))] + [10, 11, 12]
    seen = apart_mask([[], *PASSAGES], len(tokens))
    expected = slow_logits(decoder, tokens, torch.tensor(positions), seen)
    assert_close(answer_by_rival(decoder, PASSAGES, QUESTION, "pcw", 1).logits, expected)


def test_ape_weighs_the_passages_by_its_temperature_and_scale(decoder):
    tokens = joined(PREFIX, *PASSAGES, QUESTION)
    positions = [0, 1] + [2 + n for passage in PASSAGES for n in range(len(passage))] + [12, 13, 14]
    seen = apart_mask([PREFIX, *PASSAGES], len(tokens))
    is_query = torch.arange(len(tokens)) >= len(tokens) - 3
    context = (torch.arange(len(tokens)) >= 2) & ~is_query
    expected = slow_logits(decoder, tokens, torch.tensor(positions), seen, is_query, context)
    found = answer_by_rival(decoder, PASSAGES, QUESTION, "ape", 1, prefix=PREFIX).logits
    assert_close(found, expected)
    assert (found - slow_logits(decoder, tokens, torch.tensor(positions), seen)).abs().max() > 1e-3


@pytest.mark.parametrize("number", [16, 32])
def test_legolink_reads_the_first_tokens_of_each_passage_again(decoder, number):
    generator = torch.Generator().manual_seed(number)
    passages = torch.randint(3, 32, (3, number + 5), generator=generator).tolist()
    front = joined(*passages)
    again = [c for c in range(number + 5, len(front)) if c % (number + 5) < number]
    tokens = front + [front[c] for c in again] + QUESTION
    column = torch.tensor([*range(len(front)), *again, *range(len(front), len(front) + 3)])
    n = len(front)
    seen = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    seen[:n, :n] = apart_mask([[], *passages], n)
    is_last = torch.ones(len(tokens), dtype=torch.bool)
    is_last[again] = False  # the states that stay
    seen[n:] = (column <= column[n:, None]) & is_last
    expected = slow_logits(decoder, tokens, column, seen)
    found = answer_by_rival(decoder, passages, QUESTION, f"legolink_{number}", 1).logits
    assert_close(found, expected)


@torch.no_grad()
def test_cacheblend_reads_the_tokens_again_whose_keys_change_most(decoder):
    generator = torch.Generator().manual_seed(0)
    passages = torch.randint(3, 32, (3, 9), generator=generator).tolist()
    front, layers, slow = joined(*passages), decoder.model.layers, SlowLayers(decoder)
    n, positions = len(front), torch.arange(len(front) + 3)
    whole = torch.ones(n, n, dtype=torch.bool).tril()
    cached, hidden = [], decoder.model.embed_tokens(torch.tensor(front))
    for layer in layers:
        projected = slow.project(layer, hidden, positions[:n])
        cached.append(list(projected[1:]))
        hidden = slow.finish(layer, hidden, slow.attend(*projected, apart_mask([[], *passages], n)))
    hidden = decoder.model.embed_tokens(torch.tensor(front))
    for number, layer in enumerate(layers[:2]):
        projected = slow.project(layer, hidden, positions[:n])
        change = (projected[1] - cached[number][0]).square().sum((0, 2))
        cached[number] = list(projected[1:])
        hidden = slow.finish(layer, hidden, slow.attend(*projected, whole))
    chosen = sorted(change.argsort(descending=True)[: round(BLEND_SHARE * n)].tolist())
    assert len(chosen) == 4
    hidden = hidden[chosen]
    for number, layer in enumerate(layers[2:], start=2):
        queries, keys, values = slow.project(layer, hidden, positions[chosen])
        cached[number][0][:, chosen], cached[number][1][:, chosen] = keys, values
        hidden = slow.finish(layer, hidden, slow.attend(queries, *cached[number], whole[chosen]))
    hidden = decoder.model.embed_tokens(torch.tensor(QUESTION))
    for number, layer in enumerate(layers):
        queries, *states = slow.project(layer, hidden, positions[n:])
        keys, values = (torch.cat(pair, 1) for pair in zip(cached[number], states, strict=True))
        seen = torch.arange(n + 3) <= torch.arange(n, n + 3)[:, None]
        hidden = slow.finish(layer, hidden, slow.attend(queries, keys, values, seen))
    expected = decoder.lm_head(decoder.model.norm(hidden))[-1]
    assert_close(answer_by_rival(decoder, passages, QUESTION, "cacheblend_15", 1).logits, expected)


def test_operations_and_bytes_are_those_of_what_is_stored_and_of_the_rest(decoder):
    config = decoder.config
    size = sum(map(len, PASSAGES)) * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 8
    found = {rival: answer_by_rival(decoder, PASSAGES, QUESTION, rival, 1) for rival in RIVALS}
    for rival, answer in found.items():
        assert answer.stored_bytes == (0 if rival == "in_front" else size)
    decoder.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder(torch.tensor([joined(*PASSAGES, QUESTION)]), logits_to_keep=1)
    # The rest of a square of scores that the eager attention computes is left out where passages are read first.
    assert 0.9 * counter.get_total_flops() < found["in_front"].operations <= counter.get_total_flops()
    decoder.set_attn_implementation("sdpa")
    assert found["pcw"].operations < found["legolink_16"].operations < found["in_front"].operations
    assert found["pcw"].operations < found["cacheblend_15"].operations < found["in_front"].operations
    total = found["pcw"].operations + found["pcw"].stored_operations
    assert total == pytest.approx(found["in_front"].operations, rel=0.01)


def test_what_cannot_be_answered_is_refused(decoder):
    with pytest.raises(ValueError, match="'rag', expected one of in_front"):
        answer_by_rival(decoder, PASSAGES, QUESTION, "rag", 1)
    with pytest.raises(ValueError, match="none of them empty"):
        answer_by_rival(decoder, [[1], []], QUESTION, "pcw", 1)
