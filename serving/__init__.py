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
"""A server with the API of OpenAI, and a page that shows what retrieval is worth"""

from typing import TYPE_CHECKING

from modeling_retro import lazy_names, refuse_windows


refuse_windows(__name__)


if TYPE_CHECKING:
    from .app import create_app as create_app
    from .decoding_batch import DecodingBatch as DecodingBatch
    from .decoding_batch import RetrievedChunk as RetrievedChunk
    from .decoding_batch import Row as Row
    from .engine import Completion as Completion
    from .engine import Engine as Engine
    from .load import load_model as load_model
    from .reading import Reading as Reading
    from .reading import continue_both_ways as continue_both_ways
    from .reading import read_text as read_text
    from .space import export_space as export_space


_MODULES = {
    "Completion": "engine",
    "DecodingBatch": "decoding_batch",
    "Engine": "engine",
    "Reading": "reading",
    "RetrievedChunk": "decoding_batch",
    "Row": "decoding_batch",
    "continue_both_ways": "reading",
    "create_app": "app",
    "export_space": "space",
    "load_model": "load",
    "read_text": "reading",
}

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
__all__ = sorted(_MODULES)
