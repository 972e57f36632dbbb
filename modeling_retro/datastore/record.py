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
Records: dataclasses that read and write JSON objects

Each field has a rule. [`Record.from_dict`] refuses a missing or impossible field by its name, and keeps unknown ones.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from types import UnionType
from typing import Any, Self, get_args, get_origin

from huggingface_hub.dataclasses import validated_field


PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHA256 = re.compile("[0-9a-f]{64}")

# A rule returns None for a right value, or else which part of it is wrong ("" for all) and how.
Rule = Callable[[Any], tuple[str, str] | None]


def rule_of(is_right: Callable[[Any], bool], expected: str) -> Rule:
    return lambda value: None if is_right(value) else ("", f"is {value!r:.80}, expected {expected}")


def number_from(lowest: int) -> Rule:
    def is_right(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= lowest

    return rule_of(is_right, f"a whole number from {lowest}")


def matching(pattern: re.Pattern[str], expected: str) -> Rule:
    return rule_of(lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None, expected)


def one_of(*values: str) -> Rule:
    return rule_of(lambda value: isinstance(value, str) and value in values, " or ".join(values))


def or_null(rule: Rule) -> Rule:
    return lambda value: None if value is None else rule(value)


def mapping(keys: Rule, values: Rule) -> Rule:
    def rule(value: Any) -> tuple[str, str] | None:
        if problem := FIELDS(value):
            return problem
        for key, element in value.items():
            if problem := keys(key):
                return "", problem[1].replace("is ", "has ", 1)
            if problem := values(element):
                return f".{key}", problem[1]
        return None

    return rule


COUNT, SIZE = number_from(0), number_from(1)
TEXT = rule_of(lambda value: isinstance(value, str), "text")
BOOL = rule_of(lambda value: isinstance(value, bool), "true or false")
FIELDS = rule_of(lambda value: isinstance(value, dict), "fields")
NAME = matching(PLAIN_NAME, "a name without a path")
DIGEST = matching(_SHA256, "a sha256 of 64 hexadecimal digits")
COUNTS = mapping(TEXT, COUNT)


def checked(rule: Rule, default: Any = MISSING, key: str | None = None, **kwargs) -> Any:
    """A field of a record with its rule, and the key that it has in the file if this is not its name."""

    def validate(value: Any) -> None:
        is_absent = value is None and default is None
        if not is_absent and (problem := rule(value)):
            raise ValueError(" ".join(problem).strip())

    return validated_field(validate, default=default, metadata={"rule": rule, "key": key}, **kwargs)


@dataclass
class Record:
    """
    A part of the manifest. Its subclasses check every assignment to an attribute.

    Args:
        given (`dict`, *optional*):
            What the file holds besides the attributes: keys that this code does not know, and attributes that it
            names although they have their default. They are written again.
    """

    given: dict[str, Any] = field(default_factory=dict, kw_only=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], name: str = "") -> Self:
        """
        Makes a record of the JSON that [`Record.to_dict`] returned.

        Args:
            values (`Mapping`): The JSON.
            name (`str`, *optional*): Name of the record in errors.

        Raises:
            ValueError: If a field is missing or has an impossible value. The message names the field.
        """
        if problem := FIELDS(values):
            raise ValueError(f"{name} {problem[1]}")
        known, given = {}, dict(values)
        for attribute in _attributes(cls):
            key, default = _key(attribute), _default(attribute)
            field_name = f"{name}.{key}" if name else key
            if key not in values:
                if default is MISSING:
                    raise ValueError(f"{field_name} is missing")
                continue
            if (rule := attribute.metadata.get("rule")) and (problem := rule(values[key])):
                raise ValueError(f"{field_name}{problem[0]} {problem[1]}")
            known[attribute.name] = _read(attribute.type, values[key], field_name)
            if known[attribute.name] != default:
                del given[key]
        return cls(**known, given=given)

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON. Attributes that have their default are left out, unless the file had them."""
        values = {}
        for attribute in _attributes(type(self)):
            value, default = getattr(self, attribute.name), _default(attribute)
            if value != default:
                values[_key(attribute)] = _plain(value)
        return self.given | values


@cache
def _attributes(record: type[Record]) -> list[Field]:
    return [attribute for attribute in fields(record) if attribute.name != "given"]


def _key(attribute: Field) -> str:
    return attribute.metadata.get("key") or attribute.name


def _default(attribute: Field) -> Any:
    return attribute.default_factory() if attribute.default_factory is not MISSING else attribute.default


def _read(kind: Any, value: Any, name: str) -> Any:
    """Turns JSON into what the type of an attribute says: a record, records in a list or by name, or plain JSON."""
    if get_origin(kind) is UnionType:
        kind = get_args(kind)[0]
    element = (get_args(kind) or (kind,))[-1]
    if not (isinstance(element, type) and issubclass(element, Record)):
        return value
    if get_origin(kind) is list:
        if not isinstance(value, list):
            raise ValueError(f"{name} is {value!r:.80}, expected a list")
        return [element.from_dict(entry, f"{name}[{number}]") for number, entry in enumerate(value)]
    if get_origin(kind) is dict:
        if problem := mapping(NAME, FIELDS)(value):
            raise ValueError(f"{name}{problem[0]} {problem[1]}")
        return {key: element.from_dict(entry, f"{name}.{key}") for key, entry in value.items()}
    return element.from_dict(value, name)


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, list):
        return [_plain(element) for element in value]
    return {key: _plain(element) for key, element in value.items()} if isinstance(value, dict) else value
