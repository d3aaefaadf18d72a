"""`prune --resume`: whatever ends a run, and wherever, the next one ends as if nothing had been."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest

from optimum_dsa import DSAPruner, demo_model
from optimum_dsa.commands.stopping import Terminated, stoppable
from optimum_dsa.common.output import OutputFolder
from optimum_dsa.pruning.finished import FinishedBlocks
from optimum_dsa.pruning.structured.learners import learner

from .test_commands import run


# runs a command to its end, for a folder `whole`; then once for each moment, in a process of its own that is ended
# there; says how each ended, and how many blocks lie there then
ENDED = """
    import os, signal, sys
    from pathlib import Path
    import torch
    from optimum.commands.optimum_cli import main
    from optimum_dsa.checkpoint import finished_shards
    from optimum_dsa.common.output import OutputFolder
    from optimum_dsa.pruning import finished
    import optimum_dsa.pruner

    def end(number): os.kill(os.getpid(), number)

    def arm(kind, number):
        add, save = finished.FinishedBlocks.add, finished.write_tensors
        def then_end(self, block, *others):
            add(self, block, *others)
            if block == number:
                end(signal.SIGTERM if kind == "term" else signal.SIGKILL)
        def half(values, path, metadata):
            save(values, path, metadata)
            if f"{number:04}" in path.name:
                path.write_bytes(path.read_bytes()[:99])
                end(signal.SIGKILL)
        if kind in ("kill", "term"):
            finished.FinishedBlocks.add = then_end
        if kind == "half":
            finished.write_tensors = half
        if kind == "link":
            finished_shards._link = lambda *_: end(signal.SIGKILL)
        if kind == "swap":
            OutputFolder._swap = lambda *_: end(signal.SIGKILL)

    torch.set_num_threads(1)
    moments, out, arguments = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    sys.argv = ["optimum-cli", "dsa", *arguments, "-o", str(out.with_name("whole"))]
    main()
    for moment in moments.split(","):
        pid = os.fork()
        if not pid:
            kind, number = moment.split()
            arm(kind, int(number))
            sys.argv = ["optimum-cli", "dsa", *arguments, "-o", str(out), *["--resume"] * (moment != "kill 1")]
            main()
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print("ended", moment, ended, len(list(out.parent.glob(".*/blocks/block-*s"))), flush=True)
"""


@pytest.fixture
def command(text):
    return prune_of(text, "-s", "0.6", "--method", "sparsegpt", "--allocation", "dsa")


def prune_of(text, *options):
    return ["prune", str(demo_model()), *options, "--dataset", text, "--num-samples", "4", "--sequence-length", "32"]


def content(folder):
    """Every file by name, without what is of one run alone."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    described = json.loads(found["dsa_config.json"])
    for name in ("seconds", "checksum"):
        for part in (described, described.get("structured") or {}):
            part.pop(name, None)
    del found["dsa_manifest.json"]
    return found | {"dsa_config.json": described}


@pytest.mark.parametrize("what", ["weights", "weights on the disk", "structures"])
def test_a_command_that_is_ended_anywhere_goes_on_to_the_same_bytes(
    what, command, text, tmp_path, monkeypatch, capsys
):
    moments = {"kill 1": (-9, 2), "term 3": (143, 4), "half 6": (-9, 6), "swap 0": (-9, 10)}
    from_disk = what == "weights on the disk"
    if what == "structures":
        command = prune_of(text, "-s", "0.2", "--structures", "ffn,kv_group", "--layout", "per_layer")
    if from_disk:
        command = [*command, "--device-map", "disk", "--activations", "disk"]
        moments = {"kill 1": (-9, 2), "half 6": (-9, 6), "link 0": (-9, 10), "swap 0": (-9, 10)}
    arguments = [sys.executable, "-c", textwrap.dedent(ENDED), ",".join(moments), str(tmp_path / "out"), *command]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}  # it warns of forks otherwise
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    ends = [line for line in done.stdout.splitlines() if line.startswith("ended")]
    assert ends == [f"ended {moment} {code} {count}" for moment, (code, count) in moments.items()], done.stderr
    blocks = tmp_path / ".out.dsa-work" / "blocks"
    said = (
        ""
        if from_disk
        else f"prune: interrupted, 4 finished blocks are in {blocks}; the same command with --resume goes on"
    )
    assert from_disk or said in done.stderr
    assert (blocks / "block-0006.safetensors").exists()
    code, output, _ = run(monkeypatch, capsys, *command, "-o", str(tmp_path / "out"), "--resume")
    assert code == 0 and f"going on behind 10 finished blocks in {blocks}" in output
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}


def interrupted(count, error=KeyboardInterrupt):
    real = FinishedBlocks.add

    def add(self, number, *others):
        if number == count:
            raise error
        real(self, number, *others)

    return add


def test_an_interrupted_learner_says_where_its_state_is(text, tmp_path, monkeypatch, capsys):
    command = prune_of(text, "-s", "0.2", "--learner", "projected_gates", "--learn-steps", "12", "--update", "none")
    command += ["--structures", "ffn", "--checkpoints", str(tmp_path / "state"), "-o", str(tmp_path / "out")]

    def kept(*given):
        keep(*given)
        raise KeyboardInterrupt

    keep = learner._keep
    with monkeypatch.context() as patch:
        patch.setattr(learner, "_keep", kept)
        code, _, errors = run(patch, capsys, *command)
    place = tmp_path / "state" / "projected_gates.pt"
    assert code == 130 and f"what was learned is in {place}; the same command with --resume goes on" in errors
    assert run(monkeypatch, capsys, *command, "--resume")[0] == 0


def test_an_interrupted_command_says_how_to_go_on_and_is_not_replaced_unasked(command, tmp_path, monkeypatch, capsys):
    prune, blocks = [*command, "-o", str(tmp_path / "out")], tmp_path / ".out.dsa-work" / "blocks"
    with monkeypatch.context() as patch:
        patch.setattr(DSAPruner, "from_pretrained", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        code, _, errors = run(patch, capsys, *prune)
        assert code == 130 and "interrupted, nothing was written" in errors and not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(FinishedBlocks, "add", interrupted(2))
        code, _, errors = run(patch, capsys, *prune)
        assert code == 130 and f"2 finished blocks are in {blocks}; the same command with --resume goes on" in errors
    code, _, errors = run(monkeypatch, capsys, *prune)
    assert code == 2 and f"An interrupted run left blocks in {blocks.parent}; resume it, or remove" in errors
    code, _, errors = run(
        monkeypatch, capsys, *("wanda" if word == "sparsegpt" else word for word in prune), "--resume"
    )
    assert code == 2 and "was made with --method sparsegpt, not 'wanda'; resume it with the same settings" in errors
    code, _, errors = run(monkeypatch, capsys, *prune, "--resume", "--batch-size", "2")
    assert code == 0, errors
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_blocks_can_be_kept_elsewhere_and_stay_there(command, tmp_path, monkeypatch, capsys):
    prune, place = [*command, "-o", str(tmp_path / "out"), "--checkpoints", str(tmp_path / "b")], tmp_path / "b"
    assert run(monkeypatch, capsys, *prune)[0] == 0 and len(list(place.iterdir())) == 11
    (tmp_path / "b" / "block-0009.safetensors").unlink()
    code, _, errors = run(monkeypatch, capsys, *prune)
    assert code == 2 and "holds block-0000.safetensors of another run" in errors
    before = content(tmp_path / "out")
    assert run(monkeypatch, capsys, *prune, "--resume")[0] == 0
    assert content(tmp_path / "out") == before and len(list(place.iterdir())) == 11


def test_a_disk_with_room_for_the_result_alone_keeps_no_blocks(command, tmp_path, monkeypatch, capsys, caplog):
    caplog.set_level(logging.WARNING)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=6_000_000))  # and the weights have 4
    asked = []
    monkeypatch.setattr(FinishedBlocks, "add", lambda *_: asked.append(1))
    code, _, errors = run(monkeypatch, capsys, *command, "-o", str(tmp_path / "out"), "--resume")
    assert code == 2 and "bytes, and 6,000,000 are free there" in errors
    code, _, errors = run(monkeypatch, capsys, *command, "-o", str(tmp_path / "out"))
    assert code == 0 and not asked, errors
    assert "none for finished blocks beside it: this run cannot be resumed. --checkpoints FOLDER" in caplog.text
    # Of a model on the disk they are the result's shards.
    disk = ["--device-map", "disk", "-o", str(tmp_path / "from disk")]
    code, _, errors = run(monkeypatch, capsys, *command, *disk)
    assert code == 0 and len(asked) == 10, errors


def test_none_are_kept_where_none_are_wanted(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(FinishedBlocks, "open", lambda *_: pytest.fail("opened"))
    prune = [*command, "-o", str(tmp_path / "out"), "--no-checkpoints"]
    code, _, errors = run(monkeypatch, capsys, *prune, "--resume")
    assert code == 2 and "--no-checkpoints keeps none; leave one out" in errors
    assert run(monkeypatch, capsys, *prune)[0] == 0


def test_a_result_that_was_whole_needs_no_blocks_any_more(tmp_path):
    out = tmp_path / "out"
    with OutputFolder(out) as output:
        (output.scratch("blocks") / "block-0000.safetensors").write_text("1")
        output._remove = lambda folder: None  # as if it were killed between the result and what it was made from
        output.write(lambda folder: (folder / "config.json").write_text("1"))
    work = tmp_path / ".out.dsa-work"
    assert os.listdir(work / "blocks") == ["block-0000.safetensors"]
    os.rename(out, work / "result")
    with OutputFolder(out, resume=True) as output:
        assert os.listdir(output.scratch("blocks")) == ["block-0000.safetensors"]
    os.rename(out, work / "result")
    OutputFolder(out).begin().__exit__(None, None, None)
    assert os.listdir(tmp_path) == ["out"] and (out / "config.json").is_file()


def test_sigterm_is_ours_while_a_command_works_and_never_under_a_launcher(monkeypatch):
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with pytest.raises(Terminated), stoppable():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with stoppable():
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGTERM)
        assert os.waitpid(child, 0)[1] == signal.SIGTERM
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with stoppable():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_after_the_result_is_in_place_stops_nothing(monkeypatch, capsys, tmp_path):
    """What was written is whole, and what is left is to clear away and to say so."""
    work = ["prune", str(demo_model()), "-s", "0.5", "--method", "magnitude", "--allocation", "uniform", "--json"]
    remove, complete = OutputFolder._remove, OutputFolder._complete
    sent = []

    def and_end(folder):
        if folder.name.endswith("dsa-work") and (tmp_path / "out" / "config.json").exists():
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        remove(folder)

    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "_remove", staticmethod(and_end))
        code, output, errors = run(patch, capsys, *work, "-o", str(tmp_path / "out"))
    assert sent and code == 0 and json.loads(output)["output"] == str(tmp_path / "out"), errors
    assert os.listdir(tmp_path) == ["out"] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    def end_first(self, folder):
        complete(self, folder)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "_complete", end_first)
        code, output, errors = run(patch, capsys, *work, "-o", str(tmp_path / "other"))
    assert code == 143 and output == "" and "interrupted, " in errors and "is whole" not in errors


# the first that is registered is the last that is called: when all else has been shut down
LATE = """
    import atexit, os, signal, sys
    atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))
    from optimum_dsa.commands.stopping import stoppable
    with stoppable(lambda: sys.argv[1] == "whole"):
        pass
"""


@pytest.mark.parametrize("state,code", [("whole", 0), ("half", -signal.SIGTERM)])
def test_nor_does_one_while_the_process_ends(state, code):
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(LATE), state]).returncode == code
