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
Cuts documents into chunks of m tokens: the first stage of a datastore.

Many processes can share the work (`accelerate launch -m data_prep.scripts.chunk ...`), and the same command resumes an
interrupted run. A chunk never crosses the end of a document, and the last chunk of a document is padded.
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from data_prep.chunker import MANY_UNKNOWN, DocumentChunker
from data_prep.documents import (
    BadRecordsError,
    Document,
    Dropped,
    RecordFormat,
    RecordReader,
    errors_of_parts,
    plan_parts,
)
from data_prep.shard_writer import ShardWriter, in_batches
from data_prep.shipped_models import find_model, naming_the_ways
from data_prep.sources import SPOOL, Source, describe_sources, find_sources, spool_streams
from data_prep.stage_files import (
    check_options,
    clear_records,
    directory_lock,
    discard,
    finished_records,
    open_manifest,
    open_or_begin,
    process_state,
    run_shards,
    save_shard,
    share_settings,
    write_manifest,
)
from modeling_retro.datastore.checksums import checksum, file_checksums, load_tokenizer, tokenizer_fingerprint
from modeling_retro.datastore.chunks import read_columns
from modeling_retro.datastore.manifest import (
    TRAIN_SPLIT,
    ChunkShard,
    ChunksStage,
    Manifest,
    SourceRecord,
    SplitRecord,
    TokenizerRecord,
    check_split_name,
)
from modeling_retro.datastore.splits import split_path
from modeling_retro.durable_files_retro import public_name, remove, whole


logger = logging.get_logger(__name__)


def chunk_features(chunk_size: int, vocab_size: int) -> Features:
    """Types of the columns of a shard of chunks. Token ids have 16 bits if the vocabulary is small enough."""
    token = Value("uint16" if vocab_size <= 1 << 16 else "int32")
    return Features(
        {
            "input_ids": List(token, length=chunk_size),
            "length": Value("int32"),
            "document_id": Value("int64"),
            "num_bytes": Value("int64"),
        }
    )


def chunk_documents(
    inputs: str | Path | Dataset | Mapping[str, Any] | Sequence[str | Path | Dataset | Mapping[str, Any]],
    output_dir: str | Path,
    tokenizer: str | Path | PreTrainedTokenizerBase,
    split: str = TRAIN_SPLIT,
    chunk_size: int = 64,
    continuation_chunks: int = 1,
    text_column: str = "text",
    id_column: str | None = None,
    keep_columns: Sequence[str] = (),
    encoding: str | None = None,
    filter: str | None = None,
    on_bad_record: str = "error",
    max_documents: int | None = None,
    max_chunks: int | None = None,
    max_document_bytes: int = 50_000_000,
    allow_control_tokens: bool = False,
    shard_bytes: int = 32_000_000,
    append: bool = False,
    force: bool = False,
    num_proc: int = 1,
) -> ChunksStage:
    """
    Tokenizes documents and writes them as chunks, shard by shard. An interrupted run is resumed.

    Args:
        inputs (`str`, `Path`, `datasets.Dataset`, `Mapping` or a sequence of them):
            Files, folders, globs, `"-"` for jsonl on standard input, or datasets, which may be streamed. A mapping has
            `path` or `dataset` (and `config`, `split`, `streaming`), and may have its own `filter`.
        output_dir (`str` or `Path`): The datastore.
        tokenizer (`str`, `Path` or `PreTrainedTokenizerBase`): A fast tokenizer.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"` is the split that is searched. Other splits only look things up in it.
        chunk_size (`int`, *optional*, defaults to 64): Number m of tokens in a chunk.
        continuation_chunks (`int`, *optional*, defaults to 1):
            Number of chunks by which a neighbor continues in its document.
        text_column (`str`, *optional*, defaults to `"text"`): Key of the text in a record.
        id_column (`str`, *optional*):
            Key of the user's own id of a document. `"path"` is the path of its file, if records have no such key.
        keep_columns (`Sequence[str]`, *optional*):
            Further keys that are kept with a document, beside its path and its title.
        encoding (`str`, *optional*):
            Encoding of text that is not UTF-8. By default it is guessed and recorded.
        filter (`str`, *optional*):
            Condition of the records to keep: `KEY == JSON`, `KEY != JSON` or `KEY in JSON`.
        on_bad_record (`str`, *optional*, defaults to `"error"`):
            `"error"` raises an error, and `"skip"` writes bad records to `quarantine/`. Files of a folder that are no
            documents, such as images, are no errors: they are listed there too.
        max_documents (`int`, *optional*): Largest number of documents.
        max_chunks (`int`, *optional*):
            Largest number of chunks. The first document that would exceed it ends the split.
        max_document_bytes (`int`, *optional*, defaults to 50,000,000): Longer records are bad records.
        allow_control_tokens (`bool`, *optional*, defaults to `False`):
            Whether text that spells a special token becomes that token, for corpora that carry control tokens on
            purpose. All splits must have the same choice.
        shard_bytes (`int`, *optional*, defaults to 32,000,000): Number of bytes of input in a shard.
        append (`bool`, *optional*, defaults to `False`): Whether to add the inputs that the split does not hold yet.
        force (`bool`, *optional*, defaults to `False`): Whether to rebuild the split.
        num_proc (`int`, *optional*, defaults to 1):
            Number of processes that share the shards. With `max_chunks` one makes them in order.

    Returns:
        [`ChunksStage`]: the record of the split's chunks in the manifest: `num_chunks`, `num_documents`, `dropped`, ….

    Raises:
        ValueError: If an option or a record is bad, or no document has text.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if continuation_chunks < 0:
        raise ValueError(f"continuation_chunks must not be negative, got {continuation_chunks}")
    if num_proc < 1:
        raise ValueError(f"num_proc must be at least 1, got {num_proc}")
    check_split_name(split)
    if append and (max_documents is not None or max_chunks is not None):
        raise ValueError("append takes all of the new inputs; leave out max_documents and max_chunks")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        with naming_the_ways(tokenizer, "tokenizer"):
            tokenizer = load_tokenizer(find_model(tokenizer))
    if "LOCAL_WORLD_SIZE" in os.environ or num_proc > 1:
        # By default each tokenizer uses all cores, but here several processes share them.
        threads = (os.cpu_count() or 1) // (num_proc * int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, threads)))
    path = Path(output_dir)
    options = {
        "text_column": text_column,
        "id_column": id_column,
        "on_bad_record": on_bad_record,
        "max_documents": max_documents,
        "max_chunks": max_chunks,
        "max_document_bytes": max_document_bytes,
        "shard_bytes": shard_bytes,
    }
    # Datastores of before know nothing of these.
    options |= {"keep_columns": list(keep_columns)} if keep_columns else {}
    options |= {"encoding": encoding} if encoding is not None else {}
    record_format = RecordFormat.from_options(options)
    with directory_lock(path):
        manifest = open_or_begin(path)
        if force and manifest is not None and split in manifest.splits:
            discard(path, manifest, split, "chunks")
        shared = {
            "chunk_size": chunk_size,
            "continuation_chunks": continuation_chunks,
            "allow_control_tokens": allow_control_tokens,
        }
        manifest = _set_vocabulary(path, manifest, tokenizer, shared)
        sources = find_sources(spool_streams(inputs, path, split), filter)
        sources = _plan(path, manifest, split, sources, record_format, options, append)
        chunker = DocumentChunker(tokenizer, chunk_size, allow_control_tokens)
        return _chunk_shards(path, manifest, split, sources, record_format, chunker, num_proc=num_proc)


def _set_vocabulary(
    path: Path, manifest: Manifest | None, tokenizer: PreTrainedTokenizerBase, shared: dict[str, Any]
) -> Manifest:
    """Records the settings that all splits share, or compares them with those of the datastore."""
    fingerprint = tokenizer_fingerprint(tokenizer)
    if manifest is not None and manifest.splits:
        check_options("chunk", shared, {name: getattr(manifest, name) for name in shared})
        if fingerprint["sha256"] != manifest.tokenizer.sha256:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path} is not the one {path} was begun with "
                f"({manifest.tokenizer.name}); use that one, or --force to rebuild"
            )
        if not _has_tokenizer(path, manifest.tokenizer):
            _save_tokenizer(path, manifest, tokenizer)
        return manifest
    recorded = {"name": public_name(tokenizer.name_or_path), **fingerprint}
    manifest = share_settings(manifest, shared | {"tokenizer": recorded})
    write_manifest(path, manifest)
    _save_tokenizer(path, manifest, tokenizer)
    return manifest


def _save_tokenizer(path: Path, manifest: Manifest, tokenizer: PreTrainedTokenizerBase) -> None:
    save_tokenizer(path, tokenizer)
    manifest.tokenizer.files = file_checksums(path / "tokenizer")
    write_manifest(path, manifest)


def save_tokenizer(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes the tokenizer of a datastore in the main process, while the others wait."""
    state = process_state()
    if state.is_main_process:
        with whole(path / "tokenizer") as temporary:
            try:
                tokenizer.save_pretrained(temporary)
            except Exception as error:  # tokenizers raises a plain `Exception` if it cannot write
                raise OSError(f"cannot write {path / 'tokenizer'}: {error}") from error
    state.wait_for_everyone()


def _has_tokenizer(path: Path, record: TokenizerRecord) -> bool:
    """Whether the copy of the tokenizer in the datastore is complete. All processes get the same answer."""
    try:
        found = tokenizer_fingerprint(load_tokenizer(path / "tokenizer", record.files))
        is_whole = found == {"vocab_size": record.vocab_size, "sha256": record.sha256}
    except Exception:  # libraries raise all kinds of errors for damaged files
        is_whole = False
    process_state().wait_for_everyone()
    return is_whole


def _plan(
    path: Path,
    manifest: Manifest,
    split: str,
    sources: list[Source],
    record_format: RecordFormat,
    options: dict[str, Any],
    append: bool,
    known_sources: int = 0,
) -> list[Source]:
    """
    Adds the parts of new sources to the manifest, and returns the sources of all parts, in order. The first
    `known_sources` are not compared with the given ones.
    """
    described = describe_sources(sources, path)
    stage = manifest.splits[split].chunks if split in manifest.splits else None
    if stage is not None and not stage.shards and _match_sources(stage.sources, described) != [*range(len(sources))]:
        # Nothing is finished, perhaps because of a bad record in an input that was mended since.
        names = [f"shard-{index:05d}" for index in range(len(stage.parts))]
        stage = stage if finished_records(split_path(path, split) / "chunks", names) else None
    if stage is not None:
        check_options("chunk", {"keep_columns": None, "encoding": None} | options, stage.options)
        same = [None] * known_sources + _match_sources(stage.sources[known_sources:], described)
        new = [i for i in range(len(described)) if i not in same]
        if stage.options["max_chunks"] is not None and new and append:
            raise ValueError(f"{path} was cut by max_chunks; nothing can be added to it")
        if new and not append:
            raise ValueError(
                f"{path} was not made from {described[new[0]].path} as it is now; "
                "use --append to add new inputs, or --force to rebuild"
            )
    else:
        stage = ChunksStage(options, sources=[], parts=[], shards=[])
        same, new = [], list(range(len(sources)))
    if new:
        last = stage.parts[-1] if stage.parts else None
        added = plan_parts(
            [sources[i] for i in new],
            record_format,
            options["shard_bytes"],
            options["on_bad_record"],
            first_document_id=0 if last is None else last.first_document_id + last.stop - last.start,
            max_documents=None if append else options["max_documents"],
        )
        if not added and not stage.parts:
            raise ValueError(f"the inputs hold no records: {', '.join(source.path for source in described)}")
        offset = len(stage.sources)
        stage.parts = stage.parts + [replace(part, source=part.source + offset) for part in added]
        stage.sources = stage.sources + [described[i] for i in new]
        manifest.splits.setdefault(split, SplitRecord()).chunks = stage
        write_manifest(path, manifest)
    return [None if i is None else sources[i] for i in [*same, *new]]


def _match_sources(recorded: list[SourceRecord], given: list[SourceRecord]) -> list[int | None]:
    """
    Finds the index of each `recorded` source among the `given` ones, or None if it is not given. A file that has moved
    to another folder is recognized by its name, size, contents and filter.
    """
    found: list[int | None] = [None] * len(recorded)
    for name in (str, lambda path: Path(path).name):
        free = defaultdict(list)
        for i, source in enumerate(given):
            if i not in found:
                free[_identity(source, name)].append(i)
        for position, source in enumerate(recorded):
            same = free[_identity(source, name)]
            # Older datastores know their sources without checksums.
            same = [i for i in same if i not in found and source.xxh3 in (None, given[i].xxh3)]
            if found[position] is None and same:
                found[position] = same[0]
    return found


def _identity(source: SourceRecord, name: Callable[[str], str]) -> tuple:
    return source.kind, name(source.path), source.bytes, source.filter


def _chunk_shards(
    path: Path,
    manifest: Manifest,
    split: str,
    sources: list[Source | None],
    record_format: RecordFormat,
    chunker: DocumentChunker,
    is_known: Callable[[Document, np.ndarray], bool] | None = None,
    num_proc: int = 1,
) -> ChunksStage:
    root = split_path(path, split)
    stage = manifest.splits[split].chunks
    options, parts = stage.options, stage.parts
    reader = RecordReader(sources, record_format)
    features = chunk_features(chunker.chunk_size, manifest.tokenizer.vocab_size)
    # New shards of a datastore that was changed never get the name of a shard of an earlier version.
    suffix = f"-v{manifest.version}" if manifest.version else ""
    names = [shard.name for shard in stage.shards]
    names += [f"shard-{index:05d}{suffix}" for index in range(len(names), len(parts))]

    def make(index: int, temporary: Path, advance: Callable[[int], Any]) -> dict[str, Any]:
        part = parts[index]
        if sources[part.source] is None:
            raise ValueError(f"{path} is unfinished and needs {stage.sources[part.source].path} as an input too")
        room = None
        if options["max_chunks"] is not None:
            earlier = finished_records(root / "chunks", names[:index])
            room = options["max_chunks"] - sum(record["rows"] for record in earlier)
        dropped = Dropped(options["on_bad_record"])
        shard = ShardWriter(chunker, root, names[index], part, sources[part.source], dropped, room, is_known)
        try:
            for batch in in_batches(reader.documents(part, dropped), advance):
                if not shard.add(batch):
                    break
            dropped.raise_errors()  # of documents without tokens
        except BadRecordsError as error:
            later = [part for part in parts[index + 1 :] if sources[part.source] is not None]
            raise errors_of_parts(reader, later, error) from error
        return shard.save(temporary, features)

    records = run_shards(
        root / "chunks",
        stage.shards,
        names,
        make,
        description=f"Chunking {split}",
        in_order=options["max_chunks"] is not None,
        num_proc=num_proc,
        sizes=[part.stop - part.start for part in parts],
        unit="records",
    )
    shards = [ChunkShard.from_dict(record) for record in records]
    if not any(shard.rows for shard in shards):
        raise ValueError(f"no document of {', '.join(source.path for source in stage.sources)} has text")
    stage.parts = parts[: len(shards)]
    stage.set_shards(shards)
    write_manifest(path, manifest)
    clear_records(root / "chunks")
    if process_state().is_main_process:
        for spool in path.glob(f"{SPOOL}{split}-*"):
            spool.unlink()
    if stage.num_unknown_tokens > MANY_UNKNOWN * stage.num_tokens:
        logger.warning(
            f"{stage.num_unknown_tokens / stage.num_tokens:.1%} of the tokens of {split} are unknown to the "
            "tokenizer: it cannot tell these texts apart, and bits per byte measured on them are meaningless; use a "
            "tokenizer that knows the texts"
        )
    logger.info(f"{split}: {stage.num_chunks} chunks of {stage.num_documents} documents, dropped {stage.dropped}")
    return stage


def append_documents(
    datastore: str | Path,
    inputs: str | Path | Dataset | Mapping[str, Any] | Sequence[str | Path | Dataset | Mapping[str, Any]],
    known_sources: int,
    is_known: Callable[[Document, np.ndarray], bool] | None = None,
) -> ChunksStage:
    """
    Adds documents to the searched ones, with the options that the datastore was chunked with, even if an equal input
    was added before.

    Args:
        datastore (`str` or `Path`): The datastore.
        inputs (`str`, `Path`, `datasets.Dataset`, `Mapping` or a sequence of them): As [`chunk_documents`] takes them.
        known_sources (`int`):
            Number of sources of the datastore before. Further sources belong to an interrupted run.
        is_known (`Callable`, *optional*):
            Maps a document and its token ids [n, m] to whether it need not be added. Such documents count as filtered.

    Returns:
        [`ChunksStage`]: the record of the chunks in the manifest.

    Raises:
        ValueError: If a record is bad, or the inputs hold no records.
    """
    path = Path(datastore)
    with directory_lock(path):
        manifest = open_manifest(path)
        options = manifest.train.chunks.options
        sources = find_sources(spool_streams(inputs, path, TRAIN_SPLIT))
        record_format = RecordFormat.from_options(options)
        sources = _plan(path, manifest, TRAIN_SPLIT, sources, record_format, options, True, known_sources)
        tokenizer = load_tokenizer(path / "tokenizer", manifest.tokenizer.files)
        chunker = DocumentChunker(tokenizer, manifest.chunk_size, manifest.allow_control_tokens)
        return _chunk_shards(path, manifest, TRAIN_SPLIT, sources, record_format, chunker, is_known)


def restore_shard(
    path: Path,
    manifest: Manifest,
    split: str,
    name: str,
    inputs: str | Path | Dataset | Sequence[str | Path | Dataset],
) -> None:
    """
    Makes a shard of chunks again, byte for byte, from its original input.

    Args:
        path (`Path`): The datastore.
        manifest ([`Manifest`]): Its manifest.
        split (`str`): Name of the split.
        name (`str`): Name of the shard.
        inputs (`str`, `Path`, `datasets.Dataset` or a sequence of them): Inputs, among which its input must be.

    Raises:
        ValueError: If the input is not among `inputs`, or has changed.
    """
    stage, root = manifest.splits[split].chunks, split_path(path, split)
    options, names = stage.options, [shard.name for shard in stage.shards]
    index = names.index(name)
    part, record = stage.parts[index], stage.shards[index]
    wanted = stage.sources[part.source]
    is_none = not isinstance(inputs, (str, Path, Dataset)) and not inputs
    for source in [] if is_none else find_sources(inputs, wanted.filter):
        if _match_sources([wanted], [source.describe()]) == [0]:
            break
    else:
        raise ValueError(
            f"{root / 'chunks' / name} is made from {wanted.path} ({wanted.bytes} bytes); pass it as an input, "
            "as it was"
        )
    tokenizer = load_tokenizer(path / "tokenizer", manifest.tokenizer.files)
    chunker = DocumentChunker(tokenizer, manifest.chunk_size, manifest.allow_control_tokens)
    features = chunk_features(chunker.chunk_size, manifest.tokenizer.vocab_size)
    room = None
    if options["max_chunks"] is not None:
        room = options["max_chunks"] - sum(earlier.rows for earlier in stage.shards[:index])
    dropped = Dropped(options["on_bad_record"])
    shard = ShardWriter(chunker, root, name, part, source, dropped, room)
    # Only the input of this shard is read.
    reader = RecordReader([source], RecordFormat.from_options(options))
    for batch in in_batches(reader.documents(replace(part, source=0), dropped)):
        if not shard.add(batch):
            break
    with whole(root / "chunks" / name) as temporary:
        saved = shard.save(temporary, features)
        report, removed = path / "duplicates.jsonl", []
        if stage.deduplicated is not None and report.is_file():
            lines = report.read_text(encoding="utf-8").splitlines()
            removed += [json.loads(line)["document_id"] for line in lines]
        if split == TRAIN_SPLIT and manifest.compacted is not None:
            removed += np.load(path / manifest.compacted.name, allow_pickle=False).tolist()
        if removed:
            columns = read_columns(temporary)
            keep = ~np.isin(columns["document_id"], removed)
            if not keep.all():
                columns = {column: values[keep] for column, values in columns.items()}
                remove(temporary)
                save_shard(temporary, columns, features)
        if checksum(temporary) != record.sha256:
            raise ValueError(
                f"{source.path} no longer gives the chunks of {root / 'chunks' / name}; bring back the input as it "
                "was, or remake the split with `retro chunk --force`"
            )
    if record.documents_sha256 is not None:
        record.documents_sha256 = saved["documents_sha256"]  # another release of pyarrow writes other bytes
