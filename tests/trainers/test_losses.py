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
import math

import pytest
import torch
from sentence_transformers.sentence_transformer import losses as reference_losses
from torch import nn

from trainers.retriever.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss


def random_embeddings(columns=2, batch_size=5, dim=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(columns, batch_size, dim, generator=generator, dtype=torch.float64).requires_grad_()


def cosine(first, second):
    return sum(a * b for a, b in zip(first, second, strict=True)) / math.sqrt(
        sum(a * a for a in first) * sum(b * b for b in second)
    )


def slow_loss(embeddings, allowed, scale=20.0, symmetric=False):
    """The formula, one logarithm at a time. `allowed(query, row, column, other)`: may that candidate be a negative?"""
    vectors = embeddings.tolist()
    columns, batch_size = len(vectors), len(vectors[0])
    total = 0.0
    directions = [(0, range(1, columns)), (1, range(1))] if symmetric else [(0, range(1, columns))]
    for query, targets in directions:
        for row in range(batch_size):
            scores = {
                (column, other): math.exp(scale * cosine(vectors[query][row], vectors[column][other]))
                for column in targets
                for other in range(batch_size)
                if (column == targets[0] and other == row) or allowed(query, row, column, other)
            }
            total -= math.log(scores[targets[0], row] / sum(scores.values()))
    return total / batch_size / len(directions)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("columns", [2, 4])
def test_loss_is_the_formula(columns, symmetric):
    embeddings = random_embeddings(columns)
    loss = MultipleNegativesRankingLoss(symmetric=symmetric)(embeddings)
    assert loss.item() == pytest.approx(slow_loss(embeddings, lambda *_: True, symmetric=symmetric), abs=1e-12)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("columns", [2, 3, 5])
def test_loss_and_gradient_equal_sentence_transformers(columns, symmetric, similarity):
    embeddings, expected = random_embeddings(columns), random_embeddings(columns)
    loss = MultipleNegativesRankingLoss(scale=3.0, similarity=similarity, symmetric=symmetric)(embeddings)
    loss.backward()
    reference = reference_losses.MultipleNegativesRankingLoss(
        model=None,
        scale=3.0,
        **({} if similarity == "cosine" else {"similarity_fct": lambda a, b: a @ b.T}),
        directions=("query_to_doc", "doc_to_query") if symmetric else ("query_to_doc",),
        partition_mode="per_direction",
    ).compute_loss_from_embeddings(list(expected), None)
    reference.backward()
    torch.testing.assert_close(loss, reference, rtol=0, atol=1e-12)
    torch.testing.assert_close(embeddings.grad, expected.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("symmetric", [False, True])
def test_equal_texts_and_chunks_of_the_same_document_are_no_negatives(symmetric):
    embeddings = random_embeddings(columns=3, batch_size=6)
    text_ids = torch.tensor([[1, 1, 2, 3, 4, 5], [11, 12, 13, 13, 3, 15], [21, 22, 11, 24, 25, 26]])
    document_ids = torch.tensor([[0, 1, 2, -1, 4, 2], [0, 1, 5, -1, 4, -1], [-1, -1, 4, 2, 0, 1]])

    def allowed(query, row, column, other):
        texts, documents = text_ids.tolist(), document_ids.tolist()
        if texts[column][other] in (texts[0][row], texts[1][row]):
            return False
        if column < 2 and texts[1 - column][other] == texts[1 - column][row]:  # another side of the same text
            return False
        own_documents = {documents[0][row], documents[1][row]} - {-1}
        return documents[column][other] not in own_documents

    loss = MultipleNegativesRankingLoss(symmetric=symmetric)(embeddings, text_ids, document_ids)
    assert loss.item() == pytest.approx(slow_loss(embeddings, allowed, symmetric=symmetric), abs=1e-12)
    assert loss.item() != pytest.approx(slow_loss(embeddings, lambda *_: True, symmetric=symmetric), abs=1e-3)


class Encoder(nn.Module):
    """Tokens of different use, so that lengths, masks and dropout matter."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(50, 8, dtype=torch.float64)
        self.layer = nn.Linear(8, 6, dtype=torch.float64)
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs):
        mask = inputs["attention_mask"][..., None].double()
        states = torch.tanh(self.layer(self.dropout(self.tokens(inputs["input_ids"]))))
        return (states * mask).sum(1) / mask.sum(1)


def random_batch(texts):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 12, (texts,), generator=generator)
    mask = (torch.arange(12) < lengths[:, None]).long()
    return {"input_ids": torch.randint(1, 50, (texts, 12), generator=generator) * mask, "attention_mask": mask}


@pytest.mark.parametrize("mini_batch_size", [1, 4, 7, 100])
@pytest.mark.parametrize("symmetric", [False, True])
def test_cached_loss_and_gradients_equal_those_of_the_whole_batch(mini_batch_size, symmetric):
    inputs, text_ids = random_batch(24), torch.arange(24).view(3, 8) % 20
    encoder, cached_encoder = Encoder(), Encoder()
    loss = MultipleNegativesRankingLoss(symmetric=symmetric)(encoder(inputs).unflatten(0, (3, 8)), text_ids)
    loss.backward()
    cached_loss = CachedMultipleNegativesRankingLoss(
        mini_batch_size=mini_batch_size, symmetric=symmetric
    ).forward_backward(cached_encoder, inputs, num_columns=3, text_ids=text_ids)
    torch.testing.assert_close(cached_loss, loss.detach(), rtol=0, atol=1e-12)
    for parameter, expected in zip(cached_encoder.parameters(), encoder.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=0, atol=1e-12)


def test_second_pass_of_the_cached_loss_draws_the_dropout_of_the_first():
    inputs, encoder = random_batch(16), Encoder(dropout=0.5)
    passes = []

    def embed(part):
        passes.append(encoder(part))
        return passes[-1]

    torch.manual_seed(3)
    CachedMultipleNegativesRankingLoss(mini_batch_size=4).forward_backward(embed, inputs, num_columns=2)
    first, second = passes[:4], passes[4:]
    assert len(second) == 4
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(encoder(inputs), encoder(inputs))  # dropout is on


def test_cached_loss_holds_one_mini_batch_with_gradient_at_a_time():
    sizes = []

    def embed(part):
        sizes.append((len(part["input_ids"]), torch.is_grad_enabled()))
        return encoder(part)

    encoder = Encoder()
    CachedMultipleNegativesRankingLoss(mini_batch_size=4).forward_backward(embed, random_batch(16), num_columns=2)
    assert sizes == [(4, False)] * 4 + [(4, True)] * 4


def test_single_pair_is_refused_unless_it_has_a_hard_negative():
    with pytest.raises(ValueError, match="single pair"):
        MultipleNegativesRankingLoss()(random_embeddings(2, 1))
    assert MultipleNegativesRankingLoss()(random_embeddings(3, 1)).item() > 0


@pytest.mark.parametrize("options", [{"scale": 0.0}, {"similarity": "euclidean"}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        MultipleNegativesRankingLoss(**options)
