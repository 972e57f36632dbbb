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
"""Cross entropy of the next tokens, computed without a copy of the logits in float32"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable


# Number of logits in a block. In float32, 4 MiB fit into the caches of a CPU, and 256 MiB keep a GPU busy.
CPU_BLOCK_SIZE, BLOCK_SIZE = 1 << 20, 1 << 26


class BlockwiseCrossEntropy(torch.autograd.Function):
    """
    Sum of the cross entropies of logits `(N, V)` and labels `(N,)`, computed in float32 or better in blocks of rows.
    Besides the logits, only their gradient needs memory, in the dtype of the logits.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.LongTensor, ignore_index: int) -> torch.Tensor:
        ctx.save_for_backward(logits, labels)
        ctx.ignore_index = ignore_index
        block_size = CPU_BLOCK_SIZE if logits.device.type == "cpu" else BLOCK_SIZE
        ctx.num_rows = max(1, block_size // logits.shape[1])
        ctx.dtype = torch.promote_types(logits.dtype, torch.float32)
        loss = logits.new_zeros((), dtype=ctx.dtype)
        for rows, row_labels in zip(logits.split(ctx.num_rows), labels.split(ctx.num_rows), strict=True):
            loss += nn.functional.cross_entropy(
                rows.to(ctx.dtype), row_labels, ignore_index=ignore_index, reduction="sum"
            )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, labels = ctx.saved_tensors
        is_counted = labels != ctx.ignore_index
        scale = (is_counted * grad_output)[:, None]  # [N, 1]
        labels = labels.where(is_counted, 0)[:, None]
        grad = torch.empty_like(logits)
        blocks = (tensor.split(ctx.num_rows) for tensor in (logits, labels, scale, grad))
        for rows, row_labels, row_scale, row_grad in zip(*blocks, strict=True):
            # The derivative is the softmax, minus 1 at the label.
            probabilities = rows.softmax(-1, dtype=ctx.dtype)
            probabilities.scatter_add_(1, row_labels, -torch.ones_like(row_labels, dtype=ctx.dtype))
            row_grad.copy_(probabilities.mul_(row_scale))
        return grad, None, None


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.LongTensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.LongTensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """
    Mean cross entropy of the next token, in nats. It equals the `ForCausalLMLoss` of transformers, but makes no copies
    of the logits and of their gradient in float32.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, seq_len, vocab_size)`): Scores of the next tokens.
        labels (`torch.LongTensor` of shape `(batch_size, seq_len)`): Tokens, which this function shifts by one.
        vocab_size (`int`): Size of the vocabulary.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*):
            Number to divide the sum by, if the batch is part of a larger one. Defaults to the number of labels.
        ignore_index (`int`, *optional*, defaults to -100): Label that does not count.
        shift_labels (`torch.LongTensor` of shape `(batch_size, seq_len)`, *optional*):
            Labels that are already shifted.

    Returns:
        `torch.Tensor`: The loss, a scalar in float32 or better; NaN if no label counts.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    logits = logits.view(-1, vocab_size)  # [N, V]
    shift_labels = shift_labels.reshape(-1).to(logits.device)
    if num_items_in_batch is None:
        num_items_in_batch = (shift_labels != ignore_index).sum()
    elif torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(logits.device)
    if torch.compiler.is_compiling():
        # This is one expression, so that the compiler can fuse the conversion.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = nn.functional.cross_entropy(logits, shift_labels, ignore_index=ignore_index, reduction="sum")
    else:
        loss = BlockwiseCrossEntropy.apply(logits, shift_labels, ignore_index)
    return loss / num_items_in_batch
