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
Writes docs/security.md. Each row of its table is a test that is marked `hostile`; a test compares the two.

    python docs/security_page.py > docs/security.md
"""

import ast
from collections.abc import Iterator
from pathlib import Path


ROOT = Path(__file__).parents[1]
INTRODUCTION = """\
# Hostile inputs, power cuts, damaged files

Documents, datastores and models may come from people whom you do not know, disks fill up, and the power may fail. This
page lists what was tried and what happened. Each row is a test, and `python docs/security_page.py` writes the page
from the tests.

- **Text stays text.** Text from outside (documents, streams, pairs, queries, prompts) is tokenized with special tokens
  split, so it cannot contain control tokens. [Your own documents](own_documents.md) says how to allow them.
- **Names stay inside.** No name in a manifest, a shard or an index of weights can lead out of its folder. Weights are
  stored as safetensors, and arrays are read without pickle.
- **A file that has its name is whole and on the disk.** A file is written and flushed before it is renamed, and then
  its folder is flushed. A folder is replaced in one step where the file system can exchange two names. Where it
  cannot, the next run finds the old folder or the new one.
- **Damage is found.** `retro verify` computes everything again, and `--repair` remakes only the damaged parts. [From
  documents to a report](data_flow.md) describes the manifest and its versions, and what is recorded of a model.
- **Nobody is asked.** No command runs the code of a model, tokenizer or encoder, or asks whether it
  may.
- **Nothing connects unasked.** The address of a database or of a server that embeds texts comes from the user. No
  model, datastore or collection can name one.
- **Printed text is text.** Control characters in all that a command prints are written out.

`trust_remote_code=True` runs the code of a repository, and faiss trusts an index whose checksum is right. Load both
only from people whom you trust.

"""


def rows() -> Iterator[tuple[str, str, str]]:
    """Yields the input that was tried, the outcome and the file of each test that is marked `hostile`."""
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
