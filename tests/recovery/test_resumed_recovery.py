"""A recovery that goes on: to the end of an uninterrupted one, and only as what it was."""

import shutil
from dataclasses import replace

import pytest
import torch

from optimum_dsa import DSAPruner
from optimum_dsa.recovery.checkpoints import RUN
from optimum_dsa.recovery.trainer import RecoveryTrainer

from ..tiny import same_state, state
from .adapters.test_peft_method import sparse_llama
from .test_recover import regular, small


@pytest.mark.parametrize("method", ["sparse-lora", "full"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path, method):
    config = small(method=method, save_steps=3)
    whole = DSAPruner.from_pretrained(sparse_llama(sparsity=0.6))
    whole.recover(regular(), config, checkpoints=tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "cut" / "checkpoint-3")
    shutil.copy(tmp_path / "whole" / RUN, tmp_path / "cut")
    resumed = DSAPruner.from_pretrained(sparse_llama(sparsity=0.6))
    result = resumed.recover(regular(), config, checkpoints=tmp_path / "cut", resume=True)
    assert [entry["step"] for entry in result.history if "eval_loss" in entry] == [3, 6]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_resumed_run_trains_only_what_is_left_and_another_does_not_replace_it(tmp_path, monkeypatch):
    config = small(save_steps=3)
    first = DSAPruner.from_pretrained(sparse_llama(sparsity=0.6))
    first.recover(regular(), config, checkpoints=tmp_path / "kept")
    shutil.rmtree(tmp_path / "kept" / "checkpoint-6")
    done, step = [], RecoveryTrainer.training_step
    monkeypatch.setattr(
        RecoveryTrainer, "training_step", lambda self, *args, **kwargs: done.append(1) or step(self, *args, **kwargs)
    )
    again = DSAPruner.from_pretrained(sparse_llama(sparsity=0.6))
    with pytest.raises(FileExistsError, match="holds checkpoint-3 of another run"):
        again.recover(regular(), config, checkpoints=tmp_path / "kept")
    result = again.recover(regular(), config, checkpoints=tmp_path / "kept", resume=True)
    assert (len(done), result.steps) == (3, 6)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"config": {"learning_rate": 1e-3}}, "made with learning_rate=None, not 0.001"),
        ({"config": {"mode": "scale"}}, "made with mode='mask', not 'scale'"),
        ({"sparsity": 0.5}, "made with budget.model.layers.0="),
        ({"seed": 1}, "another model"),
        ({"text": 1}, "another text"),
    ],
)
def test_a_run_goes_on_as_what_it_was_alone(changes, message, tmp_path):
    config = small(save_steps=3)
    DSAPruner.from_pretrained(sparse_llama(sparsity=0.6)).recover(regular(), config, checkpoints=tmp_path)
    pruner = DSAPruner.from_pretrained(sparse_llama(sparsity=changes.get("sparsity", 0.6)))
    if "seed" in changes:
        pruner.model.lm_head.weight.data[0, 0] += 1
    before = state(pruner.model)
    text = regular().roll(changes.get("text", 0), 1)
    with pytest.raises(ValueError, match=message):
        pruner.recover(text, replace(config, **changes.get("config", {})), checkpoints=tmp_path, resume=True)
    assert same_state(pruner.model, before) and (tmp_path / "checkpoint-6").is_dir()


def test_checkpoints_that_say_nothing_of_their_run_are_refused(tmp_path):
    config = small(save_steps=3)
    DSAPruner.from_pretrained(sparse_llama(sparsity=0.6)).recover(regular(), config, checkpoints=tmp_path)
    (tmp_path / RUN).unlink()
    with pytest.raises(ValueError, match="does not say with what its checkpoints were made"):
        pruner = DSAPruner.from_pretrained(sparse_llama(sparsity=0.6))
        pruner.recover(regular(), config, checkpoints=tmp_path, resume=True)


def test_a_run_without_checkpoints_yet_begins_at_the_first_step(tmp_path, caplog):
    pruner = DSAPruner.from_pretrained(sparse_llama(sparsity=0.6))
    assert pruner.recover(regular(), small(), checkpoints=tmp_path / "none", resume=True).steps == 6
    assert "holds no whole checkpoint; training begins at the first step" in caplog.text


def empty(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def without_state(checkpoint):
    (checkpoint / "trainer_state.json").unlink()


def cut_state(checkpoint):
    (checkpoint / "trainer_state.json").write_text((checkpoint / "trainer_state.json").read_text()[:100])


def cut_weights(checkpoint):
    (weights,) = checkpoint.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])


@pytest.mark.parametrize("method", ["sparse-lora", "full"])
@pytest.mark.parametrize("damage", [empty, without_state, cut_state, cut_weights])
def test_a_run_goes_on_from_the_last_whole_checkpoint(tmp_path, damage, method, caplog):
    config = small(save_steps=2, method=method)
    whole = DSAPruner.from_pretrained(sparse_llama(sparsity=0.6))
    whole.recover(regular(), config, checkpoints=tmp_path / "kept")
    damage(tmp_path / "kept" / "checkpoint-6")  # as if it had been interrupted there
    resumed = DSAPruner.from_pretrained(sparse_llama(sparsity=0.6))
    assert resumed.recover(regular(), config, checkpoints=tmp_path / "kept", resume=True).steps == 6
    assert "checkpoint-6 was not written to its end; it is passed over" in caplog.text
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
