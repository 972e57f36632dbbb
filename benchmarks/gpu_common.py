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
"""What the parts of `gpu.py` share: sizes, datastore, models and tables"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed

from data_prep.shipped_models import find_smollm2
from modeling_retro import RetroConfig, RetroForCausalLM, RetroJointForCausalLM
from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.durable_files_retro import whole
from trainers.language_model.collator import DataCollatorForRetro
from trainers.language_model.trainer import config_for_datastore
from trainers.quickstart import MAX_CHUNKS, make_datastore, split_documents, train_tokenizer


Shape = dict[str, int]


def shape(
    hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int, num_key_value_heads: int
) -> Shape:
    """Fields that a LlamaConfig and a RetroConfig have in common."""
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_key_value_heads,
    }


@dataclass
class Size:
    """Sizes of all parts."""

    decoder: Shape  # for training and generation
    retro: Shape  # for quality
    plain: Shape  # of three times the weights of `retro`
    row_chunks: int
    batch_size: int
    steps: int  # of which the second half is measured
    batch_sizes: list[int]  # of generation
    new_tokens: int
    repeats: int
    num_texts: int
    tokens_per_batch: int
    quality_tokens: int
    max_documents: int | None
    max_chunks: dict[str, int] = field(default_factory=lambda: dict(MAX_CHUNKS))
    max_held_out_characters: int | None = None  # of a document, so that few chunks hold several documents


SIZES = {
    "full": Size(
        decoder=shape(2048, 8192, 16, 32, 8),
        retro=shape(768, 2048, 12, 12, 12),
        plain=shape(1408, 3840, 18, 22, 22),
        row_chunks=32,
        batch_size=4,
        steps=40,
        batch_sizes=[1, 8, 64],
        new_tokens=256,
        repeats=2,
        num_texts=30_000,
        tokens_per_batch=1 << 17,
        quality_tokens=100_000_000,
        max_documents=None,
    ),
    "toy": Size(
        decoder=shape(32, 64, 2, 2, 2),
        retro=shape(32, 64, 2, 2, 2),
        plain=shape(64, 128, 3, 4, 4),
        row_chunks=4,
        batch_size=2,
        steps=4,
        batch_sizes=[1, 2],
        new_tokens=20,
        repeats=1,
        num_texts=20,
        tokens_per_batch=512,
        quality_tokens=512,
        max_documents=3,
        max_chunks={"train": 200, "validation": 40},
        max_held_out_characters=1_000,
    ),
}


@dataclass
class WithoutNeighbors(DataCollatorForRetro):
    """Makes the same rows, but without neighbors: what a decoder without retrieval is trained on."""

    def __call__(self, rows: Sequence[Mapping[str, int]]) -> dict[str, torch.Tensor]:
        return {name: value for name, value in super().__call__(rows).items() if not name.startswith("neighbor_")}


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def synchronize() -> None:
    """Waits for the work that was given to the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def base_decoder(arguments: Any) -> str:
    """Folder or Hub id of the decoder that the reader is for."""
    if arguments.base is not None:
        return arguments.base
    folder = Path(arguments.output_dir) / "base"
    if arguments.size != "toy":
        return find_smollm2(folder)
    if not folder.exists():
        datastore = open_datastore(arguments)
        with whole(folder) as temporary:
            plain_decoder(datastore, SIZES["toy"].decoder).save_pretrained(temporary)
            datastore.tokenizer.save_pretrained(temporary)
    return str(folder)


def open_datastore(arguments: Any) -> RetroDatastore:
    """The datastore that was given, or one that is made from docstrings or from `--data`."""
    if arguments.datastore is not None:
        return RetroDatastore.from_pretrained(arguments.datastore)
    folder = Path(arguments.output_dir)
    split_documents(
        folder,
        arguments.data,
        seed=0,
        on_bad_record="error",
        by_name=arguments.data is None,
        max_held_out_characters=SIZES[arguments.size].max_held_out_characters,
    )
    if arguments.size == "toy":
        tokenizer = train_tokenizer(folder)
    else:
        tokenizer = AutoTokenizer.from_pretrained(base_decoder(arguments))
    return make_datastore(folder, tokenizer, RetroConfig(), SIZES[arguments.size].max_chunks)


def plain_decoder(datastore: RetroDatastore, fields: Shape) -> LlamaForCausalLM:
    """A random decoder for the tokens of a datastore."""
    set_seed(0)
    tokenizer = datastore.tokenizer
    return LlamaForCausalLM(
        LlamaConfig(
            **fields,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
        )
    )


def joint_model(datastore: RetroDatastore, fields: Shape) -> RetroJointForCausalLM:
    """A random decoder that reads neighbors with its own attention."""
    return RetroJointForCausalLM.from_decoder(
        plain_decoder(datastore, fields),
        chunk_size=datastore.chunk_size,
        continuation_chunks=datastore.continuation_chunks,
        num_neighbors=1,
    )


def retro_model(datastore: RetroDatastore, fields: Shape, **options: Any) -> RetroForCausalLM:
    """A random decoder with chunked cross attention in every third layer, and a neighbor encoder of two layers."""
    set_seed(0)
    number = fields["num_hidden_layers"]
    return RetroForCausalLM(
        config_for_datastore(
            datastore,
            **fields,
            cross_attention_layers=list(range(number // 3, number, 3)),
            neighbor_encoder_num_hidden_layers=2,
            tie_word_embeddings=True,
            num_neighbors=1,
            **options,
        )
    )


def num_parameters(model: PreTrainedModel) -> str:
    return f"{model.num_parameters() / 1e6:.2f} M"


def to_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of rows; a row may lack columns of others."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([str(row.get(name, "")) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
