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
What drafts from the neighbors are worth: processor time of `generate()` without retrieval, with it, and with it and
drafts, on held-out documents of some datastores, and on documents of another kind than their datastore (the last line
of each temperature). The texts with drafts and without must be equal. *Cold* neighbors are read for each text, *warm*
ones were read by the text before.

    python benchmarks/drafts.py --model HuggingFaceTB/SmolLM2-135M-Instruct --datastores sqlite descriptions bible

All times are of one run, on as many threads as OMP_NUM_THREADS says.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from data_prep.arguments import parse_arguments, run_command
from modeling_retro import RetroDatastore, RetroRetriever
from modeling_retro.drafts_retro import DRAFT_TOKENS
from trainers.load_model import load_retro_model


@dataclass
class DraftsArguments:
    """Arguments of this benchmark."""

    model: str = field(metadata={"help": "Folder or Hub id of the model."})
    datastores: list[str] = field(metadata={"help": "Folders of datastores with held-out documents."})
    reader: str | None = field(default=None, metadata={"help": "Adapters that read neighbors."})
    num_neighbors: int | None = field(
        default=None, metadata={"help": "Neighbors of a chunk. Defaults to those of the model."}
    )
    num_documents: int = field(default=1, metadata={"help": "Documents of each kind."})
    max_new_tokens: int = field(default=256, metadata={"help": "Tokens to write behind two chunks of a document."})
    temperatures: list[float] = field(default_factory=lambda: [0.0, 0.7], metadata={"help": "0 for greedy search."})
    dtype: str = field(default="float32", metadata={"help": "Torch dtype of the weights."})


def prompts(datastore: RetroDatastore, count: int) -> list[torch.LongTensor]:
    """The first two chunks of held-out documents that have more than two."""
    chunks = datastore.split("validation").chunks
    _, first, sizes = np.unique(np.asarray(chunks.document_id), return_index=True, return_counts=True)
    starts = first[sizes > 2][:count]
    return [torch.from_numpy(chunks.take([start, start + 1])[0].astype(np.int64).reshape(1, -1)) for start in starts]


class Measured:
    """The processor time and the steps of some texts."""

    def __init__(self):
        self.seconds, self.num_steps, self.texts = 0.0, 0, []

    def write(self, model, prompt: torch.LongTensor, temperature: float, is_warm: bool = False, **options) -> None:
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
        )
        if not is_warm:
            model.neighbor_memory.clear()
        torch.manual_seed(0)
        start = time.process_time()
        output = model.generate(prompt, eos_token_id=None, return_dict_in_generate=True, **sampling, **options)
        self.seconds += time.process_time() - start
        self.num_steps += output.get("num_steps", output.sequences.shape[1] - prompt.shape[1])
        self.texts.append(output.sequences[0].tolist())


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(DraftsArguments, argv=argv, description=__doc__)
    opened = [RetroDatastore.from_pretrained(path) for path in arguments.datastores]
    names = [Path(path).name for path in arguments.datastores]
    model = load_retro_model(
        arguments.model, opened[0], dtype=getattr(torch, arguments.dtype), reader=arguments.reader
    ).eval()
    if arguments.num_neighbors is not None:
        model.config.num_neighbors = arguments.num_neighbors
    kinds = [(name, datastore, datastore) for name, datastore in zip(names, opened, strict=True)]
    kinds.append((f"{names[-1]} with {names[0]}", opened[-1], opened[0]))
    new = arguments.max_new_tokens
    print(
        f"{torch.get_num_threads()} threads, {arguments.dtype}, {arguments.num_documents} documents of each kind, "
        f"{model.config.num_neighbors} neighbors of each chunk"
    )
    print(
        "| documents | temperature | tokens a step | OFF, tokens/s | ON / OFF | ON with drafts / OFF | "
        "the same, warm | ON with drafts / ON | equal texts |\n|---|---|---|---|---|---|---|---|---|"
    )
    with model.retrieval(False):  # the first texts of a process are slower
        model.generate(prompts(opened[0], 1)[0], max_new_tokens=4)
    for temperature in arguments.temperatures:
        for name, source, datastore in kinds:
            model.set_retriever(RetroRetriever(datastore))
            off, on, drafted, warm = (Measured() for _ in range(4))
            written = prompts(source, arguments.num_documents)
            for prompt in written:
                with model.retrieval(False):
                    off.write(model, prompt, temperature, max_new_tokens=new, draft_tokens=0)
                on.write(model, prompt, temperature, max_new_tokens=new, draft_tokens=0)
                drafted.write(model, prompt, temperature, max_new_tokens=new, draft_tokens=DRAFT_TOKENS)
                warm.write(model, prompt, temperature, is_warm=True, max_new_tokens=new, draft_tokens=DRAFT_TOKENS)
            equal = sum(left == right for left, right in zip(on.texts, drafted.texts, strict=True))
            assert warm.texts == drafted.texts
            count = new * len(written)
            print(
                f"| {name} | {temperature:g} | {count / drafted.num_steps:.2f} | {count / off.seconds:.1f} | "
                f"{off.seconds / on.seconds:.2f} | {off.seconds / drafted.seconds:.2f} | "
                f"{off.seconds / warm.seconds:.2f} | {on.seconds / drafted.seconds:.2f} | {equal} of {len(written)} |",
                flush=True,
            )


if __name__ == "__main__":
    run_command(main)
