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
"""Command lines from dataclasses: flags or a YAML/JSON file with the same names, and one-line errors."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml


if TYPE_CHECKING:
    from transformers import HfArgumentParser


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a script's docstring, which holds its runnable example."""


def parse_arguments(
    *argument_classes: type, argv: Sequence[str] | None = None, description: str | None = None, prog: str | None = None
) -> tuple[Any, ...]:
    """
    Parses a command line into dataclasses. `--config FILE` reads a YAML or JSON file whose keys are the names of the
    fields; flags win over the file.

    Args:
        argument_classes (`type`):
            Dataclasses in the form that [`~transformers.HfArgumentParser`] takes.
        argv (`Sequence[str]`, *optional*, defaults to `sys.argv[1:]`):
            The words of the command line.
        description (`str`, *optional*):
            Shown by `--help`: the docstring of the script.
        prog (`str`, *optional*):
            Name of the command in `--help`.

    Returns:
        `tuple`: one instance for each class, in order.
    """
    # It costs half a second, which `retro --help` need not pay.
    from transformers import HfArgumentParser

    parser = HfArgumentParser(argument_classes, description=description, prog=prog, formatter_class=_HelpFormatter)
    parser.add_argument("--config", metavar="FILE", default=None, help="YAML or JSON file with values of the options.")
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config", default=None)
    config_path = config_parser.parse_known_args(argv)[0].config
    if config_path is not None:
        _set_defaults_from_file(parser, Path(config_path))
    return parser.parse_args_into_dataclasses(args=argv, args_file_flag=None)[: len(argument_classes)]


def _set_defaults_from_file(parser: "HfArgumentParser", path: Path) -> None:
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(f"cannot read --config {path}: {error}")
    if not isinstance(values, dict):
        parser.error(f"--config {path} must hold a mapping of option names to values, not {type(values).__name__}")
    actions = {action.dest: action for action in parser._actions}
    unknown = sorted(set(values) - set(actions))
    if unknown:
        parser.error(
            f"--config {path} has unknown options {', '.join(map(str, unknown))}; see --help for the known ones"
        )
    for name, value in values.items():
        action = actions[name]
        action.required = False
        if action.choices is not None and value not in action.choices:
            parser.error(
                f"--config {path}: {name} is {value!r}, expected one of {', '.join(map(str, action.choices))}"
            )
        # argparse converts defaults that are strings only: 3 for a float, and 1e-4, which YAML reads as a string.
        action.default = str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def run_command(main: Callable[[], Any]) -> None:
    """Runs a script: the user's mistakes (`ValueError`, `OSError`, `ImportError`) are one line and exit code 1."""
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
