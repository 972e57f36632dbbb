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
from types import SimpleNamespace

from data_prep.results import chunks_in_words, neighbors_in_words


def test_results_are_words_with_units_and_nothing_is_said_of_what_did_not_happen():
    stage = SimpleNamespace(
        options={"num_neighbors": 2},
        shards=[SimpleNamespace(rows=1000), SimpleNamespace(rows=234)],
        counts={"own_document": 56_729, "near_duplicates": 0, "short": 3},
    )
    assert neighbors_in_words(stage).splitlines() == [
        "2 neighbors of each of 1,234 chunks",
        "56,729 hits of the chunk's own document were left out, as they should be",
        "3 chunks have fewer neighbors than asked for",
    ]
    chunks = SimpleNamespace(
        num_chunks=4212,
        num_documents=131,
        num_tokens=268_000,
        num_bytes=1_048_576,
        num_unknown_tokens=0,
        dropped={"bad_records": 0, "filtered": 7},
    )
    assert chunks_in_words(chunks).splitlines() == [
        "4,212 chunks of 131 documents (268,000 tokens, 1,048,576 bytes of text)",
        "7 records were left out by the filter",
    ]
