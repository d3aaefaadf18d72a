import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_dsa.pruning.unstructured.patterns import Pattern, count_in_columns, kth_by_extremes, removal_order


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


@pytest.mark.parametrize("text", ["row", "matrix", "group:4", "group:5", "group:128"])
@pytest.mark.parametrize("levels", [None, 3])
def test_one_order_holds_the_masks_of_all_counts(text, levels):
    values, pattern = scores(5, 13, 0, levels), Pattern.parse(text)
    order = removal_order(pattern, values)
    assert sorted(order.flatten().tolist()) == list(range(65))
    for count in range(66):
        assert torch.equal(pattern.keep(values, count), order >= count)


@pytest.mark.parametrize("text,width", [("mixed:4", 4), ("2:4", 4), ("mixed:8", 8)])
def test_an_order_of_groups_goes_level_by_level(text, width):
    values = scores(5, 16, 0)
    order = removal_order(Pattern.parse(text), values)
    for removed in range(width + 1):
        expected = Pattern.parse(f"mixed:{width}").keep(values, 80 * removed // width)
        assert torch.equal(expected, order >= 80 * removed // width)


@pytest.mark.parametrize("chunk", [10, 40])
@pytest.mark.parametrize("text", ["row", "matrix", "group:4", "2:4", "mixed:8"])
def test_large_matrices_are_done_in_parts_as_at_once(text, chunk, monkeypatch):
    values, pattern = scores(30, 16, 1, 5), Pattern.parse(text)
    count = 240
    whole = pattern.keep(values, count)
    monkeypatch.setattr("optimum_dsa.pruning.unstructured.patterns.CHUNK", chunk)
    assert torch.equal(pattern.keep(values, count), whole)
    assert pattern.holds(~whole, count)
    revived = ~whole
    revived[29, int(revived[29].nonzero()[0])] = False
    assert not pattern.holds(revived, count)


@pytest.mark.parametrize("text", ["row", "matrix", "group:3"])
def test_counts_beyond_the_matrix_remove_all_and_below_nothing(text):
    values, pattern = scores(4, 7, 2), Pattern.parse(text)
    assert pattern.keep(values, 0).all() and not pattern.keep(values, 28).any()


def test_which_patterns_have_one_sparsity():
    assert Pattern.parse("row") == Pattern("row", 0, 0) and Pattern.parse("matrix") == Pattern("matrix", 0, 0)
    assert [Pattern.parse(text).sparsity for text in ("2:4", "1:4", "3:5")] == pytest.approx([0.5, 0.75, 0.4])
    assert {Pattern.parse(text).sparsity for text in (*COUNTED, "mixed:8")} == {None}
    assert (
        Pattern.parse("group:1").width == 1 and Pattern.parse("mixed:2").width == 2 and Pattern.parse("1:2").kept == 1
    )
    for text in ("2:4", "mixed:4"):
        Pattern.parse(text).check("w", 8)
        with pytest.raises(ValueError, match="divisible by 4"):
            Pattern.parse(text).check("w", 6)
        assert not Pattern.parse(text).holds(torch.ones(2, 6, dtype=torch.bool), 6)
    for text in COUNTED:
        Pattern.parse(text).check("w", 7)


@pytest.mark.parametrize("kind", ["spread", "equal", "tiny", "zeros"])
def test_the_kth_lowest_by_extremes_is_the_kth_lowest(kind):
    """What a GPU does in the place of kthvalue."""
    scores = torch.rand(501, generator=torch.Generator().manual_seed(0))
    scores = {
        "spread": scores * 10 ** torch.linspace(-30, 30, 501),
        "equal": (scores * 4).round(),
        "tiny": scores * 1e-42,
        "zeros": torch.tensor([0.0, -0.0, 0.0, torch.inf]),
    }[kind]
    for count in {1, 2, len(scores) // 2, len(scores)}:
        assert kth_by_extremes(scores, count) == scores.kthvalue(count).values
