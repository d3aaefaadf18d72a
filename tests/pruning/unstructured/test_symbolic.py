"""Expressions are metrics like the rows of the table, and a text is read strictly."""

import json
import random

import pytest
import torch

from optimum_dsa import METRICS, Allocation, DSAConfig
from optimum_dsa.common.registry import UnknownNameError
from optimum_dsa.model.statistics import LayerStatistics
from optimum_dsa.pruning.unstructured.symbolic import DEEPEST, LARGEST, LONGEST, OPERATIONS, Expression
from optimum_dsa.search.metric_space import MetricSpace


WEIGHT = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
RIA = "mul(add(ratio(abs(W), column_sum(abs(W))), ratio(abs(W), row_sum(abs(W)))), sqrt(X))"
ZERO = "mul(abs(mul(W, W)), minmax(abs(G)))"  # as its authors write it


@pytest.fixture
def statistics():
    found = LayerStatistics(10)
    found.update_(torch.randn(3, 7, 10, generator=torch.Generator().manual_seed(1)))
    found.sequences = 3
    return found.of_weight({"gradients": torch.rand(6, 10, generator=torch.Generator().manual_seed(2))})


@pytest.mark.parametrize(
    "text, name", [("abs(W)", "magnitude"), ("mul(abs(W), X)", "wanda"), (RIA, "ria"), (ZERO, "pruner_zero")]
)
def test_published_metrics_are_expressions_with_the_same_scores(text, name, statistics):
    # a product is rounded in another order where it is of three
    assert torch.allclose(METRICS[text](WEIGHT, statistics), METRICS[name](WEIGHT, statistics), rtol=1e-6, atol=0)
    assert METRICS.fact(text, "reads") == METRICS.fact(name, "reads", "inputs")


@pytest.mark.parametrize("name", sorted(OPERATIONS))
@pytest.mark.parametrize(
    "weight", [WEIGHT, WEIGHT * 0, WEIGHT * 1e38, WEIGHT.half()], ids=["usual", "zero", "huge", "half"]
)
def test_scores_of_any_operation_are_finite_and_non_negative_and_of_the_weights_shape(name, weight, statistics):
    inner = {1: [["W"], ["X"], ["neg(W)"], ["G"]], 2: [["W", "X"], ["X", "W"], ["W", "sub(W, W)"], ["G", "G"]]}
    for parts in inner[OPERATIONS.fact(name, "arity")]:
        before = weight.clone(), statistics.squared_sum.clone()
        scores = Expression.parse(f"{name}({', '.join(parts)})")(weight, statistics)
        assert scores.shape == weight.shape and scores.dtype == torch.float32 and scores.is_contiguous()
        assert scores.isfinite().all() and scores.min() >= 0
        scores.fill_(7)  # it belongs to whoever asked for it
        assert torch.equal(weight, before[0]) and torch.equal(statistics.squared_sum, before[1])


def test_random_expressions_are_metrics_and_come_back_from_their_text(statistics):
    space, rng = MetricSpace(depth=DEEPEST, size=LARGEST), random.Random(0)
    for _ in range(300):
        text = space.sample(rng)
        found = Expression.parse(text)
        assert str(found) == text and Expression.parse(f"  {text.replace(',', ' ,')} ") == found
        scores = found(WEIGHT, statistics)
        assert scores.isfinite().all() and scores.min() >= 0 and scores.shape == WEIGHT.shape


def test_operations_are_the_published_ones(statistics):
    """By hand, of the definitions in the published code."""
    w, x = WEIGHT, statistics.input_norm
    expected = {
        "mul(square(W), minmax(abs(W)))": w * w * (w.abs() - w.abs().min()) / (w.abs().max() - w.abs().min()),
        "abs(zscore(W))": ((w - w.mean()) / w.std()).abs(),
        "abs(div(W, X))": (w / x.norm()).abs(),
        "abs(log(W))": (w.abs() + 0.001).log().abs(),
        "sqrt(W)": w.abs().sqrt(),
        "exp(tanh(W))": w.tanh().exp(),
        "abs(mul(W, neg(X)))": w.abs() * x,
    }
    for text, scores in expected.items():
        assert torch.allclose(METRICS[text](w, statistics), scores, rtol=1e-5), text


def test_a_negative_lowest_score_is_taken_from_all(statistics):
    scores = METRICS["neg(abs(W))"](WEIGHT)
    assert scores.min() == 0 and torch.equal(scores.argsort(), (-WEIGHT.abs()).argsort())


def test_equal_gradients_leave_the_weights_to_decide(statistics):
    same = statistics.of_weight({"gradients": torch.full((6, 10), 0.3)})
    assert torch.equal(METRICS[ZERO](WEIGHT, same), METRICS["pruner_zero"](WEIGHT, same))


def test_the_published_form_of_a_tree_is_read():
    leaf = {"data": "W"}
    tree = {"data": "mul", "left": {"data": "sqr", "left": leaf}, "right": {"data": "mms", "left": {"data": "X"}}}
    assert str(METRICS[json.dumps(tree)]) == "mul(square(W), minmax(X))"
    assert str(Expression.parse("skp(pow(zsn(W)))")) == "square(zscore(W))"


@pytest.mark.parametrize(
    "text, why",
    [
        ("abs(W", r"'\)' is missing"),
        ("abs(W))", "follows where it ends"),
        ("abs()", r"'\)' stands where a name"),
        ("abs(W, X)", r"'\)' is missing"),
        ("mul(W)", "',' is missing"),
        ("abs(2)", "is no name, bracket or comma"),
        ("abs(W);import os", "is no name, bracket or comma"),
        ("__import__(W)", "no '__import__'"),
        ("abs(W.data)", "is no name, bracket or comma"),
        ("(W)", "stands where a name"),
        ("abs(", "ends too soon"),
        ("square(abss(W))", "Did you mean 'abs'"),
        ("abs" * LONGEST + "(W)", "characters at most"),
        ("abs(" * (DEEPEST + 1) + "W" + ")" * (DEEPEST + 1), "levels at most"),
        ('{"data": "abs"}', "is of 1 trees"),
        ('{"data": "abs", "left": {"data": "W"}, "x": 1}', "has no 'x'"),
        ('{"data": "W", "left": {"data": "W"}}', "is a leaf"),
        ('{"data": "W"}', "is an operation on W"),
        ('{"data": ["abs"]}', "a tree is"),
        ('{"data": "abs", "left": {"data": "W"}, "left": {"data": "X"}}', "twice"),
        ("{" * 3000, "metric"),
    ],
)
def test_what_is_no_expression_is_refused_with_the_reason(text, why):
    with pytest.raises((ValueError, UnknownNameError), match=why):
        DSAConfig(0.5, metric=text)


def test_too_many_nodes_are_refused():
    tree = "W"
    for _ in range(DEEPEST - 2):
        tree = f"add({tree}, {tree})"
    with pytest.raises(ValueError, match=f"{LARGEST} operations"):
        Expression.parse(f"abs({tree})")


def test_a_name_without_brackets_is_a_row_or_nothing():
    with pytest.raises(UnknownNameError, match="Did you mean 'wanda'"):
        METRICS["wandaa"]
    with pytest.raises(UnknownNameError, match=r"Unknown metric 'W'.* such as 'mul\(abs\(W\), X\)'"):
        METRICS["W"]
    assert "abs(W)" not in METRICS and "abs(W)" not in [*METRICS]


def test_a_config_takes_the_metric_that_its_allocation_was_found_with(tmp_path):
    found = Allocation({"a": 0.5}, {"a": 10}, metric="square(W)")
    found.save(tmp_path / "allocation.json")
    assert Allocation.load(tmp_path) == found
    for allocation in (found, str(tmp_path)):
        config = DSAConfig(0.5, allocation=allocation)
        assert config.metric == config.recipe.metric == "square(W)"
        assert DSAConfig(0.5, allocation=allocation, metric="ria").metric == "ria"
    assert DSAConfig.from_dict(config.to_dict()) == config
    assert DSAConfig(0.5, allocation=Allocation({"a": 0.5}, {"a": 10})).metric is None
    with pytest.raises(ValueError, match="metric of an allocation is a text"):
        Allocation({"a": 0.5}, {"a": 10}, metric=3)
