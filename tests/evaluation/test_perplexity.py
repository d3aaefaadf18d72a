import math

import pytest
import torch

from optimum_dsa import perplexity

from ..tiny import VOCABULARY, same_state, state, tiny_llama, tokens


def test_perplexity_is_exp_of_the_mean_loss_over_predicted_tokens():
    model, data = tiny_llama(), tokens(5, 12)
    losses = []
    for row in data:
        log_probabilities = model(row[None]).logits[0].log_softmax(-1)
        losses += [-log_probabilities[i, row[i + 1]].item() for i in range(len(row) - 1)]
    assert perplexity(model, data) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_the_batch_size_does_not_matter_and_the_model_is_left_alone():
    model, data = tiny_llama().train(), tokens(5, 12)
    before = state(model)
    assert perplexity(model, data, 1) == pytest.approx(perplexity(model, data, 4), rel=1e-5)
    assert model.training and same_state(model, before)


def test_a_model_that_knows_nothing_is_as_good_as_guessing():
    model = tiny_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, tokens()) == pytest.approx(VOCABULARY, rel=1e-5)


@pytest.mark.parametrize(
    "data,message",
    [
        (torch.zeros(2, 3), "LongTensor"),
        (torch.zeros(3, dtype=torch.long), "LongTensor"),
        (torch.zeros(0, 3, dtype=torch.long), "not empty"),
        (torch.full((1, 4), VOCABULARY), f"knows 0 to {VOCABULARY - 1}"),
        (torch.full((1, 4), -1), "run from -1"),
        (torch.zeros(4, 1, dtype=torch.long), "at least 2 tokens"),
        ([[1, 2]], "got list"),
    ],
)
def test_tokens_that_cannot_be_scored_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        perplexity(tiny_llama(), data)
