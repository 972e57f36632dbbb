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
with them in front, and with them as neighbors. The passages are docstrings of an installed package, in which facts are
hidden or which hold the answers themselves.

    python benchmarks/answers.py --output_dir answers --kinds one_key --num_passages 1 2 4 10

The answers are kept, so that the same command run again goes on where it stopped.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_prep.arguments import parse_arguments, run_command
from data_prep.docstrings import read_docstrings
from modeling_retro import RetroJointForCausalLM
from trainers.evaluation.questions import KINDS, MAX_ANSWER_TOKENS, encode_passages, score_question
from trainers.evaluation.text_questions import TEXT_KINDS, make_questions
from trainers.smollm2 import find_smollm2


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
    package: str = field(default="transformers", metadata={"help": "Package whose docstrings hide the facts."})
    kinds: list[str] = field(default_factory=lambda: ["one_key"], metadata={"help": "Kinds of questions."})
    num_passages: list[int] = field(default_factory=lambda: [1, 2, 4, 10], metadata={"help": "Numbers of passages."})
    ways: list[str] = field(
        default_factory=lambda: list(WAYS),
        metadata={"help": "Ways to answer. All are in the table as far as they are."},
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
    return pad_left(prompts(batch, tokenizer))


def in_front(batch: list[dict], tokenizer: PreTrainedTokenizerBase, model: RetroJointForCausalLM) -> Inputs:
    """The passages as text in front of the question."""
    rows = prompts(batch, tokenizer)
    passages, mask = encode_passages(tokenizer, [each["passages"] for each in batch], model.config.neighbor_length)
    return pad_left([tokens[kept].tolist() + row for tokens, kept, row in zip(passages, mask, rows, strict=True)])


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
        return {**pad_left(prompts(batch, tokenizer)), **given}

    return inputs


WAYS: dict[str, Callable[..., Inputs]] = {
    "closed_book": closed_book,
    "in_front": in_front,
    "closed_chunk": closed_chunk,
    "apart": passages_of_question("apart"),
    "in_order": passages_of_question("in_order"),
}


def prompts(batch: list[dict], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of the questions."""
    return tokenizer([PROMPT.format(**each) for each in batch], add_special_tokens=False)["input_ids"]


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
        inputs = WAYS[way](batch, tokenizer, model)
        begin = time.perf_counter()
        output = model.generate(
            **inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
        seconds = (time.perf_counter() - begin) / len(batch)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        lines = [
            {"answer": text, **score_question(asked, [text]), "seconds": seconds}
            for asked, text in zip(batch, texts, strict=True)
        ]
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))


def read_table(folder: Path, kinds: Sequence[str], num_passages: Sequence[int]) -> list[str]:
    """Lines of a Markdown table: exact match of each way, and its share of the passages in front."""
    lines = [f"| questions | passages | {' | '.join(WAYS)} |", "|---" * (len(WAYS) + 2) + "|"]
    for kind in kinds:
        for number in num_passages:
            found = {}
            for way in WAYS:
                path = folder / f"{kind}-{number}-{way}.jsonl"
                if path.exists():
                    scores = [json.loads(line)["exact_match"] for line in path.read_text("utf-8").splitlines()]
                    found[way] = (np.mean(scores), len(scores))
            cells = []
            for way in WAYS:
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
    for name, chosen, known in (("ways", arguments.ways, WAYS), ("kinds", arguments.kinds, (*KINDS, *TEXT_KINDS))):
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
    texts = [document["text"] for document in read_docstrings([arguments.package])]
    for number in arguments.num_passages:
        for kind in arguments.kinds:
            questions = make_questions(kind, texts, tokenizer, number, arguments.num_questions)
            for way in arguments.ways:
                path = folder / f"{kind}-{number}-{way}.jsonl"
                answer(questions, way, path, model, tokenizer, arguments.batch_size)
                print("\n".join(read_table(folder, arguments.kinds, arguments.num_passages)), flush=True)


if __name__ == "__main__":
    run_command(main)
