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
"""Trains the encoder of the retriever on pairs of texts"""

import functools
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import BatchSampler, DataLoader
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)
from transformers.utils import logging

from data_prep.pairs.pairs import PairMixture, hash_pairs, keep_positives
from modeling_retro.durable_files_retro import sync
from modeling_retro.encoder.chunk_encoder import longest_input, pool_hidden_states
from trainers.durable_checkpoints import DurableCheckpointsMixin

from .collator import SiameseDataCollator, stack_columns
from .config import RetrieverTrainingArguments
from .evaluation import retrieval_metrics
from .export import model_card_text, save_sentence_transformers_files
from .losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss, split_by_length


logger = logging.get_logger(__name__)


class NoDuplicatesBatchSampler(BatchSampler):
    """
    Makes batches without a repeated text. Each batch is drawn from one pair set. The order depends only on `seed` and
    the epoch.

    In one step the processes take `num_processes` consecutive batches. These come from one set and have no text in
    common, so that every process can use the texts of the others as negatives. Two processes with half the batch size
    see the same pairs as one process. An epoch has as many pairs as all sets together, except those that do not fill a
    step. Rows that fit into no batch are kept for the next pass over their set.

    Args:
        text_ids (`Sequence[np.ndarray]`):
            Hashes of the texts of each set, int64 `[rows, columns]` ([`~data_prep.hash_pairs`]). The numbers of
            rows continue from one set to the next.
        batch_size (`int`):
            Number of pairs in the batch of one process.
        num_processes (`int`, *optional*, defaults to `1`):
            Number of processes that share the batches.
        weights (`Sequence[float]`, *optional*):
            Share of each set in the batches. Defaults to its share of the rows.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order.

    Raises:
        `ValueError`: if a set cannot fill a single step.
    """

    def __init__(
        self,
        text_ids: Sequence[np.ndarray],
        batch_size: int,
        num_processes: int = 1,
        weights: Sequence[float] | None = None,
        seed: int = 0,
    ):
        self.text_ids = text_ids
        self.batch_size = batch_size
        self.drop_last = True
        self.num_processes = num_processes
        rows = np.array([len(ids) for ids in text_ids])
        self.weights = rows / rows.sum() if weights is None else np.asarray(weights)
        self.offsets = np.cumsum([0, *rows])
        self.seed = seed
        self.epoch = 0
        self.num_steps = int(rows.sum()) // (batch_size * num_processes)
        if batch_size * num_processes < 2:
            raise ValueError("the batch has a single pair, so there are no negatives; use a batch size of at least 2")
        if self.num_steps == 0:
            raise ValueError(
                f"{rows.sum()} pairs do not fill one step of {batch_size} pairs on {num_processes} process(es); use a "
                "smaller batch size"
            )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_steps * self.num_processes

    def __iter__(self) -> Iterator[list[int]]:
        draws = np.random.default_rng([self.seed, self.epoch]).choice(
            len(self.text_ids), size=self.num_steps, p=self.weights
        )
        steps = [self._steps_of_set(number) for number in range(len(self.text_ids))]
        for number in draws:
            rows = next(steps[number])
            for start in range(0, len(rows), self.batch_size):
                yield rows[start : start + self.batch_size]

    def _steps_of_set(self, number: int) -> Iterator[list[int]]:
        """Yields the steps of endless passes over one set."""
        text_ids, passes = self.text_ids[number], 0
        while True:
            order = np.random.default_rng([self.seed, self.epoch, number, passes]).permutation(len(text_ids))
            step = None
            for step in self._steps_of_pass(text_ids, order):
                yield [int(self.offsets[number]) + row for row in step]
            if step is None:
                raise ValueError(
                    f"training set {number} has {len(text_ids)} pairs, too few without a common text for one step of "
                    f"{self.batch_size} pairs on {self.num_processes} process(es); use a smaller batch size"
                )
            passes += 1

    def _steps_of_pass(self, text_ids: np.ndarray, order: np.ndarray) -> Iterator[list[int]]:
        size = self.batch_size * self.num_processes
        deferred: deque[tuple[int, list[int]]] = deque()
        step, used = [], set()

        def add(row: int, ids: list[int]) -> None:
            if used.isdisjoint(ids):
                step.append(row)
                used.update(ids)
            else:
                deferred.append((row, ids))

        blocks = np.split(order, range(10_000, len(order), 10_000))
        for row, ids in ((row, ids) for block in blocks for row, ids in zip(block.tolist(), text_ids[block].tolist())):
            add(row, ids)
            if len(step) == size:
                yield step
                step, used = [], set()
                # The rows that were put off first come first in the next step. A limit keeps the pass linear.
                for _ in range(min(len(deferred), 4 * size)):
                    if len(step) < size:
                        add(*deferred.popleft())
        while len(step) + len(deferred) >= size:
            waiting = len(deferred)
            for _ in range(waiting):
                if len(step) < size:
                    add(*deferred.popleft())
            if len(step) < size:
                return
            yield step
            step, used = [], set()


class _SamplerEpoch(TrainerCallback):
    """Tells the sampler the epoch, because accelerate fails to do so in a resumed epoch of several processes."""

    def __init__(self, sampler: NoDuplicatesBatchSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch or 0))


class RetrieverTrainer(DurableCheckpointsMixin, Trainer):
    """
    Trains a text encoder on pairs, with the other pairs of the batch as negatives.

    Args:
        model (`PreTrainedModel`):
            An encoder whose output has `last_hidden_state`, such as those of `AutoModel` or `T5EncoderModel`.
        args ([`RetrieverTrainingArguments`]):
            Batch, loss, pooling and schedule.
        processing_class (`PreTrainedTokenizerBase`):
            The tokenizer.
        train_dataset (`datasets.Dataset`, `datasets.IterableDataset` or [`~data_prep.PairMixture`], *optional*):
            Pairs as [`~data_prep.load_pairs`] returns them, or with other columns that [`SiameseDataCollator`] takes.
            Rows with a label of 0 are left out. Batches have no duplicates, except those of an
            iterable dataset.
        eval_dataset (`datasets.Dataset` or `dict[str, datasets.Dataset]`, *optional*):
            Held-out pairs. Each anchor is looked up among all texts of the other columns, which gives `eval_recall@1`,
            `eval_recall@10`, `eval_mrr@10`, `eval_ndcg@10` and `eval_loss`.
        kwargs (`dict[str, Any]`, *optional*):
            Passed to [`~transformers.Trainer`].

    `save_model` writes a folder that `AutoModel`, sentence-transformers and
    [`~modeling_retro.encoder.chunk_encoder.ChunkEncoder`] can load.
    """

    _tag_names = ["sentence-transformers", "sentence-similarity", "feature-extraction", "retro"]

    # The loss of a batch is a mean, and `Trainer` divides it by the number of accumulated batches.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel,
        args: RetrieverTrainingArguments,
        processing_class: PreTrainedTokenizerBase,
        train_dataset=None,
        eval_dataset=None,
        **kwargs,
    ):
        max_length = args.max_length or longest_input(model, processing_class)
        kwargs.setdefault("data_collator", SiameseDataCollator(processing_class, max_length=max_length))
        kwargs.setdefault("compute_metrics", functools.partial(_compute_metrics, cosine=args.similarity == "cosine"))
        self.loss = _loss_of(args)
        self.max_length = max_length
        super().__init__(
            model=model,
            args=args,
            processing_class=processing_class,
            train_dataset=_positives(train_dataset),
            eval_dataset=_positives(eval_dataset),
            **kwargs,
        )
        # The batches have other names than the arguments of the model, so the default guess fails.
        self.can_return_loss = True
        self.label_names = ["text_ids"]

    def get_train_dataloader(self) -> DataLoader:
        dataset = self.train_dataset
        if dataset is None or isinstance(dataset, torch.utils.data.IterableDataset):
            return super().get_train_dataloader()
        is_mixture = isinstance(dataset, PairMixture)
        with self.args.main_process_first(desc="hashing the training texts"):
            text_ids = [hash_pairs(pairs) for pairs in (dataset.sets.values() if is_mixture else [dataset])]
        sampler = NoDuplicatesBatchSampler(
            text_ids,
            self._train_batch_size,
            num_processes=self.args.world_size,
            weights=dataset.weights if is_mixture else None,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )
        self.pop_callback(_SamplerEpoch)
        self.add_callback(_SamplerEpoch(sampler))
        dataloader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(dataloader)

    def _embed(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Embeddings [n, d] of the texts in `input_ids` [n, t], in float32 or wider."""
        with self.compute_loss_context_manager():
            hidden_states = model(**inputs).last_hidden_state
        return pool_hidden_states(hidden_states, inputs["attention_mask"], self.args.pooling)

    def _embed_columns(self, model: nn.Module, inputs: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        """Embeddings [C, B, d] of the stacked texts, in one forward pass, or on a CPU in several with less padding."""
        passes = 1
        # Processes that average gradients must run the same number of passes, whatever their texts.
        if self.args.device.type == "cpu" and self.args.world_size == 1:
            passes = _cheapest_number_of_passes(inputs["attention_mask"])
        if passes == 1:
            return self._embed(model, inputs).unflatten(0, shape)
        parts = split_by_length(inputs, -(-shape.numel() // passes))
        order = torch.cat([positions for positions, _ in parts])
        embeddings = torch.cat([self._embed(model, part) for _, part in parts])
        return embeddings[order.argsort()].unflatten(0, shape)

    def _split_inputs(self, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
        """Splits the inputs into those of the encoder and those of the loss."""
        if "input_ids" not in inputs:
            inputs = stack_columns(inputs)
        encoder_inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return encoder_inputs, {name: inputs.get(name) for name in ("text_ids", "document_ids")}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        encoder_inputs, ids = self._split_inputs(inputs)
        embeddings = self._embed_columns(model, encoder_inputs, ids["text_ids"].shape)
        loss = self.loss(embeddings, **ids)
        return (loss, embeddings) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        if not isinstance(self.loss, CachedMultipleNegativesRankingLoss):
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        encoder_inputs, ids = self._split_inputs(self._prepare_inputs(inputs))
        loss = self.loss.forward_backward(
            functools.partial(self._embed, model),
            encoder_inputs,
            num_columns=len(ids["text_ids"]),
            **ids,
            backward=lambda part: self.accelerator.backward(part / self.current_gradient_accumulation_steps),
            no_sync=functools.partial(self.accelerator.no_sync, model=model),
        )
        return loss / self.current_gradient_accumulation_steps

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        encoder_inputs, ids = self._split_inputs(self._prepare_inputs(inputs))
        shape = ids["text_ids"].shape
        with torch.no_grad():
            embeddings = self._embed_columns(model, encoder_inputs, shape)
            # The last batch may hold a single pair, for which there is no loss.
            loss = self.loss(embeddings, **ids) if shape[0] > 2 or shape[1] > 1 else None
        if prediction_loss_only:
            return loss, None, None
        return loss, embeddings.transpose(0, 1).contiguous(), ids["text_ids"].T.contiguous()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            save_sentence_transformers_files(
                output_dir or self.args.output_dir,
                dimension=self.model.config.hidden_size,
                pooling=self.args.pooling,
                normalized=self.args.similarity == "cosine",
                max_length=self.max_length,
            )
            sync(Path(output_dir or self.args.output_dir))

    def create_model_card(self, model_name: str | None = None, tags: str | list[str] | None = None, **kwargs) -> None:
        """
        Writes `README.md` into the output folder: how to load the encoder, its training and its retrieval metrics.
        """
        if not self.is_world_process_zero():
            return
        tags = [tags] if isinstance(tags, str) else list(tags or [])
        base_model = self.model.name_or_path
        data = ModelCardData(
            library_name="sentence-transformers",
            pipeline_tag="sentence-similarity",
            tags=[*self._tag_names, *(tag for tag in tags if tag not in self._tag_names)],
            base_model=None if not base_model or os.path.isdir(base_model) else base_model,
        )
        name = model_name or os.path.basename(os.path.abspath(self.args.output_dir))
        repository = self.hub_model_id or name
        content = model_card_text(name, repository, self.args, self.max_length, self.state.log_history)
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n{content}").save(os.path.join(self.args.output_dir, "README.md"))


def _positives(dataset: Any) -> Any:
    """Leaves out the rows of pair sets that a label marks as no pairs."""
    if isinstance(dataset, Mapping):
        return {name: _positives(pairs) for name, pairs in dataset.items()}
    has_columns = isinstance(dataset, (Dataset, IterableDataset)) and dataset.column_names is not None
    return keep_positives(dataset) if has_columns else dataset


def _cheapest_number_of_passes(attention_mask: Tensor) -> int:
    """The number of passes (1, 2 or 4) over texts sorted by length that computes least."""
    lengths = attention_mask.sum(dim=1).sort().values

    def cost(passes: int) -> int:
        padded = sum(len(part) * int(part[-1]) for part in lengths.split(-(-len(lengths) // passes)))
        # Each pass computes a gradient of the whole embedding table, which costs as much as 500 tokens of a small
        # encoder.
        return padded + 500 * passes

    return min((1, 2, 4), key=cost)


def _loss_of(args: RetrieverTrainingArguments) -> MultipleNegativesRankingLoss:
    options = {
        "scale": args.scale,
        "similarity": args.similarity,
        "symmetric": args.symmetric,
        "gather_across_devices": args.gather_across_devices,
    }
    if args.mini_batch_size is None:
        return MultipleNegativesRankingLoss(**options)
    return CachedMultipleNegativesRankingLoss(mini_batch_size=args.mini_batch_size, **options)


def _compute_metrics(prediction: EvalPrediction, cosine: bool) -> dict[str, float]:
    """Looks up each anchor among the texts of all other columns. Equal texts count as one."""
    embeddings, text_ids = torch.from_numpy(prediction.predictions), prediction.label_ids  # [N, C, d], [N, C]
    embeddings = (normalize(embeddings, dim=-1) if cosine else embeddings).numpy()
    queries, first_query, query_of_row = np.unique(text_ids[:, 0], return_index=True, return_inverse=True)
    documents, first_document, document_of_text = np.unique(text_ids[:, 1:], return_index=True, return_inverse=True)
    positives = document_of_text.reshape(len(text_ids), -1)[:, 0]
    relevance = np.unique(np.stack([query_of_row.reshape(-1), positives], axis=1), axis=0)
    return retrieval_metrics(
        embeddings[first_query, 0],
        embeddings[:, 1:].reshape(-1, embeddings.shape[-1])[first_document],
        relevance,
    )
