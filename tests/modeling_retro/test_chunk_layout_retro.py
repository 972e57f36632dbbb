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
"""When a chunk is complete, and which tokens see its neighbors."""

import pytest
import torch

from modeling_retro.chunk_layout_retro import completed_between, seen_chunk


@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_a_token_sees_the_chunk_that_it_or_a_token_before_it_completed_last(size):
    for index in range(-1, 4 * size):
        complete = [u for u in range(5) if u * size + size - 1 <= index]
        assert seen_chunk(index, size) == (complete[-1] if complete else -1)
    indices = torch.arange(4 * size)
    assert seen_chunk(indices, size).tolist() == [seen_chunk(index, size) for index in range(4 * size)]


@pytest.mark.parametrize("size", [1, 3, 4])
def test_chunks_are_completed_once_while_a_document_grows(size):
    for before in range(3 * size):
        for after in range(before, 4 * size):
            expected = [u for u in range(5) if before < (u + 1) * size <= after]
            assert list(completed_between(before, after, size)) == expected
