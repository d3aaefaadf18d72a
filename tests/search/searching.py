"""A small search, as several files of tests run it."""

import json

from optimum_dsa import (
    Calibration,
    DSAConfig,
)
from optimum_dsa.search.search import search

from ..tiny import tiny_llama, tokens


CALIBRATION = Calibration({"input_ids": tokens()}, "x")
VALIDATION = tokens(8, 16, seed=5)
CONFIG = DSAConfig(0.7)


def run(strategy="auto", budget="4k tokens", model=None, config=CONFIG, **options):
    return search(model or tiny_llama(), CALIBRATION, VALIDATION, config, strategy=strategy, budget=budget, **options)


def outcome(result):
    """Everything about a search but the time that it took."""
    trials = [{**json.loads(trial.to_json()), "seconds": 0} for trial in result.trace.trials]
    return trials, [(row.candidate, row.loss) for row in result.finalists]
