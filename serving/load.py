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

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from modeling_retro.retriever.retriever import RetroRetriever
from trainers.load_model import load_retro_model


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


def load_model(model: str, datastore: str, dtype: str = "auto", retriever: str | None = None) -> LoadedModel:
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
    loaded = load_retro_model(model, opened.datastore, dtype=dtype).to(device).eval()
    end_tokens = loaded.generation_config.eos_token_id
    end_tokens = [end_tokens] if isinstance(end_tokens, int) else end_tokens or []
    end_tokens = frozenset([*end_tokens, opened.datastore.tokenizer.eos_token_id]) - {None}
    return LoadedModel(loaded, opened, end_tokens)
