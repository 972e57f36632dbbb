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
"""Uploads a model with its code, its tokenizer and its card in one commit"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..added_weights_retro import record_checksums
from ..datastore.manifest import MANIFEST_NAME, check_model, read_manifest
from ..durable_files_retro import public_name
from .model_card import CARD_NAME, CONFIG_CLASSES, EVALUATION_NAME, read_evaluation, save_model_card


def push_model(
    model: PreTrainedModel,
    repo_id: str,
    *,
    datastore: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    license: str | None = None,
    retrofit_only: bool = False,
    commit_message: str = "Upload model",
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
) -> CommitInfo:
    """Uploads a RETRO model, as its method `push_to_hub` describes."""
    api = HfApi(token=token)
    if datastore is not None:
        _name_datastore(model, api, datastore)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    source = Path(model.name_or_path) if model.name_or_path else None
    if tokenizer is None and source is not None and (source / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    branch = None if create_pr else revision
    present = _root_files(api, repo_id, branch)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name in (CARD_NAME, EVALUATION_NAME):
            if name in present:
                shutil.copy(api.hf_hub_download(repo_id, name, revision=branch), folder / name)
            if source is not None and (source / name).is_file():
                shutil.copy(source / name, folder / name)
        model.save_pretrained(folder, retrofit_only=retrofit_only, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if read_evaluation(folder) is None:
            (folder / EVALUATION_NAME).unlink(missing_ok=True)
        save_model_card(folder, name=repo_id, license=license, tags=tags)
        _leave_out_folders(folder / "config.json")
        record_checksums(folder)
        # `upload_folder` may make several commits, but a model must become visible as a whole.
        files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
        stale = {name for name in present if ".safetensors" in name or name == EVALUATION_NAME} - set(files)
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(name, file) for name, file in sorted(files.items())]
            + [CommitOperationDelete(name) for name in sorted(stale)],
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def _name_datastore(model: PreTrainedModel, api: HfApi, datastore: str) -> None:
    commit = api.dataset_info(datastore).sha
    if not api.file_exists(datastore, MANIFEST_NAME, repo_type="dataset", revision=commit):
        raise ValueError(f"{datastore} is not a datastore: it has no {MANIFEST_NAME}")
    file = api.hf_hub_download(datastore, MANIFEST_NAME, repo_type="dataset", revision=commit)
    check_model(read_manifest(Path(file).parent), datastore, model.config)
    model.config.datastore_name_or_path, model.config.datastore_revision = datastore, commit


def _leave_out_folders(file: Path) -> None:
    """Shortens names of folders in a config to their last part. Checksums identify what the folders held."""

    def without_folders(part: dict[str, Any]) -> dict[str, Any]:
        names = {key: public_name(part[key]) for key in part if key.endswith("name_or_path") and part[key] is not None}
        return part | names

    config = json.loads(file.read_text(encoding="utf-8"), object_hook=without_folders)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _root_files(api: HfApi, repo_id: str, revision: str | None) -> set[str]:
    """Names of the files at the top of a repository. Raises a `ValueError` if it holds another model."""
    files = {file.rfilename for file in api.model_info(repo_id, revision=revision).siblings}
    files = {name for name in files if "/" not in name}
    model_type = None
    if "config.json" in files:
        file = api.hf_hub_download(repo_id, "config.json", revision=revision)
        model_type = json.loads(Path(file).read_text(encoding="utf-8")).get("model_type")
    others = sorted(name for name in files if name == "config.json" or ".safetensors" in name)
    if others and model_type not in CONFIG_CLASSES:
        raise ValueError(f"{repo_id} holds another model than a RETRO model ({others[0]}); choose another name")
    return files


__all__ = ["push_model"]
