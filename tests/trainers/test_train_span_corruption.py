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
"""The script that trains on corrupted spans, from the command line to the encoder that it leaves."""

import json
import math

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, ByT5Tokenizer, EvalPrediction, T5EncoderModel

from modeling_retro.encoder.chunk_encoder import ChunkEncoder, load_text_encoder
from trainers.retriever.config import RetrieverTrainingArguments
from trainers.retriever.trainer import RetrieverTrainer
from trainers.scripts.train_span_corruption import main
from trainers.span_corruption import DataCollatorForSpanCorruption, span_metrics


TINY = "d_model=16,d_kv=8,d_ff=16,num_layers=1,num_decoder_layers=1,num_heads=2"


@pytest.fixture
def tasks(tmp_path):
    source = tmp_path / "texts.jsonl"
    lines = [f"row {i} says that {i} and {i + 1} are numbers, and that {i % 7} is one too" for i in range(60)]
    source.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    path = tmp_path / "tasks.yaml"
    content = {
        "features": {"input_length": 32},
        "tasks": {"numbers": {"source": str(source)}, "held_out": {"source": str(source), "limit": 10}},
        "train": {"numbers": 1.0},
        "evaluation": ["held_out"],
    }
    path.write_text(yaml.safe_dump(content))
    return path


def train(tasks, output_dir, *options):
    base = ["--tasks", str(tasks), "--output_dir", str(output_dir), "--model_config", TINY, "--use_cpu", "true"]
    main([*base, "--per_device_train_batch_size", "4", "--learning_rate", "1e-2", "--disable_tqdm", "true", *options])


def test_a_run_that_stops_and_goes_on_equals_one_that_does_not(tasks, tmp_path):
    # 24 steps pass the end of the texts; 20 rows of the shuffle buffer are in flight at the stop.
    options = [
        "--optim",
        "adafactor",
        "--save_steps",
        "12",
        "--shuffle_buffer",
        "20",
        "--lr_scheduler_type",
        "constant",
    ]
    train(tasks, tmp_path / "whole", "--max_steps", "24", *options)
    train(tasks, tmp_path / "halves", "--max_steps", "12", *options)
    train(tasks, tmp_path / "halves", "--max_steps", "24", *options)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    halves = load_file(tmp_path / "halves" / "model.safetensors")
    assert whole.keys() == halves.keys()
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_a_run_learns_reports_and_leaves_an_encoder(tasks, tmp_path):
    train(tasks, tmp_path / "model", "--max_steps", "40", "--optim", "adamw_torch", "--save_strategy", "no")
    metrics = json.loads((tmp_path / "model" / "eval_results.json").read_text())
    assert metrics["eval_held_out_loss"] < math.log(384) - 1
    assert 0 <= metrics["eval_held_out_span_accuracy"] <= 1
    assert 0 < metrics["eval_held_out_unigram_entropy"] < math.log(384)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model" / "encoder")
    encoder = T5EncoderModel.from_pretrained(tmp_path / "model" / "encoder")
    whole = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    inputs = tokenizer("numbers", return_tensors="pt")
    torch.testing.assert_close(encoder(**inputs).last_hidden_state, whole.encoder(**inputs).last_hidden_state)

    # MNR training starts from it, and its result is one more encoder of chunks.
    trainer = RetrieverTrainer(
        model=load_text_encoder(str(tmp_path / "model" / "encoder")),
        args=RetrieverTrainingArguments(
            output_dir=str(tmp_path / "retriever"), max_steps=2, per_device_train_batch_size=4, use_cpu=True
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"anchor": list("abcdefgh"), "positive": [f"{c} {c}" for c in "abcdefgh"]}),
    )
    trainer.train()
    trainer.save_model()
    embeddings = ChunkEncoder.from_pretrained(tmp_path / "retriever", device="cpu").encode(["numbers", "one too"])
    assert embeddings.shape == (2, 16)
    hidden = trainer.model.eval()(**inputs).last_hidden_state[0].mean(dim=0)
    torch.testing.assert_close(torch.from_numpy(embeddings[0]), torch.nn.functional.normalize(hidden, dim=0))
    assert not torch.allclose(trainer.model.shared.weight, encoder.shared.weight)

    # A second run goes on from the checkpoint's weights.
    main(
        [
            "--tasks",
            str(tasks),
            "--model_name_or_path",
            str(tmp_path / "model"),
            "--max_steps",
            "1",
            "--use_cpu",
            "true",
        ]
        + ["--output_dir", str(tmp_path / "more"), "--learning_rate", "0", "--disable_tqdm", "true"]
    )
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "more"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_span_accuracy_counts_noise_tokens_and_entropy_all_labels():
    collator = DataCollatorForSpanCorruption(ByT5Tokenizer())
    # sentinel 383, two noise bytes, EOS | sentinel, one noise byte, EOS, padding
    labels = np.array([[383, 70, 71, 1], [383, 70, 1, -100]])
    predictions = np.array([[5, 70, 70, 1], [383, 70, 1, 9]])
    metrics = span_metrics(collator)(EvalPrediction(predictions=predictions, label_ids=labels))
    assert metrics["span_accuracy"] == pytest.approx(2 / 3)
    # Seven labels: 383, 70 and EOS twice each, 71 once.
    assert metrics["unigram_entropy"] == pytest.approx(3 * 2 / 7 * math.log(7 / 2) + 1 / 7 * math.log(7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--max_steps is -1"),
        (["--max_steps", "1", "--model_name_or_path", "x"], "describe a new model"),
    ],
)
def test_contradicting_options_are_refused(tasks, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(tasks, tmp_path / "model", *options)


def test_endless_evaluation_and_unknown_features_are_refused(tasks, tmp_path):
    content = yaml.safe_load(tasks.read_text())
    content["tasks"]["held_out"]["repeat"] = True
    tasks.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="evaluation on held_out would never end"):
        train(tasks, tmp_path / "model", "--max_steps", "1")
    content["tasks"]["held_out"]["repeat"] = False
    content["features"]["density"] = 0.1
    tasks.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="tasks.yaml: features.*density"):
        train(tasks, tmp_path / "model", "--max_steps", "1")
