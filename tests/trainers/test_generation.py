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
"""`retro generate` looks up a question by its own text and answers it with what it found."""

import re

import pytest
import torch
from tiny_models import tiny_llama

from modeling_retro import RetroDatastore, RetroForCausalLM, RetroJointForCausalLM
from trainers.generation import generate_with_neighbors, look_up
from trainers.scripts import generate


PROMPT, QUERY = "what looks up?", "retro looks things up in a datastore naïve"
ANSWER = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer):
    """Folders of a decoder, of a retrofit of it whose gates are open, and of it wrapped."""
    path = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    decoder = tiny_llama(
        len(tiny_tokenizer), initializer_range=0.2, max_position_embeddings=128, eos_token_id=0, pad_token_id=1
    )
    decoder.save_pretrained(path / "decoder")
    retrofit = RetroForCausalLM.from_decoder_pretrained(path / "decoder", chunk_size=8, cross_attention_layers=[1])
    with torch.no_grad():
        retrofit.model.layers[1].cross_attn.gate.fill_(2.0)
    retrofit.save_pretrained(path / "cross")
    RetroJointForCausalLM.from_decoder_pretrained(path / "decoder", chunk_size=8).save_pretrained(path / "joint")
    return path


def answer(model, prompt, **inputs):
    tokenizer = model.retriever.datastore.tokenizer
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    inputs = {"input_ids": ids, **inputs}
    return tokenizer.decode(model.generate(**inputs, **ANSWER)[0], skip_special_tokens=True)


@pytest.mark.parametrize("passages", ["apart", "in_order"])
def test_a_joint_model_answers_with_the_passages_in_sight(folders, retriever, passages):
    model = RetroJointForCausalLM.from_pretrained(folders / "joint", retriever=retriever)
    found = look_up(retriever, QUERY, 3)
    chunks = generate_with_neighbors(model, retriever, PROMPT, found=found, passages=passages, **ANSWER)
    given = {"passage_input_ids": found.neighbor_input_ids, "passage_attention_mask": found.neighbor_attention_mask}
    text = "".join(chunk.text for chunk in chunks)
    assert text == answer(model, PROMPT, **given, passages=passages)
    assert text != answer(model, PROMPT)
    # The chunks of the answer are looked up too, those of the prompt are not.
    num_prompt = len(retriever.datastore.tokenizer(PROMPT)["input_ids"])
    for number, chunk in enumerate(chunks[:-1]):
        assert bool(chunk.neighbors) == ((number + 1) * 8 > num_prompt)


def test_a_model_with_cross_attention_answers_behind_a_closed_chunk(folders, retriever):
    model = RetroForCausalLM.from_pretrained(folders / "cross", retriever=retriever)
    found = look_up(retriever, QUERY, 2)
    chunks = generate_with_neighbors(model, retriever, PROMPT, found=found, **ANSWER)
    ids = torch.tensor([retriever.datastore.tokenizer(PROMPT)["input_ids"]])
    inputs = retriever.close_chunks(ids)
    num_chunks = inputs["input_ids"].shape[1] // 8
    assert num_chunks > 1 and ids.shape[1] % 8
    neighbors, mask = (
        torch.stack([torch.zeros_like(values)] * (num_chunks - 1) + [values], dim=1)
        for values in (found.neighbor_input_ids, found.neighbor_attention_mask)
    )
    expected = answer(model, PROMPT, **inputs, neighbor_input_ids=neighbors, neighbor_attention_mask=mask)
    text = "".join(chunk.text for chunk in chunks)
    assert text == expected
    other = look_up(retriever, "日本語", 2)
    others = generate_with_neighbors(model, retriever, PROMPT, found=other, **ANSWER)
    assert text != "".join(chunk.text for chunk in others)
    with pytest.raises(ValueError, match="passages is 'in_order', but a RetroForCausalLM"):
        generate_with_neighbors(model, retriever, PROMPT, found=found, passages="in_order", **ANSWER)


@pytest.mark.parametrize(("passages", "in_front"), [("apart", 16), ("in_order", None)])
def test_a_question_that_the_model_has_no_room_for_is_refused(folders, retriever, passages, in_front):
    model = RetroJointForCausalLM.from_pretrained(folders / "joint", retriever=retriever)
    found = look_up(retriever, QUERY, 3)
    in_front = in_front or int(found.neighbor_attention_mask.sum())
    room = 128 - in_front - 12
    prompt = list(range(10, 10 + room))
    generate_with_neighbors(model, retriever, prompt, found=found, passages=passages, **ANSWER)
    message = f"has {room + 1} tokens, its passages take {in_front} positions and the answer 12, .* room for 128"
    with pytest.raises(ValueError, match=message):
        generate_with_neighbors(model, retriever, [9, *prompt], found=found, passages=passages, **ANSWER)


def command(folders, datastore, kind="joint", **options):
    options = {"model": folders / kind, "datastore": datastore, "max_new_tokens": 6, **options}
    generate.main([word for name, value in options.items() for word in (f"--{name}", str(value))])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt": "in up?"}, "Looked up 'in up?' and found 2 passages, which are read in order.\n"),
        (
            {"prompt": "in a", "query": "δέλτα", "passages": "apart", "num_neighbors": 3},
            "Looked up 'δέλτα' and found 3 passages, which are read apart.\n",
        ),
        ({"prompt": "Q:up?\nA"}, "Looked up 'up?' and found 2 passages, which are read in order.\n"),
        ({"prompt": "in a"}, ""),
        ({"prompt": "looks things up in a datastore, looks things up?"}, ""),
    ],
)
def test_the_command_says_what_it_looked_up(folders, tiny_datastore_dir, capsys, options, said):
    command(folders, tiny_datastore_dir, **options)
    output = capsys.readouterr()
    assert said in output.err and ("Looked up" in output.err) == bool(said)
    assert output.out.startswith(options["prompt"])
    assert output.out.count("    passage ") == (options.get("num_neighbors", 2) if said else 0)


def test_a_message_is_looked_up_without_its_template(folders, tiny_datastore_dir, monkeypatch, capsys):
    template = "{% for message in messages %}a datastore {{ message.content }}{% endfor %} up"
    opened = RetroDatastore.from_pretrained(tiny_datastore_dir)
    opened.tokenizer.chat_template = template
    monkeypatch.setattr(RetroDatastore, "tokenizer", opened.tokenizer)
    command(folders, tiny_datastore_dir, prompt="naïve things", chat=True)
    output = capsys.readouterr()
    assert "Looked up 'naïve things' and found 2 passages" in output.err
    # The answer is printed alone, and the chunks below it begin with the message in its template.
    assert not output.out.startswith("a datastore")
    assert re.search(r"chunk 0: a datastore .*na", output.out)


def test_the_command_refuses_an_empty_query(folders, tiny_datastore_dir):
    with pytest.raises(ValueError, match="question 0 is empty"):
        command(folders, tiny_datastore_dir, prompt="in a", query=" ")
