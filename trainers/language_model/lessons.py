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
Lessons in reading passages: questions with passages that are read apart, and what is to be answered. Rows of chunks
may stand among them.
"""

import json
from collections import UserDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_prep.chunker import text_beginning
from modeling_retro import RetroJointForCausalLM
from trainers.evaluation.questions import encode_passages

from .collator import ChunkRange, ChunkRows, DataCollatorForRetro


class Lesson(UserDict):
    """
    A lesson of [`ReaderLessons`]. It is not a `dict`, because [`~transformers.Trainer`] removes the entries of a
    `dict` that are not arguments of the model's `forward`.
    """


class ReaderLessons(Dataset):
    """
    The lessons of a file. Each line is a JSON object with the texts of some passages and the questions that are asked
    about them, each with a prompt and its answer:

    ```json
    {"passages": ["The ferry to Lemo leaves at 7:40.\\n"],
     "questions": [{"prompt": "Question: When does the ferry to Lemo leave?\\nAnswer:", "answer": " at 7:40\\n"}]}
    ```

    The index of an item is `epoch * len(dataset) + number`, as
    [`~trainers.language_model.collator.EpochRowSampler`] yields it. The lessons of an epoch come first.

    Args:
        path (`str` or `Path`): The file.
        rows ([`ChunkRows`], *optional*): Rows of text that are read among the lessons.
        row_share (`float`, *optional*, defaults to 0.0): Share of the items that are rows. Each epoch has others.
        seed (`int`, *optional*, defaults to 0): Seed of the order of the rows.

    Raises:
        ValueError: If a line is something else. The message names the line.
    """

    def __init__(self, path: str | Path, rows: ChunkRows | None = None, row_share: float = 0.0, seed: int = 0):
        with open(path, encoding="utf-8") as file:
            self.lessons = [_check_lesson(line, f"{path}, line {number}") for number, line in enumerate(file, start=1)]
        if not self.lessons:
            raise ValueError(f"{path} holds no lessons")
        if not 0.0 <= row_share < 1.0:
            raise ValueError(f"row_share is {row_share}, expected a share from 0 to below 1")
        self.rows = rows
        self.num_rows = 0 if rows is None else round(len(self.lessons) * row_share / (1 - row_share))
        self.order = np.random.default_rng(seed).permutation(0 if rows is None else len(rows))

    def __len__(self) -> int:
        return len(self.lessons) + self.num_rows

    def __getitem__(self, index: int) -> Lesson | ChunkRange:
        epoch, number = divmod(index, len(self))
        if number < len(self.lessons):
            return Lesson(self.lessons[number])
        epoch, number = divmod(epoch * self.num_rows + number - len(self.lessons), len(self.rows))
        return self.rows[epoch * len(self.rows) + int(self.order[number])]


def _check_lesson(line: str, place: str) -> dict[str, Any]:
    expected = (
        'expected {"passages": [texts], "questions": [{"prompt": text, "answer": text}]}, with at least one each'
    )
    try:
        lesson = json.loads(line)
        texts = [*lesson["passages"], *(q[name] for q in lesson["questions"] for name in ("prompt", "answer"))]
        is_lesson = bool(lesson["passages"]) and bool(lesson["questions"]) and all(map(bool, texts))
        is_lesson = is_lesson and all(isinstance(text, str) for text in texts)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{place} is no lesson ({type(error).__name__}: {error}); {expected}") from error
    if not is_lesson:
        raise ValueError(f"{place} is no lesson; {expected}")
    return lesson


@dataclass
class DataCollatorForLessons:
    """
    Turns lessons into the inputs of [`RetroJointForCausalLM`]. Each question becomes a row, with all passages of its
    lesson in sight. Passages that several rows of a batch see are read once.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of the model. Prompts may spell its special tokens, passages may not.
        neighbor_length (`int`):
            Largest number r of tokens of a passage.
        of_rows ([`DataCollatorForRetro`], *optional*):
            Makes the inputs of rows of chunks. A batch has either rows or lessons.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids`, `attention_mask` and `labels` `int64 [B, T]`, with padding in front of
        the rows. Labels are -100 but for the answers. `passage_input_ids` `int64 [B, k, r]` and
        `passage_attention_mask` `bool [B, k, r]`. If the tokenizer begins each text with a BOS token, also
        `passage_prefix_input_ids` `int64 [B, 1]`, since it stands before the passages when questions are answered.
    """

    tokenizer: PreTrainedTokenizerBase
    neighbor_length: int
    of_rows: DataCollatorForRetro | None = None

    def __call__(self, lessons: Sequence[Lesson | ChunkRange]) -> dict[str, torch.Tensor]:
        if any(isinstance(lesson, ChunkRange) for lesson in lessons):
            return self.of_rows(lessons)
        passages = [lesson["passages"] for lesson in lessons for _ in lesson["questions"]]
        questions = [question for lesson in lessons for question in lesson["questions"]]
        prompts, answers = (
            self.tokenizer([question[name] for question in questions], add_special_tokens=False)["input_ids"]
            for name in ("prompt", "answer")
        )
        rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        # The answers end in the last column, so that few predictions are computed that are not needed.
        shape = len(rows), max(map(len, rows))
        input_ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, -100)
        for number, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            input_ids[number, -len(row) :] = torch.tensor(row)
            mask[number, -len(row) :] = 1
            labels[number, -len(answer) :] = torch.tensor(answer)
        passage_ids, passage_mask = encode_passages(self.tokenizer, passages, self.neighbor_length)
        batch = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "labels": labels,
            "passage_input_ids": passage_ids,
            "passage_attention_mask": passage_mask,
        }
        if before := text_beginning(self.tokenizer):
            batch["passage_prefix_input_ids"] = torch.tensor([before] * len(rows))
        return batch


def lesson_losses(
    model: PreTrainedModel, base: RetroJointForCausalLM | None, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The cross entropy of the answers with the passages read apart, and the Kullback-Leibler divergence from the base of
    the model, which reads them in order (block distillation, arXiv 2605.15913). Of a row of chunks, the cross entropy
    of its tokens but those that see random neighbors (`sees_random`), and the divergence of all of them from the base,
    which reads the same neighbors untrained.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, or what wraps it in training.
        base ([`RetroJointForCausalLM`], *optional*):
            The model itself. Its adapters rest while it is the teacher. Without it there is no divergence.
        inputs (`dict[str, torch.Tensor]`):
            What [`DataCollatorForLessons`] makes.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: both losses in nats, summed over the tokens of the answers or of the row.
    """
    inputs = {**inputs, "use_cache": False}
    labels, sees_random = inputs.pop("labels"), inputs.pop("sees_random", None)
    of_teacher, of_reader = {}, {}
    if "passage_input_ids" in inputs:
        of_teacher, of_reader = {"passages": "in_order"}, {"passages": "apart"}
        # A prediction stands one column before its token.
        num_columns = labels.shape[1] - int((labels >= 0).any(0).nonzero()[0, 0])
        inputs["logits_to_keep"] = num_columns + 1
    else:
        num_columns = labels.shape[1] - 1
    labels = labels[:, -num_columns:]
    is_predicted = labels >= 0

    def log_probs(reader: PreTrainedModel, **passages: str) -> torch.Tensor:
        return F.log_softmax(reader(**inputs, **passages).logits[:, :-1][is_predicted].float(), dim=-1)  # [N, V]

    expected = None
    if base is not None:
        # First, because checkpointed layers of the model run again with the adapters that ran last.
        with torch.no_grad(), base.as_base():
            expected = log_probs(base, **of_teacher)
    found = log_probs(model, **of_reader)
    if sees_random is not None:
        labels = labels.masked_fill(sees_random[:, -num_columns:], -100)
    loss = F.nll_loss(found, labels[is_predicted], reduction="sum")
    if expected is None:
        return loss, torch.zeros_like(loss)
    return loss, F.kl_div(found, expected, log_target=True, reduction="sum")


__all__ = ["DataCollatorForLessons", "Lesson", "ReaderLessons", "lesson_losses"]
