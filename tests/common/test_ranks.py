"""One of several processes, here without others; real ones are in `tests/pruning/test_divided.py`."""

import logging
import threading

import pytest
import torch

from optimum_dsa.common import ranks as module
from optimum_dsa.common.launched import process_count
from optimum_dsa.common.ranks import ALONE, LostRanksError, Ranks, current_ranks, is_known


class Odd(Exception):
    """Cannot be made again from what it says."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")
        self.lock = threading.Lock()


@pytest.fixture
def told(monkeypatch):
    """What the other process of two says: the values that it calls `gather` with, one after the other."""
    said = []

    def gather(found, mine):
        found[:] = [mine, said.pop(0)]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    return said


@pytest.mark.parametrize("size,count", [(0, 3), (2, 3), (9, 3), (10, 3), (11, 4)])
def test_shares_are_even_and_are_all(size, count):
    shares = Ranks(0, count).shares(size)
    assert len(shares) == count and sum(shares) == size and max(shares) - min(shares) <= 1


def test_alone_nothing_is_sent():
    assert ALONE.alone and ALONE.is_first and ALONE.gather(3) == [3] and ALONE.of_first("x") == "x"
    tensor = torch.arange(3.0)
    ALONE.broadcast_(tensor, 0)
    assert tensor.tolist() == [0, 1, 2]
    with pytest.raises(KeyError, match="gone"), ALONE.together():
        raise KeyError("gone")


def test_the_error_of_another_is_raised_here_and_said_to_be_its(told):
    told[:] = [(None, module._sendable(ValueError("no room")))]
    with pytest.raises(ValueError, match="^on rank 1 of 2: no room$") as raised:
        Ranks(0, 2).gather()
    assert is_known(raised.value)


def test_an_error_of_both_is_raised_as_it_is(told):
    told[:] = [(None, ValueError("bad option"))]
    with pytest.raises(ValueError, match="^bad option$") as raised, Ranks(0, 2).together():
        raise ValueError("bad option")
    assert is_known(raised.value) and not told


def test_who_fails_meets_the_others_where_they_are(told):
    told[:] = [("their value", None)]
    with pytest.raises(OSError, match="^disk$"), Ranks(1, 2).together():
        raise OSError("disk")
    assert not told
    told[:] = [(4, None), (None, None)]
    with Ranks(0, 2).together():
        assert Ranks(0, 2).gather(5) == [5, 4]
    assert not told


def test_who_lost_the_others_sends_nothing_more(monkeypatch):
    def gone(*_):
        raise RuntimeError("Connection closed by peer\nmore")

    monkeypatch.setattr(torch.distributed, "all_gather_object", gone)
    ranks, said = Ranks(0, 2), "rank 0 of 2 lost another process.*closed by peer more"
    with pytest.raises(LostRanksError, match=said), ranks.together():
        ranks.gather()


def test_an_error_that_cannot_be_sent_is_told_in_words():
    assert str(module._sendable(Odd(1, 2))) == "Odd: 1 and 2"
    assert type(module._sendable(OSError("x"))) is OSError


def test_all_but_the_first_are_quiet(told):
    package = logging.getLogger("optimum_dsa")
    before, told[:] = package.level, [(None, None)]
    with Ranks(1, 2).together():
        assert not package.isEnabledFor(logging.WARNING)
    assert package.level == before


def test_a_cluster_that_sets_a_size_has_not_started_several(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert current_ranks() is ALONE
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert process_count() > 1
