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
Reads the text of documents that are no text files, such as PDF, with the library kreuzberg.

A document is data of strangers. It is parsed in a child process that has little memory and little time and is started
again after it has died. This file is also the program of that process, so it imports nothing of the package.
"""

import atexit
import functools
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from multiprocessing import Pipe
from multiprocessing.connection import Connection


# The formats that are read, by suffix.
OFFICE = "application/vnd.openxmlformats-officedocument"
FORMATS = {
    ".html": "text/html",
    ".htm": "text/html",
    ".xhtml": "text/html",
    ".pdf": "application/pdf",
    ".docx": f"{OFFICE}.wordprocessingml.document",
    ".pptx": f"{OFFICE}.presentationml.presentation",
    ".xlsx": f"{OFFICE}.spreadsheetml.sheet",
    ".odt": "application/vnd.oasis.opendocument.text",
    ".epub": "application/epub+zip",
    ".ipynb": "application/x-ipynb+json",
    ".rtf": "application/rtf",
    ".eml": "message/rfc822",
}

MAX_SECONDS = 60
MAX_MEMORY = 2 << 30  # bytes of address space
MAX_UNPACKED = 10  # times the largest size of a document
_MAX_WRITTEN = 64 << 20  # bytes of a file; kreuzberg writes its PDF library, of 8 MB, before it loads it


class Unreadable(ValueError):
    """A file that holds no text that can be read. The message is the reason."""


def extract_text(content: bytes, mime_type: str, max_bytes: int) -> tuple[str, str | None]:
    """
    Reads the text of a document in a child process. Nothing in it is executed, and nothing is fetched.

    Args:
        content (`bytes`): The file.
        mime_type (`str`): One of the values of `FORMATS`.
        max_bytes (`int`): The largest size of the text.

    Returns:
        `tuple[str, str | None]`: the text, and the title of the document if it has one.

    Raises:
        Unreadable: If the document is damaged, has no text, or needs too much time or memory.
        ImportError: If kreuzberg is missing.
    """
    if importlib.util.find_spec("kreuzberg") is None:
        raise ImportError('it needs the extra `documents`: `pip install "retro-transformers[documents]"`')
    if content.startswith(b"PK"):
        _check_archive(content, MAX_UNPACKED * max_bytes)
    answer = _worker(os.getpid()).read(content, mime_type, max_bytes)
    if "error" in answer:
        raise Unreadable(f"cannot be read: {answer['error']}")
    if not answer["text"].strip():
        raise Unreadable("no text in it (pages that are pictures of text are not read)")
    return answer["text"], answer["title"]


def _check_archive(content: bytes, limit: int) -> None:
    """Refuses a file that unpacks to too much. What it says of its sizes may be a lie; the child's memory is not."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise Unreadable(f"cannot be read: damaged ({error})") from error
    if unpacked > limit:
        raise Unreadable(f"unpacks to {unpacked} bytes, over the limit of {limit}")


class _Worker:
    """The child process, which reads one document after the other."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        # kreuzberg writes its PDF library to the folder of temporary files, where nobody else may put one.
        self._folder = tempfile.TemporaryDirectory(prefix="retro-documents-")
        atexit.register(self.stop)

    def read(self, content: bytes, mime_type: str, max_bytes: int) -> dict[str, str | None]:
        """The answer of the child to one document: `text` and `title`, or `error`."""
        if self._process is None:
            self._start()
        try:
            self._connection.send_bytes(json.dumps({"mime_type": mime_type, "max_bytes": max_bytes}).encode())
            self._connection.send_bytes(content)
            if not self._connection.poll(MAX_SECONDS):
                self.stop()
                return {"error": f"it takes longer than {MAX_SECONDS} seconds"}
            return json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            self.stop()
            return {"error": f"damaged, or it needs more than {MAX_MEMORY >> 30} GiB of memory"}

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        environment = {**os.environ, "TMPDIR": self._folder.name, "MALLOC_ARENA_MAX": "2"}
        command = [sys.executable, "-P", __file__, str(theirs.fileno())]
        self._process = subprocess.Popen(
            command,
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        theirs.close()

    def stop(self) -> None:
        """Ends the child. The next document starts it again."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._connection.close()
            self._process = None


@functools.cache
def _worker(process_id: int) -> _Worker:
    """The child of this process. A forked process gets one of its own."""
    return _Worker()


def _limit_resources() -> None:
    try:
        import resource
    except ImportError:
        return
    for name, limit in (("RLIMIT_AS", MAX_MEMORY), ("RLIMIT_FSIZE", _MAX_WRITTEN), ("RLIMIT_CORE", 0)):
        try:
            resource.setrlimit(getattr(resource, name), (limit, limit))
        except (ValueError, OSError):  # macOS has no limit of the address space
            continue


def _serve(connection: Connection) -> None:
    """Answers documents until the parent closes the connection."""
    _limit_resources()
    import kreuzberg

    config = kreuzberg.ExtractionConfig(use_cache=False, enable_quality_processing=False)
    while True:
        try:
            asked = json.loads(connection.recv_bytes())
            content = connection.recv_bytes()
        except EOFError:
            return
        try:
            found = kreuzberg.extract_bytes_sync(content, asked["mime_type"], config=config)
            size = len(found.content.encode())
            if size > asked["max_bytes"]:
                answer = {"error": f"a text of {size} bytes is over the limit of {asked['max_bytes']}"}
            else:
                answer = {"text": found.content, "title": _title(found.metadata or {})}
        except Exception as error:
            lines = str(error).splitlines() or [type(error).__name__]
            answer = {"error": lines[0].removeprefix("ParsingError: ")[:200]}
        connection.send_bytes(json.dumps(answer).encode())


def _title(metadata: dict) -> str | None:
    names = (metadata.get("title"), (metadata.get("core_properties") or {}).get("title"), metadata.get("subject"))
    return next((name.strip() for name in names if isinstance(name, str) and name.strip()), None)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
