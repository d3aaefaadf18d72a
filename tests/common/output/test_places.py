"""Outputs that cannot be written, now or in the end, and runs that go on: found before work, and nothing is lost."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from optimum_dsa.common import output as module
from optimum_dsa.common.output import ForeignFileError, OutputError, OutputFolder

from .common import KILLED, content, fill, python, write


# -- what cannot be written is found before work


def test_what_is_in_the_way_is_found_before_work(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ForeignFileError, match="file is a file, and a folder is to be written"):
        OutputFolder(tmp_path / "file").begin()
    for path in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        with pytest.raises(OutputError, match="cannot be written.*choose another path"):
            OutputFolder(path).begin()
    (tmp_path / ".out.dsa-work").mkdir()
    (tmp_path / ".out.dsa-work" / "thesis").write_text("x")
    with pytest.raises(ForeignFileError, match="was not made by it"):
        OutputFolder(tmp_path / "out").begin()
    assert content(tmp_path) == {"file": "x", ".out.dsa-work/thesis": "x"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a folder that nobody may write")
def test_a_place_that_cannot_be_written_is_found_before_work():
    with pytest.raises(OutputError, match="/proc/out cannot be written"):
        OutputFolder("/proc/out").begin()


def test_a_disk_without_room_is_found_before_work(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with OutputFolder(tmp_path / "out") as output:
        output.require(free // 2)
        with pytest.raises(OutputError, match=r"out needs [\d,]+ bytes, and [\d,]+ are free there"):
            output.require(10 * free)


@pytest.fixture
def small_disk(tmp_path):
    """A mounted disk of a megabyte, where the system lets one be made."""
    (tmp_path / "disk").mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path / "disk"], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("no right to mount a disk")
    yield tmp_path / "disk"
    subprocess.run(["umount", tmp_path / "disk"], check=True)


def test_a_mount_point_is_written_in_place(small_disk):
    for number in "12":
        write(small_disk, config=number, sub__weights=number)
        assert content(small_disk) == {"config": number, "sub/weights": number}
    assert small_disk.is_mount() and not (small_disk / ".dsa-work").exists()


def test_a_result_that_finds_no_room_is_saved_elsewhere(small_disk, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    write(small_disk / "out", config="old")
    with pytest.raises(OutputError, match="could not be written .*The result is whole in (.*)") as caught:
        write(small_disk / "out", weights="x" * 2**21)
    safe = _named(caught)
    assert content(safe) == {"weights": "x" * 2**21}
    assert content(small_disk) == {"out/config": "old"}
    shutil.rmtree(safe)


def _named(caught):
    return Path(str(caught.value).split("is whole in ")[1].rstrip("."))


def test_a_result_that_cannot_be_put_in_place_stays_and_comes_with_the_next_call(tmp_path, monkeypatch):
    out, rename = tmp_path / "out", os.rename
    write(out, config="old")

    def refuse(source, target):
        if source == tmp_path / ".out.dsa-work" / "result":
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(module.os, "rename", refuse)
        with pytest.raises(OutputError, match="could not be replaced") as caught:
            write(out, config="new")
    assert content(_named(caught)) == {"config": "new"}
    OutputFolder(out).begin().__exit__(None, None, None)
    assert content(tmp_path) == {"out/config": "new"}


def test_a_finished_result_is_kept_where_strangers_bar_its_way(tmp_path):
    out = tmp_path / "out"
    write(out, config="old")
    subprocess.run(python(KILLED, out, "rename 0", "renamed"))
    (out / "thesis").write_text("x")
    for _ in range(2):
        with pytest.raises(ForeignFileError, match="result of an earlier run, which could not replace .* of thesis"):
            OutputFolder(out).begin()
    assert content(tmp_path)[".out.dsa-work/result/config"] == "new"
    os.remove(out / "thesis")
    OutputFolder(out).begin().__exit__(None, None, None)
    assert content(tmp_path) == {"out/config": "new", "out/weights": "new"}


# -- what a run that can be resumed keeps


def test_a_rest_to_go_on_with_stays_until_the_result_is_there(out, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    with pytest.raises(KeyboardInterrupt), OutputFolder(out) as output:
        (output.scratch("checkpoints") / "step-1").write_text("1")
        raise KeyboardInterrupt
    with pytest.raises(ForeignFileError, match="An interrupted run left checkpoints in .*resume it, or remove"):
        OutputFolder(out).begin()
    with OutputFolder(out, resume=True) as output:
        assert content(output.scratch("checkpoints")) == {"step-1": "1"}
        output.write(fill(config="1"))
    assert content(tmp_path) == {"out/config": "1"} and {path.name for path in tmp_path.iterdir()} == {"out"}
    with OutputFolder(out, resume=True) as output:
        output.write(fill(config="2"))
