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
Runs all stages of a datastore from one recipe: chunk, deduplicate, embed, index, neighbors.

A recipe is your own YAML file, or the name of a recipe that comes with the package (see `data_prep/recipes`). The same
command resumes an interrupted run. If inputs were added to a recipe, `--append` adds them to the datastore.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import gather_object
from transformers import AutoConfig
from transformers.utils import logging

from data_prep import needs
from data_prep.chunk import chunk_documents, chunk_features
from data_prep.deduplicate import deduplicate_documents
from data_prep.embed import embed_chunks
from data_prep.file_report import files_of_split
from data_prep.heartbeat import step
from data_prep.index import build_index, read_embeddings
from data_prep.memory import return_freed_memory
from data_prep.neighbors import find_neighbors
from data_prep.shipped_models import find_model, naming_the_ways
from data_prep.sources import find_sources
from data_prep.stage_files import (
    clear_records,
    directory_lock,
    discard,
    open_or_begin,
    process_state,
    run_shards,
    save_shard,
    write_manifest,
)
from modeling_retro.datastore.checksums import load_tokenizer
from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.datastore.manifest import (
    INDEXES,
    TRAIN_SPLIT,
    ChunkShard,
    ChunksStage,
    EmbeddingShard,
    EmbeddingsStage,
    Manifest,
    SplitRecord,
    read_manifest,
)
from modeling_retro.datastore.splits import split_path
from modeling_retro.durable_files_retro import whole
from modeling_retro.encoder.chunk_encoder import ChunkEncoder, kept_dimensions, sentence_transformers_config


logger = logging.get_logger(__name__)

_RECIPES = Path(__file__).parent / "recipes"
_KEYS = {"tokenizer", "encoder", "splits", "chunk", "deduplicate", "embed", "index", "bm25", "neighbors", "search_all"}


def read_recipe(recipe: str | Path) -> dict[str, Any]:
    """
    Reads a recipe.

    Args:
        recipe (`str` or `Path`): A YAML file, or the name of a recipe of the package, with or without `.yaml`.

    Raises:
        ValueError: If there is no such recipe, or it has unknown keys.
    """
    candidates = [Path(recipe), _RECIPES / recipe, _RECIPES / f"{recipe}.yaml"]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        known = ", ".join(sorted(path.name for path in _RECIPES.glob("*.yaml")))
        raise ValueError(f"there is no recipe {recipe}; give a file, or one of {known}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    check_recipe(content, str(file))
    return content


def check_recipe(content: Any, name: str = "the recipe") -> None:
    """Raises a `ValueError` that begins with `name` if a recipe lacks keys or has unknown ones."""
    if not isinstance(content, Mapping) or not {"tokenizer", "splits"} <= set(content):
        raise ValueError(f"{name} must be a mapping with tokenizer, encoder and splits")
    unknown = sorted(map(str, set(content) - _KEYS))
    if unknown:
        raise ValueError(f"{name} has unknown keys {', '.join(unknown)}; known are {', '.join(sorted(_KEYS))}")
    if TRAIN_SPLIT not in content["splits"]:
        raise ValueError(f"{name} has no split {TRAIN_SPLIT!r}, which is the one that is searched")
    if "encoder" not in content and "index" in _indexes(content):
        raise ValueError(f"{name} must have an encoder, unless its retriever is bm25")


def _indexes(recipe: Mapping[str, Any]) -> set[str]:
    """The indexes that a recipe builds: those that its retriever needs, and those that its keys allow or name."""
    retriever = recipe.get("neighbors", {}).get("retriever", "dense")
    if retriever not in INDEXES:
        raise ValueError(f"the retriever of the recipe is {retriever!r}, expected one of {', '.join(INDEXES)}")
    named = {"index": "encoder", "bm25": "bm25"}
    return {*INDEXES[retriever], *(index for index, key in named.items() if key in recipe)}


def check_needs(recipe: Mapping[str, Any], data_dir: Path, path: Path, with_disk: bool = True) -> None:
    """
    Looks for all that the stages of a recipe need, before the first one begins: the inputs, the tokenizer, the
    encoder, the libraries and room on the disk.

    Args:
        recipe (`Mapping`): The recipe.
        data_dir (`Path`): Folder of the inputs with relative paths.
        path (`Path`): The datastore.
        with_disk (`bool`, *optional*, defaults to `True`): Whether the disk must have room for what is estimated.

    Raises:
        ValueError: If an input does not exist or holds no files, or the disk is too small.
        OSError: If the tokenizer or the encoder cannot be loaded.
        ImportError: If a library is missing.
    """
    sources = []
    for inputs in recipe["splits"].values():
        # Streams and datasets are opened once, when they are read.
        files = [entry for entry in _resolve(inputs, data_dir) if _is_file_input(entry)]
        sources += find_sources(files) if files else []
    needs.check_readers(sources)
    if "bm25" in _indexes(recipe):
        import data_prep.bm25_index  # noqa: F401 -- its error names the extra
    tokenizer = recipe["tokenizer"]
    if isinstance(tokenizer, (str, Path)):
        with naming_the_ways(tokenizer, "tokenizer"):
            tokenizer = load_tokenizer(find_model(tokenizer))
    dim = None
    encoder = recipe.get("encoder")
    if "index" in _indexes(recipe) and isinstance(encoder, (str, Path)):
        with naming_the_ways(encoder, "encoder"):
            name, revision = find_model(encoder), recipe.get("embed", {}).get("revision")
            if "://" in name:
                dim = ChunkEncoder.from_pretrained(name).dim
            elif sentence_transformers_config(name, revision) == {"kind": "transformer", "prompt": None}:
                config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
                dim = kept_dimensions(config.hidden_size, recipe.get("embed", {}).get("truncate_dim"))
    if with_disk:
        needs.check_disk(sources, path, recipe, len(tokenizer), dim)


def _is_file_input(entry: Any) -> bool:
    return "path" in entry if isinstance(entry, Mapping) else isinstance(entry, (str, Path)) and entry != "-"


def _build_indexes(path: Path, recipe: Mapping[str, Any]) -> None:
    if "index" in _indexes(recipe):
        build_index(path, **recipe.get("index", {}))
    if "bm25" in _indexes(recipe):
        from data_prep.bm25_index import build_bm25_index  # needs a library that other recipes do without

        build_bm25_index(path, **(recipe.get("bm25") or {}))


def prepare_datastore(
    recipe: str | Path | Mapping[str, Any],
    output_dir: str | Path,
    data_dir: str | Path = ".",
    append: bool = False,
    force: bool = False,
    check_disk: bool = True,
) -> Manifest:
    """
    Runs all stages of a recipe. Finished stages and shards are left as they are.

    Args:
        recipe (`str`, `Path` or `Mapping`): A YAML file, the name of a recipe of the package, or the contents of one.
        output_dir (`str` or `Path`): The datastore.
        data_dir (`str` or `Path`, *optional*, defaults to `"."`): Folder of the inputs with relative paths.
        append (`bool`, *optional*, defaults to `False`):
            Whether to add the inputs that the datastore does not hold yet.
        force (`bool`, *optional*, defaults to `False`): Whether to rebuild everything.
        check_disk (`bool`, *optional*, defaults to `True`):
            Whether to compare the estimated size of the datastore with the free space of the disk first.

    Returns:
        [`Manifest`]: the manifest.
    """
    if isinstance(recipe, Mapping):
        check_recipe(recipe)
    else:
        recipe = read_recipe(recipe)
    path = Path(output_dir)
    splits = list(recipe["splits"])
    neighbors = recipe.get("neighbors", {})
    indexes = _indexes(recipe)
    check_needs(recipe, Path(data_dir), path, check_disk)
    with directory_lock(path):
        for split, inputs in recipe["splits"].items():
            with _timed(f"chunk {split}"):
                chunk_documents(
                    _resolve(inputs, Path(data_dir)),
                    path,
                    recipe["tokenizer"],
                    split=split,
                    append=append,
                    force=force,
                    **recipe.get("chunk", {}),
                )
            _print_files(path, split)
        if len(splits) > 1 and recipe.get("deduplicate") is not None:
            with _timed("deduplicate"):
                deduplicate_documents(path, **recipe["deduplicate"])
        for split in splits if "index" in indexes else ():
            with _timed(f"embed {split}"):
                embed_chunks(path, recipe["encoder"], split=split, **recipe.get("embed", {}))
        with _timed("index"):
            _build_indexes(path, recipe)
        with _timed("neighbors of train"):
            find_neighbors(path, split=TRAIN_SPLIT, **neighbors)
        for split in splits:
            if split == TRAIN_SPLIT:
                continue
            if recipe.get("search_all"):
                searched = path / "search_all" / split
                with _timed(f"{split} searches {split} and train"):
                    extend_datastore(path, split, searched)
                    _build_indexes(searched, recipe)
            else:
                searched = path
            with _timed(f"neighbors of {split}"):
                find_neighbors(searched, split=split, **neighbors)
    return read_manifest(path)


def extend_datastore(base: str | Path, split: str, output_dir: str | Path) -> Manifest:
    """
    Makes a datastore in which a split is searched together with the training split. The chunks of the split are
    appended to the searched chunks of `base`. The split still queries the datastore, and its neighbors never come from
    the document of the query.

    The files of `base` are linked instead of copied, if the file system allows it. The new index starts from that of
    `base`.

    Args:
        base (`str` or `Path`): A datastore, embedded and indexed unless it is searched by BM25 alone.
        split (`str`): The split of `base`.
        output_dir (`str` or `Path`): The new datastore.

    Returns:
        [`Manifest`]: the manifest of the new datastore, which still needs the stages `index` and `neighbors`.
    """
    base, path = Path(base), Path(output_dir)
    source = read_manifest(base)
    opened = RetroDatastore(base, source)
    opened.check_compact("a datastore that extends it")
    is_embedded = source.train.embeddings is not None
    for name in (TRAIN_SPLIT, split) if is_embedded else ():
        read_embeddings(split_path(base, name), name, source)  # raises if embeddings are missing or altered
    with directory_lock(path):
        manifest = open_or_begin(path)
        train, own = source.train, source.splits[split]
        origin = {"train": train.chunks.fingerprint, split: own.chunks.fingerprint}
        if manifest is not None and manifest.extends == origin:
            return manifest
        for name in () if manifest is None else list(manifest.splits):
            discard(path, manifest, name, "chunks")
        first_document = int(opened.chunks.document_id[-1]) + 1
        first_shard = len(train.chunk_shards)
        features = chunk_features(opened.chunk_size, source.tokenizer.vocab_size)
        table = opened.split(split).chunks
        names = [f"shard-{first_shard + index:05d}" for index in range(len(own.chunk_shards))]

        def renumber(index: int, temporary: Path, advance: Callable[[int], Any]) -> dict[str, Any]:
            columns = dict(table.shard(index))
            columns["document_id"] = columns["document_id"] + first_document
            save_shard(temporary, columns, features)
            return own.chunk_shards[index].to_dict()

        records = run_shards(path / "chunks", [], names, renumber, description=f"Renumbering {split}")
        chunks = [ChunkShard.from_dict(record) for record in records]
        embeddings = [
            replace(embedding, name=shard.name, chunks_sha256=shard.sha256)
            for embedding, shard in zip(own.embedding_shards if is_embedded else (), chunks, strict=is_embedded)
        ]
        if process_state().is_main_process:
            _link_extension(base, path, split, source, names)
        # The new index starts from this one. That of BM25 is built again.
        splits = {
            TRAIN_SPLIT: _split_record(train, train.chunk_shards + chunks, train.embedding_shards + embeddings),
            split: _split_record(own, chunks, embeddings),
        }
        splits[split].searched = True
        manifest = replace(source, bm25=None, extends=origin, splits=splits).seal()
        write_manifest(path, manifest)
        clear_records(path / "chunks")
        return manifest


def _link_extension(base: Path, path: Path, split: str, source: Manifest, names: Sequence[str]) -> None:
    """Links the files of an extended datastore. `names` are the new names of the shards of the split."""
    for name in ("tokenizer", "encoder", *(source.index.sha256 if source.index is not None else ())):
        if (base / name).exists():
            _link(base / name, path / name)
    is_embedded = source.train.embeddings is not None
    for shard in source.train.chunk_shards:
        for name in (f"chunks/{shard.name}", *([f"embeddings/{shard.name}.npy"] if is_embedded else ())):
            _link(base / name, path / name)
    own, searched = split_path(base, split), split_path(path, split)
    for shard, name in zip(source.splits[split].chunk_shards, names, strict=True):
        for root in (path, searched) if is_embedded else ():
            _link(own / "embeddings" / f"{shard.name}.npy", root / "embeddings" / f"{name}.npy")
        _link(path / "chunks" / name, searched / "chunks" / name)


def _split_record(record: SplitRecord, chunks: list[ChunkShard], embeddings: list[EmbeddingShard]) -> SplitRecord:
    stage = ChunksStage(record.chunks.options, record.chunks.sources, record.chunks.parts, shards=[])
    # The table of the user's ids stays behind.
    stage.set_shards([replace(shard, documents_sha256=None) for shard in chunks])
    if not embeddings:
        return SplitRecord(chunks=stage)
    return SplitRecord(chunks=stage, embeddings=EmbeddingsStage(record.embeddings.options, embeddings))


def _link(source: Path, target: Path) -> None:
    """Links a file or the files of a folder, or copies them if they cannot be linked."""

    def link(file: str, copy: str) -> None:
        try:
            os.link(file, copy)
        except OSError:
            shutil.copyfile(file, copy)

    with whole(target) as temporary:
        if source.is_dir():
            shutil.copytree(source, temporary, copy_function=link)
        else:
            link(str(source), str(temporary))


def _resolve(inputs: Any, folder: Path) -> list[Any]:
    """Resolves the relative paths of a recipe against the data folder."""
    entries = inputs if isinstance(inputs, Sequence) and not isinstance(inputs, str) else [inputs]
    resolved = []
    for entry in entries:
        if isinstance(entry, Mapping) and "path" in entry:
            entry = {**entry, "path": str(folder / entry["path"])}
        elif isinstance(entry, str) and entry != "-":
            entry = str(folder / entry)
        resolved.append(entry)
    return resolved


def _print_files(path: Path, split: str) -> None:
    table = files_of_split(path, split, read_manifest(path).splits[split])
    if table is not None and process_state().is_main_process:
        print(table, flush=True)


@contextlib.contextmanager
def _timed(name: str) -> Iterator[None]:
    """Prints the name of a step, the seconds that it took, and the processor seconds of all processes."""
    start, process_start = time.perf_counter(), time.process_time()
    with step(name):
        yield
    seconds = time.perf_counter() - start
    processor = sum(gather_object([time.process_time() - process_start]))
    return_freed_memory()
    if process_state().is_main_process:
        print(f"{name}: {seconds:.1f} s, {processor:.1f} s of processor time", flush=True)
