"""A model whose 2:4 matrices lie as a tensor core takes them is the packed model, whoever reads it."""

import copy

import pytest
import torch

from optimum_dsa import DSAConfig, DSAPruner, from_tensor_cores, prune, to_tensor_cores
from optimum_dsa.evaluation.reading import packed_bytes
from optimum_dsa.packed import tensor_cores
from optimum_dsa.packed.linear import PackedLinear
from optimum_dsa.packed.matrix import PackedMatrix
from optimum_dsa.packed.pack_model import pack_model, packed_layers, seen_dense, unpack_model
from optimum_dsa.packed.tensor_cores import TensorCoreLinear
from optimum_dsa.pruning.zeros import found_report

from ..tiny import same_state, state, tiny_llama, tokens
from .test_two_of_four import whole_numbers


def packed(pattern="2:4", dtype=torch.bfloat16, family=tiny_llama):
    model = family().to(dtype)
    prune(model, None, DSAConfig(0.5, "magnitude", "uniform", pattern=pattern))
    return model, state(model), pack_model(model)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_is_the_packed_model_and_back_bit_for_bit(family, tiny):
    model, before, packing = packed(family=lambda: tiny(family))
    as_packed, expected = state(model), model(tokens(2)).logits
    with seen_dense(model):
        report = found_report(model)
    assert to_tensor_cores(model) == packing.packed == packed_layers(model)
    assert to_tensor_cores(model) == ()
    torch.testing.assert_close(model(tokens(2)).logits, expected)
    assert from_tensor_cores(model) == packing.packed and same_state(model, as_packed)
    to_tensor_cores(model)
    with seen_dense(model):
        assert found_report(model) == report
    assert unpack_model(model) == packing.packed and same_state(model, before)


def test_a_layer_is_held_once_copied_cast_and_moved():
    model, _, packing = packed()
    size = sum(buffer.nbytes for buffer in model.buffers())
    to_tensor_cores(model)
    layer = model.get_submodule(packing.packed[0])
    assert isinstance(layer, TensorCoreLinear) and "2:4, bits=16" in repr(layer) and not list(layer.parameters())
    assert [name for name, _ in layer.named_buffers()] == ["groups"] and size
    weight = layer.weight
    again = copy.deepcopy(layer).half()
    assert torch.equal(again.weight, weight) and again(torch.ones(1, layer.in_features).half()).dtype == torch.float16


@pytest.mark.parametrize("pattern, dtype", [("row", torch.bfloat16), ("2:4", torch.float32)])
def test_what_has_no_such_form_stays_packed(pattern, dtype):
    model, _, packing = packed(pattern, dtype)
    assert to_tensor_cores(model) == () and packed_layers(model) == packing.packed


@pytest.mark.parametrize("bits", [8, 4])
def test_whole_numbers_keep_their_scales_and_the_bias_stays(bits):
    bias = torch.nn.Parameter(torch.randn(24).half().float())
    layer = PackedLinear(whole_numbers(24, 128, bits, 0), bias)
    model = torch.nn.Sequential(layer)
    inputs = torch.randn(3, 128)
    expected = model(inputs)
    assert to_tensor_cores(model) == ("0",) and model[0].bias is bias
    torch.testing.assert_close(model.half().float()(inputs), expected)
    assert torch.equal(model[0].matrix.scales, layer.matrix.scales)
    assert model[0].shell().weight.dtype == torch.float32


def test_it_is_saved_and_its_bytes_are_counted_as_those_of_a_packed_model(tmp_path):
    pruner = DSAPruner(tiny_llama().bfloat16())
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform", pattern="2:4"))
    before = state(pruner.model)
    pruner.pack()
    pruner.save_pretrained(tmp_path / "packed")
    assert to_tensor_cores(pruner.model)
    layers = [layer for layer in pruner.model.modules() if isinstance(layer, TensorCoreLinear)]
    assert packed_bytes(pruner.model) == sum(layer.two_of_four.nbytes for layer in layers)
    pruner.save_pretrained(tmp_path / "cores")
    files = [[path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")] for name in ("packed", "cores")]
    assert files[0] and files[0] == files[1]
    pruner.unpack()
    assert same_state(pruner.model, before)


@pytest.mark.parametrize("stored", [False, True])
def test_where_a_gpu_has_kernels_a_packed_model_is_held_so_at_once(stored, monkeypatch, tmp_path):
    """A CPU stands for the GPU: who packs, and who loads packed, asks whether kernels are there."""
    pruner = DSAPruner(tiny_llama().bfloat16())
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform", pattern="2:4"))
    before = state(pruner.model)
    if stored:
        pruner.save_pretrained(tmp_path, encoding="packed")
    monkeypatch.setattr(tensor_cores, "kernels", lambda device: device.type == "cpu" or None)
    if stored:
        pruner = DSAPruner.from_pretrained(tmp_path)
    else:
        assert pruner.pack().packed
    kinds = {type(pruner.model.get_submodule(name)) for name in packed_layers(pruner.model)}
    assert kinds == {TensorCoreLinear}
    monkeypatch.undo()
    assert pruner.verify().holds and pruner.unpack() and same_state(pruner.model, before)
    pruner.pack()
    assert {type(pruner.model.get_submodule(name)) for name in packed_layers(pruner.model)} == {PackedLinear}


@pytest.mark.parametrize(
    "inputs", [torch.ones(2, 16), torch.ones(2, 400), torch.ones(()), torch.ones(2, 32, dtype=torch.int64)]
)
def test_an_input_of_another_width_or_of_whole_numbers_is_refused(inputs):
    model, *_ = packed()
    name = to_tensor_cores(model)[0]
    with pytest.raises(ValueError, match="The input of a packed matrix of .* x 32 is .* of a floating type, got"):
        model.get_submodule(name)(inputs)


def test_a_state_dict_says_whether_zeros_were_kept():
    """Of every four weights one matrix keeps two, and the other one, beside which a place is filled with a zero."""
    layers = []
    for kept in (2, 1):
        mask = torch.zeros(16, 32, dtype=torch.bool)
        mask[:, ::4] = True
        mask[:, 1::4] = kept == 2
        weight = torch.where(mask, torch.ones(()), 0.0).bfloat16()
        matrix = PackedMatrix.of(weight)
        layers.append(TensorCoreLinear(PackedLinear(matrix)))
    for one, other in (layers, layers[::-1]):
        taken = copy.deepcopy(one)
        taken.load_state_dict(other.state_dict())
        assert same_matrix(taken.matrix, other.matrix) and not same_matrix(one.matrix, other.matrix)


def same_matrix(one, other):
    return torch.equal(one.mask, other.mask) and torch.equal(one.values, other.values)
