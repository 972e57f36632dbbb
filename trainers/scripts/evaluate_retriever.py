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
Measures how well an encoder retrieves.

    retro evaluate-retriever --encoder encoder --pairs held-out.jsonl
    retro evaluate-retriever --encoder encoder --beir scifact --split test --output_file scifact.json
    retro evaluate-retriever --encoder encoder --scored_pairs sts-test.jsonl
    retro evaluate-retriever --datastore datastore --beir scifact             # by questions, in each way to search
    retro evaluate-retriever --pairs held-out.jsonl --save_beir benchmark     # makes a retrieval set from pairs

For pairs, each anchor is looked up among all positives. A BEIR set is a folder with `corpus.jsonl`, `queries.jsonl`
and `qrels/{split}.tsv`. Scored pairs are lines `{"sentence1": …, "sentence2": …, "score": …}`. The search is exact.
A document with the id of a query does not count for it, as in BEIR, unless `--no_exclude_same_id` is given.

A datastore of the corpus of the set (`retro chunk --input corpus.jsonl --id_column _id`) is searched in each way for
which it has the indexes, and a document has the place of its best chunk. The table has 95 % intervals over the
queries, and paired differences from the first way. With `--encoder`, whole documents are searched as well.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.arguments import parse_arguments, run_command


if TYPE_CHECKING:
    from modeling_retro import ChunkEncoder

    from ..retriever.evaluation import RetrievalSet


@dataclass
class EvaluateRetrieverArguments:
    """
    Arguments of `retro evaluate-retriever`.
    """

    encoder: str | None = field(default=None, metadata={"help": "Folder or Hub id of the encoder, or minilm."})
    pairs: str | None = field(default=None, metadata={"help": "Held-out pair set, as for `retro train-retriever`."})
    columns: list[str] | None = field(
        default=None, metadata={"help": "Columns of anchor and positive, if they have other names."}
    )
    beir: str | None = field(default=None, metadata={"help": "Folder of a retrieval set in BEIR layout."})
    exclude_same_id: bool = field(
        default=True, metadata={"help": "Leave the document with the id of a query out of its results."}
    )
    datastore: str | None = field(
        default=None, metadata={"help": "Datastore to measure by the queries of the BEIR set, with ids (--id_column)."}
    )
    retrievers: list[str] | None = field(
        default=None,
        metadata={"help": "Ways to search the datastore: dense, bm25, hybrid, rerank. By default all that it can."},
    )
    split: str = field(default="test", metadata={"help": "Judgements of the BEIR set to use."})
    scored_pairs: str | None = field(default=None, metadata={"help": "File .jsonl of scored pairs."})
    pooling: str | None = field(default=None, metadata={"help": "Overrides the pooling of the saved encoder."})
    recall_at: list[int] = field(
        default_factory=lambda: [1, 10, 100], metadata={"help": "Depths k of recall@k, for a datastore up to 64."}
    )
    save_beir: str | None = field(default=None, metadata={"help": "Folder to write the pairs to, in BEIR layout."})
    output_file: str | None = field(default=None, metadata={"help": "File .json for the results."})


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(
        EvaluateRetrieverArguments, argv=argv, description=__doc__, prog="retro evaluate-retriever"
    )
    from data_prep.pairs.pairs import load_pairs
    from data_prep.shipped_models import find_model, naming_the_ways
    from modeling_retro import ChunkEncoder
    from trainers.retriever.evaluation import RetrievalSet, evaluate_retriever, read_scored_pairs, spearman

    if arguments.datastore is not None and arguments.beir is None:
        raise ValueError("--datastore needs --beir: the questions, and which documents answer them")
    if arguments.pairs is None and arguments.beir is None and arguments.scored_pairs is None:
        raise ValueError("give --pairs, --beir or --scored_pairs: what to measure the encoder on")
    if arguments.encoder is None and arguments.save_beir is None and arguments.datastore is None:
        raise ValueError("give --encoder, the encoder to measure")
    sets = {}
    if arguments.pairs is not None:
        pairs = load_pairs(arguments.pairs, columns=arguments.columns)
        sets["pairs"] = RetrievalSet.from_pairs(pairs["anchor"][:], pairs["positive"][:])
        if arguments.save_beir is not None:
            sets["pairs"].save_beir(arguments.save_beir, arguments.split)
    if arguments.beir is not None:
        sets["beir"] = RetrievalSet.from_beir(arguments.beir, arguments.split, arguments.exclude_same_id)
    encoder = None
    if arguments.encoder is not None:
        with naming_the_ways(arguments.encoder, "encoder"):
            encoder = ChunkEncoder.from_pretrained(find_model(arguments.encoder), pooling=arguments.pooling)
    if arguments.datastore is not None:
        _measure_datastore(arguments, sets, encoder)
        return
    if encoder is None:
        return

    results = {name: evaluate_retriever(encoder, data, arguments.recall_at) for name, data in sets.items()}
    if arguments.scored_pairs is not None:
        first, second, scores = read_scored_pairs(arguments.scored_pairs)
        results["scored_pairs"] = {"spearman": spearman(encoder.encode(first), encoder.encode(second), scores)}
    for name, metrics in results.items():
        print(name, *(f"{metric} {value:.4f}" for metric, value in metrics.items()), sep="  ")
    if arguments.output_file is not None:
        Path(arguments.output_file).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _measure_datastore(
    arguments: EvaluateRetrieverArguments, sets: dict[str, "RetrievalSet"], encoder: "ChunkEncoder | None"
) -> None:
    from modeling_retro import RetroDatastore

    from ..retriever.questions import DEPTH, evaluate_questions

    evaluation = evaluate_questions(
        RetroDatastore.from_pretrained(arguments.datastore),
        sets["beir"],
        arguments.retrievers,
        whole=encoder,
        recall_at=[depth for depth in arguments.recall_at if depth <= DEPTH],
    )
    if evaluation.missing:
        print(f"{evaluation.missing} documents of the set are not in the datastore")
    print(evaluation.table())
    if arguments.output_file is not None:
        text = json.dumps({"datastore": evaluation.to_dict(), "missing": evaluation.missing}, indent=2)
        Path(arguments.output_file).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
