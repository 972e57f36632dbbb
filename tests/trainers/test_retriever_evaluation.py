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
import json
import math

import numpy as np
import pytest
from tiny_retriever import make_encoder, make_pairs, make_tokenizer

from modeling_retro.encoder.chunk_encoder import ChunkEncoder
from trainers.retriever.evaluation import RetrievalSet, retrieval_metrics, spearman
from trainers.scripts.evaluate_retriever import main


def slow_metrics(queries, documents, gains, ks, excluded):
    """One query at a time, from the definitions. `gains[query][document]`."""
    totals = {f"recall@{k}": 0.0 for k in ks} | {"mrr@10": 0.0, "ndcg@10": 0.0}
    for query, relevant in gains.items():
        scores = [(-float(np.dot(queries[query], vector)), number) for number, vector in enumerate(documents)]
        ranked = [number for _, number in sorted(scores) if number != excluded[query]]
        for k in ks:
            totals[f"recall@{k}"] += len(set(ranked[:k]) & set(relevant)) / len(relevant)
        ranks = [rank for rank, number in enumerate(ranked[:10], start=1) if number in relevant]
        totals["mrr@10"] += 1 / ranks[0] if ranks else 0.0
        dcg = sum(relevant.get(n, 0) / math.log2(1 + rank) for rank, n in enumerate(ranked[:10], start=1))
        best = sorted(relevant.values(), reverse=True)[:10]
        totals["ndcg@10"] += dcg / sum(gain / math.log2(1 + rank) for rank, gain in enumerate(best, start=1))
    return {name: total / len(gains) for name, total in totals.items()}


@pytest.mark.parametrize("num_documents", [5, 60])
@pytest.mark.parametrize("with_excluded", [False, True])
def test_metrics_are_those_of_the_definitions(num_documents, with_excluded):
    generator = np.random.default_rng(0)
    queries = generator.normal(size=(30, 8)).astype(np.float32)
    documents = generator.normal(size=(num_documents, 8)).astype(np.float32)
    excluded = generator.integers(-1, num_documents, size=30) if with_excluded else np.full(30, -1)
    gains = {}
    for query in range(0, 30, 2):  # every second query is judged; some have more than ten relevant documents
        number = generator.integers(1, min(num_documents, 15))
        chosen = [int(d) for d in generator.permutation(num_documents)[:number] if d != excluded[query]]
        if chosen:
            gains[query] = {document: int(generator.integers(1, 4)) for document in chosen}
    relevance = np.array([(query, document, gain) for query in gains for document, gain in gains[query].items()])
    metrics = retrieval_metrics(
        queries,
        documents,
        generator.permutation(relevance),
        ks=(1, 5, 50),
        excluded=excluded if with_excluded else None,
    )
    assert metrics == pytest.approx(slow_metrics(queries, documents, gains, (1, 5, 50), excluded), abs=1e-9)


def test_pairs_with_a_text_in_common_are_one_query_or_one_document():
    data = RetrievalSet.from_pairs(["q1", "q1", "q2"], ["d1", "d2", "d2"])
    assert sorted(data.queries) == ["q1", "q2"]
    assert sorted(data.documents) == ["d1", "d2"]
    judged = {(data.queries[query], data.documents[document]) for query, document, _ in data.relevance.tolist()}
    assert judged == {("q1", "d1"), ("q1", "d2"), ("q2", "d2")}


def test_beir_folder_reads_back_what_was_written(tmp_path):
    data = RetrievalSet.from_pairs(["q1", "q1", "q\t2"], ["d1", "d2", "d3\nx"])
    data.save_beir(tmp_path, "dev")
    again = RetrievalSet.from_beir(tmp_path, "dev")
    assert (again.queries, again.documents) == (data.queries, data.documents)
    assert again.relevance.tolist() == data.relevance.tolist()


def write_beir(folder, corpus=None, qrels="query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\n"):
    (folder / "qrels").mkdir()
    (folder / "corpus.jsonl").write_text(
        corpus or '{"_id": "d1", "title": "T", "text": "one"}\n{"_id": "d2", "title": "", "text": "two"}\n'
    )
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "?"}\n{"_id": "d2", "text": "!"}\n')
    (folder / "qrels" / "test.tsv").write_text(qrels)


def test_beir_titles_are_read_gain_zero_is_not_relevant_and_a_query_never_finds_itself(tmp_path):
    write_beir(tmp_path, qrels="query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\nd2\td1\t1\n")
    data = RetrievalSet.from_beir(tmp_path)
    assert data.documents == ["T one", "two"]
    assert data.queries == ["?", "!"]
    assert data.relevance.tolist() == [[0, 0, 2], [1, 0, 1]]
    assert data.excluded.tolist() == [-1, 1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"corpus": '{"_id": "d1", "text": "one"}\n{"_id": "d2"}\n'}, r"corpus.jsonl:2: expected"),
        ({"qrels": "query-id\tcorpus-id\tscore\nq1\td1\n"}, r"test.tsv:2: expected query-id, corpus-id, score"),
        ({"qrels": "query-id\tcorpus-id\tscore\nq1\td9\t1\n"}, r"test.tsv:2: query q1 or document d9"),
    ],
)
def test_broken_beir_file_is_named_with_its_line(tmp_path, files, message):
    write_beir(tmp_path, **files)
    with pytest.raises(ValueError, match=message):
        RetrievalSet.from_beir(tmp_path)


def test_spearman_is_the_correlation_of_ranks():
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, 50, 4)).astype(np.float32)
    scores = generator.integers(0, 6, size=50).astype(float)  # with ties
    similarities = (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)

    def ranks(values):
        return [
            sum(other < value for other in values) + sum(other == value for other in values) / 2 for value in values
        ]

    expected = np.corrcoef(ranks(similarities), ranks(scores))[0, 1]
    assert spearman(first, second, scores) == pytest.approx(expected, abs=1e-6)
    assert spearman(3 * first, second, 2 * scores) == pytest.approx(expected, abs=1e-6)


@pytest.fixture
def encoder_dir(tmp_path):
    make_encoder().save_pretrained(tmp_path / "encoder")
    make_tokenizer().save_pretrained(tmp_path / "encoder")
    return str(tmp_path / "encoder")


def test_command_measures_pairs_and_the_beir_set_made_of_them_alike(tmp_path, encoder_dir):
    pairs, beir, results = (str(tmp_path / name) for name in ("pairs", "beir", "results.json"))
    make_pairs(40).save_to_disk(pairs)
    main(["--pairs", pairs, "--save_beir", beir])
    main(
        ["--encoder", encoder_dir, "--pairs", pairs, "--beir", beir, "--recall_at", "1", "3", "--output_file", results]
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["pairs"] == pytest.approx(results["beir"])
    assert set(results["pairs"]) == {"recall@1", "recall@3", "mrr@10", "ndcg@10"}
    encoder = ChunkEncoder.from_pretrained(encoder_dir)
    queries, documents = (encoder.encode(make_pairs(40)[name][:]) for name in ("anchor", "positive"))
    hits = (queries @ documents.T).argmax(axis=1) == np.arange(40)
    assert results["pairs"]["recall@1"] == pytest.approx(hits.mean())


def test_command_correlates_scored_pairs(tmp_path, encoder_dir, capsys):
    rows = [{"sentence1": "w1 w2", "sentence2": f"w{i} w2", "score": i / 5} for i in range(1, 6)]
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["--encoder", encoder_dir, "--scored_pairs", str(tmp_path / "scored.jsonl")])
    assert "spearman" in capsys.readouterr().out
    (tmp_path / "scored.jsonl").write_text('{"sentence1": "w1", "sentence2": "w2"}\n')
    with pytest.raises(ValueError, match=r"scored.jsonl:1: expected"):
        main(["--encoder", encoder_dir, "--scored_pairs", str(tmp_path / "scored.jsonl")])
