import os
from contextlib import nullcontext

import pytest

from optimum_dsa.commands.processes import (
    ONE,
    OWN,
    TOGETHER,
    check_placed,
    own_folder,
    speaks_of,
    with_others,
)
from optimum_dsa.common.launched import process_count, process_index
from optimum_dsa.common.ranks import LostRanksError


@pytest.fixture
def second(monkeypatch):
    """As the second process of three."""
    for name, value in (("WORLD_SIZE", "3"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)


def test_alone_nothing_is_refused():
    assert (process_count(), process_index()) == (1, 0)
    assert isinstance(with_others("verify", ONE), nullcontext) and isinstance(
        with_others("prune", TOGETHER), nullcontext
    )
    check_placed("auto")
    assert own_folder("x") == "x" and own_folder(None) is None
    assert speaks_of(ValueError("x"))


def test_of_several_what_would_be_done_several_times_is_refused(second):
    assert (process_count(), process_index()) == (3, 1)
    with pytest.raises(ValueError, match="verify runs in one process, and 3 were started; .* without torchrun"):
        with_others("verify", ONE)
    assert isinstance(with_others("recover", OWN), nullcontext)
    with pytest.raises(ValueError, match="--device-map auto spreads .* 3 processes .* leave it out"):
        check_placed("auto")
    for place in ("cpu", "disk", None):
        check_placed(place)
    assert own_folder("x") == os.path.join("x", "rank-1") and own_folder(None) is None


def test_the_first_speaks_and_who_has_lost_it(second):
    assert not speaks_of(ValueError("x")) and speaks_of(LostRanksError("x"))


def test_a_size_that_a_cluster_sets_starts_nobody(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert process_count() == 1
