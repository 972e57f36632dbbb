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
"""Embedding a datastore: its shards, its encoder, what it refuses."""

import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import TINY_CHUNK_SIZE, make_texts, write_jsonl
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from data_prep.chunk import chunk_documents
from data_prep.embed import embed_chunks
from data_prep.index import build_index
from modeling_retro.datastore.checksums import checksum
from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.datastore.manifest import read_manifest
from modeling_retro.encoder.chunk_encoder import ChunkEncoder


@pytest.fixture
def chunked(tmp_path, tiny_tokenizer):
    path = tmp_path / "datastore"
    file = write_jsonl(tmp_path / "a.jsonl", make_texts(20))
    chunk_documents(file, path, tiny_tokenizer, chunk_size=TINY_CHUNK_SIZE, shard_bytes=2000)
    return path


def embeddings_of(path):
    return np.concatenate([np.load(file) for file in sorted((path / "embeddings").glob("*.npy"))])


def change_encoder(source, target, edit):
    model = AutoModel.from_pretrained(source)
    with torch.no_grad():
        edit(model)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return target


def test_rows_are_float16_in_the_order_of_the_chunks(chunked, tiny_encoder_dir):
    embed_chunks(chunked, tiny_encoder_dir, tokens_per_batch=100)
    chunks = RetroDatastore.from_pretrained(chunked).chunks
    encoder = ChunkEncoder.from_pretrained(tiny_encoder_dir, device="cpu")
    tokenizer = RetroDatastore.from_pretrained(chunked).tokenizer
    expected = encoder.encode_chunks(*chunks.take(np.arange(len(chunks))), tokenizer)
    found = embeddings_of(chunked)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_a_finished_shard_is_never_redone(chunked, tiny_encoder_dir):
    embed_chunks(chunked, tiny_encoder_dir)
    before = {file: file.stat().st_mtime_ns for file in (chunked / "embeddings").iterdir()}
    embed_chunks(chunked, tiny_encoder_dir)
    assert {file: file.stat().st_mtime_ns for file in (chunked / "embeddings").iterdir()} == before


def test_the_encoder_goes_with_the_datastore(chunked, tiny_encoder_dir, tmp_path):
    encoder = shutil.copytree(tiny_encoder_dir, tmp_path / "encoder")
    embed_chunks(chunked, encoder)
    shutil.rmtree(encoder)
    before = embeddings_of(chunked)
    chunk_documents(
        write_jsonl(tmp_path / "b.jsonl", ["abc"]),
        chunked,
        RetroDatastore.from_pretrained(chunked).tokenizer,
        split="validation",
        chunk_size=TINY_CHUNK_SIZE,
    )
    embed_chunks(chunked, split="validation")
    assert embeddings_of(chunked / "splits" / "validation").shape == (1, before.shape[1])


def test_bfloat16_agrees_with_float32(chunked, tiny_encoder_dir):
    embed_chunks(chunked, tiny_encoder_dir)
    exact = embeddings_of(chunked).astype(np.float32)
    embed_chunks(chunked, tiny_encoder_dir, dtype="bfloat16", force=True)
    rough = embeddings_of(chunked).astype(np.float32)
    has_text = np.abs(exact).sum(axis=1) > 0  # a chunk of nothing but the end of its document has none
    assert (exact * rough).sum(axis=1)[has_text].min() > 0.99 and np.abs(exact - rough).max() > 1e-4
    with pytest.raises(ValueError, match="`embed` was begun with dtype='bfloat16', not 'float32'"):
        embed_chunks(chunked, tiny_encoder_dir)


def test_a_text_without_tokens_has_the_zero_vector(tiny_encoder_dir):
    encoder = ChunkEncoder.from_pretrained(tiny_encoder_dir, device="cpu")
    vectors = encoder.encode(["", "abc", ""])
    assert (vectors[[0, 2]] == 0).all() and np.linalg.norm(vectors[1]) == pytest.approx(1)
    assert (encoder.encode([""]) == 0).all() and encoder.encode([]).shape == (0, 16)


def test_another_encoder_is_refused_until_forced(chunked, tiny_encoder_dir, tmp_path):
    embed_chunks(chunked, tiny_encoder_dir)
    other = change_encoder(tiny_encoder_dir, tmp_path / "other", lambda model: model.embeddings.LayerNorm.bias.add_(1))
    with pytest.raises(ValueError, match="is not the encoder of .* its sha256"):
        embed_chunks(chunked, other)
    before = embeddings_of(chunked)
    embed_chunks(chunked, other, force=True)
    assert np.abs(embeddings_of(chunked).astype(np.float32) - before).max() > 0.01


def test_an_encoder_of_another_width_is_refused(chunked, tiny_encoder_dir, tmp_path):
    embed_chunks(chunked, tiny_encoder_dir)
    config = BertConfig.from_pretrained(tiny_encoder_dir)
    config.hidden_size = 8
    BertModel(config).save_pretrained(tmp_path / "narrow")
    AutoTokenizer.from_pretrained(tiny_encoder_dir).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match="its dim is 8, expected 16|its sha256"):
        embed_chunks(chunked, tmp_path / "narrow")
    file = chunked / "embeddings" / "shard-00000.npy"
    np.save(file, np.load(file)[:, :8])
    with pytest.raises(ValueError, match="shard-00000.npy was altered"):
        build_index(chunked)
    manifest = read_manifest(chunked)
    manifest.train.embedding_shards[0].sha256 = checksum(file)
    manifest.write(chunked)
    with pytest.raises(ValueError, match=r"shape \[\d+, 8\], the manifest says \[\d+, 16\]"):
        build_index(chunked)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_are_refused(chunked, tiny_encoder_dir, tmp_path, value):
    broken = change_encoder(tiny_encoder_dir, tmp_path / "broken", lambda m: m.embeddings.LayerNorm.bias.fill_(value))
    with pytest.raises(ValueError, match="not finite .* of shard-00000, the first in row 0"):
        embed_chunks(chunked, broken)
    assert not list((chunked / "embeddings").glob("*.npy"))


def test_a_damaged_chunk_shard_is_named(chunked, tiny_encoder_dir):
    file = chunked / "chunks" / "shard-00001" / "data-00000-of-00001.arrow"
    content = bytearray(file.read_bytes())
    content[-200] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="chunks/shard-00001 was altered"):
        embed_chunks(chunked, tiny_encoder_dir)


@pytest.mark.slow
def test_a_full_file_system_is_named_and_the_run_goes_on_with_more_space(tmp_path, tiny_tokenizer, tiny_encoder_dir):
    """A real one: 1 MB of memory. Needs the right to mount."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        file = write_jsonl(tmp_path / "a.jsonl", [text for text in make_texts(6000) if text.strip()])
        options = {"chunk_size": 64, "shard_bytes": 200_000}
        with pytest.raises(OSError, match="No space left on device"):
            chunk_documents(file, small / "datastore", tiny_tokenizer, **options)
        with pytest.raises(ValueError, match="no finished chunks"):
            RetroDatastore.from_pretrained(small / "datastore").chunks
        subprocess.run(["mount", "-o", "remount,size=100m", str(small)], check=True)
        chunk_documents(file, small / "datastore", tiny_tokenizer, **options)
        RetroDatastore.from_pretrained(small / "datastore").verify()
    finally:
        subprocess.run(["umount", str(small)], check=True)
