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
"""Contrastive losses for the encoder of the retriever, in which the other texts of a batch are negatives"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize


class MultipleNegativesRankingLoss(nn.Module):
    r"""
    Ranks the positive of each anchor above all other positives and all hard negatives of the batch (InfoNCE).

    With anchors \\(a_i\\), candidates \\(c_j\\) (the positives, then the hard negatives), \\(c_i\\) the positive of
    \\(a_i\\) and similarity \\(s\\):

    $$\mathcal{L} = -\frac{1}{B} \sum_i \log
    \frac{\exp \lambda s(a_i, c_i)}{\sum_{j \notin F_i} \exp \lambda s(a_i, c_j)}$$

    \\(F_i\\) are the false negatives: candidates whose text equals the anchor or its positive, positives of an equal
    anchor, and candidates from the document of the anchor or of its positive. They are left out if `text_ids` and
    `document_ids` are given, as [`SiameseDataCollator`] gives them.

    Source: [arXiv:1705.00652](https://huggingface.co/papers/1705.00652), section 4.4, and
    [arXiv:1807.03748](https://huggingface.co/papers/1807.03748), equation 4.

    Args:
        scale (`float`, *optional*, defaults to `20.0`):
            The factor \\(\lambda\\), an inverse temperature.
        similarity (`str`, *optional*, defaults to `"cosine"`):
            `"cosine"` or `"dot"`.
        symmetric (`bool`, *optional*, defaults to `False`):
            Whether to also rank the anchor of each positive above all other anchors. The loss is then the mean of both
            directions.
        gather_across_devices (`bool`, *optional*, defaults to `False`):
            Whether to use the candidates of all processes, with gradients. The means of loss and gradient over the
            processes equal those of one process with the joint batch. All processes must have the same number of
            pairs.

    Example:

    ```python
    >>> import torch
    >>> from trainers import MultipleNegativesRankingLoss

    >>> embeddings = torch.eye(2).expand(2, 2, 2)  # two anchors, each equal to its positive, orthogonal to the other's
    >>> MultipleNegativesRankingLoss(scale=1.0)(embeddings)  # log(1 + exp(-1))
    tensor(0.3133)
    ```
    """

    def __init__(
        self,
        scale: float = 20.0,
        similarity: str = "cosine",
        symmetric: bool = False,
        gather_across_devices: bool = False,
    ):
        super().__init__()
        if scale <= 0:
            raise ValueError(f"scale is {scale}, expected a positive number")
        if similarity not in ("cosine", "dot"):
            raise ValueError(f"similarity is {similarity!r}, expected 'cosine' or 'dot'")
        self.scale = scale
        self.similarity = similarity
        self.symmetric = symmetric
        self.gather_across_devices = gather_across_devices

    def extra_repr(self) -> str:
        return f"scale={self.scale}, similarity={self.similarity!r}, symmetric={self.symmetric}"

    def forward(
        self, embeddings: Tensor, text_ids: Tensor | None = None, document_ids: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            embeddings (`torch.FloatTensor` of shape `(columns, batch_size, dim)`):
                Anchors, positives, first hard negatives, and so on.
            text_ids (`torch.LongTensor` of shape `(columns, batch_size)`, *optional*):
                Numbers of the texts. Equal texts have equal numbers.
            document_ids (`torch.LongTensor` of shape `(columns, batch_size)`, *optional*):
                Numbers of the documents of the texts, -1 if unknown.

        Returns:
            `torch.FloatTensor`: the mean loss of the pairs of this process, a scalar.

        Raises:
            `ValueError`: if an anchor has no other candidate than its own positive.
        """
        columns, rows, false_negatives = self._prepare(embeddings, text_ids, document_ids)
        return self._loss_of_rows(columns, rows, false_negatives).mean()

    def _prepare(self, embeddings, text_ids, document_ids):
        """
        Returns the columns of the joint batch, the rows of this process in it, and a function from rows to masks.
        """
        batch_size = embeddings.shape[1]
        start = 0
        if self.gather_across_devices and _num_processes() > 1:
            embeddings = _AllGather.apply(embeddings.transpose(0, 1)).transpose(0, 1)
            text_ids, document_ids = (
                None if ids is None else _all_gather(ids.T.contiguous()).T for ids in (text_ids, document_ids)
            )
            start = dist.get_rank() * batch_size
        if embeddings.shape[0] < 2:
            raise ValueError(
                f"embeddings have {embeddings.shape[0]} columns, expected anchors, positives and negatives"
            )
        if embeddings.shape[0] == 2 and embeddings.shape[1] < 2:
            raise ValueError(
                "the batch has a single pair and no hard negatives, so there is nothing to rank: use a batch size of "
                "at least 2"
            )
        # [C, W * B, d]: normalised here, once
        embeddings = normalize(embeddings, dim=-1) if self.similarity == "cosine" else embeddings
        rows = torch.arange(start, start + batch_size, device=embeddings.device)

        def false_negatives(rows: Tensor, targets: slice) -> Tensor:
            return _false_negatives(text_ids, document_ids, rows, targets)

        return embeddings, rows, false_negatives

    def _loss_of_rows(self, columns: Tensor, rows: Tensor, false_negatives: Callable[..., Tensor]) -> Tensor:
        """Losses [n] of some rows of the joint batch; `columns` [C, N, d] as `_prepare` returns them."""
        directions = [(0, slice(1, None)), (1, slice(0, 1))] if self.symmetric else [(0, slice(1, None))]
        losses = []
        for query, targets in directions:
            candidates = columns[targets].flatten(0, 1)  # [M, d]
            scores = self.scale * columns[query, rows] @ candidates.T  # [n, M]
            scores = scores.masked_fill(false_negatives(rows, targets), -torch.inf)
            losses.append(cross_entropy(scores, rows, reduction="none"))
        return torch.stack(losses).mean(dim=0)


class CachedMultipleNegativesRankingLoss(MultipleNegativesRankingLoss):
    r"""
    [`MultipleNegativesRankingLoss`] for batches that are larger than memory. Only one mini-batch at a time holds
    activations. Loss and gradients are those of the whole batch, at the cost of a second forward pass.

    Source: GradCache, [arXiv:2101.06983](https://huggingface.co/papers/2101.06983), section 3.2.

    Args:
        mini_batch_size (`int`, *optional*, defaults to `32`):
            Number of texts (not pairs) that are embedded at a time.
        kwargs (`dict[str, Any]`, *optional*):
            Arguments of [`MultipleNegativesRankingLoss`].

    Example:

    ```python
    loss_function = CachedMultipleNegativesRankingLoss(mini_batch_size=64)
    loss = loss_function.forward_backward(embed, batch)  # embed: dict of [n, ...] tensors -> [n, dim]
    optimizer.step()
    ```
    """

    def __init__(self, mini_batch_size: int = 32, **kwargs):
        super().__init__(**kwargs)
        if mini_batch_size < 1:
            raise ValueError(f"mini_batch_size is {mini_batch_size}, expected at least 1")
        self.mini_batch_size = mini_batch_size

    def forward_backward(
        self,
        embed: Callable[[dict[str, Tensor]], Tensor],
        inputs: dict[str, Tensor],
        num_columns: int,
        text_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        backward: Callable[[Tensor], None] = Tensor.backward,
        no_sync: Callable[[], AbstractContextManager] = nullcontext,
    ) -> Tensor:
        """
        Computes the loss and accumulates its gradients in the parameters of the encoder.

        Args:
            embed (`Callable`):
                Maps a slice of `inputs` to embeddings `(n, dim)`.
            inputs (`dict[str, torch.Tensor]`):
                Inputs of the encoder, `(columns * batch_size, length)`, with an `attention_mask`.
            num_columns (`int`):
                Number of stacked columns: anchors, positives, hard negatives.
            text_ids, document_ids (`torch.LongTensor` of shape `(columns, batch_size)`, *optional*):
                As for [`MultipleNegativesRankingLoss`].
            backward (`Callable`, *optional*, defaults to `torch.Tensor.backward`):
                Backpropagates a scalar, e.g. `accelerator.backward`.
            no_sync (`Callable`, *optional*):
                Context in which processes do not average gradients, for all mini-batches but the last.

        Returns:
            `torch.FloatTensor`: the loss, detached.
        """
        mini_batches = split_by_length(inputs, self.mini_batch_size)
        # The second pass must draw the same dropout masks as the first.
        seeds = torch.randint(2**62, (len(mini_batches),)).tolist()

        # Step 1: embeddings without graph
        embeddings = None
        for (positions, mini_batch), seed in zip(mini_batches, seeds, strict=True):
            with torch.no_grad(), _seeded(seed, positions.device):
                part = embed(mini_batch)
            if embeddings is None:
                embeddings = part.new_empty(len(inputs["attention_mask"]), part.shape[-1])
            embeddings[positions] = part

        # Step 2: the loss and its gradient with respect to the embeddings
        embeddings.requires_grad_()
        loss = self._backward_to_embeddings(embeddings.unflatten(0, (num_columns, -1)), text_ids, document_ids)

        # Step 3: chain rule, one mini-batch at a time
        for number, ((positions, mini_batch), seed) in enumerate(zip(mini_batches, seeds, strict=True), start=1):
            with no_sync() if number < len(mini_batches) else nullcontext():
                with _seeded(seed, positions.device):
                    part = embed(mini_batch)
                backward(torch.sum(part * embeddings.grad[positions]))
        return loss

    def _backward_to_embeddings(self, embeddings, text_ids, document_ids) -> Tensor:
        """Computes one slice of rows of the score matrix at a time, so that the whole matrix is never in memory."""
        gathered, rows, false_negatives = self._prepare(embeddings, text_ids, document_ids)
        columns = gathered.detach().requires_grad_()
        total = torch.zeros((), dtype=columns.dtype, device=columns.device)
        for part in rows.split(self.mini_batch_size):
            loss = self._loss_of_rows(columns, part, false_negatives).sum() / len(rows)
            loss.backward()
            total += loss.detach()
        gathered.backward(columns.grad)
        return total


def _false_negatives(text_ids: Tensor | None, document_ids: Tensor | None, rows: Tensor, targets: slice) -> Tensor:
    """
    Finds the candidates that must not count as negatives.

    Args:
        text_ids, document_ids (`torch.LongTensor` of shape `(columns, N)` or `None`): Those of the joint batch.
        rows (`torch.LongTensor` of shape `(n,)`): The rows of the mask.
        targets (`slice`): The columns that hold the M candidates, which are N times the number of columns.

    Returns:
        `torch.BoolTensor`: `(n, M)`. It is never true for the candidate that belongs to the row.
    """
    mask = torch.zeros((len(rows), 1), dtype=torch.bool, device=rows.device)
    if text_ids is not None:
        candidates = text_ids[targets].flatten()
        anchors, positives = text_ids[0, rows, None], text_ids[1, rows, None]
        # If two pairs share a text, the other text of one is also right for the other. Hard negatives stay negatives.
        shares = (text_ids[0] == anchors) if targets.start == 1 else (text_ids[1] == positives)  # [n, N]
        others = torch.zeros(len(rows), len(candidates) - shares.shape[1], dtype=torch.bool, device=rows.device)
        mask = mask | (candidates == anchors) | (candidates == positives) | torch.cat([shares, others], dim=1)
    if document_ids is not None:
        candidates = document_ids[targets].flatten()
        same = (candidates == document_ids[0, rows, None]) | (candidates == document_ids[1, rows, None])
        mask = mask | (same & (candidates >= 0))
    if mask.shape[1] > 1:
        mask[torch.arange(len(rows), device=rows.device), rows] = False
    return mask


def split_by_length(inputs: dict[str, Tensor], size: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """
    Makes mini-batches of texts of similar length, so that they need little padding.

    Args:
        inputs (`dict[str, torch.Tensor]`):
            Inputs of an encoder, `(texts, length)`, with an `attention_mask`.
        size (`int`):
            Number of texts in a mini-batch.

    Returns:
        `list[tuple[torch.LongTensor, dict[str, torch.Tensor]]]`: the numbers of the rows and the rows of each
        mini-batch.
    """
    order = inputs["attention_mask"].sum(dim=1).argsort(stable=True)
    mini_batches = []
    for positions in order.split(size):
        used = inputs["attention_mask"][positions].any(dim=0)
        mini_batches.append((positions, {name: tensor[positions][:, used] for name, tensor in inputs.items()}))
    return mini_batches


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds the random numbers of all devices inside the context, and restores their state afterwards."""
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)
        yield


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _all_gather(tensor: Tensor) -> Tensor:
    """Joins the tensors [B, ...] of all processes into one [W * B, ...], in the order of the ranks."""
    gathered = tensor.new_empty(dist.get_world_size() * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, tensor.contiguous())
    return gathered


class _AllGather(torch.autograd.Function):
    """
    `_all_gather` with gradients: each process gets the sum of the gradients of all processes for its part. PyTorch's
    own `torch.distributed.nn.functional.all_gather` is deprecated, and what it names instead is in a private module
    whose names changed between the versions that this package supports.
    """

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        return _all_gather(tensor)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]
