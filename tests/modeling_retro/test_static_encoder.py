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
"""Encoders without a transformer are held to `SentenceTransformer.encode`."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import make_texts
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, StaticEmbedding, Transformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from modeling_retro.encoder.chunk_encoder import ChunkEncoder
from modeling_retro.encoder.static_encoder import ModulesChunkEncoder, StaticChunkEncoder


DIM = 24


@pytest.fixture(scope="module")
def texts():
    """Texts with accents, Chinese, control characters, every kind of white space, and none at all."""
    generator = random.Random(0)
    odd = ["", " ", "a\x1cb c\u2003d\x0be", "won't--stop ...", "line\r\nbreak\ttab", "ÉCOLE Σίσυφος İ", "日本語 text"]
    spaces = [" ", "  ", "\n", "\t", "\r\n", "\u00a0", "\u3000"]
    mixed = ["".join(word + generator.choice(spaces) for word in text.split(" ")) for text in make_texts(40, seed=5)]
    return odd + mixed


@pytest.fixture(scope="module")
def word_tokenizer(texts):
    """A WordPiece tokenizer as BERT's, whose words are tokenized one by one."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]"]
    tokenizer.train_from_iterator(texts[:30], trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    return tokenizer


def save_static(folder, tokenizer, normalize=True, **kwargs):
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    static = StaticEmbedding(tokenizer, embedding_weights=torch.randn(tokenizer.get_vocab_size(), DIM))
    modules = [static, Normalize()] if normalize else [static]
    SentenceTransformer(modules=modules, device="cpu", **kwargs).save(str(folder))
    return folder


def expected(folder, texts, **kwargs):
    return SentenceTransformer(str(folder), device="cpu").encode(texts, batch_size=7, **kwargs)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", ["word", "byte"])
def test_static_encoder_equals_sentence_transformers(tmp_path, texts, word_tokenizer, tiny_tokenizer, normalize, kind):
    tokenizer = word_tokenizer if kind == "word" else tiny_tokenizer.backend_tokenizer
    folder = save_static(tmp_path, tokenizer, normalize)
    encoder = ChunkEncoder.from_pretrained(folder)
    assert isinstance(encoder, StaticChunkEncoder) and encoder.normalize == normalize
    for _ in range(2):  # the second time every word is known
        np.testing.assert_allclose(encoder.encode(texts, window=9), expected(folder, texts), atol=1e-6)
    assert not encoder.encode([""]).any()


def test_words_are_forgotten_when_there_are_too_many(tmp_path, texts, word_tokenizer, monkeypatch):
    monkeypatch.setattr("modeling_retro.encoder.static_encoder._MOST_WORDS", 8)
    folder = save_static(tmp_path, word_tokenizer)
    np.testing.assert_allclose(
        ChunkEncoder.from_pretrained(folder).encode(texts, window=3), expected(folder, texts), atol=1e-6
    )


def test_truncation_of_the_tokenizer_and_the_default_prompt_are_kept(tmp_path, texts, word_tokenizer):
    tokenizer = Tokenizer.from_str(word_tokenizer.to_str())
    tokenizer.enable_truncation(max_length=9)
    tokenizer.enable_padding(length=20)
    prompts = {"chunk": "retro datastore: ", "other": "no "}
    folder = save_static(tmp_path, tokenizer, prompts=prompts, default_prompt_name="chunk")
    encoder = ChunkEncoder.from_pretrained(folder)
    assert encoder.describe()["prompt"] == "retro datastore: "
    np.testing.assert_allclose(encoder.encode(texts), expected(folder, texts), atol=1e-6)
    assert np.abs(encoder.encode(texts) - expected(folder, texts, prompt="")).max() > 0.1


def test_leading_dimensions_of_a_matryoshka_encoder(tmp_path, texts, word_tokenizer):
    folder = save_static(tmp_path, word_tokenizer)
    encoder = ChunkEncoder.from_pretrained(folder, truncate_dim=10)
    truncated = expected(folder, texts, truncate_dim=10, normalize_embeddings=True)
    np.testing.assert_allclose(encoder.encode(texts), truncated, atol=1e-6)
    assert encoder.dim == encoder.describe()["dim"] == 10
    with pytest.raises(ValueError, match="between 1 and the 24 dimensions"):
        ChunkEncoder.from_pretrained(folder, truncate_dim=25)


@pytest.mark.parametrize("listed", [True, False])
def test_weights_and_mapping_of_model2vec(tmp_path, texts, word_tokenizer, listed):
    """model2vec's own files: with `modules.json` as newer versions write them, and without."""
    size = word_tokenizer.get_vocab_size()
    tensors = {
        "embeddings": torch.randn(11, DIM),
        "mapping": torch.randint(11, (size,)),
        "weights": torch.rand(size, dtype=torch.float64),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    word_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "model2vec", "normalize": True}))
    kinds = [("StaticEmbedding", "."), ("Normalize", "1_Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds)
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    reference = expected(tmp_path, texts)
    if not listed:
        (tmp_path / "modules.json").unlink()
    np.testing.assert_allclose(ChunkEncoder.from_pretrained(tmp_path).encode(texts), reference, atol=1e-6)


def test_too_few_vectors_for_the_tokenizer(tmp_path, word_tokenizer):
    folder = save_static(tmp_path, word_tokenizer)
    file = next(folder.rglob("model.safetensors"))
    save_file({"embedding.weight": torch.zeros(5, DIM)}, file)
    with pytest.raises(ValueError, match=r"has \d+ tokens, its embeddings 5 rows"):
        ChunkEncoder.from_pretrained(folder)
    with pytest.raises(ValueError, match="pools by 'mean', not 'cls'"):
        ChunkEncoder.from_pretrained(folder, pooling="cls")


@pytest.fixture(scope="module")
def dense_dir(tmp_path_factory, tiny_encoder_dir):
    """A stack that only sentence-transformers computes: max pooling and a dense layer."""
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    transformer = Transformer(str(tiny_encoder_dir))
    modules = [transformer, Pooling(16, pooling_mode="max"), Dense(16, 12), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    return folder


def test_other_modules_run_through_sentence_transformers(dense_dir, texts):
    encoder = ChunkEncoder.from_pretrained(dense_dir, device="cpu")
    assert isinstance(encoder, ModulesChunkEncoder)
    assert (encoder.dim, encoder.pooling, encoder.normalize) == (12, "modules", True)
    np.testing.assert_allclose(encoder.encode(texts), expected(dense_dir, texts), atol=1e-6)
    assert encoder.encode([]).shape == (0, 12)
    again = ChunkEncoder.from_pretrained(dense_dir, pooling="modules", normalize=True, device="cpu", dtype="bfloat16")
    assert again.describe() == encoder.describe()
    truncated = ChunkEncoder.from_pretrained(dense_dir, device="cpu", truncate_dim=5)
    reference = expected(dense_dir, texts, truncate_dim=5, normalize_embeddings=True)
    np.testing.assert_allclose(truncated.encode(texts), reference, atol=1e-6)


def test_what_a_stack_of_modules_cannot_do(dense_dir):
    with pytest.raises(ValueError, match="a pooling of its own"):
        ChunkEncoder.from_pretrained(dense_dir, pooling="mean")
    with pytest.raises(ValueError, match="normalize=False cannot undo"):
        ChunkEncoder.from_pretrained(dense_dir, normalize=False)


def test_transformer_with_prompt_and_fewer_dimensions(tmp_path, tiny_encoder_dir, texts):
    modules = [Transformer(str(tiny_encoder_dir)), Pooling(16, pooling_mode="mean"), Normalize()]
    prompts = {"prompts": {"chunk": "retro: "}, "default_prompt_name": "chunk"}
    SentenceTransformer(modules=modules, device="cpu", **prompts).save(str(tmp_path))
    encoder = ChunkEncoder.from_pretrained(tmp_path, device="cpu", truncate_dim=6)
    assert type(encoder) is ChunkEncoder and encoder.prompt == "retro: "
    reference = expected(tmp_path, texts, truncate_dim=6, normalize_embeddings=True)
    np.testing.assert_allclose(encoder.encode(texts), reference, atol=1e-5)


def test_threads_that_share_a_static_encoder_get_what_each_gets_alone(tmp_path, texts, word_tokenizer):
    folder = save_static(tmp_path, word_tokenizer)
    parts = [[f"{text} own{number}x{row}" for row, text in enumerate(texts)] for number in range(16)]
    alone = [ChunkEncoder.from_pretrained(folder).encode(part) for part in parts]
    shared = ChunkEncoder.from_pretrained(folder)
    with ThreadPoolExecutor(8) as pool:
        for found, one in zip(pool.map(shared.encode, parts), alone, strict=True):
            np.testing.assert_array_equal(found, one)
