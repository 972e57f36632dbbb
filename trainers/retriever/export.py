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
Writes the files of a saved encoder besides weights and tokenizer: those of sentence-transformers and a model card
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from .config import RetrieverTrainingArguments


def save_sentence_transformers_files(
    folder: str | os.PathLike, dimension: int, pooling: str, normalized: bool, max_length: int
) -> None:
    """
    Adds the files that sentence-transformers (in all its versions) needs besides weights, config and tokenizer.

    Args:
        folder (`str`):
            Folder of the encoder.
        dimension (`int`):
            Size of the embeddings.
        pooling (`str`):
            `"mean"` or `"cls"`.
        normalized (`bool`):
            Whether the embeddings have length 1.
        max_length (`int`):
            Longer texts are cut to this number of tokens.
    """
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalized else [])]
    files = {
        "modules.json": [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"}
            for index, (path, name) in enumerate(modules)
        ],
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine" if normalized else "dot"},
        "1_Pooling/config.json": {
            "word_embedding_dimension": dimension,
            "pooling_mode_cls_token": pooling == "cls",
            "pooling_mode_mean_tokens": pooling == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    }
    for path, _ in modules[1:]:
        os.makedirs(os.path.join(folder, path), exist_ok=True)
    for name, content in files.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)


def model_card_text(
    name: str,
    repository: str,
    args: RetrieverTrainingArguments,
    max_length: int,
    log_history: Sequence[Mapping[str, Any]],
) -> str:
    evaluations = [entry for entry in log_history if any("recall@" in key for key in entry)]
    metrics = [key for key in evaluations[-1] if "@" in key] if evaluations else []
    lines = [
        f"# {name}",
        "",
        f"A text encoder for retrieval: {args.pooling} pooling, {args.similarity} similarity, texts of up to "
        f"{max_length} tokens. It was trained on pairs with RETRO for Hugging Face, to find the chunks that a RETRO "
        "language model reads.",
        "",
        "```python",
        "from sentence_transformers import SentenceTransformer",
        "",
        f'embeddings = SentenceTransformer("{repository}").encode(["a text", "another"])',
        "```",
        "",
        "As the encoder of a datastore:",
        "",
        "```bash",
        f"retro embed --encoder {repository} …",
        "```",
        "",
        "## Training",
        "",
        f"Multiple negatives ranking loss (scale {args.scale}{', symmetric' if args.symmetric else ''}), "
        f"{args.train_batch_size * args.world_size} pairs a step, learning rate {args.learning_rate}.",
    ]
    if metrics:
        first, last = evaluations[0], evaluations[-1]
        start = f"step {first['step']}" if first["step"] else "before training"
        lines += [
            "",
            "## Retrieval on held-out pairs",
            "",
            f"| metric | {start} | step {last['step']} |",
            "|---|---|---|",
            *(f"| {key.removeprefix('eval_')} | {first[key]:.3f} | {last[key]:.3f} |" for key in metrics),
        ]
    return "\n".join(lines) + "\n"
