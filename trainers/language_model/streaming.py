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
"""Trains on a stream of documents, with a position to which a resumed run returns exactly"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import IterableDataset, load_dataset
from torch import nn
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import get_worker_info
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from data_prep.chunker import DocumentChunker
from data_prep.documents import Document
from modeling_retro.datastore.splits import DatastoreSplit
from modeling_retro.retriever.retriever import RetroRetriever

from .collator import DataCollatorForRetro, collator_options
from .config import RetroTrainingArguments
from .trainer import RetroTrainer


POSITION_FILE = "stream_position.json"
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


def load_document_stream(name_or_path: str) -> IterableDataset:
    """
    Opens documents that are read one after another and never all at once.

    Args:
        name_or_path (`str`):
            File or glob of `.jsonl`, `.parquet` or `.txt` files, which may be compressed (a `.txt` file is one
            document), or the Hub id of a dataset, whose split `train` is read.

    Returns:
        `datasets.IterableDataset`: with a column `text`.

    Raises:
        `ValueError`: for files of another kind.
    """
    if "*" not in name_or_path and not Path(name_or_path).exists():
        return load_dataset(name_or_path, split="train", streaming=True)
    builder = next((BUILDERS[suffix] for suffix in Path(name_or_path).suffixes if suffix in BUILDERS), None)
    if builder is None:
        raise ValueError(f"cannot stream documents from {name_or_path}, expected a file of {', '.join(BUILDERS)}")
    options = {"sample_by": "document"} if builder == "text" else {}
    return load_dataset(builder, data_files=name_or_path, split="train", streaming=True, **options)


@dataclass
class StreamedRow:
    """
    Consecutive chunks of a stream.

    Args:
        input_ids (`np.ndarray`):
            Token ids `[n, m]`, padded with 0.
        length (`np.ndarray`):
            Number of tokens of each chunk `[n]`.
        document_id (`np.ndarray`):
            Number of the document in the stream to which each chunk belongs `[n]`.
        number (`int`):
            Number of rows before this one.
        position (`dict`):
            The position where the next row begins, for [`StreamedRows.position`].
    """

    input_ids: np.ndarray
    length: np.ndarray
    document_id: np.ndarray
    number: int
    position: dict[str, Any]


class StreamedRows(TorchIterableDataset):
    """
    Chunks of a stream of documents, in rows of `row_chunks`. The rows have no end: after the last document the first
    one comes again, in the next epoch of the stream. A document that is cut by the end of a row continues in the next
    row.

    Args:
        documents (`datasets.IterableDataset`):
            The documents, with a column `text`. The position of the stream must be exact, so do not use
            `IterableDataset.shuffle`, whose buffer is not saved. Shuffle the documents before they are written
            instead.
        chunker ([`DocumentChunker`]):
            Cuts the documents into chunks.
        row_chunks (`int`):
            Number of chunks in a row.
    """

    def __init__(self, documents: IterableDataset, chunker: DocumentChunker, row_chunks: int):
        self.documents = documents
        self.chunker = chunker
        self.row_chunks = row_chunks
        self.position: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[StreamedRow]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError("a stream has one position: set dataloader_num_workers to 0 or 1")
        start = self.position or {"epoch": 0, "documents": None, "chunks": 0, "document": 0, "row": 0}
        number, waiting = start["row"], []
        for columns, position in self._documents_from(start):
            skipped = position["chunks"]
            while skipped < len(columns["length"]):
                missing = self.row_chunks - sum(len(piece["length"]) for piece in waiting)
                piece = {name: column[skipped : skipped + missing] for name, column in columns.items()}
                skipped += len(piece["length"])
                waiting.append(piece)
                if len(piece["length"]) == missing:
                    number += 1
                    row = {name: np.concatenate([piece[name] for piece in waiting]) for name in columns}
                    yield StreamedRow(
                        **row, number=number - 1, position={**position, "chunks": skipped, "row": number}
                    )
                    waiting = []

    def _documents_from(self, start: dict[str, Any]) -> Iterator[tuple[dict[str, np.ndarray], dict[str, Any]]]:
        """Yields the chunks of each document from a position on, and the position before the first of these chunks."""
        state, skipped, document_id = start["documents"], start["chunks"], start["document"]
        for epoch in itertools.count(start["epoch"]):
            self.documents.set_epoch(epoch)
            if state is not None:
                self.documents.load_state_dict(state)
            # The state of a stream belongs to its last example. Before the first, it is the state that was loaded.
            before, found = state, False
            for example in self.documents:
                columns, _ = self.chunker.chunk([Document(_text_of(example, document_id), document_id)])
                del columns["num_bytes"]
                found = found or len(columns["length"]) > 0
                yield columns, {"epoch": epoch, "documents": before, "chunks": skipped, "document": document_id}
                before, skipped, document_id = self.documents.state_dict(), 0, document_id + 1
            if not found and state is None:
                raise ValueError("the stream has no document with text to train on")
            state = None


def _text_of(example: dict[str, Any], document_id: int) -> str:
    text = example.get("text")
    if not isinstance(text, str):
        raise ValueError(f'document {document_id} of the stream has {text!r} for "text", expected a string')
    return text


@dataclass
class _RowSource:
    """The chunks of one row with their neighbors, used in place of a split of the datastore."""

    row: StreamedRow
    neighbor_ids: np.ndarray

    def __post_init__(self):
        self.chunks = self
        self.chunk_size = self.row.input_ids.shape[1]
        self.document_id = self.row.document_id

    def __len__(self) -> int:
        return len(self.document_id)

    def take(self, chunk_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        length = np.where(chunk_ids >= 0, self.row.length[chunk_ids], 0)
        mask = np.arange(self.chunk_size) < length[..., None]
        return self.row.input_ids[chunk_ids].astype(np.int64) * mask, mask


@dataclass
class StreamCollator:
    """
    Looks up the neighbors of the chunks of streamed rows and makes a batch of them, as [`DataCollatorForRetro`] does
    for chunks of the datastore. `stream_position` is the position after the last row, in JSON.

    Args:
        retriever ([`RetroRetriever`]):
            Looks up the chunks.
        options (`dict`):
            Options of [`DataCollatorForRetro`].
    """

    retriever: RetroRetriever
    options: dict[str, Any]

    def __call__(self, rows: list[StreamedRow]) -> dict[str, Any]:
        batches = [self._batch_of(row) for row in rows]
        batch = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        return {**batch, "stream_position": json.dumps(rows[-1].position)}

    def _batch_of(self, row: StreamedRow) -> dict[str, torch.Tensor]:
        k = max(self.options["num_neighbors"])
        neighbor_ids = np.full((len(row.length), k), -1)
        # An incomplete chunk is the last of its document, so no token would see its neighbors.
        whole = row.length == row.input_ids.shape[1]
        if whole.any():
            chunks = torch.from_numpy(row.input_ids[whole].astype(np.int64))
            neighbor_ids[whole] = self.retriever.retrieve(chunks, k).chunk_ids.numpy()
        source = _RowSource(row, neighbor_ids)
        collator = DataCollatorForRetro(self.retriever.datastore, source=source, **self.options)
        # The number of the row seeds the random choices for it.
        return collator([{"epoch": row.number, "start": 0, "end": len(row.length)}])


class RetroStreamTrainer(RetroTrainer):
    """
    [`RetroTrainer`] for a stream of documents in place of the chunks of the datastore. Neighbors are looked up during
    the training. The documents should not be in the datastore, because they would find themselves.

    A checkpoint holds the position in the stream, so that a resumed run continues with the next row. Only the file in
    which the run stopped is read again.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model to train.
        args ([`RetroTrainingArguments`]):
            The arguments of the training, with `max_steps`.
        retriever ([`RetroRetriever`]):
            Looks up neighbors in its datastore.
        documents (`datasets.IterableDataset`):
            The documents to train on (see [`StreamedRows`]).
        eval_dataset ([`DatastoreSplit`], *optional*):
            Held-out documents with their neighbors.
        kwargs:
            Passed to [`~transformers.Trainer`].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: RetroTrainingArguments,
        retriever: RetroRetriever,
        documents: IterableDataset,
        eval_dataset: DatastoreSplit | None = None,
        **kwargs: Any,
    ):
        if args.max_steps < 1:
            raise ValueError("max_steps is not set, and a stream has no end: say how many steps to train")
        # Every process reads the stream and looks up its own rows. A resumed run starts at the position of the stream.
        args.accelerator_config.dispatch_batches = False
        args.ignore_data_skip = True
        self._stream_position: str | None = None
        datastore = retriever.datastore
        allow_control_tokens = datastore.manifest.allow_control_tokens
        chunker = DocumentChunker(datastore.tokenizer, datastore.chunk_size, allow_control_tokens)
        super().__init__(
            model,
            args,
            datastore,
            eval_dataset,
            train_dataset=StreamedRows(documents, chunker, args.row_chunks),
            data_collator=StreamCollator(retriever, collator_options(args)),
            **kwargs,
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, torch.Tensor | int | None]:
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        for batch in batches:
            self._stream_position = batch.pop("stream_position")
        return batches, num_items_in_batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # A stream has no epochs to count, so the share of the training that is done is logged.
        self.state.epoch = self.state.global_step / self.state.max_steps
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # The last process has the last rows of a step.
        position = broadcast_object_list([self._stream_position], from_process=self.args.world_size - 1)[0]
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / POSITION_FILE).write_text(position + "\n", encoding="utf-8")
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / POSITION_FILE
        if not path.exists():
            raise ValueError(f"{resume_from_checkpoint} is not of a training on a stream: it has no {POSITION_FILE}")
        self.train_dataset.position = json.loads(path.read_text(encoding="utf-8"))
