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
"""The scripts that train, measure and generate, on a whole tiny datastore."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from tiny_models import tiny_llama

from modeling_retro import RetroForCausalLM
from trainers.cli import ACCELERATE_CONFIGS
from trainers.durable_checkpoints import last_complete_checkpoint
from trainers.scripts import evaluate_retro, generate, train_retro


MODEL_CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "cross_attention_layers": [1],
    "neighbor_encoder_num_hidden_layers": 1,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def model_config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(yaml.safe_dump(MODEL_CONFIG))
    return path


def train_options(default_datastore, default_config, output_dir, **options):
    options = {
        "datastore": default_datastore,
        "model_config": default_config,
        "output_dir": output_dir,
        "row_chunks": 4,
        "per_device_train_batch_size": 2,
        "max_steps": 12,
        "learning_rate": 1e-2,
        "neighbor_dropout": 0.3,
        "logging_steps": 4,
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_datastore_dir, model_config):
    output_dir = tmp_path_factory.mktemp("trained")
    options = {"save_steps": 5, "eval_strategy": "steps", "eval_steps": 6}
    train_retro.main(train_options(tiny_datastore_dir, model_config, output_dir, **options))
    return output_dir


def read_history(output_dir):
    return json.loads((output_dir / "trainer_state.json").read_text())["log_history"]


def weights(output_dir):
    return RetroForCausalLM.from_pretrained(output_dir).state_dict()


def assert_same_weights(output_dir, expected_dir):
    found, expected = weights(output_dir), weights(expected_dir)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_training_lowers_the_loss_and_logs_both_bits_per_byte(trained):
    history = read_history(trained)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]
    logged = [entry for entry in history if "loss" in entry]
    assert all(entry["tokens_per_second"] > 0 and 0 <= entry["data_wait_share"] <= 1 for entry in logged)
    evaluated = [entry for entry in history if "eval_on_bits_per_byte" in entry]
    assert [entry["step"] for entry in evaluated] == [6, 12]
    assert evaluated[1]["eval_off_bits_per_byte"] < evaluated[0]["eval_off_bits_per_byte"]


def test_checkpointing_activations_changes_nothing(tiny_datastore_dir, model_config, tmp_path):
    for name, checkpoints in (("without", False), ("with", True)):
        options = {"max_steps": 3, "save_strategy": "no", "activation_checkpointing": checkpoints}
        train_retro.main(train_options(tiny_datastore_dir, model_config, tmp_path / name, **options))
    assert_same_weights(tmp_path / "with", tmp_path / "without")


def test_model_fits_the_datastore(trained, tiny_tokenizer):
    config = RetroForCausalLM.from_pretrained(trained).config
    assert (config.vocab_size, config.chunk_size, config.eos_token_id) == (len(tiny_tokenizer), 8, 0)


@pytest.mark.parametrize("use_muon", [False, True])
def test_run_resumed_from_a_checkpoint_ends_with_the_same_weights(
    trained, tiny_datastore_dir, model_config, tmp_path, use_muon, capsys
):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    options = {"save_steps": 5, "use_muon": use_muon}
    if use_muon:
        train_retro.main(train_options(tiny_datastore_dir, model_config, whole, **options))
    else:
        whole = trained
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-5", resumed / "checkpoint-5")
    # What a process killed while it wrote a later checkpoint leaves behind.
    shutil.copytree(whole / "checkpoint-10", resumed / "checkpoint-10")
    (resumed / "checkpoint-10" / "trainer_state.json").unlink()
    capsys.readouterr()
    train_retro.main(train_options(tiny_datastore_dir, model_config, resumed, **options))
    assert f"resumed from step 5 ({resumed / 'checkpoint-5'})\n" in capsys.readouterr().out
    state = json.loads((resumed / "trainer_state.json").read_text())
    assert state["global_step"] == 12
    assert_same_weights(resumed, whole)


@pytest.mark.parametrize("streams", [False, True], ids=["datastore", "stream"])
def test_killed_run_started_again_ends_with_the_weights_of_a_whole_one(
    tiny_datastore_dir, model_config, tmp_path, streams
):
    options = {"max_steps": 60, "save_steps": 10, "save_total_limit": 2}
    if streams:
        options["train_documents"] = tiny_datastore_dir.parent / "train.jsonl"
    killed = train_options(tiny_datastore_dir, model_config, tmp_path / "killed", **options)
    process = subprocess.Popen([sys.executable, "-m", "trainers.scripts.train_retro", *killed])
    while process.poll() is None and last_complete_checkpoint(tmp_path / "killed") is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    train_retro.main(killed)
    train_retro.main(train_options(tiny_datastore_dir, model_config, tmp_path / "whole", **options))
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")
    history = {name: read_history(tmp_path / name)[-2] for name in ("killed", "whole")}
    assert [history["killed"][name] == history["whole"][name] for name in ("step", "epoch", "loss")] == [True] * 3


def test_frozen_decoder_stays_and_only_what_retro_adds_is_saved(tiny_datastore_dir, tiny_tokenizer, tmp_path):
    tiny_llama(len(tiny_tokenizer), eos_token_id=0).save_pretrained(tmp_path / "base")
    model = RetroForCausalLM.from_decoder_pretrained(tmp_path / "base", chunk_size=8, cross_attention_layers=[1])
    model.save_pretrained(tmp_path / "start")
    words = train_options(tiny_datastore_dir, None, tmp_path / "out", model=tmp_path / "start", max_steps=3)
    del words[words.index("--model_config") : words.index("--model_config") + 2]
    train_retro.main([*words, "--freeze_decoder=true", "--retrofit_only=true", "--save_strategy=no"])
    found, before = weights(tmp_path / "out"), weights(tmp_path / "start")
    changed = {name for name in before if not torch.equal(found[name], before[name])}
    assert changed
    assert all("cross_attn" in name or "neighbor_encoder" in name for name in changed)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_evaluation_writes_the_report(trained, tiny_datastore_dir, tmp_path, capsys):
    options = {"model": trained, "datastore": tiny_datastore_dir, "output_dir": tmp_path, "window_chunks": 4}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    (tmp_path / "domains.txt").write_text("a\nb\na\na\nb\na\n")
    evaluate_retro.main(
        [*words, "--stride_chunks=2", "--overlap", f"--domains={tmp_path / 'domains.txt'}", f"--baseline={trained}"]
        + ["--num_neighbors", "1", "3", "--modes", "off", "on"]
    )
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["num_documents"] == 6
    assert set(report["bits_per_byte"]) == {"off", "on k=1", "on k=3", "baseline"}
    assert report["bits_per_byte"]["baseline"] == report["bits_per_byte"]["off"]
    assert set(report["domains"]) == {"a", "b"}
    assert sum(row["num_chunks"] for row in report["overlap"]) > 0
    assert (report["split"], report["datastore"]["chunk_size"]) == ("validation", 8)
    row = f"| on k=3 | {report['bits_per_byte']['on k=3']:.4f} |"
    assert row in capsys.readouterr().out
    assert row in (trained / "README.md").read_text()


def test_generation_shows_the_neighbors_of_each_whole_chunk(trained, tiny_datastore_dir, capsys):
    options = {
        "model": trained,
        "datastore": tiny_datastore_dir,
        "prompt": "retro looks things up in a",
        "max_new_tokens": 30,
    }
    generate.main([word for name, value in options.items() for word in (f"--{name}", str(value))])
    output = capsys.readouterr().out
    assert output.startswith("retro looks things up in a")
    assert "chunk 0: retro looks" in output
    assert "neighbor 1 of " in output
    assert "neighbor 2 of " in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_config": "no-such.yaml"}, "no-such.yaml"),
        ({"model": "model"}, "either --model"),
        ({"model_config": "chunks.yaml"}, "chunk_size 4 is not"),
        ({"num_neighbors": 9}, "num_neighbors is 9, but only 4"),
    ],
)
def test_wrong_options_are_refused_by_name(tiny_datastore_dir, model_config, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chunks.yaml").write_text(yaml.safe_dump({**MODEL_CONFIG, "chunk_size": 4}))
    with pytest.raises((ValueError, OSError), match=message):
        train_retro.main(train_options(tiny_datastore_dir, model_config, tmp_path, **options))


@pytest.fixture(scope="module")
def joint_options():
    # A large epsilon: Adam would blow up the rounding of gradients near zero.
    cadence = {"logging_steps": 1, "max_steps": 6, "save_steps": 3, "eval_strategy": "steps", "eval_steps": 6}
    return {"adam_epsilon": 1e-3, **cadence}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, tiny_datastore_dir, model_config, joint_options):
    output_dir = tmp_path_factory.mktemp("one")
    train_retro.main(train_options(tiny_datastore_dir, model_config, output_dir, **joint_options))
    return output_dir


# accelerate knows tensor parallel on devices other than CPUs only; nothing but this check stands against it.
TRAIN_ON_CPUS = """
from accelerate import ParallelismConfig
from trainers.scripts import train_retro

ParallelismConfig._validate_accelerator = lambda self, accelerator: None
train_retro.main()
"""


@pytest.mark.parametrize(
    ("config", "rows", "options"),
    [
        ("ddp", 1, {}),
        ("fsdp2", 1, {"fsdp_size": 2, "save_only_model": True}),
        ("ddp", 2, {"tp_size": 2, "save_only_model": True}),
    ],
    ids=["data_parallel", "fsdp2", "tensor_parallel"],
)
def test_two_processes_end_with_the_weights_of_one_with_the_joint_batch(
    one_process, tiny_datastore_dir, model_config, joint_options, tmp_path, config, rows, options
):
    """With the shipped configs. On CPUs accelerate's FSDP is plain data parallel; that of transformers is not."""
    output_dir, script = tmp_path / "two", tmp_path / "train.py"
    script.write_text(TRAIN_ON_CPUS)
    launch = [
        "accelerate.commands.launch",
        "--config_file",
        ACCELERATE_CONFIGS / f"{config}.yaml",
        "--num_processes",
        "2",
    ]
    launch += ["--main_process_port", "0"]
    words = train_options(
        tiny_datastore_dir, model_config, output_dir, per_device_train_batch_size=rows, **joint_options, **options
    )
    subprocess.run([sys.executable, "-m", *launch, script, *words], check=True, timeout=300)
    for one, two in zip(read_history(one_process), read_history(output_dir), strict=True):
        names = [name for name in one if name.endswith(("loss", "bits_per_byte"))]
        assert names
        assert [two[name] for name in names] == pytest.approx([one[name] for name in names], rel=1e-4)
        assert one["epoch"] == two["epoch"]  # two processes of one row pass over the data as one of two rows
    found, expected = weights(output_dir), weights(one_process)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_shares_of_a_model_want_as_many_processes(tiny_datastore_dir, model_config, tmp_path):
    with pytest.raises(ValueError, match="--fsdp_size 2 and --tp_size 2 are for 4 processes, but there are 1"):
        train_retro.main(train_options(tiny_datastore_dir, model_config, tmp_path, fsdp_size=2, tp_size=2))
