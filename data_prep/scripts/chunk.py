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
Cuts documents into chunks of m tokens: the first stage of a datastore.

```bash
retro chunk --input documents.jsonl --output-dir datastore --tokenizer HuggingFaceTB/SmolLM2-135M
retro chunk --input held_out.jsonl --output-dir datastore --tokenizer HuggingFaceTB/SmolLM2-135M --split validation
```

Many processes can share the work (`--num_proc 2`, or `accelerate launch -m data_prep.scripts.chunk ...` for several
machines), and the same command resumes an interrupted run. Independent tasks can too: those of a job array with
`--num_tasks 64 --task_index $SLURM_ARRAY_TASK_ID`, and those of Ray with `--num_tasks 64 --ray auto`. A chunk never
crosses the end of a document, and the last chunk of a document is padded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.arguments import parse_arguments, run_command
from data_prep.memory import keep_freed_memory
from data_prep.task_options import TaskOptions, run_stage


@dataclass
class ChunkArguments:
    """Options of `retro chunk`."""

    output_dir: str = field(metadata={"help": "The datastore. It is created if it does not exist."})
    tokenizer: str = field(metadata={"help": "Folder or Hub id of a fast tokenizer, or smollm2."})
    input: list[str] = field(
        default_factory=list,
        metadata={"help": "Files, folders or globs, of any kind of document; - reads jsonl from stdin."},
    )
    dataset: str | None = field(default=None, metadata={"help": "A dataset in place of --input: Hub id or folder."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    streaming: bool = field(default=False, metadata={"help": "Stream the dataset instead of downloading it whole."})
    split: str = field(default="train", metadata={"help": "The split train is searched. Others only query it."})
    chunk_size: int = field(default=64, metadata={"help": "Number of tokens in a chunk."})
    continuation_chunks: int = field(default=1, metadata={"help": "Chunks by which a neighbor continues."})
    text_column: str = field(default="text", metadata={"help": "Key of the text in a record; a.b is b inside a."})
    id_column: str | None = field(
        default=None, metadata={"help": "Key of your own id of a document; path is the path of its file."}
    )
    keep_columns: list[str] = field(
        default_factory=list, metadata={"help": "Further keys to keep with a document, beside its path and title."}
    )
    encoding: str | None = field(
        default=None, metadata={"help": "Encoding of text that is not UTF-8. By default it is guessed and recorded."}
    )
    filter: str | None = field(
        default=None, metadata={"help": "Records to keep, such as 'meta.set == \"Wikipedia (en)\"'."}
    )
    on_bad_record: str = field(
        default="error",
        metadata={"help": "error stops; skip writes the record to quarantine/.", "choices": ["error", "skip"]},
    )
    max_documents: int | None = field(default=None, metadata={"help": "Largest number of documents."})
    max_chunks: int | None = field(default=None, metadata={"help": "Largest number of chunks."})
    max_document_bytes: int = field(default=50_000_000, metadata={"help": "Longer records are bad records."})
    allow_control_tokens: bool = field(
        default=False,
        metadata={"help": "Turn text such as <|endoftext|> into the control token that it spells, not into text."},
    )
    shard_bytes: int = field(default=32_000_000, metadata={"help": "Number of bytes of input in a shard."})
    append: bool = field(default=False, metadata={"help": "Add the inputs that the split does not hold yet."})
    force: bool = field(default=False, metadata={"help": "Rebuild the split from nothing."})
    num_proc: int = field(default=1, metadata={"help": "Processes that share the shards; no launcher is needed."})


def main(argv: Sequence[str] | None = None) -> None:
    arguments, tasks = parse_arguments(ChunkArguments, TaskOptions, argv=argv, description=__doc__, prog="retro chunk")
    from data_prep.chunk import chunk_documents
    from data_prep.file_report import files_of_split
    from data_prep.results import chunks_in_words
    from data_prep.stage_files import process_state
    from modeling_retro.datastore.manifest import read_manifest

    keep_freed_memory()
    options = vars(arguments)
    inputs = options.pop("input")
    names = {"dataset": "dataset", "dataset_config": "config", "dataset_split": "split", "streaming": "streaming"}
    dataset = {name: options.pop(option) for option, name in names.items()}
    if dataset["dataset"] is not None:
        inputs = [*inputs, dataset]
    stage = run_stage(chunk_documents, {"inputs": inputs, **options}, tasks)
    if stage is not None and process_state().is_main_process:
        path = Path(arguments.output_dir)
        table = files_of_split(path, arguments.split, read_manifest(path).splits[arguments.split])
        print("" if table is None else f"{table}\n", end="")
        print(chunks_in_words(stage))


if __name__ == "__main__":
    run_command(main)
