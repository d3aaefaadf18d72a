"""A model that is packed in memory is the same model to everything that a pruner does, or is unpacked, or refused."""

import pytest
import torch

from optimum_dsa import DSAConfig, DSAPruner, RecoveryConfig, ValuesConfig, prune
from optimum_dsa.evaluation.reading import packed_bytes
from optimum_dsa.packed.matrix import PackedMatrix
from optimum_dsa.packed.pack_model import packed_layers
from optimum_dsa.pruning.zeros import counted

from ..tiny import needs_compressed_loading, same_state, state, tiny_llama, tokens


pytestmark = needs_compressed_loading
CONFIG = DSAConfig(0.6, "magnitude", "uniform")


def packed_pruner():
    """A packed pruner and the state of its model before that."""
    pruner = DSAPruner(tiny_llama())
    pruner.prune(None, CONFIG)
    before = state(pruner.model)
    packing = pruner.pack()
    assert len(packing.packed) == 21 and packing.bytes_packed < 0.5 * packing.bytes_before
    return pruner, before


def test_a_model_that_was_made_of_the_same_configuration_is_not_packed():
    model = tiny_llama()
    twin = type(model)(model.config)
    pruner = DSAPruner(model)
    pruner.prune(None, CONFIG)
    pruner.pack()
    assert hasattr(model.config, "quantization_config") and not hasattr(twin.config, "quantization_config")


def test_packed_and_unpacked_is_bit_for_bit_and_leaves_no_trace():
    pruner, before = packed_pruner()
    plain = DSAPruner(tiny_llama()).model
    assert pruner.model.is_quantized and pruner.model.hf_quantizer is not None
    assert pruner.pack().packed == ()  # a second time there is nothing left to do
    assert pruner.unpack() and not packed_layers(pruner.model) and same_state(pruner.model, before)
    assert pruner.unpack() == ()
    for name in ("hf_quantizer", "quantization_method"):
        assert hasattr(pruner.model, name) == hasattr(plain, name)
    assert not pruner.model.is_quantized and not hasattr(pruner.model.config, "quantization_config")


def test_what_reads_it_finds_what_was_there(tmp_path):
    pruner, before = packed_pruner()
    assert pruner.verify().holds and counted(pruner.report, pruner.model) == pruner.report
    masks = dict(pruner.masks())
    assert len(masks) == 21 and all(torch.equal(mask, before[name] != 0) for name, mask in masks.items())
    measured = pruner.measure(tokens(2))
    pruner.save_pretrained(tmp_path / "packed")
    loaded = DSAPruner.from_pretrained(tmp_path / "packed")
    assert len(packed_layers(loaded.model)) == 21 and loaded.verify().holds
    assert loaded.measure(tokens(2)).perplexity == pytest.approx(measured.perplexity)
    loaded.unpack()
    assert same_state(loaded.model, before) and loaded.measure(tokens(2)).size == measured.size
    loaded.save_pretrained(tmp_path / "dense")
    assert same_state(DSAPruner.from_pretrained(tmp_path / "dense").model, before)


def test_what_changes_weights_unpacks_them_and_says_so(caplog):
    pruner, before = packed_pruner()
    pruner.prune(None, DSAConfig(0.7, "magnitude", "uniform"))
    assert "Pruning needs weights with their zeros: 21 packed matrices are unpacked" in caplog.text
    assert not packed_layers(pruner.model) and pruner.verify().holds and pruner.verify().removed > 0.69 * 21 * 32 * 32
    pruner, before = packed_pruner()
    pruner.recover(tokens(8), RecoveryConfig(method="full", steps=1, batch_size=2), validation=tokens(2, seed=1))
    assert "Training needs weights with their zeros" in caplog.text and not packed_layers(pruner.model)
    assert not same_state(pruner.model, before)
    assert all((pruner.model.get_parameter(name)[value == 0] == 0).all() for name, value in before.items())


def test_what_needs_dense_weights_refuses_it_by_name():
    pruner, before = packed_pruner()
    for refused in (
        lambda: prune(pruner.model, None, CONFIG),
        lambda: pruner.allocate(None, CONFIG),
        lambda: pruner.sensitivity(tokens(), CONFIG),
        lambda: pruner.search(tokens(), CONFIG, validation=tokens(seed=1)),
    ):
        with pytest.raises(ValueError, match=r"is packed, and its weights .* unpack the model first"):
            refused()
    pruner.unpack()
    assert same_state(pruner.model, before)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_model_on_a_grid_is_packed_as_whole_numbers_in_memory_as_from_a_file(family, bits, tiny, tmp_path):
    pruner = DSAPruner(tiny(family).bfloat16())
    pruner.prune(tokens(4), DSAConfig(0.6, "sparsegpt", "uniform", values=ValuesConfig(bits, group=32)))
    before, logits = state(pruner.model), pruner.model(tokens(2)).logits
    floats = sum(PackedMatrix.of(before[f"{name}.weight"]).nbytes for name in pruner.pack().packed)
    kinds = {pruner.model.get_submodule(name).values.dtype for name in packed_layers(pruner.model)}
    assert kinds == {torch.int8 if bits == "int8" else torch.uint8}
    assert packed_bytes(pruner.model) < 0.95 * floats
    torch.testing.assert_close(pruner.model(tokens(2)).logits, logits, rtol=3e-2, atol=3e-2)
    assert pruner.verify().holds
    pruner.save_pretrained(tmp_path / "packed")
    loaded = DSAPruner.from_pretrained(tmp_path / "packed")
    parts = loaded.model.state_dict()
    assert all(torch.equal(parts[name], value) for name, value in pruner.model.state_dict().items())
    for each in (pruner, loaded):
        assert each.unpack() and same_state(each.model, before)
