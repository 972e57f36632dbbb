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
"""The loss by blocks against the formula, and what it does not allocate."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_retro import loss_retro
from modeling_retro.loss_retro import causal_lm_loss


BATCH_SIZE, SEQ_LEN, VOCAB_SIZE = 3, 11, 17


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 4 rows, the last of which is not whole."""
    monkeypatch.setattr(loss_retro, "CPU_BLOCK_SIZE", 4 * VOCAB_SIZE + 3)


def make_inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(BATCH_SIZE, SEQ_LEN, VOCAB_SIZE, dtype=torch.float64, generator=generator)
    labels = torch.randint(VOCAB_SIZE, (BATCH_SIZE, SEQ_LEN), generator=generator)
    labels[0, :4] = -100
    labels[2, 5] = -100
    return logits.to(dtype).requires_grad_(), labels


def slow_loss(logits, shift_labels):
    """- log softmax at the labels that count, summed one by one."""
    total = 0.0
    for row, label in zip(logits.flatten(0, 1), shift_labels.flatten().tolist(), strict=True):
        if label != -100:
            total = total + row.exp().sum().log() - row[label]
    return total


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)])
@pytest.mark.parametrize("is_shifted", [False, True])
def test_loss_and_gradient_are_those_of_the_formula(num_items, is_shifted):
    logits, labels = make_inputs(torch.float64)
    shifted = torch.cat((labels[:, 1:], torch.full((BATCH_SIZE, 1), -100)), dim=1)
    loss = causal_lm_loss(
        logits, labels, VOCAB_SIZE, num_items_in_batch=num_items, shift_labels=shifted if is_shifted else None
    )
    expected = slow_loss(logits, shifted) / (int((shifted != -100).sum()) if num_items is None else 7)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (3 * loss).backward()
    gradient, logits.grad = logits.grad, None
    (3 * expected).backward()
    torch.testing.assert_close(gradient, logits.grad, rtol=0, atol=1e-14)


def test_half_precision_is_summed_in_float32():
    logits, labels = make_inputs(torch.bfloat16)
    wide = logits.detach().double().requires_grad_()
    loss, expected = causal_lm_loss(logits, labels, VOCAB_SIZE), causal_lm_loss(wide, labels, VOCAB_SIZE)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad, wide.grad.bfloat16(), rtol=2**-7, atol=1e-7)


def test_no_label_that_counts():
    logits, labels = make_inputs(torch.float32)
    assert causal_lm_loss(logits, torch.full_like(labels, -100), VOCAB_SIZE).isnan()
    empty = logits[:, :0].detach().requires_grad_()
    loss = causal_lm_loss(empty, labels[:, :0], VOCAB_SIZE, num_items_in_batch=1)
    loss.backward()
    assert loss == 0 and empty.grad.shape == empty.shape


def test_logits_are_not_copied_to_float32():
    class LargestFloat32(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
                self.elements = max(self.elements, result.numel())
            return result

    logits, labels = make_inputs(torch.bfloat16)
    with LargestFloat32() as largest:
        causal_lm_loss(logits, labels, VOCAB_SIZE).backward()
    assert largest.elements == 4 * VOCAB_SIZE
