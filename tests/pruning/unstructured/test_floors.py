import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_dsa.pruning.unstructured.floors import could_stand, keep_beside, numbers_of_sets, zeros_of_sets
from optimum_dsa.pruning.unstructured.patterns import Pattern


SETS = ("row", "matrix", "group:16", "group:7")


def problem(rows=9, columns=40, share=0.5, seed=0):
    """Scores, and zeros of a matrix whose rows and columns have lost very different shares."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, columns, generator=generator)
    uneven = torch.linspace(0, 2 * share, rows)[:, None] * torch.linspace(0.3, 1, columns)
    gone = torch.rand(rows, columns, generator=generator) < uneven
    return scores.masked_fill(gone, 0), gone


@pytest.mark.parametrize("pattern", SETS)
@given(seed=st.integers(0, 1000), share=st.floats(0, 0.9), more=st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_what_is_gone_goes_and_the_count_is_exact(pattern, seed, share, more):
    scores, gone = problem(share=share, seed=seed)
    count = int(gone.sum()) + round(more * int((~gone).sum()))
    removed = ~keep_beside(Pattern.parse(pattern), scores, count, gone)
    assert removed[gone].all() and int(removed.sum()) == count
    # and every set is as near to its equal share as what was gone lets it be
    numbers, standing = (zeros_of_sets(Pattern.parse(pattern), part) for part in (removed, gone))
    assert torch.equal(numbers, numbers_of_sets(Pattern.parse(pattern), gone, count))
    if pattern == "row":
        lowest = numbers.min()
        assert ((numbers == standing) | (numbers <= lowest + 1)).all()


@pytest.mark.parametrize("pattern", [*SETS, "2:4", "3:8", "mixed:8"])
def test_without_zeros_it_is_the_pattern_itself(pattern):
    scores, gone = problem(share=0)
    for count in (0, 90, 180, 359):
        expected = Pattern.parse(pattern).keep(scores, count)
        assert torch.equal(keep_beside(Pattern.parse(pattern), scores, count, None), expected)
        assert torch.equal(keep_beside(Pattern.parse(pattern), scores, count, torch.zeros_like(gone)), expected)


@pytest.mark.parametrize("pattern,width,removed", [("2:4", 4, 2), ("3:8", 8, 5), ("mixed:8", 8, 4)])
def test_a_group_loses_its_number_or_what_is_gone_of_it(pattern, width, removed):
    scores, gone = problem()
    keep = keep_beside(Pattern.parse(pattern), scores, scores.numel() // 2, gone)
    here, before = ((part.unflatten(1, (-1, width))).sum(2) for part in (~keep, gone))
    assert torch.equal(here, before.clamp_min(removed)) and not keep[gone].any()


@pytest.mark.parametrize("pattern", SETS)
def test_the_masks_nest(pattern):
    scores, gone = problem()
    last = gone
    for count in range(int(gone.sum()), scores.numel() + 1, 11):
        removed = ~keep_beside(Pattern.parse(pattern), scores, count, gone)
        assert removed[last].all()
        last = removed


@pytest.mark.parametrize("pattern", ["row", "group:16"])
def test_zeros_that_older_ones_explain_are_told_from_those_that_nothing_does(pattern):
    pattern = Pattern.parse(pattern)
    scores, gone = problem()
    count, before = int(gone.sum()) + 20, int(gone.sum())
    removed = ~keep_beside(pattern, scores, count, gone)
    assert not pattern.holds(removed, count) and could_stand(pattern, removed, count, before)
    assert not could_stand(pattern, removed, count, 0)
    elsewhere = ~Pattern("matrix").keep(scores * torch.linspace(0.1, 1, scores.shape[1]), count)
    elsewhere[0], elsewhere[1] = False, True
    elsewhere.view(-1)[elsewhere.view(-1).nonzero()[count:]] = False
    assert not could_stand(pattern, elsewhere, int(elsewhere.sum()), before // 8)
