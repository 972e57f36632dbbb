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
"""Makes pairs for training the retriever from the documents of a datastore, without labels"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash
from datasets import Dataset, Features, Value
from tqdm.auto import tqdm

from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.encoder.chunk_encoder import decode_chunks


KINDS = ("continuation", "entity", "title")

_BLOCK = 8192

# Names of several words, and identifiers such as `load_dataset` or `torch.nn`
_ENTITY = re.compile(r"\b[A-Z][\w'’-]+(?: (?:of |the |de |von |van )?[A-Z][\w'’-]+)+|\b\w{2,}(?:[._]\w{2,})+")
# Headings of wikitext (= A =), Markdown (# A) and reStructuredText (A over a line of one sign)
_TITLE = re.compile(r"^ *=+ (.+?) =+ *$|^#+ +(.+?) *$|^(\S.*)\n([=\-~^\"'*+#])\4{2,} *$", re.MULTILINE)


def pairs_from_datastore(
    datastore: RetroDatastore,
    kinds: Sequence[str] = KINDS,
    max_documents: int = 10,
    min_tokens: int = 16,
    max_chunks: int = 1_000_000,
    seed: int = 0,
) -> Dataset:
    """
    Makes pairs of chunks that belong together.

    - `"continuation"`: a chunk and the next chunk of its document
    - `"entity"`: a chunk and a chunk of another document that shares its rarest name or identifier
    - `"title"`: a chunk and a chunk of another document that holds the same section title

    Args:
        datastore ([`~modeling_retro.RetroDatastore`]):
            The datastore, of which only the chunks are read.
        kinds (`Sequence[str]`, *optional*):
            The kinds of pairs to make. Defaults to all three.
        max_documents (`int`, *optional*, defaults to 10):
            A name or title that occurs in more documents is not used.
        min_tokens (`int`, *optional*, defaults to 16):
            Shorter chunks are left out.
        max_chunks (`int`, *optional*, defaults to 1,000,000):
            Largest number of chunks to use. Of a larger datastore they are a random sample.
        seed (`int`, *optional*, defaults to 0):
            Seed of the sample and of the choice among partners.

    Returns:
        `datasets.Dataset`: the columns `anchor` and `positive`, which hold the texts of chunks as the encoder reads
        them, and `anchor_document_id` and `positive_document_id`, by which chunks of one document are not used as
        negatives of each other.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or not kinds:
        raise ValueError(f"kinds are {list(kinds)}, expected some of {', '.join(KINDS)}")
    chunks = datastore.chunks
    generator = np.random.default_rng(seed)
    chosen = np.flatnonzero((chunks.length >= min_tokens) & ~datastore.is_removed(np.arange(len(chunks))))
    if len(chosen) > max_chunks:
        chosen = np.sort(generator.choice(chosen, size=max_chunks, replace=False))
    found = []
    if "continuation" in kinds:
        found.append(_continuations(chosen, chunks.length, chunks.document_id, min_tokens))
    for kind, pattern in (("entity", _ENTITY), ("title", _TITLE)):
        if kind in kinds:
            keys, owners = _find_keys(datastore, chosen, pattern, kind)
            found.append(_pairs_with_common_key(keys, owners, chunks.document_id, max_documents, generator))
    pairs = np.concatenate(found)
    if len(pairs) == 0:
        raise ValueError(f"{datastore.path} has no pairs of the kinds {', '.join(kinds)}; its documents are too short")
    texts = Features({"anchor": Value("string"), "positive": Value("string")})
    documents = Features({f"{name}_document_id": Value("int64") for name in texts})
    fingerprint = datastore.manifest.train.chunks.fingerprint
    return Dataset.from_generator(
        _read_pairs,
        features=Features({**texts, **documents}),
        gen_kwargs={
            "datastore": str(datastore.path),
            "fingerprint": fingerprint,
            "pairs": pairs,
        },
    )


def _continuations(chosen: np.ndarray, length: np.ndarray, document_id: np.ndarray, min_tokens: int) -> np.ndarray:
    chosen = chosen[chosen + 1 < len(length)]
    follows = (document_id[chosen] == document_id[chosen + 1]) & (length[chosen + 1] >= min_tokens)
    return np.stack([chosen[follows], chosen[follows] + 1], axis=1)


def _texts(datastore: RetroDatastore, chunk_ids: np.ndarray) -> list[str]:
    return decode_chunks(*datastore.chunks.take(chunk_ids), datastore.tokenizer)


def _find_keys(
    datastore: RetroDatastore, chosen: np.ndarray, pattern: re.Pattern, kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the matches of a pattern, and the chunks of the matches, as two aligned arrays."""
    keys, owners = [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.int64)]
    for start in tqdm(range(0, len(chosen), _BLOCK), desc=f"Looking for pairs by {kind}"):
        block = chosen[start : start + _BLOCK]
        hashes = [
            {
                xxhash.xxh3_64_intdigest(next(filter(None, match.groups()), match[0]).lower().encode())
                for match in matches
            }
            for matches in map(pattern.finditer, _texts(datastore, block))
        ]
        keys.append(np.fromiter((key for found in hashes for key in sorted(found)), dtype=np.uint64))
        owners.append(np.repeat(block, [len(found) for found in hashes]))
    return np.concatenate(keys), np.concatenate(owners)


def _name(match: re.Match) -> str:
    """The title in one of the groups, or else the whole match."""
    return next(filter(None, match.groups()), match[0])


def _pairs_with_common_key(
    keys: np.ndarray, owners: np.ndarray, document_id: np.ndarray, max_documents: int, generator: np.random.Generator
) -> np.ndarray:
    """Pairs each chunk with a random chunk of another document that shares its rarest key; int64 [pairs, 2]."""
    order = np.lexsort((owners, keys))  # chunks are ordered by document
    keys, owners = keys[order], owners[order]
    documents = document_id[owners]
    new_key = np.diff(keys, prepend=~keys[:1]) != 0
    new_document = new_key | (np.diff(documents, prepend=-1) != 0)
    # The first entry, the number of entries and the number of documents of the key of each entry
    key_of = np.cumsum(new_key) - 1
    key_start = np.flatnonzero(new_key)[key_of]
    key_size = np.bincount(key_of, minlength=1)[key_of]
    key_documents = np.bincount(key_of, weights=new_document, minlength=1)[key_of].astype(np.int64)
    # The entries of the same key and document, which are skipped
    run_of = np.cumsum(new_document) - 1
    run_start = np.flatnonzero(new_document)[run_of]
    run_size = np.bincount(run_of, minlength=1)[run_of]

    usable = np.flatnonzero((key_documents >= 2) & (key_documents <= max_documents))
    rarest_first = usable[np.lexsort((key_documents[usable], owners[usable]))]
    anchors, first = np.unique(owners[rarest_first], return_index=True)
    entries = rarest_first[first]
    partners = key_start[entries] + generator.integers(key_size[entries] - run_size[entries])
    partners += np.where(partners >= run_start[entries], run_size[entries], 0)
    pairs = np.stack([anchors, owners[partners]], axis=1)
    # Only one of (a, b) and (b, a) is needed.
    return pairs[np.unique(np.sort(pairs, axis=1), axis=0, return_index=True)[1]]


def _read_pairs(datastore: str, fingerprint: str, pairs: np.ndarray) -> Iterator[dict[str, str | int]]:
    """Yields the pairs. `fingerprint` is not read: it distinguishes states of the datastore in the cache."""
    opened = RetroDatastore.from_pretrained(Path(datastore))
    for start in range(0, len(pairs), _BLOCK):
        block = pairs[start : start + _BLOCK]
        anchors, positives = _texts(opened, block[:, 0]), _texts(opened, block[:, 1])
        documents = opened.chunks.document_id[block].tolist()
        for anchor, positive, (anchor_document, positive_document) in zip(anchors, positives, documents, strict=True):
            if anchor.strip() and positive.strip():
                yield {
                    "anchor": anchor,
                    "positive": positive,
                    "anchor_document_id": anchor_document,
                    "positive_document_id": positive_document,
                }
