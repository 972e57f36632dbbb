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
"""
One training step (forward, backward, AdamW) against RETRO-pytorch at the same dimensions, and ON against OFF.

    python benchmarks/training_step.py --dtype float32 --repeats 5
    python benchmarks/training_step.py --dtype bfloat16 --attn_implementation eager

On CPUs, PyTorch's SDPA has a slow backward pass in bf16; eager attention is the faster one there.
"""

import argparse

import torch
from retro_pytorch_peer import (
    BATCH_SIZE,
    NEIGHBOR_LENGTH,
    NUM_NEIGHBORS,
    SEQ_LEN,
    VOCAB_SIZE,
    count_parameters,
    forward_flops,
    load_peer,
    make_model,
    matmul_peak,
    median_seconds,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16 is autocast.")
    parser.add_argument("--attn_implementation", default="sdpa", help="Attention of this package's model.")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    peer, _ = load_peer()
    ours, ours_off = make_model(), make_model()
    for model in (ours, ours_off):
        model.set_attn_implementation(arguments.attn_implementation)
    slots = SEQ_LEN // ours.config.chunk_size
    ids = torch.randint(1, VOCAB_SIZE, (BATCH_SIZE, SEQ_LEN + 1))
    neighbors = torch.randint(1, VOCAB_SIZE, (BATCH_SIZE, slots, NUM_NEIGHBORS, NEIGHBOR_LENGTH))

    def stepper(model, loss_function):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        model.train()

        def step():
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = loss_function(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    inputs = {"input_ids": ids[:, :-1], "labels": ids[:, :-1], "use_cache": False}
    seconds = median_seconds(
        {
            "peer": stepper(peer, lambda model: model(ids, retrieved=neighbors, return_loss=True)),
            "on": stepper(ours, lambda model: model(**inputs, neighbor_input_ids=neighbors).loss),
            "off": stepper(ours_off, lambda model: model(**inputs).loss),
        },
        arguments.repeats,
    )
    # A backward pass costs two forward passes; AdamW's few operations a weight are left out.
    flops = {
        name: 3 * forward_flops(ours, BATCH_SIZE, SEQ_LEN, neighbors=neighbors_on)
        for name, neighbors_on in (("on", True), ("off", False))
    }
    peak = matmul_peak(dtype)
    print(
        f"{torch.get_num_threads()} threads, {arguments.dtype}, {arguments.attn_implementation}, "
        f"batch {BATCH_SIZE} x {SEQ_LEN} tokens"
    )
    print(f"RETRO-pytorch  {seconds['peer']:7.3f} s a step   {count_parameters(peer):.1f} M parameters")
    print(f"this package   {seconds['on']:7.3f} s a step   {count_parameters(ours):.1f} M parameters")
    print(f"ratio          {seconds['peer'] / seconds['on']:7.2f} x")
    share = flops["on"] / seconds["on"] / peak
    print(f"share of the matmul peak ({peak / 1e9:.0f} GFLOP/s): ON {share:.0%}", end="")
    print(f", OFF {flops['off'] / seconds['off'] / peak:.0%}")
    print(f"ON / OFF       {seconds['on'] / seconds['off']:7.2f} x, by operations {flops['on'] / flops['off']:.2f} x")


if __name__ == "__main__":
    main()
