import pytest
import torch

from optimum_dsa.allocation import PRE_PROCESS, REDUCTION, AllocationFunction, Unit
from optimum_dsa.metrics import magnitude
from optimum_dsa.search.summary import ScoreSummary, measure


MATRICES = [name for name in REDUCTION if REDUCTION.fact(name, "matrix")]
VECTORS = sorted(set(REDUCTION) - set(MATRICES))


def scores(size=40_000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator).abs() * torch.rand(size, generator=generator).exp() * 0.3


@pytest.mark.parametrize("reduction", VECTORS)
@pytest.mark.parametrize("pre_process", [(), *((name,) for name in sorted(PRE_PROCESS)), ("abslog", "normalize")])
def test_a_summary_gives_what_the_scores_give(pre_process, reduction):
    x = scores()
    function = AllocationFunction(tuple(name for name in pre_process if name != "no_op"), reduction)
    # the two that depend on where one score lies are off by the width of a bin, the others by far less
    tolerance = {"median": 5e-3, "outlier_share": 5e-2}.get(reduction, 2e-5)
    exact = function.measure(Unit("u", 0.0, [x.view(200, 200)], [None], magnitude))
    assert measure(function, ScoreSummary.of(x)) == pytest.approx(exact, rel=2e-3, abs=tolerance)


def test_merging_is_the_summary_of_all():
    parts = [scores(1000, seed) * (seed + 1) for seed in range(3)]
    merged, whole = ScoreSummary.merged([ScoreSummary.of(p) for p in parts]), ScoreSummary.of(torch.cat(parts))
    assert torch.equal(merged.weights, whole.weights)
    assert torch.allclose(merged.values, whole.values, rtol=1e-6)


def test_a_users_reduction_is_taken_on_a_sample_of_equal_shares():
    @REDUCTION.register()
    def tenth(x):
        return x.quantile(0.1)

    try:
        x = scores()
        assert ScoreSummary.of(x).reduce("tenth", ScoreSummary.of(x).pre_processed(())) == pytest.approx(
            x.quantile(0.1).item(), rel=5e-3
        )
    finally:
        del REDUCTION["tenth"]
