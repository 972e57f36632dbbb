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
Trains a RETRO language model on a datastore whose neighbors have been found.

    retro train --datastore datastore --model_config small.yaml --output_dir model --num_train_epochs 3
    retro train --datastore datastore --model smollm2-retro --freeze_decoder true --output_dir model
    retro train --datastore datastore --train_documents new.jsonl --model model --output_dir out --max_steps 10000
    retro train --accelerate-config ddp --datastore datastore --model_config small.yaml --output_dir model
    accelerate launch -m trainers.scripts.train_retro --datastore datastore --model_config small.yaml --output_dir out

The model config is a YAML or JSON file with fields of `RetroConfig`; vocabulary, special tokens and chunk sizes come
from the datastore. The same command run again goes on from the last checkpoint in `output_dir`, to the same weights.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from transformers import PreTrainedModel, set_seed
from transformers.distributed import DistributedConfig

from data_prep.arguments import parse_arguments, run_command
from data_prep.memory import keep_freed_memory
from modeling_retro import RetroForCausalLM
from modeling_retro.datastore_retro import RetroDatastore
from modeling_retro.retriever_retro import RetroRetriever

from ..load_model import load_retro_model
from ..retro_config import RetroTrainingArguments
from ..retro_trainer import RetroTrainer, config_for_datastore, last_complete_checkpoint
from ..streaming import RetroStreamTrainer, load_document_stream


@dataclass
class TrainRetroArguments:
    """
    Arguments of `retro train` beside [`RetroTrainingArguments`].
    """

    datastore: str = field(metadata={"help": "Folder or Hub id of the datastore to train on and to search."})
    model: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of the model to start from: a RETRO model or any causal one."},
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
    eval_split: str = field(
        default="validation", metadata={"help": "Split of the datastore that `eval_strategy` evaluates on."}
    )
    fsdp_size: int = field(
        default=1, metadata={"help": "Processes that share the weights among them (FSDP2), each with its own rows."}
    )
    tp_size: int = field(
        default=1, metadata={"help": "Processes that share each matrix (tensor parallel), all with the same rows."}
    )
    retrofit_only: bool = field(
        default=False, metadata={"help": "Save only what RETRO adds to a frozen decoder, with the decoder's checksum."}
    )


def main(argv: Sequence[str] | None = None) -> None:
    arguments, training_arguments = parse_arguments(
        TrainRetroArguments, RetroTrainingArguments, argv=argv, description=__doc__, prog="retro train"
    )
    keep_freed_memory()
    datastore = RetroDatastore.from_pretrained(arguments.datastore)
    evaluates = training_arguments.eval_strategy != "no" or training_arguments.eval_on_start
    eval_dataset = datastore.split(arguments.eval_split) if evaluates else None
    if arguments.train_documents is None:
        model = load_model(arguments, datastore, training_arguments)
        trainer = RetroTrainer(model, training_arguments, datastore, eval_dataset)
    else:
        documents, retriever = load_document_stream(arguments.train_documents), RetroRetriever(datastore)
        model = load_model(arguments, datastore, training_arguments)
        trainer = RetroStreamTrainer(model, training_arguments, retriever, documents, eval_dataset)
    checkpoint = training_arguments.resume_from_checkpoint or last_complete_checkpoint(training_arguments.output_dir)
    trainer.train(resume_from_checkpoint=checkpoint)
    if not arguments.retrofit_only:
        trainer.save_model()
    elif trainer.is_world_process_zero():
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(
            training_arguments.output_dir, retrofit_only=True
        )
    trainer.save_state()


def load_model(
    arguments: TrainRetroArguments, datastore: RetroDatastore, training_arguments: RetroTrainingArguments
) -> PreTrainedModel:
    """The model to start from; with `fsdp_size` or `tp_size` each process loads its share of the weights."""
    if (arguments.model is None) == (arguments.model_config is None):
        raise ValueError("give either --model (to go on training) or --model_config (from scratch)")
    num_shares = arguments.fsdp_size * arguments.tp_size
    if num_shares == 1:
        if arguments.model_config is not None:
            return _model_from_scratch(arguments, datastore, training_arguments.seed)
        return load_retro_model(arguments.model, datastore, dtype=torch.float32)
    state = PartialState(cpu=training_arguments.use_cpu)
    if state.num_processes != num_shares:
        raise ValueError(
            f"--fsdp_size {arguments.fsdp_size} and --tp_size {arguments.tp_size} are for {num_shares} processes, but "
            f"there are {state.num_processes}; launch as many, such as with --accelerate-config ddp --num-processes"
        )
    start = arguments.model
    if start is None:
        # Shares are read from a file.
        start = Path(training_arguments.output_dir) / "initial"
        if state.is_main_process:
            _model_from_scratch(arguments, datastore, training_arguments.seed).save_pretrained(start)
        state.wait_for_everyone()
    distributed_config = DistributedConfig(fsdp_size=arguments.fsdp_size, tp_size=arguments.tp_size)
    return load_retro_model(str(start), datastore, dtype=torch.float32, distributed_config=distributed_config)


def _model_from_scratch(arguments: TrainRetroArguments, datastore: RetroDatastore, seed: int) -> RetroForCausalLM:
    path = Path(arguments.model_config)
    text = path.read_text(encoding="utf-8")
    try:
        fields = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read --model_config {path}: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"--model_config {path} must hold fields of RetroConfig, not {type(fields).__name__}")
    set_seed(seed)
    return RetroForCausalLM(config_for_datastore(datastore, **fields))


if __name__ == "__main__":
    run_command(main)
