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
"""Loads the model that `retro serve` serves"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from modeling_retro.datastore.manifest import allows_control_tokens

from .app import ServedModel
from .decoding_batch import DecodingBatch
from .engine import Engine
from .load import load_model
from .prompts import PromptEncoder


if TYPE_CHECKING:
    from .scripts.serve import ServeArguments


def load_served_model(arguments: "ServeArguments") -> ServedModel:
    """
    Opens the datastore, loads the model and starts its engine.

    Args:
        arguments ([`ServeArguments`]): Options of `retro serve`.

    Returns:
        [`ServedModel`]

    Raises:
        ValueError: If the model does not fit the datastore, or a limit is below 1.
    """
    for name in ("max_batch_size", "max_prompt_tokens", "max_tokens"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} is {getattr(arguments, name)}, expected at least 1")
    if arguments.max_waiting < 0 or (arguments.num_neighbors or 0) < 0:
        raise ValueError("--max_waiting and --num_neighbors cannot be negative")
    loaded = load_model(arguments.model, arguments.datastore, arguments.dtype, arguments.retriever)
    model, retriever = loaded.model, loaded.retriever
    datastore, tokenizer = retriever.datastore, retriever.datastore.tokenizer
    if allows_control_tokens(datastore.manifest):
        print(
            f"warning: {datastore.path} was chunked with allow_control_tokens: its documents can end a text or speak "
            "as another role of a conversation",
            file=sys.stderr,
        )
    config = model.config.get_text_config()
    context_length = getattr(config, "max_position_embeddings", None) or 1 << 30  # some models have no positions
    engine = Engine(
        DecodingBatch(model, retriever),
        tokenizer,
        loaded.end_tokens,
        max_batch_size=arguments.max_batch_size,
        max_waiting=arguments.max_waiting,
        refresh=retriever.refresh,
    )
    num_neighbors = arguments.num_neighbors
    return ServedModel(
        name=arguments.served_model_name or Path(arguments.model).name,
        engine=engine,
        prompts=PromptEncoder(tokenizer),
        retriever=retriever,
        num_neighbors=model.config.num_neighbors if num_neighbors is None else num_neighbors,
        vocab_size=model.config.vocab_size,
        max_prompt_tokens=arguments.max_prompt_tokens,
        max_tokens=arguments.max_tokens,
        context_length=context_length,
    )
