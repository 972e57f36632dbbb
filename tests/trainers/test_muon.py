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
"""Muon and AdamW as one optimizer."""

import copy
import io

import torch
from torch import nn

from modeling_retro import RetroConfig, RetroForCausalLM
from trainers.language_model.muon import MuonWithAdamW


def tiny_model():
    torch.manual_seed(0)
    config = RetroConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        chunk_size=4,
        cross_attention_layers=[1],
        neighbor_encoder_num_hidden_layers=1,
    )
    return RetroForCausalLM(config)


def decay_names(model):
    return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]


def make_optimizer(model):
    return MuonWithAdamW(model, lr=0.01, weight_decay=0.1, decay_names=decay_names(model), betas=(0.9, 0.95), eps=1e-8)


def train(model, optimizers, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        input_ids = torch.randint(20, (2, 16), generator=generator)
        neighbors = torch.randint(20, (2, 4, 2, 8), generator=generator)
        model(input_ids=input_ids, labels=input_ids, neighbor_input_ids=neighbors).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_matrices_of_layers_follow_muon_and_the_rest_adamw():
    model = tiny_model()
    reference = copy.deepcopy(model)
    matrices = [
        module.weight
        for name, module in reference.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    others = [parameter for parameter in reference.parameters() if all(parameter is not matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [
            {"params": [parameter for parameter in others if parameter.ndim > 1], "weight_decay": 0.1},
            {"params": [parameter for parameter in others if parameter.ndim == 1], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=(0.9, 0.95),
    )
    train(model, [make_optimizer(model)], steps=3)
    train(reference, [muon, adamw], steps=3)
    for parameter, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_optimizer_restored_from_a_checkpoint_goes_on_to_the_same_weights():
    model = tiny_model()
    optimizer = make_optimizer(model)
    train(model, [optimizer], steps=2)
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    restored_model = copy.deepcopy(model)
    restored = make_optimizer(restored_model)
    restored.load_state_dict(torch.load(saved, weights_only=True))
    for trained, with_optimizer in ((model, optimizer), (restored_model, restored)):
        with_optimizer.param_groups[0]["lr"] = 0.005
        train(trained, [with_optimizer], steps=3, seed=1)
    for parameter, expected in zip(restored_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_frozen_parameters_stay():
    model = tiny_model()
    model.model.embed_tokens.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    train(model, [make_optimizer(model)], steps=1)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(before) - {"model.embed_tokens.weight"}
