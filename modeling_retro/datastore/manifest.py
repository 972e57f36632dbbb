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
The manifest of a datastore, `datastore.json`, as Python objects

[`read_manifest`] reads it, attributes are its fields, and [`Manifest.write`] writes it. Reading and writing a file
gives the same bytes: keys that this code does not know are kept.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from huggingface_hub.dataclasses import strict

from ..durable_files_retro import public_name, write_json
from .record import (
    BOOL,
    COUNT,
    COUNTS,
    DIGEST,
    FIELDS,
    NAME,
    SIZE,
    TEXT,
    Record,
    checked,
    mapping,
    matching,
    one_of,
    or_null,
    rule_of,
)


if TYPE_CHECKING:  # this import takes seconds, and the stages that make a datastore need no configuration
    from ..configuration_retro import RetroConfig


MANIFEST_NAME = "datastore.json"
# The latest version that this code reads. It reads every version up to this one and refuses later ones. A field may be
# added without a new version if older code can do without the field. The version increases when older code would
# misread the new format. A datastore is written with the first version that can describe it, so that older code can
# read most datastores.
FORMAT_VERSION = 2
FIRST_FORMAT_VERSION = 1
# The version of a datastore that was changed. Older code would return the documents that were removed.
CHANGED_FORMAT_VERSION = 2
TRAIN_SPLIT = "train"
# Ways to find neighbors, and the indexes that each needs.
INDEXES = {"dense": ("index",), "bm25": ("bm25",), "hybrid": ("index", "bm25"), "rerank": ("index",)}


def _is_inside(value: Any) -> bool:
    return isinstance(value, str) and "\\" not in value and not {"", ".", ".."} & set(value.split("/"))


_FILES = mapping(rule_of(_is_inside, "a path inside the datastore"), DIGEST)


@strict
@dataclass
class TokenizerRecord(Record):
    """The tokenizer of the chunks."""

    name: str = checked(TEXT)
    vocab_size: int = checked(SIZE)
    sha256: str = checked(DIGEST)
    files: dict[str, str] | None = checked(_FILES, None)  # checksums of its files


@strict
@dataclass
class EncoderRecord(Record):
    """
    The encoder of the embeddings: the arguments that load it, and the sha256 of its weights. Of an encoder behind an
    endpoint, whose weights nobody here sees, `probes` are its vectors of fixed texts.
    """

    name: str = checked(TEXT)
    revision: str | None = checked(or_null(TEXT))
    pooling: str = checked(TEXT)
    normalize: bool = checked(BOOL)
    dim: int = checked(SIZE)
    sha256: str = checked(DIGEST)
    prompt: str = checked(TEXT, "")
    files: dict[str, str] | None = checked(_FILES, None)  # checksums of the files of the copy, but for its weights
    truncate_dim: int | None = checked(or_null(SIZE), None)
    probes: str | None = checked(matching(re.compile("[A-Za-z0-9+/]*={0,2}"), "base64"), None)  # float16 [texts, dim]

    @property
    def hub_name(self) -> str:
        """Its name on the Hub, for a datastore without a copy of it. Raises a `ValueError` if it is not one."""
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.name) or self.name.startswith("."):
            raise ValueError(
                f"the datastore names the encoder {self.name!r}; without a copy in it, only an id on the Hub is opened"
            )
        return self.name


@strict
@dataclass
class SourceRecord(Record):
    """An input of the chunks, as `Source.describe` describes it, by which a later run recognizes it."""

    kind: str = checked(TEXT)
    path: str = checked(TEXT)
    bytes: int | None = checked(COUNT, None)
    filter: str | None = checked(or_null(TEXT), None)
    xxh3: str | None = checked(matching(re.compile("[0-9a-f]{32}"), "32 hexadecimal digits"), None)  # of its contents


@strict
@dataclass
class Part(Record):
    """
    Records `start` to `stop` (exclusive) of the source with index `source`, which become one shard of chunks. `offset`
    is their position in bytes in a jsonl file that is not compressed. `broken` is the reason why the source cannot be
    read further, if it cannot.
    """

    source: int = checked(COUNT)
    start: int = checked(COUNT)
    stop: int = checked(COUNT)
    offset: int = checked(COUNT)
    first_document_id: int = checked(COUNT)
    broken: str | None = checked(or_null(TEXT))


@dataclass
class Shard(Record):
    """A file or folder of a stage, its checksum and its number of rows."""

    name: str = checked(NAME)
    sha256: str = checked(DIGEST)
    rows: int = checked(COUNT)


@strict
@dataclass
class ChunkShard(Shard):
    """A shard of chunks, with the counts that [`ChunksStage.set_shards`] adds up."""

    documents: int = checked(COUNT)
    tokens: int = checked(COUNT)
    bytes: int = checked(COUNT)
    dropped: dict[str, int] = checked(COUNTS)
    last: bool = checked(BOOL, False)  # whether `max_chunks` ended the split in it
    documents_sha256: str | None = checked(DIGEST, None)  # of the table of its documents
    unknown_tokens: int = checked(COUNT, 0)  # among those that were read; deduplication may have removed some


@dataclass
class MadeShard(Shard):
    """A shard that was made from the shard of chunks of the same name, whose checksum was `chunks_sha256`."""

    chunks_sha256: str = checked(DIGEST)

    def is_made_of(self, chunks: ChunkShard) -> bool:
        """Whether it was made from a shard of chunks as it is now."""
        return self.chunks_sha256 == chunks.sha256


@strict
@dataclass
class EmbeddingShard(MadeShard):
    """A file of embeddings."""


@strict
@dataclass
class NeighborShard(MadeShard):
    """A shard of neighbors. They were found among the chunks of a fingerprint, which imported ones do not have."""

    counts: dict[str, int] = checked(COUNTS)
    folder: str | None = checked(NAME, None)
    chunks_fingerprint: str | None = checked(or_null(DIGEST), None, key="index")
    removed: str | None = checked(DIGEST, None)  # checksum of the list of removed documents that were left out

    @property
    def folder_name(self) -> str:
        """Name of its folder. If the neighbors were searched again, it differs from that of their chunks."""
        return self.folder or self.name


@strict
@dataclass
class Deduplicated(Record):
    """What deduplication compared and removed."""

    options: dict[str, Any] = checked(FIELDS)
    run: str = checked(matching(re.compile("[0-9a-f]+"), "hexadecimal digits"))
    shards: int = checked(COUNT)
    documents: int = checked(COUNT)
    chunks: int = checked(COUNT)


@strict
@dataclass
class ChunksStage(Record):
    """The chunks of a split. Those of a split that is unfinished have no fingerprint and no totals."""

    options: dict[str, Any] = checked(FIELDS)  # arguments of `chunk_documents`
    sources: list[SourceRecord]
    parts: list[Part]
    shards: list[ChunkShard]
    fingerprint: str | None = checked(DIGEST, None)
    num_chunks: int | None = checked(COUNT, None)
    num_documents: int | None = checked(COUNT, None)
    num_tokens: int | None = checked(COUNT, None)
    num_bytes: int | None = checked(COUNT, None)
    num_unknown_tokens: int = checked(COUNT, 0)
    dropped: dict[str, int] | None = checked(COUNTS, None)
    deduplicated: Deduplicated | None = None

    def set_shards(self, shards: list[ChunkShard]) -> None:
        """Records shards, their fingerprint and their totals."""
        self.shards = shards
        self.fingerprint = chunks_fingerprint(shards)
        for name, total in self.totals().items():
            setattr(self, name, total)
        reasons = dict.fromkeys(reason for shard in shards for reason in shard.dropped)
        self.dropped = {reason: sum(shard.dropped.get(reason, 0) for shard in shards) for reason in reasons}

    def totals(self) -> dict[str, int]:
        """The totals of the shards, under the names that they have in this record."""
        counts = {"num_chunks": "rows", "num_documents": "documents", "num_tokens": "tokens", "num_bytes": "bytes"}
        counts["num_unknown_tokens"] = "unknown_tokens"
        return {total: sum(getattr(shard, count) for shard in self.shards) for total, count in counts.items()}

    def foreign(self, made: Sequence[MadeShard]) -> MadeShard | None:
        """The first of some shards that was made from other chunks or in another order. Shards may be missing."""
        places, last = {shard.name: number for number, shard in enumerate(self.shards)}, -1
        for shard in made:
            number = places.get(shard.name, -1)
            if number <= last or not shard.is_made_of(self.shards[number]):
                return shard
            last = number
        return None

    def indexed_by(self, index: "IndexRecord | Bm25Record") -> Literal["all", "some", "others"]:
        """Whether an index is of all these chunks, of the first shards of them, or of others."""
        if index.fingerprint == chunks_fingerprint(self.shards):
            return "all"
        return "some" if index.fingerprint == chunks_fingerprint(self.shards[: index.shards]) else "others"


@strict
@dataclass
class EmbeddingsStage(Record):
    """The embeddings of a split."""

    options: dict[str, Any] = checked(FIELDS)  # arguments of `embed_chunks`
    shards: list[EmbeddingShard]


def _neighbor_options(value: Any) -> tuple[str, str] | None:
    if problem := FIELDS(value):
        return problem
    for key, rule in {"num_neighbors": SIZE, "retriever": one_of(*INDEXES)}.items():
        if key in value and (problem := rule(value[key])):
            return f".{key}", problem[1]
    return None if "num_neighbors" in value else (".num_neighbors", "is missing")


@strict
@dataclass
class NeighborsStage(Record):
    """The neighbors of the chunks of a split."""

    options: dict[str, Any] = checked(_neighbor_options)  # arguments of `find_neighbors`
    shards: list[NeighborShard]
    counts: dict[str, int] | None = checked(COUNTS, None)


@strict
@dataclass
class SplitRecord(Record):
    """A split: the stages that are begun or finished. `searched` says that a split other than train is searched."""

    searched: bool = checked(BOOL, False)
    chunks: ChunksStage | None = None
    embeddings: EmbeddingsStage | None = None
    neighbors: NeighborsStage | None = None

    @property
    def is_chunked(self) -> bool:
        """Whether the chunks are finished."""
        return self.chunks is not None and self.chunks.fingerprint is not None

    @property
    def chunk_shards(self) -> list[ChunkShard]:
        return [] if self.chunks is None else self.chunks.shards

    @property
    def embedding_shards(self) -> list[EmbeddingShard]:
        return [] if self.embeddings is None else self.embeddings.shards

    @property
    def neighbor_shards(self) -> list[NeighborShard]:
        return [] if self.neighbors is None else self.neighbors.shards

    def check_made_of_chunks(self, stage: str, remedy: str) -> None:
        """
        Checks that the embeddings or neighbors were made from the chunks that are there now.

        Args:
            stage (`str`): `"embeddings"` or `"neighbors"`.
            remedy (`str`): What to do otherwise, in the error.

        Raises:
            ValueError: If a shard was made from other chunks.
        """
        foreign = self.chunks.foreign(self.embedding_shards if stage == "embeddings" else self.neighbor_shards)
        if foreign is not None:
            raise ValueError(
                f"the {stage} of {foreign.name} belong to other chunks or another order of rows; {remedy}"
            )


@strict
@dataclass
class IndexRecord(Record):
    """The faiss index over the searched chunks."""

    options: dict[str, Any] = checked(FIELDS)  # arguments of `build_index`
    factory: str = checked(TEXT)
    metric: str = checked(one_of("inner_product", "l2"))
    ntotal: int = checked(COUNT)
    shards: int = checked(COUNT)
    encoder_sha256: str = checked(DIGEST)
    search_parameters: dict[str, int] = checked(mapping(TEXT, SIZE))
    fingerprint: str = checked(DIGEST)
    sha256: dict[str, str] = checked(mapping(NAME, DIGEST))
    recall: dict[str, Any] | None = checked(FIELDS, None)

    @property
    def file_name(self) -> str:
        """Name of the file of the index, which another one with its lists may accompany."""
        return next((name for name in self.sha256 if name.endswith(".faiss")), "index.faiss")


def _bm25_options(value: Any) -> tuple[str, str] | None:
    if problem := FIELDS(value):
        return problem
    if "terms" not in value:
        return ".terms", "is missing"
    problem = one_of("tokens", "words")(value["terms"])
    return problem and (".terms", problem[1])


@strict
@dataclass
class Bm25Record(Record):
    """The BM25 index over the searched chunks."""

    options: dict[str, Any] = checked(_bm25_options)  # arguments of `build_bm25_index`
    folder: str = checked(NAME)
    ntotal: int = checked(COUNT)
    num_terms: int = checked(COUNT)
    shards: int = checked(COUNT)
    fingerprint: str = checked(DIGEST)
    sha256: dict[str, str] = checked(mapping(NAME, DIGEST))


@dataclass
class DocumentList(Record):
    """A file with numbers of documents."""

    name: str = checked(NAME)
    sha256: str = checked(DIGEST)
    documents: int = checked(COUNT)


@strict
@dataclass
class CompactedDocuments(DocumentList):
    """Documents that have numbers, but no chunks any longer."""


@strict
@dataclass
class RemovedDocuments(DocumentList):
    """Documents that were removed, and the number of their chunks, which are still in the files."""

    chunks: int = checked(COUNT)


@strict
@dataclass
class Manifest(Record):
    """
    The manifest of a datastore.

    Args:
        format_version (`int`): Version of the format of the files.
        chunk_size (`int`): Number m of tokens in a chunk.
        continuation_chunks (`int`): Number of chunks by which a neighbor continues in its document.
        tokenizer ([`TokenizerRecord`]): The tokenizer of the chunks.
        splits (`dict[str, SplitRecord]`): The splits by their names. `"train"` is the one that is searched.
        version (`int`, *optional*, defaults to 0): Number of times that documents were added, removed or compacted.
        allow_control_tokens (`bool`, *optional*, defaults to `True`):
            Whether text that spelled a special token became that token. A datastore without a record of this was made
            before there was a choice, and allowed it.
        encoder ([`EncoderRecord`], *optional*): The encoder of the embeddings.
        index ([`IndexRecord`], *optional*): The faiss index.
        bm25 ([`Bm25Record`], *optional*): The BM25 index.
        removed ([`RemovedDocuments`], *optional*): Removed documents whose chunks are still in the files.
        compacted ([`CompactedDocuments`], *optional*): Removed documents whose chunks are no longer in the files.
        extends (`dict[str, str]`, *optional*): Fingerprints of the chunks of the datastore that this one extends.
        files (`dict[str, str]`, *optional*): Checksums of all files of a datastore on the Hub.
        request (`str`, *optional*): Identity of the change that made this version.
        sha256 (`str`, *optional*):
            Checksum of all other fields, so that no field can change unnoticed. Those made before there was one have
            none.
    """

    format_version: int = checked(SIZE)
    chunk_size: int = checked(SIZE)
    continuation_chunks: int = checked(COUNT)
    tokenizer: TokenizerRecord
    splits: dict[str, SplitRecord]
    version: int = checked(COUNT, 0)
    allow_control_tokens: bool = checked(BOOL, True)
    encoder: EncoderRecord | None = None
    index: IndexRecord | None = None
    bm25: Bm25Record | None = None
    removed: RemovedDocuments | None = None
    compacted: CompactedDocuments | None = None
    extends: dict[str, str] | None = checked(mapping(NAME, DIGEST), None)
    files: dict[str, str] | None = checked(_FILES, None)
    request: str | None = checked(DIGEST, None)
    sha256: str | None = checked(DIGEST, None)

    @property
    def train(self) -> SplitRecord:
        """The searched split. It is empty as long as it is not begun."""
        return self.splits.get(TRAIN_SPLIT) or SplitRecord()

    def own_files(self) -> set[str]:
        """
        Lists the files and folders of this version of the datastore, without those that all versions share, relative
        to the datastore. Some may not exist, because a datastore need not have ids of its documents or bad records.
        """
        names = set(self.index.sha256) if self.index is not None else set()
        names |= {record.name for record in (self.removed, self.compacted) if record is not None}
        names |= {self.bm25.folder} if self.bm25 is not None else set()
        for split, record in self.splits.items():
            root = split_root(split)
            for shard in record.chunk_shards:
                names |= {f"{root}chunks/{shard.name}", f"{root}documents/{shard.name}.parquet"}
                names.add(f"{root}quarantine/{shard.name}.jsonl")
            names |= {f"{root}embeddings/{shard.name}.npy" for shard in record.embedding_shards}
            names |= {f"{root}neighbors/{shard.folder_name}" for shard in record.neighbor_shards}
        return names

    def checksums(self) -> dict[str, str]:
        """The checksums of the files and folders of this version, by their names relative to the datastore."""
        found = {}
        for split, record in self.splits.items():
            root = split_root(split)
            for shard in record.chunk_shards:
                found[f"{root}chunks/{shard.name}"] = shard.sha256
                if shard.documents_sha256 is not None:
                    found[f"{root}documents/{shard.name}.parquet"] = shard.documents_sha256
            found |= {f"{root}embeddings/{shard.name}.npy": shard.sha256 for shard in record.embedding_shards}
            found |= {f"{root}neighbors/{shard.folder_name}": shard.sha256 for shard in record.neighbor_shards}
        found |= self.index.sha256 if self.index is not None else {}
        if self.bm25 is not None:
            found |= {f"{self.bm25.folder}/{name}": sha256 for name, sha256 in self.bm25.sha256.items()}
        for folder, part in (("tokenizer", self.tokenizer), ("encoder", self.encoder)):
            if part is not None:
                found |= {f"{folder}/{name}": sha256 for name, sha256 in (part.files or {}).items()}
        return found | {record.name: record.sha256 for record in (self.removed, self.compacted) if record is not None}

    @property
    def is_altered(self) -> bool:
        """Whether its checksum, if it has one, is not that of its other fields."""
        return self.sha256 not in (None, self.checksum())

    def seal(self) -> Self:
        """Gives the manifest the checksum of its other fields, and returns it."""
        self.sha256 = self.checksum()
        return self

    def checksum(self) -> str:
        """The checksum of all fields but `sha256`."""
        values = {key: value for key, value in self.to_dict().items() if key != "sha256"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Writes `datastore.json` to a folder, completely or not at all. If it has a checksum, that is renewed."""
        if self.sha256 is not None:
            self.seal()
        write_json(path / MANIFEST_NAME, self.to_dict())


def split_root(split: str) -> str:
    """Beginning of the names of the files of a split, relative to the datastore."""
    return "" if split == TRAIN_SPLIT else f"splits/{split}/"


def read_manifest(path: Path, name: str = MANIFEST_NAME, check_sha256: bool = True) -> Manifest:
    """
    Reads `datastore.json` of a folder and checks all of its fields, before any file that it names is opened.

    Args:
        path (`Path`): The folder.
        name (`str`, *optional*, defaults to `"datastore.json"`): Name of the file, for those of earlier versions.
        check_sha256 (`bool`, *optional*, defaults to `True`): Whether to compare the checksum of all fields.

    Raises:
        ValueError: If the file is missing, is not JSON, was made by newer code, was altered, or holds an impossible
            value. The message names the field.
    """
    file = path / name
    if not file.is_file():
        raise ValueError(f"{path} is not a datastore: it has no {name}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if SIZE(version):
        raise ValueError(f"{file} is no manifest of a datastore: its format_version is {version!r}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {version}, this code reads versions up to {FORMAT_VERSION}: the datastore was "
            "made by a newer release of retro-transformers, install that"
        )
    try:
        manifest = Manifest.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{file} is damaged or was altered: {error}; make or download the datastore again") from error
    if check_sha256 and manifest.is_altered:
        raise ValueError(
            f"{file} was altered after it was written: its sha256 is not that of its other fields; restore it from a "
            "copy, or make or download the datastore again"
        )
    return manifest


def chunks_fingerprint(shards: Sequence[ChunkShard]) -> str:
    """The identity of a set of chunks in their order, from the checksums of its shards."""
    return hashlib.sha256(" ".join(shard.sha256 for shard in shards).encode()).hexdigest()


def check_split_name(split: str) -> None:
    """Raises a `ValueError` unless `split` can be the name of a folder of the datastore."""
    if NAME(split):
        raise ValueError(
            f"the name of a split must be a name without a path (letters, digits, '.', '_' and '-'), got {split!r}"
        )


def check_model(manifest: Manifest, name: str | Path, config: "RetroConfig") -> None:
    """
    Checks that a model can read the tokens of a datastore.

    Args:
        manifest ([`Manifest`]): The manifest of the datastore.
        name (`str` or `Path`): Name of the datastore in errors.
        config ([`RetroConfig`]):
            Config of the model. If it names its tokenizer (`tokenizer_sha256`), that is compared too.

    Raises:
        ValueError: If the chunk size or the tokenizer differs.
    """
    if config.chunk_size != manifest.chunk_size:
        raise ValueError(f"chunk_size {config.chunk_size} is not the chunk size of {name}: {manifest.chunk_size}")
    tokenizer = manifest.tokenizer
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{name} was made with another tokenizer than the model: {tokenizer.name} has "
            f"{tokenizer.vocab_size} tokens, the model {config.vocab_size}"
        )
    if config.tokenizer_sha256 not in (None, tokenizer.sha256):
        raise ValueError(
            f"{name} was made with another tokenizer than the model: that of {tokenizer.name} has the sha256 "
            f"{tokenizer.sha256[:12]}, the model was trained with {config.tokenizer_sha256[:12]}"
        )


def describe_datastore(manifest: Manifest) -> dict[str, Any]:
    """
    Describes a datastore for a report: its sizes and origin, without the folders of this machine.

    Args:
        manifest ([`Manifest`]): The manifest of the datastore.

    Returns:
        `dict`: ready for JSON.
    """
    train = manifest.train.chunks
    facts = {
        "chunks": train.num_chunks,
        "documents": train.num_documents,
        "chunk_size": manifest.chunk_size,
        "tokenizer": public_name(manifest.tokenizer.name),
        "fingerprint": train.fingerprint,
    }
    if manifest.encoder is not None:
        facts["encoder"] = public_name(manifest.encoder.name)
    if manifest.index is not None:
        facts["index"] = manifest.index.factory
    if manifest.bm25 is not None:
        facts["bm25"] = manifest.bm25.options
    if manifest.version:
        facts["version"] = manifest.version
    if manifest.removed is not None:
        facts["removed_documents"] = manifest.removed.documents
    return facts
