"""How far work is, on stderr: a bar on a terminal, lines where nobody watches one (a log file, a pipe)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from huggingface_hub.utils import are_progress_bars_disabled, tqdm

from .machine import shown_seconds


Item = TypeVar("Item")

PAUSE = 10.0  # seconds between two lines: a log of hours stays readable, and no silence is longer than a step


class Progress:
    """So many of `total` steps, shown as they are done; silenced by the Hugging Face switches.

    Off a terminal a line comes with a step at most every `PAUSE` seconds, and one at the end. Time that is left, there
    as in a bar, takes the steps to be alike.

    Args:
        description (`str`): what is done, such as "Pruning".
        total (`int`, *optional*): how many steps there are, where that is known.
        unit (`str`, defaults to `"step"`): what a step is.
        name (`str`, defaults to `"optimum_dsa"`): by which `huggingface_hub.utils.disable_progress_bars` silences it.
        hidden (`bool`, defaults to `False`): show nothing, as on all ranks but the first.
    """

    def __init__(
        self,
        description: str,
        total: int | None = None,
        unit: str = "step",
        name: str = "optimum_dsa",
        hidden: bool = False,
    ):
        self.description, self.total, self.unit = description, total, unit
        self.done = 0
        self._notes: dict[str, str] = {}
        self._began = self._said = time.monotonic()
        self._shown: tuple | None = None  # what the last line said
        self._silent = hidden or are_progress_bars_disabled(name)
        self._bar = None
        if not self._silent and _watched():
            self._bar = tqdm(total=total, desc=description, unit=unit, name=name, leave=False)

    def advance(self, steps: int = 1, **notes: str) -> None:
        """So many steps more are done."""
        self.show(self.done + steps, **notes)

    def show(self, done: int, **notes: str) -> None:
        """So many steps are done in all; `notes` stand behind, by name."""
        self.done, self._notes = done, {name: text for name, text in notes.items() if text}
        if self._silent:
            return
        if self._bar is not None:
            self._bar.n = done
            if notes:
                self._bar.set_postfix(self._notes, refresh=False)
            self._bar.update(0)
            if time.monotonic() - self._said > 0.1:  # `update(0)` redraws by steps alone, and a note may change too
                self._said = time.monotonic()
                self._bar.refresh()
        elif time.monotonic() - self._said >= PAUSE:
            self._say()

    def close(self) -> None:
        """The last line, or the end of the bar."""
        if self._bar is not None:
            self._bar.close()
        elif not self._silent and self._shown != self._state:
            self._say()
        self._silent = True

    @property
    def _state(self) -> tuple:
        return self.done, tuple(self._notes.items())

    def _say(self) -> None:
        self._said, self._shown = time.monotonic(), self._state
        of = "" if self.total is None or self.unit == "%" else f" of {self.total}"
        plural = f"{self.unit}es" if self.unit.endswith("ch") else f"{self.unit}s"
        units = self.unit if self.unit == "%" or (self.total or self.done) == 1 else plural
        notes = [f"{name} {text}" for name, text in self._notes.items()]
        taken = self._said - self._began
        facts = [f"{self.done}{of} {units}", *notes, f"{taken:.0f} s"]
        if self.total and 0 < self.done < self.total:
            facts.append(f"about {shown_seconds(taken * (self.total - self.done) / self.done)} left")
        sys.stderr.write(f"{self.description}: {', '.join(facts)}\n")
        sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def progress(
    items: Iterable[Item], description: str, unit: str = "step", name: str = "optimum_dsa", hidden: bool = False
) -> Iterator[Item]:
    """The items one after the other, each a step of a `Progress`."""
    total = len(items) if isinstance(items, Sized) else None
    with Progress(description, total, unit, name, hidden) as shown:
        for item in items:
            yield item
            shown.advance()


def _watched() -> bool:
    """Whether stderr is a terminal, or a notebook that draws bars."""
    isatty = getattr(sys.stderr, "isatty", None)
    return bool(isatty and isatty()) or "ipykernel" in sys.modules
