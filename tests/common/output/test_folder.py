"""`OutputFolder`: whole or not at all, one writer, and nothing is deleted that was not written here."""

import json
import os
import signal
import subprocess

import pytest

from optimum_dsa.common.lock import OutputBusyError
from optimum_dsa.common.manifest import MANIFEST, record
from optimum_dsa.common.output import ForeignFileError, OutputFolder

from .common import KILLED, content, fill, python, write


# -- whole or not at all


def test_what_was_written_is_there_and_is_replaced_whole(out, tmp_path):
    write(out, config="1", sub__weights="1")
    assert content(tmp_path) == {"out/config": "1", "out/sub/weights": "1"}
    assert {path.name for path in tmp_path.iterdir()} == {"out"} and not (out / ".dsa-work").exists()
    with OutputFolder(out) as output:
        fill(config="2")(output.result)
        assert content(out)["config"] == "1", "nothing of the new one is there before its end"
        output.write(fill(other="2"))
    assert content(tmp_path) == {"out/config": "2", "out/other": "2"} and not (out / "sub").exists()
    assert json.loads((out / MANIFEST).read_text())["files"].keys() == {"config", "other"}


def test_an_error_leaves_the_old_folder_and_nothing_else(out, tmp_path):
    write(out, config="old")
    with pytest.raises(RuntimeError), OutputFolder(out) as output:
        fill(config="half")(output.result)
        raise RuntimeError
    assert content(tmp_path) == {"out/config": "old"} and {path.name for path in tmp_path.iterdir()} == {"out"}


# the manifest is what is replaced first: from then on the result is whole
@pytest.mark.parametrize(
    "place,moment,left",
    [
        ("renamed", "filling", "old"),
        ("renamed", "replace 0", "old"),
        ("renamed", "rename 0", "new"),
        ("renamed", "rename 1", "new"),
        ("in place", "filling", "old"),
        ("in place", "replace 0", "old"),
        ("in place", "replace 1", "new"),
        ("in place", "replace 2", "new"),
        ("in place", "replace 3", "new"),
    ],
)
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_folder_for_the_next_call(tmp_path, place, moment, left):
    path = tmp_path / "out"
    write(path, config="old", stale="old")
    killed = subprocess.run(python(KILLED, path, moment, place))
    assert killed.returncode == -signal.SIGKILL
    OutputFolder(path).begin().__exit__(None, None, None)
    assert (
        content(path) == {"old": {"config": "old", "stale": "old"}, "new": {"config": "new", "weights": "new"}}[left]
    )
    assert {file.name for file in tmp_path.iterdir()} == {"out"}
    write(path, config="last")
    assert content(tmp_path) == {"out/config": "last"}


# -- only what is ours goes


@pytest.mark.parametrize("name", ["thesis.tex", "notes/thesis.tex", "pytorch_model.bin", ".git/HEAD"])
def test_a_file_that_was_not_written_here_is_never_lost(out, name):
    write(out, config="1")
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("years of work")
    with pytest.raises(ForeignFileError, match="holds .*which was not written by optimum-dsa; move it away"):
        OutputFolder(out).begin()
    assert content(out) == {"config": "1", name: "years of work"}
    os.remove(out / name)
    write(out, config="2")  # and the refusal left no lock behind


def test_a_file_that_was_changed_is_never_lost(out):
    write(out, config="1", weights="1")
    (out / "config").write_text("2")  # as long as before
    with pytest.raises(ForeignFileError, match="holds config, which was changed after optimum-dsa wrote it"):
        OutputFolder(out).begin()
    assert content(out) == {"config": "2", "weights": "1"}


@pytest.mark.parametrize("name", ["dsa_config.json", MANIFEST])
def test_no_name_of_a_file_makes_a_folder_ours(tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("{}")
    with pytest.raises(ForeignFileError):
        OutputFolder(tmp_path / "out").begin()
    assert (tmp_path / "out" / name).read_text() == "{}"


@pytest.mark.parametrize("manifest", [None, "not json", "[]", "{}"])
def test_without_its_manifest_a_folder_is_nobodys(tmp_path, manifest):
    write(tmp_path / "out", config="1")
    (tmp_path / "out" / MANIFEST).unlink()
    if manifest is not None:
        (tmp_path / "out" / MANIFEST).write_text(manifest)
    with pytest.raises(ForeignFileError, match=r"\(no dsa_manifest.json in it says so\); move it away"):
        OutputFolder(tmp_path / "out").begin()


def test_an_output_has_a_name():
    with pytest.raises(ValueError, match="has no name"):
        OutputFolder("")


def test_a_forged_manifest_leads_nowhere_else(tmp_path):
    write(tmp_path / "out", config="1")
    (tmp_path / "key").write_text("secret")
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    manifest["files"]["../key"] = manifest["files"]["config"] | {"size": 6}
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(manifest))
    (tmp_path / "out" / "link").symlink_to(tmp_path / "key")
    with pytest.raises(ForeignFileError, match="holds link"):
        OutputFolder(tmp_path / "out").begin()
    (tmp_path / "out" / "link").unlink()
    write(tmp_path / "out", config="2")
    assert content(tmp_path) == {"out/config": "2", "key": "secret"}


def test_what_appears_during_the_work_is_set_aside(out, tmp_path, caplog):
    write(out, config="1")
    with OutputFolder(out) as output:
        (out / "thesis.tex").write_text("years of work")
        (out / "config").write_text("edited")
        output.write(fill(config="2"))
    assert content(out)["config"] == "2"
    assert {"years of work", "edited", "2"} == set(content(tmp_path).values())
    assert "-kept-1" in caplog.text


def test_links_are_followed_and_stay(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    for number in "12":
        write(tmp_path / "out", config=number)
        assert (tmp_path / "out").is_symlink() and content(tmp_path / "disk") == {"out/config": number}


def test_a_name_with_signs_of_a_pattern_is_only_a_name(tmp_path):
    with OutputFolder(tmp_path / "out1") as other:
        write(tmp_path / "out[1]", config="1")
        write(tmp_path / "out*", config="2")
        other.write(fill(config="3"))
    assert content(tmp_path) == {"out1/config": "3", "out[1]/config": "1", "out*/config": "2"}


# -- files that are added to a folder


def test_files_are_added_to_what_is_there(tmp_path):
    out = tmp_path / "out"
    fill(thesis="x", sub__notes="y")(tmp_path)
    write(out, config="1")
    (out / "thesis").write_text("x")
    write(out, ["report", "picture"], report="1")
    write(out, ["report", "picture"], report="2", picture="2")
    assert content(out) == {"config": "1", "thesis": "x", "report": "2", "picture": "2"}
    os.remove(out / "thesis")
    write(out, config="3")  # what was added is ours as well
    assert content(out) == {"config": "3"}


def test_a_file_of_the_same_name_is_never_lost(tmp_path):
    fill(allocation="made by hand")(tmp_path / "out")
    with pytest.raises(ForeignFileError, match="holds allocation, which was not written by optimum-dsa"):
        OutputFolder(tmp_path / "out", ["allocation"]).begin()
    assert content(tmp_path) == {"out/allocation": "made by hand"}


def test_only_files_that_were_announced_are_added(tmp_path):
    with pytest.raises(ValueError, match="other was written, which was not announced"):
        write(tmp_path / "out", ["report"], report="1", other="1")
    assert content(tmp_path) == {}


def test_a_file_can_be_recorded_afterwards(tmp_path):
    write(tmp_path / "out", config="1")
    (tmp_path / "out" / "results.json").write_text("{}")
    record(tmp_path / "out" / "results.json")
    write(tmp_path / "out", config="2")
    (tmp_path / "results.json").write_text("{}")
    record(tmp_path / "results.json")
    assert content(tmp_path) == {"out/config": "2", "results.json": "{}"} and not (tmp_path / MANIFEST).exists()


# -- one writer


def test_two_writers_of_one_folder_are_refused_by_name(tmp_path):
    with OutputFolder(tmp_path / "out") as first:
        for path in (tmp_path / "out", tmp_path / "x" / ".." / "out"):
            with pytest.raises(OutputBusyError, match="out is being written by another process"):
                OutputFolder(path).begin()
        first.write(fill(config="1"))
    write(tmp_path / "out", config="2")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_the_lock_holds_between_processes_and_dies_with_its_process(tmp_path):
    code = """
        import sys
        from optimum_dsa.common.output import OutputFolder
        with OutputFolder(sys.argv[1]) as output:
            print("locked", flush=True)
            sys.stdin.read()
    """
    process = subprocess.Popen(python(code, tmp_path / "out"), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"locked\n"
    with pytest.raises(OutputBusyError):
        OutputFolder(tmp_path / "out").begin()
    process.kill()
    process.wait()
    write(tmp_path / "out", config="1")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_many_writers_at_once_one_after_the_other_or_refused(tmp_path):
    code = """
        import sys
        from optimum_dsa.common.lock import OutputBusyError
        from optimum_dsa.common.output import OutputFolder
        done = 0
        for number in range(40):
            try:
                with OutputFolder(sys.argv[1]) as output:
                    text = sys.argv[2] + str(number)
                    output.write(lambda folder: [(folder / name).write_text(text) for name in "ab"])
                    done += 1
            except OutputBusyError:
                pass
        print(done)
    """
    processes = [
        subprocess.Popen(python(code, tmp_path / "out", name), stdout=subprocess.PIPE, text=True) for name in "xyz"
    ]
    done = [int(process.communicate()[0]) for process in processes]
    assert all(process.returncode == 0 for process in processes) and sum(done) >= 1
    found = content(tmp_path / "out")
    assert found["a"] == found["b"] and {path.name for path in tmp_path.iterdir()} == {"out"}
