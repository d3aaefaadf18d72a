"""What pruning did: asked, achieved, and from which data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..common.columns import columns
from ..common.escaping import one_line
from ..model.adapters import plain_name
from ..model.left_dense import told as told_dense
from .allocation import Allocation
from .allocation.layout import place
from .comparison import compared_lines
from .configuration import DSAConfig
from .training import Reconstruction, told, told_whole


if TYPE_CHECKING:
    from .structured.prune import StructuredReport


@dataclass(frozen=True)
class PruningReport:
    """The outcome of `prune`; `print` shows it as a table.

    Attributes:
        config (`DSAConfig`): what was asked.
        allocation (`Allocation`): the sparsity that every unit was given.
        achieved (`Mapping[str, float]`): the share of zeros in every unit afterwards, counted in the weights.
        parameters (`int`): all parameters of the model, prunable or not.
        calibration (`Mapping[str, Any]`): facts of the data: source, samples, length, tokens, seed.
        dense (`Mapping[str, str]`): matrices of the blocks that stayed dense -> why.
        damping (`Mapping[str, float]`): weights whose X·Xᵀ needed more damping than asked -> the damping.
        unseen (`tuple[str, ...]`): weights that no calibration token reached; they were scored by magnitude.
        permuted (`Mapping[str, tuple[float, float]]`): weights whose columns were put in another order -> the share of
            their score that the pattern leaves, before and after.
        reconstruction (`Mapping[str, Reconstruction]`): blocks that were trained -> what that did.
        seconds (`float`): wall time.
        compared (`Mapping[str, float]`): allocation -> validation loss of the model pruned with it, best first, where
            the config asked for `"auto"`.
        compared_on (`Mapping[str, int]`): the `windows` of text, and their `length`, that those losses are of.
        chosen_by (`str`, *optional*): what trained the model and chose its zeros meanwhile, a recovery method; `None`
            where the config's method chose them. Pattern, units and counts are those of config and allocation.
        zeros_before (`Mapping[str, int]`): weights that had zeros before -> how many, all of which stayed.
        dense_sizes (`Mapping[str, int]`): how many weights each matrix of `dense` has.
        trained_before (`tuple[Mapping[str, Any], ...]`): what trained the model before this prune, first to last, as
            far as it is known.
        structured (`StructuredReport`, *optional*): what was cut out of the model, before weights were pruned.
        distillation (`Mapping[str, float]`): what training the whole model did: nats a token that its predictions lost
            "before" and "after", on held-out windows, the "rate" and the "steps"; else empty.
        divided (`bool`): whether several processes did it together, all of which have the model; not written down.
    """

    config: DSAConfig
    allocation: Allocation
    achieved: Mapping[str, float]
    parameters: int
    calibration: Mapping[str, Any] | None = None
    dense: Mapping[str, str] = field(default_factory=dict)
    damping: Mapping[str, float] = field(default_factory=dict)
    unseen: tuple[str, ...] = ()
    seconds: float = 0.0
    # Behind what was there before, for who gives them by position.
    permuted: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    reconstruction: Mapping[str, Reconstruction] = field(default_factory=dict)
    compared: Mapping[str, float] = field(default_factory=dict)
    compared_on: Mapping[str, int] = field(default_factory=dict)
    chosen_by: str | None = None
    zeros_before: Mapping[str, int] = field(default_factory=dict)
    dense_sizes: Mapping[str, int] = field(default_factory=dict)
    trained_before: tuple[Mapping[str, Any], ...] = ()
    structured: StructuredReport | None = None
    distillation: Mapping[str, float] = field(default_factory=dict)
    divided: bool = field(default=False, compare=False)

    @property
    def removed(self) -> int:
        """Zeros in the prunable weights."""
        # A share is a count divided by a size: rounding gives the whole number back.
        return sum(round(self.achieved[unit] * size) for unit, size in self.allocation.sizes.items())

    @property
    def sparsity(self) -> float:
        """Share of zeros in the prunable weights."""
        return self.removed / sum(self.allocation.sizes.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the part of `dsa_config.json` that describes the result."""
        data = {
            "config": self.config.to_dict(),
            "allocation": self.allocation.to_dict(),
            "achieved": {
                "sparsity": self.sparsity,
                "sparsity_of_all_parameters": self.removed / self.parameters,
                "removed": self.removed,
                "prunable": sum(self.allocation.sizes.values()),
                "parameters": self.parameters,
                "units": dict(self.achieved),
            },
            "calibration": dict(self.calibration) if self.calibration else None,
            "dense": dict(self.dense),
            "damping": dict(self.damping),
            "unseen": list(self.unseen),
            "permuted": {name: list(shares) for name, shares in self.permuted.items()},
            "reconstruction": {block: asdict(found) for block, found in self.reconstruction.items()},
            "seconds": round(self.seconds, 3),
        }
        if self.structured is not None:
            from .structured.described import structured_to  # which prunes with steps that are reported here

            data["structured"] = structured_to(self.structured)
        more = {
            "compared": dict(self.compared),
            "compared_on": dict(self.compared_on),
            "chosen_by": self.chosen_by,
            "zeros_before": dict(self.zeros_before),
            "dense_sizes": dict(self.dense_sizes),
            "trained_before": list(map(dict, self.trained_before)),
            "distillation": dict(self.distillation),
        }
        return data | {name: value for name, value in more.items() if value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruningReport:
        """The report in `to_dict`'s form, such as the content of `dsa_config.json`."""
        structured = data.get("structured")
        if structured is not None:
            from .structured.described import structured_from

            structured = structured_from(structured)
        return cls(
            config=DSAConfig.from_dict(data["config"]),
            allocation=Allocation.from_dict(data["allocation"]),
            achieved=dict(data["achieved"]["units"]),
            parameters=data["achieved"]["parameters"],
            calibration=data.get("calibration"),
            dense=dict(data.get("dense") or {}),
            damping=dict(data.get("damping") or {}),
            unseen=tuple(data.get("unseen") or ()),
            permuted={name: tuple(shares) for name, shares in (data.get("permuted") or {}).items()},
            reconstruction={
                block: Reconstruction(**found) for block, found in (data.get("reconstruction") or {}).items()
            },
            seconds=data.get("seconds", 0.0),
            compared=dict(data.get("compared") or {}),
            compared_on=dict(data.get("compared_on") or {}),
            chosen_by=data.get("chosen_by"),
            zeros_before=dict(data.get("zeros_before") or {}),
            dense_sizes=dict(data.get("dense_sizes") or {}),
            trained_before=tuple(data.get("trained_before") or ()),
            structured=structured,
            distillation=dict(data.get("distillation") or {}),
        )

    @property
    def notes(self) -> list[str]:
        """What there is to say beside the table, a line each."""
        notes = []
        if self.structured is not None:
            notes.append(f"structures were cut out before: {self.structured}")
        if "bos" in (self.calibration or {}):
            notes.append(f"calibrated on sequences {'that start with' if self.calibration['bos'] else 'without'} BOS")
        if self.chosen_by:
            notes.append(f"the zeros were chosen by {self.chosen_by}, while the model was trained (recover)")
        if self.dense:
            left = f"left dense: {len(self.dense)} matrices ({', '.join(sorted(set(self.dense.values())))})"
            # what is pruned outside the blocks is none of their weights
            prunable = sum(size for unit, size in self.allocation.sizes.items() if place(unit).index is not None)
            notes.append(f"{left}, {told_dense(self.dense_sizes, prunable)}" if self.dense_sizes else left)
        if self.damping:
            notes.append(f"damping raised for {len(self.damping)} weights, to {max(self.damping.values()):g} at most")
        if self.compared:
            losses, *more = compared_lines(self.compared, self.compared_on).values()
            found = "; ".join([losses, *more])
            notes.append(f"allocations compared by their validation loss after the prune: {found}")
        if self.trained_before:
            methods = [(one.get("config") or {}).get("method") or str(one.get("kind")) for one in self.trained_before]
            notes.append(f"the model was trained before it was pruned: {', '.join(methods)}")
        if self.zeros_before and not self.chosen_by:
            before = sum(self.zeros_before.values())
            share = before / sum(self.allocation.sizes.values())
            notes.append(f"{before:,} weights ({share:.4f}) were zero before, and stayed so")
        if self.unseen:
            notes.append(f"{len(self.unseen)} weights saw no calibration token and were scored by magnitude")
        if self.permuted:
            before, after = (sum(shares) / len(self.permuted) for shares in zip(*self.permuted.values()))
            notes.append(
                f"channels of {len(self.permuted)} weights in another order: {after:.2%} of their score stays, and "
                f"{before:.2%} would have"
            )
        if self.reconstruction:
            notes.append(told(self.reconstruction))
        if self.distillation:
            notes.append(told_whole(self.distillation))
        return notes

    def __str__(self) -> str:
        sizes, asked, size = self.allocation.sizes, self.allocation.sparsity, sum(self.allocation.sizes.values())
        overall = self.removed / self.parameters
        header, *lines = columns(
            [
                ("unit", "weights", "asked", "achieved"),
                *(
                    (unit, f"{sizes.get(unit, 0):,}", f"{asked.get(unit, 0.0):.4f}", f"{value:.4f}")
                    for unit, value in self.achieved.items()
                ),
                ("prunable weights", f"{size:,}", f"{self.config.sparsity:.4f}", f"{self.sparsity:.4f}"),
                ("all parameters", f"{self.parameters:,}", "", f"{overall:.4f}"),
            ]
        )
        lines = [header, *lines[:-2], "-" * len(header), *lines[-2:]]
        return "\n".join(map(one_line, [*lines, *self.notes]))


def plain_report(report: PruningReport) -> PruningReport:
    """`report` under the names that weights have without adapters."""
    named = ("achieved", "dense", "damping", "permuted", "zeros_before", "dense_sizes")
    return replace(
        report,
        allocation=_plain(report.allocation),
        unseen=tuple(map(plain_name, report.unseen)),
        **{part: {plain_name(name): value for name, value in getattr(report, part).items()} for part in named},
    )


def _plain(allocation: Allocation) -> Allocation:
    sparsity, sizes = (
        {plain_name(name): value for name, value in part.items()} for part in (allocation.sparsity, allocation.sizes)
    )
    return replace(allocation, sparsity=sparsity, sizes=sizes)
