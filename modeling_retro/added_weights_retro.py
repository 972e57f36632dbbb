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
"""Models that are made from a pretrained decoder: the checksum of the decoder, and saving only the added weights"""

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Self

from safetensors.torch import load_file, save_file
from transformers import GenerationConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, find_adapter_config_file
from transformers.utils.hub import get_checkpoint_shard_files

from .durable_files_retro import remove, whole_files, write_json


RETROFIT_WEIGHTS_NAME = "retrofit.safetensors"
# The checksums of the files of a saved model, which `retro verify` compares.
CHECKSUMS_NAME = "checksums.json"
ADAPTER_SAFE_WEIGHTS_NAME = "adapter_model.safetensors"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


# Files that decide what a model computes: weights, adapters, configurations, code, tokenizer and chat templates.
_DECISIVE = re.compile(
    r".*\.(safetensors|py|jinja|model)|.*(config|tokenizer|tokens|tokens_map|vocab|merges|index|template)\.(json|txt)"
)


def decisive_files(directory: Path) -> dict[str, Path]:
    """The files in the folder of a saved model that decide what it computes, by their names."""
    files = (*directory.glob("*"), *directory.glob("additional_chat_templates/*"))
    names = {file.relative_to(directory).as_posix(): file for file in sorted(files) if file.is_file()}
    return {name: file for name, file in names.items() if _DECISIVE.fullmatch(name)}


def record_checksums(directory: Path) -> None:
    """
    Writes the checksums of a saved model, which `retro verify` compares. `save_pretrained` of the model calls this. If
    the tokenizer is saved later, it is called again.
    """
    write_json(directory / CHECKSUMS_NAME, {n: _file_sha256(str(f)) for n, f in decisive_files(directory).items()})


def checkpoint_sha256(name_or_path: str, gguf_file: str | None = None, **hub_arguments) -> str:
    """
    Computes the checksum of the weights of a checkpoint. If one file holds the weights (or the adapter, for a
    checkpoint of PEFT), it is the checksum of the file. Otherwise it is the checksum of the checksums of the shards,
    in order.

    Args:
        name_or_path (`str`): Hub id or directory of the checkpoint.
        gguf_file (`str`, *optional*): Name of the GGUF file, if the weights are in one.
        hub_arguments: Passed to `transformers.utils.cached_file`.

    Raises:
        ValueError: If the checkpoint has no such file.
    """
    arguments = hub_arguments | {"_raise_exceptions_for_missing_entries": False}
    for name in (gguf_file,) if gguf_file is not None else (SAFE_WEIGHTS_NAME, ADAPTER_SAFE_WEIGHTS_NAME):
        single = cached_file(name_or_path, name, **arguments)
        if single is not None:
            return _file_sha256(single)
    index = cached_file(name_or_path, SAFE_WEIGHTS_INDEX_NAME, **arguments)
    if index is None:
        raise ValueError(
            f"{name_or_path} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}; a RETRO model is made "
            "from weights in safetensors files, or in the GGUF file that `gguf_file` names. Load the model with "
            "transformers and save it to get them."
        )
    shards, _ = get_checkpoint_shard_files(name_or_path, index, **hub_arguments)
    return hashlib.sha256("".join(_file_sha256(shard) for shard in shards).encode()).hexdigest()


def _file_sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name_base_relative(config: Path, folder: Path) -> None:
    """Names the base in a config, if it is a folder, relative to the folder that the config is for."""
    values = json.loads(config.read_text(encoding="utf-8"))
    base = values["base_model_name_or_path"]
    if os.path.isdir(base):
        relative = os.path.relpath(os.path.realpath(base), os.path.realpath(folder))
        values["base_model_name_or_path"] = relative if relative.startswith("..") else f"./{relative}"
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def find_base(name: str | None, folder: str | os.PathLike) -> str | None:
    """The base that a config in a folder names: a folder, relative to that one if it begins with a dot, or an id."""
    if name is not None and name.startswith(".") and os.path.isdir(folder):
        return os.path.normpath(os.path.join(folder, name))
    return name


class RetroBaseModelMixin:
    """
    Saves and loads only the weights that a model adds to the decoder that it was made from. The class of the model
    tells which weights these are (`is_added_weight`) and makes a model from the weights of a base (`_from_base`).
    """

    def freeze_decoder(self) -> None:
        """Freezes the decoder, so that only the weights that RETRO adds to it are trained."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.is_added_weight(name))

    def save_pretrained(self, save_directory: str | os.PathLike, retrofit_only: bool = False, **kwargs) -> None:
        """
        Saves the model as [`~transformers.PreTrainedModel.save_pretrained`] does. If the power fails meanwhile, each
        file has either its old content or its new one.

        Args:
            save_directory (`str` or `os.PathLike`):
                Directory to save to; created if it does not exist.
            retrofit_only (`bool`, *optional*, defaults to `False`):
                Whether to save only the weights that RETRO adds to the decoder it was made from, with the name, the
                revision and the checksum of that decoder. `from_pretrained` loads both and refuses another decoder.
                The decoder must have been frozen (see `freeze_decoder`). A decoder in a folder is named relative to
                `save_directory`, so that both can be moved together.

        Raises:
            `ValueError`: if the decoder was trained or is unknown, or if a `datastore` is named, which only
                `push_to_hub` records.
        """
        if "datastore" in kwargs:
            raise ValueError(
                f"`save_pretrained(datastore={kwargs['datastore']!r})` would not be recorded: a folder names no "
                "datastore. Pass it to `push_to_hub`, or a retriever to `from_pretrained`."
            )
        if not retrofit_only and (kwargs.get("push_to_hub") or not kwargs.get("is_main_process", True)):
            super().save_pretrained(save_directory, **kwargs)
            return
        if not retrofit_only:
            directory = Path(save_directory)
            with whole_files(directory) as temporary:
                super().save_pretrained(temporary, **kwargs)
                names = {file.name for file in temporary.iterdir()}
            # Remove the shards of an earlier save: if a folder has both, the earlier weights would be loaded.
            for file in directory.glob("model*.safetensors*"):
                if file.name not in names:
                    remove(file)
            record_checksums(directory)
            return
        if self.config.base_model_sha256 is None:
            raise ValueError("`retrofit_only=True` is for models made by `from_decoder_pretrained`; this one was not.")
        trainable = [
            name
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and not self.is_added_weight(name)
        ]
        if trainable:
            raise ValueError(
                f"`retrofit_only=True` leaves out the decoder, but its weights were trainable ({trainable[0]}, …) and "
                "may have changed: call `freeze_decoder()` before training, or save the whole model."
            )
        weights = {
            name: tensor.contiguous() for name, tensor in self.state_dict().items() if self.is_added_weight(name)
        }
        with whole_files(Path(save_directory)) as directory:
            custom_object_save(self, directory, config=self.config)
            self.generation_config.save_pretrained(directory)
            self.config.architectures = [type(self).__name__]
            self.config.save_pretrained(directory)
            _name_base_relative(directory / "config.json", Path(save_directory))
            save_file(weights, directory / RETROFIT_WEIGHTS_NAME, metadata={"format": "pt"})
        record_checksums(Path(save_directory))

    @staticmethod
    def _base_of_adapter(name_or_path: str | os.PathLike | None, **hub_arguments) -> str | None:
        """The base of a PEFT adapter if it was saved with `retrofit_only=True`, which transformers cannot load."""
        adapter = None if name_or_path is None else find_adapter_config_file(str(name_or_path), **hub_arguments)
        if adapter is None:
            return None
        base = json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"]
        missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        return None if base is None or cached_file(base, RETROFIT_WEIGHTS_NAME, **missing) is None else base

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *args,
        base_model_name_or_path: str | None = None,
        **kwargs,
    ) -> Self:
        """
        Loads a model as [`~transformers.PreTrainedModel.from_pretrained`] does. For a model that was saved with
        `retrofit_only=True`, the base is loaded too, and the decoder is frozen.

        Args:
            base_model_name_or_path (`str`, *optional*):
                Hub id or directory of the base of a model that was saved with `retrofit_only=True`, if it is no longer
                where it was.

        Raises:
            `ValueError`: if the base is not the one that the model was made from.
        """
        own_arguments = hub_arguments = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        weights = None
        if pretrained_model_name_or_path is not None:
            weights = cached_file(
                pretrained_model_name_or_path,
                RETROFIT_WEIGHTS_NAME,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                **hub_arguments,
            )
        if weights is None:
            base = cls._base_of_adapter(pretrained_model_name_or_path, **hub_arguments)
            if base is None:
                return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
            model = cls.from_pretrained(base, *args, base_model_name_or_path=base_model_name_or_path, **kwargs)
            model.load_adapter(pretrained_model_name_or_path)
            return model

        config = kwargs.pop("config", None)
        if config is None:
            config = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub_arguments)
        config.name_or_path = str(pretrained_model_name_or_path)  # PEFT takes it as the base of an adapter
        # These arguments belong to the repository of the model and not to that of the base.
        trusts = kwargs.get("trust_remote_code", False) and base_model_name_or_path is not None
        for name in ("revision", "subfolder", "_commit_hash", "code_revision"):
            kwargs.pop(name, None)
        kwargs["trust_remote_code"] = trusts  # the code of the base, if the user names it
        config.base_model_name_or_path = find_base(config.base_model_name_or_path, pretrained_model_name_or_path)
        base = base_model_name_or_path or config.base_model_name_or_path
        if base_model_name_or_path is None and config.base_model_revision is not None:
            kwargs["revision"] = config.base_model_revision
        hub_arguments = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        try:
            found = checkpoint_sha256(base, kwargs.get("gguf_file"), **hub_arguments)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{pretrained_model_name_or_path} needs its base {base}, with weights of sha256 "
                f"{config.base_model_sha256}: {error} Pass `base_model_name_or_path` to say where the base is."
            ) from error
        if found != config.base_model_sha256:
            raise ValueError(
                f"{pretrained_model_name_or_path} was made from {config.base_model_name_or_path} with weights of "
                f"sha256 {config.base_model_sha256}, but those of {base} have {found}. Pass `base_model_name_or_path` "
                "with the right one."
            )
        model = cls._from_base(config, base, **kwargs)
        retrofit = load_file(weights)
        _, unexpected = model.load_state_dict(retrofit, strict=False)
        missing = [name for name in model.state_dict() if cls.is_added_weight(name) and name not in retrofit]
        if missing or unexpected:
            raise ValueError(f"{weights} lacks the weights {missing} and has the unknown {unexpected}.")
        with contextlib.suppress(OSError):  # models that were saved without one have that of the base
            model.generation_config = GenerationConfig.from_pretrained(pretrained_model_name_or_path, **own_arguments)
        model.freeze_decoder()
        return model
