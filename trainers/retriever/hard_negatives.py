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
"""Finds hard negatives: texts that an encoder takes for the positive of an anchor although they are not"""

import numpy as np
from datasets import Dataset
from transformers.utils import logging

from data_prep.pairs.pairs import hash_pairs
from modeling_retro.datastore.datastore import faiss  # if faiss is missing, this import names the extras
from modeling_retro.encoder.chunk_encoder import ChunkEncoder
from modeling_retro.retriever.search import search


logger = logging.get_logger(__name__)


def mine_negatives(
    pairs: Dataset,
    encoder: ChunkEncoder,
    num_negatives: int = 1,
    depth: int = 50,
    max_relative_score: float = 0.95,
    factory: str = "Flat",
    seed: int = 0,
) -> Dataset:
    """
    Adds hard negatives to pairs. They are the nearest texts among all positives. The anchor, positives of an equal
    anchor, and texts that are so near that they are probably right as well, are not used.

    Source of the relative threshold: NV-Retriever, [arXiv:2407.15831](https://huggingface.co/papers/2407.15831),
    section 3.2 (TopK-PercPos).

    Args:
        pairs (`datasets.Dataset`):
            Pairs with the columns `anchor` and `positive`.
        encoder ([`~modeling_retro.encoder.chunk_encoder.ChunkEncoder`]):
            The encoder.
        num_negatives (`int`, *optional*, defaults to 1):
            Number of hard negatives of each pair. Pairs with fewer are left out.
        depth (`int`, *optional*, defaults to 50):
            Number of nearest texts to take them from.
        max_relative_score (`float`, *optional*, defaults to 0.95):
            Highest score of a negative, as a share of the score of the positive.
        factory (`str`, *optional*, defaults to `"Flat"`):
            faiss factory of the index.
        seed (`int`, *optional*, defaults to 0):
            Seed of the sample on which an index is trained.

    Returns:
        `datasets.Dataset`: columns `anchor`, `positive`, `negative_1`, …
    """
    pairs = pairs.select_columns(["anchor", "positive"])
    text_ids = hash_pairs(pairs)
    _, first_row, document_of_row = np.unique(text_ids[:, 1], return_index=True, return_inverse=True)
    anchors = encoder.encode(pairs["anchor"][:])
    documents = encoder.encode(pairs.select(first_row)["positive"][:])

    index = faiss.index_factory(documents.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    sample = np.random.default_rng(seed).permutation(len(documents))[:1_000_000]
    index.train(documents[np.sort(sample)])
    index.add(documents)

    number_of_anchor = np.unique(text_ids[:, 0], return_inverse=True)[1]
    right = np.unique(number_of_anchor * len(documents) + document_of_row)
    document_texts = text_ids[first_row, 1]

    def is_right(rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        return np.isin(number_of_anchor[rows, None] * len(documents) + ids, right) & (ids >= 0)

    def is_anchor(rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        return document_texts[ids] == text_ids[rows, 0, None]

    unwanted = {"positive": is_right, "anchor": is_anchor}
    ids, scores, _ = search(index, anchors, min(depth, len(documents)), unwanted)
    positive_scores = (anchors * documents[document_of_row]).sum(axis=1)
    usable = (ids >= 0) & (scores <= max_relative_score * positive_scores[:, None])
    order = np.argsort(~usable, axis=1, kind="stable")[:, :num_negatives]  # the nearest usable texts
    chosen = np.take_along_axis(ids, order, axis=1)
    complete = np.flatnonzero(usable.sum(axis=1) >= num_negatives)
    logger.info("%d of %d pairs have %d hard negatives", len(complete), len(pairs), num_negatives)
    mined = pairs.select(complete)
    for number in range(num_negatives):
        column = pairs.select(first_row[chosen[complete, number]])["positive"][:]
        mined = mined.add_column(f"negative_{number + 1}", column)
    return mined
