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

A prompt of less than a chunk with a question mark is a question: it is looked up by its own text before it is
answered. `--query` looks up another text, and `--chat` makes the prompt a message in the chat template of the model.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.arguments import parse_arguments, run_command


@dataclass
class GenerateArguments:
    """
    Arguments of `retro generate`.
    """

    model: str = field(metadata={"help": "Folder or Hub id of a RETRO model or of any causal one, or smollm2."})
    datastore: str = field(metadata={"help": "Folder or Hub id of the datastore to search."})
    prompt: str = field(metadata={"help": "Text to continue."})
    retriever: str | None = field(
        default=None,
        metadata={
            "help": "How neighbors are found. Defaults to the way in which the stored ones were found.",
            "choices": ["dense", "bm25", "hybrid", "rerank"],
        },
    )
    max_new_tokens: int = field(default=192, metadata={"help": "Largest number of tokens to generate."})
    do_sample: bool = field(default=False, metadata={"help": "Sample instead of taking the most probable token."})
    temperature: float = field(default=0.8, metadata={"help": "Temperature of sampling."})
    top_p: float = field(default=0.95, metadata={"help": "Share of the probability to sample from."})
    num_neighbors: int | None = field(
        default=None, metadata={"help": "Number of neighbors of a chunk. Defaults to the model's."}
    )
    query: str | None = field(
        default=None,
        metadata={
            "help": "Text to look up. The prompt and its answer see what is found. Defaults to the prompt, if it is "
            "a question of less than a chunk or a message."
        },
    )
    chat: bool = field(
        default=False,
        metadata={"help": "Make the prompt a user's message in the chat template of the model, and look it up."},
    )
    passages: str | None = field(
        default=None,
        metadata={
            "help": "How the passages of a question are read: each by itself, or one after the other as one text. The "
            "latter is the default of models that read jointly and were not trained for it.",
            "choices": ["apart", "in_order"],
        },
    )
    reader: str | None = field(
        default=None,
        metadata={
            "help": "Adapters that were trained to read neighbors, for a model that is wrapped: the name of some that "
            "come with the package, or folder or Hub id."
        },
    )
    allow_control_tokens: bool = field(
        default=False, metadata={"help": "Turn text of the prompt such as <|im_start|> into the token that it spells."}
    )
    draft_tokens: int = field(
        default=16,
        metadata={
            "help": "Largest number of tokens that are drafted from the neighbors and the text, and confirmed by one "
            "step. 0 for none."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of sampling."})


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(GenerateArguments, argv=argv, description=__doc__, prog="retro generate")
    import torch
    from transformers import set_seed

    from modeling_retro import RetroJointForCausalLM, RetroRetriever

    from ..generation import (
        format_chunks,
        format_passages,
        generate_with_neighbors,
        look_up,
        short_question,
    )
    from ..load_model import load_retro_model

    retriever = RetroRetriever.from_pretrained(arguments.datastore, retriever=arguments.retriever)
    model = load_retro_model(arguments.model, retriever.datastore, reader=arguments.reader)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.num_neighbors is not None:
        model.config.num_neighbors = arguments.num_neighbors
    sampling = {"temperature": arguments.temperature, "top_p": arguments.top_p} if arguments.do_sample else {}
    set_seed(arguments.seed)
    tokenizer = retriever.datastore.tokenizer
    prompt, found, before = arguments.prompt, None, ()
    query = arguments.query
    if query is None:
        query = prompt if arguments.chat else short_question(prompt, tokenizer, model.config.chunk_size)
    if arguments.chat:
        from ..prompts import PromptEncoder

        prompts, messages = PromptEncoder(tokenizer), [{"role": "user", "content": prompt}]
        if isinstance(model, RetroJointForCausalLM):
            before, prompt = prompts.encode_question(messages)
        else:
            prompt = prompts.encode_chat(messages)
    if query is not None:
        found = look_up(retriever, query, model.config.num_neighbors)
        number = int((found.chunk_ids >= 0).sum())
        how = (arguments.passages or model.default_passages).replace("_", " ")
        print(f"Looked up {query!r} and found {number} passages, which are read {how}.", file=sys.stderr)
    chunks = generate_with_neighbors(
        model,
        retriever,
        prompt,
        found=found,
        passages=arguments.passages,
        before=before,
        allow_control_tokens=arguments.allow_control_tokens,
        max_new_tokens=arguments.max_new_tokens,
        do_sample=arguments.do_sample,
        draft_tokens=arguments.draft_tokens,
        **sampling,
    )
    per_step = chunks.num_new_tokens / chunks.num_steps
    print(
        f"Wrote {chunks.num_new_tokens} tokens in {chunks.num_steps} steps, {per_step:.2f} tokens a step.",
        file=sys.stderr,
    )
    text = "".join(chunk.text for chunk in chunks)
    if arguments.chat:  # the answer alone
        given = "".join(tokenizer.decode(part, skip_special_tokens=True) for part in (list(before), prompt))
        text = text.removeprefix(given).strip()
    print(text)
    print()
    if found is not None:
        print(format_passages(retriever.datastore, found))
    print(format_chunks(chunks))


if __name__ == "__main__":
    run_command(main)
