"""Recovery of models that are not causal: each on the loss that fits it, or refused in one line."""

import pytest
import torch
import transformers as tf

from optimum_dsa import DataConfig, DSAConfig, DSAPruner, RecoveryConfig

from ..conftest import ENCODER
from ..tiny import masking_tokenizer
from .adapters.test_peft_method import same_zeros, zeros


COUNTING = [" ".join(str((start + step) % 10) for step in range(60)) for start in range(12)]


def asked(**changes):
    settings = {"steps": 8, "batch_size": 4, "eval_steps": 8, "validation_windows": 4, "learning_rate": 0.01}
    return RecoveryConfig(**{**settings, **changes}, data=DataConfig(sequence_length=12))


def pruned(model):
    pruner = DSAPruner(model, masking_tokenizer())
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
    return pruner


@pytest.mark.parametrize("method", ["full", "sparse-lora"])
@pytest.mark.parametrize(
    "family,said", [("bert", "of masked tokens"), ("t5", "of second halves"), ("bart", "of second")]
)
def test_it_is_trained_on_its_own_loss_and_zeros_stay(family, said, method, tiny):
    pruner = pruned(tiny(family))
    before = zeros(pruner.model)
    result = pruner.recover(COUNTING, asked(method=method))
    assert result.after < result.before and same_zeros(pruner.model, before)
    assert f"validation perplexity {said}" in str(result) and result.data["sequence_length"] == 12


def test_a_masked_model_learns_to_guess_masked_words(tiny):
    """On a causal loss, its masked loss rises."""
    pruner = pruned(tiny("bert"))
    before = pruner.measure(COUNTING[:1], sequence_length=12, num_samples=2).perplexity
    pruner.recover(COUNTING, asked(method="full"))
    assert pruner.measure(COUNTING[:1], sequence_length=12, num_samples=2).perplexity < 0.9 * before


def test_it_learns_from_its_dense_parent(tiny):
    pruner = pruned(tiny("t5"))
    result = pruner.recover(COUNTING, asked(distillation=0.5, steps=2), teacher=tiny("t5"))
    assert result.steps == 2


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertModel", "BertLMHeadModel"])
def test_a_model_without_a_loss_on_text_is_refused(name):
    torch.manual_seed(0)
    pruner = pruned(getattr(tf, name)(tf.BertConfig(**ENCODER)))
    with pytest.raises(ValueError, match="no loss of it on a text; train it on its own task|sees the tokens behind"):
        pruner.recover(COUNTING, asked())


@pytest.mark.parametrize("name,method", [("Bert", "full"), ("Bert", "sparse-lora"), ("Albert", "full")])
def test_one_with_a_second_task_is_trained_on_its_words(name, method):
    settings = {**ENCODER, "embedding_size": 16} if name == "Albert" else ENCODER
    torch.manual_seed(0)
    pruner = pruned(getattr(tf, f"{name}ForPreTraining")(getattr(tf, f"{name}Config")(**settings)))
    before = zeros(pruner.model)
    result = pruner.recover(COUNTING, asked(method=method))
    assert result.after < result.before and same_zeros(pruner.model, before)
