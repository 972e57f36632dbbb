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
Opens a datastore for reading: its chunks, its splits and its index.

```python
from modeling_retro import RetroDatastore

datastore = RetroDatastore.from_pretrained("datastore")
datastore.chunks.take([0, 1])[0]  # int64 [2, 64]: token ids of the first two chunks
datastore.take_neighbors([0, 1])[0]  # int64 [2, 128]: each with its continuation, as a neighbor
```
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub import CommitInfo
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .chunk_encoder_retro import ChunkEncoder
from .configuration_retro import RetroConfig
from .datastore_manifest_retro import (
    MANIFEST_NAME,
    PLAIN_NAME,
    TRAIN_SPLIT,
    check_model,
    index_name,
    neighbors_folder,
    read_manifest,
)
from .datastore_versions_retro import HeldVersion, open_version


if TYPE_CHECKING:
    from .bm25_retro import Bm25Index

try:
    import datasets
    import faiss
    import pyarrow as pa
except ImportError as error:
    raise ImportError(
        "Retrieval needs `datasets` and `faiss`. Install one of the two extras: "
        "`pip install retro-transformers[cpu]` or `pip install retro-transformers[gpu]`."
    ) from error


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """
    Computes the identity of a tokenizer. It is equal for two tokenizers that give every text the same ids.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A fast tokenizer.

    Returns:
        `dict`: `vocab_size`, with added tokens, and `sha256` of the serialised tokenizer without padding and
        truncation.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is a slow tokenizer; the datastore needs a fast one (tokenizer.json)"
        )
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return {"vocab_size": len(tokenizer), "sha256": hashlib.sha256(backend.to_str().encode()).hexdigest()}


def chunks_fingerprint(shards: Sequence[Mapping[str, Any]]) -> str:
    """The identity of a set of chunks in their order, from the checksums of its shards."""
    return hashlib.sha256(" ".join(shard["sha256"] for shard in shards).encode()).hexdigest()


class ChunkTable:
    """
    The chunks of one split, read-only. They are zero-copy views of the Arrow files of its shards, which are opened on
    first use.

    Args:
        folders (`Sequence[Path]`): Folders written by `datasets.Dataset.save_to_disk`, in the order of the chunk ids.
        rows (`Sequence[int]`): Number of chunks in each folder.
        chunk_size (`int`): Number m of tokens in a chunk.
    """

    def __init__(self, folders: Sequence[Path], rows: Sequence[int], chunk_size: int):
        self.folders = list(folders)
        self.chunk_size = chunk_size
        self.offsets = np.concatenate([[0], np.cumsum(np.asarray(rows, dtype=np.int64))]).astype(np.int64)
        # Each mapped file needs a file descriptor, and a large datastore has more shards than a process may open
        # files.
        self._shard = lru_cache(maxsize=256)(self._open)
        self._columns: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __repr__(self) -> str:
        return f"ChunkTable({len(self)} chunks of {self.chunk_size} tokens in {len(self.folders)} shards)"

    def __getstate__(self) -> dict[str, Any]:
        return {"folders": self.folders, "rows": np.diff(self.offsets).tolist(), "chunk_size": self.chunk_size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    @property
    def length(self) -> np.ndarray:
        """`np.ndarray` int32 [N]: Number of real tokens in each chunk. The rest of a chunk is padding."""
        return self._column("length")

    @property
    def document_id(self) -> np.ndarray:
        """`np.ndarray` int64 [N]: Document of each chunk, ascending. The chunks of a document are consecutive."""
        return self._column("document_id")

    @property
    def num_bytes(self) -> np.ndarray:
        """`np.ndarray` int64 [N]: Number of UTF-8 bytes of the source text that the tokens of each chunk cover."""
        return self._column("num_bytes")

    def take(self, chunk_ids: Any) -> tuple[np.ndarray, np.ndarray]:
        """
        Gathers chunks.

        Args:
            chunk_ids (`np.ndarray`): Integers of any shape [...]; -1 stands for an absent chunk.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: token ids int64 [..., m] (0 where masked) and mask bool [..., m].
        """
        chunk_ids = np.asarray(chunk_ids, dtype=np.int64)
        length = self.gather("length", chunk_ids)
        mask = np.arange(self.chunk_size) < length[..., None]
        return self.gather("input_ids", chunk_ids).astype(np.int64) * mask, mask

    def gather(self, column: str, chunk_ids: np.ndarray) -> np.ndarray:
        """
        Gathers the values of a column for chunks of any shape [...]. Absent chunks (-1) get zeros.

        Args:
            column (`str`): `"input_ids"`, `"length"`, `"document_id"` or `"num_bytes"`.
            chunk_ids (`np.ndarray`): int64 [...].

        Returns:
            `np.ndarray`: [...], or [..., m] for the token ids.
        """
        flat = np.asarray(chunk_ids, dtype=np.int64).reshape(-1)
        if flat.size and (flat.max() >= len(self) or flat.min() < -1):
            raise ValueError(f"chunk ids must lie in [-1, {len(self) - 1}], got {flat.min()} to {flat.max()}")
        shards = np.searchsorted(self.offsets, flat, side="right") - 1
        order = np.argsort(shards, kind="stable")
        order = order[np.count_nonzero(shards < 0) :]
        first = self._shard(0)[column]
        values = np.zeros((len(flat), *first.shape[1:]), dtype=first.dtype)
        bounds = np.flatnonzero(np.diff(shards[order])) + 1
        for positions in np.split(order, bounds) if order.size else []:
            shard = int(shards[positions[0]])
            values[positions] = self._shard(shard)[column][flat[positions] - self.offsets[shard]]
        return values.reshape((*np.shape(chunk_ids), *first.shape[1:]))

    def shard(self, index: int) -> dict[str, np.ndarray]:
        """
        The columns of one shard as views of its file: `input_ids` [n, m], `length`, `document_id`, `num_bytes` [n].
        """
        return self._shard(index)

    def _column(self, name: str) -> np.ndarray:
        if name not in self._columns:
            parts = [self._shard(index)[name] for index in range(len(self.folders))]
            self._columns[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return self._columns[name]

    def _open(self, index: int) -> dict[str, np.ndarray]:
        columns = read_columns(self.folders[index])
        rows, width = columns["input_ids"].shape
        expected = int(self.offsets[index + 1] - self.offsets[index])
        if width != self.chunk_size:
            raise ValueError(
                f"{self.folders[index]} holds chunks of {width} tokens, the manifest says {self.chunk_size}"
            )
        if rows != expected:
            raise ValueError(f"{self.folders[index]} holds {rows} chunks, the manifest says {expected}")
        return columns


def load_shard(folder: Path) -> datasets.Dataset:
    """Opens a shard as a memory-mapped dataset. Raises a `ValueError` if its list of files leads out of its folder."""
    for file in json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]:
        if not PLAIN_NAME.fullmatch(file["filename"]):
            raise ValueError(f"{folder / 'state.json'} names {file['filename']!r}, expected a name without a path")
    return datasets.load_from_disk(str(folder))


def read_columns(folder: Path) -> dict[str, np.ndarray]:
    """
    Reads the columns of a folder that `datasets.Dataset.save_to_disk` wrote, as zero-copy views of its memory-mapped
    file.

    Args:
        folder (`Path`): The folder. If its file has several record batches, they are copied into one array.

    Returns:
        `dict[str, np.ndarray]`: [n] for scalar columns, [n, width] for fixed-size lists.
    """
    try:
        table = load_shard(folder).data
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot read the shard {folder}: {error}") from error
    columns = {}
    for name in table.column_names:
        pieces = []
        for piece in table.column(name).chunks:
            if pa.types.is_fixed_size_list(piece.type):
                pieces.append(piece.flatten().to_numpy(zero_copy_only=True).reshape(-1, piece.type.list_size))
            else:
                pieces.append(piece.to_numpy(zero_copy_only=True))
        columns[name] = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return columns


class DatastoreSplit:
    """
    The chunks of one split, and their neighbors among the searched chunks.

    Args:
        path (`Path`): Folder of the split: the datastore itself, or `splits/NAME` in it.
        record (`dict`): The record of the split in the manifest.
        chunk_size (`int`): Number m of tokens in a chunk.
        searched (`bool`): Whether these chunks are also searched, so that a chunk must not find its own document.
    """

    def __init__(self, path: Path, record: Mapping[str, Any], chunk_size: int, searched: bool):
        self.path = path
        self._held: HeldVersion | None = None
        self._is_removed: _RemovedChunks | None = None
        self.record = record
        self.searched = searched
        if "fingerprint" not in record.get("chunks", {}):
            raise ValueError(f"{path} has no finished chunks; run `retro chunk` (again)")
        shards = record["chunks"]["shards"]
        folders = [path / "chunks" / shard["name"] for shard in shards]
        missing = [str(folder) for folder in folders if not folder.is_dir()]
        if missing:
            raise ValueError(f"the shard {missing[0]} is missing ({len(missing)} of {len(shards)} shards are)")
        self.chunks = ChunkTable(folders, [shard["rows"] for shard in shards], chunk_size)

    @cached_property
    def _neighbors(self) -> dict[str, np.ndarray]:
        records = self.record.get("neighbors", {}).get("shards", [])
        chunk_shards = self.record["chunks"]["shards"]
        if len(records) < len(chunk_shards):
            raise ValueError(
                f"{self.path} has neighbors for {len(records)} of {len(chunk_shards)} shards of chunks; "
                "run `retro neighbors`"
            )
        for record, chunks in zip(records, chunk_shards, strict=True):
            if record["chunks_sha256"] != chunks["sha256"]:
                raise ValueError(
                    f"the neighbors of {record['name']} belong to other chunks or another order of rows; "
                    "run `retro neighbors --force`"
                )
        parts = [read_columns(self.path / "neighbors" / neighbors_folder(record)) for record in records]
        columns = {
            name: parts[0][name] if len(parts) == 1 else np.concatenate([part[name] for part in parts])
            for name in ("neighbor_ids", "neighbor_scores")
        }
        return columns if self._is_removed is None else drop_neighbors(columns, self._is_removed)

    @property
    def neighbor_ids(self) -> np.ndarray:
        """
        `np.ndarray` int64 [n, K]: Global ids of the searched chunks, best first. -1 if there are fewer, for example
        because a neighbor was removed.
        """
        return self._neighbors["neighbor_ids"]

    @property
    def neighbor_scores(self) -> np.ndarray:
        """`np.ndarray` float32 [n, K]: Scores of `neighbor_ids` in the metric of the index."""
        return self._neighbors["neighbor_scores"]


class _RemovedChunks:
    """Says of chunk ids [...] which are of removed documents, whose numbers a file lists."""

    def __init__(self, chunks: ChunkTable, file: Path, sha256: str):
        self.chunks = chunks
        self.file = file
        self.sha256 = sha256

    @cached_property
    def documents(self) -> np.ndarray:
        return np.load(verify_file(self.file, self.sha256), allow_pickle=False)

    def __call__(self, chunk_ids: np.ndarray) -> np.ndarray:
        return np.isin(self.chunks.gather("document_id", chunk_ids), self.documents) & (chunk_ids >= 0)


def drop_neighbors(
    columns: Mapping[str, np.ndarray], is_dropped: Callable[[np.ndarray], np.ndarray]
) -> dict[str, np.ndarray]:
    """
    Drops some of the stored neighbors. Those behind move up, and the places at the end become empty.

    Args:
        columns (`Mapping[str, np.ndarray]`): `neighbor_ids` int64 [n, K] and `neighbor_scores` float32 [n, K].
        is_dropped (`Callable`): Maps ids [n, K] to bool [n, K], True for those to drop.
    """
    ids = columns["neighbor_ids"]
    kept = (ids >= 0) & ~is_dropped(ids)
    order = np.argsort(~kept, axis=1, kind="stable")
    kept = np.take_along_axis(kept, order, axis=1)
    empty = {"neighbor_ids": -1, "neighbor_scores": 0}
    return {
        name: np.where(kept, np.take_along_axis(columns[name], order, axis=1), value).astype(columns[name].dtype)
        for name, value in empty.items()
    }


class RetroDatastore:
    """
    A datastore that is opened for reading. Nothing is written to its folder. An opened datastore stays the version
    that it was when it was opened: documents that are added or removed later do not change it.

    Args:
        path (`Path`): The folder that holds `datastore.json`.
        manifest (`dict`): The contents of `datastore.json`.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path = path
        self.manifest = manifest
        self.chunk_size: int = manifest["chunk_size"]
        self.continuation_chunks: int = manifest["continuation_chunks"]
        self.neighbor_length = self.chunk_size * (1 + self.continuation_chunks)
        self._splits = {}
        self._held: HeldVersion | None = None

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, revision: str | None = None, **hub_kwargs) -> "RetroDatastore":
        """
        Opens a datastore from a folder or from a dataset repository on the Hub.

        Args:
            name_or_path (`str` or `Path`):
                A folder with `datastore.json`, the id of a dataset repository, or the address of a database that
                `retro export` wrote to (`milvus://…`, `postgresql://…`).
            revision (`str`, *optional*): Branch, tag or commit of the repository.
            hub_kwargs: Further arguments of [`~huggingface_hub.snapshot_download`].

        Raises:
            ValueError: If there is no datastore, or its files do not agree with its manifest.
        """
        if str(name_or_path).startswith(("milvus://", "postgresql://")):
            from .remote_datastore_retro import RemoteDatastore

            return RemoteDatastore(str(name_or_path))
        path = Path(name_or_path)
        if not path.is_dir():
            from .hub_transfer_retro import download_datastore

            path = download_datastore(str(name_or_path), revision=revision, **hub_kwargs)
        manifest, held = open_version(path)
        datastore = cls(path, manifest)
        datastore._held = held
        return datastore

    def reopen(self) -> "RetroDatastore":
        """Opens the version that the folder holds now."""
        return RetroDatastore.from_pretrained(self.path)

    def is_current(self) -> bool:
        """Whether the folder still holds the version that was opened. The check looks at one file."""
        return read_manifest(self.path) == self.manifest if self._held is None else self._held.is_current()

    def push_to_hub(self, repo_id: str, **kwargs) -> CommitInfo:
        """Uploads the datastore. The arguments are those of [`~modeling_retro.hub_transfer_retro.push_datastore`]."""
        from .hub_transfer_retro import push_datastore

        return push_datastore(self.path, repo_id, **kwargs)

    def __repr__(self) -> str:
        return f"RetroDatastore({str(self.path)!r}, {len(self.chunks)} chunks of {self.chunk_size} tokens)"

    def __getstate__(self) -> dict[str, Any]:
        # A copy, such as that in a data loader worker, opens the memory-mapped index and files for itself.
        return {"path": self.path, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the chunks."""
        tokenizer = AutoTokenizer.from_pretrained(self.path / "tokenizer")
        self.check_tokenizer(tokenizer)
        return tokenizer

    @property
    def chunks(self) -> ChunkTable:
        """[`ChunkTable`]: The searched chunks, which are those of the training split."""
        return self.split(TRAIN_SPLIT).chunks

    @property
    def neighbor_ids(self) -> np.ndarray:
        """`np.ndarray` int64 [N, K]: Neighbors of the searched chunks."""
        return self.split(TRAIN_SPLIT).neighbor_ids

    @property
    def neighbor_scores(self) -> np.ndarray:
        """`np.ndarray` float32 [N, K]: Scores of `neighbor_ids`."""
        return self.split(TRAIN_SPLIT).neighbor_scores

    def split(self, name: str) -> DatastoreSplit:
        """
        Returns one split. `"train"` holds the searched chunks. The chunks of other splits only look things up in it.

        Args:
            name (`str`): Name of the split, such as `"validation"`.

        Raises:
            ValueError: If the datastore has no such split.
        """
        if name not in self.manifest["splits"]:
            raise ValueError(f"{self.path} has no split {name!r}, only {', '.join(sorted(self.manifest['splits']))}")
        if name not in self._splits:
            record = self.manifest["splits"][name]
            searched = name == TRAIN_SPLIT or record.get("searched", False)
            split = DatastoreSplit(split_path(self.path, name), record, self.chunk_size, searched)
            split._held = self._held
            if "removed" in self.manifest:
                chunks, record = split.chunks if name == TRAIN_SPLIT else self.chunks, self.manifest["removed"]
                split._is_removed = _RemovedChunks(chunks, self.path / record["name"], record["sha256"])
            self._splits[name] = split
        return self._splits[name]

    @property
    def removed_documents(self) -> np.ndarray:
        """
        `np.ndarray` int64 [n], ascending: Documents that were removed, but whose chunks are still in the files until
        `retro compact` removes them.
        """
        is_removed = self.split(TRAIN_SPLIT)._is_removed
        return np.zeros(0, dtype=np.int64) if is_removed is None else is_removed.documents

    def is_removed(self, chunk_ids: Any) -> np.ndarray:
        """
        Finds the chunks of documents that were removed.

        Args:
            chunk_ids (`np.ndarray`): Global chunk ids of any shape [...]; -1 stands for an absent chunk.

        Returns:
            `np.ndarray`: bool [...].
        """
        chunk_ids = np.asarray(chunk_ids, dtype=np.int64)
        is_removed = self.split(TRAIN_SPLIT)._is_removed
        return np.zeros(chunk_ids.shape, dtype=bool) if is_removed is None else is_removed(chunk_ids)

    def check_compact(self, purpose: str) -> None:
        """
        Raises a `ValueError` if the files still hold chunks of removed documents.

        Args:
            purpose (`str`): The use that this forbids, such as "training on its chunks".
        """
        if "removed" in self.manifest:
            raise ValueError(
                f"{self.path} still holds the chunks of {self.manifest['removed']['documents']} removed documents, "
                f"which {purpose} would use; run `retro compact` first"
            )

    @cached_property
    def index(self) -> faiss.Index:
        """The faiss index over `chunks`, with the nprobe of the manifest, memory-mapped if its type allows it."""
        record = self._index_record("index", "index", "retro index")
        file = self.path / index_name(self.manifest)
        index = read_index(file)
        if index.ntotal != len(self.chunks):
            raise ValueError(f"{file} holds {index.ntotal} vectors, the datastore {len(self.chunks)} chunks")
        for name, value in record["search_parameters"].items():
            faiss.ParameterSpace().set_index_parameter(index, name, value)
        return index

    @cached_property
    def bm25(self) -> "Bm25Index":
        """The BM25 index over `chunks`, memory-mapped."""
        record = self._index_record("bm25", "BM25 index", "retro index --kind bm25")
        from .bm25_retro import Bm25Index  # needs a library that the other retrievers do not need

        index = Bm25Index(self.path / record["folder"], record)
        if index.ntotal != len(self.chunks):
            raise ValueError(
                f"{self.path / record['folder']} holds {index.ntotal} chunks, the datastore {len(self.chunks)}"
            )
        return index

    def _index_record(self, key: str, name: str, command: str) -> dict[str, Any]:
        """The record of an index in the manifest, if the index belongs to the current chunks."""
        record = self.manifest.get(key)
        if record is None:
            raise ValueError(f"{self.path} has no {name}; run `{command}`")
        shards = self.manifest["splits"][TRAIN_SPLIT]["chunks"]["shards"]
        if record["fingerprint"] != chunks_fingerprint(shards):
            if record["fingerprint"] == chunks_fingerprint(shards[: record["shards"]]):
                raise ValueError(f"the {name} of {self.path} lacks chunks that were added later; run `{command}`")
            raise ValueError(
                f"the {name} of {self.path} belongs to other chunks or another order of rows; run `{command} --force`"
            )
        return record

    @property
    def retriever(self) -> str:
        """
        The default way to look up neighbors. It is the way in which the stored neighbors of the training split were
        found, or else those of another split. If none are stored, it is the way that the existing index allows.
        """
        for name in sorted(self.manifest["splits"], key=lambda name: (name != TRAIN_SPLIT, name)):
            options = self.manifest["splits"][name].get("neighbors", {}).get("options", {})
            if "retriever" in options:
                return options["retriever"]
        return "bm25" if "index" not in self.manifest and "bm25" in self.manifest else "dense"

    def as_dataset(self) -> datasets.Dataset:
        """
        Returns the searched chunks as a `Dataset` to which the index is attached as its faiss index `"embeddings"`.

        The index stays memory-mapped and keeps its nprobe, which `Dataset.load_faiss_index` would lose. A dataset with
        an index cannot be selected from, shuffled or saved. Call `drop_index("embeddings")` before.

        Returns:
            `datasets.Dataset`: `input_ids`, `length`, `document_id` and `num_bytes`. Row i is chunk i.

        Raises:
            ValueError: If chunks of removed documents would still be found. Run `retro compact`.

        Example:

        ```python
        dataset = datastore.as_dataset()
        query = encoder.encode(["how does a search engine rank pages?"])[0]
        scores, examples = dataset.get_nearest_examples("embeddings", query, k=4)
        ```
        """
        self.check_compact("a search by `datasets`")
        chunks = datasets.concatenate_datasets([load_shard(path) for path in self.chunks.folders])
        no_vectors = np.zeros((0, self.index.d), dtype=np.float32)  # the index already holds them
        chunks.add_faiss_index_from_external_arrays(no_vectors, "embeddings", custom_index=self.index)
        return chunks

    def verify(self) -> None:
        """
        Reads every file. Raises a `ValueError` that names the first file whose checksum differs from the manifest.
        """
        for name, record in self.manifest["splits"].items():
            root = split_path(self.path, name)
            for stage, suffix in (("chunks", ""), ("embeddings", ".npy"), ("neighbors", "")):
                for shard in record.get(stage, {}).get("shards", []):
                    name = neighbors_folder(shard) if stage == "neighbors" else shard["name"]
                    verify_file(root / stage / (name + suffix), shard["sha256"])
        for name, sha256 in self.manifest.get("index", {}).get("sha256", {}).items():
            verify_file(self.path / name, sha256)
        bm25 = self.manifest.get("bm25", {})
        for name, sha256 in bm25.get("sha256", {}).items():
            verify_file(self.path / bm25["folder"] / name, sha256)
        for record in (self.manifest.get(name) for name in ("removed", "compacted")):
            if record is not None:
                verify_file(self.path / record["name"], record["sha256"])

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises a `ValueError` unless `tokenizer` is the one that made the chunks."""
        expected, found = self.manifest["tokenizer"], tokenizer_fingerprint(tokenizer)
        if found["sha256"] != expected["sha256"]:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path} (vocabulary {found['vocab_size']}, "
                f"sha256 {found['sha256'][:12]}) is not the tokenizer of {self.path}: {expected['name']} "
                f"(vocabulary {expected['vocab_size']}, sha256 {expected['sha256'][:12]})"
            )

    def check_chunk_size(self, chunk_size: int) -> None:
        """Raises a `ValueError` unless `chunk_size` is the chunk size of the datastore."""
        if chunk_size != self.chunk_size:
            raise ValueError(f"chunk_size {chunk_size} is not the chunk size of {self.path}: {self.chunk_size}")

    def check_model(self, config: RetroConfig) -> None:
        """Raises a `ValueError` unless a model of this configuration can read the tokens of the datastore."""
        check_model(self.manifest, self.path, config)

    def check_encoder(self, encoder: ChunkEncoder) -> None:
        """Raises a `ValueError` unless `encoder` gives the embeddings that the index holds."""
        expected, found = self.manifest.get("encoder"), encoder.describe()
        if expected is None:
            raise ValueError(f"{self.path} has no embeddings; run `retro embed`")
        for key in ("sha256", "dim", "pooling", "normalize", "prompt"):
            if found[key] != expected.get(key, ""):  # the prompt is not in older manifests
                raise ValueError(
                    f"the encoder {found['name']} is not the encoder of {self.path} ({expected['name']}): "
                    f"its {key} is {found[key]}, expected {expected.get(key)}"
                )

    def encoder_source(self) -> tuple[str, str | None]:
        """The name or path from which the encoder is loaded, and its revision."""
        if (self.path / "encoder").is_dir():
            return str(self.path / "encoder"), None
        if "encoder" not in self.manifest:
            raise ValueError(f"{self.path} has no embeddings; run `retro embed`")
        return self.manifest["encoder"]["name"], self.manifest["encoder"]["revision"]

    def open_encoder(
        self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
    ) -> ChunkEncoder:
        """
        Loads the encoder of the datastore.

        Args:
            device (`str` or `torch.device`, *optional*): Defaults to the first GPU, or else the CPU.
            dtype (`str` or `torch.dtype`, *optional*): Computing type. Defaults to float32.
        """
        name, revision = self.encoder_source()
        record = self.manifest["encoder"]
        options = {key: record.get(key) for key in ("pooling", "normalize", "truncate_dim")}
        return ChunkEncoder.from_pretrained(name, revision, device=device, dtype=dtype, **options)

    def take_neighbors(self, chunk_ids: Any) -> tuple[np.ndarray, np.ndarray]:
        """
        Gathers neighbors. Each is a chunk followed by its continuation in the same document.

        Args:
            chunk_ids (`np.ndarray`): Global chunk ids of any shape [..., k]; -1 stands for an absent neighbor.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: token ids int64 [..., k, r] (0 where masked) and mask bool [..., k, r].
        """
        chunk_ids = np.asarray(chunk_ids, dtype=np.int64)
        wanted = chunk_ids[..., None] + np.arange(1 + self.continuation_chunks)  # [..., k, 1 + continuation]
        wanted[(chunk_ids[..., None] < 0) | (wanted >= len(self.chunks))] = -1
        document = self.chunks.gather("document_id", wanted)
        wanted[document != document[..., :1]] = -1
        input_ids, mask = self.chunks.take(wanted)
        shape = (*chunk_ids.shape, self.neighbor_length)
        return input_ids.reshape(shape), mask.reshape(shape)


def split_path(path: Path, split: str) -> Path:
    """Folder of a split. The training split is in the folder of the datastore itself, others are in `splits/NAME`."""
    return path if split == TRAIN_SPLIT else path / "splits" / split


def checksum(path: Path) -> str:
    """The sha256 of a file, or of the names and contents of all files in a folder."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            if file != path:
                digest.update(str(file.relative_to(path)).encode())
            with file.open("rb") as handle:
                while block := handle.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def verify_file(path: Path, sha256: str) -> Path:
    """Returns `path`, or raises a `ValueError` if the file or folder is missing or its [`checksum`] differs."""
    if not path.exists():
        raise ValueError(f"{path} is missing")
    if checksum(path) != sha256:
        raise ValueError(f"{path} was altered: its checksum is not the one in {MANIFEST_NAME}")
    return path


def read_index(path: Path) -> faiss.Index:
    """Reads a faiss index. It is memory-mapped if its type allows it."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; run `retro index`")
    if path.with_suffix(".ivfdata").exists():
        mappings = [faiss.IO_FLAG_ONDISK_SAME_DIR]
    else:
        # One flag maps flat codes and graphs but refuses inverted lists. The other maps inverted lists.
        mappings = [faiss.IO_FLAG_MMAP_IFC, faiss.IO_FLAG_MMAP]
    for mapping in mappings:
        try:
            return faiss.read_index(str(path), mapping | faiss.IO_FLAG_READ_ONLY)
        except RuntimeError as error:
            reason = error
    raise ValueError(f"cannot read the index {path}: {reason}")
