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
"""A tiny model behind a real server on the loopback."""

import threading
from contextlib import contextmanager

import torch
import uvicorn
from tiny_models import tiny_llama

from modeling_retro import RetroForCausalLM, RetroJointForCausalLM
from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.retriever.retriever import RetroRetriever
from serving.app import create_app
from trainers.language_model.trainer import config_for_datastore


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 512,
}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}assistant:"


def save_model(kind, datastore_dir, folder):
    """Writes a tiny model of either kind, for a datastore, with its tokenizer."""
    datastore = RetroDatastore.from_pretrained(datastore_dir)
    torch.manual_seed(0)
    if kind == "cross":
        model = RetroForCausalLM(config_for_datastore(datastore, **SIZES))
    else:
        decoder = tiny_llama(len(datastore.tokenizer), eos_token_id=0, pad_token_id=1, **SIZES)
        model = RetroJointForCausalLM.from_decoder(decoder, chunk_size=datastore.chunk_size)
    model.save_pretrained(folder)
    datastore.tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def running(served, port=0, **options):
    """The address of a server that runs inside the block."""
    config = uvicorn.Config(create_app(served, **options), host="127.0.0.1", port=port, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server did not start")
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def retriever_of(datastore_dir):
    return RetroRetriever.from_pretrained(datastore_dir, device="cpu")
