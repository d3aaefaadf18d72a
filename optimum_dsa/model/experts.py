"""Several experts in one module: which parameters hold their matrices, and how; found by structure, as blocks are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

from torch import Tensor, nn


# Attributes by which modules say how many experts they compute with.
_COUNTS = ("num_experts", "num_routed_experts", "moe_num_experts")
# In the paper on gated maps, https://arxiv.org/abs/2002.05202, eq. 6, (act(x W) ⊗ x V) W2: the one that leads back.
_LEADS_BACK = "w2"


@dataclass(frozen=True)
class Fused:
    """How one parameter holds the matrices of experts.

    Attributes:
        count (`int`): the experts that compute with it.
        shape (`tuple[int, int]`): of one matrix as it is stored, (rows, columns).
        transposed (`bool`): whether it is stored as (in_features, out_features).
        idle (`int`): further matrices behind those, of experts that hand their input on and multiply nothing.
    """

    count: int
    shape: tuple[int, int]
    transposed: bool = False
    idle: int = 0


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the matrices of several experts in one parameter."""
    return bool(fused_parameters(module))


def fused_parameters(module: nn.Module) -> dict[str, Fused]:
    """Names of a module's own parameters that hold the matrices of experts -> how, if it says how many experts it has.

    They are of (experts, rows, columns), or all rows are below each other, (experts · inner, hidden).
    """
    experts = next((count for name in _COUNTS if isinstance(count := getattr(module, name, None), int)), None)
    if experts is None:
        return {}
    own = dict(module.named_parameters(recurse=False))
    idle = getattr(module, "zero_expert_num", None) or 0
    stacked = {name: p for name, p in own.items() if p.dim() == 3 and p.shape[0] in (experts, experts + idle)}
    shapes = [tuple(parameter.shape[1:]) for parameter in stacked.values()]
    # Most models that keep experts as (in, out) say so, and of a map without a gate the shape could not tell.
    transposed = bool(getattr(module, "is_transposed", _leads_back_by_rows(shapes)))
    found = {
        name: Fused(experts, tuple(parameter.shape[1:]), transposed, parameter.shape[0] - experts)
        for name, parameter in stacked.items()
    }
    inner = getattr(module, "ffn_hidden_size", None)
    if isinstance(inner, int):
        found |= {
            name: Fused(experts, (inner, parameter.shape[1]), name == _LEADS_BACK)
            for name, parameter in own.items()
            if parameter.dim() == 2 and parameter.shape[0] == experts * inner
        }
    return found


def expert_counts(module: nn.Module) -> set[int]:
    """How many experts a module is made of, with and without those that compute nothing; empty for anything else."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        experts = _with_parameters(module)
        # Of one type and with parts: a list of plain maps is no list of experts.
        alike = len({type(expert) for expert in experts}) == 1 and any(True for _ in experts[0].children())
        return {len(experts)} if alike else set()
    fused = fused_parameters(module)
    # What only sends tokens to the one part that holds the matrices is the experts, too.
    if not fused and next(module.parameters(recurse=False), None) is None and len(_with_parameters(module)) == 1:
        fused = fused_parameters(_with_parameters(module)[0])
    return {count for how in fused.values() for count in (how.count, how.count + how.idle)}


@dataclass(frozen=True)
class Mixture:
    """Where experts and what chooses among them are in a block; names are relative to it.

    Attributes:
        name (`str`): the module that holds both.
        experts (`tuple[str, ...]`): modules in it that are experts, alone or many.
        routers (`tuple[str, ...]`): modules beside them that hold the one matrix that scores them.
    """

    name: str
    experts: tuple[str, ...]
    routers: tuple[str, ...]


def mixtures(block: nn.Module) -> Iterator[Mixture]:
    """The mixtures of experts in a block.

    Experts are fused parameters or a list of modules of one type; their router is the module beside them that holds
    one matrix alone, with as many rows as there are experts.
    """
    for path, part in block.named_modules():
        counts = {name: expert_counts(child) for name, child in part.named_children()}
        known, before = set().union(*counts.values()), f"{path}." if path else ""
        scoring = [
            name
            for name, own in counts.items()
            if known
            and not own
            and len(found := _matrices(part.get_submodule(name))) == 1
            and found[0].shape[0] in known
        ]
        if known:
            experts = tuple(before + name for name, own in counts.items() if own)
            yield Mixture(path, experts, tuple(before + name for name in scoring))


def routers(block: nn.Module) -> set[nn.Parameter]:
    """The matrices of a block that score its experts, see [`mixtures`]."""
    names = {name for mixture in mixtures(block) for name in mixture.routers}
    return {_matrices(block.get_submodule(name))[0] for name in names}


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.dim() >= 2 and not is_vector(parameter)]


def is_vector(parameter: Tensor) -> bool:
    """Whether a parameter of any shape has at most one dimension that is not 1, such as a scale of (1, 1, n)."""
    return parameter.numel() == max(parameter.shape)


def _leads_back_by_rows(shapes: Sequence[tuple[int, int]]) -> bool:
    """Whether gate and up in one are (hidden, 2 · inner), and down is (inner, hidden): both (in, out).

    Stored the other way round they are (2 · inner, hidden) and (hidden, inner), and no sizes fit both.
    """
    return any(
        hidden == back and both == 2 * inner for (hidden, both), (inner, back) in permutations(shapes, 2)
    )  # fmt: skip


def _with_parameters(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if next(child.parameters(), None) is not None]
