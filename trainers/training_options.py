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
The options that this package adds to [`~transformers.TrainingArguments`], or whose defaults it changes. They are
separate from the classes of training arguments, because those import torch, which `--help` does without.
"""

from dataclasses import dataclass, field


@dataclass
class RetroTrainingOptions:
    """Options of training a RETRO language model (see [`~trainers.language_model.config.RetroTrainingArguments`])."""

    # Parameters whose default values differ from TrainingArguments
    learning_rate: float = field(default=3e-4, metadata={"help": "The initial learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The scheduler type to use."})
    warmup_steps: float = field(
        default=0.02, metadata={"help": "Steps of linear warm-up; a number below 1 is a share of all steps."}
    )
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of all weights except norms and biases."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 of AdamW."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must be false: rows are ranges of chunks, not inputs of the model."}
    )

    # Parameters that control the rows of tokens
    row_chunks: int = field(default=32, metadata={"help": "Number of consecutive chunks in a row."})

    # Parameters that control the neighbors
    num_neighbors: list[int] = field(
        default_factory=lambda: [2],
        metadata={"help": "Number of neighbors of a chunk in training. Each row draws one of several numbers."},
    )
    neighbor_dropout: float = field(
        default=0.1, metadata={"help": "Share of chunks that see no neighbors in a training step."}
    )
    copy_share: float = field(
        default=0.0,
        metadata={"help": "Share of chunks whose first neighbor becomes a noisy piece of their own document."},
    )

    random_share: float = field(
        default=0.0, metadata={"help": "Share of chunks whose neighbors become random chunks of the datastore."}
    )

    # Parameters that control the loss
    lm_weight: float = field(default=1.0, metadata={"help": "Weight of the language modeling loss with a teacher."})
    teacher: str | None = field(default=None, metadata={"help": "Folder that `retro teach` wrote."})
    teacher_weight: float = field(default=1.0, metadata={"help": "Weight of the divergence from the teacher."})

    # Parameters that control the optimizer
    use_muon: bool = field(
        default=False, metadata={"help": "Optimize the linear layers with Muon and the rest with AdamW."}
    )
    freeze_decoder: bool = field(
        default=False, metadata={"help": "Train only chunked cross attention and the neighbor encoder."}
    )
    decoder_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the decoder. `learning_rate` when unset."}
    )
    gate_learning_rate: float = field(
        default=1e-2, metadata={"help": "Learning rate of the gates of a retrofitted model's cross attention."}
    )

    # Parameters that control the evaluation
    eval_window_chunks: int = field(
        default=32, metadata={"help": "Length in chunks of the sliding windows over a held-out document."}
    )
    eval_stride_chunks: int = field(default=16, metadata={"help": "Step in chunks between two windows."})
    eval_max_documents: int | None = field(
        default=None, metadata={"help": "Number of held-out documents to evaluate on. All when unset."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Evaluations in a row without improvement after which the training stops; never when unset."
        },
    )

    # Parameters that control the saved files
    retrofit_only: bool = field(
        default=False,
        metadata={"help": "Save only the weights that were added to a frozen decoder, with its checksum."},
    )


@dataclass
class RetrieverTrainingOptions:
    """Options of training a retriever (see [`~trainers.retriever.config.RetrieverTrainingArguments`])."""

    # Parameters whose default values differ from TrainingArguments
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Number of pairs per device in training."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Number of pairs per device in evaluation."})
    learning_rate: float = field(default=2e-5, metadata={"help": "The initial learning rate."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Steps of linear warm-up; a number below 1 is a share of all steps."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must be false: the columns hold texts, not inputs of the model."}
    )

    # Parameters that control the embeddings
    pooling: str = field(default="mean", metadata={"help": "Pooling of token states.", "choices": ["mean", "cls"]})
    max_length: int | None = field(
        default=None,
        metadata={"help": "Longer texts are cut to this number of tokens. Defaults to the limit of the encoder."},
    )

    # Parameters that control the loss
    scale: float = field(default=20.0, metadata={"help": "Factor on the similarities (inverse temperature)."})
    similarity: str = field(
        default="cosine", metadata={"help": "Similarity of embeddings.", "choices": ["cosine", "dot"]}
    )
    symmetric: bool = field(default=False, metadata={"help": "Also rank the anchors for each positive."})
    gather_across_devices: bool = field(
        default=True, metadata={"help": "Use the texts of all processes as negatives, with gradients."}
    )
    mini_batch_size: int | None = field(
        default=None,
        metadata={"help": "Number of texts in memory at a time (GradCache). Defaults to a whole batch."},
    )
