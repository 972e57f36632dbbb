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
"""A checkpoint counts as whole only when all of it is on the disk."""

import os
from pathlib import Path

from transformers import TrainerState

from trainers.durable_checkpoints import DurableCheckpointsMixin, last_complete_checkpoint
from trainers.language_model.trainer import RetroTrainer
from trainers.retriever.trainer import RetrieverTrainer


def test_the_state_of_the_training_is_written_when_all_else_is_on_the_disk(tmp_path, disk_log, monkeypatch):
    folder = tmp_path / "checkpoint-3"
    replace, seen = os.replace, []

    def replace_seen(source, target):
        files = [folder / "model.safetensors", folder]
        seen.append((Path(target).name, all(file.stat().st_ino in disk_log.flushed for file in files)))
        assert last_complete_checkpoint(str(tmp_path)) is None
        replace(source, target)

    class Trainer:
        state = TrainerState(global_step=3)

        def _save_checkpoint(self, model, trial):
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(b"weights")
            self.state.save_to_json(str(folder / "trainer_state.json"))
            # Here the trainer removes older checkpoints.
            assert disk_log.check() == 1

    class DurableTrainer(DurableCheckpointsMixin, Trainer):
        pass

    monkeypatch.setattr(os, "replace", replace_seen)
    trainer = DurableTrainer()
    trainer._save_checkpoint(None, None)
    assert seen == [("trainer_state.json", True)]
    assert last_complete_checkpoint(str(tmp_path)) == str(folder)
    assert "save_to_json" not in vars(trainer.state)


def test_the_trainers_of_this_package_do_so():
    assert issubclass(RetroTrainer, DurableCheckpointsMixin) and issubclass(RetrieverTrainer, DurableCheckpointsMixin)
