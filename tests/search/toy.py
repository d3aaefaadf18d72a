"""What tests of searches share; a problem without a model: matrices of given sizes, a loss in closed form."""

from __future__ import annotations

import math
import random

from optimum_dsa import DSAConfig
from optimum_dsa.pruning.allocation import fit_to_budget
from optimum_dsa.search.objective import Objective
from optimum_dsa.search.problem import Budget, Problem
from optimum_dsa.search.realise import realise
from optimum_dsa.search.space import SearchSpace
from optimum_dsa.search.trace import NO_ROOM, Trial


def judge(model, calibration, validation, config, top=512):
    """The `Objective` of a model that `config` prunes."""
    return Objective(model, realise(model, calibration, config), validation, config.batch_size, top)


class Matrices:
    """What strategies use of a `Resolver`: a candidate without counts is uniform, or what `known` says of its name."""

    def __init__(self, sizes, config):
        self.sizes = {f"m{index}": size for index, size in enumerate(sizes)}
        self.steps = (1,) * len(sizes)
        self.low = tuple(math.ceil(config.min_sparsity * size) for size in sizes)
        self.high = tuple(math.floor(config.max_sparsity * size) for size in sizes)
        self.config, self.known = config, {}

    def counts(self, candidate):
        found = candidate.counts or self.known.get(candidate.function)
        return found or self.fit(dict.fromkeys(self.sizes, self.config.sparsity))

    def fit(self, sparsity):
        config = self.config
        bounds = config.min_sparsity, config.max_sparsity
        return tuple(fit_to_budget(sparsity, self.sizes, config.sparsity, *bounds).counts().values())


def toy_problem(sizes=(400, 400, 200, 1000), budget=None, windows=4, length=2048, seed=0, named=(), **config):
    """A problem over matrices of these sizes; a window has so many tokens that it is a rung of a race."""
    matrices = Matrices(sizes, DSAConfig(**{"sparsity": 0.5, **config}))
    budget = budget or Budget(tokens=200 * windows * length)
    return Problem(SearchSpace(), matrices, windows, length, budget, tuple(named), random.Random(seed))


class Bowl:
    """The loss Σ cost · size · sparsity² / 2 over matrices, smallest where cost · sparsity is the same in all."""

    def __init__(self, problem, costs):
        self.sizes, self.costs = list(problem.resolver.sizes.values()), costs

    def shares(self, counts):
        return [count / size for count, size in zip(counts, self.sizes)]

    def loss(self, counts):
        shares = self.shares(counts)
        return sum(cost * size * share**2 / 2 for cost, size, share in zip(self.costs, self.sizes, shares))

    def errors(self, counts):
        """Curves of the same shape, without the costs: what the loss makes of them is told by slopes alone."""
        return tuple(share**2 for share in self.shares(counts))

    def slopes(self, counts):
        return tuple(cost * share for cost, share in zip(self.costs, self.shares(counts)))


def play(strategy, problem, loss, slopes=None, errors=None, kept=False):
    """What a strategy returns, and all that it asked for, with losses from `loss(counts)`.

    `kept`: what the budget has no room for is refused, as an evaluator does it.
    """
    asked = []
    try:
        requests = next(strategy)
        while True:
            trials = []
            for request in requests:
                counts = problem.resolver.counts(request.candidate)
                cost = {"anchor": 0, "slopes": 3}.get(request.kind, 1)
                tokens = cost * len(request.rows) * problem.length
                if kept and not problem.budget.room(problem.until).holds(tokens, 1):
                    trials.append(Trial(len(asked), request, counts=counts, error=NO_ROOM))
                    problem.budget.add(trials[-1])
                    asked.append(request)
                    continue
                value = None if request.kind == "anchor" else loss(counts)
                found = errors(counts) if errors and request.kind == "errors" else None
                found = slopes(counts) if slopes and request.kind == "slopes" else found
                trials.append(Trial(len(asked), request, value, found, tokens, counts=counts))
                problem.budget.add(trials[-1])
                asked.append(request)
            requests = strategy.send(trials)
    except StopIteration as end:
        return end.value, asked


def counts_of(objective, share):
    return {name: round(share * size) for name, size in objective.realisation.sizes.items()}
