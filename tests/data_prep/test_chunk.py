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
"""Chunks hold every token and byte of their documents, and only those."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import edit_manifest, make_texts, write_jsonl
from datasets import Dataset, load_from_disk
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from data_prep.chunk import chunk_documents
from data_prep.chunker import DocumentChunker
from data_prep.documents import Document
from data_prep.scripts.chunk import main
from data_prep.shard_writer import ShardWriter
from data_prep.stage_files import _fork
from modeling_retro.datastore.datastore import RetroDatastore


AWKWARD = [
    "plain ascii",
    "  spaces before, between   and after   \n\n",
    "naïve café, e\u0301 decomposed, ﬁ ligature, Å angstrom",
    "日本語とカタカナ",
    "👩‍👩‍👧‍👦 family 🇳🇴 flag 🏽",
    "zero\u200bwidth\u200d \ufeff bom \u0000 nul \x07 bell",
    "עברית and عربى mixed with left to right",
    "a",
    "\t\tx\r\ny",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ⅷ ½ ﷺ ",
    "e" + "\u0301" * 30,
    "long " * 50,
]


def byte_level_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(AWKWARD, trainer)
    return tokenizer


def lossless_bpe() -> Tokenizer:
    """The kind of Llama 3, Qwen and SmolLM2, of which no offsets are needed."""
    tokenizer = byte_level_bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def normalizing_bpe() -> Tokenizer:
    """Of some documents the tokens have other bytes than the text."""
    tokenizer = lossless_bpe()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken("before", lstrip=True, rstrip=True), AddedToken("語")])
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "<eos>"], show_progress=False)
    tokenizer.train_from_iterator(AWKWARD[:4], trainer)
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=["<unk>", "<eos>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(AWKWARD[:4], trainer)
    return tokenizer


TOKENIZERS = {
    "byte-level BPE": byte_level_bpe,
    "lossless BPE": lossless_bpe,
    "normalizing BPE": normalizing_bpe,
    "WordPiece": word_piece,
    "Unigram": unigram,
}


def chunker_of(kind: str, chunk_size: int) -> DocumentChunker:
    return DocumentChunker(PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS[kind](), eos_token="<eos>"), chunk_size)


@pytest.mark.parametrize("chunk_size", [1, 3, 8])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_bytes_of_the_chunks_of_a_document_add_up_to_the_document(kind, chunk_size):
    texts = AWKWARD + make_texts(20, seed=5)
    columns, chunks = chunker_of(kind, chunk_size).chunk([Document(text, i) for i, text in enumerate(texts)])
    assert (columns["num_bytes"] >= 0).all()
    for document, text in enumerate(texts):
        covered = columns["num_bytes"][columns["document_id"] == document].sum()
        assert covered == (len(text.encode()) if chunks[document] else 0)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_bytes_of_a_chunk_end_where_its_last_token_ends(kind):
    chunker = chunker_of(kind, 4)
    tokenizer = TOKENIZERS[kind]()
    for text in AWKWARD:
        offsets = tokenizer.encode(text, add_special_tokens=False).offsets
        columns, _ = chunker.chunk([Document(text, 0)])
        covered = np.cumsum(columns["num_bytes"])
        for chunk, end in enumerate(covered[:-1]):
            last = max(stop for _, stop in offsets[: 4 * (chunk + 1)])
            expected = len(text.encode()) if 4 * (chunk + 1) >= len(offsets) else len(text[:last].encode())
            assert end == expected


def test_a_lossless_tokenizer_needs_no_offsets():
    chunker = chunker_of("lossless BPE", 4)
    documents = [Document(text, i) for i, text in enumerate(AWKWARD)]
    columns, _ = chunker.chunk(documents)
    chunker._token_bytes = None
    by_offsets, _ = chunker.chunk(documents)
    for name, column in columns.items():
        np.testing.assert_array_equal(column, by_offsets[name])
    assert chunker_of("byte-level BPE", 4)._token_bytes is None  # it puts a space before the text
    assert chunker_of("WordPiece", 4)._token_bytes is None


def test_end_of_document_covers_no_bytes():
    chunker = chunker_of("byte-level BPE", 1)
    columns, _ = chunker.chunk([Document("abc", 0)])
    assert columns["input_ids"][-1].tolist() == chunker.suffix
    assert columns["num_bytes"][-1] == 0


def test_bos_only_where_the_tokenizer_adds_one():
    tokenizer = byte_level_bpe()
    tokenizer.add_special_tokens(["<bos>"])
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
    assert DocumentChunker(plain, 8).prefix == []
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    adding = DocumentChunker(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>"), 2
    )
    columns, _ = adding.chunk([Document("naïve", 0)])
    assert columns["input_ids"][0, 0] == tokenizer.token_to_id("<bos>")
    assert columns["num_bytes"].sum() == len("naïve".encode())


def test_chunks_hold_the_tokens_of_each_document_and_one_end(tmp_path, tiny_tokenizer):
    texts = make_texts(30)
    stage = chunk_documents(
        write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "out", tiny_tokenizer, chunk_size=8, shard_bytes=3000
    )
    assert len(stage.shards) > 2
    chunks = RetroDatastore.from_pretrained(tmp_path / "out").chunks
    input_ids, mask = chunks.take(np.arange(len(chunks)))
    for document, text in enumerate(texts):
        rows = chunks.document_id == document
        expected = [*tiny_tokenizer(text, add_special_tokens=False)["input_ids"], tiny_tokenizer.eos_token_id]
        assert input_ids[rows][mask[rows]].tolist() == expected
        assert rows.sum() == -(-len(expected) // 8)  # no chunk is shared with another document
        assert tiny_tokenizer.decode(expected, skip_special_tokens=True) == text
        assert chunks.num_bytes[rows].sum() == len(text.encode())
    assert (np.diff(chunks.document_id) >= 0).all()


def test_number_of_shards_changes_nothing(tmp_path, tiny_tokenizer):
    file = write_jsonl(tmp_path / "a.jsonl", make_texts(30))
    tables = []
    for name, shard_bytes in (("one", 10**9), ("many", 500)):
        chunk_documents(file, tmp_path / name, tiny_tokenizer, chunk_size=8, shard_bytes=shard_bytes)
        tables.append(RetroDatastore.from_pretrained(tmp_path / name).chunks)
    ids = np.arange(len(tables[0])).reshape(-1, 1)[::-1]
    for column in ("input_ids", "length", "document_id", "num_bytes"):
        np.testing.assert_array_equal(tables[0].gather(column, ids), tables[1].gather(column, ids))


def test_a_shard_is_a_datasets_folder(tmp_path, tiny_tokenizer):
    chunk_documents(write_jsonl(tmp_path / "a.jsonl", ["abc"]), tmp_path / "out", tiny_tokenizer, chunk_size=8)
    shard = load_from_disk(str(tmp_path / "out" / "chunks" / "shard-00000"))
    assert shard.features["input_ids"].feature.dtype == "uint16"
    assert shard[0]["length"] == len(tiny_tokenizer("abc")["input_ids"]) + 1
    assert shard[0]["input_ids"][: shard[0]["length"]] == [
        *tiny_tokenizer("abc")["input_ids"],
        tiny_tokenizer.eos_token_id,
    ]


def test_a_dataset_in_memory_gives_the_chunks_of_the_file(tmp_path, tiny_tokenizer):
    texts = make_texts(10)
    chunk_documents(Dataset.from_dict({"text": texts}), tmp_path / "a", tiny_tokenizer, chunk_size=8)
    chunk_documents(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "b", tiny_tokenizer, chunk_size=8)
    first, second = (RetroDatastore.from_pretrained(tmp_path / name).chunks for name in "ab")
    np.testing.assert_array_equal(first.take(np.arange(len(first)))[0], second.take(np.arange(len(second)))[0])


def test_caps_keep_whole_documents(tmp_path, tiny_tokenizer):
    texts = make_texts(30)
    file = write_jsonl(tmp_path / "a.jsonl", texts)
    chunk_documents(file, tmp_path / "all", tiny_tokenizer, chunk_size=8)
    document_id = RetroDatastore.from_pretrained(tmp_path / "all").chunks.document_id
    stage = chunk_documents(file, tmp_path / "five", tiny_tokenizer, chunk_size=8, max_documents=5, shard_bytes=300)
    assert stage.num_chunks == (document_id < 5).sum()
    stage = chunk_documents(file, tmp_path / "hundred", tiny_tokenizer, chunk_size=8, max_chunks=100, shard_bytes=300)
    last = document_id[100]  # the document that goes over the cap
    assert stage.num_chunks == (document_id < last).sum() > 80


@pytest.mark.parametrize("text", ["", " \n\t ", "\u2003"])
def test_a_document_without_text_is_an_error_or_skipped(tmp_path, tiny_tokenizer, text):
    file = write_jsonl(tmp_path / "a.jsonl", ["one", text, "three"])
    with pytest.raises(ValueError, match=r"a\.jsonl:2: no text"):
        chunk_documents(file, tmp_path / "error", tiny_tokenizer)
    stage = chunk_documents(file, tmp_path / "skip", tiny_tokenizer, on_bad_record="skip")
    assert stage.num_documents == 2
    assert stage.dropped["bad_records"] == 1
    quarantine = (tmp_path / "skip" / "quarantine" / "shard-00000.jsonl").read_text()
    assert '"line": 2' in quarantine and "no text" in quarantine


def test_an_empty_corpus_is_an_error(tmp_path, tiny_tokenizer):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(ValueError, match="no records"):
        chunk_documents(empty, tmp_path / "out", tiny_tokenizer)
    with pytest.raises(ValueError, match="no document .* has text"):
        chunk_documents(write_jsonl(empty, ["", " "]), tmp_path / "out2", tiny_tokenizer, on_bad_record="skip")
    with pytest.raises(ValueError, match="has no finished chunks"):
        RetroDatastore.from_pretrained(tmp_path / "out2").chunks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"continuation_chunks": -1}, "continuation_chunks must not be negative, got -1"),
        ({"on_bad_record": "ignore"}, "'error' or 'skip', got 'ignore'"),
        ({"filter": "meta is good"}, "filter must look like"),
        ({"text_column": "content"}, r"a\.jsonl:1: no 'content' in the record \(it has 'text'\)"),
    ],
)
def test_bad_options_are_named(tmp_path, tiny_tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        chunk_documents(write_jsonl(tmp_path / "a.jsonl", ["abc"]), tmp_path / "out", tiny_tokenizer, **options)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, tiny_tokenizer):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not a datastore .*thesis.tex"):
        chunk_documents(write_jsonl(tmp_path / "a.jsonl", ["abc"]), tmp_path / "out", tiny_tokenizer, force=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_other_options_are_refused_by_name_until_forced(tmp_path, tiny_tokenizer):
    file = write_jsonl(tmp_path / "a.jsonl", ["abc", "def"])
    chunk_documents(file, tmp_path / "out", tiny_tokenizer, chunk_size=8)
    with pytest.raises(ValueError, match="begun with chunk_size=8, not 4"):
        chunk_documents(file, tmp_path / "out", tiny_tokenizer, chunk_size=4)
    other = PreTrainedTokenizerFast(tokenizer_object=byte_level_bpe(), eos_token="<eos>")
    with pytest.raises(ValueError, match="tokenizer .* is not the one"):
        chunk_documents(file, tmp_path / "out", other, chunk_size=8, split="validation")
    with pytest.raises(ValueError, match="was not made from .*b.jsonl"):
        chunk_documents(write_jsonl(tmp_path / "b.jsonl", ["x"]), tmp_path / "out", tiny_tokenizer, chunk_size=8)
    chunk_documents(file, tmp_path / "out", tiny_tokenizer, chunk_size=4, force=True)
    assert RetroDatastore.from_pretrained(tmp_path / "out").chunk_size == 4


def test_append_adds_only_the_new_documents(tmp_path, tiny_tokenizer):
    first, second = (
        write_jsonl(tmp_path / "a.jsonl", make_texts(9)),
        write_jsonl(tmp_path / "b.jsonl", make_texts(7, seed=4)),
    )
    before = chunk_documents(first, tmp_path / "out", tiny_tokenizer, chunk_size=8)
    after = chunk_documents([first, second], tmp_path / "out", tiny_tokenizer, chunk_size=8, append=True)
    assert after.shards[: len(before.shards)] == before.shards
    together = chunk_documents([first, second], tmp_path / "both", tiny_tokenizer, chunk_size=8)
    assert after.shards == together.shards


def test_a_datastore_and_inputs_that_were_moved_together_can_be_extended(tmp_path, tiny_tokenizer):
    texts = {"a": make_texts(9), "b": make_texts(7, seed=4), "c": make_texts(5, seed=5)}
    whole = chunk_documents(
        [write_jsonl(tmp_path / f"{name}.jsonl", part) for name, part in texts.items()],
        tmp_path / "whole",
        tiny_tokenizer,
        chunk_size=8,
    )
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    files = [write_jsonl(old / f"{name}.jsonl", texts[name]) for name in ("a", "b")]
    before = chunk_documents(files, old / "out", tiny_tokenizer, chunk_size=8)
    old.rename(new)
    files = [new / "b.jsonl", new / "a.jsonl"]  # in any order
    assert chunk_documents(files, new / "out", tiny_tokenizer, chunk_size=8) == before
    files.insert(0, write_jsonl(new / "c.jsonl", texts["c"]))
    after = chunk_documents(files, new / "out", tiny_tokenizer, chunk_size=8, append=True)
    assert after.shards == whole.shards


def test_an_unfinished_datastore_goes_on_where_it_was_moved(tmp_path, tiny_tokenizer, monkeypatch):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    texts = make_texts(20)
    write_jsonl(old / "a.jsonl", texts[:10])
    write_jsonl(old / "b.jsonl", texts[10:])
    saved, save = [], ShardWriter.save

    def dies_at_the_second(shard, *arguments):
        saved.append(shard)
        if len(saved) == 2:
            raise KeyboardInterrupt
        return save(shard, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ShardWriter, "save", dies_at_the_second)
        chunk_documents(sorted(old.glob("*.jsonl")), old / "out", tiny_tokenizer, chunk_size=8, shard_bytes=500)
    old.rename(new)
    stage = chunk_documents(sorted(new.glob("*.jsonl")), new / "out", tiny_tokenizer, chunk_size=8, shard_bytes=500)
    whole = chunk_documents(
        sorted(new.glob("*.jsonl")), tmp_path / "whole", tiny_tokenizer, chunk_size=8, shard_bytes=500
    )
    assert stage.shards == whole.shards


def test_command_prints_one_line_of_counts(tmp_path, tiny_tokenizer, capsys):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    file = write_jsonl(tmp_path / "a.jsonl", ["abc", "", "def"])
    options = [
        "--output_dir",
        str(tmp_path / "out"),
        "--tokenizer",
        str(tmp_path / "tokenizer"),
        "--on_bad_record",
        "skip",
    ]
    main(["--input", str(file), *options])
    assert "2 chunks of 2 documents" in capsys.readouterr().out


CONTROL = "end<eos>here <eos>"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_text_that_spells_a_control_token_stays_text(kind):
    backend = TOKENIZERS[kind]()
    unknown = "<unk>" if "<unk>" in backend.get_vocab() else None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token=unknown)
    eos = tokenizer.eos_token_id
    for allowed, number in ((False, 1), (True, 3)):
        columns, _ = DocumentChunker(tokenizer, 64, allow_control_tokens=allowed).chunk([Document(CONTROL, 0)])
        tokens = columns["input_ids"][0, : columns["length"][0]]
        assert np.count_nonzero(tokens == eos) == number and tokens[-1] == eos
        assert columns["num_bytes"].sum() == len(CONTROL.encode())


def test_the_manifest_says_whether_control_tokens_are_allowed_and_another_choice_is_refused(tmp_path, tiny_tokenizer):
    file = write_jsonl(tmp_path / "poisoned.jsonl", [CONTROL, *make_texts(3)])
    path = tmp_path / "datastore"
    chunk_documents(file, path, tiny_tokenizer, chunk_size=8)
    assert json.loads((path / "datastore.json").read_text())["allow_control_tokens"] is False
    chunks = RetroDatastore.from_pretrained(path).chunks
    tokens, mask = chunks.take(np.arange(len(chunks)))
    # Each document ends once, at its end.
    assert np.count_nonzero(tokens[mask] == tiny_tokenizer.eos_token_id) == 4
    with pytest.raises(ValueError, match="allow_control_tokens=False, not True"):
        chunk_documents(file, path, tiny_tokenizer, chunk_size=8, allow_control_tokens=True)
    # Datastores of before the choice were made with control tokens.
    edit_manifest(path, lambda manifest: manifest.pop("allow_control_tokens"))
    with pytest.raises(ValueError, match="allow_control_tokens=True, not False"):
        chunk_documents(file, path, tiny_tokenizer, chunk_size=8)
    chunk_documents(file, path, tiny_tokenizer, chunk_size=8, allow_control_tokens=True)


def run_chunk(folder, *options):
    command = [
        sys.executable,
        "-m",
        "data_prep.scripts.chunk",
        "--input",
        str(folder / "a.jsonl"),
        "--chunk_size",
        "8",
    ]
    command += ["--tokenizer", str(folder / "tokenizer"), "--shard_bytes", "400", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_processes_without_a_launcher_make_the_files_of_one(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    write_jsonl(tmp_path / "a.jsonl", make_texts(30, seed=4))
    options = {"chunk_size": 8, "shard_bytes": 400}
    chunk_documents(tmp_path / "a.jsonl", tmp_path / "one", str(tmp_path / "tokenizer"), **options)
    done = run_chunk(tmp_path, "--output_dir", str(tmp_path / "two"), "--num_proc", "2")
    assert done.returncode == 0, done.stderr
    files = {
        name: {
            str(path.relative_to(tmp_path / name)): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("one", "two")
    }
    assert files["one"] == files["two"]
    assert sum(name.startswith("chunks/shard-") and name.endswith(".arrow") for name in files["one"]) > 4

    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("no JSON\n")
    broken = run_chunk(tmp_path, "--output_dir", str(tmp_path / "broken"), "--num_proc", "2")
    assert broken.returncode != 0 and "a.jsonl:31: not valid JSON" in broken.stderr
    assert "Traceback" not in broken.stderr


def test_forked_processes_all_work_and_their_errors_are_raised(tmp_path):
    def write_pid(index, count):
        (tmp_path / str(index)).write_text(str(os.getpid()))
        count(index)
        count(1)

    assert sum(_fork(write_pid, range(7), 3)) == sum(range(7)) + 7
    pids = [(tmp_path / str(index)).read_text() for index in range(7)]
    assert len(set(pids)) == 3 and str(os.getpid()) not in pids

    def fail(index, count):
        if index == 4:
            raise ValueError("shard 4 is bad")

    with pytest.raises(ValueError, match="shard 4 is bad"):
        list(_fork(fail, range(6), 2))

    def die(index, count):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match="ended with exit code -9; run the same command again"):
        list(_fork(die, range(2), 2))
