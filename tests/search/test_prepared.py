"""What a search is refused for, before any work."""

import pytest

from optimum_dsa import Calibration, DSAConfig, DSAPruner, DSAStructuredConfig
from optimum_dsa.search.search import search

from ..tiny import tokens


CONFIG = DSAConfig(0.6)


def test_a_model_that_predicts_no_next_tokens_is_refused_before_any_work(tiny, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("work was done")

    model, message = tiny("bert"), "BertForMaskedLM predicts masked tokens, .* named allocation, such as 'owl'"
    monkeypatch.setattr("optimum_dsa.search.apart.load_apart", never)
    monkeypatch.setattr("optimum_dsa.search.search.prepared", never)
    with pytest.raises(ValueError, match=message):
        DSAPruner(model).search("no-such.txt", CONFIG)
    with pytest.raises(ValueError, match=message):
        DSAPruner(model).search("no-such.txt", DSAStructuredConfig(0.2, layout="per_layer"))
    with pytest.raises(ValueError, match=message):
        search(model, Calibration({"input_ids": tokens()}, "x"), tokens(8, 16, seed=5), CONFIG)
