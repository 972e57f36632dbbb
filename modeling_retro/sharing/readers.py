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
Readers: adapters that were trained to read neighbors, without the decoder that they were trained with. Some come with
the package, and `retro train --retrofit_only true` makes others.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers.utils import cached_file

from ..added_weights_retro import RETROFIT_WEIGHTS_NAME
from ..configuration_retro_joint import RetroJointConfig


READERS_DIR = Path(__file__).parents[1] / "readers"
# The fields of a reader's config that its weights need. The chunk sizes come from the datastore.
READER_FIELDS = ("neighbor_adapter", "row_adapter", "neighbor_bias", "hidden_neighbor_tokens")


def reader_names() -> list[str]:
    """Names of the readers that come with the package."""
    return sorted(config.parent.name for config in READERS_DIR.glob("*/config.json"))


class Reader:
    """
    The adapters of a [`RetroJointForCausalLM`] that was saved with `retrofit_only=True`.

    Args:
        name_or_path (`str`):
            Name of a reader of the package, or the folder or Hub id of a saved model.

    Attributes:
        fields (`dict[str, Any]`): Fields of [`RetroJointConfig`] that the weights need.

    Raises:
        ValueError: If there is no such reader, or the folder holds something else.
    """

    def __init__(self, name_or_path: str):
        self.name = str(name_or_path)
        location = str(READERS_DIR / self.name) if self.name in reader_names() else self.name
        try:
            weights = cached_file(location, RETROFIT_WEIGHTS_NAME)
            fields, _ = RetroJointConfig.get_config_dict(location)
        except OSError as error:
            raise ValueError(
                f"{self.name} is no reader: expected one of {reader_names()}, or a folder or Hub id with config.json "
                f"and {RETROFIT_WEIGHTS_NAME}, which `save_pretrained(…, retrofit_only=True)` writes ({error})"
            ) from error
        if fields.get("model_type") != RetroJointConfig.model_type:
            raise ValueError(
                f"{self.name} holds the added weights of a model of type {fields.get('model_type')!r}, expected those "
                f"of a {RetroJointConfig.model_type!r}; load it with `from_pretrained`"
            )
        config = RetroJointConfig.from_dict(fields)
        self.fields = {name: getattr(config, name) for name in READER_FIELDS}
        self.base = config.base_model_name_or_path
        self.weights = load_file(weights)

    def load_into(self, model: nn.Module) -> None:
        """
        Loads the weights into a model that was made with the fields of the reader.

        Args:
            model ([`RetroJointForCausalLM`]): The model.

        Raises:
            ValueError: If the decoder is not of the kind that the reader was trained with.
        """
        state = {name: tensor for name, tensor in model.state_dict().items() if model.is_added_weight(name)}
        different = [
            name
            for name in sorted(state.keys() | self.weights.keys())
            if name not in state or name not in self.weights or state[name].shape != self.weights[name].shape
        ]
        if different:

            def shape(tensors: dict[str, torch.Tensor]) -> str:
                return str(tuple(tensors[different[0]].shape)) if different[0] in tensors else "absent"

            raise ValueError(
                f"the reader {self.name} was trained for {self.base} and does not fit this model: {different[0]} is "
                f"{shape(self.weights)} in the reader and {shape(state)} in the model; wrap {self.base}, or leave out "
                "`reader`"
            )
        model.load_state_dict(self.weights, strict=False)


__all__ = ["READERS_DIR", "Reader", "reader_names"]
