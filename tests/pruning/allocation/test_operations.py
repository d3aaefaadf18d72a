"""Every row of the four tables, swept: a new one is tested on arrival."""

import math

import pytest
import torch

from optimum_dsa.pruning.allocation import POST_PROCESS, PRE_PROCESS, REDUCTION, TRANSFORM


CASES = {
    "scores": torch.rand(60, generator=torch.Generator().manual_seed(0)) * 3,
    "signed": torch.randn(60, generator=torch.Generator().manual_seed(1)),
    "zeros": torch.zeros(60),
    "constant": torch.full((60,), 2.5),
    "tiny": torch.full((60,), 1e-30),
    "huge": torch.full((60,), 1e30),
    "sparse": torch.eye(60)[3] * 4,
}
MATRICES = sorted(name for name in REDUCTION if REDUCTION.fact(name, "matrix"))
VECTORS = sorted(name for name in REDUCTION if not REDUCTION.fact(name, "matrix"))


def reduce(name, x):
    return REDUCTION[name]([x.view(6, 10)] if name in MATRICES else x)


@pytest.mark.parametrize("name", sorted(PRE_PROCESS))
@pytest.mark.parametrize("case", sorted(CASES))
def test_pre_process_keeps_the_shape_and_leaves_its_input_alone(name, case):
    x = CASES[case].clone()
    out = PRE_PROCESS[name](x)
    assert out.shape == x.shape and out.dtype == torch.float32
    assert torch.equal(x, CASES[case])
    assert not out.isnan().any()


@pytest.mark.parametrize("name", sorted(REDUCTION))
@pytest.mark.parametrize("case", sorted(CASES))
def test_reduction_gives_a_number_and_leaves_its_input_alone(name, case):
    x = CASES[case].clone()
    value = reduce(name, x)
    assert value.numel() == 1 and value.dtype == torch.float64
    assert torch.equal(x, CASES[case])
    assert not math.isnan(value.item())


@pytest.mark.parametrize("table", [TRANSFORM, POST_PROCESS], ids=lambda table: table.kind)
def test_transforms_keep_the_shape_and_leave_their_input_alone(table):
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    for name, operation in table.items():
        before = x.clone()
        assert operation(x).shape == x.shape, name
        assert torch.equal(x, before), name


@pytest.mark.parametrize("name", VECTORS)
def test_a_vector_reduction_does_not_depend_on_the_order(name):
    x = CASES["scores"]
    assert reduce(name, x.flip(0)).item() == pytest.approx(reduce(name, x).item(), rel=1e-5)


def test_values_against_their_definitions():
    x = CASES["scores"].double()
    expected = {
        "mean": x.mean(),
        "no_op": x.mean(),
        "var": x.var(),
        "std": x.std(),
        "l1_norm": x.abs().mean(),
        "frobenius_norm": x.square().sum().sqrt(),
        "geometric_mean": x.prod() ** (1 / 60),
        "entropy": torch.distributions.Categorical(x / x.sum()).entropy(),
        "outlier_share": 100 * (x > 5 * x.mean()).double().mean(),
        "median": x.sort().values[29],
    }
    assert sorted(expected) == VECTORS
    for name, value in expected.items():
        assert reduce(name, CASES["scores"]).item() == pytest.approx(value.item(), rel=1e-5), name
    m = x.view(6, 10)
    singular = torch.linalg.svdvals(m)
    expected = {
        "gram": (m @ m.t()).mean(),
        "corref": torch.corrcoef(m).mean(),
        "diagonal": m.diagonal().mean(),
        "rank": torch.linalg.matrix_rank(m).double(),
        "slogdet": torch.linalg.slogdet(m @ m.t()).logabsdet / 12,
        "determinant": singular.log().mean().exp(),
    }
    assert sorted(expected) == MATRICES
    for name, value in expected.items():
        assert reduce(name, CASES["scores"]).item() == pytest.approx(value.item(), rel=1e-5), name


def test_the_geometric_mean_of_many_numbers_neither_under_nor_overflows():
    assert REDUCTION["geometric_mean"](torch.full((10**6,), 1e-20)).item() == pytest.approx(1e-20, rel=1e-4)
    assert REDUCTION["geometric_mean"](torch.full((10**6,), 1e20)).item() == pytest.approx(1e20, rel=1e-4)


def test_rank_counts_independent_rows():
    low = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)) @ torch.randn(2, 20)
    assert REDUCTION["rank"]([low]).item() == 2


def test_published_pre_process_conventions():
    x = torch.tensor([0.0, -2.0, 1.0])
    assert torch.equal(PRE_PROCESS["abslog"](x), torch.tensor([0.0, math.log(2), 0.0]))
    assert PRE_PROCESS["log"](x)[:2].tolist() == pytest.approx([math.log(1 + 1e-6)] * 2, rel=0.1)
    assert PRE_PROCESS["normalize"](torch.ones(4)).tolist() == [0.0] * 4


def test_scaling_and_logarithms_by_hand():
    x = torch.tensor([2.0, 3.0, 4.0])
    assert PRE_PROCESS["mms"](x).tolist() == pytest.approx([0, 0.5, 1])
    assert PRE_PROCESS["mms"](torch.tensor([0.0, 1e-9])).tolist() == pytest.approx([0, 0.5])
    assert PRE_PROCESS["log"](torch.tensor([0.5, 2.0, -1.0])).tolist() == pytest.approx(
        [math.log(0.5 + 1e-6), math.log(2 + 1e-6), math.log(1 + 1e-6)], abs=1e-6
    )
    assert PRE_PROCESS["abslog"](torch.tensor([0.5, -0.5])).tolist() == pytest.approx([math.log(0.5)] * 2)
    assert PRE_PROCESS["normalize"](x).tolist() == pytest.approx([-1, 0, 1])
    assert PRE_PROCESS["pow"](x).tolist() == [4, 9, 16]


@pytest.mark.parametrize("name", ["corref", "rank"])
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_correlations_and_ranks_do_not_depend_on_the_scale(name, scale):
    m = CASES["signed"].view(6, 10)
    assert REDUCTION[name]([m * scale]).item() == pytest.approx(REDUCTION[name]([m]).item(), rel=1e-3)


def test_a_constant_row_correlates_with_none():
    m = torch.stack([CASES["signed"][:10], torch.full((10,), 3.0)])
    assert REDUCTION["corref"]([m]).item() == pytest.approx(0.25)  # one of four pairs: the first row with itself


def test_matrices_count_by_their_size():
    small, large = torch.full((2, 3), 1.0), torch.full((6, 9), 4.0)
    assert REDUCTION["diagonal"]([small, large]).item() == pytest.approx((1 * 6 + 4 * 54) / 60)


def test_singular_values_that_are_nothing_beside_the_largest_count_as_a_millionth_of_it():
    m = torch.diag(torch.tensor([8.0, 2.0, 0.0, 0.0]))
    expected = (math.log(8) + math.log(2) + 2 * math.log(8e-6)) / 4
    assert REDUCTION["slogdet"]([m]).item() == pytest.approx(expected, rel=1e-6)
    assert REDUCTION["determinant"]([m]).item() == pytest.approx(math.exp(expected), rel=1e-6)
    assert REDUCTION["rank"]([torch.diag(torch.tensor([1.0, 1.1e-3, 0.9e-3]))]).item() == 2
    assert REDUCTION["slogdet"]([torch.zeros(3, 3)]).isfinite()


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("name", ["slogdet", "determinant", "rank"])
def test_a_spectrum_of_what_is_not_finite_is_no_number_and_no_error(name, value):
    m = torch.eye(3)
    m[1, 2] = value
    found = REDUCTION[name]([m]).item()
    assert found == 0 if name == "rank" else math.isnan(found)


def test_post_process_looks_at_all_units():
    x = torch.tensor([0.0] * 9 + [1.0], dtype=torch.float64)
    assert POST_PROCESS["normalize"](x).tolist() == pytest.approx([-0.1 / 0.1**0.5] * 9 + [2.0])
    assert POST_PROCESS["normalize"](-x)[-1] == -2.0
    assert POST_PROCESS["normalize"](x[:1]).tolist() == [0.0] and not POST_PROCESS["normalize"](x[:4]).any()
    assert POST_PROCESS["rank"](torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [2, 0, 2, 1]
    assert POST_PROCESS["softmax"](x).sum().item() == pytest.approx(1)


def test_outliers_are_above_five_times_the_mean():
    x = torch.ones(100)
    x[0] = 5.2  # the mean is 1.042
    assert REDUCTION["outlier_share"](x).item() == 0
    x[:2] = 5.6  # 1.092
    assert REDUCTION["outlier_share"](x).item() == pytest.approx(2)


def test_entropy_takes_the_positive_part():
    assert REDUCTION["entropy"](torch.tensor([-5.0, 1.0, 1.0, 0.0])).item() == pytest.approx(math.log(2))
    assert REDUCTION["entropy"](torch.tensor([-5.0, 0.0])).item() == 0
