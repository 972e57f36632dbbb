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
Trains an encoder-decoder on corrupted spans (https://huggingface.co/papers/1910.10683, section 3.1.4), over bytes or
subwords, from scratch or from a checkpoint:

    retro train-span-corruption --tasks data_prep/recipes/span_corruption.yaml --output_dir byt5 \\
        --model_config d_model=512,d_ff=1024,num_layers=8 --optim adafactor --learning_rate 1e-2 --max_steps 10000
    accelerate launch -m trainers.scripts.train_span_corruption --tasks tasks.yaml --output_dir t5 \\
        --model_name_or_path google/t5-v1_1-small --max_steps 10000

`--optim adafactor` is the Adafactor of T5's pretraining, whose learning rate is relative to the scale of each
parameter. A small model that starts from scratch learns fastest on short inputs (`input_length` 32 in the tasks file,
so that a row has one or two spans), because learning to find the surroundings of a span among many takes longest.

The same command resumes an interrupted run from its last checkpoint. `output_dir` holds the model, and
`output_dir/encoder` holds its encoder, from which `retro train-retriever` can start.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.arguments import parse_arguments, run_command
from data_prep.memory import keep_freed_memory


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class SpanCorruptionArguments:
    """
    Arguments of `retro train-span-corruption`, besides those of [`~transformers.TrainingArguments`].

    Args:
        tasks (`str`):
            YAML file of tasks (see [`data_prep.span_corruption.tasks`]).
        model_name_or_path (`str`, *optional*):
            Checkpoint to continue from. Defaults to a new model.
        config_name_or_path (`str`, *optional*):
            Configuration of a new model. Defaults to a [`~transformers.T5Config`] with a gated GELU.
        model_config (`str`, *optional*):
            Changes to the configuration of a new model, `"d_model=512,num_layers=8"`.
        tokenizer_name_or_path (`str`, *optional*):
            Tokenizer. Defaults to that of the checkpoint, or for a new model to that of ByT5, whose tokens are bytes.
        shuffle_buffer (`int`, *optional*, defaults to 10000):
            Number of rows among which rows are shuffled. 0 keeps the order of the texts.
    """

    tasks: str = field(metadata={"help": "YAML file of tasks, see data_prep/span_corruption/tasks.py."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to continue from. Defaults to a new model."}
    )
    config_name_or_path: str | None = field(
        default=None, metadata={"help": "Configuration of a new model. Defaults to T5 with a gated GELU."}
    )
    model_config: str | None = field(
        default=None, metadata={"help": "Changes to the configuration of a new model: d_model=512,num_layers=8."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer. Defaults to that of the checkpoint, or to bytes for a new model."}
    )
    shuffle_buffer: int = field(
        default=10_000, metadata={"help": "Rows among which rows are shuffled; 0 keeps the order."}
    )


def load_model(args: SpanCorruptionArguments) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model and its tokenizer, from a checkpoint or new."""
    from transformers import AutoConfig, AutoModelForSeq2SeqLM, ByT5Tokenizer, T5Config

    from data_prep.shipped_models import find_model
    from modeling_retro.datastore.checksums import load_tokenizer
    from modeling_retro.encoder.own_code import no_code_of

    if args.model_name_or_path is not None:
        if args.model_config is not None or args.config_name_or_path is not None:
            raise ValueError(
                "--config_name_or_path and --model_config describe a new model: drop --model_name_or_path"
            )
        with no_code_of(f"the model {args.model_name_or_path}"):
            name = find_model(args.model_name_or_path)
            model = AutoModelForSeq2SeqLM.from_pretrained(name, trust_remote_code=False)
        return model, load_tokenizer(find_model(args.tokenizer_name_or_path or args.model_name_or_path))
    tokenizer = ByT5Tokenizer()
    if args.tokenizer_name_or_path is not None:
        tokenizer = load_tokenizer(find_model(args.tokenizer_name_or_path))
    if args.config_name_or_path is not None:
        with no_code_of(f"the model {args.config_name_or_path}"):
            config = AutoConfig.from_pretrained(find_model(args.config_name_or_path), trust_remote_code=False)
    else:
        config = T5Config(
            vocab_size=len(tokenizer),
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    if args.model_config is not None:
        config.update_from_string(args.model_config)
    if config.vocab_size < len(tokenizer):
        raise ValueError(
            f"the model has {config.vocab_size} embeddings for the {len(tokenizer)} tokens of the tokenizer"
        )
    return AutoModelForSeq2SeqLM.from_config(config), tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    args, training_args = parse_arguments(
        SpanCorruptionArguments,
        argv=argv,
        description=__doc__,
        prog="retro train-span-corruption",
        training_arguments="trainers.training_arguments:LocalTrainingArguments",
    )
    from transformers import Adafactor, AutoModelForTextEncoding, Trainer, set_seed

    from data_prep.span_corruption.tasks import load_mixture, read_tasks

    from ..durable_checkpoints import checkpoint_to_resume
    from ..span_corruption import DataCollatorForSpanCorruption, span_metrics

    keep_freed_memory()
    if training_args.max_steps <= 0:
        raise ValueError(
            f"--max_steps is {training_args.max_steps}, expected the number of steps: the rows are a stream"
        )
    set_seed(training_args.seed)
    # If rows are short, batches differ in width. Every process therefore takes its own from the stream.
    training_args.accelerator_config.dispatch_batches = False
    tasks = read_tasks(args.tasks)
    if endless := [name for name in tasks.evaluation if tasks.tasks[name].repeat]:
        raise ValueError(f"{args.tasks}: evaluation on {', '.join(endless)} would never end; remove repeat")
    model, tokenizer = load_model(args)
    try:
        collator = DataCollatorForSpanCorruption(tokenizer, seed=training_args.seed, **tasks.features)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{args.tasks}: features: {error}") from error

    # The whole mixture is repeated, so that a resumed run finds its place by counting batches.
    train_dataset = load_mixture(tasks.tasks, tasks.train, tokenizer, collator.raw_length, training_args.seed).repeat(
        None
    )
    if args.shuffle_buffer:
        train_dataset = train_dataset.shuffle(seed=training_args.seed, buffer_size=args.shuffle_buffer)
    optimizer = None
    if training_args.optim == "adafactor":
        # As in the pretraining of T5, the learning rate is relative to the scale of each parameter. That of Trainer is
        # absolute, which fits neither the large embeddings of T5 nor its small queries.
        optimizer = (
            Adafactor,
            {"lr": training_args.learning_rate, "scale_parameter": True, "relative_step": False},
        )
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset={
            name: load_mixture(tasks.tasks, {name: 1.0}, tokenizer, collator.raw_length) for name in tasks.evaluation
        },
        data_collator=collator,
        processing_class=tokenizer,
        compute_metrics=span_metrics(collator),
        optimizer_cls_and_kwargs=optimizer,
        preprocess_logits_for_metrics=lambda logits, labels: logits[0].argmax(dim=-1),
    )
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(training_args))
    trainer.save_model()
    trainer.save_state()
    if tasks.evaluation:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if trainer.is_world_process_zero():
        encoder = AutoModelForTextEncoding.from_pretrained(training_args.output_dir, trust_remote_code=False)
        encoder.save_pretrained(Path(training_args.output_dir, "encoder"))
        tokenizer.save_pretrained(Path(training_args.output_dir, "encoder"))


if __name__ == "__main__":
    run_command(main)
