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
Continues a prompt with a RETRO model and shows the neighbors that each chunk used.

    retro generate --model model --datastore datastore --prompt "Args:" --max_new_tokens 200 --do_sample
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, set_seed

from data_prep.arguments import parse_arguments, run_command
from modeling_retro.retriever_retro import RetroRetriever

from ..load_model import load_retro_model


@dataclass
class GenerateArguments:
    """
    Arguments of `retro generate`.
    """

    model: str = field(metadata={"help": "Folder or Hub id of a RETRO model, or of any causal language model."})
    datastore: str = field(metadata={"help": "Folder or Hub id of the datastore to search."})
    prompt: str = field(metadata={"help": "Text to continue."})
    max_new_tokens: int = field(default=192, metadata={"help": "Number of tokens to generate at most."})
    do_sample: bool = field(default=False, metadata={"help": "Sample, instead of taking the likeliest token."})
    temperature: float = field(default=0.8, metadata={"help": "Temperature of sampling."})
    top_p: float = field(default=0.95, metadata={"help": "Share of the probability to sample from."})
    num_neighbors: int | None = field(
        default=None, metadata={"help": "Neighbors of a chunk. Those of the model when unset."}
    )
    pad_to_chunks: bool = field(
        default=False, metadata={"help": "Pad the prompt on the left to whole chunks, so that its end is looked up."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of sampling."})


@dataclass
class GeneratedChunk:
    """
    One chunk of a generated text and what was retrieved with it.

    Args:
        text (`str`):
            Text of the chunk.
        neighbors (`list[str]`):
            Texts of its neighbors with their continuations, best first. The tokens after the chunk use them.
        scores (`list[float]`):
            Their scores.
    """

    text: str
    neighbors: list[str]
    scores: list[float]


@torch.inference_mode()
def generate_with_neighbors(
    model: PreTrainedModel, retriever: RetroRetriever, prompt: str, pad_to_chunks: bool = False, **generate_kwargs
) -> list[GeneratedChunk]:
    """
    Continues a prompt with retrieval.

    Args:
        model ([`RetroForCausalLM`] or [`RetroJointForCausalLM`]):
            The model.
        retriever ([`RetroRetriever`]):
            What it looks neighbors up with.
        prompt (`str`):
            Text to continue, not empty.
        pad_to_chunks (`bool`, *optional*, defaults to `False`):
            Whether to pad the prompt on the left to whole chunks, so that its end is looked up at once.
        generate_kwargs:
            Passed to [`~transformers.GenerationMixin.generate`].

    Returns:
        `list[GeneratedChunk]`: prompt and continuation, chunk by chunk. An incomplete last chunk has no neighbors.
    """
    datastore, tokenizer = retriever.datastore, retriever.datastore.tokenizer
    input_ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    if input_ids.shape[1] == 0:
        raise ValueError("the prompt is empty; give some text to continue")
    if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        input_ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), input_ids], dim=1)
    if pad_to_chunks:
        input_ids = retriever.pad_to_chunks(input_ids)
    model.eval()  # nothing is retrieved in training mode
    model.set_retriever(retriever)
    output = model.generate(
        input_ids.to(model.device),
        attention_mask=torch.ones_like(input_ids).to(model.device),
        return_dict_in_generate=True,
        **generate_kwargs,
    )
    tokens = output.sequences[0].cpu()
    texts = [tokenizer.decode(chunk, skip_special_tokens=True) for chunk in tokens.split(datastore.chunk_size)]
    chunks = [GeneratedChunk(text, [], []) for text in texts]
    for chunk, ids, scores in zip(
        chunks, output.get("retrieved_chunk_ids", [[]])[0], output.get("retrieved_scores", [[]])[0], strict=False
    ):
        found = ids >= 0
        neighbors, masks = datastore.take_neighbors(ids[found].numpy())
        chunk.neighbors = [
            tokenizer.decode(neighbor[mask], skip_special_tokens=True)
            for neighbor, mask in zip(neighbors, masks, strict=True)
        ]
        chunk.scores = scores[found].tolist()
    return chunks


def format_chunks(chunks: Sequence[GeneratedChunk], width: int = 100) -> str:
    """The chunks with their neighbors indented below, for reading."""
    lines = []
    for number, chunk in enumerate(chunks):
        lines.append(f"chunk {number}: {_shorten(chunk.text, 4 * width)}")
        for rank, (neighbor, score) in enumerate(zip(chunk.neighbors, chunk.scores, strict=True), start=1):
            lines.append(f"    neighbor {rank} ({score:.2f}): {_shorten(neighbor, 2 * width)}")
    return "\n".join(lines)


def _shorten(text: str, width: int) -> str:
    return textwrap.shorten(text, width, placeholder=" …")


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(GenerateArguments, argv=argv, description=__doc__, prog="retro generate")
    retriever = RetroRetriever.from_pretrained(arguments.datastore)
    model = load_retro_model(arguments.model, retriever.datastore)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.num_neighbors is not None:
        model.config.num_neighbors = arguments.num_neighbors
    sampling = {"temperature": arguments.temperature, "top_p": arguments.top_p} if arguments.do_sample else {}
    set_seed(arguments.seed)
    chunks = generate_with_neighbors(
        model,
        retriever,
        arguments.prompt,
        pad_to_chunks=arguments.pad_to_chunks,
        max_new_tokens=arguments.max_new_tokens,
        do_sample=arguments.do_sample,
        **sampling,
    )
    print("".join(chunk.text for chunk in chunks))
    print()
    print(format_chunks(chunks))


if __name__ == "__main__":
    run_command(main)
