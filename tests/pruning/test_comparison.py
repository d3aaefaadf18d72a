"""What is said of allocations that were compared: losses, text and lead, and no more than is known."""

import pytest

from optimum_dsa.pruning.comparison import CLOSE, compared_lines, windows_apart


def test_a_quarter_as_many_windows_as_calibrate_decide_and_one_at_least():
    assert [windows_apart(number) for number in (1, 3, 4, 128)] == [1, 1, 1, 32]


def test_losses_text_and_lead_are_told():
    found = compared_lines({"owl": 0.3, "uniform": 0.4, "dsa": 0.5}, {"windows": 4, "length": 16})
    assert found == {
        "losses": "owl 0.3000, uniform 0.4000, dsa 0.5000",
        "judged on": "4 windows of 16 tokens that do not calibrate",
        "lead": "owl is 25.0% below uniform",
    }


@pytest.mark.parametrize("lead,close", [(CLOSE / 2, True), (0.0, True), (2 * CLOSE, False)])
def test_a_lead_that_may_be_chance_is_called_so(lead, close):
    assert ("hardly tell apart" in compared_lines({"a": 1 - lead, "b": 1.0}, {})["lead"]) == close


@pytest.mark.parametrize(
    "compared,on,known",
    [
        ({}, {}, set()),
        (None, None, set()),
        ([1], 3, set()),
        ({"a": "x"}, {}, set()),
        ({"a": 0.0, "b": 0.0}, {"windows": "x", "length": 3}, {"losses", "lead"}),
        ({"a": 1.0, "b": [2]}, {"windows": 1, "length": 3}, {"losses", "judged on"}),
    ],
)
def test_what_a_file_has_wrong_is_left_out(compared, on, known):
    assert compared_lines(compared, on).keys() == known
