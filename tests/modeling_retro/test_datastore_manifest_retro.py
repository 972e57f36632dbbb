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
import json
import shutil

import pytest

from modeling_retro import RetroDatastore


def set_value(manifest, path, value):
    *parents, last = path
    for key in parents:
        manifest = manifest[key]
    manifest[last] = value


TRAIN = ("splits", "train")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((*TRAIN, "chunks", "num_chunks"), -5, r"splits.train.chunks.num_chunks is -5"),
        ((*TRAIN, "chunks", "num_documents"), "many", r"num_documents is 'many'"),
        ((*TRAIN, "chunks", "shards", 0, "rows"), True, r"shards\[0\].rows is True"),
        ((*TRAIN, "chunks", "shards", 0, "name"), "../../elsewhere", r"shards\[0\].name is '../../elsewhere'"),
        ((*TRAIN, "neighbors", "shards", 0, "name"), "/etc", r"neighbors.shards\[0\].name is '/etc'"),
        ((*TRAIN, "embeddings", "shards", 0, "name"), "a\\b", r"embeddings.shards\[0\].name"),
        (("splits", "../validation"), {}, r"'../validation'.*leads out"),
        (("splits",), [], r"splits is \[\]"),
        (("chunk_size",), 0, r"chunk_size is 0, expected a whole number from 1"),
        (("continuation_chunks",), 1.5, r"continuation_chunks is 1.5"),
        (("index", "ntotal"), None, r"index.ntotal is None"),
        (("index", "sha256"), {"../index.faiss": "0"}, r"'../index.faiss'"),
        (("tokenizer",), "SmolLM2", r"tokenizer is 'SmolLM2'"),
    ],
)
def test_an_altered_manifest_is_refused_with_the_field_named(tiny_datastore_dir, tmp_path, path, value, message):
    folder = tmp_path / "datastore"
    shutil.copytree(tiny_datastore_dir, folder)
    file = folder / "datastore.json"
    manifest = json.loads(file.read_text())
    set_value(manifest, path, value)
    file.write_text(json.dumps(manifest))
    # Before the file system is asked for any shard.
    shutil.rmtree(folder / "chunks")
    with pytest.raises(ValueError, match=message):
        RetroDatastore.from_pretrained(folder)
