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
"""Pyright finds no errors in a script as users write it. Wants the package pyright, which fetches itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = """
from modeling_retro import RetroConfig, RetroDatastore, RetroForCausalLM, RetroJointForCausalLM, RetroRetriever
from trainers import (
    ChunkRows,
    DataCollatorForRetro,
    RetroTrainer,
    RetroTrainingArguments,
    config_for_datastore,
    evaluate_retro,
    format_chunks,
    generate_with_neighbors,
)

datastore = RetroDatastore.from_pretrained("datastore")
retriever = RetroRetriever(datastore)
model = RetroForCausalLM.from_pretrained("model", retriever=retriever)
retrofit = RetroForCausalLM.from_decoder_pretrained("decoder", chunk_size=datastore.chunk_size)
joint = RetroJointForCausalLM.from_decoder_pretrained("decoder", retriever=retriever, chunk_size=64)
with model.retrieval(False):
    logits = model(datastore.tokenizer("text", return_tensors="pt").input_ids).logits
retrofit.freeze_decoder()
retrofit.save_pretrained("out", retrofit_only=True)
config: RetroConfig = config_for_datastore(datastore, hidden_size=64)
print(config.neighbor_length + config.chunk_size)
rows = ChunkRows(len(datastore.chunks), row_chunks=16)
batch = DataCollatorForRetro(datastore, row_chunks=16)([rows[0]])
arguments = RetroTrainingArguments(output_dir="out", num_neighbors=[2])
trainer = RetroTrainer(model, arguments, datastore, datastore.split("validation"))
trainer.train()
trainer.save_model()
evaluation = evaluate_retro(model, datastore, datastore.split("validation"), modes=["off", "on"])
print(evaluation.bits_per_byte("on") - evaluation.bits_per_byte("off"), evaluation.difference("on", "off"))
print(format_chunks(generate_with_neighbors(joint, retriever, "The", max_new_tokens=10)))
found = retriever.retrieve(batch["input_ids"].reshape(-1, datastore.chunk_size), 2)
print(found.neighbor_input_ids.shape)
"""


@pytest.mark.slow
def test_of_a_users_script_only_the_wrong_line_has_an_error_of_types(tmp_path):
    pytest.importorskip("pyright")
    (tmp_path / "script.py").write_text(SCRIPT + "print(datastore.no_such_thing)\n")
    root = str(Path(__file__).parents[1])
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "basic", "extraPaths": [root]}))
    words = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    run = subprocess.run(words, capture_output=True, text=True)
    # It may say in front that it installs itself.
    found = json.loads(run.stdout[run.stdout.index("{") :])["generalDiagnostics"]
    errors = [error["message"] for error in found if error["severity"] == "error"]
    assert len(errors) == 1 and "no_such_thing" in errors[0], "\n".join(errors)
