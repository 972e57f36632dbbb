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
Searching an index of `retro index --on_disk`: memory, and queries a second with its vectors read from the disk, and
from the page cache.

```bash
retro index --datastore datastore --on_disk   # after retro embed of the training side and of a held-out split
python benchmarks/index_on_disk.py --datastore datastore --split validation
```

Cold means that the file of the vectors was dropped from the memory of the process and from the page cache before each
batch of queries. What was read of it is printed.
"""

import argparse
import mmap
import os
import resource
import time
from pathlib import Path

import faiss
import numpy as np

from data_prep.index import read_embeddings
from modeling_retro import RetroDatastore
from modeling_retro.datastore.splits import split_path


def memory() -> str:
    """The memory of this process that is its own, and the files that it has mapped and used."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Rss"))
    sizes = {name: int(size) / 1e3 for name, size, _ in lines}
    return f"{sizes['RssAnon:']:.0f} MB of its own, {sizes['RssFile:']:.0f} MB of files"


def drop(index: faiss.Index, file: int) -> None:
    """Forgets the vectors. The page cache only drops what no process has mapped."""
    vectors = index._vectors
    start = -(-vectors.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    size = vectors.ctypes.data + vectors.nbytes - start
    index._advise(start, size // mmap.PAGESIZE * mmap.PAGESIZE, mmap.MADV_DONTNEED)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datastore", type=Path, required=True)
    parser.add_argument("--split", default="validation", help="The held-out split whose chunks are the queries.")
    parser.add_argument("--queries", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=512)
    arguments = parser.parse_args()
    datastore = RetroDatastore.from_pretrained(arguments.datastore)
    record = datastore.manifest.index
    path = split_path(datastore.path, arguments.split)
    queries = np.concatenate(read_embeddings(path, arguments.split, datastore.manifest, verify=False))
    queries = queries[np.random.default_rng(0).permutation(len(queries))[: arguments.queries]].astype(np.float32)
    print(f"before the index is opened: {memory()}")
    index = datastore.index
    print(f"opened: {memory()}; {index.ntotal} vectors of {index.d}, {record.factory}, {record.search_parameters}")
    print(f"recall@10 {record.recall['recall@10']} on {record.recall['queries']} queries, as the manifest says")
    file = os.open((datastore.path / record.file_name).with_suffix(".refine"), os.O_RDONLY)
    for state in ("cold", "again", "warm"):  # the second reads what the first has dropped
        seconds = processor = 0.0
        read = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
        for start in range(0, len(queries), arguments.batch):
            if state == "cold":
                drop(index, file)
            begin, own = time.perf_counter(), time.process_time()
            index.search(queries[start : start + arguments.batch], 10)
            seconds, processor = seconds + time.perf_counter() - begin, processor + time.process_time() - own
        rate, cost = len(queries) / seconds, processor / len(queries) * 1e6
        print(f"{state}: {rate:.0f} queries/s, {faiss.omp_get_max_threads()} threads, ", end="")
        read = (resource.getrusage(resource.RUSAGE_SELF).ru_inblock - read) / 2 / len(queries)
        print(f"{cost:.0f} microseconds of processor time and {read:.0f} kB read for each; {memory()}", flush=True)


if __name__ == "__main__":
    main()
