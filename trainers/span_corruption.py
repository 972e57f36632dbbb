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
"""The span corruption of T5: spans of a text are replaced by sentinels, and the model learns to restore them"""

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
    Makes batches for the objective of T5 (https://huggingface.co/papers/1910.10683, section 3.1.4). In each row,
    `round(length * noise_density)` tokens are noise. They form `round(noise / mean_noise_span_length)` spans. The
    lengths of these spans, and those of the kept spans between them, are drawn uniformly among all ways to cut. A row
    starts with a kept span and ends with a noise span. The inputs hold one sentinel in place of each noise span, and
    the targets hold the noise spans, each after its sentinel. Both are cut to their length - 1, and EOS is added. As
    in the released preprocessing of T5, the targets do not end with a sentinel.

    Rows of `raw_length` tokens give inputs of exactly `input_length` and labels of exactly `target_length` tokens.
    Join the texts and split them to `raw_length` beforehand, as [`~data_prep.span_corruption.tasks.load_mixture`]
    does. Shorter rows give shorter inputs, and longer rows are cut. A row of one token has no noise.

    The noise depends only on `seed` and on the tokens of the batch. It is the same in any worker, on any machine,
    after a resume and in each evaluation. A shuffled epoch has other batches and therefore other noise.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer, with a padding and an EOS token. Unless `sentinel_ids` is given, it must also have sentinels
            named `<extra_id_0>`, `<extra_id_1>`, …, which are used from the largest id down.
        noise_density (`float`, *optional*, defaults to 0.15):
            Share of the tokens that is noise, between 0 and 1.
        mean_noise_span_length (`float`, *optional*, defaults to 3.0):
            Mean number of tokens in a noise span, at least 1. ByT5 uses 20.
        input_length (`int`, *optional*, defaults to 512):
            Number of tokens of the longest inputs, with sentinels and EOS.
        target_length (`int`, *optional*):
            Number of tokens of the longest labels, with sentinels and EOS. Defaults to the number that `raw_length`
            tokens need.
        seed (`int`, *optional*, defaults to 0):
            Seed of the noise.
        sentinel_ids (`Sequence[int]`, *optional*):
            The sentinels in the order of use, for a vocabulary in which they have other names. The released
            checkpoints of ByT5 count down from byte 255, and bytes from 245 on are not used in UTF-8: `range(258, 247,
            -1)`.

    Attributes:
        raw_length (`int`): Number of tokens of a row that gives `input_length` tokens.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids` int64 [B, inputs], padded, `attention_mask` int64 [B, inputs], and
        `labels` int64 [B, targets], padded with -100. The model makes `decoder_input_ids` from the labels.

    Raises:
        `ValueError`: if the density or the span length is out of range, if the tokenizer lacks sentinels, padding or
            EOS, if a row has more spans than there are sentinels, or if a row already holds a sentinel.

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
        # As in T5's random_spans_helper: the largest number of tokens whose inputs, with sentinels and EOS, still fit.
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
        Computes the numbers of noise tokens and of noise spans in rows of `lengths` tokens, both int64. Like the
        reference, it rounds in float32 and half to even, and keeps at least one noise token and one kept token. The
        reference fails if there are more spans than kept tokens. Here there are then as many spans as kept tokens.
        """
        lengths = np.maximum(lengths, 2)
        noise = np.rint(lengths.astype(np.float32) * np.float32(self.noise_density)).astype(np.int64)
        noise = np.clip(noise, 1, lengths - 1)
        spans = np.rint(noise.astype(np.float32) / np.float32(self.mean_noise_span_length)).astype(np.int64)
        return noise, np.clip(spans, 1, np.minimum(noise, lengths - noise))

    def draw_spans(self, lengths: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        Cuts rows of `lengths` tokens [B] into alternating kept and noise spans, like T5's `random_spans_noise_mask`.

        Returns:
            The number of pairs of spans in each row, int64 [B], the lengths of all kept spans, row after row, int64
            [pairs], and the lengths of the noise spans after them, int64 [pairs]. Only rows of fewer than 2 tokens
            have empty spans.
        """
        noise, spans = self.count_noise(lengths)
        kept_lengths = _cut(np.maximum(lengths, 2) - noise, spans, rng)
        noise_lengths = _cut(noise, spans, rng)
        if lengths.min() < 2:  # the reference cuts a row of two and drops the end of the mask
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
        # Inputs hold kept tokens and then a sentinel for the noise. Labels hold a sentinel for these and then the
        # noise.
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
        """True where labels of any shape hold a sentinel, EOS or padding instead of a token of the text."""
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
        Writes rows of spans. Each span has its sentinel `sentinel_offset` tokens after its beginning. Rows are cut to
        `length` - 1, and EOS is added. Returns the rows int64 [B, longest] and their mask bool [B, longest].
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
    Cuts `num_items` [B] items into `num_segments` [B] segments of at least one item. All ways to cut are equally
    likely. Returns the lengths of all segments, row after row, int64 [sum of `num_segments`].
    """
    item = np.arange(num_items.max())
    keys = rng.random((len(num_items), len(item)))
    keys[:, 0] = -1.0  # the first item begins a segment, and so do those with the smallest keys
    keys[item >= num_items[:, None]] = 2.0
    threshold = np.take_along_axis(np.sort(keys, axis=1), num_segments[:, None] - 1, axis=1)
    begins = np.flatnonzero(keys <= threshold)
    ends = np.append(begins[1:], 0)
    ends[np.cumsum(num_segments) - 1] = np.arange(len(num_items)) * len(item) + num_items
    return ends - begins


def span_metrics(collator: DataCollatorForSpanCorruption) -> Callable[[EvalPrediction], dict[str, float]]:
    """
    Makes the function `compute_metrics` of a Trainer. It returns `span_accuracy`, the share of the noise tokens that
    the model predicts correctly, without sentinels and EOS, and `unigram_entropy`, the loss in nats of the best model
    without context.
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
