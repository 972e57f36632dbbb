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
"""
Encoders of chunks that are not transformers: the mean of token vectors (`StaticEmbedding` of sentence-transformers,
and model2vec), and any other stack of sentence-transformers modules. [`ChunkEncoder.from_pretrained`] chooses among
them.
"""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers.utils import cached_file

from .chunk_encoder import ChunkEncoder, kept_dimensions, tensors_fingerprint


# The white space that ends a word for the tokenizers of `_cuts_at_spaces`. Python's own has characters that do not.
_SPACES = str.maketrans(dict.fromkeys("\t\n\r", " "))
_MOST_WORDS = 1_000_000
_LOOKING_UP = threading.Lock()  # of all encoders, because an encoder with a lock could not be pickled


class StaticChunkEncoder(ChunkEncoder):
    """
    Embeds a text as the mean of the vectors of its tokens, like `StaticEmbedding` of sentence-transformers.

    Nearly all of the time is spent on tokenization. If the tokenizer cuts texts into words first, as that of BERT
    does, each word is tokenized only once and its ids are kept.

    Args:
        embeddings (`torch.Tensor`): [vocabulary, dim], one vector for each token id. The mean is computed in float32.
        tokenizer (`tokenizers.Tokenizer`): The tokenizer of the encoder. Its padding is switched off.
        normalize (`bool`, *optional*, defaults to `True`): Whether embeddings get length 1.
        name (`str`, *optional*): Name or path from which the encoder was loaded.
        revision (`str`, *optional*): Revision from which it was loaded.
        sha256 (`str`, *optional*): Fingerprint of the weights. Defaults to that of `embeddings`.
        prompt (`str`, *optional*): Text that is put in front of every text.
        truncate_dim (`int`, *optional*): Number of leading dimensions that are kept.

    Raises:
        ValueError: If there are fewer vectors than tokens, or fewer dimensions than `truncate_dim`.
    """

    def __init__(
        self,
        embeddings: torch.Tensor,
        tokenizer: Tokenizer,
        normalize: bool = True,
        name: str = "",
        revision: str | None = None,
        sha256: str | None = None,
        prompt: str | None = None,
        truncate_dim: int | None = None,
    ):
        if len(embeddings) < tokenizer.get_vocab_size():
            raise ValueError(
                f"the tokenizer of {name} has {tokenizer.get_vocab_size()} tokens, "
                f"its embeddings {len(embeddings)} rows"
            )
        self.dim = kept_dimensions(embeddings.shape[1], truncate_dim)
        self.truncate_dim = truncate_dim
        self.embeddings = embeddings[:, : self.dim].float().contiguous()
        self.sha256 = sha256 or tensors_fingerprint({"embeddings": embeddings})
        self.max_length = tokenizer.truncation["max_length"] if tokenizer.truncation else None
        tokenizer.no_padding()
        tokenizer.no_truncation()
        # Text that spells a special token, such as [SEP], is tokenized as text.
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer
        self.pooling = "mean"
        self.normalize = normalize
        self.prompt = prompt or ""
        self.name = name
        self.revision = revision
        self._word_ids = _WordIds(tokenizer) if _cuts_at_spaces(tokenizer) else None

    @classmethod
    def from_files(
        cls,
        name: str,
        revision: str | None,
        files: Mapping[str, Any],
        pooling: str | None = None,
        normalize: bool | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        truncate_dim: int | None = None,
    ) -> "StaticChunkEncoder":
        """Loads what `files` describes; the arguments are those of [`ChunkEncoder.from_pretrained`]."""
        if pooling not in (None, "mean"):
            raise ValueError(f"{name} is a static encoder, which pools by 'mean', not {pooling!r}")
        tensors = load_file(cached_file(name, files["path"] + "model.safetensors", revision=revision))
        tokenizer = Tokenizer.from_file(cached_file(name, files["path"] + "tokenizer.json", revision=revision))
        return cls(
            token_vectors(tensors),
            tokenizer,
            normalize=files["normalize"] if normalize is None else normalize,
            name=name,
            revision=revision,
            sha256=tensors_fingerprint(tensors),
            prompt=files["prompt"],
            truncate_dim=truncate_dim,
        )

    @torch.inference_mode()
    def encode(
        self,
        texts: Sequence[str],
        tokens_per_batch: int = 4096,
        window: int = 8192,
        advance: Callable[[int], Any] | None = None,
    ) -> np.ndarray:
        """
        Embeds texts.

        Args:
            texts (`Sequence[str]`): The texts.
            tokens_per_batch (`int`, *optional*, defaults to 4096): Not used, because nothing is padded.
            window (`int`, *optional*, defaults to 8192): Number of texts that are tokenized together.
            advance (`Callable`, *optional*): Called with the number of texts of each batch that is embedded.

        Returns:
            `np.ndarray`: float32 [n, dim], in the order of `texts`. A text without tokens has zeros.
        """
        embeddings = np.empty((len(texts), self.dim), dtype=np.float32)
        for start in range(0, len(texts), window):
            ids, lengths = self._tokenize([self.prompt + text for text in texts[start : start + window]])
            offsets = np.cumsum(lengths) - lengths
            bags = torch.nn.functional.embedding_bag(
                torch.from_numpy(ids), self.embeddings, torch.from_numpy(offsets), mode="mean"
            )
            if self.normalize:
                bags = torch.nn.functional.normalize(bags, dim=-1)
            embeddings[start : start + window] = bags.numpy()
            if advance is not None:
                advance(len(lengths))
        return embeddings

    def _tokenize(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of all texts one after another, int64 [tokens], and the number of tokens of each, int64 [n]."""
        if self._word_ids is not None:
            words = [text.translate(_SPACES).split(" ") for text in texts]  # at least one for each text, possibly ""
            with _LOOKING_UP:
                ids, counts = self._word_ids.look_up(list(chain.from_iterable(words)))
            sizes = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
            lengths = np.add.reduceat(counts, np.cumsum(sizes) - sizes)
        else:
            ids, lengths = _flat_ids(self.tokenizer, texts)
        if self.max_length is not None and lengths.max() > self.max_length:
            place = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            ids, lengths = ids[place < self.max_length], np.minimum(lengths, self.max_length)
        return ids, lengths


def _flat_ids(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of all texts one after another, int64 [tokens], and the number of tokens of each, int64 [n]."""
    rows = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    return np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=int(lengths.sum())), lengths


class _WordIds:
    """The token ids of words. Each word is tokenized when it is seen for the first time."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._forget()

    def _forget(self) -> None:
        self.number_of: dict[str, int] = {}
        self.ids = np.zeros(0, dtype=np.int64)
        self.counts = np.zeros(0, dtype=np.int64)

    def look_up(self, words: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """
        Token ids of all words one after another, int64 [tokens], and the number of ids of each word, int64 [words].
        """
        if len(self.number_of) > _MOST_WORDS:
            self._forget()
        new = list(set(words).difference(self.number_of))
        if new:
            ids, counts = _flat_ids(self.tokenizer, new)
            self.number_of.update(zip(new, range(len(self.number_of), len(self.number_of) + len(new)), strict=True))
            self.ids, self.counts = np.concatenate([self.ids, ids]), np.concatenate([self.counts, counts])
        number = np.fromiter(map(self.number_of.__getitem__, words), dtype=np.int64, count=len(words))
        counts = self.counts[number]
        starts = (np.cumsum(self.counts) - self.counts)[number]
        place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.ids[np.repeat(starts, counts) + place], counts


class ModulesChunkEncoder(ChunkEncoder):
    """
    Embeds texts with any other stack of sentence-transformers modules, which that library computes.

    Args:
        model (`sentence_transformers.SentenceTransformer`): The model.
        normalize (`bool`): Whether embeddings get length 1.
        name (`str`): Name or path from which the encoder was loaded.
        revision (`str`, *optional*): Revision from which it was loaded.
        sha256 (`str`, *optional*): Fingerprint of the weights. Defaults to that of the current weights.
        truncate_dim (`int`, *optional*): Number of leading dimensions that are kept.
    """

    def __init__(
        self,
        model: Any,
        normalize: bool,
        name: str,
        revision: str | None = None,
        sha256: str | None = None,
        truncate_dim: int | None = None,
    ):
        self.model = model.eval()
        self.tokenizer = model.tokenizer
        self.max_length = model.max_seq_length
        self.pooling = "modules"
        self.normalize = normalize
        self.prompt = model.prompts.get(model.default_prompt_name) or ""
        self.dim = kept_dimensions(model.get_embedding_dimension(), truncate_dim)
        self.truncate_dim = truncate_dim
        self.name = name
        self.revision = revision
        self.sha256 = sha256 or tensors_fingerprint(model.state_dict())

    @classmethod
    def from_files(
        cls,
        name: str,
        revision: str | None,
        files: Mapping[str, Any],
        pooling: str | None = None,
        normalize: bool | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        truncate_dim: int | None = None,
    ) -> "ModulesChunkEncoder":
        """Loads what `files` describes; the arguments are those of [`ChunkEncoder.from_pretrained`]."""
        if pooling not in (None, "modules"):
            raise ValueError(
                f"{name} is a stack of modules with a pooling of its own; pooling must be 'modules' or not be given, "
                f"got {pooling!r}"
            )
        if files["normalize"] and normalize is False:
            raise ValueError(f"the last module of {name} normalizes; normalize=False cannot undo that")
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ImportError(
                f"the modules of {name} are computed by sentence-transformers: `pip install sentence-transformers`"
            ) from error
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = SentenceTransformer(name, revision=revision, device=str(device))
        sha256 = tensors_fingerprint(model.state_dict())
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        model = model.to(dtype or torch.float32)
        return cls(model, files["normalize"] or bool(normalize), name, revision, sha256, truncate_dim)

    def encode(
        self,
        texts: Sequence[str],
        tokens_per_batch: int = 4096,
        window: int = 8192,
        advance: Callable[[int], Any] | None = None,
    ) -> np.ndarray:
        """
        Embeds texts.

        Args:
            texts (`Sequence[str]`): The texts.
            tokens_per_batch (`int`, *optional*, defaults to 4096): A batch has one text for each 128 of these tokens.
            window (`int`, *optional*, defaults to 8192): Not used, because the library sorts the texts.
            advance (`Callable`, *optional*): Called with the number of all texts, when they are embedded.

        Returns:
            `np.ndarray`: float32 [n, dim], in the order of `texts`.
        """
        if not len(texts):
            return np.zeros((0, self.dim), dtype=np.float32)
        vectors = self.model.encode(
            list(texts),
            batch_size=max(1, tokens_per_batch // 128),
            show_progress_bar=False,
            normalize_embeddings=self.normalize,
            truncate_dim=self.truncate_dim,
        )
        if advance is not None:
            advance(len(texts))
        return vectors.astype(np.float32)


def token_vectors(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """
    Returns a vector for each token id, from the tensors of a `StaticEmbedding` or of a model2vec model.

    Args:
        tensors (`Mapping[str, torch.Tensor]`):
            `embedding.weight`, or `embeddings` with optional `mapping` [vocabulary] (row of a token) and `weights`
            [vocabulary] (factor of a token).

    Returns:
        `torch.Tensor`: [vocabulary, dim].
    """
    if "embedding.weight" in tensors:
        return tensors["embedding.weight"]
    vectors = tensors["embeddings"]
    if "mapping" in tensors:
        vectors = vectors[tensors["mapping"].long()]
    if "weights" in tensors:
        vectors = vectors.float() * tensors["weights"][:, None]
    return vectors


def _cuts_at_spaces(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer cuts a text at spaces and tokenizes each word by itself, as that of BERT does."""
    parts = json.loads(tokenizer.to_str())
    kinds = {name: (parts[name] or {}).get("type") for name in ("normalizer", "pre_tokenizer")}
    plain = all(token["special"] for token in parts["added_tokens"])
    return plain and kinds["pre_tokenizer"] == "BertPreTokenizer" and kinds["normalizer"] in ("BertNormalizer", None)
