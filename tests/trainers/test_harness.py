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
"""The model of the harness answers as `retro evaluate` measures, and without retrieval as `hf` does."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from array_datastore import ArraySource
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

from data_prep.chunk import chunk_documents
from data_prep.embed import embed_chunks
from data_prep.index import build_index
from modeling_retro import RetroDatastore, RetroForCausalLM, RetroJointForCausalLM, RetroRetriever
from trainers.cli import main
from trainers.evaluation.evaluate import evaluate_retro


pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from trainers.evaluation.harness import RetroLM  # noqa: E402
from trainers.evaluation.harness_tasks import (  # noqa: E402
    definition_questions,
    next_line_questions,
    score_definition,
    score_line,
)
from trainers.evaluation.questions import encode_passages, hidden_questions  # noqa: E402


QUESTIONS = [
    ("retro looks things up in", " a datastore"),
    ("in a", " datastore"),
    ("in a", " retro"),
    ("things things up looks naïve δέλτα retro retro in a datastore looks things up", " retro looks things up in a"),
    ("", "looks"),
]
TEXT = (
    "retro looks things up in a datastore naïve looks δέλτα 日本語 in a retro datastore, things up things looks retro"
)


@pytest.fixture(scope="module")
def datastore(tiny_datastore_dir):
    return RetroDatastore.from_pretrained(tiny_datastore_dir)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer):
    """Folders of a decoder, of a retrofit of it whose gates are open, and of it wrapped."""
    path = tmp_path_factory.mktemp("models")
    fields = {"initializer_range": 0.2, "max_position_embeddings": 256, "eos_token_id": 0, "pad_token_id": 1}
    tiny_llama(len(tiny_tokenizer), **fields).save_pretrained(path / "decoder")
    tiny_tokenizer.save_pretrained(path / "decoder")
    retrofit = RetroForCausalLM.from_decoder_pretrained(path / "decoder", chunk_size=8, cross_attention_layers=[1])
    with torch.no_grad():
        retrofit.model.layers[1].cross_attn.gate.fill_(2.0)
    retrofit.save_pretrained(path / "cross")
    RetroJointForCausalLM.from_decoder_pretrained(path / "decoder", chunk_size=8).save_pretrained(path / "joint")
    return path


def requests(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=given, idx=n) for n, given in enumerate(arguments)]


def answers(model):
    generation = {"until": ["\n"], "max_gen_toks": 10, "do_sample": False}
    return {
        "questions": model.loglikelihood(requests("loglikelihood", QUESTIONS), disable_tqdm=True),
        "text": model.loglikelihood_rolling(
            requests("loglikelihood_rolling", [(TEXT,), (TEXT[:20],)]), disable_tqdm=True
        ),
        "generated": model.generate_until(
            requests("generate_until", [(prompt or "a", generation) for prompt, _ in QUESTIONS]), disable_tqdm=True
        ),
    }


def assert_same_answers(found, expected, tolerance):
    assert found["generated"] == expected["generated"]
    assert [is_greedy for _, is_greedy in found["questions"]] == [is_greedy for _, is_greedy in expected["questions"]]
    for name in ("questions", "text"):
        values = [[value[0] if name == "questions" else value for value in each[name]] for each in (found, expected)]
        np.testing.assert_allclose(*values, rtol=0, atol=tolerance)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("kind", ["cross", "joint", "decoder"])
def test_without_retrieval_the_answers_are_those_of_hf_on_the_base(folders, datastore, kind, batch_size):
    base = AutoModelForCausalLM.from_pretrained(folders / "decoder").eval()
    stock = HFLM(base, tokenizer=copy.deepcopy(datastore.tokenizer), batch_size=batch_size)
    model = RetroLM(str(folders / kind), datastore, retrieval=False, batch_size=batch_size)
    assert_same_answers(answers(model), answers(stock), tolerance=0)
    retrieving = answers(RetroLM(str(folders / kind), datastore, k=2, batch_size=batch_size))
    assert abs(retrieving["text"][0] - answers(stock)["text"][0]) > 0.1


@pytest.mark.parametrize("kind", ["cross", "joint"])
def test_batches_of_any_size_agree(folders, datastore, kind):
    model = RetroLM(str(folders / kind), datastore, k=2, batch_size=1)
    batched = RetroLM(str(folders / kind), datastore, k=2, batch_size=4)
    assert_same_answers(answers(batched), answers(model), tolerance=1e-4)


@pytest.mark.parametrize("retrieval", [True, False])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", ["cross", "joint"])
def test_a_text_costs_what_retro_evaluate_says(folders, datastore, kind, k, retrieval):
    """Of a document that begins with the token which the harness puts in front of a text."""
    harness = RetroLM(str(folders / kind), datastore, k=k, retrieval=retrieval)
    tokens = [harness.prefix_token_id, *harness.tok_encode(TEXT)]
    chunks = torch.tensor(tokens[: len(tokens) // 8 * 8]).reshape(-1, 8)
    neighbor_ids = RetroRetriever(datastore).retrieve(chunks, k).chunk_ids.numpy()
    absent = np.full((-(-len(tokens) // 8) - len(chunks), k), -1)
    split = ArraySource([tokens], 8, np.concatenate([neighbor_ids, absent]))
    evaluation = evaluate_retro(
        harness.model, datastore, split, modes=["on" if retrieval else "off"], num_neighbors=k, show_progress=False
    )
    nats = sum(next(iter(evaluation.chunk_bits.values()))) * math.log(2) - math.log(len(datastore.tokenizer))
    (found,) = harness.loglikelihood_rolling(requests("loglikelihood_rolling", [(TEXT,)]), disable_tqdm=True)
    assert found == pytest.approx(-nats, abs=1e-4)


def last_chunk(retriever, tokens):
    """What is found with the last chunk of a question, or all of a shorter one."""
    query = torch.tensor([tokens[-8:]])
    return lambda k: retriever.retrieve(query, k, attention_mask=torch.ones_like(query))


def question_inputs(kind, retriever, context, k, passages):
    """The arguments of a model for a question that was looked up."""
    if kind == "cross":
        return retriever.close_chunks([context])
    found = last_chunk(retriever, context)(k)
    return {
        "input_ids": torch.tensor([context]),
        "passage_input_ids": found.neighbor_input_ids,
        "passage_attention_mask": found.neighbor_attention_mask,
        "passages": passages,
    }


def expected_answer(kind, model, retriever, context, answer, k, passages="apart"):
    """The likelihood of an answer by one forward pass over the question and the answer."""
    inputs = question_inputs(kind, retriever, context, k, passages)
    num_context = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)
    if kind == "cross":
        length = inputs["input_ids"].shape[1]
        inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, len(answer)), value=1)
        inputs["position_ids"] = torch.arange(length)[None]
        found = retriever.retrieve(inputs["input_ids"][0, : length // 8 * 8].view(-1, 8), k)
        inputs["neighbor_input_ids"] = found.neighbor_input_ids[None]
        inputs["neighbor_attention_mask"] = found.neighbor_attention_mask[None]
    with torch.no_grad():
        log_probs = model(**inputs).logits[0].log_softmax(-1)[num_context - 1 : -1]
    return log_probs.gather(1, torch.tensor(answer)[:, None]).sum().item()


@pytest.mark.parametrize(("kind", "passages"), [("cross", "apart"), ("joint", "apart"), ("joint", "in_order")])
def test_the_end_of_a_question_is_looked_up_for_its_answer(folders, datastore, kind, passages):
    model = RetroLM(str(folders / kind), datastore, k=2, batch_size=3, passages=passages)
    retriever = RetroRetriever(datastore)
    found = model.loglikelihood(requests("loglikelihood", QUESTIONS[:4]), disable_tqdm=True)
    for (likelihood, _), (context, answer) in zip(found, QUESTIONS):
        context, answer = model._encode_pair(context, answer)
        expected = expected_answer(kind, model.model, retriever, context, answer, 2, passages)
        assert likelihood == pytest.approx(expected, abs=1e-4)

    # A question that is too long loses its beginning: whole chunks, or what the passages leave no room for.
    length = 40 if kind == "cross" else 48
    short = RetroLM(str(folders / kind), datastore, k=2, max_length=length, passages=passages)
    context, answer = model._encode_pair(TEXT, " a datastore")
    (found,) = short.loglikelihood(requests("loglikelihood", [(TEXT, " a datastore")]), disable_tqdm=True)
    room = length + 1 - len(answer)
    kept = room // 8 * 8 if kind == "cross" else room - 2 * datastore.neighbor_length
    assert 8 <= kept < len(context)
    expected = expected_answer(kind, model.model, retriever, context[-kept:], answer, 2, passages)
    assert found[0] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="max_length is 8"):
        RetroLM(str(folders / kind), datastore, max_length=8).loglikelihood(
            requests("loglikelihood", [(TEXT, " a datastore")]), disable_tqdm=True
        )


@pytest.mark.parametrize(("kind", "passages"), [("cross", "apart"), ("joint", "apart"), ("joint", "in_order")])
def test_a_prompt_is_looked_up_before_it_is_continued(folders, datastore, kind, passages):
    model = RetroLM(str(folders / kind), datastore, k=2, batch_size=4, passages=passages)
    generation = {"until": [], "max_gen_toks": 12, "do_sample": False}
    prompts = [prompt for prompt, _ in QUESTIONS[:4]]
    found = model.generate_until(
        requests("generate_until", [(prompt, generation) for prompt in prompts]), disable_tqdm=True
    )
    for prompt, text in zip(prompts, found):
        inputs = question_inputs(kind, model.retriever, model.tok_encode(prompt), 2, passages)
        output = model.model.generate(**inputs, max_new_tokens=12, do_sample=False)
        tokens = output[0, inputs["input_ids"].shape[1] :]
        assert text == datastore.tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("way", ["apart", "in_order", "in_front", "closed_book"])
def test_passages_of_a_document_are_read_in_place_of_what_is_found(folders, datastore, way):
    documents = [
        {"passages": ["retro looks\n", "in a datastore\n"]},
        {},
        {"passages": ["naïve up\n"]},
        {"passages": ["things up\n", "looks\n", "δέλτα\n"]},
    ]
    options = {"in_front": True} if way == "in_front" else {"passages": way}
    options = {"retrieval": False} if way == "closed_book" else options
    model = RetroLM(str(folders / "joint"), datastore, k=2, batch_size=4, **options)
    generation = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    asked = [
        Instance("generate_until", document, ("things up in", generation), number)
        for number, document in enumerate(documents)
    ]
    answers = model.generate_until(asked, disable_tqdm=True)
    context = model.tok_encode("things up in")
    for document, answer in zip(documents, answers, strict=True):
        found = last_chunk(RetroRetriever(datastore), context)(2)
        ids, mask = found.neighbor_input_ids, found.neighbor_attention_mask
        if "passages" in document:
            ids, mask = encode_passages(datastore.tokenizer, [document["passages"]], datastore.neighbor_length)
        inputs = {"input_ids": torch.tensor([context])}
        if way == "in_front":
            inputs["input_ids"] = torch.tensor([ids[mask].tolist() + context])
        elif way != "closed_book":
            inputs |= {"passage_input_ids": ids, "passage_attention_mask": mask, "passages": way}
        length = inputs["input_ids"].shape[1]
        output = model.model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, length:]
        assert answer == datastore.tokenizer.decode(output, skip_special_tokens=True).split("\n")[0]
    if way != "closed_book":
        assert len(set(answers)) >= 3
    with pytest.raises(ValueError, match="passage 0 of question 0 has .* tokens, but a neighbor has 16 at most"):
        long = [Instance("generate_until", {"passages": [TEXT]}, ("up", generation), 0)]
        RetroLM(str(folders / "joint"), datastore).generate_until(long, disable_tqdm=True)
    with pytest.raises(ValueError, match="a RetroForCausalLM cannot take"):
        RetroLM(str(folders / "cross"), datastore).generate_until(asked, disable_tqdm=True)


def test_a_bos_token_stands_before_the_passages(folders, datastore):
    """In order, a question reads what stands in front of it as text: the BOS token, the passages and the question."""
    found, passages = {}, ["looks things\n", "in a datastore\n"]
    # Chunks have 8 tokens, and those that an answer completes are looked up.
    generation = {"until": [], "max_gen_toks": 3, "do_sample": False}
    for name, options in {"in_order": {"passages": "in_order"}, "in_front": {"in_front": True}}.items():
        model = RetroLM(str(folders / "joint"), datastore, k=2, batch_size=2, **options)
        bos = model.tok_encode("retro")[0]
        model.tokenizer.bos_token_id = model.model.config.get_text_config().bos_token_id = bos
        asked = [("retro up in", " a datastore"), ("retro in a", " datastore")]
        assert all(model.tok_encode(prompt)[0] == bos for prompt, _ in asked)
        answered = model.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True)
        document = {"passages": passages}
        arguments = [(prompt, generation) for prompt, _ in asked]
        instances = [Instance("generate_until", document, given, n) for n, given in enumerate(arguments)]
        found[name] = answered, model.generate_until(instances, disable_tqdm=True)
    np.testing.assert_allclose(*([value for value, _ in each[0]] for each in found.values()), rtol=0, atol=1e-4)
    assert found["in_order"][1] == found["in_front"][1]
    text = torch.tensor(
        [[bos, *(token for text in passages for token in model.tok_encode(text)), *model.tok_encode("retro in a")[1:]]]
    )
    with model.model.retrieval(False):
        expected = model.model.generate(text, max_new_tokens=3, do_sample=False)[0, text.shape[1] :]
    assert found["in_front"][1][1] == model.tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("k", [1, 2])
def test_in_front_is_the_base_with_the_neighbors_in_front_of_the_question(folders, datastore, k):
    base = AutoModelForCausalLM.from_pretrained(folders / "decoder").eval()
    model = RetroLM(str(folders / "joint"), datastore, k=k, in_front=True, batch_size=3)
    found = answers(model)
    retriever = RetroRetriever(datastore)
    for (likelihood, _), text, (question, answer) in zip(found["questions"], found["generated"], QUESTIONS[:4]):
        context, answer = model._encode_pair(question, answer)
        fronts = []
        for tokens in (context, model.tok_encode(question)):
            neighbors = last_chunk(retriever, tokens)(k)
            fronts.append(neighbors.neighbor_input_ids[neighbors.neighbor_attention_mask].tolist() + tokens)
        ids = torch.tensor([fronts[0] + answer])
        with torch.no_grad():
            log_probs = base(ids).logits[0].log_softmax(-1)[-len(answer) - 1 : -1]
        expected = log_probs.gather(1, torch.tensor(answer)[:, None]).sum().item()
        assert likelihood == pytest.approx(expected, abs=1e-4)
        output = base.generate(torch.tensor([fronts[1]]), max_new_tokens=10, do_sample=False)
        written = datastore.tokenizer.decode(output[0, len(fronts[1]) :], skip_special_tokens=True)
        assert text == written.split("\n")[0]
    stock = HFLM(base, tokenizer=copy.deepcopy(datastore.tokenizer))
    np.testing.assert_allclose(found["text"], answers(stock)["text"], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="in_front is true and retrieval false"):
        RetroLM(str(folders / "joint"), datastore, in_front=True, retrieval=False)
    with pytest.raises(ValueError, match="no token for the question"):
        answers(RetroLM(str(folders / "joint"), datastore, in_front=True, max_length=11))


def test_a_wrapped_model_takes_a_reader(folders, datastore, tmp_path):
    fields = {"neighbor_adapter": {"r": 2}, "row_adapter": {"r": 2}}
    trained = RetroJointForCausalLM.from_decoder_pretrained(folders / "decoder", chunk_size=8, **fields)
    with torch.no_grad():
        for name, weight in trained.named_parameters():
            if ".lora_" in name:
                weight.normal_()
    trained.freeze_decoder()
    trained.save_pretrained(tmp_path, retrofit_only=True)
    loaded = RetroLM(str(folders / "decoder"), datastore, reader=str(tmp_path))
    assert_same_answers(answers(loaded), answers(RetroLM(trained, datastore)), tolerance=1e-5)


def test_the_datastores_tokenizer_stays_as_it_was(folders, datastore):
    tokenizer = datastore.tokenizer
    before = tokenizer.padding_side, tokenizer.pad_token_id
    answers(RetroLM(str(folders / "cross"), datastore))
    assert datastore.tokenizer is tokenizer and (tokenizer.padding_side, tokenizer.pad_token_id) == before
    with pytest.raises(ValueError, match="k is 0"):
        RetroLM(str(folders / "cross"), datastore, k=0)


@pytest.mark.parametrize("retrieval", ["true", "false"])
def test_the_command_writes_the_results_of_tasks(folders, tiny_datastore_dir, retrieval, tmp_path, capsys):
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in QUESTIONS[:4]))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(
        json.dumps(
            {
                "task": "tiny_answers",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(data)}},
                "test_split": "test",
                "output_type": "loglikelihood",
                "doc_to_text": "{{q}}",
                "doc_to_target": "{{a}}",
                "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
            }
        )
    )
    options = ["--model", str(folders / "joint"), "--datastore", str(tiny_datastore_dir), "--tasks", "tiny_answers"]
    options += ["--task_folder", str(tmp_path / "tasks"), "--output_dir", str(tmp_path / "out"), "--batch_size", "4"]
    main(["lm-eval", *options, "--retrieval", retrieval])
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    perplexity = report["results"]["tiny_answers"]["perplexity,none"]
    model = RetroLM(str(folders / "joint"), str(tiny_datastore_dir), retrieval=retrieval == "true")
    found = model.loglikelihood(requests("loglikelihood", QUESTIONS[:4]), disable_tqdm=True)
    assert perplexity == pytest.approx(math.exp(-np.mean([value for value, _ in found])), rel=1e-4)
    assert report["arguments"]["retrieval"] == (retrieval == "true")
    assert report["seconds"] > 0
    assert "tiny_answers" in (tmp_path / "out" / "results.md").read_text()
    assert "tiny_answers" in capsys.readouterr().out


def test_questions_are_lines_and_definitions_of_the_text():
    generator = np.random.default_rng(0)
    lines = ["import os", "", "", "def first():", "    return os.getcwd()", "}", "    # the last line"]
    drawn = [next_line_questions("\n".join(lines), generator)[0] for _ in range(20)]
    assert {each["answer"] for each in drawn} == {"return os.getcwd()", "# the last line"}
    for each in drawn:
        n = [line.strip() for line in lines].index(each["answer"])
        assert each["question"] == "\n".join(lines[:n]) + "\n   "
    assert next_line_questions("\n".join(lines), generator, max_lines=1)[0]["question"].count("\n") == 1
    assert next_line_questions("one\ntwo\nthree\nfour\nshort", generator) == []
    text = (
        "Much is said.\nA gate is a learned scalar that starts at zero. It opens.\nthis is not a term at all, is it.\n"
    )
    assert definition_questions(text, generator) == [
        {"question": "A gate is", "answer": "a learned scalar that starts at zero."}
    ]
    for text in ("Nothing here.", "This is a learned scalar that starts at zero.", "It is a scalar that is learned."):
        assert definition_questions(text, generator) == []


def test_scores_of_lines_and_definitions():
    line = {"answer": "return os.getcwd()"}
    assert score_line(line, ["    return os.getcwd()\n\n"]) == {"exact_match": 1.0, "edit_similarity": 1.0}
    found = score_line(line, ["return os.getpid()"])
    assert found["exact_match"] == 0 and 0.7 < found["edit_similarity"] < 1
    definition = {"answer": "a learned scalar that starts at zero."}
    assert score_definition(definition, [" a learned scalar that starts at one"])["exact_match"] == 1
    assert score_definition(definition, [" a learned vector that starts at zero"])["exact_match"] == 0
    assert score_definition(definition, [" a learned scalar that starts at zero"])["edit_similarity"] == 1


def test_tasks_made_of_a_datastore_are_run(folders, tiny_tokenizer, tiny_encoder_dir, tmp_path):
    texts = {
        "train": [f"Thing{n} is a retro datastore that looks things up {n} times.\nUp.\n" for n in range(12)],
        "validation": ["\n".join(f"looks things up in a {word} {n}" for n in range(9)) for word in ("retro", "naïve")],
    }
    for split, documents in texts.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        chunk_documents(tmp_path / f"{split}.jsonl", tmp_path / "datastore", tiny_tokenizer, split=split, chunk_size=8)
        embed_chunks(tmp_path / "datastore", tiny_encoder_dir, split=split)
    build_index(tmp_path / "datastore", factory="Flat")
    main(
        ["lm-eval-tasks", "--datastore", str(tmp_path / "datastore"), "--output_dir", str(tmp_path / "tasks")]
        + ["--num_questions", "10", "--num_passages", "2"]
    )
    # No fact fits in a neighbor of 16 tokens.
    assert sorted(path.stem for path in (tmp_path / "tasks").glob("*.yaml")) == [
        "retro_definitions",
        "retro_next_line",
    ]
    questions = {
        name: [json.loads(line) for line in (tmp_path / "tasks" / f"retro_{name}.jsonl").read_text().splitlines()]
        for name in ("next_line", "definitions")
    }
    assert [len(asked) for asked in questions.values()] == [2, 10]
    assert all(f"{each['question']} {each['answer']}\nUp.\n" in texts["train"] for each in questions["definitions"])
    assert all(
        any(text.startswith(each["question"] + each["answer"]) for text in texts["validation"])
        for each in questions["next_line"]
    )
    options = ["--model", str(folders / "joint"), "--datastore", str(tmp_path / "datastore"), "--batch_size", "4"]
    options += ["--task_folder", str(tmp_path / "tasks"), "--tasks", "retro_next_line", "retro_definitions"]
    main(["lm-eval", *options, "--output_dir", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    for name in ("retro_next_line", "retro_definitions"):
        assert results[name]["exact_match,none"] == 0
        assert 0 <= results[name]["edit_similarity,none"] < 1


def test_questions_are_written_with_their_passages(tiny_tokenizer, tmp_path):
    lines = ["looks things up in a retro datastore: " + " ".join(["things"] * n) + "." for n in range(9)]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": " ".join(lines)}) + "\n")
        chunk_documents(
            tmp_path / f"{split}.jsonl", tmp_path / "datastore", tiny_tokenizer, split=split, chunk_size=64
        )
    options = ["--num_questions", "5", "--num_passages", "1", "3", "--output_dir", str(tmp_path / "tasks")]
    main(["lm-eval-tasks", "--datastore", str(tmp_path / "datastore"), *options])
    tasks = tmp_path / "tasks"
    assert {"retro_one_key_1.yaml", "retro_one_key_3.yaml"} <= {path.name for path in tasks.iterdir()}
    asked = [json.loads(line) for line in (tasks / "retro_one_key_3.jsonl").read_text().splitlines()]
    texts = [" ".join(lines)]
    assert asked == hidden_questions("one_key", texts, tiny_tokenizer, 3, num_questions=5, max_tokens=128)
    assert all(len(tiny_tokenizer(text)["input_ids"]) <= 128 for each in asked for text in each["passages"])
