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
"""What documents and errors can do to a terminal: nothing."""

import unicodedata

import pytest
from conftest import write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from tiny_server import save_model

from data_prep import prepare_datastore
from data_prep.arguments import printable, run_command
from trainers.scripts import generate


@given(st.text())
def test_printed_text_has_no_control_characters_and_loses_none(text):
    found = printable(text)
    assert all(unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") for c in found if c not in "\n\t")
    assert not set(found) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    if "\\" not in text:
        assert found.encode("latin-1", "backslashreplace").decode("unicode_escape") == text
    kept = [c for c in text if c in "\n\t" or unicodedata.category(c)[0] in "LNPS"]
    assert "".join(kept) == text or len(found) >= len(text)


@pytest.mark.hostile(
    "documents with control sequences, which set the title of a terminal, clear it or move its cursor",
    "`retro generate` prints them as text, such as `\\x1b[2J`",
)
def test_documents_do_not_control_the_terminal(tiny_tokenizer, tmp_path, capsys):
    escapes = "\x1b]0;title\x07\x1b[31mred \x1b[2J\r\x9b5A\u202e retro looks things up "
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    texts = [escapes * 6 + word for word in ("up", "in", "a")]
    write_jsonl(tmp_path / "a.jsonl", texts)
    recipe = {
        "tokenizer": str(tmp_path / "tokenizer"),
        "chunk": {"chunk_size": 8},
        "splits": {"train": [str(tmp_path / "a.jsonl")]},
        "neighbors": {"num_neighbors": 2, "retriever": "bm25"},
    }
    prepare_datastore(recipe, tmp_path / "datastore")
    model = save_model("joint", tmp_path / "datastore", tmp_path / "tiny")
    capsys.readouterr()
    words = ["--model", str(model), "--datastore", str(tmp_path / "datastore"), "--max_new_tokens", "9"]
    generate.main([*words, "--prompt", escapes * 6])
    printed = capsys.readouterr().out
    assert "\\x1b[2J" in printed and "\\x1b]0;title\\x07" in printed and "neighbor 1" in printed
    assert all(unicodedata.category(c) != "Cc" or c in "\n\t" for c in printed) and "\u202e" not in printed


@pytest.mark.hostile(
    "an error whose text has control sequences, as from a document or the name of a file",
    "it is printed as text",
)
def test_errors_do_not_control_the_terminal(capsys):
    def fail():
        raise ValueError("the document \x1b[2J\r is broken")

    with pytest.raises(SystemExit):
        run_command(fail)
    assert capsys.readouterr().err == "error: the document \\x1b[2J\\r is broken\n"
