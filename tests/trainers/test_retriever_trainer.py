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
import copy
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from tiny_retriever import make_encoder, make_pairs, make_tokenizer
from transformers import AutoModel, T5Config, T5EncoderModel, TrainerCallback

from data_prep.pairs.pairs import PairMixture
from modeling_retro.encoder.chunk_encoder import ChunkEncoder
from trainers.retriever.config import RetrieverTrainingArguments
from trainers.retriever.losses import MultipleNegativesRankingLoss
from trainers.retriever.trainer import RetrieverTrainer, SiameseDataCollator


def make_trainer(output_dir, encoder=None, pairs=None, callbacks=None, eval_dataset=None, **options):
    defaults = {
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    return RetrieverTrainer(
        model=encoder or make_encoder(),
        args=RetrieverTrainingArguments(output_dir=str(output_dir), **(defaults | options)),
        processing_class=make_tokenizer(),
        train_dataset=pairs or make_pairs(64),
        eval_dataset=eval_dataset,
        callbacks=callbacks,
    )


def parameters_of(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


class FirstGradient(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.gradient = {
                name: parameter.grad.clone()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }


@pytest.mark.parametrize("mini_batch_size", [None, 5])
def test_accumulated_gradient_is_the_mean_of_the_batches(tmp_path, mini_batch_size):
    callback = FirstGradient()
    trainer = make_trainer(
        tmp_path,
        callbacks=[callback],
        gradient_accumulation_steps=4,
        max_steps=1,
        max_grad_norm=0.0,
        mini_batch_size=mini_batch_size,
    )
    encoder = copy.deepcopy(trainer.model)
    batches = list(trainer.get_train_dataloader())[:4]
    trainer.train()

    losses = []
    for batch in batches:
        states = encoder(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        mask = batch["attention_mask"][..., None]
        embeddings = (states * mask).sum(1) / mask.sum(1)
        losses.append(MultipleNegativesRankingLoss()(embeddings.unflatten(0, (2, 8)), batch["text_ids"]))
        (losses[-1] / 4).backward()
    expected = {name: parameter.grad for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    assert callback.gradient.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(callback.gradient[name], gradient, rtol=1e-4, atol=1e-6)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(sum(losses).item() / 4, abs=1e-4)


def notebook_rows(pairs):
    """The features of a notebook, in which every third row is labelled as no pair."""
    tokenizer = make_tokenizer()
    rows = []
    for number, pair in enumerate(pairs):
        sides = {"q1": tokenizer(pair["anchor"]), "q2": tokenizer(pair["positive"])}
        row = {
            f"{key}_{side}": tokens[key] for side, tokens in sides.items() for key in ("input_ids", "attention_mask")
        }
        rows.append(row | {"labels": 1})
        if number % 2:
            rows.append(row | {"labels": 0})
    return Dataset.from_list(rows)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("mini_batch_size", [None, 5])
def test_features_of_a_notebook_train_like_the_texts_of_their_pairs(tmp_path, separate, mini_batch_size):
    pairs, options = make_pairs(48), {"mini_batch_size": mini_batch_size, "eval_strategy": "steps", "eval_steps": 4}
    expected = make_trainer(tmp_path / "texts", pairs=pairs, eval_dataset=make_pairs(24, seed=1), **options)
    rows, held_out = notebook_rows(pairs), notebook_rows(make_pairs(24, seed=1))
    trainer = make_trainer(tmp_path / "notebook", pairs=rows, eval_dataset=held_out, **options)
    trainer.data_collator.separate = separate
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (48, 24)
    for each in (expected, trainer):
        each.train()
    torch.testing.assert_close(parameters_of(trainer), parameters_of(expected), rtol=0, atol=1e-6)
    for name in ("eval_loss", "eval_recall@1", "eval_mrr@10"):
        found = [log[name] for log in trainer.state.log_history if name in log]
        assert found == pytest.approx([log[name] for log in expected.state.log_history if name in log], abs=1e-6)
        assert len(found) == 1


def test_labels_of_texts_are_not_trained_as_pairs(tmp_path):
    pairs = make_pairs(32)
    trainer = make_trainer(tmp_path, pairs=pairs.add_column("label", [int(row < 20) for row in range(32)]))
    assert trainer.train_dataset["anchor"][:] == pairs["anchor"][:20]
    with pytest.raises(ValueError, match="the dataset holds no pair: of its records, 32 labelled as no pair"):
        make_trainer(tmp_path, pairs=pairs.add_column("label", [0] * 32))


def test_texts_of_very_different_length_have_the_loss_of_one_pass(tmp_path):
    generator = np.random.default_rng(0)
    texts = [" ".join(f"w{word}" for word in generator.integers(60, size=size)) for size in [1, 2, 3, 31] * 64]
    trainer = make_trainer(tmp_path)
    batch = trainer.data_collator(
        [{"anchor": a, "positive": b} for a, b in zip(texts[:128], texts[128:], strict=True)]
    )
    sizes = []
    hook = trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, batch)
    hook.remove()
    assert sizes == [(64, 1), (64, 2), (64, 3), (64, 31)]
    states = trainer.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"][..., None]
    embeddings = ((states * mask).sum(1) / mask.sum(1)).unflatten(0, (2, 128))
    torch.testing.assert_close(loss, trainer.loss(embeddings, batch["text_ids"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mini_batch_size", [None, 5])
def test_resumed_training_equals_uninterrupted_training_to_the_bit(tmp_path, mini_batch_size):
    sets = {"pairs": make_pairs(40), "triplets": make_pairs(32, seed=1, negatives=1)}  # 9 steps an epoch
    options = {
        "pairs": PairMixture(sets, {"pairs": 1.0, "triplets": 1.0}),
        "max_steps": 14,
        "save_strategy": "steps",
        "save_steps": 11,
        "mini_batch_size": mini_batch_size,
    }
    whole = make_trainer(tmp_path / "whole", make_encoder(dropout=0.1), **options)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", make_encoder(dropout=0.1), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-11"))
    assert torch.equal(parameters_of(resumed), parameters_of(whole))
    losses = [
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (whole, resumed)
    ]
    assert losses[0] == losses[1]


def test_training_improves_retrieval_of_held_out_pairs(tmp_path):
    trainer = make_trainer(
        tmp_path, pairs=make_pairs(800), eval_dataset=make_pairs(65, seed=9), max_steps=100, symmetric=True
    )
    before, _ = trainer.evaluate(), trainer.train()
    after = trainer.evaluate()  # 65 pairs: the last batch holds a single one
    assert after["eval_recall@1"] > before["eval_recall@1"] + 0.2
    assert after["eval_mrr@10"] > before["eval_mrr@10"]
    assert after["eval_loss"] < before["eval_loss"]


def test_metrics_count_equal_texts_once(tmp_path):
    pairs = Dataset.from_dict({"anchor": ["w1", "w1", "w2"], "positive": ["w1", "w1", "w2"]})
    metrics = make_trainer(tmp_path, eval_dataset=pairs).evaluate()
    assert metrics["eval_recall@1"] == metrics["eval_mrr@10"] == metrics["eval_ndcg@10"] == 1.0


def test_streamed_pairs_train(tmp_path):
    trainer = make_trainer(tmp_path, pairs=make_pairs(64).to_iterable_dataset(num_shards=2), max_steps=3)
    trainer.train()
    assert [entry["loss"] > 0 for entry in trainer.state.log_history if "loss" in entry] == [True] * 3


TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11", " ".join(f"w{i}" for i in range(40))]


@pytest.mark.parametrize(("pooling", "similarity"), [("mean", "cosine"), ("cls", "dot")])
def test_saved_encoder_loads_everywhere_with_the_same_embeddings(tmp_path, pooling, similarity):
    trainer = make_trainer(tmp_path, max_steps=2, pooling=pooling, similarity=similarity)
    trainer.train()
    trainer.save_model()
    batch = make_tokenizer()(TEXTS, padding=True, truncation=True, max_length=32, return_tensors="pt")
    trainer.model.eval()
    with torch.no_grad():
        states = trainer.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"][..., None]
    expected = states[:, 0] if pooling == "cls" else (states * mask).sum(1) / mask.sum(1)
    if similarity == "cosine":
        expected = expected / expected.norm(dim=1, keepdim=True)

    encoded = SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(encoded, expected, rtol=0, atol=1e-6)
    encoded = torch.from_numpy(ChunkEncoder.from_pretrained(tmp_path, device="cpu").encode(TEXTS))
    torch.testing.assert_close(encoded, expected, rtol=0, atol=1e-6)
    with torch.no_grad():
        loaded = AutoModel.from_pretrained(tmp_path)(**batch).last_hidden_state
    torch.testing.assert_close(loaded, states, rtol=0, atol=1e-6)


def test_t5_encoder_trains_and_loads(tmp_path):
    config = T5Config(vocab_size=len(make_tokenizer()), d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2)
    trainer = make_trainer(tmp_path, T5EncoderModel(config), max_steps=2)
    trainer.train()
    trainer.save_model()
    from_sentence_transformers = SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS)
    from_chunk_encoder = ChunkEncoder.from_pretrained(tmp_path, device="cpu").encode(TEXTS)
    np.testing.assert_allclose(from_sentence_transformers, from_chunk_encoder, rtol=0, atol=1e-6)


def test_model_card_says_how_to_load_and_how_it_retrieves(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=make_pairs(20, seed=9), eval_strategy="steps", eval_steps=2)
    trainer.train()
    trainer.create_model_card(model_name="my-encoder")
    card = (tmp_path / "README.md").read_text()
    assert "library_name: sentence-transformers" in card
    assert 'SentenceTransformer("my-encoder")' in card
    value = [entry["eval_recall@10"] for entry in trainer.state.log_history if "eval_recall@10" in entry][-1]
    assert f"{value:.3f} |\n" in card.split("| recall@10 |")[1]


TWO_PROCESSES = """
import json, sys, torch
sys.path.insert(0, {tests!r})
from test_retriever_trainer import make_trainer, parameters_of
from tiny_retriever import make_pairs
results = {{}}
for name, options in json.loads(sys.argv[2]).items():
    evaluation = make_pairs(13, seed=5)
    trainer = make_trainer(sys.argv[1] + name, pairs=make_pairs(64), eval_dataset=evaluation, **options)
    trainer.train()
    metrics = trainer.evaluate()
    results[name] = (trainer.args.world_size, parameters_of(trainer), metrics["eval_mrr@10"])
if trainer.is_world_process_zero():
    torch.save(results, sys.argv[1] + "results.pt")
"""


def test_two_processes_with_gathered_negatives_equal_one_with_the_joint_batch(tmp_path):
    variants = {"plain": {"symmetric": True}, "cached": {"mini_batch_size": 3}, "accumulated": {"mini_batch_size": 6}}
    variants["accumulated"]["gradient_accumulation_steps"] = 2
    common = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "warmup_steps": 0}
    options = {name: common | variant | {"per_device_train_batch_size": 4} for name, variant in variants.items()}
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES.format(tests=os.path.dirname(__file__)))
    command = [
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        script,
        f"{tmp_path}/",
        json.dumps(options),
    ]
    subprocess.run([sys.executable, "-m", *map(str, command)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    for name, variant in variants.items():
        world_size, parameters, mrr = results[name]
        assert world_size == 2
        one = make_trainer(
            tmp_path / "one",
            eval_dataset=make_pairs(13, seed=5),
            **common,
            **variant,
            per_device_train_batch_size=8,
        )
        start = parameters_of(one)
        one.train()
        torch.testing.assert_close(parameters, parameters_of(one), rtol=0, atol=1e-6)
        assert (parameters - start).abs().max() > 1e-3
        assert one.evaluate()["eval_mrr@10"] == pytest.approx(mrr, abs=1e-6)


def test_column_that_must_stay_is_not_removed(tmp_path):
    with pytest.raises(ValueError, match="remove_unused_columns must be False"):
        RetrieverTrainingArguments(output_dir=str(tmp_path), remove_unused_columns=True)


def test_longest_input_is_what_tokenizer_and_encoder_take(tmp_path):
    assert make_trainer(tmp_path).data_collator.max_length == 32
    assert make_trainer(tmp_path, max_length=7).data_collator.max_length == 7
    assert isinstance(make_trainer(tmp_path).data_collator, SiameseDataCollator)
