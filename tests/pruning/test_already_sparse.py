"""A model that is sparse already, whoever pruned it: no zero is given back, and they count."""

import logging

import pytest
import torch
from transformers import Trainer, TrainingArguments

from optimum_dsa import (
    ALLOCATIONS,
    METHODS,
    UPDATES,
    Allocation,
    DSACallback,
    DSAConfig,
    DSAPruner,
    PruningSchedule,
    RecoveryConfig,
    UpdateConfig,
    find_architecture,
    prune,
)
from optimum_dsa.checkpoint.verify import verify
from optimum_dsa.pruning.allocate import allocate

from ..tiny import tiny_llama, tokens


def weights(model, **names):
    return {weight.name: weight.tensor(model) for weight in find_architecture(model, **names).weights}


def zeros(model):
    return {name: value == 0 for name, value in weights(model).items()}


def sparse(sparsity=0.5, pattern=None, model=None):
    """A model that somebody else has pruned: by size over whole matrices, so that rows and columns differ."""
    model = model or tiny_llama()
    prune(model, None, DSAConfig(sparsity, "magnitude", "uniform", pattern=pattern))
    return model


def all_stay(model, before):
    return all(bool(zeros(model)[name][gone].all()) for name, gone in before.items())


def in_groups(model, kept, width):
    return all(
        bool(((value != 0).unflatten(1, (-1, width)).sum(2) <= kept).all()) for value in weights(model).values()
    )


@pytest.mark.parametrize(
    "method,pattern",
    [*((method, None) for method in sorted(METHODS)), ("sparsegpt", "row"), ("alps", "group:16"), ("ria", "group:16")],
)
def test_from_half_to_seventy_per_cent(method, pattern):
    model = sparse(0.5)
    before, total = zeros(model), sum(value.numel() for value in weights(model).values())
    report = prune(model, tokens(), DSAConfig(0.7, method, "owl", pattern=pattern))
    assert all_stay(model, before)
    assert report.removed == round(0.7 * total) == sum(int(gone.sum()) for gone in zeros(model).values())
    assert verify(model, report).holds, verify(model, report)
    assert sum(report.zeros_before.values()) == round(0.5 * total) and "were zero before, and stayed so" in str(report)


@pytest.mark.parametrize("allocation", sorted(ALLOCATIONS))
@pytest.mark.parametrize("granularity", ["block", "matrix"])
def test_no_allocation_asks_for_less_than_a_unit_has(allocation, granularity):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
        model.model.layers[2].self_attn.q_proj.weight[::2] = 0
    before = zeros(model)
    report = prune(model, tokens(), DSAConfig(0.5, "wanda", allocation, granularity=granularity))
    total = sum(gone.numel() for gone in before.values())
    assert all_stay(model, before) and report.removed == round(0.5 * total)
    assert verify(model, report).holds, verify(model, report)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_two_of_four_first_and_seventy_per_cent_after_keeps_both(method):
    model = sparse(0.5, "2:4")
    before = zeros(model)
    report = prune(model, tokens(), DSAConfig(0.7, method, "uniform"))
    assert all_stay(model, before) and in_groups(model, 2, 4) and report.sparsity == pytest.approx(0.7, abs=1e-4)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_seventy_per_cent_first_and_two_of_four_after_gives_none_back(method, caplog):
    model = sparse(0.7)
    before = zeros(model)
    with caplog.at_level(logging.WARNING, "optimum_dsa"):
        report = prune(model, tokens(), DSAConfig(0.5, method, "uniform", pattern="2:4"))
    assert all_stay(model, before) and in_groups(model, 2, 4)
    assert report.sparsity > 0.7 and "more than asked are zero" in caplog.text
    assert verify(model, report).holds, verify(model, report)


@pytest.mark.parametrize("settings", [{"pattern": "mixed:8"}, {"pattern": "1:4", "sparsity": 0.75}])
def test_other_patterns_in_groups_give_none_back(settings):
    model = sparse(0.5, "2:4")
    before = zeros(model)
    prune(model, tokens(), DSAConfig(**{"sparsity": 0.7, "method": "sparsegpt", "allocation": "uniform", **settings}))
    assert all_stay(model, before)


def test_less_than_is_there_is_refused_before_anything_is_changed():
    model = sparse(0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for method in ("magnitude", "sparsegpt"):
        with pytest.raises(ValueError, match=r"zero already \(0.5000\), and a sparsity of 0.3.*0.5 or more"):
            prune(model, tokens(), DSAConfig(0.3, method, "uniform"))
    with pytest.raises(ValueError, match="zero already"):
        allocate(model, tokens(), DSAConfig(0.3))
    with pytest.raises(ValueError, match="pruned already"):
        DSAPruner(model).search(tokens(8), DSAConfig(0.3), budget="10 evaluations", validation=tokens(4, seed=5))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert prune(model, tokens(), DSAConfig(0.5, "wanda")).sparsity == 0.5  # what is there is enough


@pytest.mark.parametrize("settings", [{"sparsity": 0.5, "pattern": "2:4"}, {"sparsity": 0.75, "pattern": "group:8"}])
def test_revive_gives_weights_back(settings):
    model = sparse(0.7)
    before = zeros(model)
    report = prune(model, tokens(), DSAConfig(method="sparsegpt", allocation="uniform", revive=True, **settings))
    assert not all_stay(model, before) and not report.zeros_before and verify(model, report).holds


@pytest.mark.parametrize("method", ["wanda", "wanda+swap", "wanda+dsnot"])
def test_revive_is_refused_where_no_weight_changes(method):
    with pytest.raises(ValueError, match="revive=True lets an update"):
        DSAConfig(0.7, method, revive=True)


def test_an_update_that_knows_nothing_of_older_zeros_gives_none_back():
    UPDATES.add("shaken", lambda weight, statistics, choice: (weight + 0.1).masked_fill(~choice.keep, 0))
    try:
        model = sparse(0.5)
        before = zeros(model)
        assert prune(model, tokens(), DSAConfig(0.6, update="shaken")).sparsity == pytest.approx(0.6, abs=1e-4)
        assert all_stay(model, before)
    finally:
        del UPDATES["shaken"]


@pytest.mark.parametrize("update", ["sparsegpt", "refit", "swap", "dsnot", "admm"])
@pytest.mark.parametrize("pattern", ["row", "2:4"])
def test_the_dense_models_targets_bring_none_back(update, pattern):
    model = sparse(0.6)
    before = zeros(model)
    how = {"targets": "dense", "residual": True} if UPDATES.fact(update, "reads") == "gram" else {}
    sparsity = 0.5 if pattern == "2:4" else 0.7
    prune(
        model, tokens(), DSAConfig(sparsity, "wanda", "uniform", pattern=pattern, update=UpdateConfig(update, **how))
    )
    assert all_stay(model, before)


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "deepseek_v3", "bert"])
def test_every_family_keeps_its_zeros(family, tiny, inputs):
    model = sparse(0.5, model=tiny(family))
    before = zeros(model)
    report = prune(model, inputs(family), DSAConfig(0.6, "sparsegpt", "uniform"))
    assert all_stay(model, before) and report.sparsity == pytest.approx(0.6, abs=1e-4)


def test_training_of_blocks_brings_none_back():
    model = sparse(0.5)
    before = zeros(model)
    prune(model, tokens(), DSAConfig(0.6, "sparsegpt", "uniform", reconstruct=8))
    assert all_stay(model, before)


def test_an_allocation_that_asks_for_less_than_a_unit_has_is_met_elsewhere_and_said(caplog):
    model = tiny_llama()
    for module in model.model.layers[0].modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data[:, ::2] = 0
    before = zeros(model)
    given = {"model.layers.0": 0.3, "model.layers.1": 0.6, "model.layers.2": 0.6}
    sizes = dict.fromkeys(given, 7680)
    with caplog.at_level(logging.WARNING, "optimum_dsa"):
        report = prune(model, tokens(), DSAConfig(0.5, allocation=Allocation(given, sizes)))
    assert all_stay(model, before) and report.sparsity == 0.5 and report.achieved["model.layers.0"] == 0.5
    assert "less than is zero already in 1 of 3 units, such as model.layers.0" in caplog.text


def test_the_callback_brings_none_back(tmp_path):
    data = [{"input_ids": row, "labels": row} for row in tokens(8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=2, use_cpu=True, report_to="none", save_strategy="no"
    )
    for schedule in (PruningSchedule(), PruningSchedule(start=0, end=4, every=2)):
        model = sparse(0.5)
        before = zeros(model)
        trainer = Trainer(model, arguments, train_dataset=data)
        callback = DSACallback(DSAConfig(0.7, "sparsegpt", "uniform"), tokens(), schedule).attach(trainer)
        trainer.train()
        assert all_stay(model, before) and callback.report.sparsity == pytest.approx(0.7, abs=1e-4)
    trainer = Trainer(model, arguments, train_dataset=data)
    DSACallback(DSAConfig(0.3, "sparsegpt", "uniform"), tokens(), PruningSchedule(end=4, every=2)).attach(trainer)
    with pytest.raises(ValueError, match="zero already"):
        trainer.train()


@pytest.mark.parametrize("method", ["full", "sparse-lora"])
def test_recovery_brings_none_back_of_what_the_last_prune_left_out_either(method):
    pruner = DSAPruner(sparse(0.5))
    before = zeros(pruner.model)
    pruner.prune(tokens(), DSAConfig(0.7, "wanda", "uniform", exclude=("q_proj",)))
    pruner.recover(tokens(24), RecoveryConfig(method, steps=4, learning_rate=1e-2, validation_windows=4))
    assert all_stay(pruner.model, before) and pruner.verify().holds


def test_a_block_that_holds_all_zeros_of_the_budget_is_no_obstacle():
    model = tiny_llama()
    for module in model.model.layers[0].modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data.zero_()
    report = prune(model, tokens(), DSAConfig(0.34, "wanda", "dsa", max_sparsity=0.6))
    assert report.achieved["model.layers.0"] == 1 and report.sparsity == pytest.approx(0.34, abs=1e-4)
    with pytest.raises(ValueError, match="zeros that some units have already, and min_sparsity"):
        prune(model, tokens(), DSAConfig(0.5, "wanda", "dsa", min_sparsity=0.4))


def test_verify_says_which_zeros_were_given_back():
    pruner = DSAPruner(sparse(0.5))
    pruner.prune(tokens(), DSAConfig(0.6, "wanda", "uniform"))
    weight = pruner.model.model.layers[1].self_attn.k_proj.weight
    weight.data[weight == 0] = 1.0
    assert any("k_proj.weight has 0 zeros, and had" in problem for problem in pruner.verify().problems)


def test_older_zeros_are_in_the_file_and_a_resumed_prune_has_them(tmp_path):
    pruner = DSAPruner(sparse(0.5))
    report = pruner.prune(tokens(), DSAConfig(0.6, "wanda", "uniform"), checkpoints=tmp_path / "blocks")
    pruner.save_pretrained(tmp_path / "pruned")
    again = DSAPruner.from_pretrained(tmp_path / "pruned")
    assert again.report.zeros_before == report.zeros_before and again.verify().holds
    (tmp_path / "blocks" / "block-0002.safetensors").unlink()
    other = DSAPruner(sparse(0.5))
    found = other.prune(tokens(), DSAConfig(0.6, "wanda", "uniform"), checkpoints=tmp_path / "blocks", resume=True)
    assert found.zeros_before == report.zeros_before and other.verify().holds
    assert all(torch.equal(weights(other.model)[name], value) for name, value in weights(again.model).items())
