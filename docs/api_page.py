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
Writes docs/api.md from the first sentences of docstrings; a test compares.

    python docs/api_page.py > docs/api.md
"""

import importlib
import inspect
import re
from collections.abc import Iterator


# Modules by what they are for; of each the classes, with the methods that are theirs, and the functions.
SECTIONS = {
    "The model": {
        "modeling_retro": [
            "RetroConfig",
            "RetroForCausalLM",
            "RetroModel",
            "RetroNeighborEncoder",
            "RetroCache",
            "RetroJointConfig",
            "RetroJointForCausalLM",
            "RetroJointCache",
            "NeighborMemory",
        ],
    },
    "Retrieval": {
        "modeling_retro": [
            "RetroRetriever",
            "FoundText",
            "RetrievedNeighbors",
            "RetroDatastore",
            "open_datastore",
            "ChunkEncoder",
            "DatastoreSplit",
            "ChunkTable",
            "NeighborSearch",
            "Bm25Index",
            "read_index",
            "tokenizer_fingerprint",
        ],
        "modeling_retro.retriever.search": ["search"],
        "modeling_retro.retriever.ranking": ["fuse", "rerank"],
    },
    "Sharing": {
        "modeling_retro": ["push_datastore", "download_datastore", "create_model_card", "save_model_card"],
    },
    "Documents to a datastore": {
        "data_prep": [
            "prepare_datastore",
            "extend_datastore",
            "chunk_documents",
            "deduplicate_documents",
            "embed_chunks",
            "build_index",
            "suggest_factory",
            "build_bm25_index",
            "find_neighbors",
            "add_documents",
            "update_documents",
            "remove_documents",
            "compact_datastore",
            "verify_datastore",
            "repair_datastore",
            "export_datastore",
            "import_datastore",
        ],
    },
    "Training and measuring the language model": {
        "trainers": [
            "RetroTrainingArguments",
            "RetroTrainer",
            "DataCollatorForRetro",
            "ChunkRows",
            "config_for_datastore",
            "MuonWithAdamW",
            "teach",
            "load_retro_model",
            "EvaluationOptions",
            "evaluate_retro",
            "in_front_bits",
            "evaluate_rivals",
            "build_knn_store",
            "neighbor_distribution",
            "operations_per_token",
            "RetroEvaluation",
            "bootstrap_interval",
            "generate_with_neighbors",
            "RetroLM",
            "write_tasks",
            "hidden_questions",
        ],
    },
    "Training and measuring the retriever": {
        "trainers": [
            "RetrieverTrainingArguments",
            "RetrieverTrainer",
            "SiameseDataCollator",
            "NoDuplicatesBatchSampler",
            "MultipleNegativesRankingLoss",
            "CachedMultipleNegativesRankingLoss",
            "mine_neighbors",
            "mine_negatives",
            "distill_encoder",
        ],
        "data_prep": ["load_pairs", "pairs_from_datastore"],
    },
    "Serving and showing": {
        "serving": [
            "load_model",
            "DecodingBatch",
            "Row",
            "RetrievedChunk",
            "Engine",
            "Completion",
            "create_app",
            "read_text",
            "continue_both_ways",
            "Reading",
            "export_space",
        ],
    },
    "Span corruption": {
        "trainers": ["DataCollatorForSpanCorruption"],
        "data_prep": ["read_tasks", "load_mixture"],
    },
}

PACKAGES = ("modeling_retro", "data_prep", "trainers", "serving")
WITHOUT_METHODS = ("RetroCache", "RetroConfig")
# `auto_docstring` opens these with a sentence of its own.
SUMMARIES = {
    "RetroConfig": "Configuration of a RETRO model: a decoder of the Llama family, its chunks and its neighbors.",
    "RetroForCausalLM": "The RETRO language model: decoder, retrieval, and a head that predicts the next token.",
    "RetroModel": "The RETRO model without a head.",
}

HEAD = """# API

Classes and functions by module, with the first sentence of their docstrings, which have arguments, shapes and types.
This page is made by `python docs/api_page.py > docs/api.md`.
"""


def api_page() -> str:
    """The text of docs/api.md."""
    parts = [HEAD]
    for title, modules in SECTIONS.items():
        parts.append(f"## {title}\n\n| | |\n|---|---|\n" + "\n".join(_rows(modules)) + "\n")
    return "\n".join(parts)


def _rows(modules: dict[str, list[str]]) -> Iterator[str]:
    for module, names in modules.items():
        for name in names:
            member = getattr(importlib.import_module(module), name)
            yield f"| `{module}.{name}` | {_summary(member)} |"
            if inspect.isclass(member):
                for method in _methods(member):
                    yield f"| `.{method}` | {_summary(getattr(member, method))} |"


def _methods(member: type) -> list[str]:
    """Public methods with a docstring, of the class and of those of this project that it is made of."""
    names = []
    if member.__name__ not in WITHOUT_METHODS:
        for base in member.__mro__:
            names += [name for name, value in vars(base).items() if not name.startswith("_") and _is_ours(value)]
    return list(dict.fromkeys(names))


def _is_ours(value: object) -> bool:
    function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    is_ours = inspect.isfunction(function) and function.__module__.split(".")[0] in PACKAGES
    return is_ours and function.__doc__ is not None and function.__name__ != "forward"


def _summary(member: object) -> str:
    if getattr(member, "__name__", None) in SUMMARIES:
        return SUMMARIES[member.__name__]
    text = " ".join(inspect.getdoc(member).split("\n\n")[0].split())
    text = re.sub(r"^`[^`]*`[^:.]*: ", "", text)  # the type of a property
    sentence = re.split(r"(?<=[.!?])\s", text)[0]
    sentence = re.sub(r"\[`~?([^`]*)`\]", r"`\1`", sentence).replace("|", "\\|")
    return sentence[0].upper() + sentence[1:]


if __name__ == "__main__":
    print(api_page(), end="")
