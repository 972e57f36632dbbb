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
Builds the lexical index of a datastore: BM25 scores of its chunks, in the files of the library bm25s.

The library itself builds them from Python lists with all tokens of the corpus. Here the terms are counted shard by
shard, which many processes can share, and the scores are computed on the disk.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from data_prep.stage_files import (
    check_options,
    directory_lock,
    discard,
    open_manifest,
    process_state,
    run_shards,
    write_manifest,
)
from modeling_retro.datastore.bm25 import (  # if bm25s is missing, this import names the extra
    TERMS,
    bm25s,
    inverse_document_frequency,
    words_of_chunks,
)
from modeling_retro.datastore.checksums import checksum, load_tokenizer, verify_file
from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.datastore.manifest import TRAIN_SPLIT, Bm25Record, chunks_fingerprint
from modeling_retro.durable_files_retro import remove, whole
from modeling_retro.encoder.chunk_encoder import text_mask


_WORK = ".bm25-"
_WINDOW = 1 << 15


def build_bm25_index(
    datastore: str | Path, terms: str = "tokens", k1: float = 1.5, b: float = 0.75, force: bool = False
) -> Bm25Record:
    """
    Builds the BM25 index over the searched chunks, which needs no embeddings. If chunks were added later, the index is
    built again. An interrupted run is resumed with the shards whose terms are not counted yet.

    Args:
        datastore (`str` or `Path`): The datastore.
        terms (`str`, *optional*, defaults to `"tokens"`):
            The terms to compare: the `"tokens"` of the datastore, or the `"words"` of its text in lower case.
        k1 (`float`, *optional*, defaults to 1.5): Weight of repeated terms of a chunk.
        b (`float`, *optional*, defaults to 0.75): Penalty for long chunks, from 0 to 1.
        force (`bool`, *optional*, defaults to `False`): Whether to build the index again.

    Returns:
        [`Bm25Record`]: the record of the index in the manifest: `options`, `ntotal`, `num_terms`, ….

    Raises:
        ImportError: If bm25s is not installed.
        ValueError: If an option has an impossible value, or the chunks are missing or altered.
    """
    if terms not in TERMS:
        raise ValueError(f"terms is {terms!r}, expected one of {', '.join(TERMS)}")
    if k1 < 0 or not 0 <= b <= 1:
        raise ValueError(f"k1 is {k1} and b is {b}, expected k1 from 0 and b from 0 to 1")
    path = Path(datastore)
    with directory_lock(path):
        manifest = open_manifest(path)
        if force:
            discard(path, manifest, TRAIN_SPLIT, "bm25")
        options = {"terms": terms, "k1": k1, "b": b}
        before = manifest.bm25
        if before is not None:
            check_options("index --kind bm25", options, before.options)
        chunks = RetroDatastore(path, manifest).chunks
        shards = manifest.train.chunk_shards
        indexed = None if before is None else manifest.train.chunks.indexed_by(before)
        if indexed == "all" and (path / before.folder).is_dir():
            _remove_work(path)  # a run that was killed after its last step left its own
            return before
        if indexed == "others":
            raise ValueError(f"the BM25 index of {path} belongs to other chunks; use --force to build it again")
        fingerprint = chunks_fingerprint(shards)
        run = hashlib.sha256(json.dumps([options, fingerprint], sort_keys=True).encode()).hexdigest()[:16]
        work = path / (_WORK + run)
        # A datastore that was changed keeps the index of the earlier version for its readers.
        folder = path / (f"bm25-{manifest.version}" if manifest.version else "bm25")
        state = process_state()
        _remove_work(path, but=work)
        tokenizer = load_tokenizer(path / "tokenizer", manifest.tokenizer.files)

        def count(index: int, temporary: Path, advance: Callable[[int], Any]) -> dict[str, Any]:
            verify_file(path / "chunks" / shards[index].name, shards[index].sha256)
            columns = chunks.shard(index)
            mask = np.arange(chunks.chunk_size) < columns["length"][:, None]
            with temporary.open("wb") as file:
                np.savez(file, **count_terms(columns["input_ids"], mask, tokenizer, terms, advance))
            return {}

        names = [shard.name for shard in shards]
        sizes = [shard.rows for shard in shards]
        run_shards(work, [], names, count, suffix=".npz", description="Counting terms", sizes=sizes)
        if state.is_main_process:
            with whole(folder) as temporary:
                _write_scores([work / f"{name}.npz" for name in names], len(chunks), options, work, temporary)
        state.wait_for_everyone()
        manifest.bm25 = Bm25Record(
            options=options,
            folder=folder.name,
            ntotal=len(chunks),
            num_terms=len(np.load(folder / "indptr.csc.index.npy", mmap_mode="r", allow_pickle=False)) - 1,
            shards=len(shards),
            fingerprint=fingerprint,
            sha256={file.name: checksum(file) for file in sorted(folder.iterdir())},
        )
        write_manifest(path, manifest)
        if state.is_main_process:
            remove(work)
            if before is not None and before.folder != folder.name:
                remove(path / before.folder)
        state.wait_for_everyone()
        return manifest.bm25


def _remove_work(path: Path, but: Path | None = None) -> None:
    """Removes the unfinished files of other runs."""
    state = process_state()
    if state.is_main_process:
        for other in path.glob(f"{_WORK}*"):
            if other != but:
                remove(other)
    state.wait_for_everyone()


def count_terms(
    input_ids: np.ndarray,
    mask: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    terms: str,
    advance: Callable[[int], Any] | None = None,
) -> dict[str, np.ndarray]:
    """
    Counts the occurrences of each term in each chunk.

    Args:
        input_ids (`np.ndarray`): Integers [n, m], ids of `tokenizer`.
        mask (`np.ndarray`): bool [n, m], False at padding.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer of the chunks.
        terms (`str`): `"tokens"` or `"words"`.
        advance (`Callable`, *optional*): Called with the number of chunks whose terms were counted.

    Returns:
        `dict[str, np.ndarray]`: `row`, `term` and `count` int32 [pairs], in the order of rows and terms, `length`
        int32 [n], the number of terms of each chunk, and `words` uint8, the words of terms 0, 1, … in UTF-8, each on a
        line.
    """
    numbers: dict[str, int] = {}
    parts = []
    for start in range(0, len(input_ids), _WINDOW):
        window = slice(start, start + _WINDOW)
        parts.append(_count_window(input_ids[window], mask[window], tokenizer, terms, numbers))
        if advance is not None:
            advance(len(input_ids[window]))
    for number, part in enumerate(parts):
        part["row"] += number * _WINDOW
    names = ("row", "term", "count", "length")
    counts = {name: np.concatenate([np.zeros(0, dtype=np.int32), *(part[name] for part in parts)]) for name in names}
    return counts | {"words": np.frombuffer("\n".join(numbers).encode(), dtype=np.uint8)}


def _count_window(
    input_ids: np.ndarray, mask: np.ndarray, tokenizer: PreTrainedTokenizerBase, terms: str, numbers: dict[str, int]
) -> dict[str, np.ndarray]:
    if terms == "tokens":
        row, column = np.nonzero(text_mask(input_ids, mask, tokenizer))
        term = input_ids[row, column].astype(np.int64)
    else:
        words = words_of_chunks(input_ids, mask, tokenizer)
        row = np.repeat(np.arange(len(words)), np.fromiter(map(len, words), dtype=np.int64, count=len(words)))
        flat = (numbers.setdefault(word, len(numbers)) for word in chain.from_iterable(words))
        term = np.fromiter(flat, dtype=np.int64, count=len(row))
    width = int(term.max(initial=0)) + 1
    pairs, count = np.unique(row * width + term, return_counts=True)
    counts = {"row": pairs // width, "term": pairs % width, "count": count}
    counts["length"] = np.bincount(row, minlength=len(input_ids))
    return {name: values.astype(np.int32) for name, values in counts.items()}


def _write_scores(files: Sequence[Path], ntotal: int, options: dict[str, Any], work: Path, folder: Path) -> None:
    """Writes the scores of all chunks, term by term, from the counts of their shards."""
    vocabulary: dict[str, int] = {}
    frequency, total_length = np.zeros(0, dtype=np.int64), 0
    for file in files:
        counts = _read_counts(file, vocabulary)
        found = np.bincount(counts["term"])
        frequency = np.pad(frequency, (0, max(0, len(found) - len(frequency))))
        frequency[: len(found)] += found
        total_length += int(counts["length"].sum())
    indptr = np.concatenate([[0], np.cumsum(frequency)])
    idf = inverse_document_frequency(frequency, ntotal)
    mean_length = total_length / max(ntotal, 1)
    # Memory-mapped files cannot be empty.
    data = np.memmap(work / "scores", dtype=np.float32, mode="w+", shape=(max(int(indptr[-1]), 1),))
    indices = np.memmap(work / "rows", dtype=np.int32, mode="w+", shape=data.shape)
    filled, first_row = indptr[:-1].copy(), 0
    with tqdm(total=ntotal, desc="Scoring terms", unit=" chunks") as progress:
        for file in files:
            counts = _read_counts(file, vocabulary)
            order = np.argsort(counts["term"], kind="stable")  # rows already ascend
            row, term, count = (counts[name][order] for name in ("row", "term", "count"))
            length = counts["length"][row] / mean_length
            score = idf[term] * count / (options["k1"] * (1 - options["b"] + options["b"] * length) + count)
            first = np.flatnonzero(np.diff(term, prepend=-1))
            number = np.diff(np.append(first, len(term)))
            place = filled[term] + np.arange(len(term)) - np.repeat(first, number)
            data[place], indices[place] = score, first_row + row
            filled[term[first]] += number
            first_row += len(counts["length"])
            progress.update(len(counts["length"]))
    size = int(indptr[-1])
    bm25 = bm25s.BM25(method="lucene", k1=options["k1"], b=options["b"])
    bm25.nonoccurrence_array = None
    bm25.scores = {"data": data[:size], "indices": indices[:size], "indptr": indptr, "num_docs": ntotal}
    bm25.vocab_dict = vocabulary
    bm25.save(folder, show_progress=False)


def _read_counts(file: Path, vocabulary: dict[str, int]) -> dict[str, np.ndarray]:
    """The counts of a shard, with the numbers of its words in `vocabulary`, to which new words are added."""
    with np.load(file, allow_pickle=False) as stored:
        counts = dict(stored)
    if len(counts["words"]):
        words = counts["words"].tobytes().decode().split("\n")
        numbers = np.array([vocabulary.setdefault(word, len(vocabulary)) for word in words])
        counts["term"] = numbers[counts["term"]]
    return counts
