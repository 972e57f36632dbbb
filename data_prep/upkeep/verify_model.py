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
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from data_prep.upkeep.findings import Finding, short
from modeling_retro import RetroConfig, RetroForCausalLM, RetroJointConfig, RetroJointForCausalLM
from modeling_retro.added_weights_retro import CHECKSUMS_NAME, RETROFIT_WEIGHTS_NAME, checkpoint_sha256
from modeling_retro.datastore.checksums import checksum, load_tokenizer, tokenizer_fingerprint
from modeling_retro.datastore.record import PLAIN_NAME
from modeling_retro.sharing.model_card import EVALUATION_NAME, weights_sha256


MODEL_CLASSES = {"retro": (RetroConfig, RetroForCausalLM), "retro_joint": (RetroJointConfig, RetroJointForCausalLM)}


def verify_model(path: str | Path) -> list[Finding]:
    """
    Verifies a RETRO model. Its weights must be readable, finite and those of its configuration. Its base, its
    tokenizer and its evaluation must be the ones that it names.

    Args:
        path (`str` or `Path`): Folder of the model.

    Returns:
        `list[Finding]`: the problems, empty if there are none.
    """
    path = Path(path)
    save_again = "save the model again, or download it again"
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
    if is_readable:
        with torch.device("meta"):
            model = model_class(config)
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
        findings += _base_findings(config)
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
    """Compares the weights with the checksums that were recorded when the model was saved."""
    file, files = path / CHECKSUMS_NAME, {file.name for file in path.glob("*.safetensors")}
    if not file.is_file():
        problem = "have no recorded checksums: a value that was changed to another number cannot be noticed"
        yield Finding("the weights", problem, "save the model again to record them", unchecked=True)
        return
    try:
        recorded = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        yield Finding(file.name, f"cannot be read ({short(error)})", "restore it from a copy")
        return
    for name in sorted(files | recorded.keys()):
        if name not in recorded:
            yield Finding(name, f"is not named in {CHECKSUMS_NAME}", "remove it, or save the model again")
        elif name in files and checksum(path / name) != recorded[name]:
            yield Finding(
                name, f"was altered: its checksum is not the one in {CHECKSUMS_NAME}", "restore it from a copy"
            )
        elif name not in files:
            yield Finding(name, "is missing", "restore it from a copy")


def _base_findings(config: RetroConfig | RetroJointConfig) -> Iterator[Finding]:
    base, expected = config.base_model_name_or_path, config.base_model_sha256
    remedy = "pass `base_model_name_or_path` with the right one to `from_pretrained`"
    try:
        found = checkpoint_sha256(base, revision=config.base_model_revision)
    except (OSError, ValueError) as error:
        yield Finding(f"the base {base}", f"cannot be read ({short(error)})", remedy)
        return
    if found != expected:
        yield Finding(f"the base {base}", f"has weights of sha256 {found[:12]}…, expected {expected[:12]}…", remedy)


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
