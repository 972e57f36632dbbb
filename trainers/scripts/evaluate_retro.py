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
Measures what retrieval buys a RETRO language model on held-out documents: bits per byte and perplexity.

    retro evaluate --model model --datastore datastore --output_dir evaluation
    retro evaluate --model model --datastore datastore --output_dir evaluation --num_neighbors 1 2 4 10 \\
        --modes off random on neighbor continuation shuffled --baseline decoder --overlap
    retro evaluate --model model --datastore datastore --output_dir sizes --datastore_share 0.125 0.25 0.5 1
    retro evaluate --model model --datastore datastore --output_dir lexical --retriever bm25
    retro evaluate --model HuggingFaceTB/SmolLM2-135M --datastore datastore --output_dir untrained \\
        --modes off random on in_front
    retro evaluate --model model --datastore datastore --output_dir rivals --num_neighbors 1 2 \\
        --baselines in_context knn_lm
    accelerate launch -m trainers.scripts.evaluate_retro --model model --datastore datastore --output_dir evaluation
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.arguments import parse_arguments, run_command
from data_prep.memory import keep_freed_memory


@dataclass
class EvaluateRetroArguments:
    """
    Arguments of `retro evaluate`.
    """

    model: str = field(metadata={"help": "Folder or Hub id of a RETRO model or of any causal one, or smollm2."})
    datastore: str = field(metadata={"help": "Folder or Hub id of the datastore to search."})
    output_dir: str = field(metadata={"help": "Folder for evaluation.json, evaluation.md and evaluation.png."})
    split: str = field(default="validation", metadata={"help": "Split of the datastore to evaluate on."})
    modes: list[str] = field(
        default_factory=lambda: ["off", "random", "on"],
        metadata={"help": "Some of off, random, on, neighbor, continuation, shuffled, in_front."},
    )
    num_neighbors: list[int] = field(
        default_factory=lambda: [2],
        metadata={"help": "Number of neighbors of a chunk, or several numbers to measure."},
    )
    datastore_share: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "Shares of the datastore's documents to retrieve from, each of which is measured."},
    )
    retriever: str | None = field(
        default=None,
        metadata={
            "help": "How neighbors are found. Defaults to the way in which the stored ones were found.",
            "choices": ["dense", "bm25", "hybrid", "rerank"],
        },
    )
    baseline: str | None = field(
        default=None,
        metadata={
            "help": "Another RETRO model to measure without retrieval, such as one trained with neighbor_dropout 1."
        },
    )
    baselines: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Rivals to measure beside the modes, with what each way costs: in_context (the neighbors in front "
            "of the window) and knn_lm."
        },
    )
    knn_folder: str | None = field(
        default=None,
        metadata={"help": "Folder for the keys of the kNN-LM. Defaults to knn_lm in output_dir."},
    )
    knn_factory: str = field(default="auto", metadata={"help": "Factory string of the index of the kNN-LM."})
    knn_neighbors: int = field(default=1024, metadata={"help": "Number of keys that the kNN-LM finds for a token."})
    overlap: bool = field(default=False, metadata={"help": "Report by the overlap of chunks with their neighbors."})
    domains: str | None = field(
        default=None,
        metadata={"help": "Text file with the domain of each document on a line. Each domain is reported."},
    )
    window_chunks: int = field(default=32, metadata={"help": "Length in chunks of the sliding windows."})
    stride_chunks: int = field(default=16, metadata={"help": "Step in chunks between two windows."})
    batch_size: int = field(default=8, metadata={"help": "Number of windows in a forward pass."})
    max_documents: int | None = field(default=None, metadata={"help": "Evaluate on the first documents only."})
    reader: str | None = field(
        default=None,
        metadata={
            "help": "Adapters that were trained to read neighbors, for a model that is wrapped: the name of some that "
            "come with the package, or folder or Hub id."
        },
    )
    reread_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Number of tokens at the end of a chunk that are read again with the neighbors of the chunk in "
            "sight, by a model that reads neighbors with its own attention. Defaults to that of the model."
        },
    )
    allow_unknown_tokens: bool = field(
        default=False,
        metadata={"help": "Measure texts of which the tokenizer does not know more than half of the tokens."},
    )
    model_card: bool = field(
        default=True, metadata={"help": "Also write the numbers into the card of a model in a folder."}
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Computing type of the model.", "choices": ["float32", "bfloat16", "float16"]},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the random neighbors and of the bootstrap."})


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(EvaluateRetroArguments, argv=argv, description=__doc__, prog="retro evaluate")
    import torch
    from accelerate import PartialState
    from transformers import AutoConfig

    from modeling_retro import RetroDatastore
    from modeling_retro.datastore.manifest import describe_datastore
    from modeling_retro.sharing.model_card import save_model_card
    from trainers.evaluation.closest import closest_documents, format_closest
    from trainers.evaluation.evaluate import evaluate_retro, stored_retriever
    from trainers.evaluation.options import EvaluationOptions
    from trainers.evaluation.rivals import evaluate_rivals

    from ..load_model import load_retro_model

    if arguments.baseline is not None and "knn_lm" in arguments.baselines:
        raise ValueError(
            f"--baseline is {arguments.baseline} and --baselines has knn_lm, which leaves out the documents it was "
            "tuned on; measure the other model in a run of its own"
        )
    keep_freed_memory()
    state = PartialState()
    datastore = RetroDatastore.from_pretrained(arguments.datastore)
    split = datastore.split(arguments.split)
    dtype = getattr(torch, arguments.dtype)
    domains = None
    if arguments.domains is not None:
        domains = Path(arguments.domains).read_text(encoding="utf-8").splitlines()
    options = EvaluationOptions(
        modes=arguments.modes,
        num_neighbors=arguments.num_neighbors,
        datastore_shares=arguments.datastore_share,
        window_chunks=arguments.window_chunks,
        stride_chunks=arguments.stride_chunks,
        batch_size=arguments.batch_size,
        max_documents=arguments.max_documents,
        measure_overlap=arguments.overlap,
        domains=domains,
        retriever=arguments.retriever,
        seed=arguments.seed,
        allow_unknown_tokens=arguments.allow_unknown_tokens,
    )
    reading = {"reader": arguments.reader, "reread_tokens": arguments.reread_tokens}
    model = load_retro_model(arguments.model, datastore, dtype=dtype, **reading).to(state.device)
    if arguments.baselines:
        evaluation = evaluate_rivals(
            model,
            datastore,
            split,
            arguments.baselines,
            arguments.knn_folder or Path(arguments.output_dir) / "knn_lm",
            arguments.knn_factory,
            arguments.knn_neighbors,
            options,
        )
    else:
        evaluation = evaluate_retro(model, datastore, split, options)
    if arguments.baseline is not None:
        baseline = load_retro_model(arguments.baseline, datastore, dtype=dtype).to(state.device)
        without = {"modes": ["off"], "datastore_shares": (1.0,), "measure_overlap": False, "domains": None}
        measured = evaluate_retro(baseline, datastore, split, options, **without)
        evaluation.chunk_bits["baseline"] = measured.chunk_bits["off"]
    if state.is_main_process:
        facts = {
            "split": arguments.split,
            "datastore": describe_datastore(datastore.manifest),
            "retriever": arguments.retriever or stored_retriever(split),
        }
        closest = closest_documents(datastore, split, evaluation.overlap) if arguments.overlap else []
        evaluation.save(arguments.output_dir, {**facts, "closest_documents": closest} if closest else facts)
        if (
            arguments.model_card
            and (Path(arguments.model) / "config.json").is_file()
            and AutoConfig.from_pretrained(arguments.model, trust_remote_code=False).model_type
            in ("retro", "retro_joint")
        ):
            save_model_card(arguments.model, {**evaluation.to_dict(), **facts})
        print(evaluation.to_markdown())
        if closest:
            print(f"The held-out documents that repeat the most of the datastore:\n\n{format_closest(closest)}")


if __name__ == "__main__":
    run_command(main)
