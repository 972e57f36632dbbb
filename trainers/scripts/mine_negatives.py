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
Finds hard negatives: texts that an encoder takes for the positive of an anchor although they are not.

    retro mine-negatives --encoder encoder --pairs train.jsonl.gz --num_negatives 2 --output_file hard.jsonl.gz
    retro train-retriever --model_name_or_path encoder --pairs hard.jsonl.gz --output_dir better-encoder
"""

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.arguments import parse_arguments, run_command


@dataclass
class MineNegativesArguments:
    """
    Arguments of `retro mine-negatives`.
    """

    encoder: str = field(metadata={"help": "Folder or Hub id of the encoder, or minilm."})
    pairs: list[str] = field(metadata={"help": "Pair set, as for `retro train-retriever`."})
    output_file: str = field(metadata={"help": "File .jsonl or .jsonl.gz to write."})
    columns: list[str] | None = field(
        default=None, metadata={"help": "Columns of anchor and positive, if they have other names."}
    )
    num_negatives: int = field(default=1, metadata={"help": "Number of hard negatives of each pair."})
    depth: int = field(default=50, metadata={"help": "Number of nearest texts to take them from."})
    max_relative_score: float = field(
        default=0.95,
        metadata={"help": "Texts with more than this share of the positive's score are left out: they may be right."},
    )
    factory: str = field(default="Flat", metadata={"help": "faiss factory of the index; Flat is exact."})
    seed: int = field(default=0, metadata={"help": "Seed of the sample on which an index is trained."})


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(MineNegativesArguments, argv=argv, description=__doc__, prog="retro mine-negatives")
    from data_prep.pairs.pairs import load_pairs
    from data_prep.shipped_models import find_model, naming_the_ways
    from modeling_retro import ChunkEncoder
    from modeling_retro.durable_files_retro import whole
    from trainers.retriever.hard_negatives import mine_negatives

    if not arguments.output_file.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"--output_file is {arguments.output_file}, expected a name .jsonl or .jsonl.gz")
    with naming_the_ways(arguments.encoder, "encoder"):
        encoder = ChunkEncoder.from_pretrained(find_model(arguments.encoder))
    pairs = load_pairs(arguments.pairs, columns=arguments.columns, num_negatives=0)
    mined = mine_negatives(
        pairs,
        encoder,
        num_negatives=arguments.num_negatives,
        depth=arguments.depth,
        max_relative_score=arguments.max_relative_score,
        factory=arguments.factory,
        seed=arguments.seed,
    )
    opener = gzip.open if arguments.output_file.endswith(".gz") else open
    with whole(Path(arguments.output_file)) as temporary, opener(temporary, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in mined)
    print(f"{len(mined)} of {len(pairs)} pairs have {arguments.num_negatives} hard negatives each")


if __name__ == "__main__":
    run_command(main)
