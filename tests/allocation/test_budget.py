import itertools
import json
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from optimum_dsa.allocation import Allocation, fit_to_budget, fit_to_levels, fit_to_matrices, split_count


units = st.lists(st.tuples(st.floats(-2, 3), st.integers(1, 10**7)), min_size=1, max_size=12)


def named(values):
    return {f"u{index}": value for index, value in enumerate(values)}


@given(units=units, target=st.floats(0, 1), low=st.floats(0, 0.5), high=st.floats(0.5, 1))
@settings(max_examples=300, deadline=None)
def test_the_budget_is_exact_to_one_weight_and_within_bounds(units, target, low, high):
    assume(low <= target <= high)
    wanted, sizes = named(w for w, _ in units), named(n for _, n in units)
    allocation = fit_to_budget(wanted, sizes, target, low, high)
    assert sum(allocation.counts().values()) == round(target * sum(sizes.values()))
    for unit, count in allocation.counts().items():
        assert low * sizes[unit] - 1.001 <= count <= high * sizes[unit] + 1.001
        assert 0 <= count <= sizes[unit]


@given(units=units, target=st.floats(0.05, 0.95))
@settings(max_examples=100, deadline=None)
def test_the_order_of_wishes_survives_the_fit(units, target):
    wanted, sizes = named(w for w, _ in units), named(n for _, n in units)
    sparsity = fit_to_budget(wanted, sizes, target).sparsity
    for a in wanted:
        for b in wanted:
            if wanted[a] < wanted[b]:
                assert sparsity[a] <= sparsity[b] + 1.001 / sizes[a] + 1.001 / sizes[b]


def test_a_wish_that_meets_the_budget_is_granted():
    wanted, sizes = {"a": 0.5, "b": 0.7}, {"a": 100, "b": 100}
    assert fit_to_budget(wanted, sizes, 0.6).sparsity == wanted


def test_the_mean_is_weighted_by_parameters():
    allocation = fit_to_budget({"a": 0.0, "b": 1.0}, {"a": 900, "b": 100}, 0.1, 0.0, 0.5)
    assert allocation.counts() == {"a": 50, "b": 50}


@pytest.mark.parametrize("wanted", [float("nan"), float("inf")])
def test_a_wish_that_is_not_finite_is_refused_by_name(wanted):
    with pytest.raises(ValueError, match="not finite for b"):
        fit_to_budget({"a": 0.1, "b": wanted}, {"a": 1, "b": 1}, 0.5)


def test_bounds_that_cannot_meet_the_target_are_refused():
    with pytest.raises(ValueError, match=r"0.9 cannot be met with every unit in \[0.1, 0.8\]"):
        fit_to_budget({"a": 0.1}, {"a": 10}, 0.9, 0.1, 0.8)


@given(
    levels=st.sampled_from([4, 8, 16]),
    sizes=st.lists(st.sampled_from([64, 128, 352]), min_size=1, max_size=8),
    target=st.floats(0, 1),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_levels_meet_the_total_as_nearly_as_rounding_can(levels, sizes, target, seed):
    generator = torch.Generator().manual_seed(seed)
    wanted = named(torch.rand(len(sizes), generator=generator).tolist())
    exact = fit_to_budget(wanted, named(sizes), target)
    rounded = fit_to_levels(exact, levels)
    for unit, value in rounded.sparsity.items():
        assert (value * levels) == round(value * levels)
        assert abs(value - exact.sparsity[unit]) < 1 / levels + 1e-6
    total = sum(exact.counts().values())
    choices = [
        {size * math.floor(exact.sparsity[unit] * levels + 1e-9) / levels, size * min(up, levels) / levels}
        for unit, size in exact.sizes.items()
        for up in [math.floor(exact.sparsity[unit] * levels + 1e-9) + 1]
    ]
    best = min(abs(sum(choice) - total) for choice in itertools.product(*choices))
    assert abs(sum(rounded.counts().values()) - total) == pytest.approx(best)


def test_levels_are_exact_where_the_sizes_allow_it():
    exact = fit_to_budget({"a": 0.4, "b": 0.5, "c": 0.6, "d": 0.7}, named([]) | dict.fromkeys("abcd", 800), 0.5)
    assert fit_to_levels(exact, 8).overall == 0.5


@given(
    parts=st.lists(st.lists(st.integers(1, 500), min_size=1, max_size=7), min_size=1, max_size=6),
    target=st.floats(0.2, 0.8),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_rounding_every_matrix_keeps_the_total_and_the_bounds(parts, target, seed):
    matrices = named(parts)
    wanted = named(torch.rand(len(parts), generator=torch.Generator().manual_seed(seed)).tolist())
    exact = fit_to_budget(wanted, {unit: sum(sizes) for unit, sizes in matrices.items()}, target, 0.2, 0.8)
    rounded = fit_to_matrices(exact, matrices, 0.2, 0.8)
    assert sum(rounded.counts().values()) == sum(exact.counts().values())
    for unit, count in rounded.counts().items():
        bounds = [0.2 * exact.sizes[unit], 0.8 * exact.sizes[unit], exact.counts()[unit]]
        assert math.ceil(min(bounds)) <= count <= max(bounds)


def test_a_matrix_loses_what_it_would_lose_alone_and_the_last_unit_makes_up_for_it():
    matrices = {unit: [65536, 32768, 32768, 65536, 180224, 180224, 180224] for unit in "abc"}
    exact = fit_to_budget(dict.fromkeys("abc", 0.0), dict.fromkeys("abc", 737280), 0.7)
    assert list(exact.counts().values()) == [516096] * 3
    rounded = fit_to_matrices(exact, matrices)
    assert list(rounded.counts().values()) == [516097, 516097, 516094]
    split = split_count(516097, dict(enumerate(matrices["a"])))
    assert list(split.values()) == [round(0.7 * size) for size in matrices["a"]]


@given(sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=9), share=st.floats(0, 1))
def test_a_count_is_split_in_proportion_and_without_loss(sizes, share):
    count = round(share * sum(sizes))
    split = split_count(count, named(sizes))
    assert sum(split.values()) == count
    for unit, size in named(sizes).items():
        assert abs(split[unit] - size * count / sum(sizes)) <= 1
        assert 0 <= split[unit] <= size


def test_an_allocation_survives_json(tmp_path):
    allocation = fit_to_budget({"a": 0.3, "b": 0.61}, {"a": 1000, "b": 37}, 0.4, name="mine")
    allocation.save(tmp_path / "allocation.json")
    assert Allocation.load(tmp_path / "allocation.json") == allocation
    (tmp_path / "dsa_config.json").write_text(json.dumps({"allocation": allocation.to_dict()}))
    assert Allocation.load(tmp_path) == allocation


@pytest.mark.parametrize(
    "text", ['{"a": 1.5}', '{"a": "much"}', '{"sparsity": {"a": 0.1}, "sizes": {"b": 1}}', "[1]", "{"]
)
def test_a_broken_allocation_file_is_a_clear_error(text, tmp_path):
    (tmp_path / "allocation.json").write_text(text)
    with pytest.raises(ValueError, match="allocation"):
        Allocation.load(tmp_path / "allocation.json")
