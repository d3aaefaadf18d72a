"""Budgets: proposed sparsities -> an `Allocation` that meets the target exactly."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ...common.files import read_json, write_text
from ...common.hub_file import hub_file
from ...common.values import LARGEST_WHOLE, is_whole, short
from ...model.architecture import GRANULARITIES


ALLOCATION_FILE = "allocation.json"  # in the folder of a search, and in a repository
FILES = (ALLOCATION_FILE, "dsa_config.json")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@\w[\w./-]*)?")  # an allocation function has two slashes at least


@dataclass(frozen=True)
class Allocation:
    """The sparsity of every unit, exact to one weight.

    Attributes:
        sparsity (`dict[str, float]`): unit name -> share of its weights removed, `count / size` for a whole number
            `count`.
        sizes (`dict[str, int]`): unit name -> prunable weights in it.
        name (`str`): what made it, such as "owl" or an allocation function.
        granularity (`str`, *optional*): what its units are, a value of `GRANULARITIES`; `None` where nobody has said,
            as in files of earlier releases: then the model tells, by the names of its units.
        metric (`str`, *optional*): what it was found together with: a config that takes the allocation, and names no
            metric of its own, scores by that.
    """

    sparsity: dict[str, float]
    sizes: dict[str, int]
    name: str = "custom"
    granularity: str | None = None
    metric: str | None = None

    def __post_init__(self):
        if not isinstance(self.name, str):
            raise ValueError(f"The name of an allocation is a text, got {short(self.name)}.")
        if not isinstance(self.metric, str | None):
            raise ValueError(f"The metric of an allocation is a text, got {short(self.metric)}.")
        if self.granularity not in (None, *GRANULARITIES):
            raise ValueError(
                f"The granularity of an allocation is {', '.join(GRANULARITIES)}, got {short(self.granularity)}."
            )
        if self.sparsity.keys() != self.sizes.keys():
            odd = sorted(self.sparsity.keys() ^ self.sizes.keys())
            raise ValueError(f"The allocation names units that lack a size or a sparsity: {', '.join(odd[:5])}.")
        for unit, value in self.sparsity.items():
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(
                    f"The allocation gives {unit} a sparsity of {short(value)}; expected a number in [0, 1]."
                )
        for unit, size in self.sizes.items():
            if not is_whole(size):
                raise ValueError(
                    f"The allocation gives {unit} a size of {short(size)}; expected a whole number of weights, "
                    f"at most {LARGEST_WHOLE:,}."
                )

    @property
    def overall(self) -> float:
        """The parameter-weighted mean sparsity."""
        return sum(self.counts().values()) / max(sum(self.sizes.values()), 1)

    def counts(self) -> dict[str, int]:
        """Weights to remove, per unit."""
        return {unit: round(self.sparsity[unit] * size) for unit, size in self.sizes.items()}

    def to_dict(self) -> dict:
        """Name, granularity, sparsity and sizes as JSON values, and the metric where there is one."""
        data = {
            "name": self.name,
            "granularity": self.granularity,
            "sparsity": dict(self.sparsity),
            "sizes": dict(self.sizes),
        }
        return data if self.metric is None else {**data, "metric": self.metric}

    @classmethod
    def from_dict(cls, data: Mapping) -> Allocation:
        """An allocation from `to_dict`'s form, or from a plain `{unit: sparsity}` whose sizes the model will give.

        Raises:
            ValueError: it has neither form.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"An allocation is {{unit: sparsity}}, got {short(data)}.")
        if "sparsity" not in data or not isinstance(data["sparsity"], Mapping):
            data = {"sparsity": data}
        sparsity = dict(data["sparsity"])
        sizes = data.get("sizes") or dict.fromkeys(sparsity, 0)
        if not isinstance(sizes, Mapping):
            raise ValueError(f"The sizes of an allocation are {{unit: weights}}, got {short(sizes)}.")
        return cls(sparsity, dict(sizes), data.get("name", "custom"), data.get("granularity"), data.get("metric"))

    def save(self, path: str | Path) -> None:
        """Write a JSON file that `load`, and `allocation` of a config, read."""
        write_text(Path(path), json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path, section: str | None = None) -> Allocation:
        """The allocation in a JSON file, or in the folder of a search or of a pruned model, here or on the Hub.

        Args:
            path (`str | Path`): of the file or folder; or a repository, such as "me/found" or "me/found@revision".
            section (`str`, *optional*): where the file has a section of that name, the allocation is its own:
                "structured" of a smaller model, whose `allocation` is of the zeros in what is left.

        Raises:
            OSError: there is none.
        """
        text, path = str(path), Path(path)
        if path.is_dir():
            found = next((path / name for name in FILES if (path / name).is_file()), None)
            if found is None:
                raise FileNotFoundError(
                    f"{text} has neither {' nor '.join(FILES)}, so no allocation; name a folder of a pruned model or "
                    "of a finished search (one that was ended goes on with --resume)."
                )
            path = found
        elif not path.exists() and is_repository(text):
            path = _of_repository(text)
        data = read_json(path)
        if not isinstance(data, Mapping):
            raise ValueError(f"{path} holds no allocation: expected {{unit: sparsity}}.")
        if isinstance(own := data.get(section), Mapping) and own.get("allocation"):
            data = own
        return cls.from_dict(data.get("allocation", data))


def is_repository(text: str) -> bool:
    """Whether a text can be the name of a repository on the Hub, with a revision or without."""
    return _REPOSITORY.fullmatch(text) is not None and not text.endswith(".json")


def _of_repository(text: str) -> Path:
    """The file with the allocation of a repository, in the cache."""
    name, _, revision = text.partition("@")
    options = {"revision": revision} if revision else {}
    try:
        found = next(filter(None, (hub_file(name, file, **options) for file in FILES)), None)
    except OSError as error:
        raise FileNotFoundError(
            f"The allocation {text!r} is no file or folder here, and no repository that the Hub gives: {error}"
        ) from None
    if found is None:
        raise FileNotFoundError(
            f"The allocation {text!r} is no file or folder here; on the Hub it has none of {', '.join(FILES)}, or the "
            "Hub cannot be asked."
        )
    return found


def fit_to_budget(
    proposed: Mapping[str, float],
    sizes: Mapping[str, int],
    target: float,
    low: float = 0.0,
    high: float = 1.0,
    name: str = "custom",
    granularity: str | None = None,
    floors: Mapping[str, int] | None = None,
) -> Allocation:
    """The `Allocation` nearest to `proposed` whose parameter-weighted mean is `target`, to one weight.

    Water-filling: all units are shifted by one constant and clipped to [low, high]; then every unit gets a whole
    number of weights, largest remainders first, so that the numbers add up to round(target · Σ sizes).

    Args:
        floors (`Mapping[str, int]`, *optional*): unit -> weights that are removed already and stay so, whatever `high`
            is. Where they are more than the target, they are the target.

    Raises:
        ValueError: a value of `proposed` is not finite, or no allocation within the bounds has this mean.
    """
    if not low <= target <= high:
        raise ValueError(
            f"A mean sparsity of {target} cannot be met with every unit in [{low}, {high}]; "
            "widen min_sparsity / max_sparsity or change the target."
        )
    values = torch.tensor([float(proposed[unit]) for unit in sizes], dtype=torch.float64)
    if not values.isfinite().all():
        # NaN and ±∞ alike: the difference with itself is NaN.
        bad = [unit for unit, value in zip(sizes, values.tolist()) if value - value != 0]
        raise ValueError(f"Allocation {name} is not finite for {', '.join(bad[:5])}.")
    widths = torch.tensor(list(sizes.values()), dtype=torch.float64)
    if floors and any(floors.values()):
        standing = torch.tensor([floors.get(unit, 0) for unit in sizes], dtype=torch.float64)
        target = max(target, float(standing.sum() / widths.sum()))
        low = (standing / widths.clamp(min=1)).clamp(min=low)
        high = low.clamp(min=high)
        if round(float((low * widths).sum())) > round(target * int(widths.sum())):
            raise ValueError(
                f"A mean sparsity of {target:.4f} cannot be met: the zeros that some units have already, and "
                "min_sparsity in the others, are more; choose a smaller min_sparsity or a higher sparsity."
            )
    counts = fit_counts(values, widths, target, low, high)
    sparsity = {unit: count / max(size, 1) for (unit, size), count in zip(sizes.items(), counts.tolist())}
    return Allocation(sparsity, dict(sizes), name, granularity)


def fit_counts(proposed: Tensor, sizes: Tensor, target: float, low: float | Tensor, high: float | Tensor) -> Tensor:
    """`fit_to_budget` of many proposals at once: (..., units) float64 -> weights to remove, (..., units) int64.

    `low` and `high` hold for all units, or are (units,).
    """
    exact = _shift_to_mean(proposed, sizes, target, low, high)
    return _round_to_total(exact * sizes, round(target * int(sizes.sum())))


def _shift_to_mean(values: Tensor, weights: Tensor, target: float, low: float, high: float) -> Tensor:
    """clip(values + c, low, high) with the c that makes the weighted mean `target`: exact, from the sorted kinks."""
    kinks = torch.cat([low - values, high - values], dim=-1).sort(dim=-1).values
    goal = target * weights.sum()

    def total(index: Tensor) -> Tensor:
        """Removed weight at the kinks of these places, (..., 1) int64 -> (..., 1) float64."""
        shifted = (values + kinks.gather(-1, index)).clamp(low, high)
        return (shifted * weights).sum(-1, keepdim=True)

    # between two neighbouring kinks the total is linear in the shift: bisect for them
    first = torch.zeros_like(kinks[..., :1], dtype=torch.int64)
    last = first + kinks.shape[-1] - 1
    # As many halvings as the longest row needs; a row that is done changes no more.
    for _ in range(kinks.shape[-1].bit_length()):
        middle = (first + last) // 2
        under = total(middle) <= goal
        apart = last - first > 1
        first, last = torch.where(apart & under, middle, first), torch.where(apart & ~under, middle, last)
    below, above = total(first), total(last)
    # A total that is flat there meets the goal at either end.
    share = torch.where(above > below, (goal - below) / (above - below), 0.0)
    low_kink, high_kink = kinks.gather(-1, first), kinks.gather(-1, last)
    return (values + low_kink + share * (high_kink - low_kink)).clamp(low, high)


def _round_to_total(amounts: Tensor, total: int) -> Tensor:
    """Whole numbers that add up to `total`, the sum of `amounts` rounded: (..., n) float64 -> (..., n) int64.

    Largest remainders are rounded up. Who is whole already stays: fewer are missing than have a remainder.
    """
    # A share times a size may come out a hair below the whole number that it is.
    floor = (amounts + 1e-9).floor()
    missing = total - floor.sum(-1, keepdim=True)
    order = (amounts - floor).argsort(dim=-1, descending=True, stable=True)
    chosen = torch.arange(floor.shape[-1]).expand_as(order) < missing
    return floor.scatter_add(-1, order, chosen.double()).long()


def split_count(count: int, sizes: Mapping[str, int], floors: Mapping[str, int] | None = None) -> dict[str, int]:
    """`count` weights divided over matrices in proportion to their sizes, to one weight each.

    A matrix gets no fewer than its number in `floors`; the others then share what is left.
    """
    # float64 holds whole numbers up to 2⁵³, more weights than any model has.
    limits = torch.tensor(list(sizes.values()), dtype=torch.float64)
    shares = limits * (count / max(int(limits.sum()), 1))
    divided = dict(zip(sizes, _round_to_total(shares, count).tolist()))
    if not floors or all(divided[name] >= floors.get(name, 0) for name in sizes):
        return divided
    even = dict.fromkeys(sizes, 0.0)
    return fit_to_budget(even, sizes, count / int(limits.sum()), floors=floors).counts()


def fit_to_matrices(
    allocation: Allocation,
    matrices: Mapping[str, Sequence[int]],
    low: float = 0.0,
    high: float = 1.0,
    floors: Mapping[str, int] | None = None,
) -> Allocation:
    """The allocation in which a matrix of `size` weights in a unit of `sparsity` loses round(sparsity · size).

    So it gets what implementations give it that know no budget, and results can be compared weight by weight. What
    the roundings add up to, a few weights, the last units make up for, where nothing comes behind them: the total is
    the allocation's, to one weight. No unit leaves [low, high] for it.

    Args:
        matrices (`Mapping[str, Sequence[int]]`): unit -> sizes of its matrices.
        floors (`Mapping[str, int]`, *optional*): unit -> the least that it loses, as in `fit_to_budget`.
    """
    units = list(allocation.sizes)
    counts = torch.tensor([allocation.counts()[unit] for unit in units])
    standing = torch.tensor([(floors or {}).get(unit, 0) for unit in units])
    rounded = round_matrices(counts, [matrices[unit] for unit in units], low, high, standing).tolist()
    sparsity = {unit: count / max(allocation.sizes[unit], 1) for unit, count in zip(units, rounded)}
    return replace(allocation, sparsity=sparsity)


def round_matrices(
    counts: Tensor, matrices: Sequence[Sequence[int]], low: float, high: float, floors: Tensor | None = None
) -> Tensor:
    """`fit_to_matrices` of many at once: weights to remove, (..., units) int64, as they were and as they become.

    Args:
        matrices (`Sequence[Sequence[int]]`): the sizes of each unit's matrices.
        floors (`Tensor`, *optional*): (units,) int64, the least that each loses.
    """
    sizes = torch.tensor([sum(parts) for parts in matrices], dtype=torch.float64)
    least = (low * sizes).ceil().long()
    least = torch.minimum(least if floors is None else torch.maximum(least, floors), counts)
    most = torch.maximum((high * sizes).floor().long(), counts)
    share = counts / sizes.clamp(min=1)
    rounded = torch.zeros_like(counts)
    for unit, parts in enumerate(matrices):
        for size, times in Counter(parts).items():
            rounded[..., unit] += times * (share[..., unit] * size).round().long()
    rounded = rounded.clamp(least, most)
    over = rounded.sum(-1) - counts.sum(-1)
    # From the last unit on: what comes behind a unit is changed by what is changed in it.
    for unit in reversed(range(len(matrices))):
        before = rounded[..., unit].clone()
        rounded[..., unit] = (before - over).clamp(least[..., unit], most[..., unit])
        over = over - (before - rounded[..., unit])
    return rounded
