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
Real, freely licensed text without a hub: docstrings of Python packages and HTML documentation of Debian 12 packages,
as the documents that `retro-tiny` was trained on and searches. Needs `pip install lxml`, which nothing else does.

```bash
apt-get download rust-doc python3.11-doc perl-doc sqlite3-doc apache2-doc
for file in *.deb; do dpkg-deb --extract $file debian; done
python benchmarks/corpus.py --debian debian --output_dir corpus
retro prepare --recipe retro_tiny --output-dir datastore
```

| domain     | package, version                  | licence              | documents | MB   |
|------------|-----------------------------------|----------------------|-----------|------|
| docstrings | transformers 5.23.0               | Apache-2.0           |           |      |
|            | torch 2.13.0, numpy 2.4.6,        | BSD-3-Clause         |           |      |
|            | pandas 3.1.1, scipy 1.17.1,       | BSD-3-Clause         |           |      |
|            | scikit-learn 1.9.1, sympy 1.14.0  | BSD-3-Clause         |           |      |
|            | datasets 5.2.0                    | Apache-2.0           | 5,416     | 32.6 |
| rust       | rust-doc 1.63.0+dfsg1-2           | MIT or Apache-2.0    | 19,413    | 25.7 |
| python     | python3.11-doc 3.11.2-6+deb12u9   | PSF-2.0              | 494       | 9.4  |
| perl       | perl-doc 5.36.0-7+deb12u4         | Artistic or GPL-1+   | 205       | 7.9  |
| sqlite     | sqlite3-doc 3.40.1-2+deb12u2      | public domain        | 708       | 6.7  |
| apache     | apache2-doc 2.4.71-1~deb12u1      | Apache-2.0           | 241       | 2.5  |

`train.jsonl` holds docstrings and rust, `validation.jsonl` one document in 32 of every domain (`is_held_out`), so four
domains are held out altogether. Half of the pages on processor intrinsics of rust, which hardly differ, are left out.
`validation.domains.txt` names the domain of each held-out document, and `tokenizer/` is a byte-level BPE of 8,192
tokens trained on docstrings and rust (not on what is held out). Other versions of the packages give other documents.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from multiprocessing import Pool
from pathlib import Path

import lxml.html
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data_prep.docstrings import is_held_out, read_docstrings


PACKAGES = ["transformers", "torch", "numpy", "pandas", "scipy", "sklearn", "sympy", "datasets"]
SEARCHED = ["docstrings", "rust"]
SHORTEST = 200  # characters of a page

# Domain: folder, pattern of files, element of the text, elements to cut out of it, paths without text of their own.
PAGES = {
    "python": (
        "usr/share/doc/python3.11/html",
        "*.html",
        '//div[@role="main"]',
        ["headerlink", "related", "sphinxsidebar"],
        r"^(genindex|search|_|py-modindex|contents)",
    ),
    "sqlite": (
        "usr/share/doc/sqlite3",
        "*.html",
        "//body",
        ["menu", "nosearch", "searchmenu", "toc_"],
        r"(^|/)(doclist|keyword_index|sitemap)\.html$",
    ),
    "apache": (
        "usr/share/doc/apache2-doc/manual/en",
        "*.html*",
        '//div[@id="page-content"] | //body[not(.//div[@id="page-content"])]',
        ["quickview", "preamble_menu", "toplang", "bottomlang", "permalink", "top", "comments_section", "menu"],
        r"^$",
    ),
    "rust": (
        "usr/share/doc/rust-doc/html",
        "*.html",
        '//section[@id="main-content"] | //main[not(//section[@id="main-content"])]',
        ["sidebar", "srclink", "src-link", "out-of-band", "search", "nav-", "buttons"],
        r"^(src|implementors)/|(^|/)(print|toc|all|search|settings|help)\.html$",
    ),
}
PARAGRAPHS = {"p", "h1", "h2", "h3", "h4", "pre", "table", "section", "dl", "ul"}
BLOCKS = PARAGRAPHS | {"div", "h5", "h6", "li", "ol", "tr", "dt", "dd", "blockquote", "details", "summary", "article"}
BLOCKS |= {"header", "main", "figure", "br", "hr", "td", "th"}
WITHOUT_TEXT = {"script", "style", "nav", "form", "noscript", "head", "svg", "button", "footer", "iframe", "object"}
WITHOUT_TEXT |= {"select", "input"}


def element_text(element: lxml.html.HtmlElement, inside_pre: bool = False) -> Iterator[str]:
    """Yields the text of an element: blocks on lines of their own, white space as it is in `pre` only."""

    def spaced(text: str | None) -> str:
        return text or "" if inside_pre else re.sub(r"\s+", " ", text or "")

    tag = element.tag
    if not isinstance(tag, str) or tag in WITHOUT_TEXT:
        return
    inside_pre = inside_pre or tag == "pre"
    if tag in BLOCKS:
        yield "\n\n" if tag in PARAGRAPHS else "\n"
    if tag == "li":
        yield "- "
    yield spaced(element.text)
    for child in element:
        yield from element_text(child, inside_pre)
        yield spaced(child.tail)
    if tag in BLOCKS:
        yield " " if tag in ("td", "th") else "\n"


def page_text(task: tuple[str, Path, str]) -> tuple[str, str] | None:
    """Id and text of a page; `None` for one that only leads elsewhere."""
    domain, path, name = task
    _, _, main, cut, _ = PAGES[domain]
    sys.setrecursionlimit(20_000)  # pages are nested deeply
    content = path.read_bytes().decode("utf-8", errors="replace").encode()
    page = lxml.html.document_fromstring(content, parser=lxml.html.HTMLParser(encoding="utf-8"))
    found = page.xpath(main)
    if not found or page.xpath('//meta[@http-equiv="refresh"]'):
        return None
    conditions = " or ".join(f'contains(@class, "{word}") or @id="{word}"' for word in cut)
    for element in found[0].xpath(f".//*[{conditions}]"):
        if element.getparent() is not None:
            element.drop_tree()
    text = re.sub("[§¶\u200b]", "", "".join(element_text(found[0])))
    text = re.sub(r"[ \t]+\n", "\n", text)
    return name, one_empty_line(text)


def one_empty_line(text: str) -> str:
    """The text with one empty line at most between lines."""
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def without_buttons(text: str) -> str:
    """The text of a page on Rust without the words on its buttons."""
    words = r"Run|ⓘ|Expand description|\[src\]|\[\+\]|\[−\]"
    return one_empty_line(re.sub(rf"(?m)^({words})[ \t]*\n", "", text + "\n"))


def read_pages(domain: str, debian: Path) -> Iterator[tuple[str, str]]:
    """Yields id and text of the pages of a Debian package, in the order of their paths."""
    folder, pattern, _, _, skipped = PAGES[domain]
    root = debian / folder
    names = {path: str(path.relative_to(root)) for path in sorted(root.rglob(pattern))}
    tasks = [(domain, path, f"{domain}/{name}") for path, name in names.items() if not re.search(skipped, name)]
    with Pool() as pool:
        yield from filter(None, pool.imap(page_text, tasks, chunksize=32))


def read_perl(debian: Path) -> Iterator[tuple[str, str]]:
    """Yields id and text of the pages of perl-doc, which are in Perl's own markup."""
    root = debian / "usr/share/perl"
    for path in sorted([*root.rglob("*.pod"), *root.rglob("*.pm")]):
        yield f"perl/{path.relative_to(root)}", pod_text(path.read_bytes().decode("utf-8", errors="replace"))


def pod_text(pod: str) -> str:
    """The text of a page in Perl's markup."""
    paragraphs, inside = [], False
    for paragraph in re.split(r"\n\s*\n", pod):
        if paragraph.startswith("="):
            command, _, rest = paragraph.partition(" ")
            command = command.split("\n")[0]
            inside = command != "=cut"
            if re.match("=(begin|for|over|back|pod|cut|encoding|end)", command):
                continue
            paragraph = ("- " if command == "=item" else "") + rest.strip()
        elif not inside:
            continue
        if not paragraph.startswith((" ", "\t")):  # what is indented is code
            for _ in range(4):  # marks are nested
                paragraph = re.sub(r"[BCFISZ]<<+ (.*?) >+>", r"\1", paragraph, flags=re.DOTALL)
                paragraph = re.sub(r"[BCFISZ]<([^<>]*)>", r"\1", paragraph)
                paragraph = re.sub(r"L<([^<>|]*)\|[^<>]*>", r"\1", paragraph)
                paragraph = re.sub(r"X<[^<>]*>", "", re.sub(r"L<([^<>]*)>", r"\1", paragraph))
                for name, character in (("lt", "<"), ("gt", ">"), ("sol", "/"), ("verbar", "|")):
                    paragraph = paragraph.replace(f"E<{name}>", character)
        if paragraph.strip():
            paragraphs.append(paragraph.rstrip())
    return "\n\n".join(paragraphs)


def read_domain(domain: str, debian: Path) -> Iterator[tuple[str, str]]:
    """Yields id and text of the documents of a domain."""
    if domain == "docstrings":
        for document in read_docstrings(PACKAGES):
            # transformers generates its modeling files from modular files: the same text twice.
            if not any(part.startswith("modular_") for part in document["id"].split(".")):
                yield document["id"], document["text"]
    elif domain == "perl":
        yield from read_perl(debian)
    else:
        yield from read_pages(domain, debian)


def is_left_out(name: str) -> bool:
    """Whether a page is in the half of the pages on processor intrinsics that is left out."""
    return "/arch/" in name and hashlib.sha256(b"cap" + name.encode()).digest()[0] >= 128


def train_tokenizer(texts: list[str], folder: Path) -> None:
    """Trains a byte-level BPE of 8,192 tokens, digits one by one."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=8192, special_tokens=[end], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=end, model_max_length=1 << 20
    ).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debian", type=Path, required=True, help="Folder that the Debian packages were unpacked to.")
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args()
    output = arguments.output_dir
    output.mkdir(parents=True, exist_ok=True)
    texts = []
    with (
        (output / "train.jsonl").open("w", encoding="utf-8") as train,
        (output / "validation.jsonl").open("w", encoding="utf-8") as validation,
        (output / "validation.domains.txt").open("w", encoding="utf-8") as domains,
    ):
        for domain in (*SEARCHED, "python", "perl", "sqlite", "apache"):
            seen, size = set(), 0
            for name, text in read_domain(domain, arguments.debian):
                if len(text) < SHORTEST or text in seen:
                    continue
                seen.add(text)
                text = without_buttons(text) if domain == "rust" else text
                size += len(text.encode())
                line = json.dumps({"text": text, "id": name, "domain": domain}, ensure_ascii=False) + "\n"
                if is_held_out(name):
                    validation.write(line)
                    domains.write(domain + "\n")
                elif domain in SEARCHED:
                    texts.append(text)
                    if not is_left_out(name):
                        train.write(line)
            print(f"{domain}: {len(seen)} documents, {size / 1e6:.1f} MB", flush=True)
    train_tokenizer(texts, output / "tokenizer")


if __name__ == "__main__":
    main()
