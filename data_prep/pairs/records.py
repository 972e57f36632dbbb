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
"""What the records of pair sets say: the forms of a record, its label, and why a record gives no pair"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


# Columns that say whether two texts belong together, or how much. Those of the second group are always graded.
_LABELS = ("label", "labels", "is_duplicate")
_SCORES = ("score", "scores")
# Columns of the first and the second text of a pair, in sentence-transformers, in Quora's pairs and in notebooks
_NAMES = (
    ("anchor", "positive"),
    ("query", "positive"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("sentence_A", "sentence_B"),
    ("text1", "text2"),
    ("query", "passage"),
)
_NEGATIVES = re.compile(r"(?:hard_)?negatives?_?([0-9]*)")

# Reasons why a record gives no pair
LABELLED = "labelled as no pair"
EMPTY = "without a positive"
MALFORMED = "malformed"


@dataclass(frozen=True)
class PairFormat:
    """
    Tells what the records of a pair set mean.

    Args:
        columns (`Sequence[str]`, *optional*):
            Names of the anchor, the positive and the hard negatives, in records with other names.
        label_column (`str`, *optional*):
            Name of the label. By default it is `label`, `labels`, `is_duplicate`, `score` or `scores`, if any.
        min_score (`float`, *optional*):
            The lowest label or score of two texts that belong together. By default a label is 0 or 1.
    """

    columns: tuple[str, ...] | None = None
    label_column: str | None = None
    min_score: float | None = None

    def label_of(self, names: Sequence[str]) -> str | None:
        """
        Finds the column of the label among the columns of a record.

        Raises:
            ValueError: If there are several, or the column that was named is missing.
        """
        if self.label_column is not None:
            if self.label_column not in names:
                raise ValueError(f"there is no label {self.label_column!r} among {', '.join(names)}")
            return self.label_column
        found = [name for name in (*_LABELS, *_SCORES) if name in names]
        if len(found) > 1:
            raise ValueError(f"{' and '.join(found)} could both be the label; say which one is (label_column)")
        return found[0] if found else None

    def is_positive(self, label: Any, name: str) -> bool:
        """
        Says whether a label means that two texts belong together.

        Raises:
            ValueError: If it is neither 0 nor 1, and there is no lowest score.
        """
        value = {"true": 1.0, "false": 0.0}.get(label.strip().lower(), label) if isinstance(label, str) else label
        try:
            value = float(value)
        except (TypeError, ValueError):
            value = math.nan
        if self.min_score is not None and not math.isnan(value):
            return value >= self.min_score
        if name in _SCORES and name != self.label_column and not math.isnan(value):
            raise ValueError(
                f"{name} {label!r} is a graded score; give the lowest score of texts that belong together "
                "(min_score), or remove it if all of them do"
            )
        if value not in (0.0, 1.0):
            raise ValueError(
                f"the label {name} is {label!r}, expected 0 or 1; for a graded score give the lowest one of texts "
                "that belong together (min_score), and remove the label if all of them do"
            )
        return value == 1.0

    def form(self, record: Any) -> tuple[tuple[str, ...], str | None]:
        """
        Finds the form of a record: the keys that it is known by, and the name of its label, if it has one.

        Raises:
            ValueError: If no form is known, or the label is unclear.
        """
        if isinstance(record, list):
            return ("list",), None
        if isinstance(record, dict):
            label = self.label_of(list(record))
            forms = (("set",), ("texts",), ("query", "pos"), ("questions", "is_duplicate"), *_NAMES)
            if label is not None and isinstance(record[label], list) and {"query", "docs"} <= record.keys():
                return ("query", "docs"), label
            for form in forms if self.columns is None else (self.columns,):
                if set(form) <= record.keys():
                    return form, label
            if {"premise", "hypothesis"} <= record.keys() and self.columns is None:
                raise ValueError(
                    "premise and hypothesis have one of several classes; keep the entailments, remove the label, and "
                    "name the columns (columns: premise, hypothesis)"
                )
        shown = json.dumps(record, ensure_ascii=False, default=str)[:80]
        if self.columns is not None:
            raise ValueError(f"expected the columns {', '.join(self.columns)}, got {shown}")
        raise ValueError(
            'expected ["a", "b"], {"set": […]}, {"query": …, "pos": […], "neg": […]}, {"anchor": …, "positive": …} or '
            f'{{"sentence1": …, "sentence2": …, "label": …}}, got {shown}; other names are given as columns'
        )

    def read(self, record: Any) -> tuple[list[tuple[str, str]], list[str], str | None]:
        """
        Reads a record.

        Returns:
            `tuple`: the pairs (anchor, positive), the hard negatives, and the reason if there is no pair.

        Raises:
            ValueError: If the record has no known form or an unclear label.
        """
        form, label = self.form(record)
        if form == ("query", "docs"):
            right = [self.is_positive(value, label) for value in record[label]]
            texts = list(zip(record["docs"], right, strict=True))
            pairs = [(record["query"], text) for text, is_right in texts if is_right]
            return pairs, [text for text, is_right in texts if not is_right], None if pairs else EMPTY
        pairs, negatives = self._texts(record, form)
        if label is not None and not self.is_positive(record[label], label):
            return [], negatives, LABELLED
        return pairs, negatives, None if pairs else EMPTY

    def _texts(self, record: Any, form: tuple[str, ...]) -> tuple[list[tuple[str, str]], list[str]]:
        if form == self.columns:
            return [(record[form[0]], record[form[1]])], [record[name] for name in form[2:]]
        if form in (("list",), ("texts",)):
            texts = record["texts"] if form == ("texts",) else record
            if len(texts) < 2:
                raise ValueError(f"expected an anchor and a positive, got a list of {len(texts)}")
            return [(texts[0], texts[1])], list(texts[2:])
        if form == ("set",):
            # All pairs share the first text, so that no text of the set becomes a negative of another.
            if len(record["set"]) < 2:
                raise ValueError(f"expected a set of at least 2 texts, got {len(record['set'])}")
            return [(record["set"][0], other) for other in record["set"][1:]], []
        if form == ("questions", "is_duplicate"):
            questions = record["questions"]
            texts = questions["text"] if isinstance(questions, dict) else questions
            return [(texts[0], texts[1])], []
        if form == ("query", "pos"):
            return [(record["query"], positive) for positive in _listed(record["pos"])], _listed(record.get("neg"))
        return [(record[form[0]], record[form[1]])], _negatives(record)


def _listed(texts: Any) -> list[Any]:
    if texts is None:
        return []
    return [texts] if isinstance(texts, str) else list(texts)


def _negatives(record: Mapping[str, Any]) -> list[Any]:
    """The hard negatives of a record in the order of their numbers. A column may hold a list of them."""
    found = [(int(match[1] or 0), name) for name in record if (match := _NEGATIVES.fullmatch(name))]
    return [text for _, name in sorted(found) for text in _listed(record[name])]
