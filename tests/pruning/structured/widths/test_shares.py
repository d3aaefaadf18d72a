"""Shares of all allocations of structures: the budget, what each says, and what is refused."""

from dataclasses import replace

import pytest
import torch

from optimum_dsa import find_architecture
from optimum_dsa.common.registry import UnknownNameError
from optimum_dsa.pruning.allocation import ALLOCATIONS, Allocation, measured_in_one_walk
from optimum_dsa.pruning.calibration import load_calibration
from optimum_dsa.pruning.structured import scores
from optimum_dsa.pruning.structured.budget import fitted_counts
from optimum_dsa.pruning.structured.configuration import DSAStructuredConfig
from optimum_dsa.pruning.structured.prune import prune_structures
from optimum_dsa.pruning.structured.structures import find_structures
from optimum_dsa.pruning.structured.widths.dense import dense_model
from optimum_dsa.pruning.structured.widths.shares import SHARES, allocator_of, shares

from ....tiny import same_state, state, tiny_llama, tokens


BOTH = ("ffn", "kv_group")


@pytest.fixture(scope="module")
def found():
    model = tiny_llama()
    architecture = find_architecture(model)
    structures = find_structures(model, architecture, {"input_ids": tokens(1)})
    return model, architecture, load_calibration(tokens(8), model), structures


def asked(found, **settings):
    model, architecture, calibration, structures = found
    given = {"sparsity": 0.3, "structures": BOTH, "importance": "obs", "layout": "per_layer", **settings}
    return dense_model(model, architecture, calibration, DSAStructuredConfig(**given), structures)


@pytest.mark.parametrize("name", [*sorted({*SHARES, *measured_in_one_walk()}), "abslog/var/atan,asin/no_op@-0.2"])
def test_every_allocation_meets_the_budget_and_changes_nothing(found, name):
    if name == "milp":
        pytest.importorskip("scipy")
    before = state(found[0])
    dense = asked(found, allocation=name)
    proposed = shares(dense)
    assert list(proposed) == list(dense.units) and same_state(found[0], before)
    counts = fitted_counts(dense.sizes, dense.asked, proposed)
    goes = sum(dense.sizes[unit].cost * number for unit, number in counts.items())
    assert dense.asked - min(size.cost for size in dense.sizes.values()) < goes <= dense.asked
    assert fitted_counts(dense.sizes, dense.asked, dict(reversed(proposed.items()))) == counts


def test_a_function_is_given_the_importances_of_structures(found):
    """OWL cuts units with outliers among their structures less."""
    dense = asked(found, allocation="owl", structures=("ffn",))
    scores = {unit: torch.ones(48) for unit in dense.units}
    scores["model.layers.1:ffn"][:3] = 100.0
    dense.known["importances"] = scores
    proposed = shares(dense)
    assert proposed["model.layers.1:ffn"] < proposed["model.layers.0:ffn"] == proposed["model.layers.2:ffn"]


def test_stability_goes_the_way_that_is_asked_for_and_as_far(found):
    ways = {}
    for unstable in ("less", "more"):
        dense = asked(found, allocation="stability", unstable=unstable, spread=0.1, structures=("ffn",))
        varies = torch.ones(4, 48)
        scores = {unit: varies.clone() for unit in dense.units}
        scores["model.layers.1:ffn"][0] = 3.0
        scores["model.layers.2:ffn"] *= 1e6
        dense.known["importances by part"] = scores
        ways[unstable] = shares(dense)
    less, more = ways["less"], ways["more"]
    assert less["model.layers.0:ffn"] == less["model.layers.2:ffn"] == pytest.approx(less["model.layers.1:ffn"] + 0.2)
    assert all(less[unit] + more[unit] == pytest.approx(2 * dense.share) for unit in less)


def test_parts_of_the_calibration_data_are_looked_at_one_by_one(found):
    dense = asked(found, allocation="stability", importance="wanda_sp")
    found_by_part = dense.importances_by_part["model.layers.0:ffn"]
    assert found_by_part.shape == (8, 48) and (found_by_part.std(0) > 0).all()
    one = replace(found[2], inputs={"input_ids": tokens(1)})
    with pytest.raises(ValueError, match="compares importances from text to text, and one sequence was given"):
        shares(asked((*found[:2], one, found[3]), allocation="stability"))


def test_global_takes_what_is_worth_least_for_its_cost(found):
    dense = asked(found, allocation="global")
    proposed = shares(dense)
    worth = {unit: dense.importances[unit].sort().values / dense.sizes[unit].cost for unit in dense.units}
    counts = {unit: round(share * len(dense.units[unit])) for unit, share in proposed.items()}
    last = max(float(worth[unit][number - 1]) for unit, number in counts.items() if number)
    stays = [float(worth[unit][number]) for unit, number in counts.items() if number < dense.sizes[unit].most]
    assert len(set(counts.values())) > 1 and last <= min(stays)


def test_fisher_is_one_order_of_what_the_loss_feels_whatever_chooses_within_a_unit(found):
    fisher = shares(asked(found, allocation="fisher"))
    assert len(set(fisher.values())) > 2
    assert fisher == shares(asked(found, allocation="global", importance="taylor_second"))
    for importance in ("saap", "random"):
        assert shares(asked(found, allocation="fisher", importance=importance)) == pytest.approx(fisher)
    assert shares(asked(found, allocation="fisher", blockwise=True)) == pytest.approx(fisher)


@pytest.mark.parametrize(
    "importance, warns", [("obs", True), ("magnitude", True), ("taylor", False), ("random", False)]
)
def test_one_order_of_importances_that_look_at_a_block_by_itself_is_warned_of(importance, warns, caplog):
    config = DSAStructuredConfig(0.3, importance=importance, update="none", allocation="global", layout="per_layer")
    prune_structures(tiny_llama(), tokens(), config)
    assert ("allocation='global' sets what importance='" in caplog.text) == warns


def test_gradients_are_taken_once_for_widths_and_for_what_goes(monkeypatch):
    passes, collect = [], scores.collect_products
    monkeypatch.setattr(scores, "collect_products", lambda *given: (passes.append(given), collect(*given))[1])
    config = DSAStructuredConfig(0.3, importance="taylor", update="none", allocation="global", layout="per_layer")
    prune_structures(tiny_llama(), tokens(), config)
    assert len(passes) == 1


def test_milp_loses_less_by_its_curves_than_equal_shares(found):
    pytest.importorskip("scipy")
    dense = asked(found, allocation="milp")

    def lost(proposed):
        counts = fitted_counts(dense.sizes, dense.asked, proposed)
        return sum(float(dense.curves[unit][number]) for unit, number in counts.items())

    assert lost(shares(dense)) < lost(dict.fromkeys(dense.units, dense.share))


def test_milp_meets_other_budgets_besides(found):
    pytest.importorskip("scipy")
    dense = asked(found, allocation="milp", sparsity=0.3, budgets=("kv=0.5",))
    counts = fitted_counts(dense.sizes, dense.asked, shares(dense))
    assert all(counts[unit] == 1 for unit in dense.kinds["kv_group"])


def test_what_costs_nothing_stays(found):
    dense = asked(found, cost="kv", sparsity=0.5)
    counts = fitted_counts(dense.sizes, dense.asked, shares(dense))
    assert {unit.partition(":")[2]: number for unit, number in counts.items()} == {"ffn": 0, "kv_group": 1}


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize("cost, least", [("flops", 0.28), ("kv", 0.5)])
def test_a_share_of_another_cost_is_met(cost, least, layout):
    config = DSAStructuredConfig(
        0.5 if cost == "kv" else 0.3, BOTH, "magnitude", "none", cost=cost, layout=layout, round_to=2
    )
    report = prune_structures(tiny_llama(), tokens(), config)
    assert least <= report.shares[cost] <= config.sparsity
    with pytest.raises(ValueError, match="bytes of a token in the cache are to go, and of the structures that may"):
        prune_structures(tiny_llama(), tokens(), replace(config, cost="kv", sparsity=0.9))


def test_first_and_last_blocks_stay_whole():
    report = prune_structures(
        tiny_llama(), tokens(), DSAStructuredConfig(0.1, update="none", layout="per_layer", keep_first=1, keep_last=1)
    )
    assert [len(gone) > 0 for gone in report.gone.values()] == [False, True, False]
    with pytest.raises(ValueError, match="what may go has none of them"):
        prune_structures(tiny_llama(), tokens(), DSAStructuredConfig(0.1, layout="per_layer", keep_first=9))


def test_what_a_report_says_is_pruned_again():
    settings = {"structures": BOTH, "update": "none", "layout": "per_layer"}
    first = prune_structures(tiny_llama(), tokens(), DSAStructuredConfig(0.3, allocation="global", **settings))
    assert len(set(first.allocation.sparsity.values())) > 2 and first.allocation.name == "global"
    assert first.shares["parameters"] == pytest.approx(first.sparsity) and first.shares["kv"] <= 0.5
    config = DSAStructuredConfig(0.3, allocation=first.allocation, **settings)
    assert DSAStructuredConfig.from_dict(config.to_dict()) == config
    again = prune_structures(tiny_llama(), tokens(), config)
    assert again.gone == first.gone and again.allocation == first.allocation


@pytest.mark.parametrize(
    "given, said",
    [
        ({"model.layers.0:ffn": 0.3}, "it lacks \\['model.layers.0:kv_group', .* and names nothing"),
        ({"model.layers.9:ffn": 0.3}, "names \\['model.layers.9:ffn'\\] that the model does not have"),
        (0.1, "takes 0.0[0-9]* of the blocks, but the config asks for 0.3; use sparsity="),
        (1.0, "takes 1.0000 of model.layers.0:kv_group, of which 1 of 2 can go, in steps of 1"),
    ],
)
def test_an_allocation_that_does_not_fit_is_refused(found, given, said):
    if isinstance(given, float):
        given = dict.fromkeys(found[3].structures, given)
    dense = asked(found, allocation=Allocation.from_dict(given))
    with pytest.raises(ValueError, match=said):
        shares(dense)


@pytest.mark.parametrize(
    "settings, said",
    [
        (
            {"allocation": "owl", "layout": "uniform"},
            "allocation='owl' gives blocks widths of their own, and layout='uniform' has one",
        ),
        ({"keep_last": 2, "layout": "uniform"}, "keep_last=2 gives blocks widths of their own"),
        ({"budgets": ("kv=0.5",)}, "budgets=\\['kv=0.5'\\] are met by allocation='milp' alone"),
        (
            {"allocation": "milp", "layout": "per_layer", "budgets": ("parameters=0.5",)},
            "budgets are of 'flops' or 'kv' or 'latency' besides cost='parameters', got 'parameters'",
        ),
        ({"allocation": "milp", "layout": "per_layer", "budgets": ("kv",)}, "budgets: cannot read 'kv'"),
        ({"cost": "time"}, "cost is 'parameters' or 'flops' or 'kv' or 'latency', got 'time'"),
        ({"allocation": 3}, "allocation is a name, an allocation function, a path or an Allocation, got 3"),
        ({"allocation": "auto"}, "allocation='auto' compares allocations of single weights"),
        ({"targets": "dense", "update": "none"}, "targets='dense' is what update='refit' fits to"),
        ({"targets": "dense", "sequential": False}, "sequential=False has none"),
        ({"residual": True}, "residual=True adds to the targets of the dense model"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        DSAStructuredConfig(0.2, **settings)


@pytest.mark.parametrize(
    "settings, layout",
    [
        ({}, "uniform"),
        ({"structures": ("ffn", "kv_group"), "importance": "saap", "allocation": "stability"}, "per_layer"),
        ({"keep_first": 1}, "per_layer"),
        ({"structures": ("attention", "mlp")}, "per_layer"),
        ({"structures": ("block",), "keep_first": 1}, "uniform"),
        ({"allocation": "milp", "layout": "padded"}, "padded"),
    ],
)
def test_blocks_may_differ_where_something_asks_for_it(settings, layout):
    config = DSAStructuredConfig(0.2, **settings)
    assert config.layout == layout and DSAStructuredConfig.from_dict(config.to_dict()) == config


def test_near_names_are_said():
    with pytest.raises(UnknownNameError, match="Unknown allocation 'stabilty'. Did you mean 'stability'"):
        DSAStructuredConfig(0.2, allocation="stabilty", layout="per_layer")
    assert allocator_of("owl") is ALLOCATIONS["owl"]
