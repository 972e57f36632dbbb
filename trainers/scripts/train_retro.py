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
Trains a RETRO language model on a datastore with stored neighbors.

    retro train --datastore datastore --model_config small.yaml --output_dir model --num_train_epochs 3
    retro train --datastore datastore --model smollm2-retro --freeze_decoder true --output_dir model
    retro train --datastore datastore --model HuggingFaceTB/SmolLM2-135M --neighbor_adapter_rank 16 \\
        --freeze_decoder true --retrofit_only true --teacher teacher --row_chunks 8 --output_dir reader
    retro train --datastore datastore --model HuggingFaceTB/SmolLM2-135M --neighbor_adapter_rank 16 \\
        --freeze_decoder true --retrofit_only true --lessons lessons.jsonl --output_dir reader
    retro train --datastore datastore --model model --lora_rank 16 --output_dir adapter --num_train_epochs 1
    retro train --datastore datastore --train_documents new.jsonl --model model --output_dir out --max_steps 10000
    retro train --accelerate-config ddp --datastore datastore --model_config small.yaml --output_dir model
    accelerate launch -m trainers.scripts.train_retro --datastore datastore --model_config small.yaml --output_dir out

The model config is a YAML or JSON file with fields of `RetroConfig`. The vocabulary, the special tokens and the chunk
sizes come from the datastore. The same command resumes an interrupted run from the last checkpoint in `output_dir`,
and ends with the same weights.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from data_prep.arguments import parse_arguments, run_command
from data_prep.memory import keep_freed_memory

from ..training_options import RetroTrainingOptions


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from modeling_retro import RetroDatastore, RetroForCausalLM
    from trainers.language_model.config import RetroTrainingArguments


@dataclass
class TrainRetroArguments:
    """
    Arguments of `retro train`, besides those of [`RetroTrainingArguments`].
    """

    datastore: str = field(metadata={"help": "Folder or Hub id of the datastore to train on and to search."})
    model: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of the model to start from: a RETRO model or any causal one, or smollm2."},
    )
    model_config: str | None = field(
        default=None, metadata={"help": "YAML or JSON file with fields of RetroConfig, for training from scratch."}
    )
    train_documents: str | None = field(
        default=None,
        metadata={
            "help": "Documents to train on as they stream by, in place of the datastore's own: file or glob of .jsonl "
            '(key "text"), .parquet or .txt, or Hub id of a dataset. Needs --max_steps.'
        },
    )
    lessons: str | None = field(
        default=None,
        metadata={
            "help": "JSON lines of passages and questions, as `retro lessons` writes them, to train a reader on in "
            "place of the chunks of the datastore."
        },
    )
    row_share: float = field(
        default=0.0, metadata={"help": "Share of rows of chunks among --lessons, for a reader that continues text."}
    )
    reader: str | None = field(
        default=None, metadata={"help": "Reader to start from, for a model that is wrapped; with --freeze_decoder."}
    )
    eval_split: str = field(
        default="validation", metadata={"help": "Split of the datastore that `eval_strategy` evaluates on."}
    )
    fsdp_size: int = field(
        default=1, metadata={"help": "Processes that share the weights among them (FSDP2), each with its own rows."}
    )
    tp_size: int = field(
        default=1, metadata={"help": "Processes that share each matrix (tensor parallel), all with the same rows."}
    )
    neighbor_adapter_rank: int | None = field(
        default=None,
        metadata={
            "help": "Rank of a LoRA adapter that reads neighbors, for a model that is wrapped; with --freeze_decoder."
        },
    )
    row_adapter_rank: int | None = field(
        default=None,
        metadata={"help": "Rank of a LoRA adapter of the tokens that see neighbors, for a model that is wrapped."},
    )
    neighbor_bias: bool = field(
        default=False, metadata={"help": "Learn a scalar that is added to the attention scores of neighbors."}
    )
    lora_rank: int | None = field(
        default=None,
        metadata={"help": "Rank of a LoRA adapter that is trained and saved while all other weights are frozen."},
    )
    lora_layers: str = field(
        default="decoder",
        metadata={
            "help": "Linear layers with the adapter: those of the decoder, or those of chunked cross attention.",
            "choices": ["decoder", "cross_attention"],
        },
    )
    decoder_dtype: str = field(
        default="float32",
        metadata={
            "help": "Data type of a decoder that is not trained. bfloat16 halves its memory; it needs --bf16 true.",
            "choices": ["float32", "bfloat16"],
        },
    )
    train_split: str | None = field(
        default=None, metadata={"help": "Split to train on, in place of the datastore's own chunks."}
    )
    eval_datastore: str | None = field(
        default=None, metadata={"help": "Datastore that `eval_split` belongs to. --datastore when unset."}
    )


def main(argv: Sequence[str] | None = None) -> None:
    arguments, training_arguments = parse_arguments(
        TrainRetroArguments,
        argv=argv,
        description=__doc__,
        prog="retro train",
        training_options=RetroTrainingOptions,
        training_arguments="trainers.language_model.config:RetroTrainingArguments",
    )
    from modeling_retro import RetroDatastore, RetroRetriever
    from trainers.durable_checkpoints import checkpoint_to_resume
    from trainers.language_model.collator import ChunkRows, DataCollatorForRetro, collator_options
    from trainers.language_model.lessons import DataCollatorForLessons, ReaderLessons
    from trainers.language_model.streaming import RetroStreamTrainer, load_document_stream
    from trainers.language_model.teacher import TeacherPredictions
    from trainers.language_model.trainer import RetroTrainer

    keep_freed_memory()
    datastore = RetroDatastore.from_pretrained(arguments.datastore)
    evaluates = training_arguments.eval_strategy != "no" or training_arguments.eval_on_start
    eval_datastore = datastore
    if arguments.eval_datastore is not None:
        eval_datastore = RetroDatastore.from_pretrained(arguments.eval_datastore)
    eval_dataset = eval_datastore.split(arguments.eval_split) if evaluates else None
    check_lessons(arguments, training_arguments)
    if arguments.train_documents is None:
        source = datastore if arguments.train_split is None else datastore.split(arguments.train_split)
        dataset = collator = None
        if arguments.lessons is None or arguments.row_share > 0:
            datastore.check_compact("training")
            row_chunks, teacher = training_arguments.row_chunks, None
            if training_arguments.teacher is not None:
                teacher = TeacherPredictions(training_arguments.teacher, source, row_chunks)
            dataset = ChunkRows(len(source.chunks), row_chunks)
            options = collator_options(training_arguments) | {"mark_random": arguments.lessons is not None}
            collator = DataCollatorForRetro(datastore, source, teacher=teacher, **options)
        if arguments.lessons is not None:
            dataset = ReaderLessons(arguments.lessons, dataset, arguments.row_share, training_arguments.seed)
            collator = DataCollatorForLessons(datastore.tokenizer, datastore.neighbor_length, collator)
        model = load_model(arguments, datastore, training_arguments)
        trainer = RetroTrainer(
            model,
            training_arguments,
            datastore,
            eval_dataset,
            train_dataset=dataset,
            data_collator=collator,
            eval_datastore=eval_datastore,
        )
    else:
        for name in ("train_split", "eval_datastore"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name} is for training on a datastore, not on --train_documents")
        documents, retriever = load_document_stream(arguments.train_documents), RetroRetriever(datastore)
        model = load_model(arguments, datastore, training_arguments)
        trainer = RetroStreamTrainer(model, training_arguments, retriever, documents, eval_dataset)
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(training_arguments))
    trainer.save_model()
    trainer.save_state()


def check_lessons(arguments: TrainRetroArguments, training_arguments: "RetroTrainingArguments") -> None:
    """Refuses options that do not fit lessons."""
    if arguments.lessons is None:
        if arguments.row_share != 0:
            raise ValueError(f"--row_share is {arguments.row_share}, which is for rows among --lessons: give both")
        return
    if arguments.train_documents is not None:
        raise ValueError("--train_documents is for training on chunks, not on --lessons")
    if arguments.train_split is not None and arguments.row_share == 0:
        raise ValueError("--train_split is for training on chunks, not on --lessons; --row_share reads both")
    if training_arguments.teacher is not None:
        raise ValueError("--teacher is for training on chunks; the base of the model is the teacher of --lessons")
    if arguments.row_share > 0 and training_arguments.per_device_train_batch_size > 1:
        raise ValueError("lessons and rows do not fit in a batch; set --per_device_train_batch_size 1")


def load_model(
    arguments: TrainRetroArguments, datastore: "RetroDatastore", training_arguments: "RetroTrainingArguments"
) -> "PreTrainedModel":
    """Loads the model to start from. With `fsdp_size` or `tp_size`, each process loads its share of the weights."""
    import torch
    from accelerate import PartialState
    from transformers import set_seed
    from transformers.distributed import DistributedConfig

    from ..load_model import load_retro_model

    # New weights, also those of adapters, are drawn with this seed.
    set_seed(training_arguments.seed)

    if (arguments.model is None) == (arguments.model_config is None):
        raise ValueError("give either --model (to continue its training) or --model_config (from scratch)")
    num_shares = arguments.fsdp_size * arguments.tp_size
    is_halved = arguments.decoder_dtype != "float32"
    leaves_decoder_out = arguments.lora_rank is not None or (
        training_arguments.freeze_decoder and training_arguments.retrofit_only
    )
    has_base = arguments.model is not None and num_shares == 1
    if is_halved and not (training_arguments.bf16 and leaves_decoder_out and has_base):
        raise ValueError(
            f"--decoder_dtype is {arguments.decoder_dtype}, which is for a decoder that is neither trained nor saved: "
            "it needs --bf16 true, --model, either --lora_rank or both --freeze_decoder true and --retrofit_only "
            "true, and no --fsdp_size or --tp_size"
        )
    if arguments.lora_rank is not None:
        refused = {
            "freeze_decoder": training_arguments.freeze_decoder,
            "retrofit_only": training_arguments.retrofit_only,
            "model_config": arguments.model_config is not None,
            "fsdp_size or tp_size": num_shares > 1,
            **dict.fromkeys(adapter_fields(arguments), True),
        }
        for name, is_given in refused.items():
            if is_given:
                raise ValueError(
                    f"--lora_rank is {arguments.lora_rank}, which trains an adapter of --model alone: leave out {name}"
                )
        model = load_retro_model(arguments.model, datastore, dtype=torch.float32)
        if not model.name_or_path:
            raise ValueError(
                f"{arguments.model} is no RETRO model yet, and an adapter must name one as its base. Make it by "
                f"`retro retrofit --base {arguments.model} --attention joint --retrofit_only true --output_dir FOLDER`"
            )
        if is_halved:
            model.to(getattr(torch, arguments.decoder_dtype))
        return add_lora(model, arguments.lora_rank, arguments.lora_layers)
    if num_shares == 1:
        if arguments.model_config is not None:
            return _model_from_scratch(arguments, datastore)
        model = load_retro_model(arguments.model, datastore, dtype=torch.float32, **adapter_fields(arguments))
        if is_halved:
            for name, parameter in model.named_parameters():
                if not model.is_added_weight(name):
                    parameter.data = parameter.data.to(getattr(torch, arguments.decoder_dtype))
        return model
    state = PartialState(cpu=training_arguments.use_cpu)
    if state.num_processes != num_shares:
        raise ValueError(
            f"--fsdp_size {arguments.fsdp_size} and --tp_size {arguments.tp_size} are for {num_shares} processes, but "
            f"there are {state.num_processes}; launch as many, such as with --accelerate-config ddp --num-processes"
        )
    start = arguments.model
    if start is None:
        # The shares of the processes are read from a file.
        start = Path(training_arguments.output_dir) / "initial"
        if state.is_main_process:
            _model_from_scratch(arguments, datastore).save_pretrained(start)
        state.wait_for_everyone()
    distributed_config = DistributedConfig(fsdp_size=arguments.fsdp_size, tp_size=arguments.tp_size)
    return load_retro_model(str(start), datastore, dtype=torch.float32, distributed_config=distributed_config)


def add_lora(model: "PreTrainedModel", rank: int, layers: str = "decoder") -> "PeftModel":
    """
    Adds a LoRA adapter to a model and freezes its other weights.

    Args:
        model ([`RetroForCausalLM`] or [`RetroJointForCausalLM`]): The model.
        rank (`int`): Rank of the adapter. Its scale is 2.
        layers (`str`, *optional*, defaults to `"decoder"`):
            `"decoder"` for all linear layers of the decoder except its head, `"cross_attention"` for those of chunked
            cross attention.

    Raises:
        ImportError: If PEFT is not installed.
        ValueError: For a rank below 1, or for the cross attention of a model that has none.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("--lora_rank needs PEFT: `pip install peft`") from error
    from modeling_retro import RetroForCausalLM

    if isinstance(model, RetroForCausalLM):
        modules = "(self_attn|mlp)" if layers == "decoder" else "cross_attn"
        targets = rf"model\.layers\.\d+\.{modules}\.\w+_proj"
    elif layers == "decoder":
        targets = "all-linear"
    else:
        raise ValueError(
            "--lora_layers is cross_attention, which a wrapped model does not have; leave it out, or take "
            "--neighbor_adapter_rank for an adapter that reads neighbors"
        )
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))


def adapter_fields(arguments: TrainRetroArguments) -> dict[str, Any]:
    """Fields of [`RetroJointConfig`] for the weights to train besides a frozen decoder."""
    fields: dict[str, Any] = {"neighbor_bias": True} if arguments.neighbor_bias else {}
    if arguments.reader is not None:
        fields["reader"] = arguments.reader
    for name in ("neighbor_adapter", "row_adapter"):
        rank = getattr(arguments, f"{name}_rank")
        if rank is not None:
            fields[name] = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}
    return fields


def _model_from_scratch(arguments: TrainRetroArguments, datastore: "RetroDatastore") -> "RetroForCausalLM":
    from modeling_retro import RetroForCausalLM
    from trainers.language_model.trainer import config_for_datastore

    path = Path(arguments.model_config)
    text = path.read_text(encoding="utf-8")
    try:
        fields = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read --model_config {path}: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"--model_config {path} must hold fields of RetroConfig, not {type(fields).__name__}")
    return RetroForCausalLM(config_for_datastore(datastore, **fields))


if __name__ == "__main__":
    run_command(main)
