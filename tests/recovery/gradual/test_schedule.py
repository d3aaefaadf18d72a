import pytest

from optimum_dsa import SCHEDULES, PruningSchedule


@pytest.mark.parametrize("shape", sorted(SCHEDULES))
def test_a_shape_runs_from_nothing_to_all_and_never_falls(shape):
    values = [SCHEDULES[shape](step / 100) for step in range(101)]
    assert values[0] == 0 and values[-1] == 1 and values == sorted(values)


def test_sparsity_grows_by_the_cubic_law_between_the_moments():
    schedule = PruningSchedule(start=10, end=50, every=20, initial=0.2)
    assert schedule.moments == (10, 30, 50)
    assert [schedule.sparsity(step, 0.7) for step in (0, 9)] == [0, 0]
    assert [schedule.sparsity(step, 0.7) for step in (10, 29)] == [0.2, 0.2]
    assert schedule.sparsity(30, 0.7) == pytest.approx(0.7 - 0.5 * 0.5**3)
    assert [schedule.sparsity(step, 0.7) for step in (50, 99)] == [0.7, 0.7]


def test_one_shot_is_one_moment_and_an_uneven_end_is_met():
    assert PruningSchedule(start=4).moments == (4,)
    assert PruningSchedule(end=25, every=10).moments == (0, 10, 20, 25)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"start": 5, "end": 4}, "ends at step 4, before it starts at step 5"),
        ({"every": 0}, "every is a whole number of at least 1, got 0"),
        ({"start": -1}, "start is a whole number of at least 0"),
        ({"initial": 1.0}, r"initial is a sparsity in \[0, 1\)"),
        ({"shape": "cubik"}, "Did you mean 'cubic'"),
    ],
)
def test_what_makes_no_schedule_is_refused(changes, message):
    with pytest.raises((ValueError, KeyError), match=message):
        PruningSchedule(**changes)
