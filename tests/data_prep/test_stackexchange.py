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
import html
import tracemalloc

import py7zr
import pytest

from data_prep.pairs.pairs import load_pairs
from data_prep.pairs.stackexchange import html_to_text, stackexchange_pairs
from data_prep.scripts.stackexchange import main


def row(**attributes):
    return "  <row " + " ".join(f'{name}="{html.escape(str(value))}"' for name, value in attributes.items()) + " />"


def question(number, title, body="<p>body</p>", score=5, **attributes):
    dates = {"CreationDate": "2014-05-13T23:58:30.457", "LastActivityDate": "2014-05-14T00:36:31.077"}
    return row(Id=number, PostTypeId=1, **dates, Score=score, Body=body, Title=title, Tags="<stars>", **attributes)


def answer(number, parent, body, score):
    return row(Id=number, PostTypeId=2, ParentId=parent, Score=score, Body=body, CommentCount=0)


def link(post, related, kind=3):
    return row(
        Id=post * 100, CreationDate="2014-05-14T00:53:15.437", PostId=post, RelatedPostId=related, LinkTypeId=kind
    )


POSTS = [
    answer(1, 2, "<p>comes before its question</p>", 3),
    question(2, "How far is  the <Moon>?", "<p>I <b>wonder</b>.</p>\n<pre><code>a &lt; b\n</code></pre><p>x<br>y</p>"),
    answer(3, 2, "<p>far</p>", 7),
    answer(4, 2, "<p>as far, later</p>", 7),
    question(5, "Distance to the moon", score=-2),
    question(6, "What is a “star” 🌟?", "<p>Ask &amp; tell</p>", AcceptedAnswerId=8),
    answer(7, 6, "<p>nobody likes me</p>", 0),
    answer(8, 5, "<p>to a question nobody likes</p>", 9),
    question(9, "Moon: how far?", "<img src='x.png'>"),
    row(Id=10, PostTypeId=5, Score=0, Body="a tag wiki"),
]
LINKS = [link(9, 2), link(9, 2), link(6, 2, kind=1), link(5, 2), link(77, 2)]


def write_dump(folder, posts=POSTS, links=LINKS):
    start = '\ufeff<?xml version="1.0" encoding="utf-8"?>\n'
    (folder / "Posts.xml").write_text(start + "<posts>\n" + "\n".join(posts) + "\n</posts>", encoding="utf-8")
    (folder / "PostLinks.xml").write_text(
        start + "<postlinks>\n" + "\n".join(links) + "\n</postlinks>", encoding="utf-8"
    )
    return [folder / "Posts.xml", folder / "PostLinks.xml"]


def pairs_of(folder, name):
    return [tuple(pair.values()) for pair in load_pairs(folder / f"{name}.jsonl.gz")]


def check_pairs(folder):
    moon, star = "How far is the <Moon>?", "What is a “star” 🌟?"
    assert pairs_of(folder, "title_body") == [(moon, "I wonder. a < b x y"), (star, "Ask & tell")]
    assert pairs_of(folder, "title_answer") == [(moon, "far")]
    assert pairs_of(folder, "duplicates") == [("Moon: how far?", moon)]
    assert sorted(path.name for path in folder.iterdir()) == [
        "duplicates.jsonl.gz",
        "title_answer.jsonl.gz",
        "title_body.jsonl.gz",
    ]


def test_xml_files_give_titles_with_bodies_best_answers_and_duplicates(tmp_path):
    counts = stackexchange_pairs(write_dump(tmp_path), tmp_path / "pairs")
    assert counts == {"title_body": 2, "title_answer": 1, "duplicates": 1}
    check_pairs(tmp_path / "pairs")


def test_archive_gives_what_its_files_give(tmp_path, capsys):
    files = write_dump(tmp_path)
    (tmp_path / "Users.xml").write_text("not even XML")
    with py7zr.SevenZipFile(tmp_path / "site.7z", "w") as archive:
        for file in (tmp_path / "Users.xml", *files):
            archive.write(file, file.name)
    main(["--inputs", str(tmp_path / "site.7z"), "--output_dir", str(tmp_path / "pairs")])
    assert "title_body.jsonl.gz: 2 pairs" in capsys.readouterr().out
    check_pairs(tmp_path / "pairs")


def test_one_archive_a_file_works_too(tmp_path):
    archives = []
    for file in write_dump(tmp_path):
        archives.append(tmp_path / f"stackoverflow.com-{file.stem}.7z")
        with py7zr.SevenZipFile(archives[-1], "w") as archive:
            archive.write(file, file.name)
    stackexchange_pairs(archives, tmp_path / "pairs")
    check_pairs(tmp_path / "pairs")


def test_scores_below_the_thresholds_are_left_out(tmp_path):
    files = write_dump(tmp_path)
    counts = stackexchange_pairs(files, tmp_path / "all", min_question_score=-5, min_answer_score=0)
    assert counts == {"title_body": 3, "title_answer": 3, "duplicates": 2}
    counts = stackexchange_pairs(files, tmp_path / "few", min_question_score=6)
    assert counts == {"title_body": 0, "title_answer": 0, "duplicates": 0}


@pytest.mark.parametrize("order", [1, -1])
def test_accepted_answer_counts_whatever_its_score_if_no_other_reaches_the_threshold(tmp_path, order):
    posts = [
        question(1, "accepted only", AcceptedAnswerId=2),
        answer(2, 1, "zero", 0),
        answer(3, 1, "also zero", 0),
        question(4, "accepted and better", AcceptedAnswerId=5),
        answer(5, 4, "accepted", -1),
        answer(6, 4, "better", 1),
        question(7, "none accepted"),
        answer(8, 7, "zero", 0),
        question(9, "accepted elsewhere", AcceptedAnswerId=3),
    ]
    counts = stackexchange_pairs(write_dump(tmp_path, posts[::order], [])[:1], tmp_path / "pairs")
    assert counts["title_answer"] == 2
    assert pairs_of(tmp_path / "pairs", "title_answer") == [
        ("accepted only", "zero"),
        ("accepted and better", "better"),
    ]


BOMB = """<?xml version="1.0"?>
<!DOCTYPE posts [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>
<posts><row Id="1" PostTypeId="1" Score="1" Title="&b;" Body="&b;" /></posts>"""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB, "Posts.xml:2: a document type with entities is refused"),
        ("<posts>\n" + question(1, "a") + "\n<row Id=", "Posts.xml:3: .*not well-formed|unclosed"),
        ("<posts>\n" + question(1, "a") + "\n", "Posts.xml:3: no element found"),
        ("<posts>\n" + row(Id=1, PostTypeId=1, Score=1, Body="b"), "Posts.xml:2: a row has no 'Title'"),
        ("<posts>\n" + row(Id=1, PostTypeId=1, Score="many", Body="b", Title="t"), "Posts.xml:2: invalid literal"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_broken_dump_is_refused_by_file_and_line_and_leaves_nothing(tmp_path, content, message, packed):
    dump = tmp_path / "Posts.xml"
    dump.write_text(content)
    if packed:
        with py7zr.SevenZipFile(tmp_path / "site.7z", "w") as archive:
            archive.write(dump, dump.name)
        dump = tmp_path / "site.7z"
    with pytest.raises(ValueError, match=message):
        stackexchange_pairs([dump], tmp_path / "out" / "pairs")
    assert list((tmp_path / "out").iterdir()) == []


def test_broken_archive_and_dump_without_posts_are_refused(tmp_path):
    (tmp_path / "site.7z").write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(100))
    with pytest.raises(ValueError, match="site.7z cannot be unpacked"):
        stackexchange_pairs([tmp_path / "site.7z"], tmp_path / "pairs")
    with pytest.raises(ValueError, match="no Posts.xml in"):
        stackexchange_pairs(write_dump(tmp_path)[1:], tmp_path / "pairs")


def test_memory_does_not_grow_with_the_dump(tmp_path):
    def peak(number):
        folder = tmp_path / str(number)
        folder.mkdir()
        posts = [question(i, f"title {i}", f"<p>{'word ' * 10_000} {i}</p>") for i in range(number)]
        files = write_dump(folder, posts, [])
        del posts
        tracemalloc.start()
        stackexchange_pairs(files, folder / "pairs")
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    assert peak(320) < 1.3 * peak(160)  # 16 MB of XML against 8; the parser of Python 3.13 keeps a few of them


def test_markup_becomes_text():
    assert (
        html_to_text("<p>f<b>oo</b> &amp; <a href='x'>bar</a></p>\n<ul><li>1</li>\n<li>2</li></ul>") == "foo & bar 1 2"
    )
