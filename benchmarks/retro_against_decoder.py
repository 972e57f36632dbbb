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
What retrieval is worth to the model of the quickstart: against the same decoder without retrieval trained on as many
tokens, against what is left when parts of the neighbors are taken away, and by overlap with the neighbors.

    retro quickstart --from-scratch --output_dir retro-quickstart
    python benchmarks/retro_against_decoder.py --quickstart_dir retro-quickstart --output_dir results
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.arguments import parse_arguments, run_command
from modeling_retro import RetroDatastore, RetroForCausalLM
from trainers.evaluation.evaluate import evaluate_retro
from trainers.evaluation.options import MODES
from trainers.quickstart import train_model


@dataclass
class BenchmarkArguments:
    quickstart_dir: str = field(metadata={"help": "Output folder of a finished `retro quickstart --from-scratch`."})
    output_dir: str = field(metadata={"help": "Folder for the tables and plots."})
    max_steps: int = field(default=900, metadata={"help": "Training steps of both models: those of the quickstart."})
    seed: int = field(default=0, metadata={"help": "Seed of both models: that of the quickstart."})


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(BenchmarkArguments, argv=argv, description=__doc__)
    quickstart_dir, output_dir = Path(arguments.quickstart_dir), Path(arguments.output_dir)
    datastore = RetroDatastore.from_pretrained(quickstart_dir / "datastore")
    split = datastore.split("validation")
    options = {"window_chunks": 16, "stride_chunks": 8}

    retro = RetroForCausalLM.from_pretrained(quickstart_dir / "model")
    evaluation = evaluate_retro(
        retro, datastore, split, modes=MODES, num_neighbors=[1, 2, 4], measure_overlap=True, **options
    )
    # Chunks that never see a neighbor: the same decoder, data, order and number of steps.
    options_off = {"neighbor_dropout": 1.0, "num_neighbors": [1]}
    decoder = train_model(output_dir / "decoder", datastore, arguments.max_steps, arguments.seed, **options_off)
    without = evaluate_retro(decoder, datastore, split, modes=["off"], **options)
    evaluation.chunk_bits["decoder"] = without.chunk_bits["off"]
    evaluation.save(output_dir)
    print(evaluation.to_markdown())
    for name in ("off", "on k=2", "on k=4"):
        print(f"{name} less the decoder without retrieval: {evaluation.difference(name, 'decoder')} bits per byte")


if __name__ == "__main__":
    run_command(main)
