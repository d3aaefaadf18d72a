"""The sections of a `DSAConfig`: what becomes of the weights that stay."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.settings import check_settings, setting
from ..model.statistics import DAMPING
from ..packed.grid import GROUPS, SCALES
from .targets import TARGETS
from .unstructured.updates import UPDATES


BITS = {"int8": 8, "int4": 4}  # values -> bits of a weight


@dataclass(frozen=True)
class UpdateConfig:
    """What becomes of the weights that stay.

    Args:
        name (`str`, *optional*): A row of `UPDATES`. Defaults to the method's.
        damping (`float`, defaults to 0.01): Share of mean diag(X·Xᵀ) added to it before it is inverted.
        true_sequential (`bool`, defaults to `False`): Whether the matrices of a block that come later (o; gate, up;
            down) are calibrated on the pruned ones before them (q, k, v), too: more forward passes, better weights.
        targets (`str`, defaults to `"sparse"`): What the pruned matrices are fitted to: `"sparse"`, what their own
            weights make of the inputs that they get, or `"dense"`, what the dense model has in that place, so that a
            block makes up for those before it. Routed experts are fitted to the former in any case.
        residual (`bool`, defaults to `False`): With dense targets, whether what the residual stream lacks is part of
            the target of the matrices whose outputs are added to it (o, down).
        still (`tuple[str, ...]`): Names or patterns, as in `exclude`, of matrices that lose weights, and whose others
            stay as they are, whatever the update. With method `"d2prune"` and none of them, `DSAPruner.prune` chooses
            them among those that make the heads.
    """

    name: str | None = None
    damping: float = setting(DAMPING, low=0)
    true_sequential: bool = False
    targets: str = setting("sparse", choices=TARGETS)
    residual: bool = False
    still: tuple[str, ...] = ()

    def __post_init__(self):
        check_settings(self)
        if self.name is not None:
            UPDATES[self.name]
        if self.residual and self.targets != "dense":
            raise ValueError(
                f"residual=True adds to the targets of the dense model, and targets={self.targets!r} has none; use "
                "targets='dense' with it, or leave it out."
            )


@dataclass(frozen=True)
class ValuesConfig:
    """Whether the weights that stay become whole numbers times scales, and how these are chosen.

    Args:
        name (`str`, *optional*): `"int8"` or `"int4"`: 8 or 4 bits a weight. By default weights stay as they are.
        group (`int`, defaults to 128): Columns of a matrix that share a scale: 32, 64, 128, ... up to 4096, or 0 for
            all of a row. A scale takes two bytes.
        scales (`str`, defaults to `"mse"`): How a scale is chosen: `"absmax"`, so that the largest weight is the
            largest number, or `"mse"`, so that the squared error is least.
        feedback (`bool`, defaults to `True`): Whether the weights that are rounded later make up for what is lost by
            those before them, which takes X·Xᵀ of every matrix.
    """

    name: str | None = setting(None, choices=tuple(BITS))
    group: int = setting(128, low=0)
    scales: str = setting("mse", choices=tuple(SCALES))
    feedback: bool = True

    def __post_init__(self):
        check_settings(self)
        for name in ("group", "scales", "feedback"):
            if self.name is None and (value := getattr(self, name)) != getattr(ValuesConfig, name):
                raise ValueError(
                    f"{name}={value!r} says how weights become whole numbers, and without values none does; give "
                    "values='int8' or values='int4', or leave it out."
                )
        if self.group not in GROUPS:
            raise ValueError(
                f"group={self.group} is no number of columns that may share a scale; use one of "
                f"{', '.join(map(str, sorted(GROUPS)))}, where 0 is all of a row."
            )

    @property
    def bits(self) -> int | None:
        """Bits of a weight; `None` where weights stay as they are."""
        return BITS.get(self.name)


@dataclass(frozen=True)
class ReconstructConfig:
    """How what is left is trained against the dense model: every block, once it is pruned, and in the end the whole.

    Args:
        steps (`int`, defaults to 0): Steps of training for every block, of 4 calibration windows each. 0 trains
            nothing; 64 is enough as a rule.
        rate (`float`, *optional*): The first learning rate, which falls to zero. By default the best of a few on
            calibration windows that are held out.
        span (`int`, defaults to 1): Blocks in a row that are trained together, so that each makes up for the others:
            better, with as many times the memory.
        apart (`bool`, defaults to `False`): Whether attention and MLP of a block are trained one after the other: as
            many steps each, in about half the memory.
        distill (`int`, defaults to 0): Steps of training for the whole model, when all blocks are pruned, of 4
            calibration windows each, at the best rate of a few. 0 trains nothing.
    """

    steps: int = setting(0, low=0)
    rate: float | None = setting(None, low=0, what="a learning rate")
    span: int = setting(1, low=1)
    apart: bool = False
    distill: int = setting(0, low=0)

    @property
    def asked(self) -> str | None:
        """What is trained first, such as "reconstruct=64", for errors; `None` where nothing is."""
        return f"reconstruct={self.steps}" if self.steps else f"distill={self.distill}" if self.distill else None

    @property
    def is_by_block(self) -> bool:
        """Whether one block at a time suffices, as an offloaded model has it."""
        return self.span == 1 and not self.distill

    def __post_init__(self):
        check_settings(self)
        if self.rate == 0:
            raise ValueError("rate=0 trains nothing; leave it out to have one found, or use reconstruct=0.")
        for name in ("rate", "span", "apart"):
            if not self.steps and (value := getattr(self, name)) != getattr(ReconstructConfig, name):
                raise ValueError(
                    f"{name}={value!r} says how blocks are trained, and with reconstruct=0 none is; give steps, such "
                    "as reconstruct=64, or leave it out."
                )
        if self.apart and self.span > 1:
            raise ValueError(
                f"apart=True trains parts of a block, and span={self.span} as many blocks together; leave out one of "
                "both."
            )

    def check_place(self, offloaded: bool) -> None:
        """Raise `ValueError` where a model whose weights are `offloaded` cannot be trained so."""
        if self.steps and self.span > 1 and offloaded:
            raise ValueError(
                f"span={self.span} trains blocks together, and of an offloaded model one is there at a time; use "
                "span=1, or load the model into memory."
            )
        if self.distill and offloaded:
            raise ValueError(
                f"distill={self.distill} trains the whole model, and of an offloaded one a block is there at a time; "
                "use reconstruct=64 alone, which trains block by block, or load the model into memory."
            )
