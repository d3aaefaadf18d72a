"""What lies on a grid is stored in few bits, bit for bit; what does not is stored as it was before."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_dsa.packed import bitmask
from optimum_dsa.packed.grid import to_grid
from optimum_dsa.packed.matrix import PackedMatrix
from optimum_dsa.packed.quantised import LARGEST, pack, read_header, unpack
from optimum_dsa.packed.whole import WholeHeader

from .test_matrix import FLOATS, sparse


def on_grid(shape, bits, group=0, dtype=torch.float32, seed=0):
    """Random weights of this shape whose last dimension lies on a grid."""
    rows = sparse(int(torch.tensor(shape[:-1]).prod()), shape[-1], seed)
    return to_grid(rows, bits, group).weights(dtype).view(shape)


def header_of(stored):
    return read_header(stored[:LARGEST].numpy().tobytes(), len(stored))


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=2, max_size=4),
    *(st.sampled_from((4, 8)), st.sampled_from((0, 32)), st.sampled_from(FLOATS), st.integers(0, 99), st.booleans()),
)
def test_what_is_unpacked_is_what_was_packed(shape, bits, group, dtype, seed, exchanged):
    tensor = on_grid(shape, bits, group, dtype, seed)
    tensor = tensor.mT.contiguous() if exchanged else tensor
    stored = pack(tensor)
    if stored is None:
        assert tensor.numel() < 200 or int((tensor != 0).sum()) > tensor.numel() // 2
        return
    assert len(stored) < tensor.nbytes and len(stored) % 8 == 0
    again, plain = unpack(stored), bitmask.pack(tensor)
    assert again.dtype == dtype and again.is_contiguous() and torch.equal(again, tensor)
    assert plain is None or len(stored) <= len(plain)
    assert (header_of(stored).shape, header_of(stored).size) == (tuple(tensor.shape), tensor.numel())


@pytest.mark.parametrize("bits,group,most", [(8, 0, 4.4), (8, 128, 4.5), (4, 128, 2.9), (4, 64, 3.0), (4, 32, 3.3)])
def test_a_weight_takes_the_bits_that_are_promised(bits, group, most):
    stored = pack(on_grid((256, 768), bits, group, torch.bfloat16))
    assert header_of(stored).bits == bits and header_of(stored).group == group
    assert 8 * len(stored) / (256 * 768) < most


def test_what_lies_on_no_grid_is_stored_without_its_zeros():
    for tensor in (sparse(40, 90, 0), sparse(40, 90, 0, torch.bfloat16).view(4, 10, 90), torch.zeros(300)):
        assert torch.equal(pack(tensor), bitmask.pack(tensor)) and torch.equal(unpack(pack(tensor)), tensor)
        assert isinstance(header_of(pack(tensor)), bitmask.Header)
    assert pack(torch.rand(40, 90)) is None and pack(torch.tensor(1.0)) is None and pack(torch.zeros(0, 4)) is None
    assert pack(torch.ones(8, 8, dtype=torch.int8)) is None


def test_of_few_weights_the_values_take_less_than_scales():
    tensor = torch.zeros(512, 512)
    tensor[::100, ::100] = 0.5
    assert torch.equal(pack(tensor), bitmask.pack(tensor))


def test_damage_is_refused_by_name():
    good = pack(on_grid((32, 65), 4))
    flipped = good.clone()
    flipped[header_of(good).mask.start] ^= 1
    with pytest.raises(ValueError, match="w is damaged.*keeps"):
        unpack(flipped, "w")
    behind = good.clone()
    behind = pack(on_grid((5, 67), 4))
    behind[header_of(behind).mask.stop - 1] |= 0x80
    with pytest.raises(ValueError, match="w is damaged"):
        unpack(behind, "w")
    with pytest.raises(ValueError, match="is no packed tensor"):
        unpack(torch.zeros(200, dtype=torch.uint8))
    assert read_header(bytes(200), 200) is None and isinstance(header_of(good), WholeHeader)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_stored_matrix_runs_as_it_is(bits):
    tensor = on_grid((40, 96), bits, 32)
    stored = pack(tensor)
    matrix = PackedMatrix.from_bytes(stored)
    assert torch.equal(matrix.dense(), tensor) and matrix.group == 32
    for part in (matrix.mask, matrix.values):
        assert part.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()
    assert torch.equal(matrix.to_bytes(torch.float32), stored)
    inputs = torch.randn(3, 96)
    torch.testing.assert_close(matrix.linear(inputs), inputs @ tensor.t(), rtol=1e-4, atol=1e-4)
    experts = on_grid((3, 40, 96), bits)
    assert torch.equal(PackedMatrix.from_bytes(pack(experts)).dense(), experts.flatten(0, 1))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_dense_matrix_becomes_the_nearest_and_one_on_a_grid_stays(bits):
    dense = sparse(50, 96, 3) * torch.linspace(0.5, 2, 96)
    matrix = PackedMatrix.quantised(dense, bits, 32)
    assert torch.equal(matrix.dense(), to_grid(dense, bits, 32).weights())
    assert matrix.values.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert torch.equal(matrix.dense() != 0, dense != 0)
    again = PackedMatrix.quantised(matrix.dense(), bits, 0)
    assert again.group == 32 and torch.equal(again.dense(), matrix.dense())
    plain = PackedMatrix.quantised(dense, bits, 32, "absmax")
    assert (plain.dense() - dense).norm() >= (matrix.dense() - dense).norm()


def test_scales_of_more_digits_are_kept():
    matrix = PackedMatrix.quantised(sparse(20, 40, 0), 8)
    odd = PackedMatrix(*matrix.parts[:3], matrix.shape, matrix.scales * 1.0001)
    assert torch.equal(PackedMatrix.from_bytes(odd.to_bytes()).dense(), odd.dense())
