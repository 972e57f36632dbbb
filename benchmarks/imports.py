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
What is imported before something happens: modules at `import modeling_retro` and at the `--help` of each command.

    python benchmarks/imports.py
    python benchmarks/imports.py --source ../another-checkout

Modules are counted rather than seconds, which depend on the machine and on what its disk has cached.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.arguments import parse_arguments, run_command
from trainers.cli import COMMANDS


HEAVY = ("torch", "transformers", "datasets", "faiss")
COUNT = """
import json, sys
number = len(sys.modules)
heavy = [name for name in {heavy} if name in sys.modules]
print(json.dumps([number, heavy]), file=sys.stderr)
"""
HELP = """
from trainers.cli import main
try:
    main({words})
except SystemExit:
    pass
"""


@dataclass
class ImportsArguments:
    """Arguments of this benchmark."""

    source: str = field(default=".", metadata={"help": "Root of the checkout to look at."})


def count_modules(statements: str, source: str = ".") -> tuple[int, list[str]]:
    """Number of imported modules after some statements in a fresh process, and which of `HEAVY` are among them."""
    code = statements + COUNT.format(heavy=HEAVY)
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=source)
    number, heavy = json.loads(process.stderr.splitlines()[-1])
    return number, heavy


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(ImportsArguments, argv=argv, description=__doc__)
    cases = {
        "python": "",
        "import transformers": "import transformers",
        "import modeling_retro": "import modeling_retro",
    }
    cases["retro --help"] = HELP.format(words=["--help"])
    cases |= {f"retro {command} --help": HELP.format(words=[command, "--help"]) for command in COMMANDS}
    print("| | modules | with |\n|---|---|---|")
    for name, statements in cases.items():
        number, heavy = count_modules(statements, arguments.source)
        print(f"| `{name}` | {number} | {', '.join(heavy)} |", flush=True)


if __name__ == "__main__":
    run_command(main)
