"""Texts from a stranger's files stay texts: in a terminal, in a model card, on the report's page."""

import re
import unicodedata
from dataclasses import replace

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optimum_dsa import Allocation, DataConfig, DSAConfig, Measurement, Protocol, PruningReport
from optimum_dsa.checkpoint.description import checksum, describe
from optimum_dsa.checkpoint.verify import Verification
from optimum_dsa.common.escaping import (
    code_block,
    code_span,
    inline_markdown,
    one_line,
    prose_markdown,
    table_cell,
    visible,
)
from optimum_dsa.sharing.card import base_repository, model_card
from optimum_dsa.sharing.outcome import Outcome
from optimum_dsa.sharing.page import figures, page
from optimum_dsa.sharing.provenance import command, dataset_id
from optimum_dsa.sharing.tables import Table, block_table, compared, terminal

from ..elements import Elements


markdown_it = pytest.importorskip("markdown_it", reason="the card is read by a parser of Markdown")

HOSTILE = [
    "a|b", "`a`", "```\n# x\n```", "``a ` b``", "a\nb", "\n\n# heading\n\n", "---",
    "\n---\nlicense: evil\n---\n", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</details>",
    "</code><b>", "[x](javascript:alert(1))", "![x](http://e.com/a.png)", "<http://e.com>", "https://e.com",
    "www.e.com", "a@e.com", "**bold**", "_it_", "~~x~~", "# x", "- x", "1. x", "> x", "{{ 7*7 }}", "{% raw %}",
    "{{ card_data }}", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\r", "\x00", "\x85", "\u2028", "\u202eevil",
    "\ud800", "\ufeff", "&lt;b&gt;", "&#124;", "\\", "\\|", "a\\", "'", "\"", "key: value", "? x",
    "!!python/object:os.system", "&anchor", "*alias", "%YAML", "@x", "", " ", "  ", "\t", "$x$",
    "--trust-remote-code", "-o", "$(rm -rf ~)", "'; rm -rf ~; '", "a" * 300, "model.layers.0", "q_proj",
    "ünïcode", "漢字", "😀",
]  # fmt: skip
texts = st.one_of(
    st.sampled_from(HOSTILE),
    st.lists(st.sampled_from(HOSTILE), min_size=2, max_size=3).map("".join),
    st.text(max_size=20),
    st.text(alphabet="`|\\<>[]()*_#-!&\n~{}%:\"' a", max_size=20),
)
often = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
READER = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])


def structure(text: str) -> list:
    """What Markdown makes of a text: its elements in order and their attributes, without the texts in them."""
    found = []

    def walk(tokens):
        for token in tokens:
            if token.type in ("text", "softbreak", "code_inline", "text_special"):
                continue  # whether a name is shown as text or as code changes nothing
            html = token.content.strip() if token.type.startswith("html") else ""
            found.append((token.type, token.tag, html, sorted(map(str, token.attrs.items()))))
            walk(token.children or [])

    walk(READER.parse(text))
    return found


def without_rows(elements: list) -> list:
    """Elements but those of rows, whose number follows from names: of units, and of facts that are not empty."""
    rows = ("tr_open", "tr_close", "td_open", "td_close", "inline", "tr", "td", "dt", "dd")
    found = [row for row in elements if row[0] not in rows and row[1] not in rows]
    return [(row[0], row[1], row[2], []) if row[0] == "link_open" else row for row in found]


class Parts(Elements):
    """The elements of a page with the names of their attributes, their ends, and comments."""

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, [name for name, _ in attributes]))

    def handle_endtag(self, tag):
        self.found.append(("/", tag))

    def handle_comment(self, data):
        self.found.append(("comment", data))


# -- one text


@given(texts)
@often
def test_nothing_moves_the_cursor_of_a_terminal(text):
    for made in (visible(text), one_line(text)):
        hidden = [c for c in made if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c != "\n"]
        assert not hidden
        made.encode("utf-8")
    assert "\n" not in one_line(text)
    assert visible("q_proj ± ünï 漢") == "q_proj ± ünï 漢"


@given(texts)
@often
def test_a_text_in_a_line_is_a_text_or_a_code_span(text):
    for made in (inline_markdown(text), code_span(text)):
        assert structure(f"see {made} here") == structure("see x here")
        shown = "".join(t.content for t in READER.parse(f"see {made} here")[1].children)
        assert one_line(text).strip() in shown.replace("–", "")


@given(texts)
@often
def test_a_text_in_a_sentence_is_words_and_code_spans(text):
    made = prose_markdown(f"It's pruned by {text} here: all")
    assert made.startswith("It's pruned by ") and made.endswith(" here: all")
    types = [token.type for token in READER.parse(made)[1].children]
    assert set(types) <= {"text", "code_inline"} and len(READER.parse(made)) == 3


@given(texts)
@often
def test_a_text_in_a_cell_is_one_cell(text):
    for made in (inline_markdown(text), code_span(text)):
        rows = [f"| {table_cell(made)} | 1 |", f"| 2 | {table_cell(made)} |"]
        table = "\n".join(["| a | b |", "| --- | --- |", *rows])
        assert structure(table) == structure("| a | b |\n| --- | --- |\n| x | 1 |\n| 2 | x |")


@given(texts)
@often
def test_a_text_in_a_fence_ends_with_the_fence(text):
    tokens = READER.parse(f"{code_block(text, 'bash')}\n\nend")
    assert [token.type for token in tokens] == ["fence", "paragraph_open", "inline", "paragraph_close"]


@given(st.lists(texts, min_size=2, max_size=2))
@often
def test_a_row_of_a_table_is_one_line_in_a_terminal(cells):
    assert len(str(Table(["a", "b"], [cells, cells])).split("\n")) == 3


# -- everything at once


def outcome(text: str, number: float = 0.5) -> Outcome:
    """A pruned model whose every text is `text`."""
    # a unit's name says its place; what it is called before and after that is free
    units = {f"{text}.0": 8, f"{text}.1.{text}.weight": 8, f"{text}{text}": 8}
    shares = dict.fromkeys(units, 0.5)
    allocation = Allocation(shares, units, text)
    config = DSAConfig(
        0.5,
        exclude=(text,),
        include=(text, text),
        blocks=(text,),
        data=DataConfig(text_column=text, split="train", subset=text),
    )
    calibration = {"source": text, text: text, "samples": 8}
    report = PruningReport(config, allocation, shares, 100, calibration, {text: text}, {text: 0.1}, (text,), 1.0)
    said = text or "nothing"  # what is empty has no row
    recovery = {
        "kind": "recover", "config": {"method": said, "mode": said}, "perplexity": {"before": 2.0, "after": 1.5},
        "steps": 3, "history": [], "data": {said: said},
    }  # fmt: skip
    facts = describe(report, {"name": text, "revision": text}, recovery) | {"versions": {text: text}}
    tasks = {said: {said: {"value": 0.5, "error": 0.1}}}
    row = Measurement(said, 0.5, 24, 9.5, 0.1, Protocol(said, 4, 8, "each", True, text), (2.0, 2.5), tasks)
    found = Verification((), 12, 24, "row", (), 100, dict.fromkeys(units, 4), units)
    facts["checksum"] = checksum(facts)
    return Outcome(
        text, allocation, {text + "2": allocation}, facts, evaluations=(row,), parent=(row,), bytes=9, counted=found
    )


def card_of(text: str) -> str:
    base = {"license": text, "license_name": [text], "license_link": text, "language": [text, text]}
    return str(model_card(outcome(text), "me/tiny", {"architectures": [text]}, base, uncounted=text))


KEYS = {
    "library_name", "tags", "model-index", "base_model", "base_model_relation", "datasets", "license", "license_name",
    "license_link", "language",
}  # fmt: skip


@given(texts)
@settings(often, max_examples=40)
def test_a_card_has_the_markup_and_the_keys_that_it_was_given_and_no_others(text):
    made = card_of(text)
    _, front, body = re.split(r"^---$", made, maxsplit=2, flags=re.MULTILINE)
    metadata = yaml.safe_load(front)
    assert metadata.keys() <= KEYS and metadata["tags"][:4] == ["optimum-dsa", "pruned", "sparse", "wanda"]
    assert not {"javascript", "<", "\x1b"} & set(str(metadata.get("license_link", "")))
    tame = card_of("tame" if base_repository(outcome(text).facts)[0] else "not a repository")
    expected = structure(re.split(r"^---$", tame, maxsplit=2, flags=re.MULTILINE)[2])
    for link in {row[3][0] for row in structure(body) if row[0] == "link_open"}:
        assert re.fullmatch(r"\('href', 'https://huggingface\.co/[A-Za-z0-9_./-]+'\)", link)
    assert without_rows(structure(body)) == without_rows(expected)


@given(texts)
@often
def test_a_page_has_the_elements_that_it_was_given_and_no_others(text):
    made, tame = (page([outcome(part)], {}) for part in (text, "tame"))
    assert without_rows(Parts(made).found) == without_rows(Parts(tame).found)
    assert "\x1b" not in made and "\u202e" not in made and made.encode("utf-8")


@given(texts)
@settings(often, max_examples=40)
def test_a_table_for_the_terminal_has_the_lines_that_it_was_given_and_no_others(text):
    made, tame = (terminal([outcome(part)]) for part in (text, "tame"))
    rows, expected = (len(block_table(compared([outcome(part)])).rows) for part in (text, "tame"))
    assert made.count("\n") - rows == tame.count("\n") - expected and visible(made) == made
    found = replace(outcome(text).counted, problems=(text,), unproven=(text,))
    assert str(found).count("\n") == 2 and visible(str(found)) == str(found)


DRAWN = ["<script>x</script>", "$\\frac$", "a\nb", "\x1b[31m", "\ud800", "--><b>", "_hidden", '" onload="x']


@pytest.mark.parametrize("text", DRAWN)
def test_pictures_of_hostile_names_are_drawn_and_escaped(text):
    first = outcome(text)
    made = page([first], figures([first]))
    assert "<script>" not in made and "<b>x" not in made
    kinds = {tag for tag, _ in Parts(made).found}
    assert kinds == {tag for tag, _ in Parts(page([outcome("tame")], figures([outcome("tame")]))).found}
    assert not [names for _, names in Parts(made).found if isinstance(names, list) and "onload" in names]


# -- commands and addresses


@pytest.mark.parametrize("text", HOSTILE)
def test_a_command_has_no_option_and_no_letter_that_cannot_be_seen(text):
    import shlex

    made = command(outcome(text).facts)
    words = shlex.split(made)
    assert visible(made) == made and "\n" not in made
    assert words[:2] == ["optimum-cli", "dsa"] and words[3] in (text, "BASE_MODEL")
    flags = {word for word in words if word.startswith("-")}
    known = {
        "-o",
        "--sparsity",
        "--config",
        "--exclude",
        "--include",
        "--blocks",
        "--split",
        "--subset",
        "--text-column",
    }
    assert flags <= known | {"--allocation", "--dataset", "--revision"}


@pytest.mark.parametrize("text", HOSTILE)
def test_only_names_are_repositories(text):
    name, _ = base_repository({"base_model": {"name": text, "revision": "main"}})
    assert name is None or re.fullmatch(r"[A-Za-z0-9_.-]+", name)
    assert dataset_id(text) is None
    assert base_repository({"base_model": {"name": "gpt2", "revision": "main"}}) == ("gpt2", "main")
    assert base_repository({"base_model": {"name": "gpt2", "revision": None}}) == (None, None)
