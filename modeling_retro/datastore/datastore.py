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

import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from huggingface_hub import CommitInfo
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..encoder.chunk_encoder import ChunkEncoder
from ..encoder.endpoint import ADDRESS, check_probes
from .checksums import load_tokenizer, tokenizer_fingerprint, verify_file, verify_files
from .chunks import ChunkTable, load_shard
from .documents import DocumentSource
from .links import check_links
from .manifest import TRAIN_SPLIT, Bm25Record, IndexRecord, Manifest, check_model, read_manifest
from .splits import DatastoreSplit, RemovedChunks, split_path
from .versions import HeldVersion, open_version


if TYPE_CHECKING:
    from ..configuration_retro import RetroConfig
    from .bm25 import Bm25Index

logger = logging.get_logger(__name__)

AnyIndex = TypeVar("AnyIndex", IndexRecord, Bm25Record)

try:
    import datasets
    import faiss
except ImportError as error:
    raise ImportError(
        "Retrieval needs `datasets` and `faiss`. Install one of the two extras: "
        "`pip install retro-transformers[cpu]` or `pip install retro-transformers[gpu]`."
    ) from error


class RetroDatastore:
    """
    A datastore that is opened for reading. Nothing is written to its folder. An opened datastore stays the version
    that it was when it was opened: documents that are added or removed later do not change it.

    Args:
        path (`Path`): The folder that holds `datastore.json`.
        manifest ([`Manifest`]): The contents of `datastore.json`.
    """

    def __init__(self, path: Path, manifest: Manifest):
        self.path = path
        self.manifest = manifest
        self.chunk_size = manifest.chunk_size
        self.continuation_chunks = manifest.continuation_chunks
        self.neighbor_length = self.chunk_size * (1 + self.continuation_chunks)
        self._splits = {}
        self._held: HeldVersion | None = None

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, revision: str | None = None, **hub_kwargs) -> "RetroDatastore":
        """
        Opens a datastore from a folder or from a dataset repository on the Hub.

        Args:
            name_or_path (`str` or `Path`):
                A folder with `datastore.json`, or the id of a dataset repository.
            revision (`str`, *optional*): Branch, tag or commit of the repository.
            hub_kwargs: Further arguments of [`~huggingface_hub.snapshot_download`].

        Raises:
            ValueError: If there is no datastore, or its files do not agree with its manifest.
        """
        if "://" in str(name_or_path):
            raise ValueError(
                f"{str(name_or_path).partition('://')[0]}://… is the address of a database and no folder or Hub id; "
                "open it with `RetroRetriever.from_pretrained`"
            )
        path = Path(name_or_path)
        if not path.is_dir():
            from .hub import download_datastore

            path = download_datastore(str(name_or_path), revision=revision, **hub_kwargs)
        check_links(path)
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
        """Uploads the datastore. The arguments are those of [`~modeling_retro.datastore.hub.push_datastore`]."""
        from .hub import push_datastore

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
        tokenizer = load_tokenizer(self.path / "tokenizer", self.manifest.tokenizer.files)
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
        if name not in self.manifest.splits:
            raise ValueError(f"{self.path} has no split {name!r}, only {', '.join(sorted(self.manifest.splits))}")
        if name not in self._splits:
            record, removed = self.manifest.splits[name], self.manifest.removed
            searched = name == TRAIN_SPLIT or record.searched
            split = DatastoreSplit(split_path(self.path, name), record, self.chunk_size, searched)
            split._held = self._held
            if removed is not None:
                chunks = split.chunks if name == TRAIN_SPLIT else self.chunks
                split._is_removed = RemovedChunks(chunks, self.path / removed.name, removed.sha256)
            self._splits[name] = split
        return self._splits[name]

    def sources(self, chunk_ids: Any) -> list[DocumentSource | None]:
        """The sources of searched chunks [n], as [`DatastoreSplit.sources`] says."""
        return self.split(TRAIN_SPLIT).sources(chunk_ids)

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
        if self.manifest.removed is not None:
            raise ValueError(
                f"{self.path} still holds the chunks of {self.manifest.removed.documents} removed documents, "
                f"which {purpose} would use; run `retro compact` first"
            )

    @cached_property
    def index(self) -> faiss.Index:
        """The faiss index over `chunks`, with the nprobe of the manifest, memory-mapped if its type allows it."""
        record = self._of_these_chunks(self.manifest.index, "index", "retro index")
        file = self.path / record.file_name
        index = read_index(file)
        if index.ntotal != len(self.chunks):
            raise ValueError(f"{file} holds {index.ntotal} vectors, the datastore {len(self.chunks)} chunks")
        for name, value in record.search_parameters.items():
            faiss.ParameterSpace().set_index_parameter(index, name, value)
        return index

    @cached_property
    def bm25(self) -> "Bm25Index":
        """The BM25 index over `chunks`, memory-mapped."""
        record = self._of_these_chunks(self.manifest.bm25, "BM25 index", "retro index --kind bm25")
        from .bm25 import Bm25Index  # needs a library that the other retrievers do not need

        index = Bm25Index(self.path / record.folder, record)
        if index.ntotal != len(self.chunks):
            raise ValueError(
                f"{self.path / record.folder} holds {index.ntotal} chunks, the datastore {len(self.chunks)}"
            )
        return index

    def _of_these_chunks(self, record: AnyIndex | None, name: str, command: str) -> AnyIndex:
        """The record of an index, if there is one and it belongs to the current chunks."""
        if record is None:
            raise ValueError(f"{self.path} has no {name}; run `{command}`")
        indexed = self.manifest.train.chunks.indexed_by(record)
        if indexed == "some":
            raise ValueError(f"the {name} of {self.path} lacks chunks that were added later; run `{command}`")
        if indexed == "others":
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
        for name in sorted(self.manifest.splits, key=lambda name: (name != TRAIN_SPLIT, name)):
            neighbors = self.manifest.splits[name].neighbors
            if neighbors is not None and "retriever" in neighbors.options:
                return neighbors.options["retriever"]
        return "bm25" if self.manifest.index is None and self.manifest.bm25 is not None else "dense"

    @property
    def question_retriever(self) -> str:
        """
        The default way to look up questions: `dense`, or `bm25` without an index of embeddings. `rerank` and `hybrid`,
        which suit the chunks of a text, find fewer documents for the questions that people ask.
        """
        return "bm25" if self.manifest.index is None and self.manifest.bm25 is not None else "dense"

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
        for name, sha256 in self.manifest.checksums().items():
            verify_file(self.path / name, sha256)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises a `ValueError` unless `tokenizer` is the one that made the chunks."""
        expected, found = self.manifest.tokenizer, tokenizer_fingerprint(tokenizer)
        if found["sha256"] != expected.sha256:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path} (vocabulary {found['vocab_size']}, "
                f"sha256 {found['sha256'][:12]}) is not the tokenizer of {self.path}: {expected.name} "
                f"(vocabulary {expected.vocab_size}, sha256 {expected.sha256[:12]})"
            )

    def check_chunk_size(self, chunk_size: int) -> None:
        """Raises a `ValueError` unless `chunk_size` is the chunk size of the datastore."""
        if chunk_size != self.chunk_size:
            raise ValueError(f"chunk_size {chunk_size} is not the chunk size of {self.path}: {self.chunk_size}")

    def check_model(self, config: "RetroConfig") -> None:
        """Raises a `ValueError` unless a model of this configuration can read the tokens of the datastore."""
        check_model(self.manifest, self.path, config)

    def check_encoder(self, encoder: ChunkEncoder) -> None:
        """Raises a `ValueError` unless `encoder` gives the embeddings that the index holds."""
        expected, found = self.manifest.encoder, encoder.describe()
        if expected is None:
            raise ValueError(f"{self.path} has no embeddings; run `retro embed`")
        if expected.probes is not None:
            check_probes(expected.probes, expected.dim, encoder, str(self.path))
            return
        for key in ("sha256", "dim", "pooling", "normalize", "prompt"):
            if found[key] != getattr(expected, key):
                raise ValueError(
                    f"the encoder {found['name']} is not the encoder of {self.path} ({expected.name}): "
                    f"its {key} is {found[key]}, expected {getattr(expected, key)}"
                )

    def encoder_source(self) -> tuple[str, str | None]:
        """The name or path from which the encoder is loaded, and its revision."""
        if (self.path / "encoder").is_dir():
            return str(self.path / "encoder"), None
        if self.manifest.encoder is None:
            raise ValueError(f"{self.path} has no embeddings; run `retro embed`")
        return self._named_encoder()

    def _named_encoder(self) -> tuple[str, str | None]:
        record = self.manifest.encoder
        if record.probes is None:
            logger.warning_once(f"opening the encoder {record.hub_name!r}, which {self.path} names")
            return record.hub_name, record.revision
        if not (name := os.environ.get(ADDRESS)):
            raise ValueError(
                f"the encoder of {self.path} ({record.name}) is behind an endpoint, and no datastore says where: set "
                f"{ADDRESS} to its address (http://HOST:PORT/embed or http://HOST:PORT/v1/embeddings?model=NAME), or "
                "to a folder or Hub id of the same model"
            )
        return name, None

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
        if Path(name) == Path(self.path, "encoder"):
            verify_files(
                self.path / "encoder", self.manifest.encoder.files, but=".safetensors"
            )  # weights: check_encoder
        options = {key: getattr(self.manifest.encoder, key) for key in ("pooling", "normalize", "truncate_dim")}
        if self.manifest.encoder.probes is not None:
            del options["pooling"]  # its vectors tell
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


def read_index(path: Path) -> faiss.Index:
    """
    Reads a faiss index. It is memory-mapped if its type allows it. A file `.refine` beside it holds the vectors that
    score its results again; they stay on the disk.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; run `retro index`")
    vectors = path.with_suffix(".refine")
    # One flag maps flat codes and graphs but refuses inverted lists. The other maps inverted lists.
    mappings = [faiss.IO_FLAG_MMAP_IFC, faiss.IO_FLAG_MMAP]
    if path.with_suffix(".ivfdata").exists():
        mappings = [faiss.IO_FLAG_ONDISK_SAME_DIR]
    elif vectors.exists():
        # Lists of short codes are copied into memory. The first flag would keep the file mapped beside the copy.
        mappings = [faiss.IO_FLAG_MMAP]
    for mapping in mappings:
        try:
            index = faiss.read_index(str(path), mapping | faiss.IO_FLAG_READ_ONLY)
            if vectors.exists():
                from .refined import IndexRefineOnDisk  # needs faiss

                flags = faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY
                return IndexRefineOnDisk(index, faiss.read_index(str(vectors), flags))
            return index
        except RuntimeError as error:
            reason = error
    raise ValueError(f"cannot read the index {path}: {reason}")
