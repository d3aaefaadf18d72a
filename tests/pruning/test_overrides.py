"""Sparsities that are given for some matrices: they are met, and the others make the mean."""

import json

import pytest
import torch

from optimum_dsa import ALLOCATIONS, DSAConfig, DSAPruner, allocate, find_architecture, prune, verify

from ..test_commands import run
from ..tiny import tiny_llama, tokens


def weights(model):
    return {weight.name: weight.tensor(model) for weight in find_architecture(model).weights}


def share(tensor):
    return float((tensor == 0).float().mean())


@pytest.mark.parametrize("allocation", sorted(ALLOCATIONS))
def test_given_ones_are_met_and_the_rest_is_found(allocation):
    model = tiny_llama()
    config = DSAConfig(0.5, "wanda", allocation, overrides=("mlp=0.6", "q_proj=0.4", "layers.1.mlp.down_proj=0.25"))
    report = prune(model, tokens(), config)
    found = weights(model)
    for name, tensor in found.items():
        if "layers.1.mlp.down_proj" in name:
            assert share(tensor) == 0.25  # of several the last
        elif "mlp" in name or "q_proj" in name:
            assert share(tensor) == pytest.approx(0.6 if "mlp" in name else 0.4, abs=1e-3)
    assert report.removed == round(0.5 * sum(tensor.numel() for tensor in found.values()))
    assert verify(model, report).holds and report.config == config


def test_the_rest_is_what_the_allocation_makes_of_it_alone():
    config = DSAConfig(0.5, "wanda", "owl", overrides=("mlp=0.5",))
    given = allocate(tiny_llama(num_hidden_layers=4), tokens(), config)
    alone = allocate(tiny_llama(num_hidden_layers=4), tokens(), DSAConfig(0.5, "wanda", "owl", exclude=("mlp",)))
    for unit, value in alone.sparsity.items():
        inside = [name for name in given.sparsity if name.startswith(f"{unit}.self_attn")]
        size = sum(given.sizes[name] for name in inside)
        assert sum(given.counts()[name] for name in inside) / size == pytest.approx(value, abs=1e-3)


@pytest.mark.parametrize("granularity", ["matrix", "block:kind"])
@pytest.mark.parametrize("method,pattern", [("sparsegpt", "mixed:8"), ("alps", "matrix")])
def test_any_method_follows(granularity, method, pattern):
    model = tiny_llama()
    config = DSAConfig(
        0.5, method, "owl", pattern=pattern, granularity=granularity, overrides=("*.o_proj.weight=0.25",)
    )
    report = prune(model, tokens(), config)
    assert all(share(tensor) == 0.25 for name, tensor in weights(model).items() if "o_proj" in name)
    assert report.sparsity == pytest.approx(0.5, abs=0.01) and verify(model, report).holds


def test_all_matrices_may_be_given():
    model = tiny_llama()
    mlp, attention = (sum(t.numel() for n, t in weights(model).items() if kind in n) for kind in ("mlp", "self_attn"))
    mean = (0.75 * mlp + 0.25 * attention) / (mlp + attention)
    report = prune(model, None, DSAConfig(mean, "magnitude", "uniform", overrides=("mlp=0.75", "self_attn=0.25")))
    assert report.sparsity == pytest.approx(mean, abs=1e-4) and verify(model, report).holds
    with pytest.raises(ValueError, match="nothing else is left"):
        prune(model, None, DSAConfig(0.9, "magnitude", "uniform", overrides=("mlp=0.95", "self_attn=0.75")))


def test_experts_are_named_like_others(tiny):
    model = tiny("mixtral")
    prune(model, None, DSAConfig(0.5, "magnitude", "uniform", overrides=("experts=0.55", "q_proj=0")))
    assert not any((tensor == 0).any() for name, tensor in weights(model).items() if "q_proj" in name)
    assert all(share(t) == pytest.approx(0.55, abs=1e-3) for name, t in weights(model).items() if "experts" in name)


@pytest.mark.parametrize(
    "settings,said",
    [
        ({"overrides": ("mlp",)}, "cannot read 'mlp'"),
        ({"overrides": ("mlp=1.5",)}, "cannot read 'mlp=1.5'"),
        ({"overrides": ("mlp=0.5", "mlp=0.6")}, "given twice, 0.5 and 0.6"),
        ({"overrides": ("mlp=0.5",), "pattern": "2:4", "allocation": "uniform"}, "whatever overrides say"),
        ({"overrides": ("mlp=0.6",), "pattern": "mixed:8"}, "use 0.625"),
        ({"overrides": ("mlp=0.6",), "allocation": "auto"}, "that is computed"),
        ({"overrides": ("mlp=0.8",), "max_sparsity": 0.7}, r"mlp=0.8 is not in \[0, 0.7\]"),
        ({"overrides": ("mlp=0.1",), "min_sparsity": 0.2}, r"mlp=0.1 is not in \[0.2, 1\]"),
    ],
)
def test_what_cannot_be_read_or_followed_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        DSAConfig(0.5, **settings)


def test_what_does_not_fit_the_model_is_refused_before_anything_is_changed():
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in weights(model).items()}
    for settings, said in [
        ({"overrides": ("mpl=0.5",)}, r"named 'mpl'. Did you mean 'mlp'"),
        ({"overrides": ("mlp=0.1",)}, "would be pruned to"),
        ({"overrides": ("mlp=0.5",), "exclude": ("mlp",)}, "no matrix that is pruned is named 'mlp'"),
    ]:
        with pytest.raises(ValueError, match=said):
            prune(model, tokens(), DSAConfig(0.5, **settings))
    with pytest.raises(ValueError, match="a search chooses that of all"):
        DSAPruner(model).search(tokens(8), DSAConfig(0.5, overrides=("mlp=0.6",)), validation=tokens(4, seed=5))
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())
    prune(model, None, DSAConfig(0.5, "magnitude", "uniform"))
    with pytest.raises(ValueError, match="of it is zero already"):
        prune(model, tokens(), DSAConfig(0.6, overrides=("mlp=0.3",)))


@pytest.mark.parametrize(
    "overrides,exclude", [(("layers.0=0.8",), ()), (("mlp=0.7",), ()), (("q_proj=0.9",), ("mlp",))]
)
def test_what_leaves_less_than_is_zero_already_is_refused(overrides, exclude):
    """Zeros keep, so that the mean would be more than was asked for."""
    model = tiny_llama()
    prune(model, None, DSAConfig(0.5, "magnitude", "uniform"))
    before = {name: tensor.clone() for name, tensor in weights(model).items()}
    settings = {"overrides": overrides, "exclude": exclude}
    with pytest.raises(ValueError, match="is zero already; give less") as refused:
        prune(model, None, DSAConfig(0.55, "magnitude", "uniform", **settings))
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())
    least = float(str(refused.value).split("a sparsity of ")[-1].split()[0])
    report = prune(model, None, DSAConfig(least, "magnitude", "uniform", **settings))
    assert report.allocation.overall == pytest.approx(least, abs=2e-4)


def test_they_are_saved_and_an_option(monkeypatch, capsys, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "dense")
    options = ["--method", "magnitude", "--allocation", "uniform", "--overrides", "mlp=0.6", "q_proj=0.25"]
    run(monkeypatch, capsys, "prune", str(tmp_path / "dense"), "-o", str(tmp_path / "out"), "-s", "0.5", *options)
    pruner = DSAPruner.from_pretrained(tmp_path / "out")
    assert pruner.report.config.overrides == ("mlp=0.6", "q_proj=0.25") and pruner.verify().holds
    assert json.loads((tmp_path / "out" / "dsa_config.json").read_text())["config"]["overrides"] == [
        "mlp=0.6",
        "q_proj=0.25",
    ]
