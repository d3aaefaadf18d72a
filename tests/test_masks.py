import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_dsa.masks import Pattern, count_in_columns


COUNTED = ("row", "matrix", "group:4", "group:128")


def scores(rows, columns, seed, levels=None):
    """Random scores; with `levels`, full of ties."""
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(levels, (rows, columns), generator=generator).float()
    return torch.rand(rows, columns, generator=generator)


shapes = st.tuples(st.integers(1, 9), st.integers(1, 20))


@pytest.mark.parametrize("text", COUNTED)
@given(shape=shapes, share=st.floats(0, 1), seed=st.integers(0, 99), levels=st.sampled_from([None, 1, 3]))
@settings(max_examples=60, deadline=None)
def test_a_mask_removes_exactly_the_count(text, shape, share, seed, levels):
    values = scores(*shape, seed, levels)
    count = round(share * values.numel())
    assert int((~Pattern.parse(text).keep(values, count)).sum()) == count


@pytest.mark.parametrize("text", COUNTED)
@given(shape=shapes, seed=st.integers(0, 99), levels=st.sampled_from([None, 1, 3]))
@settings(max_examples=15, deadline=None)
def test_masks_nest_as_sparsity_grows(text, shape, seed, levels):
    values, pattern = scores(*shape, seed, levels), Pattern.parse(text)
    wider = torch.ones_like(values, dtype=torch.bool)
    for count in range(values.numel() + 1):
        keep = pattern.keep(values, count)
        assert not (keep & ~wider).any()
        wider = keep


@pytest.mark.parametrize("kept,width", [(2, 4), (4, 8), (1, 4), (3, 5)])
def test_of_every_m_inputs_n_are_kept_and_they_are_the_highest(kept, width):
    values = scores(7, 5 * width, 0)
    keep = Pattern.parse(f"{kept}:{width}").keep(values, 0).unflatten(1, (-1, width))
    assert (keep.sum(-1) == kept).all()
    groups = values.unflatten(1, (-1, width))
    assert (groups.masked_fill(~keep, 2).amin(-1) > groups.masked_fill(keep, -1).amax(-1)).all()


def test_mixed_takes_n_from_the_count():
    values, pattern = scores(6, 16, 0), Pattern.parse("mixed:8")
    for removed in range(9):
        keep = pattern.keep(values, values.numel() * removed // 8)
        assert (keep.unflatten(1, (-1, 8)).sum(-1) == 8 - removed).all()
    masks = [pattern.keep(values, values.numel() * removed // 8) for removed in range(9)]
    assert all(not (b & ~a).any() for a, b in zip(masks, masks[1:]))


def test_the_lowest_are_removed():
    values = scores(8, 12, 3)
    matrix = Pattern("matrix").keep(values, 40)
    assert values[matrix].min() > values[~matrix].max()
    row = Pattern("row").keep(values, 40)
    assert (values.masked_fill(~row, 2).amin(1) > values.masked_fill(row, -1).amax(1)).all()


def test_rows_differ_by_one_at_most_and_the_first_give_more():
    removed = (~Pattern("row").keep(scores(8, 12, 4), 8 * 5 + 3)).sum(1)
    assert removed.tolist() == [6] * 3 + [5] * 5


@given(count=st.integers(0, 300), columns=st.integers(1, 40), width=st.integers(1, 40))
def test_groups_share_a_count_without_loss(count, columns, width):
    starts = range(0, columns, width)
    shares = [count_in_columns(count, columns, start, min(start + width, columns)) for start in starts]
    more = [count_in_columns(count + 1, columns, start, min(start + width, columns)) for start in starts]
    assert sum(shares) == count
    assert all(a <= b for a, b in zip(shares, more))


@pytest.mark.parametrize("text", ["", "rows", "4:2", "2:2", "0:4", "2:4:8", "group:0", "mixed:1", "group:", "-1:4"])
def test_an_unknown_pattern_says_which_there_are(text):
    with pytest.raises(ValueError, match="expected 'row', 'matrix'"):
        Pattern.parse(text)


@pytest.mark.parametrize("text", [*COUNTED, "2:4", "mixed:8"])
def test_a_pattern_prints_as_it_is_written(text):
    assert str(Pattern.parse(text)) == text


def test_an_indivisible_width_is_named_with_the_way_out():
    with pytest.raises(ValueError, match=r"mlp.up: pattern 2:4 needs in_features divisible by 4, got 30.*exclude"):
        Pattern.parse("2:4").check("mlp.up", 30)


@pytest.mark.parametrize("text", ["row", "matrix", "group:5", "1:4", "mixed:4"])
@pytest.mark.parametrize("count", [0, 1, 77, 120, 240])
def test_what_a_pattern_keeps_holds_and_one_weight_less_does_not(text, count):
    pattern = Pattern.parse(text)
    scores = torch.rand(12, 20, generator=torch.Generator().manual_seed(0))
    removed = ~pattern.keep(scores, count)
    assert pattern.holds(removed, count)
    assert pattern.holds(torch.ones_like(removed), count)
    for row, column in removed.nonzero()[:: max(int(removed.sum()) // 7, 1)].tolist():
        revived = removed.clone()
        revived[row, column] = False
        assert not pattern.holds(revived, count)
