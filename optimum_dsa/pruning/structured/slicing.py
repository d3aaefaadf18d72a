"""Structures silenced, and cut out."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ...common.escaping import one_line
from ...model.modeling_per_layer import count_anew, count_heads
from ...model.walk import WalkedBlock
from .structure import Structures


@torch.no_grad()
def silence(model: nn.Module, structures: Structures, gone: Tensor, whole: bool = False) -> None:
    """Make zero, in place, the columns through which what the structures `gone`, (n,) int64, give leaves.

    With `whole`, everything that they own.
    """
    for cut in structures.cuts if whole else structures.reads:
        parameter = model.get_parameter(cut.tensor)
        parameter.index_fill_(cut.axis, cut.index[gone].flatten().to(parameter.device), 0)


@torch.no_grad()
def cut_out(model: nn.Module, structures: Structures, gone: Tensor) -> None:
    """Cut the structures `gone`, (n,) int64, out of the model, in place: what is left are smaller matrices.

    The model gives what it gives when they are silenced.

    Raises:
        ValueError: none would be left.
    """
    if len(gone.unique()) >= len(structures):
        raise ValueError(
            f"{structures.unit} has {len(structures)} structures and {len(gone.unique())} are to go; leave one at "
            "least, or take the whole block."
        )
    if not len(gone):
        return
    for cut in structures.cuts:
        owner, _, name = cut.tensor.rpartition(".")
        module, parameter = model.get_submodule(owner), model.get_parameter(cut.tensor)
        stays = torch.ones(parameter.shape[cut.axis], dtype=torch.bool, device=parameter.device)
        stays[cut.index[gone].flatten().to(parameter.device)] = False
        value = parameter.data.index_select(cut.axis, stays.nonzero().flatten())
        module.register_parameter(name, nn.Parameter(value, requires_grad=parameter.requires_grad))
        count_anew(module)
    if structures.kind != "ffn":
        number = len(gone.unique())
        queries, keys = (per * number for per in structures.heads)
        width = structures.reads[0].index.shape[1] * number
        count_heads(model.get_submodule(structures.block), structures.relative, queries, keys, width)


@torch.no_grad()
def trouble(walked: WalkedBlock, structures: Structures) -> str | None:
    """Why the structures of a block that a walk stands at cannot be cut out one by one, or `None`: it is tried.

    The block, as a copy, is to give the same with the first of them cut out as with it silenced.
    """
    block, gone = walked.model.get_submodule(walked.name), torch.tensor([0])
    whole, given = block.__dict__, []
    for change in (silence, cut_out):
        # Under the block's own name, which is what the walk runs.
        block.__dict__ = copy.deepcopy(block).__dict__
        try:
            change(walked.model, structures, gone)
            given.append(walked.run()[0].float())
        except Exception as error:  # noqa: BLE001 - code that was written for other sizes may fail in any way
            return f"cannot be cut: {one_line(str(error))}"
        finally:
            block.__dict__ = whole
    silenced, cut = given
    if (silenced - cut).abs().max() > 1e-3 * silenced.abs().max():
        return "what is left computes something else when a part of it is cut out"
    return None
