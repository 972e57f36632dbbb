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
"""Verifies a model: its weights, its base, its tokenizer and its evaluation"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm
from transformers import AutoConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from data_prep.upkeep.findings import Finding, short
from modeling_retro import RetroConfig, RetroForCausalLM, RetroJointConfig, RetroJointForCausalLM
from modeling_retro.added_weights_retro import (
    CHECKSUMS_NAME,
    RETROFIT_WEIGHTS_NAME,
    checkpoint_sha256,
    decisive_files,
    find_base,
)
from modeling_retro.datastore.checksums import checksum, load_tokenizer, tokenizer_fingerprint
from modeling_retro.datastore.record import PLAIN_NAME
from modeling_retro.retrofit_retro import decoder_fields
from modeling_retro.sharing.model_card import EVALUATION_NAME, weights_sha256


# Fields of the configuration of a base that say nothing of what it computes, or that are chosen when it is loaded.
_FREE_FIELDS = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")

MODEL_CLASSES = {"retro": (RetroConfig, RetroForCausalLM), "retro_joint": (RetroJointConfig, RetroJointForCausalLM)}


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter of PEFT and no model."""
    return (path / "adapter_config.json").is_file() and not (path / "config.json").is_file()


def verify_model(path: str | Path) -> list[Finding]:
    """
    Verifies a RETRO model, or an adapter of one. Its files must be those that were saved, and its weights readable,
    finite and those of its configuration. Its base, its tokenizer and its evaluation must be the ones that it names.

    Args:
        path (`str` or `Path`): Folder of the model or adapter.

    Returns:
        `list[Finding]`: the problems, empty if there are none.
    """
    path = Path(path)
    save_again = "save the model again, or download it again"
    if is_adapter(path):
        findings = [Finding(name, problem, save_again) for name, problem in _weight_problems(path, {})]
        problem = "is not checked with the adapter, which does not record its checksum"
        findings.append(Finding("the base of the adapter", problem, "run `retro verify` on the base", unchecked=True))
        return [*findings, *_checksum_findings(path)]
    try:
        model_type = json.loads((path / "config.json").read_text(encoding="utf-8"))["model_type"]
        config_class, model_class = MODEL_CLASSES[model_type]
        config = config_class.from_pretrained(path)
    except Exception as error:
        return [Finding("config.json", f"is not that of a RETRO model ({short(error)})", save_again)]
    shapes: dict[str, tuple[int, ...]] = {}
    findings = [Finding(name, problem, save_again) for name, problem in _weight_problems(path, shapes)]
    is_readable = not findings
    findings += _checksum_findings(path)
    is_retrofit = (path / RETROFIT_WEIGHTS_NAME).is_file()
    model = None
    if is_readable:
        try:
            with torch.device("meta"):
                model = model_class(config)
        except Exception as error:
            findings.append(Finding("config.json", f"describes no model ({short(error)})", save_again))
    if model is not None:
        expected = {
            name: tuple(tensor.shape)
            for name, tensor in model.state_dict().items()
            if not is_retrofit or model.is_added_weight(name)
        }
        tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
        problems = {
            "lack": sorted(expected.keys() - shapes.keys() - tied),
            "have the unknown": sorted(shapes.keys() - expected.keys()),
            "have another shape than the configuration says for": sorted(
                name for name in shapes.keys() & expected.keys() if shapes[name] != expected[name]
            ),
        }
        for problem, names in problems.items():
            if names:
                findings.append(Finding("the weights", f"{problem} {names[0]} ({len(names)} in all)", save_again))
    if is_retrofit:
        findings += _base_findings(config, path)
    if (path / "tokenizer.json").is_file() and config.tokenizer_sha256 is not None:
        try:
            found = tokenizer_fingerprint(load_tokenizer(path))["sha256"]
        except Exception as error:
            found = short(error)
        if found != config.tokenizer_sha256:
            problem = f"is not the one of config.json ({found[:80]}, expected {config.tokenizer_sha256[:12]}…)"
            findings.append(Finding("tokenizer.json", problem, "save the tokenizer of the datastore beside the model"))
    if (path / EVALUATION_NAME).is_file():
        evaluation = json.loads((path / EVALUATION_NAME).read_text(encoding="utf-8"))
        if evaluation.get("weights_sha256") != weights_sha256(path):
            findings.append(Finding(EVALUATION_NAME, "is of other weights", "measure these with `retro evaluate`"))
    return findings


def _checksum_findings(path: Path) -> Iterator[Finding]:
    """Compares the files with the checksums that were recorded when the model was saved."""
    file, files = path / CHECKSUMS_NAME, decisive_files(path)
    recorded = {}
    try:
        if file.is_file():
            recorded = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        yield Finding(file.name, f"cannot be read ({short(error)})", "restore it from a copy")
        return
    unknown = sorted(files.keys() - recorded.keys())
    if unknown:
        problem = f"have no recorded checksum, so that a change in them cannot be noticed: {', '.join(unknown)}"
        yield Finding("some files", problem, "save the model again to record them", unchecked=True)
    for name, sha256 in sorted(recorded.items()):
        if name not in files:
            yield Finding(name, "is missing", "restore it from a copy")
        elif checksum(files[name]) != sha256:
            problem = f"was altered: its checksum is not the one in {CHECKSUMS_NAME}"
            yield Finding(name, problem, "restore it from a copy, or save the model again if the change was meant")


def _base_findings(config: RetroConfig | RetroJointConfig, path: Path) -> Iterator[Finding]:
    base, revision = find_base(config.base_model_name_or_path, path), config.base_model_revision
    remedy = "pass `base_model_name_or_path` with the right one to `from_pretrained`"
    expected = config.base_model_sha256
    try:
        found = checkpoint_sha256(base, revision=revision)
        base_config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=False)
        if isinstance(config, RetroJointConfig):
            fields, own = base_config.to_dict(), config.text_config.to_dict()
            fields = {name: value for name, value in fields.items() if name not in _FREE_FIELDS}
        else:
            fields, own = decoder_fields(base_config), config.to_dict()
            fields["sliding_window"] = own["sliding_window"]  # which the user may open
    except (OSError, ValueError) as error:
        yield Finding(f"the base {base}", f"cannot be read ({short(error)})", remedy)
        return
    if found != expected:
        yield Finding(f"the base {base}", f"has weights of sha256 {found[:12]}…, expected {expected[:12]}…", remedy)
    for name in (name for name, value in fields.items() if own.get(name) != value):
        problem = f"has {name} {fields[name]!r} in its configuration, expected {own.get(name)!r}"
        yield Finding(f"the base {base}", problem, remedy)


def _weight_problems(path: Path, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, str]]:
    """Reads all weights and compares them with `shapes`. Yields (file, problem)."""
    files = {file.name: file for file in sorted(path.glob("*.safetensors"))}
    if not files:
        yield "the model", "has no weights in safetensors files"
    for name, file in tqdm(files.items(), desc="Verifying weights", unit="file"):
        try:
            with safe_open(file, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118 -- no mapping
                    tensor = weights.get_tensor(key)
                    shapes[key] = tuple(tensor.shape)
                    if not torch.isfinite(tensor).all():
                        yield name, f"holds values that are not finite in {key}"
        except (SafetensorError, OSError, ValueError) as error:
            yield name, f"cannot be read ({short(error)})"
    index = path / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            yield index.name, f"cannot be read ({short(error)})"
            return
        for name in sorted(map(str, named)):
            if not PLAIN_NAME.fullmatch(name):
                yield index.name, f"names {name!r}, expected a name without a path"
            elif name not in files:
                yield name, "is missing"
