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
"""Public names can still be imported from where they once were."""

import importlib

import pytest


@pytest.mark.parametrize(
    ("former", "present"),
    [
        ("modeling_retro.retrieval_retro", ["chunk_encoder_retro", "datastore_retro", "retriever_retro"]),
        ("modeling_retro.encoder_retro", ["chunk_encoder_retro"]),
        ("modeling_retro.sharing_retro", ["model_sharing_retro", "model_card_retro"]),
        ("modeling_retro.hub_retro", ["hub_transfer_retro"]),
        ("data_prep.tasks", ["span_corruption_tasks"]),
    ],
)
def test_former_modules_give_the_same_objects(former, present):
    former = importlib.import_module(former)
    present = [importlib.import_module(f"{former.__package__}.{name}") for name in present]
    for name in former.__all__:
        assert any(getattr(former, name) is getattr(module, name, None) for module in present), name
