"""The sparse copy of one model's weights in ADMM, and its duals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...model.architecture import Weight
from ...model.sharded import is_sharded, local, reshard, shared_like, whole
from ...pruning.unstructured.patterns import Pattern
from ..gradual.held_zeros import keep_alive_


FILE = "dsa_elsa.safetensors"  # in a Trainer's checkpoint: what `SplitWeights.stored` gives


@dataclass
class Split:
    """u of one matrix, and where z is zero. z needs no tensor: where it is not zero it follows x.

    A projection gives z the kept entries of x + u and leaves u the others, so that u is zero where z is not.

    Attributes:
        dual: u, scaled by the penalty, (out_features, in_features), float32.
        keep: the same shape, bool: where z may be other than zero.
    """

    dual: Tensor
    keep: Tensor


class SplitWeights:
    """x, z and u of minimise f(x) + indicator(z has the budget's zeros), x = z; x are the model's own weights.

    Lee et al., 2025, https://arxiv.org/abs/2510.01650, with its objective-aware projection: what goes are the lowest
    v · (x + u)², v the optimizer's running mean of squared gradients, a diagonal of the Fisher matrix.

    Args:
        model (`nn.Module`): the model that is trained.
        weights (`Mapping[Weight, int]`): matrices, and how many entries of each go.
        pattern (`Pattern`): within which sets.
    """

    def __init__(self, model: nn.Module, weights: Mapping[Weight, int], pattern: Pattern):
        self.model, self.weights = model, dict(weights)
        # On its way to N:M a budget has other N; "mixed" takes the N from the count, in the end the same.
        self.pattern = Pattern("mixed", pattern.width) if pattern.kind == "n:m" else pattern
        self.splits: dict[str, Split] = {}
        experts = [weight.name for weight in self.weights if weight.expert is not None]
        if experts and is_sharded(model):
            raise ValueError(
                f"{experts[0]} is one of several experts in one parameter, of which FSDP gives processes whole "
                "experts; train under a budget with DDP, or leave experts dense with exclude."
            )

    @torch.no_grad()
    def begin(self) -> None:
        """z = x and u = 0: the budget is not there yet."""
        for weight, x in self._matrices():
            self.splits[weight.name] = Split(torch.zeros_like(x), torch.ones_like(x, dtype=torch.bool))

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `stored` gave.

        Raises:
            ValueError: a matrix is missing, or has another shape.
        """
        for weight, x in self._matrices():
            parts = [tensors.get(f"{weight.name}:{part}") for part in ("dual", "keep")]
            if any(part is None or part.shape != x.shape for part in parts):
                raise ValueError(f"What was stored has nothing of the shape of {weight.name}, {tuple(x.shape)}.")
            self.splits[weight.name] = Split(*(shared_like(part.to(x.device), x) for part in parts))

    def stored(self) -> dict[str, Tensor]:
        """Two tensors per matrix by name, of its shape: what `restore` takes; of a sharded model all have to ask."""
        return {
            f"{name}:{part}": whole(getattr(found, part)).contiguous()
            for name, found in self.splits.items()
            for part in ("dual", "keep")
        }

    @torch.no_grad()
    def pull(self, penalty: float) -> None:
        """x -= penalty · (x - z + u), in place; only where z is zero, as elsewhere it is x.

        Beside the optimizer, as AdamW does with weight decay, and not as a part of the gradient: Adam divides that by
        its own size, so that weights come to zero no faster than the learning rate, while u grows and turns the mask
        over at every projection.
        """
        for weight, x in self._matrices():
            found = self.splits[weight.name]
            x.sub_((x + found.dual).mul_(~found.keep), alpha=penalty)

    @torch.no_grad()
    def project(self, moments: Mapping[Tensor, Tensor], share: float = 1.0) -> None:
        """z = the projection of x + u onto `share` of the budget's zeros, and u = x + u - z.

        Args:
            moments (`Mapping[Tensor, Tensor]`): parameter -> running mean of its squared gradients; by magnitude alone
                where one is missing.
        """
        for weight, x in self._matrices():
            moment, total = moments.get(weight.parameter(self.model)), x + self.splits[weight.name].dual
            # √v · |x + u| has the order of v · (x + u)², whose smallest values float32 would not hold.
            scores = total.abs() if moment is None else total.abs().mul_(weight.matrix(moment).sqrt())
            # which are the lowest only the whole matrix tells
            keep = shared_like(self.pattern.keep(whole(scores), round(share * self.weights[weight])), x)
            self.splits[weight.name] = Split(total.mul_(~keep), keep)

    @torch.no_grad()
    def residual(self) -> float:
        """‖x - z‖ / ‖x‖ over all matrices: 0 where the weights are as sparse as the budget says."""
        apart = squares = 0.0
        for weight, x in self._matrices():
            apart += float(whole((x * ~self.splits[weight.name].keep).square().sum()))
            squares += float(whole(x.square().sum()))
        return (apart / squares) ** 0.5 if squares else 0.0

    @torch.no_grad()
    def make_sparse(self) -> None:
        """x = z, in place; a kept weight that is zero by chance becomes the smallest number."""
        for weight, x in self._matrices():
            keep = self.splits[weight.name].keep
            x.mul_(keep)
            keep_alive_(local(x), local(keep))

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        """Each matrix, (out_features, in_features), with a copy of it."""
        return [(x, x.clone()) for _, x in self._matrices()]

    def _matrices(self) -> Iterator[tuple[Weight, Tensor]]:
        # Looked up each time: a Trainer that moves the model replaces the tensors behind its parameters.
        reshard(self.model)
        return ((weight, weight.tensor(self.model)) for weight in self.weights)
