"""Every row of the four tables, swept: a new one is tested on arrival."""

import math

import pytest
import torch

from optimum_dsa.allocation import POST_PROCESS, PRE_PROCESS, REDUCTION, TRANSFORM


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
