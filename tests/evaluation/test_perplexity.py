import math

import pytest
import torch
import transformers as tf
from transformers.modeling_outputs import MaskedLMOutput

from optimum_dsa import DSAPruner, perplexity

from ..conftest import ENCODER
from ..tiny import VOCABULARY, masking_tokenizer, same_state, state, tiny_llama, tokens


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


class Counts(tf.BertForMaskedLM):
    """Guesses every masked number from the one before it, or behind it; of a word that it sees it predicts nothing.

    `sure` is the logit of its guess: the higher, the better the model.
    """

    sure = 20.0

    def forward(self, input_ids, **kwargs):
        before, behind = input_ids.roll(1, 1) + 1, input_ids.roll(-1, 1) - 1
        guess = torch.where(input_ids.roll(1, 1) >= 5, before, behind)
        hits = torch.nn.functional.one_hot(guess.clamp(0, 94), VOCABULARY).float() * self.sure
        return MaskedLMOutput(logits=hits * (input_ids == 3)[..., None])


NUMBERS = [" ".join(map(str, range(start, start + 30))) for start in range(50)]


@pytest.mark.parametrize("sure", [20.0, 3.0])
def test_a_masked_model_that_guesses_every_masked_word_has_no_perplexity_and_its_worse_copy_more(sure):
    model = Counts(tf.BertConfig(**ENCODER))
    model.sure = sure
    found = DSAPruner(model, masking_tokenizer()).measure(NUMBERS[:1] * 4, sequence_length=8, num_samples=4)
    # a guess of logit s among 97 words has the probability eˢ ÷ (eˢ + 96)
    expected = (math.exp(sure) + VOCABULARY - 1) / math.exp(sure)
    assert found.perplexity == pytest.approx(expected, rel=1e-4)
    assert found.protocol.predicted == "masked tokens" and "of masked tokens" in str(found)


def test_pseudo_perplexity_is_of_every_token_masked_alone_but_special_ones(tiny):
    model, tokenizer = tiny("bert").train(), masking_tokenizer()
    data = tokens(3, 7, vocabulary=90) + 5
    data[:, 0], data[:, -1] = 1, 2
    before, losses = state(model), []
    model.eval()
    for row in data:
        for place in range(1, 6):
            copy = row.clone()
            copy[place] = 3
            with torch.no_grad():
                losses.append(-model(copy[None]).logits[0, place].log_softmax(-1)[row[place]].item())
    model.train()
    for size in (2, 8):
        assert perplexity(model, data, size, tokenizer) == pytest.approx(math.exp(sum(losses) / 15), rel=1e-5)
    assert model.training and same_state(model, before)
    with pytest.raises(ValueError, match="holds special tokens and no text"):
        perplexity(model, torch.tensor([[1, 2]]), tokenizer=tokenizer)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_second_half_is_predicted_from_the_first(family, tiny):
    model, data = tiny(family), tokens(3, 9).clamp_min(3)
    with torch.no_grad():
        losses = [model(input_ids=row[None, :4], labels=row[None, 4:]).loss.item() for row in data]
    assert perplexity(model, data, 2) == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)


@pytest.mark.parametrize("family", ["vit", "whisper"])
def test_a_model_that_predicts_no_text_is_refused_before_any_is_read(family, tiny):
    def never():
        raise AssertionError("read")
        yield

    with pytest.raises(ValueError, match="so there is no loss of it on a text; measure it by its own task"):
        DSAPruner(tiny(family), masking_tokenizer()).measure(never())


def test_windows_of_a_masked_model_are_framed_and_of_the_length_that_was_asked(tiny):
    found = DSAPruner(tiny("bert"), masking_tokenizer()).measure(NUMBERS, sequence_length=10, num_samples=2)
    assert (found.protocol.sequence_length, found.protocol.windows) == (10, 2)
    assert (
        found == type(found).from_dict(found.to_dict())
        or found.protocol == type(found).from_dict(found.to_dict()).protocol
    )
