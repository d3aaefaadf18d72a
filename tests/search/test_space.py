"""Candidates as text and JSON; samples, children and mutants stay within the space and change what they say."""

import random
from dataclasses import fields, replace

import pytest

from optimum_dsa.pruning.allocation import AllocationFunction
from optimum_dsa.search.space import Candidate, SearchSpace, function_of


SPACE = SearchSpace(
    ("abs", "exp"), ("mean", "var", "std"), ("sin", "cos"), ("no_op", "tanh"), (-1, 1), (0.05, 0.2),
    ("self_attn.q_proj", "mlp.up_proj"), 0.1, ("block", "matrix"),
)  # fmt: skip
GENES = [field.name for field in fields(AllocationFunction)]


@pytest.mark.parametrize(
    "candidate,text,data",
    [
        (Candidate(), "uniform", {"function": "uniform"}),
        (Candidate("atp", 0.12345), "atp, spread 0.123", {"function": "atp", "spread": 0.12345}),
        (Candidate("owl", 0.0, "matrix"), "owl, spread 0, per matrix", None),
        (
            Candidate("owl", offsets=(("self_attn.q_proj", 0.05), ("up", 0.0), ("mlp.down_proj", -0.1))),
            "owl, q_proj +0.050, down_proj -0.100",
            {"function": "owl", "offsets": {"self_attn.q_proj": 0.05, "up": 0.0, "mlp.down_proj": -0.1}},
        ),
        (Candidate("descent", counts=(1, 2)), "descent", {"function": "descent", "counts": [1, 2]}),
        (Candidate("descent", counts=()), "descent", {"function": "descent", "counts": []}),
    ],
)
def test_a_candidate_is_told_by_what_differs_from_the_defaults(candidate, text, data):
    assert str(candidate) == text
    assert data is None or candidate.to_dict() == data
    assert Candidate.from_dict(candidate.to_dict()) == candidate


def test_samples_use_all_of_the_space_and_nothing_else():
    rng = random.Random(0)
    drawn = [SPACE.sample(rng) for _ in range(600)]
    parsed = [AllocationFunction.parse(candidate.function) for candidate in drawn]
    for name, most in (("pre_process", 2), ("transform", 2)):
        assert {len(getattr(each, name)) for each in parsed} == set(range(most + 1))
        assert {part for each in parsed for part in getattr(each, name)} == set(getattr(SPACE, name))
    assert {each.reduction for each in parsed} == set(SPACE.reduction)
    plain = sum(each.post_process == "no_op" for each in parsed) / 600
    assert {each.post_process for each in parsed} == {
        "no_op",
        "tanh",
    } and 0.68 < plain < 0.82  # half, and half of half
    assert {each.sign for each in parsed} == {-1, 1} and {c.granularity for c in drawn} == {"block", "matrix"}
    spreads, offsets = [each.spread for each in parsed], [value for c in drawn for _, value in c.offsets]
    assert 0.05 <= min(spreads) < 0.06 and 0.19 < max(spreads) <= 0.2
    assert -0.1 <= min(offsets) < -0.09 and 0.09 < max(offsets) <= 0.1
    assert all(tuple(dict(c.offsets)) == SPACE.kinds for c in drawn) and {c.spread for c in drawn} == {None}


def test_the_published_space_has_one_sign_one_spread_and_no_post_process():
    space = SearchSpace.published()
    rng = random.Random(0)
    drawn = [AllocationFunction.parse(space.sample(rng).function) for _ in range(50)]
    assert {(each.sign, each.spread, each.post_process) for each in drawn} == {(1, 0.08, "no_op")}
    assert not {"median", "outlier_share"} & set(space.reduction) and "rank" in space.reduction
    assert not {"rank", "slogdet", "determinant"} & set(SearchSpace().reduction)


def test_a_child_has_every_gene_from_one_of_its_parents():
    rng = random.Random(1)
    a = Candidate("abs,exp/mean/sin/tanh@-0.07", granularity="block", offsets=(("self_attn.q_proj", 0.1),))
    b = Candidate("exp/var/cos,cos/no_op@+0.11", granularity="matrix", offsets=(("mlp.up_proj", -0.1),))
    first, second = function_of(a), function_of(b)
    seen = {gene: set() for gene in GENES}
    offsets, granularities, mixed = set(), set(), 0
    for _ in range(200):
        child = SPACE.cross(a, b, rng)
        mixed += child.function not in (a.function, b.function)
        for gene in GENES:
            seen[gene].add(getattr(function_of(child), gene))
        offsets.add(child.offsets)
        granularities.add(child.granularity)
        assert child.spread is None
    assert seen == {gene: {getattr(first, gene), getattr(second, gene)} for gene in GENES}
    assert offsets == {(("self_attn.q_proj", x), ("mlp.up_proj", y)) for x in (0.0, 0.1) for y in (0.0, -0.1)}
    assert granularities == {"block", "matrix"} and mixed > 180


def test_a_name_is_passed_on_whole_with_its_spread():
    rng = random.Random(2)
    a, b = Candidate("atp", 0.1), Candidate("abs/mean/sin/no_op@+0.07")
    assert {(c.function, c.spread) for c in (SPACE.cross(a, b, rng) for _ in range(50))} == {
        ("atp", 0.1), (b.function, None)
    }  # fmt: skip
    owl, wide = Candidate("owl"), Candidate("owl", 0.2)
    children = {function_of(SPACE.cross(owl, wide, rng)) for _ in range(50)}
    assert {child.spread for child in children} == {0.08, 0.2} and {child.sign for child in children} == {-1}


def changed(before, after):
    """Names of what differs between two candidates."""
    if before.offsets != after.offsets:
        return {"offsets"}
    first, second = function_of(before), function_of(after)
    if first is None:
        return {"spread"} if before.spread != after.spread else set()
    return {gene for gene in GENES if getattr(first, gene) != getattr(second, gene)}


def test_a_mutant_differs_in_one_gene_and_any_gene_may_change():
    rng = random.Random(3)
    start = Candidate("abs,exp/mean/sin/tanh@-0.1", offsets=(("self_attn.q_proj", 0.02), ("mlp.up_proj", 0.0)))
    found = [changed(start, SPACE.mutate(start, rng)) for _ in range(500)]
    assert max(map(len, found)) == 1
    assert set.union(*found) == {*GENES, "offsets"}
    often = {gene: sum(gene in each for each in found) / 500 for gene in ("spread", "offsets", "reduction")}
    assert 0.18 < often["spread"] < 0.27 and 0.18 < often["offsets"] < 0.27 and often["reduction"] < 0.14


def test_numbers_are_moved_within_their_range():
    rng = random.Random(4)
    start = Candidate("atp", 0.1)  # its spread is all that can change
    space = replace(SPACE, kinds=())
    spreads = [space.mutate(start, rng).spread for _ in range(400)]
    assert min(spreads) == 0.05 and max(spreads) == 0.2
    assert sum(0.1 / 2**0.5 < spread < 0.1 * 2**0.5 for spread in spreads) / 400 == pytest.approx(0.68, abs=0.07)
    assert {space.mutate(Candidate("atp"), rng).spread > 0 for _ in range(20)} == {True}
    assert 0.05 < sorted(space.mutate(Candidate("atp"), rng).spread for _ in range(101))[50] < 0.11
    offsets = [SPACE.mutate(start, rng).offsets for _ in range(400)]
    moved = [value for each in offsets for _, value in each if value]
    for numbers in (spreads, moved):  # four digits are written down
        assert all(round(value, 4) == value for value in numbers)
        assert any(round(value, 3) != value for value in numbers)
    near = replace(start, offsets=(("self_attn.q_proj", 0.09), ("mlp.up_proj", -0.09)))
    beyond = [value for _ in range(50) for _, value in SPACE.mutate(near, rng).offsets]
    assert min(beyond) == -0.1 and max(beyond) == 0.1
    assert sum(abs(value) < 0.1 / 3 for value in moved) / len(moved) == pytest.approx(0.68, abs=0.1)
    assert {tuple(dict(each)) for each in offsets if each} == {SPACE.kinds}


def test_what_a_candidate_means():
    assert function_of(Candidate("uniform")) is None and function_of(Candidate("atp", 0.1)) is None
    assert function_of(Candidate("owl")).spread == 0.08 and function_of(Candidate("owl", 0.2)).spread == 0.2
    assert function_of(Candidate("abs/mean/sin")) == AllocationFunction(("abs",), "mean", ("sin",))
