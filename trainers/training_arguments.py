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
"""Training arguments that adapt to the machine"""

from dataclasses import dataclass

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations


_UNLISTED = ("azure_ml", "flyte", "kubeflow")  # trackers that transformers may have without listing them


@dataclass
class LocalTrainingArguments(TrainingArguments):
    """
    [`~transformers.TrainingArguments`] that choose the CPU by themselves if there is no accelerator. On such a machine
    the arguments of transformers raise an error for `bf16`, and every data loader warns that it cannot pin memory.

    Raises:
        ValueError: If `report_to` names a tracker that is not installed.
    """

    def __post_init__(self):
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        installed = get_available_reporting_integrations()
        missing = [name for name in self.report_to if name not in {*installed, *_UNLISTED}]
        if missing:
            raise ValueError(
                f"--report_to names {missing[0]!r}, which is not installed or unknown: `pip install {missing[0]}`, or "
                f"choose one of {', '.join([*installed, 'none'])}"
            )
