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
"""Copies a datastore into a database that searches vectors, where several machines can search it"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers.utils import logging

from data_prep.index import read_embeddings
from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.datastore.manifest import TRAIN_SPLIT
from modeling_retro.engines.engine import COLUMNS
from modeling_retro.engines.remote import open_engine


logger = logging.get_logger(__name__)

# What a reader needs to know of a datastore that was exported.
_FIELDS = (
    "format_version",
    "version",
    "chunk_size",
    "continuation_chunks",
    "allow_control_tokens",
    "tokenizer",
    "encoder",
)
_COUNTS = ("fingerprint", "num_chunks", "num_documents", "num_tokens", "num_bytes")


def export_datastore(
    path: str | Path, url: str, index: str = "hnsw", batch_size: int = 1000, force: bool = False
) -> dict[str, Any]:
    """
    Copies the searched chunks of a datastore and their embeddings to a database. An interrupted export resumes. Until
    its last step, the copy is marked as incomplete and nobody can open it.

    Args:
        path (`str` or `Path`): The datastore, with embeddings.
        url (`str`): Address of the database (see [`~modeling_retro.engines.engine.Engine`]).
        index (`str`, *optional*, defaults to `"hnsw"`): `"hnsw"`, or `"flat"` for exact search.
        batch_size (`int`, *optional*, defaults to 1,000): Number of chunks in a request.
        force (`bool`, *optional*, defaults to `False`): Whether to replace another datastore of this tenant.

    Returns:
        `dict`: `address` without user and password, and `chunks`, their number.

    Raises:
        ValueError: If the datastore has no embeddings or holds removed documents, if another datastore is there, or if
            the URL is not understood.
        ConnectionError: If the database does not answer.
    """
    if index not in ("hnsw", "flat"):
        raise ValueError(f"index is {index!r}, expected hnsw or flat")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    datastore = RetroDatastore.from_pretrained(path)
    datastore.check_compact("the database")
    manifest = datastore.manifest
    embeddings = read_embeddings(datastore.path, TRAIN_SPLIT, manifest)
    chunks = datastore.chunks
    train, fields = manifest.train.chunks, manifest.to_dict()
    header = {
        "manifest": {name: fields[name] for name in _FIELDS if name in fields}
        | {"splits": {TRAIN_SPLIT: {"chunks": {name: getattr(train, name) for name in _COUNTS}}}},
        "metric": manifest.index.metric if manifest.index is not None else "inner_product",
        "tokenizer": {
            file.name: file.read_text(encoding="utf-8")
            for file in sorted((datastore.path / "tokenizer").iterdir())
            if file.suffix in (".json", ".jinja")
        },
    }
    fingerprint = f"{train.fingerprint} {manifest.encoder.sha256}"
    engine = open_engine(url)
    try:
        state = engine.read_state()
        if state is not None and (state["fingerprint"], state["index"]) != (fingerprint, index):
            if not force:
                raise ValueError(
                    f"{engine.address} holds another datastore or another index; choose another ?collection= or "
                    "?tenant=, or replace it with --force"
                )
            engine.delete()
            state = None
        if state is None or not state["complete"]:
            engine.create(manifest.encoder.dim, header["metric"], index)
            if state is None:
                engine.write_header(header, fingerprint, index)
            # Batches are stored in order, so only the last one can be in doubt.
            start = max(0, min(engine.count(), len(chunks)) // batch_size - 1) * batch_size
            with tqdm(
                total=len(chunks), initial=start, desc=f"Exporting to {engine.parts.scheme}", unit="chunk"
            ) as bar:
                for first, columns in _batches(datastore, embeddings, start, batch_size):
                    engine.insert(first, columns)
                    bar.update(len(columns["embedding"]))
            engine.finish(header["metric"], index)
            found = engine.count()
            if found != len(chunks):
                raise ValueError(f"{engine.address} holds {found} chunks, expected {len(chunks)}; use --force")
            engine.mark_complete()
        logger.info("%s holds %d chunks", engine.address, len(chunks))
        return {"address": engine.address, "chunks": len(chunks)}
    finally:
        engine.disconnect()


def _batches(
    datastore: RetroDatastore, embeddings: list[np.ndarray], start: int, batch_size: int
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Consecutive chunks from `start` on: the id of the first, and their columns with float32 embeddings."""
    chunks = datastore.chunks
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in embeddings])])
    for first in range(start, len(chunks), batch_size):
        stop = min(first + batch_size, len(chunks))
        columns = {name: chunks.gather(name, np.arange(first, stop)) for name in COLUMNS}
        shards = range(np.searchsorted(offsets, first, "right") - 1, np.searchsorted(offsets, stop, "left"))
        parts = [embeddings[i][max(0, first - offsets[i]) : stop - offsets[i]] for i in shards]
        columns["embedding"] = np.concatenate(parts).astype(np.float32)
        yield first, columns
