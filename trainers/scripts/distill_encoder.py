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
Makes a static encoder from a transformer: one vector for each token of its vocabulary (model2vec). It embeds chunks
many times faster, so that large datastores can be embedded without a GPU.

    retro distill-encoder --encoder sentence-transformers/all-MiniLM-L6-v2 --output_dir static-encoder
    retro embed --datastore datastore --encoder static-encoder

This needs `pip install retro-transformers[static]`. Nothing is downloaded if the encoder is a folder.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.arguments import parse_arguments, run_command


@dataclass
class DistillEncoderArguments:
    """
    Arguments of `retro distill-encoder`.
    """

    encoder: str = field(metadata={"help": "Folder or Hub id of the encoder to distill, or minilm."})
    output_dir: str = field(metadata={"help": "Folder to write."})
    revision: str | None = field(default=None, metadata={"help": "Revision of the encoder on the Hub."})
    dim: int = field(default=256, metadata={"help": "Number of principal components that are kept."})
    sif_coefficient: float = field(
        default=1e-4,
        metadata={"help": "A token has the weight a / (a + frequency). A small a reduces that of frequent tokens."},
    )


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments(
        DistillEncoderArguments, argv=argv, description=__doc__, prog="retro distill-encoder"
    )
    from trainers.retriever.distillation import distill_encoder

    encoder = distill_encoder(**vars(arguments))
    print(f"{len(encoder.embeddings)} tokens of {encoder.dim} dimensions in {arguments.output_dir}")


if __name__ == "__main__":
    run_command(main)
