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
"""Each call of another package on the page of migration has a counterpart whose options and arguments exist."""

import ast
import dataclasses
import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

import data_prep
import modeling_retro
import trainers
from modeling_retro import ChunkEncoder, RetroForCausalLM, RetroRetriever
from trainers.cli import COMMANDS


TEXT = (Path(__file__).parents[1] / "docs" / "migration.md").read_text(encoding="utf-8")
ROWS = [
    tuple(cell.strip() for cell in row.strip("|").split("|"))
    for row in re.findall(r"^\|.*\|$", TEXT, re.MULTILINE)
    if not set(row) <= set("|- ") and row != "| there | here |"
]
# What a variable of the page is
OBJECTS = {"model": RetroForCausalLM, "retriever": RetroRetriever, "encoder": ChunkEncoder}
CALLED = {
    "text_folder_to_chunks_",
    "chunks_to_index_and_embed",
    "chunks_to_precalculated_knn_",
    "bert_embed(token_ids)",
    "return_cls_repr=True",
    "RETRODataset",
    "TrainingWrapper",
    "REPROCESS=1",
    "max_index_memory_usage",
    "tokenize_and_chunk.py",
    "embed_chunks.py",
    "train_faiss_index.py",
    "build_faiss_index.py",
    "retrieve_neighbours.py",
    "index.spec.json",
    "data.spec.json",
    "MultipleNegativesRankingLoss",
    "InputExample",
    "mine_hard_negatives",
    "MultiDatasetDataLoader",
}


def test_the_tables_name_the_calls_of_the_other_packages():
    there = "\n".join(row[0] for row in ROWS)
    assert {call for call in CALLED if call not in there} == set()


def named(name):
    for package in (modeling_retro, data_prep, trainers):
        if name in package.__all__:
            return getattr(package, name)
    return {"DataLoader": DataLoader}[name]


def check_python(code):
    """Raises unless the names that a piece of Python calls exist and take the keywords that it gives."""
    tree = ast.parse(code.replace("…", "..."), mode="eval")
    if isinstance(tree.body, ast.Name):
        name = tree.body.id
        assert name in inspect.signature(RetroForCausalLM.forward).parameters or named(name) is not None
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        if isinstance(call.func, ast.Name) and call.func.id in OBJECTS:
            function = OBJECTS[call.func.id].forward
        elif isinstance(call.func, ast.Name):
            function = named(call.func.id)
        else:
            owner = call.func.value.id
            function = getattr(OBJECTS[owner] if owner in OBJECTS else named(owner), call.func.attr)
        parameters = inspect.signature(function).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        assert takes_all or {keyword.arg for keyword in call.keywords} <= parameters.keys(), code


class Parsed(Exception):
    pass


def classes_of(command, options, monkeypatch):
    """Lets a command parse its options, and returns the classes that hold them."""
    module = importlib.import_module(COMMANDS[command][0])
    parse_arguments, classes = module.parse_arguments, []

    def parse_only(*args, **kwargs):
        classes.extend([*args, kwargs.get("training_options")])
        if options:
            parse_arguments(*args, **kwargs)
        raise Parsed

    with monkeypatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(module, "parse_arguments", parse_only)
        module.main(options)
    return [found for found in classes if found is not None]


@pytest.mark.parametrize(("there", "here"), ROWS, ids=[row[0][:40] for row in ROWS])
def test_the_counterpart_of_a_call_exists(there, here, monkeypatch):
    spans = re.findall(r"`([^`]+)`", here)
    commands = [shlex.split(span)[1:] for span in spans if span.startswith("retro ")]
    fields = set()
    for command, *options in commands:
        for found in classes_of(command, options, monkeypatch):
            fields |= {field.name for field in dataclasses.fields(found)}
    assert spans or "not needed" in here or "nothing to write" in here or "any optimizer" in here
    for span in spans:
        if span.startswith("--"):
            assert span[2:] in fields, span
        elif re.match(r"[A-Za-z_.]+(\(.*\))?$", span) and span not in ("train", "loss"):
            check_python(span)
