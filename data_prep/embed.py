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
Embeds the chunks of a datastore. Each shard of chunks gets one file of embeddings in float16.

Many processes can share the shards, one for each GPU: `accelerate launch -m data_prep.scripts.embed ...`.
"""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from data_prep.shipped_models import find_model, naming_the_ways
from data_prep.stage_files import (
    check_options,
    clear_records,
    directory_lock,
    discard,
    open_manifest,
    process_state,
    run_shards,
    write_manifest,
)
from modeling_retro.datastore.checksums import file_checksums, load_tokenizer, verify_file
from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.datastore.manifest import (
    TRAIN_SPLIT,
    EmbeddingShard,
    EmbeddingsStage,
    EncoderRecord,
    Manifest,
)
from modeling_retro.datastore.splits import split_path
from modeling_retro.durable_files_retro import public_name, remove, whole
from modeling_retro.encoder.chunk_encoder import ChunkEncoder


logger = logging.get_logger(__name__)

_WINDOW = 8192


def embed_chunks(
    datastore: str | Path,
    encoder: str | Path | ChunkEncoder | None = None,
    revision: str | None = None,
    split: str = TRAIN_SPLIT,
    pooling: str | None = None,
    normalize: bool | None = None,
    truncate_dim: int | None = None,
    dtype: str = "float32",
    tokens_per_batch: int = 4096,
    force: bool = False,
) -> EmbeddingsStage:
    """
    Embeds the chunks of a split. Finished shards are left as they are.

    Args:
        datastore (`str` or `Path`): The datastore.
        encoder (`str`, `Path` or [`ChunkEncoder`], *optional*):
            The encoder, or the address of a server (see [`~modeling_retro.encoder.endpoint.EndpointEncoder`]).
            Defaults to the one that embedded the datastore before.
        revision (`str`, *optional*): Revision of the encoder on the Hub.
        split (`str`, *optional*, defaults to `"train"`): The split.
        pooling (`str`, *optional*): `"mean"` or `"cls"`. Defaults to the pooling that the files of the encoder name.
        normalize (`bool`, *optional*):
            Whether embeddings get length 1. Defaults to the setting in the files of the encoder.
        truncate_dim (`int`, *optional*): Number of leading dimensions that are kept, for Matryoshka encoders.
        dtype (`str`, *optional*, defaults to `"float32"`): Computing type.
        tokens_per_batch (`int`, *optional*, defaults to 4096): Number of tokens in a batch, including padding.
        force (`bool`, *optional*, defaults to `False`): Whether to embed the split again.

    Returns:
        [`EmbeddingsStage`]: the record of the split's embeddings in the manifest.

    Raises:
        ValueError: If the datastore was embedded by another encoder before, or the vectors are not finite.
    """
    path = Path(datastore)
    with directory_lock(path):
        manifest = open_manifest(path)
        chunks = RetroDatastore(path, manifest).split(split).chunks
        if force:
            # The searched split and the splits that search it must have the same encoder.
            for name in list(manifest.splits) if split == TRAIN_SPLIT else [split]:
                discard(path, manifest, name, "embeddings")
        encoder = _open_encoder(path, manifest, encoder, revision, pooling, normalize, truncate_dim, dtype)
        record, options = manifest.splits[split], {"dtype": dtype}
        chunk_shards = record.chunk_shards
        stage = record.embeddings = record.embeddings or EmbeddingsStage(options, shards=[])
        check_options("embed", options, stage.options)
        record.check_made_of_chunks("embeddings", f"run `retro embed --split {split} --force`")
        write_manifest(path, manifest)
        root = split_path(path, split)
        tokenizer = load_tokenizer(path / "tokenizer", manifest.tokenizer.files)

        def make(index: int, temporary: Path, advance: Callable[[int], Any]) -> dict[str, Any]:
            verify_file(root / "chunks" / chunk_shards[index].name, chunk_shards[index].sha256)
            columns = chunks.shard(index)
            rows = len(columns["length"])
            with temporary.open("wb") as file:
                header = {"descr": "<f2", "fortran_order": False, "shape": (rows, encoder.dim)}
                np.lib.format.write_array_header_1_0(file, header)
                for start in range(0, rows, _WINDOW):
                    window = {name: column[start : start + _WINDOW] for name, column in columns.items()}
                    mask = np.arange(chunks.chunk_size) < window["length"][:, None]
                    vectors = encoder.encode_chunks(window["input_ids"], mask, tokenizer, tokens_per_batch, advance)
                    _check_finite(vectors, chunk_shards[index].name, start)
                    file.write(vectors.astype(np.float16).tobytes())
            return {"rows": rows, "chunks_sha256": chunk_shards[index].sha256}

        names = [shard.name for shard in chunk_shards]
        records = run_shards(
            root / "embeddings",
            stage.shards,
            names,
            make,
            suffix=".npy",
            description=f"Embedding {split}",
            sizes=[shard.rows for shard in chunk_shards],
        )
        stage.shards = [EmbeddingShard.from_dict(record) for record in records]
        record.check_made_of_chunks("embeddings", f"run `retro embed --split {split} --force`")
        write_manifest(path, manifest)
        clear_records(root / "embeddings")
        return stage


def _check_finite(vectors: np.ndarray, shard: str, start: int) -> None:
    bad = np.flatnonzero(~(np.abs(vectors) <= np.finfo(np.float16).max).all(axis=1))
    if len(bad):
        raise ValueError(
            f"the encoder's vectors are not finite (in float16) for {len(bad)} chunks of {shard}, the first in row "
            f"{start + bad[0]}; check its weights, or its dtype"
        )


def _open_encoder(
    path: Path,
    manifest: Manifest,
    encoder: str | Path | ChunkEncoder | None,
    revision: str | None,
    pooling: str | None,
    normalize: bool | None,
    truncate_dim: int | None,
    dtype: str,
) -> ChunkEncoder:
    """Loads the encoder. The first one is recorded, and copied unless it is on the Hub. Others must equal it."""
    datastore = RetroDatastore(path, manifest)
    state = process_state()
    device = state.device if torch.cuda.is_available() else "cpu"
    if encoder is None:
        encoder = datastore.open_encoder(device, dtype)
    elif not isinstance(encoder, ChunkEncoder):
        with naming_the_ways(encoder, "encoder"):
            name = find_model(encoder)
            encoder = ChunkEncoder.from_pretrained(name, revision, pooling, normalize, device, dtype, truncate_dim)
    source, copy = encoder.folder, path / "encoder"
    if manifest.encoder is not None and any(record.embeddings is not None for record in manifest.splits.values()):
        datastore.check_encoder(encoder)
    else:
        manifest.encoder = EncoderRecord.from_dict(encoder.describe() | {"name": public_name(encoder.name)})
        if state.is_main_process and source is None:
            remove(copy)  # of an encoder that embedded the datastore before
    # The copy is written each time, in case it was damaged.
    if state.is_main_process and source is not None and source.resolve() != copy.resolve():
        with whole(copy) as temporary:
            copy_encoder(source, temporary)
    state.wait_for_everyone()
    if copy.is_dir():
        manifest.encoder.files = file_checksums(copy, but=".safetensors")
    return encoder


def copy_encoder(source: Path, target: Path) -> None:
    """Copies the files that load the encoder: weights, configs and tokenizer, but no checkpoints of its training."""
    modules = source / "modules.json"  # of sentence-transformers, in which a module may have its own folder
    paths = [module["path"] for module in json.loads(modules.read_text(encoding="utf-8"))] if modules.is_file() else []
    for path in paths:
        if ".." in Path(path).parts or Path(path).is_absolute():
            raise ValueError(f"{modules} names the module {path!r}, which is outside the encoder")
    folders = {source, *(source / path for path in paths)}
    for folder, pattern in itertools.product(sorted(folders), ("*.safetensors", "*.json", "*.txt", "*.model")):
        for file in sorted(folder.glob(pattern)):
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
