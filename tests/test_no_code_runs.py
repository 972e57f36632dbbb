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
"""No command runs code that a model, a tokenizer or an encoder brings, and none asks whether it may."""

import ast
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import make_texts, write_jsonl
from tiny_models import tiny_llama

from modeling_retro import RetroForCausalLM, RetroJointForCausalLM
from trainers import cli


ROOT = Path(__file__).parents[1]


def test_each_loader_says_whether_it_trusts():
    """Without `trust_remote_code`, the Auto classes of transformers ask on standard input."""
    found = 0
    for package in ("modeling_retro", "data_prep", "trainers", "serving"):
        for file in sorted((ROOT / package).rglob("*.py")):
            for call in ast.walk(ast.parse(file.read_text())):
                if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
                    continue
                owner = ast.unparse(call.func.value)
                if call.func.attr != "from_pretrained" or not (owner.startswith("Auto") or owner == "auto_class"):
                    continue
                found += 1
                names = {keyword.arg or ast.unparse(keyword.value) for keyword in call.keywords}
                shipped = file.name in ("retrofit_retro.py", "modeling_retro_joint.py") and {"trust", "kwargs"} & names
                # A GGUF file brings no code, and the small model that comes with the package none of a stranger.
                harmless = "gguf_file" in names or ast.unparse(call.args[0]) == "RETRO_TINY"
                assert "trust_remote_code" in names or shipped or harmless, (file, ast.unparse(call))
    assert found >= 15


@pytest.fixture
def evil(tmp_path):
    """A folder that claims to be a model of any kind with a tokenizer, and brings the code of both."""
    folder = tmp_path / "evil"
    folder.mkdir()
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as T\n"
    (folder / "evil.py").write_text(code)
    autos = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"), "evil.T")
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": autos}))
    tokenizer = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


COMMANDS = [
    "chunk --input {texts} --tokenizer {evil} --output_dir {out}",
    "embed --datastore {datastore} --encoder {evil}",
    "retrofit --base {evil} --output_dir {out}",
    "retrofit --base {evil} --output_dir {out} --attention joint",
    "train --model {evil} --datastore {datastore} --output_dir {out}",
    "evaluate --model {evil} --datastore {datastore} --output_dir {out}",
    "generate --model {evil} --datastore {datastore} --prompt a",
    "serve --model {evil} --datastore {datastore} --port 0",
    "teach --model {evil} --datastore {datastore} --output_dir {out}",
    "lm-eval --model {evil} --datastore {datastore} --tasks x --output_dir {out}",
    "mine-neighbors --model {evil} --datastore {datastore} --output_dir {out}",
    "train-retriever --pairs {pairs} --model_name_or_path {evil} --output_dir {out}",
    "evaluate-retriever --pairs {pairs} --encoder {evil}",
    "mine-negatives --encoder {evil} --pairs {pairs} --output_file {out}.jsonl",
    "distill-encoder --encoder {evil} --output_dir {out}",
    "quickstart --model {evil} --data {texts} --output_dir {out}",
    "train-span-corruption --model_name_or_path {evil} --tasks {tasks} --max_steps 1 --output_dir {out}",
    "verify {evil}",
]


@pytest.mark.hostile(
    "a model, tokenizer or encoder that a user names in a command, which brings code, and a `y` on standard input",
    "the code is not run and nothing is asked; the command refuses it in one line",
)
@pytest.mark.parametrize("command", COMMANDS, ids=[command.partition(" {")[0] for command in COMMANDS])
def test_no_command_runs_code_or_asks(evil, tmp_path, tiny_datastore_dir, monkeypatch, capsys, command):
    texts = write_jsonl(tmp_path / "texts.jsonl", make_texts(9))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"anchor": "a text", "positive": "another"}\n' * 4)
    datastore = shutil.copytree(tiny_datastore_dir, tmp_path / "datastore")
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(f"tasks: {{a: {{source: {texts}}}}}\nfeatures: {{input_length: 32}}\ntrain: {{a: 1.0}}\n")
    values = {
        "tasks": tasks,
        "evil": evil,
        "texts": texts,
        "pairs": pairs,
        "datastore": datastore,
        "out": tmp_path / "out",
    }
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(SystemExit) as ended:
        cli.main([word.format(**values) for word in command.split()])
    printed = capsys.readouterr()
    assert ended.value.code == 1 and sys.stdin.read() == "y\n" * 9 and not (tmp_path / "ran").exists()
    if command.startswith("verify"):
        assert "config.json is not that of a RETRO model" in printed.out
    else:
        assert "needs code of its own, which is never run" in printed.err.splitlines()[-1], printed.err


def test_a_retrofit_does_not_run_the_code_of_its_base(evil, tmp_path, monkeypatch):
    """The base is named by the model, which may be that of a stranger, unless the user names it."""
    tiny_llama(300).save_pretrained(tmp_path / "base")
    for model_class, options in ((RetroJointForCausalLM, {}), (RetroForCausalLM, {"cross_attention_layers": [0]})):
        model = model_class.from_decoder_pretrained(str(tmp_path / "base"), chunk_size=8, **options)
        model.freeze_decoder()
        shutil.copy(tmp_path / "base" / "model.safetensors", evil)
        model.config.base_model_name_or_path = str(evil)
        model.save_pretrained(tmp_path / "model", retrofit_only=True)
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
        for trusts in ({}, {"trust_remote_code": True}):
            with pytest.raises(ValueError, match="trust_remote_code"):
                model_class.from_pretrained(tmp_path / "model", **trusts)
        assert sys.stdin.read() == "y\n" * 9 and not (tmp_path / "ran").exists()
