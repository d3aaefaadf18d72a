import json
import re
from dataclasses import replace

import pytest

from optimum_dsa import Allocation
from optimum_dsa.common.manifest import MANIFEST
from optimum_dsa.evaluation.measurement import Measurement, Protocol, TaskProtocol
from optimum_dsa.evaluation.results import save_results
from optimum_dsa.sharing.outcome import Outcome, read_all
from optimum_dsa.sharing.page import _lead, _lists, figures, page, title, write_report
from optimum_dsa.sharing.tables import (
    Table,
    block_table,
    compared,
    finalists_table,
    perplexity_tables,
    quality_table,
    result_tables,
    task_tables,
    terminal,
)

from ..browser import Browser, find_chromium
from ..elements import Elements
from ..tiny import tiny_llama
from .conftest import evaluation


ON_TEST, ON_B = Protocol("test.txt", 4, 16), Protocol("b", 4, 16)


def measurement(model, perplexity, protocol=ON_TEST, sparsity=0.6, size=100, **facts):
    return Measurement(model, sparsity, size, perplexity, 0.5, protocol, **facts)


def test_a_pruned_model_is_read(folders):
    outcome = Outcome.read(folders / "by-owl")
    assert outcome.name == "by-owl"
    assert outcome.allocation == Allocation.load(folders / "by-owl")
    assert outcome.achieved["sparsity"] == pytest.approx(0.6, abs=1e-4)
    assert outcome.evaluations[0].perplexity == 12.5 and outcome.evaluations[0].protocol == ON_TEST
    assert outcome.bytes == (folders / "by-owl" / "model.safetensors").stat().st_size
    assert set(outcome.baselines["uniform"].sparsity.values()) == {outcome.allocation.overall}


def test_a_search_is_read_whole_or_under_way(folders, tmp_path):
    outcome = Outcome.read(folders / "found")
    assert outcome.baselines.keys() == {"uniform", "owl"} and outcome.achieved == {}
    assert len(outcome.trace.trials) == outcome.facts["trials"]
    (tmp_path / "trace.jsonl").write_text((folders / "found" / "trace.jsonl").read_text())
    under_way = Outcome.read(tmp_path)
    assert under_way.allocation is None and under_way.config["method"] == "wanda"
    assert "a search under way" in terminal([under_way]) and "best loss" in terminal([under_way])
    assert "search" in figures([under_way]) and "allocation" not in figures([under_way])
    assert "a search under way" not in page([under_way], {})


@pytest.mark.parametrize(
    "name,text,message",
    [
        ("thesis.tex", "x", "holds neither a model"),
        ("dsa_config.json", "{", "is not JSON"),
        ("dsa_config.json", "[1]", "holds no description of a pruned model"),
        ("search.json", "[1]", "holds a list; expected an object"),
        ("dsa_config.json", '{"config": {"sparsity": 0.5}}', "no pruned model lies beside it"),
        ("trace.jsonl", "x\n", "is no search trace"),
        ("search.json", '{"config": {"sparsity": 0.5}, "finalists": [1]}', "validation_loss is a float, got nothing"),
    ],
)
def test_other_folders_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Outcome.read(tmp_path)


@pytest.mark.parametrize(
    "key,value,message",
    [
        ("achieved", {"sparsity": 0.6}, "achieved"),
        ("versions", [1], "versions"),
        ("allocation", {"name": "x", "sparsity": {}, "sizes": {}}, "allocation"),
    ],
)
def test_a_damaged_description_is_refused_by_name(folders, tmp_path, key, value, message):
    facts = json.loads((folders / "by-owl" / "dsa_config.json").read_text())
    (tmp_path / "dsa_config.json").write_text(json.dumps({**facts, key: value}))
    with pytest.raises(ValueError, match=message):
        Outcome.read(tmp_path)


def test_a_model_that_broke_down_is_shown_as_it_is(folders, tmp_path):
    for path in (folders / "by-owl").glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "evaluation.json").write_text(evaluation(float("nan")))
    (tmp_path / "other.json").write_text(evaluation(1e304, "b"))
    said = write_report(tmp_path)
    assert "nan" in said and (tmp_path / "report.html").is_file()


def test_names_stay_apart(folders):
    assert [outcome.name for outcome in read_all([folders / "found"] * 3)] == ["found", "found (2)", "found (3)"]


# -- tables


def test_the_dense_parent_is_a_row_also_where_nobody_measured_it(outcomes):
    table = quality_table(outcomes)
    assert table.header == ["model", "removed", "of all parameters", "perplexity", "weight files"]
    assert [(row[0], row[1], row[3]) for row in table.rows] == [
        ("dense", "0.00%", "–"),
        ("by-owl", "60.00%", "12.50"),
        ("by-uniform", "60.00%", "14.25"),
    ]


def test_rows_of_two_protocols_share_no_table(outcomes):
    other = replace(outcomes[0], name="other", evaluations=[measurement("other", 9.0, ON_B)])
    assert "perplexity" not in quality_table([outcomes[0], other]).header
    tables = dict(perplexity_tables([outcomes[0], other]))
    assert {protocol: [row[:2] for row in table.rows] for protocol, table in tables.items()} == {
        ON_TEST: [["by-owl", "12.50"]],
        ON_B: [["other", "9.00 ± 0.50"]],
    }
    captions = [caption for heading, caption, _ in result_tables([outcomes[0], other]) if heading == "Perplexity"]
    assert [caption.split(",")[0] for caption in captions] == ["On test.txt", "On b"]


def test_what_evaluate_wrote_feeds_the_report_with_the_dense_model_and_tasks(folders, tmp_path):
    for path in (folders / "by-owl").glob("*.json"):
        if path.name != "evaluation.json":
            (tmp_path / path.name).write_text(path.read_text())
    achieved = json.loads((tmp_path / "dsa_config.json").read_text())["achieved"]
    paired = replace(ON_TEST, fingerprint="f")
    tasks = {"arc_easy": {"acc": {"value": 0.25, "error": 0.01}}}
    dense = measurement("llama", 10.0, paired, 0.0, achieved["prunable"], losses=(2.0, 2.5, 2.4))
    own = measurement(tmp_path.name, 12.5, paired, losses=(2.2, 2.7, 2.7), tasks=tasks, task_protocol=TaskProtocol(0))
    other = measurement("somebody-else", 3.0, paired, losses=(1.0, 1.1, 1.2))
    save_results(tmp_path / "results.json", [dense, own, other])
    outcome = Outcome.read(tmp_path)
    assert (outcome.evaluations, outcome.parent) == ((own,), (dense,))
    rows = {row[0]: row for row in quality_table([outcome]).rows}
    assert [row[3] for row in rows.values()] == ["10.00 ± 0.50", "12.50 ± 0.50"]
    assert re.fullmatch(r"\+\d\.\d\d ± \d\.\d\d", rows[tmp_path.name][4])
    ((protocol, table),) = task_tables([outcome])
    assert protocol == TaskProtocol(0) and table.header == ["model", "arc_easy (acc)"]
    assert list(table.rows) == [[tmp_path.name, "0.2500 ± 0.0100"]]
    assert "dense 10.00" in page([outcome], {})


def test_a_dense_model_is_called_dense(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "llama")
    said = write_report(tmp_path / "llama", output=tmp_path / "out")
    assert "llama" in said and "0.00%" in said
    text = (tmp_path / "out" / "report.html").read_text()
    assert "<h1>llama, dense</h1>" in text and "nothing says that weights were removed" in text
    assert [path.suffix for path in (tmp_path / "out").iterdir() if path.name != MANIFEST] == [".html"]


def test_the_title_is_what_a_person_would_say(outcomes):
    owl, uniform, found = outcomes
    base = replace(owl, facts={**owl.facts, "base_model": {"name": "org/llama", "revision": None}})
    assert title([base]) == "llama with 60 % of its weights removed, and trained since"
    assert title([base, uniform]) == "llama at 60 %: owl and uniform"
    assert title([found]) == "A search for where to remove 60 %"


def test_the_block_table_has_every_block_and_allocation(outcomes):
    table = block_table(compared(outcomes))
    assert table.header == ["block", "weights", "by-owl", "by-uniform", "found", "owl"]
    assert [row[0] for row in table.rows] == [f"model.layers.{index}" for index in range(3)]
    assert all(row[3] in ("60.00%", "59.99%", "60.01%") for row in table.rows)


def test_a_baseline_that_looks_like_a_model_is_not_drawn_twice(outcomes):
    assert "uniform" not in compared(outcomes) and "uniform" in compared(outcomes[:1])


def test_the_finalists_table_is_in_order(outcomes):
    losses = [float(row[1]) for row in finalists_table(outcomes[2]).rows]
    assert losses == sorted(losses) and len(losses) >= 3


def test_a_table_is_text_and_markdown():
    table = Table(["name", "n"], [["a|b", "12"], ["c", "3"]])
    assert str(table).splitlines() == ["name   n", "a|b   12", "c      3"]
    assert table.markdown().splitlines() == ["| name | n |", "| --- | ---: |", "| `a\\|b` | 12 |", "| c | 3 |"]


# -- the page


def test_a_report_has_a_page_and_a_picture_of_everything(folders, tmp_path):
    said = write_report(folders / "by-owl", [folders / "by-uniform", folders / "found"], tmp_path / "out")
    assert "12.50" in said and "model.layers.2" in said and "█" in said
    names = {"allocation", "heatmap", "heatmap-2", "search", "training", "quality"}
    written = {path.name for path in (tmp_path / "out").iterdir()} - {MANIFEST}
    assert written == {f"{name}.png" for name in names} | {"report.html"}
    tags = Elements((tmp_path / "out" / "report.html").read_text()).found
    assert sum(tag == "figure" for tag, _ in tags) == len(names)
    labels = [attributes["aria-label"] for tag, attributes in tags if tag == "svg"]
    assert len(set(labels)) == len(names)


def test_training_after_pruning_is_told(outcomes):
    told = dict(_lists(outcomes[0]))["Training"]
    assert told[:3] == [("with", "recover"), ("steps", "4"), ("method", "sparse-lora")]
    told_of = outcomes[0].training["perplexity"]
    before, after = (f"{told_of[name]:.3f} ± {told_of[f'{name}_error']:.3f}" for name in ("before", "after"))
    assert told[-1] == ("validation perplexity", f"{before} before, {after} after")
    assert "Training" not in dict(_lists(outcomes[1]))
    assert "training" not in figures(outcomes[1:])


def test_a_picture_shows_what_nothing_else_does(outcomes):
    assert "heatmap" not in figures(outcomes[1:2])  # one share per block is the line above
    twice = [outcomes[0], replace(outcomes[0], name="again")]
    assert [name for name in figures(twice) if "heatmap" in name] == ["heatmap"]
    assert "quality" not in figures([replace(outcomes[0], evaluations=())])  # one bar has nothing to be longer than


def test_by_default_a_report_lies_in_the_folder(folders):
    before = {path.name for path in (folders / "by-uniform").iterdir()}
    write_report(folders / "by-uniform")
    after = {path.name for path in (folders / "by-uniform").iterdir()}
    assert after - before == {"report.html", "allocation.png"}


def test_the_allocation_figure_draws_every_label(outcomes):
    figure, _, caption = figures(outcomes)["allocation"]
    drawn = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert list(drawn) == ["by-owl", "by-uniform", "found", "owl"]
    assert drawn["by-uniform"] == pytest.approx([0.6] * 3, abs=1e-3)
    assert caption.endswith("beside by-uniform, found and owl. All have the same total.")


def test_a_label_keeps_its_colour_on_all_figures(outcomes):
    drawn = figures(outcomes)
    allocation = {line.get_label(): line.get_color() for line in drawn["allocation"][0].axes[0].lines}
    search_line = drawn["search"][0].axes[0].lines[0]
    assert search_line.get_color() == allocation[search_line.get_label()] == allocation["found"]


def test_a_page_asks_for_nothing_from_outside(outcomes):
    text = page(outcomes, figures(outcomes))
    assert not re.search(r"https?:|//[a-z]|@import|@font-face", text)
    for tag, attributes in Elements(text).found:
        assert tag not in ("script", "iframe", "object", "embed")
        for name in ("src", "href", "xlink:href", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)


def test_ids_are_unique_and_found(outcomes):
    text = page(outcomes, figures(outcomes))
    ids = [attributes["id"] for _, attributes in Elements(text).found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)


def test_every_colour_has_a_value_in_light_and_dark(outcomes):
    text = page(outcomes, figures(outcomes))
    light, dark = re.findall(r":root \{(.*?)\}", text, re.DOTALL)[:2]
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    for scheme in (light, dark):
        assert used <= set(re.findall(r"(--[\w-]+):", scheme))


EVIL = '<img src=x onerror="console.error(1)">$\\frac{1}{2}$ & _'


def evil(folders):
    """A folder of somebody who wishes us ill."""
    facts = json.loads((folders / "by-owl" / "dsa_config.json").read_text())
    facts["base_model"]["name"] = facts["config"]["method"] = facts["versions"]["torch"] = EVIL
    units = {f"{EVIL}.{index}.{EVIL}": 0.5 for index in range(2)}
    allocation = Allocation(units, dict.fromkeys(units, 10), EVIL)
    rows = (measurement(EVIL, 3.0, Protocol(EVIL, 4, 16), tasks={EVIL: {EVIL: {"value": 1.0, "error": None}}}),)
    return Outcome(EVIL, allocation, {EVIL: allocation}, facts, evaluations=rows, bytes=1)


def test_text_from_a_folder_stays_text(folders):
    outcome = evil(folders)
    text = page([outcome], figures([outcome]))
    assert "<img" not in text
    assert all("onerror" not in attributes for _, attributes in Elements(text).found)


# -- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if find_chromium() is None:
        pytest.skip("no chromium to open the page in; on Debian: apt-get install chromium")
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


MEASURE = """[...document.querySelectorAll('figure, .chart')].map(element => {
  const box = element.getBoundingClientRect();
  const style = getComputedStyle(element);
  return {left: box.left, right: box.right, height: box.height, seen: style.visibility + style.display};
})"""


# Cells of tables that are cut, or reached by scrolling only.
CUT = """[...document.querySelectorAll('.scroll')].flatMap(outer => [...outer.querySelectorAll('td, th')]
  .filter(cell => cell.getBoundingClientRect().right > outer.getBoundingClientRect().right + 1)
  .map(cell => cell.textContent))"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_every_figure_is_visible_in_a_browser(browser, folders, tmp_path, width, scheme):
    write_report(folders / "by-owl", [folders / "by-uniform", folders / "found"], tmp_path)
    address = (tmp_path / "report.html").as_uri()
    browser.requests.clear()
    browser.open(address, width, scheme=scheme)
    assert browser.complaints == []
    assert [request for request in browser.requests if not request.startswith("data:")] == [address]
    boxes = browser.evaluate(MEASURE)
    assert len(boxes) == 2 * 6
    for box in boxes:
        assert box["height"] > 50 and box["right"] - box["left"] > 200 and box["seen"] == "visibleblock"
        assert box["left"] >= 0 and box["right"] <= width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    browser.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert browser.evaluate(CUT) == []
    dark = browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)"
    assert dark == (scheme == "dark")
    smallest = "Math.min(...[...document.querySelectorAll('.chart text')].map(t => t.getBoundingClientRect().height))"
    assert browser.evaluate(smallest) >= 8


def test_ill_wishes_do_nothing_in_a_browser(browser, folders, tmp_path):
    outcome = evil(folders)
    (tmp_path / "report.html").write_text(page([outcome], figures([outcome])))
    browser.requests.clear()
    browser.open((tmp_path / "report.html").as_uri(), 390)
    assert browser.complaints == [] and browser.evaluate("document.images.length") == 0
    assert browser.evaluate("document.querySelector('h1').textContent").startswith(EVIL.rpartition("\\")[2])
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390


# -- the command


def test_who_chose_the_zeros_last_is_named(outcomes):
    owl = next(outcome for outcome in outcomes if outcome.name == "by-owl")
    assert ("wanda", True) in _lead(owl)
    recovery = {**owl.training, "config": {"method": "elsa"}}
    elsa = replace(owl, facts={**owl.facts, "recovery": recovery})
    assert ("elsa", True) in _lead(elsa) and ("wanda", True) not in _lead(elsa)
