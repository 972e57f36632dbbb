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
"""What the stages of a datastore made, in words."""

from modeling_retro.datastore.manifest import Bm25Record, ChunksStage, IndexRecord, NeighborsStage


_DROPPED = {
    "bad_records": "bad records were left out; quarantine/ lists them",
    "filtered": "records were left out by the filter",
    "left_out": "files were left out; quarantine/ lists them",
}
_COUNTS = {
    "own_document": "hits of the chunk's own document were left out, as they should be",
    "near_duplicates": "hits that nearly equal the chunk were left out",
    "removed": "hits of removed documents were left out",
    "refetched": "searches were repeated with more hits, because too few were left",
    "short": "chunks have fewer neighbors than asked for",
}


def chunks_in_words(stage: ChunksStage) -> str:
    """Says what was chunked, and what was left out, each in a line."""
    lines = [
        f"{stage.num_chunks:,} chunks of {stage.num_documents:,} documents "
        f"({stage.num_tokens:,} tokens, {stage.num_bytes:,} bytes of text)"
    ]
    lines += [f"{stage.dropped[name]:,} {words}" for name, words in _DROPPED.items() if stage.dropped.get(name)]
    if stage.num_unknown_tokens:
        lines.append(f"{stage.num_unknown_tokens:,} tokens are unknown to the tokenizer")
    return "\n".join(lines)


def neighbors_in_words(stage: NeighborsStage) -> str:
    """Says how many neighbors were found, and which hits were left out, each in a line."""
    rows = sum(shard.rows for shard in stage.shards)
    lines = [f"{stage.options['num_neighbors']} neighbors of each of {rows:,} chunks"]
    lines += [f"{stage.counts[name]:,} {words}" for name, words in _COUNTS.items() if stage.counts.get(name)]
    return "\n".join(lines)


def index_in_words(record: IndexRecord) -> str:
    """Says which index was built, and how well it finds."""
    parameters = ", ".join(f"{name} {value}" for name, value in record.search_parameters.items())
    recall = ", ".join(f"{name} {value:.3f}" for name, value in record.recall.items() if "@" in name)
    return f"index {record.factory} over {record.ntotal:,} chunks, {parameters or 'exact search'}: {recall}"


def bm25_in_words(record: Bm25Record) -> str:
    """Says what the BM25 index holds."""
    return f"BM25 index over {record.ntotal:,} chunks, with {record.num_terms:,} different {record.options['terms']}"
