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
Copies a datastore into Milvus or PostgreSQL, where several machines can search it.

```bash
retro export datastore --to milvus:///tmp/articles.db
retro export datastore --to "milvus://localhost:19530/?collection=articles&tenant=press"
retro export datastore --to "postgresql://writer:secret@localhost/texts?collection=articles" --index flat
```

An interrupted export resumes, and nobody can open it before it is complete. Afterwards the address stands for the
datastore in `retro generate`, `retro serve` and `RetroRetriever.from_pretrained`. This needs
`pip install retro-transformers[milvus]` or `[postgresql]`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.arguments import name_leading_words, parse_arguments, run_command


@dataclass
class ExportArguments:
    """Options of `retro export`."""

    datastore: str = field(metadata={"help": "Folder or Hub id of the datastore; may be the first word."})
    to: str = field(
        metadata={
            "help": "milvus://HOST:PORT/DATABASE, milvus:///FOLDER/FILE.db or postgresql://USER@HOST/DATABASE, with "
            "?collection=, &tenant= and &timeout= (seconds)."
        }
    )
    index: str = field(
        default="hnsw", metadata={"help": "hnsw, or flat for exact search.", "choices": ["hnsw", "flat"]}
    )
    batch_size: int = field(default=1000, metadata={"help": "Number of chunks in a request."})
    force: bool = field(default=False, metadata={"help": "Replace another datastore of this collection and tenant."})


def main(argv: Sequence[str] | None = None) -> None:
    argv = name_leading_words(argv, "datastore")
    (arguments,) = parse_arguments(ExportArguments, argv=argv, description=__doc__, prog="retro export")
    from data_prep.upkeep.export import export_datastore

    result = export_datastore(
        arguments.datastore, arguments.to, arguments.index, arguments.batch_size, arguments.force
    )
    print(f"{result['chunks']} chunks at {result['address']}")


if __name__ == "__main__":
    run_command(main)
