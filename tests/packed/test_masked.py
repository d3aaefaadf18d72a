"""The kernel for masks on a CPU: its source runs in an emulator, index for index, against the product in float64."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_dsa.packed import masked
from optimum_dsa.packed.matrix import PackedMatrix
from optimum_dsa.packed.ops import linear, linear_experts

from .emulated import Counted, emulated
from .test_matrix import sparse, whole


CARD = {"shared": (233472, 232448)}  # of two multiprocessors, with the memory of an H100's
FORMATS = {
    "bfloat16": (16, torch.bfloat16, 0),
    "float16": (16, torch.float16, 0),
    "int8": (8, torch.bfloat16, 0),
    "int8 with float16": (8, torch.float16, 0),
    "int8 in groups": (8, torch.bfloat16, 32),
    "int4": (4, torch.float16, 0),
    "int4 in groups": (4, torch.bfloat16, 128),
}
SHAPES = (
    *((37, 260, 0.6), (5, 13, 0.5), (20, 1056, 0.5), (9, 4500, 0.3)),
    *((70, 2048, 0.0), (3, 2048, 1.0), (1, 32, 0.5), (9, 13, 0.9)),
)


def of(name, rows, columns, share=0.6, seed=0):
    """A packed matrix, what it stands for in float64, and an input; of some rows the first is empty, the last full."""
    bits, dtype, group = FORMATS[name]
    x = torch.randn(columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if bits == 16:
        dense = sparse(rows, columns, seed, dtype, share)
        return PackedMatrix.of(dense), dense.double(), x
    packed, dense = whole(rows, columns, seed, bits, group)
    return packed, dense.double(), x


def in_one(packed, mask_first):
    """The parts, with mask and values in one piece of memory, which ends with either, and that piece."""
    pieces = [packed.mask, packed.values.view(torch.uint8)]
    first, second = pieces if mask_first else pieces[::-1]
    begin = -(-len(first) // 8) * 8
    memory = torch.zeros(begin + len(second) + 16, dtype=torch.uint8)[16:]
    memory[: len(first)], memory[begin:] = first, second
    mask, values = (memory[: len(first)], memory[begin:]) if mask_first else (memory[begin:], memory[: len(first)])
    return (mask, values.view(packed.values.dtype), *packed.parts[2:]), memory


def check(output, x, dense):
    """Within what rounding the output takes, and a thousandth of what is added up."""
    expected = x.double() @ dense.t()
    near = 1e-3 * (x.double().abs() @ dense.abs().t())
    assert ((output.double() - expected).abs() <= expected.abs() * 2**-8 + near / 8 + 1e-6).all()


@pytest.mark.parametrize("way", masked.WAYS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_product_is_that_of_the_matrix(emulator, name, way):
    """Masks of any width, rows that keep nothing or everything, fewer and more than warps; nothing is read beyond."""
    kernel = emulated(emulator, **CARD).masked
    for index, (rows, columns, share) in enumerate(SHAPES):
        packed, dense, x = of(name, rows, columns, share)
        parts, memory = in_one(packed, mask_first=index % 2)
        output = torch.full((rows,), torch.nan, dtype=x.dtype)
        with Counted(emulator, memory) as read:
            kernel.run(way, x, parts, output)
        check(output, x, dense)
        # Every row may begin and end within 16 bytes, of which 16 in 4096 are read for the ring's end once more.
        assert read.times * len(memory) <= len(memory) * (1 + 1 / 256) + rows * (48 + 8 * -(-columns // 32))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(FORMATS)), st.integers(1, 60), st.integers(1, 2200), st.integers(0, 10), st.integers(0, 99)
)
def test_any_shape_and_mask(emulator, name, rows, columns, tenths, seed):
    packed, dense, x = of(name, rows, columns, tenths / 10, seed)
    output = torch.full((rows,), torch.nan, dtype=x.dtype)
    emulated(emulator, **CARD).masked.run("8 warps", x, packed.parts, output)
    check(output, x, dense)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("name", ["int8", "int4 in groups"])
def test_an_input_of_any_size_meets_whole_numbers(emulator, name, scale):
    """It becomes float16 there, whose range is far smaller."""
    packed, dense, x = of(name, 20, 300)
    x = (x.double() * scale).bfloat16()
    output = torch.empty(20, dtype=x.dtype)
    emulated(emulator, **CARD).masked.run("8 warps", x, packed.parts, output)
    expected = x.double() @ dense.t()
    assert (output.double() - expected).norm() / expected.norm() < 2**-8
    emulated(emulator, **CARD).masked.run("8 warps", x * 0, packed.parts, output)
    assert not output.any()


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_no_number_stays_none(emulator, name):
    packed, _, x = of(name, 20, 300)
    for bad in (torch.nan, torch.inf):
        x[7] = bad
        output = torch.zeros(20, dtype=x.dtype)
        emulated(emulator, **CARD).masked.run("8 warps", x, packed.parts, output)
        assert not output.isfinite().any()


def test_several_vectors_and_views_of_any_place(emulator):
    """Vectors that begin anywhere, and an expert's rows, whose mask begins within a word."""
    packed, dense, _ = of("bfloat16", 40, 20)
    mask, values, starts, _, group = packed.parts
    kernel = emulated(emulator, **CARD).masked
    inputs = torch.randn(3, 21, generator=torch.Generator().manual_seed(1)).bfloat16()[:, 1:]
    for first in range(0, 40, 2):
        output = torch.empty(3, 40 - first, dtype=torch.bfloat16)
        kernel.run("8 warps", inputs, (mask[first * 20 // 8 :], values, starts[first:], None, group), output)
        check(output, inputs, dense[first:])


def test_the_table_is_measured_once_kept_and_obeyed(emulator, tmp_path):
    packed, dense, x = of("int8", 32, 512)
    kernel = emulated(emulator, **CARD, table=tmp_path / "table.json").masked
    unpacked = lambda input: linear(input, *packed.parts)  # noqa: E731
    found = kernel.linear(x.view(1, 1, -1), packed.parts, unpacked)
    assert found.shape == (1, 1, 32)
    torch.testing.assert_close(found.view(-1).double(), x.double() @ dense.t(), rtol=2**-6, atol=0.5)
    ((kind, row),) = json.loads((tmp_path / "table.json").read_text()).items()
    assert set(row) == {*masked.WAYS, "unpacked"}
    assert kind == "mask, 8 bits, bfloat16, 32 x 512, 4 tenths kept, batch 1"
    again = emulated(emulator, **CARD, table=tmp_path / "table.json").masked
    again.measure = None  # would fail: it is known
    for best in ("16 warps", "unpacked"):
        again.table.rows[kind] = {name: float(name != best) for name in row}
        assert again.way(x, packed.parts, unpacked) == (None if best == "unpacked" else best)
        assert again.linear(x, packed.parts, unpacked).shape == (32,)


def test_what_the_kernel_does_not_take_is_unpacked(emulator):
    kernel = emulated(emulator, **CARD).masked
    kernel.run = None  # would fail
    packed, dense, x = of("bfloat16", 20, 64)
    grouped = whole(20, 64, 0, 8, 48)[0]
    for matrix, inputs in (
        (packed, x.float()),
        (packed, x.half()),
        (packed, x.expand(9, 64)),
        (packed, x.new_empty(0, 64)),
        (grouped, x),
        (PackedMatrix.of(dense.bfloat16()[:0]), x),
    ):
        assert not masked.takes(inputs, matrix.parts)
        assert kernel.linear(inputs, matrix.parts, lambda input: "unpacked") == "unpacked"
    small = emulated(emulator, shared=(20000, 18000)).masked
    assert not small.ways(x, packed.parts) and small.linear(x, packed.parts, lambda input: "unpacked") == "unpacked"


def test_experts_come_one_by_one(emulator, monkeypatch):
    """The operator for experts asks for each one's product: rows of all values, and no share of them is known."""
    packed, _, _ = of("bfloat16", 48, 64)
    kernel, asked = emulated(emulator, **CARD).masked, []
    right = torch.ops.optimum_dsa.linear_reference

    def asking(input, *parts):
        asked.append(masked.kind_of(input, parts))
        output = input.new_empty(len(input), len(parts[2]) - 1)
        kernel.run("8 warps", input, parts, output)
        torch.testing.assert_close(output, right(input, *parts), rtol=2**-7, atol=0.1)
        return output

    monkeypatch.setattr("optimum_dsa.packed.ops.linear", asking)
    inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    linear_experts(inputs, torch.tensor([2, 0, 2]), *packed.parts, 16)
    assert asked == [f"mask, 16 bits, bfloat16, 16 x 64, an expert, batch {batch}" for batch in (1, 2)]
