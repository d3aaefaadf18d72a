"""Structures as the realisation of an allocation: what is silenced, made up for, and how fast the loss rises."""

from dataclasses import replace

import pytest
import torch

from optimum_dsa import Calibration
from optimum_dsa.pruning.structured.configuration import DSAStructuredConfig
from optimum_dsa.pruning.structured.slicing import silence
from optimum_dsa.search.objective import Objective
from optimum_dsa.search.realise.structures import StructureWidths

from ...pruning.structured.families import FAMILIES
from ...tiny import same_state, state, tokens


CALIBRATION, VALIDATION = Calibration({"input_ids": tokens()}, "x"), tokens(4, 16, seed=5)
CONFIG = DSAStructuredConfig(0.3, ("ffn", "head", "kv_group"), "wanda_sp", layout="per_layer")


def llama(family="Llama"):
    model = FAMILIES[family][0]()
    for parameter in model.parameters():
        parameter.data *= 2
    return model


def half(realised):
    return {unit: len(each) // 2 * realised.cost[unit] for unit, each in realised.units.items()}


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_it_computes_as_the_model_with_the_least_important_silenced(family):
    model, silenced = llama(family), llama(family)
    before = state(model)
    realised = StructureWidths(model, None, CALIBRATION, replace(CONFIG, update="none"))
    for unit, each in realised.units.items():
        order = realised.dense.importances[unit].argsort(stable=True)
        silence(silenced, each, order[: len(each) // 2])
    with realised.at(half(realised)), torch.no_grad():
        torch.testing.assert_close(model(VALIDATION).logits, silenced(VALIDATION).logits)
    assert same_state(model, before)


def test_making_up_for_it_is_nearer_to_the_dense_model():
    losses = []
    for update in ("none", "refit"):
        model = llama()
        realised = StructureWidths(model, None, CALIBRATION, replace(CONFIG, update=update))
        objective = Objective(model, realised, CALIBRATION.inputs["input_ids"])
        losses.append(objective.loss(half(realised), range(6)))
    assert losses[1] < losses[0]


@pytest.mark.parametrize("update", ["none", "refit"])
def test_slopes_are_how_the_loss_rises(update):
    """Of one unit at a time, the loss between a structure fewer and a structure more."""
    model = llama()
    before = state(model)
    realised = StructureWidths(model, None, CALIBRATION, replace(CONFIG, update=update))
    objective = Objective(model, realised, VALIDATION)
    counts = half(realised)
    loss, slopes = objective.slopes(counts, range(4))
    assert loss == pytest.approx(objective.loss(counts, range(4)), rel=1e-5)
    rises = {}
    for unit, cost in realised.cost.items():
        width = max(round(0.04 * len(realised.units[unit])), 1)
        near = [objective.loss({**counts, unit: counts[unit] + side * width * cost}, range(4)) for side in (-1, 1)]
        rises[unit] = (near[1] - near[0]) / (2 * width * cost)
    pairs = torch.tensor([[slopes[unit], rises[unit]] for unit in rises if unit.endswith("ffn")])
    torch.testing.assert_close(pairs[:, 0], pairs[:, 1], rtol=0.3, atol=float(pairs.abs().max()) * 0.15)
    assert same_state(model, before) and all(parameter.requires_grad for parameter in model.parameters())


def test_an_anchor_is_another_point_of_view():
    model = llama()
    realised = StructureWidths(model, None, CALIBRATION, CONFIG)
    objective = Objective(model, realised, VALIDATION)
    counts = half(realised)
    dense = objective.loss(counts, range(4))
    objective.move_anchor(counts)
    assert objective.loss(counts, range(4)) != dense
    objective.move_anchor(None)
    assert objective.loss(counts, range(4)) == pytest.approx(dense)


def test_it_has_no_error_curves_for_a_strategy():
    realised = StructureWidths(llama(), None, CALIBRATION, CONFIG)
    with pytest.raises(ValueError, match="reads no error curves; prune with allocation='milp'"):
        realised.errors({})
