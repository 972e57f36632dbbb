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
"""An optimizer that uses Muon for the matrices of the layers and AdamW for all other weights"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """
    Optimizes the weights of the linear layers with [`~torch.optim.Muon`], and embeddings, head and norms with
    [`~torch.optim.AdamW`]. Muon is scaled as in [arXiv:2502.16982](https://huggingface.co/papers/2502.16982), so that
    both can have the same learning rate and weight decay.

    Args:
        model (`nn.Module`):
            The model. Parameters without gradients are left out.
        lr (`float`):
            Learning rate.
        weight_decay (`float`):
            Weight decay of the matrices and the embeddings.
        decay_names (`list[str]`):
            Names of the parameters with weight decay.
        betas (`tuple[float, float]`):
            Betas of AdamW.
        eps (`float`):
            Epsilon of AdamW.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        weight_decay: float,
        decay_names: list[str],
        betas: tuple[float, float],
        eps: float,
    ):
        head = model.get_output_embeddings()
        matrices = {
            id(module.weight) for module in model.modules() if isinstance(module, nn.Linear) and module is not head
        }
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        by_muon = [parameter for _, parameter in trained if id(parameter) in matrices]
        others = [(name in decay_names, parameter) for name, parameter in trained if id(parameter) not in matrices]
        groups = [
            {"params": [parameter for decays, parameter in others if decays], "weight_decay": weight_decay},
            {"params": [parameter for decays, parameter in others if not decays], "weight_decay": 0.0},
        ]
        muon = torch.optim.Muon(by_muon, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)
        self._optimizers = (muon, adamw)
        super().__init__([*muon.param_groups, *adamw.param_groups], defaults={"lr": lr})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters (see [`~torch.optim.Optimizer.step`])."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        muon, adamw = self._optimizers
        # Loading a checkpoint replaces the groups and states that the two optimizers were made with.
        muon.param_groups = [group for group in self.param_groups if "ns_steps" in group]
        adamw.param_groups = [group for group in self.param_groups if "ns_steps" not in group]
        for optimizer in self._optimizers:
            optimizer.state = self.state
            optimizer.step()
        return loss
