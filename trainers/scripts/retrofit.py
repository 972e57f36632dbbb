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
Makes a RETRO model from a pretrained decoder, in one of two ways.

    retro retrofit --base HuggingFaceTB/SmolLM2-135M --attention joint --retrofit-only --output-dir smollm2-joint
    retro retrofit --base HuggingFaceTB/SmolLM2-135M --output-dir smollm2-retro
    retro retrofit --base Qwen/Qwen3-0.6B --output-dir qwen3-retro --cross-attention-layers 9 15 21 --retrofit-only

`--attention joint` wraps any causal language model. Its own attention reads the neighbors, and nothing has to be
trained. `--attention cross` adds the chunked cross attention of the paper to Llama, Mistral, Qwen2, Qwen3, SmolLM3 or
Granite. At first, this model computes exactly what its decoder computes. Train it with `retro train --model
smollm2-retro --freeze-decoder true ...`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.arguments import parse_arguments, run_command


@dataclass
class RetrofitArguments:
    """
    Arguments of `retro retrofit`. Other fields have the defaults of [`RetroConfig`].
    """

    base: str = field(metadata={"help": "Folder or Hub id of the decoder, or smollm2."})
    output_dir: str = field(metadata={"help": "Folder to write the model and its tokenizer to; new or empty."})
    attention: str = field(
        default="cross",
        metadata={
            "help": "How neighbors are read: by chunked cross attention that is added, or jointly with the text.",
            "choices": ["cross", "joint"],
        },
    )
    revision: str = field(default="main", metadata={"help": "Revision of the decoder on the Hub."})
    dtype: str = field(default="auto", metadata={"help": "Data type of the weights: float32, bfloat16, auto, …"})
    warm_start: bool = field(
        default=True, metadata={"help": "Copy the decoder's layers into cross attention and neighbor encoder."}
    )
    retrofit_only: bool = field(
        default=False, metadata={"help": "Write only the new weights, with the name and checksum of the decoder."}
    )
    chunk_size: int = field(default=64, metadata={"help": "Tokens in a chunk: as in the datastore."})
    continuation_chunks: int = field(
        default=1, metadata={"help": "Chunks by which a neighbor continues: as in the datastore."}
    )
    num_neighbors: int = field(default=2, metadata={"help": "Number of neighbors that the model asks for."})
    reader: str | None = field(
        default=None,
        metadata={
            "help": "Adapters that were trained to read neighbors, for joint attention: the name of some that "
            "come with the package, or folder or Hub id."
        },
    )
    cross_attention_layers: list[int] | None = field(
        default=None,
        metadata={"help": "Layers (from 0) with chunked cross attention. Defaults to every third from the sixth."},
    )
    neighbor_encoder_num_hidden_layers: int = field(default=2, metadata={"help": "Layers of the neighbor encoder."})


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(RetrofitArguments, argv=argv, description=__doc__, prog="retro retrofit")
    from data_prep.shipped_models import find_model
    from modeling_retro import RetroForCausalLM, RetroJointForCausalLM
    from modeling_retro.datastore.checksums import load_tokenizer, tokenizer_fingerprint
    from modeling_retro.encoder.own_code import no_code_of

    if arguments.reader is not None and arguments.attention != "joint":
        raise ValueError(f"--reader {arguments.reader} is for --attention joint; cross attention has no such adapters")
    output_dir = Path(arguments.output_dir)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"--output-dir {output_dir} is not empty; choose another or delete it")
    options = {
        name: getattr(arguments, name)
        for name in ("revision", "dtype", "chunk_size", "continuation_chunks", "num_neighbors")
    }
    base = find_model(arguments.base)
    with no_code_of(f"the decoder {base}"):
        if arguments.attention == "joint":
            model = RetroJointForCausalLM.from_decoder_pretrained(base, reader=arguments.reader, **options)
        else:
            model = RetroForCausalLM.from_decoder_pretrained(
                base,
                warm_start=arguments.warm_start,
                cross_attention_layers=arguments.cross_attention_layers,
                neighbor_encoder_num_hidden_layers=arguments.neighbor_encoder_num_hidden_layers,
                **options,
            )
    tokenizer = load_tokenizer(base, revision=arguments.revision)
    if tokenizer.is_fast:
        model.config.tokenizer_sha256 = tokenizer_fingerprint(tokenizer)["sha256"]
    model.freeze_decoder()
    tokenizer.save_pretrained(output_dir)
    model.save_pretrained(output_dir, retrofit_only=arguments.retrofit_only)
    added = model.num_parameters(only_trainable=True)
    print(f"{output_dir}: {model.num_parameters() / 1e6:.1f} million parameters, {added / 1e6:.1f} of them new")


if __name__ == "__main__":
    run_command(main)
