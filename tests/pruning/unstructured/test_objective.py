"""Laws of the updates that lower ‖(W − Ŵ) X‖²: admm, refit, swap."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_dsa import DSAConfig, prune, verify
from optimum_dsa.model.statistics import LayerStatistics
from optimum_dsa.pruning.unstructured.admm import admm
from optimum_dsa.pruning.unstructured.metrics import METRICS
from optimum_dsa.pruning.unstructured.objective import layer_error, row_errors
from optimum_dsa.pruning.unstructured.patterns import Pattern
from optimum_dsa.pruning.unstructured.updates import UPDATES, Choice

from ...tiny import state, tiny_llama, tokens


PATTERNS = ["row", "matrix", "group:8", "group:12", "2:4", "1:4", "mixed:8"]


def problem(rows=12, columns=32, seed=0, samples=400, dead=(), dtype=torch.float32):
    """A weight and the statistics of inputs that are strongly correlated; those of the columns `dead` are zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, columns // 4, generator=generator) @ torch.randn(
        columns // 4, columns, generator=generator
    )
    x += 0.3 * torch.randn(samples, columns, generator=generator)
    x[:, list(dead)] = 0
    stats = LayerStatistics(columns, with_gram=True)
    stats.update_(x)
    stats.sequences = 4
    return torch.randn(rows, columns, generator=generator).to(dtype), stats


def removing(text, weight, share=0.5):
    """A count that the pattern can meet, about `share` of the weight."""
    pattern = Pattern.parse(text)
    if pattern.sparsity is not None:
        return pattern, round(pattern.sparsity * weight.numel())
    if pattern.kind == "mixed":
        return pattern, round(share * pattern.width) * weight.numel() // pattern.width
    return pattern, round(share * weight.numel()) + 1


def masked(pattern, weight, stats, count, metric="wanda"):
    return Choice(pattern, count, pattern.keep(METRICS[metric](weight, stats), count))


def test_the_objective_is_the_error_of_the_outputs():
    weight, stats = problem(samples=20)
    new = weight * (torch.rand_like(weight) > 0.5)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 8, generator=generator) @ torch.randn(8, 32, generator=generator)
    x += 0.3 * torch.randn(20, 32, generator=generator)
    expected = ((new - weight) @ x.t()).square().sum(1)
    torch.testing.assert_close(row_errors(weight, new, stats.gram), expected, rtol=1e-4, atol=1e-3)
    whole = (weight @ x.t()).square().sum()
    assert layer_error(weight, new, stats.gram) == pytest.approx((expected.sum() / whole).item(), rel=1e-4)
    assert layer_error(weight, weight, stats.gram) == 0 and layer_error(weight, new, torch.zeros(32, 32)) == 0


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("seed", range(3))
def test_admm_loses_less_than_sparsegpt_and_that_less_than_wanda(text, seed):
    weight, stats = problem(24, 48, seed)
    pattern, count = removing(text, weight, 0.6)
    chosen = Choice(pattern, count)
    if pattern.kind in ("row", "matrix"):
        chosen = masked(pattern, weight, stats, count, "obs")
    zeroed = UPDATES["none"](weight, stats, masked(pattern, weight, stats, count))
    errors = [
        layer_error(weight, new, stats.gram)
        for new in (admm(weight, stats, Choice(pattern, count)), UPDATES["sparsegpt"](weight, stats, chosen), zeroed)
    ]
    assert errors[0] < 0.7 * errors[1] < 0.7 * errors[2], errors
    refit = UPDATES["refit"](weight, stats, masked(pattern, weight, stats, count))
    assert errors[0] < layer_error(weight, refit, stats.gram) < errors[2]


@given(
    text=st.sampled_from(PATTERNS),
    share=st.floats(0, 1),
    rows=st.integers(1, 9),
    groups=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def test_every_update_removes_the_exact_count_in_the_pattern(text, share, rows, groups, dtype):
    weight, stats = problem(rows, 8 * groups, dtype=dtype)
    pattern, count = removing(text, weight, share)
    count = min(count, weight.numel())
    choice = masked(pattern, weight, stats, count)
    for name in ("admm", "refit", "swap"):
        new = UPDATES[name](weight, stats, Choice(pattern, count) if name == "admm" else choice)
        assert int((new == 0).sum()) == int((~choice.keep).sum()) == count, name
        assert pattern.holds(new == 0, count) and new.isfinite().all() and new.dtype == dtype


def kinds_of_statistics():
    """Weights and statistics as models have them: fewer samples than inputs, dead inputs, none at all, all equal."""
    yield "usual", *problem()
    yield "singular", *problem(samples=5)
    yield "dead", *problem(dead=[0, 3, 4, 17])
    weight, _ = problem()
    yield "unseen", weight, LayerStatistics(32, with_gram=True)
    yield "lent", weight, LayerStatistics(32, with_gram=True, stand_in=3.0)
    equal = LayerStatistics(32, with_gram=True)
    equal.update_(torch.ones(40, 32))
    yield "equal", weight, equal
    silent = LayerStatistics(32, with_gram=True)
    silent.update_(torch.zeros(40, 32))
    yield "silent", weight, silent


@pytest.mark.parametrize("update", ["refit", "swap", "admm"])
@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("damping", [0.01, 0.0, 1.0])
def test_the_error_of_no_row_rises_from_a_mask(update, text, dtype, damping):
    for kind, weight, stats in kinds_of_statistics():
        weight = weight.to(dtype)
        pattern, count = removing(text, weight)
        choice = masked(pattern, weight, stats, count)
        choice = Choice(pattern, count, choice.keep, damping)
        before = row_errors(weight, UPDATES["none"](weight, stats, choice), stats.second_moment)
        new = UPDATES[update](weight, stats, choice)
        assert new.isfinite().all() and (row_errors(weight, new, stats.second_moment) <= before).all(), kind


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("damping", [0.01, 0.0])
def test_admm_takes_whatever_calibration_leaves_behind(text, damping):
    for kind, weight, stats in kinds_of_statistics():
        pattern, count = removing(text, weight)
        new = admm(weight, stats, Choice(pattern, count, damping=damping))
        assert new.isfinite().all() and int((new == 0).sum()) == count, kind
        assert layer_error(weight, new, stats.second_moment) < 0.5, kind


def test_weights_of_dead_inputs_go_first_and_what_is_kept_of_them_stays():
    dead = [1, 6, 7, 12]
    weight, stats = problem(dead=dead)
    weight[:, dead] *= 100  # however large they are
    assert not admm(weight, stats, Choice(Pattern("row"), weight.numel() // 2))[:, dead].any()
    few = admm(weight, stats, Choice(Pattern("matrix"), 10))
    assert int((few[:, dead] == 0).sum()) == 10
    kept = few[:, dead] != 0
    torch.testing.assert_close(few[:, dead][kept], weight[:, dead][kept])
    assert not UPDATES["swap"](weight, stats, masked(Pattern("row"), weight, stats, weight.numel() // 2))[
        :, dead
    ].any()


def test_inputs_that_were_never_seen_leave_the_magnitude():
    weight, _ = problem()
    new = admm(weight, LayerStatistics(32, with_gram=True), Choice(Pattern("matrix"), 150))
    assert torch.equal(new != 0, Pattern("matrix").keep(weight.abs(), 150))
    torch.testing.assert_close(new, weight * (new != 0))


@pytest.mark.parametrize("update", ["admm", "refit", "swap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_removed_is_nothing_changed(update, dtype):
    weight, stats = problem(dtype=dtype)
    everything = torch.ones_like(weight, dtype=torch.bool)
    for keep in (None, everything) if update == "admm" else (everything,):
        new = UPDATES[update](weight, stats, Choice(Pattern("matrix"), 0, keep))
        assert torch.equal(new, weight) and new.data_ptr() != weight.data_ptr()
    one = everything.clone()
    one[2, 5] = False
    new = UPDATES[update](weight, stats, Choice(Pattern("matrix"), 1, one))
    others = [row for row in range(len(weight)) if row != 2]
    assert torch.equal(new[others], weight[others])  # rows that lose nothing


@pytest.mark.parametrize("text", ["row", "2:4"])
def test_refit_is_the_least_squares_solution(text):
    weight, stats = problem(6, 24)
    pattern, count = removing(text, weight)
    choice = masked(pattern, weight, stats, count)
    new = UPDATES["refit"](weight, stats, choice)
    hessian = stats.gram.double() + 0.01 * stats.gram.diagonal().mean() * torch.eye(24)
    for row, kept in enumerate(choice.keep):
        exact = torch.linalg.solve(hessian[kept][:, kept], (hessian @ weight[row].double())[kept])
        torch.testing.assert_close(new[row][kept].double(), exact, rtol=1e-2, atol=1e-2)


def test_admm_with_a_mask_is_refit():
    weight, stats = problem()
    choice = masked(Pattern("row"), weight, stats, 200)
    assert torch.equal(admm(weight, stats, choice), UPDATES["refit"](weight, stats, choice))


@pytest.mark.parametrize("update", ["admm", "swap"])
def test_a_weight_that_was_zero_goes_first_and_does_not_come_back(update):
    weight, stats = problem()
    order = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1))
    weight.masked_fill_(~Pattern("row").keep(order, 90), 0)
    choice = masked(Pattern("row"), weight, stats, weight.numel() // 2)
    new = UPDATES[update](weight, stats, Choice(choice.pattern, choice.count) if update == "admm" else choice)
    assert int((new == 0).sum()) == weight.numel() // 2 and not new[weight == 0].any()


@pytest.mark.parametrize("text", ["row", "2:4", "group:12"])
def test_how_many_rows_are_swapped_at_once_changes_nothing(text, monkeypatch):
    weight, stats = problem()
    pattern, count = removing(text, weight)
    choice = masked(pattern, weight, stats, count)
    expected = UPDATES["swap"](weight, stats, choice)
    monkeypatch.setattr(sys.modules["optimum_dsa.pruning.unstructured.swap"], "CHUNK", 1)
    assert torch.equal(UPDATES["swap"](weight, stats, choice), expected)


@pytest.mark.parametrize("text,width", [("row", 16), ("2:4", 4), ("group:8", 8)])
def test_after_swaps_no_exchange_of_two_weights_lowers_the_error(text, width):
    weight, stats = problem(3, 16)
    pattern, count = removing(text, weight)
    new = UPDATES["swap"](weight, stats, masked(pattern, weight, stats, count))
    for row in range(3):
        best = row_errors(weight[[row]], new[[row]], stats.gram)
        for goes in new[row].nonzero()[:, 0].tolist():
            for comes in (new[row] == 0).nonzero()[:, 0].tolist():
                if goes // width == comes // width:
                    other = new[[row]].clone()
                    other[0, goes], other[0, comes] = 0, weight[row, comes]
                    assert row_errors(weight[[row]], other, stats.gram) >= best * (1 - 1e-4)


def test_more_sparsity_costs_more():
    weight, stats = problem()
    errors = [
        layer_error(weight, admm(weight, stats, Choice(Pattern("matrix"), n)), stats.gram) for n in (80, 200, 300)
    ]
    assert errors == sorted(errors) and errors[0] < errors[2]


@pytest.mark.parametrize("update", ["admm", "refit", "swap"])
def test_the_same_inputs_give_the_same_weights(update):
    weight, stats = problem()
    choice = masked(Pattern("row"), weight, stats, 200)
    choice = Choice(choice.pattern, 200) if update == "admm" else choice
    assert torch.equal(UPDATES[update](weight, stats, choice), UPDATES[update](weight, problem()[1], choice))


def test_one_eigendecomposition_for_all_weights_of_an_input(monkeypatch):
    calls, decompose = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(matrix.shape) or decompose(matrix))
    model = tiny_llama(num_hidden_layers=2)
    prune(model, tokens(), DSAConfig(0.6, "alps", "uniform"))
    # of each block: q, k, v; o; gate, up; down
    assert len(calls) == 2 * 4
    weight, stats = problem()
    first = stats.spectrum()
    assert stats.spectrum() is first and stats.spectrum(0.1) is not first
    stats.update_(torch.randn(3, 32))
    assert stats.spectrum(0.1) is not first and stats.spectrum().values.min() >= 0


def test_the_spectrum_is_that_of_the_scaled_second_moment():
    _, stats = problem(samples=5, dead=[3])
    found, (hessian, scale) = stats.spectrum(0.01), stats.scaled_moment(0.01)
    assert torch.equal(found.scale, scale) and (scale > 0).all()
    torch.testing.assert_close(hessian.diagonal(), torch.ones(32))
    torch.testing.assert_close((found.vectors * found.values) @ found.vectors.t(), hessian, atol=1e-4, rtol=1e-4)
    damped = stats.gram + 0.01 * torch.where(stats.dead, 1.0, stats.gram.diagonal()).mean() * torch.eye(32)
    damped[3, 3] += 1
    torch.testing.assert_close(hessian * scale * scale[:, None], damped, rtol=1e-4, atol=1e-3)


def test_float64_helps_where_float32_finds_no_eigenvalues(monkeypatch):
    decompose = torch.linalg.eigh

    def only_double(matrix):
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return decompose(matrix)

    weight, stats = problem()
    expected = admm(weight, problem()[1], Choice(Pattern("matrix"), 200))
    monkeypatch.setattr(torch.linalg, "eigh", only_double)
    found = admm(weight, stats, Choice(Pattern("matrix"), 200))
    assert found.dtype == torch.float32 and torch.equal(found != 0, expected != 0)


def test_alps_prunes_a_model_the_same_way_twice_and_at_sparsity_0_not_at_all():
    first, second, dense = tiny_llama(), tiny_llama(), tiny_llama()
    for model in (first, second):
        prune(model, tokens(), DSAConfig(0.5, "alps", "dsa"))
    assert all(torch.equal(value, state(second)[name]) for name, value in state(first).items())
    before = state(dense)
    prune(dense, tokens(), DSAConfig(0.0, "alps", "uniform"))
    assert all(torch.equal(value, before[name]) for name, value in state(dense).items())


@pytest.mark.parametrize("method", ["alps", "wanda+refit", "wanda+swap"])
def test_experts_that_no_token_reached_are_pruned_to_the_budget(method, tiny):
    model = tiny("mixtral").bfloat16()
    report = prune(model, tokens(1, 3), DSAConfig(0.5, method, "uniform"))
    assert report.unseen and report.sparsity == 0.5 and verify(model, report).holds
