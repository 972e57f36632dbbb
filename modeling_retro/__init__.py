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
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .auto_classes import register_auto_classes


if TYPE_CHECKING:
    from .configuration_retro import RetroConfig as RetroConfig
    from .configuration_retro_joint import RetroJointConfig as RetroJointConfig
    from .cross_cache_retro import RetroCache as RetroCache
    from .datastore.bm25 import Bm25Index as Bm25Index
    from .datastore.checksums import tokenizer_fingerprint as tokenizer_fingerprint
    from .datastore.chunks import ChunkTable as ChunkTable
    from .datastore.datastore import RetroDatastore as RetroDatastore
    from .datastore.datastore import read_index as read_index
    from .datastore.hub import download_datastore as download_datastore
    from .datastore.hub import push_datastore as push_datastore
    from .datastore.splits import DatastoreSplit as DatastoreSplit
    from .encoder.chunk_encoder import ChunkEncoder as ChunkEncoder
    from .joint_cache_retro import RetroJointCache as RetroJointCache
    from .modeling_retro import RetroForCausalLM as RetroForCausalLM
    from .modeling_retro import RetroModel as RetroModel
    from .modeling_retro import RetroNeighborEncoder as RetroNeighborEncoder
    from .modeling_retro import RetroPreTrainedModel as RetroPreTrainedModel
    from .modeling_retro_joint import RetroJointForCausalLM as RetroJointForCausalLM
    from .neighbor_memory_retro import NeighborMemory as NeighborMemory
    from .retriever.retriever import FoundText as FoundText
    from .retriever.retriever import RetrievedNeighbors as RetrievedNeighbors
    from .retriever.retriever import RetroRetriever as RetroRetriever
    from .retriever.retriever import open_datastore as open_datastore
    from .retriever.search import NeighborSearch as NeighborSearch
    from .sharing.model_card import create_model_card as create_model_card
    from .sharing.model_card import save_model_card as save_model_card


__version__ = "0.1.0"


def refuse_windows(package: str) -> None:
    """
    Raises an `ImportError` on Windows, for a package that writes datastores or starts limited processes.

    Args:
        package (`str`): Name of the package.
    """
    if sys.platform == "win32":
        raise ImportError(
            f"{package} needs Linux or macOS: it locks and flushes folders and limits processes in ways that Windows "
            "lacks. Use it in the Windows Subsystem for Linux; `modeling_retro` itself reads models on Windows too"
        )


def lazy_names(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """
    Makes `__getattr__` and `__dir__` of a package whose names are imported when they are used for the first time.

    Args:
        package (`str`): Name of the package.
        modules (`Mapping[str, str]`): The module of each name, from the package.
    """

    def get_attribute(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{modules[name]}", package), name)

    return get_attribute, lambda: sorted([*vars(importlib.import_module(package)), *modules])


_MODULES = {
    "Bm25Index": "datastore.bm25",
    "ChunkEncoder": "encoder.chunk_encoder",
    "ChunkTable": "datastore.chunks",
    "DatastoreSplit": "datastore.splits",
    "FoundText": "retriever.retriever",
    "NeighborMemory": "neighbor_memory_retro",
    "NeighborSearch": "retriever.search",
    "RetrievedNeighbors": "retriever.retriever",
    "RetroCache": "cross_cache_retro",
    "RetroConfig": "configuration_retro",
    "RetroDatastore": "datastore.datastore",
    "RetroForCausalLM": "modeling_retro",
    "RetroJointCache": "joint_cache_retro",
    "RetroJointConfig": "configuration_retro_joint",
    "RetroJointForCausalLM": "modeling_retro_joint",
    "RetroModel": "modeling_retro",
    "RetroNeighborEncoder": "modeling_retro",
    "RetroPreTrainedModel": "modeling_retro",
    "RetroRetriever": "retriever.retriever",
    "create_model_card": "sharing.model_card",
    "download_datastore": "datastore.hub",
    "open_datastore": "retriever.retriever",
    "push_datastore": "datastore.hub",
    "read_index": "datastore.datastore",
    "save_model_card": "sharing.model_card",
    "tokenizer_fingerprint": "datastore.checksums",
}

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
__all__ = sorted(_MODULES)

register_auto_classes()
