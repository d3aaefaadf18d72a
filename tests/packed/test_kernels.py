"""Every kernel that this processor can run multiplies and unpacks as the reference in PyTorch does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_dsa.packed import loading
from optimum_dsa.packed.matrix import PackedMatrix

from .test_matrix import FLOATS, sparse, whole


BITS = (8, 4)
DENSE, LINEAR = torch.ops.optimum_dsa.dense_rows, torch.ops.optimum_dsa.linear
DENSE_REFERENCE = torch.ops.optimum_dsa.dense_rows_reference


def matrices(rows, columns, seed=0):
    """A packed matrix of every kind and what it stands for: (rows, columns)."""
    for dtype in FLOATS:
        dense = sparse(rows, columns, seed, dtype)
        yield PackedMatrix.of(dense), dense
    for bits in BITS:
        for group in (0, 8, 24, 32, 64, 96, 128):
            yield whole(rows, columns, seed, bits, group)


def check_product(packed, dense, inputs):
    """Within 2⁻⁸ of the product in float64, of whole numbers 2⁻⁷; each number within 2⁻⁷ of the sum of what is summed.

    A tile of whole numbers times scales is rounded to bfloat16, and so is the product.
    """
    output = LINEAR(inputs, *packed.parts)
    assert output.dtype == inputs.dtype and output.shape == (*inputs.shape[:-1], len(dense))
    exact = inputs.double() @ dense.double().t()
    size = inputs.double().abs().amax(-1, keepdim=True) * dense.double().abs().sum(1)
    assert ((output.double() - exact).abs() <= 2**-7 * size).all()
    most = 2**-8 if packed.scales is None else 2**-7
    if exact.norm():
        assert (output.double() - exact).norm() <= most * torch.maximum(exact.norm(), size.norm() / 16)


@pytest.mark.parametrize("columns", [8, 40, 64, 200, 576])
def test_unpacked_rows_are_those_of_the_reference_bit_for_bit(name, columns):
    for packed, _ in matrices(37, columns):
        for dtype in FLOATS:
            expected = DENSE_REFERENCE(*packed.parts, columns, 0, 37, dtype)
            for first, last in ((0, 37), (5, 23), (36, 37), (7, 7)):
                assert torch.equal(DENSE(*packed.parts, columns, first, last, dtype), expected[first:last])


@pytest.mark.parametrize("columns", [8, 40, 64, 200, 576])
def test_products_are_those_of_the_dense_matrix(name, columns):
    for packed, dense in matrices(37, columns):
        for dtype in FLOATS:
            for batch in (0, 1, 2, 3, 4, 5, 7, 8, 9, 64):
                check_product(packed, dense, torch.randn(batch, columns).to(dtype))


@pytest.mark.parametrize("batch", [1, 20])
def test_an_input_of_another_width_is_read_by_none(name, batch):
    for packed, _ in matrices(37, 64):
        for width in (8, 56, 72, 4096):
            with pytest.raises((ValueError, RuntimeError)):  # what PyTorch raises, or that through the kernels
                LINEAR(torch.ones(batch, width), *packed.parts)


@pytest.mark.parametrize("columns", [8, 40, 200])
def test_experts_are_multiplied_with_as_each_alone(name, columns):
    """Of three experts of 24 rows, one of which nobody asks, one once, one by more vectors than a kernel takes."""
    chosen = torch.tensor([2] * 9 + [0])
    inputs = torch.randn(10, columns)
    for packed, dense in matrices(72, columns):
        found = torch.ops.optimum_dsa.linear_experts(inputs, chosen, *packed.parts, 24)
        expected = torch.stack([dense.view(3, 24, columns)[e].double() @ x.double() for e, x in zip(chosen, inputs)])
        assert (found.double() - expected).norm() <= 2**-7 * expected.norm()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 90),
    width=st.integers(1, 40),
    seed=st.integers(0, 99),
    batch=st.integers(0, 9),
    dtype=st.sampled_from(FLOATS),
    share=st.sampled_from((0.0, 0.5, 0.95, 1.0)),
    short=st.integers(0, 7),
)
def test_any_shape_and_mask(kernels, rows, width, seed, batch, dtype, share, short):
    """Also widths that no kernel takes, which go to the reference."""
    columns = max(8 * width - short, 1)
    dense = sparse(rows, columns, seed, dtype, share)
    packed = PackedMatrix.of(dense)
    inputs = torch.randn(batch, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    for one in (*kernels.runnable, "reference"):
        loading.use(one)
        check_product(packed, dense, inputs)
        assert torch.equal(packed.dense(), dense)


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_are_shared_among_threads(name, threads):
    dense = sparse(700, 256, 3, torch.bfloat16)
    dense[:300] = 0  # parts of equal values are not parts of equal rows
    packed = PackedMatrix.of(dense)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for batch in (1, 8, 16):
            check_product(packed, dense, torch.randn(batch, 256).bfloat16())
        assert torch.equal(packed.dense(), dense)
    finally:
        torch.set_num_threads(before)


def test_values_keep_their_bits_and_a_nan_is_none_but_in_its_row(name):
    dense = sparse(8, 64, 0, torch.bfloat16)
    dense[3, 5], dense[4, 6], dense[5, 0] = float("nan"), float("inf"), -0.0
    packed = PackedMatrix.of(dense)
    assert torch.equal(packed.dense().view(torch.int16), dense.view(torch.int16))
    output = LINEAR(torch.ones(1, 64, dtype=torch.bfloat16), *packed.parts)
    assert output.isfinite()[0].tolist() == [True, True, True, False, False, True, True, True]


def test_large_inputs_beside_small_ones(name):
    """One input a thousand times as large as the others, where its weight is gone, does not drown them."""
    for bits in BITS:
        packed, dense = whole(64, 1024, 0, bits, 128)
        inputs = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0))
        inputs[:, 17] = 2000
        exact = inputs.double() @ dense.double().t()
        gone = dense[:, 17] == 0
        error = (LINEAR(inputs, *packed.parts).double() - exact)[:, gone]
        assert error.norm() <= 2**-6 * exact[:, gone].norm()


def test_tensors_with_gaps_are_taken(name):
    packed, dense = next(matrices(20, 64))
    check_product(packed, dense, torch.randn(64, 3).t())
    wide = torch.stack([packed.mask, packed.mask], 1)
    output = LINEAR(torch.ones(2, 64), wide[:, 0], *packed.parts[1:])
    torch.testing.assert_close(output, LINEAR(torch.ones(2, 64), *packed.parts))


def test_more_dimensions_and_gradients(name):
    dense = sparse(40, 64, 1)
    inputs = torch.randn(2, 3, 64, requires_grad=True)
    (PackedMatrix.of(dense).linear(inputs) ** 2).sum().backward()
    other = inputs.detach().requires_grad_()
    (torch.nn.functional.linear(other, dense) ** 2).sum().backward()
    torch.testing.assert_close(inputs.grad, other.grad, rtol=1e-4, atol=1e-4)
