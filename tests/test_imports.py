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
"""What is imported before it is needed: modules are counted in a fresh process, no time is measured."""

import json
import subprocess
import sys

import pytest
from test_modeling_retro import make_model
from tiny_joint import make_joint

from trainers.cli import COMMANDS


HEAVY = ["torch", "transformers", "datasets", "pyarrow", "faiss", "accelerate"]
HELP = "from trainers.cli import main\nfor words in {words}:\n    try: main(words)\n    except SystemExit: pass\n"


def imported_after(statements, *arguments):
    """Names of the modules that are imported after some statements."""
    code = f"{statements}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    process = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stderr.splitlines()[-1])


@pytest.fixture(scope="module")
def modules_of_transformers():
    return imported_after("import transformers")


def heavy(modules):
    return [name for name in HEAVY if name in modules]


def test_importing_the_package_imports_none_of_its_requirements():
    modules = imported_after("import modeling_retro")
    assert heavy(modules) == []
    assert [name for name in modules if name.startswith("modeling_retro.")] == ["modeling_retro.auto_classes"]


@pytest.mark.parametrize("package", ["modeling_retro", "data_prep", "trainers", "serving"])
def test_every_name_of_a_package_is_found(package):
    code = f"import {package}\nfor name in {package}.__all__: getattr({package}, name)\n"
    code += f"assert set({package}.__all__) <= set(dir({package}))"
    assert "faiss" in imported_after(code)


@pytest.mark.parametrize("package", ["data_prep", "trainers", "serving"])
def test_a_package_without_its_names_imports_nothing_heavy(package):
    assert heavy(imported_after(f"import {package}")) == []


def test_a_model_comes_without_faiss_and_datasets():
    modules = imported_after("from modeling_retro import RetroForCausalLM, RetroJointForCausalLM")
    assert heavy(modules) == ["torch", "transformers", "accelerate"]


def test_chunking_comes_without_the_configuration_of_a_model():
    """It would bring the compiler of torch, which takes half as long again as all that chunking needs."""
    modules = imported_after("import data_prep.chunk")
    assert not {"modeling_retro.configuration_retro", "torch._dynamo"} & set(modules)


def test_list_of_commands_imports_nothing_heavy():
    assert heavy(imported_after(HELP.format(words=[["--help"]]))) == []


def test_help_of_every_command_imports_no_more_than_transformers_itself(modules_of_transformers):
    modules = imported_after(HELP.format(words=[[command, "--help"] for command in COMMANDS]))
    assert heavy(modules) == ["transformers"]
    others = [name for name in modules if name.split(".")[0] not in ("trainers", "data_prep", "modeling_retro")]
    assert len(others) <= len(modules_of_transformers) + 20


@pytest.mark.parametrize(
    "words",
    [
        ["chunk", "--input", "x", "--output_dir", "y", "--tokenizer", "z", "--chunk_size", "many"],
        ["embed"],
        ["index", "--datastore", "x", "--metric", "cosine"],
        ["evaluate", "--model", "x", "--datastore", "y", "--output_dir", "z", "--dtype", "float8"],
        ["quickstart", "--steps", "3"],
        ["train", "--datastore", "x", "--row_chunks", "many"],
        ["train", "--output_dir", "x"],
        ["train-retriever", "--pairs", "x", "--pooling", "max"],
        ["train-span-corruption", "--output_dir", "x"],
    ],
    ids=" ".join,
)
def test_a_wrong_option_is_reported_before_torch_is_imported(words):
    code = f"""
import sys
from trainers.cli import main
try:
    main({words})
except SystemExit as exit:
    assert exit.code in (1, 2), exit.code
else:
    raise AssertionError("the options were taken")
"""
    assert heavy(imported_after(code)) == ["transformers"]


LOADS = """
import sys
{imports}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
config = AutoConfig.from_pretrained(sys.argv[1])
assert type(model).__module__.startswith("modeling_retro."), type(model)
assert type(model).__name__ == sys.argv[2] and type(model) is getattr(modeling_retro, sys.argv[2])
assert type(config) is type(model.config)
"""
ORDERS = {
    "package first": "import modeling_retro\nfrom transformers import AutoConfig, AutoModelForCausalLM",
    "transformers first": "from transformers import AutoConfig, AutoModelForCausalLM\nimport modeling_retro",
}


@pytest.mark.parametrize("imports", ORDERS.values(), ids=ORDERS.keys())
@pytest.mark.parametrize("make", [make_model, make_joint], ids=["retro", "retro_joint"])
def test_auto_classes_know_the_models_once_the_package_is_imported(tmp_path, make, imports):
    model = make()
    model.save_pretrained(tmp_path)
    imported_after(LOADS.format(imports=imports), str(tmp_path), type(model).__name__)


@pytest.mark.parametrize("imports", ORDERS.values(), ids=ORDERS.keys())
def test_entering_the_models_imports_none_of_them(imports):
    modules = imported_after(f"{imports}\nfrom transformers.models.auto.modeling_auto import MODEL_MAPPING")
    assert [name for name in modules if name.startswith("modeling_retro.")] == ["modeling_retro.auto_classes"]


def test_other_models_are_loaded_as_before(tmp_path):
    code = """
import sys
import modeling_retro
from transformers import AutoModel, BertConfig, BertModel
config = BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)
BertModel(config).save_pretrained(sys.argv[1])
assert type(AutoModel.from_pretrained(sys.argv[1])) is BertModel
assert "modeling_retro.modeling_retro" not in sys.modules
"""
    imported_after(code, str(tmp_path))
