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
"""Low-rank adapters of a decoder that act only on neighbors, or only on the tokens that see neighbors"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import is_peft_available


NEIGHBOR_ADAPTER = "retro_neighbors"
ROW_ADAPTER = "retro_row"


def is_adapter_weight(name: str, adapter: str = f"({NEIGHBOR_ADAPTER}|{ROW_ADAPTER})") -> bool:
    """
    Whether a parameter belongs to one of these adapters.

    Args:
        name (`str`): Name of the parameter.
        adapter (`str`, *optional*): Name of the adapter. By default the parameter may belong to either of the two.
    """
    return re.search(rf"\.lora_\w+\.{adapter}(\.|$)", name) is not None


class ReaderAdapters:
    """
    The adapters of a decoder, which are LoRA layers of PEFT in the decoder itself. They are switched off until
    [`ReaderAdapters.active`] switches one of them on. Until then the decoder computes the same as without them, to the
    bit. An adapter that the decoder had before, because it was a `PeftModel`, is always on.
    """

    def __init__(self):
        self.names: list[str] = []
        self.layers: list[tuple[Any, list[str]]] = []
        self.gate: torch.Tensor | None = None

    def add_to(self, decoder: PreTrainedModel, neighbor_adapter: dict | None, row_adapter: dict | None) -> None:
        """
        Adds the adapters to a decoder and freezes its other weights.

        Args:
            decoder (`PreTrainedModel`): The decoder. Its linear layers are replaced in place.
            neighbor_adapter (`dict`, *optional*): Fields of a `peft.LoraConfig`.
            row_adapter (`dict`, *optional*): Fields of a `peft.LoraConfig`.

        Raises:
            ImportError: If PEFT is not installed.
            ValueError: If the fields are not those of a `LoraConfig`, or name no layer of the decoder.
        """
        fields = {NEIGHBOR_ADAPTER: neighbor_adapter, ROW_ADAPTER: row_adapter}
        fields = {name: value for name, value in fields.items() if value is not None}
        self.names = list(fields)
        if not fields:
            return
        if not is_peft_available():
            raise ImportError("the model has adapters for reading neighbors, which need PEFT: `pip install peft`")
        if is_peft_available():
            from peft import LoraConfig, inject_adapter_in_model
            from peft.tuners.tuners_utils import BaseTunerLayer

        before = {
            id(module): list(module.active_adapters)
            for module in decoder.modules()
            if isinstance(module, BaseTunerLayer)
        }
        for name, value in fields.items():
            try:
                inject_adapter_in_model(LoraConfig(**value), decoder, adapter_name=name)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{value} does not make an adapter of this decoder: {error}") from error
        for module in decoder.modules():
            if isinstance(module, BaseTunerLayer):
                self.layers.append((module, before.get(id(module), [])))
                if ROW_ADAPTER in getattr(module, "lora_B", {}):
                    module.lora_B[ROW_ADAPTER].register_forward_hook(self._apply_gate)
        self.switch(None)

    def switch(self, name: str | None, gate: torch.Tensor | None = None) -> None:
        """
        Switches one adapter on and the other off.

        Args:
            name (`str`, *optional*): The adapter to switch on. `None` switches both off.
            gate (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The tokens that the adapter of the row acts on.
        """
        self.gate = gate
        for layer, resting in self.layers:
            # `set_adapter` of PEFT would also change which weights require gradients.
            layer._active_adapter = resting if name is None else [*resting, name]

    @contextmanager
    def active(self, name: str | None, gate: torch.Tensor | None = None, keep: bool = False) -> Iterator[None]:
        """
        Switches one adapter on inside the context, if the decoder has it.

        Args:
            name (`str`, *optional*), gate (`torch.BoolTensor`, *optional*):
                See [`ReaderAdapters.switch`].
            keep (`bool`, *optional*, defaults to `False`):
                Whether the adapter stays on afterwards, because checkpointed layers run again in the backward pass.
        """
        self.switch(name if name in self.names else None, gate)
        try:
            yield
        finally:
            if not keep:
                self.switch(None)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Keeps both adapters off inside the context, in which the model is the one that it was made from."""
        names, self.names = self.names, []
        try:
            yield
        finally:
            self.names = names

    def _apply_gate(self, module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        gate = self.gate.to(output)[..., None]  # [B, T, 1]
        # The router of experts receives the tokens of all rows in one dimension.
        return output * (gate if output.ndim == 3 else gate.flatten(0, 1))


__all__ = ["NEIGHBOR_ADAPTER", "ROW_ADAPTER", "ReaderAdapters", "is_adapter_weight"]
