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
Peak resident memory of `retro chunk` for inputs of several sizes, made by repeating some documents.

    python benchmarks/datastore_memory.py --input documents.jsonl --tokenizer tokenizer --megabytes 10 1000
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def repeat(source: Path, target: Path, size: int) -> None:
    """Writes lines of `source`, over and over, until `target` has `size` bytes."""
    with source.open("rb") as lines, target.open("wb") as file:
        for line in itertools.cycle(lines):
            file.write(line)
            if file.tell() >= size:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="A jsonl file.")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 1000])
    arguments = parser.parse_args()
    for megabytes in arguments.megabytes:
        with tempfile.TemporaryDirectory(dir=arguments.input.parent) as folder:
            documents = Path(folder) / "documents.jsonl"
            repeat(arguments.input, documents, megabytes * 1_000_000)
            command = [sys.executable, "-m", "data_prep.scripts.chunk", "--input", str(documents)]
            command += ["--tokenizer", arguments.tokenizer, "--output-dir", str(Path(folder) / "datastore")]
            begin = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise SystemExit(f"{' '.join(command)} failed")
            print(
                f"{megabytes:>6} MB of input: peak {usage.ru_maxrss / 1024:.0f} MiB, "
                f"{time.perf_counter() - begin:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
