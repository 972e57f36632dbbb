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
"""What `retro train --report_to` leaves in the files of a tracker."""

import json

import pytest
import yaml

from modeling_retro import RetroConfig
from trainers.scripts import train_retro


STEPS = 4


def train(datastore, folder, tracker, **options):
    """Trains for four steps, with a log of each second step and one evaluation, and reports to the tracker."""
    config = folder / "small.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "cross_attention_layers": [1],
            }
        )
    )
    options = {
        "datastore": datastore,
        "model_config": config,
        "output_dir": folder / "model",
        "report_to": tracker,
        "row_chunks": 4,
        "max_steps": STEPS,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": STEPS,
        "eval_max_documents": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    train_retro.main([word for name, value in options.items() for word in (f"--{name}", str(value))])


def expected_numbers(folder):
    """The numbers that a tracker must hold by step: those that the trainer logged, under the names of trackers."""
    history = json.loads((folder / "model" / "trainer_state.json").read_text())["log_history"]
    expected = {}
    for entry in history:
        for name, value in entry.items():
            if name not in ("step", "train_runtime"):
                name = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
                expected[name, entry["step"]] = value
    assert {step for name, step in expected if name == "train/loss"} == {2, 4}
    for name in ("tokens_per_second", "data_wait_share", "learning_rate", "grad_norm"):
        assert (f"train/{name}", STEPS) in expected
    for mode in ("off", "random", "on"):
        assert {(f"eval/{mode}_bits_per_byte", STEPS), (f"eval/{mode}_perplexity", STEPS)} <= expected.keys()
    return expected


def test_tensorboard_holds_the_numbers_and_the_configuration(tiny_datastore_dir, tmp_path, monkeypatch):
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the package tensorboard"
    )
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    train(tiny_datastore_dir, tmp_path, "tensorboard")
    (run,) = (tmp_path / "model" / "runs").iterdir()
    accumulator = events.EventAccumulator(str(run)).Reload()
    tags = accumulator.Tags()
    found = {(name, event.step): event.value for name in tags["scalars"] for event in accumulator.Scalars(name)}
    expected = expected_numbers(tmp_path)
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    texts = {name: accumulator.Tensors(name)[0].tensor_proto.string_val[0] for name in tags["tensors"]}
    assert json.loads(texts["model_config/text_summary"])["model_type"] == RetroConfig.model_type
    assert json.loads(texts["args/text_summary"])["row_chunks"] == 4


def test_trackio_holds_the_numbers_and_the_configuration_without_a_network(tiny_datastore_dir, tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio", reason="needs the package trackio")
    for module in (trackio.utils, trackio.sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    train(tiny_datastore_dir, tmp_path, "trackio", project="tiny", run_name="first")
    (run,) = trackio.Api().runs("tiny")
    assert run.name == "first"
    logs = trackio.sqlite_storage.SQLiteStorage.get_logs("tiny", run.name, run_id=run.id)
    found = {(name, entry["train/global_step"]): value for entry in logs for name, value in entry.items()}
    # Trackio keeps no totals of the run.
    totals = ["train_loss", "train_samples_per_second", "train_steps_per_second", "total_flos"]
    expected = {key: value for key, value in expected_numbers(tmp_path).items() if key[0][6:] not in totals}
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    assert (run.config["model_type"], run.config["row_chunks"]) == (RetroConfig.model_type, 4)
    assert run.config["model/num_parameters"] > 0
