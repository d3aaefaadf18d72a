"""Whether a run goes on with what it began with."""

import pytest
import torch
from transformers import LlamaForCausalLM

from optimum_dsa.model.fingerprint import fingerprint_of_model, fingerprint_of_tensors

from ..tiny import tiny_llama, tokens


def test_every_weight_counts_to_its_last_bit_and_in_its_place():
    whole = fingerprint_of_model(tiny_llama())
    assert fingerprint_of_model(tiny_llama()) == whole
    for name, parameter in tiny_llama().named_parameters():
        model = tiny_llama()
        weight = model.get_parameter(name).data.view(-1)
        weight[len(weight) // 2] = torch.nextafter(weight[len(weight) // 2], torch.tensor(9.0))
        assert fingerprint_of_model(model) != whole, name
        if parameter.dim() > 1:
            model = tiny_llama()
            weight = model.get_parameter(name).data
            weight[:] = weight.flip(0)  # the same numbers elsewhere
            assert fingerprint_of_model(model) != whole, name


def test_the_configuration_and_the_dtype_count_and_where_it_was_loaded_from_does_not(tmp_path):
    whole = fingerprint_of_model(tiny_llama())
    other = tiny_llama()
    other.config.rms_norm_eps *= 2
    assert fingerprint_of_model(other) != whole
    assert fingerprint_of_model(tiny_llama().half()) != whole
    tiny_llama().save_pretrained(tmp_path / "a")
    assert fingerprint_of_model(LlamaForCausalLM.from_pretrained(tmp_path / "a")) == fingerprint_of_model(
        LlamaForCausalLM.from_pretrained(tmp_path / "a", dtype="auto")
    )


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("tied", [True, False])
def test_it_is_the_same_wherever_the_weights_are_kept(where, tied, tmp_path):
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "m")
    here = LlamaForCausalLM.from_pretrained(tmp_path / "m")
    there = LlamaForCausalLM.from_pretrained(
        tmp_path / "m", device_map={"": where}, offload_folder=tmp_path / "weights"
    )
    assert fingerprint_of_model(there) == fingerprint_of_model(here)


def test_tensors_count_by_name_value_place_and_shape():
    def found(values, **others):
        return fingerprint_of_tensors({"input_ids": values, **others})

    whole = found(tokens())
    assert found(tokens().clone()) == whole != fingerprint_of_tensors({"ids": tokens()})
    other = tokens().clone()
    other[3, 5] += 1
    assert len({whole, *map(found, (other, tokens().flip(0), tokens().view(-1), tokens()[1:]))}) == 5
    assert found(tokens(), mask=torch.ones(2)) != whole
