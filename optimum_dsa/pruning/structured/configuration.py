"""`DSAStructuredConfig`: everything that decides a model that was made smaller, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...common.registry import Registry
from ...common.settings import check_settings, section, setting, settings_from, settings_to
from ...data import DataConfig
from ...model.statistics import DAMPING
from ..sections import ReconstructConfig
from .importance import IMPORTANCES
from .structure import KINDS


UPDATES = ("none", "bias", "refit")  # what makes up for structures that go
# Whether all blocks stay alike, may differ, or may differ and are filled up with zeros: the rows of layout.LAYOUTS.
LAYOUTS = ("uniform", "per_layer", "padded")


def learners() -> Registry:
    """The rows of `LEARNERS`, which need this module."""
    from .learners import LEARNERS

    return LEARNERS


@dataclass(frozen=True)
class DSAStructuredConfig:
    """How to make a model smaller. Checked when it is made; a wrong value raises `ValueError` or `UnknownNameError`.

    Args:
        sparsity (`float`): Share of the parameters of all blocks' matrices that goes, at most, in [0, 1).
        structures (`tuple[str, ...]`, defaults to `("ffn",)`): What may go, of `KINDS`: "ffn" is a channel of an MLP,
            "head" an attention head, "kv_group" a head of keys and values with its query heads.
        importance (`str`, defaults to `"wanda_sp"`): A row of `IMPORTANCES`; the least important go first.
        update (`str`, defaults to `"refit"`): What makes up for them: "none", "bias" (the mean of what goes, added to
            the bias of what read it) or "refit" (least squares of what read it).
        damping (`float`, defaults to 0.01): Share of mean diag(X·Xᵀ) added to it before it is inverted.
        reconstruct ([`ReconstructConfig`] or `int`): Steps of training for every block then, 0 by default.
        layout (`str`, defaults to `"uniform"`): Whether all blocks stay alike ("uniform"), so that what is left is a
            plain model of its class, or may differ: in a class of this package ("per_layer"), or in a plain one with
            zeros up to the widest block ("padded").
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
    """

    sparsity: float = setting(low=0, below=1)
    structures: tuple[str, ...] = ("ffn",)
    importance: str = "wanda_sp"
    update: str = setting("refit", choices=UPDATES)
    damping: float = setting(DAMPING, low=0)
    reconstruct: ReconstructConfig = section(ReconstructConfig, shorthand="steps")
    layout: str = setting("uniform", choices=LAYOUTS)
    round_to: int = setting(1, low=1)
    sequential: bool = True
    true_sequential: bool = True
    exclude: tuple[str, ...] = ()
    data: DataConfig = section(DataConfig)
    batch_size: int = setting(8, low=1)
    learner: str | None = None
    learn_steps: int = setting(200, low=1)
    learn_rate: float | None = setting(None, low=0, what="a learning rate")

    def __post_init__(self):
        check_settings(self)
        object.__setattr__(self, "structures", tuple(dict.fromkeys(self.structures)))
        IMPORTANCES[self.importance]
        if self.learner is not None:
            learners()[self.learner]
        for name in ("learn_steps", "learn_rate"):
            if self.learner is None and (value := getattr(self, name)) != getattr(DSAStructuredConfig, name):
                raise ValueError(
                    f"{name}={value!r} is of a learner, and none is named; give learner=, or leave it out."
                )
        unknown = [kind for kind in self.structures if kind not in KINDS]
        if unknown or not self.structures:
            said = f"{unknown[0]!r} is none" if unknown else "none was given"
            raise ValueError(f"Structures are of {', '.join(map(repr, KINDS))}; {said}.")
        if self.true_sequential and not self.sequential:
            object.__setattr__(self, "true_sequential", False)
        if self.reconstruct.steps and not self.sequential:
            raise ValueError(
                f"reconstruct={self.reconstruct.steps} trains blocks on what the cut ones before them give, and "
                "sequential=False gives them the dense model's; leave out one of both."
            )

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
        return settings_to(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DSAStructuredConfig:
        """The configuration whose `to_dict` gave `data`; raises `ValueError` for a key that is no setting."""
        return settings_from(cls, data)
