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
"""Bits per byte of held-out documents without, with random and with retrieved neighbors."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from array_datastore import ArrayDatastore, ArraySource, random_datastore

from data_prep.bm25_index import build_bm25_index
from data_prep.neighbors import find_neighbors
from modeling_retro import RetroConfig, RetroDatastore, RetroForCausalLM
from trainers.evaluation.closest import closest_documents, format_closest
from trainers.evaluation.evaluate import (
    NeighborSource,
    evaluate_retro,
    longest_common_substring,
    neighbor_overlap,
    neighbors_in_share,
    token_bits,
)
from trainers.evaluation.report import RetroEvaluation, bootstrap_interval
from trainers.evaluation.windows import sliding_windows


VOCAB_SIZE = 40
CHUNK_SIZE = 4


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = RetroConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        chunk_size=CHUNK_SIZE,
        cross_attention_layers=[1],
        neighbor_encoder_num_hidden_layers=1,
        initializer_range=0.5,
    )
    return RetroForCausalLM(config)


@pytest.fixture(scope="module")
def datastore():
    return random_datastore(seed=0, vocab_size=VOCAB_SIZE, chunk_size=CHUNK_SIZE, num_documents=12, num_neighbors=3)


@pytest.fixture(scope="module")
def held_out(datastore):
    split = random_datastore(1, VOCAB_SIZE, CHUNK_SIZE, num_documents=9, num_neighbors=3, max_chunks=9)
    split.neighbor_ids %= len(datastore.chunks)
    split.chunks.num_bytes = np.random.default_rng(2).integers(1, 20, size=len(split.chunks))
    return split


def evaluate(model, datastore, held_out, **kwargs):
    return evaluate_retro(
        model, datastore, held_out, window_chunks=4, stride_chunks=3, batch_size=3, show_progress=False, **kwargs
    )


@pytest.mark.parametrize(("window", "stride"), [(2, 1), (4, 2), (4, 3), (7, 1), (32, 16)])
@pytest.mark.parametrize("num_chunks", [1, 2, 3, 4, 5, 8, 31, 33])
def test_windows_count_each_chunk_once_and_always_with_context(num_chunks, window, stride):
    counted = []
    for start, end, first_counted in sliding_windows(num_chunks, window, stride):
        assert end - start <= window
        assert first_counted > start or start == 0
        counted += range(first_counted, end)
    assert counted == list(range(num_chunks))


def reference_document_nats(model, datastore, split, document, window, stride, num_neighbors):
    """One token at a time: nats of each token of a document in the first window that holds it."""
    chunks = np.flatnonzero(split.chunks.document_id == document)
    nats = [math.log(VOCAB_SIZE)]
    for start in range(0, len(chunks), stride):
        ids = chunks[start : start + window]
        tokens = np.concatenate([split.chunks.input_ids[i][: split.chunks.length[i]] for i in ids])
        whole = [i for i in ids if split.chunks.length[i] == CHUNK_SIZE]
        inputs = {}
        if num_neighbors and whole:
            neighbors, mask = datastore.take_neighbors(split.neighbor_ids[whole, :num_neighbors])
            inputs["neighbor_input_ids"] = torch.from_numpy(neighbors)[None]
            inputs["neighbor_attention_mask"] = torch.from_numpy(mask)[None]
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(tokens)[None], **inputs).logits[0]
        log_probabilities = torch.log_softmax(logits.double(), dim=-1)
        new = range(len(nats) - start * CHUNK_SIZE, len(tokens))
        nats += [-log_probabilities[i - 1, tokens[i]].item() for i in new]
    return nats


@pytest.mark.parametrize(("mode", "num_neighbors"), [("off", 0), ("on", 1), ("on", 3)])
def test_bits_equal_a_loop_over_documents_windows_and_tokens(model, datastore, held_out, mode, num_neighbors):
    model.eval()
    evaluation = evaluate(model, datastore, held_out, modes=[mode], num_neighbors=max(num_neighbors, 1))
    nats = [
        reference_document_nats(model, datastore, held_out, document, 4, 3, num_neighbors) for document in range(9)
    ]
    bits = np.array([sum(document) / math.log(2) for document in nats])
    assert np.allclose(evaluation.document_bits(mode), bits, rtol=1e-5)
    assert evaluation.num_tokens == sum(map(len, nats)) == held_out.chunks.length.sum()
    assert evaluation.document_bytes.sum() == held_out.chunks.num_bytes.sum()
    assert math.isclose(evaluation.bits_per_byte(mode), bits.sum() / held_out.chunks.num_bytes.sum(), rel_tol=1e-5)
    assert math.isclose(
        evaluation.perplexity(mode), math.exp(sum(map(sum, nats)) / evaluation.num_tokens), rel_tol=1e-5
    )


def uniform_model(model):
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return model


def test_uniform_model_needs_the_logarithm_of_the_vocabulary_for_each_token(datastore):
    torch.manual_seed(0)
    model = uniform_model(
        RetroForCausalLM(
            RetroConfig(
                vocab_size=VOCAB_SIZE,
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                chunk_size=CHUNK_SIZE,
                cross_attention_layers=[0],
            )
        )
    )
    # Six tokens (the last an end of document without bytes) over ten bytes, then three tokens over two bytes.
    held_out = ArraySource([[1, 2, 3, 4, 5, 6], [7, 8, 9]], CHUNK_SIZE, [[0], [1], [2]], num_bytes=[7, 3, 2])
    evaluation = evaluate(model, datastore, held_out, num_neighbors=1)
    for mode in ("off", "random", "on"):
        assert math.isclose(evaluation.bits_per_byte(mode), 9 * math.log2(VOCAB_SIZE) / 12, rel_tol=1e-6)
        assert math.isclose(evaluation.perplexity(mode), VOCAB_SIZE, rel_tol=1e-6)


def test_bos_at_the_start_of_a_document_costs_nothing(model, held_out):
    documents = [[3, 1, 2, 3, 4, 5], [3, 7]]
    split = ArraySource(documents, CHUNK_SIZE, [[0], [1], [2]])
    with_bos = ArrayDatastore([[1, 2, 3]], CHUNK_SIZE, [[0]], bos_token_id=3)
    without_bos = ArrayDatastore([[1, 2, 3]], CHUNK_SIZE, [[0]])
    windows = [(0, 2, 0), (2, 3, 2)]
    bits_bos, tokens_bos = (
        values.sum(-1) for values in token_bits(model, with_bos, split, windows, None, batch_size=2)
    )
    bits, tokens = (values.sum(-1) for values in token_bits(model, without_bos, split, windows, None, batch_size=2))
    assert (tokens - tokens_bos).tolist() == [1, 0, 1]
    assert np.allclose(bits - bits_bos, [math.log2(VOCAB_SIZE), 0, math.log2(VOCAB_SIZE)])


def test_off_on_and_random_differ_only_by_the_neighbors(model, datastore, held_out):
    evaluation = evaluate(model, datastore, held_out, num_neighbors=2)
    assert list(evaluation.chunk_bits) == ["off", "random", "on"]
    assert len({round(evaluation.bits_per_byte(mode), 6) for mode in evaluation.chunk_bits}) == 3
    # Where no chunk finds a neighbor, retrieval is off.
    held_out_without = ArraySource([], CHUNK_SIZE, np.full_like(held_out.neighbor_ids, -1))
    held_out_without.chunks = held_out.chunks
    alone = evaluate(model, datastore, held_out_without, modes=["on"])
    assert np.allclose(alone.document_bits("on"), evaluation.document_bits("off"), rtol=1e-6)


def test_several_numbers_of_neighbors_are_measured_each(model, datastore, held_out):
    several = evaluate(model, datastore, held_out, modes=["off", "on"], num_neighbors=[1, 3])
    assert list(several.chunk_bits) == ["off", "on k=1", "on k=3"]
    for number in (1, 3):
        alone = evaluate(model, datastore, held_out, modes=["on"], num_neighbors=number)
        assert np.allclose(several.chunk_bits[f"on k={number}"], alone.chunk_bits["on"], rtol=1e-6)


def test_parts_of_neighbors_are_the_chunk_and_its_continuation(datastore):
    neighbor_ids = np.arange(len(datastore.chunks))[:, None]
    chunk_ids = neighbor_ids.T
    tokens, mask = datastore.take_neighbors(neighbor_ids[None])
    for mode, first, end in (("neighbor", 0, CHUNK_SIZE), ("continuation", CHUNK_SIZE, 2 * CHUNK_SIZE)):
        found_tokens, found_mask = NeighborSource(datastore, neighbor_ids, mode).take(chunk_ids)
        assert (found_tokens == tokens).all()
        assert (found_mask[..., first:end] == mask[..., first:end]).all()
        assert found_mask.sum() == mask[..., first:end].sum() > 0


def test_shuffled_neighbors_have_the_same_tokens_in_another_order(datastore):
    neighbor_ids = np.arange(len(datastore.chunks))[:, None]
    chunk_ids = neighbor_ids.T
    tokens, mask = NeighborSource(datastore, neighbor_ids, "on").take(chunk_ids)
    shuffled, shuffled_mask = NeighborSource(datastore, neighbor_ids, "shuffled", seed=1).take(chunk_ids)
    again, _ = NeighborSource(datastore, neighbor_ids, "shuffled", seed=1).take(chunk_ids)
    assert (shuffled_mask == mask).all()
    assert (shuffled == again).all()
    assert (shuffled != tokens).any()
    for row in np.ndindex(mask.shape[:-1]):
        assert sorted(shuffled[row][mask[row]]) == sorted(tokens[row][mask[row]])


def brute_force_substring(first, second):
    return max(
        (
            length
            for i in range(len(first))
            for j in range(len(second))
            for length in range(1, min(len(first) - i, len(second) - j) + 1)
            if (first[i : i + length] == second[j : j + length]).all()
        ),
        default=0,
    )


@pytest.mark.parametrize("vocab_size", [2, 5, 30])
def test_longest_common_substring_equals_brute_force(vocab_size):
    generator = np.random.default_rng(vocab_size)
    first = generator.integers(vocab_size, size=(20, 1, 6))
    second = generator.integers(vocab_size, size=(20, 3, 9))
    found = longest_common_substring(first, second)
    for row in range(20):
        for neighbor in range(3):
            assert found[row, neighbor] == brute_force_substring(first[row, 0], second[row, neighbor])


def test_overlap_is_the_longest_substring_shared_with_a_neighbor_and_ignores_padding():
    datastore = ArrayDatastore([[1, 2, 3, 4, 5, 6, 7], [8, 9]], CHUNK_SIZE, [[2]] * 3)
    # Two tokens of chunk 0, which go on into its continuation; one token and padding in common; nothing.
    split = ArraySource([[4, 5, 6, 0], [9], [3, 3, 3, 3]], CHUNK_SIZE, [[2, 0], [2, -1], [2, 1]])
    assert neighbor_overlap(datastore, split, 3).tolist() == [3 / 4, 1 / 4, 0]


def test_the_closest_documents_are_those_of_the_highest_overlap_with_their_sources(tiny_datastore_dir):
    datastore = RetroDatastore.from_pretrained(tiny_datastore_dir)
    split = datastore.split("validation")
    overlap = neighbor_overlap(datastore, split, len(split.chunks))
    rows = closest_documents(datastore, split, overlap, number=4)
    documents = split.chunks.document_id
    best = {document: overlap[documents == document].max() for document in set(documents.tolist())}
    assert [row["overlap"] for row in rows] == sorted(best.values(), reverse=True)[:4]
    for row in rows:
        sources = split.sources(range(len(documents)))
        own = [number for number, source in enumerate(sources) if source.to_dict() == row["document"]]
        chunk = own[int(np.argmax(overlap[own]))]
        tokens = split.chunks.take([chunk])[0][0]
        runs = []
        ids = split.neighbor_ids[chunk]
        for neighbor, source in zip(ids, datastore.sources(ids), strict=True):
            text, mask = datastore.take_neighbors([neighbor])
            runs.append((brute_force_substring(tokens, np.where(mask, text, -2)[0]), source.to_dict()))
        assert row["neighbor"] == max(runs, key=lambda run: run[0])[1]
        assert row["overlap"] == max(runs, key=lambda run: run[0])[0] / datastore.chunk_size
    table = format_closest(rows)
    assert f"| {rows[0]['overlap']:.0%} | validation.jsonl:{rows[0]['document']['line']} | train.jsonl:" in table


def test_overlap_bins_hold_every_chunk_once_and_cumulate_to_the_whole(model, datastore, held_out):
    domains = [f"domain {i % 2}" for i in range(9)]
    evaluation = evaluate(model, datastore, held_out, measure_overlap=True, domains=domains)
    curve = evaluation.overlap_curve()
    assert sum(row["num_chunks"] for row in curve) == len(held_out.chunks)
    for name in evaluation.chunk_bits:
        assert math.isclose(curve[-1]["cumulative_bits_per_byte"][name], evaluation.bits_per_byte(name))
    for domain, ratios in evaluation.by_domain().items():
        chosen = np.array(domains) == domain
        expected = evaluation.document_bits("on")[chosen].sum() / evaluation.document_bytes[chosen].sum()
        assert math.isclose(ratios["on"], expected)


def test_evaluation_leaves_the_model_as_it_was(model, datastore, held_out):
    model.train()
    evaluate(model, datastore, held_out, modes=["off"])
    assert model.training


def test_first_documents_are_evaluated_as_in_the_whole(model, datastore, held_out):
    whole = evaluate(model, datastore, held_out, modes=["on"])
    part = evaluate(model, datastore, held_out, modes=["on"], max_documents=4)
    assert len(part.document_bytes) == 4
    assert np.allclose(part.document_bits("on"), whole.document_bits("on")[:4], rtol=1e-6)


def test_difference_is_paired_by_document():
    generator = np.random.default_rng(0)
    off = generator.uniform(1_000, 9_000, size=50)
    evaluation = RetroEvaluation(
        {"off": off, "on": off - 10.0}, np.full(50, 1_000), np.arange(51), num_tokens=1, num_neighbors=[1]
    )
    difference = evaluation.difference("on", "off")
    for value in (difference.bits_per_byte, difference.low, difference.high):
        assert math.isclose(value, -0.01, rel_tol=1e-9)


def test_bootstrap_interval_is_that_of_the_normal_distribution_for_many_documents():
    generator = np.random.default_rng(0)
    numerator = generator.normal(1.0, 2.0, size=4000)
    low, high = bootstrap_interval(numerator, np.ones(4000))
    error = 1.96 * numerator.std() / 4000**0.5
    assert math.isclose(low, numerator.mean() - error, abs_tol=0.1 * error)
    assert math.isclose(high, numerator.mean() + error, abs_tol=0.1 * error)


def test_bootstrap_interval_is_that_of_ratios_of_drawn_documents():
    generator = np.random.default_rng(3)
    numerator, denominator = generator.normal(size=7), generator.uniform(1, 5, size=7)
    drawn = np.random.default_rng(0).integers(7, size=(2000, 7))
    ratios = [numerator[rows].sum() / denominator[rows].sum() for rows in drawn]
    expected = np.quantile(ratios, [0.025, 0.975])
    np.testing.assert_allclose(bootstrap_interval(numerator, denominator), expected, rtol=1e-9)
    assert bootstrap_interval(numerator[:1], denominator[:1]) == (numerator[0] / denominator[0],) * 2


def test_saved_files_hold_the_table(model, datastore, held_out, tmp_path):
    evaluation = evaluate(model, datastore, held_out, measure_overlap=True, domains=["all"] * 9)
    evaluation.save(tmp_path / "report")
    saved = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert saved["num_documents"] == 9
    assert saved["bits_per_byte"]["on"] == evaluation.bits_per_byte("on")
    assert set(saved["differences"]) == {"random - off", "on - off", "on - random"}
    table = (tmp_path / "report" / "evaluation.md").read_text()
    for mode in evaluation.chunk_bits:
        assert f"| {mode} | {evaluation.bits_per_byte(mode):.4f} | {evaluation.perplexity(mode):.3f} |" in table
    assert "| all |" in table
    for plot in ("evaluation.png", "overlap.png"):
        assert (tmp_path / "report" / plot).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modes": ["on", "best"]}, "unknown evaluation modes best"),
        ({"stride_chunks": 4, "window_chunks": 4}, "stride_chunks is 4"),
        ({"num_neighbors": 4}, "num_neighbors is 4"),
        ({"num_neighbors": [1, 0]}, r"num_neighbors is \[1, 0\]"),
        ({"domains": ["a"]}, "1 domains for 9 documents"),
        ({"max_documents": 0}, "no documents"),
    ],
)
def test_wrong_options_name_the_value(model, datastore, held_out, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_retro(model, datastore, held_out, show_progress=False, **options)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_neighbors_in_a_share_are_the_nearest_of_its_documents(tiny_datastore_dir, share):
    real = RetroDatastore.from_pretrained(tiny_datastore_dir)
    split, document_id = real.split("validation"), np.asarray(real.chunks.document_id)
    found = neighbors_in_share(real, split, num_chunks=30, num_neighbors=3, share=share)
    folders = {
        name: sorted((path / "embeddings").glob("*.npy"))
        for name, path in (("train", real.path), ("query", split.path))
    }
    keys, queries = (
        np.concatenate([np.load(file) for file in files]).astype(np.float32) for files in folders.values()
    )
    documents = np.flatnonzero(np.random.default_rng(0).random(document_id[-1] + 1) < share)
    assert 0 < len(documents) < 40
    allowed = np.isin(document_id, documents)
    assert allowed[found].all()
    scores = queries[:30] @ keys.T
    best = np.sort(np.where(allowed, scores, -np.inf), axis=1)[:, ::-1][:, :3]
    np.testing.assert_allclose(np.take_along_axis(scores, found, axis=1), best, rtol=1e-5)


def test_larger_shares_hold_the_smaller_ones_and_each_is_measured(model, tiny_datastore_dir):
    torch.manual_seed(0)
    real = RetroDatastore.from_pretrained(tiny_datastore_dir)
    model = RetroForCausalLM(RetroConfig(**{**model.config.to_dict(), "vocab_size": 302, "chunk_size": 8}))
    options = {"modes": ["off", "random", "on"], "num_neighbors": [1, 2], "max_documents": 2}
    evaluation = evaluate(model, real, real.split("validation"), datastore_shares=[0.3, 1], **options)
    shares = {f"on k={k} share={share}" for k in (1, 2) for share in ("0.3", "1")}
    assert set(evaluation.chunk_bits) == {"off", "random k=1", "random k=2"} | shares
    whole = evaluate(model, real, real.split("validation"), **options)
    assert np.array_equal(evaluation.chunk_bits["on k=2 share=1"], whole.chunk_bits["on k=2"])
    assert not np.array_equal(evaluation.chunk_bits["on k=2 share=0.3"], whole.chunk_bits["on k=2"])
    assert evaluation.references("on k=2 share=0.3") == ["off", "random k=2"]


def test_another_retriever_reads_what_it_would_have_stored(model, tiny_datastore_dir, tmp_path):
    torch.manual_seed(0)
    path = shutil.copytree(tiny_datastore_dir, tmp_path / "datastore")
    build_bm25_index(path)
    model = RetroForCausalLM(RetroConfig(**{**model.config.to_dict(), "vocab_size": 302, "chunk_size": 8}))
    real = RetroDatastore.from_pretrained(path)
    options = {"modes": ["on"], "num_neighbors": 2, "max_documents": 3, "measure_overlap": True}
    dense = evaluate(model, real, real.split("validation"), **options)
    anew = evaluate(model, real, real.split("validation"), retriever="bm25", **options)
    find_neighbors(path, 10, "validation", "bm25", force=True)
    real = RetroDatastore.from_pretrained(path)
    stored = evaluate(model, real, real.split("validation"), **options)
    assert np.array_equal(anew.chunk_bits["on"], stored.chunk_bits["on"])
    assert np.array_equal(anew.overlap, stored.overlap)
    assert not np.array_equal(anew.chunk_bits["on"], dense.chunk_bits["on"])
    with pytest.raises(ValueError, match="num_neighbors is 500, expected numbers from 1 to the 457 chunks"):
        evaluate(model, real, real.split("validation"), retriever="hybrid", num_neighbors=500)


@pytest.mark.parametrize("shares", [[], [0.0], [0.5, 1.5]])
def test_shares_that_are_none_are_refused(model, datastore, held_out, shares):
    with pytest.raises(ValueError, match="datastore_shares is"):
        evaluate(model, datastore, held_out, datastore_shares=shares)


def test_unknown_tokens_are_counted_in_an_evaluation(model, monkeypatch):
    warnings = []
    monkeypatch.setattr("trainers.evaluation.evaluate.logger.warning", warnings.append)
    documents, neighbors = [[5, 6, 7, 1, 1, 8, 9, 4], [1, 2, 3]], [[-1], [-1], [-1]]
    store = ArrayDatastore(documents, 4, neighbors)
    options = {"modes": ["off"], "num_neighbors": 1, "window_chunks": 2, "stride_chunks": 1, "show_progress": False}
    for unknown, expected in ((1, [1, 1, 1]), (None, [0, 0, 0])):
        store.tokenizer.unk_token_id, store.tokenizer.eos_token_id, store.tokenizer.sep_token_id = unknown, 4, None
        evaluation = evaluate_retro(model, store, ArraySource(documents, 4, neighbors), **options)
        assert evaluation.unknown_tokens.tolist() == expected
        assert evaluation.to_dict().get("unknown_tokens", 0) == sum(expected)
        assert ("3 of them unknown" in evaluation.to_markdown()) == (unknown == 1)
    assert len(warnings) == 1 and warnings[0].startswith("27.3% of the tokens are unknown")


def test_texts_of_which_most_is_unknown_are_refused(model):
    documents, neighbors = [[1, 1, 1, 4], [1, 6, 7, 4]], [[-1], [-1]]
    options = {"modes": ["off"], "num_neighbors": 1, "window_chunks": 2, "stride_chunks": 1, "show_progress": False}
    store = ArrayDatastore(documents, 4, neighbors)
    store.tokenizer.unk_token_id, store.tokenizer.eos_token_id, store.tokenizer.sep_token_id = 1, 4, None
    evaluate_retro(model, store, ArraySource(documents, 4, neighbors), **options)  # just half
    documents[1][1] = 1
    source = ArraySource(documents, 4, neighbors)
    with pytest.raises(ValueError, match="62.5% of the tokens are unknown.*allow_unknown_tokens"):
        evaluate_retro(model, store, source, **options)
    evaluate_retro(model, store, source, **options, allow_unknown_tokens=True)
