"""A model that forgets weights for as long as it is looked at, and never loses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ...common.fences import innermost_forward, is_placed, parameters_in
from ...model.architecture import Architecture, Weight
from ...model.offload import resident


# All values of an int16: half of what a float32 order would hold, at a step of 0.0015 % of a matrix.
LEVELS = 1 << 16


def quantise(order: Tensor) -> Tensor:
    """A removal order of any shape as int16: the share gone before each weight, in 65,536 steps from −32,768."""
    return ((order * LEVELS).div_(order.numel(), rounding_mode="floor") - LEVELS // 2).to(torch.int16)


class MaskedModel:
    """The model with masks that come from removal orders and counts.

    While `active`, each module multiplies by its masked weight, made afresh in its forward from the true one: nothing
    is ever written to a weight, so an exception cannot leave one behind. Two bytes per weight are held.

    Attributes:
        orders: weight name -> quantised removal order, (out_features, in_features) int16.
        counts: weight name -> weights removed; a weight without an order or a count is dense.
        values: weight name -> what takes the weight's place before it is masked, where a method updates what it keeps.
        exact: weight name -> the very mask of a prune, (out_features, in_features), True = keep; it comes before the
            order, whose steps are coarser than one weight where a matrix has more than 65,536.
        solved: weight name -> what makes the whole pruned matrix, (out_features, in_features); it comes before all
            others, and is called in every forward pass, so that no second model is held.
    """

    def __init__(self, model: nn.Module, architecture: Architecture):
        self.model = model
        self.weights = {weight.name: weight for weight in architecture.weights}
        self.orders: dict[str, Tensor] = {}
        self.counts: Mapping[str, int] = {}
        self.values: dict[str, Tensor] = {}
        self.exact: dict[str, Tensor] = {}
        self.solved: dict[str, Callable[[], Tensor]] = {}
        self._on_gradient = None
        self._suspended = False

    def keep(self, name: str, count: int) -> Tensor:
        """The mask of one weight, (out_features, in_features), True = keep."""
        return ~self._before(name, count)

    def band(self, name: str, count: int, width: int) -> Tensor:
        """The weights whose turn is within `width` of `count`: a small change would take them or give them back.

        (out_features, in_features) bool.
        """
        return self._before(name, count + width) & ~self._before(name, count - width)

    def _before(self, name: str, count: int) -> Tensor:
        """The first `count` weights to go: exact up to 65,536 weights, beyond that to one step of the order.

        (out_features, in_features), True = gone.
        """
        size = self.weights[name].size
        level = min(max(count, 0), size) * LEVELS // size - LEVELS // 2
        if level == LEVELS // 2:  # no int16 is as large
            return torch.ones_like(self.orders[name], dtype=torch.bool)
        return self.orders[name] < level

    def _is_masked(self, name: str) -> bool:
        return name in self.exact or name in self.solved or (name in self.orders and name in self.counts)

    def _gone(self, name: str) -> Tensor:
        """What is masked of one weight, (out_features, in_features), True = gone."""
        return ~self.exact[name] if name in self.exact else self._before(name, self.counts[name])

    def value(self, name: str) -> Tensor:
        """The weight before it is masked, (out_features, in_features)."""
        weight = self.weights[name]
        with resident(self.model, [weight.module]):
            return self.values.get(name, weight.tensor(self.model))

    @contextmanager
    def active(self) -> Iterator[None]:
        """The model computes with masked weights inside the context."""
        owners: dict[tuple[str, str], list[Weight]] = {}
        for weight in self.weights.values():
            owners.setdefault((weight.module, weight.attribute), []).append(weight)
        with ExitStack() as stack:
            for (module, attribute), weights in owners.items():
                stack.enter_context(self._substituted(module, attribute, weights))
            yield

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The model computes with its dense weights inside the context, also while it is `active`."""
        self._suspended = True
        try:
            yield
        finally:
            self._suspended = False

    @contextmanager
    def gradients(self, receive) -> Iterator[None]:
        """Backward passes inside the context call `receive(weight, gradient)` once per weight and forward pass.

        The gradient is that of the masked weight, (out_features, in_features), removed entries included.
        """
        self._on_gradient = receive
        try:
            yield
        finally:
            self._on_gradient = None

    @contextmanager
    def _substituted(self, name: str, attribute: str, weights: Sequence[Weight]) -> Iterator[None]:
        """The module `name` computing with its masked parameter, at the innermost place (behind offloading hooks)."""
        owner = self.model.get_submodule(name)
        parameters = parameters_in(owner)
        # An offloaded weight is there while its own module runs, and at no other time.
        around = weights[0].is_read_around(self.model) and not is_placed(owner)
        module = self.model.get_submodule(name.rpartition(".")[0]) if around else owner
        where = innermost_forward(module)
        own, inner = vars(module).get(where), getattr(module, where)

        def forward(*args, **kwargs):
            if self._suspended:
                return inner(*args, **kwargs)
            parameter = parameters[attribute]
            parameters[attribute] = self._masked(parameter, weights)
            try:
                return inner(*args, **kwargs)
            finally:
                parameters[attribute] = parameter

        setattr(module, where, forward)
        try:
            yield
        finally:
            if own is None:
                delattr(module, where)
            else:
                setattr(module, where, own)

    def _masked(self, parameter: Tensor, weights: Sequence[Weight]) -> Tensor:
        """The parameter, one matrix or (experts, ..., ...), with zeros where its weights are masked."""
        known = [weight for weight in weights if self._is_masked(weight.name)]
        if not known and self._on_gradient is None:
            return parameter
        # Of several experts in one parameter each is masked in its part of one copy; a single matrix needs none.
        alone = bool(known) and weights[0].expert is None
        masked = None if alone else parameter.detach().clone()
        for weight in known:
            if weight.name in self.solved:
                new = self.solved[weight.name]().to(parameter)
                masked = weight.matrix(new) if alone else masked
                if not alone:
                    weight.matrix(masked).copy_(new)
                continue
            gone, value = self._gone(weight.name).to(parameter.device), self.values.get(weight.name)
            if alone:  # `matrix` leads from (out_features, in_features) to what is stored as well as back
                dense = parameter if value is None else weight.matrix(value)
                masked = dense.detach().masked_fill(weight.matrix(gone), 0)
            else:
                part = weight.matrix(masked)
                (part if value is None else part.copy_(value)).masked_fill_(gone, 0)
        if self._on_gradient is not None:
            receive = self._on_gradient
            # The masked weight is the leaf: its gradient is not zero where the mask is.
            masked.requires_grad_(True)

            def hand_over(leaf: Tensor) -> None:
                """Give each weight its gradient, (out_features, in_features), out of the parameter's."""
                for weight in weights:
                    receive(weight, weight.matrix(leaf.grad))
                leaf.grad = None  # one gradient is alive at a time

            masked.register_post_accumulate_grad_hook(hand_over)
        return masked
