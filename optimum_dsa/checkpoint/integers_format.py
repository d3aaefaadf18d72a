"""The two ways in which compressed-tensors stores whole numbers, and what a `config.json` says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.registry import Registry
from ..packed.grid import GROUPS


METHOD = "compressed-tensors"
REFERENCE = "https://docs.vllm.ai/projects/llm-compressor/en/latest/guides/compression_schemes/"
SCALE, SHAPE = "weight_scale", "weight_shape"  # beside the numbers: of the matrix's type; of those that are packed


@dataclass(frozen=True)
class IntegerFormat:
    """How numbers of a matrix are stored, and which they may be.

    Attributes:
        numbers (`str`): what the tensor of numbers is called, in place of `weight`.
        bits (`tuple[int, ...]`): of a number, the default first.
        groups (`tuple[int, ...]`): columns that may share a scale, 0 for all of a row, the default first.
        packed (`bool`): as many numbers as fit lie in an int32, and `weight_shape` counts them; else each is an int8.
        inputs (`Mapping[str, Any]`, *optional*): how who runs the model rounds what a matrix is multiplied with.
    """

    numbers: str
    bits: tuple[int, ...]
    groups: tuple[int, ...]
    packed: bool
    inputs: Mapping[str, Any] | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """What there is of every matrix in place of its `weight`."""
        return (self.numbers, SCALE, SHAPE) if self.packed else (self.numbers, SCALE)


FORMATS = Registry("format")
FORMATS.add(
    "pack-quantized",
    IntegerFormat("weight_packed", (4, 8), (128, *(group for group in GROUPS if group != 128)), packed=True),
    reference=REFERENCE,
)
# vLLM multiplies int8 with int8: no other bits, and a scale has to be one of a row.
FORMATS.add(
    "int-quantized",
    IntegerFormat(
        "weight",
        (8,),
        (0,),
        packed=False,
        inputs={"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    ),
    reference=REFERENCE,
)


def entry(name: str, bits: int, group: int, ignored: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of weights of `bits` in the format `name` that share scales by `group`; 0 is all of a row.

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
    inputs = FORMATS[name].inputs
    return {
        "quant_method": METHOD,
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None if inputs is None else dict(inputs),
                "output_activations": None,
                "format": name,
            }
        },
        "ignore": list(ignored),
        "kv_cache_scheme": None,
    }


def packed_shape(shape: Sequence[int], bits: int) -> tuple[int, int]:
    """Of the int32 in which (rows, columns) numbers of `bits` lie."""
    rows, columns = shape
    return rows, -(-columns * bits // 32)


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
    if tuple(packed.shape) != packed_shape(shape, bits):
        raise ValueError(f"{tuple(packed.shape)} int32 hold no {rows} times {columns} numbers of {bits} bits.")
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    numbers = (packed[..., None] >> shifts) & (2**bits - 1)
    return (numbers.flatten(1)[:, :columns] - 2 ** (bits - 1)).to(torch.int8)
