from optimum_dsa.common.columns import columns


def test_numbers_end_together_and_names_begin_together():
    lines = columns([("name", "size", "of"), ("a", "1", "x"), ("longer", "1,000", "yy")], left=(0, -1))
    assert lines == ["name     size  of", "a           1  x", "longer  1,000  yy"]


def test_nothing_is_left_behind_a_line():
    assert columns([("a", ""), ("b", "1")]) == ["a", "b  1"]
    assert columns([("a",), ("bb",)], left=()) == [" a", "bb"]
