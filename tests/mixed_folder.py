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
"""Makes small files of every kind, from the formats' own definitions"""

import gzip
import io
import json
import random
import zipfile
from pathlib import Path


OFFICE = "http://schemas.openxmlformats.org"
WORD = f"{OFFICE}/wordprocessingml/2006/main"
RELATION = f"{OFFICE}/officeDocument/2006/relationships"
PACKAGE = f"{OFFICE}/package/2006"
TYPE = "application/vnd.openxmlformats-officedocument"
XML = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>'


def zipped(**files: str) -> bytes:
    """A zip archive of some files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return buffer.getvalue()


def _package(main: str, kind: str, parts: dict[str, str]) -> bytes:
    """An Office file whose main part, `main`, is of a kind of content."""
    types = "".join(f'<Override PartName="/{name}" ContentType="{TYPE}.{of}+xml"/>' for name, of in [(main, kind)])
    content = (
        f'{XML}<Types xmlns="{PACKAGE}/content-types"><Default Extension="rels" '
        'ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Default Extension="xml" ContentType="application/xml"/>{types}</Types>'
    )
    relation = (
        f'{XML}<Relationships xmlns="{PACKAGE}/relationships"><Relationship Id="r1" '
        f'Type="{RELATION}/officeDocument" Target="{main}"/></Relationships>'
    )
    return zipped(**{"[Content_Types].xml": content, "_rels/.rels": relation, **parts})


def docx(*paragraphs: str) -> bytes:
    body = "".join(f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>" for text in paragraphs)
    document = f'{XML}<w:document xmlns:w="{WORD}"><w:body>{body}</w:body></w:document>'
    return _package("word/document.xml", "wordprocessingml.document.main", {"word/document.xml": document})


def pptx(*lines: str) -> bytes:
    drawing, slides = f"{OFFICE}/drawingml/2006/main", f"{OFFICE}/presentationml/2006/main"
    spaces = f'xmlns:a="{drawing}" xmlns:p="{slides}" xmlns:r="{RELATION}"'
    text = "".join(f"<a:p><a:r><a:t>{line}</a:t></a:r></a:p>" for line in lines)
    slide = (
        f"{XML}<p:sld {spaces}><p:cSld><p:spTree><p:sp><p:txBody>{text}</p:txBody></p:sp></p:spTree></p:cSld></p:sld>"
    )
    show = f'{XML}<p:presentation {spaces}><p:sldIdLst><p:sldId id="256" r:id="r1"/></p:sldIdLst></p:presentation>'
    relations = (
        f'{XML}<Relationships xmlns="{PACKAGE}/relationships"><Relationship Id="r1" Type="{RELATION}/slide" '
        'Target="slides/slide1.xml"/></Relationships>'
    )
    parts = {
        "ppt/presentation.xml": show,
        "ppt/_rels/presentation.xml.rels": relations,
        "ppt/slides/slide1.xml": slide,
    }
    return _package("ppt/presentation.xml", "presentationml.presentation.main", parts)


def xlsx(*rows: tuple[str, ...]) -> bytes:
    sheet = f"{OFFICE}/spreadsheetml/2006/main"
    cells = "".join(
        "<row>" + "".join(f'<c t="inlineStr"><is><t>{value}</t></is></c>' for value in row) + "</row>" for row in rows
    )
    relations = (
        f'{XML}<Relationships xmlns="{PACKAGE}/relationships"><Relationship Id="r1" Type="{RELATION}/worksheet" '
        'Target="worksheets/sheet1.xml"/></Relationships>'
    )
    parts = {
        "xl/workbook.xml": f'{XML}<workbook xmlns="{sheet}" xmlns:r="{RELATION}"><sheets><sheet name="Prices" '
        'sheetId="1" r:id="r1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": relations,
        "xl/worksheets/sheet1.xml": f'{XML}<worksheet xmlns="{sheet}"><sheetData>{cells}</sheetData></worksheet>',
    }
    return _package("xl/workbook.xml", "spreadsheetml.sheet.main", parts)


def epub(title: str, *chapters: str) -> bytes:
    items = "".join(
        f'<item id="c{i}" href="c{i}.xhtml" media-type="application/xhtml+xml"/>' for i in range(len(chapters))
    )
    spine = "".join(f'<itemref idref="c{i}"/>' for i in range(len(chapters)))
    files = {
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": f'{XML}<container version="1.0" '
        'xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles><rootfile full-path="book.opf" '
        'media-type="application/oebps-package+xml"/></rootfiles></container>',
        "book.opf": f'{XML}<package xmlns="http://www.idpf.org/2007/opf" version="3.0"><metadata '
        f'xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>{title}</dc:title></metadata>'
        f"<manifest>{items}</manifest><spine>{spine}</spine></package>",
    }
    for i, text in enumerate(chapters):
        files[f"c{i}.xhtml"] = f'<html xmlns="http://www.w3.org/1999/xhtml"><body><p>{text}</p></body></html>'
    return zipped(**files)


def pdf(*lines: str) -> bytes:
    """A page of lines in Helvetica."""
    text = "BT /F1 12 Tf 50 750 Td 14 TL " + " ".join(f"({line}) Tj T*" for line in lines) + " ET"
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents 4 0 R "
        "/Resources << /Font << /F1 5 0 R >> >> >>",
        f"<< /Length {len(text)} >>\nstream\n{text}\nendstream",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        places.append(len(out))
        out += f"{number} 0 obj\n{content}\nendobj\n".encode("latin-1")
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    trailer = f"trailer << /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(out)}\n%%EOF\n"
    return out + f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}{trailer}".encode("latin-1")


def ipynb(*cells: str) -> bytes:
    made = [{"cell_type": "markdown", "metadata": {}, "source": [text]} for text in cells]
    return json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}).encode()


def html(title: str, *paragraphs: str, encoding: str = "utf-8") -> bytes:
    body = "".join(f"<p class='x'>{text}</p>" for text in paragraphs)
    style = "<style>p { color: red }</style><script>var tracked = 1;</script>"
    head = f"<head><meta charset='{encoding}'><title>{title}</title>{style}</head>"
    return f"<!DOCTYPE html><html>{head}<body>{body}</body></html>".encode(encoding)


def plain_texts(number: int) -> list[str]:
    """Texts of plain words, each with a first sentence of its own."""
    draw, words = random.Random(0), VOCABULARY.split()
    sentences = [" ".join(draw.choices(words, k=9)) for _ in range(number * 6)]
    return [". ".join([f"Sentence {i} says", *sentences[6 * i : 6 * i + 6]]) for i in range(number)]


VOCABULARY = "the wheel turns a gear and this gear drives another wheel slowly over an old stone bridge"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))


def mixed_folder(folder: Path, texts: list[str]) -> tuple[list[str], dict[str, str]]:
    """
    Writes 120 files of all kinds to a folder.

    Returns:
        `tuple`: the names of the files that hold documents, and the others with a part of the reason why they do not.
    """
    number = iter(range(len(texts)))

    def text() -> str:
        return texts[next(number)]

    documents, others = {}, {}
    for i in range(9):
        documents |= {
            f"notes/{i}.txt": text().encode(),
            f"notes/{i}.md": f"# Note {i}\n\n{text()}".encode(),
            f"pages/{i}.HTML": html(f"Page {i}", text(), f"café {i}", encoding="latin-1" if i % 2 else "utf-8"),
            f"reports/{i}.pdf": pdf(*text().split(". ")),
            f"reports/{i}.docx": docx(*text().split(". ")),
            f"slides/{i}.pptx": pptx(*text().split(". ")),
            f"tables/{i}.xlsx": xlsx(("what", "said"), (f"row {i}", text())),
            f"books/{i}.epub": epub(f"Book {i}", text(), text()),
            f"code/{i}.ipynb": ipynb(f"# Cells {i}", text()),
            f"old/{i}.txt": (f"Größe und naïve Übung, año {i}: " + text()).encode(["cp1252", "utf-16"][i % 2]),
        }
    documents |= {
        "records/a.jsonl": (json.dumps({"text": text()}) + "\n" + json.dumps({"text": text()}) + "\n").encode(),
        "records/b.json": json.dumps([{"text": text(), "title": "One"}, {"text": text()}], indent=1).encode(),
        "records/c.csv": f'title;text\nFirst;"{text()}"\nSecond;"two lines\n{text()}"\n'.encode(),
        "records/d.tsv": f"text\tother\n{text()}\t1\n".encode(),
        "notes/packed.rst.gz": gzip.compress(text().encode()),
        "PAGE": html("No suffix", text()),
    }
    others |= {f"pictures/{i}.png": "an image" for i in range(8)}
    others |= {
        "empty.txt": "empty",
        "blank.md": "empty",
        "sound.mp3": "sound",
        "all.zip": "an archive",
        "settings.json": "no column 'text'",
        "prices.csv": "no column 'text'",
        "numbers.jsonl": "no column 'text'",
        "broken.pdf": "cannot be read",
        "broken.docx": "damaged",
        "scan.pdf": "no text in it",
        "letter.doc": "an old or locked Office file",
        "data.xml": "XML of no known kind",
        "core": "binary data",
        "broken.parquet": "cannot be read to its end",
        "program.so": "a program",
        "bomb.docx": "over the limit",
    }
    contents = dict.fromkeys(others, PNG) | {
        "empty.txt": b"",
        "blank.md": b" \n\n",
        "settings.json": b'{\n "name": "x",\n "version": 2\n}\n',
        "prices.csv": b"item,price\napple,1\npear,2\n",
        "numbers.jsonl": b'{"a": 1}\n{"a": 2}\n',
        "scan.pdf": pdf(),
        "broken.docx": docx("x")[:50],
        "bomb.docx": zipped(**{"word/document.xml": "<a>" + " " * 600_000_000}),
    }
    for name, content in (documents | contents).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return list(documents), others
