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
Draws the pictures of the documentation into `docs/pictures`. The numbers are read from the tables of README.md and
docs/results.md, so run this again when they change:

    python docs/pictures.py
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from xml.sax.saxutils import escape


DOCS = Path(__file__).parent

# Every picture has a background of its own, so that it can be read on light and on dark pages.
PAPER, INK, GRAY, PALE = "#ffffff", "#1f2328", "#6e7781", "#d0d7de"
COLORS = ["#0969da", "#bc4c00", "#1a7f37"]  # of the neighbors of chunk 0, 1 and 2


def rectangle(x, y, width, height, fill, stroke="none", dashed=False, **attributes) -> str:
    dash = ' stroke-dasharray="3 2"' if dashed else ""
    more = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
    place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {place} fill="{fill}" stroke="{stroke}"{dash}{more}/>'


def path(points: Iterable[tuple[float, float]], stroke: str, width: float) -> str:
    places = " L".join(f"{x:g} {y:g}" for x, y in points)
    return f'<path d="M{places}" fill="none" stroke="{stroke}" stroke-width="{width:g}"/>'


def label(x, y, words, anchor="middle", fill=INK, size=14, weight="normal", turned=False) -> str:
    halo = f' stroke="{PAPER}" stroke-width="4" paint-order="stroke"' if weight == "bold" else ""
    turn = f' transform="rotate(-90 {x:g} {y:g})"' if turned else ""
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{fill}" font-size="{size}" '
        f'font-weight="{weight}"{halo}{turn}>{escape(words)}</text>'
    )


def picture(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """A whole SVG file; the title is for those who do not see it."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" role="img" font-family="Helvetica, Arial, sans-serif">',
            f"<title>{escape(title)}</title>",
            rectangle(0.5, 0.5, width - 1, height - 1, PAPER, PALE, rx=6),
            *parts,
            "</svg>",
            "",
        ]
    )


def token_view() -> str:
    """
    A row of chunks, drawn with 8 tokens in place of 64. The color of a token is that of the neighbors that it sees,
    and frames surround all that one of the tokens sees.
    """
    cell, tokens, left, row_y = 22, 8, 30, 236
    chunk = cell * tokens
    reader = 2 * tokens + 1  # sees the neighbors of chunk 1
    parts = [label(left, 34, "The color of a token is that of the neighbors that it sees.", "start", size=16)]
    for u, color in enumerate(COLORS):
        # The tokens that see the neighbors of chunk u: its last one, and those of the next chunk but the last.
        start = left + (u + 1) * chunk - cell
        middle, end = start + chunk / 2, start + chunk
        is_seen = u == (reader + 1) // tokens - 1
        strength = 1 if is_seen else 0.5
        parts.append(label(middle, 70, f"neighbors of chunk {u}", fill=color))
        for y in (84, 114):
            parts.append(rectangle(start + 7, y, 9, 22, PAPER, color, dashed=True))
            for x, width, words in ((18, 68, "neighbor"), (88, 78, "continuation")):
                parts.append(rectangle(start + x, y, width, 22, color, opacity=strength, rx=2))
                parts.append(label(start + x + width / 2, y + 15.5, words, fill=PAPER, size=12))
        if is_seen:
            parts.append(rectangle(start + 16, 79, 153, 62, "none", INK, stroke_width=2, rx=3))
        parts.append(path([(middle, 148), (middle, 196)], color, 2))
        parts.append(
            path([(start + 3, row_y - 10), (start + 3, 196), (end - 3, 196), (end - 3, row_y - 10)], color, 2)
        )
    parts.append(rectangle(left + 4, 89, 9, 22, PAPER, GRAY, dashed=True))
    parts.append(label(left + 20, 97, "hidden: the first", "start", GRAY, 13))
    parts.append(label(left + 20, 113, "token of a neighbor", "start", GRAY, 13))
    parts.append(label(left + (tokens - 1) * cell / 2, 200, "no neighbors yet", fill=GRAY, size=13))
    for i in range(4 * tokens - 1):
        u = (i + 1) // tokens - 1
        fill = PALE if u < 0 else COLORS[u]
        parts.append(rectangle(left + i * cell + 1, row_y, cell - 2, 30, fill, opacity=1 if i <= reader else 0.5))
    parts.append(label(left + 4 * chunk - cell / 2, row_y + 20, "…", fill=GRAY))
    for u in range(4):
        x = left + u * chunk
        parts.append(path([(x + 2, row_y + 40), (x + 2, row_y + 46), (x + chunk - 2, row_y + 46)], GRAY, 1))
        parts.append(path([(x + chunk - 2, row_y + 46), (x + chunk - 2, row_y + 40)], GRAY, 1))
        parts.append(label(x + chunk / 2, row_y + 63, f"chunk {u}"))
    parts.append(rectangle(left - 2, row_y - 4, (reader + 1) * cell + 4, 38, "none", INK, stroke_width=2, rx=3))
    x = left + reader * cell + cell / 2
    parts.append(path([(x, row_y + 74), (x, row_y + 36)], INK, 2))
    parts.append(path([(x - 5, row_y + 43), (x, row_y + 35), (x + 5, row_y + 43)], INK, 2))
    parts.append(label(x, row_y + 90, "This token sees what the two frames hold.", weight="bold"))
    return picture(2 * left + 4 * chunk, 346, "The neighbors that each token of a row sees", parts)


def table(page: Path, *columns: str) -> list[dict[str, str]]:
    """The rows of the first table of a page that has these columns, without bold type and with plain minus signs."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        header = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and set(columns) <= set(header):
            rows = []
            for row in lines[number + 2 :]:
                if not row.startswith("|"):
                    return rows
                cells = [cell.strip().replace("**", "").replace("−", "-") for cell in row.strip("|").split("|")]
                rows.append(dict(zip(header, cells, strict=True)))
            return rows
    raise ValueError(f"{page.name} has no table with the columns {', '.join(columns)}")


def numbers(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"[+-]?\d+(?:\.\d+)?", cell)]


def overlap() -> str:
    """What neighbors bring a chunk, by the length of the text that it shares with them, from docs/results.md."""
    rows = table(DOCS / "results.md", "overlap with the neighbors", "chunks", "off", "random", "on")
    width, height, left, right, top, bottom = 720, 420, 78, 20, 88, 66
    low, high = -0.1, 0.65

    def place(gain: float) -> float:
        return top + (high - gain) / (high - low) * (height - top - bottom)

    parts = [
        label(left, 30, "Bits per byte that neighbors save, by their overlap with the chunk", "start", size=16),
        label(24, (top + height - bottom) / 2, "bits per byte saved", turned=True),
        label(
            (left + width - right) / 2, height - 14, "longest piece of text shared with a neighbor, share of the chunk"
        ),
    ]
    for tenth in range(-1, 7):
        y = place(tenth / 10)
        parts.append(path([(left, y), (width - right, y)], INK if tenth == 0 else PALE, 1))
        parts.append(label(left - 8, y + 5, f"{tenth / 10:.1f}".replace("-", "−"), "end", GRAY, 13))
    step = (width - right - left) / len(rows)
    for number, row in enumerate(rows):
        x = left + number * step
        off = float(row["off"])
        for name, start, color in (("on", 0.16, COLORS[0]), ("random", 0.54, GRAY)):
            gain = off - float(row[name])
            y, end = sorted((place(gain), place(0)))
            parts.append(rectangle(x + start * step, y, 0.3 * step, max(end - y, 1), color))
        parts.append(
            label(x + 0.31 * step, place(max(off - float(row["on"]), 0)) - 7, row["chunks"], fill=GRAY, size=12)
        )
        parts.append(path([(x, place(low)), (x, place(low) + 5)], GRAY, 1))
        parts.append(
            label(
                x, height - bottom + 20, f"{float(row['overlap with the neighbors'].split()[0]):g}", fill=GRAY, size=13
            )
        )
    parts.append(label(width - right, height - bottom + 20, "1", fill=GRAY, size=13))
    for y, color, words in (
        (54, COLORS[0], "retrieved neighbors (number of chunks above)"),
        (74, GRAY, "random neighbors"),
    ):
        parts.append(rectangle(left + 14, y - 10, 12, 12, color))
        parts.append(label(left + 32, y + 1, words, "start", size=13))
    return picture(width, height, "Bits per byte saved against the overlap with the neighbors", parts)


# Color of each kind of text in the table of sizes.
KINDS = {
    "all": INK,
    "dictionary": COLORS[0],
    "descriptions": COLORS[1],
    "documentation": COLORS[2],
    "python": "#8250df",
}


def datastore_size() -> str:
    """What one neighbor saves by the size of the datastore, for each kind of text, from docs/results.md."""
    rows = table(DOCS / "results.md", "tokens for a parameter", *KINDS)
    width, height, left, right, top, bottom = 720, 420, 78, 128, 70, 66
    sizes = [float(row["tokens for a parameter"]) for row in rows]
    saved = {kind: [[-value for value in numbers(row[kind])] for row in rows] for kind in KINDS}
    values = [value for cells in saved.values() for cell in cells for value in cell]
    low, high = min(0, *values), max(values) * 1.03

    def place(size: float, gain: float) -> tuple[float, float]:
        share = math.log(size / sizes[0]) / math.log(sizes[-1] / sizes[0])
        return (
            left + 16 + share * (width - left - right - 24),
            top + (high - gain) / (high - low) * (height - top - bottom),
        )

    parts = [
        label(left, 30, "Bits per byte that one neighbor saves, by the size of the datastore", "start", size=16),
        label(left, 52, "upright lines: 95 % intervals", "start", GRAY, 13),
        label(24, (top + height - bottom) / 2, "bits per byte saved", turned=True),
        label((left + width - right) / 2, height - 14, "tokens of the datastore for each parameter of the model"),
    ]
    for step in range(math.ceil(low * 20), math.floor(high * 20) + 1):
        y = place(sizes[0], step / 20)[1]
        parts.append(path([(left, y), (width - right, y)], INK if step == 0 else PALE, 1))
        parts.append(label(left - 8, y + 5, f"{step / 20:.2f}".replace("-", "−"), "end", GRAY, 13))
    for size in sizes:
        x, y = place(size, low)
        parts.append(path([(x, y), (x, y + 5)], GRAY, 1))
        parts.append(label(x, y + 20, f"{size:g}", fill=GRAY, size=13))
    ends = sorted((place(sizes[-1], cells[-1][0])[1], kind) for kind, cells in saved.items())
    label_y = -math.inf
    for y, kind in ends:  # labels of lines that end close to each other are moved apart
        label_y = max(y + 5, label_y + 16)
        words = "all kinds" if kind == "all" else kind
        parts.append(label(width - right + 12, label_y, words, "start", KINDS[kind], 13))
    for number, (kind, cells) in enumerate(saved.items()):
        shift = 3 * (number - 2)
        points = [place(size, cell[0]) for size, cell in zip(sizes, cells, strict=True)]
        points = [(x + shift, y) for x, y in points]
        parts.append(path(points, KINDS[kind], 3 if kind == "all" else 1.5))
        for (x, y), size, cell in zip(points, sizes, cells, strict=True):
            parts.append(path([(x, place(size, end)[1]) for end in cell[1:]], KINDS[kind], 1))
            parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="3.5" fill="{KINDS[kind]}"/>')
    return picture(width, height, "Bits per byte saved against the size of the datastore", parts)


# Color, label and shift (some cost the same) of each way to read neighbors, by the pattern of its name in the table.
WAYS = {
    r"OFF|ON, \d+ neighbors?": (COLORS[0], "untrained model, with the number of neighbors", 0),
    r"ON.*": (COLORS[2], "model with a trained reader", 10),
    r"random.*": (GRAY, "random neighbors (lower: with the reader)", 20),
    r".*in front.*": (COLORS[1], "neighbor in front of the window", 0),
}


def _way(name: str) -> str:
    for way in WAYS:
        if re.fullmatch(way, name):
            return way
    raise ValueError(f"the table of README.md has the row {name!r}, for which docs/pictures.py has no color")


def bits_against_operations() -> str:
    """The leading table of README.md: bits per byte of each way to read neighbors, against its operations."""
    rows = table(
        DOCS.parent / "README.md", "retrieval", "bits per byte", "less OFF", "billions of operations for a token"
    )
    width, height, left, right, top, bottom = 720, 450, 78, 30, 130, 66
    points = {}
    for row in rows:
        name = row["retrieval"].split(":")[0]
        bits, operations = float(row["bits per byte"]), float(row["billions of operations for a token"])
        points[name] = (operations, bits, numbers(row["less OFF"])[1:])
    off = points["OFF"][1]
    values = [off + end for *_, interval in points.values() for end in interval] + [off]
    low, high = min(values) - 0.01, max(values) + 0.02
    most = max(operations for operations, *_ in points.values()) * 1.1

    def place(operations: float, bits: float) -> tuple[float, float]:
        return (
            left + operations / most * (width - left - right),
            top + (high - bits) / (high - low) * (height - top - bottom),
        )

    parts = [
        label(left, 30, "One model, by the way it reads neighbors", "start", size=16),
        label(left, 52, "upright lines: 95 % intervals of the difference from OFF", "start", GRAY, 13),
        label(24, (top + height - bottom) / 2, "bits per byte", turned=True),
        label((left + width - right) / 2, height - 14, "billions of operations for a token"),
    ]
    for step in range(int(low * 20) + 1, int(high * 20) + 1):
        x, y = place(0, step / 20)
        parts.append(path([(x, y), (width - right, y)], PALE, 1))
        parts.append(label(x - 8, y + 5, f"{step / 20:.2f}", "end", GRAY, 13))
    for operations in range(int(most) + 1):
        x, y = place(operations, low)
        parts.append(path([(x, y), (x, y + 5)], GRAY, 1))
        parts.append(label(x, y + 20, f"{operations}", fill=GRAY, size=13))
    parts.append(path([place(0, low), place(most, low)], INK, 1))
    ways = {way: [name for name in points if _way(name) == way] for way in WAYS}
    for number, (way, names) in enumerate((way, names) for way, names in ways.items() if names):
        color, words, shift = WAYS[way]
        key_x, key_y = left + 6 + 340 * (number // 2), 76 + 20 * (number % 2)
        parts.append(f'<circle cx="{key_x:g}" cy="{key_y:g}" r="5.5" fill="{color}"/>')
        parts.append(label(key_x + 13, key_y + 5, words, "start", size=13))
        places = {name: (place(*points[name][:2])[0] + shift, place(*points[name][:2])[1]) for name in names}
        if len(names) > 1 and not way.startswith("random"):
            parts.append(path([place(*points["OFF"][:2]), *places.values()], color, 2))
        for name, (x, y) in places.items():
            parts.append(
                path([(x, place(0, off + end)[1]) for end in points[name][2] or [points[name][1] - off]], color, 1.5)
            )
            parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="5.5" fill="{color}"/>')
            if name.startswith(("OFF", "ON")):
                words = "OFF" if name == "OFF" else f"{numbers(name)[0]:g}"
                parts.append(label(x + 9, y - 8, words, "start", color, weight="bold"))
    return picture(width, height, "Bits per byte against operations for a token", parts)


# Color and label of each way beside its rivals, by the pattern of its name in the table.
RIVALS = {
    r"ON, \d neighbors?, less OFF": (COLORS[2], "ON with the reader (number of neighbors)"),
    r"\d neighbors? in front of the window, less OFF": (COLORS[1], "neighbors in front of the window"),
    r"ON untrained, \d neighbors?, less OFF": ("#bf3989", "ON untrained"),
    r"\d random neighbors?, less OFF": (GRAY, "random neighbors with the reader"),
    r"kNN-LM": ("#8250df", "kNN-LM"),
}


def rivals() -> str:
    """Bits per byte of each way to use a datastore, against its operations, on three kinds of text."""
    corpora = ["SQLite documentation", "package descriptions", "Bible (prose)"]
    page = DOCS / "results.md"
    rows = {
        row["bits per byte"]: (row, float(row["GFLOPs a token"]))
        for row in table(page, "bits per byte", *corpora, "GFLOPs a token")[1:]
        if row["GFLOPs a token"]
    }
    (knn,) = (
        row for row in table(page, "bits per byte, less OFF, 40 documents", *corpora) if "kNN-LM" in row.values()
    )
    (cost,) = (row for row in table(page, "costs", "GFLOPs a token") if row["costs"] == "kNN-LM")
    rows["kNN-LM"] = knn, float(cost["GFLOPs a token"])
    width, height, left, right, top, bottom, gap = 960, 440, 78, 20, 138, 66, 22
    step = (width - left - right + gap) / len(corpora)
    lowest, highest, most = -0.31, 0.03, 4.3

    def place(panel: int, operations: float, gain: float) -> tuple[float, float]:
        x = left + panel * step + operations / most * (step - gap)
        return x, top + (highest - gain) / (highest - lowest) * (height - top - bottom)

    parts = [
        label(left, 30, "What one model gains from the documents of a datastore", "start", size=16),
        label(left, 52, "upright lines: 95 % intervals", "start", GRAY, 13),
        label(24, (top + height - bottom) / 2, "bits per byte, less OFF", turned=True),
        label((left + width - right) / 2, height - 14, "billions of operations for a token"),
    ]
    for panel, corpus in enumerate(corpora):
        for tenth in range(-3, 1):
            x, y = place(panel, 0, tenth / 10)
            parts.append(path([(x, y), (x + step - gap, y)], INK if tenth == 0 else PALE, 1))
            if panel == 0:
                parts.append(label(x - 8, y + 5, f"{tenth / 10:.1f}".replace("-", "−"), "end", GRAY, 13))
        for operations in range(5):
            x, y = place(panel, operations, lowest)
            parts.append(path([(x, y), (x, y + 5)], GRAY, 1))
            parts.append(label(x, y + 20, f"{operations}", fill=GRAY, size=13))
        parts.append(path([place(panel, 0, lowest), place(panel, most, lowest)], INK, 1))
        parts.append(label(place(panel, most / 2, 0)[0], top - 8, corpus, weight="bold"))
        for pattern, (color, _) in RIVALS.items():
            points = []
            for name, (row, operations) in rows.items():
                if re.fullmatch(pattern, name):
                    gain, low, high = numbers(row[corpus])
                    points.append(place(panel, operations, gain))
                    parts.append(path([place(panel, operations, end) for end in (low, high)], color, 1.5))
                    if pattern.startswith("ON, "):
                        x, y = points[-1]
                        parts.append(label(x + 8, y + 17, name[4], "start", color, weight="bold"))
            parts.append(path(points, color, 2))
            parts += [f'<circle cx="{x:g}" cy="{y:g}" r="5" fill="{color}"/>' for x, y in points]
    for number, (color, words) in enumerate(RIVALS.values()):
        x, y = left + 6 + 290 * (number // 2), 76 + 20 * (number % 2)
        parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="5" fill="{color}"/>')
        parts.append(label(x + 13, y + 5, words, "start", size=13))
    return picture(width, height, "Bits per byte less than OFF against operations for a token", parts)


def answers() -> str:
    """Exact match of definitions by each way to read passages, against its operations, from docs/results.md."""
    cost = "billions of operations, passages kept"
    rows = table(DOCS / "results.md", "4 passages, read", cost, "definitions")
    width, height, left, right, top, bottom = 720, 400, 78, 30, 56, 66
    most, highest = 100, 0.8

    def place(operations: float, share: float) -> tuple[float, float]:
        x = left + operations / most * (width - left - right)
        return x, top + (highest - share) / highest * (height - top - bottom)

    parts = [
        label(left, 30, "Definitions found in four passages that were read before", "start", size=16),
        label(24, (top + height - bottom) / 2, "exact match", turned=True),
        label((left + width - right) / 2, height - 14, "billions of operations until the first token of an answer"),
    ]
    for tenth in range(0, 9, 2):
        x, y = place(0, tenth / 10)
        parts.append(path([(x, y), (width - right, y)], INK if tenth == 0 else PALE, 1))
        parts.append(label(x - 8, y + 5, f"{tenth / 10:.1f}", "end", GRAY, 13))
    for operations in range(0, most + 1, 20):
        x, y = place(operations, 0)
        parts += [path([(x, y), (x, y + 5)], GRAY, 1), label(x, y + 20, f"{operations}", fill=GRAY, size=13)]
    for row in rows:
        x, y = place(float(row[cost]), float(row["definitions"].strip("*")))
        way = row["4 passages, read"].strip("*")
        color = COLORS[2] if "reader" in way else COLORS[0] if way == "apart" else GRAY
        parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="5" fill="{color}"/>')
        beside, anchor = (x - 10, "end") if x > width / 2 else (x + 10, "start")
        below = 20 if way.startswith("LegoLink, 16") else 5  # the next way stands beside it
        parts.append(label(beside, y + below, way, anchor, color, 13))
    return picture(width, height, "Exact match against operations, for ways to read passages", parts)


def drafts() -> str:
    """How fast texts with neighbors are written, by the tokens that a step confirms, from docs/results.md."""
    ways = {"ON / OFF": (GRAY, "ON"), "ON with drafts / OFF": (COLORS[2], "ON with drafts")}
    rows = table(DOCS / "results.md", "documents", "temperature", "tokens a step", *ways)
    width, height, left, right, top, bottom = 720, 420, 78, 30, 88, 66
    most, highest = 7.5, 3.5

    def place(per_step: float, ratio: float) -> tuple[float, float]:
        x = left + (per_step - 1) / (most - 1) * (width - left - right)
        return x, top + (highest - ratio) / highest * (height - top - bottom)

    parts = [
        label(left, 30, "Writing with neighbors, by the tokens of a step", "start", size=16),
        label(24, (top + height - bottom) / 2, "tokens/s, as a share of OFF", turned=True),
        label((left + width - right) / 2, height - 14, "tokens that a step with drafts writes"),
    ]
    for half in range(int(2 * highest) + 1):
        x, y = place(1, half / 2)
        parts.append(path([(x, y), (width - right, y)], INK if half == 2 else PALE, 1))
        parts.append(label(x - 8, y + 5, f"{half / 2:.1f}", "end", GRAY, 13))
    for half in range(2, int(2 * most) + 1):
        x, y = place(half / 2, 0)
        parts.append(path([(x, y), (x, y + 5)], GRAY, 1))
        parts.append(label(x, y + 20, f"{half / 2:.1f}", fill=GRAY, size=13))
    for number, (way, (color, words)) in enumerate(ways.items()):
        for row in rows:
            x, y = place(float(row["tokens a step"]), float(row[way]))
            fill = color if row["temperature"] == "0" else PAPER
            parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="5" fill="{fill}" stroke="{color}" stroke-width="2"/>')
        x = left + 6 + 170 * number
        parts.append(f'<circle cx="{x:g}" cy="60" r="5" fill="{color}"/>')
        parts.append(label(x + 13, 65, words, "start", size=13))
    parts.append(label(left + 366, 65, "hollow: sampled at 0.7", "start", GRAY, 13))
    return picture(width, height, "Tokens a second with neighbors, by the tokens of a step", parts)


PICTURES = {
    "token_view": token_view,
    "overlap": overlap,
    "bits_against_operations": bits_against_operations,
    "rivals": rivals,
    "answers": answers,
    "datastore_size": datastore_size,
    "drafts": drafts,
}


if __name__ == "__main__":
    (DOCS / "pictures").mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (DOCS / "pictures" / f"{name}.svg").write_text(draw(), encoding="utf-8")
