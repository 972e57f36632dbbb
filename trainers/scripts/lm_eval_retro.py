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
Evaluates a model with retrieval on tasks of the lm-evaluation-harness, which the extra `lm-eval` installs.

    retro lm-eval --model model --datastore datastore --tasks lambada_openai --output_dir harness
    retro lm-eval --model model --datastore datastore --tasks lambada_openai --retrieval false --output_dir without
    retro lm-eval --model HuggingFaceTB/SmolLM2-135M --datastore datastore --num_neighbors 1 --batch_size 8 \\
        --task_folder my_tasks --tasks my_task --output_dir untrained
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.arguments import parse_arguments, run_command
from data_prep.memory import keep_freed_memory


@dataclass
class LMEvalArguments:
    """
    Arguments of `retro lm-eval`.
    """

    model: str = field(metadata={"help": "Folder or Hub id of a RETRO model or of any causal one, or smollm2."})
    datastore: str = field(metadata={"help": "Folder or Hub id of the datastore to search."})
    tasks: list[str] = field(metadata={"help": "Names of tasks."})
    output_dir: str = field(metadata={"help": "Folder for results.json and results.md."})
    num_neighbors: int = field(default=2, metadata={"help": "Number of neighbors of a chunk."})
    retrieval: bool = field(default=True, metadata={"help": "Look up neighbors; false is the model without them."})
    in_context: bool = field(
        default=False,
        metadata={"help": "Put the neighbors of the end of a question in front of it, for a model without retrieval."},
    )
    passages: str = field(
        default="apart",
        metadata={
            "help": "How the passages of a question are read: each by itself, or one after the other as one text.",
            "choices": ["apart", "in_order"],
        },
    )
    reader: str | None = field(
        default=None,
        metadata={
            "help": "Adapters that were trained to read neighbors, for a model that is wrapped: the name of some that "
            "come with the package, or folder or Hub id."
        },
    )
    reread_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Number of tokens at the end of a chunk that are read again with the neighbors of the chunk in "
            "sight, by a model that reads neighbors with its own attention. Defaults to that of the model."
        },
    )
    task_folder: str | None = field(
        default=None, metadata={"help": "Folder with YAML files of tasks, in place of the tasks of the harness."}
    )
    num_fewshot: int | None = field(default=None, metadata={"help": "Number of examples in front of a question."})
    limit: int | None = field(default=None, metadata={"help": "Number of questions of a task, the first ones."})
    batch_size: int = field(default=1, metadata={"help": "Number of requests in a forward pass."})
    max_length: int | None = field(
        default=None, metadata={"help": "Longest sequence in tokens. Defaults to what the model can take."}
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Computing type of the model.", "choices": ["float32", "bfloat16", "float16"]},
    )


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(LMEvalArguments, argv=argv, description=__doc__, prog="retro lm-eval")
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as error:
        raise ImportError("retro lm-eval needs the extra lm-eval: pip install retro-transformers[lm-eval]") from error
    from modeling_retro.durable_files_retro import write_json, write_text
    from trainers.evaluation.harness import RetroLM
    from trainers.evaluation.operations import read_clocks

    keep_freed_memory()
    model = RetroLM(
        arguments.model,
        arguments.datastore,
        k=arguments.num_neighbors,
        retrieval=arguments.retrieval,
        in_front=arguments.in_context,
        passages=arguments.passages,
        reader=arguments.reader,
        reread_tokens=arguments.reread_tokens,
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
    )
    clocks = read_clocks()
    results = lm_eval.simple_evaluate(
        model,
        tasks=arguments.tasks,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        # Without its own thousands of tasks the harness starts at once.
        task_manager=TaskManager(include_path=arguments.task_folder, include_defaults=arguments.task_folder is None),
        log_samples=False,
    )
    names = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "lm_eval_version")
    report = {name: results[name] for name in names if name in results}
    report["seconds"], report["processor_seconds"] = (read_clocks() - clocks).tolist()
    report["arguments"] = vars(arguments)
    output_dir = Path(arguments.output_dir)
    write_json(output_dir / "results.json", json.loads(json.dumps(report, default=str)))
    write_text(output_dir / "results.md", make_table(results) + "\n")
    print(make_table(results))


if __name__ == "__main__":
    run_command(main)
