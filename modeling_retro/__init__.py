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
"""The RETRO model and the read side of its datastore."""

import importlib
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache_retro import RetroCache, RetroJointCache
from .configuration_retro import RetroConfig
from .configuration_retro_joint import RetroJointConfig
from .modeling_retro import RetroForCausalLM, RetroModel, RetroNeighborEncoder, RetroPreTrainedModel
from .modeling_retro_joint import RetroJointForCausalLM


# Installed, these classes serve the Auto classes; saved models carry their code for those who have not.
AutoConfig.register("retro", RetroConfig, exist_ok=True)
AutoModel.register(RetroConfig, RetroModel, exist_ok=True)
AutoModelForCausalLM.register(RetroConfig, RetroForCausalLM, exist_ok=True)
AutoConfig.register("retro_joint", RetroJointConfig, exist_ok=True)
AutoModelForCausalLM.register(RetroJointConfig, RetroJointForCausalLM, exist_ok=True)
RetroConfig.register_for_auto_class()
RetroModel.register_for_auto_class("AutoModel")
RetroForCausalLM.register_for_auto_class("AutoModelForCausalLM")
RetroJointConfig.register_for_auto_class()
RetroJointForCausalLM.register_for_auto_class("AutoModelForCausalLM")

_RETRIEVAL = {
    "ChunkEncoder": ".chunk_encoder_retro",
    "RetrievedNeighbors": ".retriever_retro",
    "RetroDatastore": ".datastore_retro",
    "RetroRetriever": ".retriever_retro",
}


def __getattr__(name: str) -> Any:
    """Retrieval wants faiss, the model does not: its classes are imported when they are asked for."""
    if name in _RETRIEVAL:
        return getattr(importlib.import_module(_RETRIEVAL[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [  # noqa: F822
    "ChunkEncoder",
    "RetrievedNeighbors",
    "RetroCache",
    "RetroConfig",
    "RetroDatastore",
    "RetroForCausalLM",
    "RetroJointCache",
    "RetroJointConfig",
    "RetroJointForCausalLM",
    "RetroModel",
    "RetroNeighborEncoder",
    "RetroPreTrainedModel",
    "RetroRetriever",
]
