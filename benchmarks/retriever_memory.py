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
Peak memory of training with a cached batch of 1,024 pairs, by that with a plain batch of 32.

    OMP_NUM_THREADS=1 python benchmarks/retriever_memory.py --encoder sentence-transformers/all-MiniLM-L6-v2

Each figure comes from a process of its own: the resident memory on the CPU, what torch allocated on a GPU.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile

import torch
from retriever_speed import make_pairs
from transformers import AutoTokenizer

from modeling_retro.encoder.chunk_encoder import load_text_encoder
from trainers.retriever.config import RetrieverTrainingArguments
from trainers.retriever.trainer import RetrieverTrainer


VARIANTS = {
    "plain batch of 32": (32, None),
    "cached batch of 32": (32, 32),
    "cached batch of 1,024": (1024, 32),
    "plain batch of 256": (256, None),
}


def peak_bytes(encoder, length, batch_size, mini_batch_size):
    """Trains two steps and returns the peak."""
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    with tempfile.TemporaryDirectory() as folder:
        trainer = RetrieverTrainer(
            model=load_text_encoder(encoder),
            args=RetrieverTrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=batch_size,
                mini_batch_size=mini_batch_size,
                max_length=length,
                max_steps=2,
                save_strategy="no",
                disable_tqdm=True,
                logging_strategy="no",
            ),
            processing_class=tokenizer,
            train_dataset=make_pairs(tokenizer, 2 * batch_size, length),
        )
        trainer.train()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant is not None:
        print(json.dumps(peak_bytes(arguments.encoder, arguments.length, *VARIANTS[arguments.variant])))
        return
    peaks = {}
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--encoder", arguments.encoder, "--length", str(arguments.length)]
        result = subprocess.run([*command, "--variant", variant], check=True, capture_output=True, text=True)
        peaks[variant] = json.loads(result.stdout.splitlines()[-1])
        ratio = peaks[variant] / peaks["plain batch of 32"]
        print(f"{variant:<24} {peaks[variant] / 2**20:8.0f} MiB   {ratio:.2f} x", flush=True)


if __name__ == "__main__":
    main()
