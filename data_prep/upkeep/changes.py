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
Adds, updates and removes documents of a datastore while others read it.

Each function makes one new version (see `next_version`). A reader keeps the version that it opened. A reader that
opens the datastore afterwards never finds a removed document.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from transformers.utils import logging

from data_prep.chunk import append_documents, chunk_features
from data_prep.deduplicate import deduplicate_documents
from data_prep.documents import Document
from data_prep.embed import embed_chunks
from data_prep.index import build_index, read_embeddings
from data_prep.neighbors import find_neighbors, is_stale, neighbor_features
from data_prep.shard_writer import chunk_counts
from data_prep.sources import describe_sources, find_sources
from data_prep.stage_files import (
    clear_records,
    directory_lock,
    open_manifest,
    process_state,
    run_shards,
    save_shard,
    write_manifest,
)
from data_prep.upkeep.next_version import change_datastore, check_changeable, finish_change
from modeling_retro.datastore.checksums import checksum, verify_file
from modeling_retro.datastore.chunks import read_columns
from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.datastore.manifest import (
    TRAIN_SPLIT,
    ChunkShard,
    CompactedDocuments,
    DocumentList,
    EmbeddingShard,
    Manifest,
    NeighborShard,
    RemovedDocuments,
    chunks_fingerprint,
)
from modeling_retro.datastore.splits import drop_neighbors, split_path
from modeling_retro.durable_files_retro import whole


logger = logging.get_logger(__name__)

Input = str | Path | Dataset | IterableDataset | Mapping[str, Any]
Inputs = Input | Sequence[Input]


def add_documents(
    datastore: str | Path, inputs: Inputs, refresh_neighbors: bool = False, repeat: bool = False
) -> Manifest:
    """
    Adds documents to the searched ones. They are chunked with the options of the datastore, deduplicated if the
    datastore was, embedded and indexed, and they get neighbors if the other documents have neighbors.

    Args:
        datastore (`str` or `Path`): The datastore.
        inputs (`str`, `Path`, `datasets.Dataset` or a sequence of them):
            Files, folders, globs, `"-"` for jsonl on standard input, or datasets. All of them are added, even if they
            were added before, unless the last change added the very same inputs: then the current version has them.
        refresh_neighbors (`bool`, *optional*, defaults to `False`):
            Whether to search the neighbors of the earlier chunks again. If not, these chunks keep their neighbors,
            which are marked as stale.
        repeat (`bool`, *optional*, defaults to `False`):
            Whether to add the inputs once more if the last change added them.

    Returns:
        [`Manifest`]: the manifest of the new version.

    Raises:
        ValueError: If a record is bad, if no document has text, or if the datastore cannot be changed.
    """
    path = Path(datastore)
    request = {"command": "add", "inputs": _describe(inputs, path), "refresh_neighbors": refresh_neighbors}

    def make(folder: Path) -> bool:
        before = open_manifest(path)
        _append(folder, before, inputs)
        _bring_up_to_date(folder, before, refresh_neighbors)
        return True

    return change_datastore(path, request, make, repeat)


def remove_documents(
    datastore: str | Path, documents: Sequence[int | str], refresh_neighbors: bool = False
) -> Manifest:
    """
    Removes documents from the searched ones. Their chunks are never returned from now on, and [`compact_datastore`]
    removes them from the disk. Documents that were removed before are ignored.

    Args:
        datastore (`str` or `Path`): The datastore.
        documents (`Sequence[int]` or `Sequence[str]`):
            Numbers of the documents (`document_ids` of retrieved neighbors), or the user's own ids if the datastore
            was chunked with an `id_column`.
        refresh_neighbors (`bool`, *optional*, defaults to `False`):
            Whether to search the stored neighbors again. If not, they lack the removed documents and are marked as
            stale.

    Returns:
        [`Manifest`]: the manifest of the new version, or the current one if all documents were removed before.

    Raises:
        ValueError: If there is no such document, or no document would be left.
    """
    path = Path(datastore)
    with directory_lock(path):
        finish_change(path)
        manifest = open_manifest(path)
        check_changeable(path, manifest)
        numbers = _numbers_of(path, manifest, documents)
        opened = RetroDatastore(path, manifest)
        removed = np.union1d(opened.removed_documents, numbers)
        if len(removed) == len(opened.removed_documents):
            logger.warning(f"the documents were removed from {path} before")
            return manifest
        if np.isin(opened.chunks.document_id, removed).all():
            raise ValueError(f"no document of {path} would be left; delete the folder instead")
        request = {"command": "remove", "documents": numbers.tolist(), "refresh_neighbors": refresh_neighbors}

        def make(folder: Path) -> bool:
            _set_removed(folder, removed)
            _bring_up_to_date(folder, manifest, refresh_neighbors)
            return True

        return change_datastore(path, request, make)


def update_documents(datastore: str | Path, inputs: Inputs, refresh_neighbors: bool = False) -> Manifest:
    """
    Adds documents, and removes the earlier documents with the same ids. A document that already exists with the same
    tokens stays as it is.

    Args:
        datastore (`str` or `Path`): The datastore, chunked with an `id_column`.
        inputs (`str`, `Path`, `datasets.Dataset` or a sequence of them): As [`add_documents`] takes them.
        refresh_neighbors (`bool`, *optional*, defaults to `False`): As [`add_documents`] takes it.

    Returns:
        [`Manifest`]: the manifest of the new version, or the current one if no document is new or changed.

    Raises:
        ValueError: If the documents of the datastore have no ids of their own, or for the reasons of
            [`add_documents`].
    """
    path = Path(datastore)
    request = {"command": "update", "inputs": _describe(inputs, path), "refresh_neighbors": refresh_neighbors}

    def make(folder: Path) -> bool:
        before = open_manifest(path)
        if not has_own_ids(before):
            raise ValueError(
                f"{path} was chunked without --id_column, so nothing says which documents the new ones replace; use "
                "`retro remove` and `retro add`"
            )
        opened = RetroDatastore(path, before)
        known = living_documents(opened)
        starts, stops = (np.searchsorted(opened.chunks.document_id, list(known.values()), side) for side in _SIDES)
        rows = dict(zip(known, zip(starts.tolist(), stops.tolist(), strict=True), strict=True))

        def is_known(document: Document, tokens: np.ndarray) -> bool:
            if document.name not in rows:
                return False
            old = opened.chunks.gather("input_ids", np.arange(*rows[document.name]))
            return np.array_equal(old, tokens)

        new_shards = _append(folder, before, inputs, is_known)
        if not any(shard.rows for shard in new_shards):
            return False
        _note_left_out(folder, before)
        ids, numbers = _own_ids(folder, new_shards)
        # If several new documents have the same id, the last one that differs from the old one counts.
        last = dict(zip(ids, numbers, strict=True))
        replaced = [known[name] for name in last if name in known]
        repeated = [number for name, number in zip(ids, numbers, strict=True) if name and last[name] != number]
        if replaced or repeated:
            _set_removed(folder, np.union1d(opened.removed_documents, [*replaced, *repeated]))
        _bring_up_to_date(folder, before, refresh_neighbors)
        return True

    return change_datastore(path, request, make)


def compact_datastore(datastore: str | Path, refresh_neighbors: bool = False) -> Manifest:
    """
    Removes the chunks and embeddings of removed documents from the disk, as soon as no earlier version is read, and
    builds the index again without them. Documents keep their numbers, and chunks get new ones.

    Args:
        datastore (`str` or `Path`): The datastore.
        refresh_neighbors (`bool`, *optional*, defaults to `False`):
            Whether to search stale neighbors again. If not, they stay stale.

    Returns:
        [`Manifest`]: the manifest of the new version, or the current one if no document was removed.
    """
    path = Path(datastore)
    with directory_lock(path):
        finish_change(path)
        before = open_manifest(path)
        if before.removed is None:
            return before

        def make(folder: Path) -> bool:
            if open_manifest(folder).removed is not None:
                _fold_away(folder)
            _bring_up_to_date(folder, before, refresh_neighbors)
            return True

        return change_datastore(path, {"command": "compact", "refresh_neighbors": refresh_neighbors}, make)


def describe_version(manifest: Manifest) -> str:
    """Describes a version in one line: its number, its contents, and the share of stored neighbors that is stale."""
    chunks, removed = manifest.train.chunks, manifest.removed
    gone = (0, 0) if removed is None else (removed.chunks, removed.documents)
    line = (
        f"version {manifest.version}: {chunks.num_chunks - gone[0]} chunks of "
        f"{chunks.num_documents - gone[1]} documents"
    )
    if gone[1]:
        line += f"; {gone[0]} chunks of {gone[1]} removed documents wait for `retro compact`"
    shards = [shard for record in manifest.splits.values() for shard in record.neighbor_shards]
    stale = sum(is_stale(shard, manifest) for shard in shards)
    if stale:
        line += f"; the neighbors of {stale} of {len(shards)} shards were found in an earlier version"
    return line


def has_own_ids(manifest: Manifest) -> bool:
    """Whether the searched documents have ids of the user."""
    return manifest.train.chunks is not None and manifest.train.chunks.options.get("id_column") is not None


_SIDES = ("left", "right")


def _describe(inputs: Inputs, path: Path) -> list[dict[str, Any]]:
    """Describes inputs, so that a resumed run recognizes them. A stream never equals another."""
    entries = [inputs] if isinstance(inputs, (str, Path, Dataset, IterableDataset, Mapping)) else list(inputs)
    streams = [isinstance(entry, Mapping) and entry.get("streaming") for entry in entries]
    streams += [isinstance(entry, IterableDataset) or (isinstance(entry, str) and entry == "-") for entry in entries]
    if any(streams):
        return broadcast_object_list([[{"streamed": time.time_ns()}]])[0]
    return [record.to_dict() for record in describe_sources(find_sources(entries), path)]


def _append(
    folder: Path,
    before: Manifest,
    inputs: Inputs,
    is_known: Callable[[Document, np.ndarray], bool] | None = None,
) -> list[ChunkShard]:
    """Chunks new documents and returns the records of their shards."""
    stage = before.train.chunks
    if not stage.parts:
        raise ValueError(f"{folder.parent} was imported, its documents were not read here; nothing can be added to it")
    if stage.options["max_chunks"] is not None:
        raise ValueError(f"{folder.parent} was cut by max_chunks; nothing can be added to it")
    known = len(stage.sources)
    shards = append_documents(folder, inputs, known, is_known).shards[len(stage.shards) :]
    if is_known is None and not any(shard.rows for shard in shards):
        raise ValueError("the inputs hold no documents with text; nothing is added")
    if stage.deduplicated is not None:
        options = stage.deduplicated.options
        deduplicate_documents(folder, sorted(options["against"]), options["threshold"], options["ngram"])
    return shards


def _note_left_out(folder: Path, before: Manifest) -> None:
    """
    Notes the new documents that were already known, which have numbers but no chunks, so that shards can be restored.
    """
    manifest = open_manifest(folder)
    parts = manifest.train.chunks.parts[len(before.train.chunks.parts) :]
    numbers = [np.arange(part.stop - part.start) + part.first_document_id for part in parts]
    gone = np.setdiff1d(np.concatenate(numbers), RetroDatastore(folder, manifest).chunks.document_id)
    if len(gone):
        gone = np.union1d(_read_numbers(folder, manifest.compacted), gone)
        manifest.compacted = CompactedDocuments(**_write_numbers(folder, f"compacted-{manifest.version}", gone))
        write_manifest(folder, manifest)


def _bring_up_to_date(folder: Path, before: Manifest, refresh_neighbors: bool) -> None:
    """Embeds and indexes new chunks and finds their neighbors, as far as the version `before` had these stages."""
    manifest = open_manifest(folder)
    train = manifest.train
    if train.embeddings is not None and len(train.embedding_shards) < len(train.chunk_shards):
        embed_chunks(folder, **train.embeddings.options)
    if before.index is not None:
        build_index(folder, **before.index.options)
    if before.bm25 is not None:
        from data_prep.bm25_index import build_bm25_index  # needs a library that other datastores do not need

        build_bm25_index(folder, **before.bm25.options)
    manifest = open_manifest(folder)
    for split, record in manifest.splits.items():
        stage = record.neighbors
        if stage is None:
            continue
        if refresh_neighbors:
            stage.shards = [shard for shard in stage.shards if not is_stale(shard, manifest)]
        if len(stage.shards) < len(record.chunk_shards):
            write_manifest(folder, manifest)
            find_neighbors(folder, split=split, **stage.options)
            manifest.splits[split] = open_manifest(folder).splits[split]


def _numbers_of(path: Path, manifest: Manifest, documents: Sequence[int | str]) -> np.ndarray:
    """The numbers int64 [n], ascending, of documents that are named by number or by own id, even if removed."""
    opened = RetroDatastore(path, manifest)
    there = opened.chunks.document_id
    gone = _read_numbers(path, manifest.compacted)
    names = {name for name in documents if isinstance(name, str)}
    numbers = [number for number in documents if not isinstance(number, str)]
    if names:
        if not has_own_ids(manifest):
            raise ValueError(
                f"{path} was chunked without --id_column: its documents have numbers (`document_ids` of what is "
                f"retrieved), no ids such as {min(names)!r}"
            )
        found, its_numbers = _own_ids(path, manifest.train.chunk_shards, names)
        unknown = names - set(found)
        if unknown:
            raise ValueError(f"{path} has no document with the id {min(unknown)!r} ({len(unknown)} are unknown)")
        numbers += its_numbers
    numbers = np.unique(np.array(numbers, dtype=np.int64))
    unknown = numbers[~np.isin(numbers, there) & ~np.isin(numbers, gone)]
    if len(unknown):
        raise ValueError(f"{path} has no document {unknown[0]} ({len(unknown)} are unknown)")
    return numbers[~np.isin(numbers, gone)]


def _verified_ids(file: Path, shard: ChunkShard) -> Path:
    """The table of the user's ids of a shard, compared with its checksum if it has one."""
    return file if shard.documents_sha256 is None else verify_file(file, shard.documents_sha256)


def _own_ids(
    path: Path, shards: Sequence[ChunkShard], names: Collection[str] | None = None
) -> tuple[list[str | None], list[int]]:
    """The user's own ids of the documents of some shards, and their numbers; with `names` only those of these ids."""
    files = [_verified_ids(path / "documents" / f"{shard.name}.parquet", shard) for shard in shards]
    wanted = None if names is None else pc.field("id").isin(list(names))
    tables = [pq.read_table(file, columns=["id", "document_id"], filters=wanted) for file in files]
    ids = [name for table in tables for name in table["id"].to_pylist()]
    return ids, [number for table in tables for number in table["document_id"].to_pylist()]


def living_documents(opened: RetroDatastore) -> dict[str, int]:
    """The number of each document that has its own id and was not removed."""
    ids, numbers = _own_ids(opened.path, opened.manifest.train.chunk_shards)
    is_living = np.isin(numbers, opened.chunks.document_id) & ~np.isin(numbers, opened.removed_documents)
    return {name: number for name, number, keep in zip(ids, numbers, is_living, strict=True) if keep and name}


def _read_numbers(path: Path, record: DocumentList | None) -> np.ndarray:
    if record is None:
        return np.zeros(0, dtype=np.int64)
    return np.load(verify_file(path / record.name, record.sha256), allow_pickle=False)


def _write_numbers(path: Path, name: str, numbers: np.ndarray) -> dict[str, Any]:
    """Writes the numbers of documents to a file, and returns the fields of its record."""
    file = path / f"{name}.npy"
    state = process_state()
    if state.is_main_process:
        with whole(file) as temporary, temporary.open("wb") as handle:
            np.save(handle, numbers.astype(np.int64), allow_pickle=False)
    state.wait_for_everyone()
    return {"name": file.name, "sha256": checksum(file), "documents": len(numbers)}


def _set_removed(folder: Path, documents: np.ndarray) -> None:
    manifest = open_manifest(folder)
    document_id = RetroDatastore(folder, manifest).chunks.document_id
    record = _write_numbers(folder, f"removed-{manifest.version}", documents[np.isin(documents, document_id)])
    manifest.removed = RemovedDocuments(**record, chunks=int(np.isin(document_id, documents).sum()))
    write_manifest(folder, manifest)


def _fold_away(folder: Path) -> None:
    """Removes the chunks of removed documents from all shards, and renumbers the others, also in all neighbors."""
    manifest = open_manifest(folder)
    opened = RetroDatastore(folder, manifest)
    train = manifest.train
    is_kept = ~opened.is_removed(np.arange(len(opened.chunks)))
    offsets = opened.chunks.offsets
    kept = [is_kept[start:stop] for start, stop in pairwise(offsets)]
    chunk_shards, names = _compact_chunks(folder, manifest, opened, kept)
    embedding_shards = _compact_embeddings(folder, manifest, chunk_shards, names, kept)
    new_ids = np.cumsum(is_kept) - 1
    fingerprint = chunks_fingerprint(chunk_shards)
    neighbors = {}
    for split, record in manifest.splits.items():
        if record.neighbors is not None:
            own = (chunk_shards, kept) if split == TRAIN_SPLIT else (record.chunk_shards, None)
            neighbors[split] = _compact_neighbors(folder, manifest, opened, split, *own, new_ids, fingerprint)
    train.chunks.set_shards(chunk_shards)
    if embedding_shards is not None:
        train.embeddings.shards = embedding_shards
    for split, shards in neighbors.items():
        manifest.splits[split].neighbors.shards = shards
    manifest.index = manifest.bm25 = None  # these are built again, because chunks have new numbers
    gone = np.union1d(_read_numbers(folder, manifest.compacted), opened.removed_documents)
    manifest.compacted = CompactedDocuments(**_write_numbers(folder, f"compacted-{manifest.version}", gone))
    manifest.removed = None
    write_manifest(folder, manifest)
    for split in manifest.splits:
        for stage in ("chunks", "embeddings", "neighbors"):
            clear_records(split_path(folder, split) / stage)


def _compact_chunks(
    folder: Path, manifest: Manifest, opened: RetroDatastore, kept: list[np.ndarray]
) -> tuple[list[ChunkShard], dict[int, str]]:
    """The records of all shards of chunks, and the new names, by position, of those that lost chunks."""
    shards = manifest.train.chunk_shards
    names = {i: f"shard-{i:05d}-v{manifest.version}" for i in range(len(shards)) if not kept[i].all()}
    positions = list(names)
    features = chunk_features(opened.chunk_size, manifest.tokenizer.vocab_size)

    def make(number: int, temporary: Path, advance: Callable[[int], Any]) -> dict[str, Any]:
        position = positions[number]
        old, name = shards[position], names[position]
        verify_file(folder / "chunks" / old.name, old.sha256)
        columns = {key: column[kept[position]] for key, column in opened.chunks.shard(position).items()}
        save_shard(temporary, columns, features)
        documents = np.unique(columns["document_id"])
        ids = {}
        table = folder / "documents" / f"{old.name}.parquet"
        if table.exists():
            rows = pq.read_table(_verified_ids(table, old))
            with whole(table.with_name(f"{name}.parquet")) as file:
                pq.write_table(rows.filter(np.isin(rows["document_id"].to_numpy(), documents)), file)
                ids["documents_sha256"] = checksum(file)
        bad = folder / "quarantine" / f"{old.name}.jsonl"
        if bad.exists():
            with whole(bad.with_name(f"{name}.jsonl")) as file:
                file.write_bytes(bad.read_bytes())
        return {**old.to_dict(), **chunk_counts(columns), **ids}

    records = run_shards(folder / "chunks", [], list(names.values()), make, description="Folding chunks")
    shards = list(shards)
    for position, record in zip(positions, records, strict=True):
        shards[position] = ChunkShard.from_dict(record)
    return shards, names


def _compact_embeddings(
    folder: Path,
    manifest: Manifest,
    chunk_shards: list[ChunkShard],
    names: dict[int, str],
    kept: list[np.ndarray],
) -> list[EmbeddingShard] | None:
    """The records of all shards of embeddings, or None if there are none."""
    shards = manifest.train.embedding_shards
    if not shards:
        return None
    embeddings = read_embeddings(folder, TRAIN_SPLIT, manifest)
    positions = list(names)

    def make(number: int, temporary: Path, advance: Callable[[int], Any]) -> dict[str, Any]:
        position = positions[number]
        vectors = embeddings[position][kept[position]]
        with temporary.open("wb") as file:
            np.save(file, vectors, allow_pickle=False)
        return {"rows": len(vectors), "chunks_sha256": chunk_shards[position].sha256}

    records = run_shards(
        folder / "embeddings", [], list(names.values()), make, suffix=".npy", description="Folding embeddings"
    )
    shards = list(shards)
    for position, record in zip(positions, records, strict=True):
        shards[position] = EmbeddingShard.from_dict(record)
    return shards


def _compact_neighbors(
    folder: Path,
    manifest: Manifest,
    opened: RetroDatastore,
    split: str,
    chunk_shards: list[ChunkShard],
    kept: list[np.ndarray] | None,
    new_ids: np.ndarray,
    fingerprint: str,
) -> list[NeighborShard]:
    """The records of the neighbors of a split, with the new numbers of chunks."""
    root, stage = split_path(folder, split), manifest.splits[split].neighbors
    features = neighbor_features(stage.options["num_neighbors"])
    suffix = f".v{manifest.version}"
    shards = stage.shards
    if len(shards) < len(chunk_shards):
        raise ValueError(f"the neighbors of {split} are unfinished; run `retro neighbors` first")

    def make(number: int, temporary: Path, advance: Callable[[int], Any]) -> dict[str, Any]:
        old, chunks = shards[number], chunk_shards[number]
        neighbors = verify_file(root / "neighbors" / old.folder_name, old.sha256)
        columns = drop_neighbors(read_columns(neighbors), opened.is_removed)
        ids = columns["neighbor_ids"]
        columns["neighbor_ids"] = np.where(ids >= 0, new_ids[ids], -1)
        if kept is not None:
            columns = {name: column[kept[number]] for name, column in columns.items()}
        save_shard(temporary, columns, features)
        record = {key: value for key, value in old.to_dict().items() if key != "removed"}
        if old.chunks_fingerprint is not None and not is_stale(old, manifest):
            record["index"] = fingerprint
        return record | {
            "rows": len(columns["neighbor_ids"]),
            "folder": chunks.name + suffix,
            "chunks_sha256": chunks.sha256,
        }

    names = [shard.name for shard in chunk_shards]
    records = run_shards(root / "neighbors", [], names, make, suffix, f"Folding neighbors of {split}")
    return [NeighborShard.from_dict(record) for record in records]


__all__ = ["add_documents", "compact_datastore", "remove_documents", "update_documents"]
