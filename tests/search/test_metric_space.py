"""Metrics are drawn, crossed and mutated within their space, and each is written in one way."""

import random

import pytest
import torch

from optimum_dsa.model.statistics import LayerStatistics
from optimum_dsa.pruning.unstructured.symbolic import OPERATIONS, Expression
from optimum_dsa.search.metric_space import KNOWN, JointGenes, MetricGenes, MetricSpace, simplified
from optimum_dsa.search.space import Candidate, SearchSpace


SPACE = MetricSpace()


def held(text):
    tree = Expression.parse(text)
    assert "W" in tree.leaves and tree.depth <= SPACE.depth and len([*tree.nodes()]) <= SPACE.size
    assert str(simplified(tree)) == text
    return text


def bred(rng, steps=600):
    """Metrics of every kind that a search comes by."""
    metrics = [SPACE.sample(rng) for _ in range(10)]
    for _ in range(steps):
        made = SPACE.cross(*rng.sample(metrics, 2), rng) if rng.random() < 0.5 else SPACE.mutate(metrics[-1], rng)
        metrics.append(made)
    return metrics


def test_whatever_is_bred_is_a_metric_of_the_space():
    found = [*map(held, bred(random.Random(0)))]
    assert len(set(found)) > 100
    assert {node.name for text in found for node in Expression.parse(text).nodes()} >= {*OPERATIONS}


def test_draws_are_those_of_the_seed():
    assert bred(random.Random(3), 30) == bred(random.Random(3), 30) != bred(random.Random(4), 30)


def test_simplified_metrics_put_weights_in_the_same_order():
    statistics, rng = LayerStatistics(8), random.Random(1)
    statistics.update_(torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(1)))
    gradient = torch.rand(5, 8, generator=torch.Generator().manual_seed(2))
    statistics = statistics.of_weight({"gradients": gradient})
    weight, shorter = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), 0
    grown = [SPACE._grown(rng, 5) for _ in range(1500)]
    for tree in (tree for tree in grown if tree.parts and "W" in tree.leaves):
        short = simplified(tree)
        shorter += str(short) != str(tree)
        before, after = tree(weight, statistics).flatten().double(), short(weight, statistics).flatten().double()
        # Never lower where the simplified one is higher, but for what float32 rounds.
        rising = before[after.argsort(stable=True)].diff()
        assert rising.min() >= -1e-5 * before.abs().max(), (str(tree), str(short))
    assert shorter > 100


@pytest.mark.parametrize(
    "text, expected",
    [
        ("abs(neg(abs(W)))", "abs(W)"),
        ("sqrt(square(W))", "abs(W)"),
        ("minmax(zscore(square(W)))", "square(W)"),
        ("mul(X, abs(W))", "mul(X, abs(W))"),
        ("mul(abs(W), X)", "mul(X, abs(W))"),
        ("square(mul(X, abs(W)))", "mul(X, abs(W))"),
        ("mul(W, W)", "square(W)"),
        ("neg(sub(W, X))", "sub(X, W)"),
        ("ratio(abs(W), row_sum(square(X)))", "abs(W)"),
        ("exp(mul(abs(W), sqrt(neg(X))))", "mul(abs(W), sqrt(X))"),
        ("abs(mul(X, W))", "abs(mul(W, X))"),
        ("tanh(X)", "tanh(X)"),
    ],
)
def test_what_undoes_itself_or_leaves_the_order_goes(text, expected):
    assert simplified(Expression.parse(text)) == simplified(Expression.parse(expected))
    assert len(str(simplified(Expression.parse(text)))) <= len(text)


def test_known_metrics_are_those_that_the_leaves_can_write():
    assert len({*map(held, SPACE.known)}) == len(KNOWN)
    assert MetricSpace(("W",)).known == ("abs(W)",) and MetricSpace(("W",)).reads == "nothing"


def test_genes_of_metrics_alone_leave_the_allocation():
    at, rng = Candidate("owl", 0.1), random.Random(0)
    genes = MetricGenes(SPACE, at)
    drawn = [genes.sample(rng) for _ in range(5)]
    made = [*drawn, genes.cross(drawn[0], drawn[1], rng), genes.mutate(drawn[2], rng), genes.mutate(at, rng)]
    assert made == [Candidate("owl", 0.1, metric=held(each.metric)) for each in made]
    assert genes.cross(at, at, rng) == at


def test_joint_genes_pass_on_either_half_or_change_one():
    rng, genes = random.Random(0), JointGenes(SPACE, SearchSpace())
    a, b = genes.sample(rng), genes.sample(rng)
    children = [genes.cross(a, b, rng) for _ in range(40)]
    assert any(child.function == a.function and child.metric == b.metric for child in children)
    assert any(child.function not in (a.function, b.function) for child in children)
    mutants = [genes.mutate(a, rng) for _ in range(40)]
    changed = {(mutant.metric != a.metric, mutant.function != a.function) for mutant in mutants}
    assert changed <= {(True, False), (False, True), (False, False)} and {(True, False), (False, True)} <= changed
