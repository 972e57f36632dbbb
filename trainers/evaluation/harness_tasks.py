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
"""
Tasks for the [lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness), made from the texts of a
datastore: the next line of held-out documents, the definitions of terms in the documents that are searched, and
questions about given passages of these documents: what they say, and facts that are hidden in them.
"""

import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from transformers.utils import logging

from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.datastore.splits import DatastoreSplit
from modeling_retro.durable_files_retro import write_text

from .questions import KINDS, MAX_ANSWER_TOKENS
from .text_questions import ANSWER_WORDS, DEFINITION, TEXT_KINDS, make_questions


logger = logging.get_logger(__name__)

SCORING = """\
from trainers.evaluation.harness_tasks import score_definition, score_line
from trainers.evaluation.questions import score_no_answer, score_question
"""
NUM_TEXTS = 500  # from which passages are drawn


def next_line_questions(text: str, generator: np.random.Generator, max_lines: int = 40) -> list[dict[str, str]]:
    """
    One line of a text as an answer, and the lines in front of it as the question. The question also holds the
    indentation of the line except its last character, because tokenizers join a line break with the spaces behind it,
    except the last one. Behind a bare line break, a model expects a line without indentation.

    Args:
        text (`str`): The text.
        generator (`np.random.Generator`): Draws the line, of those with four lines in front and ten characters.
        max_lines (`int`, *optional*, defaults to 40): Number of lines of a question.

    Returns:
        `list[dict[str, str]]`: one `{"question", "answer"}`, or none if there is no such line.
    """
    lines = text.split("\n")
    choices = [n for n in range(4, len(lines)) if len(lines[n].strip()) >= 10]
    if not choices:
        return []
    n = int(generator.choice(choices))
    indentation = lines[n][: len(lines[n]) - len(lines[n].lstrip())]
    question = "\n".join([*lines[max(0, n - max_lines) : n], indentation[:-1]])
    return [{"question": question, "answer": lines[n].strip()}]


def definition_questions(text: str, generator: np.random.Generator) -> list[dict[str, str]]:
    """
    A definition in a text, such as "A gate is a learned scalar that starts at zero.", as the question "A gate is" and
    its answer.

    Args:
        text (`str`): The text.
        generator (`np.random.Generator`): Draws the definition.

    Returns:
        `list[dict[str, str]]`: one `{"question", "answer"}`, or none if the text defines nothing.
    """
    found = [match for match in DEFINITION.finditer(text) if len(match["text"].split()) >= ANSWER_WORDS]
    if not found:
        return []
    match = found[int(generator.integers(len(found)))]
    return [{"question": f"{match['term']} {match['verb']}", "answer": match["text"].strip()}]


def score_line(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """Whether a generated line is the answer, and how similar it is, both without white space around it."""
    line = results[0].strip().split("\n")[0].strip()
    return {"exact_match": float(line == doc["answer"]), "edit_similarity": _similarity(line, doc["answer"])}


def score_definition(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """Whether a generated definition begins with the same five words, and how similar it is."""
    found, answer = results[0].strip(), doc["answer"].removesuffix(".")
    same = found.split()[:ANSWER_WORDS] == answer.split()[:ANSWER_WORDS]
    return {"exact_match": float(same), "edit_similarity": _similarity(found, answer)}


def _similarity(found: str, answer: str) -> float:
    return difflib.SequenceMatcher(None, found, answer, autojunk=False).ratio()


TASKS: dict[str, tuple[Callable[..., list[dict[str, str]]], str, dict[str, Any]]] = {
    "retro_next_line": (next_line_questions, "score_line", {"until": ["\n"], "max_gen_toks": 64}),
    "retro_definitions": (definition_questions, "score_definition", {"until": ["\n", "."], "max_gen_toks": 64}),
}


def write_tasks(
    datastore: RetroDatastore,
    output_dir: str | Path,
    split: str = "validation",
    num_questions: int = 200,
    seed: int = 0,
    num_passages: Sequence[int] = (1, 2, 4, 10, 32),
) -> dict[str, int]:
    """
    Writes tasks of the harness. `retro_next_line` is made from the held-out documents. From the documents that are
    searched come `retro_definitions` and questions with passages, such as `retro_one_key_4` and `retro_lookup_4` (see
    [`~trainers.evaluation.text_questions.make_questions`]). A task for which the texts hold no questions is left out.

    Args:
        datastore ([`RetroDatastore`]): The datastore.
        output_dir (`str` or `Path`): Folder for the tasks, which `--task_folder` of `retro lm-eval` takes.
        split (`str`, *optional*, defaults to `"validation"`): The held-out documents.
        num_questions (`int`, *optional*, defaults to 200): Largest number of questions of a task, one a document.
        seed (`int`, *optional*, defaults to 0): Seed of the documents and of the places in them.
        num_passages (`Sequence[int]`, *optional*, defaults to `(1, 2, 4, 10, 32)`):
            Numbers of passages of the questions that have passages. Each is a task.

    Returns:
        `dict[str, int]`: the number of questions of each task.

    Raises:
        ValueError: If no task has a question.
    """
    output_dir = Path(output_dir).resolve()
    written = {}
    for name, source in (("retro_next_line", datastore.split(split)), ("retro_definitions", datastore)):
        make, score, generation = TASKS[name]
        generator = np.random.default_rng(seed)
        questions: list[dict[str, Any]] = []
        for text in _texts(source, datastore.tokenizer, generator):
            questions += make(text, generator)
            if len(questions) == num_questions:
                break
        if not questions:
            continue
        task = {
            "doc_to_text": "question",
            "doc_to_target": "answer",
            "generation_kwargs": generation,
            "metric_list": ["exact_match", "edit_similarity"],
        }
        _write_task(output_dir, name, questions, score, task)
        written[name] = len(questions)
    texts = list(islice(_texts(datastore, datastore.tokenizer, np.random.default_rng(seed)), NUM_TEXTS))
    for kind, number in product((*KINDS, *TEXT_KINDS), num_passages):
        try:
            questions = make_questions(
                kind, texts, datastore.tokenizer, number, num_questions, seed, datastore.neighbor_length
            )
        except ValueError as error:
            logger.warning(f"No questions of the kind {kind} with {number} passages are written: {error}.")
            continue
        score = "score_no_answer" if kind == "no_answer" else "score_question"
        task = {
            "doc_to_text": "Question: {{question}}\nAnswer: {{prefix}}",
            "doc_to_target": "{{answers[0] | join(' ')}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": MAX_ANSWER_TOKENS},
            "metric_list": ["invented"] if kind == "no_answer" else ["exact_match", "f1"],
        }
        name = f"retro_{kind}_{number}"
        _write_task(output_dir, name, questions, score, task)
        written[name] = len(questions)
    if not written:
        raise ValueError("the documents have neither lines to continue nor definitions to ask for nor room for facts")
    write_text(output_dir / "retro_scoring.py", SCORING)
    return written


def _write_task(
    output_dir: Path, name: str, questions: Sequence[dict[str, Any]], score: str, task: dict[str, Any]
) -> None:
    """Writes the questions and the YAML file of a task."""
    data = output_dir / f"{name}.jsonl"
    write_text(data, "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in questions))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        **task,
        "generation_kwargs": {**task["generation_kwargs"], "do_sample": False},
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": metric != "invented"}
            for metric in task["metric_list"]
        ],
    }
    # The harness's own tag, which no YAML library writes.
    text = yaml.safe_dump(task, sort_keys=False) + f"process_results: !function retro_scoring.{score}\n"
    write_text(output_dir / f"{name}.yaml", text)


def _texts(source: RetroDatastore | DatastoreSplit, tokenizer: Any, generator: np.random.Generator) -> Iterator[str]:
    """The documents in random order, as texts."""
    starts = np.flatnonzero(np.diff(np.asarray(source.chunks.document_id), prepend=-1))
    ends = np.append(starts[1:], len(source.chunks))
    for n in generator.permutation(len(starts)):
        tokens, mask = source.chunks.take(np.arange(starts[n], ends[n]))
        yield tokenizer.decode(tokens[mask], skip_special_tokens=True)


__all__ = ["definition_questions", "next_line_questions", "score_definition", "score_line", "write_tasks"]
