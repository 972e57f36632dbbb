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
Serves a model that looks things up, with the API of OpenAI.

    retro serve --model model --datastore datastore

Any client of that API can ask it, under the name of the model's folder:

    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
        -d '{"model": "model", "prompt": "The class"}'

A key that requests must carry is taken from the environment variable RETRO_API_KEY.
"""

import ipaddress
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data_prep.arguments import parse_arguments, run_command
from modeling_retro.datastore_manifest_retro import allows_control_tokens
from modeling_retro.retriever_retro import RetroRetriever
from trainers.load_model import load_retro_model


try:
    import uvicorn

    from .app import ServedModel, create_app
except ImportError as error:
    raise ImportError(
        f"`retro serve` needs {error.name}; install the extra: `pip install retro-transformers[serve]`"
    ) from error

from .decoding_batch import DecodingBatch
from .engine import Engine
from .prompts import PromptEncoder


API_KEY = "RETRO_API_KEY"


@dataclass
class ServeArguments:
    """
    Arguments of `retro serve`.
    """

    model: str = field(metadata={"help": "Folder or Hub id of a RETRO model, or of any causal language model."})
    datastore: str = field(metadata={"help": "Folder or Hub id of the datastore to search."})
    served_model_name: str | None = field(
        default=None, metadata={"help": "What requests call the model; the last part of --model when unset."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 for all."})
    port: int = field(default=8000, metadata={"help": "Port to listen on; 0 for a free one."})
    num_neighbors: int | None = field(
        default=None,
        metadata={"help": "Neighbors of a chunk if a request does not say. Those of the model when unset."},
    )
    max_batch_size: int = field(default=16, metadata={"help": "Completions that run together."})
    max_waiting: int = field(default=64, metadata={"help": "Completions that wait; more are answered with 429."})
    max_prompt_tokens: int = field(default=4096, metadata={"help": "Longest prompt in tokens."})
    max_tokens: int = field(default=1024, metadata={"help": "Longest completion in tokens."})
    dtype: str = field(
        default="auto", metadata={"help": "Type of the weights: auto, that of the checkpoint, or float32, bfloat16 …"}
    )


def load_served_model(arguments: ServeArguments) -> ServedModel:
    """
    Opens the datastore, loads the model and starts its engine.

    Args:
        arguments ([`ServeArguments`]): What to serve.

    Returns:
        [`ServedModel`]

    Raises:
        ValueError: If the model does not fit the datastore, or for limits below 1.
    """
    for name in ("max_batch_size", "max_prompt_tokens", "max_tokens"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} is {getattr(arguments, name)}, expected at least 1")
    if arguments.max_waiting < 0 or (arguments.num_neighbors or 0) < 0:
        raise ValueError("--max_waiting and --num_neighbors cannot be negative")
    retriever = RetroRetriever.from_pretrained(arguments.datastore)
    datastore, tokenizer = retriever.datastore, retriever.datastore.tokenizer
    if allows_control_tokens(datastore.manifest):
        print(
            f"warning: {datastore.path} was chunked with allow_control_tokens: its documents can end a text or speak "
            "as another role of a conversation",
            file=sys.stderr,
        )
    model = load_retro_model(arguments.model, datastore, dtype=arguments.dtype)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    end_tokens = model.generation_config.eos_token_id
    end_tokens = [end_tokens] if isinstance(end_tokens, int) else end_tokens or []
    end_tokens = {*end_tokens, tokenizer.eos_token_id} - {None}
    config = model.config.get_text_config()
    context_length = getattr(config, "max_position_embeddings", None) or 1 << 30  # some have no positions
    engine = Engine(
        DecodingBatch(model, retriever),
        tokenizer,
        end_tokens,
        max_batch_size=arguments.max_batch_size,
        max_waiting=arguments.max_waiting,
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


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(ServeArguments, argv=argv, description=__doc__, prog="retro serve")
    api_key = os.environ.get(API_KEY) or None
    served = load_served_model(arguments)
    if api_key is None and not _is_loopback(arguments.host):
        print(
            f"warning: everybody who reaches {arguments.host} can use this server; set {API_KEY} to ask for a key",
            file=sys.stderr,
        )
    print(f"serving {served.name!r} on http://{arguments.host}:{arguments.port}/v1; Ctrl-C ends it", flush=True)
    uvicorn.run(
        create_app(served, api_key),
        host=arguments.host,
        port=arguments.port,
        log_level="warning",
        timeout_graceful_shutdown=10,  # seconds for streams that run
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    run_command(main)
