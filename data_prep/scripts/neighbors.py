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
Finds the nearest neighbors of each chunk outside its own document.

```bash
retro neighbors --datastore datastore --num-neighbors 4
retro neighbors --datastore datastore --num-neighbors 4 --split validation
retro neighbors --datastore datastore --retriever bm25
```

Many processes can share the shards: `accelerate launch -m data_prep.scripts.neighbors ...`. Independent tasks can too:
those of a job array with `--num_tasks 64 --task_index $SLURM_ARRAY_TASK_ID`, and those of Ray with `--num_tasks 64
--ray auto`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.arguments import parse_arguments, run_command
from data_prep.task_options import TaskOptions, run_stage


@dataclass
class NeighborsArguments:
    """Options of `retro neighbors`."""

    datastore: str = field(metadata={"help": "The datastore."})
    num_neighbors: int = field(default=4, metadata={"help": "Number of neighbors of a chunk."})
    split: str = field(default="train", metadata={"help": "The split whose chunks are the queries."})
    retriever: str = field(
        default="dense",
        metadata={
            "help": "By embeddings, by shared terms, by both, or by embeddings and then shared runs of tokens.",
            "choices": ["dense", "bm25", "hybrid", "rerank"],
        },
    )
    drop_near_duplicates: float | None = field(
        default=None, metadata={"help": "Drop neighbors that hold more than this share of the chunk's tokens."}
    )
    use_gpus: bool = field(default=False, metadata={"help": "Search on GPUs."})
    shard_index: bool = field(default=False, metadata={"help": "Split the index over GPUs instead of copying it."})
    force: bool = field(default=False, metadata={"help": "Search again."})


def main(argv: Sequence[str] | None = None) -> None:
    arguments, tasks = parse_arguments(
        NeighborsArguments, TaskOptions, argv=argv, description=__doc__, prog="retro neighbors"
    )
    from data_prep.neighbors import find_neighbors
    from data_prep.results import neighbors_in_words
    from data_prep.stage_files import process_state

    stage = run_stage(find_neighbors, vars(arguments), tasks)
    if stage is not None and process_state().is_main_process:
        print(neighbors_in_words(stage))


if __name__ == "__main__":
    run_command(main)
