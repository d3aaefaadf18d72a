"""ECoFLaP, ALS and NeuronAL against their formulas, written out."""

import math

import pytest
import torch

from optimum_dsa.model.gradients import collect_gradients
from optimum_dsa.pruning.allocation import from_model
from optimum_dsa.pruning.allocation.from_model import (
    best_ramp,
    by_ramp,
    by_redundancy,
    by_slopes,
    gram_of_tokens,
    slopes_of_units,
)

from ...tiny import same_state, state, tiny_llama, tokens
from .test_whole import seen_of


def test_a_slope_is_the_gradient_along_the_noise():
    """Over one window and many draws, E|g · z| is ‖g‖ √(2 ÷ π)."""
    model, ids = tiny_llama(), tokens(1).repeat(32, 1)
    seen = seen_of(model, ids, "ecoflap")
    gradients = collect_gradients(model, seen.architecture, [{"input_ids": ids[:1]}])
    found = slopes_of_units(seen)
    for unit, weights in seen.units.items():
        norm = sum(float(gradients[weight.name].square().sum()) for weight in weights) ** 0.5
        assert found[unit][0] == pytest.approx(norm * math.sqrt(2 / math.pi), rel=0.35)
        assert found[unit][1] == sum(weight.size for weight in weights)


def test_what_is_above_the_floor_goes_by_the_slopes_until_a_unit_is_full():
    measured = {"a": (1.0, 100), "b": (2.0, 100), "c": (1.0, 200)}
    found = by_slopes(measured, 0.7, None)  # at most 0.8 goes: 20, 20, 40 stay, and 40 more by 1 : 2 : 1
    assert found == pytest.approx({"a": 0.7, "b": 0.6, "c": 0.75})
    full = by_slopes({"a": (1.0, 100), "b": (1000.0, 100)}, 0.4, 0.6)
    assert full == pytest.approx({"a": 0.8, "b": 0.0}, abs=1e-3)
    assert set(by_slopes({"a": (0.0, 10), "b": (0.0, 10)}, 0.5, None).values()) == {0.5}


def test_redundancy_is_that_of_the_inputs_of_blocks():
    model, ids = tiny_llama(), tokens()
    inputs = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args, kwargs: inputs.append(args[0]), with_kwargs=True)
    measured = gram_of_tokens(seen_of(model, ids, "als"))
    inputs.clear()
    with torch.no_grad():
        model(ids)
    x = [each.flatten(0, 1) for each in inputs]
    for i, one in enumerate(measured.values()):
        for j, other in enumerate(measured.values()):
            cross, own, theirs = (a.t() @ b for a, b in ((x[i], x[j]), (x[i], x[i]), (x[j], x[j])))
            related = cross.square().sum() / (own.norm() * theirs.norm())
            assert float((one[1] * other[1]).sum()) == pytest.approx(float(related), rel=1e-3)


def test_the_programme_keeps_most_of_what_is_worth_most():
    """Two that are given the same and one of its own, which is last: its weights are worth most."""
    same, other = torch.eye(2) / 2**0.5, torch.tensor([[0.0, 1.0], [1.0, 0.0]]) / 2**0.5
    measured = {name: (name, gram, gram, 100) for name, gram in (("a", same), ("b", same), ("c", other))}
    assert by_redundancy(measured, 0.5, None) == pytest.approx({"a": 0.7, "b": 0.5, "c": 0.3})
    assert by_redundancy(measured, 0.9, None) == pytest.approx({"a": 1.0, "b": 0.9, "c": 0.8})
    assert by_redundancy(measured, 0.5, 0.05) == pytest.approx({"a": 0.55, "b": 0.5, "c": 0.45})


@pytest.mark.parametrize("family", ["mixtral", "t5", "bert", "vit"])
def test_redundancy_is_found_in_any_family(tiny, inputs, family):
    from optimum_dsa import Calibration, DSAConfig
    from optimum_dsa.pruning.allocate import allocate

    model = tiny(family)
    for granularity in ("block", "matrix"):
        found = allocate(
            model, Calibration(inputs(family), "x"), DSAConfig(0.5, "wanda", "als", granularity=granularity)
        )
        assert found.counts() and sum(found.counts().values()) == round(0.5 * sum(found.sizes.values()))


def test_the_ramp_is_the_one_under_which_inputs_change_least(monkeypatch):
    model = tiny_llama()
    before, seen = state(model), seen_of(model, name="neuronal")
    tried = {}
    plain = from_model._change_under
    monkeypatch.setattr(from_model, "_change_under", lambda *args: tried.setdefault(args[2], plain(*args)))
    found = best_ramp(seen)
    assert same_state(model, before) and tried.keys() == set(from_model.WIDTHS)
    best = min(tried, key=tried.get)
    assert list(found.values()) == [(0.0, best), (0.5, best), (1.0, best)]
    assert len(set(tried.values())) == len(tried)
    assert by_ramp(found, 0.6, None) == pytest.approx(dict(zip(found, (0.6 - best, 0.6, 0.6 + best))))
    assert list(by_ramp(found, 0.6, 0.1).values()) == pytest.approx([0.5, 0.6, 0.7])


def test_the_change_is_that_of_norms_as_shares_of_their_sum():
    """With sparsity 0 nothing is masked, and nothing changes."""
    seen = seen_of(tiny_llama(), name="neuronal", sparsity=0.02)
    batches = seen.batches(8, 16)
    assert from_model._change_under(seen, batches, 0.02) > 0
    from dataclasses import replace

    assert from_model._change_under(replace(seen, target=0.0), batches, 0.0) == 0.0
