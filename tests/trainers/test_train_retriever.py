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
import json

import pytest
from datasets import load_from_disk
from loopback_hub import loopback_hub
from sentence_transformers import SentenceTransformer
from tiny_retriever import make_encoder, make_pairs, make_tokenizer

from trainers.scripts.train_retriever import main


@pytest.fixture
def folder(tmp_path):
    """An encoder, a config, two pair sets with hard negatives in one of them, a list of weights."""
    make_encoder().save_pretrained(tmp_path / "start")
    make_tokenizer().save_pretrained(tmp_path / "start")
    config = make_encoder().config.to_dict()
    (tmp_path / "config.json").write_text(
        json.dumps({name: config[name] for name in ("model_type", "vocab_size", "hidden_size", "num_attention_heads")})
    )
    make_pairs(64).to_json(tmp_path / "pairs.jsonl")
    make_pairs(48, seed=1, negatives=1).save_to_disk(tmp_path / "triplets")
    (tmp_path / "recipe.tsv").write_text(
        "name\tpairs\tweight\tpath\npairs\t64\t0.5\ta/b/pairs.jsonl.gz\ntriplets\t48\t0.5\ta/b/triplets.jsonl.gz\n"
    )
    return tmp_path


def run(folder, *options, output="encoder"):
    sets = [str(folder / "pairs.jsonl"), str(folder / "triplets")]
    main(
        ["--output_dir", str(folder / output), "--pairs", *sets, "--use_cpu", "true", "--disable_tqdm", "true"]
        + ["--per_device_train_batch_size", "8", *options]
    )


def test_command_trains_on_a_mixture_and_writes_an_encoder_with_its_card(folder):
    evaluation = ["--eval_pairs", str(folder / "pairs.jsonl"), "--eval_on_start", "true", "--eval_strategy", "epoch"]
    recipe = ["--recipe", str(folder / "recipe.tsv"), "--num_train_epochs", "1", "--learning_rate", "0.01"]
    run(folder, "--model_name_or_path", str(folder / "start"), *recipe, *evaluation)
    assert SentenceTransformer(str(folder / "encoder"), device="cpu").encode(["w1 w2"]).shape == (1, 16)
    state = json.loads((folder / "encoder" / "trainer_state.json").read_text())
    assert state["global_step"] == (64 + 48) // 8
    measured = [f"{entry['eval_mrr@10']:.3f}" for entry in state["log_history"] if "eval_mrr@10" in entry]
    assert measured[0] != measured[-1]
    card = (folder / "encoder" / "README.md").read_text()
    assert "| metric | before training | step 14 |" in card
    assert f"| mrr@10 | {measured[0]} | {measured[-1]} |" in card


def test_same_command_again_goes_on_from_the_last_checkpoint(folder):
    options = ["--model_name_or_path", str(folder / "start"), "--save_steps", "2", "--seed", "3"]
    run(folder, *options, "--max_steps", "4", output="whole")
    run(folder, *options, "--max_steps", "4", output="interrupted")
    last = folder / "interrupted" / "checkpoint-4"
    (last / "trainer_state.json").unlink()  # what a killed process leaves
    (folder / "interrupted" / "model.safetensors").unlink()
    run(folder, *options, "--max_steps", "4", output="interrupted")
    assert (folder / "interrupted" / "model.safetensors").read_bytes() == (
        folder / "whole" / "model.safetensors"
    ).read_bytes()


def test_encoder_from_scratch_needs_a_config_and_a_tokenizer(folder):
    config = ["--model_config", str(folder / "config.json")]
    tokenizer = ["--tokenizer_name_or_path", str(folder / "start")]
    run(folder, *config, *tokenizer, "--max_steps", "1")
    assert (folder / "encoder" / "modules.json").exists()
    with pytest.raises(ValueError, match="--model_config needs --tokenizer_name_or_path"):
        run(folder, *config)
    with pytest.raises(ValueError, match="give either --model_name_or_path"):
        run(folder, *config, *tokenizer, "--model_name_or_path", str(folder / "start"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "1"], "--weights has 1 numbers for 2 pair sets"),
        (["--streaming", "true", "--max_steps", "1"], "--streaming takes one pair set"),
        (["--recipe", "recipe.tsv", "--weights", "1", "2"], "give --weights or --recipe, not both"),
        (["--per_device_train_batch_size", "1"], "single pair"),
        (["--per_device_train_batch_size", "60"], "too few without a common text for one step of 60"),
    ],
)
def test_impossible_requests_are_refused(folder, monkeypatch, options, message):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=message):
        run(folder, "--model_name_or_path", str(folder / "start"), *options)


def test_triplets_fixture_has_hard_negatives(folder):
    assert load_from_disk(folder / "triplets").column_names == ["anchor", "positive", "negative_1"]


PUSH = """
import sys
from trainers.scripts.train_retriever import main
main(["--model_name_or_path", sys.argv[1], "--pairs", sys.argv[2], "--output_dir", sys.argv[3], "--max_steps", "1",
      "--push_to_hub", "true", "--hub_model_id", "alice/encoder", "--use_cpu", "true"])
"""


def test_pushed_encoder_has_all_that_sentence_transformers_reads(folder):
    with loopback_hub() as hub:
        arguments = [str(folder / name) for name in ("start", "pairs.jsonl", "encoder")]
        hub.run(PUSH, *arguments, home=folder / "alice", token=hub.token)
        files = hub.repos["models", "alice/encoder"].files()
    assert {"model.safetensors", "config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json"} <= set(
        files
    )
    card = files["README.md"].data.decode()
    assert 'SentenceTransformer("alice/encoder")' in card
    for name, file in files.items():
        if (folder / "encoder" / name).exists():
            assert (folder / "encoder" / name).read_bytes() == file.data
