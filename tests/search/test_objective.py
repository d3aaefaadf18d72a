"""What a loss is taken from: windows, and the tail of the vocabulary."""

import pytest
import torch

from optimum_dsa import Calibration, DSAConfig, perplexity
from optimum_dsa.search.objective import Objective, _parts, _rest

from ..tiny import same_state, state, tiny_llama, tokens
from .toy import counts_of, judge


VALIDATION = tokens(5, 16, seed=5)


def test_nothing_removed_costs_nothing_and_more_costs_more(objective):
    losses = [objective.loss(counts_of(objective, share), range(4)) for share in (0.0, 0.4, 0.8)]
    assert losses[0] == pytest.approx(0, abs=2e-3)
    assert losses[0] < losses[1] < losses[2]


def test_the_loss_is_the_divergence_from_the_dense_model(objective):
    counts = counts_of(objective, 0.7)
    whole = Objective(objective.model, objective.realisation, objective.validation, top=97)
    loss = whole.loss(counts, range(4))
    with torch.no_grad():
        dense = objective.model(objective.validation).logits.log_softmax(-1)
        with whole.realisation.masked.active():
            sparse = objective.model(objective.validation).logits.log_softmax(-1)
    assert loss == pytest.approx((dense.exp() * (dense - sparse)).sum(-1).mean().item(), rel=5e-3)
    assert 0 < objective.loss(counts, range(4)) <= loss * 1.01  # fewer outcomes are told apart


def test_windows_add_up(objective):
    counts = counts_of(objective, 0.7)
    parts = [objective.loss(counts, range(i, i + 1)) for i in range(4)]
    assert objective.loss(counts, range(4)) == pytest.approx(sum(parts) / 4, rel=1e-4)


def built(calibration, method="wanda", **changes):
    config = DSAConfig(0.6, method, **changes)
    return judge(tiny_llama(num_hidden_layers=2), Calibration({"input_ids": calibration}, "x"), VALIDATION, config)


def test_windows_are_taken_in_batches_of_one_size():
    assert _parts(range(2, 9), 3) == [range(2, 5), range(5, 8), range(8, 9)]
    assert _parts(range(0, 4), 4) == [range(0, 4)] and _parts(range(3, 3), 4) == []


def test_what_is_not_among_the_likeliest_counts_as_one_outcome():
    values = torch.tensor([[0.5, 0.3], [0.6, 0.4]]).log()
    assert _rest(values)[0].item() == pytest.approx(torch.tensor(0.2).log().item(), rel=1e-5)
    assert _rest(values)[1].item() == pytest.approx(-16.0, abs=4.5) and _rest(values).isfinite().all()
    full = torch.zeros(3, 2).log_softmax(-1).requires_grad_(True)  # all there is: no tail, and yet a slope
    _rest(full + torch.tensor([[0.0], [1e-3], [-1e-9]])).sum().backward()
    assert full.grad.isfinite().all()


def test_a_divergence_over_few_outcomes_is_that_of_the_grouped_distributions():
    found = built(tokens())
    found = Objective(found.model, found.realisation, VALIDATION, top=7)
    logits = torch.randn(5, 16, 97, generator=torch.Generator().manual_seed(0))
    loss = found._compare(logits, range(5))
    with torch.no_grad():
        dense = found.model(VALIDATION).logits.softmax(-1)
    top = dense.topk(7, dim=-1).indices
    groups = [
        torch.cat([p.gather(-1, top), 1 - p.gather(-1, top).sum(-1, keepdim=True)], -1)
        for p in (dense, logits.softmax(-1))
    ]
    expected = (groups[0] * (groups[0] / groups[1]).log()).sum(-1)
    assert torch.allclose(loss, expected, rtol=5e-3, atol=5e-3)
    assert (loss > 0).all()


def test_the_perplexity_of_a_finalist_is_that_of_the_pruned_model():
    found = built(tokens(), "magnitude")
    before = state(found.model)
    counts = {name: size // 2 for name, size in found.realisation.sizes.items()}
    _, measured = found.sequential(counts, range(1, 4))
    assert same_state(found.model, before)
    for weight in found.realisation.architecture.weights:
        tensor = weight.tensor(found.model)
        tensor.data.mul_(found.realisation.method.pattern.keep(tensor.abs(), counts[weight.name]))
    assert measured == pytest.approx(perplexity(found.model, VALIDATION[1:4]), rel=1e-4)


@pytest.mark.parametrize("vocabulary", [2**15, 2**15 + 500])
def test_tokens_of_large_vocabularies_are_told_apart(vocabulary):
    model = tiny_llama(num_hidden_layers=1, vocab_size=vocabulary, hidden_size=16, intermediate_size=16)
    model.lm_head.weight.data[-1] *= 50  # so that the last token is among the likeliest somewhere
    found = judge(model, Calibration({"input_ids": tokens()}, "x"), tokens(2, 8), DSAConfig(0.5), top=4)
    assert found.loss(dict.fromkeys(found.realisation.sizes, 0), range(2)) == pytest.approx(0, abs=2e-3)
    assert max(int(ids.max()) for _, ids in found._dense) == vocabulary - 1
    assert min(int(ids.min()) for _, ids in found._dense) >= 0
    assert {ids.element_size() for _, ids in found._dense} == {2 if vocabulary == 2**15 else 4}
