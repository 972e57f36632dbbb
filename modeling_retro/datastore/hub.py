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
Transfers a datastore to and from a data set repository on the Hub.

A pushed datastore holds its chunks and neighbors as parquet, each as a configuration of `datasets`, so that
`load_dataset("user/datastore", "chunks")` reads them. It also holds its index, tokenizer and encoder, and the
manifest, which lists the sha256 of every file. Embeddings are not pushed, because the index replaces them.
"""

import copy
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetCard,
    HfApi,
    cached_assets_path,
    snapshot_download,
)
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError
from tqdm.auto import tqdm
from transformers.utils import is_datasets_available

from ..durable_files_retro import public_name, sync, sync_file
from .manifest import MANIFEST_NAME, TRAIN_SPLIT, Manifest, read_manifest, split_root


if is_datasets_available():  # if not, datastore_retro has raised an error that says what to install
    import pyarrow as pa
    import pyarrow.parquet as pq


ARROW_NAME = "data-00000-of-00001.arrow"
# The files of a datastore besides manifest and card.
PARTS = ("chunks/", "neighbors/", "splits/", "index.", "index-", "bm25", "tokenizer/", "encoder/")
FILES_PER_UPLOAD = 16
FILES_PER_COMMIT = 500

CARD = """---
tags: [retro, retrieval]
---

# {name}

A RETRO datastore: {chunks:,} chunks of {chunk_size} tokens out of {documents:,} documents, with their index
({index}) and neighbors. Tokenizer: {tokenizer}. Encoder: {encoder}.

```python
from modeling_retro import RetroRetriever

retriever = RetroRetriever.from_pretrained("{repo_id}")
```
"""


def push_datastore(
    path: Path,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload datastore",
) -> CommitInfo:
    """
    Uploads a datastore. Files that were already uploaded are skipped, so an interrupted push is resumed when it is run
    again. One commit at the end makes the upload visible, and until then the repository does not change. (The Hub
    accepts no commits of thousands of files. A datastore of that size takes several commits. The last one adds the
    manifest, without which the repository is not a datastore.)

    Args:
        path (`Path`): Folder of the datastore.
        repo_id (`str`): Repository, `"user/name"`. It is created if it does not exist.
        private (`bool`, *optional*): Whether a new repository is private.
        token (`str`, *optional*): Access token. Defaults to the stored one or that of the environment.
        revision (`str`, *optional*): Branch. It is created if it does not exist. Defaults to `"main"`.
        commit_message (`str`, *optional*, defaults to `"Upload datastore"`): Summary of the commit.

    Returns:
        `CommitInfo`: the commit. Its `oid` names the version that was pushed.

    Raises:
        `ValueError`: if the datastore is not finished, or the repository holds something else.
        `ConnectionError`: if the push is interrupted.
    """
    manifest = read_manifest(path)
    if manifest.index is None and manifest.bm25 is None:
        raise ValueError(f"{path} has no index; run `retro index` before it is pushed")
    if manifest.removed is not None:
        raise ValueError(
            f"{path} still holds the chunks of {manifest.removed.documents} removed documents; run "
            "`retro compact` before it is pushed"
        )
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
    repo = {"repo_id": repo_id, "repo_type": "dataset", "revision": revision or "main"}
    if revision is not None:
        api.create_branch(repo_id, repo_type="dataset", branch=revision, exist_ok=True)
    head = api.repo_info(**repo)
    present = {file.rfilename for file in head.siblings} - {"README.md", ".gitattributes"}
    foreign = {name for name in present if not name.startswith(PARTS)}
    if foreign and MANIFEST_NAME not in present:
        raise ValueError(f"{repo_id} holds something else than a datastore ({min(foreign)}); choose another name")
    card = _card(repo_id, manifest, api, repo if any(f.rfilename == "README.md" for f in head.siblings) else None)
    try:
        operations = _upload_files(path, manifest, api, repo)
        files = {operation.path_in_repo: operation.upload_info.sha256.hex() for operation in operations}
        public = _public_manifest(manifest)
        public.files = files
        text = json.dumps(public.seal().to_dict(), indent=2, sort_keys=True)
        operations += [CommitOperationDelete(name) for name in sorted(present - set(files) - {MANIFEST_NAME})]
        operations.append(CommitOperationAdd(MANIFEST_NAME, text.encode()))
        operations.append(CommitOperationAdd("README.md", str(card).encode()))
        return _commit(operations, commit_message, head.sha, present, api, repo)
    except (HTTPError, RuntimeError) as error:  # errors of the Hub's client
        raise ConnectionError(f"the push to {repo_id} broke off; push again to go on ({error})") from error


def _upload_files(path: Path, manifest: Manifest, api: HfApi, repo: dict[str, str]) -> list[CommitOperationAdd]:
    """Uploads the files that the Hub keeps as LFS, a few at a time. The others come with the commit."""
    shards = list(_shards(manifest))
    others = [file for shard in shards for file in sorted((path / shard).glob("*.json"))]
    others += [path / name for name in sorted(manifest.index.sha256 if manifest.index is not None else ())]
    if (bm25 := manifest.bm25) is not None:
        others += [path / bm25.folder / name for name in sorted(bm25.sha256)]
    others += [file for name in ("tokenizer/*", "encoder/**/*") for file in sorted(path.glob(name))]
    others = [file for file in others if file.is_file()]
    operations = []
    with tempfile.TemporaryDirectory() as folder, tqdm(total=len(shards) + len(others), desc=repo["repo_id"]) as bar:

        def upload(files: list[tuple[str, Path]]) -> None:
            additions = [CommitOperationAdd(name, file) for name, file in files]
            api.preupload_lfs_files(additions=additions, **repo)
            operations.extend(additions)
            bar.update(len(additions))

        for start in range(0, len(shards), FILES_PER_UPLOAD):
            # Parquet is always kept as LFS. After the upload, the commit needs only its checksum.
            group = enumerate(shards[start : start + FILES_PER_UPLOAD])
            upload([(f"{shard}.parquet", _write_parquet(path / shard, Path(folder, str(n)))) for n, shard in group])
        upload([(file.relative_to(path).as_posix(), file) for file in others])
    return operations


def _write_parquet(shard: Path, file: Path) -> Path:
    with pa.memory_map(str(shard / ARROW_NAME)) as source, pa.ipc.open_stream(source) as reader:
        # List elements keep their Arrow name, so that reading gives the same Arrow file.
        pq.write_table(reader.read_all(), file, use_content_defined_chunking=True, use_compliant_nested_type=False)
    return file


def _commit(
    operations: list[CommitOperationAdd | CommitOperationDelete],
    message: str,
    parent: str,
    present: set[str],
    api: HfApi,
    repo: dict[str, str],
) -> CommitInfo:
    """
    Commits all operations at once, or if there are too many, in several commits. The first of these then removes the
    manifest, which makes a repository a datastore, and the last one adds it again.
    """
    parts = [operations[start : start + FILES_PER_COMMIT] for start in range(0, len(operations), FILES_PER_COMMIT)]
    if len(parts) > 1 and MANIFEST_NAME in present:
        parts[0].append(CommitOperationDelete(MANIFEST_NAME))
    for number, part in enumerate(parts):
        title = message if len(parts) == 1 else f"{message} (part {number + 1} of {len(parts)})"
        commit = api.create_commit(operations=part, commit_message=title, parent_commit=parent, **repo)
        parent = commit.oid
    return commit


def download_datastore(repo_id: str, revision: str | None = None, **hub_kwargs) -> Path:
    """
    Downloads a datastore into the cache, unless it is already there.

    Args:
        repo_id (`str`): Repository, `"user/name"`.
        revision (`str`, *optional*): Branch, tag or commit.
        hub_kwargs: Further arguments of [`~huggingface_hub.snapshot_download`].

    Returns:
        `Path`: a folder like the one that was pushed, but without embeddings. Its Arrow files are memory-mapped.

    Raises:
        `ValueError`: if the repository is not a datastore, or if a file is missing or its checksum differs from the
            manifest.
    """
    try:
        snapshot = Path(snapshot_download(repo_id, repo_type="dataset", revision=revision, **hub_kwargs))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(f"{repo_id} is neither a folder nor a datastore that can be found: {error}") from error
    manifest = read_manifest(snapshot)
    if manifest.files is None:  # a folder that was uploaded without conversion
        return snapshot
    target = cached_assets_path("retro", namespace=repo_id, subfolder=snapshot.name)
    if (target / MANIFEST_NAME).is_file():
        return target
    unlisted = [name for name in (f"{shard}.parquet" for shard in _shards(manifest)) if name not in manifest.files]
    if unlisted:
        raise ValueError(f"{MANIFEST_NAME} of {repo_id} does not list {unlisted[0]}, which it needs")
    # The folder is made elsewhere and renamed, so that `target` is always complete and verified.
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        for name, sha256 in tqdm(manifest.files.items(), desc=f"Verifying {repo_id}"):
            _install(snapshot / name, sha256, temporary / name)
        shutil.copy(snapshot / MANIFEST_NAME, temporary / MANIFEST_NAME)
        sync(temporary)
        try:
            os.replace(temporary, target)
            sync_file(target.parent)
        except OSError:  # another process was faster
            if not (target / MANIFEST_NAME).is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _install(source: Path, sha256: str, target: Path) -> None:
    """Verifies a downloaded file and puts it in its place. A parquet file becomes an Arrow folder."""
    if not source.is_file():
        raise ValueError(f"the datastore lacks {source.name}, which its {MANIFEST_NAME} lists")
    with source.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise ValueError(f"{source} was altered: its checksum is not the one in {MANIFEST_NAME}")
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix != ".parquet":
        target.symlink_to(source.resolve())
        return
    # This gives the bytes of the Arrow file that was pushed: one record batch, which is read as one view.
    table = pq.read_table(source).combine_chunks()
    folder = target.with_suffix("")
    folder.mkdir(exist_ok=True)
    with pa.OSFile(str(folder / ARROW_NAME), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def _shards(manifest: Manifest) -> Iterator[str]:
    """Folders of chunks and neighbors, relative to the datastore."""
    for split, record in manifest.splits.items():
        root = split_root(split)
        yield from (f"{root}chunks/{shard.name}" for shard in record.chunk_shards)
        yield from (f"{root}neighbors/{shard.folder_name}" for shard in record.neighbor_shards)


def _public_manifest(manifest: Manifest) -> Manifest:
    """The manifest without embeddings, which are not pushed, and without the folders of this machine."""
    manifest = copy.deepcopy(manifest)
    manifest.compacted = None  # removed documents are not published
    for record in manifest.splits.values():
        record.embeddings = None
        for shard in record.chunk_shards:
            shard.documents_sha256 = None  # the user's own ids are not published
        for source in record.chunks.sources:
            if Path(source.path).is_absolute():  # older datastores recorded absolute paths
                source.path = Path(source.path).name
    for part in (manifest.tokenizer, manifest.encoder):
        if part is not None:
            part.name = public_name(part.name)
    return manifest


def _card(repo_id: str, manifest: Manifest, api: HfApi, repo: dict[str, str] | None) -> DatasetCard:
    """The existing card of the repository or a new one, with the configurations of this datastore."""
    if repo is None:
        train = manifest.train.chunks
        public = _public_manifest(manifest)
        indexes = [manifest.index.factory] if manifest.index is not None else []
        indexes += ["BM25"] if manifest.bm25 is not None else []
        text = CARD.format(
            name=repo_id.split("/")[-1],
            repo_id=repo_id,
            chunks=train.num_chunks,
            documents=train.num_documents,
            chunk_size=manifest.chunk_size,
            index=" and ".join(indexes),
            tokenizer=public.tokenizer.name,
            encoder=public.encoder.name if public.encoder is not None else "none",
        )
    else:
        text = Path(api.hf_hub_download(filename="README.md", **repo)).read_text(encoding="utf-8")
    card = DatasetCard(text, ignore_metadata_errors=True)
    patterns: dict[str, list[dict[str, str]]] = {}
    for folder in dict.fromkeys(os.path.dirname(shard) for shard in _shards(manifest)):
        split = folder.split("/")[1] if folder.startswith("splits/") else TRAIN_SPLIT
        patterns.setdefault(os.path.basename(folder), []).append({"split": split, "path": f"{folder}/*.parquet"})
    card.data["configs"] = [{"config_name": name, "data_files": files} for name, files in patterns.items()]
    return card
