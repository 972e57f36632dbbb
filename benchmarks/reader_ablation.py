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
What the parts of a reader's training are worth: readers that saw the same tokens with other losses, lessons, ranks and
sides, each measured on held-out documents of its own kinds of text and of others. `benchmarks/reader_corpus.py` makes
the texts.

    for name in mix sqlite descriptions bible; do
        retro prepare --recipe recipe.yaml --data_dir texts/$name --output_dir $name
    done
    python benchmarks/reader_ablation.py --base HuggingFaceTB/SmolLM2-135M-Instruct --datastore mix \\
        --eval_datastores mix sqlite descriptions bible --output_dir ablation

A run of 512 steps of 1,024 tokens takes one to two hours of a CPU core with bfloat16 instructions. The same command
run again goes on where it stopped, and `--runs` chooses some of the runs, so that two cores can share them.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.arguments import parse_arguments, run_command
from trainers.evaluation.report import Difference


TEACHER = ["--teacher", "{teacher}"]
RANK_16 = ["--neighbor_adapter_rank", "16"]
# Name of each run, and what sets it apart. `in_front` and `untrained` are only measured.
RUNS: dict[str, list[str] | None] = {
    "in_front": None,
    "untrained": None,
    "lm": RANK_16,
    "kl": [*RANK_16, *TEACHER, "--lm_weight", "0"],
    "lm_kl": [*RANK_16, *TEACHER],
    "lm_kl_copying": [*RANK_16, *TEACHER, "--copy_share", "0.2"],
    "lm_kl_copying_random": [*RANK_16, *TEACHER, "--copy_share", "0.2", "--random_share", "0.1"],
    "lm_rank_8": ["--neighbor_adapter_rank", "8"],
    "lm_rank_32": ["--neighbor_adapter_rank", "32"],
    "lm_both_sides": [*RANK_16, "--row_adapter_rank", "16"],
    "lm_first_token": RANK_16,  # rows see the first token of a neighbor, which is an attention sink
}


@dataclass
class AblationArguments:
    """Arguments of this benchmark."""

    base: str = field(metadata={"help": "Folder or Hub id of the decoder that the readers are for."})
    datastore: str = field(metadata={"help": "Datastore to train on: its split `lessons`."})
    eval_datastores: list[str] = field(metadata={"help": "Datastores whose split `validation` is measured."})
    output_dir: str = field(metadata={"help": "Folder for the teacher, readers and measurements; it is continued."})
    runs: list[str] = field(
        default_factory=lambda: list(RUNS), metadata={"help": "Runs to make. All are in the table as far as they are."}
    )
    steps: int = field(default=512, metadata={"help": "Training steps of 16 chunks."})
    num_neighbors: list[int] = field(
        default_factory=lambda: [1, 2], metadata={"help": "Numbers of neighbors to measure. Training uses one."}
    )


def call(script: str, *options: object) -> None:
    """Runs a command line of this project in a process of its own."""
    subprocess.run([sys.executable, "-m", f"trainers.scripts.{script}", *map(str, options)], check=True)


def train(name: str, options: list[str], arguments: AblationArguments) -> Path:
    """Trains the reader of a run and returns its folder."""
    folder, teacher = Path(arguments.output_dir), Path(arguments.output_dir) / "teacher"
    model = arguments.base
    data = ["--datastore", arguments.datastore, "--num_neighbors", 1, "--row_chunks", 8]
    if "--teacher" in options:
        call("teach", "--model", arguments.base, *data, "--split", "lessons", "--output_dir", teacher)
        options = [option.format(teacher=teacher) for option in options]
    if name == "lm_first_token":
        from modeling_retro import RetroJointForCausalLM

        model = folder / "first_token_base"
        if not model.exists():
            adapter = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
            RetroJointForCausalLM.from_decoder_pretrained(
                arguments.base, hidden_neighbor_tokens=0, neighbor_adapter=adapter
            ).save_pretrained(model, retrofit_only=True)
        options = []
    call(
        *["train_retro", "--model", model, *data, "--train_split", "lessons", *options],
        *["--freeze_decoder", "true", "--retrofit_only", "true", "--decoder_dtype", "bfloat16", "--bf16", "true"],
        *["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1, "--max_steps", arguments.steps],
        *["--learning_rate", 5e-4, "--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", 10],
        *["--weight_decay", 0, "--seed", 1, "--save_steps", 50, "--report_to", "none", "--output_dir", folder / name],
    )
    return folder / name


def measure(name: str, model: str | Path, arguments: AblationArguments) -> None:
    """Measures a run on each datastore, unless that is done."""
    modes = ["off", "in_front"] if name == "in_front" else ["off", "on", "random"]
    for datastore in arguments.eval_datastores:
        folder = Path(arguments.output_dir) / "measured" / f"{name}-{Path(datastore).name}"
        if (folder / "evaluation.json").exists():
            continue
        call(
            *["evaluate_retro", "--model", model, "--datastore", datastore, "--modes", *modes],
            *["--num_neighbors", *arguments.num_neighbors, "--window_chunks", 8, "--stride_chunks", 4],
            *["--batch_size", 4, "--dtype", "bfloat16", "--model_card", "false", "--output_dir", folder],
        )


def read_table(arguments: AblationArguments) -> list[str]:
    """Lines of a Markdown table: bits per byte less those without neighbors, and their 95 % intervals."""
    names = [Path(datastore).name for datastore in arguments.eval_datastores]
    lines = [f"| run | mode | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for run in RUNS:
        cells: dict[str, list[str]] = {}
        for name in names:
            path = Path(arguments.output_dir) / "measured" / f"{run}-{name}" / "evaluation.json"
            measured = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"bits_per_byte": {}}
            for mode in measured["bits_per_byte"]:
                if mode != "off":
                    difference = Difference(**measured["differences"][f"{mode} - off"])
                    cells.setdefault(mode, ["–"] * len(names))[names.index(name)] = str(difference)
        lines += [f"| {run} | {mode} | {' | '.join(row)} |" for mode, row in cells.items()]
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(AblationArguments, argv=argv, description=__doc__)
    unknown = sorted(set(arguments.runs) - set(RUNS))
    if unknown:
        raise ValueError(f"--runs has {', '.join(unknown)}; expected some of {', '.join(RUNS)}")
    for name in arguments.runs:
        options = RUNS[name]
        measure(name, arguments.base if options is None else train(name, options, arguments), arguments)
    print("\n".join(read_table(arguments)))


if __name__ == "__main__":
    run_command(main)
