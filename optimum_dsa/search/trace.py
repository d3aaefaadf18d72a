"""What was tried: one JSON line per trial, and the way back from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.files import parse_json
from ..common.same_run import check_same_run
from ..common.values import is_number, is_real, is_whole, short
from .space import Candidate


UNITS = ("tokens", "evaluations", "s")  # of the limits in a budget
NO_ROOM = "the budget has no room for it"  # the error of a trial that was not computed


@dataclass(frozen=True)
class Request:
    """What a strategy asks for.

    Attributes:
        kind: "loss" (a proxy: with masks or matrices from the anchor), "slopes" (the same and its slope per matrix),
            "errors" (what every matrix loses at these counts, on no validation window), "sequential" (the loss after
            the prune itself), or "anchor" (take scores at this candidate from now on).
        candidate: of what.
        start, stop: the validation windows.
    """

    kind: str
    candidate: Candidate
    start: int = 0
    stop: int = 0

    @property
    def rows(self) -> range:
        return range(self.start, self.stop)


@dataclass(frozen=True)
class Trial:
    """An answered request.

    Attributes:
        number (`int`): position in the search.
        request (`Request`): what was asked.
        loss (`float`): lower is better; `None` where the candidate is impossible, and then `error` says why.
        slopes (`tuple[float, ...]`): per matrix, where they were asked for; with "errors" those.
        tokens (`int`): validation tokens that it cost; 0 where the answer was known already.
        seconds (`float`): wall time that it cost.
        counts (`tuple[int, ...]`): what `prune` would remove per matrix, and what was judged.
        perplexity (`float`): on the same text, after a sequential prune.
    """

    number: int
    request: Request
    loss: float | None = None
    slopes: tuple[float, ...] | None = None
    tokens: int = 0
    seconds: float = 0.0
    counts: tuple[int, ...] | None = None
    error: str | None = None
    perplexity: float | None = None

    def to_json(self) -> str:
        request = self.request
        data: dict[str, Any] = {
            "number": self.number,
            "kind": request.kind,
            "candidate": request.candidate.to_dict(),
            "rows": [request.start, request.stop],
            "loss": self.loss,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 4),
        }
        for name in ("slopes", "counts", "error", "perplexity"):
            value = getattr(self, name)
            if value is not None:
                data[name] = list(value) if isinstance(value, tuple) else value
        return json.dumps(data)

    @classmethod
    def from_json(cls, line: str) -> Trial:
        """The trial in a line of a trace; `ValueError` or `KeyError` where it is none."""
        data = parse_json(line)
        if not isinstance(data, dict):
            raise ValueError(f"a trial is an object, got {short(data)}")
        for name, holds in _FIELDS.items():
            if not holds(data[name] if name in _REQUIRED else data.get(name)):
                raise ValueError(f"a trial cannot have {name}={short(data.get(name))}")
        request = Request(data["kind"], Candidate.from_dict(data["candidate"]), *data["rows"])
        slopes, counts = (None if data.get(k) is None else tuple(data[k]) for k in ("slopes", "counts"))
        return cls(
            data["number"],
            request,
            data["loss"],
            slopes,
            data["tokens"],
            data["seconds"],
            counts,
            data.get("error"),
            data.get("perplexity"),
        )


@dataclass(frozen=True)
class _Mean:
    """A loss as the mean over so many windows."""

    windows: int
    loss: float

    def with_more(self, windows: int, loss: float) -> _Mean:
        total = self.windows + windows
        return _Mean(total, (self.windows * self.loss + windows * loss) / total)


def _list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, list) and all(map(holds, value)))


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_whole, value)) and value[0] <= value[1]


_REQUIRED = ("number", "kind", "candidate", "rows", "loss", "tokens", "seconds")
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "number": is_whole,
    "kind": lambda value: isinstance(value, str),
    "candidate": lambda value: isinstance(value, dict),
    "rows": _is_rows,
    "loss": lambda value: value is None or is_real(value),
    "tokens": is_whole,
    "seconds": is_number,
    "slopes": _list_of(is_real),
    "counts": _list_of(is_whole),
    "error": lambda value: value is None or isinstance(value, str),
    "perplexity": lambda value: value is None or is_real(value),
}


def _settings(line: str) -> dict[str, Any]:
    data = parse_json(line)
    if not isinstance(data, dict) or not isinstance(data.get("settings"), dict):
        raise ValueError("its first line holds no settings")
    return data["settings"]


def _with_units(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with a budget as it is given: "2000 tokens" where the trace has [2000, None, None]."""
    amounts = settings.get("budget")
    if not isinstance(amounts, list) or len(amounts) != 3:
        return dict(settings)
    said = [f"{amount} {unit}" for amount, unit in zip(amounts, UNITS) if is_number(amount)]
    return {**settings, "budget": " ".join(said) or "no limit"}


class SearchTrace:
    """The trials of a search, in order; in a file if it has one, each line flushed as it comes.

    The first line holds the settings. A trace that is continued must have been made with the same ones.
    """

    def __init__(self, path: str | Path | None = None, settings: Mapping[str, Any] | None = None):
        self.path = None if path is None else Path(path)
        # As they come back from a file: tuples are lists, or no trace would fit its own settings.
        self.settings = json.loads(json.dumps(settings or {}))
        self.trials: list[Trial] = []
        self._file = None

    @classmethod
    def open(cls, path: str | Path | None, settings: Mapping[str, Any], resume: bool = False) -> SearchTrace:
        """A trace at `path` to write to: fresh, or with what is there already.

        Raises:
            FileExistsError: there is one, and `resume` is false.
            ValueError: it was made with other settings.
        """
        trace = cls(path, settings)
        if trace.path is None:
            return trace
        if trace.path.exists():
            if not resume:
                raise FileExistsError(f"{path} holds a search already; resume it, or choose another folder.")
            trace._read()
        trace.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not trace.path.exists()
        trace._file = trace.path.open("a", encoding="utf-8")
        if fresh:
            trace._write(json.dumps({"settings": trace.settings}))
        return trace

    @classmethod
    def load(cls, path: str | Path) -> SearchTrace:
        """The trace at `path`, to look at."""
        trace = cls(path)
        trace._read(check=False)
        return trace

    def _read(self, check: bool = True) -> None:
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]  # a kill may leave half a line
        lines = whole.splitlines()
        if not lines:
            if check:
                self.path.unlink()
            return
        settings = self._parsed(_settings, lines[0], 1)
        self.trials = [self._parsed(Trial.from_json, line, number) for number, line in enumerate(lines[1:], 2)]
        # Cut off now, or the next line would be appended to the half one.
        if whole != text and check:
            self.path.write_bytes(whole)
        if check:
            shown = map(_with_units, (settings, self.settings))
            check_same_run(f"The search in {self.path}", *shown, "choose another folder")
        self.settings = settings

    def _parsed(self, parse: Callable[[str], Any], line: bytes, number: int) -> Any:
        """What `parse` makes of a line; `ValueError` names the line, and how to go on."""
        try:
            return parse(line.decode("utf-8"))
        except (ValueError, KeyError, TypeError) as error:
            wrong = f"it lacks {error}" if isinstance(error, KeyError) else error
            way_out = "remove it and what is behind it to go on from there, or " if number > 1 else ""
            raise ValueError(
                f"{self.path} is no search trace: line {number}: {wrong}; {way_out}take another folder."
            ) from None

    def best_so_far(self) -> tuple[list[int], list[float]]:
        """Tokens spent and lowest proxy loss so far, an entry per improvement and one for the end.

        Candidates race over growing numbers of windows. Only those that met as many as the last round asks for are
        comparable and count, each by its mean over them.
        """
        races = [trial for trial in self.trials if trial.request.kind == "loss" and trial.loss is not None]
        needed = max((trial.request.stop for trial in races), default=1)
        spent = 0
        seen: dict[tuple, _Mean] = {}
        tokens: list[int] = []
        losses: list[float] = []
        for trial in self.trials:
            spent += trial.tokens
            request = trial.request
            if trial.loss is None or request.kind not in ("loss", "slopes"):
                continue
            key = trial.counts, request.candidate.metric
            if request.kind == "slopes" or request.start == 0:
                mean = _Mean(len(request.rows), trial.loss)
            elif (mean := seen.get(key)) is None or mean.windows != request.start:
                continue  # windows that it has met already, under another name perhaps, or a race without its start
            else:
                mean = mean.with_more(len(request.rows), trial.loss)
            if request.kind == "loss":
                seen[key] = mean
            if mean.windows >= needed and (not losses or mean.loss < losses[-1]):
                tokens.append(spent)
                losses.append(mean.loss)
        if losses and tokens[-1] < spent:
            tokens.append(spent)
            losses.append(losses[-1])
        return tokens, losses

    def append(self, trial: Trial) -> None:
        self.trials.append(trial)
        if self._file is not None:
            self._write(trial.to_json())

    def _write(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
