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
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import make_texts
from safetensors.torch import load_file
from test_reader_adapters_retro import LORA, make_reader
from tiny_joint import make_decoder
from tiny_models import tiny_llama
from tokenizers.processors import TemplateProcessing

from data_prep.chunk import chunk_documents
from data_prep.embed import embed_chunks
from data_prep.index import build_index
from data_prep.neighbors import find_neighbors
from modeling_retro import RetroDatastore, RetroJointForCausalLM
from trainers.evaluation.questions import KINDS, SYLLABLES, encode_passages
from trainers.language_model.collator import ChunkRows, DataCollatorForRetro
from trainers.language_model.lessons import DataCollatorForLessons, ReaderLessons, lesson_losses
from trainers.language_model.make_lessons import BEGINNINGS, ENDINGS, FACTS, MIDDLES, TWO_HOPS, UNKNOWN, make_lessons
from trainers.scripts import train_retro
from trainers.scripts.make_lessons import main as make_lessons_main
from trainers.scripts.train_reader import main as train_reader_main


LESSON = {
    "passages": ["red cat sat.\n", "A dog.\n", "blue\n"],
    "questions": [
        {"prompt": "Who sat?", "answer": " a red cat"},
        {"prompt": "Which? It is", "answer": " d"},
    ],
}


@pytest.fixture
def collator(tiny_tokenizer):
    return DataCollatorForLessons(tiny_tokenizer, neighbor_length=16)


def write_lessons(path, lessons):
    path.write_text("".join(json.dumps(lesson) + "\n" for lesson in lessons))
    return path


def test_questions_become_rows_that_end_with_their_answers_and_share_passages(collator, tiny_tokenizer, tmp_path):
    other = {"passages": ["one\n"], "questions": [{"prompt": "x", "answer": "y"}]}
    lessons = ReaderLessons(write_lessons(tmp_path / "lessons.jsonl", [LESSON, other]))
    assert len(lessons) == 2
    assert lessons[3].data == other  # the second line in the second epoch
    batch = collator([lessons[0], lessons[1]])
    questions = LESSON["questions"] + other["questions"]
    for row, mask, labels, question in zip(
        batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], questions, strict=True
    ):
        prompt, answer = (tiny_tokenizer(question[name])["input_ids"] for name in ("prompt", "answer"))
        assert row[mask].tolist() == prompt + answer
        assert mask.tolist() == sorted(mask.tolist())
        assert labels.tolist() == [-100] * (len(row) - len(answer)) + answer
    ids, kept = encode_passages(tiny_tokenizer, [LESSON["passages"]] * 2 + [other["passages"]], 16)
    assert torch.equal(batch["passage_input_ids"], ids)
    assert torch.equal(batch["passage_attention_mask"], kept)


def test_a_bos_token_stands_before_the_passages_of_lessons(collator, tiny_tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    bos = tokenizer.eos_token
    tokenizer.add_special_tokens({"bos_token": bos})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    lessons = [ReaderLessons(write_lessons(tmp_path / "lessons.jsonl", [LESSON]))[0]]
    expected = collator(lessons)
    batch = DataCollatorForLessons(tokenizer, 16)(lessons)
    assert batch.pop("passage_prefix_input_ids").tolist() == [[tokenizer.bos_token_id]] * 2
    assert expected.keys() == batch.keys()  # as without one, of a tokenizer that begins texts with nothing
    assert all(torch.equal(batch[name], values) for name, values in expected.items())


@pytest.mark.parametrize("before", [[], [5]])
def test_losses_are_those_of_each_answer_with_passages_apart_and_of_the_base_with_them_in_front(before):
    fields = {"neighbor_adapter": LORA, "row_adapter": LORA, "neighbor_bias": True}
    model, base = make_reader(**fields), make_decoder()
    torch.nn.init.constant_(model.neighbor_bias, 0.7)
    generator = torch.Generator().manual_seed(0)
    shape, vocab_size = (2, 7), model.config.vocab_size
    labels = torch.randint(3, vocab_size, shape, generator=generator)
    inputs = {
        "input_ids": labels.clone(),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]),
        "labels": labels.masked_fill(torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]]).bool(), -100),
        "passage_input_ids": torch.randint(3, vocab_size, (2, 3, 6), generator=generator),
        "passage_attention_mask": torch.ones(2, 3, 6, dtype=torch.bool),
    }
    inputs["passage_attention_mask"][0, 1, 4:] = False
    prefix = {"passage_prefix_input_ids": torch.tensor([before])} if before else {}
    inputs |= {name: values.repeat(2, 1) for name, values in prefix.items()}
    found_loss, found_divergence = lesson_losses(model, model, inputs)
    expected_loss, expected_divergence = 0, 0
    for b, first in enumerate((4, 6)):
        row = inputs["input_ids"][b][inputs["attention_mask"][b].bool()]
        passages, mask = inputs["passage_input_ids"][b], inputs["passage_attention_mask"][b]
        apart = model(
            row[None],
            passage_input_ids=passages[None],
            passage_attention_mask=mask[None],
            passages="apart",
            **prefix,
        ).logits[0]
        front = torch.cat([torch.tensor(before, dtype=torch.long), passages[mask]])
        in_front = base(torch.cat([front, row])[None]).logits[0, len(front) :]
        for column in range(first, 7):
            place = column - (7 - len(row)) - 1
            log_q, log_p = (logits[place].log_softmax(-1) for logits in (apart, in_front))
            expected_loss -= log_q[labels[b, column]]
            expected_divergence += (log_p.exp() * (log_p - log_q)).sum()
    # The losses are computed in float32.
    torch.testing.assert_close(found_loss.double(), expected_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_divergence.double(), expected_divergence, rtol=1e-4, atol=1e-5)
    assert expected_divergence > 0.1
    assert lesson_losses(model, None, inputs)[0] == found_loss
    assert model.neighbor_bias is not None and len(model.neighbor_memory) == 0


def test_losses_of_a_row_are_those_of_its_tokens_and_of_the_base_with_the_same_neighbors():
    model = make_reader(neighbor_adapter=LORA)
    base = make_reader()  # adapters that act on nothing
    size, vocab_size = model.config.chunk_size, model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, vocab_size, (1, 3 * size), generator=generator)
    inputs = {
        "input_ids": labels.clone(),
        "labels": labels,
        "neighbor_input_ids": torch.randint(3, vocab_size, (1, 3, 2, 2 * size), generator=generator),
        "neighbor_attention_mask": torch.ones(1, 3, 2, 2 * size, dtype=torch.bool),
    }
    labels[0, size + 1] = -100
    found_loss, found_divergence = lesson_losses(model, model, inputs)
    neighbors = {name: values for name, values in inputs.items() if name != "labels"}
    log_q, log_p = (reader(**neighbors).logits[0].log_softmax(-1) for reader in (model, base))
    columns = [column for column in range(1, 3 * size) if column != size + 1]
    nats = {column: -log_q[column - 1, labels[0, column]] for column in columns}
    expected_loss = sum(nats.values())
    expected_divergence = sum((log_p[n - 1].exp() * (log_p[n - 1] - log_q[n - 1])).sum() for n in columns)
    torch.testing.assert_close(found_loss.double(), expected_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_divergence.double(), expected_divergence, rtol=1e-4, atol=1e-5)
    assert expected_divergence > 0.1
    # Where random neighbors are in sight, only the base teaches.
    sees_random = torch.zeros_like(labels, dtype=torch.bool)
    sees_random[0, size : 2 * size] = True
    own_loss, divergence = lesson_losses(model, model, inputs | {"sees_random": sees_random})
    expected_loss = sum(nat for column, nat in nats.items() if not size <= column < 2 * size)
    torch.testing.assert_close(own_loss.double(), expected_loss, rtol=1e-5, atol=1e-5)
    assert divergence == found_divergence


def test_rows_among_lessons_say_which_tokens_see_random_neighbors(folder):
    datastore = RetroDatastore.from_pretrained(folder / "datastore")
    options = {"row_chunks": 4, "num_neighbors": 1}
    collator = DataCollatorForRetro(datastore, random_share=0.5, mark_random=True, seed=1, **options)
    rows = [ChunkRows(len(datastore.chunks), 4)[index] for index in range(4)]
    batch = DataCollatorForLessons(datastore.tokenizer, datastore.neighbor_length, collator)(rows)
    own = DataCollatorForRetro(datastore, **options)(rows)
    sees_random = batch["sees_random"].reshape(4, 4, -1)
    assert sees_random.any(-1).equal(sees_random.all(-1)) and not sees_random[:, 0].any()
    same = (batch["neighbor_input_ids"] == own["neighbor_input_ids"]).flatten(2).all(-1)  # [B, L]
    assert same[:, :-1].equal(~sees_random[:, 1:, 0])
    assert 0 < same.sum() < same.numel()
    assert "sees_random" not in own


def test_each_epoch_has_all_lessons_and_rows_that_were_not_read_before(tmp_path):
    path = write_lessons(tmp_path / "lessons.jsonl", [LESSON] * 6)
    dataset = ReaderLessons(path, ChunkRows(40, row_chunks=4), row_share=0.4, seed=1)
    assert len(dataset) == 10
    items = [dataset[index] for index in range(50)]
    starts = []
    for epoch in range(5):
        assert all(item.data == LESSON for item in items[10 * epoch : 10 * epoch + 6])
        starts += [item["start"] for item in items[10 * epoch + 6 : 10 * epoch + 10]]
    assert sorted(starts[:10]) == sorted(starts[10:]) == list(range(0, 40, 4))
    assert starts[:10] != sorted(starts[:10])
    assert [item["epoch"] for item in items if "epoch" in item] == [0] * 10 + [1] * 10
    assert [item.data for item in items] == [dataset[index].data for index in range(50)]
    with pytest.raises(ValueError, match="row_share is 1.0"):
        ReaderLessons(path, ChunkRows(40, row_chunks=4), row_share=1.0)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "{}",
        '{"passages": [], "questions": [{"prompt": "a", "answer": "b"}]}',
        '{"passages": ["a"]}',
        '{"passages": ["a"], "questions": [{"prompt": "a", "answer": ""}]}',
        '{"passages": [3], "questions": [{"prompt": "a", "answer": "b"}]}',
    ],
)
def test_a_line_that_is_no_lesson_is_refused_by_its_number(line, tmp_path):
    path = tmp_path / "lessons.jsonl"
    path.write_text(json.dumps(LESSON) + "\n" + line + "\n")
    with pytest.raises(ValueError, match="line 2 is no lesson"):
        ReaderLessons(path)
    path.write_text("")
    with pytest.raises(ValueError, match="holds no lessons"):
        ReaderLessons(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer, tiny_encoder_dir):
    """A datastore with neighbors as long as those of a real one, and a small decoder."""
    folder = tmp_path_factory.mktemp("lessons")
    texts = [" ".join(make_texts(4, seed=seed)) + "\n`size` (`int`, defaults to `7`):" for seed in range(12)]
    write_lessons(folder / "train.jsonl", [{"text": text} for text in texts])
    chunk_documents(folder / "train.jsonl", folder / "datastore", tiny_tokenizer, chunk_size=64)
    embed_chunks(folder / "datastore", tiny_encoder_dir)
    build_index(folder / "datastore")
    find_neighbors(folder / "datastore", num_neighbors=4)
    tiny_llama(len(tiny_tokenizer), initializer_range=0.1).save_pretrained(folder / "base")
    options = ["--datastore", str(folder / "datastore"), "--num_lessons", "40"]
    make_lessons_main([*options, "--output_file", str(folder / "lessons.jsonl")])
    return folder


def test_answers_stand_in_passages_that_fit_and_the_lessons_depend_on_the_seed(folder):
    datastore = RetroDatastore.from_pretrained(folder / "datastore")
    lessons = list(make_lessons(datastore, "train", 40))
    assert lessons == [lesson.data for lesson in map(ReaderLessons(folder / "lessons.jsonl").__getitem__, range(40))]
    assert lessons != list(make_lessons(datastore, "train", 40, seed=1))
    answers = {answer for _, answer in UNKNOWN}
    num_questions = num_unknown = 0
    for lesson in lessons:
        encode_passages(datastore.tokenizer, [lesson["passages"]], datastore.neighbor_length)
        for question in lesson["questions"]:
            num_questions += 1
            answer = question["answer"].strip().removesuffix(".")
            is_unknown = any(known.startswith(answer) for known in answers)
            num_unknown += is_unknown
            assert is_unknown or any(answer in passage for passage in lesson["passages"])
    assert num_questions > 50
    assert 0 < num_unknown < 0.3 * num_questions


def test_lessons_share_no_fact_or_name_with_the_questions_that_measure_them():
    generator = np.random.default_rng(0)
    facts = [make(generator, 4) for make in KINDS.values()]
    measured = " ".join(sentence for fact in facts for sentences in fact.sentences for sentence in sentences)
    taught = " ".join(statement for *statements, _, _ in FACTS + TWO_HOPS for statement in statements)
    measured, taught = (set(re.findall("[a-z]{4,}", text)) for text in (measured, taught))
    assert not (measured & taught) - {"that", "year"}
    names = [f"{one}{two}{end}".lower() for one in BEGINNINGS for two in MIDDLES for end in ENDINGS]
    assert not [name for name in names if any(name.startswith(s) and name[len(s) :] in SYLLABLES for s in SYLLABLES)]


def test_a_reader_learns_from_lessons_stops_and_goes_on_to_the_same_weights(folder, tmp_path):
    def train(output_dir, **options):
        if "reader" not in options:
            options["neighbor_adapter_rank"] = 2
        options = {
            "datastore": folder / "datastore",
            "lessons": folder / "lessons.jsonl",
            "model": folder / "base",
            "freeze_decoder": True,
            "retrofit_only": True,
            "max_steps": 4,
            "save_steps": 2,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "use_cpu": True,
            "disable_tqdm": True,
            "output_dir": output_dir,
            **options,
        }
        train_retro.main([word for name, value in options.items() for word in (f"--{name}", str(value))])
        return load_file(output_dir / "retrofit.safetensors")

    whole = train(tmp_path / "whole")
    train(tmp_path / "halves", max_steps=2)
    resumed = train(tmp_path / "halves")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    with pytest.raises(ValueError, match="lessons and rows do not fit in a batch"):
        train(tmp_path / "refused", row_share=0.5, per_device_train_batch_size=2)
    with pytest.raises(ValueError, match="--train_split is for training on chunks"):
        train(tmp_path / "refused", train_split="train")
    with pytest.raises(ValueError, match="the base of the model is the teacher"):
        train(tmp_path / "refused", teacher=tmp_path)
    with pytest.raises(ValueError, match="which is for rows among --lessons"):
        words = ["--datastore", str(folder / "datastore"), "--model", str(folder / "base"), "--row_share", "0.5"]
        train_retro.main([*words, "--use_cpu", "true", "--output_dir", str(tmp_path / "refused")])
    # Another run begins with this reader.
    started = train(tmp_path / "further", reader=tmp_path / "whole", learning_rate=0.0)
    assert all(torch.equal(started[name], value) for name, value in whole.items())
    datastore = RetroDatastore.from_pretrained(folder / "datastore")
    lessons, collator = ReaderLessons(folder / "lessons.jsonl"), DataCollatorForLessons(datastore.tokenizer, 128)
    losses = []
    for reader in (None, tmp_path / "whole"):
        fields = {} if reader is None else {"reader": str(reader)}
        model = RetroJointForCausalLM.from_decoder_pretrained(str(folder / "base"), **fields)
        with torch.no_grad():
            losses.append(sum(float(lesson_losses(model, None, collator([lessons[n]]))[0]) for n in range(10)))
    assert losses[1] < losses[0]


def test_one_command_makes_lessons_and_trains_a_reader_on_them(folder, tmp_path, capsys):
    words = ["--datastore", str(folder / "datastore"), "--model", str(folder / "base"), "--num_lessons", "36"]
    options = [*words, "--rank", "2", "--learning_rate", "0.05", "--dtype", "float32", "--seed", "3"]
    train_reader_main([*options, "--output_dir", str(tmp_path / "reader")])
    lessons = ReaderLessons(tmp_path / "reader" / "lessons.jsonl")
    assert len(lessons) == 36
    collator = DataCollatorForLessons(RetroDatastore.from_pretrained(folder / "datastore").tokenizer, 128)
    losses = []
    for fields in ({}, {"reader": str(tmp_path / "reader")}):
        model = RetroJointForCausalLM.from_decoder_pretrained(str(folder / "base"), **fields)
        with torch.no_grad():
            losses.append(sum(float(lesson_losses(model, None, collator([lessons[n]]))[0]) for n in range(36)))
    assert losses[1] < 0.97 * losses[0]
    weights = load_file(tmp_path / "reader" / "retrofit.safetensors")
    # Interrupted behind its first checkpoint, it comes to the same weights.
    for name in ("lessons.jsonl", "checkpoint-10"):
        copy_one = shutil.copytree if name.startswith("checkpoint") else shutil.copy
        (tmp_path / "again").mkdir(exist_ok=True)
        copy_one(tmp_path / "reader" / name, tmp_path / "again" / name)
    train_reader_main([*options, "--output_dir", str(tmp_path / "again")])
    again = load_file(tmp_path / "again" / "retrofit.safetensors")
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    with pytest.raises(ValueError, match="has other lessons than this command makes"):
        train_reader_main([*options[:-1], "4", "--output_dir", str(tmp_path / "again")])
    assert sorted(path.name for path in (tmp_path / "again").glob("lessons*")) == ["lessons.jsonl"]
    with pytest.raises(ValueError, match="--num_lessons is 3"):
        train_reader_main([*words[:-1], "3", "--output_dir", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()
