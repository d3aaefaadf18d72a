"""What whole parts of a model do for it, seen in one pass before anything goes: experts, and blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ....common.progress import progress
from ....model.calls import feed, replaced_forwards
from ....model.padding import real_tokens, without_padding
from ..instead import computing_with, matrices_without
from ..structure import Structures
from .blocks import through


@dataclass
class Usage:
    """Of the structures of a unit, (structures,) float32 each.

    Attributes:
        tokens: how many tokens were given to each.
        output: Σ over them of the norm of what an expert adds, its weight in the mixture included; and of how far a
            block, or a part of one, turns them, 1 − cos(before, after).
    """

    tokens: Tensor
    output: Tensor


@torch.no_grad()
def collect_usage(
    model: nn.Module, units: Mapping[str, Structures], batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, Usage]:
    """Unit -> how its experts are used, or what its blocks do, or what a part of a block does, as one number.

    Args:
        batches (`Sequence[Mapping[str, Tensor]]`): inputs of the model by name, (samples, length, ...).

    Raises:
        ValueError: what they are given could not be observed.
    """
    # Of an offloaded model no weight is anywhere until it runs.
    device = next((each.device for each in model.parameters() if not each.is_meta), torch.device("cpu"))
    sizes = {unit: 1 if each.entire else len(each) for unit, each in units.items()}
    found = {unit: Usage(*torch.zeros(2, size, device=device)) for unit, size in sizes.items()}
    handles, real = [], _Real()
    training = model.training
    try:
        model.eval()
        for unit, each in units.items():
            if each.entire:
                handles.append(_turn_of_part(model, each, found[unit], real))
                continue
            if each.kind == "block":
                handles += _turns(model, each, found[unit], real)
                continue
            name = each.wholes[0].rsplit(".", 2)[0] if each.wholes else each.cuts[0].tensor.rpartition(".")[0]
            watch = _of_modules(model, each) if each.wholes else _of_fused
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(_hook(watch, found[unit], real), with_kwargs=True))
        for batch in progress(batches, "Usage", "batch", "optimum_dsa.prune"):
            for part in without_padding(batch):
                real.tokens = real_tokens(model, part)
                feed(model, part)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    for unit, usage in found.items():
        if not usage.tokens.any():
            instead = ", or score them by their weights, with importance='magnitude'" if "expert" in unit else ""
            raise ValueError(f"{unit}: what they are given could not be observed; leave them whole{instead}.")
    return found


@dataclass
class _Real:
    """Which tokens of a batch are no padding, (samples, length) bool; `None` for all."""

    tokens: Tensor | None = None

    def of(self, number: int, device: torch.device) -> Tensor:
        """(number,) bool, of the tokens of a batch below each other."""
        if self.tokens is None or self.tokens.numel() != number:
            return torch.ones(number, dtype=torch.bool, device=device)
        return self.tokens.flatten().to(device)


# module that is about to run, its arguments -> the number of each expert and the norms of what it adds to its tokens
_Watch = Callable[[nn.Module, tuple, dict[str, Any]], Iterator[tuple[Tensor, Tensor]]]


def _hook(watch: _Watch, usage: Usage, real: _Real) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        for experts, norms in watch(module, args, kwargs):
            counted = real.of(len(experts), experts.device) & (experts >= 0) & (experts < len(usage.tokens))
            index = experts[counted].to(usage.tokens.device)
            usage.tokens.index_add_(0, index, torch.ones(len(index), device=usage.tokens.device))
            usage.output.index_add_(0, index, norms[counted].float().to(usage.tokens.device))

    return hook


def _noted(usage: Usage, number: int, before: Tensor, after: Tensor, real: _Real) -> None:
    """Note how far tokens are turned from `before` to `after`, (samples, ..., hidden size) both."""
    before, after = (hidden.flatten(0, -2).float() for hidden in (before, after))
    counted = real.of(len(before), before.device)
    turned = 1 - torch.cosine_similarity(before, after, dim=-1)
    usage.tokens[number] += counted.sum().to(usage.tokens.device)
    usage.output[number] += turned[counted].sum().to(usage.tokens.device)


def _turns(model: nn.Module, structures: Structures, usage: Usage, real: _Real) -> Iterator[Any]:
    """Hooks on blocks that note how far each turns its tokens."""

    def watch(number: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            _noted(usage, number, *through(args, kwargs, output), real)

        return hook

    for number, name in enumerate(structures.wholes):
        yield model.get_submodule(name).register_forward_hook(watch(number), with_kwargs=True)


def _turn_of_part(model: nn.Module, structures: Structures, usage: Usage, real: _Real) -> Any:
    """A hook on a block that notes how far a part of it turns its tokens: the block is run once more without it."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        # Made anew for each batch: those of all blocks at once would be a third of a model beside it.
        with computing_with(model, matrices_without(model, structures, torch.arange(len(structures)), None, 0.0)):
            without = module.forward(*args, **kwargs)
        _noted(usage, 0, *(one if isinstance(one, Tensor) else one[0] for one in (without, output)), real)

    return model.get_submodule(structures.block).register_forward_hook(hook, with_kwargs=True)


def _of_fused(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Experts of one module, run once more for each of those that a token has.

    It is told them by whole numbers, (tokens, chosen), and their weights of the same shape.
    """
    given = [*args, *kwargs.values()]
    index = next((one for one in given if _is_index(one)), None)
    weights = next((o for o in given if index is not None and _is_weights(o, index)), None)
    if weights is None:
        return

    def only(value: Any, number: int) -> Any:
        # Kernels that group tokens by expert take no strides.
        return value[:, number : number + 1].contiguous() if value is index or value is weights else value

    for number in range(index.shape[1]):
        part = module.forward(*(only(v, number) for v in args), **{k: only(v, number) for k, v in kwargs.items()})
        yield index[:, number], part.flatten(0, -2).norm(dim=-1)


def _is_index(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point() and not value.is_complex()


def _is_weights(value: Any, index: Tensor) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape == index.shape


def _of_modules(model: nn.Module, structures: Structures) -> _Watch:
    """Experts that are modules each: what holds them is run with one of them alone, and with none."""
    experts = [model.get_submodule(name) for name in structures.wholes]

    def watch(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
        rest = None
        for number in (None, *range(len(experts))):
            others = [expert for other, expert in enumerate(experts) if other != number]
            with replaced_forwards(others, lambda index, forward: torch.zeros_like):
                output = module.forward(*args, **kwargs)
            output = (output if isinstance(output, Tensor) else output[0]).flatten(0, -2)
            if rest is None:
                rest = output
                continue
            norms = (output - rest).norm(dim=-1)
            # what adds nothing to a token was not chosen for it
            yield torch.where(norms > 0, number, -1), norms

    return watch
