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
"""Loads the model, the retriever and the tokens that end a text, for the server and the page"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from modeling_retro import RetroJointForCausalLM
from modeling_retro.retriever.retriever import RetroRetriever
from trainers.load_model import load_retro_model
from trainers.prompts import PromptEncoder

from .decoding_batch import DecodingBatch
from .engine import Engine


if TYPE_CHECKING:
    from .served_model import ServedModel
    from .vllm.load import VllmOptions


@dataclass
class LoadedModel:
    """
    A model with its datastore.

    Args:
        model ([`RetroForCausalLM`] or [`RetroJointForCausalLM`]): The model, in evaluation mode.
        retriever ([`RetroRetriever`]): Looks up the chunks.
        end_tokens (`frozenset[int]`): Tokens that end a text.
    """

    model: PreTrainedModel
    retriever: RetroRetriever
    end_tokens: frozenset[int]


def load_model(
    model: str,
    datastore: str,
    dtype: str = "auto",
    retriever: str | None = None,
    reader: str | None = None,
    reread_tokens: int | None = None,
) -> LoadedModel:
    """
    Loads a model and its datastore. The model goes to the first GPU if there is one.

    Args:
        model (`str`): Folder or Hub id of a RETRO model, or of any causal language model.
        datastore (`str`): Folder or Hub id of the datastore.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the weights. `"auto"` is the type of the checkpoint on a GPU, and float32 on a CPU, because many
            CPUs are slow in half precision.
        retriever (`str`, *optional*):
            How neighbors are found. Defaults to the way in which the stored ones were found.
        reader (`str`, *optional*):
            Adapters that were trained to read neighbors, for a model that is wrapped: the name of some that come with
            the package, or folder or Hub id.
        reread_tokens (`int`, *optional*):
            Number of tokens at the end of each chunk that a model with joint attention reads again. Defaults to what
            the model was saved with, and to whole chunks for one that is wrapped.

    Returns:
        [`LoadedModel`]

    Raises:
        ValueError: If the model does not fit the datastore, or there is no such type.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype is {dtype!r}, expected auto or a type of torch such as float32 or bfloat16")
    if dtype == "auto" and device == "cpu":
        dtype = "float32"
    opened = RetroRetriever.from_pretrained(datastore, retriever=retriever)
    options = {"dtype": dtype, "reader": reader, "reread_tokens": reread_tokens}
    loaded = load_retro_model(model, opened.datastore, **options).to(device).eval()
    end_tokens = loaded.generation_config.eos_token_id
    end_tokens = [end_tokens] if isinstance(end_tokens, int) else end_tokens or []
    end_tokens = frozenset([*end_tokens, opened.datastore.tokenizer.eos_token_id]) - {None}
    return LoadedModel(loaded, opened, end_tokens)


def load_served_model(
    model: str,
    datastore: str,
    *,
    retriever: str | None = None,
    reader: str | None = None,
    reread_tokens: int | None = None,
    served_model_name: str | None = None,
    num_neighbors: int | None = None,
    max_batch_size: int = 16,
    max_waiting: int = 64,
    max_prompt_tokens: int = 4096,
    max_tokens: int = 1024,
    draft_tokens: int | None = None,
    dtype: str = "auto",
    vllm: "VllmOptions | None" = None,
) -> "ServedModel":
    """
    Opens the datastore, loads the model and starts its engine.

    Args:
        model (`str`): See [`load_model`].
        datastore (`str`): See [`load_model`].
        retriever (`str`, *optional*): See [`load_model`].
        reader (`str`, *optional*): See [`load_model`].
        reread_tokens (`int`, *optional*): See [`load_model`].
        served_model_name (`str`, *optional*): Name of the model in requests. Defaults to the last part of `model`.
        num_neighbors (`int`, *optional*):
            Neighbors of a chunk unless a request names another number. Defaults to the model's.
        max_batch_size (`int`, *optional*, defaults to 16): Largest number of completions that run together.
        max_waiting (`int`, *optional*, defaults to 64): Completions that may wait.
        max_prompt_tokens (`int`, *optional*, defaults to 4096): Longest prompt in tokens.
        max_tokens (`int`, *optional*, defaults to 1024): Longest completion in tokens.
        draft_tokens (`int`, *optional*): Largest number of tokens in a draft (see [`DecodingBatch`]).
        dtype (`str`, *optional*, defaults to `"auto"`): See [`load_model`].
        vllm ([`VllmOptions`], *optional*): Where vLLM computes. By default this process does.

    Returns:
        [`ServedModel`]

    Raises:
        ValueError: If the model does not fit the datastore, or a limit is below 1.
    """
    from .served_model import ServedModel  # needs libraries that the page can do without

    limits = {"max_batch_size": max_batch_size, "max_prompt_tokens": max_prompt_tokens, "max_tokens": max_tokens}
    for name, limit in limits.items():
        if limit < 1:
            raise ValueError(f"--{name} is {limit}, expected at least 1")
    numbers = {"max_waiting": max_waiting, "num_neighbors": num_neighbors, "draft_tokens": draft_tokens}
    for name, number in (numbers | {"reread_tokens": reread_tokens}).items():
        if (number or 0) < 0:
            raise ValueError(f"--{name} is {number}, expected at least 0")
    if vllm is not None:
        if draft_tokens:
            raise ValueError("--draft_tokens is for --engine retro")
        from .vllm.load import load_vllm_engine

        searching = RetroRetriever.from_pretrained(datastore, retriever=retriever)
        engine = load_vllm_engine(model, searching, vllm, dtype, reader, reread_tokens, max_batch_size, max_waiting)
        config, reads_jointly = engine.config, True
        neighbors = config.num_neighbors if num_neighbors is None else num_neighbors
        context_length = engine.max_model_len - neighbors * config.neighbor_length
    else:
        loaded = load_model(model, datastore, dtype, retriever, reader, reread_tokens)
        config, searching = loaded.model.config, loaded.retriever
        reads_jointly = isinstance(loaded.model, RetroJointForCausalLM)
        engine = Engine(
            DecodingBatch(loaded.model, searching, draft_tokens),
            searching.datastore.tokenizer,
            loaded.end_tokens,
            max_batch_size=max_batch_size,
            max_waiting=max_waiting,
            refresh=searching.refresh,
        )
        # Some models have no positions.
        context_length = getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    opened = searching.datastore
    if opened.manifest.allow_control_tokens:
        print(
            f"warning: {opened.path} was chunked with allow_control_tokens: its documents can end a text or speak "
            "as another role of a conversation",
            file=sys.stderr,
        )
    return ServedModel(
        name=served_model_name or Path(model).name,
        engine=engine,
        prompts=PromptEncoder(opened.tokenizer),
        retriever=searching,
        num_neighbors=config.num_neighbors if num_neighbors is None else num_neighbors,
        vocab_size=config.vocab_size,
        max_prompt_tokens=max_prompt_tokens,
        max_tokens=max_tokens,
        context_length=context_length,
        reads_jointly=reads_jointly,
    )
