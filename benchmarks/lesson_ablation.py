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
What the lessons of a reader that answers are worth: readers that read the same number of tokens, each without one kind
of lessons, and one that learns vectors around each passage in place of adapters, as KV Packet does. Each answers
questions about texts that it was not trained on, and continues such text.

    python benchmarks/lesson_ablation.py --datastore mix --split lessons --text_datastore sqlite \\
        --documents sqlite.jsonl --definitions descriptions.jsonl --output_dir ablation

A run of 40,000 tokens takes about seven minutes of a CPU core with bfloat16 instructions, and three more to measure.
The same command run again makes the runs that are missing, and `--runs` chooses some of them.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from answers import answer_batch
from torch import nn
from tqdm import tqdm
from transformers import AutoTokenizer

from data_prep.arguments import parse_arguments, run_command
from data_prep.docstrings import read_docstrings
from data_prep.shipped_models import find_smollm2
from modeling_retro import RetroDatastore, RetroJointForCausalLM
from trainers.evaluation.questions import score_question
from trainers.evaluation.text_questions import make_questions
from trainers.language_model import make_lessons
from trainers.language_model.collator import ChunkRows, DataCollatorForRetro
from trainers.language_model.lessons import DataCollatorForLessons, Lesson, lesson_losses


NUM_TOKENS = 8  # in front of a passage, and behind it
ROW_CHUNKS, ROW_SHARE, NUM_MEASURED_ROWS = 8, 0.55, 20
LESSONS_OF_A_STEP, WARMUP_STEPS = 4, 4
# Name of each run, and what sets it apart: constants of the lessons, and options.
RUNS: dict[str, dict[str, float]] = {
    "untrained": {},
    "all": {},
    "tokens": {},
    "no text that is continued": {"row_share": 0},
    "no questions": {"row_share": 1},
    "no questions about what texts say": {"TEXT_QUESTION_SHARE": 0},
    "no invented facts": {"TEXT_QUESTION_SHARE": 1},
    "no divergence from the base": {"teacher": 0},
}
# Kind of questions, and number of passages.
MEASURED = [("several_keys", 4), ("definition", 4), ("lookup", 4)]


@dataclass
class AblationArguments:
    """Arguments of this benchmark."""

    datastore: str = field(metadata={"help": "Datastore with stored neighbors, from whose texts lessons are made."})
    text_datastore: str = field(metadata={"help": "Another one, whose held-out text is continued with neighbors."})
    documents: str = field(metadata={"help": "JSON lines file of texts (key `text`) in which facts are hidden."})
    definitions: str = field(metadata={"help": "JSON lines file of texts whose definitions are asked for."})
    output_dir: str = field(metadata={"help": "Folder for what was measured; it is continued."})
    split: str = field(default="train", metadata={"help": "Split whose documents become lessons."})
    package: str = field(default="sklearn", metadata={"help": "Package whose docstrings are looked up in."})
    model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the base. Defaults to SmolLM2-135M-Instruct."}
    )
    runs: list[str] = field(
        default_factory=lambda: list(RUNS), metadata={"help": "Runs to make. All are in the table as far as they are."}
    )
    tokens: int = field(default=40_000, metadata={"help": "Number of tokens of rows and passages that a run reads."})
    learning_rate: float = field(default=8e-4, metadata={"help": "Largest learning rate of adapters."})
    token_learning_rate: float = field(default=1e-2, metadata={"help": "Largest learning rate of tokens."})
    num_questions: int = field(default=48, metadata={"help": "Number of questions of each kind."})


class TokenReader(nn.Module):
    """
    A base that reads each passage between trained vectors: eight in front of it and eight behind. Nothing else is
    trained, so a reader has 18 kB.

    Args:
        model ([`RetroJointForCausalLM`]): The base, whose passages may be longer by these vectors.
    """

    def __init__(self, model: RetroJointForCausalLM):
        super().__init__()
        self.model, self.config = model, model.config
        embedding = model.get_input_embeddings()
        self.first = embedding.num_embeddings  # id of the first of the vectors
        drawn = torch.randint(self.first, (2 * NUM_TOKENS,), generator=torch.Generator().manual_seed(0))
        self.vectors = nn.Parameter(embedding.weight[drawn].detach().float().clone())
        embedding.register_parameter("around_passages", self.vectors)  # the states of passages depend on it
        self._ids: torch.Tensor | None = None
        embedding.register_forward_pre_hook(self._hide)
        embedding.register_forward_hook(self._embed)

    def _hide(self, _: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        self._ids = args[0]
        return (self._ids.masked_fill(self._ids >= self.first, 0),)

    def _embed(self, _: nn.Module, args: tuple[torch.Tensor], embedded: torch.Tensor) -> torch.Tensor:
        is_trained = self._ids >= self.first
        if not is_trained.any():
            return embedded
        vectors = self.vectors[(self._ids - self.first).clamp(min=0)].to(embedded.dtype)
        return torch.where(is_trained[..., None], vectors, embedded)

    def between(
        self, passage_input_ids: torch.Tensor, passage_attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The passages `[B, k, r]` with the vectors around each, as ids `[B, k, r + 16]` and their mask."""
        number, (b, k, _) = NUM_TOKENS, passage_input_ids.shape
        r = int(passage_attention_mask.sum(-1).max())
        ids = passage_input_ids.new_zeros(b, k, r + 2 * number)
        mask = passage_attention_mask.new_zeros(ids.shape)
        trained = torch.arange(self.first, self.first + 2 * number)
        is_there = passage_attention_mask.any(-1)
        ids[..., :number], mask[..., :number] = trained[:number], is_there[..., None]
        ids[..., number : number + r] = passage_input_ids[..., :r]
        mask[..., number : number + r] = passage_attention_mask[..., :r]
        end = number + passage_attention_mask.sum(-1, keepdim=True) + torch.arange(number)
        ids.scatter_(-1, end, trained[number:].expand(b, k, -1))
        mask.scatter_(-1, end, is_there[..., None].expand(-1, -1, number))
        return {"passage_input_ids": ids, "passage_attention_mask": mask}

    def _inputs(self, inputs: dict) -> dict:
        if inputs.get("passages") == "in_order":
            return inputs
        if "passage_input_ids" in inputs:
            names = ("passage_input_ids", "passage_attention_mask")
            return {**inputs, **self.between(*(inputs[name] for name in names))}
        ids, mask = inputs["neighbor_input_ids"], inputs["neighbor_attention_mask"]  # [B, L, k, r]
        found = self.between(ids.flatten(1, 2), mask.flatten(1, 2)).values()
        ids, mask = (x.unflatten(1, ids.shape[1:3]) for x in found)
        return {**inputs, "neighbor_input_ids": ids, "neighbor_attention_mask": mask}

    def forward(self, **inputs):
        return self.model(**self._inputs(inputs))

    def generate(self, **inputs):
        return self.model.generate(**self._inputs(inputs))


def batches_of(run: str, arguments: AblationArguments, tokenizer) -> Iterator[dict[str, torch.Tensor]]:
    """The lessons of a run and rows of text, without end. The runs that are not without some have the same."""
    options = RUNS[run]
    constants = {name: value for name, value in options.items() if name.isupper()}
    row_share = options.get("row_share", ROW_SHARE)
    datastore = RetroDatastore.from_pretrained(arguments.datastore)
    source = datastore.split(arguments.split)
    rows, generator = ChunkRows(len(source.chunks), ROW_CHUNKS), np.random.default_rng(0)
    of_lessons = DataCollatorForLessons(tokenizer, datastore.neighbor_length)
    shares = {"copy_share": 0.15, "random_share": 0.2, "mark_random": True}
    of_rows = DataCollatorForRetro(datastore, source, ROW_CHUNKS, 1, **shares)
    with patch.multiple(make_lessons, **constants) if constants else nullcontext():
        lessons = make_lessons.make_lessons(datastore, arguments.split, 10**6)
        while True:
            row, is_row = int(generator.integers(len(rows))), generator.random() < row_share
            yield of_rows([rows[row]]) if is_row else of_lessons([Lesson(next(lessons))])


def load(run: str, source: str) -> tuple[nn.Module, list[nn.Parameter]]:
    """A reader that knows nothing yet, and what is to be trained of it."""
    fields = (
        {}
        if run in ("untrained", "tokens")
        else {"neighbor_adapter": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}}
    )
    if run == "tokens":
        fields["continuation_chunks"] = 2  # passages may be longer
    torch.manual_seed(0)
    model = RetroJointForCausalLM.from_decoder_pretrained(source, dtype=torch.bfloat16, **fields).requires_grad_(False)
    if run == "tokens":
        model = TokenReader(model)
        return model, [model.vectors.requires_grad_(True)]
    trained = [weight for name, weight in model.named_parameters() if "lora_" in name]
    for weight in trained:
        weight.data = weight.data.float()
        weight.requires_grad_(True)
    return model, trained


def num_read(batch: dict[str, torch.Tensor]) -> int:
    """Number of tokens of the rows and of their passages or neighbors, which the rows of a lesson share."""
    if "passage_input_ids" in batch:
        return int(batch["attention_mask"].sum() + batch["passage_attention_mask"][0].sum())
    return batch["input_ids"].numel() + int(batch["neighbor_attention_mask"].sum())


def train(run: str, reader: nn.Module, trained: list[nn.Parameter], tokenizer, arguments: AblationArguments) -> dict:
    """Reads lessons and rows until a number of tokens is reached."""
    base = reader.model if isinstance(reader, TokenReader) else reader
    peak = arguments.token_learning_rate if run == "tokens" else arguments.learning_rate
    optimizer = torch.optim.AdamW(trained, lr=peak, weight_decay=0)
    batches_read, teacher = batches_of(run, arguments, tokenizer), RUNS[run].get("teacher", 1)
    num_tokens = num_answers = step = 0
    losses, begin = [], time.process_time()
    progress = tqdm(total=arguments.tokens, desc=run, unit="token")
    while num_tokens < arguments.tokens:
        batches = [next(batches_read) for _ in range(LESSONS_OF_A_STEP)]
        answers = sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in batches)
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16):
                loss, divergence = lesson_losses(reader, base if teacher else None, batch)
            ((loss + teacher * divergence) / answers).backward()
            losses.append(float(loss) / answers)
            num_tokens += num_read(batch)
            progress.update(num_read(batch))
        done = min(1, num_tokens / arguments.tokens)
        optimizer.param_groups[0]["lr"] = peak * min((step + 1) / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * done))
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        num_answers, step = num_answers + answers, step + 1
    seconds = time.process_time() - begin
    return {
        "tokens": num_tokens, "answer_tokens": num_answers, "seconds": seconds, "steps": step,
        "kilobytes": sum(weight.numel() for weight in trained) * 2 / 1000,
        "last_losses": sum(losses[-40:]) / 10,
    }  # fmt: skip


@torch.inference_mode()
def measure(run: str, reader: nn.Module, tokenizer, arguments: AblationArguments) -> dict[str, float]:
    """Exact match of answers, with the passages apart, and nats of a token of continued text."""
    read = {
        name: [json.loads(line)["text"] for line in Path(getattr(arguments, name)).read_text("utf-8").splitlines()]
        for name in ("documents", "definitions")
    }
    read["lookup"] = [document["text"] for document in read_docstrings([arguments.package])]
    found = {}
    ways = ["apart", "in_order"] if run == "untrained" else ["apart"]
    for kind, number in MEASURED:
        texts = read[{"definition": "definitions", "lookup": "lookup"}.get(kind, "documents")]
        questions = make_questions(kind, texts, tokenizer, number, arguments.num_questions)
        for way in ways:
            scores = []
            for start in range(0, len(questions), 8):
                batch = questions[start : start + 8]
                answers, _ = answer_batch(batch, way, reader, tokenizer)
                scores += [
                    score_question(*pair)["exact_match"]
                    for pair in zip(batch, ([text] for text in answers), strict=True)
                ]
            found[f"{kind} {number}" + (" in order" if way == "in_order" else "")] = sum(scores) / len(scores)
    datastore = RetroDatastore.from_pretrained(arguments.text_datastore)
    source = datastore.split("validation")
    rows, collator = ChunkRows(len(source.chunks), ROW_CHUNKS), DataCollatorForRetro(datastore, source, ROW_CHUNKS, 1)
    with torch.autocast("cpu", torch.bfloat16):
        batches = [collator([rows[number]]) for number in range(min(NUM_MEASURED_ROWS, len(rows)))]
        nats = sum(float(lesson_losses(reader, None, batch)[0]) for batch in batches)
    found["text, nats"] = nats / sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in batches)
    return found


def read_table(folder: Path) -> list[str]:
    """Lines of a Markdown table."""
    rows = {run: json.loads((folder / f"{run}.json").read_text()) for run in RUNS if (folder / f"{run}.json").exists()}
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [f"| run | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for run, row in rows.items():
        lines.append(f"| {run} | {' | '.join(f'{row[name]:.3f}' if name in row else '–' for name in names)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(AblationArguments, argv=argv, description=__doc__)
    if unknown := sorted(set(arguments.runs) - set(RUNS)):
        raise ValueError(f"--runs has {', '.join(unknown)}; expected some of {', '.join(RUNS)}")
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    source = arguments.model or find_smollm2(folder / "smollm2")
    tokenizer = AutoTokenizer.from_pretrained(source)
    for run in arguments.runs:
        path = folder / f"{run}.json"
        if not path.exists():
            reader, trained = load(run, source)
            trained_with = train(run, reader, trained, tokenizer, arguments) if trained else {}
            found = measure(run, reader.eval(), tokenizer, arguments)
            path.write_text(json.dumps(found | trained_with))
        print("\n".join(read_table(folder)), flush=True)


if __name__ == "__main__":
    run_command(main)
