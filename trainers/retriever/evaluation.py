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
"""Measures retrieval by embeddings: Recall@k, MRR and nDCG on pairs or a BEIR set, and Spearman on scored pairs"""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from data_prep.pairs.pairs import hash_texts
from modeling_retro.datastore.datastore import faiss  # if faiss is missing, this import names the extras
from modeling_retro.encoder.chunk_encoder import ChunkEncoder


def retrieval_metrics(
    queries: np.ndarray,
    documents: np.ndarray,
    relevance: np.ndarray,
    ks: Sequence[int] = (1, 10, 100),
    excluded: np.ndarray | None = None,
) -> dict[str, float]:
    r"""
    Computes metrics of an exact search by inner product, as means over the queries that have a relevant document.

    - recall@k: share of the relevant documents among the first k
    - mrr@k: 1 / rank of the first relevant document, 0 if it is not among the first k
    - ndcg@k: \\(\sum_i g_i / \log_2(1 + i)\\) over the first k, divided by its value for the best order

    Args:
        queries (`np.ndarray`):
            float32 `[Q, d]`.
        documents (`np.ndarray`):
            float32 `[D, d]`.
        relevance (`np.ndarray`):
            int64 `[R, 2]`, rows (query, document), or `[R, 3]` with a gain above 0 as the third column.
        ks (`Sequence[int]`, *optional*, defaults to `(1, 10, 100)`):
            Numbers of documents for recall. MRR and nDCG are those at 10.
        excluded (`np.ndarray`, *optional*):
            int64 `[Q]`, a document that does not count for each query (such as the query itself), -1 for none.

    Returns:
        `dict[str, float]`: `recall@1`, …, `mrr@10`, `ndcg@10`.
    """
    if len(relevance) == 0:
        raise ValueError("no query has a relevant document")
    depth = min(max(*ks, 10), len(documents))
    index = faiss.IndexFlatIP(documents.shape[1])
    index.add(np.ascontiguousarray(documents, dtype=np.float32))
    _, ranked = index.search(
        np.ascontiguousarray(queries, dtype=np.float32), min(depth + (excluded is not None), len(documents))
    )
    if excluded is not None:
        # A stable sort moves the excluded document behind all others.
        order = np.argsort(ranked == excluded[:, None], axis=1, kind="stable")
        ranked = np.take_along_axis(np.where(ranked == excluded[:, None], -1, ranked), order, axis=1)[:, :depth]

    metrics = ranking_metrics(ranked, relevance, ks)
    return {name: float(values.mean()) for name, values in metrics.items()}


def ranking_metrics(ranked: np.ndarray, relevance: np.ndarray, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """
    Computes the metrics of [`retrieval_metrics`] for each query, from documents that are ranked already.

    Args:
        ranked (`np.ndarray`):
            int64 `[Q, depth]`, the documents found for each query, best first, -1 for none. No document comes twice.
        relevance (`np.ndarray`):
            int64 `[R, 2]` or `[R, 3]`, as for [`retrieval_metrics`].
        ks (`Sequence[int]`):
            Numbers of documents for recall.

    Returns:
        `dict[str, np.ndarray]`: float64 `[J]` for the J queries that have a relevant document, in their order.
    """
    num_queries = len(ranked)
    gains = relevance[:, 2] if relevance.shape[1] > 2 else np.ones(len(relevance))
    # The gain of each document found, [Q, depth], by binary search among the pairs (query, document)
    width = max(ranked.max(initial=-1), relevance[:, 1].max()) + 1
    keys = relevance[:, 0].astype(np.int64) * width + relevance[:, 1].astype(np.int64)
    order = np.argsort(keys)
    keys, gains, owners = keys[order], gains[order].astype(np.float64), relevance[order, 0].astype(np.int64)
    found_keys = np.arange(num_queries)[:, None] * width + ranked
    places = np.searchsorted(keys, found_keys).clip(max=len(keys) - 1)
    found = np.where((keys[places] == found_keys) & (ranked >= 0), gains[places], 0.0)

    number_relevant = np.bincount(owners, minlength=num_queries)
    judged = number_relevant > 0
    metrics = {}
    for k in ks:
        metrics[f"recall@{k}"] = ((found[:, :k] > 0).sum(axis=1) / number_relevant.clip(min=1))[judged]
    hits = found[:, :10] > 0
    metrics["mrr@10"] = (hits.any(axis=1) / (hits.argmax(axis=1) + 1))[judged]

    discounts = 1 / np.log2(np.arange(2, 12))
    by_gain = np.lexsort((-gains, owners))
    # The place of each judgement in the best order for its query
    rank = np.arange(len(owners)) - np.searchsorted(owners, owners)
    best = np.where(rank < 10, gains[by_gain] * discounts[rank.clip(max=9)], 0.0)
    ideal = np.bincount(owners, weights=best, minlength=num_queries)
    dcg = found[:, :10] @ discounts[: found[:, :10].shape[1]]
    metrics["ndcg@10"] = dcg[judged] / ideal[judged]
    return metrics


def spearman(first: np.ndarray, second: np.ndarray, scores: Sequence[float]) -> float:
    """
    Computes the rank correlation of cosine similarities with scores that people gave.

    Args:
        first, second (`np.ndarray`):
            float32 `[n, d]`, embeddings of the two texts of each pair.
        scores (`Sequence[float]`):
            Scores of the pairs.

    Returns:
        `float`: Spearman's correlation.
    """
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(spearmanr((first * second).sum(axis=1) / norms, scores).statistic)


@dataclass
class RetrievalSet:
    """
    Queries, documents, and the relevant documents of each query.

    Args:
        queries, documents (`list[str]`):
            Texts.
        relevance (`np.ndarray`):
            int64 `[R, 3]`, rows (query, document, gain).
        excluded (`np.ndarray`):
            int64 `[Q]`, the document that has the id of the query and is left out of its results, -1 for none.
        document_names (`list[str]`, *optional*):
            Ids of the documents in the files.
    """

    queries: list[str]
    documents: list[str]
    relevance: np.ndarray
    excluded: np.ndarray
    document_names: list[str] | None = None

    @classmethod
    def from_pairs(cls, anchors: Sequence[str], positives: Sequence[str]) -> "RetrievalSet":
        """Uses anchors as queries and positives as documents. Equal texts count as one."""
        _, first_query, query_of_row = np.unique(hash_texts(anchors), return_index=True, return_inverse=True)
        _, first_document, document_of_row = np.unique(hash_texts(positives), return_index=True, return_inverse=True)
        relevance = np.unique(np.stack([query_of_row, document_of_row], axis=1), axis=0)
        return cls(
            [anchors[row] for row in first_query],
            [positives[row] for row in first_document],
            np.concatenate([relevance, np.ones_like(relevance[:, :1])], axis=1),
            np.full(len(first_query), -1),
        )

    @classmethod
    def from_beir(cls, folder: str | Path, split: str = "test", exclude_same_id: bool = True) -> "RetrievalSet":
        """
        Reads `corpus.jsonl`, `queries.jsonl` and `qrels/{split}.tsv`. Queries without a judgement are left out.

        Args:
            folder (`str`): The folder.
            split (`str`, *optional*, defaults to `"test"`): Name of the judgements.
            exclude_same_id (`bool`, *optional*, defaults to `True`):
                Whether a document with the id of a query is left out of its results, as BEIR does: in sets whose
                queries are documents, each would find itself.

        Raises:
            `ValueError`: if a line cannot be read. The message names the file and the line.
        """
        folder = Path(folder)
        documents = _read_beir_texts(folder / "corpus.jsonl")
        queries = _read_beir_texts(folder / "queries.jsonl")
        document_numbers = {name: number for number, name in enumerate(documents)}
        judgements = _read_qrels(folder / "qrels" / f"{split}.tsv", queries, document_numbers)
        names = list(dict.fromkeys(query for query, _, _ in judgements))
        query_numbers = {name: number for number, name in enumerate(names)}
        relevance = [(query_numbers[query], document, gain) for query, document, gain in judgements if gain > 0]
        return cls(
            [queries[name] for name in names],
            list(documents.values()),
            np.array(relevance, dtype=np.int64).reshape(-1, 3),
            np.array([document_numbers.get(name, -1) if exclude_same_id else -1 for name in names]),
            list(documents),
        )

    def save_beir(self, folder: str | Path, split: str = "test") -> None:
        """Writes the set in BEIR layout."""
        folder = Path(folder)
        (folder / "qrels").mkdir(parents=True, exist_ok=True)
        for name, prefix, texts in (("corpus", "d", self.documents), ("queries", "q", self.queries)):
            with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
                records = ({"_id": f"{prefix}{number}", "text": text} for number, text in enumerate(texts))
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with open(folder / "qrels" / f"{split}.tsv", "w", encoding="utf-8") as file:
            file.write("query-id\tcorpus-id\tscore\n")
            file.writelines(f"q{query}\td{document}\t{gain}\n" for query, document, gain in self.relevance.tolist())


def _read_beir_texts(path: Path) -> dict[str, str]:
    texts = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                title = record.get("title") or ""
                texts[str(record["_id"])] = f"{title} {record['text']}" if title else record["text"]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f'{path}:{number}: expected {{"_id": …, "text": …}}, got {line[:80]!r}') from error
    return texts


def _read_qrels(path: Path, queries: dict[str, str], documents: dict[str, int]) -> list[tuple[str, int, int]]:
    judgements = []
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        next(rows, None)
        for number, row in enumerate(rows, start=2):
            try:
                query, document, gain = row
                gain = int(gain)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: expected query-id, corpus-id, score, got {row}") from error
            if query not in queries or document not in documents:
                raise ValueError(f"{path}:{number}: query {query} or document {document} is in no file of the set")
            judgements.append((query, documents[document], gain))
    return judgements


def evaluate_retriever(
    encoder: ChunkEncoder, retrieval_set: RetrievalSet, recall_at: Sequence[int] = (1, 10, 100)
) -> dict[str, float]:
    """
    Embeds a retrieval set and measures the exact search.

    Args:
        encoder ([`~modeling_retro.encoder.chunk_encoder.ChunkEncoder`]):
            The encoder.
        retrieval_set ([`RetrievalSet`]):
            Queries, documents and judgements.
        recall_at (`Sequence[int]`, *optional*, defaults to `(1, 10, 100)`):
            Depths of recall.

    Returns:
        `dict[str, float]`: see [`retrieval_metrics`].
    """
    return retrieval_metrics(
        encoder.encode(retrieval_set.queries),
        encoder.encode(retrieval_set.documents),
        retrieval_set.relevance,
        ks=recall_at,
        excluded=retrieval_set.excluded,
    )


def read_scored_pairs(path: str | Path) -> tuple[list[str], list[str], np.ndarray]:
    """Reads lines `{"sentence1": …, "sentence2": …, "score": …}` into first texts, second texts and scores."""
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                rows.append((record["sentence1"], record["sentence2"], float(record["score"])))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{path}:{number}: expected {{"sentence1": …, "sentence2": …, "score": …}}, got {line[:80]!r}'
                ) from error
    if len(rows) < 2:
        raise ValueError(f"{path} has {len(rows)} scored pairs; a correlation needs at least 2")
    first, second, scores = zip(*rows, strict=True)
    return list(first), list(second), np.array(scores)
