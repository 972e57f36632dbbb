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
"""Names the held-out documents that repeat the most of the datastore, and the documents that they repeat"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.datastore.splits import DatastoreSplit
from modeling_retro.retriever.ranking import longest_common_substring


def closest_documents(
    datastore: RetroDatastore, split: DatastoreSplit, overlap: np.ndarray, number: int = 10
) -> list[dict[str, Any]]:
    """
    Finds the chunk of each held-out document that overlaps the most with one of its stored neighbors, and the source
    of that neighbor.

    Args:
        datastore ([`RetroDatastore`]):
            The datastore of the neighbors.
        split ([`DatastoreSplit`]):
            The held-out documents.
        overlap (`np.ndarray`):
            float64 `[chunks]`, the overlap of each chunk, as [`neighbor_overlap`] measures it.
        number (`int`, *optional*, defaults to 10):
            Largest number of documents.

    Returns:
        `list[dict]`: `overlap`, `document` and `neighbor` (sources, `None` where the datastore does not say), the
        highest overlap first.
    """
    documents = split.chunks.document_id[: len(overlap)]
    order = np.lexsort((np.arange(len(overlap)), -overlap))
    _, first = np.unique(documents[order], return_index=True)
    chunks = order[np.sort(first)][:number]
    chunks = chunks[overlap[chunks] > 0]
    ids = split.neighbor_ids[chunks]
    tokens, mask = split.chunks.take(chunks)
    neighbors, neighbor_mask = datastore.take_neighbors(ids)
    # Padding must not equal any token.
    runs = longest_common_substring(np.where(mask, tokens, -1)[:, None], np.where(neighbor_mask, neighbors, -2))
    closest = np.take_along_axis(ids, runs.argmax(-1)[:, None], axis=1)[:, 0]
    rows = zip(overlap[chunks].tolist(), split.sources(chunks), datastore.sources(closest), strict=True)
    return [
        {"overlap": share, "document": own and own.to_dict(), "neighbor": its and its.to_dict()}
        for share, own, its in rows
    ]


def format_closest(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of [`closest_documents`] as a Markdown table."""

    def name(source: Mapping[str, Any] | None) -> str:
        source = source or {}
        place = source.get("id") or ":".join(str(source[key]) for key in ("path", "line") if key in source)
        return f"{source['title']} ({place})" if "title" in source else place or "unknown"

    lines = ["| overlap | held-out document | document of the neighbor |", "|---|---|---|"]
    lines += [f"| {row['overlap']:.0%} | {name(row['document'])} | {name(row['neighbor'])} |" for row in rows]
    return "\n".join(lines)
