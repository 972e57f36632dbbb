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
"""Datastores of a few small arrays, with the read interface of `RetroDatastore`, for tests that need exact numbers."""

from types import SimpleNamespace

import numpy as np

from modeling_retro.datastore.manifest import SplitRecord


class ArrayChunks:
    """The interface of `ChunkTable` over lists of token ids: one list a chunk."""

    def __init__(self, documents, chunk_size, num_bytes=None):
        rows = [
            (document_id, document[start : start + chunk_size])
            for document_id, document in enumerate(documents)
            for start in range(0, len(document), chunk_size)
        ]
        self.chunk_size = chunk_size
        self.document_id = np.array([document_id for document_id, _ in rows])
        self.length = np.array([len(tokens) for _, tokens in rows], dtype=np.int32)
        self.input_ids = np.zeros((len(rows), chunk_size), dtype=np.int64)
        for row, (_, tokens) in zip(self.input_ids, rows, strict=True):
            row[: len(tokens)] = tokens
        self.num_bytes = self.length.astype(np.int64) if num_bytes is None else np.array(num_bytes)

    def __len__(self):
        return len(self.input_ids)

    def take(self, chunk_ids):
        chunk_ids = np.asarray(chunk_ids)
        length = np.where(chunk_ids >= 0, self.length[chunk_ids], 0)
        mask = np.arange(self.chunk_size) < length[..., None]
        return self.input_ids[chunk_ids] * mask, mask


class ArraySource:
    """The interface of `DatastoreSplit`."""

    def __init__(self, documents, chunk_size, neighbor_ids, num_bytes=None):
        self.chunks = ArrayChunks(documents, chunk_size, num_bytes)
        self.neighbor_ids = np.array(neighbor_ids)
        self.record = SplitRecord()


class ArrayTokenizer:
    def __init__(self, bos_token_id=None):
        self.bos_token_id = bos_token_id
        self.unk_token_id = None


class ArrayDatastore(ArraySource):
    """The interface of `RetroDatastore` with one chunk of continuation."""

    def __init__(self, documents, chunk_size, neighbor_ids, bos_token_id=None):
        super().__init__(documents, chunk_size, neighbor_ids)
        self.chunk_size = chunk_size
        self.continuation_chunks = 1
        self.manifest = SimpleNamespace(tokenizer=SimpleNamespace(sha256="of an array"), removed=None)
        self.neighbor_length = 2 * chunk_size
        self.tokenizer = ArrayTokenizer(bos_token_id)

    def check_model(self, config):
        self.check_chunk_size(config.chunk_size)

    def check_chunk_size(self, chunk_size):
        if chunk_size != self.chunk_size:
            raise ValueError(f"chunk_size {chunk_size} is not the chunk size {self.chunk_size}")

    def take_neighbors(self, chunk_ids):
        chunk_ids = np.asarray(chunk_ids)
        last = np.append(np.diff(self.chunks.document_id) != 0, True)
        following = np.where((chunk_ids >= 0) & ~last[chunk_ids], chunk_ids + 1, -1)
        tokens, mask = self.chunks.take(np.stack([chunk_ids, following], axis=-1))
        return tokens.reshape(*chunk_ids.shape, -1), mask.reshape(*chunk_ids.shape, -1)


def random_datastore(seed, vocab_size, chunk_size, num_documents, num_neighbors, max_chunks=5):
    """Documents of random tokens, with random neighbors; about one in eight is absent."""
    generator = np.random.default_rng(seed)
    documents = [
        generator.integers(vocab_size, size=generator.integers(1, max_chunks * chunk_size + 1)).tolist()
        for _ in range(num_documents)
    ]
    num_chunks = sum(-(-len(document) // chunk_size) for document in documents)
    neighbor_ids = generator.integers(num_chunks, size=(num_chunks, num_neighbors))
    neighbor_ids[generator.random(neighbor_ids.shape) < 0.125] = -1
    return ArrayDatastore(documents, chunk_size, neighbor_ids)
