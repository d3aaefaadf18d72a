import pytest
import torch

from optimum_dsa.model.statistics import LayerStatistics
from optimum_dsa.pruning.unstructured.metrics import METRICS


@pytest.fixture
def statistics():
    stats = LayerStatistics(10, with_gram=True)
    stats.update_(torch.randn(4, 20, 10, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 11))
    stats.sequences = 4
    return stats.of_weight({"gradients": GRADIENT, "regional": GRADIENT.flip(0)})


GRADIENT = torch.rand(6, 10, generator=torch.Generator().manual_seed(2)) / 50
WEIGHT = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", sorted(METRICS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_non_negative_float32_of_the_weights_shape(name, dtype, statistics):
    weight = WEIGHT.to(dtype)
    before, sums = weight.clone(), statistics.squared_sum.clone()
    scores = METRICS[name](weight, statistics)
    assert scores.shape == weight.shape and scores.dtype == torch.float32
    assert scores.isfinite().all() and (scores >= 0).all()
    assert torch.equal(weight, before) and torch.equal(statistics.squared_sum, sums)
    assert METRICS.references[name].startswith("https://")


@pytest.mark.parametrize("name", sorted(METRICS))
def test_zeros_score_lowest_in_their_row(name, statistics):
    weight = WEIGHT.clone()
    weight[:, 3] = 0
    scores = METRICS[name](weight, statistics)
    assert (scores[:, 3] == scores.amin(dim=1)).all()


@pytest.mark.parametrize("name", sorted(METRICS))
def test_a_weight_that_saw_no_input_is_still_scored(name):
    nothing = torch.zeros_like(WEIGHT)
    unseen = LayerStatistics(10, with_gram=True).of_weight({"gradients": nothing, "regional": nothing})
    scores = METRICS[name](WEIGHT, unseen)
    assert scores.isfinite().all() and (scores > 0).all()
    if name != "ria":  # which weighs a weight against its row and column, inputs or not
        assert torch.equal(scores.argsort(dim=1), WEIGHT.abs().argsort(dim=1))


def test_wanda_is_the_weight_times_the_norm_of_its_input(statistics):
    x = torch.randn(4, 20, 10, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 11)
    norm = (x.square().sum((0, 1)) / 4).sqrt()
    assert torch.allclose(METRICS["wanda"](WEIGHT, statistics), WEIGHT.abs() * norm, rtol=1e-5)


def test_the_published_symbolic_metric_is_its_formula_on_random_tensors():
    """|W · W| · mms(|G|), mms(x) = (x − min x) ÷ (max x − min x) over the matrix."""
    generator = torch.Generator().manual_seed(3)
    for rows, columns in ((1, 2), (6, 10), (33, 7)):
        weight, gradient = (torch.randn(rows, columns, generator=generator) for _ in range(2))
        gradient = gradient.abs() * 10.0 ** torch.randint(-6, 3, (1,), generator=generator)
        before = gradient.clone()
        found = METRICS["pruner_zero"](weight, LayerStatistics(columns).of_weight({"gradients": gradient}))
        expected = (weight * weight).abs() * ((gradient - gradient.min()) / (gradient.max() - gradient.min()))
        torch.testing.assert_close(found, expected)
        assert torch.equal(gradient, before)


def test_gradients_are_blended_with_the_norms_of_inputs(statistics):
    norm = statistics.input_norm
    torch.testing.assert_close(
        METRICS["gblm"](WEIGHT, statistics), WEIGHT.abs() * norm + 100 * WEIGHT.abs() * GRADIENT
    )
    mean = GRADIENT.flip(0) / 2  # over four sequences, squared
    torch.testing.assert_close(METRICS["wanda++"](WEIGHT, statistics), (100 * mean + norm) * WEIGHT.abs())


def test_the_dual_expansion_adds_norms_of_outputs_to_the_error(statistics):
    x = torch.randn(4, 20, 10, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 11)
    outputs = (x @ WEIGHT.t()).square().sum((0, 1)).div(4).sqrt()
    norm, n = statistics.input_norm, 4
    first = outputs[:, None] * WEIGHT.abs() * norm
    # The published sums over the samples: y = Σ k ‖Y‖ ÷ n s, x = Σ k √(2 ÷ k) ‖X‖ ÷ n s, beside (2 ÷ n) X·Xᵀ.
    scale = n / 2 * (n + 1) / 2 * (2 / 3) * (2 * n) ** 0.5 / 1500**2
    expected = METRICS["obs"](WEIGHT, statistics) + scale * first
    torch.testing.assert_close(METRICS["d2"](WEIGHT, statistics), expected)
    assert (expected - METRICS["obs"](WEIGHT, statistics)).abs().max() > 0
    expected = WEIGHT.square() * norm**2 + ((n + 1) / 2 / 1500) ** 2 * first
    torch.testing.assert_close(METRICS["d2_still"](WEIGHT, statistics), expected)


def test_the_wanda_variant_cuts_every_row_at_one_share(statistics):
    """All weights below a threshold α are exactly the lowest of their row that together hold α of its score."""
    wanda, share = METRICS["wanda"](WEIGHT, statistics), METRICS["wanda_variant"](WEIGHT, statistics)
    for row, shares in zip(wanda, share):
        held = [row[row <= value].sum() / row.sum() for value in row]
        assert torch.allclose(shares, torch.stack(held), atol=1e-5)


def test_ria_against_its_formula(statistics):
    size = WEIGHT.abs()
    expected = (size / size.sum(0) + size / size.sum(1, keepdim=True)) * statistics.input_norm**0.5
    assert torch.allclose(METRICS["ria"](WEIGHT, statistics), expected, rtol=1e-5)


def test_obs_is_the_error_of_removing_a_weight_and_repairing_the_rest(statistics):
    """w² / [H⁻¹]_jj equals the least squares error left when weight j is zero and the others are free."""
    hessian = statistics.gram.double() + 0.01 * statistics.gram.diagonal().mean() * torch.eye(10)
    scores = METRICS["obs"](WEIGHT, statistics)
    row = WEIGHT[0].double()
    for j in range(10):
        free = [k for k in range(10) if k != j]
        change = torch.zeros(10, dtype=torch.float64)
        change[j] = -row[j]
        change[free] = -torch.linalg.solve(hessian[free][:, free], hessian[free, j] * -row[j])
        assert scores[0, j].item() == pytest.approx((change @ hessian @ change).item(), rel=1e-3)
