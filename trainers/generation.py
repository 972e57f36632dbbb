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
"""Continues a prompt with a RETRO model and reports the neighbors of each chunk"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from modeling_retro.retriever.retriever import RetroRetriever


@dataclass
class GeneratedChunk:
    """
    One chunk of a generated text and its neighbors.

    Args:
        text (`str`):
            Text of the chunk.
        neighbors (`list[str]`):
            Texts of the neighbors of the chunk with their continuations, best first. The tokens after the chunk see
            them.
        scores (`list[float]`):
            Scores of the neighbors.
    """

    text: str
    neighbors: list[str]
    scores: list[float]


@torch.inference_mode()
def generate_with_neighbors(
    model: PreTrainedModel,
    retriever: RetroRetriever,
    prompt: str,
    pad_to_chunks: bool = False,
    allow_control_tokens: bool = False,
    **generate_kwargs,
) -> list[GeneratedChunk]:
    """
    Continues a prompt with retrieval.

    Args:
        model ([`RetroForCausalLM`] or [`RetroJointForCausalLM`]):
            The model.
        retriever ([`RetroRetriever`]):
            The retriever that looks up the neighbors.
        prompt (`str`):
            Text to continue. It must not be empty.
        pad_to_chunks (`bool`, *optional*, defaults to `False`):
            Whether to pad the prompt on the left to whole chunks, so that its end is looked up at once. The model does
            not see the padding.
        allow_control_tokens (`bool`, *optional*, defaults to `False`):
            Whether text of the prompt that spells a special token, such as `<|im_start|>`, becomes that token.
        generate_kwargs:
            Passed to [`~transformers.GenerationMixin.generate`].

    Returns:
        `list[GeneratedChunk]`: prompt and continuation, chunk by chunk. An incomplete last chunk has no neighbors.
    """
    datastore, tokenizer = retriever.datastore, retriever.datastore.tokenizer
    input_ids = tokenizer(
        prompt, add_special_tokens=False, split_special_tokens=not allow_control_tokens, return_tensors="pt"
    )["input_ids"]
    if input_ids.shape[1] == 0:
        raise ValueError("the prompt is empty; give some text to continue")
    if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        input_ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), input_ids], dim=1)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if pad_to_chunks:
        inputs = retriever.close_chunks(input_ids)
    model.eval()  # nothing is retrieved in training mode
    model.set_retriever(retriever)
    output = model.generate(
        **{name: values.to(model.device) for name, values in inputs.items()},
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
    """Formats the chunks for reading, with their neighbors indented below."""
    lines = []
    for number, chunk in enumerate(chunks):
        lines.append(f"chunk {number}: {_shorten(chunk.text, 4 * width)}")
        for rank, (neighbor, score) in enumerate(zip(chunk.neighbors, chunk.scores, strict=True), start=1):
            lines.append(f"    neighbor {rank} ({score:.2f}): {_shorten(neighbor, 2 * width)}")
    return "\n".join(lines)


def _shorten(text: str, width: int) -> str:
    return textwrap.shorten(text, width, placeholder=" …")
