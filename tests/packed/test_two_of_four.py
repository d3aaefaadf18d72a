"""Two of four in a tensor core's order is the matrix that it was made of, place by place and bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_dsa.packed.matrix import PackedMatrix, packed_bits, row_starts
from optimum_dsa.packed.two_of_four import TwoOfFour, has_form


def two_of_four(rows, columns, seed=0, share=1.0):
    """Random weights, bfloat16, of which two of four are kept, or `share` of these; the first row keeps none."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns // 4, 4, generator=generator)
    keep = torch.zeros_like(weight, dtype=torch.bool)
    keep.scatter_(2, torch.rand(weight.shape, generator=generator).topk(2, dim=2).indices, True)
    keep &= torch.rand(weight.shape, generator=generator) < share
    if share < 1:
        keep[0] = False
    return weight.masked_fill(~keep, 0).view(rows, columns).bfloat16()


def whole_numbers(rows, columns, bits, group, seed=0, share=1.0):
    """The same of 8 or 4 bits, packed, with a scale per `group` columns."""
    generator = torch.Generator().manual_seed(seed)
    keep = two_of_four(rows, columns, seed, share) != 0
    limit = 1 << bits - 1
    numbers = torch.randint(-limit, limit, (rows, columns), generator=generator, dtype=torch.int8)
    numbers[numbers == 0] = 1
    scales = (torch.rand(rows, -(-columns // group) if group else 1, generator=generator) + 0.1).bfloat16().float()
    mask, values = packed_bits(keep), numbers[keep]
    starts = row_starts(mask, (rows, columns), even=bits == 4)
    if bits == 4:
        wide = torch.zeros(int(starts[-1]), dtype=torch.int8)
        first = torch.arange(columns) < keep.sum(1)[:, None]
        wide[(starts[:-1, None] + torch.arange(columns))[first]] = values
        both = wide.view(torch.uint8).view(-1, 2) & 15
        values = both[:, 0] | both[:, 1] << 4
    return PackedMatrix(mask, values, starts, (rows, columns), scales, group)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.integers(1, 140), st.integers(0, 99), st.sampled_from((1.0, 0.6)))
def test_it_is_the_packed_matrix_bit_for_bit(rows, fours, seed, share):
    dense = two_of_four(rows, 4 * fours, seed, share)
    packed = PackedMatrix.of(dense)
    assert has_form(packed)
    made = TwoOfFour.of(packed)
    assert made.full == (share == 1.0) or rows == 1
    assert torch.equal(made.dense(), dense)
    assert all(torch.equal(one, other) for one, other in zip(made.matrix().parts[:3], packed.parts[:3]))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 80),
    st.integers(1, 140),
    st.integers(0, 99),
    st.sampled_from((1.0, 0.6)),
    st.sampled_from(((8, 0), (4, 0), (4, 128), (4, 256))),
)
def test_whole_numbers_and_their_scales_come_back(rows, fours, seed, share, kind):
    packed = whole_numbers(rows, 4 * fours, *kind, seed, share)
    made = TwoOfFour.of(packed)
    torch.testing.assert_close(made.dense(torch.float32), packed.dense(), rtol=1e-6, atol=0)
    again = made.matrix()
    assert all(torch.equal(one, other) for one, other in zip(again.parts[:4], packed.parts[:4]))
    assert again.group == packed.group and again.shape == packed.shape


def test_a_weight_lies_where_the_instruction_takes_it():
    """By the words of the instruction alone: of one weight, lane, register, half of it, and the bits of its place."""
    for row, column in ((0, 0), (9, 37), (20, 255), (31, 300), (8, 491)):
        dense = torch.zeros(32, 512, dtype=torch.bfloat16)
        dense[row, column] = 3.0
        group = TwoOfFour.of(PackedMatrix.of(dense)).groups[row // 16, column // 256]
        instruction, within = column % 256 // 32, column % 32
        four = 2 * (within // 4 % 4) + within // 16  # of the instruction: columns are permuted by whole fours
        g, low = row % 8, row % 16 // 8
        values = (
            group[:4096].view(torch.bfloat16).view(8, 32, 4, 2)[instruction, 4 * g + four % 4, low + 2 * (four // 4)]
        )
        words = group[4096:].view(torch.int32).view(32, 4)
        word = int(words[4 * g + 2 * (instruction % 2) + four // 4, instruction // 2])
        two = word >> (16 * low + 4 * (four % 4)) & 15
        places = (two & 3, two >> 2)
        assert places[0] < places[1] and column % 4 in places
        assert values[places.index(column % 4)] == 3.0 and values.float().sum() == 3.0


@pytest.mark.parametrize("bits, per_weight", [(16, 1.125), (8, 0.625), (4, 0.390625)])
def test_bytes_of_a_weight(bits, per_weight):
    packed = PackedMatrix.of(two_of_four(32, 512)) if bits == 16 else whole_numbers(32, 512, bits, 0)
    assert TwoOfFour.of(packed).groups.nbytes == per_weight * 32 * 512


def test_a_kept_zero_stays_where_every_four_keeps_two():
    packed = whole_numbers(16, 256, 8, 0)
    packed.values[5] = 0
    assert torch.equal(TwoOfFour.of(packed).matrix().mask, packed.mask)


def test_what_has_no_such_form_is_told():
    three = torch.zeros(4, 8, dtype=torch.bfloat16)
    three[2, 4:7] = 1
    assert not has_form(PackedMatrix.of(three))
    with pytest.raises(ValueError, match="more than two weights"):
        TwoOfFour.of(PackedMatrix.of(three))
    for other in (torch.ones(2, 6).bfloat16(), two_of_four(4, 8).float()):
        with pytest.raises(ValueError, match="no form of two of four"):
            TwoOfFour.of(PackedMatrix.of(other))
    with pytest.raises(ValueError, match="no form of two of four"):
        TwoOfFour.of(whole_numbers(4, 128, 8, 64))
    fine = whole_numbers(4, 128, 4, 0)
    fine.scales[1] = 1.0001
    with pytest.raises(ValueError, match="one of bfloat16"):
        TwoOfFour.of(fine)
    assert not has_form(PackedMatrix.of(torch.ones(2, 6)))


def test_the_operator_is_what_tracing_expects_and_has_the_gradient_of_the_dense_matrix():
    dense = two_of_four(300, 260, share=0.7)
    made = TwoOfFour.of(PackedMatrix.of(dense))
    inputs = torch.randn(2, 3, 260, requires_grad=True)
    torch.library.opcheck(torch.ops.optimum_dsa.linear_24, (inputs, made.groups, None, 300))
    (made.linear(inputs) ** 2).sum().backward()
    other = inputs.detach().requires_grad_()
    (torch.nn.functional.linear(other, dense.float()) ** 2).sum().backward()
    torch.testing.assert_close(inputs.grad, other.grad, rtol=1e-4, atol=1e-4)
