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
"""`retro search`: passages once each, with their sources."""

import json
import re

import pytest

from data_prep.chunk import chunk_documents
from data_prep.embed import embed_chunks
from data_prep.index import build_index
from modeling_retro import RetroRetriever
from trainers.scripts.search import main


@pytest.fixture(scope="module")
def datastore(tmp_path_factory, tiny_tokenizer, tiny_encoder_dir):
    folder = tmp_path_factory.mktemp("search")
    (folder / "texts").mkdir()
    for name, text in {
        "a.md": "# About cats\n\nThe cat sat",
        "b.txt": "A dog ran off",
        "c.txt": "A dog ran off",
    }.items():
        (folder / "texts" / name).write_text(text)
    chunk_documents(folder / "texts", folder / "datastore", tiny_tokenizer, chunk_size=8)
    embed_chunks(folder / "datastore", tiny_encoder_dir)
    build_index(folder / "datastore", factory="Flat")
    return folder / "datastore"


def test_passages_come_once_with_their_sources(datastore, capsys):
    main([str(datastore), "A dog ran off", "--k", "20", "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = RetroRetriever.from_pretrained(datastore).search("A dog ran off", 20)
    assert [line["text"] for line in lines] == [passage.text for passage in found]
    assert len({line["text"].strip() for line in lines}) == len(lines) == [line["rank"] for line in lines][-1]
    assert lines[0]["source"] == {"path": "texts/b.txt"}
    assert {"path": "texts/a.md", "title": "About cats"} in [line["source"] for line in lines]
    main([str(datastore), "The cat sat", "A dog ran off", "--k", "1"])
    printed = capsys.readouterr().out
    assert re.search(r"== A dog ran off\n1\. texts/b\.txt \(0\.\d\d\)\n   A dog", printed)


def test_mistakes_are_named(datastore):
    with pytest.raises(ValueError, match="--k is 0"):
        main([str(datastore), "dog", "--k", "0"])
    with pytest.raises(ValueError, match="text 0 is empty"):
        main([str(datastore), " "])
