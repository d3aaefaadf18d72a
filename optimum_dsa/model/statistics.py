"""What calibration leaves behind for one weight matrix."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .factor import InverseFactor, Spectrum, damped, factor_of_inverse


logger = logging.getLogger(__name__)

# The share that the published SparseGPT code adds as `percdamp`.
DAMPING = 0.01
CHUNK = 2**20  # inputs that are copied at once: bounds the memory, and stays in a processor's cache
SUMS = ("squared_sum", "sum", "gram", "drift", "lack")  # fields of `LayerStatistics` that add up over inputs
GPU_CHUNK = 2**24  # the same where there is no cache to stay in, and every call has to be worth its launch


@dataclass
class LayerStatistics:
    """Sums over the inputs x of one linear map, in float32.

    Attributes:
        squared_sum (`Tensor`): (in_features,), Σ x_j² over all tokens.
        gram (`Tensor`): (in_features, in_features), Σ x xᵀ over all tokens; `None` unless it was asked for.
        sum (`Tensor`): (in_features,), Σ x_j over all tokens; `None` unless it was asked for.
        tokens (`int`): inputs seen. A routed expert counts those that reached it.
        sequences (`int`): sequences seen.
        stand_in (`float`): what every Σ x_j² is taken to be where no input was seen.
        drift (`Tensor`): (in_features, in_features), Σ (x_dense − x) xᵀ over all tokens, x_dense being what the dense
            model gives in the place of x; `None` where no such input was seen.
        lack (`Tensor`): (out_features, in_features), Σ (h_dense − h) xᵀ, h being the residual stream to which the
            outputs are added; `None` where they are not, or nobody asked.
        paired (`int`): inputs whose x_dense was seen. A routed expert has none: the dense model routes other tokens.

    Of weights that share an input these are one object; where gradients are read, which are each weight's own, views
    of one, see [`LayerStatistics.of_weight`].

    A matrix that saw no input at all (an expert that no token was routed to) answers as if its inputs were white: its
    scores fall back to the weights alone. `stand_in` brings them to the scale of those beside it, or allocators that
    compare scores would take it for another kind of matrix.
    """

    in_features: int
    device: torch.device | str = "cpu"
    with_gram: bool = False
    tokens: int = 0
    sequences: int = 0
    squared_sum: Tensor = None
    gram: Tensor | None = None
    stand_in: float | None = None
    drift: Tensor | None = None
    lack: Tensor | None = None
    paired: int = 0
    with_sum: bool = False
    sum: Tensor | None = None
    _lacking: int = field(default=0, repr=False)
    _gradients: dict[str, Tensor] = field(default_factory=dict, repr=False)  # what a walk read -> of this weight
    # what was computed of the sums, with the damping it took: one for all views of them
    _derived: dict[str, tuple[float, Any]] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        if self.squared_sum is None:
            self.squared_sum = torch.zeros(self.in_features, dtype=torch.float32, device=self.device)
        if self.with_gram and self.gram is None:
            self.gram = torch.zeros(self.in_features, self.in_features, dtype=torch.float32, device=self.device)
        if self.with_sum and self.sum is None:
            self.sum = torch.zeros_like(self.squared_sum)

    @torch.no_grad()
    def update_(self, inputs: Tensor) -> None:
        """Add a batch of inputs, (..., in_features) of any dtype, in place.

        Their sums are made apart and then added: whoever makes those of a batch elsewhere, as another process does,
        and adds them in the same order ends with the same bits.
        """
        rows = inputs.reshape(-1, inputs.shape[-1])
        # Into empty sums at once: what is added to zeros has the same bits, and a gram beside a gram takes memory.
        part = self if self.tokens == 0 else self.empty()
        part._count(rows)
        if part is not self:
            self.add_(part)
        self.release_()

    def empty(self) -> LayerStatistics:
        """Sums of the same kind in which nothing is counted yet."""
        return LayerStatistics(self.in_features, self.device, self.with_gram, with_sum=self.with_sum)

    @torch.no_grad()
    def add_(self, other: LayerStatistics) -> None:
        """Add the sums of other inputs of the same weight, in place; sequences are not counted by it."""
        self.tokens += other.tokens
        self.paired += other.paired
        self._lacking += other._lacking
        for name in SUMS:
            if (more := getattr(other, name)) is not None:
                own = getattr(self, name)
                setattr(self, name, _sum(own, more.clone() if own is None else more))
        if self.gram is not None:
            self.squared_sum.copy_(self.gram.diagonal())
        self.release_()

    def _count(self, rows: Tensor) -> None:
        """Add `rows`, (tokens, in_features), to sums that are empty."""
        self.tokens += rows.shape[0]
        # With a gram at least in_features rows: every part reads and writes the whole gram.
        chunk = (GPU_CHUNK if rows.is_cuda else CHUNK) // self.in_features
        for part in rows.split(max(chunk, 1 if self.gram is None else self.in_features)):
            if self.sum is not None:
                self.sum += part.sum(dim=0, dtype=torch.float32)
            if self.gram is None:
                # float16 ends at 65,504: the square of an input of 256 is beyond it.
                self.squared_sum += part.float().square().sum(dim=0)
            elif part.is_cuda and sums_halves_in_float32(part.device, part.dtype):
                # The product of two halves is a float32 without rounding, so that tensor cores lose nothing.
                self.gram += torch.mm(part.t(), part, out_dtype=torch.float32)
            else:
                part = part.float()
                self.gram.addmm_(part.t(), part)
        if self.gram is not None:
            # The same sums, so that a metric on Σ x² and an update on X·Xᵀ never disagree about a dead input.
            self.squared_sum.copy_(self.gram.diagonal())

    @torch.no_grad()
    def pair_(self, inputs: Tensor, dense: Tensor) -> None:
        """Add to `drift`, in place, the inputs of a batch and those of the dense model, (..., in_features) both."""
        rows, others = inputs.reshape(-1, inputs.shape[-1]), dense.reshape(-1, dense.shape[-1])
        self.paired += rows.shape[0]
        width, found = max(CHUNK // self.in_features, self.in_features), None
        for part, other in zip(rows.split(width), others.split(width)):
            # The difference and not X_dense·Xᵀ: exactly zero where nothing is pruned yet, and small behind that.
            part = part.float()
            missing = (other.float() - part).t()
            found = missing @ part if found is None else found.addmm_(missing, part)
        self.drift = _sum(self.drift, found)

    @torch.no_grad()
    def lack_(self, inputs: Tensor, missing: Tensor) -> None:
        """Add to `lack`, in place, a batch's inputs, (..., in_features), and h_dense − h, (..., out_features)."""
        rows, others = inputs.reshape(-1, inputs.shape[-1]), missing.reshape(-1, missing.shape[-1])
        self._lacking += rows.shape[0]
        found = others.float().t() @ rows.float()
        self.lack = _sum(self.lack, found)

    @torch.no_grad()
    def reorder_(self, order: Tensor) -> None:
        """Put the inputs in another order, in place: input k becomes what input `order[k]` was, (in_features,)."""
        self.squared_sum = self.squared_sum[order]
        if self.sum is not None:
            self.sum = self.sum[order]
        for name in ("gram", "drift"):
            if (moment := getattr(self, name)) is not None:
                setattr(self, name, moment[order[:, None], order])
        if self.lack is not None:
            self.lack = self.lack[:, order]
        self.release_()

    @torch.no_grad()
    def without(self, gone: Tensor) -> LayerStatistics:
        """These sums as if the inputs `gone`, (in_features,) bool, had never fired; a new X·Xᵀ where there is one."""
        sums = {
            name: None if (value := getattr(self, name)) is None else value.masked_fill(gone, 0)
            for name in ("squared_sum", "sum", "gram")
        }
        if sums["gram"] is not None:
            sums["gram"].masked_fill_(gone[:, None], 0)
        return replace(self, **sums, drift=None, lack=None, _derived={})

    def of_weight(self, gradients: Mapping[str, Tensor]) -> LayerStatistics:
        """A view of these sums, and of what is computed of them, with `gradients` of one of the weights.

        Args:
            gradients (`Mapping[str, Tensor]`): "gradients" or "regional" -> (out_features, in_features) float32.
        """
        return replace(self, _gradients=dict(gradients))

    def shares(self, other: LayerStatistics | None) -> bool:
        """Whether both are of one and the same input."""
        return other is not None and other.squared_sum is self.squared_sum

    @property
    def gradient(self) -> Tensor:
        """(out_features, in_features), √ of the sum over samples of the squared gradient of the dense model's loss.

        Raises:
            ValueError: it was not collected.
        """
        return self._gradient("gradients")

    @property
    def regional_gradient(self) -> Tensor:
        """(out_features, in_features), as `gradient`, of ‖f(X)‖₂, X going into the weight's block as it is walked.

        Raises:
            ValueError: it was not collected.
        """
        return self._gradient("regional")

    def _gradient(self, read: str) -> Tensor:
        if read not in self._gradients:
            raise ValueError(
                f'Gradients were not collected; walk the blocks with reads={{"inputs", "{read}"}} for this metric.'
            )
        return self._gradients[read]

    @property
    def lacks(self) -> bool:
        """Whether `lack` is a sum over all the inputs that were seen."""
        return self.lack is not None and self._lacking == self.tokens

    @property
    def is_paired(self) -> bool:
        """Whether `drift` and `cross` are sums over all the inputs that were seen."""
        return self.drift is not None and self.paired == self.tokens

    @property
    def cross(self) -> Tensor:
        """(in_features, in_features), X_dense·Xᵀ: Σ x_dense xᵀ over all tokens.

        Raises:
            ValueError: it was not collected, or not for all inputs.
        """
        if not self.is_paired:
            raise ValueError('X_dense·Xᵀ was not collected; walk the blocks with reads={"gram", "cross_gram"}.')
        return self.second_moment + self.drift

    @property
    def input_norm(self) -> Tensor:
        """(in_features,), √(Σ x² over tokens ÷ number of sequences): the scaler of the published Wanda code."""
        if self.tokens == 0 and self.stand_in is None:
            return torch.ones_like(self.squared_sum)
        # By sequences and not by tokens, as the published code divides, so that scores have its scale.
        found = self.squared_sum if self.tokens else torch.full_like(self.squared_sum, self.stand_in)
        return (found / max(self.sequences, 1)).sqrt_()

    @property
    def mean(self) -> Tensor:
        """(in_features,), the mean of x_j over all tokens; 0 where no input was seen.

        Raises:
            ValueError: Σ x_j was not collected.
        """
        if self.sum is None:
            raise ValueError('Σ x was not collected; walk the blocks with reads={"inputs", "mean"} for this update.')
        return self.sum / max(self.tokens, 1)

    @property
    def second_moment(self) -> Tensor:
        """(in_features, in_features), X·Xᵀ as it is used: `gram`, or what stands in for it. Not to be written to.

        Raises:
            ValueError: no `gram` was collected.
        """
        if self.gram is None:
            raise ValueError('X·Xᵀ was not collected; walk the blocks with reads={"gram"} for this metric or update.')
        if self.tokens:
            return self.gram
        return torch.diag(torch.full_like(self.squared_sum, 1.0 if self.stand_in is None else self.stand_in))

    @property
    def dead(self) -> Tensor:
        """(in_features,) bool: inputs that never fired, whose weights multiply nothing."""
        return (self.second_moment.diagonal() if self.with_gram else self.input_norm) == 0

    def release_(self) -> None:
        """Give up, in place, what was derived of the sums: it is computed again if somebody asks."""
        self._derived.clear()

    @property
    def damping_used(self) -> float | None:
        """The damping that the last `inverse_factor` took."""
        return self._derived["factor"][1].damping if "factor" in self._derived else None

    def inverse_factor(self, damping: float = DAMPING) -> InverseFactor:
        """The `InverseFactor` at `damping` times the mean of diag(X Xᵀ), computed once.

        Inputs that never fired get a one on the diagonal. Where the factorisation fails, the damping is raised
        tenfold until it succeeds, and a warning says so.

        Raises:
            ValueError: no `gram` was collected, or it is so ill-conditioned that no damping up to 10⁸ helps.

        Frantar & Alistarh, 2023, https://arxiv.org/abs/2301.00774, section 3.3.
        """
        if (known := self._derived.get("factor")) and known[0] == damping:
            return known[1]
        moment = self.second_moment
        # Without any damping there is nothing to multiply: then from the usual share on.
        for attempt in [damping * 10.0**power for power in range(11)] if damping > 0 else [0.0, DAMPING, 1.0, 100.0]:
            factor = factor_of_inverse(damped(moment, attempt))
            if factor is not None:
                break
        else:
            shape = tuple(self.gram.shape)
            raise ValueError(f"X·Xᵀ, {shape}, has no Cholesky factor at any damping up to {attempt:g}.")
        if attempt != damping:
            logger.warning("X·Xᵀ is ill-conditioned: the damping was raised from %g to %g.", damping, attempt)
        found = InverseFactor(factor, attempt)
        self._derived["factor"] = (damping, found)
        return found

    def scaled_moment(self, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
        """H, (in_features, in_features), of unit diagonal, and its `scale`, (in_features,), see [`Spectrum`].

        A new matrix at every call. Inputs that never fired are uncorrelated with all others, and their scale is not 0.

        Raises:
            ValueError: no `gram` was collected.
        """
        hessian = damped(self.second_moment, damping)
        scale = hessian.diagonal().sqrt()
        hessian.div_(scale).div_(scale[:, None])
        return hessian, scale

    def spectrum(self, damping: float = DAMPING) -> Spectrum:
        """The `Spectrum` at `damping` times the mean of diag(X Xᵀ), computed once.

        Weights that share an input share these statistics, and with them the most expensive step of an update.

        Raises:
            ValueError: no `gram` was collected.
        """
        if (known := self._derived.get("spectrum")) is None or known[0] != damping:
            hessian, scale = self.scaled_moment(damping)
            try:
                values, vectors = torch.linalg.eigh(hessian)
            except torch.linalg.LinAlgError:  # float32 can fail to converge where eigenvalues lie very close
                values, vectors = (part.float() for part in torch.linalg.eigh(hessian.double()))
            # A sum of squares has no negative eigenvalue; rounding gives it some.
            known = self._derived["spectrum"] = (damping, Spectrum(scale, values.clamp_min_(0), vectors))
        return known[1]


@dataclass(frozen=True)
class CollectedStatistics:
    """Statistics that somebody else has collected, instead of calibration data: a walk over them runs nothing.

    Attributes:
        statistics (`Mapping[str, LayerStatistics]`): by weight name.
        source (`str`): where they come from.
    """

    statistics: Mapping[str, LayerStatistics]
    source: str

    def facts(self) -> dict[str, Any]:
        """What a pruned model's description says of its calibration."""
        tokens = max((found.tokens for found in self.statistics.values()), default=0)
        return {"source": self.source, "samples": None, "length": None, "tokens": tokens, "seed": None}


@cache
def sums_halves_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of float16 or bfloat16 matrices can be had in float32 there, without copies in float32."""
    if dtype not in (torch.float16, torch.bfloat16):
        return False
    try:
        some = torch.ones(16, 16, device=device, dtype=dtype)
        return bool((torch.mm(some, some, out_dtype=torch.float32) == 16).all())
    except (RuntimeError, TypeError):  # no kernel for this device, or a PyTorch that does not know the argument
        return False


def _sum(total: Tensor | None, more: Tensor) -> Tensor:
    """`total` with `more` added to it in place, of any one shape; where there is none, `more` itself."""
    # As if to zeros, in which no -0 is left.
    return more.add_(0.0) if total is None else total.add_(more)
