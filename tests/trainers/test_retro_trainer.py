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
"""Rows, batches and training of the RETRO language model."""

import json

import numpy as np
import pytest
import torch
from array_datastore import ArrayDatastore, random_datastore
from tiny_models import tiny_llama
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from modeling_retro import RetroConfig, RetroForCausalLM, RetroJointForCausalLM
from trainers.durable_checkpoints import last_complete_checkpoint
from trainers.language_model.collator import ChunkRows, DataCollatorForRetro, EpochRowSampler
from trainers.language_model.config import RetroTrainingArguments
from trainers.language_model.trainer import RetroTrainer


# Chunks of two tokens: chunks 0 and 1 are the first document (three tokens), 2 the second (one), 3 and 4 the third.
SMALL_DOCUMENTS = [[11, 12, 13], [21], [31, 32, 33, 34]]
SMALL_NEIGHBORS = [[3, 2], [4, -1], [0, 3], [-1, -1], [1, 2]]


@pytest.fixture
def small_datastore():
    return ArrayDatastore(SMALL_DOCUMENTS, chunk_size=2, neighbor_ids=SMALL_NEIGHBORS)


def collate(datastore, row_chunks, epoch=0, rows=None, **kwargs):
    chunk_rows = ChunkRows(len(datastore.chunks), row_chunks)
    rows = range(len(chunk_rows)) if rows is None else rows
    collator = DataCollatorForRetro(datastore, row_chunks=row_chunks, **kwargs)
    return collator([chunk_rows[epoch * len(chunk_rows) + row] for row in rows])


def test_batch_worked_by_hand(small_datastore):
    batch = collate(small_datastore, row_chunks=3, num_neighbors=2)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[11, 12, 13, 0, 21, 0], [31, 32, 33, 34, 0, 0]],
        "position_ids": [[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 0, 1]],
        "labels": [[-100, 12, 13, -100, -100, -100], [-100, 32, 33, 34, -100, -100]],
        "neighbor_input_ids": [
            [[[31, 32, 33, 34], [21, 0, 0, 0]], [[33, 34, 0, 0], [0, 0, 0, 0]], [[11, 12, 13, 0], [31, 32, 33, 34]]],
            [[[0, 0, 0, 0], [0, 0, 0, 0]], [[13, 0, 0, 0], [21, 0, 0, 0]], [[0, 0, 0, 0], [0, 0, 0, 0]]],
        ],
        "neighbor_attention_mask": [
            [
                [[True] * 4, [True, False, False, False]],
                [[True, True, False, False], [False] * 4],
                [[True, True, True, False], [True] * 4],
            ],
            [[[False] * 4] * 2, [[True, False, False, False], [True, False, False, False]], [[False] * 4] * 2],
        ],
    }


def test_document_cut_by_the_end_of_a_row_goes_on_in_the_next(small_datastore):
    batch = collate(small_datastore, row_chunks=4, num_neighbors=1)
    assert batch["input_ids"].tolist() == [[11, 12, 13, 0, 21, 0, 31, 32], [33, 34, 0, 0, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5]]
    assert batch["labels"].tolist()[1] == [-100, 34, -100, -100, -100, -100, -100, -100]


@pytest.mark.parametrize("row_chunks", [1, 3, 7, 64])
def test_every_token_is_in_one_row_and_only_first_tokens_have_no_label(row_chunks):
    datastore = random_datastore(seed=row_chunks, vocab_size=50, chunk_size=4, num_documents=20, num_neighbors=2)
    batch = collate(datastore, row_chunks=row_chunks, num_neighbors=2)
    chunk_starts = (batch["position_ids"] == 0).reshape(-1, 4)[: len(datastore.chunks)]
    tokens = batch["input_ids"].reshape(-1, 4)[: len(datastore.chunks)]
    labels = batch["labels"].reshape(-1, 4)[: len(datastore.chunks)]
    real = torch.arange(4) < torch.from_numpy(datastore.chunks.length)[:, None]
    assert tokens[real].tolist() == datastore.chunks.input_ids[real.numpy()].tolist()
    assert torch.equal(labels == -100, ~real | chunk_starts)
    assert torch.equal(labels[labels != -100], tokens[labels != -100])
    assert (batch["labels"].reshape(-1, 4)[len(datastore.chunks) :] == -100).all()


@pytest.mark.parametrize("row_chunks", [3, 7])
def test_positions_count_from_the_start_of_each_document_in_a_row(row_chunks):
    datastore = random_datastore(seed=1, vocab_size=50, chunk_size=4, num_documents=20, num_neighbors=1)
    positions = collate(datastore, row_chunks=row_chunks, num_neighbors=1)["position_ids"]
    document_id = datastore.chunks.document_id
    for row in range(len(positions)):
        expected, position = [], 0
        for chunk in range(row * row_chunks, min((row + 1) * row_chunks, len(document_id))):
            if chunk > row * row_chunks and document_id[chunk] != document_id[chunk - 1]:
                position = 0
            expected += range(position, position + 4)
            position += 4
        assert positions[row, : len(expected)].tolist() == expected


def dropped_chunks(datastore, epoch, seed, rows=None, dropout=0.5):
    batch = collate(
        datastore, row_chunks=4, epoch=epoch, rows=rows, num_neighbors=1, neighbor_dropout=dropout, seed=seed
    )
    return ~batch["neighbor_attention_mask"].any(-1).any(-1)


@pytest.fixture
def datastore_with_all_neighbors():
    datastore = random_datastore(seed=2, vocab_size=50, chunk_size=4, num_documents=300, num_neighbors=1)
    datastore.neighbor_ids = np.abs(datastore.neighbor_ids)
    return datastore


def test_neighbor_dropout_is_a_function_of_seed_epoch_and_row(datastore_with_all_neighbors):
    datastore = datastore_with_all_neighbors
    dropped = dropped_chunks(datastore, epoch=3, seed=5)
    assert torch.equal(dropped[[7, 2]], dropped_chunks(datastore, epoch=3, seed=5, rows=[7, 2]))
    assert not torch.equal(dropped, dropped_chunks(datastore, epoch=4, seed=5))
    assert not torch.equal(dropped, dropped_chunks(datastore, epoch=3, seed=6))


@pytest.mark.parametrize("dropout", [0.0, 0.2, 1.0])
def test_neighbor_dropout_drops_the_given_share_of_chunks(datastore_with_all_neighbors, dropout):
    datastore = datastore_with_all_neighbors
    dropped = dropped_chunks(datastore, epoch=0, seed=0, dropout=dropout).flatten()[: len(datastore.chunks)]
    share = dropped.float().mean().item()
    assert abs(share - dropout) <= 4 * (dropout * (1 - dropout) / len(dropped)) ** 0.5


def test_copied_pieces_hold_the_tokens_to_come_of_the_own_document_and_noise():
    # Every token tells document and place, so that a piece shows where it was cut out.
    documents = [[1000 * document + place for place in range(37)] for document in range(1, 60)]
    num_chunks, chunk_size = 5, 8
    datastore = ArrayDatastore(documents, chunk_size, neighbor_ids=[[-1, -1]] * num_chunks * len(documents))
    batch = collate(datastore, row_chunks=num_chunks, num_neighbors=2, copy_share=0.5)
    again = collate(datastore, row_chunks=num_chunks, num_neighbors=2, copy_share=0.5, rows=[7, 3])
    assert torch.equal(batch["neighbor_input_ids"][[7, 3]], again["neighbor_input_ids"])

    pieces, masks = batch["neighbor_input_ids"], batch["neighbor_attention_mask"]
    assert not masks[:, :, 1].any(), "only the first neighbor is replaced"
    copied = masks[:, :, 0].any(-1)
    assert 0.4 < copied.float().mean() < 0.6
    starts, kept = [], []
    for row, slot in copied.nonzero().tolist():
        piece, mask = pieces[row, slot, 0], masks[row, slot, 0]
        if mask.sum() < chunk_size:  # too little behind the end of a document to tell its start from noise
            continue
        places = piece - 1000 * (row + 1) - torch.arange(len(piece)) - slot * chunk_size
        start = places[mask].mode().values
        kept.append((places[mask] == start).float().mean())
        starts.append(int(start))
        inside = torch.arange(len(piece)) + slot * chunk_size + start
        assert torch.equal(mask, (inside >= 0) & (inside < 37)), "a piece ends where its document does"
    assert set(starts) == set(range(-chunk_size // 2, chunk_size // 2 + 1))
    assert 0.75 < torch.stack(kept).mean() < 0.95


def test_rows_draw_one_of_several_numbers_of_neighbors():
    datastore = random_datastore(seed=3, vocab_size=50, chunk_size=4, num_documents=200, num_neighbors=4)
    datastore.neighbor_ids = np.abs(datastore.neighbor_ids)
    whole_rows = range(len(datastore.chunks) // 4)
    batch = collate(datastore, row_chunks=4, rows=whole_rows, num_neighbors=[1, 3])
    present = batch["neighbor_attention_mask"].any(-1)  # [B, L, k]
    assert present.shape[-1] == 3
    numbers = present.sum(-1)
    assert (numbers == numbers[:, :1]).all()
    assert set(numbers.unique().tolist()) == {1, 3}
    assert torch.equal(present, torch.arange(3) < numbers[..., None])


@pytest.fixture
def make_trainer(tmp_path):
    def make(cross_attention_gate=False, **options):
        config = RetroConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            chunk_size=4,
            cross_attention_layers=[1],
            cross_attention_gate=cross_attention_gate,
        )
        datastore = random_datastore(seed=3, vocab_size=50, chunk_size=4, num_documents=20, num_neighbors=2)
        datastore.tokenizer = None
        arguments = RetroTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)
        return RetroTrainer(RetroForCausalLM(config), arguments, datastore)

    return make


@pytest.mark.parametrize("use_muon", [False, True])
def test_norms_do_not_decay_and_the_decoder_has_its_own_learning_rate(make_trainer, use_muon):
    trainer = make_trainer(learning_rate=1e-3, decoder_learning_rate=1e-5, weight_decay=0.3, use_muon=use_muon)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    seen = []
    for group in trainer.create_optimizer().param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            added = "cross_attn" in name or "neighbor_encoder" in name
            assert group["lr"] == (1e-3 if added else 1e-5), name
            assert group["weight_decay"] == (0.0 if "norm" in name else 0.3), name
    assert sorted(seen) == sorted(names.values())


@pytest.mark.parametrize("use_muon", [False, True])
@pytest.mark.parametrize("gate_rate", [{}, {"gate_learning_rate": 3e-2}])
def test_gates_have_their_own_learning_rate_and_do_not_decay(make_trainer, use_muon, gate_rate):
    rates = {"learning_rate": 1e-3, "decoder_learning_rate": 1e-5} | gate_rate
    trainer = make_trainer(cross_attention_gate=True, weight_decay=0.3, use_muon=use_muon, **rates)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = {}
    for group in trainer.create_optimizer().param_groups:
        groups |= {names[id(parameter)]: (group["lr"], group["weight_decay"]) for parameter in group["params"]}
    assert groups["model.layers.1.cross_attn.gate"] == (gate_rate.get("gate_learning_rate", 1e-2), 0.0)
    assert groups["model.layers.1.cross_attn.q_proj.weight"] == (1e-3, 0.3)
    assert groups["model.layers.1.self_attn.q_proj.weight"] == (1e-5, 0.3)
    assert set(groups) == set(names.values())


def test_frozen_decoder_has_nothing_in_the_optimizer(make_trainer):
    trainer = make_trainer(freeze_decoder=True)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    optimized = [names[id(p)] for group in trainer.create_optimizer().param_groups for p in group["params"]]
    assert optimized
    assert all("cross_attn" in name or "neighbor_encoder" in name for name in optimized)


def test_more_neighbors_than_stored_is_an_error(small_datastore):
    with pytest.raises(ValueError, match="num_neighbors is 3, but only 2"):
        DataCollatorForRetro(small_datastore, num_neighbors=3)


def test_sampler_visits_every_row_in_another_order_each_epoch():
    sampler = EpochRowSampler(num_rows=50, seed=1)
    orders = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        indices = np.array(list(sampler))
        assert (indices // 50 == epoch).all()
        assert sorted(indices % 50) == list(range(50))
        orders.append((indices % 50).tolist())
    assert orders[0] != orders[1]
    sampler.set_epoch(0)
    assert [index % 50 for index in sampler] == orders[0]


def test_workers_make_the_same_batches_as_the_process_itself(datastore_with_all_neighbors):
    rows = ChunkRows(len(datastore_with_all_neighbors.chunks), 4)
    collator = DataCollatorForRetro(
        datastore_with_all_neighbors, row_chunks=4, num_neighbors=1, neighbor_dropout=0.5, seed=3
    )

    def batches(num_workers):
        sampler = EpochRowSampler(len(rows), seed=3)
        sampler.set_epoch(1)
        return list(DataLoader(rows, batch_size=16, sampler=sampler, collate_fn=collator, num_workers=num_workers))

    for here, worker in zip(batches(0), batches(2), strict=True):
        assert all(torch.equal(here[name], worker[name]) for name in here)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row_chunks": 0}, "row_chunks is 0"),
        ({"num_neighbors": [2, 0]}, r"num_neighbors is \[2, 0\]"),
        ({"freeze_decoder": True, "decoder_learning_rate": 1e-4}, "decoder_learning_rate is set"),
        ({"neighbor_dropout": 1.5}, "neighbor_dropout is 1.5"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
    ],
)
def test_wrong_training_arguments_name_the_value(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        RetroTrainingArguments(output_dir=str(tmp_path), **options)


def test_checkpoint_without_a_readable_state_is_passed_over(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    for step, state in ((9, json.dumps({"global_step": 9})), (10, json.dumps({"global_step": 10})), (11, '{"glob')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-12").mkdir()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("has_lora", [False, True])
@pytest.mark.parametrize("kind", ["cross", "joint"])
def test_a_plain_trainer_follows_the_collator(kind, has_lora, tmp_path):
    """`Trainer` drops what `forward` does not take from rows that are dicts; those of `ChunkRows` are none."""
    config = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    datastore = random_datastore(seed=3, vocab_size=50, chunk_size=4, num_documents=20, num_neighbors=2)
    torch.manual_seed(0)
    if kind == "cross":
        model = RetroForCausalLM(
            RetroConfig(**config, num_attention_heads=2, chunk_size=4, cross_attention_layers=[1])
        )
    else:
        model = RetroJointForCausalLM.from_decoder(tiny_llama(config["vocab_size"]), chunk_size=4)
    if has_lora:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    rows, collator = ChunkRows(len(datastore.chunks), 4), DataCollatorForRetro(datastore, row_chunks=4)
    with torch.no_grad():
        expected = model.eval()(**collator([rows[index] for index in range(8)])).loss
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", per_device_eval_batch_size=8),
        train_dataset=rows,
        eval_dataset=[rows[index] for index in range(8)],
        data_collator=collator,
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.args.max_steps = 2
    trainer.train()
    learned = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert learned and learned <= {name for name, parameter in model.named_parameters() if parameter.requires_grad}
