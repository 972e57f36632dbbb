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
"""Rows of consecutive chunks, and the batches that a model is trained on"""

from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.datastore.splits import DatastoreSplit

from .config import RetroTrainingArguments
from .teacher import TeacherPredictions


class ChunkRange(UserDict):
    """
    A row of [`ChunkRows`]. It is not a `dict`, because [`~transformers.Trainer`] removes the entries of a `dict` that
    are not arguments of the model's `forward`. The collator would then not receive the range.
    """


class ChunkRows(Dataset):
    """
    The chunks of a table, in rows of `row_chunks` consecutive chunks. No tokens are copied: an item is a range of
    chunk ids, which [`DataCollatorForRetro`] turns into tensors.

    The index of an item is `epoch * len(rows) + row`, as [`EpochRowSampler`] yields it. Every random choice for an
    item therefore depends on seed, epoch and row alone, and not on the process or worker that makes the item.

    Args:
        num_chunks (`int`):
            Number of chunks in the table.
        row_chunks (`int`):
            Number L of chunks in a row. The last row may have fewer.
    """

    def __init__(self, num_chunks: int, row_chunks: int):
        self.num_chunks = num_chunks
        self.row_chunks = row_chunks

    def __len__(self) -> int:
        return -(-self.num_chunks // self.row_chunks)

    def __getitem__(self, index: int) -> ChunkRange:
        epoch, row = divmod(index, len(self))
        start = row * self.row_chunks
        return ChunkRange(epoch=epoch, start=start, end=min(start + self.row_chunks, self.num_chunks))


class EpochRowSampler(Sampler[int]):
    """
    Yields `epoch * num_rows + row` for all rows, in an order that depends only on `seed` and the epoch.

    Args:
        num_rows (`int`):
            Number of rows in an epoch.
        seed (`int`):
            Seed of the order.
    """

    def __init__(self, num_rows: int, seed: int):
        self.num_rows = num_rows
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_rows)
        yield from (self.epoch * self.num_rows + order).tolist()


@dataclass
class DataCollatorForRetro:
    """
    Turns ranges of consecutive chunks into the inputs of [`RetroForCausalLM`]. Tokens and neighbors are gathered from
    the memory-mapped datastore.

    A row may hold several documents. `position_ids` restart at each document, so that documents do not attend to one
    another, and no `attention_mask` is needed. `labels` are -100 on padding and on the first token of each document,
    because the token before it belongs to another document.

    Args:
        datastore ([`RetroDatastore`]):
            The datastore of the neighbors.
        source ([`RetroDatastore`] or [`DatastoreSplit`], *optional*, defaults to `datastore`):
            The chunks of the rows.
        row_chunks (`int`, *optional*, defaults to `32`):
            Number of chunk slots L of a row. Shorter ranges are padded.
        num_neighbors (`int` or `Sequence[int]`, *optional*, defaults to `2`):
            Number k of neighbors of a chunk. If several numbers are given, each row draws one, and k is the largest.
        neighbor_dropout (`float`, *optional*, defaults to `0.0`):
            Probability that a chunk sees no neighbors.
        copy_share (`float`, *optional*, defaults to `0.0`):
            Probability that the first neighbor of a chunk is replaced by a noisy piece of the chunk's own document,
            which holds most of the next tokens (see [`DataCollatorForRetro.copy_pieces`]). Use it only in training.
        random_share (`float`, *optional*, defaults to `0.0`):
            Probability that the neighbors of a chunk are replaced by random chunks, so that the model learns not to
            trust every neighbor. Use it only in training.
        teacher ([`~trainers.language_model.teacher.TeacherPredictions`], *optional*):
            Predictions of a teacher to add to the batch. After a chunk whose neighbors were replaced, the predictions
            for the next chunk are left out.
        mark_random (`bool`, *optional*, defaults to `False`):
            Whether the batch says which tokens see random neighbors.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random choices, which depend only on it, the epoch and the row.

    Returns (with m the chunk size and r the neighbor length of the datastore):
        `dict[str, torch.Tensor]`: `input_ids`, `position_ids` and `labels` `int64 [B, L * m]`, `neighbor_input_ids`
        `int64 [B, L, k, r]` and `neighbor_attention_mask` `bool [B, L, k, r]`. With a teacher also `teacher_token_ids`
        `int64 [B, L * m, K]` and `teacher_log_probs` `float32 [B, L * m, K]`, and with `mark_random`
        `sees_random` `bool [B, L * m]`, which is true for the tokens of a chunk after one with random neighbors.

    Example with chunks of two tokens. The first document has three chunks, and the second has one (a token and a pad):

    ```python
    >>> collator = DataCollatorForRetro(datastore, row_chunks=2, num_neighbors=1)
    >>> batch = collator([{"epoch": 0, "start": 1, "end": 3}])
    >>> batch["input_ids"]
    tensor([[13, 14, 21,  0]])
    >>> batch["position_ids"]
    tensor([[0, 1, 0, 1]])
    >>> batch["labels"]
    tensor([[-100,   14, -100, -100]])
    ```
    """

    datastore: RetroDatastore
    source: RetroDatastore | DatastoreSplit | None = None
    row_chunks: int = 32
    num_neighbors: int | Sequence[int] = 2
    neighbor_dropout: float = 0.0
    copy_share: float = 0.0
    random_share: float = 0.0
    teacher: TeacherPredictions | None = None
    mark_random: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.source is None:
            self.source = self.datastore
        if isinstance(self.num_neighbors, int):
            self.num_neighbors = [self.num_neighbors]
        available = self.source.neighbor_ids.shape[1]
        if max(self.num_neighbors) > available:
            raise ValueError(
                f"num_neighbors is {max(self.num_neighbors)}, but only {available} neighbors a chunk are stored; run "
                "`retro neighbors` with a larger number"
            )

    def __call__(self, rows: Sequence[Mapping[str, int]]) -> dict[str, torch.Tensor]:
        start = np.array([row["start"] for row in rows])[:, None]
        end = np.array([row["end"] for row in rows])[:, None]
        chunk_ids = start + np.arange(self.row_chunks)  # [B, L]
        present = chunk_ids < end
        input_ids, mask = self.source.chunks.take(np.where(present, chunk_ids, -1))  # [B, L, m]

        begins_document = self._begins_document(chunk_ids, present)
        labels = np.where(mask, input_ids, -100)
        labels[..., 0][begins_document] = -100

        neighbor_ids = self.source.neighbor_ids[np.where(present, chunk_ids, 0), : max(self.num_neighbors)]
        seen = np.stack([self._seen_neighbors(row) for row in rows])  # [B, L, k]
        is_own = present & seen[..., 0]  # [B, L]: chunks that see neighbors of their own
        is_random = np.zeros_like(present)
        if self.random_share > 0:
            drawn = [self._draw_random(row) for row in rows]
            is_random = np.stack([chosen for chosen, _ in drawn])
            neighbor_ids = np.where(is_random[..., None], np.stack([ids for _, ids in drawn]), neighbor_ids)
            is_own &= ~is_random
        neighbor_ids = np.where(present[..., None] & seen, neighbor_ids, -1)
        neighbor_input_ids, neighbor_mask = self.datastore.take_neighbors(neighbor_ids)  # [B, L, k, r]
        if self.copy_share > 0:
            for row, ids, is_seen, tokens, token_mask in zip(
                rows, chunk_ids, is_own, neighbor_input_ids, neighbor_mask, strict=True
            ):
                generator = np.random.default_rng([self.seed, row["epoch"], row["start"], 1])
                copied = is_seen & (generator.random(self.row_chunks) < self.copy_share)  # [L]
                tokens[copied, 0], token_mask[copied, 0] = self.copy_pieces(ids[copied], generator)
                is_seen &= ~copied

        batch = {
            "input_ids": input_ids.reshape(len(rows), -1),
            "position_ids": self._positions(begins_document).reshape(len(rows), -1),
            "labels": labels.reshape(len(rows), -1),
            "neighbor_input_ids": neighbor_input_ids,
            "neighbor_attention_mask": neighbor_mask,
        }
        if self.mark_random:
            sees_random = np.zeros_like(mask)  # [B, L, m]
            sees_random[:, 1:] = is_random[:, :-1, None]
            batch["sees_random"] = sees_random.reshape(len(rows), -1)
        if self.teacher is not None:
            token_ids, log_probs = self.teacher.take(np.where(present, chunk_ids, -1))  # [B, L, m, K]
            # The teacher read the neighbors of the chunk before, which the model did not see.
            token_ids[:, 0] = -1
            token_ids[:, 1:][~is_own[:, :-1]] = -1
            batch["teacher_token_ids"] = token_ids.reshape(len(rows), -1, token_ids.shape[-1])
            batch["teacher_log_probs"] = log_probs.reshape(len(rows), -1, log_probs.shape[-1])
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}

    def copy_pieces(self, chunk_ids: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """
        Makes pieces of the chunks' own documents that take the place of neighbors. A piece is as long as a neighbor
        and starts up to half a chunk before or after the chunk. Up to 30 % of its tokens are replaced by other tokens
        of the pieces. From such pieces a model learns to find its place in a neighbor and to copy the text that
        follows, which it learns only slowly from natural neighbors. The noise prevents it from trusting neighbors
        blindly.

        Args:
            chunk_ids (`np.ndarray` of shape `(n,)`):
                The chunks, as rows of the source.
            generator (`np.random.Generator`):
                Generator of the starts and of the noise.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: tokens `int64 (n, r)` and their mask `bool (n, r)`, True for real tokens.
        """
        chunks, length = self.source.chunks, self.datastore.neighbor_length
        size = chunks.chunk_size
        around = chunk_ids[:, None] + np.arange(-1, 1 - (-length // size))  # [n, 2 + r / m]
        inside = np.clip(around, 0, len(chunks) - 1)
        same_document = (around == inside) & (chunks.document_id[inside] == chunks.document_id[chunk_ids][:, None])
        tokens, mask = chunks.take(np.where(same_document, around, -1))
        tokens, mask = (array.reshape(len(around), around.shape[1] * size) for array in (tokens, mask))
        start = size + generator.integers(-(size // 2), size // 2, len(chunk_ids), endpoint=True)
        columns = start[:, None] + np.arange(length)  # [n, r]
        tokens, mask = np.take_along_axis(tokens, columns, 1), np.take_along_axis(mask, columns, 1)
        if mask.any():
            noisy = mask & (generator.random(mask.shape) < generator.uniform(0, 0.3, len(mask))[:, None])
            tokens[noisy] = generator.choice(tokens[mask], np.count_nonzero(noisy))
        return tokens, mask

    def _draw_random(self, row: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
        """Draws the chunks of a row that see random neighbors, bool `[L]`, and these neighbors, int64 `[L, k]`."""
        generator = np.random.default_rng([self.seed, row["epoch"], row["start"], 2])
        chosen = generator.random(self.row_chunks) < self.random_share
        shape = (self.row_chunks, max(self.num_neighbors))
        return chosen, generator.integers(len(self.datastore.chunks), size=shape)

    def _begins_document(self, chunk_ids: np.ndarray, present: np.ndarray) -> np.ndarray:
        document_ids = np.where(present, self.source.chunks.document_id[np.where(present, chunk_ids, 0)], -1)
        begins = np.ones_like(present)  # [B, L]; the first chunk of a row begins a document, or the rest of one
        begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        return begins

    def _positions(self, begins_document: np.ndarray) -> np.ndarray:
        slots = np.arange(self.row_chunks)
        first_slot = np.maximum.accumulate(np.where(begins_document, slots, 0), axis=1)
        chunk_size = self.source.chunks.chunk_size
        return (slots - first_slot)[..., None] * chunk_size + np.arange(chunk_size)  # [B, L, m]

    def _seen_neighbors(self, row: Mapping[str, int]) -> np.ndarray:
        generator = np.random.default_rng([self.seed, row["epoch"], row["start"]])
        dropped = generator.random(self.row_chunks) < self.neighbor_dropout
        number = generator.choice(self.num_neighbors)
        return ~dropped[:, None] & (np.arange(max(self.num_neighbors)) < number)


def collator_options(args: RetroTrainingArguments) -> dict[str, Any]:
    """The options of [`DataCollatorForRetro`] among the training arguments."""
    names = ("row_chunks", "num_neighbors", "neighbor_dropout", "copy_share", "random_share", "seed")
    return {name: getattr(args, name) for name in names}


__all__ = ["ChunkRange", "ChunkRows", "DataCollatorForRetro", "EpochRowSampler", "collator_options"]
