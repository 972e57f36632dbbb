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
Embeds the chunks of a datastore. Each shard of chunks gets one file of embeddings in float16.

```bash
retro embed --datastore datastore --encoder sentence-transformers/all-MiniLM-L6-v2
retro embed --datastore datastore --split validation
```

Many processes can share the shards, one for each GPU: `accelerate launch -m data_prep.scripts.embed ...`. Independent
tasks can too: those of a job array with `--num_tasks 64 --task_index $SLURM_ARRAY_TASK_ID`, and those of Ray with
`--num_tasks 64 --ray auto`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.arguments import parse_arguments, run_command
from data_prep.memory import keep_freed_memory
from data_prep.task_options import TaskOptions, run_stage


@dataclass
class EmbedArguments:
    """Options of `retro embed`."""

    datastore: str = field(metadata={"help": "The datastore."})
    encoder: str | None = field(
        default=None,
        metadata={
            "help": (
                "Folder or Hub id of the encoder, or the address of a server that embeds texts "
                "(http://HOST/embed or http://HOST/v1/embeddings?model=NAME); by default the one used before."
            )
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Revision of the encoder on the Hub."})
    split: str = field(default="train", metadata={"help": "The split to embed."})
    pooling: str | None = field(
        default=None, metadata={"help": "By default that of the encoder's files.", "choices": ["mean", "cls"]}
    )
    normalize: bool | None = field(default=None, metadata={"help": "By default as the encoder's files say."})
    truncate_dim: int | None = field(
        default=None, metadata={"help": "Number of leading dimensions that are kept, for Matryoshka encoders."}
    )
    dtype: str = field(
        default="float32", metadata={"help": "Computing type.", "choices": ["float32", "bfloat16", "float16"]}
    )
    tokens_per_batch: int = field(default=4096, metadata={"help": "Number of tokens in a batch, including padding."})
    force: bool = field(default=False, metadata={"help": "Embed the split again."})


def main(argv: Sequence[str] | None = None) -> None:
    arguments, tasks = parse_arguments(EmbedArguments, TaskOptions, argv=argv, description=__doc__, prog="retro embed")
    from data_prep.embed import embed_chunks
    from data_prep.stage_files import process_state

    keep_freed_memory()
    stage = run_stage(embed_chunks, vars(arguments), tasks)
    if stage is not None and process_state().is_main_process:
        print(f"{sum(shard.rows for shard in stage.shards):,} chunks are embedded, in {len(stage.shards)} shards")


if __name__ == "__main__":
    run_command(main)
