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
Imports data sets of other RETRO implementations into a datastore, so that they need not be tokenized and embedded
again.

The format `norlund` takes an `index.spec.json`, or a `data.spec.json` that also has neighbors. The format
`retro_pytorch` takes the memory map of the chunks. The files `*.doc_ids.dat`, `*.chunks.knn.dat` and
`processed-stats.json`, which holds the sizes, are found beside it unless they are given. If embeddings, index or
neighbors are missing, the other stages make them as usual.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from data_prep.chunk import chunk_features, save_tokenizer
from data_prep.chunker import control_tokens_inside
from data_prep.embed import copy_encoder
from data_prep.neighbors import neighbor_features
from data_prep.shard_writer import chunk_counts
from data_prep.shipped_models import find_model
from data_prep.stage_files import (
    clear_records,
    directory_lock,
    open_or_begin,
    process_state,
    run_shards,
    save_shard,
    share_settings,
    write_manifest,
)
from modeling_retro.datastore.checksums import file_checksums, load_tokenizer, tokenizer_fingerprint
from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.datastore.manifest import (
    TRAIN_SPLIT,
    ChunkShard,
    ChunksStage,
    EmbeddingShard,
    EmbeddingsStage,
    EncoderRecord,
    Manifest,
    NeighborShard,
    NeighborsStage,
    SourceRecord,
    SplitRecord,
    check_split_name,
    read_manifest,
)
from modeling_retro.datastore.splits import split_path
from modeling_retro.durable_files_retro import public_name, whole
from modeling_retro.encoder.chunk_encoder import ChunkEncoder, decode_chunks


logger = logging.get_logger(__name__)

# Smallest cosine between imported embeddings and those of the encoder that is said to have made them.
_AGREEMENT = 0.98
_SAMPLE = 32


@dataclass
class ForeignShard:
    """A shard of another program: tokens [n, m], padded with 0, documents [n], vectors [n, dim], neighbors [n, k]."""

    name: str
    chunks: np.ndarray
    document_id: np.ndarray
    embeddings: np.ndarray | None = None
    neighbors: np.ndarray | None = None
    # Number of chunks among which the neighbors were searched, if the files say so
    searched: int | None = None


def import_datastore(
    format: str,
    source: str | Path,
    output_dir: str | Path,
    tokenizer: str | Path | PreTrainedTokenizerBase,
    encoder: str | Path | ChunkEncoder | None = None,
    split: str = TRAIN_SPLIT,
    doc_ids: str | Path | None = None,
    knn: str | Path | None = None,
    stats: str | Path | None = None,
    chunk_size: int = 64,
) -> dict[str, Any]:
    """
    Imports chunks into a datastore, and embeddings and neighbors if there are any.

    The source text is not available, so `num_bytes` of a chunk is the number of bytes of its decoded text.

    Args:
        format (`str`): `"norlund"` or `"retro_pytorch"`.
        source (`str` or `Path`): `index.spec.json` or `data.spec.json`, or the memory map of the chunks.
        output_dir (`str` or `Path`): The datastore.
        tokenizer (`str`, `Path` or `PreTrainedTokenizerBase`): The tokenizer that made the token ids.
        encoder (`str`, `Path` or [`ChunkEncoder`], *optional*):
            The encoder that made the embeddings. A sample of them is compared with it. Without it, embeddings are not
            imported.
        split (`str`, *optional*, defaults to `"train"`): The split to import to.
        doc_ids (`str` or `Path`, *optional*): Memory map of the document ids (`retro_pytorch`).
        knn (`str` or `Path`, *optional*): Memory map of the neighbors (`retro_pytorch`).
        stats (`str` or `Path`, *optional*): Json with the number of chunks (`retro_pytorch`).
        chunk_size (`int`, *optional*, defaults to 64): Number of tokens in a chunk (`retro_pytorch`).

    Returns:
        `dict`: the manifest.

    Raises:
        ValueError: If a file is missing, or disagrees with another file, the tokenizer or the encoder. The message
            names it.
    """
    if format == "norlund":
        shards = read_norlund(Path(source), is_searched=split == TRAIN_SPLIT)
    elif format == "retro_pytorch":
        shards = read_retro_pytorch(Path(source), doc_ids, knn, stats, chunk_size)
    else:
        raise ValueError(f"format must be 'norlund' or 'retro_pytorch', got {format!r}")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = load_tokenizer(find_model(tokenizer))
    check_split_name(split)
    _check_shards(shards, len(tokenizer))
    path = Path(output_dir)
    with directory_lock(path):
        manifest = open_or_begin(path)
        if manifest is not None and split in manifest.splits:
            raise ValueError(f"{path} has a split {split!r} already; choose another directory")
        manifest = _write_chunks(path, manifest, split, shards, tokenizer)
        if encoder is not None and all(shard.embeddings is not None for shard in shards):
            _write_embeddings(path, manifest, split, shards, encoder)
        if all(shard.neighbors is not None for shard in shards):
            _write_neighbors(path, manifest, split, shards)
    return read_manifest(path)


def _load(path: Path, dimensions: int, rows: int | None = None) -> np.ndarray:
    """Memory-maps a npy file and checks its dimensions and rows."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if array.ndim != dimensions or rows is not None and len(array) != rows:
        expected = f"{dimensions} dimensions" + ("" if rows is None else f" and {rows} rows")
        raise ValueError(f"{path} has shape {list(array.shape)}, expected {expected}")
    return array


def _read_spec(spec: Path) -> tuple[list[dict[str, Path]], Path | None]:
    """The files of each shard of a spec file, and the spec file of the chunks that neighbors are, if it names one."""
    try:
        content = json.loads(spec.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {spec}: {error}") from error
    entries = content["shards"] if isinstance(content, dict) and "shards" in content else content
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "chunks" in entry for entry in entries):
        raise ValueError(f"{spec} is neither a list of shards nor a mapping with `shards`; each shard has `chunks`")
    shards = [{key: spec.parent / value for key, value in entry.items()} for entry in entries]
    index_spec = content.get("neighbours", {}).get("index_spec") if isinstance(content, dict) else None
    return shards, None if index_spec is None else spec.parent / index_spec


def read_norlund(spec: Path, is_searched: bool = True) -> list[ForeignShard]:
    """
    Reads `index.spec.json` (a list of shards with embeddings) or `data.spec.json` (`shards` with neighbors). The
    latter names the former: if both list the same shards, the embeddings are taken from there.

    Args:
        spec (`Path`): The file. Paths in it are relative to its folder.
        is_searched (`bool`, *optional*, defaults to `True`): Whether the neighbors are to be found among these chunks.

    Raises:
        ValueError: If a file is missing or two files disagree.
    """
    entries, index_spec = _read_spec(spec)
    searched = None
    if index_spec is not None:
        indexed, _ = _read_spec(index_spec)
        if [files["chunks"].resolve() for files in entries] == [files["chunks"].resolve() for files in indexed]:
            entries = [found | files for found, files in zip(indexed, entries, strict=True)]
        elif is_searched:
            raise ValueError(
                f"the neighbors of {spec} are chunks of {index_spec}, which lists other shards or another order; "
                f"import {index_spec.name} first, and {spec.name} into another split of the same datastore (--split)"
            )
        searched = sum(len(_load(files["chunks"], 2)) for files in indexed)
    shards, first_document = [], 0
    for files in entries:
        for key in ("seq2chunk", "chunk2seq"):
            if key not in files:
                raise ValueError(f"{spec}: the shard {files['chunks']} has no {key}")
        chunks = _load(files["chunks"], 2)
        document_id = np.asarray(_load(files["chunk2seq"], 1, len(chunks)), dtype=np.int64)
        starts = np.flatnonzero(np.diff(document_id, prepend=-1))
        if not np.array_equal(starts, _load(files["seq2chunk"], 1)):
            raise ValueError(f"{files['seq2chunk']} and {files['chunk2seq']} disagree about where documents begin")
        shards.append(
            ForeignShard(
                name=str(files["chunks"]),
                chunks=chunks,
                document_id=document_id + first_document,
                embeddings=_load(files["embeddings"], 2, len(chunks)) if "embeddings" in files else None,
                neighbors=_load(files["neighbours"], 2, len(chunks)) if "neighbours" in files else None,
                searched=searched,
            )
        )
        first_document += len(starts)
    return shards


def read_retro_pytorch(
    chunks: Path,
    doc_ids: str | Path | None = None,
    knn: str | Path | None = None,
    stats: str | Path | None = None,
    chunk_size: int = 64,
) -> list[ForeignShard]:
    """
    Reads the memory maps of RETRO-pytorch, which have no headers. They hold chunks int32 [N, m + 1], whose last column
    is the first token of the next chunk, document ids int32 [N], and neighbors int32 [N, k].

    Args:
        chunks (`Path`): The file of the chunks, such as `train.chunks.dat`.
        doc_ids (`str` or `Path`, *optional*): Defaults to `train.doc_ids.dat`.
        knn (`str` or `Path`, *optional*): Defaults to `train.chunks.knn.dat`, if there is one.
        stats (`str` or `Path`, *optional*): Defaults to `processed-stats.json`, or else `train.stats.json`.
        chunk_size (`int`, *optional*, defaults to 64): Number m of tokens in a chunk.

    Raises:
        ValueError: If a file is missing, or its size does not fit the number of chunks.
    """
    stem = chunks.name.removesuffix(".dat").removesuffix(".chunks")
    doc_ids = Path(doc_ids or chunks.with_name(f"{stem}.doc_ids.dat"))
    if stats is None:
        names = ("processed-stats.json", f"{stem}.stats.json")
        stats = next(
            (file for name in names if (file := chunks.with_name(name)).is_file()), chunks.with_name(names[0])
        )
    stats = Path(stats)
    default_knn = chunks.with_name(f"{stem}.chunks.knn.dat")
    knn = Path(knn) if knn is not None else default_knn if default_knn.exists() else None
    for file in (chunks, doc_ids, stats, knn):
        if file is not None and not file.is_file():
            raise ValueError(f"{file} is missing")
    try:
        number = int(json.loads(stats.read_text(encoding="utf-8"))["chunks"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{stats}: expected {{"chunks": …, "docs": …, "seqs": …}}: {error}') from error

    def memory_map(file: Path, width: int | None) -> np.ndarray:
        # The maps are allocated for the largest possible number of chunks, and the rest is empty.
        values = np.memmap(file, dtype=np.int32, mode="r")
        width = width or _width_of_rows(values, number)
        if width == 0 or len(values) < number * width:
            raise ValueError(f"{file} holds {len(values)} numbers, fewer than {number} chunks of {width} ({stats})")
        return values[: number * width].reshape(number, width)

    return [
        ForeignShard(
            name=str(chunks),
            chunks=memory_map(chunks, chunk_size + 1)[:, :chunk_size],
            document_id=memory_map(doc_ids, 1)[:, 0].astype(np.int64),
            neighbors=None if knn is None else memory_map(knn, None),
        )
    ]


def _width_of_rows(values: np.ndarray, number: int) -> int:
    """
    The length k of each of `number` rows of distinct ids. Reading them for training appends rows of zeros to the file,
    so its size alone does not say it: it is the smallest k after whose last row there are only zeros.
    """
    used = len(values) if not values.any() else int(np.flatnonzero(values)[-1]) + 1
    return -(-used // max(1, number))


def _check_shards(shards: Sequence[ForeignShard], vocab_size: int) -> None:
    if not shards or not sum(len(shard.chunks) for shard in shards):
        raise ValueError("there are no chunks to import")
    m = shards[0].chunks.shape[1]
    for shard in shards:
        if shard.chunks.shape[1] != m:
            raise ValueError(f"{shard.name} has chunks of {shard.chunks.shape[1]} tokens, {shards[0].name} of {m}")
        if len(shard.chunks) and not 0 <= int(shard.chunks.min()) <= int(shard.chunks.max()) < vocab_size:
            raise ValueError(
                f"{shard.name} has token ids from {shard.chunks.min()} to {shard.chunks.max()}; the tokenizer has "
                f"{vocab_size} tokens: it is not the one that made them"
            )
        if (np.diff(shard.document_id) < 0).any():
            raise ValueError(f"the documents of {shard.name} are not in order")


def _lengths(shard: ForeignShard) -> np.ndarray:
    """Number of real tokens of each chunk. Only the last chunk of a document is padded, with zeros at its end."""
    chunks = np.asarray(shard.chunks)
    trailing = np.argmax(chunks[:, ::-1] != 0, axis=1)
    is_last = np.diff(shard.document_id, append=-1) != 0
    return np.where(is_last, np.maximum(chunks.shape[1] - trailing, 1), chunks.shape[1]).astype(np.int32)


def _write_chunks(
    path: Path,
    manifest: Manifest | None,
    split: str,
    shards: Sequence[ForeignShard],
    tokenizer: PreTrainedTokenizerBase,
) -> Manifest:
    m = shards[0].chunks.shape[1]
    fingerprint = tokenizer_fingerprint(tokenizer)
    control_tokens = sum(
        control_tokens_inside(tokenizer, shard.chunks, _lengths(shard), shard.document_id) for shard in shards
    )
    if manifest is not None and manifest.splits:
        RetroDatastore(path, manifest).check_tokenizer(tokenizer)
        RetroDatastore(path, manifest).check_chunk_size(m)
        if control_tokens and not manifest.allow_control_tokens:
            raise ValueError(
                f"{shards[0].name} has control tokens inside documents ({control_tokens} in all), and {path} was "
                "begun without; choose another directory"
            )
    elif control_tokens:
        logger.warning(
            f"{shards[0].name} has control tokens inside documents ({control_tokens} in all): they can end a text or "
            "speak as another role of a chat"
        )
    if manifest is None or not manifest.splits:
        settings = {
            "chunk_size": m,
            "continuation_chunks": 1,
            "allow_control_tokens": control_tokens > 0,
            "tokenizer": {"name": public_name(tokenizer.name_or_path), **fingerprint},
        }
        manifest = share_settings(manifest, settings)
        write_manifest(path, manifest)
        save_tokenizer(path, tokenizer)
        manifest.tokenizer.files = file_checksums(path / "tokenizer")
    features = chunk_features(m, fingerprint["vocab_size"])

    def make(index: int, temporary: Path, advance: Callable[[int], Any]) -> dict[str, Any]:
        shard, length = shards[index], _lengths(shards[index])
        mask = np.arange(m) < length[:, None]
        num_bytes = np.zeros(len(length), dtype=np.int64)
        for start in range(0, len(length), 8192):
            rows = slice(start, start + 8192)
            texts = decode_chunks(shard.chunks[rows], mask[rows], tokenizer)
            num_bytes[rows] = [len(text.encode()) for text in texts]
        columns = {
            "input_ids": np.asarray(shard.chunks) * mask,
            "length": length,
            "document_id": shard.document_id,
            "num_bytes": num_bytes,
        }
        save_shard(temporary, columns, features)
        return {**chunk_counts(columns), "dropped": {}}

    names = [f"shard-{index:05d}" for index in range(len(shards))]
    root = split_path(path, split)
    sources = [SourceRecord(kind="import", path=Path(shard.name).name) for shard in shards]
    stage = ChunksStage(options={}, sources=sources, parts=[], shards=[])
    records = run_shards(root / "chunks", [], names, make, description="Importing chunks")
    stage.set_shards([ChunkShard.from_dict(record) for record in records])
    manifest.splits[split] = SplitRecord(chunks=stage)
    write_manifest(path, manifest)
    clear_records(root / "chunks")
    return manifest


def _write_embeddings(
    path: Path,
    manifest: Manifest,
    split: str,
    shards: Sequence[ForeignShard],
    encoder: str | Path | ChunkEncoder,
) -> None:
    if not isinstance(encoder, ChunkEncoder):
        encoder = ChunkEncoder.from_pretrained(find_model(encoder))
    datastore = RetroDatastore(path, manifest)
    if manifest.encoder is not None:
        datastore.check_encoder(encoder)
    chunks = datastore.split(split).chunks
    for index, shard in enumerate(shards):
        rows = np.linspace(0, len(shard.chunks) - 1, min(_SAMPLE, len(shard.chunks))).astype(np.int64)
        expected = encoder.encode_chunks(*chunks.take(rows + chunks.offsets[index]), datastore.tokenizer)
        found = np.asarray(shard.embeddings[rows], dtype=np.float32)
        if found.shape != expected.shape:
            raise ValueError(
                f"the embeddings of {shard.name} have {found.shape[1]} dimensions, {encoder.name} has {encoder.dim}"
            )
        norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
        cosine = float(np.median((found * expected).sum(axis=1) / np.maximum(norms, 1e-9)))
        if not cosine >= _AGREEMENT:
            raise ValueError(
                f"the embeddings of {shard.name} are not those of {encoder.name}: the median cosine of a sample is "
                f"{cosine:.3f}, expected at least {_AGREEMENT}"
            )
    root = split_path(path, split)
    chunk_shards = manifest.splits[split].chunk_shards

    def make(index: int, temporary: Path, advance: Callable[[int], Any]) -> dict[str, Any]:
        vectors = np.asarray(shards[index].embeddings, dtype=np.float16)
        if not np.isfinite(vectors).all():
            raise ValueError(f"the embeddings of {shards[index].name} are not all finite")
        with temporary.open("wb") as file:
            np.save(file, vectors, allow_pickle=False)
        return {"rows": len(vectors), "chunks_sha256": chunk_shards[index].sha256}

    names = [shard.name for shard in chunk_shards]
    records = run_shards(root / "embeddings", [], names, make, suffix=".npy", description="Importing embeddings")
    manifest.encoder = EncoderRecord.from_dict(encoder.describe() | {"name": public_name(encoder.name)})
    embeddings = [EmbeddingShard.from_dict(record) for record in records]
    manifest.splits[split].embeddings = EmbeddingsStage({"dtype": "float32"}, embeddings)
    if process_state().is_main_process and encoder.folder is not None:
        with whole(path / "encoder") as temporary:
            copy_encoder(encoder.folder, temporary)
        manifest.encoder.files = file_checksums(path / "encoder", but=".safetensors")
    write_manifest(path, manifest)
    clear_records(root / "embeddings")


def _write_neighbors(path: Path, manifest: Manifest, split: str, shards: Sequence[ForeignShard]) -> None:
    total = sum(shard.rows for shard in manifest.train.chunk_shards)
    k = shards[0].neighbors.shape[1]
    for shard in shards:
        if shard.searched not in (None, total):
            raise ValueError(
                f"the neighbors of {shard.name} were searched among {shard.searched} chunks, and the split "
                f"{TRAIN_SPLIT!r} has {total}; import the index.spec.json that they belong to first"
            )
        low, high = int(shard.neighbors.min()), int(shard.neighbors.max())
        if shard.neighbors.shape[1] != k or low < -1 or high >= total:
            raise ValueError(
                f"the neighbors of {shard.name} ([n, {shard.neighbors.shape[1]}], ids {low} to {high}) do not fit: "
                f"expected [n, {k}] and ids from -1 to {total - 1}, the searched chunks"
            )
    chunk_shards = manifest.splits[split].chunk_shards

    def make(index: int, temporary: Path, advance: Callable[[int], Any]) -> dict[str, Any]:
        ids = np.asarray(shards[index].neighbors, dtype=np.int64)
        # The files hold the order of the neighbors, but not their scores.
        columns = {"neighbor_ids": ids, "neighbor_scores": np.zeros(ids.shape, dtype=np.float32)}
        save_shard(temporary, columns, neighbor_features(k))
        return {"rows": len(ids), "counts": {}, "chunks_sha256": chunk_shards[index].sha256, "index": None}

    names = [shard.name for shard in chunk_shards]
    root = split_path(path, split)
    records = run_shards(root / "neighbors", [], names, make, description="Importing neighbors")
    options = {"num_neighbors": k, "drop_near_duplicates": None}
    neighbors = [NeighborShard.from_dict(record) for record in records]
    manifest.splits[split].neighbors = NeighborsStage(options, neighbors, counts={})
    write_manifest(path, manifest)
    clear_records(root / "neighbors")
