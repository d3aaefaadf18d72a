"""Qualities: how good a pruned model is to be, in one word, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..common.registry import Registry
from .unstructured.patterns import Pattern


@dataclass(frozen=True)
class Quality:
    """A row of `QUALITIES`: settings of a `DSAConfig` under their flat names.

    Attributes:
        decides: what the word stands for. To ask for another value of one of them beside it is a contradiction.
        fills: what is taken where nothing else was given.
    """

    decides: Mapping[str, Any]
    fills: Mapping[str, Any]

    def __str__(self) -> str:
        """Its settings as a line: "alps, targets dense, ..."."""
        parts = [str(self.decides["method"])]
        for name, value in (self.decides | self.fills).items():
            if name in ("method", "sequential"):
                continue
            parts.append(name.replace("_", " ") if value is True else f"{name.replace('_', ' ')} {value}")
        return ", ".join(parts)


# These are what a method is made of: with one of them said, there is nothing left for a quality to choose.
CHOSEN = ("method", "metric", "update")

# The fact `costs` is the time over that of wanda at the same allocation and calibration, one thread of a CPU.
QUALITIES = Registry("quality")

QUALITIES.add(
    "fast",
    # 8,192 tokens: norms of inputs need few, and the forward passes are all that it spends.
    Quality({"method": "wanda"}, {"allocation": "dsa", "num_samples": 16, "sequence_length": 512}),
    about="a mask by wanda, the weights as they are: minutes on a CPU for a model of 1 B",
    costs=1,
)
QUALITIES.add(
    "good",
    Quality(
        {"method": "alps", "targets": "dense", "sequential": True},
        {"allocation": "dsa", "num_samples": 64},
    ),
    about="mask and weights found together by alps, fitted to what the dense model has in each place",
    costs=4,
)
QUALITIES.add(
    "best",
    Quality(
        {"method": "alps", "targets": "dense", "true_sequential": True, "residual": True, "sequential": True},
        {"reconstruct": 64, "allocation": "dsa", "num_samples": 128},
    ),
    about="matrix after matrix, with what the residual stream lacks, and every block trained to what it gave",
    costs=26,
)


def with_quality(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, settings of a `DSAConfig` by their flat names, and what the quality `name` says of all others.

    A strict N:M pattern leaves nothing to allocate, so that its allocation is uniform where none was given.

    Raises:
        UnknownNameError: there is no such quality.
        ValueError: a setting that the quality decides is given, and not as it decides.
    """
    row = QUALITIES[name]
    for setting, value in given.items():
        decided = row.decides.get(setting)
        if setting in CHOSEN or (setting in row.decides and value != decided):
            raise ValueError(
                f"quality {name!r} chooses {'how to prune' if decided is None else f'{setting}={decided!r}'}, and "
                f"{setting}={value!r} was given as well; leave out one of both."
            )
    fills = dict(row.fills)
    pattern = given.get("pattern")
    if pattern is not None and Pattern.parse(pattern).sparsity is not None:
        fills["allocation"] = "uniform"
    return fills | dict(row.decides) | dict(given)
