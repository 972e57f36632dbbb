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
import subprocess
import sys

import numpy as np
import pytest
import torch
from array_datastore import random_datastore
from safetensors.torch import load_file
from tiny_models import tiny_llama
from transformers import LlamaForCausalLM, TrainerState

from modeling_retro import RetroJointForCausalLM
from modeling_retro.datastore.datastore import RetroDatastore
from trainers.language_model.collator import ChunkRows, DataCollatorForRetro
from trainers.language_model.teacher import TeacherPredictions, teach, teacher_loss
from trainers.scripts import teach as teach_script
from trainers.scripts import train_retro


ROW_CHUNKS, TOP = 3, 5


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(len(tiny_tokenizer), initializer_range=0.4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory, base_dir, tiny_datastore_dir):
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    options = {"datastore": tiny_datastore_dir, "model": base_dir, "output_dir": folder, "row_chunks": ROW_CHUNKS}
    teach_script.main(
        [word for name, value in options.items() for word in (f"--{name}", str(value))] + ["--top_tokens", "5"]
    )
    return folder


def test_a_teacher_says_what_the_base_does_with_the_neighbor_in_front_of_the_window(
    teacher_dir, base_dir, tiny_datastore_dir
):
    datastore = RetroDatastore.from_pretrained(tiny_datastore_dir)
    base = LlamaForCausalLM.from_pretrained(base_dir)
    found_ids, found_log_probs = TeacherPredictions(teacher_dir, datastore, ROW_CHUNKS).take(
        np.arange(len(datastore.chunks))
    )
    document_id, num_taught = datastore.chunks.document_id, 0
    for chunk in range(0, len(datastore.chunks), 7):
        start = max(chunk // ROW_CHUNKS * ROW_CHUNKS, int(np.flatnonzero(document_id == document_id[chunk])[0]))
        if start == chunk:
            assert (found_ids[chunk] == -1).all()
            continue
        neighbor, mask = datastore.take_neighbors(datastore.neighbor_ids[chunk - 1, :1])
        window = [
            tokens[real] for tokens, real in zip(*datastore.chunks.take(np.arange(start, chunk + 1)), strict=True)
        ]
        sequence = np.concatenate([neighbor[mask], *window])
        with torch.no_grad():
            log_probs = base(torch.from_numpy(sequence)[None]).logits[0].log_softmax(-1)
        for place in range(len(window[-1])):
            expected = log_probs[len(sequence) - len(window[-1]) + place - 1].topk(TOP)
            assert found_ids[chunk, place].tolist() == expected.indices.tolist()
            np.testing.assert_allclose(found_log_probs[chunk, place], expected.values, atol=2e-2)
            num_taught += 1
        assert (found_ids[chunk, len(window[-1]) :] == -1).all()
    assert num_taught > 20


def test_teacher_loss_is_the_divergence_over_the_named_tokens_and_the_rest():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 11, generator=generator, dtype=torch.float64)
    teacher = torch.randn(2, 4, 11, generator=generator, dtype=torch.float64).log_softmax(-1)
    log_probs, token_ids = teacher.topk(3)
    token_ids[0, 2] = -1
    total, number = teacher_loss(logits, token_ids, log_probs)
    expected, count = 0.0, 0
    for b in range(2):
        for t in range(1, 4):
            if (b, t) == (0, 2):
                continue
            q, p = logits[b, t - 1].softmax(-1), log_probs[b, t].exp()
            q = torch.cat([q[token_ids[b, t]], 1 - q[token_ids[b, t]].sum(0, keepdim=True)])
            p = torch.cat([p, 1 - p.sum(0, keepdim=True)])
            expected, count = expected + (p * (p / q).log()).sum(), count + 1
    assert number == count == 5
    torch.testing.assert_close(total, expected.to(total.dtype), rtol=1e-5, atol=1e-6)


def test_a_teacher_of_other_rows_or_half_made_is_refused(teacher_dir, tiny_datastore_dir, base_dir, tmp_path):
    datastore = RetroDatastore.from_pretrained(tiny_datastore_dir)
    with pytest.raises(ValueError, match="row_chunks 3, the training has 4"):
        TeacherPredictions(teacher_dir, datastore, 4)
    with pytest.raises(ValueError, match="made for chunks"):
        TeacherPredictions(teacher_dir, datastore.split("validation"), ROW_CHUNKS)
    model = RetroJointForCausalLM.from_decoder_pretrained(str(base_dir), chunk_size=datastore.chunk_size)
    with pytest.raises(ValueError, match="made with top_tokens 5, not 4"):
        teach(tiny_datastore_dir, model, teacher_dir, row_chunks=ROW_CHUNKS, top_tokens=4)
    manifest = json.loads((teacher_dir / "teacher.json").read_text())
    (tmp_path / "teacher.json").write_text(json.dumps(manifest | {"shards": manifest["shards"][:-1]}))
    with pytest.raises(ValueError, match="not finished"):
        TeacherPredictions(tmp_path, datastore, ROW_CHUNKS)


class CountedTeacher:
    """Says its own chunk's number for every token."""

    def take(self, chunk_ids):
        shape = (*chunk_ids.shape, 4, 1)
        return np.broadcast_to(chunk_ids[..., None, None], shape).copy(), np.zeros(shape, dtype=np.float32)


def test_random_neighbors_replace_a_share_and_silence_the_teacher_of_the_next_chunk():
    datastore = random_datastore(seed=2, vocab_size=500, chunk_size=4, num_documents=300, num_neighbors=1)
    datastore.neighbor_ids = np.abs(datastore.neighbor_ids)
    rows = [ChunkRows(len(datastore.chunks), 4)[row] for row in range(80)]
    plain = DataCollatorForRetro(datastore, row_chunks=4, num_neighbors=1)(rows)
    collator = DataCollatorForRetro(
        datastore, row_chunks=4, num_neighbors=1, random_share=0.4, teacher=CountedTeacher()
    )
    batch = collator(rows)
    replaced = (batch["neighbor_input_ids"] != plain["neighbor_input_ids"]).any(-1).any(-1)  # [B, L]
    assert 0.25 < replaced.float().mean() < 0.55
    taught = batch["teacher_token_ids"].reshape(80, 4, 4)[..., 0] >= 0
    assert not taught[:, 0].any()
    assert torch.equal(taught[:, 1:], ~replaced[:, :-1])
    assert torch.equal(collator(rows[5:7])["neighbor_input_ids"], batch["neighbor_input_ids"][5:7])


def reader_options(datastore, base, teacher, output_dir, **options):
    """The words of a `retro train` that trains everything a reader may have."""
    options = {
        "datastore": datastore,
        "model": base,
        "output_dir": output_dir,
        "neighbor_adapter_rank": 2,
        "row_adapter_rank": 2,
        "neighbor_bias": True,
        "freeze_decoder": True,
        "retrofit_only": True,
        "teacher": teacher,
        "teacher_weight": 2.0,
        "random_share": 0.2,
        "row_chunks": ROW_CHUNKS,
        "num_neighbors": 1,
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def test_two_processes_train_the_reader_that_one_trains_with_the_joint_batch(
    teacher_dir, base_dir, tiny_datastore_dir, tmp_path
):
    # A large epsilon: Adam would blow up the rounding of gradients near zero.
    words = [tiny_datastore_dir, base_dir, teacher_dir]
    options = {"adam_epsilon": 1e-3, "max_steps": 4}
    train_retro.main(reader_options(*words, tmp_path / "one", **options))
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "-m", "trainers.scripts.train_retro"]
    two = reader_options(*words, tmp_path / "two", per_device_train_batch_size=1, **options)
    subprocess.run([sys.executable, "-m", *launch, *map(str, two)], check=True, timeout=300)
    expected = RetroJointForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    found = RetroJointForCausalLM.from_pretrained(tmp_path / "two").state_dict()
    names = ("one", "two")
    batches = [TrainerState.load_from_json(tmp_path / n / "checkpoint-4" / "trainer_state.json") for n in names]
    assert batches[0].epoch == batches[1].epoch  # so there were two processes: each had half of the rows
    assert found["neighbor_bias"] != 0
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_an_adapter_learns_from_its_teacher_stops_and_goes_on_to_the_same_weights(
    teacher_dir, base_dir, tiny_datastore_dir, tmp_path
):
    def train(output_dir, **options):
        words = [tiny_datastore_dir, base_dir, teacher_dir, output_dir]
        train_retro.main(reader_options(*words, gradient_accumulation_steps=2, **options))
        return RetroJointForCausalLM.from_pretrained(output_dir)

    whole = train(tmp_path / "whole")
    assert not list((tmp_path / "whole").rglob("model.safetensors"))
    state = whole.state_dict()
    base = LlamaForCausalLM.from_pretrained(base_dir)
    assert torch.equal(state["decoder.lm_head.weight"], base.lm_head.weight)
    assert state["neighbor_bias"] != 0
    train(tmp_path / "halves", max_steps=4, lr_scheduler_type="constant")
    constant = train(tmp_path / "constant", lr_scheduler_type="constant").state_dict()
    resumed = train(tmp_path / "halves", max_steps=6, lr_scheduler_type="constant").state_dict()
    assert resumed.keys() == constant.keys()
    for name, value in resumed.items():
        assert torch.equal(value, constant[name]), name


def test_a_frozen_decoder_may_be_in_bfloat16(teacher_dir, base_dir, tiny_datastore_dir, tmp_path):
    words = [tiny_datastore_dir, base_dir, teacher_dir]
    train_retro.main(reader_options(*words, tmp_path / "float32", bf16=True))
    half = {"bf16": True, "decoder_dtype": "bfloat16"}
    train_retro.main(reader_options(*words, tmp_path / "bfloat16", **half))
    # The command again, from a checkpoint: to the same adapters.
    (tmp_path / "resumed").mkdir()
    (tmp_path / "bfloat16" / "checkpoint-4").rename(tmp_path / "resumed" / "checkpoint-4")
    train_retro.main(reader_options(*words, tmp_path / "resumed", **half))
    start, *trained = (
        load_file(tmp_path / name / "retrofit.safetensors")
        for name in ("float32/checkpoint-2", "float32", "bfloat16", "resumed")
    )
    expected, found, resumed = trained
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, resumed[name])
    learned, difference = (
        torch.cat([(left[name] - expected[name]).flatten() for name in expected]).norm() for left in (start, found)
    )
    assert difference < 0.5 * learned


@pytest.mark.parametrize("options", [{}, {"bf16": True, "retrofit_only": False}, {"bf16": True, "fsdp_size": 2}])
def test_a_decoder_in_bfloat16_that_would_be_trained_or_saved_is_refused(
    teacher_dir, base_dir, tiny_datastore_dir, tmp_path, options
):
    words = reader_options(tiny_datastore_dir, base_dir, teacher_dir, tmp_path, decoder_dtype="bfloat16", **options)
    with pytest.raises(ValueError, match="--decoder_dtype is bfloat16, .* needs --bf16 true"):
        train_retro.main(words)


def test_a_decoder_in_bfloat16_from_scratch_is_refused(teacher_dir, base_dir, tiny_datastore_dir, tmp_path):
    half = {"bf16": True, "decoder_dtype": "bfloat16"}
    words = reader_options(tiny_datastore_dir, base_dir, teacher_dir, tmp_path / "reader", **half)
    config = tmp_path / "config.yaml"
    config.write_text("hidden_size: 32\n", encoding="utf-8")
    place = words.index("--model")
    words[place : place + 2] = ["--model_config", str(config)]
    with pytest.raises(ValueError, match="--decoder_dtype is bfloat16, .* needs --bf16 true, --model"):
        train_retro.main(words)
