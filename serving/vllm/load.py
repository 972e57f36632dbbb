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
"""Opens a model for a server whose completions vLLM computes. Its weights are loaded there, not here."""

import atexit
import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import find_adapter_config_file

from data_prep.shipped_models import find_model, naming_the_ways
from modeling_retro import RetroConfig, RetroJointConfig
from modeling_retro.added_weights_retro import RETROFIT_WEIGHTS_NAME
from modeling_retro.encoder.own_code import no_code_of
from modeling_retro.joint_attention_retro import layer_windows
from modeling_retro.modeling_retro_joint import check_decoder
from modeling_retro.reader_adapters_retro import NEIGHBOR_ADAPTER
from modeling_retro.retriever.retriever import RetroRetriever
from modeling_retro.sharing.readers import Reader

from .engine import VllmEngine
from .processes import EngineProcess


READER = "retro_reader"


@dataclass
class VllmOptions:
    """
    Where vLLM computes.

    Args:
        urls (`Sequence[str]`, *optional*): Addresses of processes that run already.
        python (`str`, *optional*): The interpreter of an environment with vLLM, to start a process if there is none.
        arguments (`str`, *optional*, defaults to `""`): More arguments of this process, as on a command line.
        max_gib (`float`, *optional*, defaults to 2.0):
            Largest size of the states of neighbors and texts that this process keeps, in gibibytes.
    """

    urls: Sequence[str] = ()
    python: str | None = None
    arguments: str = ""
    max_gib: float = 2.0


def load_vllm_engine(
    model: str,
    retriever: RetroRetriever,
    options: VllmOptions,
    dtype: str = "auto",
    reader: str | None = None,
    reread_tokens: int | None = None,
    max_batch_size: int = 16,
    max_waiting: int = 64,
) -> VllmEngine:
    """
    Starts vLLM for a model, or connects to it.

    Args:
        model (`str`):
            Folder or Hub id of a causal language model, or of a [`RetroJointForCausalLM`] that was saved without its
            decoder (`retrofit_only=True`).
        retriever ([`RetroRetriever`]): Looks up the chunks.
        options ([`VllmOptions`]): Where vLLM computes.
        dtype (`str`, *optional*, defaults to `"auto"`): Type of the weights.
        reader (`str`, *optional*): See [`load_model`].
        reread_tokens (`int`, *optional*): See [`load_model`].
        max_batch_size (`int`, *optional*, defaults to 16): Largest number of completions that run together.
        max_waiting (`int`, *optional*, defaults to 64): Completions that may wait.

    Raises:
        ValueError: If vLLM cannot serve this model with neighbors, with the reason.
    """
    if bool(options.urls) == bool(options.python):
        raise ValueError("vLLM runs at --engine_url, or is started with --engine_python: give one of the two")
    config, decoder, adapter = _open_config(model, retriever.datastore, reader)
    config.reread_tokens = config.reread_tokens if reread_tokens is None else reread_tokens
    retriever.datastore.check_model(config)
    generation = _end_tokens(decoder, config)
    end_tokens = frozenset([*generation, retriever.datastore.tokenizer.eos_token_id]) - {None}
    name = None if adapter is None else READER
    processes = []
    if options.python:
        folder = None if adapter is None else (READER, write_peft_adapter(adapter))
        if dtype == "auto" and not torch.cuda.is_available():
            dtype = "float32"
        arguments = shlex.split(options.arguments)
        processes.append(EngineProcess(options.python, decoder, dtype, options.max_gib, arguments, folder))
    elif name is not None:
        print(f"the engines must have the reader as an adapter of the name {READER!r}", file=sys.stderr)
    return VllmEngine(
        options.urls or [process.url for process in processes],
        config,
        retriever,
        retriever.datastore.tokenizer,
        end_tokens,
        default_passages="in_order" if adapter is None else "apart",
        reader=name,
        processes=processes,
        max_batch_size=max_batch_size,
        max_waiting=max_waiting,
        refresh=retriever.refresh,
    )


def _open_config(model: str, datastore, reader: str | None) -> tuple[RetroJointConfig, str, Reader | None]:
    """The config of the model, where its decoder is, and its reader, if it has one."""
    with naming_the_ways(model, "model"):
        folder = find_model(model)
        if find_adapter_config_file(folder) is not None:
            raise ValueError(f"{model} is a PEFT adapter; merge it into its base, and serve that")
        with no_code_of(f"the model {folder}"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.model_type == RetroConfig.model_type:
        raise ValueError(f"{model} has layers of its own for neighbors, which vLLM does not have; use --engine retro")
    adapter = None if reader is None else Reader(reader)
    if config.model_type == RetroJointConfig.model_type:
        if reader is not None:
            raise ValueError(f"{model} is a RETRO model already; --reader is for a model that is wrapped")
        if config.base_model_name_or_path is None or not Path(folder, RETROFIT_WEIGHTS_NAME).is_file():
            raise ValueError(
                f"{model} holds its decoder in a form that vLLM does not load: save it with `retrofit_only=True`, or "
                "save its `decoder` alone, and serve that"
            )
        decoder = find_model(config.base_model_name_or_path)
        adapter = Reader(folder) if config.neighbor_adapter is not None else None
    else:
        fields = {} if adapter is None else adapter.fields
        config = RetroJointConfig(
            text_config=config,
            chunk_size=datastore.chunk_size,
            continuation_chunks=datastore.continuation_chunks,
            reread_tokens=datastore.chunk_size,
            **fields,
        )
        decoder = folder
    _check_config(model, config)
    return config, decoder, adapter


def _check_config(model: str, config: RetroJointConfig) -> None:
    reasons = []
    if config.row_adapter is not None:
        reasons.append("its rows have an adapter of their own, which begins to act in the middle of a row")
    if config.neighbor_bias:
        reasons.append("it weighs neighbors by a bias, which the attention of vLLM does not have")
    if any(window is not None for window in layer_windows(config.text_config).values()):
        reasons.append("the sliding windows of its layers would count neighbors")
    if reasons:
        raise ValueError(f"vLLM cannot serve {model}: {'; '.join(reasons)}; use --engine retro")
    with torch.device("meta"):
        check_decoder(AutoModelForCausalLM.from_config(config.text_config), config)


def _end_tokens(decoder: str, config: RetroJointConfig) -> list[int]:
    try:
        found = GenerationConfig.from_pretrained(decoder).eos_token_id
    except OSError:
        found = config.text_config.get_text_config().eos_token_id
    return [found] if isinstance(found, int) else list(found or [])


def write_peft_adapter(reader: Reader) -> Path:
    """
    Writes the adapter of a reader in the form of PEFT, which vLLM loads, to a temporary folder for this process.

    Args:
        reader ([`Reader`]): The reader.
    """
    folder = Path(tempfile.mkdtemp(prefix="retro-reader-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # vLLM may be started again until then
    mark = f".{NEIGHBOR_ADAPTER}."
    weights = {
        f"base_model.model.{name.removeprefix('decoder.').replace(mark, '.')}": tensor.contiguous()
        for name, tensor in reader.weights.items()
    }
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    modules = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in weights})
    fields = {**reader.fields["neighbor_adapter"], "peft_type": "LORA", "target_modules": modules}
    text = json.dumps(fields | {"base_model_name_or_path": reader.base}, indent=2)
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    return folder
