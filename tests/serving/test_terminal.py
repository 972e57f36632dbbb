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

import contextlib
import os
import pty
import re
import subprocess
import sys
import termios
import unicodedata
from pathlib import Path

import pytest
from conftest import write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from tiny_server import save_model

from data_prep import prepare_datastore
from data_prep.arguments import run_command
from data_prep.terminal import printable
from trainers import cli


HOSTILE = "\x1b]0;title\x07\x1b[2J\x1b[A\r\x9b5A\u202e\u2066\x00"
PRINT_IN_ALL_WAYS = """
import sys
from data_prep.arguments import run_command

def main():
    import argparse, logging, threading, warnings
    import transformers, uvicorn
    from tqdm.auto import tqdm

    print("<result>", HOSTILE)
    print(HOSTILE)
    sys.stdout.writelines(["<lines> " + HOSTILE])
    print("<error stream>", HOSTILE, file=sys.stderr)
    uvicorn.Config(None, log_level="warning", use_colors=False)
    logging.getLogger("uvicorn.error").warning("<server> %s", HOSTILE)
    logging.getLogger("serving.engine").warning("<engine> %s", HOSTILE)
    transformers.utils.logging.get_logger("transformers.x").warning("<transformers> " + HOSTILE)
    warnings.warn("<warning> " + HOSTILE)
    for _ in tqdm([HOSTILE], desc="<bar> " + HOSTILE):
        for _ in tqdm([HOSTILE], desc="<inner bar> " + HOSTILE, position=1):
            tqdm.write("<beside bars> " + HOSTILE)
    thread = threading.Thread(target=lambda: int("<thread> " + HOSTILE))
    thread.start()
    thread.join()
    try:
        argparse.ArgumentParser().parse_args(["<parser> " + HOSTILE])
    except SystemExit:
        raise RuntimeError("<end> " + HOSTILE)

run_command(main)
"""


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
    cli.main(["generate", *words, "--prompt", escapes * 6])
    printed = capsys.readouterr().out
    assert "\\x1b[2J" in printed and "\\x1b]0;title\\x07" in printed and "neighbor 1" in printed
    assert all(unicodedata.category(c) != "Cc" or c in "\n\t" for c in printed) and "\u202e" not in printed


@pytest.mark.hostile(
    "control sequences in a result, a warning, a traceback, the log of the server and of libraries, a refused option "
    "and the name of a progress bar, of a command that prints to a terminal",
    "they are printed as text",
)
def test_nothing_that_a_command_prints_controls_the_terminal():
    terminal, end = pty.openpty()
    termios.tcsetwinsize(terminal, (50, 1000))
    script = f"HOSTILE = {HOSTILE!r}\n{PRINT_IN_ALL_WAYS}"
    environment = {**os.environ, "PYTHON_COLORS": "0"}  # Python 3.13 colors its own tracebacks
    command = subprocess.Popen([sys.executable, "-c", script], stdout=end, stderr=end, env=environment)
    os.close(end)
    printed = b""
    with contextlib.suppress(OSError):  # the other end was closed
        while piece := os.read(terminal, 1 << 16):
            printed += piece
    os.close(terminal)
    assert command.wait() == 1
    text = printed.decode().replace("\r\n", "\n")
    ways = re.findall(r"<([a-z ]+)>", PRINT_IN_ALL_WAYS)
    assert [way for way in ways if f"<{way}>" not in text] == []
    # Only bars may go to the begin of their line and to lines of others. The count of silent seconds clears its own.
    assert text.count("]0;title") == text.count(printable(HOSTILE)) >= len(ways)
    assert {c for c in re.sub(r"\x1b\[[AK]", "", text) if not c.isprintable()} <= {"\n", "\t", "\r"}


@pytest.mark.hostile("an error whose text has control sequences", "it is printed as text, in one line")
def test_errors_do_not_control_the_terminal(capsys):
    def fail():
        raise ValueError("the document \x1b[2J\r is broken")

    with pytest.raises(SystemExit):
        run_command(fail)
    assert capsys.readouterr().err == "error: the document \\x1b[2J\\r is broken\n"


def test_each_command_is_run_where_its_output_is_made_printable():
    for module, _ in cli.COMMANDS.values():
        script = Path(*module.split(".")).with_suffix(".py")
        assert script.read_text().endswith('if __name__ == "__main__":\n    run_command(main)\n'), script
