"""`RecoveryConfig`: how a pruned model is trained back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..common.registry import near
from .adapters.modes import MODES


METHODS = ("sparse-lora", "full")
RANKS = ("allocation", "uniform")
# Learning rates by mode of the adapter, and for all weights; SPP's is the published one.
LEARNING_RATES = {"mask": 1e-3, "scale": 1e-3, "spp": 4e-3, "full": 3e-4}


@dataclass(frozen=True)
class RecoveryConfig:
    """How to train a pruned model back. Checked when it is made; a wrong value raises `ValueError`.

    Args:
        method (`str`, defaults to `"sparse-lora"`): `"sparse-lora"` trains adapters, `"full"` all weights that are not
            zero.
        mode (`str`, defaults to `"mask"`): A row of `MODES`: what the adapters add.
        steps (`int`, defaults to 300): Optimizer steps.
        learning_rate (`float`, *optional*): At its highest, after a linear warm-up over a tenth of the steps; a cosine
            brings it to zero. Defaults to 1e-3 (mask, scale), 4e-3 (spp) or 3e-4 (full).
        batch_size (`int`, defaults to 8): Sequences per forward pass.
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
        sequence_length (`int`, *optional*): Tokens per sequence. Defaults to the model's longest, at most 2048.
        text_column (`str`, defaults to `"text"`): The column of a dataset that holds the text.
        split (`str`, *optional*): The split of a named dataset. Defaults to `"train"`.
        bos (`bool`, *optional*): Whether each sequence starts with the tokenizer's beginning-of-sequence token. By
            default where the tokenizer adds it.
        seed (`int`, defaults to 0): Order of the text, and the adapters' start.
        validation_windows (`int`, defaults to 32): Windows on which perplexity is measured; where no validation text
            is given, they are taken from the training text, which then does without them.
        eval_steps (`int`, defaults to 50): Steps between two measurements of the validation loss.
        patience (`int`, *optional*): Stop after so many measurements without a new best, and keep the best.
        save_steps (`int`, *optional*): Steps between two checkpoints that a run can be resumed from.
        bf16 (`bool`, defaults to `False`): Multiply in bfloat16.
        gradient_checkpointing (`bool`, defaults to `False`): Less memory for more time.
    """

    method: str = "sparse-lora"
    mode: str = "mask"
    steps: int = 300
    learning_rate: float | None = None
    batch_size: int = 8
    accumulation: int = 1
    weight_decay: float = 0.0
    rank: int = 16
    alpha: float | None = None
    ranks: str = "allocation"
    merge: bool = True
    distillation: float = 0.0
    temperature: float = 1.0
    sequence_length: int | None = None
    text_column: str = "text"
    split: str | None = None
    bos: bool | None = None
    seed: int = 0
    validation_windows: int = 32
    eval_steps: int = 50
    patience: int | None = None
    save_steps: int | None = None
    bf16: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self):
        for name, known in (("method", METHODS), ("ranks", RANKS)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, got {value!r}.{near(str(value), known)}")
        MODES[self.mode]
        for name in ("steps", "batch_size", "accumulation", "rank", "validation_windows", "eval_steps"):
            self._whole(name, 1)
        for name in ("sequence_length", "patience", "save_steps"):
            if getattr(self, name) is not None:
                self._whole(name, 2 if name == "sequence_length" else 1)
        self._whole("seed", 0)
        if not (self.bos is None or isinstance(self.bos, bool)):
            raise ValueError(f"bos is true, false or None, got {self.bos!r}.")
        for name, low, high in (
            ("distillation", 0.0, 1.0),
            ("weight_decay", 0.0, math.inf),
            ("temperature", 1e-3, math.inf),
            ("learning_rate", 0.0, math.inf),
            ("alpha", 0.0, math.inf),
        ):
            value = getattr(self, name)
            if value is None and name in ("learning_rate", "alpha"):
                continue
            if not isinstance(value, (int, float)) or not low <= value <= high:
                raise ValueError(f"{name} is a number in [{low:g}, {high:g}], got {value!r}.")

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} is a whole number of at least {least}, got {value!r}.")

    @property
    def rate(self) -> float:
        """The learning rate: the one given, or the default of method and mode."""
        given = self.learning_rate
        return given if given is not None else LEARNING_RATES["full" if self.method == "full" else self.mode]

    @property
    def windows(self) -> int:
        """Sequences that one process trains on."""
        return self.steps * self.batch_size * self.accumulation

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RecoveryConfig:
        """The config in `to_dict`'s form; an unknown key raises `ValueError`."""
        known = [field.name for field in fields(cls)]
        for key in data:
            if key not in known:
                raise ValueError(f"RecoveryConfig has no {key!r}.{near(key, known)} Known: {', '.join(known)}.")
        return cls(**data)
