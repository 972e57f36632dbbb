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
"""Reads the docstrings of installed packages: real text that needs no download, with one document for each module"""

import ast
import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm.auto import tqdm


def read_docstrings(packages: Sequence[str], show_progress: bool = True) -> Iterator[dict[str, str]]:
    """
    Reads the docstrings of packages from their source files. Nothing is imported or executed.

    Args:
        packages (`Sequence[str]`):
            Names of installed packages, such as `"transformers"`.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar over the files of each package.

    Yields:
        `dict[str, str]`: `"text"` and `"id"`. The text holds the docstrings of one module in the order of the source
        (that of the module first, then those of its classes and functions), with empty lines in between. The id is the
        dotted name of the module. Modules come in the order of their paths. Modules without docstrings, and those
        whose text equals that of an earlier module, are left out.

    Raises:
        `ValueError`: if a package is not installed as source files.
    """
    seen = set()
    for package in packages:
        root = _package_directory(package)
        paths = sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts)
        for path in tqdm(paths, desc=f"Docstrings of {package}", unit="file", disable=not show_progress):
            text = _module_docstrings(path)
            if text and text not in seen:
                seen.add(text)
                parts = (package, *path.relative_to(root).with_suffix("").parts)
                yield {"text": text, "id": ".".join(parts).removesuffix(".__init__")}


def is_held_out(document_id: str) -> bool:
    """
    Whether a document is held out of training. A hash of its id decides, so that the same documents (one in 32) are
    held out of every version of a corpus.

    Args:
        document_id (`str`):
            Name of the document, which must stay the same when its text changes, such as the dotted name of a module.

    Returns:
        `bool`
    """
    return int.from_bytes(hashlib.sha256(document_id.encode()).digest()[:8], "big") % 32 == 0


def _package_directory(package: str) -> Path:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"no package named {package!r} is installed; name an installed package, such as transformers")
    return Path(spec.submodule_search_locations[0])


def _module_docstrings(path: Path) -> str:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and test data also have the suffix .py
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: 0 if isinstance(node, ast.Module) else node.lineno)
    docstrings = (ast.get_docstring(node) for node in nodes)
    # A lone surrogate, which a source can hold as an escape, cannot be encoded in UTF-8.
    return "\n\n".join(filter(None, docstrings)).encode("utf-8", errors="replace").decode("utf-8")
