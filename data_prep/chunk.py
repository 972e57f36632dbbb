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
Documents to chunks of m tokens: the first stage of a datastore.

Many processes share the work (`accelerate launch -m data_prep.scripts.chunk ...`), and the same command goes on after
an interruption. A chunk never crosses documents; the last one of a document is padded.
"""

import json
import os
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, List, Value
from tokenizers import Encoding, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from data_prep.documents import (
    SPOOL,
    BadRecord,
    Document,
    Dropped,
    Part,
    RecordFormat,
    RecordReader,
    Source,
    find_sources,
    plan_parts,
    record_location,
    spool_streams,
)
from data_prep.stage_files import (
    check_options,
    clear_records,
    directory_lock,
    discard,
    finished_records,
    open_manifest,
    process_state,
    run_shards,
    save_shard,
    write_manifest,
)
from modeling_retro.datastore_manifest_retro import TRAIN_SPLIT, allows_control_tokens, check_split_name, public_name
from modeling_retro.datastore_retro import (
    checksum,
    chunks_fingerprint,
    read_columns,
    split_path,
    tokenizer_fingerprint,
)
from modeling_retro.durable_files_retro import remove, whole


logger = logging.get_logger(__name__)

_BATCH_CHARACTERS = 1 << 20


def chunk_features(chunk_size: int, vocab_size: int) -> Features:
    """Types of the columns of a shard of chunks; token ids in 16 bits where the vocabulary allows."""
    token = Value("uint16" if vocab_size <= 1 << 16 else "int32")
    return Features(
        {
            "input_ids": List(token, length=chunk_size),
            "length": Value("int32"),
            "document_id": Value("int64"),
            "num_bytes": Value("int64"),
        }
    )


class DocumentChunker:
    """
    Cuts documents into chunks of token ids, with the bytes of the source that each chunk covers.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A fast tokenizer with an EOS (or SEP) token.
        chunk_size (`int`): Tokens in a chunk, m.
        allow_control_tokens (`bool`, *optional*, defaults to `False`):
            Whether text that spells a special token, such as `<|endoftext|>`, becomes that token. By default it stays
            text, so that no document can end itself or speak as another role of a chat.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chunk_size: int, allow_control_tokens: bool = False):
        eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        if eos is None:
            raise ValueError(f"the tokenizer {tokenizer.name_or_path} has no EOS token to end a document with")
        self.chunk_size = chunk_size
        self.dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
        self.suffix = [eos]
        starts_with_bos = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        self.prefix = [tokenizer.bos_token_id] if starts_with_bos else []
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = not allow_control_tokens
        # Models of the Unigram kind may find a special token among their own pieces all the same.
        spelled = [self._backend.encode(token, add_special_tokens=False).ids for token in tokenizer.all_special_tokens]
        spelled = set(chain.from_iterable(spelled)) & set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        self._unwanted = [] if allow_control_tokens else sorted(spelled)
        self._unknown = tokenizer.unk_token_id
        self._token_bytes = byte_lengths(self._backend)

    def chunk(self, documents: Sequence[Document]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """
        Chunks some documents.

        Args:
            documents (`Sequence[Document]`): The documents.

        Returns:
            `tuple`: the columns (`input_ids` [n, m] padded with 0, `length`, `document_id`, `num_bytes` [n]), and the
            number of chunks of each document (int64; 0 for a document without any token).
        """
        m = self.chunk_size
        rows, encodings = self._encode([document.text for document in documents])
        added = len(self.prefix) + len(self.suffix)
        tokens = np.array([len(row) + added if len(row) else 0 for row in rows], dtype=np.int64)
        chunks = -(-tokens // m)
        first_chunk = np.cumsum(chunks) - chunks
        first_token = np.cumsum(tokens) - tokens
        # Token j of a document stands at first_chunk * m + j of the flat array of chunks.
        place = np.arange(tokens.sum()) + np.repeat(first_chunk * m - first_token, tokens)
        input_ids = np.zeros((int(chunks.sum()), m), dtype=self.dtype)
        prefix, suffix = np.array(self.prefix, dtype=self.dtype), np.array(self.suffix, dtype=self.dtype)
        parts = chain.from_iterable((prefix, row, suffix) for row in rows if len(row))
        input_ids.reshape(-1)[place] = np.concatenate([prefix[:0], *parts])
        length = np.full(len(input_ids), m, dtype=np.int32)
        kept = chunks > 0
        length[(first_chunk + chunks - 1)[kept]] = (tokens - (chunks - 1) * m)[kept]
        num_bytes = [
            self._chunk_bytes(document.text, row, encoding)
            for document, row, encoding in zip(documents, rows, encodings, strict=True)
            if len(row)
        ]
        document_id = np.array([document.document_id for document in documents], dtype=np.int64)
        columns = {
            "input_ids": input_ids,
            "length": length,
            "document_id": np.repeat(document_id, chunks),
            "num_bytes": np.concatenate([np.zeros(0, dtype=np.int64), *num_bytes]),
        }
        return columns, chunks

    def encode(self, text: str) -> np.ndarray:
        """
        Token ids of a text as they stand in a document, without the tokens that begin and end one.

        Args:
            text (`str`): The text.

        Returns:
            `np.ndarray`: `[T]`.

        Raises:
            ValueError: If the text spells a control token that the tokenizer cannot split.
        """
        return self._encode([text])[0][0]

    def _encode(self, texts: Sequence[str]) -> tuple[list[np.ndarray], list[Encoding]]:
        # Where the bytes of each token are known, nobody needs the offsets, which take up to a quarter of the time.
        encode = self._backend.encode_batch if self._token_bytes is None else self._backend.encode_batch_fast
        encodings = encode(list(texts), add_special_tokens=False)
        rows = [np.fromiter(encoding.ids, dtype=self.dtype, count=len(encoding)) for encoding in encodings]
        if self._unwanted:
            rows = [self._without_control_tokens(row) for row in rows]
        return rows, encodings

    def _without_control_tokens(self, row: np.ndarray) -> np.ndarray:
        is_unwanted = np.isin(row, self._unwanted)
        if is_unwanted.any() and self._unknown is None:
            raise ValueError(
                "a document spells a control token, which the tokenizer cannot split and for which it has no unknown "
                "token; pass allow_control_tokens if the documents can be trusted"
            )
        return np.where(is_unwanted, self.dtype(self._unknown or 0), row)

    def _chunk_bytes(self, text: str, row: np.ndarray, encoding: Encoding) -> np.ndarray:
        """
        UTF-8 bytes of the text that each chunk of a document covers. A chunk ends where its last token ends, so what
        the tokenizer skips before a token belongs to that token, and a character split over two chunks to the first.
        """
        # Of the text, so many tokens stand in all chunks up to each but the last.
        stops = np.arange(self.chunk_size, len(row) + len(self.prefix) + len(self.suffix), self.chunk_size)
        stops = np.clip(stops - len(self.prefix), 0, len(row))
        data = text.encode()
        cuts = None
        if self._token_bytes is not None:
            ends = np.append(0, np.cumsum(self._token_bytes[row]))
            if ends[-1] == len(data):
                cuts = ends[stops]
            else:  # a normalizer changed the text, or a token took the spaces around it
                encoding = self._backend.encode(text, add_special_tokens=False)
        if cuts is None:
            ends = [0, *(encoding.token_to_chars(int(stop) - 1)[1] if stop else 0 for stop in stops)]
            ends = np.maximum.accumulate(ends)  # offsets of some normalizers step back
            cuts = np.cumsum([len(text[a:b].encode()) for a, b in pairwise(ends)], dtype=np.int64)
            cuts[stops == len(row)] = len(data)
        for i, cut in enumerate(cuts.tolist()):
            while cut < len(data) and data[cut] & 0xC0 == 0x80:  # inside of a character
                cut += 1
            cuts[i] = cut
        return np.diff(cuts, prepend=0, append=len(data))


def control_tokens_inside(
    tokenizer: PreTrainedTokenizerBase, input_ids: np.ndarray, length: np.ndarray, document_id: np.ndarray
) -> int:
    """
    Number of special tokens that are neither the first nor the last of a document.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        input_ids (`np.ndarray`): Token ids [n, m] of whole documents.
        length (`np.ndarray`): Tokens of each chunk [n].
        document_id (`np.ndarray`): Document of each chunk [n], ascending.
    """
    special = sorted(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})
    is_special = np.isin(input_ids, special) & (np.arange(input_ids.shape[1]) < length[:, None])
    starts = np.diff(document_id, prepend=-1) != 0
    is_special[starts, 0] = False
    ends = np.append(starts[1:], True)
    is_special[ends, length[ends] - 1] = False
    return int(is_special.sum())


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray | None:
    """
    Bytes of the text that each token of a byte-level tokenizer stands for.

    Args:
        tokenizer (`Tokenizer`): Any tokenizer.

    Returns:
        `np.ndarray`: int64 [vocabulary], or None for a tokenizer of another kind or one that puts a space before the
        text.
    """
    steps = json.loads(tokenizer.to_str())["pre_tokenizer"] or {"type": None}
    steps = [step for step in steps.get("pretokenizers", [steps]) if step["type"] == "ByteLevel"]
    if not steps or any(step["add_prefix_space"] for step in steps):
        return None
    vocabulary = tokenizer.get_vocab()
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    lengths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, index in vocabulary.items():
        # Each character of a byte-level token stands for one byte; tokens added later are as they are.
        lengths[index] = len(token.encode()) if token in added else len(token)
    return lengths


def chunk_documents(
    inputs: str | Path | Dataset | Mapping[str, Any] | Sequence[str | Path | Dataset | Mapping[str, Any]],
    output_dir: str | Path,
    tokenizer: str | Path | PreTrainedTokenizerBase,
    split: str = TRAIN_SPLIT,
    chunk_size: int = 64,
    continuation_chunks: int = 1,
    text_column: str = "text",
    id_column: str | None = None,
    filter: str | None = None,
    on_bad_record: str = "error",
    max_documents: int | None = None,
    max_chunks: int | None = None,
    max_document_bytes: int = 50_000_000,
    allow_control_tokens: bool = False,
    shard_bytes: int = 32_000_000,
    append: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """
    Tokenizes documents and writes them as chunks, shard by shard; goes on where an earlier run stopped.

    Args:
        inputs (`str`, `Path`, `datasets.Dataset`, `Mapping` or a sequence of them):
            Files, folders, globs, `"-"` for jsonl on standard input, or datasets (streamed ones too). A mapping has
            `path` or `dataset` (and `config`, `split`, `streaming`), and may have a `filter` of its own.
        output_dir (`str` or `Path`): The datastore.
        tokenizer (`str`, `Path` or `PreTrainedTokenizerBase`): A fast tokenizer.
        split (`str`, *optional*, defaults to `"train"`): `"train"` is what is searched; other splits only query it.
        chunk_size (`int`, *optional*, defaults to 64): Tokens in a chunk, m.
        continuation_chunks (`int`, *optional*, defaults to 1): Chunks of the same document a neighbor goes on.
        text_column (`str`, *optional*, defaults to `"text"`): Key of the text in a record.
        id_column (`str`, *optional*): Key of the user's own id of a document, written to `documents/`.
        filter (`str`, *optional*): `KEY == JSON`, `KEY != JSON` or `KEY in JSON`: which records to keep.
        on_bad_record (`str`, *optional*, defaults to `"error"`): `"error"`, or `"skip"` into `quarantine/`.
        max_documents (`int`, *optional*): Stop after so many documents.
        max_chunks (`int`, *optional*): Stop before the document that would go over so many chunks.
        max_document_bytes (`int`, *optional*, defaults to 50,000,000): Longer records are bad records.
        allow_control_tokens (`bool`, *optional*, defaults to `False`): Whether text that spells a special token
            becomes that token, for corpora that carry control tokens on purpose. One choice for all splits.
        shard_bytes (`int`, *optional*, defaults to 32,000,000): Bytes of input in a shard.
        append (`bool`, *optional*, defaults to `False`): Add the inputs that the split does not hold yet.
        force (`bool`, *optional*, defaults to `False`): Rebuild the split.

    Returns:
        `dict`: what the manifest says of the split's chunks, with `num_chunks`, `num_documents` and `dropped`.

    Raises:
        ValueError: If an option or a record is bad, or no document has text.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if continuation_chunks < 0:
        raise ValueError(f"continuation_chunks must not be negative, got {continuation_chunks}")
    check_split_name(split)
    if append and (max_documents is not None or max_chunks is not None):
        raise ValueError("append takes all of the new inputs; leave out max_documents and max_chunks")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    if "LOCAL_WORLD_SIZE" in os.environ:
        # The tokenizers of several processes share the cores; by default each of them takes all.
        threads = (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])
        os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, threads)))
    path = Path(output_dir)
    record_format = RecordFormat(text_column, id_column, max_document_bytes)
    options = {
        "text_column": text_column,
        "id_column": id_column,
        "on_bad_record": on_bad_record,
        "max_documents": max_documents,
        "max_chunks": max_chunks,
        "max_document_bytes": max_document_bytes,
        "shard_bytes": shard_bytes,
    }
    with directory_lock(path):
        manifest = open_manifest(path, create=True)
        if force and split in manifest["splits"]:
            discard(path, manifest, split, "chunks")
        shared = {
            "chunk_size": chunk_size,
            "continuation_chunks": continuation_chunks,
            "allow_control_tokens": allow_control_tokens,
        }
        _set_vocabulary(path, manifest, tokenizer, shared)
        sources = find_sources(spool_streams(inputs, path, split), filter)
        sources = _plan(path, manifest, split, sources, record_format, options, append)
        chunker = DocumentChunker(tokenizer, chunk_size, allow_control_tokens)
        return _chunk_shards(path, manifest, split, sources, record_format, chunker)


def _set_vocabulary(
    path: Path, manifest: dict[str, Any], tokenizer: PreTrainedTokenizerBase, shared: dict[str, Any]
) -> None:
    """Sets what all splits share, or checks it against what the datastore already has."""
    fingerprint = tokenizer_fingerprint(tokenizer)
    if manifest["splits"]:
        check_options("chunk", shared, {"allow_control_tokens": allows_control_tokens(manifest)} | manifest)
        if fingerprint["sha256"] != manifest["tokenizer"]["sha256"]:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path} is not the one {path} was begun with "
                f"({manifest['tokenizer']['name']}); use that one, or --force to rebuild"
            )
        if not _has_tokenizer(path, fingerprint):
            save_tokenizer(path, tokenizer)
        return
    manifest |= shared | {"tokenizer": {"name": public_name(tokenizer.name_or_path), **fingerprint}}
    write_manifest(path, manifest)
    save_tokenizer(path, tokenizer)


def save_tokenizer(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes the tokenizer of a datastore by the main process; the others wait for it."""
    state = process_state()
    if state.is_main_process:
        with whole(path / "tokenizer") as temporary:
            try:
                tokenizer.save_pretrained(temporary)
            except Exception as error:  # of a failed write, tokenizers makes an `Exception` and nothing more
                raise OSError(f"cannot write {path / 'tokenizer'}: {error}") from error
    state.wait_for_everyone()


def _has_tokenizer(path: Path, fingerprint: dict[str, Any]) -> bool:
    """Whether the datastore's own copy of its tokenizer is whole. All processes get the same answer."""
    try:
        is_whole = tokenizer_fingerprint(AutoTokenizer.from_pretrained(path / "tokenizer")) == fingerprint
    except Exception:  # whatever a damaged file makes of the libraries that read it
        is_whole = False
    process_state().wait_for_everyone()
    return is_whole


def _plan(
    path: Path,
    manifest: dict[str, Any],
    split: str,
    sources: list[Source],
    record_format: RecordFormat,
    options: dict[str, Any],
    append: bool,
) -> list[Source]:
    """Adds the parts of new sources to the manifest; returns all sources of its parts, in order."""
    described = [source.describe() for source in sources]
    stage = manifest["splits"].get(split, {}).get("chunks")
    if stage is not None:
        check_options("chunk", options, stage["options"])
        same = _match_sources(stage["sources"], described)
        new = [i for i in range(len(described)) if i not in same]
        if stage["options"]["max_chunks"] is not None and new and append:
            raise ValueError(f"{path} was cut by max_chunks; nothing can be added to it")
        if new and not append:
            raise ValueError(
                f"{path} was not made from {described[new[0]]['path']} as it is now; "
                "use --append to add new inputs, or --force to rebuild"
            )
    else:
        stage = {"options": options, "sources": [], "parts": [], "shards": []}
        same, new = [], list(range(len(sources)))
    if new:
        parts = stage["parts"]
        last = parts[-1] if parts else None
        added = plan_parts(
            [sources[i] for i in new],
            record_format,
            options["shard_bytes"],
            options["on_bad_record"],
            first_document_id=0 if last is None else last["first_document_id"] + last["stop"] - last["start"],
            max_documents=options["max_documents"],
        )
        if not added and not parts:
            raise ValueError(f"the inputs hold no records: {', '.join(source['path'] for source in described)}")
        offset = len(stage["sources"])
        stage["parts"] = parts + [{**asdict(part), "source": part.source + offset} for part in added]
        stage["sources"] = stage["sources"] + [described[i] for i in new]
        manifest["splits"].setdefault(split, {})["chunks"] = stage
        write_manifest(path, manifest)
    return [None if i is None else sources[i] for i in [*same, *new]]


def _match_sources(recorded: list[dict[str, Any]], given: list[dict[str, Any]]) -> list[int | None]:
    """
    Index among the `given` sources of each `recorded` one, None where it is not given. A file may have moved to
    another folder since: then its name, size and filter tell it.
    """
    found: list[int | None] = [None] * len(recorded)
    for name in (str, lambda path: Path(path).name):
        free = defaultdict(deque)
        for i, source in enumerate(given):
            if i not in found:
                free[json.dumps({**source, "path": name(source["path"])}, sort_keys=True)].append(i)
        for position, source in enumerate(recorded):
            same = free[json.dumps({**source, "path": name(source["path"])}, sort_keys=True)]
            if found[position] is None and same:
                found[position] = same.popleft()
    return found


def _chunk_shards(
    path: Path,
    manifest: dict[str, Any],
    split: str,
    sources: list[Source | None],
    record_format: RecordFormat,
    chunker: DocumentChunker,
) -> dict[str, Any]:
    root = split_path(path, split)
    stage = manifest["splits"][split]["chunks"]
    options = stage["options"]
    parts = [Part(**part) for part in stage["parts"]]
    reader = RecordReader(sources, record_format)
    features = chunk_features(chunker.chunk_size, manifest["tokenizer"]["vocab_size"])
    names = [f"shard-{index:05d}" for index in range(len(parts))]

    def make(index: int, temporary: Path) -> dict[str, Any]:
        part = parts[index]
        if sources[part.source] is None:
            raise ValueError(f"{path} is unfinished and needs {stage['sources'][part.source]['path']} as an input too")
        room = None
        if options["max_chunks"] is not None:
            earlier = finished_records(root / "chunks", names[:index])
            room = options["max_chunks"] - sum(record["rows"] for record in earlier)
        dropped = Dropped(options["on_bad_record"])
        shard = _ShardWriter(chunker, root, names[index], part, sources[part.source], dropped, room)
        for batch in _batches(reader.documents(part, dropped)):
            if not shard.add(batch):
                break
        return shard.save(temporary, features, options["id_column"] is not None)

    records = run_shards(
        root / "chunks",
        stage["shards"],
        names,
        make,
        description=f"Chunking {split}",
        in_order=options["max_chunks"] is not None,
    )
    if not any(record["rows"] for record in records):
        raise ValueError(f"no document of {', '.join(source['path'] for source in stage['sources'])} has text")
    stage["parts"] = stage["parts"][: len(records)]
    set_shards(stage, records)
    write_manifest(path, manifest)
    clear_records(root / "chunks")
    if process_state().is_main_process:
        for spool in path.glob(f"{SPOOL}{split}-*"):
            spool.unlink()
    logger.info(
        f"{split}: {stage['num_chunks']} chunks of {stage['num_documents']} documents, dropped {stage['dropped']}"
    )
    return stage


def restore_shard(
    path: Path,
    split: str,
    name: str,
    inputs: str | Path | Dataset | Sequence[str | Path | Dataset],
) -> None:
    """
    Makes a shard of chunks again, byte for byte, from the input that it was made from.

    Args:
        path (`Path`): The datastore.
        split (`str`): Name of the split.
        name (`str`): Name of the shard.
        inputs (`str`, `Path`, `datasets.Dataset` or a sequence of them): Where its input is, among others.

    Raises:
        ValueError: If the input is not among `inputs`, or is another than it was.
    """
    manifest = open_manifest(path)
    stage, root = manifest["splits"][split]["chunks"], split_path(path, split)
    options, names = stage["options"], [record["name"] for record in stage["shards"]]
    index = names.index(name)
    part, record = Part(**stage["parts"][index]), stage["shards"][index]
    wanted = stage["sources"][part.source]
    is_none = not isinstance(inputs, (str, Path, Dataset)) and not inputs
    for source in [] if is_none else find_sources(inputs, wanted["filter"]):
        if _match_sources([wanted], [source.describe()]) == [0]:
            break
    else:
        raise ValueError(
            f"{root / 'chunks' / name} is made from {wanted['path']} ({wanted['bytes']} bytes); pass it as an input"
        )
    tokenizer = AutoTokenizer.from_pretrained(path / "tokenizer")
    chunker = DocumentChunker(tokenizer, manifest["chunk_size"], allows_control_tokens(manifest))
    features = chunk_features(chunker.chunk_size, manifest["tokenizer"]["vocab_size"])
    room = None
    if options["max_chunks"] is not None:
        room = options["max_chunks"] - sum(earlier["rows"] for earlier in stage["shards"][:index])
    dropped = Dropped(options["on_bad_record"])
    shard = _ShardWriter(chunker, root, name, part, source, dropped, room)
    # One shard reads its input alone: the others of the part stand elsewhere.
    record_format = RecordFormat(options["text_column"], options["id_column"], options["max_document_bytes"])
    reader = RecordReader([source], record_format)
    for batch in _batches(reader.documents(replace(part, source=0), dropped)):
        if not shard.add(batch):
            break
    with whole(root / "chunks" / name) as temporary:
        shard.save(temporary, features, options["id_column"] is not None)
        report = path / "duplicates.jsonl"
        if "deduplicated" in stage and report.is_file():
            lines = report.read_text(encoding="utf-8").splitlines()
            removed = [json.loads(line)["document_id"] for line in lines]
            columns = read_columns(temporary)
            keep = ~np.isin(columns["document_id"], removed)
            if not keep.all():
                columns = {column: values[keep] for column, values in columns.items()}
                remove(temporary)
                save_shard(temporary, columns, features)
        if checksum(temporary) != record["sha256"]:
            raise ValueError(
                f"{source.path} no longer gives the chunks of {root / 'chunks' / name}; bring back the input as it "
                "was, or make the split anew with `retro chunk --force`"
            )


def set_shards(stage: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Sets the shards of a stage of chunks, their fingerprint and their totals."""
    stage["shards"] = records
    stage["fingerprint"] = chunks_fingerprint(records)
    for total, key in (("chunks", "rows"), ("documents", "documents"), ("tokens", "tokens"), ("bytes", "bytes")):
        stage[f"num_{total}"] = sum(record[key] for record in records)
    reasons = records[0]["dropped"]
    stage["dropped"] = {reason: sum(record["dropped"][reason] for record in records) for reason in reasons}


class _ShardWriter:
    """Collects the chunks of one shard and writes them, with the ids and bad records beside them."""

    def __init__(
        self,
        chunker: DocumentChunker,
        root: Path,
        name: str,
        part: Part,
        source: Source,
        dropped: Dropped,
        room: int | None,
    ):
        self.chunker = chunker
        self.root = root
        self.name = name
        self.part = part
        self.source = source
        self.dropped = dropped
        self.room = room
        self.last = False
        self.columns: list[dict[str, np.ndarray]] = []
        self.documents: list[tuple[int, str | None, int]] = []

    def add(self, batch: list[Document]) -> bool:
        """Chunks a batch; False if there is no room for all of it."""
        columns, chunks = self.chunker.chunk(batch)
        if self.room is not None:
            fits = list(accumulate(chunks.tolist()))
            kept = sum(total <= self.room for total in fits)
            self.last = kept < len(batch)
            batch, chunks = batch[:kept], chunks[:kept]
            columns = {name: column[: int(chunks.sum())] for name, column in columns.items()}
            self.room -= int(chunks.sum())
        for document, number in zip(batch, chunks.tolist(), strict=True):
            if number:
                self.documents.append((document.document_id, document.name, number))
            else:
                record = document.document_id - self.part.first_document_id + self.part.start
                self.dropped.add(BadRecord(*record_location(self.source, record), "no tokens in the text"))
        self.columns.append(columns)
        return not self.last

    def save(self, temporary: Path, features: Features, with_documents: bool) -> dict[str, Any]:
        """Writes the shard to `temporary`; returns its record."""
        empty = {name: np.zeros((0, *_width(feature)), dtype=np.int64) for name, feature in features.items()}
        columns = {
            name: np.concatenate([part[name] for part in self.columns]) if self.columns else empty[name]
            for name in features
        }
        save_shard(temporary, columns, features)
        if with_documents:
            ids, names, chunks = zip(*self.documents, strict=True) if self.documents else ((), (), ())
            types = {"document_id": pa.int64(), "id": pa.string(), "chunks": pa.int64()}
            table = pa.table(dict(zip(types, (ids, names, chunks), strict=True)), schema=pa.schema(types))
            with whole(self.root / "documents" / f"{self.name}.parquet") as file:
                pq.write_table(table, file)
        if self.dropped.bad:
            with whole(self.root / "quarantine" / f"{self.name}.jsonl") as file:
                bad = [{**asdict(bad), "file": self.source.public(bad.file)} for bad in self.dropped.bad]
                file.write_text("".join(json.dumps(record) + "\n" for record in bad), encoding="utf-8")
        return {
            "rows": len(columns["length"]),
            "documents": len(self.documents),
            "tokens": int(columns["length"].sum()),
            "bytes": int(columns["num_bytes"].sum()),
            "dropped": {"bad_records": len(self.dropped.bad), "filtered": self.dropped.filtered},
            "last": self.last,
        }


def _width(feature: Value | List) -> tuple[int, ...]:
    return (feature.length,) if isinstance(feature, List) else ()


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Groups documents to about a million characters, which are tokenized in parallel."""
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
