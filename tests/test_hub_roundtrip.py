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
"""What one person shares by `push_to_hub`, another loads over HTTP, in another process with another cache."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loopback_hub import loopback_hub

from data_prep.bm25_index import build_bm25_index
from data_prep.neighbors import find_neighbors
from modeling_retro import RetroConfig, RetroDatastore, RetroForCausalLM, RetroRetriever
from modeling_retro.datastore.manifest import read_manifest
from modeling_retro.sharing.model_card import save_model_card


# Stands for a machine without this package: its modules cannot be imported.
WITHOUT_PACKAGE = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_retro", "data_prep", "trainers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""

PUSH = """
import json, sys
from huggingface_hub import CommitOperationAdd, HfApi
from modeling_retro import RetroDatastore, RetroForCausalLM
from modeling_retro.datastore import hub as hub_transfer_retro

report = {}

def attempt(name, function, *args, **kwargs):
    try:
        report.setdefault(name, []).append(function(*args, **kwargs).oid)
    except Exception as error:
        report.setdefault(name, []).append(f"{type(error).__name__}: {error}")

def make(repo, file, content, repo_type=None):
    HfApi().create_repo(repo, repo_type=repo_type)
    HfApi().upload_file(path_or_fileobj=content, path_in_repo=file, repo_id=repo, repo_type=repo_type)

make("alice/other", "x.txt", b"x", "dataset")
make("alice/gpt2", "config.json", b'{"model_type": "gpt2"}')
datastore = RetroDatastore.from_pretrained("datastore")
for repo in ("alice/datastore", "alice/datastore", "alice/other"):
    attempt(repo, datastore.push_to_hub, repo, private=True)
HfApi().create_commit(
    "alice/datastore",
    [
        CommitOperationAdd("README.md", b"---\\nlicense: cc0-1.0\\n---\\n\\nMy own words.\\n"),
        CommitOperationAdd("chunks/shard-00099.parquet", b"of an older datastore"),
    ],
    commit_message="A card, and something old",
    repo_type="dataset",
)

hub_transfer_retro.FILES_PER_COMMIT = 8
for _ in range(2):
    attempt("alice/large", datastore.push_to_hub, "alice/large")
    try:
        report.setdefault("loaded", []).append(len(RetroDatastore.from_pretrained("alice/large").chunks))
    except ValueError as error:
        report.setdefault("loaded", []).append(str(error))
hub_transfer_retro.FILES_PER_COMMIT = 500

model = RetroForCausalLM.from_pretrained("model")
attempt("gpt2", model.push_to_hub, "alice/gpt2")
attempt("no datastore", model.push_to_hub, "alice/none", datastore="alice/other")
attempt("breaks off", model.push_to_hub, "alice/model")
report["siblings"] = [file.rfilename for file in HfApi().model_info("alice/model").siblings]
exec(sys.argv[1])
model.save_pretrained("sharded", max_shard_size="20KB")
RetroForCausalLM.from_pretrained("sharded").push_to_hub("alice/shards", max_shard_size="20KB")
RetroForCausalLM.from_pretrained("sharded").push_to_hub("alice/shards")
report["update"] = HfApi().dataset_info("alice/datastore").sha
print(json.dumps(report))
"""

USE_MODEL = """
import json, os, sys, torch
from transformers import AutoModel

exec(sys.argv[1])
base = AutoModel.from_pretrained("alice/model", trust_remote_code=True)
result = {"on": model(**inputs).logits, "base": base(**inputs).last_hidden_state}
result["tokens"] = model.generate(**inputs, max_new_tokens=20, do_sample=False)
with model.retrieval(False):
    result["off"] = model(**inputs).logits
torch.save(result, "result.pt")
# The datastore is private: a token that is given for the model opens it too.
AutoModelForCausalLM.from_pretrained(
    "alice/model", trust_remote_code=True, retriever="auto", token=os.environ.pop("HF_TOKEN"), cache_dir="elsewhere"
)
print(json.dumps({"code": type(model).__module__, "datastore": str(model.retriever.datastore.path)}))
"""

USE_CODE_ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

try:
    exec(sys.argv[1])
except ImportError as error:
    print(error)
model = AutoModelForCausalLM.from_pretrained("alice/model", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("alice/model", trust_remote_code=True)
torch.save(model(**tokenizer(sys.argv[2], return_tensors="pt")).logits, "off.pt")
"""

USE_DATASTORE = """
import json, sys
from modeling_retro import RetroDatastore

report = {}
for revision in sys.argv[2:]:
    try:
        datastore = RetroDatastore.from_pretrained("alice/datastore", revision=revision)
        datastore.verify()
        again = RetroDatastore.from_pretrained("alice/datastore", revision=revision)
        assert again.path == datastore.path
        report[revision] = {
            "chunks": datastore.chunks.take(range(len(datastore.chunks)))[0].tolist(),
            "neighbors": datastore.split("validation").neighbor_ids.tolist(),
        }
    except Exception as error:
        report[revision] = f"{type(error).__name__}: {error}"
exec(sys.argv[1])
report["datasets"] = chunks["input_ids"][:]
report["splits"] = sorted(load_dataset("alice/datastore", "neighbors"))
report["encoders"] = [encoder.sha256, retriever.encoder.sha256]
try:
    RetroDatastore.from_pretrained("alice/datastore", token=False, cache_dir="elsewhere")
except Exception as error:
    report["anonymous"] = type(error).__name__
print(json.dumps(report))
"""

# The page's own examples: share (model and datastore, encoder), use (anywhere, with this package, as data sets).
EXAMPLES = re.findall(r"```python\n(.*?)```", Path("docs/hub.md").read_text(encoding="utf-8"), re.DOTALL)
EVALUATION = {
    "num_documents": 2,
    "num_bytes": 100,
    "num_tokens": 50,
    "num_neighbors": [2],
    "bits_per_byte": {"off": 1.5, "on": 1.25},
    "perplexity": {"off": 8.0, "on": 4.0},
    "differences": {"on - off": {"bits_per_byte": -0.25, "low": -0.5, "high": 0.125}},
}
PROMPT = "retro looks things up in a datastore"


@pytest.fixture(scope="module")
def hub():
    with loopback_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, tiny_tokenizer):
    torch.manual_seed(0)
    config = RetroConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        chunk_size=8,
        cross_attention_layers=[1],
        neighbor_encoder_num_hidden_layers=1,
        initializer_range=0.3,
        pad_token_id=tiny_tokenizer.pad_token_id,
        eos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("model")
    RetroForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    save_model_card(folder, EVALUATION)
    return folder


@pytest.fixture(scope="module")
def pushed(hub, tiny_datastore_dir, tiny_encoder_dir, model_dir, tmp_path_factory):
    """Alice pushes a datastore, at first in vain, tries other repositories, then does what the page says."""
    hub.fail_after(3, "^PUT /lfs/", times=1)
    hub.fail_after(1, "/alice/large/commit/", times=1, hang_up=True)
    hub.fail_after(0, "/alice/model/commit/", times=1, hang_up=True)
    home = tmp_path_factory.mktemp("alice")
    for name, folder in {"datastore": tiny_datastore_dir, "encoder": tiny_encoder_dir, "model": model_dir}.items():
        (home / name).symlink_to(folder)
    return json.loads(hub.run(PUSH, "".join(EXAMPLES[:2]), home=home).stdout)


def test_a_push_that_broke_off_goes_on_without_repeating_itself(hub, pushed):
    broken, whole = pushed["alice/datastore"]
    assert broken.startswith("ConnectionError: the push to alice/datastore broke off; push again to go on (")
    repo = hub.repos["datasets", "alice/datastore"]
    # The commit that made the repository, and one that shows everything at once; two more are of later.
    assert list(repo.commits).index(whole) == 1
    assert len(repo.commits) == 4
    uploads = [request for request in hub.requests if request.startswith("PUT /lfs/")]
    assert len(uploads) == len(set(uploads)) + 1
    assert repo.private


def test_a_datastore_of_many_files_has_no_manifest_before_it_is_whole(hub, pushed):
    broken, whole = pushed["alice/large"]
    assert broken.startswith("ConnectionError: the push to alice/large broke off; push again to go on (")
    repo = hub.repos["datasets", "alice/large"]
    *parts, last = repo.commits
    assert last == whole
    assert len(parts) > 3
    assert not any("datastore.json" in repo.files(part) for part in parts)
    unfinished, chunks = pushed["loaded"]
    assert "has no datastore.json" in unfinished
    assert repo.files().keys() == hub.repos["datasets", "alice/datastore"].files(pushed["alice/datastore"][1]).keys()
    assert chunks > 0


def test_a_model_is_pushed_whole_or_not_at_all_and_only_where_it_fits(hub, pushed):
    assert "Server disconnected" in pushed["breaks off"][0]
    assert pushed["siblings"] == []
    repo = hub.repos["models", "alice/model"]
    assert len(repo.commits) == 2
    files = repo.files()
    assert {"model.safetensors", "modeling_retro.py", "tokenizer.json", "README.md", "evaluation.json"} <= set(files)
    card = files["README.md"].data.decode()
    assert 'from_pretrained("alice/model", trust_remote_code=True, retriever="auto")' in card
    assert "[alice/datastore](https://huggingface.co/datasets/alice/datastore)" in card
    assert {"license: apache-2.0", "- alice/datastore"} <= set(card.splitlines())
    assert "| on | 1.2500 |" in card
    config = json.loads(files["config.json"].data)
    assert config["datastore_name_or_path"] == "alice/datastore"
    assert config["datastore_revision"] == pushed["update"]

    before, after = list(hub.repos["models", "alice/shards"].commits.values())[-2:]
    assert len([name for name in before if ".safetensors" in name]) > 2
    assert [name for name in after if ".safetensors" in name] == ["model.safetensors"]

    assert "alice/gpt2 holds another model than a RETRO model (config.json)" in pushed["gpt2"][0]
    assert set(hub.repos["models", "alice/gpt2"].files()) == {"config.json"}
    assert "alice/other is not a datastore: it has no datastore.json" in pushed["no datastore"][0]
    assert ("models", "alice/none") not in hub.repos


def test_an_update_keeps_the_card_and_removes_what_is_old(hub, pushed):
    repo = hub.repos["datasets", "alice/datastore"]
    assert repo.refs["main"] == pushed["update"]
    before, after = (dict(repo.files(revision)) for revision in (pushed["alice/datastore"][1], "main"))
    card = after.pop("README.md").data.decode()
    before.pop("README.md")
    assert before == after
    assert "My own words." in card
    assert "license: cc0-1.0" in card
    assert "config_name: neighbors" in card


def test_a_repository_of_something_else_is_left_alone(hub, pushed):
    assert "alice/other holds something else than a datastore (x.txt)" in pushed["alice/other"][0]
    assert set(hub.repos["datasets", "alice/other"].files()) == {"x.txt"}


def test_the_pushed_manifest_tells_nothing_of_the_machine(hub, pushed, tiny_datastore_dir):
    files = hub.repos["datasets", "alice/datastore"].files()
    assert str(tiny_datastore_dir.parent.parent).encode() not in files["datastore.json"].data + files["README.md"].data
    assert not any("embeddings" in name for name in files)


def test_a_shared_model_loads_without_this_package_and_retrieves_with_it(
    hub, pushed, model_dir, tiny_datastore_dir, tmp_path, tiny_tokenizer
):
    assert PROMPT in EXAMPLES[2]
    refusal = hub.run(WITHOUT_PACKAGE + USE_CODE_ALONE, EXAMPLES[2], PROMPT, home=tmp_path / "carol").stdout
    assert "retriever='auto' needs the package" in refusal and "pip install retro-transformers" in refusal
    printed = hub.run(USE_MODEL, EXAMPLES[2], home=tmp_path / "bob").stdout
    assert PROMPT in printed
    report = json.loads(printed.splitlines()[-1])
    assert report["code"].startswith("transformers_modules.")
    assert report["datastore"].startswith(str(tmp_path / "bob"))
    there = torch.load(tmp_path / "bob" / "result.pt", weights_only=True)

    model = RetroForCausalLM.from_pretrained(model_dir, retriever=RetroRetriever.from_pretrained(tiny_datastore_dir))
    inputs = tiny_tokenizer(PROMPT, return_tensors="pt")
    assert inputs.input_ids.shape[1] > 16
    torch.testing.assert_close(there["on"], model(**inputs).logits)
    assert there["tokens"].tolist() == model.generate(**inputs, max_new_tokens=20, do_sample=False).tolist()
    torch.testing.assert_close(there["base"], model.model(**inputs).last_hidden_state)
    with model.retrieval(False):
        torch.testing.assert_close(there["off"], model(**inputs).logits)
        torch.testing.assert_close(torch.load(tmp_path / "carol" / "off.pt"), model(**inputs).logits)
    assert not torch.allclose(there["on"], there["off"], atol=1e-3)


def test_models_refuse_datastores_that_are_not_theirs(model_dir, tiny_datastore_dir):
    with pytest.raises(ValueError, match="names no datastore"):
        RetroForCausalLM.from_pretrained(model_dir, retriever="auto")
    with pytest.raises(ValueError, match="'datastore', expected a retriever or 'auto'"):
        RetroForCausalLM.from_pretrained(model_dir, retriever="datastore")
    named = {"datastore_name_or_path": str(tiny_datastore_dir), "retriever": "auto", "ignore_mismatched_sizes": True}
    assert RetroForCausalLM.from_pretrained(model_dir, **named).is_retrieving
    with pytest.raises(ValueError, match="chunk_size 16 is not the chunk size"):
        RetroForCausalLM.from_pretrained(model_dir, chunk_size=16, **named)
    with pytest.raises(ValueError, match="another tokenizer than the model: .* has 300 tokens, the model 299"):
        RetroForCausalLM.from_pretrained(model_dir, vocab_size=299, **named)
    # As many tokens, but others: told by the checksum that training recorded.
    own = RetroRetriever.from_pretrained(tiny_datastore_dir)
    tokenizer_sha256 = own.datastore.manifest.tokenizer.sha256
    RetroForCausalLM.from_pretrained(model_dir, tokenizer_sha256=tokenizer_sha256, retriever=own)
    for retriever in (own, "auto"):
        with pytest.raises(ValueError, match="another tokenizer than the model: .* trained with 0123456789ab"):
            RetroForCausalLM.from_pretrained(
                model_dir, **named | {"retriever": retriever, "tokenizer_sha256": "0123456789abcdef"}
            )


def test_names_without_a_datastore_are_named():
    for name in ("no/such", "no such name", "./no/such/folder"):
        with pytest.raises(ValueError, match=f"{name} is neither a folder nor a datastore"):
            RetroDatastore.from_pretrained(name)


def test_datastores_are_verified_pinned_and_read_by_datasets(hub, pushed, tiny_datastore_dir, tmp_path):
    datastore = RetroDatastore.from_pretrained(tiny_datastore_dir)
    repo = hub.repos["datasets", "alice/datastore"]
    files = repo.files()
    manifest = json.loads(files["datastore.json"].data)
    parquet = next(name for name in files if name.endswith(".parquet"))

    def branch(name, changes):
        changed = {file: data for file, data in (files | changes).items() if data is not None}
        repo.commit(name, changed, name)

    def with_manifest(**changes):
        changed = manifest | changes
        changed.pop("sha256")  # what else is wrong is found without it
        return {"datastore.json": replace(files["datastore.json"], data=json.dumps(changed).encode())}

    def altered(name):
        data = files[name].data
        return {name: replace(files[name], data=data[:-1] + bytes([data[-1] ^ 1]))}

    branch("altered-index", altered("index.faiss"))
    branch("altered-chunks", altered(parquet))
    branch("missing-file", {parquet: None})
    branch("unlisted-shard", with_manifest(files={n: s for n, s in manifest["files"].items() if n != parquet}))
    branch("escaping", with_manifest(files=manifest["files"] | {"../../escaped.txt": "0" * 64}))
    branch("newer", with_manifest(format_version=99))
    branch("no-manifest", {"datastore.json": None})
    names = ["altered-index", "altered-chunks", "missing-file", "unlisted-shard", "escaping", "newer", "no-manifest"]

    revisions = ["main", pushed["alice/datastore"][1], *names]
    report = json.loads(hub.run(USE_DATASTORE, "".join(EXAMPLES[3:]), *revisions, home=tmp_path).stdout)
    chunks = datastore.chunks.take(range(len(datastore.chunks)))[0]
    expected = {"chunks": chunks.tolist(), "neighbors": datastore.split("validation").neighbor_ids.tolist()}
    assert report["main"] == report[pushed["alice/datastore"][1]] == expected
    assert report["datasets"] == expected["chunks"]
    assert report["splits"] == ["train", "validation"]
    assert report["encoders"] == [datastore.manifest.encoder.sha256] * 2
    assert report["anonymous"] == "RepositoryNotFoundError"
    assert "index.faiss was altered" in report["altered-index"]
    assert f"{parquet} was altered" in report["altered-chunks"]
    assert f"lacks {parquet.split('/')[-1]}" in report["missing-file"]
    assert f"does not list {parquet}" in report["unlisted-shard"]
    assert "files has '../../escaped.txt', expected a path inside the datastore" in report["escaping"]
    assert "format version 99" in report["newer"]
    assert "has no datastore.json" in report["no-manifest"]
    assert all(report[name].startswith("ValueError: ") for name in names)


PUSH_BM25 = """
from modeling_retro import RetroDatastore

RetroDatastore.from_pretrained("datastore").push_to_hub("alice/lexical")
"""

SEARCH_BM25 = """
import json
import torch
from modeling_retro import RetroDatastore, RetroRetriever

datastore = RetroDatastore.from_pretrained("alice/lexical")
datastore.verify()
chunks = datastore.split("validation").chunks
tokens = torch.from_numpy(chunks.take(range(len(chunks)))[0])
report = {"retriever": datastore.retriever}
for way in ("bm25", "hybrid"):
    found = RetroRetriever(datastore, retriever=way, device="cpu").retrieve(tokens, 3)
    report[way] = [found.chunk_ids.tolist(), found.scores.tolist()]
print(json.dumps(report))
"""


def test_a_datastore_with_a_bm25_index_is_shared_with_it(hub, tiny_datastore_dir, tmp_path):
    folder = shutil.copytree(tiny_datastore_dir, tmp_path / "alice" / "datastore")
    build_bm25_index(folder)
    for split in ("train", "validation"):
        find_neighbors(folder, 4, split, "bm25", force=True)
    hub.run(PUSH_BM25, home=tmp_path / "alice")
    files = hub.repos["datasets", "alice/lexical"].files()
    assert {"index.faiss", *(f"bm25/{name}" for name in read_manifest(folder).bm25.sha256)} <= set(files)
    report = json.loads(hub.run(SEARCH_BM25, home=tmp_path / "bob").stdout.splitlines()[-1])
    datastore = RetroDatastore.from_pretrained(folder)
    chunks = datastore.split("validation").chunks
    tokens = torch.from_numpy(chunks.take(range(len(chunks)))[0])
    assert report["retriever"] == "bm25"
    for way in ("bm25", "hybrid"):
        found = RetroRetriever(datastore, retriever=way, device="cpu").retrieve(tokens, 3)
        assert report[way][0] == found.chunk_ids.tolist()
        assert (found.chunk_ids >= 0).any()
        torch.testing.assert_close(torch.tensor(report[way][1]), found.scores)
