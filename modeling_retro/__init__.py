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
The RETRO models, the datastore and its retriever. `import modeling_retro` imports none of them. A class is imported
when it is used for the first time, with torch, transformers or faiss if it needs them.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .auto_classes_retro import register_auto_classes


if TYPE_CHECKING:
    from .cache_retro import RetroCache, RetroJointCache
    from .chunk_encoder_retro import ChunkEncoder
    from .configuration_retro import RetroConfig
    from .configuration_retro_joint import RetroJointConfig
    from .datastore_retro import RetroDatastore
    from .modeling_retro import RetroForCausalLM, RetroModel, RetroNeighborEncoder, RetroPreTrainedModel
    from .modeling_retro_joint import RetroJointForCausalLM
    from .retriever_retro import RetrievedNeighbors, RetroRetriever

_MODULES = {
    "ChunkEncoder": "chunk_encoder_retro",
    "RetrievedNeighbors": "retriever_retro",
    "RetroCache": "cache_retro",
    "RetroConfig": "configuration_retro",
    "RetroDatastore": "datastore_retro",
    "RetroForCausalLM": "modeling_retro",
    "RetroJointCache": "cache_retro",
    "RetroJointConfig": "configuration_retro_joint",
    "RetroJointForCausalLM": "modeling_retro_joint",
    "RetroModel": "modeling_retro",
    "RetroNeighborEncoder": "modeling_retro",
    "RetroPreTrainedModel": "modeling_retro",
    "RetroRetriever": "retriever_retro",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])


register_auto_classes()

__all__ = [
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
