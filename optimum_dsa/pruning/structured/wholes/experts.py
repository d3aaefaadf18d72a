"""Experts as structures: where they are, and a router that chooses some of them never."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ....model.experts import Mixture, fused_parameters, mixtures
from ....model.walk import WalkedBlock
from ..structure import Cut, Structures


# What modules and configurations call the number of experts that are chosen for a token.
_CHOSEN = (
    *("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"),
    *("experts_per_token", "num_selected_experts"),
)
_PRODUCTS = {nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}


def expert_structures(walked: WalkedBlock, dense: Mapping[str, str]) -> Iterator[Structures]:
    """The experts of a block, by mixture; `dense` tells weights that stay as they are -> why."""
    block = walked.model.get_submodule(walked.name)
    for mixture in mixtures(block):
        if len(mixture.experts) == len(mixture.routers) == 1:
            found = _structures(walked, block, mixture)
            if found is not None and not any(
                why == "excluded" and _owns(found, name.partition("[")[0]) for name, why in dense.items()
            ):
                yield found


def _owns(structures: Structures, name: str) -> bool:
    return any(name == cut.tensor for cut in structures.cuts) or name.startswith(
        tuple(f"{whole}." for whole in structures.wholes) or ("\0",)
    )


def _structures(walked: WalkedBlock, block: nn.Module, mixture: Mixture) -> Structures | None:
    """`None` where not every expert is one thing alone."""
    name, router = mixture.experts[0], mixture.routers[0]
    held, cuts, wholes, around = block.get_submodule(name), [], (), {mixture.name, name, router}
    if isinstance(held, nn.ModuleList):
        wholes = tuple(f"{walked.name}.{name}.{number}" for number in range(len(held)))
        count = len(held)
    else:
        if not fused_parameters(held):  # it sends tokens to the one part that has parameters
            name = next(
                f"{name}.{child}" for child, part in held.named_children() if any(True for _ in part.parameters())
            )
            held, around = block.get_submodule(name), around | {name}
        ways = fused_parameters(held)
        count = next(iter(ways.values())).count
        if any(how.idle for how in ways.values()):
            return None
        cuts = list(_rows(f"{walked.name}.{name}", held, count))
    cuts += _rows(f"{walked.name}.{router}", block.get_submodule(router), count)
    modules = [vars(block.get_submodule(part)) for part in sorted(around)]
    # Of a configuration `top_k` may be how text is drawn.
    config = {name: value for name, value in vars(walked.model.config.get_text_config()).items() if name != "top_k"}
    chosen = _numbers(modules) or _numbers([config])
    names = tuple(f"{walked.name}.{part}".rstrip(".") for part in sorted(around))
    unit = f"{walked.name}:expert"
    return Structures(unit, "expert", tuple(cuts), (), wholes=wholes, least=max(chosen, default=1), around=names)


def _numbers(holders: list[dict[str, Any]]) -> list[int]:
    """How many experts are chosen for a token, as attributes say."""
    found = [holder.get(name) for holder in holders for name in _CHOSEN]
    return [value for value in found if isinstance(value, int) and not isinstance(value, bool)]


def _rows(prefix: str, module: nn.Module, count: int) -> Iterator[Cut]:
    """The parts of a module's own tensors, one or several rows for each of `count` experts."""
    for path, part in module.named_modules():
        fused = fused_parameters(part)
        for attribute, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            rows = tensor.shape[0] if tensor.dim() else 0
            # Of two dimensions, the matrices of all experts stand below each other.
            if rows == count or (attribute in fused and tensor.dim() == 2):
                yield Cut(".".join(filter(None, (prefix, path, attribute))), 0, torch.arange(rows).view(count, -1))


@torch.no_grad()
def unrouted(model: nn.Module, structures: Structures, gone: Tensor) -> None:
    """Have a router give the experts `gone`, (n,) int64, a logit of -inf, before any are chosen; in place."""
    router = _router(structures)
    module = model.get_submodule(router)
    inside = [cut.tensor.removeprefix(f"{router}.") for cut in structures.cuts if cut.tensor.startswith(f"{router}.")]
    plain = module.forward

    @wraps(plain)
    def forward(*args, **kwargs):
        tensors = [module.get_submodule(name.rpartition(".")[0]) for name in inside]
        owned = [getattr(part, name.rpartition(".")[2]) for part, name in zip(tensors, inside)]
        with _Masked(owned, gone):
            return plain(*args, **kwargs)

    module.forward = forward


@contextmanager
def routed_without(model: nn.Module, structures: Structures, gone: Tensor) -> Iterator[None]:
    """`unrouted`, for as long as the context is open."""
    module = model.get_submodule(_router(structures))
    own = vars(module).get("forward")
    try:
        if len(gone):
            unrouted(model, structures, gone)
        yield
    finally:
        vars(module).pop("forward", None)
        if own is not None:
            module.forward = own


def _router(structures: Structures) -> str:
    """The full name of the module that scores the experts."""
    return max((name for name in structures.around if structures.cuts[-1].tensor.startswith(f"{name}.")), key=len)


class _Masked(TorchFunctionMode):
    """Products of the router's matrix, and vectors that are added to its scores, are -inf where experts are gone.

    Args:
        owned: matrices and vectors with a row for each expert.
    """

    def __init__(self, owned: list[Tensor], gone: Tensor):
        super().__init__()
        self._matrices = [tensor for tensor in owned if tensor.dim() > 1]
        self._vectors = [tensor for tensor in owned if tensor.dim() == 1]
        self._gone = gone

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        made = func(*args, **kwargs)
        # What is made of the matrix alone is it in another dtype, or turned round.
        if any(value is known for value in given for known in self._matrices) and isinstance(made, Tensor):
            if func in _PRODUCTS:
                return made.index_fill(-1, self._gone.to(made.device), float("-inf"))
            self._matrices.append(made)
        elif any(value is known for value in given for known in self._vectors) and isinstance(made, Tensor):
            if made.dim() > 1 and made.is_floating_point():
                return made.index_fill(-1, self._gone.to(made.device), float("-inf"))
            self._vectors.append(made)
        return made
