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
"""The results of an evaluation of RETRO: numbers, tables and plots"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from modeling_retro.durable_files_retro import write_text
from modeling_retro.sharing.model_card import Way, evaluation_tables


OVERLAP_EDGES = np.arange(9) / 8


@dataclass
class Difference:
    """
    The difference in bits per byte between one way to retrieve and another.

    Args:
        bits_per_byte (`float`):
            The difference. Below zero, the first way is better.
        low (`float`), high (`float`):
            95 % confidence interval, by bootstrap over documents.
    """

    bits_per_byte: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.bits_per_byte:+.4f} ({self.low:+.4f} … {self.high:+.4f})"


@dataclass
class RetroEvaluation:
    """
    The results of [`~trainers.evaluate_retro`]. Each way to retrieve has the name of a
    [`~modeling_retro.sharing.model_card.Way`]: its mode, such as `"on"`. If several numbers of neighbors are measured,
    the number is added (`"on k=2"`), and if only a share of the datastore is searched, the share is added (`"on k=2
    share=0.5"`).

    Args:
        chunk_bits (`dict[str, np.ndarray]`):
            Bits of the code for each chunk, float64 `[chunks]`, for each way to retrieve.
        chunk_bytes (`np.ndarray`):
            Bytes of the UTF-8 source of each chunk, int64 `[chunks]`.
        document_offsets (`np.ndarray`):
            The first chunk of each document, and the end of the last document, int64 `[documents + 1]`.
        num_tokens (`int`):
            Number of counted tokens.
        num_neighbors (`list[int]`):
            Numbers of neighbors of a chunk that were measured.
        overlap (`np.ndarray`, *optional*):
            Longest token substring shared with a neighbor, as a share of the chunk size, float64 `[chunks]`.
        domains (`list[str]`, *optional*):
            Domain of each document.
        seed (`int`, *optional*, defaults to 0):
            Seed of the bootstrap.
        chunk_tokens (`np.ndarray`, *optional*):
            Number of counted tokens of each chunk, int64 `[chunks]`.
        unknown_tokens (`np.ndarray`, *optional*):
            Number of tokens of each chunk that stand for text that the tokenizer does not know, int64 `[chunks]`.
        token_bits (`dict[str, np.ndarray]`, *optional*):
            Bits of the code for each token, float64 `[chunks, m]`, for some ways to retrieve.
        seconds (`dict[str, np.ndarray]`, *optional*):
            Wall-clock time and processor time of the measurement of each way, float64 `[2]`.
        rivals (`dict[str, dict[str, float]]`, *optional*):
            What each way costs (see [`~trainers.evaluation.rivals.evaluate_rivals`]).
        knn_lm (`dict`, *optional*):
            The settings of the kNN-LM.
    """

    chunk_bits: dict[str, np.ndarray]
    chunk_bytes: np.ndarray
    document_offsets: np.ndarray
    num_tokens: int
    num_neighbors: list[int]
    overlap: np.ndarray | None = None
    domains: list[str] | None = None
    seed: int = 0
    chunk_tokens: np.ndarray | None = None
    unknown_tokens: np.ndarray | None = None
    token_bits: dict[str, np.ndarray] = field(default_factory=dict)
    seconds: dict[str, np.ndarray] = field(default_factory=dict)
    rivals: dict[str, dict[str, float]] = field(default_factory=dict)
    knn_lm: dict[str, Any] | None = None
    document_bytes: np.ndarray = field(init=False)

    def __post_init__(self):
        self.document_bytes = np.add.reduceat(self.chunk_bytes, self.document_offsets[:-1])

    def document_bits(self, name: str) -> np.ndarray:
        """Bits of each document, float64 `[documents]`."""
        return np.add.reduceat(self.chunk_bits[name], self.document_offsets[:-1])

    def only(self, documents: np.ndarray) -> "RetroEvaluation":
        """The same results over some documents, given as bool `[documents]`."""
        lengths = np.diff(self.document_offsets)
        chunks = np.repeat(documents, lengths)
        return replace(
            self,
            chunk_bits={name: bits[chunks] for name, bits in self.chunk_bits.items()},
            chunk_bytes=self.chunk_bytes[chunks],
            document_offsets=np.concatenate([[0], np.cumsum(lengths[documents])]),
            num_tokens=int(self.chunk_tokens[chunks].sum()),
            overlap=None if self.overlap is None else self.overlap[chunks],
            domains=None if self.domains is None else [self.domains[n] for n in np.flatnonzero(documents)],
            chunk_tokens=self.chunk_tokens[chunks],
            unknown_tokens=None if self.unknown_tokens is None else self.unknown_tokens[chunks],
            token_bits={name: bits[chunks] for name, bits in self.token_bits.items()},
        )

    def bits_per_byte(self, name: str) -> float:
        """Bits of the code per byte of the source text."""
        return float(self.chunk_bits[name].sum() / self.chunk_bytes.sum())

    def perplexity(self, name: str) -> float:
        """Perplexity per token of the model's tokenizer."""
        return float(2.0 ** (self.chunk_bits[name].sum() / self.num_tokens))

    def difference(self, name: str, reference: str) -> Difference:
        """The difference in bits per byte between `name` and `reference`, over the same documents."""
        bits = self.document_bits(name) - self.document_bits(reference)
        low, high = bootstrap_interval(bits, self.document_bytes, seed=self.seed)
        return Difference(float(bits.sum() / self.document_bytes.sum()), low, high)

    def references(self, name: str) -> list[str]:
        """The ways that `name` is compared with: no retrieval, and the same number of random neighbors."""
        candidates = map(str, Way.parse(name).references())
        return [candidate for candidate in candidates if candidate in self.chunk_bits and candidate != name]

    def overlap_curve(self) -> list[dict]:
        """
        Bits per byte by overlap with the neighbors (arXiv:2112.04426, section 2.6), for the chunks in each bin and for
        all chunks up to the upper end of the bin.
        """
        rows = []
        for low, high in zip(OVERLAP_EDGES[:-1], OVERLAP_EDGES[1:], strict=True):
            upto = (self.overlap <= high) & (self.chunk_bytes > 0)
            within = upto & ((self.overlap > low) | (low == 0))
            rows.append(
                {
                    "overlap": [float(low), float(high)],
                    "num_chunks": int(within.sum()),
                    "bits_per_byte": self._ratios(within),
                    "cumulative_bits_per_byte": self._ratios(upto),
                }
            )
        return rows

    def by_domain(self) -> dict[str, dict[str, float]]:
        """Bits per byte of each domain."""
        domain_of_chunk = np.repeat(self.domains, np.diff(self.document_offsets))
        return {domain: self._ratios(domain_of_chunk == domain) for domain in sorted(set(self.domains))}

    def _ratios(self, chosen: np.ndarray) -> dict[str, float | None]:
        num_bytes = self.chunk_bytes[chosen].sum()
        return {
            name: float(bits[chosen].sum() / num_bytes) if num_bytes else None
            for name, bits in self.chunk_bits.items()
        }

    def to_dict(self) -> dict:
        """The numbers, ready for JSON."""
        names = list(self.chunk_bits)
        numbers = {
            "num_documents": len(self.document_bytes),
            "num_bytes": int(self.chunk_bytes.sum()),
            "num_tokens": self.num_tokens,
            "num_neighbors": self.num_neighbors,
            "bits_per_byte": {name: self.bits_per_byte(name) for name in names},
            "perplexity": {name: self.perplexity(name) for name in names},
            "differences": {
                f"{name} - {reference}": asdict(self.difference(name, reference))
                for i, name in enumerate(names)
                for reference in names[:i]
            },
        }
        if self.unknown_tokens is not None and self.unknown_tokens.any():
            numbers["unknown_tokens"] = int(self.unknown_tokens.sum())
        if self.overlap is not None:
            numbers["overlap"] = self.overlap_curve()
        if self.domains is not None:
            numbers["domains"] = self.by_domain()
        if self.rivals:
            numbers["rivals"] = {name: self._interval(name) | costs for name, costs in self.rivals.items()}
        if self.knn_lm is not None:
            numbers["knn_lm"] = self.knn_lm
        return numbers

    def _interval(self, name: str) -> dict[str, float]:
        low, high = bootstrap_interval(self.document_bits(name), self.document_bytes, seed=self.seed)
        return {"bits_per_byte": self.bits_per_byte(name), "low": low, "high": high}

    def to_markdown(self) -> str:
        """The numbers as Markdown tables."""
        return evaluation_tables(self.to_dict())

    def save(self, directory: str | os.PathLike, facts: Mapping[str, Any] | None = None) -> None:
        """
        Writes `evaluation.json`, `evaluation.md`, `evaluation.png` and, if they were measured, `overlap.png` and
        `rivals.svg`.

        Args:
            directory (`str` or `os.PathLike`):
                Directory to write to. It is created if it does not exist.
            facts (`Mapping`, *optional*):
                Further entries of `evaluation.json`, such as a description of the datastore.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        numbers = {**self.to_dict(), **(facts or {})}
        write_text(directory / "evaluation.json", json.dumps(numbers, indent=2) + "\n")
        write_text(directory / "evaluation.md", evaluation_tables(numbers))
        self.plot(directory / "evaluation.png")
        if self.overlap is not None:
            self.plot_overlap(directory / "overlap.png")
        if self.rivals:
            self.plot_rivals(directory / "rivals.svg")

    def plot(self, path: str | os.PathLike) -> None:
        """
        Draws the bits per byte of each way to retrieve, and the change for each document.

        Args:
            path (`str` or `os.PathLike`):
                PNG file to write.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4), layout="constrained")
        bars, changes = figure.subplots(1, 2)
        names = list(self.chunk_bits)
        values = [self.bits_per_byte(name) for name in names]
        bars.bar_label(bars.barh(names, values, color="tab:blue"), fmt="%.4f")
        spread = max(values) - min(values) or max(values)
        bars.set_xlim(max(0.0, min(values) - spread), max(values) + spread)
        bars.invert_yaxis()
        bars.set_xlabel("bits per byte (axis cut)")
        for name in names:
            if name != "off" and "off" in self.chunk_bits:
                difference = (self.document_bits(name) - self.document_bits("off")) / self.document_bytes
                changes.plot(np.sort(difference), label=f"{name} − off")
        changes.axhline(0.0, color="gray", linewidth=0.8)
        changes.set_xlabel("held-out documents, sorted")
        changes.set_ylabel("bits per byte")
        changes.legend()
        figure.savefig(path, dpi=150)

    def plot_overlap(self, path: str | os.PathLike) -> None:
        """
        Draws the bits per byte of the chunks whose overlap with their neighbors is at most a share.

        Args:
            path (`str` or `os.PathLike`):
                PNG file to write.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        curve = self.overlap_curve()
        for name in self.chunk_bits:
            points = [(row["overlap"][1], row["cumulative_bits_per_byte"][name]) for row in curve]
            axes.plot(*zip(*((x, y) for x, y in points if y is not None), strict=True), marker="o", label=name)
        axes.set_xlabel("overlap with the neighbors, at most")
        axes.set_ylabel("bits per byte")
        axes.legend()
        figure.savefig(path, dpi=150)

    def plot_rivals(self, path: str | os.PathLike) -> None:
        """
        Draws the bits per byte of each way against its operations for a token. A line joins the ways that no other
        beats in both.

        Args:
            path (`str` or `os.PathLike`):
                SVG or PNG file to write.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        places = {
            name: (costs["operations_per_token"] / 1e9, self.bits_per_byte(name))
            for name, costs in self.rivals.items()
        }
        best, lowest = [], float("inf")
        for operations, bits in sorted(places.values()):
            if bits < lowest:
                best.append((operations, bits))
                lowest = bits
        axes.plot(*zip(*best, strict=True), color="lightgray", zorder=0)
        # A legend, because ways that cost the same would have labels in the same place.
        for number, name in enumerate(sorted(places, key=lambda name: places[name][1])):
            axes.plot(*places[name], "osD^vPX*<>"[number % 10], color=f"C{number % 10}", markersize=9, label=name)
        axes.set_xscale("log")
        ticks = [tick * 10.0**power for power in range(-6, 6) for tick in (1, 2, 5)]
        low, high = (edge(x for x, _ in places.values()) for edge in (min, max))
        axes.set_xticks([tick for tick in ticks if low / 2 <= tick <= high * 2], minor=False)
        axes.minorticks_off()
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("billions of operations for a token")
        axes.set_ylabel("bits per byte")
        axes.grid(color="whitesmoke")
        figure.legend(loc="outside right upper", frameon=False)
        figure.savefig(path, dpi=150)


def bootstrap_interval(
    numerator: np.ndarray, denominator: np.ndarray, num_samples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """
    Computes the bootstrap confidence interval of `numerator.sum() / denominator.sum()`, with documents drawn with
    replacement.

    Args:
        numerator (`np.ndarray`), denominator (`np.ndarray`):
            Values of each document, `[documents]`.
        num_samples (`int`, *optional*, defaults to 2000):
            Number of draws.
        level (`float`, *optional*, defaults to 0.95):
            Share of the draws inside the interval.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draws.

    Returns:
        `tuple[float, float]`: lower and upper end.
    """
    from scipy.stats import bootstrap

    if len(numerator) == 1:  # There is nothing else to draw.
        return (float(numerator[0] / denominator[0]),) * 2
    found = bootstrap(
        (numerator, denominator),
        lambda over, under, axis: over.sum(axis) / under.sum(axis),
        n_resamples=num_samples,
        confidence_level=level,
        method="percentile",
        paired=True,
        vectorized=True,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)
