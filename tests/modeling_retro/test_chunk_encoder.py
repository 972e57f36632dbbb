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
"""The encoder of chunks: what text it sees, how it pools, and how it is known again."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import make_texts
from transformers import AutoModel, AutoTokenizer

from modeling_retro.encoder.chunk_encoder import ChunkEncoder
from modeling_retro.retriever.retriever import RetroRetriever


def embeddings_of(path):
    files = sorted((path / "embeddings").glob("*.npy"))
    return np.concatenate([np.load(file) for file in files]).astype(np.float32)


def test_embeddings_are_those_of_the_text_of_the_chunks(datastore, tiny_encoder_dir):
    """Mean over the tokens of the encoder's last layer, normalised, written out with transformers."""
    model = AutoModel.from_pretrained(tiny_encoder_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder_dir)
    keys = embeddings_of(datastore.path)
    for chunk in range(0, len(keys), 37):
        input_ids, mask = datastore.chunks.take(chunk)
        text = datastore.tokenizer.decode(input_ids[mask], skip_special_tokens=True)
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden.mean(0), dim=0)
        np.testing.assert_allclose(keys[chunk], expected, atol=2e-3)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_an_embedding_does_not_depend_on_its_batch(tiny_encoder_dir, pooling):
    encoder = ChunkEncoder.from_pretrained(tiny_encoder_dir, pooling=pooling, normalize=False, device="cpu")
    texts = make_texts(30, seed=7)
    together = encoder.encode(texts, tokens_per_batch=200, window=11)
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert together.dtype == np.float32 and together.shape == (30, 16)


def test_sentence_transformers_files_decide_pooling(tiny_encoder_dir, tmp_path):
    folder = shutil.copytree(tiny_encoder_dir, tmp_path / "encoder")
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling")]
    modules = [
        {"idx": i, "type": f"sentence_transformers.models.{kind}", "path": path}
        for i, (kind, path) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 17}))
    encoder = ChunkEncoder.from_pretrained(folder, device="cpu")
    assert (encoder.pooling, encoder.normalize, encoder.max_length) == ("cls", False, 17)


def test_the_encoder_is_known_by_its_weights_whatever_the_dtype(datastore, tiny_encoder_dir):
    assert RetroRetriever(datastore, dtype="bfloat16").encoder.model.dtype == torch.bfloat16
