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
"""Raw documents to a datastore and to training data: one stage a file, data flowing one way"""

from typing import TYPE_CHECKING

from modeling_retro import lazy_names, refuse_windows


refuse_windows(__name__)


if TYPE_CHECKING:
    from .bm25_index import build_bm25_index as build_bm25_index
    from .chunk import chunk_documents as chunk_documents
    from .deduplicate import deduplicate_documents as deduplicate_documents
    from .embed import embed_chunks as embed_chunks
    from .faiss_index import suggest_factory as suggest_factory
    from .index import build_index as build_index
    from .neighbors import find_neighbors as find_neighbors
    from .pairs.corpus import pairs_from_datastore as pairs_from_datastore
    from .pairs.pairs import PairMixture as PairMixture
    from .pairs.pairs import hash_pairs as hash_pairs
    from .pairs.pairs import hash_texts as hash_texts
    from .pairs.pairs import load_pairs as load_pairs
    from .prepare import extend_datastore as extend_datastore
    from .prepare import prepare_datastore as prepare_datastore
    from .span_corruption.tasks import load_mixture as load_mixture
    from .span_corruption.tasks import read_tasks as read_tasks
    from .upkeep.changes import add_documents as add_documents
    from .upkeep.changes import compact_datastore as compact_datastore
    from .upkeep.changes import remove_documents as remove_documents
    from .upkeep.changes import update_documents as update_documents
    from .upkeep.export import export_datastore as export_datastore
    from .upkeep.import_others import import_datastore as import_datastore
    from .upkeep.verify import repair_datastore as repair_datastore
    from .upkeep.verify import verify_datastore as verify_datastore


_MODULES = {
    "PairMixture": "pairs.pairs",
    "add_documents": "upkeep.changes",
    "build_bm25_index": "bm25_index",
    "build_index": "index",
    "chunk_documents": "chunk",
    "compact_datastore": "upkeep.changes",
    "deduplicate_documents": "deduplicate",
    "embed_chunks": "embed",
    "export_datastore": "upkeep.export",
    "extend_datastore": "prepare",
    "find_neighbors": "neighbors",
    "hash_pairs": "pairs.pairs",
    "hash_texts": "pairs.pairs",
    "import_datastore": "upkeep.import_others",
    "load_mixture": "span_corruption.tasks",
    "load_pairs": "pairs.pairs",
    "pairs_from_datastore": "pairs.corpus",
    "prepare_datastore": "prepare",
    "read_tasks": "span_corruption.tasks",
    "remove_documents": "upkeep.changes",
    "repair_datastore": "upkeep.verify",
    "suggest_factory": "faiss_index",
    "update_documents": "upkeep.changes",
    "verify_datastore": "upkeep.verify",
}

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
__all__ = sorted(_MODULES)
