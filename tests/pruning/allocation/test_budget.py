import itertools
import json
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from optimum_dsa.pruning.allocation import Allocation, fit_to_budget, fit_to_levels, fit_to_matrices, split_count


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


@pytest.mark.parametrize(
    "low,high,target,rounded",
    [
        (0.0, 0.5, 0.5, {"a": 4, "b": 50}),  # three of 4/9 · 3 are 3: b would go over its bound for it
        (0.0, 1.0, 0.5, {"a": 3, "b": 51}),
        (0.5, 1.0, 0.5, {"a": 5, "b": 49}),  # 5 is below what the bounds allow it, 4 of them are not
    ],
)
def test_no_unit_leaves_its_bounds_for_the_rounding_of_its_matrices(low, high, target, rounded):
    matrices = {"a": [3, 3, 3], "b": [100]}
    sizes = {"a": 9, "b": 100}
    counts = {"a": 4, "b": 50} if low == 0 else {"a": 5, "b": 49}
    exact = Allocation({unit: counts[unit] / sizes[unit] for unit in sizes}, sizes)
    assert fit_to_matrices(exact, matrices, low, high).counts() == rounded


def test_a_unit_that_rounding_takes_over_its_bounds_is_brought_back_to_them():
    """Half of 3 rounds to 2, three times over; half of 5 to 2."""
    sizes = {"odd": 9, "more": 15, "even": 100}
    exact = Allocation({"odd": 4 / 9, "more": 8 / 15, "even": 0.5}, sizes)
    matrices = {"odd": [3, 3, 3], "more": [5, 5, 5], "even": [100]}
    assert fit_to_matrices(exact, matrices).counts() == {"odd": 3, "more": 9, "even": 50}
    assert fit_to_matrices(exact, matrices, 0.0, 0.55).counts() == {"odd": 3, "more": 8, "even": 51}
    assert fit_to_matrices(exact, matrices, 0.4, 1.0).counts() == {"odd": 4, "more": 9, "even": 49}


def test_the_last_units_make_up_for_the_roundings_as_far_as_they_can():
    sizes = {"a": 60, "b": 10, "c": 4}
    matrices = {"a": [6] * 10, "b": [10], "c": [4]}
    exact = Allocation({"a": 24 / 60, "b": 0.5, "c": 0.5}, sizes)  # 2.4 of each six are 2: four are missing
    assert fit_to_matrices(exact, matrices).counts() == {"a": 20, "b": 7, "c": 4}
    exact = Allocation({"a": 26 / 60, "b": 0.5, "c": 0.5}, sizes)  # 2.6 are 3: four are too many
    assert fit_to_matrices(exact, matrices).counts() == {"a": 30, "b": 3, "c": 0}


@given(sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=9), share=st.floats(0, 1))
def test_who_is_nearest_to_the_next_whole_number_gets_it(sizes, share):
    """The split is the nearest to the exact shares that whole numbers of this sum can be."""
    count = round(share * sum(sizes))
    exact = {unit: size * count / sum(sizes) for unit, size in named(sizes).items()}
    split = split_count(count, named(sizes))
    up = [exact[unit] - split[unit] for unit in split if split[unit] > exact[unit] + 1e-6]
    down = [exact[unit] - split[unit] for unit in split if split[unit] < exact[unit] - 1e-6]
    assert not up or not down or 1 + min(up) >= max(down) - 1e-6


def test_among_equal_remainders_the_first_are_rounded_up():
    assert split_count(5, {"a": 10, "b": 10, "c": 10, "d": 10}) == {"a": 2, "b": 1, "c": 1, "d": 1}
    assert split_count(3, {"a": 12, "b": 19}) == {"a": 1, "b": 2}
    assert split_count(0, {"a": 0}) == {"a": 0} and split_count(0, {}) == {}


@given(units=units, target=st.floats(0, 1), low=st.floats(0, 0.5), high=st.floats(0.5, 1))
@settings(max_examples=100, deadline=None)
def test_a_fit_is_the_wish_moved_by_one_number_and_cut_at_the_bounds(units, target, low, high):
    assume(low <= target <= high)
    wanted, sizes = named(w for w, _ in units), named(n for _, n in units)
    fitted = fit_to_budget(wanted, sizes, target, low, high).counts()
    for a in wanted:
        for b in wanted:
            # who was moved up less than another is held by a bound: it at its highest, or the other at its lowest
            if (
                fitted[a] / sizes[a] - wanted[a]
                < fitted[b] / sizes[b] - wanted[b] - 1.001 / sizes[a] - 1.001 / sizes[b]
            ):
                assert fitted[a] >= high * sizes[a] - 1.001 or fitted[b] <= low * sizes[b] + 1.001


@given(
    levels=st.sampled_from([4, 8, 16]),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=8),
    low=st.floats(0, 0.4),
    high=st.floats(0.6, 1),
)
@settings(max_examples=80, deadline=None)
def test_levels_keep_the_bounds_and_the_total(levels, shares, low, high):
    sizes = named([levels * 16] * len(shares))
    exact = fit_to_budget(named(shares), sizes, 0.5, low, high)
    rounded = fit_to_levels(exact, levels, low, high)
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in rounded.sparsity.values())
    total = sum(exact.counts().values())
    assert abs(sum(rounded.counts().values()) - total) <= 8  # half a step of one unit


def test_levels_that_no_choice_can_keep_are_refused():
    with pytest.raises(ValueError, match=r"0.9 cannot be met in steps of 1/8 with every unit from 0/8 to 7/8"):
        fit_to_levels(Allocation(dict.fromkeys("ab", 0.9), dict.fromkeys("ab", 80)), 8, high=0.99)
    with pytest.raises(ValueError, match="a larger M"):
        fit_to_levels(Allocation(dict.fromkeys("ab", 0.3), dict.fromkeys("ab", 80)), 4, low=0.3, high=0.4)


@pytest.mark.parametrize("share", [0.3, 0.55, 0.8])
def test_units_of_one_remainder_that_are_rounded_up_are_spread_over_the_model(share):
    names = [f"layers.{index}" for index in range(12)]
    exact = fit_to_budget(dict.fromkeys(names, share), dict.fromkeys(names, 80), share)
    rounded = list(fit_to_levels(exact, 8).sparsity.values())
    raised = [index for index, value in enumerate(rounded) if value == max(rounded)]
    gaps = [after - before for before, after in zip(raised, raised[1:])]
    assert 0 < len(raised) < 12 and max(gaps) - min(gaps) <= 1, raised
    assert abs(sum(raised) / len(raised) - 5.5) <= 1  # not the first ones, nor the last


def test_a_weight_that_the_budget_gave_to_the_first_units_is_no_other_remainder():
    names = [f"b{index}" for index in range(20)]
    exact = fit_to_budget(dict.fromkeys(names, 0.55), dict.fromkeys(names, 2048), 0.55)
    assert len(set(exact.counts().values())) == 2  # not one number for all
    rounded = fit_to_levels(exact, 4).counts().values()
    raised = [index for index, count in enumerate(rounded) if count == max(rounded)]
    assert raised == [2, 7, 12, 17]
    cost = {name: -index for index, name in enumerate(names)}
    last = fit_to_levels(exact, 4, cost=cost).sparsity
    assert [name for name in names if last[name] == 0.75] == names[-4:]


def test_units_of_one_remainder_are_rounded_up_where_it_costs_least():
    exact = Allocation(dict.fromkeys("abcd", 0.55), dict.fromkeys("abcd", 80), "mine", "block")
    rounded = fit_to_levels(exact, 8, cost={"a": 3.0, "b": 1.0, "c": 2.0, "d": 4.0})
    assert rounded.sparsity == {"a": 0.5, "b": 0.625, "c": 0.625, "d": 0.5}
    assert (rounded.name, rounded.granularity) == ("mine", "block")


def test_levels_prefer_the_units_that_are_nearest_to_the_next_one():
    exact = Allocation({"a": 0.30, "b": 0.45, "c": 0.60, "d": 0.65}, dict.fromkeys("abcd", 100))
    assert fit_to_levels(exact, 4).sparsity == {"a": 0.25, "b": 0.5, "c": 0.5, "d": 0.75}
    assert fit_to_levels(Allocation({"a": 1.0, "b": 0.0}, {"a": 8, "b": 8}), 8).sparsity == {"a": 1.0, "b": 0.0}
    assert fit_to_levels(Allocation({}, {}), 4).sparsity == {}


def test_an_allocation_counts_whole_weights_and_weighs_by_size():
    allocation = Allocation({"a": 1 / 3, "b": 1.0}, {"a": 300, "b": 100}, "mine")
    assert allocation.counts() == {"a": 100, "b": 100} and allocation.overall == 0.5
    assert Allocation({}, {}).overall == 0
    assert Allocation.from_dict(allocation.to_dict()) == allocation
    plain = Allocation.from_dict({"a": 0.5})
    assert (plain.sparsity, plain.sizes, plain.name) == ({"a": 0.5}, {"a": 0}, "custom")
    named_unit = Allocation.from_dict({"sparsity": 0.5})  # a unit of this name
    assert named_unit.sparsity == {"sparsity": 0.5}


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), "0.5", None])
def test_a_share_is_a_number_from_0_to_1(value):
    with pytest.raises(ValueError, match="gives a a sparsity of"):
        Allocation({"a": value}, {"a": 1})
    assert Allocation({"a": 0, "b": 1}, {"a": 1, "b": 1}).counts() == {"a": 0, "b": 1}
    with pytest.raises(ValueError, match="lack a size or a sparsity: b, c"):
        Allocation({"a": 0.5, "b": 0.5}, {"a": 1, "c": 1})


def test_a_folder_gives_what_was_found_before_what_was_pruned(tmp_path):
    found, pruned = Allocation({"a": 0.5}, {"a": 2}, "found"), Allocation({"a": 1.0}, {"a": 2}, "pruned")
    (tmp_path / "dsa_config.json").write_text(json.dumps({"allocation": pruned.to_dict()}))
    assert Allocation.load(tmp_path) == pruned
    found.save(tmp_path / "allocation.json")
    assert Allocation.load(tmp_path) == found
    with pytest.raises(FileNotFoundError, match="dsa_config.json"):
        Allocation.load(tmp_path.parent)


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
