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
"""Every kind of input gives the same documents; every kind of damage is named."""

import gzip
import io
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_texts
from datasets import Dataset

from data_prep.documents import Document, Dropped, RecordFormat, RecordReader, plan_parts
from data_prep.sources import Filter, find_sources, spool_streams


def read_all(inputs, part_bytes=10**9, on_bad_record="error", **options):
    sources = find_sources(inputs, options.pop("filter", None))
    record_format = RecordFormat(**options)
    reader = RecordReader(sources, record_format)
    dropped = Dropped(on_bad_record)
    parts = plan_parts(sources, record_format, part_bytes, on_bad_record)
    return [document for part in parts for document in reader.documents(part, dropped)], dropped, parts


def packed(path, data):
    compression = "gzip" if path.suffix == ".gz" else "zstd"
    with pa.output_stream(str(path), compression=compression) as file:
        file.write(data)
    return path


def write_as(kind, folder, texts):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path = folder / f"data.{kind}"
    if kind == "folder":
        path.mkdir()
        for number, text in enumerate(texts):
            (path / f"{number:04d}.txt").write_text(text, encoding="utf-8", newline="")
    elif kind == "parquet":
        pq.write_table(pa.table({"text": texts, "other": range(len(texts))}), path, row_group_size=7)
    elif kind == "jsonl":
        path.write_bytes(lines)
    elif kind == "dataset":
        return Dataset.from_dict({"text": texts})
    else:
        packed(path, lines)
    return path


KINDS = ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "folder", "dataset"]


@pytest.mark.parametrize("part_bytes", [1, 700, 10**9])
@pytest.mark.parametrize("kind", KINDS)
def test_every_input_gives_its_texts_in_order_for_any_cut(tmp_path, kind, part_bytes):
    texts = make_texts(30)
    documents, dropped, parts = read_all(write_as(kind, tmp_path, texts), part_bytes)
    assert documents == [Document(text, number) for number, text in enumerate(texts)]
    assert dropped.bad == [] and dropped.filtered == 0
    assert (len(parts) == 1) == (part_bytes == 10**9)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.zst", "parquet", "folder"])
def test_parts_can_be_read_in_any_order(tmp_path, kind):
    texts = make_texts(30)
    sources = find_sources(write_as(kind, tmp_path, texts))
    parts = plan_parts(sources, RecordFormat(), 500, "error")
    reader = RecordReader(sources, RecordFormat())
    documents = [document for part in reversed(parts) for document in reader.documents(part, Dropped("error"))]
    assert sorted(document.document_id for document in documents) == list(range(30))
    assert all(document.text == texts[document.document_id] for document in documents)


def test_globs_and_folders_are_sorted_and_mixed(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.md", ".hidden"):
        (tmp_path / name).write_text(name)
    assert [document.text for document in read_all(tmp_path)[0]] == ["a.txt", "b.txt", "sub/c.md"]
    assert [document.text for document in read_all(str(tmp_path / "**" / "*.md"))[0]] == ["sub/c.md"]


@pytest.mark.parametrize("name", ["D.JSONL", "d.Json", "d.NDJSON", "d.JSONL.GZ", "d.json.Zst", "d.v1.Jsonl.gz"])
def test_records_are_known_by_their_suffix_in_any_case(tmp_path, name):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "two", "three")).encode()
    path = tmp_path / name
    if path.suffix.lower() in (".gz", ".zst"):
        with pa.output_stream(str(path), compression="gzip" if path.suffix.lower() == ".gz" else "zstd") as file:
            file.write(lines)
    else:
        path.write_bytes(lines)
    assert [document.text for document in read_all(path)[0]] == ["one", "two", "three"]
    assert [document.text for document in read_all(path, part_bytes=20)[0]] == ["one", "two", "three"]
    pq.write_table(pa.table({"text": ["four"]}), tmp_path / "D.PARQUET")
    assert [document.text for document in read_all(tmp_path / "D.PARQUET")[0]] == ["four"]


def test_missing_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.jsonl: no such file, folder or glob"):
        find_sources(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="no files in it"):
        find_sources(tmp_path)


def test_filter_and_id_reach_into_nested_records(tmp_path):
    records = [
        {"body": {"text": f"text {i}"}, "meta": {"set": "Wikipedia (en)" if i % 3 else "Books3", "key": i}}
        for i in range(9)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = {"text_column": "body.text", "id_column": "meta.key"}
    documents, dropped, _ = read_all(path, filter='meta.set == "Wikipedia (en)"', **options)
    assert [document.name for document in documents] == ["1", "2", "4", "5", "7", "8"]
    assert [document.document_id for document in documents] == [1, 2, 4, 5, 7, 8]
    assert dropped.filtered == 3
    others, _, _ = read_all(path, filter='meta.set != "Wikipedia (en)"', **options)
    assert [document.name for document in others] == ["0", "3", "6"]
    several, _, _ = read_all(
        {"path": path, "filter": 'meta.set in ["Books3", "C4"]'}, filter="meta.set == 0", **options
    )
    assert [document.name for document in several] == ["0", "3", "6"]


@pytest.mark.parametrize("expression", ["meta is good", "meta == good", 'meta in "abc"'])
def test_a_filter_that_cannot_be_understood_is_named(expression):
    with pytest.raises(ValueError, match="filter must look like .* got"):
        Filter(expression)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_by_name_gives_its_texts(tmp_path, streaming):
    texts = make_texts(20)
    write_as("parquet", tmp_path, texts)
    entry = {"dataset": str(tmp_path), "streaming": streaming, "filter": "other != 3"}
    (spooled,) = spool_streams(entry, tmp_path, "train")
    documents, dropped, _ = read_all([spooled])
    assert [document.text for document in documents] == texts[:3] + texts[4:]
    assert len(list(tmp_path.glob(".stream-*"))) == streaming


def test_a_saved_dataset_is_known_by_its_folder(tmp_path):
    texts = make_texts(5)
    Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "saved"))
    assert [document.text for document in read_all(tmp_path / "saved")[0]] == texts


def test_standard_input_is_copied_once(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "one"}\n{"text": "two"}\n')))
    inputs = spool_streams("-", tmp_path, "train")
    assert [document.text for document in read_all(inputs)[0]] == ["one", "two"]
    assert spool_streams(["-"], tmp_path, "train") == inputs  # an interrupted run finds the copy
    assert find_sources(inputs)[0].describe().path == "-"


BAD_LINES = {
    "not valid JSON": b'{"text": "half',
    "expected a JSON object, got list": b'["text"]',
    "no 'text' in the record": b'{"content": "abc"}',
    "'text' is int, expected a string": b'{"text": 7}',
    "'text' is NoneType, expected a string": b'{"text": null}',
    "no text": b'{"text": " \\n "}',
    "not valid UTF-8 at byte 10": b'{"text": "\xff\xfe"}',
    "half a surrogate pair at character 1": b'{"text": "a\\ud800"}',
    "is over the limit of 1000": b'{"text": "' + b"x" * 2000 + b'"}',
}


@pytest.mark.hostile(
    "a record that is broken JSON, has half a surrogate pair, is not UTF-8, or is too long",
    "an error that names file and line; `--on_bad_record skip` counts it and sets it aside",
)
@pytest.mark.parametrize("reason", BAD_LINES)
def test_a_bad_line_is_an_error_with_file_and_line_or_a_counted_skip(tmp_path, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n' + BAD_LINES[reason] + b'\n{"text": "two"}')
    with pytest.raises(ValueError, match=rf"a\.jsonl:3: .*{reason}"):
        read_all(path, max_document_bytes=1000)
    documents, dropped, _ = read_all(path, max_document_bytes=1000, on_bad_record="skip")
    assert [document.text for document in documents] == ["one", "two"]
    (bad,) = dropped.bad
    assert (bad.file, bad.line) == (str(path), 3) and reason in bad.reason


def test_a_line_of_200_mb_is_passed_over_in_little_memory(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "one"}\n{"text": "')
        file.writelines([b"x" * 1_000_000] * 200)
        file.write(b'"}\n{"text": "two"}\n')
    tracemalloc.start()
    documents, dropped, _ = read_all(path, on_bad_record="skip", max_document_bytes=1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [document.text for document in documents] == ["one", "two"]
    (bad,) = dropped.bad
    assert bad.line == 2 and "a line of 200000013 bytes" in bad.reason
    assert peak < 10_000_000


@pytest.mark.hostile(
    "a truncated `.gz`, `.zst` or `.parquet`",
    "an error that names the file, or the documents before the damage",
)
@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_a_truncated_file_is_named_or_read_as_far_as_it_goes(tmp_path, kind):
    texts = [f"text {number} {number**7}" for number in range(20_000)]
    path = write_as(kind, tmp_path, texts)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"data\.{kind}.*cannot be read to its end: .*[Tt]runcated"):
        read_all(path)
    documents, dropped, parts = read_all(path, part_bytes=50_000, on_bad_record="skip")
    assert len(parts) > 2 and 1000 < len(documents) < 20_000
    assert [document.text for document in documents] == texts[: len(documents)]
    assert "cannot be read to its end" in dropped.bad[-1].reason


@pytest.mark.parametrize("content", [b"PAR1 and then nothing", b"\x1f\x8b no gzip"])
def test_a_broken_file_is_named_or_skipped(tmp_path, content):
    path = tmp_path / ("a.parquet" if content.startswith(b"PAR1") else "a.jsonl.gz")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path.name}.*cannot be read to its end"):
        read_all(path)
    documents, dropped, _ = read_all(path, on_bad_record="skip")
    assert documents == [] and len(dropped.bad) == 1


def test_a_parquet_column_of_the_wrong_type_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet:1: 'text' is int, expected a string"):
        read_all(path)


def test_a_file_without_text_is_an_error_if_it_was_named_and_left_out_of_a_folder(tmp_path):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b").write_bytes(b"\x89PNG\r\n\x1a\n\0\xff")
    (tmp_path / "c.PNG").write_bytes(b"")
    for name, reason in {"b": "binary data, no text", "c.PNG": "an image; not read"}.items():
        with pytest.raises(ValueError, match=rf"{name}:1: {reason}"):
            read_all(tmp_path / name)
        assert [bad.reason for bad in read_all(tmp_path / name, on_bad_record="skip")[1].bad] == [reason]
    documents, dropped, _ = read_all(tmp_path)
    assert [document.text for document in documents] == ["fine"]
    assert dropped.bad == [] and len(dropped.left_out) == 2


def test_text_files_are_unpacked(tmp_path):
    (tmp_path / "a.rst.gz").write_bytes(gzip.compress("naïve".encode()))
    assert [document.text for document in read_all(tmp_path)[0]] == ["naïve"]
