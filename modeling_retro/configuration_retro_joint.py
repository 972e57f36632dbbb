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
"""Configuration of a causal language model that reads neighbors with its own attention"""

import os
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.utils import auto_docstring
from transformers.utils.type_validators import interval

from .lora_targets_retro import name_lora_targets


@auto_docstring(checkpoint="retro-transformers/smollm2-135m-joint")
@strict
class RetroJointConfig(PreTrainedConfig):
    r"""
    text_config (`dict` or `PreTrainedConfig`, *optional*):
        Config of the wrapped decoder: any model that `AutoModelForCausalLM` loads. Defaults to a Llama.
    chunk_size (`int`, *optional*, defaults to 64):
        Number m of tokens in a chunk. Neighbors are looked up once for each whole chunk of a document.
    num_neighbors (`int`, *optional*, defaults to 2):
        Number k of neighbors that the model asks its retriever for. Neighbors given to `forward` may be any number.
    continuation_chunks (`int`, *optional*, defaults to 1):
        Number of chunks that follow a retrieved chunk in its document and are read with it. A neighbor has
        `chunk_size * (1 + continuation_chunks)` tokens.
    hidden_neighbor_tokens (`int`, *optional*, defaults to 1):
        Number of tokens at the beginning of each neighbor that a row does not see. The first token of a sequence draws
        attention whatever it says (it is an [attention sink](https://huggingface.co/papers/2309.17453)), and a row has
        a first token of its own.
    reread_tokens (`int`, *optional*, defaults to 0):
        Number of tokens at the end of each complete chunk that are read again with the neighbors of the chunk in
        sight, before the text goes on. 0 reads every token once, as models do that were saved without this field.
        [`~RetroJointForCausalLM.from_decoder`] makes models that read whole chunks again.
    neighbor_bias (`bool`, *optional*, defaults to `False`):
        Whether a learned scalar is added to the attention scores of all neighbor tokens.
    neighbor_adapter (`dict`, *optional*):
        Fields of a `peft.LoraConfig`: an adapter of the decoder that is active only while neighbors are encoded.
    row_adapter (`dict`, *optional*):
        Fields of a `peft.LoraConfig`: an adapter of the decoder that is active only while the tokens of a row read
        neighbors.
    base_model_name_or_path (`str`, *optional*):
        Decoder that the model was made from.
    base_model_revision (`str`, *optional*):
        Its revision.
    base_model_sha256 (`str`, *optional*):
        Checksum of its weights.
    tokenizer_sha256 (`str`, *optional*):
        Checksum of the tokenizer that the model was trained with, as the manifest of a datastore has it. A datastore
        of another tokenizer is then refused.
    datastore_name_or_path (`str`, *optional*):
        Datastore that `from_pretrained(..., retriever="auto")` opens.
    datastore_revision (`str`, *optional*):
        Its revision.

    Example:

    ```python
    >>> from modeling_retro import RetroJointConfig, RetroJointForCausalLM
    >>> from transformers import Qwen3Config

    >>> config = RetroJointConfig(text_config=Qwen3Config(num_hidden_layers=2, hidden_size=64, intermediate_size=128))
    >>> model = RetroJointForCausalLM(config)
    >>> config.neighbor_length
    128
    ```"""

    model_type = "retro_joint"
    _auto_class = "AutoConfig"  # saving copies the code along
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")}
    keys_to_ignore_at_inference = ["past_key_values"]

    text_config: dict | PreTrainedConfig | None = None
    chunk_size: int = interval(min=1)(default=64)
    num_neighbors: int = interval(min=0)(default=2)
    continuation_chunks: int = interval(min=0)(default=1)
    hidden_neighbor_tokens: int = interval(min=0)(default=1)
    reread_tokens: int = interval(min=0)(default=0)
    neighbor_bias: bool = False
    neighbor_adapter: dict | None = None
    row_adapter: dict | None = None
    tie_word_embeddings: bool = False
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    base_model_sha256: str | None = None
    tokenizer_sha256: str | None = None
    datastore_name_or_path: str | None = None
    datastore_revision: str | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))

    def to_dict(self) -> dict[str, Any]:
        """
        The fields, as [`~transformers.PreTrainedConfig.to_dict`] gives them. PEFT reads the type of the model here.
        """
        name_lora_targets(self.model_type, self.text_config.get_text_config().model_type)
        return super().to_dict()

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Saves the configuration as [`~transformers.PreTrainedConfig.save_pretrained`] does, for every Auto class."""
        # transformers would add only the class of the saved model.
        self.auto_map = {
            "AutoConfig": "configuration_retro_joint.RetroJointConfig",
            "AutoModelForCausalLM": "modeling_retro_joint.RetroJointForCausalLM",
        }
        super().save_pretrained(save_directory, **kwargs)

    @property
    def neighbor_length(self) -> int:
        """`int`: Number r of tokens of a neighbor: the retrieved chunk and its continuation."""
        return self.chunk_size * (1 + self.continuation_chunks)

    @property
    def vocab_size(self) -> int:
        """`int`: Size of the decoder's vocabulary."""
        return self.text_config.get_text_config().vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.text_config.get_text_config().vocab_size = value


__all__ = ["RetroJointConfig"]
