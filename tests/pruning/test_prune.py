import json
import logging
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_dsa import (
    ALLOCATIONS,
    METHODS,
    Allocation,
    DSAConfig,
    UpdateConfig,
    allocate,
    find_architecture,
    prune,
)
from optimum_dsa.model.statistics import CollectedStatistics
from optimum_dsa.model.walk import walk_blocks
from optimum_dsa.pruning.allocation import measured_in_one_walk

from ..tiny import VOCABULARY, same_state, state, tiny_llama, tokens


def blocks_of(model):
    return {f"model.layers.{index}": block for index, block in enumerate(model.model.layers)}


def zeros(module):
    return sum(int((m.weight == 0).sum()) for m in module.modules() if isinstance(m, torch.nn.Linear))


def size(module):
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Linear))


# Those that run the model take their time, and know nothing of the method.
RUN = sorted(set(ALLOCATIONS) - set(measured_in_one_walk()))


@pytest.mark.parametrize(
    "method,allocation",
    [*product(sorted(METHODS), measured_in_one_walk()), *product(["wanda"], RUN), ("sparsegpt", "besa")],
)
def test_every_method_meets_every_allocation_exactly(method, allocation):
    model = tiny_llama()
    before = state(model)
    report = prune(model, tokens(), DSAConfig(0.6, method, allocation))
    assert zeros(model.model.layers) == round(0.6 * size(model.model.layers)) == report.removed
    if report.allocation.sizes.keys() == blocks_of(model).keys():
        for name, block in blocks_of(model).items():
            assert zeros(block) == report.allocation.counts()[name]
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(model.state_dict()[name], before[name])
    if METHODS[method].update == "none":
        for name, value in model.state_dict().items():
            assert torch.equal(value[value != 0], before[name][value != 0])


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize(
    "pattern,sparsity",
    [("row", 0.37), ("matrix", 0.37), ("group:16", 0.37), ("2:4", 0.5), ("1:4", 0.75), ("4:8", 0.5)],
)
def test_every_method_takes_every_pattern(method, pattern, sparsity):
    model = tiny_llama()
    prune(model, tokens(), DSAConfig(sparsity, method, "uniform", pattern=pattern))
    assert zeros(model.model.layers) == round(sparsity * size(model.model.layers))
    if ":" in pattern and not pattern.startswith("group"):
        kept, width = map(int, pattern.split(":"))
        for weight in find_architecture(model).weights:
            assert ((weight.tensor(model) != 0).unflatten(1, (-1, width)).sum(-1) == kept).all()


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_mixed_n_of_m_follows_the_allocation_at_the_exact_budget(method):
    model = tiny_llama(num_hidden_layers=4)
    report = prune(model, tokens(), DSAConfig(0.5, method, "atp", spread=0.25, pattern="mixed:8"))
    assert report.sparsity == 0.5
    levels = [value * 8 for value in report.achieved.values()]
    assert levels == sorted(levels) and levels[0] < levels[-1] and all(level == int(level) for level in levels)
    for name, block in blocks_of(model).items():
        for module in block.modules():
            if isinstance(module, torch.nn.Linear):
                removed = (module.weight == 0).unflatten(1, (-1, 8)).sum(-1)
                assert (removed == report.achieved[name] * 8).all()


@given(sparsity=st.floats(0, 0.99), allocation=st.sampled_from(["uniform", "owl", "er", "atp"]))
@settings(max_examples=12, deadline=None)
def test_any_sparsity_is_met_to_one_weight(sparsity, allocation):
    model = tiny_llama(num_hidden_layers=2)
    report = prune(model, tokens(2, 8), DSAConfig(sparsity, "wanda", allocation))
    assert zeros(model.model.layers) == round(sparsity * size(model.model.layers)) == report.removed


def test_masks_nest_as_sparsity_grows():
    last = None
    for sparsity in (0.2, 0.45, 0.5, 0.8):
        model = tiny_llama()
        prune(model, tokens(), DSAConfig(sparsity, "wanda", "uniform", sequential=False))
        gone = {weight.name: weight.tensor(model) == 0 for weight in find_architecture(model).weights}
        assert last is None or all((~last[name] | gone[name]).all() for name in gone)
        last = gone


def test_pruning_twice_removes_the_same_weights_first():
    model = tiny_llama()
    prune(model, tokens(), DSAConfig(0.4, "magnitude", "uniform"))
    first = {weight.name: weight.tensor(model) == 0 for weight in find_architecture(model).weights}
    report = prune(model, tokens(), DSAConfig(0.7, "magnitude", "uniform"))
    assert report.sparsity == pytest.approx(0.7, abs=1e-4)
    assert all((weight.tensor(model)[first[weight.name]] == 0).all() for weight in find_architecture(model).weights)


def test_the_same_config_and_tokens_give_the_same_model():
    results = []
    for _ in range(2):
        model = tiny_llama()
        prune(model, tokens(), DSAConfig(0.5, "sparsegpt", "dsa"))
        results.append(state(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_allocate_changes_nothing_and_is_what_prune_uses():
    model = tiny_llama()
    before = state(model)
    config = DSAConfig(0.6, "wanda", "owl")
    allocation = allocate(model, tokens(), config)
    assert same_state(model, before)
    assert allocation == prune(model, tokens(), config).allocation


@pytest.mark.parametrize("form", ["object", "json", "plain json"])
def test_any_json_allocation_can_be_applied(form, tmp_path):
    model = tiny_llama()
    per_block = {"model.layers.0": 0.3, "model.layers.1": 0.8, "model.layers.2": 0.7}
    allocation = Allocation(per_block, dict.fromkeys(per_block, size(model.model.layers[0])))
    path = tmp_path / "allocation.json"
    if form == "json":
        allocation.save(path)
    elif form == "plain json":
        path.write_text(json.dumps(per_block))
    report = prune(model, tokens(), DSAConfig(0.6, allocation=allocation if form == "object" else str(path)))
    assert report.achieved == pytest.approx(per_block, abs=1e-3)
    assert report.removed == round(0.6 * size(model.model.layers))


def test_an_allocation_per_matrix_is_recognised():
    model = tiny_llama()
    config = DSAConfig(0.6, "magnitude", "er")
    found = allocate(model, None, config)
    assert len(found.sizes) == 21
    assert prune(model, None, DSAConfig(0.6, "magnitude", found)).achieved == pytest.approx(found.sparsity)


@pytest.mark.parametrize(
    "allocation,message",
    [
        (
            {"model.layers.0": 0.5},
            r"does not fit the model: it lacks \['model.layers.1', 'model.layers.2'\] and names nothing",
        ),
        ({f"model.layers.{i}": 0.5 for i in range(4)}, r"lacks nothing and names \['model.layers.3'\]"),
        ({f"model.layers.{i}": 0.9 for i in range(3)}, "mean sparsity is 0.9000.*asks for 0.6; use sparsity=0.9"),
    ],
)
def test_an_allocation_that_does_not_fit_is_refused(allocation, message):
    model = tiny_llama()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        prune(model, tokens(), DSAConfig(0.6, allocation=Allocation(allocation, dict.fromkeys(allocation, 1))))
    assert same_state(model, before)


def test_data_are_needed_only_where_something_reads_them():
    def needs(**changes):
        config = DSAConfig(0.5, **changes)
        return bool(config.resolved.reads), bool(config.resolved.allocation_reads)

    assert needs(method="magnitude", allocation="uniform") == (False, False)
    assert needs(method="magnitude", allocation="er") == (False, False)
    assert needs(method="magnitude", allocation="alphapruning") == (False, False)
    assert needs(method="magnitude", allocation="dsa") == (False, True)
    assert needs(method="magnitude", allocation="dsa", allocation_metric="magnitude") == (False, False)
    assert needs(method="magnitude", allocation="uniform", update="sparsegpt") == (True, False)
    assert needs(method="wanda", allocation="uniform") == (True, False)
    model = tiny_llama()
    prune(model, None, DSAConfig(0.5, "magnitude", "alphapruning"))
    with pytest.raises(ValueError, match="grid of values 'int8' needs calibration data"):
        prune(tiny_llama(), None, DSAConfig(0.5, "magnitude", "uniform", values="int8"))
    with pytest.raises(ValueError, match="method 'wanda' needs calibration data"):
        prune(model, None, DSAConfig(0.5, "wanda", "uniform"))
    with pytest.raises(ValueError, match="allocation 'owl' needs calibration data"):
        prune(model, None, DSAConfig(0.5, "magnitude", "owl"))


def poison(name, value):
    def change(model):
        model.get_parameter(name).data[0, 0] = value

    return change


def overflow(model):
    model.model.layers[1].mlp.up_proj.weight.data *= 1e20
    model.model.layers[1].mlp.down_proj.weight.data *= 1e25


@pytest.mark.parametrize(
    "change,data,config,message",
    [
        (
            poison("model.layers.1.mlp.up_proj.weight", float("nan")),
            tokens(),
            {},
            "layers.1.mlp.up_proj.weight holds NaN",
        ),
        (poison("model.layers.2.self_attn.q_proj.weight", float("inf")), tokens(), {}, "layers.2.self_attn.q_proj"),
        (poison("model.embed_tokens.weight", 0.0), tokens() + VOCABULARY, {}, "made with another tokenizer"),
        (overflow, tokens(), {}, "output of model.layers.1 holds NaN or infinities"),
        (None, tokens(), {"pattern": "3:5", "sparsity": 0.4, "allocation": "uniform"}, "divisible by 5, got 32"),
        (None, tokens(), {"exclude": ["mlp.upproj"]}, "mlp.upproj"),
        (None, tokens(), {"blocks": ["model.layer"]}, "Did you mean 'model.layers'"),
    ],
)
def test_bad_input_is_a_clear_error_before_any_weight_is_changed(change, data, config, message):
    model = tiny_llama()
    if change:
        change(model)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        prune(model, data, DSAConfig(**{"sparsity": 0.5, **config}))
    after = state(model)
    assert all(torch.equal(after[name].nan_to_num(7), before[name].nan_to_num(7)) for name in before)


def test_the_report_says_what_was_asked_and_achieved():
    model = tiny_llama()
    report = prune(model, tokens(), DSAConfig(0.5, allocation="owl", exclude=["q_proj"]))
    lines = str(report).splitlines()
    assert lines[0].split() == ["unit", "weights", "asked", "achieved"]
    assert [line.split()[0] for line in lines[1:4]] == list(blocks_of(model))
    assert lines[5].split()[-2:] == ["0.5000", "0.5000"]
    assert "left dense: 3 matrices (excluded)" in str(report)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["achieved"]["removed"] == report.removed
    assert data["calibration"] == {"source": "tensor", "samples": 6, "length": 16, "tokens": 96, "seed": None}
    assert data["achieved"]["parameters"] == sum(p.numel() for p in model.parameters())


def test_raised_damping_is_reported():
    model = tiny_llama(num_hidden_layers=2)
    report = prune(model, tokens(1, 4), DSAConfig(0.5, "sparsegpt", "uniform", update=UpdateConfig(damping=0.0)))
    assert report.damping and "damping raised for" in str(report)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_low_precision_models_are_pruned_in_their_own_dtype():
    model = tiny_llama().bfloat16()
    prune(model, tokens(), DSAConfig(0.5, "sparsegpt", "dsa"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert zeros(model.model.layers) == round(0.5 * size(model.model.layers))


@pytest.mark.parametrize(
    "allocation,changes,blocks,told",
    [
        ("sigmoid/outlier_share/no_op", {}, 3, True),  # nothing is five times a mean of a half
        ("sigmoid/outlier_share/no_op", {}, 1, False),
        ("sigmoid/outlier_share/no_op", {"spread": 0.0}, 3, False),
        ("uniform", {}, 3, False),
        ("abs/var/atan", {}, 3, False),
    ],
)
def test_an_allocation_that_does_not_tell_units_apart_is_told(allocation, changes, blocks, told, caplog):
    model = tiny_llama(num_hidden_layers=blocks)
    with caplog.at_level(logging.WARNING, "optimum_dsa.pruning.prune"):
        found = allocate(model, tokens(), DSAConfig(0.5, allocation=allocation, **changes))
    assert ("does not tell the units of this model apart: all get 0.5" in caplog.text) is told
    assert (len(set(found.sparsity.values())) == 1) is (allocation != "abs/var/atan")


def test_a_given_allocation_is_of_the_weights_that_are_pruned_and_of_no_other_units():
    model = tiny_llama()
    found = allocate(model, None, DSAConfig(0.5, "magnitude", "uniform"))
    with pytest.raises(ValueError, match="are pruned here; it is of another model, or of other exclude"):
        prune(model, None, DSAConfig(0.5, "magnitude", found, exclude=("down_proj",)))
    with pytest.raises(ValueError, match="granularity='matrix' is for an allocation that is computed"):
        prune(model, None, DSAConfig(0.5, "magnitude", found, granularity="matrix"))
    with pytest.raises(ValueError, match=r"spread=0.1 is for an allocation that is computed"):
        prune(model, None, DSAConfig(0.5, "magnitude", found, spread=0.1))
    plain = Allocation.from_dict(found.sparsity)
    assert prune(model, None, DSAConfig(0.5, "magnitude", plain, exclude=("down_proj",))).allocation.overall == 0.5


def test_a_given_allocation_may_leave_the_bounds_and_is_fitted_to_the_exact_total():
    model = tiny_llama()
    per_block = size(model.model.layers[0])
    given = Allocation({"model.layers.0": 0.02, "model.layers.1": 0.9903, "model.layers.2": 0.79}, dict.fromkeys(
        (f"model.layers.{index}" for index in range(3)), per_block
    ), "mine")  # fmt: skip
    for low, high in ((0.0, 0.99), (0.5, 0.7)):
        found = allocate(model, None, DSAConfig(0.6, allocation=given, min_sparsity=low, max_sparsity=high))
        assert found.name == "mine" and found.sparsity == pytest.approx(given.sparsity, abs=2e-3)
        assert sum(found.counts().values()) == round(0.6 * 3 * per_block)
    for wrong in (0.6004, 0.5996):
        allocate(model, None, DSAConfig(wrong, allocation=given))
    for wrong in (0.6007, 0.5993):
        with pytest.raises(ValueError, match="mean sparsity is 0.6001"):
            allocate(model, None, DSAConfig(wrong, allocation=given))


def test_what_a_config_reads_of_calibration():
    for changes, expected in (
        ({"method": "wanda", "allocation": "uniform"}, False),
        ({"method": "sparsegpt", "allocation": "uniform"}, True),
        ({"method": "wanda", "allocation": "lsa"}, True),
        ({"method": "magnitude", "allocation": "uniform", "metric": "obs"}, True),
        ({"method": "wanda", "allocation": "dsa", "allocation_metric": "obs"}, True),
    ):
        found = DSAConfig(0.5, **changes).resolved
        assert ("gram" in found.reads | found.allocation_reads) is expected, changes
    with pytest.raises(ValueError, match="allocation 'owl' needs calibration data"):
        allocate(tiny_llama(), None, DSAConfig(0.5, allocation="owl"))


def test_statistics_that_are_there_already_are_used_and_nothing_is_run():
    model = tiny_llama()
    found = find_architecture(model)
    statistics = {name: each for block in walk_blocks(model, found, [{"input_ids": tokens()}], sequential=False)
                  for name, each in block.statistics.items()}  # fmt: skip
    expected = tiny_llama()
    prune(expected, tokens(), DSAConfig(0.5, sequential=False))
    model.forward = None
    report = prune(model, CollectedStatistics(statistics, "elsewhere"), DSAConfig(0.5))
    assert same_state(model, state(expected))
    assert report.calibration["source"] == "elsewhere" and report.calibration["tokens"] == 96
