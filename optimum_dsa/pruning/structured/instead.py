"""Matrices as they are once structures are gone, and a model that computes with them for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...model.statistics import LayerStatistics
from .refit import refit_columns
from .structure import Structures


@torch.no_grad()
def matrices_without(
    model: nn.Module,
    structures: Structures,
    gone: Tensor,
    statistics: LayerStatistics | None,
    damping: float,
) -> dict[str, Tensor]:
    """Parameter -> what it is without the structures `gone`, (n,) int64, as it is stored; nothing is changed.

    With `statistics` of what these matrices read, they are refitted, otherwise silenced.
    """
    found = {}
    for cut in structures.reads:
        parameter = model.get_parameter(cut.tensor)
        index = cut.index.to(parameter.device)
        columns = torch.zeros(parameter.shape[cut.axis], dtype=torch.bool, device=parameter.device)
        columns[index[gone.to(parameter.device)].flatten()] = True
        # (out_features, in_features), whichever way round it is stored
        weight = parameter.detach() if cut.axis else parameter.detach().t()
        if statistics is None:
            new = weight.masked_fill(columns, 0)
        else:
            new = refit_columns(weight, statistics, columns, damping).to(weight.dtype)
        found[cut.tensor] = new if cut.axis else new.t()
    return found


@contextmanager
def computing_with(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """The model's parameters of these names being `values`, of their shapes, while the context is open."""
    own = {name: model.get_parameter(name).data for name in values}
    try:
        # Pointers move and no weight does.
        for name, value in values.items():
            model.get_parameter(name).data = value
        yield
    finally:
        for name, value in own.items():
            model.get_parameter(name).data = value


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout while the context is open, and then each of its modules as it was."""
    # Module by module: parts of a model may be frozen in eval mode on purpose.
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
