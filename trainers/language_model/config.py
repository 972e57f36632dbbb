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
"""Training arguments of the RETRO language model"""

from dataclasses import dataclass

from trainers.training_arguments import LocalTrainingArguments
from trainers.training_options import RetroTrainingOptions


@dataclass
class RetroTrainingArguments(RetroTrainingOptions, LocalTrainingArguments):
    """
    Configuration class for [`RetroTrainer`].

    Only the parameters that are specific to RETRO training are listed here. See [`~transformers.TrainingArguments`]
    for the others.

    Parameters:
        > Parameters that control the rows of tokens

        row_chunks (`int`, *optional*, defaults to `32`):
            Number of consecutive chunks in a row, which has `row_chunks * chunk_size` tokens. A row may hold several
            documents. A document that is cut by the end of a row continues in the next row.

        > Parameters that control the neighbors

        num_neighbors (`list[int]`, *optional*, defaults to `[2]`):
            Number k of neighbors that a chunk sees in training. If several numbers are given, each row draws one.
        neighbor_dropout (`float`, *optional*, defaults to `0.1`):
            Share of chunks that see no neighbors in a training step, so that the model stays good without retrieval.
        copy_share (`float`, *optional*, defaults to `0.0`):
            Share of chunks whose first neighbor is replaced by a noisy piece of their own document, which holds most
            of the next tokens. From such pieces the model learns to copy faster than from natural neighbors.

        random_share (`float`, *optional*, defaults to `0.0`):
            Share of chunks whose neighbors become random chunks of the datastore in a training step, so that the model
            learns not to trust every neighbor.

        > Parameters that control the loss

        lm_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the language modeling loss if there is a teacher.
        teacher (`str`, *optional*):
            Folder that `retro teach` wrote, with the predictions of a model that reads the neighbor in front of its
            window. The divergence from these predictions becomes a part of the loss.
        teacher_weight (`float`, *optional*, defaults to `1.0`):
            Weight of this divergence.

        > Parameters that control the optimizer

        use_muon (`bool`, *optional*, defaults to `False`):
            Whether to optimize the weights of the linear layers with Muon and the others with AdamW, instead of
            `optim`.
        freeze_decoder (`bool`, *optional*, defaults to `False`):
            Whether to train only chunked cross attention and the neighbor encoder, as in retrofitting.
        decoder_learning_rate (`float`, *optional*):
            Learning rate of the decoder. `learning_rate` then applies only to cross attention and the neighbor
            encoder.
        gate_learning_rate (`float`, *optional*, defaults to `1e-2`):
            Learning rate of the gates of the cross attention of a retrofitted model, which have no weight decay. They
            start at zero, and Adam moves them by about one learning rate in each step. At `1e-2` they need ten steps
            to open, at `3e-4` hundreds.

        > Parameters that control the evaluation

        eval_window_chunks (`int`, *optional*, defaults to `32`):
            Length in chunks of the sliding windows over a held-out document.
        eval_stride_chunks (`int`, *optional*, defaults to `16`):
            Step in chunks between two windows. Every token is counted once, in the first window that holds it.
        eval_max_documents (`int`, *optional*):
            Number of held-out documents to evaluate on, from the beginning of the split. Defaults to all.
        early_stopping_patience (`int`, *optional*):
            Number of evaluations in a row without a better `metric_for_best_model` after which the training stops.
            Needs `load_best_model_at_end`.

        > Parameters that control the saved files

        retrofit_only (`bool`, *optional*, defaults to `False`):
            Whether to save only the weights that were added to a frozen decoder, with the checksum of the decoder.
            This applies to checkpoints as well.

    These parameters have default values different from [`~transformers.TrainingArguments`]:

    - `learning_rate`: Defaults to `3e-4` instead of `5e-5`.
    - `lr_scheduler_type`: Defaults to `"cosine"` instead of `"linear"`.
    - `warmup_steps`: Defaults to `0.02` (of all steps) instead of `0`.
    - `weight_decay`: Defaults to `0.1` instead of `0`. It is applied to neither norms nor biases.
    - `adam_beta2`: Defaults to `0.95` instead of `0.999`.
    - `use_cpu`: Is set to `True` if there is no accelerator.
    - `remove_unused_columns`: Defaults to `False` instead of `True`, because rows are ranges of chunks, not model
      inputs.
    """

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
        if not 0.0 <= self.random_share <= 1.0:
            raise ValueError(f"random_share is {self.random_share}, expected a share between 0 and 1")
        if self.teacher is None and self.lm_weight != 1.0:
            raise ValueError(f"lm_weight is {self.lm_weight}, but there is no teacher beside the loss; give `teacher`")
        if self.early_stopping_patience is not None and not self.load_best_model_at_end:
            raise ValueError("early_stopping_patience needs load_best_model_at_end=True")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: rows are ranges of chunks, not inputs of the model")
