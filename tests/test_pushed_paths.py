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
"""What is pushed names no folder of the machine that pushed it."""

import io
import json

import pyarrow.parquet as pq
import pytest
from loopback_hub import loopback_hub
from tiny_models import tiny_llama

from modeling_retro import RetroForCausalLM, RetroJointForCausalLM


PUSH = """
from modeling_retro import RetroDatastore, RetroForCausalLM, RetroJointForCausalLM

RetroDatastore.from_pretrained("datastore").push_to_hub("jane/datastore")
for name, model_class in {"model": RetroForCausalLM, "joint": RetroJointForCausalLM}.items():
    for retrofit_only in (False, True):
        repo = f"jane/{name}-{retrofit_only}".lower()
        model = model_class.from_pretrained(name)
        model.freeze_decoder()
        model.push_to_hub(repo, retrofit_only=retrofit_only)
    try:
        model_class.from_pretrained(repo)
    except ValueError as error:
        print(error)
    print(model_class.from_pretrained(repo, base_model_name_or_path="bases/base").config.base_model_name_or_path)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_datastore_dir, tiny_tokenizer):
    """Folder of the one who pushes: a datastore and models that were made from a base beside them."""
    home = tmp_path_factory.mktemp("jane")
    (home / "datastore").symlink_to(tiny_datastore_dir)
    tiny_llama(len(tiny_tokenizer), eos_token_id=None).save_pretrained(home / "bases" / "base")
    fields = {"chunk_size": 8, "datastore_name_or_path": str(tiny_datastore_dir)}
    cross = RetroForCausalLM.from_decoder_pretrained(
        str(home / "bases" / "base"), cross_attention_layers=[1], **fields
    )
    for name, model in {
        "model": cross,
        "joint": RetroJointForCausalLM.from_decoder_pretrained(str(home / "bases" / "base"), **fields),
    }.items():
        model.save_pretrained(home / name)
        tiny_tokenizer.save_pretrained(home / name)
    return home


@pytest.mark.hostile(
    "names of the folders of the machine that pushes a datastore or a model",
    "they stand in no pushed file",
)
def test_no_pushed_file_holds_a_path_of_this_machine(home, tmp_path_factory):
    secrets = [str(tmp_path_factory.getbasetemp()).encode(), str(home).encode()]
    with loopback_hub() as hub:
        result = hub.run(PUSH, home=home)
        repos = {name: repo.files() for (_, name), repo in hub.repos.items()}
    assert len(repos) == 5
    for name, files in repos.items():
        for path, file in files.items():
            data = file.data
            if path.endswith(".parquet"):  # its strings are compressed
                table = pq.read_table(io.BytesIO(data))
                data += repr((table.schema.metadata, table.to_pydict())).encode()
            assert not any(secret in data for secret in secrets), f"{path} of {name}"
    for name in repos.keys() - {"jane/datastore"}:
        config = json.loads(repos[name]["config.json"].data)
        assert config["base_model_name_or_path"] == "base" and len(config["base_model_sha256"]) == 64
    # Whoever has the base says where it is.
    assert result.stdout.count("Pass `base_model_name_or_path` to say where the base is") == 2
