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
"""The part of `gpu.py` that measures quality: it trains three models in several calls and measures them"""

import time
from pathlib import Path
from typing import Any

from gpu_common import (
    SIZES,
    WithoutNeighbors,
    base_decoder,
    device,
    joint_model,
    num_parameters,
    open_datastore,
    retro_model,
)
from transformers import PreTrainedModel, TrainerCallback, set_seed

from modeling_retro import RetroForCausalLM, RetroJointForCausalLM
from modeling_retro.datastore.datastore import RetroDatastore
from trainers.durable_checkpoints import last_complete_checkpoint
from trainers.evaluation.evaluate import evaluate_retro
from trainers.evaluation.options import MODES
from trainers.evaluation.report import RetroEvaluation
from trainers.language_model.collator import DataCollatorForRetro, collator_options
from trainers.language_model.config import RetroTrainingArguments
from trainers.language_model.trainer import RetroTrainer
from trainers.load_model import load_retro_model


READER_RANK = 16
WINDOWS = {"window_chunks": 8, "stride_chunks": 4}


class StopAt(TrainerCallback):
    """Saves a checkpoint and stops when the time is over."""

    def __init__(self, end_time: float):
        self.end_time = end_time

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() > self.end_time:
            control.should_save = control.should_training_stop = True


def make_model(name: str, arguments: Any, datastore: RetroDatastore) -> PreTrainedModel:
    """The model of a run before its training."""
    size = SIZES[arguments.size]
    if name == "retro":
        return retro_model(datastore, size.retro)
    if name == "decoder":
        return joint_model(datastore, size.plain)  # without neighbors it is a plain decoder
    set_seed(0)
    adapter = {"r": READER_RANK, "lora_alpha": 2 * READER_RANK, "target_modules": "all-linear"}
    return load_retro_model(base_decoder(arguments), datastore, neighbor_adapter=adapter)


def train_until(name: str, arguments: Any, datastore: RetroDatastore, end_time: float) -> dict[str, Any]:
    """
    Trains a run until it is done or the time is over, from its last checkpoint. The weights are in
    `{output_dir}/{name}`.

    Returns:
        `dict`: `run`, `step`, `of` and `parameters`.
    """
    size, folder = SIZES[arguments.size], Path(arguments.output_dir) / name
    row_tokens = size.row_chunks * datastore.chunk_size
    max_steps = -(-size.quality_tokens // (row_tokens * size.batch_size))
    options = RetroTrainingArguments(
        output_dir=str(folder),
        max_steps=max_steps,
        logging_steps=50,
        save_steps=500,
        save_total_limit=1,
        report_to="none",
        bf16=True,
        row_chunks=size.row_chunks,
        num_neighbors=[1],
        per_device_train_batch_size=size.batch_size,
        freeze_decoder=name == "reader",
        retrofit_only=name == "reader",
        disable_tqdm=arguments.size == "toy",
    )
    model = make_model(name, arguments, datastore)
    collator = (WithoutNeighbors if name == "decoder" else DataCollatorForRetro)(
        datastore, **collator_options(options)
    )
    trainer = RetroTrainer(model, options, datastore, data_collator=collator, callbacks=[StopAt(end_time)])
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(str(folder)))
    step = trainer.state.global_step
    if step == max_steps:
        trainer.save_model()
        trainer.save_state()
    return {"run": name, "step": step, "of": max_steps, "parameters": num_parameters(model)}


def measure_quality(arguments: Any) -> dict[str, Any]:
    """
    Trains the reader of a pretrained decoder, a RETRO model, and a plain decoder of three times its weights, all on
    the same rows, and measures them on held-out documents. Each call goes on from the checkpoints for `minutes`.
    """
    end_time = time.monotonic() + 60 * arguments.minutes
    datastore, rows = open_datastore(arguments), []
    for name in ("reader", "retro", "decoder"):
        if rows and time.monotonic() > end_time:
            return {"rows": rows, "done": False}
        rows.append(train_until(name, arguments, datastore, end_time))
        if rows[-1]["step"] < rows[-1]["of"]:
            return {"rows": rows, "done": False}
    evaluations = evaluate(arguments, datastore)
    for name, evaluation in evaluations.items():
        evaluation.save(Path(arguments.output_dir) / name)
        rows += [{"run": name, "mode": mode, "bits per byte": f"{bits:.4f}"} for mode, bits in bits_of(evaluation)]
    rows += [
        {"run": "overlap {:.2f} to {:.2f}".format(*row["overlap"]), "chunks": row["num_chunks"]} | row["bits_per_byte"]
        for row in evaluations["evaluation"].overlap_curve()
    ]
    return {"rows": rows, "done": True}


def bits_of(evaluation: RetroEvaluation) -> list[tuple[str, float]]:
    return [(mode, evaluation.bits_per_byte(mode)) for mode in evaluation.chunk_bits]


def evaluate(arguments: Any, datastore: RetroDatastore) -> dict[str, RetroEvaluation]:
    """Measures the three models. The plain decoder is another way beside those of the RETRO model."""
    folder, split = Path(arguments.output_dir), datastore.split("validation")
    options = {
        "num_neighbors": 1,
        "max_documents": SIZES[arguments.size].max_documents,
        "show_progress": arguments.size != "toy",
        **WINDOWS,
    }
    reader = RetroJointForCausalLM.from_pretrained(folder / "reader").to(device())
    retro = RetroForCausalLM.from_pretrained(folder / "retro").to(device())
    decoder = RetroJointForCausalLM.from_pretrained(folder / "decoder").to(device())
    evaluation = evaluate_retro(retro, datastore, split, modes=MODES, measure_overlap=True, **options)
    without = evaluate_retro(decoder, datastore, split, modes=["off"], **options)
    evaluation.chunk_bits["decoder"] = without.chunk_bits["off"]
    reader_modes = ("off", "random", "on", "in_front")
    return {
        "evaluation": evaluation,
        "reader_evaluation": evaluate_retro(reader, datastore, split, modes=reader_modes, **options),
    }
