"""`DSAStructuredConfig`: everything that decides a model that was made smaller, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...common.registry import Registry, near
from ...common.settings import check_settings, section, setting, settings_from, settings_to
from ...data import DataConfig
from ...model.activations import PLACES
from ...model.statistics import DAMPING
from ..allocation import Allocation
from ..overrides import parsed
from ..sections import ReconstructConfig
from ..targets import TARGETS
from .importance import IMPORTANCES, importance_of
from .structure import ENTIRE, KINDS, WHOLE
from .widths.costs import COSTS
from .widths.shares import SHARES, allocator_of


UPDATES = ("none", "bias", "refit")  # what makes up for structures that go
# Whether all blocks stay alike, may differ, or may differ and are filled up with zeros: the rows of layout.LAYOUTS.
LAYOUTS = ("uniform", "per_layer", "padded")
# Allocations that look at nothing but importances, so that they are of experts, too.
OF_EXPERTS = ("uniform", "stability", "global", "atp")


def learners() -> Registry:
    """The rows of `LEARNERS`, which need this module."""
    from .learners import LEARNERS

    return LEARNERS


def tells_of_experts(allocation: str) -> bool:
    """Whether an allocation, by its name, text or place, says how many experts go: it looks at no matrices."""
    if allocation in SHARES or allocation in OF_EXPERTS:
        return allocation in OF_EXPERTS
    found = allocator_of(allocation)
    return found is None or found.reads == "scores"


def rise_of(max_loss: float | str) -> float:
    """The share that 0.05 or "5%" says; `ValueError` for what is none, and for 5, which may be meant as "5%"."""
    text = str(max_loss).strip()
    try:
        found = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise ValueError(
            f"max_loss is a share by which the perplexity may rise, such as 0.05 or '5%', got {max_loss!r}."
        )
    if found >= 1 and isinstance(max_loss, str) and not text.endswith("%"):
        raise ValueError(
            f"max_loss={max_loss!r} is {found:.0%}; say '{text}%', or '{100 * found:g}%' if that is meant."
        )
    return found


@dataclass(frozen=True)
class DSAStructuredConfig:
    """How to make a model smaller. Checked when it is made; a wrong value raises `ValueError` or `UnknownNameError`.

    Args:
        sparsity (`float`): Share of the parameters of all blocks' matrices that goes, at most, in [0, 1); of
            whole blocks it is their share.
        structures (`tuple[str, ...]`, defaults to `("ffn",)`): What may go, of `KINDS`: "ffn" is a channel of an MLP,
            "head" an attention head, "kv_group" a head of keys and values with its query heads, "expert" an expert,
            "block" a whole block (alone), "attention" and "mlp" all heads or all channels of a block (with no others).
        importance (`str`, defaults to `"wanda_sp"`): A row of `IMPORTANCES`; the least important go first. Where it is
            one that scores none, experts have "reap", and blocks, "attention" and "mlp" "block_influence".
        update (`str`, defaults to `"refit"`): What makes up for them: "none", "bias" (the mean of what goes, added to
            the bias of what read it) or "refit" (least squares of what read it).
        damping (`float`, defaults to 0.01): Share of mean diag(X·Xᵀ) added to it before it is inverted.
        reconstruct ([`ReconstructConfig`] or `int`): Steps of training for every block then, 0 by default.
        layout (`str`, *optional*): Whether all blocks stay alike ("uniform"), so that what is left is a plain model of
            its class, or may differ: in a class of this package ("per_layer"), or in a plain one with zeros up to the
            widest block ("padded"). By default "per_layer" where `allocation`, `keep_first`, `keep_last` or the parts
            that go ask for blocks that differ, else "uniform".
        round_to (`int`, defaults to 1): Channels of an MLP that stay are a multiple of it, in every block.
        sequential (`bool`, defaults to `True`): Whether a block is calibrated on what the cut ones before it give.
        true_sequential (`bool`, defaults to `True`): Whether the MLP of a block is calibrated on its cut attention.
        exclude (`tuple[str, ...]`): Patterns of matrices that stay whole, and with them what shares their structures.
        data ([`DataConfig`]): How calibration text is cut.
        batch_size (`int`, defaults to 8): Sequences per forward pass.
        learner (`str`, *optional*): A row of `LEARNERS`: which structures go is learned from the calibration text, and
            importances are where that begins. By default the least important go at once.
        learn_steps (`int`, defaults to 200): Steps that it takes, of `batch_size` windows.
        learn_rate (`float`, *optional*): Its learning rate; by default the learner's own.
        learn_prompt (`str`, *optional*): Text that the model is given before every window that it learns from, such
            as what Compresso tells a model of its pruning; nothing is asked of it.
        allocation (`str` or [`Allocation`], defaults to `"uniform"`): How the share differs from block to block and
            kind to kind: a row of `SHARES` ("uniform", "stability", "global", "fisher", "milp") or of `ALLOCATIONS`,
            an allocation function, an [`Allocation`] of units such as "model.layers.3:ffn", or where one is. All but
            "uniform" ask for a layout whose blocks may differ.
        spread (`float`, *optional*): Half the distance between the most and the least cut unit. Defaults to the
            allocation's own.
        unstable (`str`, defaults to `"less"`): With the allocation "stability", whether units whose importances vary
            from text to text are cut "less" or "more".
        cost (`str`, defaults to `"parameters"`): What `sparsity` is a share of: "parameters" of the blocks' matrices,
            "flops" for a token at the end of a calibration window, "kv", the bytes of a token in the cache, or
            "latency", the time that this machine takes for a calibration window.
        budgets (`tuple[str, ...]`): With the allocation "milp", shares of other costs that go at least, such as
            "kv=0.5".
        keep_first (`int`, defaults to 0): Blocks at the beginning that stay whole.
        keep_last (`int`, defaults to 0): Blocks at the end that stay whole.
        rounds (`int`, defaults to 1): In how many rounds a block's structures go; importances are taken anew in each,
            of what the update has made of the rest.
        targets (`str`, defaults to `"sparse"`): What a refit comes near to: "sparse", what the whole matrix
            makes of the inputs that it gets, or "dense", what the dense model has in that place.
        residual (`bool`, defaults to `False`): With dense targets, whether what the residual stream lacks is part of
            the target of matrices whose outputs are added to it, such as what attention lost.
        blockwise (`bool`, defaults to `False`): Whether gradients, where they are read, are taken of one block at a
            time: the same, in the memory of one block's, with a pass for each.
        max_loss (`str` or `float`, *optional*): By what share the perplexity may rise, such as "5%" or 0.05: as much
            goes as that allows, which is looked for by [`find_share`], at the cost of a prune for every trial. In the
            place of `sparsity`, which is 0 then.
        activations (`str`, defaults to `"memory"`): Where the activations between two blocks are kept: in memory or
            on the "disk". It does not change the result.
    """

    sparsity: float = setting(low=0, below=1)
    structures: tuple[str, ...] = ("ffn",)
    importance: str = "wanda_sp"
    update: str = setting("refit", choices=UPDATES)
    damping: float = setting(DAMPING, low=0)
    reconstruct: ReconstructConfig = section(ReconstructConfig, shorthand="steps")
    layout: str | None = setting(None, choices=LAYOUTS)
    round_to: int = setting(1, low=1)
    sequential: bool = True
    true_sequential: bool = True
    exclude: tuple[str, ...] = ()
    data: DataConfig = section(DataConfig)
    batch_size: int = setting(8, low=1)
    learner: str | None = None
    learn_steps: int = setting(200, low=1)
    learn_rate: float | None = setting(None, low=0, what="a learning rate")
    learn_prompt: str | None = None
    allocation: str | Allocation = "uniform"
    spread: float | None = setting(None, low=0, high=1, what="a half-width")
    unstable: str = setting("less", choices=("less", "more"))
    cost: str = setting("parameters", choices=tuple(COSTS))
    budgets: tuple[str, ...] = ()
    keep_first: int = setting(0, low=0)
    keep_last: int = setting(0, low=0)
    rounds: int = setting(1, low=1)
    targets: str = setting("sparse", choices=TARGETS)
    residual: bool = False
    blockwise: bool = False
    max_loss: str | None = None
    activations: str = setting("memory", choices=PLACES)

    def __post_init__(self):
        if isinstance(self.max_loss, (int, float)) and not isinstance(self.max_loss, bool):
            share = self.max_loss
            object.__setattr__(self, "max_loss", f"{100 * share:g}%" if 1 <= share < math.inf else str(share))
        check_settings(self)
        if self.max_loss is not None:
            rise_of(self.max_loss)
            if self.sparsity:
                raise ValueError(
                    f"sparsity={self.sparsity:g} says how much goes, and max_loss={self.max_loss!r} finds it; give "
                    "one of both."
                )
        object.__setattr__(self, "structures", tuple(dict.fromkeys(self.structures)))
        if self.layout is None:
            differ = self._differing or {*self.structures} & {*ENTIRE}
            object.__setattr__(self, "layout", "per_layer" if differ else "uniform")
        IMPORTANCES[self.importance]
        if self.learner is not None:
            learners()[self.learner]
        for name in ("learn_steps", "learn_rate", "learn_prompt"):
            if self.learner is None and (value := getattr(self, name)) != getattr(DSAStructuredConfig, name):
                raise ValueError(
                    f"{name}={value!r} is of a learner, and none is named; give learner=, or leave it out."
                )
        self._check_structures()
        self._check_widths()
        self._check_unread()
        self._check_targets()
        if self.true_sequential and not self.sequential:
            object.__setattr__(self, "true_sequential", False)
        if self.reconstruct.steps and not self.sequential:
            raise ValueError(
                f"reconstruct={self.reconstruct.steps} trains blocks on what the cut ones before them give, and "
                "sequential=False gives them the dense model's; leave out one of both."
            )

    def _check_structures(self) -> None:
        unknown = [kind for kind in self.structures if kind not in KINDS]
        if unknown or not self.structures:
            said = f"{unknown[0]!r} is none.{near(unknown[0], KINDS)}" if unknown else "none was given."
            raise ValueError(f"Structures are of {', '.join(map(repr, KINDS))}; {said}")
        for kind in self.structures:
            importance_of(kind, self.importance)
        if "block" in self.structures and len(self.structures) > 1:
            raise ValueError(
                f"Blocks go alone, and structures={list(self.structures)}; cut blocks first, and others out of what "
                "is left."
            )
        self._check_entire()
        if self.reconstruct.steps and set(self.structures) <= set(WHOLE):
            raise ValueError(
                f"reconstruct={self.reconstruct.steps} trains blocks against what they gave as the walk began, and "
                f"{' and '.join(map(repr, self.structures))} are gone by then; leave it out, and recover afterwards."
            )
        if self.learner and (whole := [kind for kind in self.structures if kind in (*WHOLE, *ENTIRE)]):
            raise ValueError(f"A learner is of channels and heads, and {whole[0]!r} is to go; leave learner= out.")
        if (whole := [kind for kind in self.structures if kind in WHOLE]) and self.cost != "parameters":
            raise ValueError(
                f"cost={self.cost!r} is counted of channels and heads, and {whole[0]!r} is to go; use "
                "cost='parameters'."
            )

    def _check_entire(self) -> None:
        """Raise where attention or MLPs are to go with all that they are made of, and something does not fit that."""
        if not (entire := [kind for kind in self.structures if kind in ENTIRE]):
            return
        if others := [kind for kind in self.structures if kind not in ENTIRE]:
            raise ValueError(
                f"{entire[0]!r} goes with all that it is made of, and {others[0]!r} is to go as well; cut one of both "
                "first, and the other out of what is left."
            )
        if self.layout == "uniform":
            raise ValueError(
                f"structures={list(self.structures)} leaves blocks that differ, and layout='uniform' has one shape "
                "for all; use layout='per_layer', or 'padded', which keeps zeros."
            )
        if "latency" in (self.cost, *self.least):
            raise ValueError(
                f"cost='latency' is timed by the width of what stays, and of {entire[0]!r} nothing does; use "
                "cost='parameters' or 'flops'."
            )
        named = isinstance(self.allocation, str) and self.allocation != "uniform"
        if named and (self.allocation in SHARES or allocator_of(self.allocation) is not None):
            raise ValueError(
                f"allocation={self.allocation!r} says how many of a block's structures go, and {entire[0]!r} goes "
                "whole, the least important first; leave it out, or give an allocation of 0 and 1."
            )

    def _check_widths(self) -> None:
        """Raise where blocks cannot get the widths that are asked for."""
        if not (isinstance(self.allocation, str) and self.allocation in SHARES):
            if not isinstance(self.allocation, (str, Allocation)):
                raise ValueError(
                    f"allocation is a name, an allocation function, a path or an Allocation, got {self.allocation!r}."
                )
            allocator_of(self.allocation)
        if self.allocation != "uniform" and set(self.structures) & set(WHOLE):
            self._check_of_wholes()
        if self.structures == ("block",):
            return  # whichever go, the rest are alike
        if self.layout == "uniform" and self._differing:
            name = self._differing[0]
            value = getattr(self, name)
            raise ValueError(
                f"{name}={getattr(value, 'name', value)!r} gives blocks widths of their own, and layout='uniform' has "
                f"one for all; use layout='per_layer', or leave {name} out."
            )
        if self.budgets and self.allocation != "milp":
            raise ValueError(
                f"budgets={list(self.budgets)} are met by allocation='milp' alone, besides that of cost="
                f"{self.cost!r}; use it, or leave them out."
            )
        for name in self.least:
            if name not in COSTS or name == self.cost:
                others = [cost for cost in COSTS if cost != self.cost]
                raise ValueError(
                    f"budgets are of {' or '.join(map(repr, others))} besides cost={self.cost!r}, got {name!r}."
                )

    @property
    def _differing(self) -> list[str]:
        """Settings that give blocks widths of their own; which of whole blocks go leaves the rest alike."""
        asked = {
            "allocation": self.allocation != "uniform",
            "keep_first": self.keep_first,
            "keep_last": self.keep_last,
        }
        return [name for name, value in asked.items() if value and self.structures != ("block",)]

    def _check_unread(self) -> None:
        """Raise where a setting is given of what is not done."""
        at_once = set(self.structures) <= {*WHOLE, *ENTIRE}
        if self.spread is not None and at_once and self.structures != ("expert",):
            raise ValueError(
                f"spread={self.spread:g} says how far apart the shares of blocks are, and {self.structures[0]!r} goes "
                "whole; leave it out."
            )
        if self.rounds > 1 and (at_once or self.learner is not None):
            what = f"learner={self.learner!r} has chosen" if self.learner else f"{self.structures[0]!r} goes at once"
            raise ValueError(
                f"rounds={self.rounds} takes importances anew while channels and heads go, and {what}; leave it out."
            )
        rows = {importance_of(kind, self.importance) for kind in self.structures}
        gradients = any(IMPORTANCES.fact(row, "gradients") for row in rows)
        fitted = self.update == "refit" or any(IMPORTANCES.fact(row, "reads") == "gram" for row in rows)
        named = self.allocation if isinstance(self.allocation, str) else ""
        for name, read, who in (
            ("unstable", named == "stability", "allocation='stability'"),
            ("spread", named not in SHARES or named == "stability", "allocation='stability' and allocation functions"),
            ("damping", fitted or named == "milp", "a refit, importances such as 'obs' and allocation='milp'"),
            ("blockwise", gradients or named == "fisher", "gradients: 'taylor' and others, allocation='fisher'"),
            ("round_to", "ffn" in self.structures, "channels ('ffn')"),
            ("rounds", fitted and not gradients and self.importance != "random", "importances that a refit changes"),
        ):
            if not read and (value := getattr(self, name)) != getattr(DSAStructuredConfig, name):
                raise ValueError(f"{name}={value!r} is read by {who} alone; use them, or leave {name} out.")

    def _check_of_wholes(self) -> None:
        """Raise where an allocation tells nothing of what goes as a whole."""
        if "block" in self.structures:
            raise ValueError(
                "Allocations are of what blocks have several of, and 'block' is to go; use allocation='uniform'."
            )
        name = self.allocation
        if isinstance(name, str) and not tells_of_experts(name):
            raise ValueError(
                f"allocation={name!r} is of channels and heads, and 'expert' is to go; use one of "
                f"{', '.join(map(repr, OF_EXPERTS))}, one that reads scores (an allocation function, 'owl'), or one "
                "that is given."
            )
        rows = {kind: importance_of(kind, self.importance) for kind in self.structures}
        if name == "global" and len(set(rows.values())) > 1:
            said = ", ".join(f"{row!r} of {kind!r}" for kind, row in rows.items())
            raise ValueError(
                f"allocation='global' makes one order of all that may go, and importances are {said}; take one of "
                "both kinds, such as 'taylor' or 'magnitude', or another allocation."
            )

    def _check_targets(self) -> None:
        """Raise where nothing could be fitted to what the dense model has."""
        if self.targets == "dense" and (self.update != "refit" or not self.sequential):
            other = f"update={self.update!r}" if self.update != "refit" else "sequential=False"
            raise ValueError(
                f"targets='dense' is what update='refit' fits to behind blocks that were cut, and {other} has none; "
                "leave out one of both."
            )
        if self.residual and self.targets != "dense":
            raise ValueError(
                "residual=True adds to the targets of the dense model; use targets='dense' with it, or leave it out."
            )

    @property
    def least(self) -> dict[str, float]:
        """Cost -> the share of it that `budgets` say is to go at least."""
        return parsed(self.budgets, "budgets", "kv=0.5")

    @property
    def folds(self) -> bool:
        """Whether scales that were learned become a part of the weights: a refit finds them itself."""
        return self.update != "refit"

    @property
    def method(self) -> str:
        """What needs calibration, as errors call it."""
        return self.importance

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON values."""
        data = settings_to(self)
        return data | ({"allocation": self.allocation.to_dict()} if isinstance(self.allocation, Allocation) else {})

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DSAStructuredConfig:
        """The configuration whose `to_dict` gave `data`; raises `ValueError` for a key that is no setting."""
        allocation = data.get("allocation")
        given = {"allocation": Allocation.from_dict(allocation)} if isinstance(allocation, Mapping) else {}
        return settings_from(cls, {**data, **given})
