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
"""`retro train --lora_rank`: an adapter that is trained, resumed, evaluated, generated with and merged."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_train_retro import train_options
from tiny_models import tiny_llama

from modeling_retro import RetroDatastore, RetroForCausalLM, RetroJointForCausalLM, RetroRetriever
from trainers.load_model import load_retro_model
from trainers.scripts import evaluate_retro, generate, train_retro


peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tiny_tokenizer):
    """Folders of a decoder, of a retrofit of it, and of both kinds of model that name it as their base."""
    path = tmp_path_factory.mktemp("bases")
    tiny_llama(len(tiny_tokenizer), eos_token_id=0).save_pretrained(path / "llama")
    retrofit = RetroForCausalLM.from_decoder_pretrained(path / "llama", chunk_size=8, cross_attention_layers=[1])
    with torch.no_grad():
        retrofit.model.layers[1].cross_attn.gate.fill_(0.5)
    retrofit.save_pretrained(path / "cross")
    joint = RetroJointForCausalLM.from_decoder_pretrained(path / "llama", chunk_size=8)
    for name, model in (("cross", retrofit), ("joint", joint)):
        model.freeze_decoder()
        model.save_pretrained(path / f"{name}-reference", retrofit_only=True)
    return path


def train(datastore, base, output_dir, **options):
    words = train_options(datastore, None, output_dir, model=base, lora_rank=2, max_steps=4, **options)
    del words[words.index("--model_config") : words.index("--model_config") + 2]
    train_retro.main(words)


def outputs(model, datastore):
    """Logits with and without neighbors, and what is generated, of the beginning of a held-out document."""
    split = datastore.split("validation")
    chunk_ids = torch.arange(3)[None].numpy()
    ids = torch.from_numpy(split.chunks.take(chunk_ids)[0].reshape(1, -1))
    neighbors, mask = map(torch.from_numpy, datastore.take_neighbors(split.neighbor_ids[chunk_ids, :2]))
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    model.eval()
    inner.set_retriever(RetroRetriever(datastore))
    with torch.no_grad():
        on = model(input_ids=ids, neighbor_input_ids=neighbors, neighbor_attention_mask=mask).logits
        with inner.retrieval(False):
            off = model(input_ids=ids).logits
        tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    return on, off, tokens


@pytest.mark.parametrize(
    ("base", "layers"),
    [
        ("cross", "decoder"),
        ("cross", "cross_attention"),
        ("cross-reference", "cross_attention"),
        ("joint-reference", "decoder"),
    ],
)
def test_an_adapter_is_trained_evaluated_generated_with_and_merged(
    bases, base, layers, tiny_datastore_dir, tmp_path, capsys
):
    train(tiny_datastore_dir, bases / base, tmp_path / "adapter", lora_layers=layers, save_steps=2)
    assert {path.name for path in (tmp_path / "adapter").glob("*.safetensors")} == {"adapter_model.safetensors"}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(bases / base)
    datastore = RetroDatastore.from_pretrained(tiny_datastore_dir)
    before = outputs(load_retro_model(str(bases / base), datastore), datastore)
    adapted = load_retro_model(str(tmp_path / "adapter"), datastore)
    after = outputs(adapted, datastore)
    assert (after[0] - before[0]).abs().max() > 1e-3
    if layers == "cross_attention":
        assert torch.equal(after[1], before[1])
    else:
        assert (after[1] - before[1]).abs().max() > 1e-3
    names = {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert names and all(("cross_attn" in name) == (layers == "cross_attention") for name in names)
    assert not any("lm_head" in name or "neighbor_encoder" in name for name in names)

    # The command again, from a checkpoint: to the same adapter.
    (tmp_path / "adapter").rename(tmp_path / "first")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "first" / "checkpoint-2").rename(tmp_path / "adapter" / "checkpoint-2")
    train(tiny_datastore_dir, bases / base, tmp_path / "adapter", lora_layers=layers, save_steps=2)
    for found, expected in zip(outputs(load_retro_model(str(tmp_path / "adapter"), datastore), datastore), after):
        assert torch.equal(found, expected)

    by_peft = peft.PeftModel.from_pretrained(load_retro_model(str(bases / base), datastore), tmp_path / "adapter")
    for found, expected in zip(outputs(by_peft, datastore), after):
        assert torch.equal(found, expected)
    merged = by_peft.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = load_retro_model(str(tmp_path / "merged"), datastore)
    for found, expected in zip(outputs(loaded, datastore), after):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    options = ["--datastore", str(tiny_datastore_dir), "--model"]
    reports = {}
    for name in ("adapter", "merged"):
        words = [*options, str(tmp_path / name), "--output_dir", str(tmp_path / f"{name}-report")]
        evaluate_retro.main([*words, "--window_chunks=4", "--stride_chunks=2"])
        reports[name] = json.loads((tmp_path / f"{name}-report" / "evaluation.json").read_text())["bits_per_byte"]
    assert reports["adapter"] == pytest.approx(reports["merged"], abs=1e-5)
    capsys.readouterr()
    prompt = ["--prompt", "retro looks things up in a", "--max_new_tokens", "12"]
    generate.main([*options, str(tmp_path / "adapter"), *prompt])
    assert "neighbor 1 of " in capsys.readouterr().out


@pytest.mark.parametrize("base", ["cross-reference", "joint-reference"])
def test_the_frozen_weights_may_be_in_bfloat16(bases, base, tiny_datastore_dir, tmp_path):
    datastore = RetroDatastore.from_pretrained(tiny_datastore_dir)
    answers = []
    for name in ("float32", "bfloat16"):
        train(tiny_datastore_dir, bases / base, tmp_path / name, bf16=True, decoder_dtype=name)
        weights = load_file(tmp_path / name / "adapter_model.safetensors")
        assert {value.dtype for value in weights.values()} == {torch.float32}
        answers.append(outputs(load_retro_model(str(tmp_path / name), datastore), datastore)[0])
    start = outputs(load_retro_model(str(bases / base), datastore), datastore)[0]
    assert (answers[1] - answers[0]).norm() < 0.2 * (answers[0] - start).norm()


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        ("cross", {"freeze_decoder": True}, "leave out freeze_decoder"),
        ("joint-reference", {"lora_layers": "cross_attention"}, "neighbor_adapter_rank"),
        ("joint-reference", {"neighbor_adapter_rank": 2}, "leave out neighbor_adapter"),
        ("llama", {}, "retro retrofit --base .*llama --attention joint"),
    ],
)
def test_adapters_that_cannot_be_are_refused(bases, base, options, message, tiny_datastore_dir, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(tiny_datastore_dir, bases / base, tmp_path, **options)
