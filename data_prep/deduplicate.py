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
Removes the training documents that nearly equal a held-out document: 13-gram Jaccard similarity of at least 0.8.

This stage runs after `chunk` of all splits and before `embed`. Candidates come from MinHash signatures (Broder 1997),
and each candidate is verified on the n-grams of its token ids. `duplicates.jsonl` lists the documents that were
removed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from datasketch import MinHash, MinHashLSH
from transformers.utils import logging

from data_prep.chunk import chunk_features
from data_prep.shard_writer import chunk_counts
from data_prep.stage_files import (
    directory_lock,
    discard,
    open_manifest,
    process_state,
    run_shards,
    save_shard,
    write_manifest,
)
from modeling_retro.datastore.checksums import verify_file
from modeling_retro.datastore.chunks import ChunkTable
from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.datastore.manifest import TRAIN_SPLIT, ChunkShard, ChunksStage, Deduplicated, Manifest
from modeling_retro.durable_files_retro import remove, replace, whole


logger = logging.get_logger(__name__)

_SIGNATURE_SIZE = 128
# Candidates need less similarity, because missing a duplicate is worse than verifying a document in vain.
_MARGIN = 0.6
_WORK = ".deduplicated-"


class NearDuplicates:
    """
    Finds the known document that a given document nearly equals.

    Args:
        threshold (`float`):
            Smallest Jaccard similarity of the sets of n-grams of two near duplicates.
        ngram (`int`): Number of tokens in an n-gram. A shorter document is one n-gram.
    """

    def __init__(self, threshold: float = 0.8, ngram: int = 13):
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must lie in (0, 1], got {threshold}")
        if ngram < 1:
            raise ValueError(f"ngram must be at least 1, got {ngram}")
        self.threshold = threshold
        self.ngram = ngram
        self._index = MinHashLSH(threshold=_MARGIN * threshold, num_perm=_SIGNATURE_SIZE)
        self._known: dict[Any, np.ndarray] = {}

    def add(self, key: Any, tokens: np.ndarray) -> None:
        """Adds a document with the token ids `tokens` [n] to the known ones, under `key`."""
        ngrams = self._ngrams(tokens)
        self._known[key] = ngrams
        self._index.insert(key, self._signature(ngrams))

    def find(self, tokens: np.ndarray) -> tuple[Any, float] | None:
        """Key and similarity of the most similar known document, if it is at least `threshold`."""
        ngrams = self._ngrams(tokens)
        matches = [
            (similarity, key)
            for key in self._index.query(self._signature(ngrams))
            if (similarity := _jaccard(ngrams, self._known[key])) >= self.threshold
        ]
        if not matches:
            return None
        similarity, key = max(matches, key=lambda match: (match[0], str(match[1])))
        return key, similarity

    def _ngrams(self, tokens: np.ndarray) -> np.ndarray:
        """The distinct n-grams as rows [g, ngram]. A document that is shorter than an n-gram is padded with -1."""
        tokens = np.asarray(tokens, dtype=np.int32)
        if len(tokens) < self.ngram:
            tokens = np.pad(tokens, (0, self.ngram - len(tokens)), constant_values=-1)
        windows = np.lib.stride_tricks.sliding_window_view(tokens, self.ngram)
        rows = np.ascontiguousarray(windows).view(f"V{4 * self.ngram}").reshape(-1)
        return np.unique(rows)

    def _signature(self, ngrams: np.ndarray) -> MinHash:
        signature = MinHash(num_perm=_SIGNATURE_SIZE, hashfunc=int)
        hashes = _hash(ngrams.view(np.uint32).reshape(len(ngrams), -1))
        for start in range(0, len(hashes), 8192):
            signature.update_batch(hashes[start : start + 8192])
        return signature


def _hash(rows: np.ndarray) -> np.ndarray:
    """Hashes rows of 32-bit integers to 32 bits by multiply and shift, modulo 2**64."""
    hashes = np.zeros(len(rows), dtype=np.uint64)
    for column in rows.T:
        hashes = (hashes ^ column) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(32)
    return hashes & np.uint64(0xFFFFFFFF)


def _jaccard(first: np.ndarray, second: np.ndarray) -> float:
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / (len(first) + len(second) - common)


def documents_of(columns: dict[str, np.ndarray]) -> Iterator[tuple[int, slice, np.ndarray]]:
    """Yields (document id, rows, token ids) of the documents of a shard of chunks, in order."""
    document_id, length, input_ids = columns["document_id"], columns["length"], columns["input_ids"]
    bounds = [*np.flatnonzero(np.diff(document_id, prepend=-1)), len(document_id)]
    for start, stop in pairwise(bounds):
        tokens = input_ids[start:stop].reshape(-1)[: (stop - start - 1) * input_ids.shape[1] + length[stop - 1]]
        yield int(document_id[start]), slice(int(start), int(stop)), tokens


def deduplicate_documents(
    datastore: str | Path,
    against: Sequence[str] = (),
    threshold: float = 0.8,
    ngram: int = 13,
    force: bool = False,
) -> Deduplicated:
    """
    Removes training documents that are near duplicates of documents of other splits.

    Args:
        datastore (`str` or `Path`): The datastore.
        against (`Sequence[str]`, *optional*): The splits of held-out documents. Defaults to all but `"train"`.
        threshold (`float`, *optional*, defaults to 0.8): Smallest Jaccard similarity of documents that are removed.
        ngram (`int`, *optional*, defaults to 13): Number of tokens in an n-gram.
        force (`bool`, *optional*, defaults to `False`): Whether to remove embeddings of chunks that change.

    Returns:
        [`Deduplicated`]: the record in the manifest: the numbers of removed `documents` and `chunks`, and the options.

    Raises:
        ValueError: If there is no held-out split, if no document would be left, or if the chunks are already embedded.
    """
    path = Path(datastore)
    with directory_lock(path):
        manifest = open_manifest(path)
        _finish(path, manifest.train.chunks)
        opened = RetroDatastore(path, manifest)
        stage = opened.split(TRAIN_SPLIT).record.chunks
        against = sorted(against or set(manifest.splits) - {TRAIN_SPLIT})
        if not against:
            raise ValueError(f"{path} has no held-out split; run `retro chunk --split validation` first")
        known = {name: opened.split(name).record.chunks.fingerprint for name in against}
        options = {"against": known, "threshold": threshold, "ngram": ngram}
        before = stage.deduplicated
        if before is None or before.options != options:
            before = Deduplicated(options, run="0", shards=0, documents=0, chunks=0)
        if before.shards == len(stage.shards):
            return before
        if len(manifest.train.embedding_shards) > before.shards:
            if not force:
                raise ValueError(
                    f"{path} is already embedded; deduplicate before that, or use --force to embed it again"
                )
            discard(path, manifest, TRAIN_SPLIT, "embeddings")
        if manifest.bm25 is not None and manifest.bm25.shards > before.shards:
            if not force:
                raise ValueError(
                    f"{path} is already indexed; deduplicate before that, or use --force to index it again"
                )
            discard(path, manifest, TRAIN_SPLIT, "bm25")
        return _remove_duplicates(path, manifest, opened, before)


def _remove_duplicates(path: Path, manifest: Manifest, opened: RetroDatastore, before: Deduplicated) -> Deduplicated:
    options, stage = before.options, manifest.train.chunks
    shards = stage.shards
    detector = NearDuplicates(options["threshold"], options["ngram"])
    for name in options["against"]:
        table = opened.split(name).chunks
        for index in range(len(table.folders)):
            for document, _, tokens in documents_of(table.shard(index)):
                detector.add((name, document), tokens)
    features = chunk_features(manifest.chunk_size, manifest.tokenizer.vocab_size)

    def make(index: int, temporary: Path, advance: Callable[[int], Any]) -> dict[str, Any]:
        folder = verify_file(path / "chunks" / shards[index].name, shards[index].sha256)
        keep, duplicates = _find_in_shard(detector, opened.chunks, index if index >= before.shards else None, advance)
        if not duplicates:
            shutil.copytree(folder, temporary, copy_function=os.link)
            return {**shards[index].to_dict(), "duplicates": []}
        columns = {name: column[keep] for name, column in opened.chunks.shard(index).items()}
        save_shard(temporary, columns, features)
        return {
            **shards[index].to_dict(),
            **chunk_counts(columns),
            "duplicates": duplicates,
        }

    names = [shard.name for shard in shards]
    # An interrupted run is resumed only if it compares the same chunks in the same way.
    run = hashlib.sha256(json.dumps([stage.fingerprint, before.to_dict()], sort_keys=True).encode()).hexdigest()[:16]
    sizes = [shard.documents for shard in shards]
    work = path / (_WORK + run)
    records = run_shards(work, [], names, make, description="Deduplicating", sizes=sizes, unit="documents")
    duplicates = [duplicate for record in records for duplicate in record.pop("duplicates")]
    shards = [ChunkShard.from_dict(record) for record in records]
    removed = stage.num_chunks - sum(shard.rows for shard in shards)
    if removed == stage.num_chunks:
        raise ValueError("every training document nearly equals a held-out document; nothing would be left")
    if process_state().is_main_process:
        report = path / "duplicates.jsonl"
        earlier = report.read_text(encoding="utf-8") if before.shards else ""
        with whole(report) as temporary:
            temporary.write_text(earlier + "".join(json.dumps(line) + "\n" for line in duplicates), encoding="utf-8")
    stage.deduplicated = Deduplicated(
        options,
        run,
        shards=len(shards),
        documents=before.documents + len(duplicates),
        chunks=before.chunks + removed,
    )
    stage.set_shards(shards)
    write_manifest(path, manifest)
    _finish(path, stage)
    return stage.deduplicated


def _find_in_shard(
    detector: NearDuplicates, table: ChunkTable, index: int | None, advance: Callable[[int], Any]
) -> tuple[np.ndarray | None, list[dict[str, Any]]]:
    """Mask of the rows to keep and the duplicates of a shard. Shards that were searched before are skipped."""
    if index is None:
        return None, []
    columns = table.shard(index)
    keep = np.ones(len(columns["length"]), dtype=bool)
    duplicates = []
    for document, rows, tokens in documents_of(columns):
        match = detector.find(tokens)
        advance(1)
        if match is not None:
            (split, other), similarity = match
            keep[rows] = False
            chunks = rows.stop - rows.start
            duplicates.append(
                {"document_id": document, "split": split, "of": other, "jaccard": similarity, "chunks": chunks}
            )
    return keep, duplicates


def _finish(path: Path, stage: ChunksStage | None) -> None:
    """
    Replaces all chunks by the remaining ones. The manifest already names these, so if this step is interrupted, the
    next run repeats only this step.
    """
    state = process_state()
    if stage is not None and stage.deduplicated is not None and state.is_main_process:
        work = path / (_WORK + stage.deduplicated.run)
        # Only the remaining chunks have records. If a kill came after both folders changed their names, the working
        # folder holds the former chunks, or what is left of them.
        if any(work.glob(".shard-*.json")):
            replace(work, path / "chunks")
        for file in (path / "chunks").glob(".shard-*.json"):
            file.unlink()
        for leftover in path.glob(f"{_WORK}*"):
            remove(leftover)
    state.wait_for_everyone()
