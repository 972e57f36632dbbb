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
Questions of public sets with ten passages each, as passages read apart are judged: HotpotQA, 2WikiMultihopQA and
MuSiQue bring their passages, and those of NQ-open, TriviaQA and PopQA are looked up in a datastore.
"""

import json
from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from transformers import PreTrainedTokenizerBase

from modeling_retro.retriever.retriever import RetroRetriever


def public_questions(
    dataset: str,
    tokenizer: PreTrainedTokenizerBase,
    num_passages: int = 10,
    num_questions: int = 200,
    seed: int = 0,
    max_tokens: int = 128,
    config: str | None = None,
    split: str = "validation",
    retriever: RetroRetriever | None = None,
) -> list[dict]:
    """
    Reads the first questions of a public set.

    Args:
        dataset (`str`):
            Hub id or folder of a set whose rows are in the form of NQ-open, TriviaQA, PopQA, HotpotQA, 2WikiMultihopQA
            or MuSiQue.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer that measures passages.
        num_passages (`int`, *optional*, defaults to 10):
            Number of passages. The gold ones are among them, and the others come in the order of the set.
        num_questions (`int`, *optional*, defaults to 200):
            Number of questions.
        seed (`int`, *optional*, defaults to 0):
            Seed of the ranks of the passages.
        max_tokens (`int`, *optional*, defaults to 128):
            Largest number of tokens of a passage. The end of a longer one is left out.
        config (`str`, *optional*):
            Config of the set, such as `"distractor"` of HotpotQA.
        split (`str`, *optional*, defaults to `"validation"`):
            Split of the set.
        retriever ([`RetroRetriever`], *optional*):
            Looks up the passages of questions that come without any.

    Returns:
        `list[dict]`: questions as those of [`~trainers.evaluation.questions.hidden_questions`], with an empty
        `prefix`. Nobody knows which of the passages that were looked up are gold ones, so `gold` is empty then.

    Raises:
        ValueError: If rows have another form, or no passages and there is no retriever.
    """
    generator = np.random.default_rng(seed)
    questions = []
    for row in islice(load_dataset(dataset, config, split=split, streaming=True), num_questions):
        question, answers = _question(row, dataset)
        passages = _passages(row)
        if passages is None:
            if retriever is None:
                raise ValueError(f"the questions of {dataset} come without passages: give a datastore to look them up")
            texts, gold = _look_up(question, retriever, tokenizer, num_passages), []
        else:
            # Gold ones first, so that they are among those that are kept; sorting is stable.
            kept = sorted(passages, key=lambda passage: not passage[1])[:num_passages]
            kept = [kept[n] for n in generator.permutation(len(kept))]
            texts, gold = [text for text, _ in kept], [rank for rank, (_, is_gold) in enumerate(kept) if is_gold]
        questions.append(
            {
                "question": question,
                "prefix": "",
                "answers": [[answer] for answer in answers],
                "passages": [_cut(text, tokenizer, max_tokens) for text in texts],
                "gold": gold,
            }
        )
    return questions


def _question(row: Mapping[str, Any], dataset: str) -> tuple[str, list[str]]:
    """The question of a row and its right answers."""
    answers = row.get("possible_answers", row.get("answer"))
    if "possible_answers" in row and isinstance(answers, str):
        answers = json.loads(answers)  # PopQA
    if isinstance(answers, Mapping):
        answers = [answers["value"], *answers.get("aliases", [])]  # TriviaQA
    if isinstance(answers, str):
        answers = [answers, *row.get("answer_aliases", [])]  # MuSiQue has aliases
    if not isinstance(row.get("question"), str) or not answers:
        raise ValueError(
            f"the rows of {dataset} have the columns {', '.join(row)}; expected `question`, and `answer` or "
            "`possible_answers`"
        )
    return row["question"], list(dict.fromkeys(answers))


def _passages(row: Mapping[str, Any]) -> list[tuple[str, bool]] | None:
    """The passages of a row and whether each is a gold one, or `None` if it has none."""
    if "paragraphs" in row:  # MuSiQue
        return [(f"{p['title']}: {p['paragraph_text']}", p["is_supporting"]) for p in row["paragraphs"]]
    if "context" not in row:
        return None
    context, facts = row["context"], row["supporting_facts"]
    # Lists of columns, or of pairs.
    pairs = zip(context["title"], context["sentences"], strict=True) if isinstance(context, Mapping) else context
    gold = set(facts["title"]) if isinstance(facts, Mapping) else {title for title, _ in facts}
    return [(f"{title}: {' '.join(map(str.strip, sentences))}", title in gold) for title, sentences in pairs]


def _look_up(
    question: str, retriever: RetroRetriever, tokenizer: PreTrainedTokenizerBase, num_passages: int
) -> list[str]:
    tokens = tokenizer(question, add_special_tokens=False, return_tensors="pt")["input_ids"]
    found = retriever.retrieve(tokens, num_passages, attention_mask=torch.ones_like(tokens))
    pairs = zip(found.neighbor_input_ids[0], found.neighbor_attention_mask[0].bool(), strict=True)
    return [tokenizer.decode(ids[mask], skip_special_tokens=True) for ids, mask in pairs if mask.any()]


def _cut(text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> str:
    """As much of a passage as fits, on one line that ends with a line break."""
    text = " ".join(text.split())
    options = {"add_special_tokens": False, "split_special_tokens": True}
    for number in range(max_tokens, 0, -1):
        tokens = tokenizer(text + "\n", **options)["input_ids"]
        if len(tokens) <= max_tokens:
            return text + "\n"
        text = tokenizer.decode(tokens[: number - 1], skip_special_tokens=False).replace("\ufffd", "").strip()
    raise ValueError(f"nothing of a passage fits into {max_tokens} tokens")


__all__ = ["public_questions"]
