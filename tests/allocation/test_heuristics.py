import math

import pytest
import torch

from optimum_dsa.allocation import ALLOCATIONS, Unit, fit_to_budget
from optimum_dsa.allocation.heuristics import greedy_error, published_spread, tail_exponent
from optimum_dsa.metrics import wanda
from optimum_dsa.statistics import LayerStatistics


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


def wish(name, granularity="block", target=0.6, spread=None):
    allocator = ALLOCATIONS[name]
    return allocator.wish(
        {unit.name: allocator.measure(unit) for unit in units(allocator.granularity or granularity)}, target, spread
    )


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
@pytest.mark.parametrize("granularity", ["block", "matrix"])
@pytest.mark.parametrize("target", [0.0, 0.3, 0.7, 0.95])
def test_every_allocator_meets_every_budget(name, granularity, target):
    wanted = wish(name, granularity, target)
    sizes = {unit: 384 if unit.endswith(".0") else 640 for unit in wanted}
    allocation = fit_to_budget(wanted, sizes, target)
    assert sum(allocation.counts().values()) == round(target * sum(sizes.values()))
    if target == 0:
        assert set(allocation.counts().values()) == {0}


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
def test_every_allocator_is_deterministic_and_leaves_the_weights_alone(name):
    allocator = ALLOCATIONS[name]
    seen = units(allocator.granularity or "block")
    before = [[weight.clone() for weight in unit.weights] for unit in seen]
    first = allocator.wish({unit.name: allocator.measure(unit) for unit in seen}, 0.6)
    again = allocator.wish({unit.name: allocator.measure(unit) for unit in seen}, 0.6)
    assert first == again
    assert all(torch.equal(a, b) for unit, old in zip(seen, before) for a, b in zip(unit.weights, old))


@pytest.mark.parametrize("name", sorted(set(ALLOCATIONS) - {"uniform", "er", "er_plus", "global", "dsa"}))
def test_the_spread_is_the_half_width(name):
    wanted = wish(name, target=0.5, spread=0.05)
    assert max(wanted.values()) - min(wanted.values()) == pytest.approx(0.1, rel=0.1)
    assert len(set(wish(name, target=0.5, spread=0.0).values())) == 1


def test_every_published_allocator_has_its_reference():
    assert {name for name, reference in ALLOCATIONS.references.items() if not reference} == {"uniform"}


def test_the_ramp_rises_with_depth():
    assert list(wish("atp", target=0.6, spread=0.1).values()) == pytest.approx([0.5, 0.55, 0.6, 0.65, 0.7])


def test_one_threshold_over_all_scores():
    """`global` gives every unit the share of its scores below the quantile of all scores."""
    seen = units("block")
    allocator = ALLOCATIONS["global"]
    wanted = allocator.wish({unit.name: allocator.measure(unit) for unit in seen}, 0.6)
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
    assert ALLOCATIONS["owl"].wish(measured, 0.7) == pytest.approx({"calm": 0.78, "wild": 0.62})


def test_erdos_renyi_densities_follow_the_shapes_until_one_is_full():
    shapes = {"square": (64, 64), "flat": (8, 512), "small": (8, 8)}
    wanted = ALLOCATIONS["er"].wish(shapes, 0.9)
    density = {name: 1 - value for name, value in wanted.items()}
    ratio = (8 + 512) / (8 * 512) / ((64 + 64) / (64 * 64))
    assert density["flat"] / density["square"] == pytest.approx(ratio)
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    kept = sum(density[name] * sizes[name] for name in sizes)
    assert kept == pytest.approx(0.1 * sum(sizes.values()))
    assert ALLOCATIONS["er"].wish(shapes, 0.5)["small"] == 0.0
    assert ALLOCATIONS["er_plus"].wish(shapes, 0.5)["small"] == 0.0


def test_dlp_uses_its_published_widths():
    assert [published_spread(s) for s in (0.05, 0.1, 0.7, 0.8, 0.95)] == [0.06, 0.06, 0.15, 0.12, 0.12]
    assert published_spread(0.65) == pytest.approx(0.125)


def test_the_tail_exponent_of_a_power_law_is_recovered():
    """Eigenvalues with density λ^-α have the Hill exponent α."""
    uniform = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    for alpha in (2.5, 4.0):
        assert tail_exponent(uniform ** (-1 / (alpha - 1))) == pytest.approx(alpha, rel=0.1)


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
