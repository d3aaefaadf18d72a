"""Bars on a terminal, lines elsewhere, nothing where the user said so."""

import sys

import pytest
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from optimum_dsa.common import progress as module
from optimum_dsa.common.progress import Progress, progress


@pytest.fixture
def clock(monkeypatch):
    """Time that goes on when the test says so; progress is shown, which the other tests switch off."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    enable_progress_bars()
    yield lambda seconds: now.__setitem__(0, now[0] + seconds)
    disable_progress_bars()


def test_off_a_terminal_a_short_loop_is_one_line_at_its_end(clock, capsys):
    assert list(progress("abc", "Pruning", "block")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "Pruning: 3 of 3 blocks, 0 s\n")


def test_off_a_terminal_a_long_loop_is_a_line_per_step_and_no_more_than_one_in_ten_seconds(clock, capsys):
    for _ in progress(range(4), "Pruning", "block"):
        clock(60)
    lines = capsys.readouterr().err.splitlines()
    left = [", about 3 min left", ", about 2 min left", ", about 60 s left", ""]
    assert lines == [f"Pruning: {n} of 4 blocks, {60 * n} s{text}" for n, text in enumerate(left, 1)]
    for _ in progress(range(100), "Pruning", "block"):
        clock(1)
    assert len(capsys.readouterr().err.splitlines()) == 10


def test_what_was_reached_before_an_interruption_is_said(clock, capsys):
    with pytest.raises(KeyboardInterrupt):
        for item in progress(range(9), "Searching", "trial"):
            if item == 5:
                raise KeyboardInterrupt
    # a generator that is left behind is closed when it is forgotten
    assert capsys.readouterr().err == "Searching: 5 of 9 trials, 0 s, about a second left\n"


def test_notes_and_a_share_instead_of_a_count(clock, capsys):
    with Progress("Searching", 100, "%") as shown:
        clock(12)
        shown.show(34, best="0.5", nothing="")
    assert capsys.readouterr().err == "Searching: 34 %, best 0.5, 12 s, about 23 s left\n"


def test_hidden_and_switched_off_it_says_nothing(clock, capsys):
    list(progress("ab", "Pruning", hidden=True))
    disable_progress_bars("optimum_dsa.quiet")
    list(progress("ab", "Pruning", name="optimum_dsa.quiet"))
    assert capsys.readouterr().err == ""


def test_on_a_terminal_it_is_a_bar_that_leaves_nothing(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("Pruning", 3, "block") as shown:
        for _ in range(3):
            clock(1)
            shown.advance(best="0.25")
    written = capsys.readouterr().err
    assert "3/3" in written and "best=0.25" in written and "\n" not in written
