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
Makes a teacher for a model that reads neighbors. The teacher is the same decoder, or a larger one with the same
vocabulary, which reads the neighbor in front of its window. Its most probable next tokens are computed and stored
once, and training pulls the model towards them (block distillation, arXiv 2605.15913; CEPED, arXiv 2402.16617).
"""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Features, List, Value
from transformers import PreTrainedModel

from data_prep.stage_files import directory_lock, process_state, run_shards, save_shard
from modeling_retro.datastore.chunks import read_columns
from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.datastore.manifest import TRAIN_SPLIT
from modeling_retro.datastore.splits import DatastoreSplit
from modeling_retro.durable_files_retro import write_json
from trainers.evaluation.in_front import rows_in_front
from trainers.evaluation.predictions import predictions


TEACHER_NAME = "teacher.json"
ROWS_PER_SHARD = 32  # a run that is killed loses at most one shard


def teach(
    datastore: str | Path,
    model: PreTrainedModel,
    output_dir: str | Path,
    split: str = TRAIN_SPLIT,
    row_chunks: int = 8,
    num_neighbors: int = 1,
    top_tokens: int = 50,
    batch_size: int = 8,
) -> dict[str, Any]:
    """
    Stores the predictions of a teacher for each token of a split. A row of `row_chunks` chunks is a window. The
    teacher reads a chunk together with the earlier chunks of the same document in its row, and with the neighbors of
    the chunk before it in front. The first chunk of a document or row has no neighbors and is left out.

    Args:
        datastore (`str` or `Path`):
            The datastore, with neighbors of the split.
        model ([`~transformers.PreTrainedModel`]):
            The teacher: a RETRO model of either kind, which runs without retrieval.
        output_dir (`str` or `Path`):
            Folder to write to. If it holds an interrupted run, that run is resumed.
        split (`str`, *optional*, defaults to `"train"`):
            The split for training.
        row_chunks (`int`, *optional*, defaults to 8):
            Number of chunks in a row of the training, `RetroTrainingArguments.row_chunks`.
        num_neighbors (`int`, *optional*, defaults to 1):
            Number of neighbors in front of the window.
        top_tokens (`int`, *optional*, defaults to 50):
            Number of most probable tokens that are stored for each position.
        batch_size (`int`, *optional*, defaults to 8):
            Number of chunks in a forward pass.

    Returns:
        `dict`: the contents of `teacher.json`.

    Raises:
        ValueError: If the folder holds another teacher, or the split has too few neighbors.
    """
    opened, folder = RetroDatastore.from_pretrained(datastore), Path(output_dir)
    opened.check_model(model.config)
    opened.check_compact("a teacher")
    source = opened.split(split)
    if not 1 <= num_neighbors <= source.neighbor_ids.shape[1]:
        raise ValueError(
            f"num_neighbors is {num_neighbors}, expected 1 to the {source.neighbor_ids.shape[1]} neighbors of a chunk "
            "that are stored; run `retro neighbors` for more"
        )
    size, num_chunks = opened.chunk_size, len(source.chunks)
    options = {
        "split": split,
        "chunks": source.record.chunks.fingerprint,
        "row_chunks": row_chunks,
        "num_neighbors": num_neighbors,
        "top_tokens": top_tokens,
        "vocab_size": model.config.vocab_size,
        "base": getattr(model.config, "base_model_sha256", None),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with directory_lock(folder):
        if (folder / TEACHER_NAME).exists():
            _check_options(folder, options)
        _write_manifest(folder, {"options": options, "shards": []})
        features = Features(
            {
                "token_ids": List(Value("int32"), length=size * top_tokens),
                "log_probs": List(Value("float16"), length=size * top_tokens),
            }
        )
        shard_chunks = row_chunks * ROWS_PER_SHARD
        names = [f"shard-{number:05d}" for number in range(-(-num_chunks // shard_chunks))]
        document_id = source.chunks.document_id

        @torch.inference_mode()
        def make(shard: int, temporary: Path, advance: Callable[[int], Any]) -> dict[str, Any]:
            first, end = shard * shard_chunks, min((shard + 1) * shard_chunks, num_chunks)
            token_ids = np.full((end - first, size, top_tokens), -1, dtype=np.int32)
            log_probs = np.zeros((end - first, size, top_tokens), dtype=np.float16)
            jobs = [
                (chunk, start)
                for chunk in range(first, end)
                if (start := _window_start(document_id, chunk, row_chunks)) < chunk
            ]
            jobs.sort(key=lambda job: job[0] - job[1])
            for begin in range(0, len(jobs), batch_size):
                batch = jobs[begin : begin + batch_size]
                neighbor_ids = source.neighbor_ids[:, :num_neighbors]
                front = rows_in_front(opened, source, batch, neighbor_ids, model.device)
                chunks = np.array([chunk - first for chunk, _ in batch])[front.rows.cpu().numpy()]
                inputs = {"input_ids": front.input_ids}
                for block, logits in predictions(model, inputs, front.rows, front.columns - 1):
                    top = F.log_softmax(logits, dim=-1).topk(top_tokens)
                    taught = chunks[block.cpu().numpy()], front.places[block].cpu().numpy()
                    token_ids[taught], log_probs[taught] = top.indices.cpu().numpy(), top.values.cpu().numpy()
                advance(len(batch))
            columns = {"token_ids": token_ids, "log_probs": log_probs}
            save_shard(
                temporary, {name: values.reshape(end - first, -1) for name, values in columns.items()}, features
            )
            return {"rows": end - first}

        was_training = model.training
        model.eval()
        sizes = [min(shard_chunks, num_chunks - first) for first in range(0, num_chunks, shard_chunks)]
        shards = run_shards(folder, [], names, make, description="Teaching", sizes=sizes)
        model.train(was_training)
        manifest = {"options": options, "shards": shards}
        _write_manifest(folder, manifest)
        return manifest


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    if process_state().is_main_process:
        write_json(folder / TEACHER_NAME, manifest)
    process_state().wait_for_everyone()


def _check_options(folder: Path, expected: dict[str, Any]) -> None:
    found = json.loads((folder / TEACHER_NAME).read_text(encoding="utf-8"))["options"]
    for name, value in expected.items():
        if found.get(name) != value:
            raise ValueError(
                f"the teacher in {folder} was made with {name} {found.get(name)!r}, not {value!r}; write to another "
                "folder"
            )


def _window_start(document_id: np.ndarray, chunk: int, row_chunks: int) -> int:
    """The first chunk in the row of a chunk that belongs to the same document as the chunk."""
    row = chunk // row_chunks * row_chunks
    return row + int(np.searchsorted(document_id[row : chunk + 1], document_id[chunk]))


class TeacherPredictions:
    """
    The predictions of a teacher for the tokens of a split, read from the files that [`teach`] wrote.

    Args:
        folder (`str` or `Path`):
            The folder.
        source ([`RetroDatastore`] or [`DatastoreSplit`]):
            The split for training.
        row_chunks (`int`):
            Number of chunks in a row of the training.

    Raises:
        ValueError: If the folder belongs to another split or to other rows, or is not finished.
    """

    def __init__(self, folder: str | Path, source: RetroDatastore | DatastoreSplit, row_chunks: int):
        self.folder = Path(folder)
        path = self.folder / TEACHER_NAME
        if not path.is_file():
            raise ValueError(f"{folder} has no {TEACHER_NAME}; make a teacher with `retro teach`")
        manifest = json.loads(path.read_text(encoding="utf-8"))
        options, shards = manifest["options"], manifest["shards"]
        source = source.split(TRAIN_SPLIT) if isinstance(source, RetroDatastore) else source
        expected = {"chunks": source.record.chunks.fingerprint, "row_chunks": row_chunks}
        for name, value in expected.items():
            if options[name] != value:
                raise ValueError(
                    f"the teacher in {folder} was made for {name} {options[name]!r}, the training has {value!r}; run "
                    "`retro teach` for this training"
                )
        if sum(shard["rows"] for shard in shards) != len(source.chunks):
            raise ValueError(f"the teacher in {folder} is not finished; run `retro teach` again")
        self.shard_chunks = row_chunks * ROWS_PER_SHARD
        self.shape = (source.chunks.chunk_size, options["top_tokens"])
        self.names = [shard["name"] for shard in shards]
        self._shard = lru_cache(maxsize=64)(lambda index: read_columns(self.folder / self.names[index]))

    def take(self, chunk_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        Returns the tokens that the teacher considers most probable in the place of each token of chunks.

        Args:
            chunk_ids (`np.ndarray`): int64 `[...]`, -1 for absent chunks.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: token ids int64 `[..., m, K]`, -1 where the teacher has no prediction, and
            log probabilities float32 `[..., m, K]`.
        """
        flat = np.asarray(chunk_ids, dtype=np.int64).reshape(-1)
        token_ids = np.full((len(flat), *self.shape), -1, dtype=np.int64)
        log_probs = np.zeros((len(flat), *self.shape), dtype=np.float32)
        for index in np.unique(flat[flat >= 0] // self.shard_chunks):
            chosen = (flat >= 0) & (flat // self.shard_chunks == index)
            rows, columns = flat[chosen] - index * self.shard_chunks, self._shard(int(index))
            token_ids[chosen] = columns["token_ids"][rows].reshape(-1, *self.shape)
            log_probs[chosen] = columns["log_probs"][rows].reshape(-1, *self.shape)
        shape = (*np.shape(chunk_ids), *self.shape)
        return token_ids.reshape(shape), log_probs.reshape(shape)


def teacher_loss(
    logits: torch.Tensor, token_ids: torch.LongTensor, log_probs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Computes the Kullback-Leibler divergence of a model from its teacher, over the tokens that the teacher names and
    over all other tokens taken together.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, T, V)`):
            Logits of the model.
        token_ids (`torch.LongTensor` of shape `(batch_size, T, K)`):
            The most probable tokens of the teacher in the place of each token of the row, -1 where it has none.
        log_probs (`torch.Tensor` of shape `(batch_size, T, K)`):
            Log probabilities of these tokens.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the sum over all places with a prediction of the teacher, in nats, and the
        number of these places.
    """
    is_taught = token_ids[:, 1:, 0] >= 0  # [B, T - 1]; the logits before a token predict it
    log_p = log_probs[:, 1:][is_taught].float()  # [N, K]
    log_q = F.log_softmax(logits[:, :-1][is_taught].float(), dim=-1).gather(1, token_ids[:, 1:][is_taught])
    # Rounding could make the probability of the other tokens negative.
    rest_p = (1 - log_p.exp().sum(-1)).clamp(min=1e-6)
    rest_q = (1 - log_q.exp().sum(-1)).clamp(min=1e-6)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1) + rest_p * (rest_p.log() - rest_q.log())
    return divergence.sum(), is_taught.sum()


__all__ = ["TeacherPredictions", "teach", "teacher_loss"]
