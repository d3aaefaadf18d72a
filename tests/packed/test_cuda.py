"""The kernels of a GPU on a CPU: their source runs in an emulator, index for index, called as on a card."""

import importlib
import json
from functools import partial
from pathlib import Path

import pytest
import torch

from optimum_dsa.packed import cuda, masked, measured
from optimum_dsa.packed.matrix import PackedMatrix
from optimum_dsa.packed.two_of_four import TwoOfFour, reference_rows

from .emulated import Counted, emulated
from .test_matrix import sparse, whole
from .test_two_of_four import two_of_four, whole_numbers


def matrix(bits, rows, columns, share):
    if bits == 16:
        return PackedMatrix.of(two_of_four(rows, columns, share=share))
    return whole_numbers(rows, columns, bits, 128 if bits == 4 and columns > 128 else 0, share=share)


@pytest.mark.parametrize("way", cuda.WAYS)
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_product_is_that_of_the_matrix(emulator, bits, way):
    """Off the tiles in both directions, of few and many rows, 1 to 8 vectors, columns in one part and in several."""
    kernels = emulated(emulator)
    for rows, columns, share, batch in ((37, 260, 0.6, 1), (70, 2304, 1.0, 5), (1, 4, 1.0, 2), (130, 1000, 0.9, 3)):
        made = TwoOfFour.of(matrix(bits, rows, columns, share))
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(batch, columns, generator=generator).bfloat16()
        output = torch.full((batch, rows), torch.nan, dtype=torch.bfloat16)
        with Counted(emulator, made.groups) as read:
            kernels.run(way, inputs, made.groups, made.scales, output)
        expected = inputs.double() @ made.dense(torch.float32).double().t()
        torch.testing.assert_close(output.double(), expected, rtol=2**-8, atol=float(expected.abs().mean()) / 250)
        tiles, high = len(made.groups), cuda.WAYS[way][1]
        assert read.times == pytest.approx(-(-tiles // high) * high / tiles)


def test_columns_are_shared_by_blocks_where_the_input_does_not_fit(emulator):
    kernels = emulated(emulator, shared=(3 * 16000, 14000))
    way = "more ahead, 2 tiles"
    assert kernels.parts(way, 40, 4096, 1) == 1 and kernels.parts(way, 40, 4096, 4) > 1
    made = TwoOfFour.of(matrix(16, 40, 4096, 0.9))
    inputs = torch.randn(4, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    outputs = [torch.empty(4, 40, dtype=torch.bfloat16) for _ in range(2)]
    for output in outputs:
        kernels.run(way, inputs, made.groups, None, output)
    torch.testing.assert_close(outputs[0].float(), inputs.float() @ made.dense().float().t(), rtol=2**-7, atol=0.3)
    assert torch.equal(*outputs)  # parts are added in their order
    sums, arrived = kernels.room(inputs, 0, 0, 0)
    assert sums.any() and not arrived.any()
    assert kernels.parts(way, 40, 2**20, 8) is None


def test_the_table_is_measured_once_kept_and_obeyed(emulator, tmp_path):
    made = TwoOfFour.of(matrix(8, 32, 512, 1.0))
    inputs = torch.randn(1, 1, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    kernels = emulated(emulator, table=tmp_path / "table.json")
    expected = made.linear(inputs)
    torch.testing.assert_close(kernels.linear(inputs, made.groups, made.scales, 32), expected, rtol=2**-7, atol=0.5)
    (row,) = json.loads((tmp_path / "table.json").read_text()).values()
    assert set(row) == {*cuda.WAYS, "unpacked", "dense"}
    again = emulated(emulator, table=tmp_path / "table.json")
    again.measure = None  # would fail: it is known
    key = again.key(made.groups, 32, inputs)
    for best in ("16 warps", "unpacked"):
        again.table.rows[key] = {name: float(name != best) for name in row}
        assert again.way(inputs.view(1, -1), made.groups, made.scales, 32) == (None if best == "unpacked" else best)
        assert again.linear(inputs, made.groups, made.scales, 32).shape == (1, 1, 32)


def test_what_a_kernel_does_not_take_is_unpacked(emulator):
    kernels = emulated(emulator)
    kernels.run = None  # would fail
    made = TwoOfFour.of(matrix(16, 20, 64, 1.0))
    for inputs in (torch.ones(1, 64), torch.ones(9, 64).bfloat16(), torch.ones(0, 64).bfloat16()):
        found = kernels.linear(inputs, made.groups, None, 20)
        torch.testing.assert_close(found, torch.nn.functional.linear(inputs, made.dense(inputs.dtype)))


@pytest.mark.parametrize("bits, group", [(16, 0), (8, 0), (8, 32), (4, 0), (4, 128)])
def test_rows_are_unpacked_as_in_pytorch_bit_for_bit(emulator, bits, group):
    """Of masks that begin within a byte, of rows that keep nothing or an odd number, from any row on."""
    kernels = emulated(emulator)
    for rows, columns in ((37, 260), (5, 13), (20, 1056)):
        if bits == 16:
            packed = PackedMatrix.of(sparse(rows, columns, 0, torch.bfloat16))
        else:
            packed = whole(rows, columns, 0, bits, group)[0]
        for first, last in ((0, rows), (3, rows - 1)):
            expected = packed.dense(torch.bfloat16)[first:last]
            found = kernels.rows_of(packed.parts, bits, columns, first, last, lambda expected=expected: expected)
            assert torch.equal(found, expected)
    assert kernels.trusted == {f"{bits} bits, anywhere": True}


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_tiles_of_two_of_four_are_unpacked_as_in_pytorch_bit_for_bit(emulator, bits):
    kernels = emulated(emulator)
    for rows, columns, share in ((37, 260, 0.6), (50, 772, 1.0)):
        made = TwoOfFour.of(matrix(bits, rows, columns, share))
        for first, last in ((0, rows), (16, rows - 1)):
            reference = partial(reference_rows, made.groups, made.scales, columns, first, last, torch.bfloat16)
            parts = (None, made.groups, None, made.scales, 0)
            assert torch.equal(kernels.rows_of(parts, bits, columns, first, last, reference), reference())
            assert torch.equal(kernels.rows_of(parts, bits, columns, first, last, None), reference())
    assert kernels.trusted == {f"{bits} bits, 2:4": True}


def test_what_is_not_unpacked_as_in_pytorch_is_not_unpacked_again(emulator, caplog):
    kernels = emulated(emulator)
    packed, right = PackedMatrix.of(sparse(4, 32, 0, torch.bfloat16)), torch.ones(4, 32).bfloat16()
    for _ in range(2):
        assert torch.equal(kernels.rows_of(packed.parts, 16, 32, 0, 4, lambda: right), right)
    assert caplog.text.count("not as in PyTorch") == 1


def test_tiles_are_of_a_bounded_size(monkeypatch):
    monkeypatch.setattr(cuda, "TILE_WEIGHTS", 20 * 300)
    weight, seen = torch.randn(700, 20), []

    def dense(first, last):
        seen.append(last - first)
        return weight[first:last]

    inputs = torch.randn(2, 3, 20)
    torch.testing.assert_close(cuda.by_tiles(inputs, 700, dense), torch.nn.functional.linear(inputs, weight))
    assert seen == [256, 256, 188]


def test_the_benchmark_checks_and_times_every_way(emulator, monkeypatch, tmp_path):
    """The emulator stands for the card, so that the first run on one is none in vain."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "benchmarks")
    decoding = importlib.import_module("decoding")
    card = emulated(emulator, shared=(233472, 232448), table=tmp_path / "table.json")
    monkeypatch.setattr(decoding, "kernels", lambda device: card)
    monkeypatch.setattr(measured, "milliseconds", lambda work, device, times=1: work() is None or 2.0)
    monkeypatch.setattr(decoding, "KINDS", ("2:4 int8", "60 %", "60 % int8"))
    monkeypatch.setattr(decoding, "BATCHES", {"2:4": (1,), "mask": (1, 2)})
    assert len(list(decoding.layers(torch.device("cpu")))) == len(card.table.rows) == 5
    for key, row in card.table.rows.items():
        assert set(row) == {*(cuda.WAYS if key.startswith("2:4") else masked.WAYS), "unpacked", "dense"}
