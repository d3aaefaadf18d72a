import pytest
import torch

from optimum_dsa.pruning.allocation import PRE_PROCESS, REDUCTION, AllocationFunction, Unit
from optimum_dsa.pruning.unstructured.metrics import magnitude
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


@pytest.mark.parametrize("scale", [1e-7, 1e5])
@pytest.mark.parametrize("reduction", VECTORS)
def test_scores_of_any_scale_are_reduced_as_they_are(reduction, scale):
    x = (scores(5000) + 0.01) * scale
    function = AllocationFunction((), reduction)
    exact = function.measure(Unit("u", 0.0, [x.view(50, 100)], [None], magnitude))
    assert measure(function, ScoreSummary.of(x)) == pytest.approx(exact, rel=1e-2)


def test_nothing_positive_has_no_entropy():
    summary = ScoreSummary.of(torch.zeros(7))
    assert (summary.values.tolist(), summary.weights.tolist()) == ([0.0], [7.0])
    assert summary.reduce("entropy", summary.pre_processed(())) == 0


def test_the_median_is_the_lower_of_the_two_in_the_middle():
    for values, middle in (([1, 2, 3, 4], 2), ([1, 2, 3], 2), ([5], 5), ([1, 1, 1, 9], 1), ([1, 9, 9, 9], 9)):
        summary = ScoreSummary.of(torch.tensor(values, dtype=torch.float32))
        assert summary.reduce("median", summary.pre_processed(())) == middle
        turned = -summary.pre_processed(())  # falling values are put in order first
        assert summary.reduce("median", turned) == sorted(-value for value in values)[(len(values) - 1) // 2]


def test_one_score_is_one_bin_with_its_own_value():
    summary = ScoreSummary.of(torch.tensor([[0.3, 0.3], [7.0, 0.0]]))
    assert summary.values.tolist() == pytest.approx([0, 0.3, 7]) and summary.weights.tolist() == [1, 2, 1]
    assert ScoreSummary.merged([summary]) is summary


def test_few_scores_are_reduced_exactly():
    x = torch.tensor([0.5, 0.5, 2.0, 7.0])
    summary = ScoreSummary.of(x)
    for name, expected in (("var", x.var()), ("std", x.std()), ("mean", x.mean()), ("frobenius_norm", x.norm())):
        assert summary.reduce(name, summary.pre_processed(())) == pytest.approx(expected.item(), rel=1e-6), name
    normal = (x - x.mean()) / x.std()
    assert summary.pre_processed(("normalize",)).tolist() == pytest.approx(normal[[0, 2, 3]].tolist(), rel=1e-5)
    scaled = ((x - 0.5) / 6.5).square()
    assert summary.pre_processed(("mms", "pow")).tolist() == pytest.approx(scaled[[0, 2, 3]].tolist(), rel=1e-5)
    assert ScoreSummary.of(torch.full((3,), 1e-9)).pre_processed(("mms",)).tolist() == [0]
    near = ScoreSummary.of(torch.tensor([0.0, 1e-9]))
    assert near.pre_processed(("mms",)).tolist() == pytest.approx([0, 0.5], rel=1e-3)
