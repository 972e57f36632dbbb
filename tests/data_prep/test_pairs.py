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
import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from loopback_hub import Repository, StoredFile, loopback_hub

from data_prep.pairs import pairs as pairs_module
from data_prep.pairs.collections import RECIPE_PATH, read_recipe
from data_prep.pairs.pairs import load_pairs, pair_columns
from data_prep.scripts.pairs import main


def write_lines(path, records):
    lines = "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    return str(path)


FORMS = {
    "list": ([["a", "b"], ["c", "d"]], [("a", "b"), ("c", "d")]),
    "triplets": ([["a", "b", "n"], ["c", "d", "m"]], [("a", "b", "n"), ("c", "d", "m")]),
    "sets": ([{"set": ["a", "b", "c"]}, {"set": ["d", "e"]}], [("a", "b"), ("a", "c"), ("d", "e")]),
    "queries": (
        [{"query": "a", "pos": ["b", "c"], "neg": ["n", "m"]}, {"query": "d", "pos": ["e"], "neg": ["x", "y", "z"]}],
        [("a", "b", "n", "m"), ("a", "c", "n", "m"), ("d", "e", "x", "y")],
    ),
    "queries without negatives": ([{"query": "a", "pos": ["b"]}], [("a", "b")]),
    "anchors": ([{"anchor": "a", "positive": "b", "negative": "n"}], [("a", "b", "n")]),
    "anchors, numbered": (
        [{"anchor": "a", "negative_2": "m", "positive": "b", "negative_1": "n"}],
        [("a", "b", "n", "m")],
    ),
    "labelled": (
        [
            {"questions": {"id": [1, 2], "text": ["a", "b"]}, "is_duplicate": True},
            {"questions": {"id": [3, 4], "text": ["c", "d"]}, "is_duplicate": False},
        ],
        [("a", "b")],
    ),
}


def labelled(**values):
    """Records of a, b and c, d, of which `values` are equal or, if they are lists, differ."""
    return [
        {name: value[row] if isinstance(value, list) else value for name, value in values.items()} for row in (0, 1)
    ]


FORMS |= {
    "sentences with a label": (labelled(sentence1=["a", "c"], sentence2=["b", "d"], label=[1, 0]), [("a", "b")]),
    "labels in place of label": (labelled(anchor=["a", "c"], positive=["b", "d"], labels=[0, 1]), [("c", "d")]),
    "a label as a fraction": (labelled(text1=["a", "c"], text2=["b", "d"], label=[1.0, 0.0]), [("a", "b")]),
    "a label as a word": (labelled(text1=["a", "c"], text2=["b", "d"], label=["True", "false"]), [("a", "b")]),
    "Quora, flat": (
        [
            {"id": 0, "qid1": 1, "qid2": 2, "question1": "a", "question2": "b", "is_duplicate": "1"},
            {"id": 1, "qid1": 3, "qid2": 4, "question1": "c", "question2": None, "is_duplicate": "0"},
        ],
        [("a", "b")],
    ),
    "InputExample": ([{"texts": ["a", "b"], "label": 1.0}, {"texts": ["c", "d"], "label": 0.0}], [("a", "b")]),
    "triplets with a label": (
        labelled(anchor=["a", "c"], positive=["b", "d"], negative=["n", "m"], label=[1, 0]),
        [("a", "b", "n")],
    ),
    "list of negatives": ([{"query": "a", "positive": "b", "negatives": ["n", "m"]}], [("a", "b", "n", "m")]),
    "labelled list": (
        [{"query": "a", "docs": ["n", "b", "c"], "labels": [0, 1, 1]}],
        [("a", "b", "n"), ("a", "c", "n")],
    ),
    "query without a positive": ([{"query": "a", "pos": ["b"]}, {"query": "c", "pos": []}], [("a", "b")]),
}


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
@pytest.mark.parametrize(("records", "expected"), FORMS.values(), ids=FORMS)
def test_every_form_of_a_file_gives_the_same_columns(tmp_path, name, records, expected):
    pairs = load_pairs(write_lines(tmp_path / name, records))
    assert pairs.column_names == ["anchor", "positive", "negative_1", "negative_2"][: len(expected[0])]
    assert [tuple(row.values()) for row in pairs] == expected


GRADED = [{"sentence1": f"a{i}", "sentence2": f"b{i}", "score": i / 4} for i in range(5)]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (GRADED[4], r"score 1.0 is a graded score; give the lowest score .* \(min_score\), or remove it"),
        ({"anchor": "a", "positive": "b", "label": 0.75}, r"the label label is 0.75, expected 0 or 1; .*min_score"),
        ({"anchor": "a", "positive": "b", "label": -1}, "the label label is -1, expected 0 or 1"),
        ({"anchor": "a", "positive": "b", "label": None}, "the label label is None, expected 0 or 1"),
        ({"anchor": "a", "positive": "b", "labels": "duplicate"}, "the label labels is 'duplicate', expected 0 or 1"),
        ({"anchor": "a", "positive": "b", "label": 1, "score": 0.5}, r"label and score could both .*\(label_column\)"),
        (
            {"anchor": "a", "positive": "b", "scores": [0.5, 0.2]},
            "the label scores is .*, expected 0 or 1; .* remove the label",
        ),
        ({"premise": "a", "hypothesis": "b", "label": 0}, "one of several classes; keep the entailments, .*columns"),
        ({"title": "a", "body": "b"}, "other names are given as columns"),
    ],
)
def test_label_that_is_unclear_is_refused_with_the_remedy(tmp_path, record, message):
    path = write_lines(tmp_path / "pairs.jsonl", [record, record])
    with pytest.raises(ValueError, match=rf"pairs.jsonl:1: not a pair: .*{message}"):
        load_pairs(path)
    datasets.Dataset.from_list([record, record]).save_to_disk(tmp_path / "stored")
    with pytest.raises(ValueError, match=message if "columns" not in message else "columns"):
        load_pairs(tmp_path / "stored")


def test_graded_pairs_are_cut_at_the_lowest_score(tmp_path):
    path = write_lines(tmp_path / "pairs.jsonl", GRADED)
    expected = [{"anchor": f"a{i}", "positive": f"b{i}"} for i in (3, 4)]
    assert list(load_pairs(path, min_score=0.75)) == expected
    assert list(load_pairs(path, min_score=0.75, streaming=True)) == expected
    datasets.Dataset.from_list(GRADED).save_to_disk(tmp_path / "stored")
    columns = ["sentence1", "sentence2"]
    assert list(load_pairs(tmp_path / "stored", min_score=0.75)) == expected
    assert list(load_pairs(tmp_path / "stored", min_score=0.75, columns=columns)) == expected


def test_names_of_columns_and_label_are_taken_for_files_too(tmp_path):
    rows = [{"left": f"a{i}", "right": f"b{i}", "same": i % 2, "id": i} for i in range(4)]
    path = write_lines(tmp_path / "pairs.jsonl", rows)
    expected = [{"anchor": f"a{i}", "positive": f"b{i}"} for i in (1, 3)]
    assert list(load_pairs(path, columns=["left", "right"], label_column="same")) == expected
    assert len(load_pairs(path, columns=["left", "right"])) == 4
    with pytest.raises(ValueError, match="expected the columns left, middle, got"):
        load_pairs(path, columns=["left", "middle"])
    with pytest.raises(ValueError, match="there is no label 'equal' among left, right, same, id"):
        load_pairs(path, columns=["left", "right"], label_column="equal")


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(pairs_module.logger, "warning", lambda message, *values: said.append(message % values))
    return said


@pytest.mark.parametrize("num_proc", [None, 2])
def test_what_is_left_out_is_counted_for_each_file(tmp_path, warnings, num_proc):
    records = [{"query": f"q{i}", "pos": [f"a{i}", f"b{i}"][: i % 3], "label": int(i != 4)} for i in range(9)]
    first = write_lines(tmp_path / "first.jsonl", [*records, "{broken"])
    second = write_lines(tmp_path / "second.jsonl", [["a", "b"]])
    for _ in range(2):  # the second time from the cache
        warnings.clear()
        pairs = load_pairs([first, second], skip_bad_lines=True, num_proc=num_proc)
        assert len(pairs) == 3 * (1 + 2) - 1 + 1
        counted = [line for line in warnings if "left out" in line]
        assert counted == [
            f"{first} gives 8 pairs; left out: 1 labelled as no pair, 3 without a positive, 1 malformed"
        ]


@pytest.mark.parametrize("streaming", [False, True])
def test_file_without_any_positive_says_so(tmp_path, streaming):
    good = write_lines(tmp_path / "good.jsonl", [["a", "b"]])
    none = write_lines(tmp_path / "none.jsonl", [{"text1": "a", "text2": "b", "label": 0}] * 3)
    with pytest.raises(ValueError, match="none.jsonl holds no pair: of its records, 3 labelled as no pair"):
        list(load_pairs([good, none], streaming=streaming))
    with pytest.raises(ValueError, match="empty.jsonl holds no pair"):
        load_pairs(write_lines(tmp_path / "empty.jsonl", []))
    datasets.Dataset.from_list([{"anchor": "a", "positive": "b", "label": 0}]).save_to_disk(tmp_path / "stored")
    with pytest.raises(ValueError, match="the dataset holds no pair"):
        load_pairs(tmp_path / "stored")


@pytest.mark.parametrize("form", ["sentences with a label", "triplets with a label", "labels in place of label"])
def test_labels_of_a_dataset_say_the_same_as_those_of_a_file(tmp_path, form):
    records, expected = FORMS[form]
    datasets.Dataset.from_list(records).save_to_disk(tmp_path / "stored")
    assert [tuple(row.values()) for row in load_pairs(tmp_path / "stored")] == expected


@pytest.mark.parametrize("name", ["p.json", "p.JSONL", "p.json.gz", "p.ndjson.ZST", "P.Jsonl.GZ", "p.v2.jsonl.zst"])
def test_a_file_is_read_by_its_suffix_packed_or_not_and_in_any_case(tmp_path, name):
    lines = "".join(json.dumps(record) + "\n" for record in FORMS["triplets"][0]).encode()
    compression = {"z": "gzip", "Z": "gzip", "t": "zstd", "T": "zstd"}.get(name[-1])
    with pa.output_stream(tmp_path / name, compression=compression) as file:
        file.write(lines)
    assert [tuple(row.values()) for row in load_pairs(tmp_path / name)] == FORMS["triplets"][1]


@pytest.mark.parametrize(("name", "mark"), [("quora.tsv", "\t"), ("quora.CSV.gz", ",")])
def test_tables_are_read_by_the_names_of_their_columns(tmp_path, name, mark):
    rows = [("question1", "question2", "is_duplicate"), ('"a, ""A"""', '"b\nB"', "1"), ("c", "d", "0")]
    text = "".join(mark.join(row) + "\n" for row in rows).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    assert list(load_pairs(tmp_path / name)) == [{"anchor": 'a, "A"', "positive": "b\nB"}]
    (tmp_path / "wide.tsv").write_text("question1\tquestion2\na\tb\tc\n")
    with pytest.raises(ValueError, match="wide.tsv:2: not a pair: the row has 1 cells more than there are columns"):
        load_pairs(tmp_path / "wide.tsv")


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_all_workers_read_the_lines_of_one_file(tmp_path, name):
    path = write_lines(tmp_path / name, [[f"a{i}", f"b{i}"] for i in range(10)])
    assert pairs_module._parts(path, 3) == [(0, 3), (3, 6), (6, 10)]
    pairs = load_pairs(path, num_proc=3)
    assert pairs.num_rows == 10
    assert len(pairs.cache_files) == 3  # one for each worker
    assert list(pairs) == list(load_pairs(path))
    write_lines(tmp_path / name, [[f"a{i}", f"b{i}"] for i in range(8)] + [["a"]])
    with pytest.raises(ValueError, match=f"{name}:9: not a pair"):
        load_pairs(path, num_proc=3)


def test_columns_of_a_dataset_are_taken_by_form_or_by_name(tmp_path):
    rows = {"question": ["a", "c"], "answer": ["b", "d"], "wrong": ["n", "m"], "id": [1, 2]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "named")
    pairs = load_pairs(tmp_path / "named", columns=["question", "answer", "wrong"])
    assert list(pairs) == [
        {"anchor": "a", "positive": "b", "negative_1": "n"},
        {"anchor": "c", "positive": "d", "negative_1": "m"},
    ]
    with pytest.raises(ValueError, match="say which hold anchor, positive"):
        load_pairs(tmp_path / "named")
    with pytest.raises(ValueError, match="columns are question, title; expected"):
        load_pairs(tmp_path / "named", columns=["question", "title"])

    datasets.Dataset.from_list(FORMS["labelled"][0]).save_to_disk(tmp_path / "labelled")
    assert list(load_pairs(tmp_path / "labelled")) == [{"anchor": "a", "positive": "b"}]


def test_streamed_files_are_shared_by_the_workers(tmp_path):
    files = [write_lines(tmp_path / f"{i}.jsonl", [[f"a{i}-{j}", f"b{i}-{j}"] for j in range(3)]) for i in range(4)]
    stream = load_pairs(files, streaming=True)
    assert stream.num_shards == 4
    assert list(stream) == list(load_pairs(files)) == list(load_pairs(files, num_proc=2))


def test_changed_file_is_read_again(tmp_path):
    path = write_lines(tmp_path / "pairs.jsonl", [["a", "b"]])
    assert load_pairs(path)[0]["anchor"] == "a"
    write_lines(tmp_path / "pairs.jsonl", [["other", "b"]])
    assert load_pairs(path)[0]["anchor"] == "other"


@pytest.mark.parametrize(
    ("second_line", "message"),
    [
        ("{broken", "not a pair"),
        (["a"], "expected an anchor and a positive, got a list of 1"),
        (["", "b"], "expected a text that is not empty, got ''"),
        (["a", 7], "expected a text that is not empty, got 7"),
        ({"query": "a", "pos": ["b"]}, "this record has the form pos/query, the ones before have list"),
        ({"text": "a"}, 'expected \\["a", "b"\\]'),
    ],
)
def test_bad_line_is_named_by_file_and_number_and_can_be_left_out(tmp_path, second_line, message):
    path = write_lines(tmp_path / "pairs.jsonl", [["a", "b"], second_line, ["c", "d"]])
    with pytest.raises(ValueError, match=rf"pairs.jsonl:2: .*{message}"):
        load_pairs(path)
    assert load_pairs(path, skip_bad_lines=True)["anchor"][:] == ["a", "c"]


def test_hard_negatives_in_some_records_only_are_refused(tmp_path):
    path = write_lines(tmp_path / "pairs.jsonl", [["a", "b", "n"], ["c", "d"]])
    with pytest.raises(ValueError, match="pairs.jsonl:2: .*expected 1 hard negatives as in the first record, got 0"):
        load_pairs(path)
    assert load_pairs(path, num_negatives=0).column_names == ["anchor", "positive"]


def test_file_cut_off_in_the_middle_is_named(tmp_path):
    whole = gzip.compress(json.dumps(["a", "b" * 10_000]).encode())
    (tmp_path / "pairs.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="pairs.jsonl.gz:1"):
        load_pairs(tmp_path / "pairs.jsonl.gz")


def test_one_column_is_no_pair_set():
    for columns in (["anchor"], ["anchor", "positive", "negative_2"], ["anchor", "positive_input_ids"]):
        with pytest.raises(ValueError, match="expected `anchor`, `positive`"):
            pair_columns(columns)


def test_recipe_of_public_sets_has_a_weight_and_a_file_for_each():
    rows = read_recipe()
    assert len(rows) > 30
    for name, row in rows.items():
        assert int(row["pairs"]) > 0
        assert 0 < float(row["weight"]) <= 1
        assert Path(row["path"]).name == f"{name}.jsonl.gz"


def test_broken_recipe_is_refused(tmp_path):
    (tmp_path / "recipe.tsv").write_text("name\tpairs\tweight\tpath\nx\t1\t1.0\n")
    with pytest.raises(ValueError, match="recipe.tsv: x: expected name, pairs, weight and path"):
        read_recipe(tmp_path / "recipe.tsv")


DOWNLOAD = """
import sys
from data_prep.scripts.pairs import main
main(["--download", "first", "second", "--recipe", sys.argv[1], "--output_dir", sys.argv[2]])
"""


def test_download_that_broke_off_goes_on_with_what_is_missing(tmp_path):
    output, home = tmp_path / "collections", tmp_path / "bob"
    contents = {name: gzip.compress(json.dumps([name, "b"]).encode()) for name in ("first", "second")}
    recipe = tmp_path / "recipe.tsv"
    rows = "".join(f"{name}\t1\t1.0\talice/collection/{name}.jsonl.gz\n" for name in contents)
    recipe.write_text("name\tpairs\tweight\tpath\n" + rows)
    with loopback_hub() as hub:
        repository = hub.repos["datasets", "alice/collection"] = Repository()
        files = {f"{name}.jsonl.gz": StoredFile(content, is_lfs=True) for name, content in contents.items()}
        repository.commit("main", files, "Add the sets")
        hub.fail_after(0, r"^GET .*second\.jsonl\.gz")
        assert hub.run(DOWNLOAD, str(recipe), str(output), home=home, check=False).returncode != 0
        assert (output / "first.jsonl.gz").exists()
        assert not (output / "second.jsonl.gz").exists()
        hub.recover()
        seen = len(hub.requests)
        hub.run(DOWNLOAD, str(recipe), str(output), home=home)
        fetched = [request for request in hub.requests[seen:] if request.startswith("GET ") and "resolve" in request]
        assert not any("first" in request for request in fetched)
    for name, content in contents.items():
        assert (output / f"{name}.jsonl.gz").read_bytes() == content
    assert load_pairs(output / "second.jsonl.gz")[0] == {"anchor": "second", "positive": "b"}


def test_command_stores_a_set_that_loads_again(tmp_path, capsys):
    path = write_lines(tmp_path / "pairs.jsonl", FORMS["queries"][0])
    main(["--sources", path, "--output_dir", str(tmp_path / "pairs"), "--num_negatives", "1"])
    assert "3 pairs with the columns anchor, positive, negative_1" in capsys.readouterr().out
    assert list(load_pairs(tmp_path / "pairs")) == list(load_pairs(path, num_negatives=1))


def test_command_wants_one_source(tmp_path):
    for options in ([], ["--sources", "a.jsonl", "--download", "AllNLI"]):
        with pytest.raises(ValueError, match="give one of --sources, --download and --datastore"):
            main([*options, "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="has no set nonsense"):
        main(["--download", "nonsense", "--recipe", str(RECIPE_PATH), "--output_dir", str(tmp_path)])
