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
Trains the encoder that finds neighbors, on pairs of texts.

    retro train-retriever --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 --pairs train.jsonl.gz \
        --eval_pairs held-out.jsonl --eval_strategy steps --eval_on_start true --output_dir encoder
    accelerate launch -m trainers.scripts.train_retriever --model_name_or_path … --pairs a.jsonl.gz b.jsonl.gz \
        --weights 2 1 --mini_batch_size 64 --per_device_train_batch_size 1024 --output_dir encoder

Several pair sets form a mixture, in which each batch comes from one of them. sentence-transformers, AutoModel and
`retro embed --encoder` can load the folder that is written. The same command resumes an interrupted run from its last
checkpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from data_prep.arguments import parse_arguments, run_command
from data_prep.memory import keep_freed_memory

from ..training_options import RetrieverTrainingOptions


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedModel

    from data_prep.pairs.pairs import PairMixture
    from trainers.retriever.config import RetrieverTrainingArguments


@dataclass
class TrainRetrieverArguments:
    """
    Arguments of `retro train-retriever`, besides those of [`RetrieverTrainingArguments`].
    """

    pairs: list[str] = field(
        metadata={
            "help": "Pair sets: files .jsonl, .json, .csv or .tsv[.gz|.zst], folders of `retro pairs`, Hub datasets."
        }
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the encoder to start from, or minilm."}
    )
    model_config: str | None = field(
        default=None,
        metadata={"help": "YAML or JSON file with `model_type` and fields of its config, to start from scratch."},
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer. Defaults to that of the encoder."}
    )
    weights: list[float] | None = field(
        default=None, metadata={"help": "Relative number of batches of each pair set. Defaults to their sizes."}
    )
    recipe: str | None = field(
        default=None,
        metadata={"help": "List like recipes/sentence_pairs.tsv to take the weights from, by file name."},
    )
    columns: list[str] | None = field(
        default=None, metadata={"help": "Columns of anchor, positive and hard negatives, if they have other names."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column of the label, if it is not label, labels, is_duplicate or score."}
    )
    min_score: float | None = field(
        default=None, metadata={"help": "Lowest label or score of two texts that belong together. By default 0 or 1."}
    )
    num_negatives: int | None = field(
        default=None, metadata={"help": "Number of hard negatives. Defaults to that of the first record."}
    )
    skip_bad_lines: bool = field(default=False, metadata={"help": "Leave malformed lines out instead of stopping."})
    streaming: bool = field(
        default=False, metadata={"help": "Do not read the (single) pair set into a table first. Needs --max_steps."}
    )
    num_proc: int | None = field(default=None, metadata={"help": "Processes that read the files."})
    eval_pairs: str | None = field(default=None, metadata={"help": "Held-out pair set."})


def main(argv: Sequence[str] | None = None) -> None:
    arguments, training_arguments = parse_arguments(
        TrainRetrieverArguments,
        argv=argv,
        description=__doc__,
        prog="retro train-retriever",
        training_options=RetrieverTrainingOptions,
        training_arguments="trainers.retriever.config:RetrieverTrainingArguments",
    )
    from data_prep.pairs.pairs import load_pairs
    from data_prep.shipped_models import find_model
    from modeling_retro.datastore.checksums import load_tokenizer
    from trainers.durable_checkpoints import checkpoint_to_resume
    from trainers.retriever.trainer import RetrieverTrainer

    keep_freed_memory()
    if arguments.tokenizer_name_or_path is None and arguments.model_name_or_path is None:
        raise ValueError("--model_config needs --tokenizer_name_or_path")
    eval_dataset = None
    if arguments.eval_pairs is not None:
        eval_dataset = load_pairs(arguments.eval_pairs, **_meaning(arguments))
    trainer = RetrieverTrainer(
        model=_load_encoder(arguments, training_arguments.seed),
        args=training_arguments,
        processing_class=load_tokenizer(find_model(arguments.tokenizer_name_or_path or arguments.model_name_or_path)),
        train_dataset=_load_training_pairs(arguments, training_arguments),
        eval_dataset=eval_dataset,
    )
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(training_arguments))
    if eval_dataset is not None:
        trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_model()
    trainer.save_state()
    if training_arguments.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card()


def _meaning(arguments: TrainRetrieverArguments) -> dict[str, Any]:
    """The options of `load_pairs` that say what the records of the pair sets mean."""
    return {name: getattr(arguments, name) for name in ("columns", "label_column", "min_score")}


def _load_encoder(arguments: TrainRetrieverArguments, seed: int) -> "PreTrainedModel":
    from transformers import AutoConfig, AutoModel, set_seed

    from data_prep.shipped_models import find_model, naming_the_ways
    from modeling_retro.encoder.chunk_encoder import load_text_encoder

    if (arguments.model_name_or_path is None) == (arguments.model_config is None):
        raise ValueError(
            "give either --model_name_or_path (an encoder to start from) or --model_config (from scratch)"
        )
    if arguments.model_name_or_path is not None:
        with naming_the_ways(arguments.model_name_or_path, "encoder"):
            return load_text_encoder(find_model(arguments.model_name_or_path))
    fields = yaml.safe_load(Path(arguments.model_config).read_text(encoding="utf-8"))
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise ValueError(f"{arguments.model_config}: expected `model_type` and fields of its config")
    set_seed(seed)
    return AutoModel.from_config(AutoConfig.for_model(**fields))


def _load_training_pairs(
    arguments: TrainRetrieverArguments, training_arguments: "RetrieverTrainingArguments"
) -> "Dataset | IterableDataset | PairMixture":
    from data_prep.file_types import bare_name
    from data_prep.pairs.collections import read_recipe
    from data_prep.pairs.pairs import PairMixture, load_pairs

    if arguments.streaming and len(arguments.pairs) > 1:
        raise ValueError("--streaming takes one pair set; a mixture needs to know the sizes of its sets")
    names = [bare_name(source) for source in arguments.pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"the pair sets {', '.join(arguments.pairs)} have names in common")
    weights = arguments.weights
    if arguments.recipe is not None:
        rows = read_recipe(arguments.recipe)
        unknown = [name for name in names if name not in rows]
        if unknown:
            raise ValueError(f"{arguments.recipe} has no set {', '.join(unknown)}")
        if weights is not None:
            raise ValueError("give --weights or --recipe, not both")
        weights = [float(rows[name]["weight"]) for name in names]
    if weights is not None and len(weights) != len(names):
        raise ValueError(f"--weights has {len(weights)} numbers for {len(names)} pair sets")
    with training_arguments.main_process_first(desc="reading the pairs"):
        sets = [
            load_pairs(
                source,
                **_meaning(arguments),
                num_proc=arguments.num_proc,
                num_negatives=arguments.num_negatives,
                skip_bad_lines=arguments.skip_bad_lines,
                streaming=arguments.streaming,
            )
            for source in arguments.pairs
        ]
    if len(sets) == 1:
        return sets[0]
    return PairMixture(
        dict(zip(names, sets, strict=True)), None if weights is None else dict(zip(names, weights, strict=True))
    )


if __name__ == "__main__":
    run_command(main)
