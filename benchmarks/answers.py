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
Questions whose answers stand in given passages, answered by the same model in several ways: without the passages,
with all of them or the right ones in front, with them as neighbors, and as rivals do that read passages apart. The
passages are docstrings of an installed package or other documents. They have hidden facts or hold the answers
themselves.

    python benchmarks/answers.py --output_dir answers --kinds one_key --num_passages 1 2 4 10
    python benchmarks/answers.py --output_dir hotpot --dataset hotpotqa/hotpot_qa --dataset_config distractor
    python benchmarks/answers.py --output_dir read --kinds lookup --package sklearn --reader smollm2-135m-instruct

The answers are kept, so that the same command run again goes on where it stopped.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_prep.arguments import parse_arguments, run_command
from data_prep.chunker import text_beginning
from data_prep.docstrings import read_docstrings
from data_prep.shipped_models import find_smollm2
from modeling_retro import RetroJointForCausalLM, RetroRetriever
from trainers.evaluation.passage_rivals import RIVALS, answer_by_rival
from trainers.evaluation.public_questions import public_questions
from trainers.evaluation.questions import KINDS, MAX_ANSWER_TOKENS, encode_passages, score_question
from trainers.evaluation.text_questions import TEXT_KINDS, make_questions
from trainers.prompts import PromptEncoder


PROMPT = "Question: {question}\nAnswer: {prefix}"
Inputs = dict[str, torch.Tensor | str]


@dataclass
class QuestionsArguments:
    """Arguments of this benchmark."""

    output_dir: str = field(metadata={"help": "Folder for the answers; it is continued."})
    model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the decoder. Defaults to SmolLM2-135M-Instruct."}
    )
    reader: str | None = field(default=None, metadata={"help": "Adapters that were trained to read neighbors."})
    package: str = field(default="transformers", metadata={"help": "Package whose docstrings become passages."})
    documents: str | None = field(
        default=None, metadata={"help": "JSON lines file whose texts (key `text`) become passages, not docstrings."}
    )
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Hub id of a public set, such as hotpotqa/hotpot_qa, whose questions take the place of kinds."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Its config, such as distractor."})
    datastore: str | None = field(
        default=None, metadata={"help": "Datastore to look up the passages of a public set that brings none."}
    )
    kinds: list[str] = field(default_factory=lambda: ["one_key"], metadata={"help": "Kinds of questions."})
    num_passages: list[int] = field(default_factory=lambda: [1, 2, 4, 10], metadata={"help": "Numbers of passages."})
    ways: list[str] = field(
        default_factory=lambda: list(ALL_WAYS),
        metadata={"help": "Ways to answer. All are in the tables as far as they are."},
    )
    num_questions: int = field(default=200, metadata={"help": "Number of questions of each kind."})
    batch_size: int = field(default=8, metadata={"help": "Number of questions in a batch."})
    dtype: str = field(default="bfloat16", metadata={"help": "Computing type.", "choices": ["float32", "bfloat16"]})


def pad_left(rows: Sequence[Sequence[int]], multiple: int = 1) -> dict[str, torch.Tensor]:
    """Rows of tokens with hidden padding in front. The last column is at the end of a multiple of positions."""
    lengths = torch.tensor([len(row) for row in rows])
    num_columns = -(-int(lengths.max()) // multiple) * multiple
    columns = torch.arange(num_columns)
    mask = columns >= num_columns - lengths[:, None]
    input_ids = torch.zeros(mask.shape, dtype=torch.long)
    input_ids[mask] = torch.tensor([token for row in rows for token in row])
    return {"input_ids": input_ids, "attention_mask": mask.long()}


def closed_book(batch: list[dict], tokenizer: PreTrainedTokenizerBase, model: RetroJointForCausalLM) -> Inputs:
    """The question alone."""
    return pad_left([[*text_beginning(tokenizer), *row] for row in prompts(batch, tokenizer)])


def in_front(batch: list[dict], tokenizer: PreTrainedTokenizerBase, model: RetroJointForCausalLM) -> Inputs:
    """The passages as text in front of the question."""
    rows = prompts(batch, tokenizer)
    passages, mask = encode_passages(tokenizer, [each["passages"] for each in batch], model.config.neighbor_length)
    texts = [tokens[kept].tolist() for tokens, kept in zip(passages, mask, strict=True)]
    return pad_left([[*text_beginning(tokenizer), *text, *row] for text, row in zip(texts, rows, strict=True)])


def gold_in_front(batch: list[dict], tokenizer: PreTrainedTokenizerBase, model: RetroJointForCausalLM) -> Inputs:
    """Only the passages with the answer, as text in front of the question."""
    gold = [{**each, "passages": [each["passages"][rank] for rank in each["gold"]]} for each in batch]
    return (
        in_front(gold, tokenizer, model)
        if any(each["gold"] for each in batch)
        else closed_book(batch, tokenizer, model)
    )


def closed_chunk(batch: list[dict], tokenizer: PreTrainedTokenizerBase, model: RetroJointForCausalLM) -> Inputs:
    """The passages as neighbors of a chunk that ends with the question, so that its last token alone sees them."""
    size = model.config.chunk_size
    inputs = pad_left(prompts(batch, tokenizer), multiple=size)
    num_columns = inputs["input_ids"].shape[1]
    passages, mask = encode_passages(tokenizer, [each["passages"] for each in batch], model.config.neighbor_length)
    slots = (len(batch), num_columns // size, *passages.shape[1:])
    neighbor_ids, neighbor_mask = torch.zeros(slots, dtype=torch.long), torch.zeros(slots, dtype=torch.bool)
    neighbor_ids[:, -1], neighbor_mask[:, -1] = passages, mask
    position_ids = torch.arange(num_columns) * inputs["attention_mask"]
    neighbors = {"neighbor_input_ids": neighbor_ids, "neighbor_attention_mask": neighbor_mask}
    return {**inputs, **neighbors, "position_ids": position_ids}


def passages_of_question(passages: str) -> Callable[..., Inputs]:
    """The passages in sight of the whole question and of its answer."""

    def inputs(batch: list[dict], tokenizer: PreTrainedTokenizerBase, model: RetroJointForCausalLM) -> Inputs:
        texts = [each["passages"] for each in batch]
        input_ids, mask = encode_passages(tokenizer, texts, model.config.neighbor_length)
        given = {"passage_input_ids": input_ids, "passage_attention_mask": mask, "passages": passages}
        if before := text_beginning(tokenizer):
            prefix = pad_left([before] * len(batch))
            given |= {f"passage_prefix_{name}": values for name, values in prefix.items()}
        return {**pad_left(prompts(batch, tokenizer)), **given}

    return inputs


@lru_cache(maxsize=1)
def prompt_encoder(tokenizer: PreTrainedTokenizerBase) -> PromptEncoder:
    """The encoder of conversations, whose chat template has a process of its own."""
    return PromptEncoder(tokenizer)


def conversation(way: str) -> Callable[..., Inputs]:
    """
    The question as a message in the chat template, whose answer has begun. The passages stand in front of the template
    (`pasted_in_front`), or inside the message, as text (`pasted`) or in sight, `apart` or `in_order`.
    """

    def inputs(batch: list[dict], tokenizer: PreTrainedTokenizerBase, model: RetroJointForCausalLM) -> Inputs:
        texts = [each["passages"] for each in batch]
        input_ids, mask = encode_passages(tokenizer, texts, model.config.neighbor_length)
        messages = [[{"role": "user", "content": each["question"]}] for each in batch]
        before, rows = zip(*map(prompt_encoder(tokenizer).encode_question, messages))
        begun = tokenizer([each["prefix"] for each in batch], add_special_tokens=False)["input_ids"]
        rows = [row + first for row, first in zip(rows, begun, strict=True)]
        if way in ("apart", "in_order"):
            prefix = {f"passage_prefix_{name}": x for name, x in pad_left(before).items()}
            given = {"passage_input_ids": input_ids, "passage_attention_mask": mask, "passages": way}
            return {**pad_left(rows), **given, **prefix}
        front = [tokens[kept].tolist() for tokens, kept in zip(input_ids, mask, strict=True)]
        parts = zip(before, front, rows) if way == "pasted" else zip(front, before, rows)
        return pad_left([sum(part, []) for part in parts])

    return inputs


WAYS: dict[str, Callable[..., Inputs]] = {
    "closed_book": closed_book,
    "gold_in_front": gold_in_front,
    "in_front": in_front,
    "closed_chunk": closed_chunk,
    "apart": passages_of_question("apart"),
    "in_order": passages_of_question("in_order"),
}
WAYS |= {f"chat_{way}": conversation(way) for way in ("pasted_in_front", "pasted", "apart", "in_order")}


ALL_WAYS = list(dict.fromkeys([*WAYS, *RIVALS]))  # the passages in front are the same way twice


def prompts(batch: list[dict], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of the questions."""
    return tokenizer([PROMPT.format(**each).rstrip() for each in batch], add_special_tokens=False)["input_ids"]


def answer_batch(
    batch: list[dict], way: str, model: RetroJointForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[str], list[dict]]:
    """The answers of a batch by `generate()`."""
    inputs = WAYS[way](batch, tokenizer, model)
    output = model.generate(
        **inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts, [{} for _ in batch]


def answer_one(
    batch: list[dict], way: str, model: RetroJointForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[str], list[dict]]:
    """The answers of a rival, one question at a time, with their operations and the bytes that it stores."""
    texts, measured = [], []
    prefix = tokenizer("Passages:\n", add_special_tokens=False)["input_ids"]
    for asked, row in zip(batch, prompts(batch, tokenizer), strict=True):
        passages, mask = encode_passages(tokenizer, [asked["passages"]], model.config.neighbor_length)
        ids = [tokens[kept].tolist() for tokens, kept in zip(passages[0], mask[0], strict=True)]
        found = answer_by_rival(model.decoder, ids, row, way, MAX_ANSWER_TOKENS, prefix)
        texts.append(tokenizer.decode(found.tokens, skip_special_tokens=True))
        names = ("operations", "stored_operations", "stored_bytes")
        measured.append({name: getattr(found, name) for name in names})
    return texts, measured


@torch.inference_mode()
def answer(
    questions: list[dict],
    way: str,
    path: Path,
    model: RetroJointForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
) -> None:
    """Answers the questions whose answers the file does not hold yet, and adds them to it."""
    done = len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0
    for start in range(done, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        begin = time.perf_counter()
        texts, measured = (answer_batch if way in WAYS else answer_one)(batch, way, model, tokenizer)
        seconds = (time.perf_counter() - begin) / len(batch)
        lines = [
            {"answer": text, **score_question(asked, [text]), "seconds": seconds, **more}
            for asked, text, more in zip(batch, texts, measured, strict=True)
        ]
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))


def read_table(folder: Path, kinds: Sequence[str], num_passages: Sequence[int]) -> list[str]:
    """Lines of a Markdown table: exact match of each way, and its share of the passages in front."""
    lines = [f"| questions | passages | {' | '.join(ALL_WAYS)} |", "|---" * (len(ALL_WAYS) + 2) + "|"]
    for kind in kinds:
        for number in num_passages:
            found = {}
            for way in ALL_WAYS:
                path = folder / f"{kind}-{number}-{way}.jsonl"
                if path.exists():
                    scores = [json.loads(line)["exact_match"] for line in path.read_text("utf-8").splitlines()]
                    found[way] = (np.mean(scores), len(scores))
            cells = []
            for way in ALL_WAYS:
                cell = f"{found[way][0]:.3f}" if way in found else "–"
                if way in found and found.get("in_front", (0, 0))[0] and way not in ("closed_book", "in_front"):
                    cell += f" ({found[way][0] / found['in_front'][0]:.0%})"
                cells.append(cell)
            numbers = {number for _, number in found.values()}
            asked = "–".join(map(str, sorted({min(numbers), max(numbers)}))) if numbers else "0"
            lines.append(f"| {kind}, {asked} | {number} | {' | '.join(cells)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(QuestionsArguments, argv=argv, description=__doc__)
    for name, chosen, known in (("ways", arguments.ways, ALL_WAYS), ("kinds", arguments.kinds, (*KINDS, *TEXT_KINDS))):
        unknown = sorted(set(chosen) - set(known))
        if unknown:
            raise ValueError(f"--{name} has {', '.join(unknown)}; expected some of {', '.join(known)}")
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    source = arguments.model or find_smollm2(folder / "smollm2")
    tokenizer = AutoTokenizer.from_pretrained(source)
    reader = {} if arguments.reader is None else {"reader": arguments.reader}
    model = RetroJointForCausalLM.from_decoder_pretrained(source, dtype=getattr(torch, arguments.dtype), **reader)
    model.eval()
    if arguments.dataset is not None:
        retriever = None if arguments.datastore is None else RetroRetriever.from_pretrained(arguments.datastore)
        arguments.kinds = [arguments.dataset.replace("/", "--")]

        def make(kind: str, number: int) -> list[dict]:
            return public_questions(
                arguments.dataset,
                tokenizer,
                number,
                arguments.num_questions,
                config=arguments.dataset_config,
                retriever=retriever,
            )
    else:
        if arguments.documents is None:
            texts = [document["text"] for document in read_docstrings([arguments.package])]
        else:
            texts = [json.loads(line)["text"] for line in Path(arguments.documents).read_text("utf-8").splitlines()]

        def make(kind: str, number: int) -> list[dict]:
            return make_questions(kind, texts, tokenizer, number, arguments.num_questions)

    for number in arguments.num_passages:
        for kind in arguments.kinds:
            questions = make(kind, number)
            for way in arguments.ways:
                path = folder / f"{kind}-{number}-{way}.jsonl"
                answer(questions, way, path, model, tokenizer, arguments.batch_size)
                print("\n".join(read_table(folder, arguments.kinds, arguments.num_passages)), flush=True)


if __name__ == "__main__":
    run_command(main)
