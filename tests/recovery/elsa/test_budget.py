"""The budget is the pruned model's own, or what is asked for a dense one; anything unclear is refused."""

import re

import pytest

from optimum_dsa import Allocation, DSAConfig, DSAPruner, RecoveryConfig
from optimum_dsa.recovery.elsa.budget import counts_of, with_budget

from ...test_commands import run
from ...tiny import tiny_llama, tokens
from ..test_recover import regular, small


def dense_report(model):
    from optimum_dsa.checkpoint.origin import report_of

    return report_of(model)


@pytest.mark.parametrize("config", [DSAConfig(0.7, "wanda", "owl"), DSAConfig(0.6, "magnitude", granularity="matrix")])
def test_the_counts_of_a_pruned_model_are_its_zeros(config):
    pruner = DSAPruner.from_pretrained(tiny_llama())
    pruner.prune(tokens(), config)
    counts, pattern = counts_of(pruner.model, pruner.report)
    assert pattern == config.resolved.pattern
    assert {weight: int((weight.tensor(pruner.model) == 0).sum()) for weight in counts} == counts


def test_a_block_that_loses_nothing_is_left_alone(tmp_path):
    model = tiny_llama()
    sizes = dense_report(model).allocation.sizes
    first, *rest = sizes
    shares = {first: 0.0, **dict.fromkeys(rest, 0.5)}
    Allocation(shares, sizes).save(tmp_path / "allocation.json")
    mean = sum(shares[unit] * size for unit, size in sizes.items()) / sum(sizes.values())
    asked = small(method="elsa", sparsity=mean, allocation=str(tmp_path / "allocation.json"))
    counts = counts_of(model, with_budget(model, dense_report(model), asked))[0]
    assert len(counts) == 14 and not any(weight.name.startswith(first) for weight in counts)


def test_a_budget_without_zeros_is_refused(monkeypatch, capsys, tmp_path):
    with pytest.raises(ValueError, match=r"sparsity=0 is a budget without zeros, .* give a share in \(0, 1\)"):
        RecoveryConfig("elsa", sparsity=0)
    pruner = DSAPruner(tiny_llama())
    with pytest.raises(ValueError, match="A budget of 1e-06 leaves all 23,040 prunable weights"):
        pruner.recover(regular(), small(method="elsa", sparsity=1e-6))
    pruner.prune(None, DSAConfig(0.0, "magnitude", "uniform"))
    with pytest.raises(ValueError, match="A budget of 0 leaves all"):
        pruner.recover(regular(), small(method="elsa"))
    (tmp_path / "text.txt").write_text("some words")
    data = ["-o", str(tmp_path / "out"), "--dataset", str(tmp_path / "text.txt")]
    code, output, errors = run(monkeypatch, capsys, "recover", "none", *data, "--method", "elsa", "-s", "0")
    assert (code, output, len(errors.splitlines())) == (
        2,
        "",
        1,
    ) and "--sparsity 0 is a budget without zeros" in errors


@pytest.mark.parametrize(
    "changes,words",
    [
        ({}, "is dense, and no budget was given; say sparsity=0.8"),
        ({"sparsity": 0.7, "pattern": "2:4"}, "Pattern 2:4 removes 0.5 of every matrix"),
        ({"sparsity": 0.7, "allocation": "owl"}, "allocation='owl' is computed from data"),
    ],
)
def test_a_dense_model_needs_a_budget_that_can_be_met(changes, words):
    pruner = DSAPruner.from_pretrained(tiny_llama())
    with pytest.raises(ValueError, match=re.escape(words)):
        pruner.recover(regular(), small(method="elsa", **changes))


def test_a_pruned_model_has_its_budget():
    pruner = DSAPruner.from_pretrained(tiny_llama())
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
    with pytest.raises(ValueError, match=r"sparsity=0.8 is for a dense model, and this one was pruned to 0.5000"):
        pruner.recover(regular(), small(method="elsa", sparsity=0.8))


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"method": "full", "sparsity": 0.5}, "sparsity=0.5 is for methods that choose zeros (elsa)"),
        ({"method": "elsa", "patience": 2}, "patience=2 would bring back an earlier model"),
        ({"penalty": 0.0}, "penalty is a number, in [0.0001, 1], got 0.0"),
        ({"sparsity": 1.0}, "sparsity is the share of weights to remove, in [0, 1), got 1.0"),
        ({"shape": "cubik"}, "Did you mean 'cubic'?"),
        ({"project_every": 0}, "project_every is a whole number of at least 1, got 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, words):
    with pytest.raises((ValueError, KeyError), match=re.escape(words)):
        RecoveryConfig(**changes)


def test_frozen_weights_and_foreign_budgets_are_refused():
    pruner = DSAPruner.from_pretrained(tiny_llama())
    report = pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
    with pytest.raises(ValueError, match=r"The budget says nothing of .*layers\.3"):
        counts_of(tiny_llama(num_hidden_layers=4), report)
    pruner.model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj.weight is frozen"):
        counts_of(pruner.model, report)


@pytest.mark.parametrize("changes", [{"allocation": "er"}, {"pattern": "2:4"}])
def test_a_pruned_model_has_its_allocation_and_its_pattern_too(changes):
    pruner = DSAPruner.from_pretrained(tiny_llama())
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name}=.* is for a dense model, and this one was pruned to 0.5000"):
        pruner.recover(regular(), small(method="elsa", **changes))
