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
"""Questions: passages that stay in sight of a whole prompt and of its answer"""

import pytest
import torch
from test_generation_retro import HashRetriever, left_padded
from test_modeling_retro import CHUNK, LENGTH, VOCAB, assert_close, make_inputs
from tiny_joint import FAMILIES, make_joint
from torch.nn import functional as F
from transformers import DynamicCache

from modeling_retro import RetroJointCache
from modeling_retro.joint_cache_retro import RetroJointStaticCache
from modeling_retro.joint_call_retro import begin_before_passages


SLIDING = {"mistral-sliding", "gemma2", "gemma3"}


class QuestionRetriever(HashRetriever):
    """Looks up chunks, and questions of any length by their real tokens."""

    def __init__(self):
        super().__init__()
        self.questions = []

    def retrieve(self, chunk_input_ids, k, attention_mask=None):
        if attention_mask is None:
            return super().retrieve(chunk_input_ids, k)
        texts = [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(chunk_input_ids, attention_mask)]
        self.questions += texts
        chunks = self.chunks
        found = super().retrieve(torch.tensor([[sum(text), len(text)] for text in texts]), k)
        self.chunks = chunks[: len(chunks) - len(texts)]
        return found


def make_passages(batch_size, k=2, seed=5):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (batch_size, k, LENGTH), generator=generator)
    kept = torch.randint(2, LENGTH + 1, (batch_size, k, 1), generator=generator)
    return ids, torch.arange(LENGTH) < kept


def passage_inputs(batch_size, passages="apart", **options):
    ids, mask = make_passages(batch_size, **options)
    return {"passage_input_ids": ids, "passage_attention_mask": mask, "passages": passages}


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in SLIDING])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_passages_in_order_are_the_base_with_the_passages_in_front(family, attn_implementation):
    model = make_joint(family, attn_implementation=attn_implementation)
    # In float64, transformers' eager attention makes padding NaN.
    num_rows = 1 if attn_implementation == "eager" else 2
    row, _ = left_padded([3 * CHUNK + 1] * num_rows)
    inputs = passage_inputs(num_rows, "in_order", k=3)
    with torch.no_grad():
        found = model(row, **inputs).logits
        assert (found - model(row).logits).abs().max() > 1e-2
        for n in range(num_rows):
            front = inputs["passage_input_ids"][n][inputs["passage_attention_mask"][n]]
            expected = model.decoder(torch.cat([front, row[n]])[None]).logits[0, len(front) :]
            assert_close(found[n], expected, 1e-5)


def slow_passages(model, row, passages, mask):
    """The plain decoder on [passages | row], whose tokens see all tokens of passages but the first of each."""
    lengths = mask.sum(-1).tolist()
    sequence = torch.cat([passages[mask], row])
    positions = [torch.arange(length) - passages.shape[1] for length in lengths] + [torch.arange(len(row))]
    seen = torch.zeros(len(sequence), len(sequence), dtype=torch.bool)
    start = 0
    for length in lengths:
        end = start + length
        seen[start:end, start:end] = torch.ones(length, length, dtype=torch.bool).tril()
        seen[sum(lengths) + 1 :, start + 1 : end] = True
        start = end
    masks = {}
    distance = torch.arange(len(row))[:, None] - torch.arange(len(row))
    windows = {"full_attention": len(row), "sliding_attention": getattr(model.decoder.config, "sliding_window", None)}
    for layer_type in set(getattr(model.decoder.config, "layer_types", None) or windows):
        own = seen.clone()
        own[start:, start:] = (distance >= 0) & (distance < (windows[layer_type] or len(row)))
        masks[layer_type] = torch.zeros(1, 1, *own.shape, dtype=torch.float64).masked_fill(~own, -1e300)
    has_types = getattr(model.decoder.config, "layer_types", None) is not None and len(masks) > 1
    own = masks["sliding_attention"] if windows["sliding_attention"] else masks["full_attention"]
    return model.decoder(
        sequence[None],
        attention_mask=masks if has_types else own,
        position_ids=torch.cat(positions)[None],
        use_cache=False,
    ).logits[0, start:]


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma2", "gemma3", "smollm3", "gpt_neox"])
def test_passages_apart_are_seen_by_all_tokens_but_the_first(family):
    model = make_joint(family)
    row, _ = left_padded([3 * CHUNK + 1, 3 * CHUNK + 1])
    inputs = passage_inputs(2, k=3)
    with torch.no_grad():
        found = model(row, **inputs).logits
        expected = [
            slow_passages(model, row[n], inputs["passage_input_ids"][n], inputs["passage_attention_mask"][n])
            for n in range(2)
        ]
    assert_close(found, torch.stack(expected), 1e-7 if family != "gemma2" else 5e-6)


def prefix_inputs(lengths, seed=9):
    ids, mask = left_padded(lengths, seed)
    return {"passage_prefix_input_ids": ids, "passage_prefix_attention_mask": mask}


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in SLIDING])
def test_passages_in_order_inside_a_prompt_are_the_base_with_the_passages_at_their_place(family):
    """The prompt is a conversation: what stands before the text of its last message, and the rest."""
    model = make_joint(family, reread_tokens=CHUNK)
    row, _ = left_padded([3 * CHUNK + 1, 3 * CHUNK + 1])
    inputs = passage_inputs(2, "in_order", k=3) | prefix_inputs([2 * LENGTH + 3, 2])
    with torch.no_grad():
        found = model(row, **inputs).logits
        for n in range(2):
            prefix = inputs["passage_prefix_input_ids"][n][inputs["passage_prefix_attention_mask"][n].bool()]
            front = torch.cat([prefix, inputs["passage_input_ids"][n][inputs["passage_attention_mask"][n]]])
            expected = model.decoder(torch.cat([front, row[n]])[None]).logits[0, len(front) :]
            assert_close(found[n], expected, 1e-5)


@pytest.mark.parametrize("family", ["llama", "smollm3", "gpt_neox"])
def test_passages_apart_inside_a_prompt_are_each_read_behind_what_stands_before_them(family):
    model = make_joint(family)
    row, _ = left_padded([3 * CHUNK + 1])
    passages, mask = make_passages(1, k=3)
    mask[0, 1] = False  # one is absent
    prefix = prefix_inputs([5])["passage_prefix_input_ids"]
    given = {"passage_input_ids": passages, "passage_attention_mask": mask, "passage_prefix_input_ids": prefix}
    # One sequence [prefix | passages | row]: a passage sees the prefix and itself, the row sees all.
    lengths = [int(n) for n in mask[0].sum(-1)]
    sequence = torch.cat([prefix[0], passages[mask], row[0]])
    start, seen = 5, torch.ones(len(sequence), len(sequence), dtype=torch.bool).tril()
    positions = [torch.arange(-LENGTH - 5, -LENGTH)]
    for length in lengths:
        seen[start : start + length, 5:start] = False
        positions.append(torch.arange(length) - LENGTH)
        start += length
    positions.append(torch.arange(len(row[0])))
    with torch.no_grad():
        expected = model.decoder(
            sequence[None],
            attention_mask=torch.zeros(1, 1, *seen.shape, dtype=torch.float64).masked_fill(~seen, -1e300),
            position_ids=torch.cat(positions)[None],
            use_cache=False,
        ).logits[0, start:]
        assert_close(model(row, **given).logits[0], expected, 1e-7)


@pytest.mark.parametrize("passages", ["apart", "in_order"])
def test_conversations_of_a_batch_are_answered_as_each_alone(passages):
    model = make_joint(reread_tokens=CHUNK)
    model.set_retriever(QuestionRetriever())
    ids, mask = left_padded([CHUNK + 1, 3])
    inputs = passage_inputs(2, passages) | prefix_inputs([LENGTH + 2, 1])
    options = {"max_new_tokens": 2 * CHUNK, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **inputs, **options)
    static = model.generate(ids, attention_mask=mask, **inputs, **options, cache_implementation="static")
    assert torch.equal(static, together)
    for n in range(2):
        own = {name: x if isinstance(x, str) else x[n : n + 1] for name, x in inputs.items()}
        kept = own["passage_prefix_attention_mask"][0].bool()
        own |= {name: own[name][:, kept] for name in prefix_inputs([1])}
        row = ids[n : n + 1, mask[n].bool()]
        alone = model.generate(row, **own, **options)
        assert torch.equal(alone[0, row.shape[1] :], together[n, ids.shape[1] :])


@pytest.mark.parametrize("passages", ["apart", "in_order"])
@pytest.mark.parametrize("reread_tokens", [0, CHUNK])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_an_answer_keeps_passages_and_neighbors_in_sight_cached_and_uncached_alone_and_in_a_batch(
    family, passages, reread_tokens
):
    model = make_joint(family, reread_tokens=reread_tokens)
    lengths = [4 * CHUNK + 1, 3 * CHUNK, 2 * CHUNK + 3]
    ids, mask = left_padded(lengths)
    prompt = 2 * CHUNK + 2
    inputs = passage_inputs(3, passages)
    chunks = HashRetriever()

    def neighbors_of(row):
        """The neighbors of the chunks that end behind the prompt, whose padding is in front."""
        own = ids[row, mask[row].bool()]
        before = prompt - (ids.shape[1] - lengths[row])
        found = chunks.retrieve(own[: len(own) // CHUNK * CHUNK].view(-1, CHUNK), 2)
        is_later = (torch.arange(1, len(own) // CHUNK + 1) * CHUNK > before)[:, None, None]
        return found.neighbor_input_ids[None], (found.neighbor_attention_mask & is_later)[None]

    with torch.no_grad():
        alone = []
        for row in range(3):
            own_neighbors, own_mask = neighbors_of(row)
            own = {name: value if isinstance(value, str) else value[row : row + 1] for name, value in inputs.items()}
            own |= {"neighbor_input_ids": own_neighbors, "neighbor_attention_mask": own_mask, "use_cache": False}
            alone.append(model(ids[row, mask[row].bool()][None], **own).logits[0])
        model.set_retriever(QuestionRetriever())
        for step in (1, 3, CHUNK + 1):
            cache = RetroJointCache()
            first = {"attention_mask": mask[:, :prompt], "past_key_values": cache}
            logits = [model(ids[:, :prompt], **first, **inputs).logits]
            for start in range(prompt, ids.shape[1], step):
                end = min(start + step, ids.shape[1])
                later = {"attention_mask": mask[:, :end], "past_key_values": cache}
                logits.append(model(ids[:, start:end], **later).logits)
            logits = torch.cat(logits, dim=1)
            for row in range(3):
                assert_close(logits[row, mask[row].bool()], alone[row], 1e-7)


@pytest.mark.parametrize("passages", ["apart", "in_order"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 3}])
def test_a_question_is_looked_up_by_itself_and_answered_alike_with_and_without_a_cache(passages, options):
    model = make_joint(reread_tokens=CHUNK)
    model.set_retriever(QuestionRetriever())
    size = 1 if "prompt_lookup_num_tokens" in options else 2
    ids, mask = left_padded([2 * CHUNK + 1, CHUNK + 2][:size])
    question, question_mask = left_padded([3, 5][:size], seed=9)
    arguments = {"attention_mask": mask, "question_input_ids": question, "question_attention_mask": question_mask}
    arguments |= {"passages": passages, "max_new_tokens": 2 * CHUNK + 1, "do_sample": False, "eos_token_id": None}
    arguments |= {"pad_token_id": 0, "return_dict_in_generate": True, **options}
    with_cache = model.generate(ids, **arguments)
    expected = [tuple(row[kept.bool()].tolist()) for row, kept in zip(question, question_mask)]
    assert model.retriever.questions == expected
    # The chunks of the prompt are not looked up, and those of the answer are.
    prompts = {tuple(row[kept.bool()][:CHUNK].tolist()) for row, kept in zip(ids, mask)}
    assert model.retriever.chunks and not prompts & set(model.retriever.chunks)
    found = QuestionRetriever().retrieve(question, 2, attention_mask=question_mask)
    repeats = options.get("num_return_sequences", 1)
    assert torch.equal(with_cache.passage_chunk_ids, found.chunk_ids.repeat_interleave(repeats, dim=0))
    if "prompt_lookup_num_tokens" in options:
        arguments.pop("prompt_lookup_num_tokens")
        without = model.generate(ids, **arguments)
    else:
        without = model.generate(ids, use_cache=False, **arguments)
    assert torch.equal(with_cache.sequences, without.sequences)
    given = {name: value for name, value in arguments.items() if not name.startswith("question_")}
    given |= {
        "passage_input_ids": found.neighbor_input_ids,
        "passage_attention_mask": found.neighbor_attention_mask,
    }
    assert torch.equal(model.generate(ids, **given).sequences, with_cache.sequences)
    with model.retrieval(False):
        assert not torch.equal(
            model.generate(ids, **{**given, "passage_input_ids": None}).sequences, without.sequences
        )


@pytest.mark.parametrize("passages", ["apart", "in_order"])
def test_a_bos_token_stands_before_the_passages_of_its_question(passages):
    model = make_joint(reread_tokens=CHUNK)
    bos = model.config.get_text_config().bos_token_id
    rows, mask = left_padded([2 * CHUNK + 1, CHUNK - 1])
    rows = rows.masked_fill(rows == bos, bos + 1)
    first = mask.long().argmax(-1, keepdim=True)
    rows.scatter_(1, first, bos)
    inputs, options = passage_inputs(2, passages), {"max_new_tokens": 2 * CHUNK, "do_sample": False}
    options["eos_token_id"] = None
    found = model.generate(rows, attention_mask=mask, **inputs, **options)
    assert torch.equal(found[:, : rows.shape[1]], rows)
    for n in range(2):
        ids, kept = inputs["passage_input_ids"][n], inputs["passage_attention_mask"][n]
        rest = rows[n, int(first[n]) + 1 :][None]
        if passages == "in_order":
            text = torch.cat([torch.tensor([bos]), ids[kept], rest[0]])[None]
            expected = model.decoder.generate(text, attention_mask=torch.ones_like(text), **options)[
                0, text.shape[1] :
            ]
        else:
            given = {"passage_input_ids": ids[None], "passage_attention_mask": kept[None], "passages": passages}
            prefix = torch.tensor([[bos]])
            expected = model.generate(rest, passage_prefix_input_ids=prefix, **given, **options)[0, rest.shape[1] :]
        assert torch.equal(found[n, rows.shape[1] :], expected)
    # A token that begins each message of a conversation is no BOS token, and one alone leaves no question.
    rows[:, -2] = bos
    assert begin_before_passages(rows, mask, bos) == begin_before_passages(rows[:, -2:-1], None, bos) == {}


@pytest.mark.parametrize("in_parts", [True, False])
def test_gradients_reach_the_decoder_through_passages_with_checkpointing_too(in_parts):
    model = make_joint(reread_tokens=CHUNK)
    model._parts_work = in_parts
    ids, _ = left_padded([3 * CHUNK])
    passages, mask = make_passages(1)
    weight = model.decoder.model.layers[0].self_attn.v_proj.weight
    logits = slow_passages(model, ids[0], passages[0], mask[0])
    torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]).backward()
    expected, weight.grad = weight.grad.clone(), None
    model.train()
    for is_reentrant in (None, False, True):
        if is_reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
        weight.grad = None
        model(ids, labels=ids, passage_input_ids=passages, passage_attention_mask=mask).loss.backward()
        assert_close(weight.grad, expected, 1e-7)


def test_no_passages_are_none():
    model = make_joint()
    ids, _ = left_padded([2 * CHUNK])
    passages, mask = make_passages(1)
    with torch.no_grad():
        found = model(ids, passage_input_ids=passages, passage_attention_mask=torch.zeros_like(mask)).logits
        assert torch.equal(found, model(ids).logits)


def test_a_mask_that_says_nothing_of_cached_tokens_is_refused_when_they_are_read_again():
    model = make_joint(reread_tokens=CHUNK)
    ids, neighbors, neighbor_mask = make_inputs(1, 2 * CHUNK)
    given = {"neighbor_input_ids": neighbors[:, 1:], "neighbor_attention_mask": neighbor_mask[:, 1:]}
    seen = torch.ones(2 * CHUNK, 2 * CHUNK, dtype=torch.bool).tril()[None, None, -1:]
    cache = RetroJointCache()
    with torch.no_grad():
        model(ids[:, :-1], neighbor_input_ids=neighbors[:, :1], past_key_values=cache)
        with pytest.raises(ValueError, match=r"mask of shape \(1, 1, 1, 8\) says nothing of what cached tokens see"):
            model(ids[:, -1:], attention_mask=seen, past_key_values=cache, **given)
        # Nothing was done: the same call without the mask goes on.
        assert cache.get_seq_length() == 2 * CHUNK - 1
        logits = model(ids[:, -1:], past_key_values=cache, **given).logits[0, -1]
        expected = model(
            ids,
            neighbor_input_ids=neighbors,
            neighbor_attention_mask=torch.cat([torch.ones_like(neighbor_mask[:, :1]), neighbor_mask[:, 1:]], dim=1),
        ).logits[0, -1]
    assert_close(logits, expected, 1e-10)


def test_caches_without_room_for_read_states_are_refused_before_anything_is_done():
    model = make_joint(reread_tokens=CHUNK)
    ids, neighbors, _ = make_inputs(1, 2 * CHUNK)
    passages, mask = make_passages(1)
    questions = {"passage_input_ids": passages, "passage_attention_mask": mask}
    for cache, given, message in [
        (DynamicCache(), {"neighbor_input_ids": neighbors}, "DynamicCache, which cannot hold the state of retrieval"),
        (DynamicCache(), questions, "pass a `RetroJointCache`"),
        (RetroJointStaticCache(3, 9), questions, "room for 9 tokens and 3 keys of neighbors, but there are 8"),
        (RetroJointStaticCache(2 * LENGTH, 7), {"neighbor_input_ids": neighbors}, "room for 7 tokens"),
    ]:
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            model(ids, past_key_values=cache, **given)
        assert cache.get_seq_length() == 0


def test_bad_questions_are_named():
    model = make_joint()
    ids, _ = left_padded([2 * CHUNK, 2 * CHUNK])
    passages, mask = make_passages(2)
    filled = RetroJointCache()
    with torch.no_grad():
        model(ids, past_key_values=filled)
    documents = torch.arange(CHUNK).repeat(2)[None].expand(2, -1)
    longer = torch.ones(2, 1, LENGTH + 1, dtype=torch.long)
    for given, message in [
        ({"passage_input_ids": passages, "passages": "together"}, "'together', expected 'apart' or 'in_order'"),
        ({"passage_input_ids": longer}, f"at most {LENGTH} tokens in a passage"),
        ({"passage_input_ids": passages, "passage_attention_mask": mask[:, :1]}, "passage_attention_mask"),
        ({"passage_prefix_input_ids": ids}, "are given without passages"),
        ({"passage_input_ids": passages, "passage_prefix_input_ids": ids[:1]}, "passage_prefix_input_ids"),
        ({"passage_input_ids": passages[:1]}, "has 1 rows, expected those of the call, 2"),
        ({"passage_input_ids": passages, "past_key_values": filled}, "8 of its tokens are cached"),
        ({"passage_input_ids": passages, "position_ids": documents}, "several documents"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(ids, **given)
    with pytest.raises(ValueError, match="no retriever"):
        model.generate(ids, question_input_ids=ids)


@pytest.mark.parametrize("way", ["apart", "in_order"])
def test_a_question_must_fit_behind_its_passages(way):
    model = make_joint()
    passages, mask = make_passages(1)
    longest = int(mask.sum() if way == "in_order" else mask.sum(-1).max())
    ids = left_padded([2 * CHUNK])[0][:1]
    padded, padding = F.pad(ids, (9, 0)), F.pad(torch.ones_like(ids), (9, 0))
    given = {"passage_input_ids": passages, "passage_attention_mask": mask, "passages": way}
    cache = RetroJointCache()
    with torch.no_grad():
        model.config.get_text_config().max_position_embeddings = longest + 2 * CHUNK
        model(padded, attention_mask=padding, **given)  # padding takes no room
        model.config.get_text_config().max_position_embeddings -= 1
        with pytest.raises(ValueError, match=f"have {longest + 2 * CHUNK} tokens, but there is room for"):
            model.generate(ids, past_key_values=cache, max_new_tokens=1, **given)
    assert cache.get_seq_length() == 0
