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
Queries a second of `retro neighbors`, and how many had to fetch more results than at first.

```bash
python benchmarks/neighbors.py --datastore datastore --num_neighbors 4
python benchmarks/neighbors.py --datastore datastore --num_neighbors 4 --drop_near_duplicates 0.9
```

Works on a copy of the datastore that shares its files; the datastore stays as it is.
"""

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

import faiss

from data_prep.neighbors import find_neighbors
from modeling_retro.datastore.manifest import TRAIN_SPLIT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datastore", type=Path, required=True)
    parser.add_argument("--split", default=TRAIN_SPLIT)
    parser.add_argument("--num_neighbors", type=int, default=4)
    parser.add_argument("--drop_near_duplicates", type=float)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.datastore.parent) as folder:
        copy = Path(folder) / "datastore"
        hidden = shutil.ignore_patterns(".*", "neighbors")
        shutil.copytree(arguments.datastore, copy, copy_function=os.link, ignore=hidden)
        begin = time.perf_counter()
        stage = find_neighbors(
            copy,
            arguments.num_neighbors,
            arguments.split,
            drop_near_duplicates=arguments.drop_near_duplicates,
            force=True,
        )
        seconds = time.perf_counter() - begin
    queries = sum(shard.rows for shard in stage.shards)
    print(
        f"{queries} queries, {faiss.omp_get_max_threads()} threads: {queries / seconds:.0f} queries/s; "
        f"{stage.counts['refetched'] / queries:.2%} fetched again"
    )
    print(", ".join(f"{number} {name.replace('_', ' ')}" for name, number in stage.counts.items()))


if __name__ == "__main__":
    main()
