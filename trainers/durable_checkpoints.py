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
"""Checkpoints that survive a power cut"""

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from modeling_retro.durable_files_retro import sync, whole


def last_complete_checkpoint(output_dir: str) -> str | None:
    """
    Finds the newest complete checkpoint. A killed run may leave an incomplete one, which lacks the state of the
    training, because the trainer writes it last.

    Args:
        output_dir (`str`):
            Folder that contains the folders `checkpoint-{step}`.

    Returns:
        `str`, *optional*: the path of the checkpoint, or None if there is none.
    """
    checkpoints = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (step := _step_of(path)) is not None:
            checkpoints[step] = str(path)
    return checkpoints[max(checkpoints)] if checkpoints else None


def checkpoint_to_resume(arguments: TrainingArguments) -> str | None:
    """
    Finds the checkpoint from which a training continues, the one that its arguments name or the newest complete one,
    and says so.

    Args:
        arguments (`TrainingArguments`):
            Arguments of the training.

    Returns:
        `str`, *optional*: the path of the checkpoint, or None if the training begins.
    """
    checkpoint = arguments.resume_from_checkpoint or last_complete_checkpoint(arguments.output_dir)
    if checkpoint is not None and arguments.process_index == 0 and (step := _step_of(Path(checkpoint))) is not None:
        print(f"resumed from step {step} ({checkpoint})", flush=True)
    return checkpoint


def _step_of(checkpoint: Path) -> int | None:
    """The step after which a checkpoint was written, or None if it is incomplete."""
    try:
        return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError):
        return None


class DurableCheckpointsMixin:
    """
    Makes a `Trainer` write its state after the rest of a checkpoint is on the disk, because
    [`last_complete_checkpoint`] recognizes a complete checkpoint by this file. Older checkpoints are removed only
    then.
    """

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        state = self.state

        def save_to_json(json_path: str) -> None:
            sync(Path(json_path).parent)
            with whole(Path(json_path)) as temporary:
                type(state).save_to_json(state, str(temporary))

        state.save_to_json = save_to_json
        try:
            super()._save_checkpoint(model, trial)
        finally:
            del state.save_to_json
