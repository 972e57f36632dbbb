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
Peak resident memory of `retro evaluate` with a large vocabulary, as a process of its own, with logits in blocks and
with the logits of a whole batch. The model has random weights and few layers, so that its head dominates. A third
process only loads the model and the datastore.

    python benchmarks/evaluation_memory.py --vocab_size 262144 --batch_size 8 --window_chunks 8
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np


CHUNK_SIZE = 64
LOAD = """
import sys
from modeling_retro import RetroDatastore
from trainers.load_model import load_retro_model
datastore = RetroDatastore.from_pretrained(sys.argv[2])
datastore.split("validation")
model = load_retro_model(sys.argv[1], datastore)
print(sum(weight.nbytes for weight in model.parameters()))
"""
EVALUATE = """
import sys
from trainers.evaluation import predictions
from trainers.scripts import evaluate_retro
if sys.argv[1] == "whole":
    predictions.CPU_BLOCK_SIZE = 1 << 62
evaluate_retro.main(sys.argv[2:])
"""


def make_model(folder: Path, vocab_size: int, hidden_size: int) -> None:
    """Saves a decoder of two layers with random weights and a tokenizer of as many words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<eos>": 0} | {f"w{number}": number for number in range(1, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=hidden_size // 64,
        tie_word_embeddings=True,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_datastore(folder: Path, model: Path, vocab_size: int, num_documents: int, document_chunks: int) -> None:
    """A datastore of random words with BM25, and as many held-out documents."""
    import json

    from transformers import AutoTokenizer

    from data_prep.bm25_index import build_bm25_index
    from data_prep.chunk import chunk_documents
    from data_prep.neighbors import find_neighbors

    generator = np.random.default_rng(0)
    for split in ("train", "validation"):
        tokens = generator.integers(1, vocab_size, size=(num_documents, document_chunks * CHUNK_SIZE - 1))
        texts = [" ".join(f"w{token}" for token in row) for row in tokens]
        documents = folder.parent / f"{split}.jsonl"
        documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        chunk_documents(documents, folder, AutoTokenizer.from_pretrained(model), split=split, chunk_size=CHUNK_SIZE)
    build_bm25_index(folder)
    find_neighbors(folder, 2, "validation", "bm25")


def peak_of(command: list[str]) -> tuple[int, str]:
    """Peak resident bytes of a command, and what it printed."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_maxrss * 1024, output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab_size", type=int, default=262_144)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--window_chunks", type=int, default=8)
    parser.add_argument("--modes", nargs="+", default=["off", "random", "on", "in_front"])
    parser.add_argument("--whole", action="store_true", help="Also make the logits of a whole batch, for comparison.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, datastore = Path(folder) / "model", Path(folder) / "datastore"
        make_model(model, arguments.vocab_size, arguments.hidden_size)
        size = arguments.vocab_size, arguments.batch_size, arguments.window_chunks
        make_datastore(datastore, model, *size)
        loaded, output = peak_of([sys.executable, "-c", LOAD, str(model), str(datastore)])
        weights = int(output.split()[-1])
        print(
            f"weights {weights / 1e9:.2f} GB; peak of a process that only loads them {loaded / 1e9:.2f} GB", flush=True
        )
        options = ["--model", str(model), "--datastore", str(datastore), "--num_neighbors", "1"]
        options += ["--batch_size", str(arguments.batch_size), "--window_chunks", str(arguments.window_chunks)]
        options += ["--stride_chunks", str(arguments.window_chunks // 2), "--modes"]
        for mode in arguments.modes:
            for way in ("blocks", "whole") if arguments.whole else ("blocks",):
                words = [*options, mode, "--output_dir", str(Path(folder) / f"{mode}-{way}")]
                peak, _ = peak_of([sys.executable, "-c", EVALUATE, way, *words])
                print(
                    f"{mode:>10}, {way:>6}: peak {peak / 1e9:.2f} GB, weights + {(peak - weights) / 1e9:.2f} GB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
