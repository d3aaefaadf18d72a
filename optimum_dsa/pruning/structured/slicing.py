"""Structures silenced, and cut out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...common.escaping import one_line
from ...model.modeling_per_layer import EXPERT_COUNTS, count_anew, count_heads, keep_rows, leave_out
from ...model.offload import copied, is_offloaded, resident
from ...model.walk import WalkedBlock
from .structure import Structures, tensor_named
from .wholes.blocks import apply, pass_by, without_blocks
from .wholes.experts import unrouted


logger = logging.getLogger(__name__)


@torch.no_grad()
def silence(model: nn.Module, structures: Structures, gone: Tensor, whole: bool = False) -> None:
    """Make zero, in place, the columns through which what the structures `gone`, (n,) int64, give leaves.

    With `whole`, everything that they own. Of experts the router's logit becomes -inf, before any are chosen; blocks
    hand on what they are given.
    """
    if structures.kind == "expert":
        unrouted(model, structures, gone)
    if structures.kind == "block":
        pass_by(model, structures, gone)
    for cut in structures.cuts if whole else structures.reads:
        parameter = model.get_parameter(cut.tensor)
        parameter.index_fill_(cut.axis, cut.index[gone].flatten().to(parameter.device), 0)


@torch.no_grad()
def cut_out(model: nn.Module, structures: Structures, gone: Tensor) -> None:
    """Cut the structures `gone`, (n,) int64, out of the model, in place: what is left are smaller matrices.

    The model gives what it gives when they are silenced.

    Raises:
        ValueError: fewer would be left than have to be.
    """
    if len(structures) - len(gone.unique()) < structures.least:
        least = "one" if structures.least == 1 else structures.least
        raise ValueError(
            f"{structures.unit} has {len(structures)} structures and {len(gone.unique())} are to go; leave {least} at "
            "least."
        )
    if not len(gone):
        return
    for cut in structures.cuts:
        owner, _, name = cut.tensor.rpartition(".")
        module, tensor = model.get_submodule(owner), tensor_named(model, cut.tensor)
        stays = torch.ones(tensor.shape[cut.axis], dtype=torch.bool, device=tensor.device)
        stays[cut.index[gone].flatten().to(tensor.device)] = False
        value = tensor.data.index_select(cut.axis, stays.nonzero().flatten())
        if isinstance(tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=tensor.requires_grad)
        setattr(module, name, value)
        count_anew(module)
    if structures.kind == "block":
        apply(without_blocks(model, structures, set(gone.tolist())))
    elif structures.kind == "expert":
        _count_experts(model, structures, set(gone.tolist()))
    elif structures.kind != "ffn":
        number = len(gone.unique())
        queries, keys = (per * number for per in structures.heads)
        width = structures.reads[0].index.shape[1] * number
        block = model.get_submodule(structures.block)
        count_heads(block, structures.relative, queries, keys, width)
        if structures.slopes:
            stays = [each for each in range(len(structures)) if each not in set(gone.tolist())]
            stays = torch.tensor(stays, dtype=torch.int64)
            heads = structures.query_heads(stays).sort().values.tolist()
            keep_rows(block, structures.relative, heads, structures.slopes)
    if structures.absent and len(structures) == len(gone.unique()):
        leave_out(model.get_submodule(structures.block), *structures.absent)


@contextmanager
def rewriting(model: nn.Module, structures: Structures) -> Iterator[None]:
    """The block of some structures in memory, to be cut; what is left is kept where its weights came from."""
    elsewhere = is_offloaded(model)
    # Whole blocks own no part of a tensor, and go as they are.
    with resident(model, [structures.block] if structures.cuts else []) as changes:
        yield
        changes.update(cut.tensor for cut in structures.cuts if elsewhere)


def _count_experts(model: nn.Module, structures: Structures, gone: set[int]) -> None:
    """Take experts that are modules out of their list, and have the modules around say how many are left."""
    if structures.wholes:
        owner, _, name = structures.wholes[0].rpartition(".")[0].rpartition(".")
        kept = [model.get_submodule(whole) for number, whole in enumerate(structures.wholes) if number not in gone]
        setattr(model.get_submodule(owner), name, nn.ModuleList(kept))
    for name in structures.around:
        holder = vars(model.get_submodule(name))
        for attribute in EXPERT_COUNTS:
            if holder.get(attribute) == len(structures):
                setattr(model.get_submodule(name), attribute, len(structures) - len(gone))


@torch.no_grad()
def trouble(walked: WalkedBlock, structures: Structures) -> str | None:
    """Why the structures of a block that a walk stands at cannot be cut out, or `None`: it is tried.

    The block, as a copy, is to give the same with the first of them (or all, where they are `entire`) cut out as with
    it silenced.
    """
    block, gone = walked.model.get_submodule(walked.name), torch.arange(len(structures) if structures.entire else 1)
    whole, given = block.__dict__, []
    for change in (silence, cut_out):
        # Under the block's own name, which is what the walk runs.
        block.__dict__ = copied(block).__dict__
        try:
            change(walked.model, structures, gone)
            given.append(walked.run()[0].float())
        except Exception as error:  # noqa: BLE001 - code that was written for other sizes may fail in any way
            logger.debug("%s without a part of it: %s", structures.unit, one_line(str(error)))
            part = "it" if structures.entire else "a part of it, having sizes of its own"
            return f"cannot be cut: its block does not run without {part}"
        finally:
            block.__dict__ = whole
    silenced, cut = given
    if (silenced - cut).abs().max() > 1e-3 * silenced.abs().max():
        part = "it" if structures.entire else "a part of it"
        return f"what is left computes something else when {part} is cut out"
    return None
