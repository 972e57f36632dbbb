import pytest
import torch
from test_modeling_retro import CHUNK
from test_reader_adapters_retro import LORA, make_inputs
from tiny_joint import make_decoder
from transformers import AutoModelForCausalLM

from modeling_retro import RetroForCausalLM, RetroJointForCausalLM
from modeling_retro.reader_adapters_retro import is_adapter_weight
from modeling_retro.sharing.readers import READERS_DIR, Reader, reader_names


def save_reader(folder, **fields):
    """Saves a decoder and a reader for it apart, and gives inputs and the outputs of the two together."""
    make_decoder().save_pretrained(folder / "base")
    model = RetroJointForCausalLM.from_decoder_pretrained(
        folder / "base", chunk_size=CHUNK, neighbor_adapter=LORA, row_adapter=LORA, neighbor_bias=True, **fields
    )
    torch.manual_seed(1)
    with torch.no_grad():
        model.neighbor_bias.fill_(0.7)
        for name, parameter in model.named_parameters():
            if is_adapter_weight(name):
                parameter.normal_(std=0.3)
    model.freeze_decoder()
    model.save_pretrained(folder / "reader", retrofit_only=True)
    ids, neighbors = make_inputs()
    return ids, neighbors, model(ids, neighbor_input_ids=neighbors).logits


def test_a_reader_goes_with_a_decoder_that_is_loaded_by_itself(tmp_path):
    ids, neighbors, expected = save_reader(tmp_path, hidden_neighbor_tokens=2)
    model = RetroJointForCausalLM.from_decoder_pretrained(
        tmp_path / "base", reader=tmp_path / "reader", chunk_size=CHUNK
    )
    assert model.config.hidden_neighbor_tokens == 2
    assert torch.equal(model(ids, neighbor_input_ids=neighbors).logits, expected)
    assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(tmp_path / "base")(ids).logits)
    # Saved whole, it is the same model.
    model.save_pretrained(tmp_path / "whole")
    whole = RetroJointForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(
        whole(ids, neighbor_input_ids=neighbors).logits, expected, atol=2e-5, rtol=0, check_dtype=False
    )


def test_a_reader_goes_with_other_weights_of_the_same_shapes_but_not_with_another_decoder(tmp_path):
    ids, neighbors, expected = save_reader(tmp_path)
    other = RetroJointForCausalLM.from_decoder(make_decoder(seed=5), reader=tmp_path / "reader", chunk_size=CHUNK)
    assert not torch.allclose(other(ids, neighbor_input_ids=neighbors).logits, expected)
    wider = make_decoder(hidden_size=48)
    with pytest.raises(
        ValueError, match=r"was trained for .*base and does not fit this model: decoder\..* in the reader"
    ):
        RetroJointForCausalLM.from_decoder(wider, reader=tmp_path / "reader", chunk_size=CHUNK)


def test_something_that_is_no_reader_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="nothing-like-that is no reader: expected one of"):
        Reader("nothing-like-that")
    make_decoder().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no reader"):
        Reader(tmp_path)
    sizes = {"cross_attention_layers": [1], "neighbor_encoder_num_hidden_layers": 1, "chunk_size": CHUNK}
    paper = RetroForCausalLM.from_decoder_pretrained(tmp_path, **sizes)
    paper.freeze_decoder()
    paper.save_pretrained(tmp_path / "paper", retrofit_only=True)
    with pytest.raises(ValueError, match="of type 'retro', expected those of a 'retro_joint'"):
        Reader(tmp_path / "paper")


@pytest.mark.parametrize("name", reader_names())
def test_the_readers_of_the_package_are_small_and_whole(name):
    folder = READERS_DIR / name
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 12 * 2**20
    assert (folder / "README.md").is_file()
    reader = Reader(name)
    assert reader.fields["neighbor_adapter"] is not None
    assert all(torch.isfinite(tensor).all() for tensor in reader.weights.values())
