"""A header of whole numbers says where its parts lie, and is refused where they cannot be what it says."""

import pytest
import torch

from optimum_dsa.packed.grid import Grid, to_grid
from optimum_dsa.packed.matrix import PackedMatrix
from optimum_dsa.packed.whole import LARGEST, MAGIC, read_whole

from .test_matrix import sparse


def packed(rows=30, columns=70, bits=4, group=32, **options):
    return PackedMatrix.of_grid(to_grid(sparse(rows, columns, 0), bits, group), bits).to_bytes(**options)


def header_of(stored):
    return read_whole(stored.numpy().tobytes(), len(stored), "w")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [0, 32])
def test_the_parts_lie_where_the_table_says(bits, group):
    stored = packed(bits=bits, group=group, dtype=torch.float16)
    header, kept = header_of(stored), int((sparse(30, 70, 0) != 0).sum())
    assert (header.dtype, header.shape, header.kept, header.size) == (torch.float16, (30, 70), kept, 2100)
    assert (header.bits, header.group, header.scale_dtype, header.exchanged) == (bits, group, torch.bfloat16, False)
    assert header.scales_shape == (30, 3 if group else 1) and header.matrix == (30, 70)
    assert header.mask == slice(88, 88 + 263) and header.values.start == 352
    assert header.places == (kept if bits == 8 else sum(-(-int(row.sum()) // 2) for row in sparse(30, 70, 0) != 0))
    assert header.scales.stop - header.scales.start == 2 * 30 * (3 if group else 1)
    assert header.bytes == len(stored) and len(stored) % 8 == 0
    assert stored[:8].view(torch.int64).item() == MAGIC and read_whole(stored[:64].numpy().tobytes(), 64) is None


def test_a_stack_has_the_rows_of_all_and_exchanged_ones_have_its_columns():
    header = header_of(packed(30, 70, dtype=torch.float32, shape=(5, 6, 70)))
    assert header.matrix == (30, 70) and header.shape == (5, 6, 70)
    header = header_of(packed(30, 70, shape=(3, 70, 10), exchanged=True))
    assert header.matrix == (30, 70) and header.exchanged and header.size == 2100


@pytest.mark.parametrize(
    "place,value",
    [
        *(
            (1, 99),
            (1, -1),
            (2, -1),
            (2, 10**9),
            (3, 0),
            (3, 1),
            (3, 99),
            (4, 5),
            (4, -8),
            (5, -1),
            (5, 1),
            (5, 2**62),
        ),
        *((6, -1), (6, 1), (6, 2**62), (7, 99), (7, -1), (8, 2), (8, -1), (9, 2**40), (9, -30), (10, 2**62), (10, 71)),
    ],
)
def test_damage_is_refused_by_name_before_memory_is_taken(place, value):
    stored = packed()
    assert header_of(stored) is not None
    stored[: 8 * 11].view(torch.int64)[place] = value
    with pytest.raises(ValueError, match="w is damaged"):
        header_of(stored)
    with pytest.raises(ValueError, match="w is damaged"):
        PackedMatrix.from_bytes(stored, "w")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_mask_that_keeps_one_more_is_refused_by_name(bits):
    """Of 4 bits the row may have a place for it: half a byte."""
    kept = torch.zeros(3, 16, dtype=torch.int8)
    kept[:, :5] = 3
    matrix = PackedMatrix.of_grid(Grid(kept, torch.ones(3, 1)), bits)
    stored = matrix.to_bytes()
    stored[header_of(stored).mask] |= torch.tensor([0, 0, 0, 0, 1 << 5, 0], dtype=torch.uint8)
    with pytest.raises(ValueError, match="w is damaged.* keeps 16 weights"):
        PackedMatrix.from_bytes(stored, "w")


def test_what_is_cut_off_is_refused_and_what_is_something_else_is_none():
    stored = packed()
    with pytest.raises(ValueError, match="w is damaged"):
        header_of(stored[:-8])
    assert read_whole(b"", 0) is None and read_whole(bytes(LARGEST), LARGEST) is None
    with pytest.raises(ValueError, match="is damaged"):
        header_of(torch.cat([stored, stored]))
