import math

import pytest

from optimum_dsa import DSAPruner, load_tokens, perplexity, perplexity_with_error
from optimum_dsa.commands.embedded import demo_model, demo_texts
from optimum_dsa.evaluation.perplexity import window_losses

from ..tiny import tiny_llama, tokens


evaluate = pytest.importorskip("evaluate")
pytestmark = pytest.mark.contract


def test_the_metric_is_perplexity_of_a_model_in_memory_and_of_a_folder():
    from optimum_dsa import Perplexity

    texts = [text[:3000] for text in demo_texts("validation")]
    pruner = DSAPruner.from_pretrained(demo_model())
    expected = perplexity(pruner.model, load_tokens(texts, pruner.tokenizer, sequence_length=64))
    options = {"predictions": texts, "sequence_length": 64}
    for given in ({"model": pruner.model, "tokenizer": pruner.tokenizer}, {"model": str(demo_model())}):
        found = Perplexity().compute(**options, **given)
        assert found["perplexity"] == pytest.approx(expected) and found["sequence_length"] == 64
        assert found["standard_error"] > 0 and found["windows"] > 10
    with pytest.raises(ValueError, match="needs the model's tokenizer"):
        Perplexity().compute(**options, model=pruner.model)


def test_the_standard_error_is_that_of_the_mean_over_windows():
    model, data = tiny_llama(), tokens(5, 12)
    value, error = perplexity_with_error(model, data)
    losses = window_losses(model, data)
    assert value == pytest.approx(math.exp(losses.mean()))
    assert error == pytest.approx(value * losses.std().item() / 5**0.5)
    assert perplexity_with_error(model, data[:1])[1] is None
