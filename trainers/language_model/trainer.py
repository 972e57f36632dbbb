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
"""Trains a RETRO language model on the chunks of its datastore"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from modeling_retro import RetroConfig
from modeling_retro.added_weights_retro import RETROFIT_WEIGHTS_NAME, record_checksums
from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.datastore.splits import DatastoreSplit
from modeling_retro.sharing.model_card import save_model_card
from trainers.durable_checkpoints import DurableCheckpointsMixin
from trainers.evaluation.evaluate import evaluate_retro

from .collator import ChunkRows, DataCollatorForRetro, EpochRowSampler, collator_options
from .config import RetroTrainingArguments
from .lessons import ReaderLessons, lesson_losses
from .muon import MuonWithAdamW
from .teacher import teacher_loss


def config_for_datastore(datastore: RetroDatastore, **fields: Any) -> RetroConfig:
    """
    Makes the config of a model for a datastore, with its vocabulary, special tokens and chunk sizes.

    Args:
        datastore ([`RetroDatastore`]):
            The datastore to train on and to search.
        fields:
            Other fields of [`RetroConfig`]. They override the fields that are taken from the datastore.

    Returns:
        [`RetroConfig`]
    """
    tokenizer = datastore.tokenizer
    from_datastore = {
        "vocab_size": len(tokenizer),
        "chunk_size": datastore.chunk_size,
        "continuation_chunks": datastore.continuation_chunks,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tokenizer_sha256": datastore.manifest.tokenizer.sha256,
    }
    return RetroConfig(**{**from_datastore, **fields})


EVALUATED_MODES = ("off", "random", "on")


def _is_gate(name: str) -> bool:
    return name.endswith("cross_attn.gate")


class RetroTrainer(DurableCheckpointsMixin, Trainer):
    """
    Trains [`RetroForCausalLM`] on the chunks of a datastore, each chunk with its neighbors from other documents, and
    evaluates it in bits per byte with and without retrieval.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model to train.
        args ([`RetroTrainingArguments`]):
            The arguments of the training.
        datastore ([`RetroDatastore`]):
            The datastore to train on and to search, with stored neighbors (`retro neighbors`).
        eval_dataset ([`DatastoreSplit`], *optional*):
            Held-out documents with their neighbors, such as `datastore.split("validation")`.
        train_dataset (`torch.utils.data.Dataset`, *optional*):
            Rows to train on. Defaults to the chunks of the datastore.
        data_collator (`Callable`, *optional*):
            Makes batches of these rows. Defaults to [`DataCollatorForRetro`].
        eval_datastore ([`RetroDatastore`], *optional*, defaults to `datastore`):
            The datastore of the neighbors of `eval_dataset`.
        kwargs:
            Passed to [`~transformers.Trainer`].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: RetroTrainingArguments,
        datastore: RetroDatastore,
        eval_dataset: DatastoreSplit | None = None,
        train_dataset: Dataset | None = None,
        data_collator: Callable[[list], dict[str, torch.Tensor]] | None = None,
        eval_datastore: RetroDatastore | None = None,
        **kwargs: Any,
    ):
        datastore.check_model(model.config)
        self.eval_datastore = datastore if eval_datastore is None else eval_datastore
        # By this checksum the trained model refuses a datastore of another tokenizer.
        model.config.tokenizer_sha256 = datastore.manifest.tokenizer.sha256
        if args.freeze_decoder:
            model.freeze_decoder()
        self.datastore = datastore
        self._seconds_waited = 0.0
        self._tokens_seen = 0
        self._last_log_time = None
        if train_dataset is None:
            train_dataset = ChunkRows(len(datastore.chunks), args.row_chunks)
        if data_collator is None:
            data_collator = DataCollatorForRetro(datastore, **collator_options(args))
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=datastore.tokenizer,
            **kwargs,
        )
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))

    def _get_train_sampler(self, train_dataset: ChunkRows | None = None) -> EpochRowSampler:
        data_seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochRowSampler(len(self.train_dataset), data_seed)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """
        Computes the loss of the model. With a teacher it is the weighted sum of this loss and the divergence from the
        teacher, both averaged over the same number of tokens. Lessons have a teacher of their own: the base, which
        reads the passages in order.
        """
        if isinstance(self.train_dataset, ReaderLessons):
            return self._lesson_loss(model, inputs, num_items_in_batch)
        if "teacher_token_ids" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        teacher = inputs.pop("teacher_token_ids"), inputs.pop("teacher_log_probs")
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        divergence, num_taught = teacher_loss(outputs["logits"], *teacher)
        if num_items_in_batch is None:
            divergence = divergence / num_taught.clamp(min=1)
        else:
            divergence = divergence * self._loss_scale() / num_items_in_batch
        loss = self.args.lm_weight * loss + self.args.teacher_weight * divergence
        return (loss, outputs) if return_outputs else loss

    def _lesson_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        base = self.accelerator.unwrap_model(model) if self.args.teacher_weight > 0 else None
        loss, divergence = lesson_losses(model, base, inputs)
        loss = self.args.lm_weight * loss + self.args.teacher_weight * divergence
        if num_items_in_batch is None:
            return loss / (inputs["labels"] >= 0).sum()
        return loss * self._loss_scale() / num_items_in_batch

    def _loss_scale(self) -> int:
        """What a sum over the items of a batch is multiplied with, because processes average their gradients."""
        num_workers = self.accelerator.num_processes // self.get_tp_size()
        return num_workers if self.args.average_tokens_across_devices else 1

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.retrofit_only:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            output_dir = self.args.output_dir if output_dir is None else output_dir
            self.accelerator.unwrap_model(self.model).save_pretrained(output_dir, retrofit_only=True)
            self.processing_class.save_pretrained(output_dir)
            torch.save(self.args, Path(output_dir) / TRAINING_ARGS_NAME)
        if self.args.should_save:  # the tokenizer was saved after the model
            record_checksums(Path(self.args.output_dir if output_dir is None else output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        weights = Path(resume_from_checkpoint) / RETROFIT_WEIGHTS_NAME
        if weights.is_file():
            self.accelerator.unwrap_model(self.model).load_state_dict(load_file(weights), strict=False)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self.args.retrofit_only:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        model = self.model if model is None else model
        if self.optimizer is not None:
            return self.optimizer
        if self.args.use_muon:
            self.optimizer = MuonWithAdamW(
                model,
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                decay_names=self.get_decay_parameter_names(model),
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
        else:
            super().create_optimizer(model)
        self._give_learning_rates(model)
        return self.optimizer

    def _give_learning_rates(self, model: nn.Module) -> None:
        """Splits the groups of the optimizer if the decoder or the gates have their own learning rates."""
        added_rate, decoder_rate = self.args.learning_rate, self.args.decoder_learning_rate
        decoder_rate = added_rate if decoder_rate is None else decoder_rate
        rates = {}
        for name, parameter in model.named_parameters():
            rate = added_rate if self.model.is_added_weight(name) else decoder_rate
            rates[id(parameter)] = self.args.gate_learning_rate if _is_gate(name) else rate
        groups = []
        for group in self.optimizer.param_groups:
            for rate in sorted({rates[id(parameter)] for parameter in group["params"]}):
                parameters = [parameter for parameter in group["params"] if rates[id(parameter)] == rate]
                groups.append({**group, "params": parameters, "lr": rate})
        self.optimizer.param_groups = groups

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters with weight decay, which are all except norms, biases and gates."""
        return [name for name in super().get_decay_parameter_names(model) if not _is_gate(name)]

    def evaluate(
        self,
        eval_dataset: DatastoreSplit | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Measures bits per byte and perplexity without neighbors (`off`), with random ones (`random`) and with the
        retrieved ones (`on`). `{prefix}_loss` is the loss with the retrieved ones, in nats per token.
        """
        start_time = time.perf_counter()
        with self.accelerator.autocast():
            evaluation = evaluate_retro(
                self.model,
                self.eval_datastore,
                self.eval_dataset if eval_dataset is None else eval_dataset,
                modes=EVALUATED_MODES,
                num_neighbors=max(self.args.num_neighbors),
                window_chunks=self.args.eval_window_chunks,
                stride_chunks=self.args.eval_stride_chunks,
                batch_size=self.args.per_device_eval_batch_size,
                max_documents=self.args.eval_max_documents,
                show_progress=not self.args.disable_tqdm,
            )
        metrics = {f"{metric_key_prefix}_loss": float(np.log(evaluation.perplexity("on")))}
        for mode in EVALUATED_MODES:
            metrics[f"{metric_key_prefix}_{mode}_bits_per_byte"] = evaluation.bits_per_byte(mode)
            metrics[f"{metric_key_prefix}_{mode}_perplexity"] = evaluation.perplexity(mode)
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - start_time
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(
        self,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Writes `README.md` into the output folder, as [`~modeling_retro.sharing.model_card.save_model_card`] does. It
        holds the numbers of `retro evaluate` if they belong to these weights.

        Args:
            license (`str`, *optional*):
                Licence of the model.
            tags (`str` or `list[str]`, *optional*):
                Further tags.
            model_name (`str`, *optional*):
                Name of the model, if it has none on the Hub.
            kwargs:
                Not used. [`~transformers.Trainer.push_to_hub`] passes further arguments.
        """
        if self.is_world_process_zero():
            tags = [tags] if isinstance(tags, str) else tags
            save_model_card(self.args.output_dir, name=self.hub_model_id or model_name, license=license, tags=tags)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, torch.Tensor | int | None]:
        start_time = time.perf_counter()
        if self._last_log_time is None:
            self._last_log_time = start_time
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        self._seconds_waited += time.perf_counter() - start_time
        num_workers = self.args.world_size // self.get_tp_size()
        self._tokens_seen += sum(batch["input_ids"].numel() for batch in batches) * num_workers
        return batches, num_items_in_batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._tokens_seen and "loss" in logs:
            elapsed = time.perf_counter() - self._last_log_time
            logs["tokens_per_second"] = self._tokens_seen / elapsed
            logs["data_wait_share"] = self._seconds_waited / elapsed
            self._seconds_waited, self._tokens_seen, self._last_log_time = 0.0, 0, None
        super().log(logs, start_time)
