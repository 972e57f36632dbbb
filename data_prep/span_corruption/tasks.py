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
Reads a YAML file of named tasks. It says where the texts of each task come from, how they are prepared, and which
share of the training each task has.

    features:                    # the corruption, the same for all tasks, because a batch mixes tasks
      input_length: 512
      noise_density: 0.15
      mean_noise_span_length: 3.0
    tasks:
      wikitext:
        source: Salesforce/wikitext           # a data set on the Hub, or a file or folder
        config: wikitext-103-raw-v1
        split: train
        text_column: text
        preprocessors: ["builtins:str.strip"] # functions from text to text, or to None to drop the row
        longer_than: 100                      # characters
        limit: 1000000                        # largest number of rows
        repeat: true                          # start again at the end
    train:
      wikitext: 1.0                           # share of the rows
    evaluation: []                            # names of tasks
"""

import os
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from datasets import IterableDataset, IterableDatasetDict, interleave_datasets, load_dataset
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TextTask:
    """
    The texts of one source and their preparation.

    Args:
        source (`str`):
            Name of a data set on the Hub, or a file or folder of text, jsonl, csv or parquet files.
        config (`str`, *optional*):
            Configuration of the data set.
        revision (`str`, *optional*):
            Revision of a data set on the Hub.
        split (`str`, *optional*, defaults to `"train"`):
            Split of the data set.
        text_column (`str`, *optional*, defaults to `"text"`):
            Column that holds the text.
        preprocessors (`list[str]`, *optional*):
            Functions from text to text, or to `None` to drop the row, applied in order, as `"module:function"`.
        longer_than (`int`, *optional*, defaults to 0):
            Only texts with more characters are used. They are counted after the preprocessors.
        limit (`int`, *optional*):
            Largest number of rows that are read.
        repeat (`bool`, *optional*, defaults to `False`):
            Whether the source starts again at its end.
    """

    source: str
    config: str | None = None
    revision: str | None = None
    split: str = "train"
    text_column: str = "text"
    preprocessors: list[str] = field(default_factory=list)
    longer_than: int = 0
    limit: int | None = None
    repeat: bool = False

    def texts(self) -> IterableDataset:
        """The texts, in order, as rows `{"text": str}`."""
        splits = open_texts(self.source, self.config, self.revision)
        if self.split not in splits:
            raise ValueError(f"{self.source} has no split {self.split!r}; it has {', '.join(splits)}")
        rows = splits[self.split] if self.limit is None else splits[self.split].take(self.limit)
        functions = [_resolve(name) for name in self.preprocessors]
        rows = rows.map(
            _preprocess,
            batched=True,
            remove_columns=rows.column_names,
            fn_kwargs={
                "column": self.text_column,
                "functions": functions,
                "longer_than": self.longer_than,
                "source": self.source,
            },
        )
        return rows.repeat(None) if self.repeat else rows


@dataclass(frozen=True)
class TaskFile:
    """
    The contents of a file of tasks.

    Args:
        tasks (`dict[str, TextTask]`): The tasks by name.
        train (`dict[str, float]`): Share of each task in the training rows. The shares need not add up to 1.
        evaluation (`list[str]`, *optional*): Names of the tasks to evaluate on.
        features (`dict[str, Any]`, *optional*): Options of [`~trainers.DataCollatorForSpanCorruption`].
    """

    tasks: dict[str, TextTask]
    train: dict[str, float]
    evaluation: list[str] = field(default_factory=list)
    features: dict[str, Any] = field(default_factory=dict)


def open_texts(source: str, config: str | None = None, revision: str | None = None) -> IterableDatasetDict:
    """
    Opens a data set to be streamed.

    Args:
        source (`str`):
            Name of a data set on the Hub, or a file or folder of text, jsonl, csv or parquet files.
        config (`str`, *optional*):
            Configuration of the data set.
        revision (`str`, *optional*):
            Revision of a data set on the Hub.
    """
    path = Path(source)
    if path.is_file():
        return load_dataset(str(path.parent), config, data_files=path.name, streaming=True)
    return load_dataset(source, config, revision=revision, streaming=True)


def read_tasks(path: str | os.PathLike) -> TaskFile:
    """
    Reads a file of tasks.

    Raises:
        `ValueError`: if keys are unknown or missing, if shares are not positive, or if a name has no task.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    file = _build(TaskFile, content, str(path))
    if not isinstance(file.tasks, dict):
        raise ValueError(f"{path}: tasks must map names to tasks, not be {type(file.tasks).__name__}")
    tasks = {name: _build(TextTask, task, f"{path}: task {name}") for name, task in file.tasks.items()}
    if unknown := [name for name in chain(file.train, file.evaluation) if name not in tasks]:
        raise ValueError(f"{path}: no task {', '.join(unknown)}; there are {', '.join(tasks)}")
    if not file.train or any(not isinstance(share, int | float) or share <= 0 for share in file.train.values()):
        raise ValueError(f"{path}: train must map at least one task to a positive share, not be {file.train}")
    return TaskFile(tasks, file.train, file.evaluation, file.features)


def load_mixture(
    tasks: Mapping[str, TextTask],
    shares: Mapping[str, float],
    tokenizer: PreTrainedTokenizerBase,
    row_length: int,
    seed: int = 0,
) -> IterableDataset:
    """
    Mixes tasks by their shares of the rows. The texts of a task are tokenized without special tokens. Then 100 texts
    at a time are joined and split into rows of `row_length` tokens, and the rest of each hundred becomes a shorter
    row. Each row of a task that does not repeat comes once. If a task repeats, the mixture never ends.

    Args:
        tasks (`Mapping[str, TextTask]`):
            The tasks by name.
        shares (`Mapping[str, float]`):
            Share of each task. The shares need not add up to 1.
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer.
        row_length (`int`):
            Number of tokens in a row: `raw_length` of [`~trainers.DataCollatorForSpanCorruption`].
        seed (`int`, *optional*, defaults to 0):
            Seed of the mixing.

    Returns:
        `IterableDataset`: rows `{"input_ids": list[int]}`.
    """
    fn_kwargs = {"tokenizer": tokenizer, "row_length": row_length}
    streams = [
        tasks[name].texts().map(_tokenize, batched=True, batch_size=100, remove_columns=["text"], fn_kwargs=fn_kwargs)
        for name in shares
    ]
    total = sum(shares.values())
    return interleave_datasets(
        streams,
        probabilities=[share / total for share in shares.values()],
        seed=seed,
        stopping_strategy="all_exhausted_without_replacement",
    )


def _build(cls: type, content: Any, place: str) -> Any:
    known = {item.name for item in fields(cls)}
    if not isinstance(content, dict):
        raise ValueError(f"{place} must be a mapping with keys out of {', '.join(sorted(known))}, not {content!r}")
    if unknown := sorted(set(map(str, content)) - known):
        raise ValueError(f"{place} has unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    try:
        return cls(**content)
    except TypeError as error:
        raise ValueError(f"{place}: {error}") from error


def _resolve(name: str) -> Any:
    try:
        return pkgutil.resolve_name(name)
    except (ValueError, ImportError, AttributeError) as error:
        raise ValueError(f'preprocessor {name!r} is not found ({error}); expected "module:function"') from error


def _preprocess(batch: dict[str, list], column: str, functions: list, longer_than: int, source: str) -> dict:
    if column not in batch:
        raise ValueError(f"{source} has no column {column!r}; it has {', '.join(batch)}")
    if others := [text for text in batch[column] if not isinstance(text, str | None)]:
        raise ValueError(f"column {column!r} of {source} holds {others[0]!r}, expected text")
    return {"text": list(_processed(batch[column], functions, longer_than))}


def _processed(texts: list[str | None], functions: list, longer_than: int) -> Iterator[str]:
    for text in texts:
        for function in functions:
            text = None if text is None else function(text)
        if text is not None and len(text) > longer_than:
            yield text


def _tokenize(batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, row_length: int) -> dict[str, list]:
    # Text that spells a special token is tokenized as text.
    texts = tokenizer(batch["text"], add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)
    tokens = list(chain.from_iterable(texts["input_ids"]))
    return {"input_ids": [tokens[start : start + row_length] for start in range(0, len(tokens), row_length)]}
