import pytest

from optimum_dsa.search.efficiency import Shift, efficiency, efficiency_line


def test_waiting_is_what_is_lost():
    shifts = [Shift(9.0, 1.0, 900), Shift(6.0, 4.0, 1200)]
    assert efficiency(shifts) == 0.75
    assert [shift.speed for shift in shifts] == [100, 200]
    said = efficiency_line(shifts)
    assert said.startswith("2 processes: 75% ") and "1.0, 4.0 s" in said and "100, 200 tokens" in said
    assert shifts[0].to_dict() == {"seconds": 9.0, "waited": 1.0, "tokens": 900}


@pytest.mark.parametrize("shifts", [[], [Shift(), Shift(0.0, 2.0)]])
def test_without_work_there_is_no_efficiency(shifts):
    assert efficiency(shifts) == 0 and all(shift.speed == 0 for shift in shifts)
