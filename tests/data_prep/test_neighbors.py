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
"""Neighbors are filtered for a reason, and every reason is counted."""

import shutil

import numpy as np
import pytest

from data_prep.neighbors import find_neighbors, near_duplicate_filter
from modeling_retro.datastore.datastore import RetroDatastore


@pytest.fixture
def datastore_dir(tiny_datastore_dir, tmp_path):
    return shutil.copytree(tiny_datastore_dir, tmp_path / "datastore")


def token_share(query, other):
    return np.mean([token in other for token in query])


def test_share_of_tokens_is_that_of_the_definition(tiny_datastore_dir):
    chunks = RetroDatastore.from_pretrained(tiny_datastore_dir).chunks
    generator = np.random.default_rng(0)
    query_ids = generator.integers(0, len(chunks), 50)
    input_ids, mask = chunks.take(query_ids)
    rows, ids = np.arange(50), generator.integers(0, len(chunks), (50, 7))
    dropped = near_duplicate_filter(chunks, input_ids, mask, 0.5)(rows, ids)
    for row, column in np.ndindex(dropped.shape):
        other, other_mask = chunks.take(ids[row, column])
        share = token_share(input_ids[row][mask[row]], other[other_mask])
        assert dropped[row, column] == (share > 0.5)
    assert 0 < dropped.mean() < 1


def test_near_duplicates_are_dropped_and_counted(datastore_dir):
    datastore = RetroDatastore.from_pretrained(datastore_dir)
    before = datastore.neighbor_ids.copy()
    stage = find_neighbors(datastore_dir, num_neighbors=4, drop_near_duplicates=0.6, force=True)
    datastore = RetroDatastore.from_pretrained(datastore_dir)
    after, documents = datastore.neighbor_ids, datastore.chunks.document_id
    assert stage.counts["near_duplicates"] > 0 and stage.counts["own_document"] > 0
    assert datastore.manifest.train.neighbors.counts == stage.counts
    assert (after != before).any()
    for chunk in range(0, len(after), 11):
        query, mask = datastore.chunks.take(chunk)
        for neighbor in after[chunk][after[chunk] >= 0]:
            other, other_mask = datastore.chunks.take(neighbor)
            assert token_share(query[mask], other[other_mask]) <= 0.6
            assert documents[neighbor] != documents[chunk]


def test_finished_neighbors_are_left_alone(datastore_dir):
    shard = datastore_dir / "neighbors" / "shard-00000"
    before = shard.stat().st_mtime_ns
    find_neighbors(datastore_dir, num_neighbors=4)
    assert shard.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="`neighbors` was begun with num_neighbors=4, not 3"):
        find_neighbors(datastore_dir, num_neighbors=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_neighbors": 0}, r"between 1 and the 457 searched chunks, got 0"),
        ({"num_neighbors": 10_000}, "got 10000"),
        ({"drop_near_duplicates": 1.5}, r"must lie in \[0, 1\), got 1.5"),
        ({"split": "test"}, "no split 'test'"),
    ],
)
def test_bad_options_are_named(datastore_dir, options, message):
    with pytest.raises(ValueError, match=message):
        find_neighbors(datastore_dir, **options)
