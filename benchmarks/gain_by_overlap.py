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
What the gain of a chunk depends on: Spearman's rank correlation of the bits that retrieval saves with the share of the
tokens of the chunk that its neighbors hold (Norlund et al., arXiv 2302.12128), and with the score of the search.

    python benchmarks/gain_by_overlap.py --model HuggingFaceTB/SmolLM2-135M-Instruct --reader smollm2-135m-instruct \
        --datastore datastore

A chunk is read with the neighbors of the chunk before it, so the first chunk of a document does not count.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.stats import spearmanr

from data_prep.arguments import parse_arguments, run_command
from modeling_retro import RetroDatastore
from trainers.evaluation.evaluate import evaluate_retro
from trainers.load_model import load_retro_model


@dataclass
class GainArguments:
    """Arguments of this benchmark."""

    model: str = field(metadata={"help": "Folder or Hub id of the model."})
    datastore: str = field(metadata={"help": "Folder or Hub id of the datastore, with neighbors."})
    reader: str | None = field(default=None, metadata={"help": "Adapters that read neighbors."})
    split: str = field(default="validation", metadata={"help": "Split to measure."})
    num_neighbors: int = field(default=1, metadata={"help": "Neighbors of a chunk."})
    dtype: str = field(default="float32", metadata={"help": "Torch dtype of the weights."})


def unigram_overlap(chunks: np.ndarray, is_token: np.ndarray, neighbors: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """
    The share of the tokens of each chunk [n, m] that occur anywhere in its neighbors [n, l], as float [n].
    """
    occurs = ((chunks[:, :, None] == neighbors[:, None]) & seen[:, None]).any(-1) & is_token
    return occurs.sum(1) / np.maximum(is_token.sum(1), 1)


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(GainArguments, argv=argv, description=__doc__)
    datastore = RetroDatastore.from_pretrained(arguments.datastore)
    split, k = datastore.split(arguments.split), arguments.num_neighbors
    model = load_retro_model(
        arguments.model, datastore, dtype=getattr(torch, arguments.dtype), reader=arguments.reader
    ).eval()
    windows = {"window_chunks": 8, "stride_chunks": 4, "batch_size": 4}
    evaluation = evaluate_retro(model, datastore, split, modes=("off", "on"), num_neighbors=k, **windows)
    document = split.chunks.document_id
    read = 1 + np.flatnonzero(document[1:] == document[:-1])
    gain = (evaluation.chunk_bits["off"] - evaluation.chunk_bits["on"])[read]
    ids = split.neighbor_ids[read - 1, :k]
    neighbors, seen = datastore.take_neighbors(ids)
    tokens, is_token = split.chunks.take(read)
    overlap = unigram_overlap(tokens, is_token, neighbors.reshape(len(ids), -1), seen.reshape(len(ids), -1))
    score = split.neighbor_scores[read - 1, 0]
    for name, values in (("unigram overlap", overlap), ("score of the first neighbor", score)):
        result = spearmanr(gain, values)
        print(f"{name}: Spearman {result.statistic:+.2f} (p {result.pvalue:.1e}, {len(read)} chunks)")


if __name__ == "__main__":
    run_command(main)
