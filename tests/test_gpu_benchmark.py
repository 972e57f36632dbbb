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
"""Every part of `benchmarks/gpu.py` at toy size, on the CPU."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_texts, write_jsonl
from transformers import AutoModelForCausalLM

from modeling_retro import RetroForCausalLM
from trainers import quickstart


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the script itself can be run")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    yield gpu
    for name in [name for name in sys.modules if name == "gpu" or name.startswith("gpu_")]:
        del sys.modules[name]


def run(gpu, output_dir, *parts, **options):
    options = {"output_dir": output_dir, "size": "toy", **options}
    gpu.main(["--parts", *parts, *(f"--{name}={value}" for name, value in options.items())])


def table(capsys, part):
    """The cells of the table of a part, a list for each row, and its heading."""
    printed = capsys.readouterr().out
    heading, _, rest = printed.partition(f"## {part} (")[2].partition("\n")
    lines = [line for line in rest.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]], heading


def test_equalities_say_which_tests_wait_for_a_gpu(gpu, tmp_path, capsys):
    run(gpu, tmp_path, "equalities")
    rows, _ = table(capsys, "equalities")
    assert len(rows) > 10 and {row["result"] for row in rows} == {"skipped"}
    assert all("CUDA" in row["reason"] for row in rows)


def test_training_prints_speed_and_ratios_and_is_not_repeated(gpu, tmp_path, capsys, tiny_datastore_dir):
    run(gpu, tmp_path, "training", datastore=tiny_datastore_dir)
    rows, heading = table(capsys, "training")
    assert heading.startswith("CPU") and "TFLOP/s measured" in rows[0]["model"]
    assert [row["mode"] for row in rows[1:]] == ["OFF", "ON", "ON / OFF"] * 2
    for off, on, ratio in (rows[1:4], rows[4:7]):
        operations = [float(row["GFLOP a token"]) for row in (off, on)]
        # More operations with neighbors, as many as the ratio says, and each mode has its speed.
        assert 1 < operations[1] / operations[0] == pytest.approx(float(ratio["operations"]), rel=0.02)
        assert float(off["tokens/s"]) > 0 and float(on["tokens/s"]) > 0
        quotient = float(ratio["time"]) / float(ratio["operations"])
        assert float(ratio["time / operations (goal ≤ 1.2)"]) == pytest.approx(quotient, abs=0.05)
    before = json.loads((tmp_path / "training.json").read_text())
    run(gpu, tmp_path, "training", datastore=tmp_path / "gone")
    assert table(capsys, "training") == (rows, heading)
    assert json.loads((tmp_path / "training.json").read_text()) == before
    with pytest.raises(ValueError, match="neither a folder"):
        run(gpu, tmp_path, "training", datastore=tmp_path / "gone", again=True)


def test_generation_compares_both_models_with_the_base_at_each_batch_size(gpu, tmp_path, capsys, tiny_datastore_dir):
    run(gpu, tmp_path, "generation", datastore=tiny_datastore_dir)
    rows, _ = table(capsys, "generation")
    models = ["base, plain transformers"] + [
        f"{kind} attention, {m}" for kind in ("joint", "cross") for m in ("OFF", "ON")
    ]
    assert [(row["batch"], row["model"]) for row in rows] == [(size, model) for size in "12" for model in models]
    assert all(float(row["tokens/s"]) > 0 for row in rows)
    assert [row["time / base"] for row in rows[::5]] == ["1.00", "1.00"]


def test_embedding_and_a_datastore_of_own_documents(gpu, tmp_path, capsys, monkeypatch, tiny_encoder_dir):
    monkeypatch.setattr(quickstart, "find_encoder", lambda: tiny_encoder_dir)
    documents = write_jsonl(tmp_path / "documents.jsonl", make_texts(60, seed=7, max_words=200))
    run(gpu, tmp_path / "run", "embedding", data=documents)
    rows, _ = table(capsys, "embedding")
    assert [row["encoder in bfloat16"] for row in rows] == ["sentence-transformers", "ChunkEncoder"]
    assert all(float(row["chunks/s"]) > 0 for row in rows)


def test_quality_goes_on_from_its_checkpoints_and_keeps_the_weights(gpu, tmp_path, capsys, tiny_datastore_dir):
    options = {"datastore": tiny_datastore_dir}
    run(gpu, tmp_path, "quality", minutes=0, **options)
    rows, heading = table(capsys, "quality")
    assert "not done" in heading and [(row["run"], row["step"], row["of"]) for row in rows] == [("reader", "1", "8")]
    run(gpu, tmp_path, "quality", minutes=0, **options)
    rows, _ = table(capsys, "quality")
    assert [(row["run"], row["step"]) for row in rows] == [("reader", "2")]

    run(gpu, tmp_path, "quality", **options)
    rows, heading = table(capsys, "quality")
    assert ", done)" in heading
    assert [(row["run"], row["step"]) for row in rows[:3]] == [("reader", "8"), ("retro", "8"), ("decoder", "8")]
    retro, decoder = (float(row["parameters"].split()[0]) for row in rows[1:3])
    assert decoder > retro
    bits = {(row["run"], row["mode"]): float(row["bits per byte"]) for row in rows if row["bits per byte"]}
    assert {mode for run, mode in bits if run == "reader_evaluation"} == {"off", "random", "on", "in_front"}
    assert {"off", "random", "on", "decoder"} <= {mode for run, mode in bits if run == "evaluation"}
    overlap = [row for row in rows if row["run"].startswith("overlap")]
    assert len(overlap) > 3 and sum(int(row["chunks"]) for row in overlap) > 0 and "decoder" in overlap[0]
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "retro"), RetroForCausalLM)
    assert (tmp_path / "reader_evaluation" / "evaluation.json").exists()
    with pytest.raises(ValueError, match="size 'toy', not 'full'"):
        run(gpu, tmp_path, "quality", size="full")


def test_unknown_parts_are_refused_by_name(gpu, tmp_path):
    with pytest.raises(ValueError, match="unknown parts speed; expected some of equalities, training"):
        run(gpu, tmp_path, "speed")
