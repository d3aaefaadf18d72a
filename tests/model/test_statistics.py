import logging

import pytest
import torch

from optimum_dsa.model.statistics import CollectedStatistics, LayerStatistics, sums_halves_in_float32


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


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_inputs_that_never_fired_have_a_one_on_the_diagonal(scale):
    """So their weights are worth something whatever the scale of the others; the ones count in the mean's damping."""
    stats = LayerStatistics(6, with_gram=True)
    stats.update_(scale * data() * torch.tensor([1.0, 0, 1, 0, 1, 1]))
    gram = stats.gram.clone()
    factor = stats.inverse_factor(0.05).factor
    mended = gram + torch.diag((gram.diagonal() == 0).float())
    mended += 0.05 * mended.diagonal().mean() * torch.eye(6)
    assert torch.allclose(factor.t() @ factor @ mended, torch.eye(6), atol=1e-3)
    assert torch.equal(stats.gram, gram)
    assert factor[1, 1].item() == pytest.approx(mended[1, 1].item() ** -0.5, rel=1e-4)


def test_a_matrix_that_saw_no_input_answers_as_if_its_inputs_were_white():
    stats = LayerStatistics(4, with_gram=True)
    assert torch.equal(stats.input_norm, torch.ones(4))
    assert torch.allclose(stats.inverse_factor(0.01).factor, torch.eye(4) / 1.01**0.5, rtol=1e-5)
    assert stats.damping_used == 0.01


@pytest.mark.parametrize("sequences,divisor", [(0, 1), (1, 1), (4, 4)])
def test_the_norm_of_an_input_is_per_sequence(sequences, divisor):
    stats = LayerStatistics(6)
    stats.update_(data())
    stats.sequences = sequences
    before = stats.squared_sum.clone()
    assert torch.allclose(stats.input_norm, (data().square().sum(0) / divisor).sqrt(), rtol=1e-5)
    assert torch.equal(stats.squared_sum, before)


def test_new_inputs_or_another_damping_make_a_new_factor():
    stats = LayerStatistics(6, with_gram=True)
    stats.update_(data())
    assert stats.damping_used is None
    first, other = stats.inverse_factor(0.01), stats.inverse_factor(0.1)
    assert other.damping == stats.damping_used == 0.1 and not torch.equal(first.factor, other.factor)
    stats.update_(data(seed=1))
    assert stats.damping_used is None
    assert not torch.equal(stats.inverse_factor(0.1).factor, other.factor)


@pytest.mark.parametrize("chunk", [4, 20, 60])
def test_many_inputs_are_summed_part_by_part_as_at_once(chunk, monkeypatch):
    monkeypatch.setattr("optimum_dsa.model.statistics.CHUNK", chunk)
    rows = data(37)
    for gram in (False, True):
        stats = LayerStatistics(6, with_gram=gram)
        stats.update_(rows)
        assert stats.tokens == 37 and torch.allclose(stats.squared_sum, rows.square().sum(0), rtol=1e-5)
        if gram:
            assert torch.allclose(stats.gram, rows.t() @ rows, rtol=1e-4, atol=1e-4)


def test_no_damping_at_all_is_raised_in_great_steps(caplog):
    stats = LayerStatistics(6, with_gram=True)
    stats.update_(data(3))  # of rank three
    with caplog.at_level(logging.WARNING):
        assert stats.inverse_factor(0.0).damping == 0.01
    stats = LayerStatistics(2, with_gram=True, tokens=3)
    stats.gram = torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    assert stats.inverse_factor(0.0).damping == 100.0
    whole = LayerStatistics(6, with_gram=True)
    whole.update_(data())
    caplog.clear()
    assert whole.inverse_factor(0.0).damping == 0.0 and not caplog.text


def test_what_others_collected_says_how_much_was_seen():
    few, many = LayerStatistics(2, tokens=3), LayerStatistics(2, tokens=9)
    facts = CollectedStatistics({"a": few, "b": many, "c": few}, "elsewhere").facts()
    assert facts == {"source": "elsewhere", "samples": None, "length": None, "tokens": 9, "seed": None}
    assert CollectedStatistics({}, "nowhere").facts()["tokens"] == 0


def test_without_a_gram_the_factor_says_what_to_do():
    with pytest.raises(ValueError, match="was not collected; walk the blocks with reads"):
        LayerStatistics(3).inverse_factor()


def test_sums_that_are_given_are_gone_on_with():
    first = LayerStatistics(6, with_gram=True)
    first.update_(data())
    copy = LayerStatistics(
        6, with_gram=True, tokens=40, squared_sum=first.squared_sum.clone(), gram=first.gram.clone()
    )
    for stats in (first, copy):
        stats.update_(data(seed=1))
    assert torch.equal(copy.gram, first.gram) and torch.equal(copy.squared_sum, first.squared_sum)
    assert LayerStatistics(6).gram is None and copy.tokens == 80


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_processor_has_no_products_of_halves_in_float32(dtype):
    assert not sums_halves_in_float32(torch.device("cpu"), dtype)


def test_inputs_can_be_taken_to_have_never_fired():
    inputs = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 1
    whole, part = (LayerStatistics(6, with_gram=True, with_sum=True, sequences=1) for _ in range(2))
    gone = torch.tensor([False, True, False, False, True, False])
    whole.update_(inputs)
    part.update_(inputs.masked_fill(gone, 0))
    whole.inverse_factor(0.1)
    found = whole.without(gone)
    assert torch.equal(found.gram, part.gram) and torch.equal(found.sum, part.sum)
    assert torch.equal(found.input_norm, part.input_norm) and torch.equal(found.dead, gone)
    torch.testing.assert_close(found.inverse_factor(0.1).factor, part.inverse_factor(0.1).factor)
    assert not torch.equal(whole.gram, part.gram)
