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
Builds the faiss index over the embeddings of a datastore: trains it on a sample, fills it shard by shard, merges the
shards and measures the index.

It always measures recall@1 and recall@10 against exact search, and writes them into the manifest with the nprobe
(efSearch for HNSW) that reaches the target. Many processes can fill the shards: `accelerate launch -m
data_prep.scripts.index ...`.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers.utils import logging

from data_prep.faiss_index import (
    RECALL_AT,
    empty_copy,
    last_line,
    make_index,
    merge_on_disk,
    metric_type,
    read_to_add,
    recall_at,
    suggest_factory,
    to_gpus,
    tune,
    without,
    write_index,
    write_refined,
)
from data_prep.memory import return_freed_memory
from data_prep.stage_files import (
    check_options,
    directory_lock,
    discard,
    open_manifest,
    process_state,
    run_shards,
    write_manifest,
)
from modeling_retro.datastore.checksums import checksum, verify_file
from modeling_retro.datastore.datastore import faiss, read_index  # if faiss is missing, this import names the extras
from modeling_retro.datastore.manifest import TRAIN_SPLIT, IndexRecord, Manifest, chunks_fingerprint
from modeling_retro.datastore.splits import split_path
from modeling_retro.durable_files_retro import make_folder, remove, replace, sync, whole, write_json


logger = logging.get_logger(__name__)

_WORK = ".index-"
# Number of training vectors for each list of an inverted file, and in all. More take longer and find nothing more.
_TRAINING_PER_LIST, _LEAST_TRAINING = 64, 1 << 16
# Number of vectors that are converted to float32 at once.
_BLOCK = 1 << 16


def read_embeddings(path: Path, split: str, manifest: Manifest, verify: bool = True) -> list[np.ndarray]:
    """
    Opens the embeddings of a split, memory-mapped.

    Args:
        path (`Path`): Folder of the split.
        split (`str`): Name of the split.
        manifest ([`Manifest`]): The manifest of the datastore.
        verify (`bool`, *optional*, defaults to `True`): Whether to compare checksums.

    Returns:
        `list[np.ndarray]`: float16 [chunks of the shard, dim] for each shard.

    Raises:
        ValueError: If embeddings are missing, altered, or belong to other chunks or another order of rows.
    """
    record = manifest.splits[split]
    if len(record.embedding_shards) < len(record.chunk_shards):
        raise ValueError(
            f"{split} has embeddings for {len(record.embedding_shards)} of {len(record.chunk_shards)} shards of "
            f"chunks; run `retro embed --split {split}`"
        )
    record.check_made_of_chunks("embeddings", f"run `retro embed --split {split} --force`")
    arrays = []
    for shard, chunks in zip(record.embedding_shards, record.chunk_shards, strict=True):
        file = path / "embeddings" / f"{shard.name}.npy"
        if verify:
            verify_file(file, shard.sha256)
        array = np.load(file, mmap_mode="r", allow_pickle=False)
        expected = (chunks.rows, manifest.encoder.dim)
        if array.shape != expected:
            raise ValueError(f"{file} has shape {list(array.shape)}, the manifest says {list(expected)}")
        arrays.append(array)
    return arrays


def build_index(
    datastore: str | Path,
    factory: str = "auto",
    metric: str = "inner_product",
    max_index_memory: float | None = None,
    max_training_vectors: int = 1_000_000,
    target_recall: float = 0.95,
    recall_queries: int = 1000,
    seed: int = 0,
    use_gpus: bool = False,
    shard_index: bool = False,
    on_disk: bool = False,
    force: bool = False,
) -> IndexRecord:
    """
    Builds the index over the embeddings of the searched chunks, or adds the shards that it does not hold yet.

    Args:
        datastore (`str` or `Path`): The datastore.
        factory (`str`, *optional*, defaults to `"auto"`):
            A faiss factory string. `"auto"` chooses one by the number of chunks.
        metric (`str`, *optional*, defaults to `"inner_product"`): `"inner_product"` or `"l2"`.
        max_index_memory (`float`, *optional*):
            Largest size of the index in GB. `"auto"` compresses vectors to fit into it. A larger inverted file is
            merged on disk.
        max_training_vectors (`int`, *optional*, defaults to 1,000,000): Size of the random training sample.
        target_recall (`float`, *optional*, defaults to 0.95): The recall@10 for which nprobe or efSearch is set.
        recall_queries (`int`, *optional*, defaults to 1000): Number of queries to measure the recall with.
        seed (`int`, *optional*, defaults to 0): Seed of the samples.
        use_gpus (`bool`, *optional*, defaults to `False`): Whether to train and fill the index on GPUs.
        shard_index (`bool`, *optional*, defaults to `False`):
            Whether to split the index over GPUs instead of copying it.
        on_disk (`bool`, *optional*, defaults to `False`):
            Whether the vectors that score the results of short codes again stay on the disk when the index is
            searched. Memory then holds the codes: dim / 2 + 8 bytes of a chunk instead of 2.25 dim + 8, or dim / 4
            + 8 if `max_index_memory` allows no more.
        force (`bool`, *optional*, defaults to `False`): Whether to build the index again.

    Returns:
        [`IndexRecord`]: the record of the index in the manifest: `factory`, `search_parameters`, `recall`, ….

    Raises:
        ValueError: If faiss does not know the factory or has no GPUs, if embeddings are missing or belong to other
            chunks, or if the results of the factory are not scored again and `on_disk` is true.
    """
    path = Path(datastore)
    if use_gpus and not faiss.get_num_gpus():
        raise ValueError("use_gpus: this faiss sees no GPU; install `retro-transformers[gpu]` on a machine with one")
    with directory_lock(path):
        manifest = open_manifest(path)
        if force:
            discard(path, manifest, TRAIN_SPLIT, "index")
        options = {
            "factory": factory,
            "metric": metric,
            "max_index_memory": max_index_memory,
            "max_training_vectors": max_training_vectors,
            "target_recall": target_recall,
            "recall_queries": recall_queries,
            "seed": seed,
            **({"on_disk": True} if on_disk else {}),  # older indexes do not record it
        }
        before, chunks = manifest.index, manifest.train.chunks
        if chunks is None:
            raise ValueError(f"{path} has no chunks to index; run `retro chunk`")
        if before is not None:
            check_options("index", {"on_disk": False} | options, {"on_disk": False} | before.options)
        indexed = None if before is None else chunks.indexed_by(before)
        if indexed == "all" and (path / before.file_name).exists():
            if process_state().is_main_process:
                for work in path.glob(f"{_WORK}*"):
                    remove(work)  # a run that was killed after its last step left its own
            return before
        if indexed == "others":
            raise ValueError(f"the index of {path} belongs to other chunks; use --force to build it again")
        fingerprint = chunks_fingerprint(chunks.shards)
        identity = [options, fingerprint, before and before.to_dict()]
        run = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        build = _IndexBuild(path, path / (_WORK + run), manifest, options, before, use_gpus, shard_index)
        if not build.record_path.exists():
            build.train()
            build.fill()
            build.merge()
            build.measure(fingerprint)
        return build.publish()


class _IndexBuild:
    """
    One run of `build_index`. It works in its own folder, so that an interrupted run is resumed at the step where it
    stopped, and the index in use is replaced only at the end.
    """

    def __init__(
        self,
        path: Path,
        work: Path,
        manifest: Manifest,
        options: dict[str, Any],
        before: IndexRecord | None,
        use_gpus: bool,
        shard_index: bool,
    ):
        self.path = path
        self.work = work
        self.manifest = manifest
        self.options = options
        self.before = before
        self.vectors_on_disk = options.get("on_disk", False)
        self.use_gpus = use_gpus
        self.shard_index = shard_index
        self.state = process_state()
        self.record_path = work / "record.json"
        # A datastore that was changed keeps the index of the earlier version for its readers.
        self.name = f"index-{manifest.version}" if manifest.version else "index"
        self.merged = work / f"{self.name}.faiss"
        if self.record_path.exists():
            return
        self.embeddings = read_embeddings(path, TRAIN_SPLIT, manifest)
        self.offsets = np.concatenate([[0], np.cumsum([len(array) for array in self.embeddings])])
        self.dim = self.embeddings[0].shape[1]
        self.first_shard = before.shards if before else 0
        self.factory = before.factory if before else self._choose_factory()
        if self.state.is_main_process:
            for other in path.glob(f"{_WORK}*"):
                if other != work:
                    remove(other)
            make_folder(work)
        self.state.wait_for_everyone()

    def _choose_factory(self) -> str:
        if self.options["factory"] != "auto":
            return self.options["factory"]
        memory = self.options["max_index_memory"]
        max_bytes = None if memory is None else memory * 1e9
        for_gpus = faiss.get_num_gpus() > 0
        return suggest_factory(int(self.offsets[-1]), self.dim, max_bytes, for_gpus, self.vectors_on_disk)

    def train(self) -> None:
        """Trains an empty index on a random sample, or empties the index to which shards are added."""
        if self.state.is_main_process and not self._trained.exists():
            if self.before is not None:
                index = empty_copy(self.path / self.before.file_name)
            else:
                index = make_index(self.factory, self.dim, self.options["metric"])
                if self.vectors_on_disk and not isinstance(faiss.downcast_index(index), faiss.IndexRefine):
                    raise ValueError(
                        f"on_disk needs a factory whose results are scored again, got {self.factory!r}; leave the "
                        f"factory out, or add ',Refine(SQfp16)' to it"
                    )
                if not index.is_trained:
                    ivf = faiss.try_extract_index_ivf(index)
                    enough = max(_TRAINING_PER_LIST * ivf.nlist, _LEAST_TRAINING) if ivf is not None else np.inf
                    sample = self._sample(min(self.options["max_training_vectors"], enough))
                    if self.use_gpus and ivf is not None:
                        clustering = faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(faiss.extract_index_ivf(index).d))
                        faiss.extract_index_ivf(index).clustering_index = clustering
                    try:
                        with _threads_of_all():
                            index.train(sample)
                    except RuntimeError as error:
                        raise ValueError(
                            f"faiss cannot train {self.factory!r} on {len(sample)} vectors: {last_line(error)}"
                        ) from error
            with whole(self._trained) as temporary:
                write_index(index, temporary)
        self.state.wait_for_everyone()

    def fill(self) -> None:
        """Adds each shard to its own copy of the trained index, unless indexes of this type cannot be merged."""
        if not self._mergeable:
            return
        names = [shard.name for shard in self.manifest.train.chunk_shards]

        def make(number: int, temporary: Path, advance: Callable[[int], Any]) -> dict[str, Any]:
            index = faiss.read_index(str(self._trained))
            if self.use_gpus:
                index = to_gpus(index, self.shard_index)
            self._add(index, self.first_shard + number, advance)
            write_index(faiss.index_gpu_to_cpu(index) if self.use_gpus else index, temporary)
            return {}

        new = names[self.first_shard :]
        run_shards(self.work, [], new, make, ".faiss", f"Filling {self.factory}", sizes=self._sizes)

    def merge(self) -> None:
        """Merges the shards in memory, or on disk if the index is larger than `max_index_memory`."""
        if self.state.is_main_process and not self.merged.exists():
            old = [self.path / self.before.file_name] if self.before else []
            shards = self.manifest.train.chunk_shards[self.first_shard :]
            files = old + [self.work / f"{shard.name}.faiss" for shard in shards]
            index = faiss.read_index(str(self._trained))
            if not self._mergeable:
                index = read_to_add(old[0]) if old else index
                with _threads_of_all():
                    total = sum(self._sizes)
                    with tqdm(total=total, desc=f"Filling {self.factory}", unit=" chunks") as progress:
                        for shard in range(self.first_shard, len(self.embeddings)):
                            self._add(index, shard, progress.update)
                            return_freed_memory()  # an index that grows leaves ever larger pieces behind
            elif self._on_disk:
                data = self.merged.with_suffix(".ivfdata")
                merge_on_disk(index, files, data)
                sync(data)
            else:
                for file in files:
                    index.merge_from(faiss.read_index(str(file)), 0)
            if self.vectors_on_disk:
                write_refined(index, self.merged)
            else:
                with whole(self.merged) as temporary:
                    write_index(index, temporary)
            del index
            return_freed_memory()
        self.state.wait_for_everyone()

    def measure(self, fingerprint: str) -> None:
        """Sets the search parameters for the target recall, and writes the record."""
        queries, excluded, source = self._held_out_queries()
        exact = self._exact_search(queries, excluded)
        if self.state.is_main_process:
            index = read_index(self.merged)

            def recall_now() -> dict[str, float]:
                found = index.search(queries, min(RECALL_AT[-1] + 1, index.ntotal))[1]
                return recall_at(self._scores(queries, without(found, excluded)), exact)

            with _threads_of_all():
                parameters, recall = tune(index, recall_now, self.options["target_recall"])
            if recall[f"recall@{RECALL_AT[-1]}"] < self.options["target_recall"]:
                logger.warning(
                    f"recall@10 is {recall['recall@10']:.3f} at best, below the target "
                    f"{self.options['target_recall']}; a factory with less compression finds more"
                )
            record = {
                "options": self.options,
                "factory": self.factory,
                "metric": self.options["metric"],
                "ntotal": int(index.ntotal),
                "shards": len(self.embeddings),
                "encoder_sha256": self.manifest.encoder.sha256,
                "search_parameters": parameters,
                "recall": {**recall, "queries": len(queries), "source": source},
                "fingerprint": fingerprint,
                "sha256": {file.name: checksum(file) for file in sorted(self.work.glob(f"{self.name}.*"))},
            }
            write_json(self.record_path, record)
        self.state.wait_for_everyone()

    def publish(self) -> IndexRecord:
        """Moves the finished index into the datastore."""
        record = IndexRecord.from_dict(json.loads(self.record_path.read_text(encoding="utf-8")), "the new index")
        if self.state.is_main_process:
            for name in sorted(record.sha256, reverse=True):  # first the lists, then the index that reads them
                if (self.work / name).exists():
                    replace(self.work / name, self.path / name)
            for name in set(self.before.sha256 if self.before else ()) - set(record.sha256):
                remove(self.path / name)
        self.manifest.index = record
        write_manifest(self.path, self.manifest)
        if self.state.is_main_process:
            remove(self.work)
        self.state.wait_for_everyone()
        return record

    @property
    def _trained(self) -> Path:
        return self.work / "trained.faiss"

    @cached_property
    def _mergeable(self) -> bool:
        index = faiss.read_index(str(self._trained))
        try:
            index.check_compatible_for_merge(index)
        except RuntimeError:
            return False
        return True

    @cached_property
    def _on_disk(self) -> bool:
        memory = self.options["max_index_memory"]
        ivf = faiss.try_extract_index_ivf(faiss.read_index(str(self._trained)))
        return ivf is not None and memory is not None and (ivf.code_size + 8) * self.offsets[-1] > memory * 1e9

    @property
    def _sizes(self) -> list[int]:
        """Number of chunks of each shard that is added."""
        return [len(array) for array in self.embeddings[self.first_shard :]]

    def _add(self, index: faiss.Index, shard: int, advance: Callable[[int], Any]) -> None:
        with_ids = self._mergeable and faiss.try_extract_index_ivf(index) is not None
        for start, vectors in _blocks(self.embeddings[shard]):
            if with_ids:
                first = self.offsets[shard] + start
                index.add_with_ids(vectors, np.arange(first, first + len(vectors)))
            else:
                index.add(vectors)
            advance(len(vectors))

    def _sample(self, number: int) -> np.ndarray:
        """A random sample of the rows of all shards, float32, in the order of the chunks."""
        total = int(self.offsets[-1])
        rows = np.arange(total)
        if number < total:
            rows = np.sort(np.random.default_rng(self.options["seed"]).choice(total, number, replace=False))
        return self._rows(rows)

    def _rows(self, rows: np.ndarray) -> np.ndarray:
        vectors = np.empty((len(rows), self.dim), dtype=np.float32)
        for start, array in zip(self.offsets, self.embeddings, strict=False):
            here = (rows >= start) & (rows < start + len(array))
            vectors[here] = _reopened(array)[rows[here] - start]
        return vectors

    def _held_out_queries(self) -> tuple[np.ndarray, np.ndarray, str]:
        """Queries [q, dim], the row that each query must not find (-1 for none), and the source of the queries."""
        number = self.options["recall_queries"]
        generator = np.random.default_rng(self.options["seed"] + 1)
        for split in sorted(set(self.manifest.splits) - {TRAIN_SPLIT}):
            record = self.manifest.splits[split]
            if record.chunks is not None and len(record.embedding_shards) == len(record.chunk_shards):
                queries = np.concatenate(read_embeddings(split_path(self.path, split), split, self.manifest))
                rows = np.sort(generator.choice(len(queries), min(number, len(queries)), replace=False))
                return queries[rows].astype(np.float32), np.full(len(rows), -1), split
        total = int(self.offsets[-1])
        rows = np.sort(generator.choice(total, min(number, total), replace=False))
        return self._rows(rows), rows, f"{TRAIN_SPLIT}, each without itself"

    def _scores(self, queries: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Exact scores [q, n] of the chunks found, larger is better. The scores of an index may be approximate."""
        rows, place = np.unique(np.maximum(ids, 0), return_inverse=True)
        vectors = self._rows(rows)[place.reshape(ids.shape)]
        if self.options["metric"] == "l2":
            scores = -((queries[:, None] - vectors) ** 2).sum(-1)
        else:
            scores = np.einsum("qd,qnd->qn", queries, vectors)
        return np.where(ids >= 0, scores, -np.inf)

    def _exact_search(self, queries: np.ndarray, excluded: np.ndarray) -> np.ndarray:
        """Exact scores [q, 10] of the nearest neighbors. Each process searches its shards."""
        k = RECALL_AT[-1] + 1
        kind = metric_type(self.options["metric"])
        scores, ids = np.zeros((len(queries), 0), dtype=np.float32), np.zeros((len(queries), 0), dtype=np.int64)
        for shard in range(self.state.process_index, len(self.embeddings), self.state.num_processes):
            for start, vectors in _blocks(self.embeddings[shard]):
                found_scores, found = faiss.knn(queries, vectors, min(k, len(vectors)), metric=kind)
                scores = np.concatenate([scores, found_scores], axis=1)
                ids = np.concatenate([ids, found + self.offsets[shard] + start], axis=1)
                scores, ids = _best(scores, ids, k, kind)
        gathered = gather_object([(scores, ids)])
        scores, ids = (np.concatenate(part, axis=1) for part in zip(*gathered, strict=True))
        return self._scores(queries, without(_best(scores, ids, k, kind)[1], excluded))


@contextlib.contextmanager
def _threads_of_all() -> Iterator[None]:
    """Gives one process the threads of the processes of this machine that wait for it."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads * int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


def _best(scores: np.ndarray, ids: np.ndarray, k: int, kind: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort((ids, -scores if kind == faiss.METRIC_INNER_PRODUCT else scores), axis=-1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


def _reopened(array: np.memmap) -> np.memmap:
    """The same file, mapped anew, so that what is read of it leaves the memory with the returned array."""
    return np.load(array.filename, mmap_mode="r", allow_pickle=False)


def _blocks(array: np.memmap) -> Iterator[tuple[int, np.ndarray]]:
    array = _reopened(array)
    for start in range(0, len(array), _BLOCK):
        yield start, array[start : start + _BLOCK].astype(np.float32)
