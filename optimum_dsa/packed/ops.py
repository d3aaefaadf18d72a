"""Products with packed matrices: the operators, and what they are in PyTorch. Faster kernels register elsewhere.

A matrix of (rows, columns) is four tensors, see [`~packed.matrix.PackedMatrix`]:

* `mask`, (⌈rows · columns ÷ 8⌉,) uint8: one bit per weight, row by row, lowest bit first.
* `values`, (kept,): the kept weights in their order; int8; or uint8, two numbers of 4 bits a byte, the first one low.
* `starts`, (rows + 1,) int64: at which value each row begins; of 4 bits, every row begins at a byte.
* `scales`, (rows, groups) float32: what whole numbers are multiplied with, per `group` columns (0: a row); or `None`.

Operators trust what they are given, as they run for every token: [`~packed.matrix.PackedMatrix`] has checked it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .loading import load


TILE = 256  # rows that are dense at once
_LIBRARY = torch.library.Library("optimum_dsa", "DEF")
_PACKED = "Tensor mask, Tensor values, Tensor starts, Tensor? scales, int group"
# Under a second name, by which kernels find the reference once they stand where it stood.
for _name in ("", "_reference"):
    _LIBRARY.define(f"linear{_name}(Tensor input, {_PACKED}) -> Tensor")
    _LIBRARY.define(f"dense_rows{_name}({_PACKED}, int columns, int first, int last, ScalarType dtype) -> Tensor")
_LIBRARY.define(f"linear_experts(Tensor input, Tensor experts, {_PACKED}, int rows) -> Tensor")


def linear(
    input: Tensor, mask: Tensor, values: Tensor, starts: Tensor, scales: Tensor | None = None, group: int = 0
) -> Tensor:
    """input · Wᵀ, (..., columns) -> (..., rows) in the input's dtype: by a kernel, where one is there."""
    return torch.ops.optimum_dsa.linear(input, mask, values, starts, scales, group)


def linear_experts(
    input: Tensor,
    experts: Tensor,
    mask: Tensor,
    values: Tensor,
    starts: Tensor,
    scales: Tensor | None,
    group: int,
    rows: int,
) -> Tensor:
    """Each vector of the input, (n, columns), times the matrix of its expert, transposed: (n, rows).

    Args:
        experts: (n,), a number for each vector; one beyond the last expert gets zeros.
        mask, values, starts, scales, group: of all matrices below each other, (all experts' rows, columns).
        rows: of one; with its columns a multiple of 8 weights.
    """
    return torch.ops.optimum_dsa.linear_experts(input, experts, mask, values, starts, scales, group, rows)


def dense_rows(
    mask: Tensor,
    values: Tensor,
    starts: Tensor,
    scales: Tensor | None,
    group: int,
    columns: int,
    first: int,
    last: int,
    dtype: torch.dtype,
) -> Tensor:
    """The rows from `first` to before `last` with their zeros, (last - first, columns) of `dtype`."""
    return torch.ops.optimum_dsa.dense_rows(mask, values, starts, scales, group, columns, first, last, dtype)


def whole_numbers(values: Tensor) -> Tensor:
    """The values of a matrix as numbers of one element each: 4 bits, two a byte, become int8, from -8 to 7."""
    if values.dtype != torch.uint8:
        return values
    both = torch.stack((values & 15, values >> 4), dim=-1).flatten().view(torch.int8)
    return both - ((both & 8) << 1)


def ones(mask: Tensor) -> Tensor:
    """How many bits are set in each byte, of any shape, uint8: pairs, then fours, then all, added side by side."""
    pairs = mask - ((mask >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (fours + (fours >> 4)) & 0x0F


def _dense_rows(mask, values, starts, scales, group, columns, first, last, dtype):
    # Cut at whole bytes, of which the first bits may belong to the row before.
    begin, end = first * columns, last * columns
    part = mask[begin // 8 : -(-end // 8)]
    bits = (part[:, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    kept = bits.flatten()[begin % 8 : begin % 8 + end - begin].bool().view(last - first, columns)
    if values.dtype == torch.uint8:
        # Of 4 bits, rows of an odd number have one place more than values.
        ends = starts[first : last + 1].tolist()
        some = whole_numbers(values[ends[0] // 2 : -(-ends[-1] // 2)])
        counts = kept.sum(1)
        places = torch.arange(columns, device=mask.device) < counts[:, None]
        wide = torch.zeros(last - first, columns, dtype=torch.int8, device=mask.device)
        index = (starts[first:last] - starts[first])[:, None] + torch.arange(columns, device=mask.device)
        wide[places] = some[index[places]]
        some = wide[places]
    else:
        some = values[int(starts[first]) : int(starts[last])]
    if scales is None:
        return torch.zeros(kept.shape, dtype=dtype, device=mask.device).masked_scatter_(kept, some.to(dtype))
    dense = torch.zeros(kept.shape, dtype=torch.float32, device=mask.device).masked_scatter_(kept, some.float())
    each = scales[first:last].repeat_interleave(group or columns, dim=1)[:, :columns]
    return dense.mul_(each).to(dtype)


def _linear(input, mask, values, starts, scales, group):
    rows, columns = len(starts) - 1, input.shape[-1]
    if len(mask) != -(-rows * columns // 8):
        raise ValueError(f"A mask of {len(mask)} bytes is none of {rows} rows of {columns}, the input's width.")
    output = input.new_empty(*input.shape[:-1], rows)
    for first in range(0, rows, TILE):
        last = min(first + TILE, rows)
        tile = dense_rows(mask, values, starts, scales, group, columns, first, last, input.dtype)
        output[..., first:last] = torch.nn.functional.linear(input, tile)
    return output


def _of_experts(experts: Tensor, mask: Tensor, starts: Tensor, scales: Tensor | None, columns: int, rows: int):
    """For each expert that is asked: which vectors are its, (n,), and mask, starts and scales of its matrix."""
    number = (len(starts) - 1) // max(rows, 1)
    counts = torch.bincount(experts, minlength=number)[:number].tolist()
    order = experts.argsort(stable=True)[: sum(counts)]
    for expert, here in enumerate(order.split(counts)):
        if len(here):
            first, last = expert * rows, (expert + 1) * rows
            # Values stay whole, as rows say where in all of them they begin.
            own = None if scales is None else scales[first:last]
            yield here, mask[first * columns // 8 : last * columns // 8], starts[first : last + 1], own


def _linear_experts(input, experts, mask, values, starts, scales, group, rows):
    output = input.new_zeros(len(input), rows)
    for here, bits, begins, own in _of_experts(experts, mask, starts, scales, input.shape[-1], rows):
        output[here] = linear(input[here], bits, values, begins, own, group)
    return output


def _first(name: str, reference):
    """The reference, until kernels are found: looked for at the first product on a CPU, once."""

    def operator(*arguments):
        if arguments[0].device.type == "cpu" and load().path is not None:
            return getattr(torch.ops.optimum_dsa, name)(*arguments)
        return reference(*arguments)

    return operator


_LIBRARY.impl("dense_rows_reference", _dense_rows, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_reference", _linear, "CompositeExplicitAutograd")
_LIBRARY.impl("dense_rows", _first("dense_rows", _dense_rows), "CompositeExplicitAutograd")
_LIBRARY.impl("linear", _first("linear", _linear), "CompositeExplicitAutograd")
_LIBRARY.impl("linear_experts", _linear_experts, "CompositeExplicitAutograd")


@torch.library.register_fake("optimum_dsa::linear")
def _(input, mask, values, starts, scales, group):
    return input.new_empty(*input.shape[:-1], starts.shape[0] - 1)


@torch.library.register_fake("optimum_dsa::linear_experts")
def _(input, experts, mask, values, starts, scales, group, rows):
    return input.new_empty(input.shape[0], rows)


@torch.library.register_fake("optimum_dsa::dense_rows")
def _(mask, values, starts, scales, group, columns, first, last, dtype):
    return mask.new_empty(last - first, columns, dtype=dtype)


def _remember(ctx, inputs, output) -> None:
    input, mask, values, starts, scales, group = inputs
    ctx.save_for_backward(mask, values, starts, scales)
    ctx.group, ctx.columns = group, input.shape[-1]


def _backward(ctx, gradient):
    """The gradient of the input, (..., columns); the matrix has none."""
    mask, values, starts, scales = ctx.saved_tensors
    return _times(gradient, mask, values, starts, scales, ctx.group, ctx.columns), None, None, None, None, None


def _times(gradient, mask, values, starts, scales, group, columns):
    """gradient · W, (..., rows) -> (..., columns), a tile of rows at a time."""
    rows, found = gradient.shape[-1], gradient.new_zeros(*gradient.shape[:-1], columns)
    for first in range(0, rows, TILE):
        last = min(first + TILE, rows)
        tile = dense_rows(mask, values, starts, scales, group, columns, first, last, gradient.dtype)
        found += gradient[..., first:last] @ tile
    return found


def _remember_experts(ctx, inputs, output) -> None:
    input, experts, mask, values, starts, scales, group, rows = inputs
    ctx.save_for_backward(experts, mask, values, starts, scales)
    ctx.group, ctx.columns, ctx.rows = group, input.shape[-1], rows


def _backward_experts(ctx, gradient):
    experts, mask, values, starts, scales = ctx.saved_tensors
    found = gradient.new_zeros(len(gradient), ctx.columns)
    for here, bits, begins, own in _of_experts(experts, mask, starts, scales, ctx.columns, ctx.rows):
        found[here] = _times(gradient[here], bits, values, begins, own, ctx.group, ctx.columns)
    return found, *[None] * 7


torch.library.register_autograd("optimum_dsa::linear", _backward, setup_context=_remember)
torch.library.register_autograd("optimum_dsa::linear_experts", _backward_experts, setup_context=_remember_experts)


def _kept(mask: Tensor, values: Tensor, starts: Tensor) -> int:
    """Weights that a matrix keeps; where nothing but shapes is known, as many as its values have places for."""
    if values.dtype == torch.uint8 and type(mask) is Tensor and not mask.is_meta:
        # Of 4 bits, a row of an odd number has a place for one more.
        return int(ones(mask).sum())
    return values.numel() * (2 if values.dtype == torch.uint8 else 1)


@register_flop_formula(torch.ops.optimum_dsa.linear, get_raw=True)
def _operations(input, mask, values, starts, *others, out_val=None, **options) -> int:
    """Floating point operations of a product: two for each kept weight and vector of the input."""
    return 2 * _kept(mask, values, starts) * (input.numel() // max(input.shape[-1], 1))


@register_flop_formula(torch.ops.optimum_dsa.linear_experts, get_raw=True)
def _operations_of_experts(input, experts, mask, values, starts, *others, rows=0, out_val=None, **options) -> int:
    """Likewise, of experts that all keep as many."""
    number = max((len(starts) - 1) // max(others[-1] if others else rows, 1), 1)
    return 2 * _kept(mask, values, starts) * len(input) // number
