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
How the gain from retrieval grows with the datastore: bits per byte with neighbors out of random, nested shares of the
documents of one datastore. A share is given in tokens for each parameter of the model. The search in it is exact.

`benchmarks/large_corpus.py` makes the texts, and this recipe makes the datastore:

```yaml
# large.yaml
tokenizer: HuggingFaceTB/SmolLM2-135M-Instruct
encoder: static  # made by `retro distill-encoder`
splits:
  train: [large.jsonl]
  held_out: [large.held_out.jsonl]  # whole documents, so that their near duplicates are removed from train
  measured: [large.measured.jsonl]  # passages of them
deduplicate: {}
neighbors:
  num_neighbors: 2
```

```bash
retro prepare --recipe large.yaml --output_dir large
python benchmarks/datastore_size.py --model HuggingFaceTB/SmolLM2-135M-Instruct --reader smollm2-135m-instruct \\
    --datastore large --domains large.measured.kinds.txt --dtype bfloat16 --output_file datastore_size.json
```

In arXiv 2604.00715 the gain grows like `C log(1 + eta tokens)`. The script fits this curve, and says which share of
the gain at 20 tokens for each parameter, the largest size of that paper, one token for each has by it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import faiss
import numpy as np
import torch

from data_prep.arguments import parse_arguments, run_command
from data_prep.index import read_embeddings
from data_prep.memory import keep_freed_memory
from modeling_retro import RetroDatastore
from modeling_retro.datastore.manifest import TRAIN_SPLIT
from modeling_retro.datastore.splits import DatastoreSplit
from trainers.evaluation.evaluate import NeighborSource, token_bits
from trainers.evaluation.report import RetroEvaluation
from trainers.evaluation.windows import document_offsets, document_windows
from trainers.load_model import load_retro_model


WINDOW_CHUNKS, STRIDE_CHUNKS = 8, 4
PAPER_SIZES = (1, 20)  # tokens for each parameter
RATES = np.logspace(-3, 9, 1201)  # candidates for eta, for each token of each parameter


@dataclass
class SizeArguments:
    """Arguments of this benchmark."""

    model: str = field(metadata={"help": "Folder or Hub id of the model."})
    datastore: str = field(metadata={"help": "Folder of the datastore, with embeddings."})
    output_file: str = field(metadata={"help": "JSON file for the numbers. Finished measurements in it are kept."})
    reader: str | None = field(default=None, metadata={"help": "Adapters that read neighbors."})
    split: str = field(default="measured", metadata={"help": "Split to measure."})
    domains: str | None = field(default=None, metadata={"help": "Text file with the kind of each document on a line."})
    num_neighbors: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "Neighbors of a chunk."})
    tokens_per_parameter: list[float] = field(
        default_factory=lambda: [0.01, 0.03, 0.1, 0.3, 0.7], metadata={"help": "Sizes of the datastore."}
    )
    dtype: str = field(default="float32", metadata={"help": "Torch dtype of the weights."})
    batch_size: int = field(default=4, metadata={"help": "Windows in a forward pass."})
    seed: int = field(default=0, metadata={"help": "Seed of the order of the documents."})


def tokens_before(datastore: RetroDatastore, seed: int) -> np.ndarray:
    """
    The tokens of the documents that come before the document of each chunk in a random order, int64 [chunks]. All
    chunks with less than some number form a share of the documents, and larger numbers give shares that hold it.
    """
    document_id = np.asarray(datastore.chunks.document_id)
    tokens = np.bincount(document_id, weights=datastore.chunks.length).astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(tokens))
    before = np.zeros_like(tokens)
    before[order[1:]] = np.cumsum(tokens[order])[:-1]
    return before[document_id]


def exact_neighbors(
    embeddings: Sequence[np.ndarray], is_searched: np.ndarray, queries: np.ndarray, k: int
) -> np.ndarray:
    """Global ids [q, k] of the nearest of the chunks [n] that are searched, by inner product."""
    scores, ids = np.zeros((len(queries), 0), dtype=np.float32), np.zeros((len(queries), 0), dtype=np.int64)
    offset = 0
    for shard in embeddings:
        rows = np.flatnonzero(is_searched[offset : offset + len(shard)])
        if len(rows):
            found_scores, found = faiss.knn(
                queries, shard[rows].astype(np.float32), min(k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT
            )
            scores = np.concatenate([scores, found_scores], axis=1)
            ids = np.concatenate([ids, offset + rows[found]], axis=1)
            best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            scores, ids = np.take_along_axis(scores, best, axis=1), np.take_along_axis(ids, best, axis=1)
        offset += len(shard)
    return ids


def describe_growth(evaluation: RetroEvaluation, sizes: dict[str, float], num_samples: int = 2000) -> dict[str, list]:
    """
    What ten times the tokens gain in bits per byte (the slope of a line through the gains), and the share of the gain
    at 20 tokens for each parameter that one token has by the fitted curve: value, and 95 % interval by bootstrap over
    documents. `sizes` has the tokens for each parameter of each measurement.
    """
    tokens = np.array(list(sizes.values()))
    off = evaluation.document_bits("off")
    saved = np.stack([off - evaluation.document_bits(name) for name in sizes])  # [sizes, documents]
    num_documents = saved.shape[1]
    draws = np.random.default_rng(evaluation.seed).integers(num_documents, size=(num_samples, num_documents))
    draws = np.concatenate([np.arange(num_documents)[None], draws])  # the first are the documents themselves
    gains = saved[:, draws].sum(-1) / evaluation.document_bytes[draws].sum(-1)  # [sizes, samples]
    slopes = np.polyfit(np.log10(tokens), gains, 1)[0]
    curves = np.log1p(RATES[:, None] * tokens)  # [rates, sizes]; each is scaled to the gains by least squares
    explained = (curves @ gains) ** 2 / (curves**2).sum(1, keepdims=True)
    one, most = np.log1p(RATES[explained.argmax(0)] * np.array(PAPER_SIZES)[:, None])
    return {
        name: [float(values[0]), *map(float, np.percentile(values[1:], [2.5, 97.5]))]
        for name, values in (("bits_per_tenfold", slopes), ("share_of_gain_at_one_token", one / most))
    }


class Measurement:
    """Bits of the chunks of a split in each setting, kept in a file so that an interrupted run goes on."""

    def __init__(self, arguments: SizeArguments, datastore: RetroDatastore, split: DatastoreSplit):
        self.file = Path(arguments.output_file).with_suffix(".npz")
        self.bits = dict(np.load(self.file)) if self.file.exists() else {}
        self.datastore, self.split, self.batch_size = datastore, split, arguments.batch_size
        self.offsets = document_offsets(split.chunks.document_id)
        self.windows = document_windows(self.offsets, WINDOW_CHUNKS, STRIDE_CHUNKS)

    def add(self, name: str, model: torch.nn.Module, neighbor_ids: np.ndarray | None) -> None:
        if name not in self.bits:
            neighbors = None if neighbor_ids is None else NeighborSource(self.datastore, neighbor_ids)
            bits, is_counted = token_bits(
                model, self.datastore, self.split, self.windows, neighbors, self.batch_size, name
            )
            self.bits[name], self.bits["tokens"] = bits.sum(-1), is_counted.sum(-1)
            np.savez(self.file, **self.bits)

    def evaluation(self, domains: list[str] | None, num_neighbors: list[int]) -> RetroEvaluation:
        return RetroEvaluation(
            chunk_bits={name: bits for name, bits in self.bits.items() if name != "tokens"},
            chunk_bytes=np.asarray(self.split.chunks.num_bytes),
            document_offsets=self.offsets,
            num_tokens=int(self.bits["tokens"].sum()),
            num_neighbors=num_neighbors,
            domains=domains,
            chunk_tokens=self.bits["tokens"],
        )


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(SizeArguments, argv=argv, description=__doc__)
    keep_freed_memory()
    datastore = RetroDatastore.from_pretrained(arguments.datastore)
    split = datastore.split(arguments.split)
    model = load_retro_model(
        arguments.model, datastore, dtype=getattr(torch, arguments.dtype), reader=arguments.reader
    ).eval()
    parameters = model.decoder.num_parameters()
    embeddings = read_embeddings(datastore.path, TRAIN_SPLIT, datastore.manifest)
    queries = np.concatenate(read_embeddings(split.path, arguments.split, datastore.manifest)).astype(np.float32)
    before = tokens_before(datastore, arguments.seed)
    total, most = int(np.asarray(datastore.chunks.length).sum()), max(arguments.num_neighbors)
    measurement = Measurement(arguments, datastore, split)

    measurement.add("off", model, None)
    drawn = np.random.default_rng(arguments.seed).integers(len(before), size=(len(queries), most))
    measurement.add("random k=1", model, drawn[:, :1])
    sizes = {}
    for tokens_per_parameter in arguments.tokens_per_parameter:
        is_searched = before < tokens_per_parameter * parameters
        tokens = int(np.asarray(datastore.chunks.length)[is_searched].sum())
        sizes[tokens_per_parameter] = {"tokens": tokens, "chunks": int(is_searched.sum())}
        print(f"{tokens_per_parameter:g} tokens per parameter: {tokens} of {total}", flush=True)
        neighbor_ids = exact_neighbors(embeddings, is_searched, queries, most)
        for k in arguments.num_neighbors:
            measurement.add(f"on k={k} {tokens_per_parameter:g}", model, neighbor_ids[:, :k])

    domains = Path(arguments.domains).read_text().split() if arguments.domains else None
    evaluation = measurement.evaluation(domains, arguments.num_neighbors)
    kinds = {"all": evaluation}
    for kind in sorted(set(domains or ())):
        kinds[kind] = evaluation.only(np.array([domain == kind for domain in domains]))
    results = {"parameters": parameters, "tokens": total, "sizes": sizes, "kinds": {}}
    for kind, part in kinds.items():
        growth = {
            k: describe_growth(part, {f"on k={k} {size:g}": sizes[size]["tokens"] / parameters for size in sizes})
            for k in arguments.num_neighbors
        }
        results["kinds"][kind] = part.to_dict() | {"growth": growth}
        print(f"\n{kind}: {len(part.document_bytes)} documents, OFF {part.bits_per_byte('off'):.4f}")
        for name in part.chunk_bits:
            print(f"{name:<16}{part.bits_per_byte(name):8.4f}  {part.difference(name, 'off')}")
        for k, values in growth.items():
            print(f"k={k}", {name: [round(value, 4) for value in numbers] for name, numbers in values.items()})
    Path(arguments.output_file).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
