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
Verifies a datastore or a model by computing all checksums, counts and cross-references again.

A [`Finding`] names the file or field, the problem, and the stage that remakes it. The command is `retro verify`.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from data_prep.chunk import restore_shard
from data_prep.chunker import control_tokens_inside
from data_prep.embed import embed_chunks
from data_prep.index import build_index
from data_prep.neighbors import find_neighbors
from data_prep.shard_writer import chunk_counts
from data_prep.stage_files import directory_lock, write_manifest
from data_prep.upkeep.findings import Finding, short
from data_prep.upkeep.verify_model import is_adapter, verify_model
from modeling_retro.datastore.checksums import load_tokenizer, tokenizer_fingerprint, verify_file
from modeling_retro.datastore.chunks import read_columns
from modeling_retro.datastore.datastore import RetroDatastore, faiss, read_index
from modeling_retro.datastore.links import outward_links
from modeling_retro.datastore.manifest import (
    MANIFEST_NAME,
    TRAIN_SPLIT,
    ChunkShard,
    EmbeddingShard,
    IndexRecord,
    Manifest,
    NeighborShard,
    Shard,
    chunks_fingerprint,
    read_manifest,
)
from modeling_retro.datastore.splits import split_path
from modeling_retro.durable_files_retro import remove
from modeling_retro.encoder.endpoint import ADDRESS


_BLOCK = 1 << 16


def _by_chunks(shards: Sequence[ChunkShard], description: str) -> Iterator[ChunkShard]:
    """Yields shards, with a bar that counts their chunks."""
    with tqdm(total=sum(shard.rows for shard in shards), desc=description, unit=" chunks") as progress:
        for shard in shards:
            yield shard
            progress.update(shard.rows)


def verify(path: str | Path) -> list[Finding]:
    """
    Verifies a datastore or a model.

    Args:
        path (`str` or `Path`): Folder of the datastore or model.

    Returns:
        `list[Finding]`: the problems, empty if there are none.

    Raises:
        ValueError: If the folder holds neither a datastore nor a model.
    """
    path = Path(path)
    if (path / MANIFEST_NAME).is_file():
        return verify_datastore(path)
    if (path / "config.json").is_file() or is_adapter(path):
        return verify_model(path)
    raise ValueError(f"{path} is neither a datastore ({MANIFEST_NAME}) nor a model (config.json)")


def verify_datastore(path: str | Path) -> list[Finding]:
    """
    Verifies a datastore, and the datastores in it that also search its other splits (`search_all`).

    Args:
        path (`str` or `Path`): Folder of the datastore.

    Returns:
        `list[Finding]`: the problems, empty if there are none.
    """
    path = Path(path)
    links = [
        (link.relative_to(path).as_posix(), f"is a symbolic link to {target}") for link, target in outward_links(path)
    ]
    if links:  # what they lead to is not read
        return [Finding(link, f"{problem}, outside the datastore", "remove it") for link, problem in links]
    try:
        manifest = read_manifest(path, check_sha256=False)
    except ValueError as error:
        remedy = "restore it from a copy, or remake the datastore with `retro prepare --force`"
        return [Finding(MANIFEST_NAME, f"is refused ({error})", remedy)]
    findings = []
    if manifest.is_altered:
        problem = "was altered after it was written: its sha256 is not that of its other fields"
        findings.append(Finding(MANIFEST_NAME, problem, "restore it from a copy, unless counts are named below"))
    findings += _DatastoreVerifier(path, manifest).findings()
    for nested in sorted(path.glob(f"search_all/*/{MANIFEST_NAME}")):
        name = nested.parent.relative_to(path)
        remedy = f"remove {name} and run `retro prepare` again"
        found = verify_datastore(nested.parent)
        findings += [Finding(f"{name}/{finding.where}", finding.problem, remedy) for finding in found]
    return findings


class _DatastoreVerifier:
    """Verifies all files of a datastore in one pass."""

    def __init__(self, path: Path, manifest: Manifest):
        self.path = path
        self.manifest = manifest
        self.datastore = RetroDatastore(path, manifest)
        self.tokenizer: PreTrainedTokenizerBase | None = None
        # Stages of splits that are damaged. The parts that depend on them are not checked.
        self.broken: set[tuple[str, str]] = set()

    def findings(self) -> Iterator[Finding]:
        yield from self._files()
        yield from self._tokenizer()
        yield from self._encoder()
        for split in self.manifest.splits:
            yield from self._chunks(split)
        for split in self.manifest.splits:
            yield from self._embeddings(split)
        yield from self._index()
        yield from self._bm25()
        yield from self._removed()
        for split in self.manifest.splits:
            yield from self._neighbors(split)

    def _finding(
        self, where: Path | str, problem: str, stage: str, split: str | None = None, shard: str | None = None
    ):
        split_option = "" if split in (None, TRAIN_SPLIT) else f" --split {split}"
        remedy = {
            "chunks": f"`retro verify --repair --input …` remakes it; `retro chunk{split_option} --force` remakes all",
            "counts": "`retro verify --repair` counts again",
            "embeddings": f"`retro verify --repair` remakes it; `retro embed{split_option} --force` remakes all",
            "index": "`retro verify --repair` remakes it, and so does `retro index --force`",
            "bm25": "`retro verify --repair` remakes it, and so does `retro index --kind bm25 --force`",
            "neighbors": f"`retro verify --repair` remakes it; `retro neighbors{split_option} --force` remakes all",
            "tokenizer": "`retro chunk` with the same inputs and tokenizer writes it again",
            "encoder": "`retro embed` with the same encoder writes it again",
        }[stage]
        if self.manifest.files is not None:
            stage, remedy = None, f"remove {self.path} and download the datastore again"
        elif self.manifest.extends is not None:
            stage, remedy = None, "remove the datastore and remake it with `retro prepare`"
        elif stage == "chunks" and not self.manifest.splits[split].chunks.parts:
            stage, remedy = None, "import the datastore again with `retro import`"
        elif stage in ("tokenizer", "encoder"):
            stage = None
        where = where.relative_to(self.path).as_posix() if isinstance(where, Path) else where
        return Finding(where, problem, remedy, stage, split, shard)

    def _files(self) -> Iterator[Finding]:
        """Checks the files of a downloaded datastore that were not converted. Those that became Arrow are shards."""
        for name, sha256 in (self.manifest.files or {}).items():
            if not name.endswith(".parquet") and (problem := _file_problem(self.path / name, sha256)):
                yield self._finding(self.path / name, problem, "index")

    def _tokenizer(self) -> Iterator[Finding]:
        folder, expected = self.path / "tokenizer", self.manifest.tokenizer
        try:
            tokenizer = load_tokenizer(folder, expected.files)
            found = tokenizer_fingerprint(tokenizer)
        except Exception as error:  # libraries raise all kinds of errors for damaged files
            yield self._finding(folder, f"cannot be read ({short(error)})", "tokenizer")
            return
        for key in ("vocab_size", "sha256"):
            if found[key] != getattr(expected, key):
                problem = f"has the {key} {found[key]}, the manifest says {getattr(expected, key)}"
                yield self._finding(folder, problem, "tokenizer")
                return
        self.tokenizer = tokenizer

    def _encoder(self) -> Iterator[Finding]:
        if self.manifest.encoder is None:
            return
        try:
            self.datastore.check_encoder(self.datastore.open_encoder())
        except Exception as error:
            record = self.manifest.encoder
            unnamed = record.probes is not None and not os.environ.get(ADDRESS)
            if not (self.path / "encoder").is_dir() and (isinstance(error, OSError) or unnamed):
                problem = f"{record.name} could not be checked, because it is out of reach"
                remedy = "check it where the Hub is in reach"
                if record.probes is not None:
                    remedy = f"set {ADDRESS} to the address of the server that has it"
                yield Finding("the encoder", problem, remedy, unchecked=True)
                return
            yield self._finding(self.path / "encoder", f"is not what was embedded with ({short(error)})", "encoder")

    def _chunks(self, split: str) -> Iterator[Finding]:
        stage = self.manifest.splits[split].chunks
        field = f"splits.{split}.chunks"
        if not self.manifest.splits[split].is_chunked:
            yield Finding(field, "is unfinished", "run the same `retro chunk` again")
            self.broken.add((split, "chunks"))
            return
        last_document = -1
        for shard in _by_chunks(stage.shards, f"Verifying chunks of {split}"):
            folder = split_path(self.path, split) / "chunks" / shard.name
            columns, problems = self._read_shard(folder, shard, "chunks")
            if columns is not None:
                problems += self._chunk_problems(columns, last_document)
                last_document = int(columns["document_id"].max(initial=last_document))
            for problem in problems:
                self.broken.add((split, "chunks"))
                yield self._finding(folder, problem, "chunks", split, shard.name)
            table = split_path(self.path, split) / "documents" / f"{shard.name}.parquet"
            if shard.documents_sha256 is not None and (problem := _file_problem(table, shard.documents_sha256)):
                yield self._finding(table, problem, "chunks", split, shard.name)
            for name, found in {} if columns is None or problems else chunk_counts(columns).items():
                if found != getattr(shard, name):
                    where = f"{field}.shards {shard.name}"
                    problem = f"says {getattr(shard, name)} {name}, the shard holds {found}"
                    yield self._finding(where, problem, "counts", split)
        for total, found in stage.totals().items():
            if (recorded := getattr(stage, total)) != found:
                yield self._finding(f"{field}.{total}", f"is {recorded}, its shards say {found}", "counts", split)
        if stage.fingerprint != chunks_fingerprint(stage.shards):
            yield self._finding(f"{field}.fingerprint", "is not that of its shards", "counts", split)

    def _read_shard(self, folder: Path, record: Shard, kind: str) -> tuple[dict[str, np.ndarray] | None, list[str]]:
        """The columns of a shard, if they can be read, and the problems of its files."""
        expected = {
            "chunks": {"input_ids": 2, "length": 1, "document_id": 1, "num_bytes": 1},
            "neighbors": {"neighbor_ids": 2, "neighbor_scores": 2},
        }[kind]
        problem = _file_problem(folder, record.sha256)
        problems = [problem] if problem else []
        if not folder.is_dir():
            return None, problems
        try:
            columns = read_columns(folder)
        except Exception as error:
            return None, [*problems, f"cannot be read ({short(error)})"]
        found = {name: column.ndim for name, column in columns.items()}
        if found != expected:
            return None, [*problems, f"has the columns {found}, expected {expected} (dimensions)"]
        rows = len(next(iter(columns.values())))
        if rows != record.rows:
            return None, [*problems, f"has {rows} rows, the manifest says {record.rows}"]
        return columns, problems

    def _chunk_problems(self, columns: dict[str, np.ndarray], last_document: int) -> list[str]:
        m, problems = self.datastore.chunk_size, []
        input_ids, length, document_id = (columns[name] for name in ("input_ids", "length", "document_id"))
        if input_ids.shape[1] != m:
            return [f"has chunks of {input_ids.shape[1]} tokens, the manifest says {m}"]
        if not len(length):
            return []
        if length.min() < 1 or length.max() > m:
            return [f"has lengths from {length.min()} to {length.max()}, expected 1 to {m}"]
        is_token = np.arange(m) < length[:, None]
        tokens = input_ids[is_token]
        vocab_size = self.manifest.tokenizer.vocab_size
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            problems.append(f"has token ids from {tokens.min()} to {tokens.max()}, the vocabulary {vocab_size} tokens")
        if input_ids[~is_token].any():
            problems.append("has tokens after the length of a chunk, where padding is 0")
        changes = np.diff(document_id)
        if document_id[0] < max(0, last_document) or (changes < 0).any():
            problems.append("has document ids that do not ascend")
        if (length[:-1][changes == 0] < m).any():
            problems.append("has a chunk that is not full before the last one of its document")
        if columns["num_bytes"].min() < 0:
            problems.append("has negative numbers of bytes")
        if not self.manifest.allow_control_tokens and self.tokenizer is not None and not problems:
            number = control_tokens_inside(self.tokenizer, input_ids, length, document_id)
            if number:
                problems.append(f"has {number} control tokens inside documents, which the manifest excludes")
        return problems

    def _embeddings(self, split: str) -> Iterator[Finding]:
        split_record = self.manifest.splits[split]
        if split_record.embeddings is None:
            return
        records = {record.name: record for record in split_record.embedding_shards}
        for shard in _by_chunks(split_record.chunk_shards, f"Verifying embeddings of {split}"):
            file = split_path(self.path, split) / "embeddings" / f"{shard.name}.npy"
            problem = self._embedding_problem(file, records.get(shard.name), shard)
            if problem:
                self.broken.add((split, "embeddings"))
                yield self._finding(file, problem, "embeddings", split, shard.name)

    def _embedding_problem(self, file: Path, record: EmbeddingShard | None, chunks: ChunkShard) -> str | None:
        if record is None:
            return "is not made yet"
        if not record.is_made_of(chunks):
            return "belongs to other chunks"
        if problem := _file_problem(file, record.sha256):
            return problem
        try:
            vectors = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            return f"cannot be read ({short(error)})"
        expected = (chunks.rows, self.manifest.encoder and self.manifest.encoder.dim)
        if vectors.shape != expected or vectors.dtype != np.float16:
            return f"is {vectors.dtype} {list(vectors.shape)}, expected float16 {list(expected)}"
        for start in range(0, len(vectors), _BLOCK):
            if not np.isfinite(vectors[start : start + _BLOCK]).all():
                return "holds values that are not finite"
        return None

    def _index(self) -> Iterator[Finding]:
        record = self.manifest.index
        if record is None:
            return
        problems = []
        for name, sha256 in record.sha256.items():
            if problem := _file_problem(self.path / name, sha256):
                problems.append((self.path / name, problem))
        chunks = self.manifest.train.chunks
        if chunks is None or chunks.indexed_by(record) != "all":
            problems.append(("index.fingerprint", "is of other chunks, or of fewer"))
        if self.manifest.encoder is None or record.encoder_sha256 != self.manifest.encoder.sha256:
            problems.append(("index.encoder_sha256", "is that of another encoder"))
        if not problems:  # faiss does not check the files that it reads
            problems = list(self._index_problems(record, chunks.totals()["num_chunks"]))
        for where, problem in problems:
            self.broken.add((TRAIN_SPLIT, "index"))
            yield self._finding(where, problem, "index")

    def _removed(self) -> Iterator[Finding]:
        """Checks the lists of removed documents and of compacted documents."""
        document_id = None
        if (TRAIN_SPLIT, "chunks") not in self.broken:
            document_id = self.datastore.chunks.document_id
        for key in ("removed", "compacted"):
            record = getattr(self.manifest, key)
            if record is None:
                continue
            file = self.path / record.name
            remedy = "restore it from a copy, or remake the datastore from its documents"
            if problem := _file_problem(file, record.sha256):
                self.broken.add((TRAIN_SPLIT, "removed"))
                yield Finding(file.name, problem, remedy)
                continue
            documents = np.load(file, allow_pickle=False)
            if len(documents) != record.documents or (np.diff(documents) <= 0).any():
                yield Finding(key, f"says {record.documents} documents, its file lists {len(documents)}", remedy)
            if document_id is None:
                continue
            chunks = int(np.isin(document_id, documents).sum())
            expected = self.manifest.removed.chunks if key == "removed" else 0
            if chunks != expected:
                yield Finding(key, f"says that {expected} of the chunks are theirs, the shards hold {chunks}", remedy)

    def _bm25(self) -> Iterator[Finding]:
        record = self.manifest.bm25
        if record is None:
            return
        folder, problems = self.path / record.folder, []
        for name, sha256 in record.sha256.items():
            if problem := _file_problem(folder / name, sha256):
                problems.append((folder / name, problem))
        chunks = self.manifest.train.chunks
        if chunks is None or chunks.indexed_by(record) != "all":
            problems.append(("bm25.fingerprint", "is of other chunks, or of fewer"))
        if not problems:
            try:
                from modeling_retro.datastore.bm25 import (
                    Bm25Index,  # needs a library that other datastores do not need
                )

                index = Bm25Index(folder, record)
                index.check()
                if index.ntotal != (rows := chunks.totals()["num_chunks"]):
                    problems.append((folder, f"holds {index.ntotal} chunks, there are {rows}"))
            except (ValueError, ImportError) as error:
                problems.append((folder, f"cannot be read ({short(error)})"))
        for where, problem in problems:
            self.broken.add((TRAIN_SPLIT, "bm25"))
            yield self._finding(where, problem, "bm25")

    def _index_problems(self, record: IndexRecord, rows: int) -> Iterator[tuple[Path | str, str]]:
        file = self.path / record.file_name
        try:
            index = read_index(file)
            for name, value in record.search_parameters.items():
                faiss.ParameterSpace().set_index_parameter(index, name, value)
        except (ValueError, RuntimeError) as error:
            yield file, f"cannot be read ({short(error)})"
            return
        metric = faiss.METRIC_INNER_PRODUCT if record.metric == "inner_product" else faiss.METRIC_L2
        found = {"ntotal": index.ntotal, "dim": index.d, "metric": index.metric_type}
        expected = {"ntotal": rows, "dim": self.manifest.encoder.dim, "metric": metric}
        for name in found:
            if found[name] != expected[name]:
                yield file, f"has the {name} {found[name]}, expected {expected[name]}"
        if record.ntotal != rows:
            yield "index.ntotal", f"is {record.ntotal}, there are {rows} chunks"

    def _neighbors(self, split: str) -> Iterator[Finding]:
        split_record = self.manifest.splits[split]
        if split_record.neighbors is None:
            return
        records = {record.name: record for record in split_record.neighbor_shards}
        for shard in _by_chunks(split_record.chunk_shards, f"Verifying neighbors of {split}"):
            record = records.get(shard.name)
            folder = split_path(self.path, split) / "neighbors" / (record.folder_name if record else shard.name)
            if record is None:
                problems = ["is not made yet"]
            elif not record.is_made_of(shard):
                problems = ["belongs to other chunks"]
            else:
                columns, problems = self._read_shard(folder, record, "neighbors")
                if columns is not None and not problems:
                    problems = list(self._neighbor_problems(split, shard, record, columns))
            for problem in problems:
                yield self._finding(folder, problem, "neighbors", split, shard.name)

    def _neighbor_problems(
        self, split: str, shard: ChunkShard, record: NeighborShard, columns: dict[str, np.ndarray]
    ) -> Iterator[str]:
        ids, scores = columns["neighbor_ids"], columns["neighbor_scores"]
        k = self.manifest.splits[split].neighbors.options["num_neighbors"]
        rows = sum(part.rows for part in self.manifest.train.chunk_shards)
        if ids.shape != (shard.rows, k) or scores.shape != ids.shape:
            yield f"has shape {list(ids.shape)}, expected {[shard.rows, k]}"
            return
        if ids.size and (ids.min() < -1 or ids.max() >= rows):
            yield f"has ids from {ids.min()} to {ids.max()}, expected -1 to {rows - 1}"
            return
        if not np.isfinite(scores).all():
            yield "has scores that are not finite"
        if ((ids[:, 1:] >= 0) & (ids[:, :-1] < 0)).any():
            yield "has a neighbor after an absent one"
        in_order = np.sort(ids, axis=1)
        if ((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)).any():
            yield "has the same neighbor twice"
        # Imported neighbors were chosen by another program.
        if self.broken & {(split, "chunks"), (TRAIN_SPLIT, "chunks")} or record.chunks_fingerprint is None:
            return
        if self.datastore.split(split).searched:
            own = read_columns(split_path(self.path, split) / "chunks" / shard.name)["document_id"]
            found = self.datastore.chunks.gather("document_id", ids)
            if ((found == own[:, None]) & (ids >= 0)).any():
                yield "has neighbors in the chunk's own document"


def _file_problem(path: Path, sha256: str) -> str | None:
    try:
        verify_file(path, sha256)
    except ValueError as error:
        return str(error).removeprefix(f"{path} ")
    return None


def repair_datastore(
    path: str | Path, inputs: str | Path | Dataset | Sequence[str | Path | Dataset] = ()
) -> list[Finding]:
    """
    Remakes the parts in which [`verify_datastore`] finds problems, and nothing else.

    Args:
        path (`str` or `Path`): The datastore.
        inputs (`str`, `Path`, `datasets.Dataset` or a sequence of them, *optional*):
            The inputs that the datastore was made from, wherever they are now. Shards of chunks are remade from them,
            byte for byte.

    Returns:
        `list[Finding]`: the problems that are left.

    Raises:
        ValueError: If a shard of chunks cannot be remade from the inputs.
    """
    path = Path(path)
    with directory_lock(path):
        findings = [finding for finding in verify_datastore(path) if finding.stage is not None]
        if not findings:
            return verify_datastore(path)
        chunks = dict.fromkeys((found.split, found.shard) for found in findings if found.stage == "chunks")
        manifest = read_manifest(path, check_sha256=False)
        was_altered = manifest.is_altered
        for split, shard in chunks:
            restore_shard(path, manifest, split, shard, inputs)
        for split in {found.split for found in findings if found.stage == "counts"}:
            _count_anew(path, manifest, split)
        if was_altered and manifest.is_altered:
            raise ValueError(
                f"{path / MANIFEST_NAME} was altered, and not only in its counts; restore it from a copy, or "
                "remake the datastore with `retro prepare --force`"
            )
        # Whole stages are remade last. A shard without a record is made by its stage.
        for stage in ("embeddings", "neighbors"):
            for found in findings:
                if found.stage == stage:
                    record = getattr(manifest.splits[found.split], stage)
                    record.shards = [shard for shard in record.shards if shard.name != found.shard]
        stages = {(found.stage, found.split) for found in findings}
        if ("index", None) in stages:
            index, manifest.index = manifest.index, None
        if ("bm25", None) in stages:
            bm25, manifest.bm25 = manifest.bm25, None
        write_manifest(path, manifest)
        for split, record in manifest.splits.items():
            if ("embeddings", split) in stages:
                embed_chunks(path, split=split, **record.embeddings.options)
        if ("index", None) in stages:
            for name in index.sha256:
                remove(path / name)
            build_index(path, **index.options)
        if ("bm25", None) in stages:
            from data_prep.bm25_index import build_bm25_index

            remove(path / bm25.folder)
            build_bm25_index(path, **bm25.options)
        for split, record in manifest.splits.items():
            if ("neighbors", split) in stages:
                find_neighbors(path, split=split, **record.neighbors.options)
        return verify_datastore(path)


def _count_anew(path: Path, manifest: Manifest, split: str) -> None:
    """Sets the counts of a split to those of its shards, if these are the recorded shards."""
    stage = manifest.splits[split].chunks
    for shard in stage.shards:
        folder = verify_file(split_path(path, split) / "chunks" / shard.name, shard.sha256)
        for name, count in chunk_counts(read_columns(folder)).items():
            setattr(shard, name, count)
    stage.set_shards(stage.shards)


__all__ = ["Finding", "repair_datastore", "verify", "verify_datastore", "verify_model"]
