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
r"""
Imports data sets of other RETRO implementations into a datastore, so that they need not be tokenized and embedded
again.

```bash
retro import --format norlund --source index.spec.json --output-dir datastore --tokenizer google-t5/t5-base \
    --encoder sentence-transformers/all-MiniLM-L6-v2
retro import --format norlund --source val.data.spec.json --output-dir datastore --tokenizer google-t5/t5-base \
    --split validation
retro import --format retro_pytorch --source train.chunks.dat --output-dir datastore \
    --tokenizer google-bert/bert-base-cased
```

The format `norlund` takes an `index.spec.json`, or a `data.spec.json` that also has neighbors. The format
`retro_pytorch` takes the memory map of the chunks. The files `*.doc_ids.dat`, `*.chunks.knn.dat` and
`processed-stats.json`, which holds the sizes, are found beside it unless they are given. If embeddings, index or
neighbors are missing, the other stages make them as usual.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.arguments import parse_arguments, run_command


@dataclass
class ImportArguments:
    """Options of `retro import`."""

    format: str = field(metadata={"help": "Where the files come from.", "choices": ["norlund", "retro_pytorch"]})
    source: str = field(metadata={"help": "index.spec.json or data.spec.json, or the memory map of the chunks."})
    output_dir: str = field(metadata={"help": "The datastore. It is created if it does not exist."})
    tokenizer: str = field(metadata={"help": "Folder or Hub id of the tokenizer that made the token ids, or smollm2."})
    encoder: str | None = field(default=None, metadata={"help": "The encoder that made the embeddings."})
    split: str = field(default="train", metadata={"help": "Split to import to. The split train is searched."})
    doc_ids: str | None = field(default=None, metadata={"help": "retro_pytorch: memory map of the document ids."})
    knn: str | None = field(default=None, metadata={"help": "retro_pytorch: memory map of the neighbors."})
    stats: str | None = field(default=None, metadata={"help": "retro_pytorch: json with the number of chunks."})
    chunk_size: int = field(default=64, metadata={"help": "retro_pytorch: tokens in a chunk."})


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(ImportArguments, argv=argv, description=__doc__, prog="retro import")
    from data_prep.stage_files import process_state
    from data_prep.upkeep.import_others import import_datastore

    manifest = import_datastore(**vars(arguments))
    if process_state().is_main_process:
        record = manifest.splits[arguments.split]
        parts = ", ".join(name for name in ("chunks", "embeddings", "neighbors") if getattr(record, name) is not None)
        print(f"imported {record.chunks.num_chunks} chunks of {record.chunks.num_documents} documents: {parts}")


if __name__ == "__main__":
    run_command(main)
