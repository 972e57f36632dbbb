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
Registers the RETRO models with the Auto classes of transformers when this package is imported.

`AutoModelForCausalLM.register` takes the classes themselves. Importing them needs torch and takes seconds.
transformers registers its own models by name and imports a model when it is loaded. This module registers the RETRO
models in the same way, as soon as the tables of names in transformers are imported.
"""

import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType


CONFIG_NAMES = {"retro": "RetroConfig", "retro_joint": "RetroJointConfig"}
# The tables of transformers.models.auto.modeling_auto, and the names that are entered into them.
MODEL_NAMES = {
    "MODEL_MAPPING": {"retro": "RetroModel"},
    "MODEL_FOR_CAUSAL_LM_MAPPING": {"retro": "RetroForCausalLM", "retro_joint": "RetroJointForCausalLM"},
}


def _enter_configs(configuration_auto: ModuleType) -> None:
    configuration_auto.CONFIG_MAPPING_NAMES.update(CONFIG_NAMES)
    configuration_auto.CONFIG_MAPPING._modules.update(_modules())


def _enter_models(modeling_auto: ModuleType) -> None:
    for table, names in MODEL_NAMES.items():
        mapping = getattr(modeling_auto, table)
        mapping._model_mapping.update(names)
        mapping._reverse_config_mapping.update({config: model_type for model_type, config in CONFIG_NAMES.items()})
        mapping._modules.update(_modules())


def _modules() -> dict[str, ModuleType]:
    """The module with the classes of each model type: this package, which imports them on first use."""
    return dict.fromkeys(CONFIG_NAMES, sys.modules[__package__])


_ENTER = {
    "transformers.models.auto.configuration_auto": _enter_configs,
    "transformers.models.auto.modeling_auto": _enter_models,
}


class _EnterAfterImport(MetaPathFinder):
    """Finds the modules of `_ENTER` as usual, and enters the names at the end of their import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _ENTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_enter(module: ModuleType) -> None:
                execute(module)
                _ENTER[fullname](module)

            spec.loader.exec_module = execute_and_enter
        return spec


def register_auto_classes() -> None:
    """Enters the RETRO models now, or when the tables of transformers are imported."""
    sys.meta_path.insert(0, _EnterAfterImport())
    for name, enter in _ENTER.items():
        if name in sys.modules:
            enter(sys.modules[name])
