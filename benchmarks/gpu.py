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
All that a machine with a GPU is asked, in one command. Each part ends within a few minutes, prints a table and keeps
it in `--output_dir`, so that the same command goes on where the last one stopped.

    python benchmarks/gpu.py --output_dir gpu
    python benchmarks/gpu.py --output_dir gpu --parts generation embedding --again true
    python benchmarks/gpu.py --output_dir gpu --parts quality --datastore datastore
    python benchmarks/gpu.py --output_dir toy --size toy

| part       | what it does                                                                                         |
|------------|------------------------------------------------------------------------------------------------------|
| equalities | runs the tests that are marked `gpu`                                                                 |
| training   | trains decoders of about a billion weights: tokens a second, share of the peak, ON against OFF       |
| generation | generates at several batch sizes: the base by plain transformers, and both models OFF and ON          |
| embedding  | embeds chunks in bfloat16, beside sentence-transformers                                              |
| quality    | trains a reader, a RETRO model, and a plain decoder of three times its weights, and measures them     |

`quality` stops after `--minutes` and leaves a checkpoint; call it until its table says that it is done. `--size toy`
runs every part in seconds on a CPU. Without `--datastore`, one is made from the docstrings of the installed
transformers, which is enough for speed. For quality, give a larger one (see docs/training.md).
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from gpu_common import SIZES, device_name, to_markdown
from gpu_quality import measure_quality
from gpu_speed import measure_embedding, measure_generation, measure_training

from data_prep.arguments import parse_arguments, run_command
from modeling_retro.durable_files_retro import make_folder, write_json


REPOSITORY = Path(__file__).parents[1]


@dataclass
class GpuArguments:
    """Arguments of this benchmark."""

    output_dir: str = field(metadata={"help": "Folder for tables, checkpoints and weights; it is continued."})
    parts: list[str] = field(
        default_factory=lambda: list(PARTS),
        metadata={"help": "Parts to run: equalities, training, generation, embedding, quality."},
    )
    size: str = field(default="full", metadata={"help": "Size of models and data.", "choices": list(SIZES)})
    datastore: str | None = field(
        default=None, metadata={"help": "Datastore with a split `validation`. One of docstrings is made when unset."}
    )
    data: str | None = field(
        default=None, metadata={"help": "Documents of the datastore that is made, in place of docstrings."}
    )
    base: str | None = field(
        default=None, metadata={"help": "Decoder that the reader is for. SmolLM2-135M-Instruct when unset."}
    )
    minutes: float = field(default=8.0, metadata={"help": "Minutes after which `quality` stops at a checkpoint."})
    again: bool = field(default=False, metadata={"help": "Run parts again that are done."})


def run_tests(arguments: GpuArguments) -> dict[str, Any]:
    """Runs the tests that are marked for a GPU. Its rows name the tests, and say why one was skipped or failed."""
    report = Path(arguments.output_dir).resolve() / "equalities.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", f"--junit-xml={report}", "tests/test_gpu.py"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if not report.exists():
        raise RuntimeError(f"the tests did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    rows = []
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = next((child for child in case if child.tag in ("skipped", "failure", "error")), None)
        reason = "" if outcome is None else outcome.get("message", "").splitlines()[0]
        result = "passed" if outcome is None else outcome.tag
        rows.append({"test": case.get("name"), "result": result, "reason": reason})
    return {"rows": rows, "done": True}


PARTS: dict[str, Callable[[GpuArguments], dict[str, Any]]] = {
    "equalities": run_tests,
    "training": measure_training,
    "generation": measure_generation,
    "embedding": measure_embedding,
    "quality": measure_quality,
}


def run_part(name: str, arguments: GpuArguments) -> dict[str, Any]:
    """
    Runs a part unless it is done, and keeps its result in `{name}.json`.

    Returns:
        `dict`: `rows` of the table, whether the part is `done`, the `device`, the `seconds` and the `size`.

    Raises:
        ValueError: If the folder holds the result of another size.
    """
    path = Path(arguments.output_dir) / f"{name}.json"
    if path.exists():
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["size"] != arguments.size:
            raise ValueError(
                f"{path} holds a result of size {result['size']!r}, not {arguments.size!r}; choose another "
                "--output_dir for this size"
            )
        if result["done"] and not arguments.again:
            return result
    start_time = time.perf_counter()
    result = PARTS[name](arguments)
    result |= {
        "device": device_name(),
        "torch": torch.__version__,
        "size": arguments.size,
        "seconds": round(time.perf_counter() - start_time, 1),
    }
    write_json(path, result)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(GpuArguments, argv=argv, description=__doc__)
    unknown = sorted(set(arguments.parts) - set(PARTS))
    if unknown:
        raise ValueError(f"unknown parts {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
    make_folder(Path(arguments.output_dir))
    for name in arguments.parts:
        result = run_part(name, arguments)
        state = "done" if result["done"] else "not done: run the same command again"
        print(f"\n## {name} ({result['device']}, {result['seconds']} s, {state})\n\n{to_markdown(result['rows'])}")


if __name__ == "__main__":
    run_command(main)
