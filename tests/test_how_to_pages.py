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
The how-to pages are walked through: what they tell to type is run as it stands, page after page in one folder, in
which the folders of a tiny tokenizer, decoder and encoder have the names of those on the Hub. Blocks of `text` and
`py` are shown only.
"""

import gzip
import json
import os
import random
import shlex

import pytest
from conftest import make_texts, write_jsonl
from mixed_folder import mixed_folder, plain_texts
from test_documentation import ROOT, all_commands, commands_of, fenced_blocks
from tiny_models import tiny_llama

from modeling_retro import RetroDatastore
from trainers.cli import main as retro


# In this order: later pages use what earlier ones made.
PAGES = [
    "tutorial",
    "own_documents",
    "data_flow",
    "training",
    "evaluation",
    "generation",
    "retrofit",
    "../README",
    "semantics",
    "retriever",
    "cluster",
    "recipes",
    "living_datastore",
    "neighbors",
]

# What needs the network, an archive or minutes, and the test that runs it otherwise, on data of its own.
NOT_RUN = {
    "retro quickstart": "test_quickstart.py",
    "retro pairs --download": "test_pairs.py",
    "retro stackexchange": "test_stackexchange.py",
    "retro train-retriever --model_name_or_path encoder --pairs mined/pairs": "test_mine_neighbors.py",
    "retro evaluate-retriever --encoder encoder --beir": "test_retriever_evaluation.py",
    "retro lessons": "test_lessons.py",
    "retro reader": "test_lessons.py",
    "retro train --datastore datastore --lessons": "test_lessons.py",
    "retro serve": "test_serve.py",
    "retro demo": "test_demo.py",
}


def is_run(command):
    return not any(command.startswith(prefix) for prefix in NOT_RUN)


def write_pairs(path, number, scored=False):
    generator = random.Random(number)
    texts = make_texts(2 * number, seed=number, max_words=12)
    texts = [f"{index} {text.strip()}" for index, text in enumerate(texts)]  # none twice
    records = list(zip(texts[::2], texts[1::2], strict=True))
    if scored:
        records = [{"sentence1": a, "sentence2": b, "score": generator.random()} for a, b in records]
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_tokenizer, tiny_encoder_dir):
    """A folder with what the pages suppose: documents, pairs, and models under their names on the Hub."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "sentence-transformers").mkdir()
    (folder / "sentence-transformers" / "all-MiniLM-L6-v2").symlink_to(tiny_encoder_dir)
    special = {"eos_token_id": tiny_tokenizer.eos_token_id, "pad_token_id": tiny_tokenizer.pad_token_id}
    for target in (tiny_llama(len(tiny_tokenizer), hidden_size=32, **special), tiny_tokenizer):
        target.save_pretrained(folder / "HuggingFaceTB" / "SmolLM2-135M")
        target.save_pretrained(folder / "smollm2")
    (folder / "minilm").symlink_to(tiny_encoder_dir)
    chat = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    settings = json.loads((folder / "smollm2" / "tokenizer_config.json").read_text()) | {"chat_template": chat}
    (folder / "smollm2" / "tokenizer_config.json").write_text(json.dumps(settings))
    mixed_folder(folder / "my_documents", plain_texts(130))
    write_jsonl(folder / "documents.jsonl", make_texts(16, seed=2))
    write_jsonl(folder / "held_out.jsonl", make_texts(3, seed=3))
    write_jsonl(folder / "more.jsonl", make_texts(3, seed=4))
    for name, letters in (("articles", "ab"), ("changed", "bc")):
        records = [
            {"name": f"{a}{n}", "text": f"text {t}"}
            for a in letters
            for n, t in enumerate(make_texts(6, seed=len(name)))
        ]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (folder / "documents").mkdir()
    (folder / "my_texts").mkdir()
    for number, text in enumerate(make_texts(16, seed=5)):
        (folder / "documents" / f"{number}.txt").write_text(text, encoding="utf-8")
    write_jsonl(folder / "my_texts" / "train.jsonl", [text + " retro looks things up" * 5 for text in make_texts(4)])
    write_pairs(folder / "pairs.jsonl.gz", 100)
    write_pairs(folder / "held-out.jsonl", 10)
    write_pairs(folder / "sts.jsonl", 10, scored=True)
    rows = "".join(f"the sentence {number},its like {number},{number % 6}\n" for number in range(12))
    (folder / "stsb.csv.gz").write_bytes(gzip.compress(f"sentence1,sentence2,score\n{rows}".encode()))
    return folder


def walk(page):
    """Runs the blocks of a page in order, in the current folder, and returns the names that its Python made."""
    namespace = {}
    for language, block in fenced_blocks(page):
        if language == "yaml":
            name = block.splitlines()[0].removeprefix("# ")
            with open(name, "w", encoding="utf-8") as file:
                file.write(block)
        elif language == "bash":
            for command in commands_of(block):
                if is_run(command):
                    retro(shlex.split(command)[1:])
        elif language == "python":
            exec(compile(block, page.name, "exec"), namespace)
    return namespace


@pytest.fixture(scope="module")
def walked(workplace):
    """What became of each page: the names that its Python made, or the exception that ended it."""
    results = {}
    before = os.getcwd()
    os.chdir(workplace)
    try:
        for name in PAGES:
            try:
                results[name] = walk(ROOT / "docs" / f"{name}.md")
            except (Exception, SystemExit) as error:
                results[name] = error
    finally:
        os.chdir(before)
    return results


@pytest.mark.parametrize("name", PAGES)
def test_page_runs_from_top_to_bottom(walked, name):
    if isinstance(walked[name], BaseException):
        raise walked[name]


def test_the_pages_made_what_they_promise(walked, workplace):
    assert walked["semantics"]["outputs"].logits.shape == (1, 512, 32000)  # of the model in one call
    assert walked["training"]["batch"]["neighbor_input_ids"].shape[1:] == (16, 2, 128)  # of the ten statements
    numbers = json.loads((workplace / "evaluation" / "evaluation.json").read_text())
    assert set(numbers["bits_per_byte"]) == {"off", "random", "on"}
    assert (workplace / "adapter" / "retrofit.safetensors").is_file()
    tokenizer = json.loads((workplace / "datastore" / "datastore.json").read_text())["tokenizer"]["sha256"]
    for model in ("model", "smollm2-retro", "retrofitted"):
        assert json.loads((workplace / model / "config.json").read_text())["tokenizer_sha256"] == tokenizer
    assert "| on k=1 |" in (workplace / "model" / "README.md").read_text()
    assert 'from_pretrained("trained"' in (workplace / "trained" / "README.md").read_text()
    chunks = [
        json.loads((workplace / name / "datastore.json").read_text())["splits"]["train"]["chunks"]["num_chunks"]
        for name in ("from_python", "from_recipe")
    ]
    assert chunks[0] < chunks[1]
    sources = RetroDatastore.from_pretrained(workplace / "first_datastore").sources([0])
    assert sources[0].id.startswith("my_documents/")


def test_what_is_not_run_here_is_run_elsewhere():
    written = [command for command, _ in all_commands()]
    for prefix, test in NOT_RUN.items():
        assert any(command.startswith(prefix) for command in written)
        assert list((ROOT / "tests").rglob(test))
    pages = {ROOT / "docs" / f"{name}.md" for name in PAGES}
    assert {page for command, page in all_commands() if is_run(command)} <= {page.resolve() for page in pages}
