"""The report of a pruned model or a search: one page, its pictures, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.escaping import visible
from ..common.files import write_text
from ..common.output import OutputFolder
from ..common.version import VERSION
from ..pruning.allocation.layout import grid
from .charts import (
    allocation_chart,
    heat_map,
    quality_chart,
    readable_bytes,
    search_curves,
    short_number,
    training_curves,
)
from .outcome import Outcome, read_all
from .svg import inline_svg
from .tables import (
    block_table,
    compared,
    describe_text,
    limits,
    measured,
    percent,
    percentage,
    result_tables,
    terminal,
    text_of,
    vouched,
)


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(folder: str | Path, compare: Sequence[str | Path] = (), output: str | Path | None = None) -> str:
    """Write `report.html` and its pictures as PNG into `output`; returns a table for the terminal.

    Args:
        folder: of a pruned model or of a search.
        compare: more of them, to show beside it.
        output: by default `folder`.

    Raises:
        FileNotFoundError: a folder holds neither a pruned model nor a search.
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
    """Name -> figure, heading and caption, of all that the outcomes have to show."""
    drawn = {}
    allocations = compared(outcomes)
    labels = list(dict.fromkeys([*allocations, *(outcome.name for outcome in outcomes)]))
    if allocations:
        others = [label for label in allocations if label != outcomes[0].name]
        caption = "The share of weights removed from each block, first to last"
        caption += f", beside {_listed(others)}. All have the same total." if len(_totals(allocations)) == 1 else "."
        drawn["allocation"] = allocation_chart(allocations), "Where weights were removed", caption
    mapped = [outcome for outcome in outcomes if outcome.allocation is not None]
    shares = [share for outcome in mapped for share in grid(outcome.allocation)[2].values()]
    for number, outcome in enumerate(mapped):
        name = "heatmap" if number == 0 else f"heatmap-{number + 1}"
        heading = f"Block by matrix: {outcome.name}" if len(outcomes) > 1 else "Block by matrix"
        caption = "The share removed, in percent; darker is more."
        drawn[name] = heat_map(outcome.allocation, bounds=(min(shares), max(shares))), heading, caption
    traces = {outcome.name: outcome.trace for outcome in outcomes if outcome.trace and outcome.trace.trials}
    if traces:
        caption = (
            "The best validation loss so far, by one-shot masks, against the text it took: a proxy. The star is the "
            "winner after a real prune."
        )
        drawn["search"] = search_curves(traces, among=labels), "The search", caption
    histories = {outcome.name: outcome.training.get("history") for outcome in outcomes}
    if histories := {name: history for name, history in histories.items() if history}:
        caption = "Loss on validation text while the model was trained, zeros kept; thin, that on training text."
        drawn["training"] = training_curves(histories, among=labels), "Training after pruning", caption
    rows = [row for row in measured(outcomes) if row.perplexity is not None or row.bytes is not None]
    if rows:
        caption = "Perplexity where it was measured, and bytes on disk."
        drawn["quality"] = quality_chart(rows, among=labels), "Quality and size", caption
    return drawn


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
    blocks = block_table(allocations) if allocations else None
    return _template().render(
        version=VERSION,
        title=first.name,
        kicker="pruned model" if first.achieved else "search of an allocation",
        lead=_lead(first),
        tiles=_tiles(first),
        cards=cards,
        blocks=blocks,
        blocks_with_bars=[(row, percentage(row[2])) for row in blocks.rows] if blocks else [],
        lists=_lists(first),
        limits=limits(first),
        vouched=vouched(outcomes),
    )


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
    sparsity = config.get("sparsity")
    if not outcome.achieved:
        return [("An allocation for ", False), (percent(sparsity), True), (f" with {config.get('method')}.", False)]
    base = (outcome.facts.get("base_model") or {}).get("name") or "A model"
    name = outcome.allocation.name
    parts = [(base, True), (" with ", False), (percent(outcome.achieved.get("sparsity")), True)]
    return [*parts, (f" of its prunable weights removed: {config.get('method')}, allocation {name}.", False)]


def _tiles(outcome: Outcome) -> list[tuple[str, str, str]]:
    """The figures that matter most: label, value, note."""
    achieved, facts = outcome.achieved, outcome.facts
    if achieved:
        tiles = [
            ("Removed", percent(achieved["sparsity"]), f"{achieved['removed']:,} of {achieved['prunable']:,} weights"),
            ("Of all parameters", percent(achieved["sparsity_of_all_parameters"]), "embeddings and norms stay dense"),
        ]
        if outcome.evaluations:
            row = outcome.evaluations[0]
            tiles.append(("Perplexity", f"{row['perplexity']:.2f}", describe_text(text_of(row))))
        if outcome.bytes is not None:
            note = "without the zeros" if outcome.compressed else "zeros are stored like other numbers"
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


def _lists(outcome: Outcome) -> list[tuple[str, list[tuple[str, str]]]]:
    """What made it: heading and facts by name."""
    config = [(name, _shown(value)) for name, value in outcome.config.items() if value not in (None, [], "")]
    data = [(name, _shown(value)) for name, value in (outcome.facts.get("calibration") or {}).items()]
    made = [(name, _shown(value)) for name, value in (outcome.facts.get("versions") or {}).items()]
    parts = [("Configuration", config), ("Calibration", data), ("Training", _training(outcome)), ("Versions", made)]
    return [(heading, facts) for heading, facts in parts if facts]


def _training(outcome: Outcome) -> list[tuple[str, str]]:
    """What is known of training after pruning, or during it."""
    training = outcome.training
    facts = {"with": training.get("kind"), "steps": training.get("steps", training.get("step"))}
    if "perplexity" in training:
        asked, perplexity = training["config"], training["perplexity"]
        facts |= {"method": asked["method"], "mode": asked["mode"] if asked["method"] == "sparse-lora" else None}
        facts["validation perplexity"] = f"{perplexity['before']:.3f} before, {perplexity['after']:.3f} after"
    return [(name, str(value)) for name, value in facts.items() if value is not None]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return str(value.get("name", f"{len(value)} values"))
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
