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
"""What a stranger's datastore or model names is not opened, followed or run, unless it is harmless."""

import io
import json
import random
import shutil
import socket
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_texts
from peft import LoraConfig, get_peft_model
from test_modeling_retro import make_model
from tiny_models import tiny_llama

from data_prep.chunk import chunk_documents
from data_prep.prepare import prepare_datastore
from data_prep.scripts import verify as verify_script
from data_prep.stage_files import directory_lock
from data_prep.upkeep.changes import compact_datastore, remove_documents
from data_prep.upkeep.verify import repair_datastore, verify, verify_datastore
from modeling_retro import RetroDatastore, RetroForCausalLM, RetroJointForCausalLM
from modeling_retro.added_weights_retro import record_checksums
from modeling_retro.datastore.manifest import MANIFEST_NAME, read_manifest


@pytest.fixture
def copy(tiny_datastore_dir, tmp_path):
    return shutil.copytree(tiny_datastore_dir, tmp_path / "copy")


@pytest.mark.hostile(
    "a model whose configuration names the address of a database (`postgresql://…`, `milvus://…`) as its datastore, "
    'opened with `retriever="auto"`',
    "refused; nothing is connected to. Only a folder or an id on the Hub is opened, and its name is logged",
)
@pytest.mark.parametrize("scheme", ["postgresql", "milvus", "https"])
def test_a_model_cannot_name_an_address(tmp_path, scheme):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        model = make_model()
        address = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}/x?timeout=2"
        model.config.datastore_name_or_path = address
        model.save_pretrained(tmp_path / "model")
        with pytest.raises(ValueError, match="names the address.*only a folder or an id on the Hub"):
            RetroForCausalLM.from_pretrained(tmp_path / "model", retriever="auto")
        with pytest.raises(ValueError):
            RetroDatastore.from_pretrained(address)
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.hostile(
    "a datastore or a collection of a database that names a folder or an address of this machine as its encoder",
    "refused; without a copy in the datastore only an id on the Hub is opened, and its name is logged",
)
@pytest.mark.parametrize("name", ["/etc/models", "../elsewhere", "~/encoder", "https://host/encoder", "a/b/c", "."])
def test_an_encoder_that_is_named_is_on_the_hub(copy, name):
    shutil.rmtree(copy / "encoder")
    manifest = read_manifest(copy)
    manifest.encoder.name = name
    manifest.write(copy)
    with pytest.raises(ValueError, match="only an id on the Hub is opened"):
        RetroDatastore.from_pretrained(copy).open_encoder()


def with_code(folder, ran):
    """Adds a class to the tokenizer in a folder, as models on the Hub have it."""
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {
        "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]},
        "tokenizer_class": "T",
    }
    file.write_text(json.dumps(config))
    (folder / "evil.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as T\n"
    )


@pytest.mark.hostile(
    "a datastore whose tokenizer or encoder brings code, and a `y` on standard input",
    "the code is not run and nothing is asked; `retro verify` names the folder",
)
@pytest.mark.parametrize("part", ["tokenizer", "encoder"])
def test_code_of_a_datastore_is_never_run(copy, tmp_path, monkeypatch, part):
    with_code(copy / part, tmp_path / "ran")
    if part == "encoder":
        config = json.loads((copy / part / "config.json").read_text())
        config |= {"auto_map": {"AutoConfig": "evil.T", "AutoModel": "evil.T"}, "model_type": "evil"}
        (copy / part / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    findings = verify_datastore(copy)
    assert [finding.where for finding in findings] == [part] and "\n" not in str(findings[0])
    opened = RetroDatastore.from_pretrained(copy)
    with pytest.raises(ValueError):
        opened.tokenizer if part == "tokenizer" else opened.open_encoder()
    assert not (tmp_path / "ran").exists() and sys.stdin.read() == "y\n" * 9


def outside(copy, tmp_path):
    """Lets a folder of the datastore be a link out of it, and an earlier version name what is behind the link."""
    victim = tmp_path / "home" / "photos"
    victim.mkdir(parents=True)
    (victim / "a.jpg").write_text("precious")
    values = json.loads((copy / MANIFEST_NAME).read_text())
    shard = values["splits"]["train"]["chunks"]["shards"][0] | {"name": "photos"}
    values["splits"]["x"] = {"chunks": values["splits"]["train"]["chunks"] | {"shards": [shard]}}
    del values["sha256"]
    (copy / "versions").mkdir()
    (copy / "versions" / "1.json").write_text(json.dumps(values))
    (copy / "splits" / "x").mkdir()
    (copy / "splits" / "x" / "chunks").symlink_to("../../../home")
    return victim


@pytest.mark.hostile(
    "a datastore with a symbolic link out of it, and an earlier version that names a folder behind the link",
    "no stage reads, writes or removes anything in it; the error and `retro verify` name the link",
)
def test_a_link_out_of_a_datastore_is_not_followed(copy, tmp_path):
    victim = outside(copy, tmp_path)
    assert [finding.where for finding in verify_datastore(copy)] == ["splits/x/chunks"]
    for use in (
        lambda: remove_documents(copy, [1]),
        lambda: RetroDatastore.from_pretrained(copy),
        lambda: directory_lock(copy).__enter__(),
    ):
        with pytest.raises(ValueError, match="splits/x/chunks is a symbolic link to .*home, outside the datastore"):
            use()
    assert (victim / "a.jpg").read_text() == "precious"


def test_links_inside_a_datastore_and_those_of_the_cache_are_followed(copy, tmp_path, monkeypatch):
    (copy / "neighbors" / "shard-00000").rename(copy / "elsewhere")
    (copy / "neighbors" / "shard-00000").symlink_to("../elsewhere")
    RetroDatastore.from_pretrained(copy).verify()
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "1"
    shutil.copytree(copy, snapshot)
    (snapshot.parent.parent / "blobs").mkdir()
    (snapshot / "index.faiss").rename(snapshot.parent.parent / "blobs" / "0")
    (snapshot / "index.faiss").symlink_to("../../blobs/0")
    RetroDatastore.from_pretrained(snapshot).verify()


@pytest.mark.hostile("a recipe in Python with an unknown key", "refused like a file; the error names the key")
def test_a_recipe_in_python_is_checked_like_a_file(tmp_path):
    recipe = {"tokenizer": "t", "encoder": "e", "splits": {"train": "x.jsonl"}, "chunk_size": 8}
    with pytest.raises(ValueError, match="the recipe has unknown keys chunk_size; known are"):
        prepare_datastore(recipe, tmp_path / "out")
    with pytest.raises(ValueError, match="the recipe must be a mapping with tokenizer"):
        prepare_datastore({"splits": {}}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def with_ids(tmp_path, tiny_tokenizer):
    records = [{"id": name, "text": text} for name, text in zip("abcdef", make_texts(6), strict=True)]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    chunk_documents(file, tmp_path / "own", tiny_tokenizer, chunk_size=8, id_column="id")
    return tmp_path / "own"


@pytest.mark.hostile(
    "a table of the user's ids (`documents/`) in which two ids have changed places",
    "`retro verify` names it; `retro remove` and `retro update` refuse it",
)
def test_exchanged_ids_are_found_before_the_wrong_document_is_removed(with_ids):
    (file,) = (with_ids / "documents").glob("*.parquet")
    table = pq.read_table(file)
    ids = [{"a": "b", "b": "a"}.get(name, name) for name in table["id"].to_pylist()]
    pq.write_table(table.set_column(1, table.schema.field("id"), pa.array(ids)), file)
    assert [finding.where for finding in verify_datastore(with_ids)] == [f"documents/{file.name}"]
    with pytest.raises(ValueError, match="was altered: its checksum"):
        remove_documents(with_ids, ["a"])
    assert repair_datastore(with_ids, with_ids.parent / "own.jsonl") == []
    assert remove_documents(with_ids, ["a"]).removed.documents == 1
    compact_datastore(with_ids)
    assert verify_datastore(with_ids) == []
    with pytest.raises(ValueError, match="has no document with the id 'z'"):
        remove_documents(with_ids, ["z"])


@pytest.mark.hostile(
    "a file of the tokenizer or of the encoder's tokenizer and configuration that was altered, removed or added",
    "`retro verify` names the folder; it is not loaded",
)
@pytest.mark.parametrize("part", ["tokenizer", "encoder"])
def test_files_of_tokenizer_and_encoder_have_checksums(tiny_datastore_dir, tmp_path, part):
    for number, change in enumerate(
        (lambda file: file.write_text(file.read_text() + " "), lambda file: file.unlink())
    ):
        for file in sorted((tiny_datastore_dir / part).glob("*.json")):
            copy = shutil.copytree(tiny_datastore_dir, tmp_path / f"{file.name}{number}")
            change(copy / part / file.name)
            assert [finding.where for finding in verify_datastore(copy)] == [part], file
            opened = RetroDatastore.from_pretrained(copy)
            with pytest.raises(ValueError, match=file.name):
                opened.tokenizer if part == "tokenizer" else opened.open_encoder()
    copy = shutil.copytree(tiny_datastore_dir, tmp_path / "added")
    (copy / part / "chat_template.jinja").write_text("{{ 1 }}")
    assert [finding.where for finding in verify_datastore(copy)] == [part]


def test_what_cannot_be_checked_is_said_with_another_status(copy, tmp_path, capsys):
    shutil.rmtree(copy / "encoder")
    (finding,) = verify_datastore(copy)
    assert finding.unchecked and "could not be checked, because it is out of reach" in str(finding)
    with pytest.raises(SystemExit) as ended:
        verify_script.main([str(copy)])
    assert ended.value.code == 2 and "out of reach" in capsys.readouterr().out
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    assert verify(tmp_path / "model") == []
    (tmp_path / "model" / "checksums.json").unlink()
    (finding,) = verify(tmp_path / "model")
    assert finding.unchecked and "have no recorded checksum" in str(finding) and "config.json" in str(finding)


@pytest.mark.hostile(
    "one bit of any file that decides what a saved model or retrofit computes, or of the weights of the base of a "
    "retrofit, at random places; a configuration of this base that says something else",
    "found by `retro verify MODEL`. It ends with another exit status where it can compare nothing: a file that was "
    "written after the model was saved, a model without recorded checksums, the base of an adapter",
)
@pytest.mark.parametrize("kind", ["whole", "cross", "joint"])
def test_a_flipped_bit_in_any_file_of_a_model_is_found(tmp_path, tiny_tokenizer, kind):
    path, base = tmp_path / "model", tmp_path / "base"
    tiny_llama(300).save_pretrained(base)
    model_class = RetroJointForCausalLM if kind == "joint" else RetroForCausalLM
    options = {} if kind == "joint" else {"cross_attention_layers": [0]}
    model = model_class.from_decoder_pretrained(str(base), chunk_size=8, **options)
    model.freeze_decoder()
    tiny_tokenizer.save_pretrained(path)
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    model.save_pretrained(path, retrofit_only=kind != "whole")
    (path / "README.md").write_text("a card says what it wants")
    assert verify(path) == []
    files = [file for file in sorted(path.rglob("*")) if file.name != "README.md"]
    files += [base / "model.safetensors"] if kind != "whole" else []
    expected = {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "checksums.json"}
    assert expected <= {file.name for file in files}
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config.replace('"default"', '"dEfault"'))  # of the rotary embedding
    assert any("describes no model" in str(finding) for finding in verify(path))
    (path / "config.json").write_text(config)
    drawn = random.Random(0)
    for file in files:
        data = file.read_bytes()
        for _ in range(3):
            altered = bytearray(data)
            altered[drawn.randrange(len(data))] ^= 1 << drawn.randrange(8)
            file.write_bytes(altered)
            assert [finding for finding in verify(path) if not finding.unchecked], file
        file.write_bytes(data)
    assert verify(path) == []
    text = (base / "config.json").read_text()
    for field, value in (("rms_norm_eps", 2e-6), ("num_attention_heads", 1), ("rope_parameters", {"rope_theta": 9.0})):
        (base / "config.json").write_text(json.dumps(json.loads(text) | {field: value}))
        assert any(f"has {field}" in str(finding) for finding in verify(path)) == (kind != "whole")
    (base / "config.json").write_text(text)
    (path / "tokenizer_config.json").write_text("{}")  # saved again, and not the model
    assert [finding.where for finding in verify(path)] == ["tokenizer_config.json"]
    model.save_pretrained(path, retrofit_only=kind != "whole")
    assert verify(path) == []
    (path / "added_tokens.json").write_text("{}")
    (finding,) = verify(path)
    assert finding.unchecked and "added_tokens.json" in str(finding)


def test_an_adapter_is_verified_and_its_base_is_not(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    record_checksums(tmp_path / "adapter")
    (finding,) = verify(tmp_path / "adapter")
    assert finding.unchecked and "does not record" in str(finding)
    data = bytearray((tmp_path / "adapter" / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(data)
    assert "adapter_model.safetensors was altered" in " ".join(map(str, verify(tmp_path / "adapter")))


def test_a_retrofit_keeps_its_own_generation_config(tmp_path):
    tiny_llama(300).save_pretrained(tmp_path / "base")
    model = RetroJointForCausalLM.from_decoder_pretrained(str(tmp_path / "base"), chunk_size=8)
    model.freeze_decoder()
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "model", retrofit_only=True)
    assert RetroJointForCausalLM.from_pretrained(tmp_path / "model").generation_config.max_new_tokens == 7
