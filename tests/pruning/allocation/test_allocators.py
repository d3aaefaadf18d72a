import math
from functools import cache

import pytest
import torch

from optimum_dsa import DSAConfig
from optimum_dsa.model.statistics import LayerStatistics
from optimum_dsa.pruning.allocate import architecture_for, seen_by_allocator
from optimum_dsa.pruning.allocation import ALLOCATIONS, Unit, fit_to_budget
from optimum_dsa.pruning.allocation.allocators import greedy_error, published_spread, tail_exponent
from optimum_dsa.pruning.source import as_calibration
from optimum_dsa.pruning.unstructured.metrics import wanda

from ...tiny import same_state, state, tiny_llama, tokens


def statistics(in_features, seed=0, tokens=200):
    stats = LayerStatistics(in_features, with_gram=True)
    stats.update_(torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(seed)))
    stats.sequences = 4
    return stats


def units(granularity, blocks=5):
    generator = torch.Generator().manual_seed(0)
    found = []
    for index in range(blocks):
        scale = 1 + index
        weights = [torch.randn(24, 16, generator=generator) * scale, torch.randn(16, 40, generator=generator) ** 3]
        stats = [statistics(16, index), statistics(40, index + 50)]
        depth = index / (blocks - 1)
        if granularity == "block":
            found.append(Unit(f"b{index}", depth, weights, stats, wanda))
        else:
            found += [Unit(f"b{index}.{j}", depth, [w], [s], wanda) for j, (w, s) in enumerate(zip(weights, stats))]
    return found


@cache
def measured(name, granularity="block", target=0.6):
    """What the allocator is given to propose by, and the sizes of the units."""
    allocator = ALLOCATIONS[name]
    granularity = allocator.granularity or granularity
    if allocator.reads != "model":
        found = {unit.name: allocator.measure(unit) for unit in units(granularity)}
        return found, {unit: 384 if unit.endswith(".0") else 640 for unit in found}
    model = tiny_llama(num_hidden_layers=2)
    config = DSAConfig(target, "wanda", name, granularity=granularity)
    architecture = architecture_for(model, config)
    before = state(model)
    seen = seen_by_allocator(model, architecture, as_calibration(tokens(2, 8), model), config)
    found = allocator.measure_model(seen)
    assert same_state(model, before) and found.keys() == architecture.units(granularity).keys()
    return found, {unit: sum(each.size for each in own) for unit, own in architecture.units(granularity).items()}


def wish(name, granularity="block", target=0.6, spread=None):
    return ALLOCATIONS[name].propose(measured(name, granularity, target)[0], target, spread)


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
@pytest.mark.parametrize("granularity", ["block", "matrix"])
@pytest.mark.parametrize("target", [0.0, 0.3, 0.7, 0.95])
def test_every_allocator_meets_every_budget(name, granularity, target):
    wanted = wish(name, granularity, target)
    sizes = measured(name, granularity, target)[1]
    allocation = fit_to_budget(wanted, sizes, target)
    assert sum(allocation.counts().values()) == round(target * sum(sizes.values()))
    if target == 0:
        assert set(allocation.counts().values()) == {0}


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
def test_every_allocator_is_deterministic_and_leaves_the_weights_alone(name):
    allocator = ALLOCATIONS[name]
    if allocator.reads == "model":
        first = wish(name)
        measured.cache_clear()
        assert first == wish(name)
        return
    seen = units(allocator.granularity or "block")
    before = [[weight.clone() for weight in unit.weights] for unit in seen]
    first = allocator.propose({unit.name: allocator.measure(unit) for unit in seen}, 0.6)
    again = allocator.propose({unit.name: allocator.measure(unit) for unit in seen}, 0.6)
    assert first == again
    assert all(torch.equal(a, b) for unit, old in zip(seen, before) for a, b in zip(unit.weights, old))


@pytest.mark.parametrize(
    "name", sorted(set(ALLOCATIONS) - {"uniform", "er", "er_plus", "global", "dsa", "ecoflap", "besa"})
)
def test_the_spread_is_the_half_width(name):
    wanted = wish(name, target=0.5, spread=0.05)
    assert max(wanted.values()) - min(wanted.values()) == pytest.approx(0.1, rel=0.1)
    assert len({round(value, 12) for value in wish(name, target=0.5, spread=0.0).values()}) == 1


def test_every_published_allocator_has_its_reference():
    assert {name for name, reference in ALLOCATIONS.references.items() if not reference} == {"uniform"}


def test_the_ramp_rises_with_depth():
    assert list(wish("atp", target=0.6, spread=0.1).values()) == pytest.approx([0.5, 0.55, 0.6, 0.65, 0.7])


def test_one_threshold_over_all_scores():
    """`global` gives every unit the share of its scores below the quantile of all scores."""
    seen = units("block")
    allocator = ALLOCATIONS["global"]
    wanted = allocator.propose({unit.name: allocator.measure(unit) for unit in seen}, 0.6)
    flat = {unit.name: unit.flat_scores() for unit in seen}
    threshold = torch.cat(list(flat.values())).quantile(0.6)
    for name, scores in flat.items():
        assert wanted[name] == pytest.approx((scores < threshold).float().mean().item(), abs=5e-3)


def test_owl_protects_the_unit_with_more_outliers():
    calm, wild = torch.ones(10, 100), torch.ones(10, 100)
    wild[:, :3] = 100.0
    stats = LayerStatistics(100)
    measured = {
        name: ALLOCATIONS["owl"].measure(Unit(name, 0.0, [weight], [stats], wanda))
        for name, weight in (("calm", calm), ("wild", wild))
    }
    assert measured == pytest.approx({"calm": 0.0, "wild": 3.0})
    assert ALLOCATIONS["owl"].propose(measured, 0.7) == pytest.approx({"calm": 0.78, "wild": 0.62})


def test_erdos_renyi_densities_follow_the_shapes_until_one_is_full():
    shapes = {"square": (64, 64), "flat": (8, 512), "small": (8, 8)}
    wanted = ALLOCATIONS["er"].propose(shapes, 0.9)
    density = {name: 1 - value for name, value in wanted.items()}
    ratio = (8 + 512) / (8 * 512) / ((64 + 64) / (64 * 64))
    assert density["flat"] / density["square"] == pytest.approx(ratio)
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    kept = sum(density[name] * sizes[name] for name in sizes)
    assert kept == pytest.approx(0.1 * sum(sizes.values()))
    assert ALLOCATIONS["er"].propose(shapes, 0.5)["small"] == 0.0
    assert ALLOCATIONS["er_plus"].propose(shapes, 0.5)["small"] == 0.0


def test_dlp_uses_its_published_widths():
    assert [published_spread(s) for s in (0.05, 0.1, 0.7, 0.8, 0.95)] == [0.06, 0.06, 0.15, 0.12, 0.12]
    assert published_spread(0.65) == pytest.approx(0.125)


def test_the_tail_exponent_of_a_power_law_is_recovered():
    """Eigenvalues with density λ^-α have the Hill exponent α."""
    uniform = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    for alpha in (2.5, 4.0):
        assert tail_exponent(uniform ** (-1 / (alpha - 1))) == pytest.approx(alpha, rel=0.1)


def published_exponent(eigenvalues):
    """The published loop over all eigenvalues, xmin at the peak of the histogram, in plain Python."""
    values = sorted(value for value in eigenvalues if value > 0)
    logs = [math.log10(value) for value in values]
    low, high = logs[0], logs[-1]
    bins = [0] * 100
    for value in logs:
        bins[min(int((value - low) / (high - low) * 100), 99)] += 1
    peak = 10 ** (low + (high - low) * bins.index(max(bins)) / 100)
    best, exponent = 1.0, 0.0
    for i, smallest in enumerate(values[:-1]):
        if smallest < math.log10(0.95 * peak):
            continue
        if smallest > 1.5 * peak:
            break
        n = len(values) - i
        alpha = 1 + n / sum(math.log(value / smallest) for value in values[i:])
        gap = max(abs(1 - (value / smallest) ** (1 - alpha) - k / n) for k, value in enumerate(values[i:]))
        if gap < best:
            best, exponent = gap, alpha
    return exponent


@pytest.mark.parametrize("scale", [0.3, 1.0, 40.0, 3000.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_tail_exponent_is_that_of_the_published_loop(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.linalg.svdvals(torch.randn(60, 90, generator=generator).double()).square() / 90 * scale
    heavy = spectrum * torch.rand(60, generator=generator).double() ** -0.7
    for values in (spectrum, heavy):
        assert tail_exponent(values) == pytest.approx(published_exponent(values.tolist()), rel=1e-6)


def test_small_eigenvalues_count_and_zeros_do_not():
    """The published default drops none: a spectrum's histogram, and so its peak, begins at its smallest value."""
    values = torch.linspace(1, 100, 40, dtype=torch.float64)
    small = torch.cat([torch.full((7,), 100 * 0.9e-5, dtype=torch.float64), values])
    assert tail_exponent(small) == pytest.approx(published_exponent(small.tolist()), rel=1e-6)
    assert tail_exponent(small) != tail_exponent(values)
    assert tail_exponent(torch.cat([torch.zeros(3, dtype=torch.float64), values])) == tail_exponent(values)
    assert tail_exponent(values.flip(0)) == tail_exponent(values)


def test_a_spectrum_of_fewer_than_three_values_has_no_tail():
    assert tail_exponent(torch.tensor([5.0, 1.0])) == tail_exponent(torch.tensor([5.0, 1.0, 0.0])) == 1.0
    assert tail_exponent(torch.tensor([5.0, 2.0, 1.0])) > 1.0


@pytest.mark.parametrize(
    "spread,expected", [(None, [0.7, 1.3, 1.3, 1.0]), (0.07, [0.9, 1.1, 1.1, 1.0]), (0.0, [1.0, 1.0, 1.0, 1.0])]
)
def test_alphapruning_is_proportional_to_the_scaled_exponents_at_the_mean_asked_for(spread, expected):
    """Heavier tails (a smaller exponent) are pruned less; ratios run from 1 − ε to 1 + ε, and the target is the mean
    over all weights: a large block counts as much as it is large."""
    sizes = [100, 300, 50, 50]
    measured = dict(zip("abcd", zip([2.0, 6.0, 6.0, 4.0], sizes)))
    proposed = ALLOCATIONS["alphapruning"].propose(measured, 0.7, spread)
    mean = sum(ratio * size for ratio, size in zip(expected, sizes)) / sum(sizes)
    assert list(proposed.values()) == pytest.approx([0.7 * ratio / mean for ratio in expected])
    overall = sum(share * size for share, size in zip(proposed.values(), sizes)) / sum(sizes)
    assert overall == pytest.approx(0.7)
    same = ALLOCATIONS["alphapruning"].propose({"a": (3.0, 8), "b": (3.0, 9)}, 0.7)
    assert list(same.values()) == pytest.approx([0.7, 0.7])


def test_alphapruning_takes_the_mean_over_a_blocks_matrices():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(20, 30, generator=generator), torch.randn(40, 25, generator=generator) ** 3]
    measure = ALLOCATIONS["alphapruning"].measure
    single = [measure(Unit("u", 0.0, [weight], [None], wanda)) for weight in weights]
    expected = [tail_exponent(torch.linalg.svdvals(weight.double()).square()) for weight in weights]
    assert [exponent for exponent, _ in single] == pytest.approx(expected, rel=1e-4)
    both = measure(Unit("u", 0.0, weights, [None] * 2, wanda))
    assert both == (pytest.approx(sum(exponent for exponent, _ in single) / 2), 1600)


def test_a_threshold_within_one_bin_takes_its_share_of_all_that_lie_there():
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    first, second = counts.clone(), counts.clone()
    first[10], first[20], second[20], second[30] = 10, 10, 30, 50
    propose = ALLOCATIONS["global"].propose
    assert propose({"a": first, "b": second}, 0.1) == pytest.approx({"a": 0.5, "b": 0.0})
    assert propose({"a": first, "b": second}, 0.3) == pytest.approx({"a": 0.75, "b": 0.1875})
    assert propose({"a": first, "b": second}, 0.5) == pytest.approx({"a": 1.0, "b": 0.375})
    assert propose({"a": first, "b": second}, 1.0) == pytest.approx({"a": 1.0, "b": 1.0})
    assert propose({"a": first, "b": second}, 0.0) == pytest.approx({"a": 0.0, "b": 0.0})
    last = counts.clone()
    last[-1] = 4
    assert propose({"a": last}, 0.5) == pytest.approx({"a": 0.5})


def test_erdos_renyi_keeps_its_last_matrix_dense_as_long_as_the_budget_allows():
    shapes = {"a": (64, 64), "b": (32, 128), "last": (64, 48)}
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    for target in (0.5, 0.6):
        plain, plus = (ALLOCATIONS[name].propose(shapes, target) for name in ("er", "er_plus"))
        assert plus["last"] == 0.0 < plain["last"]
        for wanted in (plain, plus):
            assert sum(wanted[name] * sizes[name] for name in sizes) == pytest.approx(target * sum(sizes.values()))
    assert ALLOCATIONS["er_plus"].propose(shapes, 0.95) == pytest.approx({"a": 1.0, "b": 1.0, "last": 0.0})


def test_the_published_widths_are_joined_by_lines():
    assert [published_spread(s) for s in (0.3, 0.4, 0.15, 0.25, 0.45, 0.55, 0.75)] == pytest.approx(
        [0.04, 0.02, 0.04, 0.03, 0.03, 0.07, 0.135]
    )
    wide = ALLOCATIONS["dlp"].propose({"a": 0.0, "b": 1.0}, 0.7)
    assert wide == pytest.approx({"a": 0.55, "b": 0.85})
    assert ALLOCATIONS["dlp"].propose({"a": 0.0, "b": 1.0}, 0.7, 0.02) == pytest.approx({"a": 0.68, "b": 0.72})
    assert ALLOCATIONS["lsa"].propose({"a": 0.0, "b": 1.0}, 0.7) == pytest.approx({"a": 0.55, "b": 0.85})
    assert ALLOCATIONS["atp"].propose({"a": 0.0, "b": 1.0}, 0.7) == pytest.approx({"a": 0.62, "b": 0.78})


def greedy(weight, x, width):
    """One weight at a time, half of each group of columns, by the true error ‖removed X‖² of all that is gone."""
    total = 0.0
    for row in weight:
        gone = torch.zeros_like(row)
        for start in range(0, len(row), width):
            columns = range(start, min(start + width, len(row)))
            for _ in range(len(columns) // 2):
                before = (gone @ x).square().sum()
                tries = {j: gone.index_fill(0, torch.tensor(j), row[j].item()) for j in columns if gone[j] == 0}
                rise = {j: (tried @ x).square().sum() - before for j, tried in tries.items()}
                chosen = min(rise, key=rise.get)
                total, gone = total + rise[chosen].item(), tries[chosen]
    return total


@pytest.mark.parametrize("width", [2, 4, 8, 10, 128])
def test_the_greedy_error_of_a_group_counts_what_earlier_groups_removed(width):
    generator = torch.Generator().manual_seed(4)
    weight, x = torch.randn(3, 10, generator=generator), torch.randn(10, 40, generator=generator) + 0.5
    assert greedy_error(weight, x @ x.t(), width) == pytest.approx(greedy(weight, x, width), rel=1e-4)


def test_the_greedy_errors_of_a_units_matrices_are_added():
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(3, 10, generator=generator)
    of_both = Unit("u", 0.0, [weight, weight], [statistics(10), statistics(10, 1)], wanda)
    single = [Unit("u", 0.0, [weight], [each], wanda) for each in of_both.statistics]
    measure = ALLOCATIONS["lsa"].measure
    assert measure(of_both) == pytest.approx(sum(map(measure, single)))


def test_the_greedy_error_is_the_error_of_what_it_removes():
    """Against a plain loop that removes one weight at a time and measures ‖W X − W' X‖² itself."""
    generator = torch.Generator().manual_seed(3)
    weight, x = torch.randn(3, 8, generator=generator), torch.randn(8, 50, generator=generator)
    total = 0.0
    for row in weight:
        removed: list[int] = []
        for _ in range(4):
            errors = {}
            for j in set(range(8)) - set(removed):
                gone = torch.zeros(8)
                gone[[*removed, j]] = row[[*removed, j]]
                errors[j] = (gone @ x).square().sum().item()
            removed.append(min(errors, key=errors.get))
        total += errors[removed[-1]]
    assert greedy_error(weight, x @ x.t()) == pytest.approx(total, rel=1e-4)
    assert math.isfinite(greedy_error(torch.randn(2, 300), torch.eye(300)))
