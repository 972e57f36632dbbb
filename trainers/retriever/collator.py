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
"""Makes batches of pairs: one stacked batch for one forward pass, or one batch for each side of a pair"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase
from transformers.data.data_collator import DataCollatorMixin

from data_prep.pairs.pairs import hash_texts, pair_columns
from data_prep.pairs.records import PairFormat


_TENSORS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass
class SiameseDataCollator(DataCollatorMixin):
    """
    Stacks anchors, positives and hard negatives into one batch for one forward pass.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizes columns of text and pads them.
        max_length (`int`, *optional*):
            Longer texts are cut to this number of tokens. Defaults to the tokenizer's `model_max_length`.
        pad_to_multiple_of (`int`, *optional*):
            The length of the batch is padded to a multiple of this number. Defaults to the length of the longest text.
        separate (`bool`, *optional*, defaults to `False`):
            Whether to return each column as tensors of its own, padded to its own longest text.

    The rows have the columns `anchor`, `positive`, `negative_1`, …, or if they are already tokenized,
    `anchor_input_ids` and so on, or `input_ids_q1`, `input_ids_q2` and so on with any suffixes, of which the first is
    the anchor (`anchor_attention_mask` and `attention_mask_q1` are optional). If the documents are known, they also
    have `anchor_document_id` and so on. A label of 0 is refused in a stacked batch, whose rows are all pairs.

    Returns (with C columns, B rows, T the longest length):
        `dict[str, torch.Tensor]`: `input_ids` and `attention_mask` `int64 [C * B, T]` with all anchors first,
        `text_ids` `int64 [C, B]`, which are equal for equal texts, and `document_ids` `int64 [C, B]`, if the documents
        are known. With `separate`, for each column `input_ids_q1` and `attention_mask_q1` (or `anchor_input_ids` and
        so on) `int64 [B, T]` with a T of its own, and `labels` `[B]`, if the rows have labels.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from trainers import SiameseDataCollator

    >>> tokenizer = AutoTokenizer.from_pretrained("google-bert/bert-base-uncased")
    >>> rows = [
    ...     {"input_ids_q1": [101, 7, 102], "input_ids_q2": [101, 8, 9, 102], "labels": 1},
    ...     {"input_ids_q1": [101, 5, 102], "input_ids_q2": [101, 6, 102], "labels": 1},
    ... ]
    >>> SiameseDataCollator(tokenizer)(rows)["input_ids"]
    tensor([[101,   7, 102,   0],
            [101,   5, 102,   0],
            [101,   8,   9, 102],
            [101,   6, 102,   0]])
    >>> batch = SiameseDataCollator(tokenizer, separate=True)(rows)
    >>> list(batch)
    ['input_ids_q1', 'attention_mask_q1', 'input_ids_q2', 'attention_mask_q2', 'labels']
    >>> batch["input_ids_q2"]
    tensor([[101,   8,   9, 102],
            [101,   6, 102,   0]])
    ```
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    separate: bool = False
    return_tensors: str = "pt"

    def __post_init__(self):
        if self.tokenizer.pad_token_id is None:
            raise ValueError(
                f"{self.tokenizer.name_or_path or type(self.tokenizer).__name__} has no padding token; set "
                "`tokenizer.pad_token`, to `tokenizer.eos_token` for instance"
            )

    def torch_call(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        columns = pair_columns(examples[0].keys())
        self._check(examples, columns)
        label = PairFormat().label_of(list(examples[0]))
        if self.separate:
            batch = {}
            for column in columns:
                name = column if "input_ids" in column else f"{column}_input_ids"
                found = self._encode(examples, [column])
                batch |= {name.replace("input_ids", key): found[key] for key in _TENSORS if key in found}
            if label is not None:
                batch["labels"] = torch.as_tensor(np.asarray([example[label] for example in examples]))
            return batch
        for row, example in enumerate(examples if label is not None else []):
            if not PairFormat().is_positive(example[label], label):
                raise ValueError(
                    f"{label} of row {row} of the batch is {example[label]!r}: its texts do not belong together; "
                    "`data_prep.pairs.pairs.keep_positives` removes such rows, and `separate=True` returns the labels"
                )
        texts = [example[column] for column in columns for example in examples]
        batch = self._encode(examples, columns)
        result = {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "text_ids": torch.from_numpy(hash_texts(texts).reshape(len(columns), len(examples))),
        }
        document_columns = [
            column.replace("input_ids", "document_id") if "input_ids" in column else f"{column}_document_id"
            for column in columns
        ]
        if not examples[0].keys().isdisjoint(document_columns):
            document_ids = [[example.get(column, -1) for example in examples] for column in document_columns]
            result["document_ids"] = torch.tensor(document_ids, dtype=torch.int64)
        return result

    def _check(self, examples: Sequence[Mapping[str, Any]], columns: list[str]) -> None:
        for row, example in enumerate(examples):
            for name in set(pair_columns(example.keys())) ^ set(columns):
                raise ValueError(
                    f"{name} is in some rows only: row 0 has {', '.join(columns)}, row {row} does not have the same; "
                    "a batch has equally many hard negatives in all rows"
                )
            for column in columns:
                text = example[column]
                if text is None or len(text.strip() if isinstance(text, str) else text) == 0:
                    raise ValueError(
                        f"{column} of row {row} of the batch is {text!r}, expected a text or tokens; a hard negative "
                        "is there in all rows or in none"
                    )

    def _encode(self, examples: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Mapping[str, Tensor]:
        """Tokenizes or pads the texts of some columns, one column after the other."""
        texts = [example[column] for column in columns for example in examples]
        if "input_ids" not in columns[0]:
            return self.tokenizer(
                texts,
                truncation=True,
                max_length=self.max_length,
                padding=True,
                pad_to_multiple_of=self.pad_to_multiple_of,
                # Text that spells a special token is tokenized as text.
                split_special_tokens=True,
                return_token_type_ids=False,
                return_attention_mask=True,
                return_tensors="pt",
            )
        features = {}
        for key in _TENSORS:
            names = [column.replace("input_ids", key) for column in columns]
            if all(name in examples[0] for name in names):
                rows = [example[name] for name in names for example in examples]
                features[key] = [np.asarray(row)[: self.max_length].tolist() for row in rows]
        return self.tokenizer.pad(features, pad_to_multiple_of=self.pad_to_multiple_of, return_tensors="pt")


def stack_columns(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    Stacks the separate tensors of the columns of a batch, such as those of a notebook's own collator.

    Args:
        batch (`Mapping[str, torch.Tensor]`):
            `input_ids_q1` and `attention_mask_q1` `[B, T]` for two or more suffixes, or `anchor_input_ids` and so on,
            and optionally `labels` `[B]`.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids` and `attention_mask` `[C * B, T]` and `text_ids` `[C, B]`, as
        [`SiameseDataCollator`] gives them.

    Raises:
        `ValueError`: if a mask is missing, or a label is not 1.
    """
    columns = pair_columns(batch.keys())
    label = PairFormat().label_of(list(batch))
    if label is not None and not bool((batch[label] == 1).all()):
        raise ValueError(
            f"the {label} of a batch are {batch[label].tolist()}, expected 1: texts that do not belong together "
            "cannot be trained as pairs; leave such rows out of the dataset"
        )
    missing = [column for column in columns if column.replace("input_ids", "attention_mask") not in batch]
    if missing:
        raise ValueError(f"{missing[0]} has no mask {missing[0].replace('input_ids', 'attention_mask')}")
    length = max(batch[column].shape[1] for column in columns)
    stacked = {}
    for key in ("input_ids", "attention_mask"):
        tensors = [batch[column.replace("input_ids", key)] for column in columns]
        stacked[key] = torch.cat([pad(tensor, (0, length - tensor.shape[1])) for tensor in tensors])
    rows = zip(stacked["input_ids"].cpu().numpy(), stacked["attention_mask"].cpu().numpy() != 0, strict=True)
    text_ids = torch.from_numpy(hash_texts([tokens[mask] for tokens, mask in rows]))
    stacked["text_ids"] = text_ids.view(len(columns), -1).to(stacked["input_ids"].device)
    return stacked
