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
Serves a model with retrieval, with the API of OpenAI.

    retro serve --model model --datastore datastore

Any client of this API can use it. The name of the model is that of its folder:

    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
        -d '{"model": "model", "prompt": "The class"}'

With `--engine vllm`, vLLM computes, in an environment of its own (docs/serving_vllm.md):

    retro serve --model model --datastore datastore --engine vllm --engine_python vllm-env/bin/python

If the environment variable RETRO_API_KEY holds a key, requests must carry it. After SIGTERM or Ctrl-C, running answers
may take --grace_period seconds more.
"""

import ipaddress
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from data_prep.arguments import parse_arguments, run_command
from data_prep.heartbeat import end_heartbeat


if TYPE_CHECKING:
    from ..vllm.load import VllmOptions


API_KEY = "RETRO_API_KEY"
LISTENING = {"host", "port", "allowed_hosts", "allow_origins", "grace_period"}
ENGINE = {"engine", "engine_url", "engine_python", "engine_args", "engine_memory"}


@dataclass
class ServeArguments:
    """
    Arguments of `retro serve`.
    """

    model: str = field(metadata={"help": "Folder or Hub id of a RETRO model or of any causal one, or smollm2."})
    datastore: str = field(metadata={"help": "Folder or Hub id of the datastore to search."})
    retriever: str | None = field(
        default=None,
        metadata={
            "help": "How neighbors are found. Defaults to the way in which the stored ones were found.",
            "choices": ["dense", "bm25", "hybrid", "rerank"],
        },
    )
    reader: str | None = field(
        default=None,
        metadata={
            "help": "Adapters that were trained to read neighbors, for a model that is wrapped: the name of some that "
            "come with the package, or folder or Hub id."
        },
    )
    reread_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Number of tokens at the end of each chunk that a model with joint attention reads again when the "
            "chunk has neighbors; 0 is fastest. Defaults to what a model was saved with, and to whole chunks for one "
            "that is wrapped."
        },
    )
    served_model_name: str | None = field(
        default=None, metadata={"help": "Name of the model in requests. Defaults to the last part of --model."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 for all."})
    port: int = field(default=8000, metadata={"help": "Port to listen on; 0 for a free one."})
    allowed_hosts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Names of this server, such as those of a proxy. Other names are refused, addresses are not."
        },
    )
    allow_origins: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Origins whose pages may use this server in a browser, such as https://example.org; * for all."
        },
    )
    grace_period: float = field(default=10.0, metadata={"help": "Seconds for running answers when the server ends."})
    num_neighbors: int | None = field(
        default=None,
        metadata={"help": "Neighbors of a chunk unless a request names another number. Defaults to the model's."},
    )
    max_batch_size: int = field(default=16, metadata={"help": "Largest number of completions that run together."})
    max_waiting: int = field(default=64, metadata={"help": "Completions that may wait; others get status 429."})
    max_prompt_tokens: int = field(default=4096, metadata={"help": "Longest prompt in tokens."})
    max_tokens: int = field(default=1024, metadata={"help": "Longest completion in tokens."})
    draft_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Largest number of tokens that are drafted from the neighbors and the text of a completion, and "
            "confirmed by one step. 0 for none. Defaults to 16 in float32, and to 0 in 16 bits."
        },
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "float32, bfloat16, …; auto is float32 on a CPU, and the type of the checkpoint on a GPU."},
    )
    engine: str = field(
        default="retro", metadata={"help": "What computes: this process, or vLLM.", "choices": ["retro", "vllm"]}
    )
    engine_python: str | None = field(
        default=None,
        metadata={"help": "The Python of an environment with vLLM, in which a process of it is started."},
    )
    engine_args: str = field(
        default="",
        metadata={
            "help": "More arguments of this process, such as '--max-model-len 4096 --gpu-memory-utilization 0.8'."
        },
    )
    engine_memory: float = field(
        default=2.0,
        metadata={
            "help": "Gibibytes that this process may use for states of neighbors and of texts, beside its cache."
        },
    )
    engine_url: list[str] = field(
        default_factory=list,
        metadata={"help": "Addresses of vLLM processes that run already, with the connector of this package."},
    )


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(ServeArguments, argv=argv, description=__doc__, prog="retro serve")
    if arguments.grace_period < 0:
        raise ValueError(f"--grace_period is {arguments.grace_period}, expected 0 or more seconds")
    api_key = _api_key()
    try:
        from ..app import create_app
        from ..listening import Server, bind
    except ImportError as error:
        raise ImportError(
            f"`retro serve` needs {error.name}; install the extra: `pip install retro-transformers[serve]`"
        ) from error
    from ..load import load_served_model

    with bind(arguments.host, arguments.port) as listener:
        options = {name: value for name, value in vars(arguments).items() if name not in LISTENING | ENGINE}
        served = load_served_model(**options, vllm=_vllm_options(arguments))
        if api_key is None and not _is_loopback(arguments.host):
            print(
                f"warning: everybody who reaches {arguments.host} can use this server; set {API_KEY} to ask for a key",
                file=sys.stderr,
            )
        hosts = [arguments.host, *arguments.allowed_hosts]
        app = create_app(served, api_key, allowed_hosts=hosts, allow_origins=arguments.allow_origins)
        server = Server(app, served.engine, served.name, arguments.grace_period)
        end_heartbeat()
        server.run([listener])
    if server.has_failed:
        raise ValueError("the engine of the server has stopped; the log says why")


def _vllm_options(arguments: ServeArguments) -> "VllmOptions | None":
    if arguments.engine == "retro":
        if arguments.engine_url or arguments.engine_python or arguments.engine_args:
            raise ValueError("--engine_url, --engine_python and --engine_args are for --engine vllm")
        return None
    from ..vllm.load import VllmOptions

    python, memory = arguments.engine_python, arguments.engine_memory
    return VllmOptions(arguments.engine_url, python, arguments.engine_args, memory)


def _api_key() -> str | None:
    """The key of the environment. A file from which it was read may end in a newline."""
    key = os.environ.get(API_KEY, "")
    if key and (not key.strip().isprintable() or not key.strip() or " " in key.strip()):
        raise ValueError(f"{API_KEY} holds white space or unprintable characters, which no request can carry")
    return key.strip() or None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    run_command(main)
