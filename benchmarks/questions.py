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
Measures how each way to search finds the documents that answer questions, on three sets that are made here.

    apt-get download perl-doc python3.11-doc sqlite3-doc && for file in *.deb; do dpkg-deb -x $file root; done
    python benchmarks/questions.py --root root --encoder all-MiniLM-L6-v2 --tokenizer SmolLM2-135M --output-dir sets

- faq: the questions of the FAQs of Perl and Python; the documents are their answers, and sections of Perl's manual.
- docstrings: the first sentence of the docstring of a function is the question, and the rest is the document.
- pages: the headings of the documentation of SQLite are the questions, and the pages without them are the documents.
"""

import argparse
import ast
import html
import json
import random
import re
from collections import Counter
from pathlib import Path

import scipy
import sklearn

from data_prep import build_bm25_index, build_index, chunk_documents, embed_chunks
from modeling_retro import ChunkEncoder, RetroDatastore
from trainers.retriever.evaluation import RetrievalSet
from trainers.retriever.questions import WHOLE, QuestionEvaluation, evaluate_questions


def plain(pod: str) -> str:
    """The text of a section of Perl's documentation without its markup."""
    text = re.sub(r"X<[^>]*>", "", pod)
    text = re.sub(r"[A-Z]<+ ?(?:[^<>|]*\|)?([^<>]*?) ?>+", r"\1", text)
    return re.sub(r"^=.*$", "", text, flags=re.MULTILINE).strip()


def faq(root: Path, generator: random.Random) -> tuple[dict[str, str], dict[str, str]]:
    """Questions and their answers by the same keys. Documents without a question are sections of Perl's manual."""
    questions, documents, others = {}, {}, []
    for path in sorted(next(root.glob("usr/share/perl/*/pod")).glob("*.pod")):
        pod = path.read_text(encoding="utf-8", errors="replace")
        for section in re.split(r"^(?==head[12] )", pod, flags=re.MULTILINE)[1:]:
            heading, _, body = section.partition("\n")
            heading, body = plain(heading.split(" ", 1)[1]), plain(body)
            if path.name.startswith("perlfaq") and heading.endswith("?") and len(body) >= 100:
                key = f"{path.stem}-{len(questions)}"
                questions[key], documents[key] = heading, body
            elif not path.name.startswith("perlfaq") and 100 <= len(body) < 6000:
                others.append(body)
    pattern = re.compile(r"^([^=\s][^\n]*\?)\n-{4,}\n(.*?)(?=^\S[^\n]*\n[-=]{4,}\n|\Z)", re.MULTILINE | re.DOTALL)
    for path in sorted(root.glob("usr/share/doc/python3.11/html/_sources/faq/*.rst.txt")):
        for heading, body in pattern.findall(path.read_text(encoding="utf-8")):
            if len(body.strip()) >= 100:
                key = f"{path.name}-{len(questions)}"
                questions[key], documents[key] = heading, re.sub(r":[\w:]+:`([^`]*)`", r"\1", body.strip())
    others = generator.sample(list(dict.fromkeys(others)), 400)
    return questions, documents | {f"other-{number}": body for number, body in enumerate(others)}


def docstrings(root: Path, generator: random.Random) -> tuple[dict[str, str], dict[str, str]]:
    """Functions and classes of SciPy and scikit-learn."""
    questions, documents = {}, {}
    for package in (scipy, sklearn):
        folder = Path(package.__file__).parent
        for path in sorted(folder.rglob("*.py")):
            if "test" in str(path.relative_to(folder)):
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                text = ast.get_docstring(node) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else None
                first, _, rest = (text or "").partition("\n\n")
                if 20 < len(first) < 200 and 200 < len(rest) < 4000:
                    key = f"{path.stem}.{node.name}"
                    questions[key], documents[key] = " ".join(first.split()), rest
    keys = generator.sample(asked_once(questions), 600)
    return {key: questions[key] for key in keys[:400]}, {key: documents[key] for key in keys}


def pages(root: Path, generator: random.Random) -> tuple[dict[str, str], dict[str, str]]:
    """120 pages of at most about 80 chunks; the key of a question is the page and a number."""
    questions, documents = {}, {}
    for path in sorted(root.glob("usr/share/doc/sqlite3/*.html")):
        body = path.read_text(encoding="utf-8", errors="replace").rpartition("</form>")[2]
        headings = re.findall(r"<h[1-4][^>]*>(.*?)</h", body, re.DOTALL)
        # The table of contents repeats the headings.
        body = re.sub(r'<div class="fancy[-_]toc\d?".*?</div>', " ", body, flags=re.DOTALL)
        body = re.sub(r"<(script|style|h[1-6])[^>]*>.*?</\1>", " ", body, flags=re.DOTALL)
        body = re.sub(r"\n\s*\n+", "\n", html.unescape(re.sub(r"<[^>]+>", " ", body))).strip()
        if 1000 < len(body) < 20_000:
            documents[path.stem] = body
            for number, heading in enumerate(headings):
                heading = re.sub(r"^[\d. ]+", "", " ".join(re.sub(r"<[^>]*>", " ", html.unescape(heading)).split()))
                if len(heading.split()) >= 3:
                    questions[f"{path.stem}#{number}"] = heading
    documents = {key: documents[key] for key in generator.sample(list(documents), 120)}
    keys = [key for key in asked_once(questions) if key.split("#")[0] in documents]
    return {key: questions[key] for key in generator.sample(keys, min(400, len(keys)))}, documents


def asked_once(questions: dict[str, str]) -> list[str]:
    """The keys of the questions that only one document answers."""
    counts = Counter(questions.values())
    return [key for key, question in questions.items() if counts[question] == 1]


def write_set(folder: Path, questions: dict[str, str], documents: dict[str, str]) -> None:
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, prefix, texts in (("corpus", "", documents), ("queries", "q-", questions)):
        lines = (json.dumps({"_id": prefix + key, "text": text}) + "\n" for key, text in texts.items())
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    rows = "".join(f"q-{key}\t{key.split('#')[0]}\t1\n" for key in questions)
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows, encoding="utf-8")


def measure(folder: Path, encoder: ChunkEncoder, tokenizer: str, sizes: list[int]) -> QuestionEvaluation:
    """The ways with chunks of each size, and whole documents, compared with `dense` of the first size."""
    questions = RetrievalSet.from_beir(folder)
    metrics = {}
    for size in sizes:
        path = folder / f"chunks-{size}"
        chunk_documents(folder / "corpus.jsonl", path, tokenizer, chunk_size=size, id_column="_id")
        embed_chunks(path, encoder)
        build_index(path)
        for terms in ("tokens", "words"):
            build_bm25_index(path, terms, force=True)
            datastore = RetroDatastore.from_pretrained(path)
            ways = ["dense", "rerank", "bm25", "hybrid"] if terms == "tokens" else ["bm25", "hybrid"]
            whole = encoder if size == sizes[0] and terms == "tokens" else None
            found = evaluate_questions(datastore, questions, ways, whole=whole).metrics
            for way, values in found.items():
                suffix = f" of {terms}" if way in ("bm25", "hybrid") else ""
                metrics[way if way == WHOLE else f"{way}{suffix}, {size}"] = values
    return QuestionEvaluation(metrics)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="Where the packages of apt were unpacked.")
    parser.add_argument("--encoder", required=True, help="Folder or Hub id of the encoder.")
    parser.add_argument("--dtype", default="float32", help="Type in which the encoder computes.")
    parser.add_argument("--tokenizer", required=True, help="Folder or Hub id of the tokenizer of the chunks.")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 128], help="Tokens in a chunk.")
    parser.add_argument("--sets", nargs="+", default=["faq", "docstrings", "pages"])
    arguments = parser.parse_args()
    encoder = ChunkEncoder.from_pretrained(arguments.encoder, dtype=arguments.dtype)
    for name in arguments.sets:
        folder = arguments.output_dir / name
        if not (folder / "corpus.jsonl").exists():
            write_set(folder, *globals()[name](arguments.root, random.Random(0)))
        evaluation = measure(folder, encoder, arguments.tokenizer, arguments.sizes)
        (folder / "results.json").write_text(json.dumps(evaluation.to_dict(), indent=2) + "\n", encoding="utf-8")
        print(f"\n{name}\n{evaluation.table()}", flush=True)


if __name__ == "__main__":
    main()
