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
"""What a neighbor does for the next chunk, against log-probabilities computed one neighbor at a time."""

import json

import numpy as np
import pytest
import torch
from array_datastore import random_datastore
from datasets import load_from_disk
from tiny_models import SIZES, tiny_llama

from data_prep.pairs.pairs import load_pairs
from modeling_retro import RetroConfig, RetroForCausalLM, RetroJointForCausalLM
from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.encoder.chunk_encoder import decode_chunks
from trainers.retriever import neighbor_preference
from trainers.retriever.neighbor_preference import (
    choose_pairs,
    chunks_with_a_successor,
    mine_neighbors,
    neighbor_gains,
)
from trainers.scripts import train_retriever
from trainers.scripts.mine_neighbors import main


VOCAB, CHUNK = 50, 6


def make_model(kind, vocab_size=VOCAB, chunk_size=CHUNK):
    torch.manual_seed(0)
    if kind == "cross":
        fields = {"cross_attention_layers": [1], "neighbor_encoder_num_hidden_layers": 1, "chunk_size": chunk_size}
        config = RetroConfig(vocab_size=vocab_size, initializer_range=0.4, **SIZES, **fields)
        return RetroForCausalLM(config).eval()
    decoder = tiny_llama(vocab_size, initializer_range=0.4)
    return RetroJointForCausalLM.from_decoder(decoder, chunk_size=chunk_size)


@torch.no_grad()
def log_prob_of_the_next_chunk(model, datastore, chunk, neighbor, context_chunks):
    """Reads one row without padding, with at most one neighbor, and adds up over the tokens of the next chunk."""
    document = np.flatnonzero(datastore.chunks.document_id == datastore.chunks.document_id[chunk])
    first = max(document[0], chunk - context_chunks + 1)
    tokens, mask = datastore.chunks.take(np.arange(first, chunk + 2))
    row = torch.from_numpy(tokens[mask])[None]
    inputs = {}
    if neighbor is not None:
        ids, real = datastore.take_neighbors(np.array(neighbor))
        # The chunks before have no neighbors. Padding is behind a neighbor, whose places count from its padded end.
        slots = torch.zeros(1, chunk - first + 1, 1, len(ids), dtype=torch.long)
        slots[0, -1, 0] = torch.from_numpy(ids)
        slots_mask = torch.zeros(slots.shape, dtype=torch.bool)
        slots_mask[0, -1, 0] = torch.from_numpy(real)
        inputs = {"neighbor_input_ids": slots, "neighbor_attention_mask": slots_mask}
    log_probs = model(input_ids=row, **inputs).logits[0].log_softmax(-1)
    start = (chunk - first + 1) * datastore.chunk_size
    return sum(log_probs[place - 1, row[0, place]].item() for place in range(start, row.shape[1]))


@pytest.mark.parametrize("kind", ["joint", "cross"])
@pytest.mark.parametrize("context_chunks", [1, 3])
def test_gains_are_those_of_one_neighbor_at_a_time(kind, context_chunks):
    datastore = random_datastore(seed=3, vocab_size=VOCAB, chunk_size=CHUNK, num_documents=12, num_neighbors=5)
    model = make_model(kind)
    chunk_ids = chunks_with_a_successor(datastore.chunks)
    neighbor_ids = datastore.neighbor_ids[chunk_ids]
    assert len(chunk_ids) > 10 and (neighbor_ids < 0).any() and (datastore.chunks.length[chunk_ids + 1] < CHUNK).any()
    gains = neighbor_gains(model, datastore, chunk_ids, neighbor_ids, context_chunks, batch_size=7)
    for chunk, neighbors, found in zip(chunk_ids, neighbor_ids, gains, strict=True):
        without = log_prob_of_the_next_chunk(model, datastore, chunk, None, context_chunks)
        for neighbor, gain in zip(neighbors, found, strict=True):
            if neighbor < 0:
                assert np.isnan(gain)
                continue
            expected = log_prob_of_the_next_chunk(model, datastore, chunk, neighbor, context_chunks) - without
            assert gain == pytest.approx(expected, abs=2e-4)
    assert np.nanstd(gains) > 0.1


def test_a_neighbor_is_read_once_for_all_chunks(monkeypatch):
    datastore = random_datastore(seed=3, vocab_size=VOCAB, chunk_size=CHUNK, num_documents=12, num_neighbors=5)
    model, read = make_model("joint"), []
    encode = model._encode_neighbors
    monkeypatch.setattr(model, "_encode_neighbors", lambda ids, mask: (read.append(len(ids)), encode(ids, mask))[1])
    chunk_ids = chunks_with_a_successor(datastore.chunks)
    neighbor_gains(model, datastore, chunk_ids, datastore.neighbor_ids[chunk_ids], batch_size=4)
    tokens, mask = datastore.take_neighbors(datastore.neighbor_ids[chunk_ids])
    present = mask.any(-1)
    assert sum(read) == len(np.unique(np.where(mask, tokens, -1)[present], axis=0)) < present.sum()


def test_the_best_neighbor_is_the_positive_and_the_worst_the_negative(tiny_datastore_dir):
    datastore = RetroDatastore.from_pretrained(tiny_datastore_dir)
    gains = np.array([[0.5, -1.0, 2.0, 1.0], [-0.1, -0.2, np.nan, -3.0], [3.0, 0.2, 0.1, np.nan]], dtype=np.float32)
    chunk_id, neighbor_ids = np.array([3, 9, 20]), np.array([[30, 41, 52, 63], [70, 81, -1, 92], [100, 110, 20, -1]])
    pairs = choose_pairs(datastore, chunk_id, neighbor_ids, gains, num_positives=2, num_negatives=1)
    expected = [[3, 52, 41], [3, 63, 41], [20, 100, 20], [20, 110, 20]]  # a chunk itself may be a negative
    texts = [decode_chunks(*datastore.chunks.take(np.array(row)), datastore.tokenizer) for row in expected]
    assert [list(row.values()) for row in pairs] == texts
    assert pairs.column_names == ["anchor", "positive", "negative_1"]
    assert len(choose_pairs(datastore, chunk_id, neighbor_ids, gains, num_negatives=0, floor=1.0)) == 2
    with pytest.raises(ValueError, match="by more than 9.0 nats and leaves 1 others"):
        choose_pairs(datastore, chunk_id, neighbor_ids, gains, floor=9.0)
    # A copy of the chunk is no positive, and what says the same as the positive is no negative.
    same = choose_pairs(datastore, chunk_id[2:], np.array([[20, 110, 110, 120]]), np.array([[3.0, 2, 1, 0]]), 2, 1)
    assert same["positive"][:] == [texts[3][1]] * 2 and same["negative_1"][:] != same["positive"][:]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(len(tiny_tokenizer), initializer_range=0.4).save_pretrained(folder)
    return folder


def test_a_killed_run_goes_on_and_its_pairs_are_what_the_trainer_takes(
    base_dir, tiny_datastore_dir, tiny_encoder_dir, tmp_path, monkeypatch, dies_at, capsys
):
    monkeypatch.setattr(neighbor_preference, "CHUNKS_PER_SHARD", 16)
    words = ["--datastore", str(tiny_datastore_dir), "--model", str(base_dir), "--num_candidates", "4"]
    words += ["--max_chunks", "60", "--min_tokens", "4"]
    main([*words, "--output_dir", str(tmp_path / "whole")])
    scored = dies_at(3, neighbor_preference, "neighbor_gains")
    with pytest.raises(KeyboardInterrupt):
        main([*words, "--output_dir", str(tmp_path / "killed")])
    assert not (tmp_path / "killed" / "pairs").exists()
    main([*words, "--output_dir", str(tmp_path / "killed")])
    assert len(scored) == 5  # four shards, of which the third was begun twice
    whole, killed = (load_from_disk(str(tmp_path / name / "pairs")) for name in ("whole", "killed"))
    assert whole[:] == killed[:] and f"{len(whole)} pairs in" in capsys.readouterr().out
    loaded = load_pairs(str(tmp_path / "killed" / "pairs"))
    assert loaded.column_names == ["anchor", "positive", "negative_1"] and len(loaded) > 20
    options = ["--per_device_train_batch_size", "4", "--max_steps", "1", "--report_to", "none"]
    options += ["--model_name_or_path", str(tiny_encoder_dir), "--output_dir", str(tmp_path / "encoder")]
    train_retriever.main([*options, "--pairs", str(tmp_path / "killed" / "pairs")])
    assert (tmp_path / "encoder" / "modules.json").is_file()
    # Other pairs are chosen from the same scores, without scoring again.
    main([*words, "--output_dir", str(tmp_path / "killed"), "--num_negatives", "2"])
    assert len(scored) == 5 and "negative_2" in load_from_disk(str(tmp_path / "killed" / "pairs")).column_names
    with pytest.raises(ValueError, match="another context_chunks than this run has"):
        main([*words, "--output_dir", str(tmp_path / "killed"), "--context_chunks", "2"])
    assert json.loads((tmp_path / "killed" / "mined.json").read_text())["context_chunks"] == 1


def test_bad_numbers_are_named(base_dir, tiny_datastore_dir, tmp_path):
    datastore = RetroDatastore.from_pretrained(tiny_datastore_dir)
    model = RetroJointForCausalLM.from_decoder_pretrained(str(base_dir), chunk_size=datastore.chunk_size)
    for options, message in (
        ({}, "num_candidates is 16, expected 1 to the 4 neighbors of a chunk that are stored; run `retro neighbors"),
        ({"num_candidates": 4, "num_negatives": 4}, "num_positives is 1 and num_negatives is 4, expected"),
        ({"num_candidates": 4, "num_positives": 0}, "num_positives is 0"),
        ({"num_candidates": 4, "context_chunks": 0}, "context_chunks is 0"),
        ({"num_candidates": 4, "min_tokens": 9}, "no chunk of .* has a next chunk of 9 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            mine_neighbors(tiny_datastore_dir, model, tmp_path / "mined", **options)
    assert not (tmp_path / "mined").exists()
