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
"""A folder with files of every kind: text comes of all that hold text, and the others are named."""

import json
import os
import re
import signal

import pytest
from mixed_folder import docx, epub, html, mixed_folder, pdf, plain_texts, pptx, xlsx, zipped

from data_prep import extraction
from data_prep.chunk import chunk_documents
from data_prep.documents import BadRecordsError, Dropped, RecordFormat, RecordReader, plan_parts
from data_prep.extraction import FORMATS, Unreadable, extract_text
from data_prep.scripts.chunk import main
from data_prep.sources import find_sources
from data_prep.text_files import decode
from modeling_retro import RetroDatastore


def read_all(inputs, on_bad_record="error", **options):
    sources, record_format = find_sources(inputs), RecordFormat(**options)
    reader, dropped = RecordReader(sources, record_format), Dropped(on_bad_record)
    parts = plan_parts(sources, record_format, 10**9, on_bad_record)
    return [document for part in parts for document in reader.documents(part, dropped)], dropped


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed") / "texts"
    texts = plain_texts(130)
    return folder, texts, *mixed_folder(folder, texts)


def words(text):
    return re.findall(r"\w+", text)


def test_all_text_of_a_mixed_folder_is_read_and_nothing_else(mixed):
    folder, texts, names, others = mixed
    assert len(names) + len(others) == 120
    documents, dropped = read_all(folder)
    assert {document.source.path for document in documents} == {f"texts/{name}" for name in names}
    for document in documents:
        assert not re.search(r"<[a-z/!?]|\\u00|�|\0|\bvar\b|PK\x03|nbformat|%PDF", document.text), document.source
    # Every text that was written is in a document, word for word and in its order.
    found = [" ".join(words(document.text)) for document in documents]
    used = [text for text in texts if any(" ".join(words(text)) in part for part in found)]
    written = sum(f"Sentence {i} says" in " ".join(found) for i in range(len(texts)))
    assert len(used) == written == 9 * 11 + 9
    reasons = {os.path.relpath(bad.file, folder): bad.reason for bad in dropped.left_out}
    assert set(reasons) == set(others) and dropped.bad == []
    for name, reason in others.items():
        assert reason in reasons[name]
    titles = {document.source.path: document.source.title for document in documents}
    assert titles["texts/notes/3.md"] == "Note 3" and titles["texts/pages/3.HTML"] == "Page 3"
    assert titles["texts/books/3.epub"] == "Book 3" and titles["texts/notes/3.txt"] is None
    encodings = {document.source.path: document.encoding for document in documents}
    assert encodings["texts/old/2.txt"] == "cp1252" and encodings["texts/old/1.txt"] == "utf-16"
    assert encodings["texts/notes/1.txt"] is None and encodings["texts/pages/1.HTML"] == "latin-1"


def test_the_command_prints_what_was_taken_and_left_out_and_lists_the_latter(mixed, tmp_path, tiny_tokenizer, capsys):
    folder, _, names, others = mixed
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = ["--tokenizer", str(tmp_path / "tokenizer"), "--chunk_size", "8", "--id_column", "path"]
    main(["--input", str(folder), "--output_dir", str(tmp_path / "datastore"), *options])
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in printed.splitlines()}
    assert rows[".pdf"][1:4] == ["9", "9", "2"] and rows[".png"][1:4] == ["0", "0", "8"]
    assert rows[".csv"][1:4] == ["1", "2", "1"]
    assert "8 × an image; not read" in printed and "5 cp1252" in printed and "4 utf-16" in printed
    listed = [json.loads(line) for file in (tmp_path / "datastore" / "quarantine").iterdir() for line in file.open()]
    assert {record["file"] for record in listed} == {f"texts/{name}" for name in others}
    datastore = RetroDatastore.from_pretrained(tmp_path / "datastore")
    sources = datastore.sources(range(len(datastore.chunks)))
    assert {source.path for source in sources} == {f"texts/{name}" for name in names}
    by_id = {source.id: source for source in sources}
    assert by_id["texts/reports/2.pdf"].path == "texts/reports/2.pdf"
    assert str(by_id["texts/notes/3.md"]) == "Note 3 (texts/notes/3.md)"
    assert by_id["texts/records/c.csv:2"].title == "Second"
    assert str(by_id["texts/records/b.json:1"]) == "One (texts/records/b.json:1)"


def test_every_format_gives_its_text_in_order():
    made = {".docx": docx, ".pptx": pptx, ".pdf": pdf}
    for suffix, make in made.items():
        text, _ = extract_text(make("First comes this.", "Then that.", "And the end."), FORMATS[suffix], 10**6)
        assert words(text) == words("First comes this. Then that. And the end."), suffix
    text, _ = extract_text(xlsx(("a", "b"), ("1", "2")), FORMATS[".xlsx"], 10**6)
    assert words(text)[-4:] == ["a", "b", "1", "2"]
    text, title = extract_text(epub("A book", "Chapter one.", "Chapter two."), FORMATS[".epub"], 10**6)
    assert (words(text), title) == (["Chapter", "one", "Chapter", "two"], "A book")


@pytest.mark.hostile(
    "a document that unpacks to gigabytes, is damaged, or takes its reader too long or down with it",
    "left out of a folder and named; the next document is read",
)
def test_hostile_documents_are_refused_and_the_next_is_read(monkeypatch):
    bomb = zipped(**{"word/document.xml": "<a>" + " " * 30_000_000})
    with pytest.raises(Unreadable, match="unpacks to 30000003 bytes, over the limit of 10000000"):
        extract_text(bomb, FORMATS[".docx"], 1_000_000)
    with pytest.raises(Unreadable, match="a text of .* bytes is over the limit of 10"):
        extract_text(html("t", "more than ten letters"), FORMATS[".html"], 10)
    for content in (b"PK\x03\x04", b"%PDF-1.4\n%%EOF", b"", b"\xff" * 100):
        with pytest.raises(Unreadable, match="cannot be read|no text"):
            extract_text(content, FORMATS[".docx" if content.startswith(b"PK") else ".pdf"], 10**6)
    assert words(extract_text(docx("alive"), FORMATS[".docx"], 10**6)[0]) == ["alive"]
    os.kill(extraction._worker(os.getpid())._process.pid, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(extraction, "MAX_SECONDS", 0.1)
        with pytest.raises(Unreadable, match="it takes longer than 0.1 seconds"):
            extract_text(docx("slow"), FORMATS[".docx"], 10**6)
    assert words(extract_text(docx("again"), FORMATS[".docx"], 10**6)[0]) == ["again"]
    child = extraction._worker(os.getpid())._process
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    with pytest.raises(Unreadable, match="damaged, or it needs more than 2 GiB of memory"):
        extract_text(docx("dead"), FORMATS[".docx"], 10**6)
    assert words(extract_text(docx("and again"), FORMATS[".docx"], 10**6)[0]) == ["and", "again"]


def test_the_child_has_little_memory():
    import resource

    assert words(extract_text(docx("x"), FORMATS[".docx"], 10**6)[0]) == ["x"]
    child = extraction._worker(os.getpid())._process.pid
    assert resource.prlimit(child, resource.RLIMIT_AS) == (extraction.MAX_MEMORY,) * 2
    assert resource.prlimit(child, resource.RLIMIT_FSIZE)[0] < 2**27


def test_without_the_library_its_formats_are_left_out_with_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.pdf").write_bytes(pdf("unread"))
    monkeypatch.setattr(extraction.importlib.util, "find_spec", lambda name: None)
    documents, dropped = read_all(tmp_path)
    assert [document.text for document in documents] == ["fine"]
    assert "retro-transformers[documents]" in dropped.left_out[0].reason


@pytest.mark.parametrize(
    ("text", "encoding", "found"),
    [
        ("Les élèves ont mangé près de la forêt.", "latin-1", "cp1252"),
        ("“quoted” — Größe 5 €", "cp1252", "cp1252"),
        ("Zażółć gęślą jaźń. Wszystkie książki leżą na półce.", "cp1250", "cp1250"),
        ("Съешь же ещё этих мягких французских булок, да выпей чаю.", "cp1251", "cp1251"),
        ("日本語の文章です。これはテストです。", "shift_jis", "cp932"),
        ("这是一个测试文件，里面有中文。", "gb18030", "gb18030"),
        ("naïve", "utf-8-sig", None),
        ("naïve 日本", "utf-16", "utf-16"),
        ("naïve 日本", "utf-32", "utf-32"),
        ("plain letters", "utf-16-be", "utf-16-be"),
        ("naïve", "utf-8", None),
    ],
)
def test_text_is_decoded_and_its_encoding_is_told(text, encoding, found):
    assert decode(text.encode(encoding)) == (text.removeprefix("\ufeff"), found)


def test_an_encoding_that_was_named_is_used_where_utf_8_fails():
    assert decode("Ωμέγα".encode("iso8859-7"), "iso8859-7") == ("Ωμέγα", "iso8859-7")
    assert decode("Ωμέγα".encode(), "iso8859-7") == ("Ωμέγα", None)
    with pytest.raises(Unreadable, match="'klingon' is no known encoding"):
        decode(b"\xff", "klingon")
    with pytest.raises(Unreadable, match="not valid ascii at byte 3"):
        decode(b"abc\xff", "ascii")
    for content in (bytes(range(256)) * 4, b"\x00" * 50, os.urandom(5000)):
        with pytest.raises(Unreadable):
            decode(content)


def test_columns_are_kept_and_errors_come_together(tmp_path, tiny_tokenizer):
    records = [{"body": f"text {i}", "author": f"A{i}", "title": f"T{i}"} for i in range(3)]
    for name in ("a.jsonl", "b.jsonl"):
        lines = [json.dumps(record) for record in records]
        lines[1:1] = ["no json", '{"body": 7}']
        (tmp_path / name).write_text("\n".join(lines))
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    options = {"text_column": "body", "keep_columns": ["author"], "chunk_size": 8}
    with pytest.raises(BadRecordsError) as caught:
        chunk_documents(inputs, tmp_path / "d", tiny_tokenizer, **options)
    places = re.findall(r"([ab]\.jsonl:\d): (not valid JSON|'body' is int)", str(caught.value))
    reasons = {2: "not valid JSON", 3: "'body' is int"}
    assert places == [(f"{name}.jsonl:{line}", why) for name in "ab" for line, why in reasons.items()]
    # Mended, the same command begins anew, because nothing was finished.
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    stage = chunk_documents(inputs, tmp_path / "d", tiny_tokenizer, **options)
    assert stage.num_documents == 6
    datastore = RetroDatastore.from_pretrained(tmp_path / "d")
    last = datastore.sources([len(datastore.chunks) - 1])[0].to_dict()
    assert last == {"path": "b.jsonl", "line": 3, "title": "T2", "fields": {"author": "A2"}}
    with pytest.raises(ValueError, match="begun with keep_columns=.'author'."):
        chunk_documents(inputs, tmp_path / "d", tiny_tokenizer, text_column="body", chunk_size=8)


def test_files_with_columns_name_them_if_that_of_the_text_is_missing(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("body,n\nx,1\n")
    for name in ("a.parquet", "b.csv"):
        with pytest.raises(ValueError, match=r"no column 'text' \(it has 'body', 'n'\); --text_column names"):
            read_all(tmp_path / name)
        assert [document.text for document in read_all(tmp_path / name, text_column="body")[0]] == ["x"]
