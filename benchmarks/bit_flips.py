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
Which flipped bits `retro verify` does not find: flips single bits at random places in every file of datastores and
models, one at a time, and prints how many were tried and how many were silent.

    retro prepare --recipe recipe.yaml --output_dir datastore
    retro retrofit --base base --output-dir model --retrofit-only
    python benchmarks/bit_flips.py --paths datastore model --flips 20

It works on copies. A flip is silent if the verification finds no damage.
"""

import random
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.arguments import parse_arguments, run_command


@dataclass
class BitFlipsArguments:
    """Options of this benchmark."""

    paths: list[str] = field(metadata={"help": "Folders of datastores and models."})
    flips: int = field(default=20, metadata={"help": "Bits to flip in each file."})
    seed: int = field(default=0, metadata={"help": "Seed of the places."})


def count_flips(path: Path, flips: int, seed: int) -> dict[str, tuple[int, int]]:
    """
    Flips bits in the files of a folder, which is altered meanwhile.

    Args:
        path (`Path`): Folder of a datastore or a model in which nothing is wrong.
        flips (`int`): Bits to flip in each file.
        seed (`int`): Seed of the places.

    Returns:
        `dict`: how many were tried and how many were silent, by the names of the files without numbers of shards.
    """
    from data_prep.upkeep.verify import verify

    if any(not finding.unchecked for finding in verify(path)):
        raise ValueError(f"`retro verify {path}` finds damage already")
    counts = defaultdict(lambda: [0, 0])
    drawn = random.Random(seed)
    for file in sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size):
        data = file.read_bytes()
        count = counts[re.sub(r"\d{5}", "N", file.relative_to(path).as_posix())]
        for _ in range(flips):
            altered = bytearray(data)
            altered[drawn.randrange(len(data))] ^= 1 << drawn.randrange(8)
            file.write_bytes(altered)
            count[0] += 1
            count[1] += all(finding.unchecked for finding in verify(path))
        file.write_bytes(data)
    return {name: tuple(count) for name, count in counts.items()}


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(BitFlipsArguments, argv=argv, description=__doc__)
    print("| folder | file | tried | silent |\n|---|---|---|---|")
    for path in map(Path, arguments.paths):
        with tempfile.TemporaryDirectory() as folder:
            copy = shutil.copytree(path, Path(folder, path.name))
            for name, (tried, silent) in count_flips(copy, arguments.flips, arguments.seed).items():
                print(f"| {path.name} | {name} | {tried} | {silent} |", flush=True)


if __name__ == "__main__":
    run_command(main)
