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
"""The command `retro`, which runs modules that `python -m` and `accelerate launch -m` can run as well"""

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.arguments import run_command
from data_prep.heartbeat import end_heartbeat
from modeling_retro import __version__


ACCELERATE_CONFIGS = Path(__file__).parent / "accelerate_configs"

# The groups of `retro --help` and of README.md: the module of each command and what it does.
GROUPS = {
    "begin": {
        "quickstart": ("trainers.scripts.quickstart", "make a datastore and measure the gain from it, in minutes"),
    },
    "make a datastore": {
        "plan": ("data_prep.scripts.plan", "estimate time, memory and disk of a datastore"),
        "prepare": ("data_prep.scripts.prepare", "run all stages of the datastore from one recipe"),
        "chunk": ("data_prep.scripts.chunk", "cut documents into chunks of tokens"),
        "deduplicate": ("data_prep.scripts.deduplicate", "drop training documents that nearly equal held-out ones"),
        "embed": ("data_prep.scripts.embed", "embed the chunks"),
        "index": ("data_prep.scripts.index", "build the faiss index over the embeddings"),
        "neighbors": ("data_prep.scripts.neighbors", "find the neighbors of every chunk"),
        "import": ("data_prep.scripts.convert", "import data of other RETRO implementations"),
    },
    "keep a datastore": {
        "add": ("data_prep.scripts.add", "add documents to a datastore while others read it"),
        "update": ("data_prep.scripts.update", "add documents, and replace those with the same id"),
        "remove": ("data_prep.scripts.remove", "remove documents, which are then no longer found"),
        "compact": ("data_prep.scripts.compact", "remove the chunks of removed documents from the disk"),
        "verify": ("data_prep.scripts.verify", "find damage in a datastore or model, and repair it"),
        "export": ("data_prep.scripts.export", "copy a datastore into Milvus or PostgreSQL"),
        "push": ("data_prep.scripts.push", "publish a datastore in an object store, such as S3"),
        "pull": ("data_prep.scripts.pull", "bring a datastore from an object store"),
    },
    "train and measure a language model": {
        "retrofit": ("trainers.scripts.retrofit", "give retrieval to a pretrained language model"),
        "train": ("trainers.scripts.train_retro", "train a RETRO language model"),
        "teach": (
            "trainers.scripts.teach",
            "store the predictions of a model with the neighbor in front, as a teacher",
        ),
        "reader": (
            "trainers.scripts.train_reader",
            "teach a pretrained language model to read passages of a datastore",
        ),
        "lessons": ("trainers.scripts.make_lessons", "make lessons in reading from the texts of a datastore"),
        "evaluate": ("trainers.scripts.evaluate_retro", "measure the gain from retrieval, in bits per byte"),
        "lm-eval": (
            "trainers.scripts.lm_eval_retro",
            "evaluate with retrieval on tasks of the lm-evaluation-harness",
        ),
        "lm-eval-tasks": ("trainers.scripts.lm_eval_tasks", "make tasks of the harness from the texts of a datastore"),
    },
    "use it": {
        "search": ("trainers.scripts.search", "look a text up in a datastore"),
        "generate": ("trainers.scripts.generate", "continue a prompt and show the neighbors used"),
        "serve": ("serving.scripts.serve", "answer requests with the API of OpenAI"),
        "demo": ("serving.scripts.demo", "show what retrieval is worth, in a browser"),
    },
    "train and measure the retriever": {
        "pairs": ("data_prep.scripts.pairs", "write sentence pairs for the retriever"),
        "stackexchange": ("data_prep.scripts.stackexchange", "turn a StackExchange dump into pairs"),
        "train-retriever": ("trainers.scripts.train_retriever", "train the encoder that finds neighbors"),
        "evaluate-retriever": ("trainers.scripts.evaluate_retriever", "measure a retriever"),
        "mine-negatives": ("trainers.scripts.mine_negatives", "find hard negatives for retriever training"),
        "mine-neighbors": ("trainers.scripts.mine_neighbors", "find the neighbors that help a language model"),
        "distill-encoder": ("trainers.scripts.distill_encoder", "make a static encoder, which is many times faster"),
    },
    "span corruption (T5)": {
        "wikitext": ("data_prep.scripts.wikitext", "turn WikiText files into documents"),
        "train-span-corruption": ("trainers.scripts.train_span_corruption", "train on corrupted spans"),
    },
}

COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


def help_text() -> str:
    """The list of commands that `retro --help` prints."""
    lines = ["usage: retro COMMAND [options]", "       retro COMMAND --help"]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:"]
        lines += [f"  {name:<22} {summary}" for name, (_, summary) in commands.items()]
    lines += [
        "",
        "on several devices:",
        "  retro COMMAND --accelerate-config NAME_OR_FILE [--num-processes N] [options]",
        f"  with one of {', '.join(accelerate_config_names())}, or a file written by `accelerate config`",
    ]
    return "\n".join(lines)


def accelerate_config_names() -> list[str]:
    """Names of the configs of `accelerate launch` that come with the package."""
    return sorted(path.stem for path in ACCELERATE_CONFIGS.glob("*.yaml"))


def run_module(module: str, options: Sequence[str]) -> None:
    """
    Runs the `main` of a module in this process or, with `--accelerate-config`, in processes that accelerate launches.

    Args:
        module (`str`):
            Name of the module.
        options (`Sequence[str]`):
            Words of the command line after the command.

    Raises:
        `ValueError`: if the accelerate config is neither a known name nor a file.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--accelerate-config", "--accelerate_config")
    parser.add_argument("--num-processes", "--num_processes")
    launch, options = parser.parse_known_args(options)
    if launch.accelerate_config is None:
        importlib.import_module(module).main(options)
        return

    from accelerate.commands.launch import launch_command, launch_command_parser

    path = ACCELERATE_CONFIGS / f"{launch.accelerate_config}.yaml"
    if not path.is_file():
        path = Path(launch.accelerate_config)
    if not path.is_file():
        raise ValueError(
            f"--accelerate-config is {launch.accelerate_config!r}, expected a file or one of "
            f"{', '.join(accelerate_config_names())}"
        )
    words = ["--config_file", str(path)]
    if launch.num_processes is not None:
        words += ["--num_processes", launch.num_processes]
    end_heartbeat()  # the processes have their own
    launch_command(launch_command_parser().parse_args([*words, "-m", module, *options]))


def main(argv: Sequence[str] | None = None) -> None:
    """
    Runs `retro COMMAND [options]`.

    Args:
        argv (`Sequence[str]`, *optional*, defaults to `sys.argv[1:]`):
            The words after `retro`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text())
        return
    if argv[0] == "--version":
        print(f"retro-transformers {__version__}")
        return
    command, *options = argv
    if command not in COMMANDS:
        nearest = difflib.get_close_matches(command, COMMANDS, n=1)
        guess = f"did you mean {nearest[0]!r}? Known" if nearest else "known"
        print(f"error: unknown command {command!r}; {guess} are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)

    run_command(lambda: run_module(COMMANDS[command][0], options))


if __name__ == "__main__":
    main()
