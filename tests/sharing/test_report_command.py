"""`optimum-cli dsa report`, from the shell."""

import sys

from optimum_dsa.common.installation import how_to_install

from ..test_commands import run
from .common import snapshot


def test_the_command_prints_tables_and_says_where_the_page_is(monkeypatch, capsys, folders, tmp_path):
    arguments = [str(folders / "found"), "--compare", str(folders / "by-owl"), "-o", str(tmp_path / "out")]
    code, output, errors = run(monkeypatch, capsys, "report", *arguments)
    assert (code, errors) == (0, "")
    assert "Finalists of found" in output and output.splitlines()[-1] == f"saved to {tmp_path / 'out' / 'report.html'}"


def test_curves_of_a_pruned_model_are_refused_and_its_folder_stays_as_it_is(monkeypatch, capsys, saved, tmp_path):
    before = snapshot(saved)
    asked = ["report", str(saved), "--sensitivity", "--method", "magnitude"]
    for place, message in (([], "say where with -o"), (["-o", str(tmp_path / "out")], "is pruned already: 60.00%")):
        code, output, errors = run(monkeypatch, capsys, *asked, *place)
        assert code == 2 and output == "" and message in errors and len(errors.splitlines()) == 1
    assert snapshot(saved) == before and not (tmp_path / "out").exists()


def test_the_command_refuses_in_one_line(monkeypatch, capsys, folders, tmp_path):
    (tmp_path / "file").write_text("x")
    for arguments, message in (
        ([tmp_path], "holds neither a model (config.json, dsa_config.json) nor a search"),
        ([folders / "found", "-o", tmp_path / "file"], "is a file, and a folder is to be written"),
        ([folders / "found", "--method", "alps"], "--method is for --sensitivity, which was not asked for"),
    ):
        code, output, errors = run(monkeypatch, capsys, "report", *map(str, arguments))
        assert code == 2 and output == "" and message in errors
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, errors = run(monkeypatch, capsys, "report", str(folders / "found"), "-o", str(tmp_path / "new"))
    assert code == 2 and how_to_install("plots") in errors and not (tmp_path / "new").exists()
