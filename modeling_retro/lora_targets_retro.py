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
"""The layers to which a `LoraConfig()` without layer names adds adapters"""

import sys


def name_lora_targets(model_type: str, decoder_type: str) -> None:
    """
    Gives a type of model the default layers of PEFT for the type of its decoder. PEFT finds these layers only by the
    type in `config.to_dict()`. This function does not import PEFT.

    Args:
        model_type (`str`): Type of the model.
        decoder_type (`str`): Type of its decoder, or of the decoders whose module names it has.
    """
    constants = sys.modules.get("peft.utils.constants")
    if constants is None:
        return
    targets = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    targets.pop(model_type, None)
    if decoder_type in targets:
        targets[model_type] = targets[decoder_type]


__all__ = ["name_lora_targets"]
