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
"""The parts of `gpu.py` that measure speed: training, generation and embedding"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_common import (
    SIZES,
    WithoutNeighbors,
    device,
    device_name,
    joint_model,
    num_parameters,
    open_datastore,
    retro_model,
    synchronize,
)
from joint_scaling import RandomRetriever
from sentence_transformers import SentenceTransformer
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.encoder.chunk_encoder import ChunkEncoder, decode_chunks
from trainers.language_model.collator import ChunkRows, DataCollatorForRetro, collator_options
from trainers.language_model.config import RetroTrainingArguments
from trainers.language_model.trainer import RetroTrainer


MODELS = {"joint attention": joint_model, "cross attention": retro_model}
# Dense bfloat16 operations a second that the vendor states.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def matmul_peak(size: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations a second of the best of ten products of square matrices."""
    left, right = (torch.randn(size, size, device=device()).to(dtype) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: left @ right, 1) for _ in range(10))


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a function, with the work that it leaves to the GPU, after one call that does not count."""
    function()
    taken = []
    for _ in range(repeats):
        synchronize()
        start_time = time.perf_counter()
        function()
        synchronize()
        taken.append(time.perf_counter() - start_time)
    return statistics.median(taken)


def training_operations(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> int:
    """Operations of the forward and the backward pass of a batch, two for a multiplication with an addition."""
    # With eager attention all of them are products of matrices, which the counter knows on every device.
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    model.train()
    with (
        FlopCounterMode(display=False) as counter,
        torch.autocast(model.device.type, torch.bfloat16),
    ):
        model(**{name: value.to(model.device) for name, value in batch.items()}).loss.backward()
    model.zero_grad()
    model.set_attn_implementation(implementation)
    return counter.get_total_flops()


def train(model: PreTrainedModel, datastore: RetroDatastore, arguments: Any, is_on: bool) -> dict[str, float]:
    """Trains for a few steps; tokens a second and waiting for data, of the second half of them."""
    size = SIZES[arguments.size]
    options = RetroTrainingArguments(
        output_dir=str(Path(arguments.output_dir) / "training"),
        max_steps=size.steps,
        logging_steps=size.steps // 2,
        save_strategy="no",
        report_to="none",
        bf16=True,
        row_chunks=size.row_chunks,
        num_neighbors=[1],
        neighbor_dropout=0.0,
        per_device_train_batch_size=size.batch_size,
        dataloader_num_workers=4 if torch.cuda.is_available() else 0,
        disable_tqdm=arguments.size == "toy",
    )
    collator = (DataCollatorForRetro if is_on else WithoutNeighbors)(datastore, **collator_options(options))
    trainer = RetroTrainer(model, options, datastore, data_collator=collator)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "tokens_per_second" in entry]
    row = collator([ChunkRows(len(datastore.chunks), size.row_chunks)[0]])
    operations = training_operations(model, row) / row["input_ids"].numel()
    return {name: logged[-1][name] for name in ("tokens_per_second", "data_wait_share")} | {"operations": operations}


def measure_training(arguments: Any) -> dict[str, Any]:
    """
    Trains all weights of both kinds of models with neighbors (ON) and without (OFF). The share of the peak is that of
    the operations that were counted; masked attention scores count as well.
    """
    size, datastore = SIZES[arguments.size], open_datastore(arguments)
    known = [peak for name, peak in PEAKS.items() if name in device_name()]
    peak = known[0] if known else matmul_peak(8192 if torch.cuda.is_available() else 256)
    rows = [{"model": f"peak: {peak / 1e12:.3g} TFLOP/s {'stated' if known else 'measured'}"}]
    for name, make in MODELS.items():
        measured = {}
        for mode in ("OFF", "ON"):
            model = make(datastore, size.decoder)
            measured[mode] = found = train(model, datastore, arguments, mode == "ON")
            rows.append(
                {
                    "model": f"{name}, {num_parameters(model)}",
                    "mode": mode,
                    "tokens/s": f"{found['tokens_per_second']:.0f}",
                    "GFLOP a token": f"{found['operations'] / 1e9:.3g}",
                    "share of the peak (goal 45 %)": f"{found['tokens_per_second'] * found['operations'] / peak:.1%}",
                    "waits for data (goal < 2 %)": f"{found['data_wait_share']:.1%}",
                }
            )
            del model
            torch.cuda.empty_cache()
        on, off = measured["ON"], measured["OFF"]
        by_time = off["tokens_per_second"] / on["tokens_per_second"]
        by_operations = on["operations"] / off["operations"]
        ratios = {"mode": "ON / OFF", "time": f"{by_time:.2f}", "operations": f"{by_operations:.2f}"}
        rows.append({"model": name} | ratios | {"time / operations (goal ≤ 1.2)": f"{by_time / by_operations:.2f}"})
    return {"rows": rows, "done": True}


@torch.inference_mode()
def measure_generation(arguments: Any) -> dict[str, Any]:
    """Greedy generation behind a prompt of one chunk, with new random neighbors at every chunk."""
    size, datastore = SIZES[arguments.size], open_datastore(arguments)
    rows, base = [], {}
    for name, make in MODELS.items():
        model = make(datastore, size.decoder).to(device(), torch.bfloat16).eval()
        config = model.config
        model.set_retriever(RandomRetriever(config.vocab_size, config.neighbor_length))
        for batch_size in size.batch_sizes:
            prompt = torch.randint(config.vocab_size, (batch_size, config.chunk_size), device=device())
            options = {
                "attention_mask": torch.ones_like(prompt),
                "max_new_tokens": size.new_tokens,
                "min_new_tokens": size.new_tokens,
                "do_sample": False,
            }

            def generate(is_on: bool, model=model, prompt=prompt, options=options) -> None:
                with model.retrieval(is_on):
                    model.generate(prompt, **options)

            if name == "joint attention":
                base[batch_size] = seconds(lambda: model.decoder.generate(prompt, **options), size.repeats)  # noqa: B023
                rows.append(generation_row("base, plain transformers", batch_size, base[batch_size], base, size))
            for mode, is_on in (("OFF", False), ("ON", True)):
                taken = seconds(lambda: generate(is_on), size.repeats)  # noqa: B023
                rows.append(generation_row(f"{name}, {mode}", batch_size, taken, base, size))
    rows.sort(key=lambda row: row["batch"])
    return {"rows": rows, "done": True}


def generation_row(name: str, batch_size: int, taken: float, base: dict[int, float], size: Any) -> dict[str, Any]:
    return {
        "batch": batch_size,
        "model": name,
        "tokens/s": f"{batch_size * size.new_tokens / taken:.1f}",
        "time / base": f"{taken / base[batch_size]:.2f}",
    }


def measure_embedding(arguments: Any) -> dict[str, Any]:
    """Embeds chunks with the encoder of the datastore in bfloat16."""
    size, datastore = SIZES[arguments.size], open_datastore(arguments)
    chosen = np.random.default_rng(0).integers(len(datastore.chunks), size=size.num_texts)
    texts = decode_chunks(*datastore.chunks.take(chosen), datastore.tokenizer)
    encoder, _ = datastore.encoder_source()
    peer = SentenceTransformer(encoder, device=device(), model_kwargs={"dtype": "bfloat16"})
    ours = ChunkEncoder.from_pretrained(encoder, device=device(), dtype="bfloat16")
    programs = {
        "sentence-transformers": lambda: peer.encode(texts, batch_size=512, show_progress_bar=False),
        "ChunkEncoder": lambda: ours.encode(texts, tokens_per_batch=size.tokens_per_batch),
    }
    rates = {name: len(texts) / seconds(program, size.repeats) for name, program in programs.items()}
    rows = [
        {
            "encoder in bfloat16": name,
            "chunks/s": f"{rate:.0f}",
            "× sentence-transformers": f"{rate / rates['sentence-transformers']:.2f}",
        }
        for name, rate in rates.items()
    ]
    return {"rows": rows, "done": True}
