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
"""The plan of a datastore is the datastore that comes of it."""

import numpy as np
import pytest

from data_prep.faiss_index import index_bytes, make_index
from data_prep.plan import parse_number, plan_datastore
from data_prep.scripts.plan import main
from modeling_retro.datastore.datastore import RetroDatastore


def test_planned_sizes_are_those_of_a_datastore(tiny_datastore_dir):
    datastore = RetroDatastore.from_pretrained(tiny_datastore_dir)
    train = datastore.manifest.train.chunks
    tokens, documents = train.num_tokens, train.num_documents
    plan = plan_datastore(tokens, chunk_size=8, dim=16, vocab_size=300, tokens_per_document=tokens // documents)
    assert plan["chunks"] == pytest.approx(train.num_chunks, rel=0.02)
    sizes = {
        "chunks": sum(file.stat().st_size for file in tiny_datastore_dir.glob("chunks/*/*.arrow")),
        "embeddings": sum(file.stat().st_size for file in tiny_datastore_dir.glob("embeddings/*")),
        "index": (tiny_datastore_dir / "index.faiss").stat().st_size,
        "neighbors": sum(file.stat().st_size for file in tiny_datastore_dir.glob("neighbors/*/*.arrow")),
    }
    for name, size in sizes.items():
        assert size == pytest.approx(plan[f"{name}_bytes"], rel=0.03, abs=5000)  # headers of small files
    assert plan["factory"] == datastore.manifest.index.factory


@pytest.mark.parametrize(
    "factory",
    ["Flat", "IVF16,Flat", "IVF16,SQ8", "OPQ8,IVF16,PQ8x4", "SQfp16", "IVF16,PQ16x4fsr,Refine(SQfp16)"]
    + ["HNSW8", "HNSW32_SQfp16"],
)
def test_planned_index_is_as_large_as_a_real_one(factory, tmp_path):
    import faiss

    vectors = np.random.default_rng(0).normal(size=(4000, 32)).astype(np.float32)
    index = make_index(factory, 32, "inner_product")
    index.train(vectors)
    index.add(vectors)
    size = faiss.serialize_index(index).nbytes
    assert size == pytest.approx(index_bytes(factory, 4000, 32), rel=0.2)


def test_an_index_on_disk_holds_codes_and_ids_in_memory():
    plan = plan_datastore(64_000_000_000, dim=256, on_disk=True)
    chunks = plan["chunks"]
    assert plan["factory"] == "IVF131072_HNSW32,PQ256x4fsr,Refine(SQfp16)"
    assert plan["index_memory_bytes"] == chunks * (128 + 8) + 131072 * 4 * 256
    assert plan["index_bytes"] == plan["index_memory_bytes"] + chunks * 2 * 256


def test_numbers_take_units():
    numbers = {"1.75T": 1_750_000_000_000, "40B": 40_000_000_000, "10M": 10_000_000, "3k": 3000, "7": 7}
    assert {text: parse_number(text) for text in numbers} == numbers
    for text in ("many", "-3M", "", "0", "nan"):
        with pytest.raises(ValueError, match="expected a positive number"):
            parse_number(text)
    with pytest.raises(ValueError, match="num_gpus must be positive, got 0"):
        plan_datastore(10, num_gpus=0)


def test_command_prints_the_paper_s_datastore(capsys):
    main(["--tokens", "1.75T", "--num_gpus", "100", "--max_index_memory", "1000"])
    output = capsys.readouterr().out
    assert "28,437,500,001" in output and "OPQ" in output and "GPU-hours" in output
