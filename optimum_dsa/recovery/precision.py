"""Training in float32 of what is kept in half precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .gradual.held_zeros import keep_alive_


@contextmanager
def in_float32(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """The model with parameters in float32 while the context is open, and in their own dtypes after it.

    Small steps vanish in bfloat16. On leaving, a weight that is not zero but would round to it stays alive.
    """
    changed = {name: p.dtype for name, p in model.named_parameters() if enabled and p.dtype != torch.float32}
    for name in changed:
        parameter = model.get_parameter(name)
        # `.data`, so that the parameter stays the same object, by which ties hold.
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for name, dtype in changed.items():
            parameter = model.get_parameter(name)
            keep = parameter.data != 0
            parameter.data = parameter.data.to(dtype)
            keep_alive_(parameter.data, keep)
