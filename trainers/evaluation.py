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
What retrieval buys: bits per byte and perplexity over held-out documents without neighbors, with random ones and with
the retrieved ones.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import reduce
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from modeling_retro.retrieval_retro import DatastoreSplit, RetroDatastore


MODES = ("off", "random", "on")


@dataclass
class Difference:
    """
    Bits per byte of one mode less those of another.

    Args:
        bits_per_byte (`float`):
            Below zero, the first mode is better.
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
    What [`evaluate_retro`] measures.

    Args:
        document_bits (`dict[str, np.ndarray]`):
            Bits of the code for each document, for each mode, float64 `[num_documents]`.
        document_bytes (`np.ndarray`):
            Bytes of the UTF-8 source of each document, int64 `[num_documents]`.
        num_tokens (`int`):
            Number of tokens counted.
        num_neighbors (`int`):
            Neighbors of a chunk, where there are any.
        seed (`int`):
            Seed of the bootstrap.
    """

    document_bits: dict[str, np.ndarray]
    document_bytes: np.ndarray
    num_tokens: int
    num_neighbors: int
    seed: int = 0

    def bits_per_byte(self, mode: str) -> float:
        """Bits of the code for the text in this mode per byte of its source."""
        return float(self.document_bits[mode].sum() / self.document_bytes.sum())

    def perplexity(self, mode: str) -> float:
        """Perplexity in this mode per token of the model's tokenizer."""
        return float(2.0 ** (self.document_bits[mode].sum() / self.num_tokens))

    def difference(self, mode: str, reference: str) -> Difference:
        """Bits per byte of `mode` less those of `reference`, over the same documents."""
        bits = self.document_bits[mode] - self.document_bits[reference]
        low, high = bootstrap_interval(bits, self.document_bytes, seed=self.seed)
        return Difference(float(bits.sum() / self.document_bytes.sum()), low, high)

    def to_dict(self) -> dict:
        """The numbers, ready for JSON."""
        modes = list(self.document_bits)
        pairs = [(mode, reference) for i, mode in enumerate(modes) for reference in modes[:i]]
        return {
            "num_documents": len(self.document_bytes),
            "num_bytes": int(self.document_bytes.sum()),
            "num_tokens": self.num_tokens,
            "num_neighbors": self.num_neighbors,
            "bits_per_byte": {mode: self.bits_per_byte(mode) for mode in modes},
            "perplexity": {mode: self.perplexity(mode) for mode in modes},
            "differences": {
                f"{mode} - {reference}": asdict(self.difference(mode, reference)) for mode, reference in pairs
            },
        }

    def to_markdown(self) -> str:
        """The results as a Markdown table."""
        references = [mode for mode in ("off", "random") if mode in self.document_bits]
        header = ["retrieval", "bits per byte", "perplexity", *(f"less {reference}" for reference in references)]
        lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        for mode in self.document_bits:
            cells = [mode, f"{self.bits_per_byte(mode):.4f}", f"{self.perplexity(mode):.3f}"]
            cells += ["" if mode == reference else str(self.difference(mode, reference)) for reference in references]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
        lines.append(
            f"{len(self.document_bytes):,} held-out documents, {self.document_bytes.sum():,} bytes, "
            f"{self.num_tokens:,} tokens; {self.num_neighbors} neighbors a chunk; in brackets 95 % intervals by "
            "bootstrap over documents."
        )
        return "\n".join(lines) + "\n"

    def save(self, directory: str | os.PathLike) -> None:
        """
        Writes `evaluation.json`, `evaluation.md` and `evaluation.png` (with matplotlib).

        Args:
            directory (`str` or `os.PathLike`):
                Directory to write to; made if it is not there.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "evaluation.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        (directory / "evaluation.md").write_text(self.to_markdown(), encoding="utf-8")
        self.plot(directory / "evaluation.png")

    def plot(self, path: str | os.PathLike) -> None:
        """
        Draws the bits per byte of each mode, and how retrieval changes each document.

        Args:
            path (`str` or `os.PathLike`):
                PNG file to write.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.6), layout="constrained")
        bars, changes = figure.subplots(1, 2)
        values = [self.bits_per_byte(mode) for mode in self.document_bits]
        drawn = bars.bar(list(self.document_bits), values, color="tab:blue")
        bars.bar_label(drawn, fmt="%.4f")
        spread = max(values) - min(values) or max(values)
        bars.set_ylim(max(0.0, min(values) - spread), max(values) + spread / 2)
        bars.set_ylabel("bits per byte (axis cut)")
        for mode in self.document_bits:
            if mode != "off" and "off" in self.document_bits:
                difference = (self.document_bits[mode] - self.document_bits["off"]) / self.document_bytes
                changes.plot(np.sort(difference), label=f"{mode} − off")
        changes.axhline(0.0, color="gray", linewidth=0.8)
        changes.set_xlabel("held-out documents, sorted")
        changes.set_ylabel("bits per byte")
        changes.legend()
        figure.savefig(path, dpi=150)


def evaluate_retro(
    model: PreTrainedModel,
    datastore: RetroDatastore,
    split: DatastoreSplit,
    modes: Sequence[str] = MODES,
    num_neighbors: int = 2,
    window_chunks: int = 32,
    stride_chunks: int = 16,
    batch_size: int = 8,
    max_documents: int | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> RetroEvaluation:
    """
    Measures a RETRO model on whole held-out documents, in sliding windows. Every token is counted once, the end of
    the document included (it has no bytes). A first token that the model has no context for is charged
    `log2(vocab_size)` bits, unless it is the BOS, which is known: so the bits are those of a complete code of the
    text. Runs on all processes of a distributed launch.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A [`RetroForCausalLM`].
        datastore ([`RetroDatastore`]):
            Where the neighbors come from.
        split ([`DatastoreSplit`]):
            The held-out documents, whose neighbors have been found.
        modes (`Sequence[str]`, *optional*, defaults to `("off", "random", "on")`):
            `"off"` without neighbors, `"random"` with chunks drawn from the datastore, `"on"` with the neighbors.
        num_neighbors (`int`, *optional*, defaults to 2):
            Number of neighbors k of a chunk.
        window_chunks (`int`, *optional*, defaults to 32):
            Length of a window in chunks. A window starts at position 0 and sees only the neighbors of its own chunks.
        stride_chunks (`int`, *optional*, defaults to 16):
            Step between windows; smaller than the window, so that a counted token always has context.
        batch_size (`int`, *optional*, defaults to 8):
            Number of windows in a forward pass.
        max_documents (`int`, *optional*):
            Evaluate on the first documents of the split only.
        seed (`int`, *optional*, defaults to 0):
            Seed of the random neighbors and of the bootstrap.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        [`RetroEvaluation`]

    Raises:
        `ValueError`: for unknown modes, a stride that is not smaller than the window, more neighbors than were found,
            or a split without documents.
    """
    unknown = sorted(set(modes) - set(MODES))
    if unknown:
        raise ValueError(f"unknown evaluation modes {', '.join(unknown)}; expected some of {', '.join(MODES)}")
    if not 0 < stride_chunks < window_chunks:
        raise ValueError(
            f"stride_chunks is {stride_chunks}, expected at least 1 and less than window_chunks, {window_chunks}"
        )
    document_offsets = _document_offsets(split.chunks.document_id, max_documents)
    num_chunks = int(document_offsets[-1])
    if num_chunks == 0:
        raise ValueError("the split has no documents to evaluate on")
    if num_neighbors > split.neighbor_ids.shape[1]:
        raise ValueError(
            f"num_neighbors is {num_neighbors}, but {split.neighbor_ids.shape[1]} neighbors a chunk are stored; "
            "run `retro neighbors` with a larger number"
        )

    windows = [
        (offset + start, offset + end, offset + first_counted)
        for offset, length in zip(document_offsets[:-1], np.diff(document_offsets), strict=True)
        for start, end, first_counted in sliding_windows(length, window_chunks, stride_chunks)
    ]
    neighbor_ids = {
        "off": None,
        "random": np.random.default_rng(seed).integers(len(datastore.chunks), size=(num_chunks, num_neighbors)),
        "on": split.neighbor_ids[:num_chunks, :num_neighbors],
    }
    document_bits = {}
    for mode in modes:
        bits, num_tokens = chunk_bits(
            model,
            datastore,
            split,
            windows,
            neighbor_ids[mode],
            batch_size,
            description=f"Evaluating ({mode})" if show_progress else None,
        )
        document_bits[mode] = np.add.reduceat(bits, document_offsets[:-1])

    document_bytes = np.add.reduceat(np.asarray(split.chunks.num_bytes[:num_chunks]), document_offsets[:-1])
    return RetroEvaluation(document_bits, document_bytes, int(num_tokens.sum()), num_neighbors, seed)


def sliding_windows(num_chunks: int, window_chunks: int, stride_chunks: int) -> list[tuple[int, int, int]]:
    """
    Windows over a document of which every chunk is counted in exactly one.

    Args:
        num_chunks (`int`):
            Length of the document in chunks.
        window_chunks (`int`), stride_chunks (`int`):
            Length of a window and step between windows, in chunks.

    Returns:
        `list[tuple[int, int, int]]`: start and end of each window, and the first chunk counted in it.
    """
    windows, counted = [], 0
    for start in range(0, num_chunks, stride_chunks):
        end = min(start + window_chunks, num_chunks)
        windows.append((start, end, counted))
        counted = end
        if end == num_chunks:
            break
    return windows


@torch.inference_mode()
def chunk_bits(
    model: PreTrainedModel,
    datastore: RetroDatastore,
    split: DatastoreSplit,
    windows: Sequence[tuple[int, int, int]],
    neighbor_ids: np.ndarray | None,
    batch_size: int,
    description: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Bits that the model needs for each chunk.

    Args:
        model ([`~transformers.PreTrainedModel`]), datastore ([`RetroDatastore`]), split ([`DatastoreSplit`]):
            See [`evaluate_retro`].
        windows (`Sequence[tuple[int, int, int]]`):
            First chunk, end and first counted chunk of each window, as chunk ids of the split.
        neighbor_ids (`np.ndarray`, *optional*):
            Global chunk ids of the neighbors, int64 `[chunks, k]`. None evaluates without retrieval.
        batch_size (`int`):
            Number of windows in a forward pass.
        description (`str`, *optional*):
            Label of the progress bar; no bar when unset.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: bits float64 and number of counted tokens int64, both `[chunks]`.
    """
    state = PartialState()
    windows = np.array(sorted(windows, key=lambda window: window[1] - window[0]))
    batches = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
    bits = np.zeros(max(end for _, end, _ in windows))
    num_tokens = np.zeros(len(bits), dtype=np.int64)

    was_training = model.training
    model.eval()
    rounds = range(-(-len(batches) // state.num_processes))
    for i in tqdm(rounds, desc=description, disable=description is None or not state.is_main_process):
        # Sharded models need every process in every forward pass, so one without a batch left repeats another's.
        i = i * state.num_processes + state.process_index
        start, end, first_counted = batches[i % len(batches)].T[..., None]
        chunk_ids = start + np.arange((end - start).max())  # [B, L]
        chunk_ids = np.where(chunk_ids < end, chunk_ids, -1)
        nats, counted = _token_nats(model, datastore, split, chunk_ids, neighbor_ids)  # [B, L, m]
        counted &= (chunk_ids >= first_counted)[..., None]
        if i < len(batches):
            chosen = chunk_ids >= first_counted
            bits[chunk_ids[chosen]] = (nats * counted).sum(-1)[chosen] / math.log(2)
            num_tokens[chunk_ids[chosen]] = counted.sum(-1)[chosen]
    model.train(was_training)
    return _sum_over_processes(bits), _sum_over_processes(num_tokens)


def _token_nats(
    model: PreTrainedModel,
    datastore: RetroDatastore,
    split: DatastoreSplit,
    chunk_ids: np.ndarray,
    neighbor_ids: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Nats (float64) and whether they count, each `[B, L, m]`, of the tokens in windows of chunk ids `[B, L]`."""
    input_ids, counted = split.chunks.take(chunk_ids)  # [B, L, m]
    neighbors = {}
    if neighbor_ids is not None:
        ids = np.where((chunk_ids >= 0)[..., None], neighbor_ids[chunk_ids], -1)  # [B, L, k]
        neighbor_input_ids, neighbor_mask = datastore.take_neighbors(ids)  # [B, L, k, r]
        neighbors["neighbor_input_ids"] = torch.from_numpy(neighbor_input_ids).to(model.device)
        neighbors["neighbor_attention_mask"] = torch.from_numpy(neighbor_mask).to(model.device)

    # Padding is on the right, where causal attention never looks from a real token: no mask is needed.
    tokens = torch.from_numpy(input_ids.reshape(len(chunk_ids), -1)).to(model.device)  # [B, T]
    with model.retrieval(False):
        logits = model(input_ids=tokens, use_cache=False, **neighbors).logits[:, :-1].float()
    nats = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").double().cpu().numpy()
    uniform = math.log(model.config.vocab_size)
    nats = np.concatenate([np.full((len(nats), 1), uniform), nats], axis=1).reshape(input_ids.shape)

    bos_token_id = datastore.tokenizer.bos_token_id
    if bos_token_id is not None:
        counted[:, 0, 0] &= input_ids[:, 0, 0] != bos_token_id
    return nats, counted


def _document_offsets(document_id: np.ndarray, max_documents: int | None) -> np.ndarray:
    """First chunk of each document, and the end of the last: int64 `[documents + 1]`."""
    document_id = np.asarray(document_id)
    offsets = np.flatnonzero(np.diff(document_id, prepend=-1))
    offsets = np.append(offsets, len(document_id))
    return offsets if max_documents is None else offsets[: max_documents + 1]


def _sum_over_processes(array: np.ndarray) -> np.ndarray:
    state = PartialState()
    if state.num_processes == 1:
        return array
    return reduce(torch.from_numpy(array).to(state.device), reduction="sum").cpu().numpy()


def bootstrap_interval(
    numerator: np.ndarray, denominator: np.ndarray, num_samples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """
    Confidence interval of `numerator.sum() / denominator.sum()` when documents are drawn anew, with replacement.

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
    generator = np.random.default_rng(seed)
    ratios = np.empty(num_samples)
    for i in range(num_samples):
        drawn = generator.integers(len(numerator), size=len(numerator))
        ratios[i] = numerator[drawn].sum() / denominator[drawn].sum()
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
