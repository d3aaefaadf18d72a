"""A packed matrix is the matrix it was made of, and its product is that matrix's product."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from optimum_dsa.packed.bitmask import pack
from optimum_dsa.packed.grid import to_grid
from optimum_dsa.packed.matrix import PackedMatrix, packed_bits, row_starts


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def sparse(rows, columns, seed, dtype=torch.float32, share=0.6):
    """Random weights; with more than two rows the first keeps nothing and the last everything."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(rows, columns, generator=generator) > share
    if rows > 2:
        keep[0], keep[-1] = False, True
    return (torch.randn(rows, columns, generator=generator).clamp_min(-3) * keep).to(dtype)


def whole(rows, columns, seed, bits, group):
    """A packed matrix of whole numbers, and what it stands for, (rows, columns) float32."""
    generator = torch.Generator().manual_seed(seed)
    keep = sparse(rows, columns, seed) != 0
    numbers = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8) * keep
    scales = torch.rand(rows, -(-columns // group) if group else 1, generator=generator) + 0.1
    mask = packed_bits(keep)
    starts = row_starts(mask, (rows, columns), even=bits == 4)
    values = torch.zeros(int(starts[-1]), dtype=torch.int8)
    for row, start in enumerate(starts[:-1].tolist()):
        kept = numbers[row][keep[row]]
        values[start : start + len(kept)] = kept
    if bits == 4:
        both = (values.view(torch.uint8) & 15).view(-1, 2)
        values = both[:, 0] | both[:, 1] << 4
    expected = numbers.float() * scales.repeat_interleave(group or columns, 1)[:, :columns]
    return PackedMatrix(mask, values, starts, (rows, columns), scales, group), expected


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 80), st.integers(0, 99), st.sampled_from(FLOATS))
def test_it_is_what_it_was_bit_for_bit(rows, columns, seed, dtype):
    dense = sparse(rows, columns, seed, dtype)
    packed = PackedMatrix.of(dense)
    assert torch.equal(packed.dense(), dense)
    inputs = torch.randn(2, 3, columns).to(dtype)
    torch.testing.assert_close(packed.linear(inputs), torch.nn.functional.linear(inputs, dense))
    if (stored := pack(dense)) is not None:
        again = PackedMatrix.from_bytes(stored)
        assert all(torch.equal(one, other) for one, other in zip(again.parts[:3], packed.parts[:3]))
        assert again.mask.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 270), st.integers(1, 80), st.integers(0, 99), st.sampled_from((4, 8)), st.sampled_from((0, 8, 32))
)
def test_whole_numbers_are_multiplied_with_their_scales(rows, columns, seed, bits, group):
    packed, expected = whole(rows, columns, seed, bits, group)
    torch.testing.assert_close(packed.dense(), expected)
    inputs = torch.randn(3, columns)
    torch.testing.assert_close(packed.linear(inputs), inputs @ expected.t(), rtol=1e-4, atol=1e-4)


def test_the_gradient_of_the_input_is_that_of_the_dense_matrix():
    dense = sparse(600, 40, 0)
    inputs = torch.randn(4, 40, requires_grad=True)
    (PackedMatrix.of(dense).linear(inputs) ** 2).sum().backward()
    other = inputs.detach().requires_grad_()
    (torch.nn.functional.linear(other, dense) ** 2).sum().backward()
    torch.testing.assert_close(inputs.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_the_operators_are_what_tracing_and_compiling_expect():
    packed = PackedMatrix.of(sparse(20, 40, 1))
    inputs = torch.randn(2, 40, requires_grad=True)
    torch.library.opcheck(torch.ops.optimum_dsa.linear, (inputs, *packed.parts))
    torch.library.opcheck(torch.ops.optimum_dsa.dense_rows, (*packed.parts, 40, 3, 17, torch.float32))


def test_operations_are_counted_for_the_weights_that_are_kept():
    dense = sparse(20, 40, 1).abs()
    with FlopCounterMode(display=False) as counter:
        PackedMatrix.of(dense).linear(torch.randn(3, 7, 40))
    assert counter.get_total_flops() == 2 * 21 * int(dense.count_nonzero())


def test_an_empty_batch_has_an_empty_product():
    assert PackedMatrix.of(sparse(20, 40, 1)).linear(torch.zeros(0, 40)).shape == (0, 20)


def test_parts_that_do_not_fit_are_refused():
    good, _ = whole(6, 24, 0, 8, 8)
    mask, values, starts, scales, group = good.parts
    for wrong in (
        (mask[:-1], values, starts, scales, group),
        (mask, values[:-1], starts, scales, group),
        (mask, values, starts + 1, scales, group),
        (mask, values, starts.flip(0), scales, group),
        (mask.bitwise_not(), values, starts, scales, group),
        (mask, values, starts, None, group),
        (mask, values, starts, scales[:, :1], group),
        (mask, values.float(), starts, scales, group),
    ):
        with pytest.raises(ValueError, match="6 x 24"):
            PackedMatrix(wrong[0], wrong[1], wrong[2], (6, 24), *wrong[3:])
    odd = PackedMatrix.of(sparse(3, 5, 0))
    odd.mask[-1] |= 128
    with pytest.raises(ValueError, match="3 x 5 weights has bits behind its last"):
        PackedMatrix(*odd.parts[:3], odd.shape)
    with pytest.raises(ValueError, match="is no packed matrix"):
        PackedMatrix.from_bytes(torch.zeros(100, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits,group", [(8, 0), (8, 32), (4, 32), (4, 64)])
def test_what_lies_on_a_grid_is_whole_numbers_and_bit_for_bit_what_it_was(bits, group, dtype):
    dense = to_grid(sparse(40, 96, 1), bits, group).weights(dtype)
    found = PackedMatrix.smallest(dense)
    assert found.values.dtype == (torch.int8 if bits == 8 else torch.uint8) and found.group == group
    assert torch.equal(found.dense(dtype), dense) and found.nbytes < PackedMatrix.of(dense).nbytes


def test_what_lies_on_none_or_keeps_too_few_is_floats():
    few = torch.zeros(64, 512, dtype=torch.bfloat16)
    few[:, 7] = 0.5
    for dense in (sparse(40, 90, 0), few, torch.zeros(3, 16), torch.zeros(0, 16)):
        found = PackedMatrix.smallest(dense)
        assert found.scales is None and torch.equal(found.dense(), dense)
