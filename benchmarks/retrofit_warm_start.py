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
Retrofit with a warm start against a fresh one: training loss over the first steps, with the decoder frozen and the
same batches, and what neighbors change on held-out chunks afterwards.

    python benchmarks/retrofit_warm_start.py --base SmolLM2-135M --datastore datastore --steps 200 \
        --encoder_layers 18 --cross_attention_layers 18 20 22

The datastore is one chunked with the base's tokenizer, whose neighbors have been found, with a validation split.
"""

import argparse

import numpy as np
import torch
from tqdm.auto import tqdm

from data_prep.memory import keep_freed_memory
from modeling_retro import RetroDatastore, RetroForCausalLM
from trainers.evaluation.evaluate import evaluate_retro
from trainers.language_model.collator import ChunkRows, DataCollatorForRetro, EpochRowSampler


def train(model: RetroForCausalLM, batches: list[dict[str, torch.Tensor]], learning_rate: float) -> list[float]:
    """Loss of each step; the gates, which start closed, have a rate of 1e-2."""
    model.freeze_decoder()
    model.train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gates = [parameter for name, parameter in trained.items() if name.endswith("gate")]
    others = [parameter for name, parameter in trained.items() if not name.endswith("gate")]
    optimizer = torch.optim.AdamW(
        [{"params": others}, {"params": gates, "lr": 1e-2}], lr=learning_rate, weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    losses = []
    for batch in tqdm(batches):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--datastore", required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--row_chunks", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--encoder_layers", type=int, default=2)
    parser.add_argument("--cross_attention_layers", type=int, nargs="+", help="By default every third from the sixth.")
    parser.add_argument("--copy_share", type=float, default=0.0)
    parser.add_argument("--eval_documents", type=int, default=10)
    arguments = parser.parse_args()
    keep_freed_memory()
    datastore = RetroDatastore.from_pretrained(arguments.datastore)
    rows = ChunkRows(len(datastore.chunks), arguments.row_chunks)
    order = list(EpochRowSampler(len(rows), seed=0))[: arguments.steps * arguments.batch_size]
    collator = DataCollatorForRetro(
        datastore, row_chunks=arguments.row_chunks, num_neighbors=2, copy_share=arguments.copy_share
    )
    batches = [
        collator([rows[index] for index in order[start : start + arguments.batch_size]])
        for start in range(0, len(order), arguments.batch_size)
    ]
    losses, evaluations = {}, {}
    for name, warm_start in (("warm", True), ("fresh", False)):
        torch.manual_seed(0)
        model = RetroForCausalLM.from_decoder_pretrained(
            arguments.base,
            warm_start=warm_start,
            cross_attention_layers=arguments.cross_attention_layers,
            neighbor_encoder_num_hidden_layers=arguments.encoder_layers,
        )
        losses[name] = train(model, batches, arguments.learning_rate)
        with torch.autocast("cpu", torch.bfloat16):
            evaluations[name] = evaluate_retro(
                model,
                datastore,
                datastore.split("validation"),
                window_chunks=8,
                stride_chunks=4,
                batch_size=4,
                max_documents=arguments.eval_documents,
            )
    print("| steps | warm | fresh |\n|---|---|---|")
    for start in range(0, arguments.steps, 25):
        means = [np.mean(losses[name][start : start + 25]) for name in ("warm", "fresh")]
        print(f"| {start + 1} … {min(start + 25, arguments.steps)} | {means[0]:.4f} | {means[1]:.4f} |")
    for name, evaluation in evaluations.items():
        print(f"\n{name} start, held out:\n\n{evaluation.to_markdown()}")


if __name__ == "__main__":
    main()
