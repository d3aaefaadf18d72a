"""The report of a pruned model or a search: one page, its pictures, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.escaping import visible
from ..common.files import write_text
from ..common.output import OutputFolder
from ..common.version import VERSION
from ..evaluation.measurement import with_error
from ..pruning.allocation import ALLOCATIONS
from ..pruning.allocation.layout import grid, place
from ..pruning.comparison import compared_lines
from ..pruning.structured.described import by_kind, parameters_before
from ..pruning.structured.importance import chosen_by
from ..recovery.configuration import RecoveryConfig
from .account import account, cut_settings, details, notes, settings, training_settings
from .benefit import benefit_tile
from .charts import (
    Measured,
    allocation_chart,
    heat_map,
    quality_chart,
    readable_bytes,
    search_curves,
    short_number,
    training_curves,
    width_chart,
)
from .outcome import Outcome, read_all
from .svg import inline_svg
from .tables import (
    Table,
    block_table,
    compared,
    limits,
    measured,
    of_the_base,
    percent,
    percentage,
    result_tables,
    terminal,
    vouched,
)


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(folder: str | Path, compare: Sequence[str | Path] = (), output: str | Path | None = None) -> str:
    """Write `report.html` and its pictures as PNG into `output`; returns a table for the terminal.

    Args:
        folder (`str | Path`): of a model or of a search.
        compare (`Sequence[str | Path]`): more of them, to show beside it.
        output (`str | Path`, *optional*): by default `folder`.

    Raises:
        FileNotFoundError: a folder holds neither a model nor a search.
        ImportError: matplotlib is not installed.
    """
    outcomes = read_all([folder, *compare])
    drawn = figures(outcomes)

    def fill(place: Path) -> None:
        for name, (figure, _, _) in drawn.items():
            figure.savefig(place / f"{name}.png", dpi=200)
        write_text(place / "report.html", page(outcomes, drawn))

    names = ["report.html", *(f"{name}.png" for name in drawn)]
    with OutputFolder(folder if output is None else output, names) as target:
        target.write(fill, rescue=False)
    return terminal(outcomes)


def figures(outcomes: Sequence[Outcome]) -> dict[str, tuple[Figure, str, str]]:
    """Name -> figure, heading and caption, of all that the outcomes have to show and that a table does not."""
    drawn = {}
    allocations = compared(outcomes)
    rows = measured(outcomes)
    among = _allocation_names(outcomes, rows)
    if allocations:
        others = [label for label in allocations if label != outcomes[0].name]
        caption = "The share of weights removed from each block, first to last"
        same = others and len(_totals(allocations)) == 1
        caption += f", beside {_listed(others)}. All have the same total." if same else "."
        drawn["allocation"] = allocation_chart(allocations), "Where weights were removed", caption
    drawn |= _heat_maps(outcomes)
    for number, outcome in enumerate([one for one in outcomes if one.structured]):
        heading = f"What stays: {outcome.name}" if len(outcomes) > 1 else "What stays"
        caption = "Structures in each block, first to last, in the outline of those that the dense model has."
        drawn[f"widths-{number + 1}" if number else "widths"] = width_chart(by_kind(outcome.widths)), heading, caption
    traces = {outcome.name: outcome.trace for outcome in outcomes if outcome.trace and outcome.trace.trials}
    if traces:
        caption = (
            "The best validation loss so far, before any real prune, against the text it took: a proxy. The star is "
            "the winner after one."
        )
        drawn["search"] = search_curves(traces, among=among), "The search", caption
    histories = {outcome.name: outcome.training.get("history") for outcome in outcomes}
    if histories := {name: history for name, history in histories.items() if history and len(history) > 1}:
        caption = "Loss on validation text, with the zeros, while the model was trained; thin, that on training text."
        drawn["training"] = training_curves(histories, among=among), "Training", caption
    if len(rows) > 1:  # one bar has nothing to be longer than
        caption = "Perplexity where it was measured, and bytes on disk where they differ."
        drawn["quality"] = quality_chart(rows, among=among), "Quality and size", caption
    return drawn


def _heat_maps(outcomes: Sequence[Outcome]) -> dict[str, tuple[Figure, str, str]]:
    """A map of every allocation that differs within blocks; what is one share per block is a line already."""
    drawn: dict[str, tuple[Figure, str, str]] = {}
    mapped: dict[str, tuple[Outcome, dict]] = {}
    for outcome in outcomes:
        if outcome.allocation is not None:
            _, kinds, shares = grid(outcome.allocation)
            if len(kinds) > 1 and all(shares != other for _, other in mapped.values()):
                mapped[outcome.name] = outcome, shares
    values = [share for _, shares in mapped.values() for share in shares.values()]
    for number, (outcome, _) in enumerate(mapped.values()):
        name = "heatmap" if number == 0 else f"heatmap-{number + 1}"
        heading = f"Block by matrix: {outcome.name}" if len(outcomes) > 1 else "Block by matrix"
        caption = "The share removed, in percent; darker is more."
        drawn[name] = heat_map(outcome.allocation, bounds=(min(values), max(values))), heading, caption
    return drawn


def _allocation_names(outcomes: Sequence[Outcome], rows: Sequence[Measured]) -> dict[str, str]:
    """Label -> name of the allocation whose colour it has on every chart."""
    names = {label: allocation.name for label, allocation in compared(outcomes).items()}
    names |= {row.name: names.get(row.name, "dense") for row in rows}
    return names | {outcome.name: names.get(outcome.name, "found") for outcome in outcomes if outcome.trace}


def page(outcomes: Sequence[Outcome], drawn: dict[str, tuple[Figure, str, str]]) -> str:
    """The page as text; it asks for nothing from outside."""
    from markupsafe import Markup

    first, allocations = outcomes[0], compared(outcomes)
    cards = [
        {"heading": heading, "caption": caption, "svg": Markup(inline_svg(figure, name, heading)), "wide": False}
        for name, (figure, heading, caption) in drawn.items()
    ]
    cards += [
        {"heading": heading, "caption": caption, "table": table, "wide": len(table.header) > 4}
        for heading, caption, table in result_tables(outcomes)
    ]
    _fill_rows(cards)
    blocks = _short_names(block_table(allocations)) if allocations else None
    return _template().render(
        version=VERSION,
        title=title(outcomes),
        kicker=first.name,
        lead=_lead(first),
        tiles=_tiles(first),
        cards=cards,
        blocks=blocks,
        blocks_with_bars=[(row, percentage(row[2])) for row in blocks.rows] if blocks else [],
        account=" ".join(account(first)),
        notes=notes(first),
        details=details(first),
        lists=_lists(first),
        limits="" if first.is_dense else " ".join(filter(None, [limits(first), of_the_base(first)])),
        vouched=vouched(outcomes),
    )


def title(outcomes: Sequence[Outcome]) -> str:
    """What the page is about, as a person would say it."""
    first = outcomes[0]
    share = first.config.get("sparsity")
    rounded = "" if share is None else f"{100 * share:.3g} %"
    if first.is_dense:
        return f"{first.name}, dense"
    if not first.achieved:
        return f"A search for where to remove {rounded}"
    base = first.base or first.name
    if first.structured:
        smaller = 1 - first.achieved["parameters"] / parameters_before(first.structured)
        cut = f"{base} with {100 * smaller:.3g} % of its parameters cut out"
        return (cut if first.is_only_cut else f"{cut}, and {rounded} of what is left removed") + _since(first)
    models = [outcome for outcome in outcomes if outcome.achieved and outcome.allocation is not None]
    told = [name if (name := model.allocation.name) in ALLOCATIONS else "discovered" for model in models]
    if len(set(told)) > 1:
        return f"{base} at {rounded}: {_listed(list(dict.fromkeys(told)))}"
    return f"{base} with {rounded} of its weights removed" + _since(first)


def _since(outcome: Outcome) -> str:
    if not outcome.training:
        return ""
    return ", in a training" if outcome.was_trained_sparse else ", and trained since"


def _short_names(table: Table) -> Table:
    """The table of blocks with a number in place of each name, where all are of one list; a phone is narrow."""
    places = [place(row[0]) for row in table.rows]
    if len({at.stack for at in places}) > 1 or any(at.index is None for at in places):
        return table
    return Table(table.header, [[str(at.index), *row[1:]] for at, row in zip(places, table.rows)])


def _fill_rows(cards: list[dict[str, Any]]) -> None:
    """Make those cards wide that would have no neighbour in a row of two; in place."""
    waiting = None
    for card in cards:
        if card["wide"]:
            if waiting:
                waiting["wide"] = True
            waiting = None
        else:
            waiting = None if waiting else card
    if waiting:
        waiting["wide"] = True


def _lead(outcome: Outcome) -> list[tuple[str, bool]]:
    """The sentence under the title, in parts: text, whether it stands out."""
    config = outcome.config
    if outcome.is_dense:
        return [("A dense model: nothing says that weights were removed from it (no dsa_config.json).", False)]
    method = str(config.get("method"))
    if not outcome.achieved:
        return [("Weights are removed by ", False), (method, True), ("; searched is how many from each block.", False)]
    if outcome.is_only_cut:
        chosen = chosen_by(outcome.structured["config"])
        return [("Structures were chosen by ", False), (chosen, True), (".", False)]
    parts = [("Weights were chosen by ", False), (method, True), (", and how many from each block by ", False)]
    return [*parts, (str(outcome.allocation.name), True), (".", False)]


def _tiles(outcome: Outcome) -> list[tuple[str, str, str]]:
    """The figures that matter most: label, value, note."""
    achieved, facts = outcome.achieved, outcome.facts
    if outcome.is_dense:
        sizes = (
            [] if outcome.bytes is None else [("Weight files", readable_bytes(outcome.bytes), "of the dense model")]
        )
        return [("Removed", percent(0.0), "as far as its files tell"), *_perplexity_tile(outcome), *sizes]
    if achieved:
        zeros = [
            ("Removed", percent(achieved["sparsity"]), f"{achieved['removed']:,} of {achieved['prunable']:,} weights"),
            ("Of all parameters", percent(achieved["sparsity_of_all_parameters"]), "embeddings and norms stay dense"),
        ]
        tiles = [*_parameters_tile(outcome), *([] if outcome.is_only_cut else zeros)]
        tiles += [*_perplexity_tile(outcome), *benefit_tile(outcome)]
        if outcome.bytes is not None:
            note = "without the zeros" if outcome.compressed else "zeros are stored like other numbers"
            note = "" if outcome.is_only_cut else note
            tiles.append(("Weight files", readable_bytes(outcome.bytes), note))
        return tiles
    tiles = []
    if finalists := facts.get("finalists"):
        uniform = next((row for row in finalists if row["allocation"]["name"] == "uniform"), None)
        note = "" if uniform is None else f"uniform: {uniform['validation_loss']:.4f}"
        tiles.append(("Validation loss", f"{finalists[0]['validation_loss']:.4f}", note))
        note = "" if uniform is None else f"uniform: {uniform['validation_perplexity']:.2f}"
        tiles.append(("Validation perplexity", f"{finalists[0]['validation_perplexity']:.2f}", note))
    trials = outcome.trace.trials if outcome.trace else []
    tiles.append(("Trials", f"{len(trials) or facts.get('trials', 0):,}", "candidates on validation windows"))
    spent = sum(trial.tokens for trial in trials) or facts.get("tokens", 0)
    tiles.append(("Text", short_number(spent), "validation tokens"))
    return tiles


def _parameters_tile(outcome: Outcome) -> list[tuple[str, str, str]]:
    """How many parameters are left of a model out of which structures were cut."""
    if not outcome.structured:
        return []
    before, now = parameters_before(outcome.structured), outcome.achieved["parameters"]
    return [("Parameters", short_number(now), f"{percent(1 - now / before)} of {before:,} were cut out")]


def _perplexity_tile(outcome: Outcome) -> list[tuple[str, str, str]]:
    """The first perplexity of a model, beside its dense parent's where that was measured by the same protocol."""
    row = next((row for row in outcome.evaluations if row.perplexity is not None), None)
    if row is None:
        return []
    dense = next((one for one in outcome.parent if one.protocol == row.protocol and one.perplexity is not None), None)
    parts = [] if row.perplexity_error is None else [f"± {row.perplexity_error:.2f}"]
    parts += [] if dense is None else [f"dense {dense.perplexity:.2f}"]
    return [("Perplexity", f"{row.perplexity:.2f}", "; ".join([*parts, str(row.protocol)]))]


def _lists(outcome: Outcome) -> list[tuple[str, list[tuple[str, str]]]]:
    """What made it: heading and facts by name."""
    config = [(name, _shown(value)) for name, value in settings(outcome).items() if value not in (None, [], "")]
    # A search's file is held against no schema.
    of = {name: value for name, value in outcome.facts.items() if isinstance(value, Mapping)}
    data, made = (
        [(name, _shown(value)) for name, value in of.get(part, {}).items()] for part in ("calibration", "versions")
    )
    if outcome.is_only_cut:
        data = [(name, _shown(value)) for name, value in (outcome.structured.get("calibration") or {}).items()]
    cut = {} if outcome.is_only_cut else cut_settings(outcome)
    tried = [*compared_lines(*(of.get(name, {}) for name in ("compared", "compared_on"))).items()]
    plain = training_settings({"config": RecoveryConfig().to_dict()})
    trained = [
        (name, _shown(value))
        for name, value in training_settings(outcome.training).items()
        if name not in ("method", "mode") and value != plain.get(name)
    ]
    parts = [
        ("Allocations compared", tried),
        ("Configuration", config),
        ("Configuration of the cut", [(name, _shown(value)) for name, value in cut.items()]),
        ("Calibration", data),
        ("Training", _training(outcome)),
        ("Settings of the training", trained),
        ("Versions", made),
    ]
    return [(heading, facts) for heading, facts in parts if facts]


def _training(outcome: Outcome) -> list[tuple[str, str]]:
    """What is known of training after pruning, or during it."""
    training = outcome.training
    facts = {"with": training.get("kind"), "steps": training.get("steps", training.get("step"))}
    if "perplexity" in training:
        asked, perplexity = training["config"], training["perplexity"]
        facts |= {"method": asked["method"], "mode": asked["mode"] if asked["method"] == "sparse-lora" else None}
        told = {name: with_error(perplexity[name], perplexity.get(f"{name}_error"), 3) for name in ("before", "after")}
        facts["validation perplexity"] = f"{told['before']} before, {told['after']} after"
    return [(name, str(value)) for name, value in facts.items() if value is not None]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        given = {name: part for name, part in value.items() if part not in (None, False)}
        # An allocation has a name and the share of every unit beside it.
        name = [str(given.pop("name"))] if "name" in given else []
        parts = (f"{part} {_shown(inner)}" for part, inner in given.items() if not isinstance(inner, dict))
        return ", ".join([*name, *(() if "sparsity" in given else parts)]) or "as the method has it"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _totals(allocations: dict) -> set[float]:
    return {round(sum(a.counts().values()) / max(sum(a.sizes.values()), 1), 4) for a in allocations.values()}


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


@cache
def _template():
    from jinja2 import Environment, StrictUndefined

    text = files("optimum_dsa.sharing").joinpath("templates/report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=_harmless)
    return environment.from_string(text)


def _harmless(value: Any) -> Any:
    """A text without hidden characters; it is escaped after this. What is markup by intent stays as it is."""
    return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value
