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
"""Training arguments of the encoder of the retriever"""

from dataclasses import dataclass

from trainers.training_arguments import LocalTrainingArguments
from trainers.training_options import RetrieverTrainingOptions


@dataclass
class RetrieverTrainingArguments(RetrieverTrainingOptions, LocalTrainingArguments):
    """
    Configuration class for [`RetrieverTrainer`].

    Only the parameters that are specific to retriever training are listed here. See
    [`~transformers.TrainingArguments`] for the others.

    Parameters:
        > Parameters that control the embeddings

        pooling (`str`, *optional*, defaults to `"mean"`):
            How the states of tokens become one embedding: `"mean"` over the tokens that are not padding, or `"cls"`,
            the first token.
        max_length (`int`, *optional*):
            Longer texts are cut to this number of tokens. Defaults to the limit of tokenizer and encoder.

        > Parameters that control the loss

        scale (`float`, *optional*, defaults to `20.0`):
            Factor on the similarities (inverse temperature).
        similarity (`str`, *optional*, defaults to `"cosine"`):
            `"cosine"` (the saved encoder normalizes its embeddings) or `"dot"`.
        symmetric (`bool`, *optional*, defaults to `False`):
            Whether to also rank the anchors for each positive.
        gather_across_devices (`bool`, *optional*, defaults to `True`):
            Whether to use the texts of all processes as negatives, with gradients.
        mini_batch_size (`int`, *optional*):
            Number of texts in memory at a time (GradCache). Defaults to a whole batch.

    These parameters have default values different from [`~transformers.TrainingArguments`]:

    - `per_device_train_batch_size`: Defaults to `64` instead of `8`. A larger batch has more negatives.
    - `per_device_eval_batch_size`: Defaults to `64` instead of `8`.
    - `learning_rate`: Defaults to `2e-5` instead of `5e-5`.
    - `warmup_steps`: Defaults to `0.1` (of all steps) instead of `0`.
    - `use_cpu`: Is set to `True` if there is no accelerator.
    - `remove_unused_columns`: Defaults to `False` instead of `True`. The columns hold texts, not model inputs.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.pooling not in ("mean", "cls"):
            raise ValueError(f"pooling is {self.pooling!r}, expected 'mean' or 'cls'")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: the columns hold texts, not inputs of the model")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length is {self.max_length}, expected at least 1")
