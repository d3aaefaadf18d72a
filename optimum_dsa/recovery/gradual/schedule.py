"""How sparsity grows while a model is trained."""

from __future__ import annotations

from dataclasses import dataclass

from ...common.registry import Registry


SCHEDULES = Registry("schedule")


@SCHEDULES.register(reference="https://arxiv.org/abs/1710.01878")
def cubic(time: float) -> float:
    """1 - (1 - t)³: fast at first, slow at the end."""
    return 1 - (1 - time) ** 3


@SCHEDULES.register()
def linear(time: float) -> float:
    """t: the same at every moment."""
    return time


@dataclass(frozen=True)
class PruningSchedule:
    """The optimizer steps before which a model is pruned, and how far.

    Args:
        start (`int`, defaults to 0): The step before which it is pruned first; 0 is before any training.
        end (`int`, *optional*): The step before which it reaches the final sparsity. Defaults to `start`: one shot.
        every (`int`, defaults to 10): Steps from one pruning to the next.
        initial (`float`, defaults to 0.0): The sparsity from which it grows.
        shape (`str`, defaults to `"cubic"`): A row of `SCHEDULES`: the share of the way as a function of the share of
            the time.
    """

    start: int = 0
    end: int | None = None
    every: int = 10
    initial: float = 0.0
    shape: str = "cubic"

    def __post_init__(self):
        for name, least in (("start", 0), ("every", 1), ("end", 0)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole and value >= least) and not (name == "end" and value is None):
                raise ValueError(f"{name} is a whole number of at least {least}, got {value!r}.")
        if self.end is not None and self.end < self.start:
            raise ValueError(f"The schedule ends at step {self.end}, before it starts at step {self.start}.")
        if not 0 <= self.initial < 1:
            raise ValueError(f"initial is a sparsity in [0, 1), got {self.initial!r}.")
        SCHEDULES[self.shape]

    @property
    def last(self) -> int:
        """The step of the last pruning."""
        return self.start if self.end is None else self.end

    @property
    def moments(self) -> tuple[int, ...]:
        """The steps before which the model is pruned."""
        return (*range(self.start, self.last, self.every), self.last)

    def sparsity(self, step: int, final: float) -> float:
        """What has been removed before `step`, `step` included."""
        if step >= self.last:
            return final
        # A step between two moments has what the one before it removed.
        done = [moment for moment in self.moments if moment <= step]
        if not done:
            return 0.0
        share = (done[-1] - self.start) / (self.last - self.start)
        return self.initial + (final - self.initial) * SCHEDULES[self.shape](share)
