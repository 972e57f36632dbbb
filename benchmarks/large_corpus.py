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
About 100 million tokens of real, freely licensed text without a hub: documentation of Debian 12 packages, a
dictionary, descriptions of packages, and the Python sources of installed packages for what is missing. No document
comes twice.

```bash
apt-get download rust-doc openjdk-17-doc linux-doc-6.1 perl-doc python3.11-doc sqlite3-doc apache2-doc dict-gcide \\
    erlang-doc ghc-doc libboost1.74-doc racket-doc postgresql-doc-15 cmake-doc git-doc nodejs-doc libgtk-4-doc \\
    llvm-14-doc vim-doc
for file in *.deb; do dpkg-deb --extract $file debian; done
/usr/lib/apt/apt-helper cat-file /var/lib/apt/lists/*_bookworm_main_i18n_Translation-en* > debian/Translation-en
pip install lxml
python benchmarks/large_corpus.py --debian debian --output_file large.jsonl
```

The sources of Python come last, in an order drawn by the hash of their names, until the file holds `--num_bytes` of
text. Documents with equal text, those that are shorter than 200 characters, indexes, translations, and listings of
source code in the documentation are left out. So are the paragraphs with which many pages of a package begin or end.
`large.jsonl.counts.json` says how many documents and bytes there are of each kind.

48 documents of each of four kinds are held out, drawn by the hash of their names: entries of the dictionary,
descriptions, pages of documentation and sources of Python. `large.held_out.jsonl` holds them as they are, for `retro
deduplicate`. `large.measured.jsonl` holds a passage from the middle of each, so that no measurement is of headers and
licences. `large.measured.kinds.txt` names the kind of each passage, for `retro evaluate --domains`.
"""

import argparse
import gzip
import json
import os
import re
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import groupby
from multiprocessing import Pool
from pathlib import Path

import lxml.html
import xxhash
from corpus import BLOCKS, PARAGRAPHS, SHORTEST, WITHOUT_TEXT, one_empty_line, pod_text, without_buttons
from reader_corpus import descriptions, digest


LONGEST = 400_000  # bytes of a file: longer ones are tables and generated data
SKIPPED = re.compile(
    r"^linux-doc|^apache2-doc/manual/(?!en/)|(^|/)(src|implementors|_sources|class-use|index-files|src-html|_modules|htmlman)/"
    r"|(^|/)(print|toc|all|search|settings|genindex\w*|py-modindex|contents|overview-tree|package-tree|package-use"
    r"|doc-index[^/]*|keyword_index|doclist|sitemap|all(classes|packages)-index|deprecated-list|constant-values)\.html?$"
    r"|\.html\.(?!gz)"
)
FRAME = 20  # pages of a package that begin or end with the same paragraph, which is then cut
HELD_OUT = {"gcide": "dictionary", "description": "descriptions", "pages": "documentation", "python sources": "python"}
NUM_HELD_OUT, SHORTEST_HELD_OUT, PASSAGE = 48, 800, 1300  # of each kind; characters
MAIN = '//main | //*[@role="main"] | //section[@id="main-content"] | //div[@id="page-content"]'
CUT = ["sidebar", "srclink", "src-link", "out-of-band", "headerlink", "nav", "menu", "toc", "search", "buttons"]
_CUT = " or ".join(f'contains(@class, "{word}") or contains(@id, "{word}")' for word in CUT)
_CUT = " | ".join([f".//*[{_CUT}]", *(f".//{tag}" for tag in sorted(WITHOUT_TEXT))])
_PARAGRAPHS = " | ".join(f".//{tag}" for tag in sorted(PARAGRAPHS))
_LINES = " | ".join(f".//{tag}" for tag in sorted(BLOCKS - PARAGRAPHS - {"td", "th"}))


def page_text(path: Path) -> str:
    """The text of a page in HTML, without what leads elsewhere."""
    content = read_bytes(path).decode("utf-8", errors="replace").encode()
    if not content.strip():
        return ""
    page = lxml.html.document_fromstring(content, parser=lxml.html.HTMLParser(encoding="utf-8"))
    if page.xpath('//meta[@http-equiv="refresh"]'):
        return ""
    found = page.xpath(MAIN) or page.xpath("//body")
    if not found:
        return ""
    for element in found[0].xpath(_CUT):
        if element.getparent() is not None:
            element.drop_tree()
    for blocks, ends in ((_PARAGRAPHS, "\n\n"), (_LINES, "\n"), (".//td | .//th", " ")):
        for element in found[0].xpath(blocks):
            element.text = ends + (element.text or "")
            element.tail = ends + (element.tail or "")
    text = lxml.etree.tostring(found[0], method="text", encoding="unicode", with_tail=False)
    text = re.sub("[§¶\u200b\r]", "", text)
    return without_buttons(re.sub(r"[ \t]+\n", "\n", text))


def without_frame(pages: list[str]) -> list[str]:
    """Pages of a package without the paragraphs with which many of them begin or end: menus, notes on copyright."""
    parts = [re.split(r"\n\s*\n", page) for page in pages]
    for end in (0, -1):
        for _ in range(8):
            forms = [re.sub(r"\d+", "", " ".join(part[end].split())) for part in parts]
            counts = Counter(forms)
            for part, form in zip(parts, forms, strict=True):
                if len(part) > 1 and counts[form] >= FRAME:
                    part.pop(end)
    return ["\n\n".join(part).strip() for part in parts]


def read_bytes(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data


def file_text(task: tuple[str, Path]) -> str:
    """The text of a file of a kind, empty if it has none."""
    kind, path = task
    sys.setrecursionlimit(20_000)  # pages are nested deeply
    if path.is_symlink() or (kind == "python sources" and path.stat().st_size > LONGEST):
        return ""
    try:
        if kind == "pages":
            return page_text(path)
        text = read_bytes(path).decode("utf-8")
    except (UnicodeDecodeError, ValueError, lxml.etree.ParserError, OSError):
        return ""
    return pod_text(text) if kind == "perl" else one_empty_line(text)


def list_files(debian: Path) -> Iterator[tuple[str, str, Path]]:
    """
    Kind, name and path of the files of the packages, and of the sources of this Python's packages. The documentation
    of Linux is read from its own markup, not from the pages that are made of it.
    """
    documentation = debian / "usr/share/doc"
    for path in sorted(documentation.rglob("*.htm*")):
        name = str(path.relative_to(documentation))
        if path.suffix in (".html", ".htm", ".gz") and not SKIPPED.search(name):
            yield "pages", name, path
    for path in sorted(documentation.rglob("*.rst.gz")):
        yield "linux", str(path.relative_to(documentation)), path
    for path in sorted([*(debian / "usr/share/perl").rglob("*.pod"), *(debian / "usr/share/perl").rglob("*.pm")]):
        yield "perl", str(path.relative_to(debian)), path
    packages = Path(sysconfig.get_paths()["purelib"])
    for path in sorted(packages.rglob("*.py"), key=lambda path: digest("source", str(path.relative_to(packages)))):
        yield "python sources", str(path.relative_to(packages)), path


def read_files(debian: Path) -> Iterator[tuple[str, str]]:
    """Yields name and text of all files."""
    listed = list(list_files(debian))
    with Pool() as pool:
        texts = pool.imap(file_text, [(kind, path) for kind, _, path in listed], chunksize=32)
        named = ((f"{kind}/{name}", text) for (kind, name, _), text in zip(listed, texts, strict=True))
        for package, group in groupby(named, key=lambda document: package_of(document[0])):
            if package in ("linux", "perl", "python sources"):
                yield from group
            else:
                names, pages = zip(*group, strict=True)
                yield from zip(names, without_frame(pages), strict=True)


def package_of(name: str) -> str:
    """The package of a page, and the kind of other documents."""
    kind, _, rest = name.partition("/")
    return rest.partition("/")[0] if kind == "pages" else kind


def dictionary(debian: Path) -> Iterator[tuple[str, str]]:
    """Yields name and text of parts of a dictionary of about 4,000 characters each."""
    text = gzip.decompress((debian / "usr/share/dictd/gcide.dict.dz").read_bytes()).decode("utf-8", "replace")
    part: list[str] = []
    size = number = 0
    for entry in re.split(r"\n(?=\S)", text):
        part.append(entry)
        size += len(entry)
        if size > 4000:
            yield f"gcide/{number}", one_empty_line("\n".join(part))
            part, size, number = [], 0, number + 1
    yield f"gcide/{number}", one_empty_line("\n".join(part))


class HeldOut:
    """The documents of each kind whose names have the smallest hashes, among those that are long enough."""

    def __init__(self):
        self.documents: dict[str, dict[bytes, tuple[str, str]]] = {kind: {} for kind in HELD_OUT.values()}

    def exchange(self, name: str, text: str) -> tuple[str, str] | None:
        """Takes a document, and returns one that is not held out: this one, or one that it displaces, if any."""
        kind = HELD_OUT.get(name.split("/")[0])
        if kind is None or len(text) < SHORTEST_HELD_OUT:
            return name, text
        chosen = self.documents[kind]
        chosen[digest("held out", name)] = name, text
        return chosen.pop(max(chosen)) if len(chosen) > NUM_HELD_OUT else None

    def write(self, output_file: Path) -> None:
        kinds = []
        whole, measured = (output_file.with_suffix(f".{name}.jsonl") for name in ("held_out", "measured"))
        with whole.open("w", encoding="utf-8") as documents, measured.open("w", encoding="utf-8") as passages:
            for kind, chosen in self.documents.items():
                for _, (name, text) in sorted(chosen.items()):
                    documents.write(json.dumps({"text": text, "id": name}, ensure_ascii=False) + "\n")
                    passages.write(json.dumps({"text": passage(text), "id": name}, ensure_ascii=False) + "\n")
                    kinds.append(kind)
        output_file.with_suffix(".measured.kinds.txt").write_text("\n".join(kinds) + "\n", encoding="utf-8")


def passage(text: str) -> str:
    """A passage that begins with a line after a third of the text, or with the text itself if it is short."""
    start = text.find("\n", len(text) // 3) + 1 if len(text) > 2 * PASSAGE else 0
    return text[start : start + PASSAGE].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debian", type=Path, required=True, help="Folder that the Debian packages were unpacked to.")
    parser.add_argument("--output_file", type=Path, required=True)
    parser.add_argument("--num_bytes", type=int, default=400_000_000, help="Bytes of text.")
    arguments = parser.parse_args()
    counts: dict[str, dict[str, int]] = defaultdict(lambda: {"documents": 0, "bytes": 0})
    seen: set[int] = set()
    size = 0
    held_out = HeldOut()
    partial = arguments.output_file.with_name(arguments.output_file.name + ".partial")

    def documents() -> Iterator[tuple[str, str]]:
        yield from dictionary(arguments.debian)
        yield from ((name, text.strip()) for name, text in descriptions(arguments.debian))
        yield from read_files(arguments.debian)

    with partial.open("w", encoding="utf-8") as file:
        for name, text in documents():
            text = text.encode("utf-8", "replace").decode()
            if len(text) < SHORTEST:
                continue
            identity = xxhash.xxh3_64_intdigest(text.encode())
            if identity in seen:
                continue
            seen.add(identity)
            kept = held_out.exchange(name, text)
            if kept is None:
                continue
            name, text = kept
            file.write(json.dumps({"text": text, "id": name}, ensure_ascii=False) + "\n")
            num_bytes = len(text.encode())
            count = counts[package_of(name)]
            count["documents"] += 1
            count["bytes"] += num_bytes
            size += num_bytes
            if size >= arguments.num_bytes:
                break
    os.replace(partial, arguments.output_file)
    held_out.write(arguments.output_file)
    ordered = dict(sorted(counts.items(), key=lambda item: -item[1]["bytes"]))
    Path(f"{arguments.output_file}.counts.json").write_text(json.dumps(ordered, indent=2) + "\n")
    for kind, count in ordered.items():
        print(f"{kind:<28}{count['documents']:8d} documents {count['bytes'] / 1e6:8.1f} MB")
    print(f"{'all':<28}{sum(count['documents'] for count in counts.values()):8d} documents {size / 1e6:8.1f} MB")


if __name__ == "__main__":
    main()
