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
"""What an evaluation measures: the modes, the numbers of neighbors, the windows"""

from collections.abc import Sequence
from dataclasses import dataclass


MODES = ("off", "random", "on", "neighbor", "continuation", "shuffled", "in_front")


@dataclass(frozen=True)
class EvaluationOptions:
    """
    The options of [`~trainers.evaluation.evaluate.evaluate_retro`] and
    [`~trainers.evaluation.rivals.evaluate_rivals`].

    Args:
        modes (`Sequence[str]`, *optional*, defaults to `("off", "random", "on")`):
            `"off"` without neighbors, `"random"` with random chunks of the datastore, `"on"` with the neighbors,
            `"neighbor"` with the neighbors but without their continuations, `"continuation"` with only the
            continuations, `"shuffled"` with the tokens of each neighbor in random order, and `"in_front"` with the
            neighbors in front of the window of the model without retrieval (see
            [`~trainers.evaluation.in_front.in_front_bits`]).
        num_neighbors (`int` or `Sequence[int]`, *optional*, defaults to 2):
            Number k of neighbors of a chunk, or several numbers, of which each is measured.
        datastore_shares (`Sequence[float]`, *optional*, defaults to `(1.0,)`):
            Shares of the datastore's documents to retrieve from, which shows the effect of its size. For a share below
            1, neighbors are searched again, which needs the embeddings of the split unless BM25 searches.
        window_chunks (`int`, *optional*, defaults to 32):
            Length of a window in chunks. A window starts at position 0 and sees only the neighbors of its own chunks.
        stride_chunks (`int`, *optional*, defaults to 16):
            Step between windows. It must be smaller than the window, so that every counted token has context.
        batch_size (`int`, *optional*, defaults to 8):
            Number of windows in a forward pass.
        max_documents (`int`, *optional*):
            Number of documents to evaluate on, from the beginning of the split. Defaults to all.
        measure_overlap (`bool`, *optional*, defaults to `False`):
            Whether to measure the overlap of each chunk with its ten nearest neighbors, or with fewer if fewer are
            stored.
        domains (`Sequence[str]`, *optional*):
            Domain of each document. Each domain is reported by itself.
        retriever (`str`, *optional*):
            How neighbors are found: `"dense"`, `"bm25"`, `"hybrid"` or `"rerank"` (see
            [`~modeling_retro.retriever.search.NeighborSearch`]). Defaults to the way in which the stored ones
            were found. With another way, they are searched again.
        seed (`int`, *optional*, defaults to 0):
            Seed of the random neighbors, of the shuffling and of the bootstrap.
        keep_token_bits (`bool`, *optional*, defaults to `False`):
            Whether to keep the bits of each token, which all modes except `"in_front"` have.
        allow_unknown_tokens (`bool`, *optional*, defaults to `False`):
            Whether to measure texts of which more than half of the tokens are unknown to the tokenizer. Their bits per
            byte mean nothing, because unknown tokens look the same.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Raises:
        `ValueError`: if a mode is unknown, if the stride is not smaller than the window, or if a number of neighbors
            or a share is out of range.
    """

    modes: Sequence[str] = ("off", "random", "on")
    num_neighbors: int | Sequence[int] = 2
    datastore_shares: Sequence[float] = (1.0,)
    window_chunks: int = 32
    stride_chunks: int = 16
    batch_size: int = 8
    max_documents: int | None = None
    measure_overlap: bool = False
    domains: Sequence[str] | None = None
    retriever: str | None = None
    seed: int = 0
    keep_token_bits: bool = False
    allow_unknown_tokens: bool = False
    show_progress: bool = True

    def __post_init__(self):
        unknown = sorted(set(self.modes) - set(MODES))
        if unknown:
            raise ValueError(f"unknown evaluation modes {', '.join(unknown)}; expected some of {', '.join(MODES)}")
        if not 0 < self.stride_chunks < self.window_chunks:
            raise ValueError(
                f"stride_chunks is {self.stride_chunks}, expected at least 1 and less than window_chunks, "
                f"{self.window_chunks}"
            )
        if not self.numbers or min(self.numbers) < 1:
            raise ValueError(f"num_neighbors is {self.num_neighbors}, expected one or more numbers from 1 on")
        shares = self.datastore_shares
        if not shares or not 0 < min(shares) <= max(shares) <= 1:
            raise ValueError(f"datastore_shares is {list(shares)}, expected shares above 0 and up to 1")

    @property
    def numbers(self) -> list[int]:
        """The numbers of neighbors that are measured."""
        return [self.num_neighbors] if isinstance(self.num_neighbors, int) else list(self.num_neighbors)


__all__ = ["MODES", "EvaluationOptions"]
