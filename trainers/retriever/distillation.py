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
"""Makes static encoders, with one vector for each token of the vocabulary, from transformers (model2vec)"""

from pathlib import Path

import numpy as np
from transformers.utils import logging

from data_prep.shipped_models import find_model, naming_the_ways
from modeling_retro.datastore.checksums import load_tokenizer
from modeling_retro.durable_files_retro import whole
from modeling_retro.encoder.chunk_encoder import load_text_encoder, sentence_transformers_config
from modeling_retro.encoder.static_encoder import StaticChunkEncoder


logger = logging.get_logger(__name__)


def distill_encoder(
    encoder: str | Path,
    output_dir: str | Path,
    revision: str | None = None,
    dim: int = 256,
    sif_coefficient: float = 1e-4,
) -> StaticChunkEncoder:
    """
    Distills an encoder into one vector for each token of its vocabulary.

    Each token is embedded by itself, with the pooling of the encoder. The vectors are reduced to their `dim` principal
    components. Tokens are weighted by their frequency, which Zipf's law gives from their order in the vocabulary.

    Args:
        encoder (`str` or `Path`): Folder or Hub id of a transformer with mean or cls pooling.
        output_dir (`str` or `Path`): Folder to write, in the format of model2vec and sentence-transformers.
        revision (`str`, *optional*): Revision of the encoder on the Hub.
        dim (`int`, *optional*, defaults to 256): Number of dimensions that are kept.
        sif_coefficient (`float`, *optional*, defaults to 1e-4):
            The number a in the weight a / (a + frequency) of a token, between 0 and 1.

    Returns:
        [`StaticChunkEncoder`]: the encoder that was written.

    Raises:
        ImportError: If model2vec is not installed.
        ValueError: If the encoder is not a transformer, or has fewer dimensions.
    """
    try:
        from model2vec.distill import distill_from_model
    except ImportError as error:
        raise ImportError("distilling an encoder needs model2vec: `pip install retro-transformers[static]`") from error
    name = find_model(encoder)
    with naming_the_ways(encoder, "encoder"):
        files = sentence_transformers_config(name, revision)
    if files["kind"] != "transformer":
        raise ValueError(f"{name} is no transformer with mean or cls pooling; distill one")
    if not 0 < sif_coefficient < 1:
        raise ValueError(f"sif_coefficient must lie between 0 and 1, got {sif_coefficient}")
    model = load_text_encoder(name, revision=revision, use_safetensors=True)
    if not 1 <= dim <= model.config.hidden_size:
        raise ValueError(f"dim must lie between 1 and the {model.config.hidden_size} dimensions of {name}, got {dim}")
    static = distill_from_model(
        model.float(),
        load_tokenizer(name, revision=revision),
        pca_dims=dim,
        sif_coefficient=sif_coefficient,
        quantize_to="float32",
        pooling={"mean": "mean", "cls": "first"}[files.get("pooling", "mean")],
    )
    # The padding of the transformer's tokenizer is not needed here, and it would count in the mean.
    static.tokenizer.no_padding()
    static.tokenizer.no_truncation()
    # safetensors writes the bytes of an array in the order of memory, and the components are stored by columns.
    static.embedding = np.ascontiguousarray(static.embedding)
    static.config["tokenizer_name"] = static.base_model_name
    with whole(Path(output_dir)) as temporary:
        static.save_pretrained(temporary)
    return StaticChunkEncoder.from_pretrained(output_dir)
