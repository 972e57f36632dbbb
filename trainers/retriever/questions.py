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
"""Measures the retriever of a datastore by questions: which of its documents do they find, in each way to search"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.upkeep.changes import living_documents
from modeling_retro import RetroDatastore, RetroRetriever
from modeling_retro.datastore.manifest import INDEXES
from modeling_retro.encoder.chunk_encoder import ChunkEncoder
from modeling_retro.retriever.search import DEPTH
from trainers.evaluation.report import bootstrap_interval

from .evaluation import RetrievalSet, ranking_metrics


WHOLE = "whole documents"


@dataclass
class QuestionEvaluation:
    """
    The metrics of several ways to search, for each question.

    Args:
        metrics (`dict[str, dict[str, np.ndarray]]`):
            For each way, the metrics of [`~trainers.retriever.evaluation.ranking_metrics`], float64 `[J]`.
        missing (`int`): Number of documents of the set that the datastore does not hold.
    """

    metrics: dict[str, dict[str, np.ndarray]]
    missing: int = 0

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Means and 95 % intervals over questions of each way, and of its differences from the first way."""
        first = next(iter(self.metrics))
        result = {}
        for way, metrics in self.metrics.items():
            result[way] = {name: _mean(values) for name, values in metrics.items()}
            if way != first:
                result[way][f"less {first}"] = {
                    name: _mean(values - self.metrics[first][name]) for name, values in metrics.items()
                }
        return result

    def table(self) -> str:
        """One row of a Markdown table for each way; differences from the first are paired over questions."""
        ways = self.to_dict()
        first, *_ = ways
        names = list(self.metrics[first])
        lines = ["| retriever | " + " | ".join(names) + f" | ndcg@10, less {first} |", "|---" * (len(names) + 2) + "|"]
        for way, numbers in ways.items():
            cells = [f"{numbers[name]['mean']:.3f}" for name in names]
            cells[names.index("ndcg@10")] += " ({low:.3f} to {high:.3f})".format(**numbers["ndcg@10"])
            difference = numbers.get(f"less {first}")
            text = "{mean:+.3f} ({low:+.3f} to {high:+.3f})".format(**difference["ndcg@10"]) if difference else ""
            lines.append(" | ".join([f"| {way}", *cells, text]) + " |")
        return "\n".join(lines)


def _mean(values: np.ndarray) -> dict[str, float]:
    low, high = bootstrap_interval(values, np.ones(len(values)))
    return {"mean": float(values.mean()), "low": low, "high": high}


def evaluate_questions(
    datastore: RetroDatastore,
    questions: RetrievalSet,
    retrievers: Sequence[str] | None = None,
    whole: ChunkEncoder | None = None,
    recall_at: Sequence[int] = (1, 10),
) -> QuestionEvaluation:
    """
    Looks up questions among the chunks of a datastore. A document has the place of its best chunk.

    Each way looks at 64 chunks, as in generation: `hybrid` joins, and `rerank` reorders, the first 64. A document that
    has no chunk among them is not found.

    Args:
        datastore ([`~modeling_retro.RetroDatastore`]):
            A datastore of the documents of the set, with the ids of the set (`retro chunk --id_column _id`).
        questions ([`~trainers.retriever.evaluation.RetrievalSet`]):
            Questions and judgements, as [`~trainers.retriever.evaluation.RetrievalSet.from_beir`] reads them.
        retrievers (`Sequence[str]`, *optional*):
            Ways to search. Defaults to all for which the datastore has the indexes.
        whole ([`~modeling_retro.ChunkEncoder`], *optional*):
            An encoder with which whole documents are searched too, for comparison.
        recall_at (`Sequence[int]`, *optional*, defaults to `(1, 10)`):
            Depths of recall, at most 64.

    Returns:
        [`QuestionEvaluation`]

    Raises:
        `ValueError`: if the documents have no ids, none of them belongs to the set, or an index is missing.
    """
    if max(recall_at, default=0) > DEPTH:
        raise ValueError(f"recall at {max(recall_at)} needs more than the {DEPTH} chunks that are looked at")
    ids = living_documents(datastore) if (datastore.path / "documents").is_dir() else {}
    numbers = {ids[name]: number for number, name in enumerate(questions.document_names or []) if name in ids}
    if not numbers:
        raise ValueError(
            f"{datastore.path} holds no document of the set; make it of the corpus: retro chunk --input corpus.jsonl "
            "--id_column _id"
        )
    if retrievers is None:
        has = {name for name in ("index", "bm25") if getattr(datastore.manifest, name) is not None}
        retrievers = [name for name, needed in INDEXES.items() if has.issuperset(needed)]
    metrics, encoder = {}, None
    for name in retrievers:
        retriever = RetroRetriever(datastore, encoder=encoder, retriever=name)
        encoder = encoder or retriever.encoder
        chunk_ids, _ = retriever.find(questions.queries, DEPTH)
        documents = np.where(chunk_ids >= 0, datastore.chunks.gather("document_id", chunk_ids), -1)
        ranked = rank_documents(documents, numbers, len(questions.documents), questions.excluded)
        metrics[name] = ranking_metrics(ranked, questions.relevance, recall_at)
    if whole is not None:
        similarity = whole.encode(questions.queries) @ whole.encode(questions.documents).T
        order = np.argsort(-similarity, axis=1, kind="stable")[:, : DEPTH + 1]
        same = {number: number for number in range(len(questions.documents))}
        ranked = rank_documents(order, same, len(questions.documents), questions.excluded)
        metrics[WHOLE] = ranking_metrics(ranked, questions.relevance, recall_at)
    return QuestionEvaluation(metrics, missing=len(questions.documents) - len(numbers))


def rank_documents(
    documents: np.ndarray, numbers: dict[int, int], num_documents: int, excluded: np.ndarray
) -> np.ndarray:
    """
    Ranks documents by the first of their chunks.

    Args:
        documents (`np.ndarray`): int64 [Q, w], the documents of the chunks found, best first, -1 for none.
        numbers (`dict[int, int]`): The number in the set of each document of the datastore that belongs to it.
        num_documents (`int`): Number of documents of the set. Others get numbers from here on: they are not relevant.
        excluded (`np.ndarray`): int64 [Q], a document of the set that does not count, -1 for none.

    Returns:
        `np.ndarray`: int64 [Q, w], numbers of documents without repetition, -1 behind the last.
    """
    ranked = np.full(documents.shape, -1, dtype=np.int64)
    for row, (found, own) in enumerate(zip(documents.tolist(), excluded.tolist(), strict=True)):
        names = [numbers.get(document, num_documents + document) for document in dict.fromkeys(found) if document >= 0]
        names = [name for name in names if name != own]
        ranked[row, : len(names)] = names
    return ranked
