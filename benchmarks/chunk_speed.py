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
Chunking against the tokenizer alone, in processor seconds of one process, so that a busy machine does not matter.

```bash
python benchmarks/chunk_speed.py documents.jsonl tokenizer_folder
```

Prints the rate of `tokenizers.encode_batch` on the same batches, of `retro chunk` (reading, tokenizing, chunking,
writing), and of a loop that encodes, pads and appends document by document.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from transformers import AutoTokenizer

from data_prep.chunk import DocumentChunker, chunk_documents
from data_prep.documents import Document


CHUNK_SIZE = 64
BATCH = 64


def seconds_of(function) -> float:
    """Processor seconds of a call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def naive_loop(tokenizer, texts: list[str]) -> None:
    """What the earlier programs do: encode, pad and append one document at a time."""
    chunks = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids += [0] * (-len(ids) % CHUNK_SIZE)
        chunks += [ids[start : start + CHUNK_SIZE] for start in range(0, len(ids), CHUNK_SIZE)]


def main() -> None:
    file, tokenizer = Path(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[2])
    texts = [json.loads(line)["text"] for line in file.open(encoding="utf-8")]
    batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    backend, chunker = tokenizer.backend_tokenizer, DocumentChunker(tokenizer, CHUNK_SIZE)
    with tempfile.TemporaryDirectory() as folder:
        rates = {
            "tokenizers.encode_batch": lambda: [backend.encode_batch(b, add_special_tokens=False) for b in batches],
            "DocumentChunker.chunk": lambda: [chunker.chunk([Document(t, 0) for t in b]) for b in batches],
            "retro chunk": lambda: chunk_documents(file, folder, tokenizer, on_bad_record="skip"),
            "loop over documents": lambda: naive_loop(tokenizer, texts),
        }
        raw = None
        for name, function in rates.items():
            rate = megabytes / seconds_of(function)
            raw = raw or rate
            print(f"{name:<26}{rate:8.2f} MB/s of processor time{rate / raw:8.2f} of the tokenizer", flush=True)


if __name__ == "__main__":
    main()
