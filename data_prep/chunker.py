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
"""Cuts the texts of documents into chunks of tokens"""

import json
from collections.abc import Sequence
from itertools import chain, pairwise

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from data_prep.documents import (
    Document,
)


# Share of unknown tokens above which a warning is given.
MANY_UNKNOWN = 0.01


def text_beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens with which a tokenizer begins each text: its BOS token, or none."""
    first = tokenizer("")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


class DocumentChunker:
    """
    Cuts documents into chunks of token ids, and counts the bytes of the source that each chunk covers.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A fast tokenizer with an EOS (or SEP) token.
        chunk_size (`int`): Number m of tokens in a chunk.
        allow_control_tokens (`bool`, *optional*, defaults to `False`):
            Whether text that spells a special token, such as `<|endoftext|>`, becomes that token. By default it is
            tokenized as text, so that no document can end itself or speak as another role of a chat.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chunk_size: int, allow_control_tokens: bool = False):
        eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        if eos is None:
            raise ValueError(f"the tokenizer {tokenizer.name_or_path} has no EOS token to end a document with")
        self.chunk_size = chunk_size
        self.dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
        self.suffix = [eos]
        self.prefix = text_beginning(tokenizer)
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = not allow_control_tokens
        # Models of the Unigram kind may still have a special token among their pieces.
        spelled = [self._backend.encode(token, add_special_tokens=False).ids for token in tokenizer.all_special_tokens]
        spelled = set(chain.from_iterable(spelled)) & set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        self._unwanted = [] if allow_control_tokens else sorted(spelled)
        self.tokenizer = tokenizer
        self._unknown = tokenizer.unk_token_id
        self._token_bytes = byte_lengths(self._backend)

    def chunk(self, documents: Sequence[Document]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """
        Chunks some documents.

        Args:
            documents (`Sequence[Document]`): The documents.

        Returns:
            `tuple`: the columns (`input_ids` [n, m], padded with 0, and `length`, `document_id`, `num_bytes` [n]), and
            the number of chunks of each document (int64, 0 for a document without tokens).
        """
        m = self.chunk_size
        rows, encodings = self._encode([document.text for document in documents])
        added = len(self.prefix) + len(self.suffix)
        tokens = np.array([len(row) + added if len(row) else 0 for row in rows], dtype=np.int64)
        chunks = -(-tokens // m)
        first_chunk = np.cumsum(chunks) - chunks
        first_token = np.cumsum(tokens) - tokens
        # Token j of a document has index first_chunk * m + j in the flat array of chunks.
        place = np.arange(tokens.sum()) + np.repeat(first_chunk * m - first_token, tokens)
        input_ids = np.zeros((int(chunks.sum()), m), dtype=self.dtype)
        prefix, suffix = np.array(self.prefix, dtype=self.dtype), np.array(self.suffix, dtype=self.dtype)
        parts = chain.from_iterable((prefix, row, suffix) for row in rows if len(row))
        input_ids.reshape(-1)[place] = np.concatenate([prefix[:0], *parts])
        length = np.full(len(input_ids), m, dtype=np.int32)
        kept = chunks > 0
        length[(first_chunk + chunks - 1)[kept]] = (tokens - (chunks - 1) * m)[kept]
        num_bytes = [
            self._chunk_bytes(document.text, row, encoding)
            for document, row, encoding in zip(documents, rows, encodings, strict=True)
            if len(row)
        ]
        document_id = np.array([document.document_id for document in documents], dtype=np.int64)
        columns = {
            "input_ids": input_ids,
            "length": length,
            "document_id": np.repeat(document_id, chunks),
            "num_bytes": np.concatenate([np.zeros(0, dtype=np.int64), *num_bytes]),
        }
        return columns, chunks

    def encode(self, text: str) -> np.ndarray:
        """
        Tokenizes a text as a part of a document, without the tokens at the beginning and the end of a document.

        Args:
            text (`str`): The text.

        Returns:
            `np.ndarray`: `[T]`.

        Raises:
            ValueError: If the text spells a control token that the tokenizer cannot split.
        """
        return self._encode([text])[0][0]

    def _encode(self, texts: Sequence[str]) -> tuple[list[np.ndarray], list[Encoding]]:
        # If the bytes of each token are known, the offsets, which take up to a quarter of the time, are not needed.
        encode = self._backend.encode_batch if self._token_bytes is None else self._backend.encode_batch_fast
        encodings = encode(list(texts), add_special_tokens=False)
        rows = [np.fromiter(encoding.ids, dtype=self.dtype, count=len(encoding)) for encoding in encodings]
        if self._unwanted:
            rows = [self._without_control_tokens(row) for row in rows]
        return rows, encodings

    def _without_control_tokens(self, row: np.ndarray) -> np.ndarray:
        is_unwanted = np.isin(row, self._unwanted)
        if is_unwanted.any() and self._unknown is None:
            raise ValueError(
                "a document spells a control token, which the tokenizer cannot split and for which it has no unknown "
                "token; pass allow_control_tokens if the documents can be trusted"
            )
        return np.where(is_unwanted, self.dtype(self._unknown or 0), row)

    def _chunk_bytes(self, text: str, row: np.ndarray, encoding: Encoding) -> np.ndarray:
        """
        Counts the UTF-8 bytes of the text that each chunk of a document covers. A chunk ends where its last token
        ends. Text that the tokenizer skips before a token therefore belongs to that token, and a character that is
        split over two chunks belongs to the first.
        """
        # The numbers of tokens up to the end of each chunk but the last.
        stops = np.arange(self.chunk_size, len(row) + len(self.prefix) + len(self.suffix), self.chunk_size)
        stops = np.clip(stops - len(self.prefix), 0, len(row))
        data = text.encode()
        cuts = None
        if self._token_bytes is not None:
            ends = np.append(0, np.cumsum(self._token_bytes[row]))
            if ends[-1] == len(data):
                cuts = ends[stops]
            else:  # a normalizer changed the text, or a token includes spaces
                encoding = self._backend.encode(text, add_special_tokens=False)
        if cuts is None:
            ends = [0, *(encoding.token_to_chars(int(stop) - 1)[1] if stop else 0 for stop in stops)]
            ends = np.maximum.accumulate(ends)  # offsets of some normalizers decrease
            cuts = np.cumsum([len(text[a:b].encode()) for a, b in pairwise(ends)], dtype=np.int64)
            cuts[stops == len(row)] = len(data)
        for i, cut in enumerate(cuts.tolist()):
            while cut < len(data) and data[cut] & 0xC0 == 0x80:  # inside a character
                cut += 1
            cuts[i] = cut
        return np.diff(cuts, prepend=0, append=len(data))


def unknown_tokens(tokenizer: PreTrainedTokenizerBase, input_ids: np.ndarray, length: np.ndarray) -> np.ndarray:
    """
    Counts the unknown tokens of chunks. A tokenizer that knows all bytes has none, even if, as in GPT-2, its unknown
    token is that of the end of a text.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        input_ids (`np.ndarray`): Token ids [n, m].
        length (`np.ndarray`): Number of tokens of each chunk [n].

    Returns:
        `np.ndarray`: int64 [n].
    """
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.sep_token_id):
        return np.zeros(len(input_ids), dtype=np.int64)
    return ((input_ids == unknown) & (np.arange(input_ids.shape[1]) < length[:, None])).sum(axis=1)


def control_tokens_inside(
    tokenizer: PreTrainedTokenizerBase, input_ids: np.ndarray, length: np.ndarray, document_id: np.ndarray
) -> int:
    """
    Counts the special tokens that are neither the first nor the last token of a document.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        input_ids (`np.ndarray`): Token ids [n, m] of whole documents.
        length (`np.ndarray`): Number of tokens of each chunk [n].
        document_id (`np.ndarray`): Id of the document of each chunk [n], ascending.
    """
    special = sorted(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})
    is_special = np.isin(input_ids, special) & (np.arange(input_ids.shape[1]) < length[:, None])
    starts = np.diff(document_id, prepend=-1) != 0
    is_special[starts, 0] = False
    ends = np.append(starts[1:], True)
    is_special[ends, length[ends] - 1] = False
    return int(is_special.sum())


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray | None:
    """
    Returns the number of bytes that each token of a byte-level tokenizer stands for.

    Args:
        tokenizer (`Tokenizer`): Any tokenizer.

    Returns:
        `np.ndarray`: int64 [vocabulary], or None for a tokenizer of another kind or one that puts a space before the
        text.
    """
    steps = json.loads(tokenizer.to_str())["pre_tokenizer"] or {"type": None}
    steps = [step for step in steps.get("pretokenizers", [steps]) if step["type"] == "ByteLevel"]
    if not steps or any(step["add_prefix_space"] for step in steps):
        return None
    vocabulary = tokenizer.get_vocab()
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    lengths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, index in vocabulary.items():
        # Each character of a byte-level token stands for one byte. Tokens that were added later are plain text.
        lengths[index] = len(token.encode()) if token in added else len(token)
    return lengths
