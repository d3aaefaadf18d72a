"""What the tables share: rows that are pruned anew, measured on text and tasks, kept in a file, and printed.

A row that cannot be run, for want of its allocator, its metric or its tasks' data, is named at the end and why. A
table that was stopped goes on where it was, with the same --output.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # rows.py is shared with the scripts beside this folder

from rows import MEASURED, Rows, add_options, config_of, loaded, searched, share, windows_of

from optimum_dsa import DSAConfig, DSAPruner, Measurement, measure
from optimum_dsa.common.machine import machine_name, shown_seconds
from optimum_dsa.common.registry import UnknownNameError
from optimum_dsa.evaluation.comparison import main_metric, shown_tasks
from optimum_dsa.evaluation.measurement import with_error
from optimum_dsa.evaluation.tasks import Tasks, find_tasks


DENSE = "dense"
THERE, NOT_RUN = "was there", "not run"
Finished = Callable[["Row", DSAPruner, Measurement], None]


@dataclass(frozen=True)
class Row:
    """A model of a table.

    Attributes:
        name: what it is called; with the sparsity it stands for one row.
        sparsity: such as "0.5", or a pattern such as "2:4"; "" of the dense model.
        settings: of its `DSAConfig`; `allocation="searched"` has one searched for.
        tasks: names of the tasks that it is measured on.
        against: the row at the same sparsity that its losses are held against.
        seed: which calibration windows are drawn; by default the first.
    """

    name: str
    sparsity: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    against: str | None = None
    seed: int | None = None


def parser_of(
    description: str, sparsities: Sequence[str] = ("0.5", "0.6", "0.7"), tasks: bool = True
) -> argparse.ArgumentParser:
    """Options that every table has, and those of tasks where its rows may have some."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    if tasks:
        add_task_options(parser)
    add_sparsities(parser, list(sparsities), f"default: {' '.join(sparsities)}")
    return parser


def add_sparsities(parser: argparse.ArgumentParser, default: list[str] | None, help: str) -> None:
    parser.add_argument("--sparsities", nargs="+", type=share, default=default, help=help)


def add_task_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks-path", help="folder of tasks with local data; default: lm-eval's own tasks")
    parser.add_argument("--limit", type=int, help="questions per task (default: all)")


class Table:
    """Rows of one run: what they need, and what came of them.

    Args:
        args: of `parser_of`'s options.
        finished: called with every row that is made, its pruner and its measurement, before the model is let go.
    """

    of_tasks = ("limit", "tasks_path")  # options that are read where a row has tasks

    def __init__(self, args: argparse.Namespace, finished: Finished | None = None):
        self.args, self.finished = args, finished
        self.tokens = windows_of(args)
        self.rows = Rows(args.output, args.model, self.tokens)
        self.text = next(name for name in reversed(MEASURED) if name in self.tokens)
        self.found: dict[tuple[str, str], tuple[Measurement, dict]] = {}
        self.missing: dict[str, str] = {}
        self._tasks: dict[tuple[str, ...], Tasks | None] = {}

    def run(self, rows: Sequence[Row], text: bool = True) -> None:
        """Make the rows that are not there, and say after each how far it is; `text`: losses are measured."""
        self._look(rows)
        self._stop(rows)
        took = []
        for number, row in enumerate(rows, 1):
            began = time.monotonic()
            made = self._run(row, text)
            took += [time.monotonic() - began] if made not in (THERE, NOT_RUN) else []
            rest = len(rows) - number
            left = [f"about {shown_seconds(statistics.fmean(took) * rest)} left"] if took and rest else []
            print(", ".join([f"{number} of {len(rows)}: {title(row)}", made, *left]), flush=True)
        self._stop(rows)
        print()

    def _look(self, rows: Sequence[Row]) -> None:
        """Say what cannot be run, before any of it is."""
        given = [name for name in self.of_tasks if getattr(self.args, name, None) is not None]
        if given and not any(row.tasks for row in rows):
            sys.exit(f"--{given[0].replace('_', '-')} is of tasks, and no row has any: name tasks, or leave it out")
        for row in rows:
            self._config(row)
            self.tasks(row.tasks)
        for name, why in self.missing.items():
            print(f"will not be run: {name}: {why}", file=sys.stderr, flush=True)

    def _stop(self, rows: Sequence[Row]) -> None:
        """End with an error where no row with a sparsity can be run."""
        pruned = [title(row) for row in rows if row.sparsity]
        if pruned and all(name in self.missing for name in pruned):
            sys.exit("\n".join(["no row can be run", *(f"{name}: {self.missing[name]}" for name in pruned)]))

    def _config(self, row: Row) -> DSAConfig | None:
        """What a row asks for; `None` where that is nothing, or cannot be: then it is noted as missing."""
        try:
            config = config_of(row.settings, row.sparsity, self.args) if row.sparsity else None
        except (ValueError, UnknownNameError) as error:
            self.missing[title(row)] = str(error)
            return None
        if row.sparsity and config is None:
            self.missing[title(row)] = "a pattern leaves nothing to allocate"
        return config

    def _run(self, row: Row, text: bool) -> str:
        """Make one row; what became of it."""
        config = self._config(row)
        if title(row) in self.missing:
            return NOT_RUN
        tasks = self.tasks(row.tasks)
        if not text and tasks is None:
            return NOT_RUN
        key = self._key(row, config, tasks, text)
        known = key in self.rows
        try:
            kept = self.rows.row(key, lambda: self._make(row, config, tasks, text))
        except ValueError as error:  # such as a matrix that a pattern does not divide
            self.missing[title(row)] = str(error)
            return NOT_RUN
        self.found[row.name, row.sparsity] = Measurement.from_dict(kept["measured"]), kept
        return THERE if known else f"{shown_seconds(kept['prune_seconds'] + kept['measure_seconds'])}"

    def tasks(self, names: tuple[str, ...]) -> Tasks | None:
        """lm-eval's tasks of these names; `None` where there are none, or their data are not to be had."""
        if names and names not in self._tasks:
            try:
                self._tasks[names] = find_tasks(names, self.args.tasks_path)
                self._tasks[names].loaded  # noqa: B018 - the data, which may be missing
            except (ValueError, OSError, UnknownNameError) as error:
                self._tasks[names] = None
                self.missing[f"tasks {', '.join(names)}"] = str(error)
        return self._tasks.get(names)

    def _key(self, row: Row, config: DSAConfig | None, tasks: Tasks | None, text: bool) -> str:
        args = self.args
        of = [args.samples, args.length, args.windows, self.text if text else None]
        asked = [tasks.names, args.limit, str(args.tasks_path and Path(args.tasks_path).resolve())] if tasks else []
        is_searched = row.settings.get("allocation") == "searched"
        search = [args.allocation, args.strategy, args.budget] if is_searched else []
        return json.dumps([config and config.to_dict(), row.seed, search, *of, *asked])

    def calibration(self, seed: int | None) -> torch.Tensor:
        """Windows that a row is pruned on, (samples, length): the first, or those that a seed draws."""
        windows = self.tokens["calibration"]
        if seed is not None:
            windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]
        return windows[: self.args.samples, : self.args.length]

    def _make(self, row: Row, config: DSAConfig | None, tasks: Tasks | None, text: bool) -> dict:
        """The row's measurement as JSON, and the seconds of its parts."""
        pruner, kept = DSAPruner(loaded(self.args), AutoTokenizer.from_pretrained(self.args.model)), {}
        start = time.perf_counter()
        if config is not None:
            calibration = self.calibration(row.seed)
            if row.settings.get("allocation") == "searched":
                config = self._searched(pruner, calibration, config, kept)
                start = time.perf_counter()
            pruner.prune(calibration, config)
        middle = time.perf_counter()
        found = measure(
            pruner.model,
            self.tokens[self.text][: self.args.windows] if text else None,
            tasks or (),
            tokenizer=pruner.tokenizer,
            report=pruner.report,
            name=title(row),
            limit=self.args.limit if tasks else None,
            batch_size=self.args.batch_size,
            keep=True,
        )
        if found.protocol:  # token ids do not tell what they are of
            text_name = Path(self.args.text).name if self.args.text else self.text
            found = replace(found, protocol=replace(found.protocol, dataset=text_name))
        seconds = {"prune_seconds": middle - start, "measure_seconds": time.perf_counter() - middle}
        if self.finished:
            self.finished(row, pruner, found)
        return {"measured": found.to_dict(), **{name: round(value, 1) for name, value in seconds.items()}, **kept}

    def _searched(self, pruner: DSAPruner, calibration: torch.Tensor, config: DSAConfig, kept: dict) -> DSAConfig:
        """The config with an allocation that was found, before or now; what a search took goes into `kept`."""
        if self.args.allocation:
            return replace(config, allocation=self.args.allocation)
        plain = replace(config, reconstruct=0, permute=None)  # a candidate is then judged in seconds
        found, kept["search_seconds"] = searched(pruner, calibration, plain, self.tokens["validation"], self.args)
        kept["allocation"] = found.best.to_dict()
        return replace(config, allocation=found.best)

    # -- what came of it

    def print(self, rows: Sequence[Row]) -> str:
        """The rows as a table in Markdown, then what was not run; also what was printed."""
        there = [row for row in rows if (row.name, row.sparsity) in self.found]
        found = [self.found[row.name, row.sparsity][0] for row in there]
        lines = [self.heading(found), "", *markdown(self._columns(there, found))] if there else []
        lines += ["", self.times()] if there else []
        lines += ["", *(f"not run: {name}: {why}" for name, why in self.missing.items())] if self.missing else []
        print("\n".join(lines))
        return "\n".join(lines) + "\n"

    def heading(self, found: Sequence[Measurement]) -> str:
        """What the table was made of."""
        shape = " x ".join(map(str, self.calibration(None).shape))
        text = [f"perplexity on {one.protocol}" for one in found if one.protocol][:1]
        tasks = [f"tasks: {one.task_protocol}" for one in found if one.task_protocol][:1]
        facts = [f"{Path(str(self.args.model)).name}, {shape} calibration tokens", *text, *tasks]
        return "; ".join([*facts, f"{machine_name(self.args.device)}, {torch.get_num_threads()} threads"])

    def times(self) -> str:
        """What all rows took, those of earlier runs as well."""
        kept = [kept for _, kept in self.found.values()]
        parts = {"pruning": "prune_seconds", "measuring": "measure_seconds", "searching": "search_seconds"}
        sums = {part: sum(one.get(name, 0) for one in kept) for part, name in parts.items()}
        return f"{len(kept)} rows: {', '.join(f'{shown_seconds(v)} of {part}' for part, v in sums.items() if v)}"

    def _columns(self, rows: Sequence[Row], found: Sequence[Measurement]) -> dict[str, list[str]]:
        columns = {"": [title(row) for row in rows], "sparsity": [f"{one.sparsity:.4f}" for one in found]}
        if any(one.perplexity is not None for one in found):
            columns["perplexity"] = [with_error(one.perplexity, one.perplexity_error, 2) for one in found]
            columns["loss, difference"] = [self.difference(row) for row in rows]
        for task in shown_tasks(found):
            metric = main_metric(found, task)
            values = [one.tasks.get(task, {}).get(metric, {"value": None, "error": None}) for one in found]
            columns[f"{task} ({metric})"] = [with_error(one["value"], one["error"], 4) for one in values]
        kept = [self.found[row.name, row.sparsity][1] for row in rows]
        columns["seconds"] = [f"{one['prune_seconds']:.0f} + {one['measure_seconds']:.0f}" for one in kept]
        if any("search_seconds" in one for one in kept):
            columns["search"] = [f"{one['search_seconds']:.0f}" if "search_seconds" in one else "" for one in kept]
        return columns

    def difference(self, row: Row) -> str:
        """A row's losses less those of the row that it is held against, window by window, with the standard error."""
        pair = [self.found.get((name, row.sparsity)) for name in (row.against, row.name)]
        if row.against in (None, row.name) or None in pair:
            return ""
        change, error = loss_difference(*(found for found, _ in pair))
        return signed(change, error)


def loss_difference(first: Measurement, other: Measurement) -> tuple[float | None, float | None]:
    """Mean of `other`'s loss less `first`'s over the windows that both met, and its standard error."""
    if first.protocol != other.protocol or not first.losses or len(first.losses) != len(other.losses):
        return None, None
    changes = [there - here for there, here in zip(other.losses, first.losses)]
    error = statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else None
    return statistics.fmean(changes), error


def signed(value: float | None, error: float | None) -> str:
    """A difference and its standard error."""
    return ("+" if value is not None and value > 0 else "") + with_error(value, error, 4)


def markdown(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Columns as a table in Markdown."""
    rows = [list(columns), ["---"] * len(columns), *map(list, zip(*columns.values()))]
    return [f"| {' | '.join(cells)} |" for cells in rows]


def title(row: Row) -> str:
    return f"{row.name}, {row.sparsity}" if row.sparsity else row.name


def each_with_dsa(methods: Iterable[str], sparsities: Iterable[str]) -> Iterator[Row]:
    """At every sparsity each method alone, and with DSA's allocation, held against it."""
    for sparsity in sparsities:
        for method in methods:
            yield Row(method, sparsity, {"method": method})
            yield Row(f"{method} + dsa", sparsity, {"method": method, "allocation": "dsa"}, against=method)


def with_tasks(rows: Sequence[Row], tasks: Sequence[str]) -> list[Row]:
    """The rows, each measured on these tasks."""
    return [dataclasses.replace(row, tasks=tuple(tasks)) for row in rows]
