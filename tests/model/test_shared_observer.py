"""Sums of batches that are made apart, here by one process that sends to itself; see `test_divided.py`."""

import pytest
import torch

from optimum_dsa import find_architecture
from optimum_dsa.common.ranks import ALONE, Ranks
from optimum_dsa.model.architecture import UnprunableError
from optimum_dsa.model.observer import Observer
from optimum_dsa.model.shared_observer import SharedObserver, as_first, own_batches
from optimum_dsa.model.statistics import SUMS, LayerStatistics

from ..tiny import tiny_llama


class Solo(Ranks):
    """One process that does as if there were others."""

    alone, wire = False, torch.device("cpu")

    def gather(self, value=None, error=None):
        return ALONE.gather(value, error)

    def gather_flat(self, mine, sizes):
        assert sizes == [len(mine)]
        return [mine]

    def scatter(self, mine, senders, size):
        assert senders == [0] and len(mine) == size
        return mine.view(1, -1)

    def joined(self, share, size):
        return share


def observed(observer, batches, twice=()):
    """The statistics of a block whose q and k are given the same, and whose o is given `twice` in some batches."""
    block = find_architecture(tiny_llama()).blocks[0]
    q, k, _, o = block.weights[:4]

    def run(number):
        inputs = batches[number]
        observer.start_batch(len(inputs), tokens=inputs.shape[:-1].numel())
        for weight in (q, k):
            observer.observe(weight, inputs)
        for _ in range(2 if number in twice else 1):
            observer.observe(o, inputs.flip(0) * 3)
        observer.add_residual({o.name: inputs}, {o.name: inputs + 1})

    observer.over(range(len(batches)), run)
    return observer.finish(block), (q, k, o)


@pytest.mark.parametrize("gram,mean", [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("twice", [(), (1,)])
def test_the_bits_are_those_of_one_process(gram, mean, twice):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(3, 40, 32, generator=generator) for _ in range(4)]
    expected, (q, k, o) = observed(Observer(gram, mean), batches, twice)
    found, _ = observed(SharedObserver(Solo(), gram, mean), batches, twice)
    assert list(found) == list(expected)
    assert found[q.name] is found[k.name] is not found[o.name]
    for name, own in expected.items():
        other = found[name]
        assert (own.tokens, own.sequences, own.lacks) == (other.tokens, other.sequences, other.lacks)
        for field in SUMS:
            one, two = getattr(own, field), getattr(other, field)
            assert (one is None) == (two is None) and (one is None or torch.equal(one, two)), (name, field)
    assert found[o.name].lack is not None


def test_sharing_ends_in_the_first_batch_or_never():
    block = find_architecture(tiny_llama()).blocks[0]
    q, k = block.weights[:2]
    observer = SharedObserver(Solo(), False, False)

    def run(number):
        inputs = torch.ones(1, 2, 32)
        observer.start_batch(1)
        observer.observe(q, inputs)
        observer.observe(k, inputs.clone() if number else inputs)

    with pytest.raises(UnprunableError, match="the same input at first and different ones later"):
        observer.over(range(2), run)


@pytest.mark.parametrize("count,dealt", [(2, [[0, 2, 4], [1, 3]]), (3, [[0, 3], [1, 4], [2]])])
def test_batches_are_dealt_out_in_turn(count, dealt):
    batches = [{"input_ids": torch.tensor([[number]])} for number in range(5)]
    for rank, expected in enumerate(dealt):
        own, real, uncounted = own_batches(batches, [None] * 5, Ranks(rank, count))
        assert [int(batch["input_ids"]) for batch in own] == expected
        assert len(real) == len(own) and uncounted == 0


def test_who_has_no_batch_runs_the_first_and_does_not_count_it():
    batches = [{"input_ids": torch.tensor([[7]])}]
    own, real, uncounted = own_batches(batches, [None], Ranks(2, 3))
    assert own == batches and real == [None] and uncounted == 1


def test_statistics_are_ordered_and_shared_as_the_first_has_them():
    one, two = LayerStatistics(3), LayerStatistics(3)
    given = {"a": one, "b": two, "c": one}
    assert as_first(given, ALONE) is given

    class Second(Solo):
        def of_first(self, value=None):
            assert value == [("a", "a"), ("b", "b"), ("c", "a")]
            return [("b", "b"), ("a", "b"), ("c", "c")]

    found = as_first(given, Second())
    assert list(found) == ["b", "a", "c"] and found["a"] is found["b"] is two and found["c"] is one
