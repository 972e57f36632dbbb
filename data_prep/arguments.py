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
"""Command lines that are made from dataclasses: options as flags or in a YAML or JSON file, and errors of one line."""

import argparse
import json
import os
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from data_prep.terminal import printable_output


if TYPE_CHECKING:
    from transformers import HfArgumentParser


_EPILOG = """\
The fields of transformers.TrainingArguments are options too, such as --output_dir, --num_train_epochs, --max_steps,
--per_device_train_batch_size, --gradient_accumulation_steps, --bf16, --save_steps and --eval_strategy:
https://huggingface.co/docs/transformers/main_classes/trainer"""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a script's docstring, which holds its runnable example."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.option_strings[:1] == [f"--no_{action.dest}"]:  # transformers repeats the help of the opposite
            return f"Switch --{action.dest} off."
        if action.default is None:
            return action.help
        return super()._get_help_string(action)


def parse_arguments(
    *argument_classes: type,
    argv: Sequence[str] | None = None,
    description: str | None = None,
    prog: str | None = None,
    training_options: type | None = None,
    training_arguments: str | None = None,
) -> tuple[Any, ...]:
    """
    Parses a command line into dataclasses. `--config FILE` reads a YAML or JSON file whose keys are the names of the
    fields. A flag overrides the file. A script calls this function before it imports torch or any module that does, so
    that `--help` and mistakes in the options are answered at once.

    [`~transformers.TrainingArguments`] itself imports torch. A script that trains therefore names its subclass of it
    as a string. The class is imported after all other options were checked, and `--help` shows only the options of
    `training_options`.

    Args:
        argument_classes (`type`):
            Dataclasses in the form that [`~transformers.HfArgumentParser`] takes.
        argv (`Sequence[str]`, *optional*, defaults to `sys.argv[1:]`):
            The words of the command line.
        description (`str`, *optional*):
            Text that `--help` shows: the docstring of the script.
        prog (`str`, *optional*):
            Name of the command in `--help`.
        training_options (`type`, *optional*):
            Dataclass of the options that the training arguments add, or for which they change the default.
        training_arguments (`str`, *optional*):
            `"module:Class"` of a subclass of [`~transformers.TrainingArguments`].

    Returns:
        `tuple`: one instance for each class, in order, and the training arguments last.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    has_datastore = any(field.name == "datastore" for kind in argument_classes for field in fields(kind))
    if has_datastore and argv and not argv[0].startswith("-"):
        argv = ["--datastore", *argv]  # `retro evaluate datastore` is `retro evaluate --datastore datastore`
    if training_arguments is not None:
        classes = argument_classes if training_options is None else (*argument_classes, training_options)
        _parser(classes, argv, True, description=description, prog=prog, epilog=_EPILOG).parse_known_args(argv)
        argument_classes = (*argument_classes, pkgutil.resolve_name(training_arguments))
    parser = _parser(argument_classes, argv, False, description=description, prog=prog)
    return parser.parse_args_into_dataclasses(args=argv, args_file_flag=None)[: len(argument_classes)]


def name_leading_words(argv: Sequence[str] | None, first: str, others: str | None = None) -> list[str]:
    """
    Gives the words that stand before all options the names of options, so that `retro add datastore new.jsonl` is
    `retro add --datastore datastore --input new.jsonl`.

    Args:
        argv (`Sequence[str]`, *optional*, defaults to `sys.argv[1:]`): The words of the command line.
        first (`str`): The option of the first word.
        others (`str`, *optional*): The option of the words after it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    number = next((i for i, word in enumerate(argv) if word.startswith("-") and word != "-"), len(argv))
    words, options = argv[:number], argv[number:]
    named = [f"--{first}", words[0]] if words else []
    if len(words) > 1:
        named += [f"--{others}", *words[1:]] if others else words[1:]
    return named + options


def _parser(
    argument_classes: Sequence[type], argv: Sequence[str] | None, skip_unknown: bool, **kwargs: Any
) -> "HfArgumentParser":
    """A parser with the defaults of `--config`. With `skip_unknown`, it ignores keys of other dataclasses."""
    # This import takes half a second, which `retro --help` can do without.
    from transformers import HfArgumentParser

    # An abbreviation of one option may be the whole name of another, such as --fsdp and --fsdp_size.
    parser = HfArgumentParser(argument_classes, formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)
    parser.add_argument("--config", metavar="FILE", default=None, help="YAML or JSON file with values of the options.")
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config", default=None)
    config_path = config_parser.parse_known_args(argv)[0].config
    if config_path is not None:
        _set_defaults_from_file(parser, Path(config_path), skip_unknown)
    return parser


def _set_defaults_from_file(parser: "HfArgumentParser", path: Path, skip_unknown: bool) -> None:
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(f"cannot read --config {path}: {error}")
    if not isinstance(values, dict):
        parser.error(f"--config {path} must hold a mapping of option names to values, not {type(values).__name__}")
    actions = {action.dest: action for action in parser._actions}
    unknown = sorted(set(values) - set(actions))
    if unknown and not skip_unknown:
        parser.error(
            f"--config {path} has unknown options {', '.join(map(str, unknown))}; see --help for the known ones"
        )
    for name, value in values.items():
        if name not in actions:
            continue
        action = actions[name]
        action.required = False
        if action.choices is not None and value not in action.choices:
            parser.error(
                f"--config {path}: {name} is {value!r}, expected one of {', '.join(map(str, action.choices))}"
            )
        # argparse converts only defaults that are strings. A float may be given as 3, or as 1e-4, a string in YAML.
        action.default = str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _from_a_clone(message: str) -> str:
    """Says of an extra of this package how pip finds it: it is installed from a clone until it is published."""
    hint, number = re.subn(r'pip install "?retro-transformers\[([\w-]+)\]"?', r'pip install ".[\1]"', message)
    return f"{hint} (in a clone of the repository of retro-transformers)" if number else message


def run_command(main: Callable[[], Any]) -> None:
    """
    Runs a script. A mistake of the user (`ValueError`, `OSError`, `ImportError`) is reported in one line, with exit
    code 1. All that is printed passes through [`printable_output`]. If the output is not a terminal, only long work
    shows its progress, once a minute.
    """
    if not sys.stderr.isatty():
        # tqdm reads these variables when it is imported, for the bars of all libraries.
        os.environ.setdefault("TQDM_DELAY", "30")
        os.environ.setdefault("TQDM_MININTERVAL", "60")
    with printable_output():
        try:
            main()
            sys.stdout.flush()
        except BrokenPipeError:  # what read the output, such as `head`, has ended
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except (ValueError, OSError, ImportError) as error:
            print(f"error: {_from_a_clone(str(error))}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted; run the same command again to resume", file=sys.stderr)
            sys.exit(130)
        except Exception:  # Python would print it after the block
            traceback.print_exc()
            sys.exit(1)
