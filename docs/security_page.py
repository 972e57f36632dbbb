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
Writes docs/security.md: its table is that of the tests that are marked `hostile`; a test compares.

    python docs/security_page.py > docs/security.md
"""

import ast
from collections.abc import Iterator
from pathlib import Path


ROOT = Path(__file__).parents[1]
INTRODUCTION = """\
# Hostile inputs, power cuts, damaged files

Documents, datastores and models come from others, disks fill up and the power fails. This page says what was tried and
how it ends; each row is a test. It is written by `python docs/security_page.py` from the tests themselves.

- **Text stays text.** Whatever comes from outside (documents, streams, pairs, queries, prompts) is tokenized with
  special tokens split. [How to allow them](own_documents.md).
- **Names stay inside.** No name in a manifest, shard or index of weights leads out of its folder. Weights are
  safetensors, arrays are read without pickle.
- **What has a name is whole and on the disk.** Files are flushed, renamed, and the folder is flushed; a folder that is
  replaced is exchanged with its successor in one step, or found again by the next run where the file system cannot.
- **Damage is found.** `retro verify` computes everything anew and `--repair` makes just what is damaged.
  [The manifest and its versions](data_flow.md).

`trust_remote_code=True` runs the code of a repository, and faiss trusts an index whose checksum is right: load both
only from whom you trust.

"""


def rows() -> Iterator[tuple[str, str, str]]:
    """What was tried, how it ended, and the file of the test, for every test that is marked `hostile`."""
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        for function in ast.parse(file.read_text(encoding="utf-8")).body:
            for mark in getattr(function, "decorator_list", []):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.hostile":
                    tried, outcome = (ast.literal_eval(text).replace("|", r"\|") for text in mark.args)
                    yield tried, outcome, file.relative_to(ROOT).as_posix()


def security_page() -> str:
    """The text of docs/security.md."""
    lines = ["| tried | outcome | test |", "|---|---|---|"]
    lines += [f"| {tried} | {outcome} | [{Path(file).stem}](../{file}) |" for tried, outcome, file in rows()]
    return INTRODUCTION + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(security_page(), end="")
