import signal
import subprocess
import sys
import textwrap

import pytest

from optimum_dsa.files import check_output, new_directory, write_text


MARK = "dsa_config.json"


def ours(path, content="old"):
    path.mkdir()
    (path / MARK).write_text(content)
    return path


def test_a_folder_is_replaced_when_the_context_ends_well(tmp_path):
    target = ours(tmp_path / "out")
    (target / "stale.bin").write_text("x")
    with new_directory(target, MARK) as fresh:
        (fresh / MARK).write_text("new")
        assert (target / MARK).read_text() == "old"
    assert [p.name for p in tmp_path.rglob("*")] == ["out", MARK]
    assert (target / MARK).read_text() == "new"


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path):
    target = ours(tmp_path / "out")
    with pytest.raises(RuntimeError), new_directory(target, MARK) as fresh:
        (fresh / MARK).write_text("half")
        raise RuntimeError
    assert [p.name for p in tmp_path.rglob("*")] == ["out", MARK]
    assert (target / MARK).read_text() == "old"


def test_a_kill_leaves_the_old_folder_and_the_next_save_cleans_up(tmp_path):
    target = ours(tmp_path / "out")
    script = f"""
        import os, signal
        from optimum_dsa.files import new_directory
        with new_directory({str(target)!r}, {MARK!r}) as fresh:
            (fresh / {MARK!r}).write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(script)]).returncode == -signal.SIGKILL
    assert (target / MARK).read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    with new_directory(target, MARK) as fresh:
        (fresh / MARK).write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_caught_between_the_two_renames_comes_back(tmp_path):
    ours(tmp_path / ".out.dsa-old")
    with pytest.raises(RuntimeError), new_directory(tmp_path / "out", MARK):
        raise RuntimeError
    assert (tmp_path / "out" / MARK).read_text() == "old"


def test_what_is_not_ours_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("x")
    (tmp_path / "empty").mkdir()
    for name in ("file", "folder"):
        with pytest.raises(FileExistsError, match="was not written by optimum-dsa"):
            check_output(tmp_path / name, MARK)
    check_output(tmp_path / "empty", MARK)
    check_output(tmp_path / "none", MARK)
    check_output(ours(tmp_path / "ours"), MARK)


def test_a_file_is_replaced_whole(tmp_path):
    write_text(tmp_path / "a.json", "one")
    write_text(tmp_path / "a.json", "two")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.json", "two")]
