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
"""Training arguments on a machine without an accelerator, and on one that has one."""

import pytest
import torch
from transformers import TrainingArguments

from trainers.language_model.config import RetroTrainingArguments
from trainers.retriever.config import RetrieverTrainingArguments
from trainers.training_arguments import LocalTrainingArguments


CLASSES = [LocalTrainingArguments, RetroTrainingArguments, RetrieverTrainingArguments]


@pytest.mark.parametrize("arguments_class", CLASSES)
def test_a_machine_without_accelerator_computes_in_bf16_on_its_cpu(monkeypatch, tmp_path, arguments_class):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    arguments = arguments_class(output_dir=str(tmp_path), bf16=True)
    assert arguments.use_cpu and arguments.device.type == "cpu"
    assert not arguments.dataloader_pin_memory  # nothing to pin memory for, and no warning that says so


@pytest.mark.parametrize("arguments_class", CLASSES)
@pytest.mark.parametrize("use_cpu", [False, True])
def test_with_an_accelerator_the_user_decides(monkeypatch, tmp_path, arguments_class, use_cpu):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert arguments_class(output_dir=str(tmp_path), use_cpu=use_cpu).use_cpu is use_cpu


@pytest.mark.parametrize("arguments_class", CLASSES[1:])
def test_own_defaults_win_over_those_of_transformers(tmp_path, arguments_class):
    assert issubclass(arguments_class, TrainingArguments)
    arguments = arguments_class(output_dir=str(tmp_path))
    assert arguments.remove_unused_columns is False
    assert arguments.learning_rate != TrainingArguments(output_dir=str(tmp_path)).learning_rate


def test_a_tracker_that_is_not_installed_is_refused_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr("trainers.training_arguments.get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match="'wandb', which is not installed .*choose one of tensorboard, none"):
        LocalTrainingArguments(output_dir=str(tmp_path), report_to=["tensorboard", "wandb"])
    assert LocalTrainingArguments(output_dir=str(tmp_path), report_to="tensorboard").report_to == ["tensorboard"]
    assert LocalTrainingArguments(output_dir=str(tmp_path), report_to="none").report_to == []
