"""Whole numbers as compressed-tensors packs them into int32, and what a `config.json` says of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


METHOD, FORMAT = "compressed-tensors", "pack-quantized"
PARTS = ("weight_packed", "weight_scale", "weight_shape")  # of every matrix, in place of its `weight`


def entry(bits: int, group: int, ignored: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of weights of `bits` that share scales by `group`; 0 is all of a row.

    Args:
        ignored: names of the `nn.Linear` that stay as they are.
    """
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if group else "channel",
        "group_size": group or None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
    }
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
                "format": FORMAT,
            }
        },
        "ignore": list(ignored),
        "kv_cache_scheme": None,
    }


def pack_numbers(numbers: Tensor, bits: int) -> Tensor:
    """(rows, columns) int8, from -2^(bits - 1), as (rows, ⌈columns · bits / 32⌉) int32, the first lowest."""
    count = 32 // bits
    padded = torch.nn.functional.pad(numbers.int() + 2 ** (bits - 1), (0, -numbers.shape[1] % count))
    shifts = torch.arange(0, 32, bits, dtype=torch.int64, device=numbers.device)
    words = (padded.unflatten(1, (-1, count)).long() << shifts).sum(dim=2)
    # the highest bit of a word is its sign
    return torch.where(words >= 2**31, words - 2**32, words).int()


def unpack_numbers(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """The numbers, `shape` int8, that were packed as `packed`, (rows, words) int32.

    Raises:
        ValueError: they are not as many.
    """
    rows, columns = shape
    if tuple(packed.shape) != (rows, -(-columns * bits // 32)):
        raise ValueError(f"{tuple(packed.shape)} int32 hold no {rows} times {columns} numbers of {bits} bits.")
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    numbers = (packed[..., None] >> shifts) & (2**bits - 1)
    return (numbers.flatten(1)[:, :columns] - 2 ** (bits - 1)).to(torch.int8)
