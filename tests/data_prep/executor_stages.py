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
"""The stages of a small datastore, as the tests of executors run them."""

from functools import partial

from conftest import TINY_CHUNK_SIZE, make_texts, write_jsonl

from data_prep.chunk import chunk_documents
from data_prep.embed import embed_chunks
from data_prep.index import build_index
from data_prep.neighbors import find_neighbors


def stages_of(folder, tokenizer, encoder, num_texts):
    """A function that takes the path of a datastore, and returns its stages, each as a call without arguments."""
    tokenizer.save_pretrained(folder / "tokenizer")
    file = write_jsonl(folder / "train.jsonl", [text for text in make_texts(num_texts, seed=2) if text.strip()])

    def of(path):
        chunking = {"chunk_size": TINY_CHUNK_SIZE, "shard_bytes": 2000}
        return [
            partial(chunk_documents, str(file), path, str(folder / "tokenizer"), **chunking),
            partial(embed_chunks, path, str(encoder)),
            partial(build_index, path, factory="Flat"),
            partial(find_neighbors, path, num_neighbors=2),
        ]

    return of
