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
import numpy as np
import pytest
from datasets import Dataset
from tiny_retriever import make_encoder, make_tokenizer

from data_prep.pairs.pairs import load_pairs
from modeling_retro.encoder.chunk_encoder import ChunkEncoder
from trainers.retriever.hard_negatives import mine_negatives
from trainers.scripts.mine_negatives import main


def make_ambiguous_pairs():
    """Few words, so that texts repeat: anchors with several positives, positives that are anchors too."""
    generator = np.random.default_rng(0)
    texts = [" ".join(f"w{word}" for word in generator.integers(4, size=2)) for _ in range(120)]
    return Dataset.from_dict({"anchor": texts[:60], "positive": texts[60:]})


def slow_negatives(pairs, encoder, row, num_negatives, max_relative_score):
    """All positives by similarity, less what may be right."""
    anchor, positive = pairs[row]["anchor"], pairs[row]["positive"]
    right = {other["positive"] for other in pairs if other["anchor"] == anchor}
    texts = sorted(set(pairs["positive"][:]))
    scores = dict(zip(texts, encoder.encode(texts) @ encoder.encode([anchor])[0], strict=True))
    texts = [text for text in texts if text not in right and text != anchor]
    texts = [text for text in texts if scores[text] <= max_relative_score * scores[positive]]
    return sorted(texts, key=lambda text: -scores[text])[:num_negatives]


@pytest.mark.parametrize("max_relative_score", [0.9, 0.99])
def test_hard_negatives_are_the_nearest_texts_that_are_not_right(max_relative_score):
    pairs, encoder = make_ambiguous_pairs(), ChunkEncoder(make_encoder(), make_tokenizer())
    mined = mine_negatives(pairs, encoder, num_negatives=2, depth=60, max_relative_score=max_relative_score)
    expected = [slow_negatives(pairs, encoder, row, 2, max_relative_score) for row in range(len(pairs))]
    complete = [row for row, negatives in enumerate(expected) if len(negatives) == 2]
    assert len(complete) > 0
    assert mined["anchor"][:] == [pairs[row]["anchor"] for row in complete]
    scores = encoder.encode(mined["anchor"][:])
    for number in range(2):
        found, wanted = mined[f"negative_{number + 1}"][:], [expected[row][number] for row in complete]
        for vector, one, other in zip(scores, found, wanted, strict=True):
            # Two texts may score alike to the last digits
            assert one == other or encoder.encode([one])[0] @ vector == pytest.approx(
                encoder.encode([other])[0] @ vector, abs=1e-5
            )


def test_command_writes_triplets_that_load_as_pairs(tmp_path):
    make_encoder().save_pretrained(tmp_path / "encoder")
    make_tokenizer().save_pretrained(tmp_path / "encoder")
    make_ambiguous_pairs().to_json(tmp_path / "pairs.jsonl")
    output = tmp_path / "hard.jsonl.gz"
    main(
        [
            "--encoder",
            str(tmp_path / "encoder"),
            "--pairs",
            str(tmp_path / "pairs.jsonl"),
            "--output_file",
            str(output),
        ]
    )
    mined = load_pairs(output)
    assert mined.column_names == ["anchor", "positive", "negative_1"]
    assert 0 < len(mined) <= 60
    assert not any(row["negative_1"] in (row["anchor"], row["positive"]) for row in mined)
    with pytest.raises(ValueError, match=r"expected a name .jsonl"):
        main(["--encoder", str(tmp_path), "--pairs", "x.jsonl", "--output_file", str(tmp_path / "hard.csv")])
