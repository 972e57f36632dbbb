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
Turns a StackExchange dump into pairs for the retriever.

Writes `title_body.jsonl.gz`, `title_answer.jsonl.gz` (with the best answer to a question) and `duplicates.jsonl.gz`
(with the titles of a question and of the question that it repeats). Their lines are `["anchor", "positive"]`.

Posts are read as a stream. A text whose partner has not come yet waits in a temporary SQLite file beside the output,
so dumps of any size need the same memory.
"""

import gzip
import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, TextIO
from xml.parsers import expat

from tqdm.auto import tqdm

from data_prep.stage_files import whole


try:
    import py7zr
    from bs4 import BeautifulSoup
    from py7zr.io import Py7zIO, WriterFactory
except ImportError as error:
    raise ImportError(
        "Reading StackExchange dumps needs `py7zr` and `beautifulsoup4`; install the extra that brings them: "
        "`pip install retro-transformers[stackexchange]`"
    ) from error


_QUESTION, _ANSWER, _DUPLICATE = "1", "2", "3"
_READ_SIZE = 1 << 20

_SCHEMA = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE questions (id INTEGER PRIMARY KEY, title TEXT, accepted INTEGER);
CREATE TABLE answers (question INTEGER PRIMARY KEY, body TEXT, score INTEGER);
CREATE TABLE low_answers (id INTEGER PRIMARY KEY, question INTEGER, body TEXT);
CREATE TABLE duplicates (question INTEGER, original INTEGER, UNIQUE (question, original));
"""

_BETTER_ANSWER = """
INSERT INTO answers VALUES (?, ?, ?)
ON CONFLICT (question) DO UPDATE SET body = excluded.body, score = excluded.score WHERE excluded.score > score
"""
_ANSWERS = """
SELECT title, COALESCE(answers.body, low_answers.body) FROM questions
LEFT JOIN answers ON answers.question = questions.id
LEFT JOIN low_answers ON low_answers.id = accepted AND low_answers.question = questions.id
WHERE COALESCE(answers.body, low_answers.body) IS NOT NULL ORDER BY questions.id
"""
_DUPLICATES = """
SELECT one.title, other.title FROM duplicates JOIN questions AS one ON one.id = question
JOIN questions AS other ON other.id = original WHERE one.title != other.title ORDER BY question, original
"""


def html_to_text(html: str) -> str:
    """
    Extracts the text of a post.

    Args:
        html (`str`):
            Body of the post.

    Returns:
        `str`: the text in one line, without markup.
    """
    soup = BeautifulSoup(html, "html.parser")
    for line_break in soup.find_all("br"):
        line_break.replace_with("\n")
    return " ".join(soup.get_text().split())


class _RowParser:
    """
    Passes the attributes of each `<row …/>` of an XML stream to a function, and keeps nothing.

    A dump declares no entities. A document type could declare some, so it is refused.
    """

    def __init__(self, name: str, on_row: Callable[[Mapping[str, str]], None]):
        self.name = name
        self.on_row = on_row
        self.parser = expat.ParserCreate()
        self.parser.StartElementHandler = self._start_element
        self.parser.StartDoctypeDeclHandler = self._refuse
        self.parser.EntityDeclHandler = self._refuse

    def _start_element(self, tag: str, attributes: dict[str, str]) -> None:
        if tag == "row":
            self.on_row(attributes)

    def _refuse(self, *declaration: Any) -> None:
        raise ValueError("a document type with entities is refused; dumps have none")

    def feed(self, data: bytes, is_last: bool = False) -> None:
        try:
            self.parser.Parse(data, is_last)
        except KeyError as error:
            raise ValueError(f"{self.name}:{self.parser.CurrentLineNumber}: a row has no {error}") from error
        except (ValueError, expat.ExpatError) as error:
            raise ValueError(f"{self.name}:{self.parser.CurrentLineNumber}: {error}") from error


class _Member(Py7zIO):
    """A member of an archive that is parsed while it is unpacked."""

    def __init__(self, parser: _RowParser, progress: tqdm):
        self.parser = parser
        self.progress = progress
        self.written = 0

    def write(self, s: bytes | bytearray) -> int:
        self.parser.feed(bytes(s))
        self.progress.update(len(s))
        self.written += len(s)
        return len(s)

    def read(self, size: int | None = None) -> bytes:
        return b""

    def seek(self, offset: int, whence: int = 0) -> int:
        return 0

    def flush(self) -> None:
        pass

    def size(self) -> int:
        return self.written


class _OneMember(WriterFactory):
    def __init__(self, parser: _RowParser, progress: tqdm):
        self.member = _Member(parser, progress)

    def create(self, filename: str) -> Py7zIO:
        return self.member


def _read(path: Path, suffix: str, on_row: Callable[[Mapping[str, str]], None]) -> bool:
    """Parses the file, or the members of an archive, that end in `suffix`. Returns whether there were any."""
    if path.suffix != ".7z":
        if not path.name.endswith(suffix):
            return False
        parser = _RowParser(str(path), on_row)
        with open(path, "rb") as file, tqdm(desc=f"Reading {suffix}", unit="B", unit_scale=True) as progress:
            while block := file.read(_READ_SIZE):
                parser.feed(block)
                progress.update(len(block))
        parser.feed(b"", is_last=True)
        return True
    try:
        with py7zr.SevenZipFile(path) as archive:
            members = [name for name in archive.getnames() if Path(name).name.endswith(suffix)]
        for name in members:
            parser = _RowParser(f"{path}/{name}", on_row)
            progress = tqdm(desc=f"Reading {name}", unit="B", unit_scale=True)
            with py7zr.SevenZipFile(path) as archive, progress:
                archive.extract(targets=[name], factory=_OneMember(parser, progress))
            parser.feed(b"", is_last=True)
    except (py7zr.exceptions.ArchiveError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be unpacked: {error or type(error).__name__}") from error
    return bool(members)


class _PairFile:
    """A file of lines `["anchor", "positive"]`."""

    def __init__(self, file: TextIO):
        self.file = file
        self.pairs = 0

    def write(self, anchor: str, positive: str) -> None:
        if anchor and positive:
            self.file.write(json.dumps([anchor, positive], ensure_ascii=False) + "\n")
            self.pairs += 1


class _Posts:
    """Processes the rows of a dump. Texts that cannot be written at once wait in the database."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        files: Mapping[str, _PairFile],
        min_question_score: int,
        min_answer_score: int,
    ):
        self.connection = connection
        self.files = files
        self.min_question_score = min_question_score
        self.min_answer_score = min_answer_score
        connection.executescript(_SCHEMA)

    def add_post(self, row: Mapping[str, str]) -> None:
        score = int(row["Score"])
        if row["PostTypeId"] == _QUESTION and score >= self.min_question_score:
            title = " ".join(row["Title"].split())
            values = (int(row["Id"]), title, int(row.get("AcceptedAnswerId", -1)))
            self.connection.execute("INSERT OR REPLACE INTO questions VALUES (?, ?, ?)", values)
            self.files["title_body"].write(title, html_to_text(row["Body"]))
        elif row["PostTypeId"] == _ANSWER and score >= self.min_answer_score:
            self.connection.execute(_BETTER_ANSWER, (int(row["ParentId"]), row["Body"], score))
        elif row["PostTypeId"] == _ANSWER:
            values = (int(row["Id"]), int(row["ParentId"]), row["Body"])
            self.connection.execute("INSERT OR REPLACE INTO low_answers VALUES (?, ?, ?)", values)

    def add_link(self, row: Mapping[str, str]) -> None:
        if row["LinkTypeId"] == _DUPLICATE:
            ends = (int(row["PostId"]), int(row["RelatedPostId"]))
            self.connection.execute("INSERT OR IGNORE INTO duplicates VALUES (?, ?)", ends)

    def write_joined(self) -> None:
        """Writes the pairs whose two texts are in different rows."""
        for title, body in tqdm(self.connection.execute(_ANSWERS), desc="Writing answers", unit=" pairs"):
            self.files["title_answer"].write(title, html_to_text(body))
        for title, original in tqdm(self.connection.execute(_DUPLICATES), desc="Writing duplicates", unit=" pairs"):
            self.files["duplicates"].write(title, original)


def stackexchange_pairs(
    inputs: Sequence[str | Path], output_dir: str | Path, min_question_score: int = 0, min_answer_score: int = 1
) -> dict[str, int]:
    """
    Turns a StackExchange dump into pairs.

    Args:
        inputs (`Sequence[str]`):
            The dump: archives `.7z`, or files whose names end in `Posts.xml` and `PostLinks.xml`. Links are optional.
        output_dir (`str`):
            Folder for `title_body.jsonl.gz`, `title_answer.jsonl.gz` and `duplicates.jsonl.gz`.
        min_question_score (`int`, *optional*, defaults to 0):
            Questions with a lower score are left out.
        min_answer_score (`int`, *optional*, defaults to 1):
            Answers with a lower score are left out. Among the others the best is used, or the first of several best.
            If there are none, the answer that the asker accepted is used, whatever its score.

    Returns:
        `dict[str, int]`: number of pairs in each file.

    Raises:
        `ValueError`: if the XML is broken, declares entities, or lacks attributes of posts. The message names the file
            and the line.
    """
    paths = [Path(path) for path in inputs]
    with whole(Path(output_dir)) as folder, ExitStack() as stack:
        folder.mkdir()
        database = folder / "waiting.sqlite"
        connection = stack.enter_context(closing(sqlite3.connect(database, check_same_thread=False)))
        files = {
            name: _PairFile(stack.enter_context(gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8")))
            for name in ("title_body", "title_answer", "duplicates")
        }
        posts = _Posts(connection, files, min_question_score, min_answer_score)
        found = [_read(path, "Posts.xml", posts.add_post) for path in paths]
        if not any(found):
            raise ValueError(f"no Posts.xml in {', '.join(map(str, paths))}")
        for path in paths:
            _read(path, "PostLinks.xml", posts.add_link)
        posts.write_joined()
        stack.close()
        database.unlink()
    return {name: file.pairs for name, file in files.items()}
