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
import pytest
import torch
from slow_retro import SlowRetro

from modeling_retro import RetroCache, RetroConfig, RetroForCausalLM


CHUNK = 4
LENGTH = 2 * CHUNK
VOCAB = 50


def make_model(seed=0, **fields):
    torch.manual_seed(seed)
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "cross_attention_layers": [1, 2],
        "chunk_size": CHUNK,
        "neighbor_encoder_num_hidden_layers": 2,
        "initializer_range": 0.3,
        "attn_implementation": "sdpa",
    } | fields
    model = RetroForCausalLM(RetroConfig(**fields)).double().eval()
    for parameter in model.parameters():  # norms and gates differ from their neutral starts
        if parameter.ndim == 1:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def make_inputs(batch_size, length, num_slots=None, k=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    num_slots = length // CHUNK if num_slots is None else num_slots
    ids = torch.randint(0, VOCAB, (batch_size, length), generator=generator)
    neighbors = torch.randint(0, VOCAB, (batch_size, num_slots, k, LENGTH), generator=generator)
    # Each neighbor keeps a prefix of random length; some are absent.
    kept = torch.randint(0, LENGTH + 1, (batch_size, num_slots, k, 1), generator=generator)
    return ids, neighbors, torch.arange(LENGTH) < kept


def slow_logits(model, ids, neighbors, mask, first=0):
    """The reference for one document."""
    given = {
        u: [(neighbors[u, n].tolist(), mask[u, n].tolist()) for n in range(neighbors.shape[1]) if mask[u, n].any()]
        for u in range(neighbors.shape[0])
    }
    with torch.no_grad():
        return SlowRetro(model).document_logits(ids.tolist(), given, first)


def assert_close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"qk_norm": True, "attention_bias": True, "attention_output_bias": True, "mlp_bias": True, "head_dim": 6},
        {"neighbor_encoder_hidden_size": 12, "neighbor_encoder_cross_attention_layers": [0, 1]},
        {"neighbor_encoder_cross_attention_layers": [], "cross_attention_layers": [0], "cross_attention_gate": True},
        {
            "tie_word_embeddings": True,
            "neighbor_rope_theta": 100.0,
            "rope_parameters": {"rope_theta": 50.0, "rope_type": "default"},
        },
    ],
    ids=["default", "biases-and-norms", "narrow-encoder", "unconditioned-gated", "tied-thetas"],
)
def test_forward_equals_the_slow_reference(fields, attn_implementation):
    model = make_model(attn_implementation=attn_implementation, **fields)
    ids, neighbors, mask = make_inputs(2, 3 * CHUNK + 2)
    with torch.no_grad():
        logits = model(ids, neighbor_input_ids=neighbors, neighbor_attention_mask=mask).logits
    for row in range(2):
        # Rotary angles are float32 in the model, as in transformers.
        assert_close(logits[row], slow_logits(model, ids[row], neighbors[row], mask[row]), 1e-5)


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_any_chunk_size_equals_the_slow_reference(chunk_size):
    model = make_model(chunk_size=chunk_size)
    ids = torch.randint(0, VOCAB, (1, 7))
    neighbors = torch.randint(0, VOCAB, (1, 7 // chunk_size, 3, 2 * chunk_size))
    mask = torch.rand(neighbors.shape) < 0.7
    with torch.no_grad():
        logits = model(ids, neighbor_input_ids=neighbors, neighbor_attention_mask=mask).logits
    assert_close(logits[0], slow_logits(model, ids[0], neighbors[0], mask[0]), 1e-5)


def test_later_tokens_do_not_change_earlier_logits():
    model = make_model()
    ids, neighbors, mask = make_inputs(1, 3 * CHUNK)
    with torch.no_grad():
        logits = model(ids, neighbor_input_ids=neighbors, neighbor_attention_mask=mask).logits
        for t in range(1, 3 * CHUNK):
            changed = ids.clone()
            changed[:, t:] = (changed[:, t:] + 1) % VOCAB
            other = model(changed, neighbor_input_ids=neighbors, neighbor_attention_mask=mask).logits
            assert_close(other[:, :t], logits[:, :t])
            assert (other[:, t] - logits[:, t]).abs().max() > 1e-4


def test_neighbors_of_a_chunk_act_from_its_last_token_on_and_directly_for_one_chunk():
    """A single decoder layer shows the window without the self-attention that carries it further."""
    model = make_model(num_hidden_layers=1, cross_attention_layers=[0])
    ids, neighbors, _ = make_inputs(1, 4 * CHUNK)
    with torch.no_grad():
        logits = model(ids, neighbor_input_ids=neighbors).logits
        for u in range(4):
            changed = neighbors.clone()
            changed[:, u] = (changed[:, u] + 1) % VOCAB
            difference = (model(ids, neighbor_input_ids=changed).logits - logits).abs().amax(-1)[0]
            window = slice((u + 1) * CHUNK - 1, (u + 2) * CHUNK - 1)
            assert (difference[window] > 1e-6).all()
            difference[window] = 0
            assert (difference == 0).all()


def test_first_tokens_of_a_document_see_no_neighbors():
    model = make_model()
    ids, neighbors, _ = make_inputs(1, 2 * CHUNK)
    with torch.no_grad():
        on, off = model(ids, neighbor_input_ids=neighbors).logits, model(ids).logits
    assert torch.equal(on[:, : CHUNK - 1], off[:, : CHUNK - 1])
    assert ((on - off)[:, CHUNK - 1 :].abs().amax(-1) > 1e-4).all()


def test_order_of_neighbors_does_not_matter():
    model = make_model()
    ids, neighbors, mask = make_inputs(2, 3 * CHUNK, k=4)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        logits = model(ids, neighbor_input_ids=neighbors, neighbor_attention_mask=mask).logits
        other = model(ids, neighbor_input_ids=neighbors[:, :, order], neighbor_attention_mask=mask[:, :, order]).logits
    assert_close(other, logits)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("biases", [False, True])
def test_no_neighbors_are_the_same_function_however_they_are_given(attn_implementation, biases):
    model = make_model(
        attn_implementation=attn_implementation, attention_bias=biases, attention_output_bias=biases
    ).float()
    ids, neighbors, mask = make_inputs(2, 3 * CHUNK)
    with torch.no_grad():
        off = model(ids).logits
        masked = model(ids, neighbor_input_ids=neighbors, neighbor_attention_mask=torch.zeros_like(mask)).logits
        no_k = model(ids, neighbor_input_ids=neighbors[:, :, :0]).logits
        no_slots = model(ids, neighbor_input_ids=neighbors[:, :0]).logits
    assert torch.equal(masked, off) and torch.equal(no_k, off) and torch.equal(no_slots, off)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_gradients_are_finite_and_reach_every_parameter_when_all_neighbors_are_masked(attn_implementation):
    model = make_model(attn_implementation=attn_implementation).train()
    ids, neighbors, mask = make_inputs(2, 3 * CHUNK)
    model(
        ids, labels=ids, neighbor_input_ids=neighbors, neighbor_attention_mask=torch.zeros_like(mask)
    ).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if "cross_attn" in name or "neighbor_encoder" in name:
            assert (parameter.grad == 0).all(), name


def test_what_masked_neighbor_tokens_hold_does_not_matter():
    model = make_model()
    ids, neighbors, mask = make_inputs(2, 3 * CHUNK)
    other = torch.where(mask, neighbors, (neighbors + 7) % VOCAB)
    with torch.no_grad():
        logits = model(ids, neighbor_input_ids=neighbors, neighbor_attention_mask=mask).logits
        assert torch.equal(model(ids, neighbor_input_ids=other, neighbor_attention_mask=mask.int()).logits, logits)


def test_fewer_slots_than_chunks_leave_the_later_chunks_without_neighbors():
    model = make_model()
    ids, neighbors, mask = make_inputs(1, 4 * CHUNK)
    mask[:, 2:] = False
    with torch.no_grad():
        expected = model(ids, neighbor_input_ids=neighbors, neighbor_attention_mask=mask).logits
        logits = model(ids, neighbor_input_ids=neighbors[:, :2], neighbor_attention_mask=mask[:, :2]).logits
    assert_close(logits, expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_padded_row_equals_row_alone(side, attn_implementation):
    model = make_model(attn_implementation=attn_implementation)
    lengths = [3 * CHUNK + 1, 2 * CHUNK, CHUNK - 1, 1]
    total = max(lengths) + 2
    ids = torch.zeros(len(lengths), total, dtype=torch.long)
    attention_mask = torch.zeros_like(ids)
    slots = total // CHUNK
    neighbors = torch.zeros(len(lengths), slots, 2, LENGTH, dtype=torch.long)
    mask = torch.zeros(neighbors.shape, dtype=torch.bool)
    alone = []
    for row, length in enumerate(lengths):
        own_ids, own_neighbors, own_mask = make_inputs(1, length, seed=row)
        columns = slice(total - length, total) if side == "left" else slice(0, length)
        ids[row, columns], attention_mask[row, columns] = own_ids[0], 1
        neighbors[row, : length // CHUNK], mask[row, : length // CHUNK] = own_neighbors[0], own_mask[0]
        with torch.no_grad():
            inputs = {"neighbor_input_ids": own_neighbors, "neighbor_attention_mask": own_mask}
            alone.append((columns, model(own_ids, **inputs).logits[0]))
    with torch.no_grad():
        logits = model(
            ids, attention_mask=attention_mask, neighbor_input_ids=neighbors, neighbor_attention_mask=mask
        ).logits
    for row, (columns, expected) in enumerate(alone):
        assert_close(logits[row, columns], expected)


@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("padding", ["none", "all ones", "left"])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_packed_documents_equal_documents_alone(use_cache, padding, aligned, batch_size):
    """Aligned: documents padded to whole chunks, as the collator packs them. Else: as they come."""
    model = make_model()
    lengths = [2 * CHUNK + 1, CHUNK - 1, 3 * CHUNK, CHUNK + 2]
    pad = 3 if padding == "left" else 0
    ids, positions, expected, columns, slots = [], [], [], [], []
    start = 0
    for n, length in enumerate(lengths):
        own_ids, own_neighbors, own_mask = make_inputs(1, length, seed=n)
        with torch.no_grad():
            inputs = {"neighbor_input_ids": own_neighbors, "neighbor_attention_mask": own_mask}
            expected.append(model(own_ids, **inputs).logits[0])
        padded = -(-length // CHUNK) * CHUNK if aligned else length
        columns.append(slice(pad + start, pad + start + length))
        slots.append((start // CHUNK, own_neighbors[0], own_mask[0]))
        ids.append(torch.cat([own_ids[0], torch.zeros(padded - length, dtype=torch.long)]))
        positions.append(torch.arange(padded))
        start += padded
    zeros = torch.zeros(pad, dtype=torch.long)
    ids, positions = torch.cat([zeros, *ids])[None], torch.cat([zeros, *positions])[None]
    neighbors = torch.zeros(1, start // CHUNK, 2, LENGTH, dtype=torch.long)
    mask = torch.zeros(neighbors.shape, dtype=torch.bool)
    for first, own_neighbors, own_mask in slots:
        neighbors[0, first : first + len(own_neighbors)], mask[0, first : first + len(own_neighbors)] = (
            own_neighbors,
            own_mask,
        )
    attention_mask = None if padding == "none" else (torch.arange(ids.shape[1]) >= pad).long()[None]
    repeat = (batch_size, 1)
    with torch.no_grad():
        logits = model(
            ids.repeat(repeat),
            position_ids=positions,  # of one row: for all
            attention_mask=None if attention_mask is None else attention_mask.repeat(repeat),
            neighbor_input_ids=neighbors.repeat(batch_size, 1, 1, 1),
            neighbor_attention_mask=mask.repeat(batch_size, 1, 1, 1),
            use_cache=use_cache,
        ).logits
    for own_columns, own_expected in zip(columns, expected):
        for row in range(batch_size):
            assert_close(logits[row, own_columns], own_expected)


def test_labels_are_shifted_inside_and_ignored_at_minus_100():
    model = make_model()
    ids, neighbors, mask = make_inputs(2, 2 * CHUNK)
    labels = ids.clone()
    labels[0, 3] = -100
    with torch.no_grad():
        outputs = model(ids, labels=labels, neighbor_input_ids=neighbors, neighbor_attention_mask=mask)
    log_probs = outputs.logits.log_softmax(-1)
    terms = [-log_probs[b, t, ids[b, t + 1]] for b in range(2) for t in range(2 * CHUNK - 1) if (b, t + 1) != (0, 3)]
    assert_close(outputs.loss.double(), torch.stack(terms).mean(), 1e-6)


def test_too_many_slots_are_an_error_that_names_both_numbers():
    model = make_model()
    ids, neighbors, _ = make_inputs(1, 2 * CHUNK + 3, num_slots=3)
    with pytest.raises(ValueError, match=r"3 slots.* 2 chunks"):
        model(ids, neighbor_input_ids=neighbors)
    cache = RetroCache(config=model.config)
    model(ids[:, :5], past_key_values=cache)
    with pytest.raises(ValueError, match=r"3 slots.* 2 chunks"):
        model(ids[:, 5:10], past_key_values=cache, neighbor_input_ids=neighbors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"neighbor_input_ids": torch.zeros(2, 1, 2, LENGTH, dtype=torch.long)}, "batch_size 1"),
        ({"neighbor_input_ids": torch.zeros(1, 2, LENGTH, dtype=torch.long)}, "expected"),
        ({"neighbor_attention_mask": torch.ones(1, 1, 2, LENGTH - 1)}, "neighbor_attention_mask"),
    ],
)
def test_neighbors_of_wrong_shape_are_an_error(change, message):
    ids, neighbors, mask = make_inputs(1, CHUNK)
    inputs = {"neighbor_input_ids": neighbors, "neighbor_attention_mask": mask} | change
    with pytest.raises(ValueError, match=message):
        make_model()(ids, **inputs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunk_size": 0}, "chunk_size"),
        ({"cross_attention_layers": [3]}, "cross_attention_layers"),
        ({"cross_attention_layers": []}, "cross_attention_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 5}, "head_dim"),
        ({"neighbor_encoder_cross_attention_layers": [2]}, "neighbor_encoder_cross_attention_layers"),
    ],
)
def test_impossible_configurations_are_errors_that_name_the_field(fields, message):
    with pytest.raises(Exception, match=message):
        make_model(**fields)


def test_saved_and_loaded_model_gives_equal_logits(tmp_path):
    model = make_model(cross_attention_gate=True, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors", ".py"}
    loaded = RetroForCausalLM.from_pretrained(tmp_path).eval()
    ids, neighbors, mask = make_inputs(2, 3 * CHUNK)
    inputs = {"neighbor_input_ids": neighbors, "neighbor_attention_mask": mask}
    with torch.no_grad():
        assert torch.equal(loaded(ids, **inputs).logits, model(ids, **inputs).logits)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(use_reentrant):
    ids, neighbors, mask = make_inputs(2, 3 * CHUNK)
    gradients = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        inputs = {"neighbor_input_ids": neighbors, "neighbor_attention_mask": mask}
        model(ids, labels=ids, use_cache=False, **inputs).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize(
    "field",
    ["hidden_dropout", "neighbor_encoder_hidden_dropout", "attention_dropout", "neighbor_encoder_attention_dropout"],
)
def test_dropouts_act_in_training_only(field):
    ids, neighbors, mask = make_inputs(1, 3 * CHUNK)
    inputs = {"neighbor_input_ids": neighbors, "neighbor_attention_mask": mask}
    model, plain = make_model(**{field: 0.5}), make_model()
    with torch.no_grad():
        assert torch.equal(model(ids, **inputs).logits, plain(ids, **inputs).logits)
        model.train()
        assert (model(ids, **inputs).logits - plain(ids, **inputs).logits).abs().max() > 1e-3


def test_attentions_and_hidden_states_are_the_decoders():
    model = make_model(attn_implementation="eager")
    ids, neighbors, mask = make_inputs(2, 3 * CHUNK)
    with torch.no_grad():
        outputs = model(
            ids,
            neighbor_input_ids=neighbors,
            neighbor_attention_mask=mask,
            output_attentions=True,
            output_hidden_states=True,
        )
    assert [a.shape for a in outputs.attentions] == [(2, 4, 3 * CHUNK, 3 * CHUNK)] * 3
    assert [h.shape for h in outputs.hidden_states] == [(2, 3 * CHUNK, 16)] * 4
    assert [a.shape for a in outputs.cross_attentions] == [(2 * 3, 4, CHUNK, 2 * LENGTH)] * 2
