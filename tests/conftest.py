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
"""Small things that many tests share: a tokenizer, an encoder and a datastore, made once and read only."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


# Before torch, faiss and tokenizers start their threads: the tests are small, threads only wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before gRPC starts: where it is used, each fork (a worker of a DataLoader, say) would first wait for its threads.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast  # noqa: E402

from data_prep.chunk import chunk_documents  # noqa: E402
from data_prep.embed import embed_chunks  # noqa: E402
from data_prep.index import build_index  # noqa: E402
from data_prep.neighbors import find_neighbors  # noqa: E402
from modeling_retro import durable_files_retro  # noqa: E402
from modeling_retro.datastore.datastore import RetroDatastore  # noqa: E402
from modeling_retro.retriever.retriever import RetroRetriever  # noqa: E402


TINY_CHUNK_SIZE = 8


def make_texts(number: int, seed: int = 0, max_words: int = 60) -> list[str]:
    """Random texts over a small vocabulary, with characters of one to four bytes and odd white space."""
    words = [
        "retro",
        "looks",
        "things",
        "up",
        "in",
        "a",
        "datastore",
        "naïve",
        "δέλτα",
        "日本語",
        "👩‍👩‍👧",
        "e\u0301",
        "\u00a0",
    ]
    generator = random.Random(seed)
    return [
        generator.choice(["", " ", "\n"]) + " ".join(generator.choices(words, k=generator.randint(1, max_words)))
        for _ in range(number)
    ]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """Writes one record a text."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def edit_manifest(path: Path, edit: Callable[[dict], Any]) -> None:
    """Edits `datastore.json` as JSON. It then has no checksum, like those that were written before there was one."""
    manifest = json.loads((path / "datastore.json").read_text())
    manifest.pop("sha256", None)
    edit(manifest)
    (path / "datastore.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with 300 tokens, `<eos>` and `<pad>`; it round-trips every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_texts(20, seed=1), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(scope="session")
def tiny_encoder_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """Folder of a random BERT of width 16 with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
        initializer_range=0.5,  # far apart embeddings, so that neighbors do not hang on rounding
    )
    BertModel(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_datastore_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast, tiny_encoder_dir: Path
) -> Path:
    """
    A whole datastore: chunks of 8 tokens, 40 training documents in several shards, a validation split of 6, an exact
    index, 4 neighbors. Tests that write make a copy first.
    """
    folder = tmp_path_factory.mktemp("tiny_datastore")
    inputs = {
        "train": write_jsonl(folder / "train.jsonl", make_texts(40, seed=2)),
        "validation": write_jsonl(folder / "validation.jsonl", make_texts(6, seed=3)),
    }
    datastore = folder / "datastore"
    for split, file in inputs.items():
        chunk_documents(file, datastore, tiny_tokenizer, split=split, chunk_size=TINY_CHUNK_SIZE, shard_bytes=4000)
        embed_chunks(datastore, tiny_encoder_dir, split=split)
    build_index(datastore, factory="Flat")
    for split in inputs:
        find_neighbors(datastore, num_neighbors=4, split=split)
    return datastore


@pytest.fixture(scope="module")
def datastore(tiny_datastore_dir: Path) -> RetroDatastore:
    """The tiny datastore, opened."""
    return RetroDatastore.from_pretrained(tiny_datastore_dir)


@pytest.fixture(scope="module")
def retriever(datastore: RetroDatastore) -> RetroRetriever:
    """Searches the tiny datastore."""
    return RetroRetriever(datastore, device="cpu")


class DiskLog:
    """
    Records the system calls that flush and rename, and what stood in the file system when they were made.

    `check()` says that each file and folder was flushed, as it was then, before it took its name; that the folder
    that holds the new name was flushed before anything else was renamed; and that no folder was ever away. It returns
    the number of renames.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.problems: list[str] = []
        self.renames = 0
        self.flushed: dict[int, tuple[int, int]] = {}
        self.waiting: list[Path] = []
        fsync, rename, exchange = os.fsync, os.replace, durable_files_retro._exchange

        def logged_fsync(handle: int) -> None:
            fsync(handle)
            status = os.fstat(handle)
            self.flushed[status.st_ino] = (status.st_size, status.st_mtime_ns)
            path = Path(os.readlink(f"/proc/self/fd/{handle}"))
            self.waiting = [folder for folder in self.waiting if folder != path]

        def logged_rename(source: str | Path, target: str | Path) -> None:
            self._before_rename(Path(source), Path(target))
            if Path(target).is_dir():
                self.problems.append(f"{target} was replaced in several steps")
            rename(source, target)
            self.waiting.append(Path(target).resolve().parent)

        def logged_exchange(source: Path, target: Path) -> bool:
            self._before_rename(source, target)
            self.waiting.append(target.resolve().parent)
            return exchange(source, target)

        monkeypatch.setattr(os, "fsync", logged_fsync)
        monkeypatch.setattr(os, "replace", logged_rename)
        monkeypatch.setattr(os, "rename", logged_rename)
        monkeypatch.setattr(durable_files_retro, "_exchange", logged_exchange)

    def _before_rename(self, source: Path, target: Path) -> None:
        self.renames += 1
        if self.waiting:
            self.problems.append(f"{self.waiting[0]} was not flushed before {target} was renamed")
        for path in [source, *(source.rglob("*") if source.is_dir() else [])]:
            status = path.stat()
            if self.flushed.get(status.st_ino) != (status.st_size, status.st_mtime_ns):
                self.problems.append(f"{path} was not flushed before it was renamed to {target}")

    def check(self) -> int:
        """The number of renames, all of which were in order."""
        assert not self.problems, "\n".join(self.problems)
        assert not self.waiting, f"{self.waiting[0]} was not flushed after the last rename"
        return self.renames


@pytest.fixture
def dies_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, ModuleType, str], list[tuple]]:
    """Makes a function of a module end the run at its call of this number. Returns the arguments of its calls."""

    def replace(number: int, module: ModuleType, name: str) -> list[tuple]:
        calls, function = [], getattr(module, name)

        def dies(*arguments):
            calls.append(arguments)
            if len(calls) == number:
                raise KeyboardInterrupt
            return function(*arguments)

        monkeypatch.setattr(module, name, dies)
        return calls

    return replace


@pytest.fixture
def disk_log(monkeypatch: pytest.MonkeyPatch) -> DiskLog:
    """A log of what is flushed and renamed during the test."""
    return DiskLog(monkeypatch)
