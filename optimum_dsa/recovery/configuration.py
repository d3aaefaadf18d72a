"""`RecoveryConfig`: how a pruned model is trained back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..common.settings import check_settings, section, setting, settings_from, settings_to, takes_flat_names
from ..data import DataConfig
from .adapters.modes import GROUP_SIZE, MODES
from .gradual.schedule import SCHEDULES
from .recoveries import RECOVERIES


RANKS = ("allocation", "uniform")
SHARDINGS = ("none", "fsdp")
# Learning rates by mode of the adapter; SPP's is the published one.
LEARNING_RATES = {"mask": 1e-3, "scale": 1e-3, "spp": 4e-3, "grouped": 1e-3}


# Settings of methods that choose zeros, and of those that train adapters.
OF_ZEROS = ("sparsity", "allocation", "pattern", "penalty", "project_every", "growth", "shape")
OF_ADAPTERS = ("mode", "rank", "alpha", "ranks", "merge", "group_size")


@takes_flat_names
@dataclass(frozen=True)
class RecoveryConfig:
    """How to train a pruned model back. Checked when it is made; a wrong value raises `ValueError`.

    Args:
        method (`str`, defaults to `"sparse-lora"`): A row of `RECOVERIES`: `"sparse-lora"` trains adapters, `"full"`
            all weights that are not zero, `"elsa"` all weights, while it chooses which become zero.
        mode (`str`, defaults to `"mask"`): A row of `MODES`: what the adapters add.
        steps (`int`, defaults to 300): Optimizer steps.
        learning_rate (`float`, *optional*): At its highest, after a linear warm-up over a tenth of the steps; a cosine
            brings it to zero. Defaults to 1e-3 (mask, scale, grouped), 4e-3 (spp), 3e-4
            (full) or 2e-3 (elsa).
        batch_size (`int`, defaults to 8): Sequences per forward pass, of all processes together.
        accumulation (`int`, defaults to 1): Forward passes per optimizer step.
        weight_decay (`float`, defaults to 0.0): AdamW's.
        rank (`int`, defaults to 16): Of the adapters, on average.
        alpha (`float`, *optional*): Defaults to twice the rank.
        ranks (`str`, defaults to `"allocation"`): `"allocation"` gives higher ranks where more was pruned, `"uniform"`
            the same everywhere.
        merge (`bool`, defaults to `True`): Put the adapters into the weights at the end.
        distillation (`float`, defaults to 0.0): Weight of the divergence from the dense model's predictions, in
            [0, 1]; the rest is the language modelling loss.
        temperature (`float`, defaults to 1.0): Softens both predictions that are compared.
        sparsity (`float`, *optional*): The budget of a dense model that `"elsa"` trains: the share of its prunable
            weights that end as zeros, more than 0. A pruned model has its budget.
        allocation (`str`, defaults to `"uniform"`): How that is divided: a row of `ALLOCATIONS` that needs no data, or
            the path of an allocation.
        pattern (`str`, defaults to `"matrix"`): Within which weights of the dense model the zeros are chosen.
        penalty (`float`, defaults to 0.2): What a step of `"elsa"` takes of the distance to sparse weights.
        project_every (`int`, defaults to 5): Its steps between two choices of the zeros.
        growth (`float`, defaults to 0.5): The share of its steps in which the budget grows from nothing to the whole.
        shape (`str`, defaults to `"cubic"`): A row of `SCHEDULES`: how it grows.
        data (`DataConfig`): Which text is trained on: how much, how long a sequence, column, split, and the seed of
            its order and of the adapters' start.
        validation_windows (`int`, defaults to 32): Windows on which perplexity is measured; where no validation text
            is given, they are taken from the training text, which then does without them.
        eval_steps (`int`, defaults to 50): Steps between two measurements of the validation loss.
        patience (`int`, *optional*): Stop after so many measurements without a new best, and keep the best.
        save_steps (`int`, *optional*): Steps between two checkpoints that a run can be resumed from.
        bf16 (`bool`, defaults to `False`): Multiply in bfloat16.
        gradient_checkpointing (`bool`, defaults to `False`): Less memory for more time.
        group_size (`int`, defaults to 32): Columns of a weight that change by one number in mode `"grouped"`.
        sharding (`str`, defaults to `"none"`): How processes of torchrun divide the model while it is trained:
            `"none"`, each holds all of it (DDP); `"fsdp"`, each holds a share of weights, gradients and what the
            optimizer knows (FSDP 2).
    """

    method: str = "sparse-lora"
    mode: str = "mask"
    steps: int = setting(300, low=1)
    learning_rate: float | None = setting(None, low=0)
    batch_size: int = setting(8, low=1)
    accumulation: int = setting(1, low=1)
    weight_decay: float = setting(0.0, low=0)
    rank: int = setting(16, low=1)
    alpha: float | None = setting(None, low=0)
    ranks: str = setting("allocation", choices=RANKS)
    merge: bool = True
    distillation: float = setting(0.0, low=0, high=1)
    temperature: float = setting(1.0, low=1e-3)
    sparsity: float | None = setting(None, low=0, below=1, what="the share of weights to remove")
    allocation: str = "uniform"
    pattern: str = "matrix"
    penalty: float = setting(0.2, low=1e-4, high=1)
    project_every: int = setting(5, low=1)
    growth: float = setting(0.5, low=0, high=1)
    shape: str = "cubic"
    data: DataConfig = section(DataConfig)
    validation_windows: int = setting(32, low=1)
    eval_steps: int = setting(50, low=1)
    patience: int | None = setting(None, low=1)
    save_steps: int | None = setting(None, low=1)
    bf16: bool = False
    gradient_checkpointing: bool = False
    group_size: int = setting(GROUP_SIZE, low=1)
    sharding: str = setting("none", choices=SHARDINGS)

    def __post_init__(self):
        check_settings(self)
        RECOVERIES[self.method], MODES[self.mode], SCHEDULES[self.shape]
        if not MODES[self.mode].grouped:
            self._refuse(("group_size",), f"is for mode 'grouped', and mode={self.mode!r} has no groups")
        if self.moves_zeros:
            if self.sparsity == 0:
                raise ValueError(
                    f"sparsity=0 is a budget without zeros, and method={self.method!r} chooses which weights become "
                    "zero; give a share in (0, 1), such as 0.8. A model that stays dense is trained with "
                    "transformers' Trainer."
                )
            if self.patience is not None:
                raise ValueError(
                    f"patience={self.patience} would bring back an earlier model, and with method={self.method!r} "
                    "only the last is sparse; leave it out, or ask for fewer steps."
                )
        else:
            able = ", ".join(sorted(name for name in RECOVERIES if RECOVERIES.fact(name, "moves_zeros", False)))
            self._refuse(OF_ZEROS, f"is for methods that choose zeros ({able}), and {self.method!r} keeps those there")
        if self.trains_weights:
            able = ", ".join(sorted(name for name in RECOVERIES if not RECOVERIES.fact(name, "trains_weights", True)))
            self._refuse(OF_ADAPTERS, f"is for adapters ({able}), and {self.method!r} trains the weights themselves")
        if self.data.image_column is not None:
            raise ValueError(f"image_column={self.data.image_column!r} is for calibration: training reads text.")
        if not self.data.packing:
            raise ValueError("packing=False is for calibration: training takes windows of one length.")
        if not self.distillation:
            self._refuse(("temperature",), "is for distillation, which is 0")

    def _refuse(self, names: tuple[str, ...], why: str) -> None:
        """Raise `ValueError` where one of these settings was given: it would be passed over."""
        for name in names:
            if (value := getattr(self, name)) != getattr(RecoveryConfig, name):
                raise ValueError(f"{name}={value!r} {why}; leave it out.")

    @property
    def rate(self) -> float:
        """The learning rate: the one given, or the default of method and mode."""
        own = RECOVERIES.fact(self.method, "rate", LEARNING_RATES.get(self.mode))
        return own if self.learning_rate is None else self.learning_rate

    @property
    def trains_weights(self) -> bool:
        """Whether the model's own weights are trained, and not adapters beside them."""
        return RECOVERIES.fact(self.method, "trains_weights", True)

    @property
    def moves_zeros(self) -> bool:
        """Whether training chooses the zeros, and does not keep those that are there."""
        return RECOVERIES.fact(self.method, "moves_zeros", False)

    @property
    def windows(self) -> int:
        """Sequences that one process trains on."""
        return self.steps * self.batch_size * self.accumulation

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values, sections as objects."""
        return settings_to(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RecoveryConfig:
        """The config in `to_dict`'s form; an unknown key raises `ValueError`."""
        return settings_from(cls, data)
