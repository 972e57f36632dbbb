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
"""The card of a model: made from its configuration and its evaluation, by hand if someone wishes."""

import json

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from test_modeling_retro import make_model

from modeling_retro import RetroConfig
from modeling_retro.sharing.model_card import Way, create_model_card, evaluation_tables, save_model_card
from trainers.evaluation.report import RetroEvaluation


def random_evaluation(**kwargs):
    generator = np.random.default_rng(0)
    modes = ("off", "random k=1", "on k=1", "random k=2", "on k=2")
    return RetroEvaluation(
        chunk_bits={mode: generator.uniform(50, 100, size=12) for mode in modes},
        chunk_bytes=generator.integers(20, 60, size=12),
        document_offsets=np.array([0, 3, 7, 12]),
        num_tokens=90,
        num_neighbors=[1, 2],
        **kwargs,
    )


@pytest.mark.parametrize(
    ("way", "name", "random"),
    [
        (Way("off"), "off", "random"),
        (Way("on"), "on", "random"),
        (Way("on", 2), "on k=2", "random k=2"),
        (Way("shuffled", 10, 0.125), "shuffled k=10 share=0.125", "random k=10"),
        (Way("on", share=1e-05), "on share=1e-05", "random"),
        (Way("on", 1, has_reader=True), "on k=1 reader", "random k=1 reader"),
        (Way("on", 1, has_knn_lm=True), "on k=1 + knn_lm", "random k=1 + knn_lm"),
        (Way("on", has_knn_lm=True), "on + knn_lm", "random + knn_lm"),
        (Way("another decoder"), "another decoder", "random"),
    ],
)
def test_the_name_of_a_way_is_read_as_the_way(way, name, random):
    assert str(way) == name
    assert Way.parse(name) == way
    assert [str(reference) for reference in way.references()] == ["off", random]


def test_tables_compare_with_off_and_with_as_many_random_neighbors():
    evaluation = random_evaluation(overlap=np.linspace(0, 1, 12), domains=["a", "b", "a"])
    main, overlap, domains = evaluation_tables(evaluation.to_dict()).split("\n\n|")
    rows = {row.split("|")[1].strip(): row.split("|")[2:-1] for row in main.splitlines() if row.startswith("|")}
    for mode in evaluation.chunk_bits:
        bits_per_byte, perplexity, less_off, less_random = (cell.strip() for cell in rows[mode])
        assert bits_per_byte == f"{evaluation.bits_per_byte(mode):.4f}"
        assert perplexity == f"{evaluation.perplexity(mode):.3f}"
        assert less_off == ("" if mode == "off" else str(evaluation.difference(mode, "off")))
        random = "random" + mode.removeprefix("on") if mode.startswith("on") else None
        assert less_random == ("" if random is None else str(evaluation.difference(mode, random)))
    curve = evaluation.overlap_curve()
    assert [line.split("|")[2].strip() for line in overlap.splitlines()[2:10]] == [str(r["num_chunks"]) for r in curve]
    assert f"{evaluation.by_domain()['b']['on k=2']:.4f}" in domains


def test_a_difference_is_read_in_either_direction():
    numbers = {"off": 2.0, "random": 1.0}
    evaluation = {
        "num_documents": 1,
        "num_bytes": 1,
        "num_tokens": 1,
        "num_neighbors": [2],
        "bits_per_byte": numbers,
        "perplexity": numbers,
        "differences": {"random - off": {"bits_per_byte": -1.0, "low": -2.0, "high": -0.5}},
    }
    off = evaluation_tables(evaluation).splitlines()[2]
    assert off.endswith("| +1.0000 (+0.5000 … +2.0000) |")


def test_the_card_says_what_the_model_is_and_carries_its_numbers_as_metadata():
    evaluation = random_evaluation().to_dict() | {"split": "validation"}
    config = make_model().config
    config.datastore_name_or_path, config.datastore_revision = "alice/datastore", "0123456789abcdef"
    config.base_model_name_or_path = "alice/base"
    card = create_model_card(config, "alice/model", evaluation, license="mit", tags=["small", "retro"])
    assert card.data.license == "mit"
    assert card.data.base_model == "alice/base"
    assert card.data.datasets == ["alice/datastore"]
    assert card.data.tags == ["retro", "retrieval", "small"]
    again = ModelCard(str(card))
    measured = {result.metric_name: result.metric_value for result in again.data.eval_results}
    for mode, value in evaluation["bits_per_byte"].items():
        assert measured[f"bits per byte, retrieval {mode}"] == pytest.approx(value, abs=1e-4)
    assert {result.dataset_split for result in again.data.eval_results} == {"validation"}
    assert "alice/datastore](https://huggingface.co/datasets/alice/datastore) at `0123456789ab`" in card.text
    assert 'from_pretrained("alice/model", trust_remote_code=True, retriever="auto")' in card.text


def test_folders_of_this_machine_stay_out_of_the_card(tmp_path):
    model = make_model()
    model.config.datastore_name_or_path = model.config.base_model_name_or_path = str(tmp_path)
    model.save_pretrained(tmp_path / "model")
    save_model_card(tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text()
    assert str(tmp_path) not in text
    assert 'AutoTokenizer.from_pretrained("model"' in text
    assert "base_model" not in text and "datasets:" not in text


def test_numbers_of_other_weights_leave_the_card(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    save_model_card(tmp_path, random_evaluation().to_dict())
    save_model_card(tmp_path, name="alice/model")
    assert "| on k=2 |" in (tmp_path / "README.md").read_text()
    model.lm_head.weight.data.mul_(2)
    model.save_pretrained(tmp_path)
    save_model_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| on k=2 |" not in text and "model-index" not in text


def test_metadata_is_kept_and_a_card_written_by_hand_is_left_alone(tmp_path):
    make_model().save_pretrained(tmp_path)
    save_model_card(tmp_path, license="mit")
    card = ModelCard.load(tmp_path / "README.md")
    card.data.language = "en"
    card.save(tmp_path / "README.md")
    save_model_card(tmp_path, random_evaluation().to_dict())
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.language) == ("mit", "en")
    assert "| on k=2 |" in card.text
    assert json.loads((tmp_path / "evaluation.json").read_text())["weights_sha256"]

    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\nMy own words.\n")
    save_model_card(tmp_path, random_evaluation().to_dict(), license="apache-2.0")
    assert (tmp_path / "README.md").read_text() == "---\nlicense: apache-2.0\n---\n\nMy own words.\n"


def test_results_on_a_datastore_of_the_hub_are_written_for_its_pages(tmp_path):
    config = RetroConfig(datastore_name_or_path="alice/docstrings", datastore_revision="a" * 40)
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    evaluation = random_evaluation().to_dict()
    save_model_card(tmp_path, {**evaluation, "split": "validation"})
    file = tmp_path / ".eval_results" / "retro.yaml"
    entries = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert {entry.notes: entry.value for entry in entries} == {
        f"retrieval {name}": round(value, 4) for name, value in evaluation["bits_per_byte"].items()
    }
    assert {(entry.dataset_id, entry.task_id, entry.dataset_revision) for entry in entries} == {
        ("alice/docstrings", "validation_bits_per_byte", "a" * 40)
    }
    # Of other weights, or on a datastore of this machine, nothing is said.
    (tmp_path / "model.safetensors").write_bytes(b"others")
    save_model_card(tmp_path)
    assert not file.exists()
