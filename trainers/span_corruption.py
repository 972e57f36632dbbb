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
"""T5's span corruption: contiguous spans of a text are replaced by sentinels, and the model writes the spans back."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import xxhash
from transformers import EvalPrediction, PreTrainedTokenizerBase


@dataclass
class DataCollatorForSpanCorruption:
    """
    Batches for the objective of T5 (https://huggingface.co/papers/1910.10683, section 3.1.4). In each row,
    `round(length * noise_density)` tokens are noise; they form `round(noise / mean_noise_span_length)` spans whose
    lengths, like those of the kept spans between them, are drawn uniformly among all ways to cut. A row starts with a
    kept span and ends with a noise span. The inputs hold one sentinel for each noise span, the targets hold the noise
    spans, each after its sentinel; both are cut to their length - 1 and closed with EOS. As in T5's released
    preprocessing, no sentinel closes the targets.

    Rows of `raw_length` tokens make inputs of `input_length` and labels of `target_length` tokens exactly, so texts
    are to be joined and split to `raw_length` beforehand, as [`~data_prep.span_corruption_tasks.load_mixture`] does.
    Shorter rows make shorter inputs, longer ones are cut. A row of one token has no noise.

    The noise is a function of `seed` and of the tokens of the batch: the same in any worker, on any machine, after a
    resume and in each evaluation. An epoch that is shuffled composes other batches, and so draws other noise.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Has a padding and an EOS token and, unless `sentinel_ids` is given, sentinels named `<extra_id_0>`,
            `<extra_id_1>`, …, which are used from the largest id down.
        noise_density (`float`, *optional*, defaults to 0.15):
            Share of the tokens that is noise, between 0 and 1.
        mean_noise_span_length (`float`, *optional*, defaults to 3.0):
            Tokens of a noise span, on average; at least 1. ByT5 uses 20.
        input_length (`int`, *optional*, defaults to 512):
            Tokens of the longest inputs, with sentinels and EOS.
        target_length (`int`, *optional*):
            Tokens of the longest labels, with sentinels and EOS. Defaults to what `raw_length` tokens need.
        seed (`int`, *optional*, defaults to 0):
            Seed of the noise.
        sentinel_ids (`Sequence[int]`, *optional*):
            The sentinels in the order of use, for a vocabulary that names them otherwise. The released ByT5
            checkpoints count down from byte 255, and bytes from 245 are never part of UTF-8: `range(258, 247, -1)`.

    Attributes:
        raw_length (`int`): Tokens of a row that fill `input_length`.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids` int64 [B, inputs], padded; `attention_mask` int64 [B, inputs]; `labels`
        int64 [B, targets], padded with -100. The model makes `decoder_input_ids` of the labels.

    Raises:
        `ValueError`: for a density or span length out of range, a tokenizer without sentinels, padding or EOS, rows
        with more spans than there are sentinels, and rows that hold a sentinel before any noise.

    Example:

    ```python
    >>> from transformers import ByT5Tokenizer
    >>> from trainers.span_corruption import DataCollatorForSpanCorruption

    >>> tokenizer = ByT5Tokenizer()
    >>> collator = DataCollatorForSpanCorruption(tokenizer, noise_density=0.3, input_length=16)
    >>> collator.raw_length, collator.target_length
    (19, 9)
    >>> batch = collator([{"input_ids": tokenizer("Look things up now.", add_special_tokens=False).input_ids}])
    >>> {name: tuple(tensor.shape) for name, tensor in batch.items()}
    {'input_ids': (1, 16), 'attention_mask': (1, 16), 'labels': (1, 9)}

    ```
    """

    tokenizer: PreTrainedTokenizerBase
    noise_density: float = 0.15
    mean_noise_span_length: float = 3.0
    input_length: int = 512
    target_length: int | None = None
    seed: int = 0
    sentinel_ids: Sequence[int] | None = None
    raw_length: int = field(init=False)

    def __post_init__(self):
        if not 0 < self.noise_density < 1:
            raise ValueError(f"noise_density is {self.noise_density}, expected a share between 0 and 1")
        if self.mean_noise_span_length < 1:
            raise ValueError(f"mean_noise_span_length is {self.mean_noise_span_length}, expected at least 1 token")
        if self.tokenizer.pad_token_id is None or self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"span corruption needs a padding and an EOS token; {type(self.tokenizer).__name__} has "
                f"pad_token={self.tokenizer.pad_token!r} and eos_token={self.tokenizer.eos_token!r}"
            )
        sentinels = self.sentinel_ids
        if sentinels is None:
            vocabulary = self.tokenizer.get_vocab()
            sentinels = sorted((i for token, i in vocabulary.items() if re.fullmatch(r"<extra_id_\d+>", token)))[::-1]
        self._sentinels = np.array(sentinels, dtype=np.int64)
        if not len(self._sentinels):
            raise ValueError(
                f"{type(self.tokenizer).__name__} has no sentinels: add them by tokenizer.add_special_tokens("
                '{"additional_special_tokens": [f"<extra_id_{i}>" for i in range(100)]}) and resize the embeddings of '
                "the model, or pass sentinel_ids"
            )
        if len(np.unique(self._sentinels)) < len(self._sentinels):
            raise ValueError(f"sentinel_ids has repeated ids: {self._sentinels.tolist()}")
        self.raw_length, longest_targets = self._fit_lengths()
        if self.target_length is None:
            self.target_length = longest_targets

    def _fit_lengths(self) -> tuple[int, int]:
        # As T5's random_spans_helper: the most tokens whose inputs, with sentinels and EOS, still fit.
        lengths = np.arange(2, int(self.input_length / (1 - self.noise_density)) + 2)
        noise, spans = self.count_noise(lengths)
        fitting = np.flatnonzero(lengths - noise + spans + 1 <= self.input_length)
        if not len(fitting):
            raise ValueError(f"input_length is {self.input_length}, expected at least 3: a token, a sentinel and EOS")
        last = fitting[-1]
        if spans[last] > len(self._sentinels):
            raise ValueError(
                f"input_length={self.input_length} at noise_density={self.noise_density} and mean_noise_span_length="
                f"{self.mean_noise_span_length} makes {spans[last]} spans a row, but there are only "
                f"{len(self._sentinels)} sentinels: shorten input_length, lengthen the spans or add sentinels"
            )
        return int(lengths[last]), int(noise[last] + spans[last] + 1)

    def count_noise(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        Noise tokens and noise spans of rows of `lengths` tokens, both int64. Rounds in float32 and half to even, and
        keeps at least one noise and one kept token, as the reference does; where the reference has no answer, because
        there are more spans than kept tokens, there are as many spans as kept tokens.
        """
        lengths = np.maximum(lengths, 2)
        noise = np.rint(lengths.astype(np.float32) * np.float32(self.noise_density)).astype(np.int64)
        noise = np.clip(noise, 1, lengths - 1)
        spans = np.rint(noise.astype(np.float32) / np.float32(self.mean_noise_span_length)).astype(np.int64)
        return noise, np.clip(spans, 1, np.minimum(noise, lengths - noise))

    def draw_spans(self, lengths: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        Cuts rows of `lengths` tokens [B] into alternating kept and noise spans, as T5's `random_spans_noise_mask`.

        Returns:
            The number of pairs of spans of each row, int64 [B]; tokens of all kept spans, row after row, int64
            [pairs]; tokens of the noise span after each, int64 [pairs]. Only rows below 2 tokens have empty spans.
        """
        noise, spans = self.count_noise(lengths)
        kept_lengths = _cut(np.maximum(lengths, 2) - noise, spans, rng)
        noise_lengths = _cut(noise, spans, rng)
        if lengths.min() < 2:  # the reference cuts a row of two, then drops the end of the mask
            row = np.repeat(np.arange(len(lengths)), spans)
            kept_lengths[lengths[row] == 0] = 0
            noise_lengths[lengths[row] < 2] = 0
        return spans, kept_lengths, noise_lengths

    def __call__(self, features: Sequence[dict]) -> dict[str, torch.Tensor]:
        rows = [np.asarray(feature["input_ids"], dtype=np.int64) for feature in features]
        lengths = np.array([len(row) for row in rows])
        tokens = np.concatenate(rows)
        self._refuse_sentinels(tokens)
        rng = np.random.default_rng([self.seed, xxhash.xxh3_64_intdigest(tokens.tobytes())])
        spans, kept_lengths, noise_lengths = self.draw_spans(lengths, rng)
        if spans.max() > len(self._sentinels):
            raise ValueError(
                f"a row of {lengths[spans.argmax()]} tokens has {spans.max()} spans, but there are only "
                f"{len(self._sentinels)} sentinels: split the texts to raw_length={self.raw_length} tokens"
            )
        is_noise = np.repeat(np.tile([False, True], len(kept_lengths)), np.c_[kept_lengths, noise_lengths].ravel())
        # Inputs: kept tokens, then a sentinel for the noise. Labels: a sentinel for the kept tokens, then the noise.
        inputs, input_mask = self._join(
            tokens[~is_noise], spans, kept_lengths, noise_lengths > 0, kept_lengths, self.input_length
        )
        labels, label_mask = self._join(
            tokens[is_noise], spans, noise_lengths, kept_lengths > 0, np.zeros_like(kept_lengths), self.target_length
        )
        inputs[~input_mask] = self.tokenizer.pad_token_id
        labels[~label_mask] = -100
        return {
            "input_ids": torch.from_numpy(inputs),
            "attention_mask": torch.from_numpy(input_mask.astype(np.int64)),
            "labels": torch.from_numpy(labels),
        }

    def is_special(self, tokens: np.ndarray) -> np.ndarray:
        """True where labels of any shape hold no token of the text: sentinels, EOS, padding."""
        return np.isin(tokens, [*self._sentinels, self.tokenizer.eos_token_id, -100])

    def _refuse_sentinels(self, tokens: np.ndarray) -> None:
        suspects = tokens[(tokens >= self._sentinels.min()) & (tokens <= self._sentinels.max())]
        if (reserved := suspects[np.isin(suspects, self._sentinels)]).size:
            raise ValueError(
                f"token {reserved[0]} of the text is a sentinel; tokenize with add_special_tokens=False, "
                "split_special_tokens=True"
            )

    def _join(
        self,
        tokens: np.ndarray,
        spans: np.ndarray,
        span_lengths: np.ndarray,
        has_sentinel: np.ndarray,
        sentinel_offset: np.ndarray,
        length: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """
        Writes the rows of spans, each with its sentinel `sentinel_offset` tokens from its begin, cut to `length` - 1
        and closed with EOS. Returns the rows int64 [B, longest] and the mask bool [B, longest] of what they hold.
        """
        last_span = np.cumsum(spans) - 1
        row = np.repeat(np.arange(len(spans)), spans)
        number = np.arange(len(row)) - (last_span + 1 - spans)[row]
        ends = np.cumsum(span_lengths + has_sentinel)
        sizes = np.diff(ends[last_span], prepend=0)
        begins = ends - (span_lengths + has_sentinel) - (ends[last_span] - sizes)[row]
        column = np.arange(sizes.max() + 1)
        place = (row * len(column) + begins + sentinel_offset)[has_sentinel]

        is_token = column < sizes[:, None]
        is_token.ravel()[place] = False
        joined = np.empty(is_token.shape, dtype=np.int64)
        joined[is_token] = tokens
        joined.ravel()[place] = self._sentinels[number[has_sentinel]]
        sizes = np.minimum(sizes, length - 1)
        joined[np.arange(len(sizes)), sizes] = self.tokenizer.eos_token_id
        return joined[:, :length], column[:length] <= sizes[:, None]


def _cut(num_items: np.ndarray, num_segments: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """
    Cuts `num_items` [B] things into `num_segments` [B] segments of at least one, all ways being equally likely.
    Returns the lengths of all segments, row after row, int64 [sum of `num_segments`].
    """
    item = np.arange(num_items.max())
    keys = rng.random((len(num_items), len(item)))
    keys[:, 0] = -1.0  # the first item always begins a segment; the smallest keys say which others do
    keys[item >= num_items[:, None]] = 2.0
    threshold = np.take_along_axis(np.sort(keys, axis=1), num_segments[:, None] - 1, axis=1)
    begins = np.flatnonzero(keys <= threshold)
    ends = np.append(begins[1:], 0)
    ends[np.cumsum(num_segments) - 1] = np.arange(len(num_items)) * len(item) + num_items
    return ends - begins


def span_metrics(collator: DataCollatorForSpanCorruption) -> Callable[[EvalPrediction], dict[str, float]]:
    """
    Makes the `compute_metrics` of a Trainer: `span_accuracy`, the share of the noise tokens that the model names
    right, sentinels and EOS not counted, and `unigram_entropy`, the loss in nats of the best model without context.
    """

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        labels = prediction.label_ids
        tokens = labels[labels != -100]
        is_right = prediction.predictions[labels != -100] == tokens
        share = np.unique(tokens, return_counts=True)[1] / len(tokens)
        return {
            "span_accuracy": float(is_right[~collator.is_special(tokens)].mean()),
            "unigram_entropy": float(-(share * np.log(share)).sum()),
        }

    return compute_metrics
