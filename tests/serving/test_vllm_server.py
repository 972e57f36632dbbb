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
"""A server whose completions vLLM computes answers as one that computes them itself. A fake stands for vLLM."""

import pytest
import requests
import torch
from fake_vllm import FakeVllm
from peft import PeftModel
from tiny_models import tiny_llama
from tiny_server import SIZES, running, save_model
from transformers import LlamaForCausalLM

from modeling_retro import RetroJointForCausalLM
from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.reader_adapters_retro import NEIGHBOR_ADAPTER
from modeling_retro.sharing.readers import Reader
from serving.load import load_served_model
from serving.scripts.serve import main
from serving.vllm.load import VllmOptions, write_peft_adapter


@pytest.fixture(scope="module")
def decoder_dir(tiny_datastore_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder") / "model"
    tokenizer = RetroDatastore.from_pretrained(tiny_datastore_dir).tokenizer
    tiny_llama(len(tokenizer), eos_token_id=0, pad_token_id=1, **SIZES).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def addresses(decoder_dir, tiny_datastore_dir):
    """The addresses of a server that computes itself, and of one that asks vLLM."""
    own = load_served_model(str(decoder_dir), str(tiny_datastore_dir), draft_tokens=0)
    with FakeVllm(LlamaForCausalLM.from_pretrained(decoder_dir).eval()) as fake:
        options = VllmOptions(urls=[fake.url])
        other = load_served_model(str(decoder_dir), str(tiny_datastore_dir), vllm=options)
        with running(own) as one, running(other) as another:
            yield one, another


COMMON = {"model": "model", "temperature": 0, "max_tokens": 30}


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "retro looks things up"},
        {"prompt": "retro looks things up in a datastore " * 5, "num_neighbors": 3, "logprobs": 2},
        {"prompt": ["retro", "a datastore"], "retrieval": False, "echo": True, "stop": ["looks"]},
        {"prompt": "up in a", "query": "retro looks things up", "passages": "apart"},
        {"prompt": "up in a", "query": "retro looks things up", "passages": "in_order"},
    ],
)
def test_answers_are_the_same(addresses, body):
    own, other = (requests.post(f"{one}/v1/completions", json=COMMON | body).json() for one in addresses)
    assert own["usage"] == other["usage"]
    for mine, theirs in zip(own["choices"], other["choices"], strict=True):
        if (logprobs := theirs.pop("logprobs")) is not None:
            expected = mine["logprobs"]
            assert logprobs["token_logprobs"] == pytest.approx(expected["token_logprobs"], abs=1e-4)
            assert list(logprobs["top_logprobs"][0]) == list(expected["top_logprobs"][0])
        mine.pop("logprobs")
        assert mine == theirs


def test_both_engines_read_as_much_again_as_the_server_is_told(addresses, decoder_dir, tiny_datastore_dir):
    body = COMMON | {"prompt": "retro looks things up in a datastore " * 5, "logprobs": 0}
    options = {"reread_tokens": 0}
    own = load_served_model(str(decoder_dir), str(tiny_datastore_dir), draft_tokens=0, **options)
    with FakeVllm(LlamaForCausalLM.from_pretrained(decoder_dir).eval()) as fake:
        other = load_served_model(str(decoder_dir), str(tiny_datastore_dir), vllm=VllmOptions([fake.url]), **options)
        with running(own) as one, running(other) as another:
            answers = [requests.post(f"{url}/v1/completions", json=body).json() for url in (*addresses, one, another)]
    logprobs = [answer["choices"][0]["logprobs"]["token_logprobs"] for answer in answers]
    assert logprobs[2] == pytest.approx(logprobs[3], abs=1e-4)
    assert logprobs[0] != pytest.approx(logprobs[2], abs=1e-4)  # whole chunks are read again there
    with pytest.raises(ValueError, match="--reread_tokens is -1"):
        load_served_model(str(decoder_dir), str(tiny_datastore_dir), reread_tokens=-1)


def test_a_stream_says_the_same(addresses):
    body = COMMON | {"prompt": "retro looks things up in", "stream": True}
    texts = []
    for address in addresses:
        lines = requests.post(f"{address}/v1/completions", json=body).text.split("\n\n")
        assert lines[-2] == "data: [DONE]"
        texts.append([line.partition('"choices"')[2] for line in lines[:-2]])
    assert texts[0] == texts[1]


def test_what_vllm_cannot_do_is_status_400_and_the_server_is_well(addresses):
    body = COMMON | {"prompt": "retro", "presence_penalty": 1.0}
    answer = requests.post(f"{addresses[1]}/v1/completions", json=body)
    assert answer.status_code == 400 and "presence_penalty" in answer.json()["error"]["message"]
    assert requests.get(f"{addresses[1]}/health").json() == {"status": "ok", "engine_restarts": 0}
    metrics = requests.get(f"{addresses[1]}/metrics").text
    kept = next(line for line in metrics.splitlines() if line.startswith("retro_state_bytes"))
    assert float(kept.split()[1]) > 0


def test_a_reader_is_written_in_the_form_of_peft(tmp_path):
    tiny_llama(40).save_pretrained(tmp_path / "base")
    adapter = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
    model = RetroJointForCausalLM.from_decoder_pretrained(str(tmp_path / "base"), neighbor_adapter=adapter)
    for name, weights in model.named_parameters():
        if "lora_B" in name:  # they are zero in a new adapter
            torch.nn.init.normal_(weights)
    model.save_pretrained(tmp_path / "reader", retrofit_only=True)
    folder = write_peft_adapter(Reader(str(tmp_path / "reader")))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        with model.adapters.active(NEIGHBOR_ADAPTER):
            expected = model.decoder(ids).logits
        found = PeftModel.from_pretrained(tiny_llama(40), folder)(ids).logits
    torch.testing.assert_close(found, expected)


def test_models_that_vllm_cannot_serve_are_refused(tiny_datastore_dir, decoder_dir, tmp_path):
    options = VllmOptions(urls=["http://127.0.0.1:9"])
    for kind, why in (("cross", "layers of its own"), ("joint", "retrofit_only")):
        folder = save_model(kind, tiny_datastore_dir, tmp_path / kind)
        with pytest.raises(ValueError, match=why):
            load_served_model(str(folder), str(tiny_datastore_dir), vllm=options)
    with pytest.raises(ValueError, match="one of the two"):
        load_served_model(str(decoder_dir), str(tiny_datastore_dir), vllm=VllmOptions())


def test_a_process_that_cannot_start_is_told(tiny_datastore_dir, decoder_dir):
    with pytest.raises(ValueError, match="vLLM has ended before it could serve"):
        load_served_model(str(decoder_dir), str(tiny_datastore_dir), vllm=VllmOptions(python="false"))


def test_options_of_vllm_want_the_engine_vllm(tiny_datastore_dir, decoder_dir):
    with pytest.raises(ValueError, match="are for --engine vllm"):
        main(
            [
                "--model",
                str(decoder_dir),
                "--datastore",
                str(tiny_datastore_dir),
                "--engine_python",
                "x",
                "--port",
                "0",
            ]
        )
