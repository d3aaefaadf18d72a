"""Notebooks run from their first cell to their last, and are stored without what they print."""

import json
from pathlib import Path

import pytest


FOLDER = Path(__file__).resolve().parents[1] / "examples" / "notebooks"
if not FOLDER.is_dir():
    pytest.skip("only in a checkout", allow_module_level=True)


def code_of(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_cell_runs(notebook, tmp_path, monkeypatch, capsys):
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(notebook, as_version=4))
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for number, cell in enumerate(code_of(notebook)):
        assert not cell["outputs"] and cell["execution_count"] is None
        exec(compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert (
        "holds: " in printed and "report.html" in printed and "matrices of 8 bits, a scale for 32 columns" in printed
    )
    assert (tmp_path / "tiny-llama-60-int8" / "dsa_config.json").is_file()
