"""Numbers in int32, as compressed-tensors packs them."""

import pytest
import torch

from optimum_dsa.checkpoint.integers_format import pack_numbers, unpack_numbers


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [32, 33, 7])
def test_numbers_come_out_again_and_are_packed_as_theirs(bits, columns):
    theirs = pytest.importorskip("compressed_tensors").compressors
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    numbers = torch.randint(low, high, (5, columns), dtype=torch.int8)
    numbers[0, :2] = torch.tensor([low, high - 1])
    packed = pack_numbers(numbers, bits)
    assert torch.equal(unpack_numbers(packed, bits, (5, columns)), numbers)
    assert torch.equal(
        theirs.pack_quantized.helpers.unpack_from_int32(packed, bits, torch.Size((5, columns))), numbers
    )


def test_as_many_as_there_are():
    with pytest.raises(ValueError, match="hold no 2 times 9 numbers of 4 bits"):
        unpack_numbers(torch.zeros(2, 1, dtype=torch.int32), 4, (2, 9))
