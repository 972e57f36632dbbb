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
"""The pieces of a stream are the whole text, for any tokens, and up to the first stop sequence."""

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from serving.sampling import ChosenToken
from serving.text_stream import TextStream


TEXTS = ["retro looks things up in a datastore, naïve δέλτα 日本語 👩‍👩‍👧", "a stop, an end; the end."]
CONTROL = ["<eos>", "<unk>", "<|end|>", "<|end|>!"]


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def metaspace():
    """As in Llama 2: characters without a token are written as bytes, and the first space of a text is dropped."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["retro looks things up"] * 5, trainer)
    # Bytes are tokens of text.
    parts = json.loads(tokenizer.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] in CONTROL]
    return Tokenizer.from_str(json.dumps(parts))


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=CONTROL, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


METASPACE = metaspace()
MAKERS = {"byte-level": byte_level, "metaspace": metaspace, "word-piece": word_piece}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=MAKERS[request.param](), eos_token="<eos>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|end|>!"]})
    return tokenizer


def stream(tokenizer, ids, stop=()):
    """The pieces, the last of which comes at the end, and the tokens that were returned with them."""
    text = TextStream(tokenizer, stop)
    pieces, tokens = [], []
    for id in ids:
        piece, some = text.push(ChosenToken(id, 0.0, []))
        pieces.append(piece)
        tokens += some
        if text.is_stopped:
            break
    piece, some = text.finish()
    return [*pieces, piece], tokens + some, text.is_stopped


def whole(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_the_pieces_of_any_tokens_are_the_whole_text(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    pieces, tokens, is_stopped = stream(tokenizer, ids)
    # Single bytes that are no character may change the meaning of those before them, which a stream cannot take back.
    assert "".join(pieces) == whole(tokenizer, ids) or "\ufffd" in whole(tokenizer, ids)
    assert not is_stopped and [token.chosen.id for token in tokens] == ids


@given(ids=st.lists(st.integers(4, 259), max_size=20))
def test_bytes_that_are_no_characters_are_streamed_too(ids):
    """With a token for each byte, in any order."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=METASPACE, eos_token="<eos>", unk_token="<unk>")
    text = bytes(id - 4 for id in ids)
    pieces, tokens, _ = stream(tokenizer, ids)
    assert [token.chosen.id for token in tokens] == ids
    with contextlib.suppress(UnicodeDecodeError):
        assert "".join(pieces) == text.decode().removeprefix(" ")


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=40))
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    pieces, _, _ = stream(tokenizer, ids)
    assert "".join(pieces) == whole(tokenizer, ids)
    if tokenizer.backend_tokenizer.to_str().count('"ByteLevel"') > 1:
        assert "".join(pieces) == text
        # A piece never has a part of a character.
        assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_a_stream_ends_in_front_of_its_first_stop_sequence(tokenizer, data):
    ids = data.draw(st.lists(st.integers(4, len(tokenizer) - 1), min_size=1, max_size=30))
    text = "".join(stream(tokenizer, ids)[0])
    start = data.draw(st.integers(0, max(0, len(text) - 1)))
    stops = data.draw(st.lists(st.text(min_size=1, max_size=3), max_size=2))
    stops += [text[start : start + data.draw(st.integers(1, 4))] or "none"]
    pieces, tokens, is_stopped = stream(tokenizer, ids, stops)
    # The first one that is complete ends the stream; of several that one token completes, the one that begins first.
    lengths = [len("".join(stream(tokenizer, ids[: n + 1])[0][:-1])) for n in range(len(ids))]
    expected = text
    for length in [*lengths, len(text)]:
        found = [place for stop in stops if (place := text[:length].find(stop)) >= 0]
        if found:
            expected = text[: min(found)]
            break
    assert "".join(pieces) == expected
    assert is_stopped == (expected != text or any(text.endswith(stop) for stop in stops) or bool(found))
    assert all(token.offset <= len(expected) for token in tokens)


def test_a_stop_sequence_may_spell_control_tokens(tokenizer):
    words = tokenizer("retro up", add_special_tokens=False)["input_ids"]
    text = whole(tokenizer, words)
    end, end_mark = tokenizer.convert_tokens_to_ids(["<|end|>", "<|end|>!"])
    assert stream(tokenizer, [*words, end, *words], ["zzz", "<|end|>"])[0::2] == (
        [*stream(tokenizer, words)[0][:-1], "", ""],
        True,
    )
    assert "".join(stream(tokenizer, [*words, end, end], ["<|end|><|end|>"])[0]) == text
    assert stream(tokenizer, [*words, end, end], ["<|end|><|end|>"])[2]
    # The longer spelling is another token, and parts of a spelling are no text.
    assert stream(tokenizer, [*words, end_mark], ["<|end|>!"])[2]
    for stop in ("end", "|>", "<|end|>?"):
        pieces, _, is_stopped = stream(tokenizer, [*words, end, end_mark], [stop])
        assert not is_stopped and "".join(pieces) == text
    # Text that spells it as text stops too.
    spelled = tokenizer("a<|end|>b", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if "<|end|>" in whole(tokenizer, spelled):
        pieces, _, is_stopped = stream(tokenizer, spelled, ["<|end|>"])
        assert is_stopped and "".join(pieces) == whole(tokenizer, spelled).partition("<|end|>")[0]
