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
"""The model card: a description of the model, how to load it, and the results of an evaluation"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from transformers.utils import logging

from ..configuration_retro import RetroConfig
from ..configuration_retro_joint import RetroJointConfig
from ..durable_files_retro import whole


logger = logging.get_logger(__name__)

CONFIG_CLASSES = {config_class.model_type: config_class for config_class in (RetroConfig, RetroJointConfig)}

CARD_NAME = "README.md"
EVALUATION_NAME = "evaluation.json"
EVAL_RESULTS = Path(".eval_results") / "retro.yaml"
MARKER = "<!-- Written anew at each evaluation and push. Remove this line to keep the card as it is. -->"

CARD = """{marker}

# {title}

This is a RETRO language model ([arXiv 2112.04426](https://huggingface.co/papers/2112.04426)). It looks up each whole
chunk of {chunk_size} tokens in a datastore, and attends to the neighbors from the last token of the chunk on. Without
a datastore it runs as a plain decoder.

{facts}

## Use

{use}

{evaluation}"""

USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True{retriever})
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)

inputs = tokenizer("The", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```

"""

WITH_DATASTORE = """`retriever="auto"` opens the datastore, which needs `pip install retro-transformers[cpu]`. Without
it, the model needs no more than transformers, and does not retrieve. `trust_remote_code=True` runs the code of this
repository, so pin a `revision` that you have read."""

WITHOUT_DATASTORE = """To retrieve, pass `retriever=RetroRetriever.from_pretrained(...)` with a datastore of the same
tokenizer. `trust_remote_code=True` runs the code of this repository, so pin a `revision` that you have read."""


@dataclass(frozen=True)
class Way:
    """
    A way to retrieve in an evaluation. In a report it has the name `str(way)`, such as `"on k=2 share=0.5"`.

    Args:
        mode (`str`):
            `"off"`, `"random"`, `"on"` or another mode of `retro evaluate`, or another name.
        num_neighbors (`int`, *optional*):
            Number of neighbors of a chunk, if the report has several numbers.
        share (`float`, *optional*):
            Share of the datastore that is searched, if the report has shares.
        has_reader (`bool`, *optional*, defaults to `False`):
            Whether the model was trained to read neighbors, in a report that has both.
        has_knn_lm (`bool`, *optional*, defaults to `False`):
            Whether the predictions are mixed with those of a kNN-LM.
    """

    mode: str
    num_neighbors: int | None = None
    share: float | None = None
    has_reader: bool = False
    has_knn_lm: bool = False

    def __str__(self) -> str:
        number = "" if self.num_neighbors is None else f" k={self.num_neighbors}"
        share = "" if self.share is None else f" share={self.share:g}"
        return self.mode + number + share + " reader" * self.has_reader + " + knn_lm" * self.has_knn_lm

    @classmethod
    def parse(cls, name: str) -> "Way":
        """The way that has this name in a report. A name of another form is that of a mode."""
        pattern = r"(\S+?)(?: k=(\d+))?(?: share=([\d.e+-]+))?( reader)?( \+ knn_lm)?"
        found = re.fullmatch(pattern, name)
        if found is None:
            return cls(name)
        mode, number, share, reader, knn_lm = found.groups()
        return cls(mode, number and int(number), share and float(share), bool(reader), bool(knn_lm))

    def references(self) -> tuple["Way", "Way"]:
        """What a report compares it with: no retrieval, and the same number of random neighbors."""
        return Way("off"), replace(self, mode="random", share=None)


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """The evaluation in the folder of a model, if there is one and it belongs to the weights in the folder."""
    file = folder / EVALUATION_NAME
    if not file.is_file():
        return None
    evaluation = json.loads(file.read_text(encoding="utf-8"))
    if evaluation.get("weights_sha256") == weights_sha256(folder):
        return evaluation
    logger.warning(f"{file} is of other weights than {folder} holds and is left out; `retro evaluate` measures these")
    return None


def weights_sha256(folder: Path) -> str:
    """Checksum of the safetensors files of a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def save_model_card(
    folder: str | Path,
    evaluation: Mapping[str, Any] | None = None,
    name: str | None = None,
    license: str | None = None,
    tags: list[str] | None = None,
) -> None:
    """
    Writes the model card, `README.md`, into the folder of a saved model. The results are also written to
    `.eval_results/retro.yaml`, which the Hub shows on the page of the model, if the datastore is on the Hub. A card
    without the line that says that it was generated counts as written by hand. It keeps its text, and only its license
    is set if one is given.

    Args:
        folder (`str` or `Path`):
            Folder of the model.
        evaluation (`Mapping`, *optional*):
            Results of `retro evaluate`, as in its `evaluation.json`. They are written into the folder of the model
            with the checksum of its weights. Defaults to results that were written there before, if they belong to
            these weights.
        name (`str`, *optional*):
            Hub id of the model. Defaults to the name of the folder.
        license (`str`, *optional*):
            Licence of the model. Defaults to that of the existing card.
        tags (`list[str]`, *optional*):
            Further tags.
    """
    folder = Path(folder)
    if evaluation is not None:
        evaluation = {**evaluation, "weights_sha256": weights_sha256(folder)}
        (folder / EVALUATION_NAME).write_text(json.dumps(evaluation, indent=2) + "\n", encoding="utf-8")
    else:
        evaluation = read_evaluation(folder)
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    config = CONFIG_CLASSES[model_type].from_pretrained(folder)
    card = create_model_card(config, name or folder.name, evaluation, license, tags)
    file = folder / CARD_NAME
    if file.is_file():
        before = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        if MARKER not in before.text:
            if license is not None:
                before.data["license"] = license
            card = before
        else:
            old, new = before.data.to_dict(), card.data.to_dict()
            kept = {key: value for key, value in old.items() if key not in (*new, "model-index")}
            for key, value in kept.items():
                card.data[key] = value
    with whole(file) as temporary:
        card.save(temporary)
    _save_eval_results(folder / EVAL_RESULTS, config, evaluation)


def _save_eval_results(
    file: Path, config: RetroConfig | RetroJointConfig, evaluation: Mapping[str, Any] | None
) -> None:
    """Writes the results in the form that the Hub shows on the page of the model, if the datastore is on the Hub."""
    datastore = _hub_id(config.datastore_name_or_path)
    if evaluation is None or datastore is None:
        file.unlink(missing_ok=True)
        return
    entries = [
        EvalResultEntry(
            dataset_id=datastore,
            task_id=f"{evaluation.get('split', 'validation')}_bits_per_byte",
            value=round(value, 4),
            dataset_revision=config.datastore_revision,
            notes=f"retrieval {retrieval}",
        )
        for retrieval, value in evaluation["bits_per_byte"].items()
    ]
    file.parent.mkdir(exist_ok=True)
    with whole(file) as temporary:
        temporary.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")


def create_model_card(
    config: RetroConfig | RetroJointConfig,
    name: str,
    evaluation: Mapping[str, Any] | None = None,
    license: str | None = None,
    tags: list[str] | None = None,
) -> ModelCard:
    """
    Makes the card of a RETRO model. It describes the model, its datastore and its base, tells how to load the model,
    and reports the results of an evaluation as tables and in the metadata.

    Args:
        config ([`RetroConfig`] or [`RetroJointConfig`]):
            Config of the model.
        name (`str`):
            Hub id or folder of the model, from which the example in the card loads it.
        evaluation (`Mapping`, *optional*):
            The contents of the `evaluation.json` of `retro evaluate`.
        license (`str`, *optional*):
            Licence of the model.
        tags (`list[str]`, *optional*):
            Further tags.

    Returns:
        `ModelCard`
    """
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["retro", "retrieval", *(tags or [])])),
        base_model=_hub_id(config.base_model_name_or_path),
        datasets=[name for name in [_hub_id(config.datastore_name_or_path)] if name] or None,
        model_name=Path(name).name,
        eval_results=list(_eval_results(config, evaluation)) if evaluation else None,
    )
    has_datastore = config.datastore_name_or_path is not None
    text = CARD.format(
        marker=MARKER,
        title=Path(name).name,
        chunk_size=config.chunk_size,
        facts=_table(["", ""], _facts(config)),
        use=USE.format(name=name, retriever=', retriever="auto"' if has_datastore else "")
        + (WITH_DATASTORE if has_datastore else WITHOUT_DATASTORE),
        evaluation=_evaluation_section(evaluation) if evaluation else "",
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n")


def _hub_id(name: str | None) -> str | None:
    """`name` if it can be an id of the Hub, else `None`, because the name of a folder is useless to others."""
    return None if name is None or Path(name).exists() or name.count("/") > 1 or name[0] in "./~" else name


def _facts(config: RetroConfig | RetroJointConfig) -> Iterator[list[str]]:
    decoder = config.get_text_config()
    yield ["decoder", f"{decoder.num_hidden_layers} layers of width {decoder.hidden_size}"]
    yield ["vocabulary", f"{config.vocab_size:,} tokens"]
    yield [
        "retrieval",
        f"{config.num_neighbors} neighbors of {config.neighbor_length} tokens for each chunk of {config.chunk_size}",
    ]
    if isinstance(config, RetroJointConfig):
        yield ["neighbors are read by", f"the decoder's own attention ({decoder.model_type})"]
    else:
        layers = ", ".join(map(str, config.cross_attention_layers))
        yield ["chunked cross attention", f"in layers {layers} (from 0)" + (", gated" * config.cross_attention_gate)]
        encoder = config.neighbor_encoder_num_hidden_layers, config.neighbor_encoder_hidden_size
        yield ["neighbor encoder", "{} layers of width {}".format(*encoder)]
    if base := _hub_id(config.base_model_name_or_path):
        revision = f" at `{config.base_model_revision[:12]}`" if config.base_model_revision else ""
        yield ["made from", f"[{base}](https://huggingface.co/{base}){revision}"]
    if datastore := _hub_id(config.datastore_name_or_path):
        revision = f" at `{config.datastore_revision[:12]}`" if config.datastore_revision else ""
        yield ["datastore", f"[{datastore}](https://huggingface.co/datasets/{datastore}){revision}"]


def _eval_results(config: RetroConfig | RetroJointConfig, evaluation: Mapping[str, Any]) -> Iterator[EvalResult]:
    datastore = _hub_id(config.datastore_name_or_path)
    for metric in ("bits_per_byte", "perplexity"):
        for retrieval, value in evaluation[metric].items():
            yield EvalResult(
                task_type="text-generation",
                dataset_type=datastore or "datastore",
                dataset_name="held-out documents of " + (datastore or "the datastore"),
                dataset_split=evaluation.get("split"),
                metric_type=metric,
                metric_name=f"{metric.replace('_', ' ')}, retrieval {retrieval}",
                metric_value=round(value, 4),
            )


def _evaluation_section(evaluation: Mapping[str, Any]) -> str:
    intro = "Bits per byte of held-out documents, without neighbors, with random ones and with the retrieved ones."
    text = f"## Evaluation\n\n{intro}\n\n{evaluation_tables(evaluation)}"
    if facts := evaluation.get("datastore"):
        text += (
            f"\nMeasured with a datastore of {facts['chunks']:,} chunks out of {facts['documents']:,} documents "
            f"(tokenizer {facts['tokenizer']}, encoder {facts.get('encoder')}, index {facts.get('index')}, "
            f"chunks `{facts['fingerprint'][:12]}`).\n"
        )
    return text


def evaluation_tables(evaluation: Mapping[str, Any]) -> str:
    """
    Formats the numbers of an evaluation as Markdown tables.

    Args:
        evaluation (`Mapping`): The contents of the `evaluation.json` of `retro evaluate`.
    """
    names = list(evaluation["bits_per_byte"])
    tables = [_main_table(evaluation)]
    if "rivals" in evaluation:
        tables.append(_rivals_table(evaluation))
    if "overlap" in evaluation:
        rows = [
            [
                "{:.3f} … {:.3f}".format(*row["overlap"]),
                str(row["num_chunks"]),
                *(_number(row["bits_per_byte"][name]) for name in names),
            ]
            for row in evaluation["overlap"]
        ]
        tables.append(_table(["overlap with the neighbors", "chunks", *names], rows))
    if "domains" in evaluation:
        rows = [[domain, *map(_number, ratios.values())] for domain, ratios in evaluation["domains"].items()]
        tables.append(_table(["domain", *names], rows))
    return "\n".join(tables)


def _main_table(evaluation: Mapping[str, Any]) -> str:
    rows = []
    for name, bits_per_byte in evaluation["bits_per_byte"].items():
        references = Way.parse(name).references()
        differences = [_difference(evaluation["differences"], name, str(reference)) for reference in references]
        rows.append([name, _number(bits_per_byte), f"{evaluation['perplexity'][name]:.3f}", *differences])
    unknown = f" ({evaluation['unknown_tokens']:,} of them unknown)" if evaluation.get("unknown_tokens") else ""
    note = (
        f"{evaluation['num_documents']:,} held-out documents, {evaluation['num_bytes']:,} bytes, "
        f"{evaluation['num_tokens']:,} tokens{unknown}; "
        f"{', '.join(map(str, evaluation['num_neighbors']))} neighbors a chunk; "
        "in brackets 95 % intervals by bootstrap over documents."
    )
    return f"{_table(['retrieval', 'bits per byte', 'perplexity', 'less off', 'less random'], rows)}\n{note}\n"


def _rivals_table(evaluation: Mapping[str, Any]) -> str:
    rows = [
        [
            name,
            "{bits_per_byte:.4f} ({low:.4f} … {high:.4f})".format(**numbers),
            f"{numbers['operations_per_token'] / 1e9:.3f}",
            f"{numbers['milliseconds_per_token']:.2f}",
            f"{numbers['processor_milliseconds_per_token']:.2f}",
            f"{numbers['storage_bytes'] / 1e6:.1f}",
        ]
        for name, numbers in evaluation["rivals"].items()
    ]
    header = ["way", "bits per byte", "GFLOPs a token", "ms a token", "processor ms a token", "stored MB"]
    return _table(header, rows)


def _difference(differences: Mapping[str, Mapping[str, float]], name: str, reference: str) -> str:
    """Bits per byte of `name` less those of `reference`. The evaluation holds each pair in one direction only."""
    values = differences.get(f"{name} - {reference}")
    if values is None and f"{reference} - {name}" in differences:
        other = differences[f"{reference} - {name}"]
        values = {"bits_per_byte": -other["bits_per_byte"], "low": -other["high"], "high": -other["low"]}
    return "" if values is None else "{bits_per_byte:+.4f} ({low:+.4f} … {high:+.4f})".format(**values)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _table(header: list[str], rows: Any) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


__all__ = ["Way", "create_model_card", "save_model_card"]
