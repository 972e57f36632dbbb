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
"""Training arguments of the RETRO language model."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class RetroTrainingArguments(TrainingArguments):
    """
    Configuration class for [`RetroTrainer`].

    Only the parameters specific to RETRO training are listed here; see [`~transformers.TrainingArguments`] for the
    others.

    Parameters:
        > Parameters that control the rows of tokens

        row_chunks (`int`, *optional*, defaults to `32`):
            Number of consecutive chunks in a row: a row has `row_chunks * chunk_size` tokens. Documents follow each
            other in a row; one that is cut by the end of a row goes on in the next.

        > Parameters that control the neighbors

        num_neighbors (`list[int]`, *optional*, defaults to `[2]`):
            Number of neighbors k that a chunk sees in training. Of several numbers, each row draws one.
        neighbor_dropout (`float`, *optional*, defaults to `0.1`):
            Share of chunks that see no neighbors in a training step, so that the model without retrieval stays good.
        copy_share (`float`, *optional*, defaults to `0.0`):
            Share of chunks whose first neighbor is replaced by a noisy piece of their own document that holds most of
            the tokens to come: a lesson in copying that natural neighbors teach only slowly.

        > Parameters that control the optimizer

        use_muon (`bool`, *optional*, defaults to `False`):
            Whether to optimize the weights of the linear layers with Muon and the rest with AdamW, instead of `optim`.
        freeze_decoder (`bool`, *optional*, defaults to `False`):
            Whether to train only chunked cross attention and the neighbor encoder, as in retrofitting.
        decoder_learning_rate (`float`, *optional*):
            Learning rate of the decoder; `learning_rate` is then that of cross attention and neighbor encoder alone.
        gate_learning_rate (`float`, *optional*, defaults to `1e-2`):
            Learning rate of the gates of a retrofitted model's cross attention, which never decay. They start at zero
            and Adam moves them by about one learning rate a step: at `1e-2` they take ten steps to open, at `3e-4`
            hundreds.

        > Parameters that control the evaluation

        eval_window_chunks (`int`, *optional*, defaults to `32`):
            Length in chunks of the sliding windows over a held-out document.
        eval_stride_chunks (`int`, *optional*, defaults to `16`):
            Step in chunks between two windows. Every token is counted once, in the first window that holds it.
        eval_max_documents (`int`, *optional*):
            Number of held-out documents to evaluate on, the first ones. All when unset.

    These parameters have default values different from [`~transformers.TrainingArguments`]:

    - `learning_rate`: Defaults to `3e-4` instead of `5e-5`.
    - `lr_scheduler_type`: Defaults to `"cosine"` instead of `"linear"`.
    - `warmup_steps`: Defaults to `0.02` (of all steps) instead of `0`.
    - `weight_decay`: Defaults to `0.1` instead of `0`. It is applied to neither norms nor biases.
    - `adam_beta2`: Defaults to `0.95` instead of `0.999`.
    - `remove_unused_columns`: Defaults to `False` instead of `True`: rows are ranges of chunks, not model inputs.
    """

    # Parameters whose default values differ from TrainingArguments
    learning_rate: float = field(default=3e-4, metadata={"help": "The initial learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The scheduler type to use."})
    warmup_steps: float = field(
        default=0.02, metadata={"help": "Steps of linear warm-up; a number below 1 is a share of all steps."}
    )
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of all weights but norms and biases."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 of AdamW."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must be false: rows are ranges of chunks, not inputs of the model."}
    )

    # Parameters that control the rows of tokens
    row_chunks: int = field(default=32, metadata={"help": "Number of consecutive chunks in a row."})

    # Parameters that control the neighbors
    num_neighbors: list[int] = field(
        default_factory=lambda: [2],
        metadata={"help": "Number of neighbors that a chunk sees in training; of several, each row draws one."},
    )
    neighbor_dropout: float = field(
        default=0.1, metadata={"help": "Share of chunks that see no neighbors in a training step."}
    )
    copy_share: float = field(
        default=0.0,
        metadata={"help": "Share of chunks whose first neighbor becomes a noisy piece of their own document."},
    )

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

    def __post_init__(self):
        super().__post_init__()
        if self.row_chunks < 1:
            raise ValueError(f"row_chunks is {self.row_chunks}, expected at least 1")
        if not self.num_neighbors or min(self.num_neighbors) < 1:
            raise ValueError(
                f"num_neighbors is {self.num_neighbors}, expected numbers from 1; neighbor_dropout=1.0 trains without "
                "neighbors"
            )
        if self.freeze_decoder and self.decoder_learning_rate is not None:
            raise ValueError("decoder_learning_rate is set, but freeze_decoder leaves nothing that it would train")
        if not 0.0 <= self.neighbor_dropout <= 1.0:
            raise ValueError(f"neighbor_dropout is {self.neighbor_dropout}, expected a share between 0 and 1")
        if not 0.0 <= self.copy_share <= 1.0:
            raise ValueError(f"copy_share is {self.copy_share}, expected a share between 0 and 1")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: rows are ranges of chunks, not inputs of the model")
