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
"""The in-memory Hub behaves, for the real client in real processes, as the Hub does where these tests rely on it."""

import re
import urllib.error
import urllib.request

import pytest
from loopback_hub import loopback_hub


@pytest.fixture(scope="module")
def hub():
    with loopback_hub(lfs_threshold=1000) as hub:
        yield hub


@pytest.fixture(autouse=True)
def healthy_again(hub):
    yield
    hub.recover()


def test_pushed_model_loads_in_a_fresh_process(hub, tmp_path):
    push = """
import torch
from transformers import AutoModel, LlamaConfig, LlamaModel
torch.manual_seed(0)
config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
model = LlamaModel(config)
model.push_to_hub("model")
print(model(torch.arange(4)[None]).last_hidden_state.sum().item())
"""
    load = """
import torch
from transformers import AutoModel
print(AutoModel.from_pretrained("alice/model")(torch.arange(4)[None]).last_hidden_state.sum().item())
"""
    pushed = hub.run(push, home=tmp_path / "alice").stdout
    assert hub.run(load, home=tmp_path / "bob", token=None).stdout == pushed
    files = hub.repos["models", "alice/model"].files()
    assert files["model.safetensors"].is_lfs
    assert not files["config.json"].is_lfs


def test_pushed_dataset_loads_and_streams_in_a_fresh_process(hub, tmp_path):
    push = """
from datasets import Dataset
for config in ("chunks", "neighbors"):
    Dataset.from_dict({"x": [f"{config} {i}" for i in range(5)]}).push_to_hub("alice/data", config_name=config)
"""
    load = """
from datasets import load_dataset
print(load_dataset("alice/data", "neighbors", split="train")["x"][3])
print(next(iter(load_dataset("alice/data", "chunks", split="train", streaming=True)))["x"])
"""
    hub.run(push, home=tmp_path / "alice")
    assert hub.run(load, home=tmp_path / "bob").stdout == "neighbors 3\nchunks 0\n"


def test_commits_branches_and_tags_stay_readable(hub, tmp_path):
    code = """
from pathlib import Path
from huggingface_hub import CommitOperationDelete, HfApi, HfFileSystem, snapshot_download
api = HfApi()
repo = api.create_repo("kept", repo_type="dataset", exist_ok=True).repo_id
api.create_repo("kept", repo_type="dataset", exist_ok=True)
folder = Path("folder/sub")
folder.mkdir(parents=True)
Path("folder/small.txt").write_text("first")
(folder / "large.txt").write_bytes(b"x" * 5000)
first = api.upload_folder(folder_path="folder", repo_id=repo, repo_type="dataset").oid
api.create_tag(repo, tag="v1", repo_type="dataset")
Path("folder/small.txt").write_text("second")
api.upload_folder(folder_path="folder", repo_id=repo, repo_type="dataset")
api.create_branch(repo, branch="side/way", repo_type="dataset")
deletion = CommitOperationDelete("sub/large.txt")
api.create_commit(repo, [deletion], commit_message="-", revision="side/way", repo_type="dataset")
for revision in (first, "v1", None, "side/way"):
    path = Path(snapshot_download(repo, revision=revision, repo_type="dataset"))
    print((path / "small.txt").read_text(), sorted(p.name for p in path.rglob("*.txt")))
print(sorted(f.path for f in api.list_repo_tree(repo, repo_type="dataset")))
print([tag.name for tag in api.list_repo_refs(repo, repo_type="dataset").tags])
with HfFileSystem().open(f"datasets/{repo}/sub/large.txt", "rb") as file:
    file.seek(4990)
    print(len(file.read()))
"""
    lines = hub.run(code, home=tmp_path).stdout.splitlines()
    assert lines == [
        "first ['large.txt', 'small.txt']",
        "first ['large.txt', 'small.txt']",
        "second ['large.txt', 'small.txt']",
        "second ['small.txt']",
        "['small.txt', 'sub']",
        "['v1']",
        "10",
    ]


def test_missing_and_private_things_are_refused_by_name(hub, tmp_path):
    code = """
import sys
from huggingface_hub import HfApi, hf_hub_download
api = HfApi()
api.create_repo("private", private=True, exist_ok=True)
api.upload_file(path_or_fileobj=b"secret", path_in_repo="a.txt", repo_id="alice/private")
calls = [
    lambda: hf_hub_download("alice/private", "a.txt", token="hf_of_mallory"),
    lambda: hf_hub_download("alice/private", "a.txt", token=False),
    lambda: hf_hub_download("alice/private", "b.txt"),
    lambda: hf_hub_download("alice/private", "a.txt", revision="v9"),
    lambda: hf_hub_download("alice/absent", "a.txt"),
    lambda: api.upload_file(path_or_fileobj=b"", path_in_repo="a.txt", repo_id="alice/private", token="hf_of_mallory"),
    lambda: api.create_repo("mine", token=False),
    lambda: hf_hub_download("alice/private", "a.txt"),
]
for call in calls:
    try:
        print(open(call()).read())
    except Exception as error:
        print(type(error).__name__)
"""
    assert hub.run(code, home=tmp_path).stdout.split() == [
        "HfHubHTTPError",
        "RepositoryNotFoundError",
        "RemoteEntryNotFoundError",
        "RevisionNotFoundError",
        "RepositoryNotFoundError",
        "HfHubHTTPError",
        "HfHubHTTPError",
        "secret",
    ]


@pytest.mark.parametrize("failing", ["^PUT /lfs/", "/commit/main$"])
def test_interrupted_push_changes_nothing_and_resumes_without_uploading_twice(hub, tmp_path, failing):
    repo_id = f"alice/resumed-{len(hub.repos)}"
    push = f"""
from pathlib import Path
from huggingface_hub import HfApi
Path("folder").mkdir(exist_ok=True)
for name in ("a", "b", "c"):
    Path("folder", name).write_bytes(({repo_id!r} + name).encode() * 1000)
HfApi().create_repo({repo_id!r}, exist_ok=True)
HfApi().upload_folder(folder_path="folder", repo_id={repo_id!r})
"""
    hub.fail_after(1 if "lfs" in failing else 0, failing)
    broken = hub.run(push, home=tmp_path, check=False)
    assert broken.returncode != 0
    assert "507" in broken.stderr
    assert hub.repos["models", repo_id].files() == {}
    hub.recover()
    already_there = len(hub.lfs_objects)
    before = len(hub.requests)
    hub.run(push, home=tmp_path)
    assert sorted(hub.repos["models", repo_id].files()) == ["a", "b", "c"]
    uploads = [request for request in hub.requests[before:] if re.match("PUT /lfs/", request)]
    assert len(uploads) == len(hub.lfs_objects) - already_there


def test_upload_with_another_content_than_announced_is_refused(hub):
    request = urllib.request.Request(f"{hub.url}/lfs/{'0' * 64}", data=b"other", method="PUT")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)
