"""Matrices solved at levels as the realisation of an allocation: what the update makes, and error curves."""

import pytest
import torch

from optimum_dsa import METHODS, Calibration, DSAConfig, UpdateConfig
from optimum_dsa.search.objective import Objective
from optimum_dsa.search.realise import realise, suited
from optimum_dsa.search.realise.database import OFFSETS, relative_error

from ...tiny import same_state, state, tiny_llama, tokens


VALIDATION = tokens(8, 16, seed=5)
CALIBRATION = Calibration({"input_ids": tokens()}, "x")
WHOLE = UpdateConfig(targets="dense", true_sequential=True, residual=True)


def built(method="sparsegpt", kind="database", **changes):
    config = DSAConfig(0.6, method, **changes)
    model = tiny_llama(num_hidden_layers=2)
    for parameter in model.parameters():
        parameter.data *= 3  # or nothing that is removed would matter
    return Objective(model, realise(model, CALIBRATION, config, kind), VALIDATION, 8)


def uniform(found, share=0.6):
    return {name: round(share * size) for name, size in found.realisation.sizes.items()}


@pytest.mark.parametrize(
    "method,update",
    [*((method, UpdateConfig()) for method in sorted(METHODS)), ("sparsegpt", WHOLE), ("alps", WHOLE)],
)
def test_at_the_anchor_a_candidate_is_the_model_that_prune_leaves(method, update):
    found = built(method, update=update)
    before = state(found.model)
    counts = uniform(found)
    for weight in found.realisation.architecture.weights:  # an allocation that is not uniform
        counts[weight.name] += 20 * (1 if "mlp" in weight.name else -1)
    found.move_anchor(counts)
    proxy = found.loss(counts, range(8))
    assert proxy == pytest.approx(found.sequential(counts, range(8))[0], rel=0.02)
    assert same_state(found.model, before)


def test_at_its_levels_a_matrix_is_what_the_update_makes_of_it(monkeypatch):
    made = {}
    found = built(update=WHOLE)
    pruned = type(found.realisation.method).pruned

    def noted(method, weight, statistics, count):
        made[weight.data_ptr(), count] = new = pruned(method, weight, statistics, count)
        return new

    monkeypatch.setattr(type(found.realisation.method), "pruned", noted)
    database = found.realisation
    found.loss(uniform(found), range(1))
    assert len(made) == len(database.sizes) * (1 + 2 * len(OFFSETS))
    for weight in database.architecture.weights:
        own = {count: new for (place, count), new in made.items() if place == weight.tensor(found.model).data_ptr()}
        for count, new in own.items():
            got = database._between(weight.name, count)
            assert int((got == 0).sum()) == count
            assert torch.equal(got, new.to(torch.bfloat16))


@pytest.mark.parametrize("pattern", ["row", "mixed:4"])
def test_between_levels_counts_are_met_to_a_row_and_losses_lie_between(pattern):
    found = built(pattern=pattern)
    counts = uniform(found, 0.6 if pattern == "row" else 0.5)
    found.realisation.move_anchor(counts)
    found.loss(counts, range(1))
    for name, size in found.realisation.sizes.items():
        columns = found.realisation.masked.weights[name].shape[1]
        for share in (0.1, 0.45, 0.5, 0.57, 0.62, 0.75, 0.95):
            gone = int((found.realisation._between(name, round(share * size)) == 0).sum())
            assert abs(gone - share * size) <= columns
        assert found.realisation._between(name, 0).count_nonzero() == size
        assert not found.realisation._between(name, size).any()


def test_error_curves_rise_from_none_to_all_with_what_is_removed():
    found = built(update=WHOLE)
    curves = [found.errors(uniform(found, share / 20)) for share in range(21)]
    for name in found.realisation.sizes:
        curve = [errors[name] for errors in curves]
        assert curve[0] == 0 and curve[-1] == 1
        assert curve == sorted(curve)


def test_an_error_is_that_of_the_outputs():
    from optimum_dsa.model.statistics import LayerStatistics

    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(6, 8, generator=generator), torch.randn(40, 8, generator=generator)
    new = weight * (weight.abs() > 0.5)
    with_gram, without = LayerStatistics(8, with_gram=True), LayerStatistics(8)
    with_gram.update_(inputs), without.update_(inputs)
    expected = ((weight - new) @ inputs.t()).square().sum() / (weight @ inputs.t()).square().sum()
    assert relative_error(weight, new, with_gram, 0.01) == pytest.approx(expected.item(), rel=1e-4)
    assert relative_error(weight, new, without, 0.01) == pytest.approx(expected.item(), rel=0.3)
    assert relative_error(weight, new, None, 0.01) == pytest.approx(
        ((weight - new).square().sum() / weight.square().sum()).item(), rel=1e-4
    )
    assert relative_error(weight * 0, weight * 0, None, 0.01) == 0


def test_slopes_are_the_change_of_the_loss_from_level_to_level():
    found = built(update=WHOLE)
    counts = uniform(found)
    loss, slopes = found.slopes(counts, range(8))
    assert loss == pytest.approx(found.loss(counts, range(8)), rel=1e-4)
    measured, predicted = [], []
    for name, size in found.realisation.sizes.items():
        fewer, more = (counts | {name: counts[name] + way * round(0.04 * size)} for way in (-1, 1))
        width = more[name] - fewer[name]
        measured.append((found.loss(more, range(8)) - found.loss(fewer, range(8))) / width)
        predicted.append(slopes[name])
    assert torch.corrcoef(torch.tensor([measured, predicted]))[0, 1] > 0.8


def test_the_anchor_is_solved_once_and_given_up_for_a_prune():
    found = built()
    counts = uniform(found)
    found.loss(counts, range(1))
    levels = found.realisation._levels
    found.move_anchor(None)
    found.loss(counts, range(1))
    assert found.realisation._levels is levels
    found.sequential(counts, range(1))
    assert not found.realisation._levels


def test_levels_take_a_bit_per_weight_and_two_bytes_for_each_that_is_kept():
    found = built()
    found.loss(uniform(found), range(1))
    levels = [level for each in found.realisation._levels.values() for level in each if level.packed is not None]
    held = sum(level.packed.nbytes for level in levels)
    assert held == pytest.approx(7 * (0.4 * 2 + 1 / 8) * sum(found.realisation.sizes.values()), rel=0.1)


def test_methods_that_change_what_they_keep_are_judged_by_the_database():
    assert {method: suited(DSAConfig(0.5, method)) for method in ("wanda", "magnitude", "alps", "sparsegpt")} == {
        "wanda": "masks", "magnitude": "masks", "alps": "database", "sparsegpt": "database"
    }  # fmt: skip


def test_masks_have_no_error_curves():
    with pytest.raises(ValueError, match="realisation='database'"):
        built("wanda", "masks").errors({})


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_experts_of_one_parameter_and_transposed_weights_are_each_replaced(family, tiny):
    """With matrices solved at uniform as with the masks and values of a prune: all of them, in their layout."""
    model, config = tiny(family).eval(), DSAConfig(0.5, "sparsegpt", "uniform")
    database = realise(model, CALIBRATION, config, "database")
    counts, text = database._uniform, tokens(2, 16, seed=5)
    with torch.no_grad():
        with database.at(counts):
            proxy = model(text).logits
        with database.pruned(counts):
            exact = model(text).logits
    torch.testing.assert_close(proxy, exact, rtol=0.1, atol=0.05 * exact.std().item())
