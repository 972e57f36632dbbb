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

import shutil

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, BertModel, PreTrainedTokenizerFast

from data_prep.embed import embed_chunks
from data_prep.index import build_index
from data_prep.neighbors import find_neighbors
from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.encoder.chunk_encoder import ChunkEncoder
from modeling_retro.retriever.retriever import RetroRetriever
from trainers.retriever.distillation import distill_encoder
from trainers.scripts.distill_encoder import main


pytest.importorskip("model2vec.distill", reason="wants the extra `static`", exc_type=ImportError)

WORDS = ["retro", "looks", "things", "up", "in", "a", "data", "##store", "##s", "na", "##ive"]


@pytest.fixture(scope="module")
def bert_dir(tmp_path_factory):
    """A random BERT with BERT's tokenizer, which pads and truncates, as published encoders do."""
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = list(dict.fromkeys(vocabulary))
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding(length=32)
    tokenizer.enable_truncation(max_length=32)
    names = {name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(vocabulary), initializer_range=0.5, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def static_dir(tmp_path_factory, bert_dir):
    folder = tmp_path_factory.mktemp("static") / "encoder"
    main(["--encoder", str(bert_dir), "--output_dir", str(folder), "--dim", "16"])
    return folder


def test_similarities_are_those_of_weighted_means_of_single_tokens(bert_dir, static_dir):
    """All components are kept here, so that distances are those of the encoder's states, less their mean."""
    model = AutoModel.from_pretrained(bert_dir).eval()
    encoder = ChunkEncoder.from_pretrained(static_dir)
    vocabulary = encoder.tokenizer.get_vocab()
    bert = Tokenizer.from_file(str(bert_dir / "tokenizer.json"))
    states = np.zeros((len(vocabulary), 16), dtype=np.float32)
    with torch.no_grad():
        for token, row in vocabulary.items():
            input_ids = torch.tensor([[2, bert.token_to_id(token), 3]])
            states[row] = model(input_ids).last_hidden_state[0].mean(dim=0)
    states -= states.mean(axis=0)
    share = 1 / np.arange(2, len(states) + 2)
    weights = 1e-4 / (1e-4 + share / share.sum())
    rows = [vocabulary[token] for token in ("data", "##store", "looks", "up", "up")]
    mean = (states[rows] * weights[rows, None]).mean(axis=0)
    other = states[vocabulary["retro"]]
    expected = mean @ other / np.linalg.norm(mean) / np.linalg.norm(other)
    one, two = encoder.encode(["Datastore looks up\nup", "retro"])
    assert one @ two == pytest.approx(expected, abs=1e-4)


def test_folder_loads_in_both_libraries_and_names_no_folder_of_this_machine(bert_dir, static_dir):
    model2vec = pytest.importorskip("model2vec")
    texts = ["a datastore looks up things " * 3, "naive retros", "up"]
    ours = ChunkEncoder.from_pretrained(static_dir).encode(texts)
    np.testing.assert_allclose(SentenceTransformer(str(static_dir), device="cpu").encode(texts), ours, atol=1e-6)
    np.testing.assert_allclose(model2vec.StaticModel.from_pretrained(static_dir).encode(texts), ours, atol=1e-6)
    for file in static_dir.rglob("*"):
        assert not file.is_file() or str(bert_dir.parent).encode() not in file.read_bytes()


def test_datastore_keeps_its_static_encoder(tiny_datastore_dir, static_dir, tmp_path):
    encoder_dir = shutil.copytree(static_dir, tmp_path / "encoder")
    datastore = shutil.copytree(tiny_datastore_dir, tmp_path / "datastore")
    embed_chunks(datastore, encoder_dir, truncate_dim=12, force=True)
    build_index(datastore)
    shutil.rmtree(encoder_dir)
    embed_chunks(datastore, split="validation", force=True)
    find_neighbors(datastore, num_neighbors=2, split="validation")
    opened = RetroDatastore.from_pretrained(datastore)
    assert opened.manifest.encoder.dim == opened.index.d == 12
    retriever = RetroRetriever(opened)
    split = opened.split("validation")
    whole = split.chunks.length == opened.chunk_size
    found = retriever.retrieve(torch.from_numpy(split.chunks.take(np.flatnonzero(whole))[0]), k=2)
    np.testing.assert_allclose(found.scores, split.neighbor_scores[whole], atol=2e-3)


def test_what_cannot_be_distilled(bert_dir, static_dir, tmp_path):
    with pytest.raises(ValueError, match="no transformer with mean or cls pooling"):
        distill_encoder(static_dir, tmp_path / "again")
    with pytest.raises(ValueError, match="between 1 and the 16 dimensions"):
        distill_encoder(bert_dir, tmp_path / "wide", dim=17)
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        distill_encoder(bert_dir, tmp_path / "heavy", sif_coefficient=1)
    assert list(tmp_path.iterdir()) == []
