"""`DSAConfig`: everything that decides a pruned model, as plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..common.files import read_json, write_text
from ..common.installation import how_to_upgrade
from ..common.settings import (
    check_settings,
    flattened,
    nested,
    section,
    setting,
    settings_from,
    settings_to,
    takes_flat_names,
)
from ..common.values import is_whole
from ..data import DataConfig
from ..model.activations import PLACES
from ..model.architecture import GRANULARITIES
from .allocation import ALLOCATIONS, Allocation, AllocationFunction, Allocator, is_repository, levels_within
from .overrides import check_overrides
from .presets import with_quality
from .resolved_method import ResolvedMethod, check_gradients, check_revive, check_still
from .sections import ReconstructConfig, UpdateConfig, ValuesConfig
from .unstructured.methods import METHODS, Method
from .unstructured.patterns import Pattern
from .unstructured.permutations import PERMUTATIONS
from .unstructured.updates import UPDATES


CONFIG_NAME = "dsa_config.json"
FORMAT_VERSION = 3  # of that file
FREE = ("batch_size", "activations")  # settings that change memory and time, and no result
AUTO = "auto"  # an allocation that is yet to be chosen


@takes_flat_names
@dataclass(frozen=True)
class DSAConfig:
    """How to prune a model. Checked when it is made; a wrong value raises `ValueError` or `UnknownNameError`.

    Args:
        sparsity (`float`): Share of the prunable weights that are zero in the end, those of before too, in [0, 1).
        method (`str`, defaults to `"wanda"`): A row of `METHODS`: metric, pattern and update.
        allocation (`str` or [`Allocation`], defaults to `"dsa"`): A row of `ALLOCATIONS`, an allocation function such
            as `"abslog/var/atan,asin/no_op@+0.08"` or `"W:(ABSLOG)-(VAR)-(ATAN,ASIN)-(7)"`, an [`Allocation`], the
            path of one as JSON or of a pruned model, a repository on the Hub with one (`"me/found"`, `"me/found@v1"`),
            or `"auto"`: the rows that one walk measures are tried for real, and the best is taken.
        spread (`float`, *optional*): Half the distance between the most and the least pruned unit. Defaults to the
            allocation's own.
        pattern (`str`, *optional*): `"row"`, `"matrix"`, `"group:128"`, `"2:4"` (any N:M) or `"mixed:8"`. Defaults to
            the method's.
        update (`UpdateConfig` or `str`, *optional*): What becomes of the weights that stay; a text is its name, a row
            of `UPDATES`. Defaults to the method's.
        permute (`str`, *optional*): A row of `PERMUTATIONS`: with an N:M pattern, the order in which channels within a
            block are put first, so that more of what matters stays. The model computes the same. Defaults to the order
            that they have.
        reconstruct (`ReconstructConfig` or `int`): Training of every block's kept weights against the dense block; a
            number is its steps.
        values (`ValuesConfig` or `str`, *optional*): Whether the weights that stay become whole numbers times scales:
            a text is `"int8"` or `"int4"`. By default they stay as they are.
        overrides (`tuple[str, ...]`): Sparsities of some matrices, such as `"mlp=0.6"`, by names or patterns as in
            `exclude`, of which the last counts. The others are allocated so that the mean is met.
        granularity (`str`, defaults to `"block"`): One sparsity per `"block"`, per `"matrix"`, or per `"block:kind"`:
            the attention of a block and its MLP apart. An allocation that exists per matrix only (`er`, `er_plus`) is
            computed per matrix.
        sequential (`bool`, defaults to `True`): Whether each block is calibrated on the outputs of the pruned blocks
            before it.
        exclude (`tuple[str, ...]`): Names or glob patterns of weights to leave dense.
        include (`tuple[str, ...]`): Names of matrices outside the blocks to prune as well, such as `"lm_head"`.
        blocks (`tuple[str, ...]`): Names of the module lists to prune instead of the ones that are found.
        skip_unprunable (`bool`): Leave dense what cannot be pruned, instead of refusing the model.
        revive (`bool`): Whether weights that are zero before may come back, as an update makes them.
        metric (`str`, *optional*): A row of `METRICS`, or an expression such as `"mul(abs(W), X)"`. Defaults to that
            which a given allocation was found with, or to the method's.
        allocation_metric (`str`, defaults to `"wanda"`): The scores from which the allocation is computed.
        min_sparsity (`float`, defaults to 0.0): The least that any unit is pruned.
        max_sparsity (`float`, defaults to 0.99): The most that any unit is pruned.
        data (`DataConfig`): Which text feeds the statistics: samples, their length, column, split, seed.
        batch_size (`int`, defaults to 8): Sequences per forward pass. It does not change the result.
        activations (`str`, defaults to `"memory"`): Where the activations between two blocks are kept, in the model's
            type: `"memory"`, or `"disk"`, in a file that goes with the process. It does not change the result.
    """

    sparsity: float = setting(low=0, below=1, what="the share of weights to remove")
    method: str = "wanda"
    allocation: str | Allocation = "dsa"
    spread: float | None = setting(None, low=0, high=1, what="a half-width")
    pattern: str | None = None
    update: UpdateConfig = section(UpdateConfig, shorthand="name")
    permute: str | None = None
    reconstruct: ReconstructConfig = section(ReconstructConfig, shorthand="steps")
    values: ValuesConfig = section(ValuesConfig, shorthand="name")
    overrides: tuple[str, ...] = ()
    granularity: str = setting("block", choices=GRANULARITIES)
    sequential: bool = True
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    skip_unprunable: bool = False
    revive: bool = False
    metric: str | None = None
    allocation_metric: str = "wanda"
    min_sparsity: float = setting(0.0, low=0, high=1)
    max_sparsity: float = setting(0.99, low=0, high=1)
    data: DataConfig = section(DataConfig)
    batch_size: int = setting(8, low=1)
    activations: str = setting("memory", choices=PLACES)

    def __post_init__(self):
        check_settings(self)
        if not self.min_sparsity <= self.sparsity <= self.max_sparsity:
            raise ValueError(
                f"A sparsity of {self.sparsity} cannot be met with every unit in [{self.min_sparsity}, "
                f"{self.max_sparsity}]; widen min_sparsity / max_sparsity or change the sparsity."
            )
        METHODS[self.method]
        self._take_metric()
        if self.update.true_sequential and not self.sequential:
            raise ValueError(
                "true_sequential=True calibrates matrices on the pruned ones before them, and sequential=False "
                "calibrates all on the dense model; leave out one of both."
            )
        if self.reconstruct.steps and not self.sequential:
            raise ValueError(
                f"reconstruct={self.reconstruct.steps} trains blocks on what the pruned ones before them give, and "
                "sequential=False gives them the dense model's; leave out one of both."
            )
        self._check_pattern(self.resolved.pattern)
        if self.permute is not None:
            PERMUTATIONS[self.permute]
            if not self.resolved.pattern.in_groups:
                raise ValueError(
                    f"permute={self.permute!r} chooses which channels share a group of an N:M pattern, and "
                    f"pattern='{self.resolved.pattern}' has none; use pattern='2:4' (any N:M) or pattern='mixed:8', "
                    "or leave it out."
                )
        if self.update.targets == "dense":
            self._check_dense_targets()
        check_overrides(self)
        check_gradients(self)
        check_still(self)
        check_revive(self)
        if self.allocation == AUTO and (self.spread is not None or self.granularity != "block"):
            given = f"granularity={self.granularity!r}" if self.spread is None else f"spread={self.spread:g}"
            raise ValueError(
                "allocation='auto' compares named allocations as they are, per block and with their own spread; leave "
                f"out {given}, or name an allocation."
            )

    def _take_metric(self) -> None:
        """Score by what the allocation was found with, unless told otherwise: from here on the config says it."""
        if self.metric is None and self.allocation != AUTO and self.allocator is None:
            with suppress(OSError):  # of the Hub, that cannot be asked: who needs the allocation will say so
                object.__setattr__(self, "metric", self.given_allocation().metric)

    def _check_pattern(self, pattern: Pattern) -> None:
        # Here and not when it is allocated: no choice of N could meet it, whatever the model.
        if pattern.kind == "mixed":
            least, most = levels_within(pattern.width, self.min_sparsity, self.max_sparsity)
            if not least <= self.sparsity * pattern.width <= most:
                raise ValueError(
                    f"A sparsity of {self.sparsity} cannot be met with pattern {pattern} and every unit in "
                    f"[{self.min_sparsity}, {self.max_sparsity}], which leaves {least}/{pattern.width} to "
                    f"{most}/{pattern.width}; choose a larger M, or widen min_sparsity / max_sparsity."
                )
        if pattern.sparsity is None:
            return
        # A sparsity is typed in decimals, and 1/3 has none.
        if not math.isclose(pattern.sparsity, self.sparsity, abs_tol=1e-6):
            raise ValueError(
                f"Pattern {pattern} removes {pattern.sparsity:.7g} of every matrix, but the sparsity asked for is "
                f"{self.sparsity}; use sparsity={pattern.sparsity:.7g} or pattern='mixed:{pattern.width}'."
            )
        if self.allocation != "uniform":
            raise ValueError(
                f"Pattern {pattern} gives every matrix the same sparsity, so there is nothing to allocate; "
                f"use allocation='uniform', or pattern='mixed:{pattern.width}' to let N differ."
            )

    def _check_dense_targets(self) -> None:
        if UPDATES.fact(self.recipe.update, "reads", "nothing") != "gram":
            able = ", ".join(name for name in sorted(UPDATES) if UPDATES.fact(name, "reads", "nothing") == "gram")
            raise ValueError(
                f"targets='dense' is for updates that fit the kept weights to X·Xᵀ, and {self.recipe.update!r}, the "
                f"update of method {self.method!r}, does not; use one of {able}, or targets='sparse'."
            )
        if not self.sequential:
            raise ValueError(
                "targets='dense' with sequential=False changes nothing: every block is calibrated on the dense model "
                "already; leave out one of both."
            )

    @property
    def recipe(self) -> Method:
        """Metric, pattern and update: the method's row with what this config replaces in it."""
        row = METHODS[self.method]
        given = (self.metric, row.metric), (self.pattern, row.pattern), (self.update.name, row.update)
        return Method(*(own if mine is None else mine for mine, own in given))

    @cached_property
    def resolved(self) -> ResolvedMethod:
        """The functions behind metric, pattern and update, and what they need."""
        return ResolvedMethod.of(self)

    @property
    def allocator(self) -> Allocator | None:
        """What computes the allocation; `None` where it is given."""
        name = self.allocation
        if isinstance(name, Allocation) or name == AUTO:
            return None
        if not isinstance(name, str):
            raise ValueError(f"allocation is a name, an allocation function, a path or an Allocation, got {name!r}.")
        if name in ALLOCATIONS:
            return ALLOCATIONS[name]
        if _exists(name):
            return None
        # Said here, or a path that was mistyped would be taken for a name or a function.
        if name.endswith(".json"):
            raise FileNotFoundError(f"No allocation file {name!r}.")
        if is_repository(name):
            return None
        if "/" in name or name.upper().startswith("W:"):
            return AllocationFunction.parse(name)
        return ALLOCATIONS[name]

    @property
    def chooses_still(self) -> bool:
        """Whether it is yet to be tried which matrices the update leaves alone."""
        return not self.update.still and self.recipe.update != "none" and bool(METHODS.fact(self.method, "still"))

    @property
    def is_open(self) -> bool:
        """Whether something is chosen by trying it on text, which `DSAPruner.prune` does."""
        return self.allocation == AUTO or self.chooses_still

    @property
    def unit_granularity(self) -> str:
        """The granularity of the units: the config's, or the only one at which the allocator exists."""
        return getattr(self.allocator, "granularity", None) or self.granularity

    def given_allocation(self) -> Allocation:
        """The allocation where `allocator` is `None`."""
        return self.allocation if isinstance(self.allocation, Allocation) else Allocation.load(self.allocation)

    def check_settled(self) -> None:
        """Raise `ValueError` where the allocation is yet to be chosen."""
        if self.allocation == AUTO:
            raise ValueError(
                "allocation='auto' is chosen by trying allocations on text, which DSAPruner.prune does; call that, "
                f"and its report has the name, or name one of {', '.join(ALLOCATIONS)}."
            )

    @classmethod
    def preset(cls, quality: str, sparsity: float, **settings) -> DSAConfig:
        """The config of a quality, a row of `QUALITIES`: `"fast"`, `"good"` or `"best"`.

        ```python
        DSAConfig.preset("good", 0.7, num_samples=32, exclude=("lm_head",))
        ```

        Args:
            settings (`dict`): any of a `DSAConfig`, those of its sections under their own names, too. The quality
                fills in what is not given; of a section that is given as an object, all is.

        Raises:
            UnknownNameError: there is no such quality.
            ValueError: a setting contradicts the quality, such as another method; it names both.
        """
        given = {
            name: settings_to(value) if isinstance(value, (DataConfig, UpdateConfig, ValuesConfig)) else value
            for name, value in settings.items()
        }
        flat = with_quality(quality, {"sparsity": sparsity, **flattened(cls, given)})
        return settings_from(cls, nested(cls, flat))

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values, sections as objects."""
        data = settings_to(self)
        return data | ({"allocation": self.allocation.to_dict()} if isinstance(self.allocation, Allocation) else {})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DSAConfig:
        """The config in `to_dict`'s form; settings of its sections may stand beside them, as before version 3.

        Raises:
            ValueError: a key that is no setting.
        """
        allocation = data.get("allocation")
        given = {"allocation": Allocation.from_dict(allocation)} if isinstance(allocation, Mapping) else {}
        return settings_from(cls, {**data, **given})

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `dsa_config.json` with this config into `directory`; never over that of a pruned model.

        Raises:
            ValueError: its allocation is yet to be chosen: a file says what a model was made with.
        """
        self.check_settled()
        Path(directory).mkdir(parents=True, exist_ok=True)
        file = Path(directory) / CONFIG_NAME
        # The file of a pruned model has the same name, and says what cannot be found out again.
        if file.exists() and not _holds_config(file):
            raise FileExistsError(f"{file} is not a saved DSAConfig alone; choose another folder.")
        data = {"format_version": FORMAT_VERSION, "config": self.to_dict()}
        write_text(file, json.dumps(data, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, path: str | Path) -> DSAConfig:
        """The config in a `dsa_config.json`, or in the folder that holds one: a saved config's or a pruned model's."""
        path = Path(path)
        path = path / CONFIG_NAME if path.is_dir() else path
        data = read_json(path)
        if not isinstance(data, Mapping) or not isinstance(data.get("config", data), Mapping):
            raise ValueError(f"{path} holds no DSAConfig.")
        version = data.get("format_version", 1)
        if not is_whole(version) or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"{path} has version {version!r} of the format, and this optimum-dsa knows up to {FORMAT_VERSION}; "
                f"upgrade it with {how_to_upgrade()}."
            )
        # An earlier form has the settings at the top.
        given = data.get("config") or {name: value for name, value in data.items() if name != "format_version"}
        return cls.from_dict(given)


def _holds_config(file: Path) -> bool:
    """Whether a file holds what `DSAConfig.save_pretrained` writes, and nothing else."""
    try:
        data = read_json(file)
    except ValueError:
        return False
    return isinstance(data, Mapping) and data.keys() == {"format_version", "config"}


def _exists(path: str) -> bool:
    try:
        return bool(path) and Path(path).exists()
    except (OSError, ValueError):  # no path at all: too long, or with a zero byte
        return False
