import logging

import pytest
import torch

from optimum_dsa.statistics import LayerStatistics


def data(rows=40, columns=6, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("gram", [False, True])
def test_parts_add_up_to_the_whole(gram):
    whole, parts = LayerStatistics(6, with_gram=gram), LayerStatistics(6, with_gram=gram)
    whole.update_(data())
    for part in data().view(8, 5, 6).split(3):
        parts.update_(part)
    assert whole.tokens == parts.tokens == 40
    assert torch.allclose(whole.squared_sum, data().square().sum(0), rtol=1e-5)
    assert torch.allclose(parts.squared_sum, whole.squared_sum, rtol=1e-5)
    if gram:
        assert torch.allclose(parts.gram, data().t() @ data(), rtol=1e-4, atol=1e-4)


def test_low_precision_inputs_are_summed_in_float32():
    stats = LayerStatistics(1)
    for _ in range(4):
        stats.update_(torch.full((1000, 1), 0.5, dtype=torch.bfloat16))
    assert stats.squared_sum.dtype == torch.float32 and stats.squared_sum.item() == pytest.approx(1000, rel=1e-6)


def test_the_factor_factorises_the_damped_inverse():
    stats = LayerStatistics(6, with_gram=True)
    stats.update_(data())
    found = stats.inverse_factor(0.01)
    hessian = stats.gram + 0.01 * stats.gram.diagonal().mean() * torch.eye(6)
    assert found.damping == 0.01
    assert torch.equal(found.factor, found.factor.triu())
    assert torch.allclose(found.factor.t() @ found.factor @ hessian, torch.eye(6), atol=1e-4)
    assert stats.inverse_factor(0.01) is found


def test_an_ill_conditioned_gram_raises_its_damping_and_says_so(caplog):
    stats = LayerStatistics(3, with_gram=True)
    stats.gram = torch.tensor([[1.0, 3.0, 0.0], [3.0, 1.0, 0.0], [0.0, 0.0, 1.0]])  # not positive: eigenvalue -2
    stats.tokens = 3
    with caplog.at_level(logging.WARNING):
        found = stats.inverse_factor(0.01)
    assert found.damping == stats.damping_used == pytest.approx(10)
    assert found.factor.isfinite().all()
    assert "raised from 0.01 to 10" in caplog.text


def test_a_gram_that_no_damping_mends_is_an_error():
    stats = LayerStatistics(2, with_gram=True)
    stats.gram = torch.full((2, 2), float("nan"))
    stats.tokens = 1
    with pytest.raises(ValueError, match="no Cholesky factor at any damping"):
        stats.inverse_factor()


def test_inputs_that_never_fired_do_not_break_the_factor():
    stats = LayerStatistics(6, with_gram=True)
    stats.update_(data() * torch.tensor([1.0, 0, 1, 0, 1, 1]))
    assert stats.inverse_factor().factor.isfinite().all()


def test_without_a_gram_the_factor_says_what_to_do():
    with pytest.raises(ValueError, match="gram=True"):
        LayerStatistics(3).inverse_factor()
