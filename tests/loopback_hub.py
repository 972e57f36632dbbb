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
A Hugging Face Hub in memory, on 127.0.0.1: what pushing, loading and resuming need, so that tests go through the real
client over real HTTP. No xet, no pull requests.

    with loopback_hub() as hub:
        hub.run("from transformers import AutoModel; AutoModel.from_pretrained(...)", home=tmp_path / "alice")
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


# The Hub keeps these as LFS whatever their size (`datasets` relies on it for parquet); everything else by size.
LFS_SUFFIXES = (".arrow", ".bin", ".faiss", ".npy", ".parquet", ".safetensors")


@dataclass(frozen=True)
class StoredFile:
    data: bytes
    is_lfs: bool

    @cached_property
    def oid(self) -> str:
        """Git blob id."""
        pointer = f"oid sha256:{self.etag}\nsize {len(self.data)}\n".encode() if self.is_lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()

    @cached_property
    def etag(self) -> str:
        """sha256 of an LFS file, git blob id of any other."""
        return hashlib.sha256(self.data).hexdigest() if self.is_lfs else self.oid

    def describe(self, path: str) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(self.data), "oid": self.oid}
        if self.is_lfs:
            entry["lfs"] = {"oid": self.etag, "size": len(self.data), "pointerSize": 128}
        return entry


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, StoredFile]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)

    def commit(self, branch: str, files: dict[str, StoredFile], title: str) -> str:
        listing = json.dumps([title, len(self.commits), sorted((path, file.etag) for path, file in files.items())])
        sha = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[sha], self.refs[branch] = files, sha
        return sha

    def files(self, revision: str = "main") -> dict[str, StoredFile]:
        return self.commits[self.refs.get(revision, revision)]


class LoopbackHub:
    """
    Attributes:
        url (`str`): The endpoint.
        token (`str`): The one token that may write and may read private repos. Any other is refused.
        user (`str`): The namespace of that token.
        repos (`dict[tuple[str, str], Repository]`): By type (`"models"`, `"datasets"`) and id.
        requests (`list[str]`): `"METHOD /path"` of everything asked so far.
    """

    user = "alice"
    token = "hf_of_alice"

    def __init__(self, url: str, lfs_threshold: int):
        self.url = url
        self.lfs_threshold = lfs_threshold
        self.repos: dict[tuple[str, str], Repository] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self._failing: list[list] = []

    def fail_after(self, count: int, pattern: str = "", times: int | None = None, hang_up: bool = False) -> None:
        """
        Answers 507, which the client does not retry, once `count` more requests `"METHOD /path"` match `pattern`; so
        many `times`, or until [`recover`]. With `hang_up` it closes the connection instead, as a network that is gone.
        """
        self._failing.append([re.compile(pattern), count, None if times is None else count + times, hang_up])

    def recover(self) -> None:
        """Ends what `fail_after` began."""
        self._failing.clear()

    def failure(self, request: str) -> str | None:
        """How this request fails, if it does."""
        with self.lock:
            self.requests.append(request)
            for rule in self._failing:
                pattern, first, end, hang_up = rule
                if not pattern.search(request):
                    continue
                rule[1:3] = first - 1, None if end is None else end - 1
                if first <= 0 and (end is None or end > 0):
                    return "hang up" if hang_up else "answer 507"
            return None

    def env(self, home: str | os.PathLike, token: str | None = token) -> dict[str, str]:
        """Environment of a process that uses this Hub, with a cache of its own in the folder `home`."""
        offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
        environment = {name: value for name, value in os.environ.items() if name not in offline}
        environment |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        environment.pop("HF_TOKEN", None)
        return environment if token is None else environment | {"HF_TOKEN": token}

    def run(
        self, code: str, *args: str, home: str | os.PathLike, token: str | None = token, check: bool = True
    ) -> subprocess.CompletedProcess:
        """Runs Python code in a new process in the new folder `home`, away from the repository of these tests."""
        Path(home).mkdir(parents=True, exist_ok=True)
        result = subprocess.run(
            [sys.executable, "-c", code, *args],
            env=self.env(home, token),
            cwd=home,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if check and result.returncode != 0:
            raise AssertionError(f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}")
        return result


@dataclass(frozen=True)
class Response:
    data: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})


class HubError(Exception):
    def __init__(self, status: int, code: str = "", message: str = ""):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class HubRequestHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "HubServer"

    def log_message(self, format: str, *args: Any) -> None:
        """The requests are in `hub.requests`; nothing is printed."""

    def do_GET(self) -> None:
        self.dispatch()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def dispatch(self) -> None:
        body = self.read_body()
        request = f"{self.command} {urlsplit(self.path).path}"
        try:
            failure = self.hub.failure(request)
            if failure == "hang up":
                self.close_connection = True
                return
            if failure is not None:
                raise HubError(507, message="the test made this request fail")
            response = self.answer(request, body)
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            response = Response(json.dumps({"error": error.message}).encode(), error.status, headers)
        if not isinstance(response, Response):
            response = Response(json.dumps(response).encode())
        self.send_response(response.status, HTTPStatus(response.status).phrase)
        self.send_header("Content-Length", str(len(response.data)))
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.data)

    def answer(self, request: str, body: bytes) -> "Response | dict | list":
        for pattern, handler in self.ROUTES:
            if match := re.fullmatch(pattern, request):
                self.authorise(writes=self.command not in ("GET", "HEAD") and handler not in self.READING_POSTS)
                with self.hub.lock:
                    return handler(self, body, *(group and unquote(group) for group in match.groups()))
        raise HubError(404, message=f"the loopback Hub does not know {request}")

    @property
    def hub(self) -> LoopbackHub:
        return self.server.hub

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def authorise(self, writes: bool) -> None:
        given = self.headers.get("Authorization")
        # An LFS upload goes to a signed address, without the token.
        if given is not None and given != f"Bearer {self.hub.token}":
            raise HubError(401, message="Invalid credentials in Authorization header")
        if given is None and writes and not self.path.startswith("/lfs/"):
            raise HubError(401, message="a token is needed to write")

    def repo(self, kind: str | None, repo_id: str) -> Repository:
        repo = self.hub.repos.get((kind or "models", repo_id))
        if repo is None or (repo.private and self.headers.get("Authorization") is None):
            raise HubError(404, "RepoNotFound", "Repository not found")
        return repo

    def snapshot(
        self, kind: str | None, repo_id: str, revision: str | None
    ) -> tuple[Repository, str, dict[str, StoredFile]]:
        repo = self.repo(kind, repo_id)
        sha = repo.refs.get(revision or "main", revision)
        if sha not in repo.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, sha, repo.commits[sha]

    # ---- repositories

    def create_repo(self, body: bytes) -> Response | dict:
        request = json.loads(body)
        kind, repo_id = key = self.key_of(request)
        url = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{repo_id}"
        if key in self.hub.repos:
            return Response(json.dumps({"error": "You already created this repo", "url": url}).encode(), 409)
        repo = self.hub.repos[key] = Repository(private=request.get("visibility") == "private")
        repo.commit("main", {}, "initial commit")
        return {"url": url, "name": repo_id}

    def key_of(self, request: dict) -> tuple[str, str]:
        return f"{request.get('type') or 'model'}s", f"{request['organization'] or self.hub.user}/{request['name']}"

    def delete_repo(self, body: bytes) -> dict:
        key = self.key_of(json.loads(body))
        self.repo(*key)
        del self.hub.repos[key]
        return {}

    def whoami(self, body: bytes) -> dict:
        if self.headers.get("Authorization") is None:
            raise HubError(401, message="a token is needed")
        return {"type": "user", "name": self.hub.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def validate_yaml(self, body: bytes) -> dict:
        return {"errors": [], "warnings": []}

    def create_branch(self, body: bytes, kind: str, repo_id: str, branch: str) -> dict:
        repo, sha, _ = self.snapshot(kind, repo_id, json.loads(body).get("startingPoint"))
        if branch in repo.refs:
            raise HubError(409, message="Reference already exists")
        repo.refs[branch] = sha
        return {}

    def create_tag(self, body: bytes, kind: str, repo_id: str, revision: str) -> dict:
        tag = json.loads(body)["tag"]
        repo, sha, _ = self.snapshot(kind, repo_id, revision)
        if tag in repo.refs:
            raise HubError(409, message="Reference already exists")
        repo.refs[tag] = sha
        repo.tags.add(tag)
        return {}

    def list_refs(self, body: bytes, kind: str, repo_id: str) -> dict:
        repo = self.repo(kind, repo_id)
        entries = {name: {"name": name, "targetCommit": sha} for name, sha in repo.refs.items()}
        return {
            "branches": [entry | {"ref": f"refs/heads/{n}"} for n, entry in entries.items() if n not in repo.tags],
            "tags": [entry | {"ref": f"refs/tags/{n}"} for n, entry in entries.items() if n in repo.tags],
            "converts": [],
        }

    # ---- reading

    def repo_info(self, body: bytes, kind: str, repo_id: str, revision: str | None) -> dict:
        repo, sha, files = self.snapshot(kind, repo_id, revision)
        siblings = [{"rfilename": path, "size": len(file.data), "blobId": file.oid} for path, file in files.items()]
        return {"id": repo_id, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []}

    def tree(self, body: bytes, kind: str, repo_id: str, revision: str, folder: str | None) -> list[dict]:
        files = self.snapshot(kind, repo_id, revision)[2]
        prefix = f"{folder.strip('/')}/" if folder else ""
        inside = {path: file for path, file in files.items() if path.startswith(prefix)}
        if prefix and not inside:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        entries = [file.describe(path) for path, file in inside.items()]
        parents = {str(parent) for path in inside for parent in Path(path).parents if str(parent).startswith(prefix)}
        entries += [self.describe_folder(parent) for parent in sorted(parents - {"."})]
        if parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1"):
            return entries
        return [entry for entry in entries if "/" not in entry["path"].removeprefix(prefix)]

    @staticmethod
    def describe_folder(path: str) -> dict:
        return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}

    def paths_info(self, body: bytes, kind: str, repo_id: str, revision: str) -> list[dict]:
        files = self.snapshot(kind, repo_id, revision)[2]
        asked = parse_qs(body.decode()).get("paths", [])
        folders = {str(parent) for path in files for parent in Path(path).parents}
        return [files[path].describe(path) for path in asked if path in files] + [
            self.describe_folder(path) for path in asked if path in folders
        ]

    def resolve(self, body: bytes, kind: str | None, repo_id: str, revision: str, path: str) -> Response:
        _, sha, files = self.snapshot(kind, repo_id, revision)
        if path not in files:
            raise HubError(404, "EntryNotFound", "Entry not found")
        data = files[path].data
        headers = {"X-Repo-Commit": sha, "ETag": f'"{files[path].etag}"', "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        requested = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if requested is None:
            return Response(data, 200, headers)
        first, last = requested.groups()
        start = int(first) if first else max(len(data) - int(last), 0)
        stop = min(int(last) + 1, len(data)) if first and last else len(data)
        if start >= stop:
            raise HubError(416, message="Range not satisfiable")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return Response(data[start:stop], 206, headers)

    # ---- writing

    def preupload(self, body: bytes, kind: str, repo_id: str, revision: str) -> dict:
        files = self.snapshot(kind, repo_id, revision)[2]
        answers = []
        for file in json.loads(body)["files"]:
            is_lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] >= self.hub.lfs_threshold
            answer = {"path": file["path"], "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False}
            answers.append(answer | ({"oid": files[file["path"]].etag} if file["path"] in files else {}))
        return {"files": answers}

    def lfs_batch(self, body: bytes, kind: str | None, repo_id: str) -> dict:
        self.repo(kind, repo_id)
        objects = []
        for item in json.loads(body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}}
            objects.append(item | ({} if item["oid"] in self.hub.lfs_objects else upload))
        return {"transfer": "basic", "objects": objects}

    def put_lfs_object(self, body: bytes, oid: str) -> dict:
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, message="the sha256 of the upload is not the announced one")
        self.hub.lfs_objects[oid] = body
        return {}

    def create_commit(self, body: bytes, kind: str, repo_id: str, branch: str) -> dict:
        repo, head, files = self.snapshot(kind, repo_id, branch)
        if branch not in repo.refs or branch in repo.tags:
            raise HubError(400, message=f"{branch} is not a branch")
        files = dict(files)
        title = ""
        for line in body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit", head) != head:
                    raise HubError(412, message="A commit has happened since")
            elif key == "file":
                files[value["path"]] = StoredFile(base64.b64decode(value["content"]), is_lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.lfs_objects:
                    raise HubError(400, message=f"LFS object of {value['path']} was never uploaded")
                files[value["path"]] = StoredFile(self.hub.lfs_objects[value["oid"]], is_lfs=True)
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
            elif key == "deletedFolder":
                files = {path: file for path, file in files.items() if not path.startswith(value["path"])}
            else:
                raise HubError(400, message=f"unknown operation {key}")
        sha = repo.commit(branch, files, title)
        url = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{repo_id}/commit/{sha}"
        return {"commitOid": sha, "commitUrl": url, "success": True}

    READING_POSTS = (validate_yaml, paths_info)
    ROUTES = [
        (r"POST /api/repos/create", create_repo),
        (r"DELETE /api/repos/delete", delete_repo),
        (r"GET /api/whoami-v2", whoami),
        (r"POST /api/validate-yaml", validate_yaml),
        (r"PUT /lfs/([0-9a-f]{64})", put_lfs_object),
        (r"POST /(?:(\w+)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", lfs_batch),
        (r"POST /api/(\w+)/([^/]+/[^/]+)/preupload/([^/]+)", preupload),
        (r"POST /api/(\w+)/([^/]+/[^/]+)/commit/([^/]+)", create_commit),
        (r"POST /api/(\w+)/([^/]+/[^/]+)/paths-info/([^/]+)", paths_info),
        (r"POST /api/(\w+)/([^/]+/[^/]+)/branch/([^/]+)", create_branch),
        (r"POST /api/(\w+)/([^/]+/[^/]+)/tag/([^/]+)", create_tag),
        (r"GET /api/(\w+)/([^/]+/[^/]+)/refs", list_refs),
        (r"GET /api/(\w+)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", tree),
        (r"GET /api/(\w+)/([^/]+/[^/]+)(?:/revision/([^/]+))?", repo_info),
        (r"(?:GET|HEAD) /(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", resolve),
    ]


class HubServer(ThreadingHTTPServer):
    daemon_threads = True
    hub: LoopbackHub


@contextmanager
def loopback_hub(lfs_threshold: int = 1_000_000) -> Iterator[LoopbackHub]:
    """
    Serves an empty Hub until the block ends.

    Args:
        lfs_threshold (`int`, *optional*, defaults to 1,000,000): Files of so many bytes or more are uploaded as LFS.
    """
    server = HubServer(("127.0.0.1", 0), HubRequestHandler)
    server.hub = LoopbackHub(f"http://127.0.0.1:{server.server_port}", lfs_threshold)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
