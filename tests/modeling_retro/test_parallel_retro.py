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
"""Tensor parallelism and FSDP2 of transformers, on two processes, against one."""

import socket

import torch
import torch.distributed as dist
from test_generation_retro import HashRetriever, left_padded
from test_modeling_retro import CHUNK, assert_close, make_inputs, make_model
from torch.distributed.tensor import DTensor
from torch.multiprocessing import spawn
from transformers.distributed import DistributedConfig

from modeling_retro import RetroForCausalLM


def load(folder, **sizes):
    distributed_config = DistributedConfig(**sizes) if sizes else None
    return RetroForCausalLM.from_pretrained(folder, distributed_config=distributed_config).train()


def loss_of(model, rows=slice(None)):
    ids, neighbors, mask = make_inputs(2, 3 * CHUNK + 2)
    inputs = {"neighbor_input_ids": neighbors[rows], "neighbor_attention_mask": mask[rows]}
    return model(ids[rows], labels=ids[rows], use_cache=False, **inputs).loss


def gradients_of(model):
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}


def generated_by(model):
    ids, mask = left_padded([2 * CHUNK + 1, CHUNK])
    model.eval().set_retriever(HashRetriever())
    arguments = {"max_new_tokens": CHUNK + 1, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=mask, **arguments)


def compare_with_one_process(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2)
    reference = load(folder)
    loss_of(reference).backward()
    expected = gradients_of(reference)

    # Tensor parallelism: all ranks compute the same batch.
    model = load(folder, tp_size=2)
    replicated = {name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)}
    assert all(name.endswith(("norm.weight", ".gate")) for name in replicated), replicated
    loss = loss_of(model)
    loss.backward()
    assert_close(loss.detach(), loss_of(reference).detach(), 1e-6)
    for name, gradient in gradients_of(model).items():
        assert_close(gradient, expected[name], 1e-9)
    tokens = generated_by(reference)
    assert torch.equal(generated_by(model), tokens)

    # Fully sharded: each rank has its own row, gradients are averaged.
    model = load(folder, fsdp_size=2)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    loss_of(model, slice(rank, rank + 1)).backward()
    for name, gradient in gradients_of(model).items():
        assert_close(gradient, expected[name], 1e-9)
    assert torch.equal(generated_by(model), tokens)
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    """Losses, gradients and generation with retrieval, of a model with every kind of weight."""
    model = make_model(qk_norm=True, attention_bias=True, attention_output_bias=True, cross_attention_gate=True)
    model.save_pretrained(tmp_path)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    spawn(compare_with_one_process, (port, tmp_path), nprocs=2)
