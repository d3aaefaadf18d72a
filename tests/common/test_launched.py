"""What a launcher says of a process."""

import pytest

from optimum_dsa.common.launched import process_count, process_index


@pytest.mark.parametrize(
    ("variables", "count", "index"),
    [
        ({}, 1, 0),
        ({"WORLD_SIZE": "3", "RANK": "1", "LOCAL_RANK": "1"}, 3, 1),
        ({"WORLD_SIZE": "4", "RANK": "2"}, 1, 0),  # of a cluster that starts one
        ({"WORLD_SIZE": "", "RANK": "", "LOCAL_RANK": "0"}, 1, 0),
    ],
    ids=["alone", "of three", "no launcher", "empty"],
)
def test_only_who_was_launched_with_others_is_one_of_several(monkeypatch, variables, count, index):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (process_count(), process_index()) == (count, index)
