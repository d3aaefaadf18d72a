"""Who chose the zeros, and what trained a model, stays known: after it was saved, loaded, and trained again."""

import json

import pytest

from optimum_dsa import DSAConfig, DSAPruner
from optimum_dsa.checkpoint.description import after
from optimum_dsa.commands.embedded import demo_model, demo_texts
from optimum_dsa.sharing.account import account
from optimum_dsa.sharing.outcome import Outcome

from ..test_commands import run
from ..tiny import tiny_llama
from .test_recover import regular, small


def content(folder):
    return json.loads((folder / "dsa_config.json").read_text())


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "pruned"])
def test_a_recovery_that_chose_the_zeros_is_who_chose_them(tmp_path, dense):
    pruner = DSAPruner(tiny_llama())
    if not dense:
        assert pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform")).chosen_by is None
        pruner.recover(regular(), small(steps=1))
        assert pruner.report.chosen_by is None  # its zeros are those that were there
    pruner.recover(regular(), small(method="elsa", **({"sparsity": 0.5} if dense else {})))
    assert "the zeros were chosen by elsa, while the model was trained" in str(pruner.report)
    pruner.save_pretrained(tmp_path / "elsa")
    again = DSAPruner.from_pretrained(tmp_path / "elsa")
    again.recover(regular(), small(steps=1))
    again.save_pretrained(tmp_path / "again")
    for folder in ("elsa", "again"):
        assert content(tmp_path / folder)["chosen_by"] == "elsa"
        found = DSAPruner.from_pretrained(tmp_path / folder).verify()
        assert found.holds and "that elsa chose the zeros while the model was trained" in found.unproven[0]
        assert "magnitude" not in str(found)
    again.prune(None, DSAConfig(0.7, "magnitude", "uniform"))
    assert again.report.chosen_by is None


def test_what_trained_a_model_is_saved_with_it_again_and_again(tmp_path):
    pruner = DSAPruner(tiny_llama())
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
    for number, steps in enumerate((1, 2, 3)):
        pruner.recover(regular(), small(method="full", steps=steps))
        pruner.save_pretrained(tmp_path / str(number))
        pruner = DSAPruner.from_pretrained(tmp_path / str(number))
    pruner.save_pretrained(tmp_path / "copy", compressed=True)
    kept, last = content(tmp_path / "copy")["recovery"], content(tmp_path / "2")["recovery"]
    assert kept == last and kept["steps"] == 3 and kept["history"]
    assert [(one["kind"], one["steps"], "history" in one) for one in kept["earlier"]] == [
        ("recover", 1, False), ("recover", 2, False)
    ]  # fmt: skip
    assert "earlier" not in content(tmp_path / "0")["recovery"]
    in_memory = DSAPruner(DSAPruner.from_pretrained(tmp_path / "0").model)
    in_memory.recover(regular(), small(method="full", steps=1))
    in_memory.save_pretrained(tmp_path / "memory")
    assert len(content(tmp_path / "memory")["recovery"]["earlier"]) == 1


def test_what_trained_a_model_before_it_is_pruned_again_stays_known(tmp_path):
    pruner = DSAPruner(tiny_llama())
    assert pruner.prune(None, DSAConfig(0.3, "magnitude", "uniform")).trained_before == ()
    for steps in (1, 2):
        pruner.recover(regular(), small(method="full", steps=steps))
    pruner.save_pretrained(tmp_path / "first")
    loaded, in_memory = (DSAPruner.from_pretrained(tmp_path / "first") for _ in range(2))
    for one in (pruner, loaded, DSAPruner(in_memory.model)):
        report = one.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
        assert [(known["steps"], "history" in known) for known in report.trained_before] == [(1, False), (2, False)]
        assert "the model was trained before it was pruned: full, full" in str(report)
    loaded.save_pretrained(tmp_path / "second")
    found = content(tmp_path / "second")
    assert "recovery" not in found and [one["steps"] for one in found["trained_before"]] == [1, 2]
    told = " ".join(account(Outcome.read(tmp_path / "second")))
    assert "Before it was pruned, the model was trained: 2 steps by recover with the method full." in told
    assert "not trained" not in told and "as they were" in told
    again = DSAPruner.from_pretrained(tmp_path / "second")
    again.recover(regular(), small(method="full", steps=3))
    again.prune(None, DSAConfig(0.6, "magnitude", "uniform"))
    assert [one["steps"] for one in again.report.trained_before] == [1, 2, 3] and again.verify().holds


def test_earlier_trainings_stand_in_one_list():
    one, two, three = ({"kind": "recover", "steps": steps, "history": [1]} for steps in (1, 2, 3))
    assert after(None, one) == one and after({}, one) == one
    found = after(after(one, two), three)
    assert found["steps"] == 3 and [part["steps"] for part in found["earlier"]] == [1, 2]
    assert all(part.keys() == {"kind", "steps"} for part in found["earlier"])


def test_verify_tells_who_chose_the_zeros_of_a_model_that_was_trained_sparse(monkeypatch, capsys, tmp_path):
    text = tmp_path / "train.txt"
    text.write_text("\n".join(demo_texts("calibration"))[:20_000])
    work = ["recover", str(demo_model()), "-o", str(tmp_path / "out"), "--dataset", str(text), "--method", "elsa"]
    work += ["-s", "0.6", "--steps", "1", "--batch-size", "1", "--sequence-length", "16", "--validation-windows", "1"]
    assert run(monkeypatch, capsys, *work)[0] == 0
    code, output, _ = run(monkeypatch, capsys, "verify", str(tmp_path / "out"))
    assert code == 0 and "not proven: that elsa chose the zeros" in output and "magnitude" not in output
