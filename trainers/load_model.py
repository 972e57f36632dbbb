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
"""Loads a model of any kind for a datastore"""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file

from data_prep.shipped_models import find_model, naming_the_ways
from modeling_retro import RetroConfig, RetroForCausalLM, RetroJointConfig, RetroJointForCausalLM
from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.encoder.own_code import no_code_of


def load_retro_model(name_or_path: str, datastore: RetroDatastore, **kwargs: Any) -> PreTrainedModel:
    """
    Loads a RETRO model of either kind. Any other causal language model is wrapped in [`RetroJointForCausalLM`], which
    reads the neighbors of the datastore untrained.

    Args:
        name_or_path (`str`):
            Folder or Hub id of the model, or of a PEFT adapter of it, or `"smollm2"` (see [`find_model`]).
        datastore ([`RetroDatastore`]):
            The datastore that the model will read. A wrapped model gets its chunk sizes.
        kwargs:
            Passed to `from_pretrained`. For a model that is wrapped, also fields of [`RetroJointConfig`] and `reader`.
            `reader` and `reread_tokens` may be `None`, which leaves them as they are in the model.

    Returns:
        [`RetroForCausalLM`] or [`RetroJointForCausalLM`]

    Raises:
        `ValueError`: if the model cannot be wrapped or does not fit the datastore.
    """
    with naming_the_ways(name_or_path, "model"):
        name_or_path = find_model(name_or_path)
        adapter = find_adapter_config_file(name_or_path)
        base = name_or_path if adapter is None else json.loads(Path(adapter).read_text())["base_model_name_or_path"]
        with no_code_of(f"the model {base}"):
            config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    for name in ("reader", "reread_tokens"):
        if kwargs.get(name) is None:
            kwargs.pop(name, None)
    classes = {RetroConfig.model_type: RetroForCausalLM, RetroJointConfig.model_type: RetroJointForCausalLM}
    added = sorted(set(kwargs) & {"reader", "neighbor_adapter", "row_adapter", "neighbor_bias"})
    if config.model_type in classes and added:
        raise ValueError(f"{name_or_path} is a RETRO model already; {', '.join(added)} are for a model to be wrapped")
    if config.model_type == RetroConfig.model_type and "reread_tokens" in kwargs:
        raise ValueError(
            f"{name_or_path} reads neighbors in layers of their own, and no tokens again; reread_tokens is for a "
            "model that reads them with its own attention"
        )
    if config.model_type in classes:
        model = classes[config.model_type].from_pretrained(name_or_path, **kwargs)
    else:
        model = RetroJointForCausalLM.from_decoder_pretrained(
            name_or_path,
            chunk_size=datastore.chunk_size,
            continuation_chunks=datastore.continuation_chunks,
            **kwargs,
        )
    datastore.check_model(model.config)
    return model
