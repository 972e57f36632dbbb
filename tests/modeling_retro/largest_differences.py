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
"""
Prints the largest differences of logits between two ways to compute the same, for each family of decoders, in float64:

    PYTHONPATH=tests/modeling_retro:tests python tests/modeling_retro/largest_differences.py

The tests hold the same equalities to bounds. "base" is without neighbors, and has to be 0. The norms of most families
round to float32, which hides smaller differences; those of gpt_neox do not. Eager attention, which gemma2 has, rounds
its softmax.
"""

import torch
from test_generation_retro import HashRetriever, left_padded
from test_modeling_retro import CHUNK, make_inputs, make_model, slow_logits
from tiny_joint import FAMILIES, make_joint, slow_joint_logits


LENGTH = 4 * CHUNK + 2
COLUMNS = ("slow reference", "base", "cached", "in a batch")


def neighbors_of(ids: torch.LongTensor) -> dict[str, torch.Tensor]:
    """The neighbors of the whole chunks of one row, which depend on their tokens alone."""
    found = HashRetriever().retrieve(ids[: len(ids) // CHUNK * CHUNK].view(-1, CHUNK), 2)
    return {
        "neighbor_input_ids": found.neighbor_input_ids[None],
        "neighbor_attention_mask": found.neighbor_attention_mask[None],
    }


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    """The largest difference of two tensors."""
    return float((left - right).abs().max())


def cached_logits(model, ids: torch.LongTensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits of rows with retrieval, first of a chunk and a token, and then of one token after another."""
    cache, parts, start = model.cache_class(), [], 0
    for end in (CHUNK + 1, *range(CHUNK + 2, ids.shape[1] + 1)):
        positions = (mask[:, :end].cumsum(-1) - 1).clamp(min=0)[:, start:]
        given = {"attention_mask": mask[:, :end], "position_ids": positions, "past_key_values": cache}
        parts.append(model(ids[:, start:end], **given).logits)
        start = end
    return torch.cat(parts, dim=1)


@torch.no_grad()
def largest_differences(model, base, slow) -> list[float]:
    """One number for each of `COLUMNS`."""
    ids, mask = left_padded([LENGTH, LENGTH - CHUNK - 1])
    rows = [ids[n, mask[n].bool()] for n in range(2)]
    alone = [model(row[None], **neighbors_of(row)).logits[0] for row in rows]
    found = [max(difference(own, slow(row)) for own, row in zip(alone, rows))]
    found.append(max(difference(model(row[None]).logits, base(row[None]).logits) for row in rows))
    model.set_retriever(HashRetriever())
    ones = torch.ones_like(rows[0])[None]
    found.append(difference(cached_logits(model, rows[0][None], ones)[0], alone[0]))
    together = cached_logits(model, ids, mask)
    found.append(max(difference(together[n, mask[n].bool()], alone[n]) for n in range(2)))
    model.set_retriever(None)
    return found


def main() -> None:
    print(f"| model | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")

    def show(name: str, *arguments) -> None:
        numbers = " | ".join(f"{value:.0e}" for value in largest_differences(*arguments))
        print(f"| {name} | {numbers} |", flush=True)

    model = make_model()

    def slow_cross(row: torch.LongTensor) -> torch.Tensor:
        given = neighbors_of(row)
        return slow_logits(model, row, given["neighbor_input_ids"][0], given["neighbor_attention_mask"][0])

    show("cross attention", model, lambda row: model(row, **empty(row)), slow_cross)
    for family in FAMILIES:
        for reread_tokens in (0, CHUNK):
            joint = make_joint(family, reread_tokens=reread_tokens)

            def slow_joint(row: torch.LongTensor, joint=joint) -> torch.Tensor:
                given = neighbors_of(row)
                return slow_joint_logits(
                    joint, row, given["neighbor_input_ids"][0], given["neighbor_attention_mask"][0]
                )

            show(f"{family}{', read again' if reread_tokens else ''}", joint, joint.decoder, slow_joint)


def empty(row: torch.LongTensor) -> dict[str, torch.Tensor]:
    """Neighbors that are all absent."""
    _, neighbors, mask = make_inputs(1, row.shape[1])
    return {"neighbor_input_ids": neighbors, "neighbor_attention_mask": torch.zeros_like(mask)}


if __name__ == "__main__":
    main()
