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
`retro chunk` on several processes against the tokenizer alone on as many, and against loops over documents on one:
that of RETRO-pytorch (`pip install --no-deps retro-pytorch einops`), and the plainest there is.

```bash
python benchmarks/chunk_speed.py --input documents.jsonl --tokenizer tokenizer --processes 2
```

The tokenizer gets its documents in memory and throws its results away; `retro chunk` and the loops read jsonl and
write chunks, all with the same tokenizer. `retro chunk` is timed as a whole command and without the seconds that
Python and its libraries take to start. Beside the seconds on the clock, which want a machine that does nothing else,
stand those of the processors.
"""

import argparse
import itertools
import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
from datastore_memory import repeat
from transformers import AutoTokenizer


CHUNK_SIZE = 64
BATCH = 64


def now(who: int = resource.RUSAGE_SELF) -> np.ndarray:
    """Seconds on the clock, and those that processors have spent."""
    usage = resource.getrusage(who)
    return np.array([time.perf_counter(), usage.ru_utime + usage.ru_stime])


def encode_batches(file: Path, tokenizer: str, rank: int, processes: int, ready, seconds) -> None:
    """The tokenizer alone, on the share of one process."""
    backend = AutoTokenizer.from_pretrained(tokenizer).backend_tokenizer
    with file.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in itertools.islice(lines, rank, None, processes)]
    ready.wait()
    begin = now()
    for start in range(0, len(texts), BATCH):
        backend.encode_batch_fast(texts[start : start + BATCH], add_special_tokens=False)
    seconds[2 * rank : 2 * rank + 2] = now() - begin


def tokenizer_alone(file: Path, tokenizer: str, processes: int) -> np.ndarray:
    """Some processes tokenize the documents, all starting at once; the clock is that of the slowest."""
    context = multiprocessing.get_context("spawn")
    ready, seconds = context.Barrier(processes), context.Array("d", 2 * processes)
    workers = [
        context.Process(target=encode_batches, args=(file, tokenizer, rank, processes, ready, seconds))
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return np.array([max(seconds[::2]), sum(seconds[1::2])])


def retro_chunk(file: Path, tokenizer: str, processes: int) -> np.ndarray:
    """The command, from its start to its end."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
        command += ["--multi_gpu"] if processes > 1 else []  # several processes, on CPUs too
        command += ["-m", "data_prep.scripts.chunk", "--input", str(file), "--tokenizer", tokenizer]
        command += ["--output-dir", f"{folder}/datastore", "--shard-bytes", "4000000", "--on-bad-record", "skip"]
        begin = now(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True)
        return now(resource.RUSAGE_CHILDREN) - begin


def retro_pytorch(file: Path, tokenizer: str) -> np.ndarray:
    """The loop of RETRO-pytorch's `text_folder_to_chunks_`: encodes, pads and appends one document at a time."""
    sys.modules.setdefault("autofaiss", types.SimpleNamespace(build_index=None))  # chunking does not need it
    from retro_pytorch import retrieval

    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    retrieval.tokenize = lambda text: tokenizer([text], padding=True, return_tensors="pt").input_ids
    with tempfile.NamedTemporaryFile(dir=file.parent) as output, file.open(encoding="utf-8") as lines:
        chunks = np.memmap(output.name, np.int32, "w+", shape=(file.stat().st_size // 32, CHUNK_SIZE + 1))
        begin, total = now(), 0
        for line in lines:
            text = json.loads(line)["text"]
            own, _ = retrieval.doc_text_to_chunks_and_seq_indices(doc_text=text, chunk_size=CHUNK_SIZE)
            chunks[total : total + len(own)] = own.numpy()
            total += len(own)
        return now() - begin


def plain_loop(file: Path, tokenizer: str) -> np.ndarray:
    """Encodes, pads and appends one document at a time to a list."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    begin = now()
    chunks = []
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            ids = tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
            ids.append(tokenizer.eos_token_id)
            ids += [0] * (-len(ids) % CHUNK_SIZE)
            chunks += [ids[start : start + CHUNK_SIZE] for start in range(0, len(ids), CHUNK_SIZE)]
    with tempfile.TemporaryFile() as output:
        np.save(output, np.array(chunks, dtype=np.uint16))
    return now() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="A jsonl file with the text in `text`.")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=50, help="Of the input, repeated if it is smaller.")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.input.parent) as folder:
        file, line = Path(folder) / "documents.jsonl", Path(folder) / "line.jsonl"
        repeat(arguments.input, file, arguments.megabytes * 1_000_000)
        repeat(arguments.input, line, 1)
        shared = (arguments.tokenizer, arguments.processes)
        taken = {"tokenizer": [], "command": [], "start": [], "peer": [], "loop": []}
        for _ in range(arguments.repeats):
            taken["tokenizer"].append(tokenizer_alone(file, *shared))
            taken["command"].append(retro_chunk(file, *shared))
            taken["start"].append(retro_chunk(line, *shared))
            taken["peer"].append(retro_pytorch(file, arguments.tokenizer))
            taken["loop"].append(plain_loop(file, arguments.tokenizer))
    seconds = {name: np.median(times, axis=0) for name, times in taken.items()}
    rows = {
        f"tokenizers.encode_batch_fast, {arguments.processes} processes": seconds["tokenizer"],
        f"retro chunk, {arguments.processes} processes": seconds["command"] - seconds["start"],
        "… with the start of Python": seconds["command"],
        "RETRO-pytorch, 1 process": seconds["peer"],
        "plain loop, 1 process": seconds["loop"],
    }
    print(
        f"{arguments.megabytes} MB of jsonl, median of {arguments.repeats}; speed by the clock, by processor seconds"
    )
    for name, own in rows.items():
        rates = arguments.megabytes / own, seconds["tokenizer"] / own, seconds["peer"] / own
        units = ("MB/s", "x the tokenizer", "x RETRO-pytorch")
        columns = (f"{clock:7.2f}, {cpu:.2f} {unit}" for (clock, cpu), unit in zip(rates, units, strict=True))
        print(f"{name:<46}" + "".join(columns))


if __name__ == "__main__":
    main()
