import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_dsa.common.registry import UnknownNameError
from optimum_dsa.pruning.allocation import (
    ALLOCATIONS,
    POST_PROCESS,
    PRE_PROCESS,
    REDUCTION,
    TRANSFORM,
    AllocationFunction,
    Unit,
    fit_to_budget,
)
from optimum_dsa.pruning.unstructured.metrics import magnitude


def operations(table, most):
    names = st.sampled_from(sorted(set(table) - {"no_op"}))
    return st.lists(names, max_size=most).map(tuple)


functions = st.builds(
    AllocationFunction,
    pre_process=operations(PRE_PROCESS, 2),
    reduction=st.sampled_from(sorted(REDUCTION)),
    transform=operations(TRANSFORM, 2),
    post_process=st.sampled_from(sorted(POST_PROCESS)),
    sign=st.sampled_from([-1, 1]),
    spread=st.floats(0, 1),
)
numbers = st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=9)


def unit(*weights, name="block", depth=0.0):
    return Unit(name, depth, weights, [None] * len(weights), magnitude)


@given(function=functions)
@settings(max_examples=200, deadline=None)
def test_a_function_survives_printing_and_parsing(function):
    assert AllocationFunction.parse(str(function)) == function


def test_the_published_string():
    dsa = AllocationFunction.parse("W:(ABSLOG)-(VAR)-(ATAN,ASIN)-(7)")
    assert dsa == ALLOCATIONS["dsa"] == AllocationFunction(("abslog",), "var", ("atan", "asin"), spread=0.08)
    assert dsa.published() == "W:(ABSLOG)-(VAR)-(ATAN,ASIN)-(7)"
    assert str(dsa) == "abslog/var/atan,asin/no_op@+0.08"
    assert AllocationFunction.parse("W:(NO_OP)-(MEAN)-(NO_OP)") == AllocationFunction()
    with pytest.raises(ValueError, match="cannot write"):
        ALLOCATIONS["owl"].published()


@given(text=st.text(max_size=40))
@settings(max_examples=300, deadline=None)
def test_the_parser_reads_or_refuses_and_never_crashes(text):
    for candidate in (text, f"W:({text})-(VAR)-(SIN)", f"abs/{text}/sin", f"abs/var/sin/no_op@{text}"):
        try:
            function = AllocationFunction.parse(candidate)
        except (ValueError, UnknownNameError) as error:
            assert str(error)
        else:
            assert AllocationFunction.parse(str(function)) == function


@pytest.mark.parametrize(
    "text,message",
    [
        ("W:(ABSLOG)-(VARR)-(ATAN)-(7)", "Did you mean 'var'"),
        ("abs,log,exp/var/sin", "At most two"),
        ("abs/var/sin/no_op@2", "half-width in"),
        ("W:(ABS)-(VAR)-(9)", "Unknown transform '9'"),
        ("uniform", "Cannot read"),
    ],
)
def test_a_wrong_function_says_what_is_wrong(text, message):
    with pytest.raises((ValueError, UnknownNameError), match=message):
        AllocationFunction.parse(text)


@given(function=functions, values=numbers, target=st.floats(0.05, 0.95))
@settings(max_examples=300, deadline=None)
def test_any_function_of_any_numbers_meets_the_budget(function, values, target):
    measured = {f"u{index}": value for index, value in enumerate(values)}
    sizes = {name: 1000 + 7 * index for index, name in enumerate(measured)}
    allocation = fit_to_budget(function.propose(measured, target), sizes, target)
    assert sum(allocation.counts().values()) == round(target * sum(sizes.values()))


@pytest.mark.parametrize("reduction", sorted(REDUCTION))
def test_any_reduction_measures_any_unit(reduction):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(6, 10, generator=generator), torch.randn(12, 4, generator=generator).bfloat16()]
    before = [weight.clone() for weight in weights]
    value = AllocationFunction(("abs",), reduction).measure(unit(*weights))
    assert math.isfinite(value)
    assert all(torch.equal(a, b) for a, b in zip(weights, before))


@given(function=functions, target=st.floats(0.1, 0.9))
@settings(max_examples=50, deadline=None)
def test_permuting_the_units_permutes_the_proposals(function, target):
    measured = {"a": 0.3, "b": 1.7, "c": 0.9, "d": -2.0}
    turned = dict(reversed(measured.items()))
    wanted = function.propose(measured, target)
    assert function.propose(turned, target) == pytest.approx({name: wanted[name] for name in turned}, abs=1e-9)


def test_no_spread_is_uniform_and_the_sign_turns_the_order():
    measured = {"a": 1.0, "b": 2.0, "c": 4.0}
    assert set(AllocationFunction(spread=0.0).propose(measured, 0.6).values()) == {0.6}
    up = AllocationFunction(spread=0.1).propose(measured, 0.6)
    down = AllocationFunction(spread=0.1, sign=-1).propose(measured, 0.6)
    assert up["a"] < up["b"] < up["c"] and max(up.values()) - min(up.values()) == pytest.approx(0.2)
    assert {name: 1.2 - value for name, value in up.items()} == pytest.approx(down)


def test_what_has_no_arcsine_is_most_protected_as_published():
    """asin(atan(v)) is NaN for v > tan(1); the published code turns that into 0, the lowest value."""
    measured = {"early": 2.0, "late": 1.3, "middle": 1.0}
    wanted = ALLOCATIONS["dsa"].propose(measured, 0.7)
    assert wanted["early"] < wanted["middle"] < wanted["late"]
    x = ALLOCATIONS["dsa"].importance(torch.tensor([2.0, 1.3, float("inf")]))
    assert x[0] == 0 and x[1] == pytest.approx(math.asin(math.atan(1.3)))


@pytest.mark.parametrize("transform,post", [((), "no_op"), ((), "abs"), (("exp",), "no_op"), (("log",), "no_op")])
def test_infinities_count_as_minus_one_and_what_is_no_number_as_zero(transform, post):
    """As in the published code, after the transforms and after the post-process."""
    function = AllocationFunction(transform=transform, post_process=post)
    values = {
        (): [math.inf, -math.inf, math.nan, 0.5],
        ("exp",): [1e4, 0.0, math.nan, math.log(0.5)],
        ("log",): [math.inf, 0.0, -3.0, math.exp(0.5)],
    }[transform]
    expected = {(): [-1, -1, 0, 0.5], ("exp",): [-1, 1, 0, 0.5], ("log",): [-1, -1, 0, 0.5]}[transform]
    found = function.importance(torch.tensor(values)).tolist()
    assert found == pytest.approx([abs(x) for x in expected] if post == "abs" else expected, abs=1e-3)


def test_infinities_of_the_post_process_count_as_minus_one_too():
    assert AllocationFunction(post_process="exp").importance(torch.tensor([1e4, 0.0])).tolist() == [-1.0, 1.0]
    assert AllocationFunction(post_process="log").importance(torch.tensor([0.0, -1.0, 1.0])).tolist() == [
        -1.0,
        0.0,
        0.0,
    ]


def test_an_infinite_measurement_is_pruned_least_or_most_as_the_sign_says_and_too_wide_a_span_is_uniform():
    measured = {"a": 0.5, "b": math.inf, "c": 1.0}
    up, down = (AllocationFunction(sign=sign, spread=0.1).propose(measured, 0.5) for sign in (1, -1))
    assert min(up, key=up.get) == max(down, key=down.get) == "b"
    assert up["c"] - up["b"] == pytest.approx(0.2) == down["b"] - down["c"]
    assert set(AllocationFunction().propose({"a": 1e308, "b": -1e308, "c": 0.0}, 0.5).values()) == {0.5}
    assert set(AllocationFunction().propose({"a": 3.0, "b": 3.0}, 0.5).values()) == {0.5}


def test_a_post_process_sees_each_row_of_units_by_itself():
    rows = torch.tensor([[1.0, 2.0, 3.0], [5.0, 4.0, 9.0]])
    function = AllocationFunction(post_process="rank", spread=0.1)
    assert function.importance(rows).tolist() == [[0, 1, 2], [1, 0, 2]]
    both = function.proposals(rows, 0.5)
    assert torch.equal(both, torch.stack([function.proposals(row, 0.5) for row in rows]))
    assert both[1].tolist() == pytest.approx([0.5, 0.4, 0.6])


def test_defaults_of_what_is_written_shortly():
    short = AllocationFunction.parse("abs/var/")
    assert short == AllocationFunction(("abs",), "var")
    assert AllocationFunction.parse("/mean//tanh@-.5") == AllocationFunction((), "mean", (), "tanh", -1, 0.5)
    assert AllocationFunction.parse(" no_op,abs/VAR/no_op@0.1 ") == AllocationFunction(("abs",), "var", (), spread=0.1)
    assert AllocationFunction.parse("/mean/@+1e-3").spread == 0.001
    with pytest.raises(ValueError, match="spread '1.2.3'"):
        AllocationFunction.parse("/mean/@+1.2.3")


@pytest.mark.parametrize(
    "changes", [{"sign": 0}, {"sign": 2}, {"spread": -0.01}, {"spread": 1.01}, {"spread": math.nan}]
)
def test_signs_and_spreads_that_mean_nothing_are_refused(changes):
    with pytest.raises(ValueError, match="of an allocation function is"):
        AllocationFunction(**changes)
    for spread in (0, 1):
        assert AllocationFunction(spread=spread).spread == spread
    for stage in ("pre_process", "transform"):
        AllocationFunction(**{stage: ("abs", "abs")})
        with pytest.raises(ValueError, match="At most two"):
            AllocationFunction(**{stage: ("abs", "abs", "abs")})


def test_what_the_published_form_cannot_write():
    for changes in ({"sign": -1}, {"spread": 0.1}, {"post_process": "tanh"}):
        with pytest.raises(ValueError, match="cannot write"):
            AllocationFunction(**changes).published()
    assert AllocationFunction().published() == "W:(NO_OP)-(MEAN)-(NO_OP)-(7)"


def test_one_unit_measures_its_matrices_as_one_vector():
    a, b = torch.randn(3, 4), torch.randn(5, 2)
    whole = torch.cat([a.flatten(), b.flatten()]).abs()
    assert AllocationFunction((), "var").measure(unit(a, b)) == pytest.approx(whole.var().item(), rel=1e-6)
