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
"""The encoder that embeds chunks and other texts, for the keys of a datastore and for the queries"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file, logging

from .own_code import no_code_of


logger = logging.get_logger(__name__)


def weights_fingerprint(model: torch.nn.Module, missing: Sequence[str] = ()) -> str:
    """
    Computes the sha256 of the names and values of a model's weights. It does not depend on the file format.

    Args:
        model (`torch.nn.Module`): The model, in the dtype of its checkpoint.
        missing (`Sequence[str]`, *optional*):
            Names of weights that the checkpoint lacks. They are initialised at random and never used.

    Returns:
        `str`: The hexadecimal digest.
    """
    return tensors_fingerprint({name: value for name, value in model.state_dict().items() if name not in missing})


def tensors_fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """The sha256 of the names and values of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_text_encoder(name_or_path: str, revision: str | None = None, **kwargs) -> Any:
    """
    Loads a text encoder: any model that `AutoModel` loads, or the encoder of a T5.

    Args:
        name_or_path (`str`): Folder or Hub id.
        revision (`str`, *optional*): Revision on the Hub.
        kwargs (`dict`, *optional*): Passed to `from_pretrained`.

    Returns:
        `PreTrainedModel`: the encoder (with the loading info, if `kwargs` ask for it).
    """
    with no_code_of(f"the encoder {name_or_path}"):
        config = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
        auto_class = AutoModelForTextEncoding if config.model_type in ("t5", "mt5", "umt5") else AutoModel
        return auto_class.from_pretrained(name_or_path, revision=revision, trust_remote_code=False, **kwargs)


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """
    Returns the largest number of tokens that the encoder and its tokenizer accept.

    Args:
        model (`PreTrainedModel`): The encoder. For relative positions, as in T5, the number is 512.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.

    Returns:
        `int`: the smaller of the two limits.
    """
    return min(tokenizer.model_max_length, model.config.to_dict().get("max_position_embeddings") or 512)


def pool_hidden_states(hidden_states: torch.Tensor, attention_mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """
    Computes one embedding for each text.

    Args:
        hidden_states (`torch.FloatTensor` of shape `(n, t, dim)`): States of the tokens.
        attention_mask (`torch.Tensor` of shape `(n, t)`): bool or 0/1, 0 at padding.
        pooling (`str`): `"mean"` over the tokens, or `"cls"`, the first token.

    Returns:
        `torch.FloatTensor`: `(n, dim)`, float32 or wider, not normalized.
    """
    hidden_states = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    if pooling == "cls":
        return hidden_states[:, 0]
    mask = attention_mask[..., None].to(hidden_states.dtype)
    return (hidden_states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


class ChunkEncoder:
    """
    Embeds chunks and other texts, for keys and for queries.

    Args:
        model (`PreTrainedModel`): An encoder with `last_hidden_state`.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer of the encoder.
        pooling (`str`, *optional*, defaults to `"mean"`): `"mean"` over the tokens, or `"cls"`, the first token.
        normalize (`bool`, *optional*, defaults to `True`): Whether embeddings get length 1.
        max_length (`int`, *optional*):
            Longest input in tokens. Longer texts are cut. Defaults to the limit of the model.
        name (`str`, *optional*): Name or path from which the encoder was loaded.
        revision (`str`, *optional*): Revision from which it was loaded.
        sha256 (`str`, *optional*): Fingerprint of the weights. Defaults to that of the current weights.
        prompt (`str`, *optional*): Text that is put in front of every text.
        truncate_dim (`int`, *optional*): Number of leading dimensions that are kept, for Matryoshka encoders.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pooling: str = "mean",
        normalize: bool = True,
        max_length: int | None = None,
        name: str | None = None,
        revision: str | None = None,
        sha256: str | None = None,
        prompt: str | None = None,
        truncate_dim: int | None = None,
    ):
        if pooling not in ("mean", "cls"):
            raise ValueError(f"pooling must be 'mean' or 'cls', got {pooling!r}")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_length = max_length or longest_input(model, tokenizer)
        self.name = name or model.name_or_path
        self.revision = revision
        self.pooling = pooling
        self.normalize = normalize
        self.prompt = prompt or ""
        self.dim = kept_dimensions(model.config.hidden_size, truncate_dim)
        self.truncate_dim = truncate_dim
        self.sha256 = sha256 or weights_fingerprint(model)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        revision: str | None = None,
        pooling: str | None = None,
        normalize: bool | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        truncate_dim: int | None = None,
    ) -> "ChunkEncoder":
        """
        Loads any `AutoModel` encoder or any sentence-transformers model, with its own pooling and prompt.

        Static models (a `StaticEmbedding`, model2vec) become a [`StaticChunkEncoder`]. Other stacks of modules become
        a [`ModulesChunkEncoder`], unless they are a transformer with mean or cls pooling. An address becomes an
        [`EndpointEncoder`].

        Args:
            name_or_path (`str` or `Path`):
                Folder, Hub id, or the address of a server that embeds texts (see [`EndpointEncoder`]).
            revision (`str`, *optional*): Revision on the Hub.
            pooling (`str`, *optional*):
                Overrides the pooling that the files of a transformer name (`"mean"` if they name none). Static models
                accept only `"mean"`, and other stacks of modules only `"modules"`.
            normalize (`bool`, *optional*): Overrides the normalisation in the files (`True` if they have none).
            device (`str` or `torch.device`, *optional*): Defaults to the first GPU, else the CPU.
            dtype (`str` or `torch.dtype`, *optional*): Computing type, such as `"bfloat16"`. Defaults to float32.
            truncate_dim (`int`, *optional*): Number of leading dimensions that are kept, for Matryoshka encoders.

        Raises:
            ValueError: If the model does not have this pooling or has fewer dimensions.
            ImportError: If its modules need sentence-transformers, which is not installed.
        """
        name = str(name_or_path)
        if "://" in name:
            from .endpoint import EndpointEncoder

            for option, value in {"revision": revision, "pooling": pooling}.items():
                if value is not None:
                    raise ValueError(f"the server of an encoder decides its {option}; leave out {option}={value!r}")
            return EndpointEncoder(name, normalize is not False, truncate_dim)
        files = sentence_transformers_config(name, revision)
        if files["kind"] != "transformer":
            from .static_encoder import ModulesChunkEncoder, StaticChunkEncoder

            subclass = StaticChunkEncoder if files["kind"] == "static" else ModulesChunkEncoder
            return subclass.from_files(name, revision, files, pooling, normalize, device, dtype, truncate_dim)
        model, loading = load_text_encoder(
            name, revision=revision, dtype="auto", use_safetensors=True, output_loading_info=True
        )
        sha256 = weights_fingerprint(model, loading["missing_keys"])
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(
            model.to(device=device, dtype=dtype or torch.float32),
            AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False),
            pooling=pooling or files.get("pooling", "mean"),
            normalize=files.get("normalize", True) if normalize is None else normalize,
            max_length=files.get("max_length"),
            name=name,
            revision=revision,
            sha256=sha256,
            prompt=files["prompt"],
            truncate_dim=truncate_dim,
        )

    @property
    def folder(self) -> Path | None:
        """The folder from which the encoder was loaded, if it was one."""
        return Path(self.name) if Path(self.name).is_dir() else None

    def describe(self) -> dict[str, Any]:
        """The record for the manifest: the arguments that load the encoder again, and the sha256 of its weights."""
        return {
            "name": self.name,
            "revision": self.revision,
            "pooling": self.pooling,
            "normalize": self.normalize,
            "prompt": self.prompt,
            "truncate_dim": self.truncate_dim,
            "dim": self.dim,
            "sha256": self.sha256,
        }

    @torch.inference_mode()
    def encode(
        self,
        texts: Sequence[str],
        tokens_per_batch: int = 4096,
        window: int = 8192,
        advance: Callable[[int], Any] | None = None,
    ) -> np.ndarray:
        """
        Embeds texts. They are sorted by length inside windows, so that batches hold little padding.

        Args:
            texts (`Sequence[str]`): The texts.
            tokens_per_batch (`int`, *optional*, defaults to 4096): Number of tokens in a batch, including padding.
            window (`int`, *optional*, defaults to 8192): Number of texts that are tokenised and sorted together.
            advance (`Callable`, *optional*): Called with the number of texts of each batch that is embedded.

        Returns:
            `np.ndarray`: float32 [n, dim], in the order of `texts`. A text without tokens has zeros.
        """
        embeddings = np.zeros((len(texts), self.dim), dtype=np.float32)
        for start in range(0, len(texts), window):
            encoded = self.tokenizer(
                [self.prompt + text for text in texts[start : start + window]],
                truncation=True,
                max_length=self.max_length,
                # Text that spells a special token, such as [SEP], is tokenized as text.
                split_special_tokens=True,
                return_attention_mask=False,
                return_token_type_ids=False,
            )["input_ids"]
            lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
            order = np.argsort(lengths, kind="stable")
            order = order[np.count_nonzero(lengths == 0) :]  # a text without tokens keeps the zero vector
            for batch in _batches(order, lengths, tokens_per_batch):
                embeddings[start + batch] = self._embed([encoded[row] for row in batch], lengths[batch])
                if advance is not None:
                    advance(len(batch))
        return embeddings

    def encode_chunks(
        self,
        input_ids: Any,
        mask: Any,
        tokenizer: PreTrainedTokenizerBase,
        tokens_per_batch: int = 4096,
        advance: Callable[[int], Any] | None = None,
    ) -> np.ndarray:
        """
        Embeds the text of chunks that another tokenizer made. Special tokens are dropped.

        Args:
            input_ids (`np.ndarray`): Integers [n, m], ids of `tokenizer`.
            mask (`np.ndarray`): bool [n, m], False at padding.
            tokenizer (`PreTrainedTokenizerBase`): The tokenizer of the chunks.
            tokens_per_batch (`int`, *optional*, defaults to 4096): Number of tokens in a batch, including padding.
            advance (`Callable`, *optional*): Called with the number of chunks of each batch that is embedded.

        Returns:
            `np.ndarray`: float32 [n, dim].
        """
        return self.encode(decode_chunks(input_ids, mask, tokenizer), tokens_per_batch, advance=advance)

    def _embed(self, rows: list[list[int]], lengths: np.ndarray) -> np.ndarray:
        width = int(lengths.max())
        input_ids = np.full((len(rows), width), self.tokenizer.pad_token_id or 0, dtype=np.int64)
        mask = np.arange(width) < lengths[:, None]
        input_ids[mask] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
        input_ids = torch.from_numpy(input_ids).to(self.model.device)
        mask = torch.from_numpy(mask).to(self.model.device)
        hidden = self.model(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state  # [b, t, dim]
        pooled = pool_hidden_states(hidden, mask, self.pooling)[:, : self.dim]
        if self.normalize:
            pooled = torch.nn.functional.normalize(pooled, dim=-1)
        return pooled.cpu().numpy()


def _batches(order: np.ndarray, lengths: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    """Cuts rows that are sorted by length into batches of at most `tokens_per_batch` tokens, including padding."""
    batches, start = [], 0
    for end in range(1, len(order) + 1):
        if end == len(order) or lengths[order[end]] * (end + 1 - start) > tokens_per_batch:
            batches.append(order[start:end])
            start = end
    return batches


def decode_chunks(input_ids: Any, mask: Any, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of chunks [n, m] for keys and queries, without padding and special tokens and without any clean-up."""
    rows = [row[real].tolist() for row, real in zip(np.asarray(input_ids), np.asarray(mask, dtype=bool), strict=True)]
    # `tokenizer.batch_decode` decodes row by row; this decodes rows in parallel.
    return tokenizer.backend_tokenizer.decode_batch(rows, skip_special_tokens=True)


def text_mask(input_ids: Any, mask: Any, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """bool [n, m]: True for the tokens of chunks that are neither padding nor special tokens."""
    return np.asarray(mask, dtype=bool) & ~np.isin(input_ids, tokenizer.all_special_ids)


def kept_dimensions(dim: int, truncate_dim: int | None) -> int:
    """Number of dimensions that are kept of `dim`. Raises a `ValueError` if there are fewer than `truncate_dim`."""
    if truncate_dim is not None and not 1 <= truncate_dim <= dim:
        raise ValueError(
            f"truncate_dim must lie between 1 and the {dim} dimensions of the encoder, got {truncate_dim}"
        )
    return truncate_dim or dim


def load_json(name: str, file: str, revision: str | None = None) -> Any:
    """Contents of a JSON file in a model's folder or Hub repository, or None if there is no such file."""
    path = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def sentence_transformers_config(name: str, revision: str | None = None) -> dict[str, Any]:
    """
    Reads the kind, pooling, normalization, prompt and longest input of an encoder from its files.

    Args:
        name (`str`): Folder or Hub id.
        revision (`str`, *optional*): Revision on the Hub.

    Returns:
        `dict`: `kind` and `prompt`, and if the files name them, `pooling`, `normalize`, `max_length` and the `path` of
        a static module. The kind is `"transformer"`, `"static"`, or `"modules"` for any other stack of
        sentence-transformers modules.
    """
    modules = load_json(name, "modules.json", revision)
    if modules is None:
        config = load_json(name, "config.json", revision) or {}
        if config.get("model_type") == "model2vec":
            return {"kind": "static", "prompt": None, "path": "", "normalize": config.get("normalize", False)}
        return {"kind": "transformer", "prompt": None}
    common = load_json(name, "config_sentence_transformers.json", revision) or {}
    prompt = (common.get("prompts") or {}).get(common.get("default_prompt_name"))
    types = [module["type"] for module in modules]
    for own in (kind for kind in types if not kind.startswith("sentence_transformers.")):
        raise ValueError(f"the encoder {name} needs code of its own ({own}), which is never run; choose another")
    kinds = [kind.rsplit(".", 1)[-1] for kind in types]
    config = {"kind": "transformer", "prompt": prompt, "normalize": kinds[-1] == "Normalize"}
    if kinds[-1] == "Normalize":
        kinds = kinds[:-1]
    if kinds == ["StaticEmbedding"]:
        path = modules[0]["path"].strip("./")
        return {**config, "kind": "static", "path": f"{path}/" if path else ""}
    max_length = (load_json(name, "sentence_bert_config.json", revision) or {}).get("max_seq_length")
    if max_length is not None:
        config["max_length"] = max_length
    if kinds == ["Transformer"]:
        return config
    pooling = load_json(name, f"{modules[1]['path']}/config.json", revision) if kinds[1:] == ["Pooling"] else {}
    flags = [flag for flag, on in pooling.items() if flag.startswith("pooling_mode_") and on]
    mode = pooling.get("pooling_mode") or "+".join(flags).removeprefix("pooling_mode_")
    known = {"mean_tokens": "mean", "cls_token": "cls", "mean": "mean", "cls": "cls"}
    if kinds[0] == "Transformer" and mode in known and (not prompt or pooling.get("include_prompt", True)):
        return {**config, "pooling": known[mode]}
    return {**config, "kind": "modules"}
