"""Training under a budget ends with exactly its zeros, wherever they were, and a run that was cut ends alike."""

import json
import shutil

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from optimum_dsa import DSAConfig, DSAPruner, find_architecture, perplexity
from optimum_dsa.checkpoint.origin import report_of
from optimum_dsa.recovery.checkpoints import RUN
from optimum_dsa.recovery.elsa.budget import with_budget
from optimum_dsa.recovery.elsa.callback import ElsaCallback
from optimum_dsa.recovery.elsa.split import FILE, SplitWeights
from optimum_dsa.recovery.recover import make_trainer

from ...tiny import tiny_llama
from ..adapters.test_peft_method import same_zeros, sparse_llama, zeros
from ..test_recover import regular, small


pytestmark = pytest.mark.contract


def asked(**changes):
    return small(**{"method": "elsa", "steps": 12, "learning_rate": 0.01, "project_every": 2, **changes})


def trained(model, config, **given):
    pruner = DSAPruner.from_pretrained(model)
    return pruner, pruner.recover(regular(), config, **given)


@pytest.mark.parametrize(
    "changes",
    [
        {"sparsity": 0.8},
        {"sparsity": 0.7, "pattern": "row", "growth": 0.0, "accumulation": 2},
        {"sparsity": 0.5, "pattern": "2:4", "bf16": True, "gradient_checkpointing": True},
        {"sparsity": 0.6, "allocation": "er", "project_every": 5, "shape": "linear"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_a_dense_model_ends_with_the_budget(changes):
    pruner, result = trained(tiny_llama(), asked(**changes))
    assert pruner.verify().holds and result.after < 0.6 * result.before
    report = pruner.report
    assert report.sparsity == pytest.approx(changes["sparsity"], abs=1e-4)
    assert report.allocation.counts() == {
        unit: round(report.achieved[unit] * size) for unit, size in report.allocation.sizes.items()
    }


@pytest.mark.parametrize("config", [DSAConfig(0.7, "wanda", "owl"), DSAConfig(0.5, "wanda", "uniform", pattern="2:4")])
def test_a_pruned_model_keeps_its_budget_and_its_zeros_move(config):
    pruner = DSAPruner.from_pretrained(tiny_llama())
    before, first = pruner.prune(regular(), config), zeros(pruner.model)
    pruner.recover(regular(), asked(learning_rate=0.02))
    assert pruner.verify().holds and pruner.report.achieved == before.achieved
    assert not same_zeros(pruner.model, first)


def test_a_sparse_model_from_elsewhere_keeps_the_number_of_its_zeros():
    model = sparse_llama(sparsity=0.6)
    before = {name: int(zero.sum()) for name, zero in zeros(model).items()}
    pruner, _ = trained(model, asked())
    assert sum(int(zero.sum()) for zero in zeros(pruner.model).values()) == sum(before.values())


def test_the_weights_come_to_the_sparse_ones():
    pruner, result = trained(tiny_llama(), asked(sparsity=0.8, steps=60, learning_rate=0.01, eval_steps=10))
    residuals = [entry["residual"] for entry in result.history if "residual" in entry]
    assert residuals[-1] < 0.1 * max(residuals) > 0


def test_without_zeros_it_is_plain_training(tmp_path):
    plain, model = tiny_llama(), tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.data[:5, :10] = 0
    plain.load_state_dict(model.state_dict())
    for one, callbacks in ((model, [ElsaCallback(report_of(tiny_llama()), every=2)]), (plain, [])):
        trainer = make_trainer(one, regular()[:-8], regular()[-8:], asked(), None, tmp_path)
        for callback in callbacks:
            callback.attach(trainer)
        trainer.train()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    assert not torch.equal(model.model.norm.weight, tiny_llama().model.norm.weight)


def test_the_validation_loss_is_that_of_the_sparse_model_and_the_last_one_of_the_result():
    pruner, result = trained(tiny_llama(), asked(sparsity=0.9, eval_steps=6))
    last = [entry["eval_loss"] for entry in result.history if "eval_loss" in entry][-1]
    assert torch.tensor(last).exp().item() == pytest.approx(result.after, rel=1e-4)


def test_an_evaluation_on_the_way_changes_nothing():
    often, seldom = (trained(tiny_llama(), asked(sparsity=0.8, eval_steps=steps))[0].model for steps in (1, 12))
    assert all(torch.equal(value, seldom.state_dict()[name]) for name, value in often.state_dict().items())


@pytest.mark.parametrize("every,cut", [(3, 6), (4, 6), (4, 12)])  # at a projection, between two, and at the end
def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path, every, cut):
    config = asked(sparsity=0.8, save_steps=6, project_every=every, accumulation=2)
    whole, _ = trained(tiny_llama(), config, checkpoints=tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{cut}", tmp_path / "cut" / f"checkpoint-{cut}")
    shutil.copy(tmp_path / "whole" / RUN, tmp_path / "cut")
    resumed, _ = trained(tiny_llama(), config, checkpoints=tmp_path / "cut", resume=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_checkpoint_without_the_duals_is_passed_over(tmp_path, caplog):
    config = asked(sparsity=0.8, save_steps=6)
    trained(tiny_llama(), config, checkpoints=tmp_path)
    (tmp_path / "checkpoint-12" / FILE).unlink()
    assert trained(tiny_llama(), config, checkpoints=tmp_path, resume=True)[1].steps == 12
    assert "checkpoint-12 was not written to its end" in caplog.text


def own_trainer(model, folder, sparsity=0.8, **arguments):
    """A Trainer of a user's own, with the callback."""
    report = with_budget(model, report_of(model), asked(sparsity=sparsity))
    defaults = {
        "max_steps": 12, "learning_rate": 0.01, "per_device_train_batch_size": 4, "report_to": "none",
        "use_cpu": True, "save_strategy": "no", "logging_steps": 4,
    }  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in regular()]
    trainer = Trainer(model, TrainingArguments(str(folder), **{**defaults, **arguments}), train_dataset=data)
    ElsaCallback(report).attach(trainer)
    return trainer, report


def test_any_trainer_ends_with_the_budget_also_when_it_is_stopped(tmp_path):
    for stop in (None, 7):
        model = tiny_llama()
        trainer, report = own_trainer(model, tmp_path)
        if stop:
            trainer.add_callback(StopAt(stop))
        trainer.train()
        found = dict.fromkeys(report.allocation.sizes, 0)
        for unit, weights in find_architecture(model).units("block").items():
            found[unit] = sum(int((weight.tensor(model) == 0).sum()) for weight in weights)
        assert found == report.allocation.counts() and trainer.state.global_step == (stop or 12)


def test_zeros_are_chosen_by_the_optimizers_second_moments(tmp_path, monkeypatch):
    given, project = [], SplitWeights.project
    monkeypatch.setattr(
        SplitWeights, "project", lambda self, moments, share: given.append(moments) or project(self, moments, share)
    )
    model = tiny_llama()
    own_trainer(model, tmp_path)[0].train()
    wanted = {weight.parameter(model) for weight in find_architecture(model).weights}
    assert given and all(wanted <= moments.keys() for moments in given)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize(
    "arguments,words",
    [
        (
            {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"},
            "load_best_model_at_end",
        ),
    ],
)
def test_what_would_end_without_the_budget_is_refused(tmp_path, arguments, words):
    trainer, _ = own_trainer(tiny_llama(), tmp_path)
    for name, value in arguments.items():
        setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=words):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


@pytest.mark.parametrize("penalty", [0, -1, float("nan")])
def test_no_penalty_leads_nowhere(penalty):
    with pytest.raises(ValueError, match=r"penalty is a number in \(0, 1\]"):
        ElsaCallback(None, penalty)


def test_tied_weights_and_bfloat16():
    model = tiny_llama(tie_word_embeddings=True)
    pruner = DSAPruner.from_pretrained(model.to(torch.bfloat16))
    pruner.prune(None, DSAConfig(0.6, "magnitude", "uniform", include=["lm_head", "embed_tokens"]))
    pruner.recover(regular(), asked(distillation=0.5), teacher=tiny_llama())
    assert pruner.verify().holds and {p.dtype for p in pruner.model.parameters()} == {torch.bfloat16}
    assert pruner.model.lm_head.weight is pruner.model.get_input_embeddings().weight


def test_the_saved_model_says_what_was_done(tmp_path):
    pruner, _ = trained(tiny_llama(), asked(sparsity=0.8))
    pruner.save_pretrained(tmp_path / "out")
    again = DSAPruner.from_pretrained(tmp_path / "out")
    described = json.loads((tmp_path / "out" / "dsa_config.json").read_text())
    assert again.verify().holds and described["recovery"]["config"]["method"] == "elsa"
    assert described["recovery"]["config"]["penalty"] == asked().penalty
    assert perplexity(again.model, regular(8)) == pytest.approx(perplexity(pruner.model, regular(8)))
