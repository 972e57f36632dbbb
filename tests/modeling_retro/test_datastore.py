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
"""The datastore, read: its chunks and its index, and what does not fit together is refused by name."""

import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY_CHUNK_SIZE, edit_manifest, make_texts
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.encoder.chunk_encoder import ChunkEncoder
from modeling_retro.retriever.retriever import RetroRetriever


@pytest.fixture
def datastore_copy(tiny_datastore_dir, tmp_path):
    return shutil.copytree(tiny_datastore_dir, tmp_path / "datastore")


def test_take_gathers_rows_of_any_shape_and_masks_absent_ones(datastore):
    chunks = datastore.chunks
    everything = np.concatenate([chunks.shard(index)["input_ids"] for index in range(len(chunks.folders))])
    assert len(chunks.folders) > 1 and len(everything) == len(chunks)
    ids = np.random.default_rng(0).integers(-1, len(chunks), (3, 5, 2))
    input_ids, mask = chunks.take(ids)
    assert input_ids.dtype == np.int64 and mask.dtype == bool and input_ids.shape == (3, 5, 2, TINY_CHUNK_SIZE)
    for place in np.ndindex(ids.shape):
        length = chunks.length[ids[place]] if ids[place] >= 0 else 0
        assert mask[place].tolist() == [j < length for j in range(TINY_CHUNK_SIZE)]
        assert (input_ids[place][:length] == everything[ids[place]][:length]).all()
        assert (input_ids[place][length:] == 0).all()


def test_take_refuses_ids_that_do_not_exist(datastore):
    with pytest.raises(ValueError, match="chunk ids must lie in"):
        datastore.chunks.take([len(datastore.chunks)])
    with pytest.raises(ValueError, match="got -2"):
        datastore.chunks.take([-2, 0])


def test_a_shard_is_read_without_a_copy(datastore):
    assert not datastore.chunks.shard(0)["input_ids"].flags.owndata
    assert not datastore.chunks.shard(0)["input_ids"].flags.writeable


def test_a_neighbor_goes_on_inside_its_document_only(datastore):
    chunks, m = datastore.chunks, TINY_CHUNK_SIZE
    ids = np.arange(-1, len(chunks)).reshape(1, -1)
    input_ids, mask = datastore.take_neighbors(ids)
    assert input_ids.shape == (1, len(chunks) + 1, 2 * m)
    for column, chunk in enumerate(ids[0]):
        first, first_mask = chunks.take(chunk)
        assert (input_ids[0, column, :m] == first).all() and (mask[0, column, :m] == first_mask).all()
        goes_on = 0 <= chunk < len(chunks) - 1 and chunks.document_id[chunk] == chunks.document_id[chunk + 1]
        second, second_mask = chunks.take(chunk + 1 if goes_on else -1)
        assert (input_ids[0, column, m:] == second).all() and (mask[0, column, m:] == second_mask).all()


def test_the_index_serves_as_the_faiss_index_of_a_dataset(datastore, retriever):
    dataset = datastore.as_dataset()
    texts = make_texts(5, seed=11)
    queries = retriever.encoder.encode(texts)
    found_scores, examples = dataset.get_nearest_examples_batch("embeddings", queries, k=3)
    files = sorted((datastore.path / "embeddings").glob("*.npy"))
    assert len(files) > 1
    scores = queries @ np.concatenate([np.load(file) for file in files]).astype(np.float32).T
    for row, found in enumerate(examples):
        nearest = np.argsort(-scores[row], kind="stable")[:3]
        np.testing.assert_array_equal(found["input_ids"], datastore.chunks.gather("input_ids", nearest))
        np.testing.assert_allclose(found_scores[row], scores[row, nearest], rtol=1e-5)


def test_the_file_of_the_index_is_what_datasets_loads(datastore, retriever):
    dataset = datastore.as_dataset()
    attached = dataset.search_batch("embeddings", queries := retriever.encoder.encode(make_texts(5, seed=11)), k=3)
    dataset.drop_index("embeddings")
    dataset.load_faiss_index("embeddings", str(datastore.path / "index.faiss"))
    np.testing.assert_array_equal(
        dataset.search_batch("embeddings", queries, k=3).total_indices, attached.total_indices
    )


def test_a_datastore_can_go_to_another_process(datastore):
    other = pickle.loads(pickle.dumps(datastore))
    ids = np.arange(len(other.chunks))
    assert (other.chunks.take(ids)[0] == datastore.chunks.take(ids)[0]).all()


def test_another_tokenizer_chunk_size_or_encoder_is_refused_by_name(datastore, tiny_encoder_dir, tmp_path):
    other = PreTrainedTokenizerFast.from_pretrained(tiny_encoder_dir)
    datastore.check_tokenizer(other)
    other.add_tokens(["retrospective"])
    with pytest.raises(ValueError, match="tokenizer .* is not the tokenizer of"):
        datastore.check_tokenizer(other)
    datastore.check_chunk_size(TINY_CHUNK_SIZE)
    with pytest.raises(ValueError, match="chunk_size 64 is not the chunk size of .*: 8"):
        datastore.check_chunk_size(64)
    RetroRetriever(datastore, ChunkEncoder.from_pretrained(tiny_encoder_dir))
    with pytest.raises(ValueError, match="its pooling is cls, expected mean"):
        RetroRetriever(datastore, ChunkEncoder.from_pretrained(tiny_encoder_dir, pooling="cls"))
    torch.manual_seed(7)  # or the weights may be those of the encoder, by the state that another test left
    BertModel(BertConfig.from_pretrained(tiny_encoder_dir)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_encoder_dir).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its sha256 is"):
        RetroRetriever(datastore, ChunkEncoder.from_pretrained(tmp_path))


def test_a_changed_tokenizer_folder_is_refused(datastore_copy, tiny_tokenizer):
    other = PreTrainedTokenizerFast.from_pretrained(datastore_copy / "tokenizer")
    other.add_tokens(["retrospective"])
    other.save_pretrained(datastore_copy / "tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer.json was altered: its checksum is not the one in datastore.json"):
        RetroDatastore.from_pretrained(datastore_copy).tokenizer


def test_another_chunk_size_in_the_manifest_is_refused(datastore_copy):
    edit_manifest(datastore_copy, lambda manifest: manifest.update(chunk_size=64))
    with pytest.raises(ValueError, match="chunks of 8 tokens, the manifest says 64"):
        RetroDatastore.from_pretrained(datastore_copy).chunks.take([0])


def test_another_order_of_rows_is_refused(datastore_copy):
    edit_manifest(datastore_copy, lambda manifest: manifest["splits"]["train"]["chunks"]["shards"].reverse())
    datastore = RetroDatastore.from_pretrained(datastore_copy)
    with pytest.raises(ValueError, match="index .* belongs to other chunks or another order of rows"):
        datastore.index
    with pytest.raises(ValueError, match="neighbors of .* belong to other chunks or another order of rows"):
        datastore.neighbor_ids


def test_missing_parts_are_named_with_the_command_that_makes_them(datastore_copy):
    edit_manifest(
        datastore_copy, lambda manifest: [manifest.pop("index"), manifest["splits"]["train"].pop("neighbors")]
    )
    datastore = RetroDatastore.from_pretrained(datastore_copy)
    with pytest.raises(ValueError, match="run `retro index`"):
        datastore.index
    with pytest.raises(ValueError, match="run `retro neighbors`"):
        datastore.neighbor_ids
    with pytest.raises(ValueError, match="no split 'test', only train, validation"):
        datastore.split("test")
    shutil.rmtree(datastore_copy / "chunks" / "shard-00001")
    with pytest.raises(ValueError, match=r"shard-00001 is missing \(1 of \d+ shards are\)"):
        RetroDatastore.from_pretrained(datastore_copy).chunks


def test_what_is_no_datastore_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no datastore.json"):
        RetroDatastore.from_pretrained(tmp_path)
    (tmp_path / "datastore.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        RetroDatastore.from_pretrained(tmp_path)
    (tmp_path / "datastore.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="format version 99, this code reads versions up to 2"):
        RetroDatastore.from_pretrained(tmp_path)


def test_a_read_only_datastore_can_be_searched(datastore_copy):
    for path in [datastore_copy, *datastore_copy.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted((path, path.stat().st_mtime_ns) for path in datastore_copy.rglob("*"))
    retriever = RetroRetriever.from_pretrained(datastore_copy, device="cpu")
    retriever.retrieve(torch.from_numpy(retriever.datastore.chunks.take([0])[0]), 2)
    assert sorted((path, path.stat().st_mtime_ns) for path in datastore_copy.rglob("*")) == before
    for path in [datastore_copy, *datastore_copy.rglob("*")]:
        path.chmod(0o755)
