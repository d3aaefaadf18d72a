"""The pages say what the package does: names, options, links, code and commands are held against it."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
import yaml

import optimum_dsa
from optimum_dsa import (
    ALLOCATIONS,
    IMPORTANCES,
    LEARNERS,
    METHODS,
    METRICS,
    MODES,
    PERMUTATIONS,
    POST_PROCESS,
    PRE_PROCESS,
    RECOVERIES,
    REDUCTION,
    SCHEDULES,
    SHARES,
    TRANSFORM,
    UPDATES,
)
from optimum_dsa.checkpoint.description import schema
from optimum_dsa.commands.dsa import DSACommand
from optimum_dsa.commands.embedded import demo_model, demo_texts
from optimum_dsa.commands.prune import asked_config, asked_structures
from optimum_dsa.common.registry import Registry
from optimum_dsa.evaluation.perplexity import REFERENCE as PSEUDO
from optimum_dsa.model.examples import REFERENCE as MASKING
from optimum_dsa.pruning.reconstruct import REFERENCE as RECONSTRUCTION
from optimum_dsa.pruning.structured.wholes.entire import REFERENCE as PARTS_GO
from optimum_dsa.pruning.structured.widths.costs import COSTS
from optimum_dsa.pruning.unstructured.grid import REFERENCE as FEEDBACK
from optimum_dsa.pruning.unstructured.grid import SETTLING
from optimum_dsa.pruning.unstructured.symbolic import OPERATIONS
from optimum_dsa.recovery.trainer import REFERENCE as DISTILLATION


ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "docs" / "source"
PAGES = {path.relative_to(SOURCE).with_suffix("").as_posix(): path.read_text() for path in SOURCE.rglob("*.md")}
TEXTS = {**PAGES, "README": (ROOT / "README.md").read_text()}
EXAMPLES = [path for path in (ROOT / "examples").rglob("*.py") if "benchmarks" not in path.parts]
TABLES = {
    "Metrics": METRICS,
    "Methods": METHODS,
    "Allocations": ALLOCATIONS,
    "Pre-process": PRE_PROCESS,
    "Reduction": REDUCTION,
    "Transform": TRANSFORM,
    "Post-process": POST_PROCESS,
    "Updates": UPDATES,
    "Order of channels": PERMUTATIONS,
}
# A block under this comment, which no reader sees, is executed.
BLOCK = re.compile(r"(?P<runs><!-- runs -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str, only_run: bool = False) -> list[str]:
    found = [match for match in BLOCK.finditer(text) if match["language"] == language]
    return [match["code"] for match in found if match["runs"] or not only_run]


def prose(text: str) -> str:
    return BLOCK.sub("", text)


def headings(text: str) -> dict[str, str]:
    """Anchor -> title."""
    titles = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-"): title for title in titles}


def section(text: str, title: str) -> str:
    """The text between a heading and the next one of any level."""
    return re.search(rf"^#+ {re.escape(title)}$(.*?)(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL)[1]


def rows(text: str) -> list[list[str]]:
    """The cells of the tables' rows, without their heads."""
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    rules = {number for number, cells in enumerate(lines) if set("".join(cells)) <= set("-|")}
    return [cells for number, cells in enumerate(lines) if number not in rules and number + 1 not in rules]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def commands() -> ArgumentParser:
    """A parser of everything that stands behind `optimum-cli`."""
    parser = ArgumentParser("optimum-cli")
    DSACommand(parser.add_subparsers(required=True))
    return parser


def command_parsers() -> dict[str, ArgumentParser]:
    (subparsers,) = commands()._subparsers._group_actions
    (leaves,) = subparsers.choices["dsa"]._subparsers._group_actions
    return {name: parser.complete() for name, parser in leaves.choices.items()}


def command_lines(text: str, only_run: bool = False) -> list[list[str]]:
    lines = [line for code in blocks(text, "bash", only_run) for line in code.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("optimum-cli ")]


# -- links


def test_every_page_is_in_the_table_of_contents_once():
    listed = [
        page["local"] for part in yaml.safe_load((SOURCE / "_toctree.yml").read_text()) for page in part["sections"]
    ]
    assert sorted(listed) == sorted(PAGES)


@pytest.mark.parametrize("name", sorted(PAGES))
def test_internal_links_lead_to_a_page_and_a_heading(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(PAGES[name])):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        page = (SOURCE / name).parent.joinpath(path).resolve().relative_to(SOURCE).as_posix() if path else name
        assert page in PAGES, link
        assert not anchor or anchor in headings(PAGES[page]), link


def test_links_of_the_readme_lead_to_a_file_and_a_heading():
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(TEXTS["README"])):
        path, _, anchor = link.partition("#")
        if not link.startswith("https://"):
            assert (ROOT / path).is_file(), link
            assert not anchor or anchor in headings((ROOT / path).read_text()), link


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_papers_are_cited_by_the_addresses_of_the_tables(name):
    tables = [*TABLES.values(), MODES, SCHEDULES, RECOVERIES, IMPORTANCES, LEARNERS, SHARES, OPERATIONS]
    known = {address for table in tables for address in table.references.values()} | {DISTILLATION, RECONSTRUCTION}
    known |= {MASKING, PSEUDO, FEEDBACK, SETTLING, PARTS_GO}
    assert set(re.findall(r"https://arxiv\.org/[\w./]+", TEXTS[name])) <= known


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_references_to_python_objects_resolve(name):
    for path in re.findall(r"\[`~?([\w.]+)`\](?!\()", TEXTS[name]):
        value = optimum_dsa
        for part in path.split("."):
            value = getattr(value, part)


# -- names


@pytest.mark.parametrize("title", TABLES)
def test_concepts_lists_every_registered_name_and_no_other(title):
    text, table = section(PAGES["concepts"], title), TABLES[title]
    names = [quoted(cells[0])[0] for cells in rows(text)] if rows(text) else quoted(text)
    assert sorted(names) == sorted(table)


def test_the_guide_of_smaller_models_lists_every_importance_with_its_reference():
    found = {quoted(cells[0])[0]: cells[1] for cells in rows(section(PAGES["guides/structured"], "Importances"))}
    assert sorted(found) == sorted(IMPORTANCES)
    assert all(IMPORTANCES.references[name] in text for name, text in found.items())


def test_the_guide_of_smaller_models_lists_every_allocation_with_its_reference():
    found = {
        quoted(cells[0])[0]: cells[1] for cells in rows(section(PAGES["guides/structured"], "How many from where"))
    }
    assert sorted(found) == sorted(SHARES)
    assert all(SHARES.references[name] is None or SHARES.references[name] in text for name, text in found.items())


def test_the_guide_of_smaller_models_lists_every_cost():
    found = {quoted(cells[0])[0] for cells in rows(section(PAGES["guides/structured"], "What is counted"))}
    assert found == set(COSTS)


def test_the_guide_of_smaller_models_lists_every_learner_with_its_reference_and_rate():
    found = {quoted(cells[0])[0]: cells for cells in rows(section(PAGES["guides/structured"], "Learners"))}
    assert sorted(found) == sorted(LEARNERS)
    for name, cells in found.items():
        assert LEARNERS.references[name] in cells[1] and float(cells[3]) == LEARNERS.fact(name, "rate")
        assert (cells[2] == "forward and backward") == LEARNERS.fact(name, "gradients")


@pytest.mark.parametrize("title", ["Metrics", "Methods", "Allocations", "Updates"])
def test_concepts_gives_every_row_its_reference(title):
    for cells in rows(section(PAGES["concepts"], title)):
        address = TABLES[title].references[quoted(cells[0])[0]]
        assert (f"]({address})" in cells[-1]) if address else ("](" not in cells[-1]), cells


def test_concepts_says_what_methods_are_made_of_and_what_operations_read():
    for name, metric, pattern, update, _ in rows(section(PAGES["concepts"], "Methods")):
        row = METHODS[quoted(name)[0]]
        assert [row.metric, row.pattern, row.update] == [quoted(cell)[0] for cell in (metric, pattern, update)]
    for title, column, default in (("Metrics", 2, "inputs"), ("Updates", 2, "nothing")):
        for cells in rows(section(PAGES["concepts"], title)):
            assert TABLES[title].fact(quoted(cells[0])[0], "reads", default) == cells[column], cells
    for cells in rows(section(PAGES["concepts"], "Allocations")):
        assert ALLOCATIONS[quoted(cells[0])[0]].reads == cells[4], cells


@pytest.mark.parametrize("table", [METHODS, ALLOCATIONS], ids=lambda table: table.kind)
def test_help_and_readme_name_every_method_and_allocation_and_no_other(table):
    text = command_parsers()["prune"].format_help()
    for name in table:
        assert re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text), name
    line = next(line for line in TEXTS["README"].splitlines() if line.startswith(f"| {table.kind}s |"))
    assert sorted(quoted(line)) == sorted(table)


@pytest.mark.parametrize("command", sorted(command_parsers()))
def test_cli_page_has_every_option(command):
    text = section(PAGES["cli"], command)
    everywhere = {"-h", "--help", *quoted(" ".join(cells[0] for cells in rows(section(PAGES["cli"], "Command line"))))}
    for action in command_parsers()[command]._actions:
        for option in action.option_strings or [action.dest]:
            assert option in quoted(text) or option in everywhere, option
    known = {option for action in command_parsers()[command]._actions for option in action.option_strings}
    assert {word for word in quoted(" ".join(cells[0] for cells in rows(text))) if word[0] == "-"} <= known


@pytest.mark.parametrize("title,table", [("Modes", MODES), ("Schedules", SCHEDULES)])
def test_recovery_lists_every_row_with_its_reference(title, table):
    cells = {quoted(row[0])[0]: row[-1] for row in rows(section(PAGES["guides/recovery"], title))}
    assert sorted(cells) == sorted(table)
    for name, text in cells.items():
        assert (f"]({table.references[name]})" in text) if table.references[name] else ("](" not in text), name


def test_package_reference_has_every_public_name():
    documented = re.findall(r"^\[\[autodoc\]\] (\S+)$", PAGES["package_reference"], re.MULTILINE)
    tables = [quoted(cells[0])[0] for cells in rows(section(PAGES["package_reference"], "Tables of names"))]
    for name in optimum_dsa.__all__:
        assert name in (tables if isinstance(getattr(optimum_dsa, name), Registry) else documented), name


def test_architectures_page_has_every_reason_for_staying_dense():
    tree = ast.parse((ROOT / "optimum_dsa" / "model" / "architecture.py").read_text())
    reasons = {
        node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]).startswith("dense[")
        and isinstance(node.value, ast.Constant)
    }
    assert reasons and reasons == {
        quoted(cells[0])[0] for cells in rows(section(PAGES["guides/architectures"], "What stays dense"))
    }


def test_checkpoints_page_has_every_key_of_the_description():
    keys = [quoted(cells[0])[0] for cells in rows(section(PAGES["guides/checkpoints"], "dsa_config.json"))]
    assert sorted(keys) == sorted(schema()["properties"])


def test_troubleshooting_quotes_what_the_package_says():
    said = "\n".join(message for path in (ROOT / "optimum_dsa").rglob("*.py") for message in texts_of(path))
    for cells in rows(PAGES["guides/troubleshooting"]):
        for part in quoted(cells[0])[0].split("…"):
            assert part.strip() in said, cells[0]


def texts_of(path: Path) -> list[str]:
    """The texts in a module, with … for what is filled in."""
    tree = ast.parse(path.read_text())
    joined = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    filled = [
        "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values) for node in joined
    ]
    return filled + [
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


# -- code and commands


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_code_compiles_and_imports_public_names(name):
    for code in blocks(TEXTS[name], "python"):
        check_imports(code)


# Benchmarks measure the parts inside, and name them.
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_import_public_names(path):
    check_imports(path.read_text())


def check_imports(code: str) -> None:
    """What comes from this package comes from `optimum_dsa`, and is one of its public names."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("optimum_dsa.") for alias in node.names), code
        if isinstance(node, ast.ImportFrom) and node.module.startswith("optimum_dsa"):
            assert node.module == "optimum_dsa", ast.unparse(node)
            assert {alias.name for alias in node.names} <= {*optimum_dsa.__all__}, ast.unparse(node)


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_commands_are_accepted(name):
    for line in command_lines(TEXTS[name]):
        if "--help" not in line:
            args = commands().parse_args(line)
            assert args.func(args).args is args
            if line[1] in ("prune", "search"):
                if getattr(args, "allocation", None) == "found":  # the folder that the line before would write
                    args.allocation = None
                if getattr(args, "max_loss", None) is None:  # which stands in its place
                    given = {"layout": "per_layer"} if line[1] == "search" else {}
                    config = asked_structures(args, command_parsers()[line[1]], **given) or asked_config(args)
                    assert 0 <= config.sparsity < 1


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder with the files that pages name; what is registered meanwhile is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "tiny-llama").symlink_to(demo_model())
    for part in ("calibration", "test"):
        (tmp_path / f"{part}.txt").write_text("\n".join(demo_texts(part)))
    before = {title: set(table) for title, table in TABLES.items()}
    yield tmp_path
    for title, table in TABLES.items():
        for name in set(table) - before[title]:
            del table[name]


@pytest.mark.parametrize("name", sorted(name for name in TEXTS if "<!-- runs -->" in TEXTS[name]))
def test_pages_run(name, workplace):
    namespace = {"__name__": name}
    for code in blocks(TEXTS[name], "python", only_run=True):
        exec(compile(code, f"{name}.md", "exec"), namespace)
    for law in [value for key, value in namespace.items() if key.startswith("test_")]:
        law()
    for line in command_lines(TEXTS[name], only_run=True):
        args = commands().parse_args(line)
        args.func(args).run()


def test_add_a_metric_runs_whole_and_tests_itself():
    page = PAGES["add_a_metric"]
    assert blocks(page, "python") == blocks(page, "python", only_run=True)
    assert len(re.findall(r"^def test_", page, re.MULTILINE)) == 3


# -- the build

builder = pytest.mark.skipif(importlib.util.find_spec("doc_builder") is None, reason="hf-doc-builder is not installed")


def build(source: Path, output: Path) -> subprocess.CompletedProcess:
    code = "from doc_builder.commands.doc_builder_cli import main; main()"
    command = [sys.executable, "-c", code, "build", "optimum_dsa", source, "--build_dir", output]
    options = ["--repo_name", "optimum-dsa", "--version", "main", "--clean"]
    return subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=300)


@builder
def test_docs_build_and_parameters_are_items(tmp_path):
    done = build(SOURCE, tmp_path)
    assert done.returncode == 0, done.stderr
    built = {path.stem: path.read_text() for path in tmp_path.rglob("*.mdx")}
    assert built.keys() == {Path(name).name for name in PAGES}
    for described in re.findall(r"<paramsdesc>(.*?)</paramsdesc>", built["package_reference"], re.DOTALL):
        run_on = [line for line in described.splitlines() if not line.startswith(("- **", "  "))]
        assert not run_on, (
            f"write 'name (`type`): ...' in the docstring, or doc-builder makes no item of {run_on[0]!r}"
        )


@builder
def test_docs_do_not_build_with_an_unknown_object(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "_toctree.yml").write_text("- title: Docs\n  sections:\n  - local: index\n    title: Index\n")
    (source / "index.md").write_text("# Index\n\n[[autodoc]] DSAConfiguration\n")
    done = build(source, tmp_path / "build")
    assert done.returncode != 0
    assert "Unable to find DSAConfiguration" in done.stderr
