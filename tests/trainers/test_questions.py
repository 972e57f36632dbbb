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
"""Questions to a datastore: documents by their best chunk, metrics by their definitions, paired differences."""

import json
import math

import numpy as np
import pytest
from conftest import make_texts

from data_prep.bm25_index import build_bm25_index
from data_prep.chunk import chunk_documents
from data_prep.embed import embed_chunks
from data_prep.index import build_index
from modeling_retro import RetroDatastore, RetroRetriever
from modeling_retro.encoder.chunk_encoder import ChunkEncoder
from trainers.retriever.evaluation import RetrievalSet
from trainers.retriever.questions import WHOLE, evaluate_questions, rank_documents
from trainers.scripts.evaluate_retriever import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer, tiny_encoder_dir):
    """A set of 30 documents, of which the datastore has 29 and 5 others; the last query has the id of a document."""
    folder = tmp_path_factory.mktemp("questions")
    (folder / "qrels").mkdir()
    texts = make_texts(35, seed=5)
    generator = np.random.default_rng(0)
    corpus = [{"_id": f"d{number}", "text": text} for number, text in enumerate(texts)]
    words = [text.split() for text in texts]
    queries = [{"_id": f"q{i}", "text": " ".join(words[i][: 1 + i % 9])} for i in range(20)]
    queries.append({"_id": "d3", "text": texts[3][:40]})
    judgements = [(query["_id"], f"d{i % 30}", 2) for i, query in enumerate(queries)]
    judgements += [(f"q{i}", f"d{generator.integers(20, 30)}", 1) for i in range(0, 20, 3)]
    judgements.append(("d3", "d3", 1))
    for name, records in (("corpus", corpus[:30]), ("queries", queries), ("chunked", corpus[1:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = "".join(f"{query}\t{document}\t{gain}\n" for query, document, gain in judgements)
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
    chunk_documents(folder / "chunked.jsonl", folder / "datastore", tiny_tokenizer, chunk_size=8, id_column="_id")
    embed_chunks(folder / "datastore", tiny_encoder_dir)
    build_index(folder / "datastore")
    build_bm25_index(folder / "datastore")
    return folder


def slow_metrics(ranked, relevant, ks):
    """Metrics of one question from the definitions; `relevant` maps names to gains."""
    metrics = {f"recall@{k}": len(set(ranked[:k]) & set(relevant)) / len(relevant) for k in ks}
    ranks = [rank for rank, name in enumerate(ranked[:10], start=1) if name in relevant]
    metrics["mrr@10"] = 1 / ranks[0] if ranks else 0.0
    dcg = sum(relevant.get(name, 0) / math.log2(1 + rank) for rank, name in enumerate(ranked[:10], start=1))
    best = sorted(relevant.values(), reverse=True)[:10]
    metrics["ndcg@10"] = dcg / sum(gain / math.log2(1 + rank) for rank, gain in enumerate(best, start=1))
    return metrics


def slow_evaluation(folder, retriever, exclude_same_id):
    """One question at a time: the first 64 chunks, each document at the place of its first."""
    opened = RetroRetriever.from_pretrained(folder / "datastore", device="cpu", retriever=retriever)
    lines = (folder / "chunked.jsonl").read_text().splitlines()
    names = [json.loads(line)["_id"] for line in lines]
    relevant = {}
    for row in (folder / "qrels" / "test.tsv").read_text().splitlines()[1:]:
        query, document, gain = row.split("\t")
        relevant.setdefault(query, {})[document] = int(gain)
    results = []
    for line in (folder / "queries.jsonl").read_text().splitlines():
        query = json.loads(line)
        ranked = []
        for chunk_id in opened.find([query["text"]], 64)[0][0]:
            name = names[opened.datastore.chunks.document_id[chunk_id]] if chunk_id >= 0 else None
            if name and name not in ranked and not (exclude_same_id and name == query["_id"]):
                ranked.append(name)
        results.append(slow_metrics(ranked, relevant[query["_id"]], (1, 5)))
    return {name: [result[name] for result in results] for name in results[0]}


@pytest.mark.parametrize("exclude_same_id", [True, False])
def test_metrics_of_each_way_are_those_of_the_definitions(folder, exclude_same_id):
    questions = RetrievalSet.from_beir(folder, exclude_same_id=exclude_same_id)
    datastore = RetroDatastore.from_pretrained(folder / "datastore")
    evaluation = evaluate_questions(datastore, questions, recall_at=(1, 5))
    assert evaluation.missing == 1
    assert list(evaluation.metrics) == ["dense", "bm25", "hybrid", "rerank"]
    for retriever, metrics in evaluation.metrics.items():
        expected = slow_evaluation(folder, retriever, exclude_same_id)
        assert metrics.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_allclose(metrics[name], values, atol=1e-12)
    assert questions.excluded[-1] == (3 if exclude_same_id else -1)


def test_whole_documents_are_searched_beside_the_chunks(folder, tiny_encoder_dir):
    questions = RetrievalSet.from_beir(folder)
    datastore = RetroDatastore.from_pretrained(folder / "datastore")
    encoder = ChunkEncoder.from_pretrained(tiny_encoder_dir, device="cpu")
    evaluation = evaluate_questions(datastore, questions, ["bm25"], whole=encoder, recall_at=(5,))
    assert list(evaluation.metrics) == ["bm25", WHOLE]
    similarity = encoder.encode(questions.queries) @ encoder.encode(questions.documents).T
    for row, own in enumerate(questions.excluded):
        ranked = [number for number in np.argsort(-similarity[row], kind="stable").tolist() if number != own]
        relevant = {document: gain for query, document, gain in questions.relevance.tolist() if query == row}
        expected = slow_metrics(ranked, relevant, (5,))
        assert {name: values[row] for name, values in evaluation.metrics[WHOLE].items()} == pytest.approx(expected)


def test_a_document_has_the_place_of_its_best_chunk():
    documents = np.array([[7, 7, 5, 9, 5, -1], [9, 5, 7, 7, 7, 7]])
    ranked = rank_documents(documents, {5: 0, 7: 1}, 2, np.array([-1, 0]))
    assert ranked.tolist() == [[1, 0, 2 + 9, -1, -1, -1], [2 + 9, 1, -1, -1, -1, -1]]


def test_table_has_intervals_and_paired_differences(folder, capsys):
    output = folder / "results.json"
    main(
        ["--datastore", str(folder / "datastore"), "--beir", str(folder), "--retrievers", "bm25", "dense"]
        + ["--output_file", str(output)]
    )
    printed = capsys.readouterr().out
    assert printed.startswith("1 documents of the set are not in the datastore\n| retriever | recall@1 | recall@10 |")
    results = json.loads(output.read_text())["datastore"]
    expected = {name: np.array(slow_evaluation(folder, name, True)["ndcg@10"]) for name in ("bm25", "dense")}
    for name, values in expected.items():
        found = results[name]["ndcg@10"]
        assert found["mean"] == pytest.approx(values.mean())
        assert found["low"] <= found["mean"] <= found["high"]
        assert "{mean:.3f} ({low:.3f} to {high:.3f})".format(**found) in printed
    difference = expected["dense"] - expected["bm25"]
    found = results["dense"]["less bm25"]["ndcg@10"]
    assert found["mean"] == pytest.approx(difference.mean())
    draws = np.random.default_rng(1).integers(len(difference), size=(20_000, len(difference)))
    low, high = np.quantile(difference[draws].mean(axis=1), [0.025, 0.975])
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.02)
    assert "less bm25" not in results["bm25"]


def test_what_cannot_be_measured_is_named(folder, tmp_path, tiny_tokenizer):
    with pytest.raises(ValueError, match="--datastore needs --beir"):
        main(["--datastore", str(folder / "datastore")])
    questions = RetrievalSet.from_beir(folder)
    with pytest.raises(ValueError, match="recall at 100 needs more than the 64 chunks"):
        evaluate_questions(RetroDatastore.from_pretrained(folder / "datastore"), questions, recall_at=(100,))
    chunk_documents(folder / "chunked.jsonl", tmp_path / "datastore", tiny_tokenizer, chunk_size=8)
    with pytest.raises(ValueError, match="holds no document of the set; make it of the corpus: retro chunk .*_id"):
        evaluate_questions(RetroDatastore.from_pretrained(tmp_path / "datastore"), questions)
