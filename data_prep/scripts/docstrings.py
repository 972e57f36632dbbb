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
Writes the docstrings of installed packages: real text that needs no download, with one document for each module.

    python -m data_prep.scripts.docstrings --packages transformers --output_file docstrings.jsonl
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.arguments import parse_arguments, run_command


@dataclass
class DocstringsArguments:
    """
    Arguments of `python -m data_prep.scripts.docstrings`.
    """

    output_file: str = field(metadata={"help": "Jsonl file to write, with one document on each line."})
    packages: list[str] = field(
        default_factory=lambda: ["transformers"], metadata={"help": "Names of installed packages to read."}
    )


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(
        DocstringsArguments, argv=argv, description=__doc__, prog="python -m data_prep.scripts.docstrings"
    )
    from data_prep.docstrings import read_docstrings

    output_file = Path(arguments.output_file)
    output_file.parent.mkdir(parents=True, exist_ok=True)
    partial_file = output_file.with_name(output_file.name + ".partial")
    with partial_file.open("w", encoding="utf-8") as stream:
        for document in read_docstrings(arguments.packages):
            stream.write(json.dumps(document, ensure_ascii=False) + "\n")
    os.replace(partial_file, output_file)


if __name__ == "__main__":
    run_command(main)
