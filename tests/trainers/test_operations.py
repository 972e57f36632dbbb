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
"""Operations are counted as a pen would count them."""

import torch
from tiny_models import SIZES, tiny_llama

from modeling_retro import RetroJointForCausalLM
from trainers.evaluation.operations import operations_per_token


VOCAB, CHUNK, WINDOW = 50, 8, 4


def multiplications(num_tokens, num_keys, num_predicted):
    """Operations of the matrices and of attention for tokens that each see some keys, and of the head."""
    width, inner, layers = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["num_hidden_layers"]
    body = layers * (4 * width**2 + 3 * width * inner)
    return 2 * (num_tokens * body + layers * num_tokens * num_keys * 2 * width + num_predicted * width * VOCAB)


def make_model(**fields):
    return RetroJointForCausalLM.from_decoder(tiny_llama(VOCAB), chunk_size=CHUNK, **fields)


def test_without_neighbors_each_token_passes_the_matrices_and_attends_to_the_window():
    operations = operations_per_token(make_model(), 1, WINDOW, modes=("off",))["off"]
    rotations = operations * CHUNK - multiplications(CHUNK, WINDOW * CHUNK, CHUNK)
    assert 0 <= rotations <= 2 * WINDOW * CHUNK * SIZES["hidden_size"]  # angles are a product of matrices


def test_neighbors_in_front_are_read_with_the_whole_window():
    model = make_model()
    operations = operations_per_token(model, 2, WINDOW, modes=("in_front",))["in_front"]
    row = WINDOW * CHUNK + 2 * model.config.neighbor_length
    assert abs(operations * CHUNK / multiplications(row, row, CHUNK) - 1) < 0.01


def test_with_neighbors_these_are_read_and_then_the_chunk_again():
    model, length = make_model(reread_tokens=0), 2 * CHUNK
    for number in (1, 2):
        operations = operations_per_token(model, number, WINDOW, modes=("on",))["on"]
        row = multiplications(CHUNK, WINDOW * CHUNK + number * length, CHUNK)
        neighbors = multiplications(number * length, length, 0)
        assert abs(operations * CHUNK / (row + neighbors) - 1) < 0.05
    without = operations * CHUNK
    model.config.reread_tokens = CHUNK
    again = operations_per_token(model, 2, WINDOW, modes=("on",))["on"] * CHUNK - without
    assert abs(again / multiplications(CHUNK, WINDOW * CHUNK + 2 * length, 1) - 1) < 0.05
    assert model.config._attn_implementation == "sdpa"
    assert torch.is_grad_enabled()
