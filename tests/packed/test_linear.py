"""A packed layer is the layer that it stands for, wherever a model takes it."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_dsa.packed.linear import PARTS, PackedLinear
from optimum_dsa.packed.matrix import PackedMatrix

from .test_matrix import sparse, whole


def layer(kind="linear", bias=True, dtype=torch.float32, seed=0):
    """A layer of 40 inputs and 24 outputs whose weight is sparse."""
    made = Conv1D(24, 40) if kind == "conv1d" else nn.Linear(40, 24, bias=bias)
    weight = sparse(24, 40, seed)
    made.weight = nn.Parameter(weight.t().contiguous() if kind == "conv1d" else weight)
    return made.to(dtype)


def quantised(seed=0, bits=8):
    return PackedLinear(whole(24, 40, seed, bits, 8)[0], nn.Parameter(torch.randn(24)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind,bias", [("linear", True), ("linear", False), ("conv1d", True)])
def test_it_multiplies_as_the_layer_and_becomes_it_again(kind, bias, dtype):
    dense = layer(kind, bias, dtype)
    packed = PackedLinear.of(dense)
    inputs = torch.randn(2, 3, 40, dtype=dtype)
    torch.testing.assert_close(packed(inputs), dense(inputs), rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=2e-2)
    again = packed.layer()
    assert type(again) is type(dense) and again.bias is dense.bias
    assert torch.equal(again.weight, dense.weight) and again.weight.is_contiguous() and again.weight.requires_grad
    assert torch.equal(packed.weight, dense.weight) and packed.shell().weight.shape == dense.weight.shape


def test_a_cast_leaves_masks_starts_and_scales_alone():
    packed, exact = PackedLinear.of(layer()), quantised()
    parts, scales, group = {n: getattr(packed, n) for n in PARTS}, exact.scales.clone(), exact.group
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for each in (packed, exact):
            each.to(dtype)
        assert packed.values.dtype == dtype and packed.bias.dtype == dtype and packed.matrix.dense().dtype == dtype
        assert torch.equal(packed.mask, parts["mask"]) and torch.equal(packed.starts, parts["starts"])
        assert exact.values.dtype == torch.int8 and torch.equal(exact.scales, scales) and exact.group == group
    assert torch.equal(exact.matrix.dense(), whole(24, 40, 0, 8, 8)[0].dense())


@pytest.mark.parametrize("make", [lambda seed: PackedLinear.of(layer(seed=seed)), quantised], ids=["float", "int8"])
def test_a_state_dict_brings_another_matrix_with_other_zeros(make):
    one, other = make(0), make(1)
    assert one.values.shape != other.values.shape
    one.load_state_dict(other.state_dict())
    assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)
    inputs = torch.randn(3, 40)
    assert torch.equal(one(inputs), other(inputs)) and torch.equal(copy.deepcopy(one)(inputs), other(inputs))


@pytest.mark.parametrize("make", [lambda: PackedLinear.of(layer()), quantised, lambda: quantised(bits=4)])
@pytest.mark.parametrize(
    "inputs",
    [
        torch.ones(1, 8),
        torch.ones(2, 48),
        torch.ones(20, 32),
        torch.ones(1, 320),
        torch.ones(()),
        torch.ones(40).long(),
    ],
)
def test_an_input_of_another_width_or_of_whole_numbers_is_refused(make, inputs):
    with pytest.raises(ValueError, match="The input of a packed matrix of 24 x 40 is .* floating type, got"):
        make()(inputs)


@pytest.mark.parametrize("make", [lambda: PackedLinear.of(layer()), quantised])
def test_within_autocast_it_computes_in_its_type_as_a_dense_layer_does(make):
    made, inputs = make(), torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, dense = made(inputs), made.layer()(inputs)
    assert found.dtype == dense.dtype == torch.bfloat16 != made(inputs).dtype
    torch.testing.assert_close(found, dense, rtol=2e-2, atol=2e-2)


def test_parts_that_do_not_fit_are_refused_before_one_is_taken():
    one, other = PackedLinear.of(layer()), PackedLinear.of(layer(seed=1))
    before = copy.deepcopy(one.state_dict())
    for state in (
        {**other.state_dict(), "mask": other.mask.bitwise_not()},
        {**other.state_dict(), "starts": other.starts + 1},
        {**other.state_dict(), "values": other.values[:-1]},
        {"mask": other.mask},
        quantised().state_dict(),
    ):
        with pytest.raises(ValueError, match="packed layer"):
            one.load_state_dict(state, strict=False)
        assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())
    with pytest.raises(ValueError, match="holds torch.int8, and the state dict torch.uint8"):
        quantised().load_state_dict(quantised(bits=4).state_dict())


def test_on_the_device_without_data_it_has_shapes():
    packed = PackedLinear.of(layer()).to("meta")
    assert packed(torch.empty(2, 5, 40, device="meta")).shape == (2, 5, 24)
    packed.load_state_dict(PackedLinear.of(layer()).state_dict(), assign=True)
    assert torch.equal(packed.weight, layer().weight)


def test_it_compiles_whole_and_gives_gradients_to_what_is_before_and_beside_it():
    packed = PackedLinear.of(layer())
    compiled = torch.compile(packed, fullgraph=True, backend="eager")
    inputs = torch.randn(4, 40, requires_grad=True)
    compiled(inputs).sum().backward()
    torch.testing.assert_close(inputs.grad, layer().weight.sum(0).expand(4, 40))
    torch.testing.assert_close(packed.bias.grad, torch.full((24,), 4.0))
    assert [name for name, _ in packed.named_parameters()] == ["bias"]


def test_it_says_what_it_holds():
    assert "in_features=40, out_features=24, values=float32, kept=0.6" in repr(PackedLinear.of(layer()))
    half = PackedLinear(PackedMatrix.of(layer().weight), None)
    assert "bias=False" in repr(half) and half(torch.zeros(0, 40)).shape == (0, 24)
