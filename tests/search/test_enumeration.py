import random

import pytest
import torch

from optimum_dsa import Calibration, DSAConfig, fit_to_budget
from optimum_dsa.pruning.allocation import AllocationFunction
from optimum_dsa.pruning.allocation.budget import fit_counts
from optimum_dsa.search.enumeration import Enumeration, block_sizes, enumerate_space
from optimum_dsa.search.realise import realise
from optimum_dsa.search.resolver import Resolver
from optimum_dsa.search.space import Candidate, SearchSpace

from ..tiny import tiny_llama, tokens


SPACE = SearchSpace(
    pre_process=("abs", "abslog", "mms", "tanh"),
    reduction=("mean", "var", "l1_norm", "gram", "slogdet"),
    transform=("atan", "asin", "exp"),
    post_process=("no_op", "softmax"),
    signs=(-1, 1),
    spreads=(0.1, 0.1),
)


@pytest.fixture(scope="module")
def resolver():
    model = tiny_llama(num_hidden_layers=4)
    calibration, config = Calibration({"input_ids": tokens()}, "x"), DSAConfig(0.7)
    return Resolver(model, realise(model, calibration, config), calibration, config, ())


@pytest.fixture(scope="module")
def enumeration(resolver):
    return enumerate_space(SPACE, resolver)


def test_every_function_of_the_space_is_there_with_the_allocation_that_it_gives(enumeration, resolver):
    rng = random.Random(0)
    blocks = list(resolver.units["block"].values())
    for _ in range(60):
        function = SPACE.sample(rng).function
        counts = resolver.counts(Candidate(function))
        position = {name: index for index, name in enumerate(resolver.sizes)}
        found = torch.tensor([sum(counts[position[w.name]] for w in weights) for weights in blocks])
        # a histogram's sum and a matrix's differ in the last bits, which may move single weights
        assert (enumeration.counts - found).abs().amax(1).min() <= 2, function


def test_allocations_are_distinct_and_shared_by_all_functions(enumeration):
    assert len(enumeration.counts.unique(dim=0)) == len(enumeration) == len(enumeration.representatives)
    pre, transform = 1 + 4 + 16, 1 + 3 + 9
    assert enumeration.functions == int(enumeration.sharing.sum()) == pre * 5 * transform * 2 * 2
    assert 1 < len(enumeration) < enumeration.functions


def test_representatives_give_the_allocation_that_they_stand_for(enumeration, resolver):
    for index in range(0, len(enumeration), max(len(enumeration) // 20, 1)):
        counts = dict(zip(resolver.sizes, resolver.counts(Candidate(str(enumeration.representatives[index])))))
        blocks = [sum(counts[w.name] for w in weights) for weights in resolver.units["block"].values()]
        assert (enumeration.counts[index] - torch.tensor(blocks)).abs().max() <= 2


def test_merging_leaves_allocations_that_are_apart(enumeration, resolver):
    sizes = block_sizes(resolver)
    kept = enumeration.merged(sizes, 0.02, 10**6)
    index = {function: row for row, function in enumerate(enumeration.representatives)}
    rows = (enumeration.counts / sizes)[[index[function] for function in kept]]
    apart = (rows[:, None] - rows[None]).abs().amax(-1) + torch.eye(len(rows))
    assert apart.min() > 0.02
    everything = enumeration.counts / sizes
    assert (everything[:, None] - rows[None]).abs().amax(-1).amin(1).max() <= 0.02
    assert len(enumeration.merged(sizes, 0.0, 3)) == 4


def test_the_published_space_has_as_many_texts_as_its_tables_write(resolver):
    space = SearchSpace.published()
    assert (len(space.pre_process) + 1, len(space.reduction) + 1, len(space.transform) + 1) == (10, 14, 13)
    assert enumerate_space(space, resolver).texts == (1 + 10 + 100) * 14 * (13 + 169) * 4


def test_many_wishes_are_fitted_as_one_is():
    generator = torch.Generator().manual_seed(0)
    wanted = torch.rand(50, 7, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    sizes = {f"u{index}": size for index, size in enumerate((10, 30, 30, 7, 1, 100, 64))}
    together = fit_counts(wanted, torch.tensor(list(sizes.values())).double(), 0.6, 0.1, 0.9)
    for wish, counts in zip(wanted.tolist(), together.tolist()):
        one = fit_to_budget(dict(zip(sizes, wish)), sizes, 0.6, 0.1, 0.9)
        assert counts == list(one.counts().values())


def test_the_most_shared_stand_for_what_is_near_them_and_among_equals_the_first():
    functions = [AllocationFunction(spread=spread) for spread in (0.1, 0.2, 0.3, 0.4, 0.5)]
    shares = torch.tensor([[0.50, 0.5], [0.51, 0.5], [0.9, 0.5], [0.50, 0.6], [0.9, 0.51]])
    found = Enumeration(9, 9, functions, torch.tensor([1, 3, 2, 1, 2]), (shares * 1000).long())
    sizes = torch.tensor([1000.0, 1000.0])
    assert found.merged(sizes, 0.05, 9) == [functions[1], functions[2], functions[3]]
    assert found.merged(sizes, 0.0, 9) == [functions[index] for index in (1, 2, 4, 0, 3)]
    assert found.merged(sizes, 0.2, 9) == [functions[1], functions[2]]
    assert found.merged(sizes, 0.0, 2) == [functions[index] for index in (1, 2, 4)]
    assert len(found) == 5


def test_a_small_space_by_hand(resolver):
    """Two functions that order blocks alike give one allocation, of which the shorter is the representative."""
    space = SearchSpace(("abs",), ("mean", "no_op"), ("no_op",), ("no_op",), (1,), (0.1, 0.1))
    found = enumerate_space(space, resolver)
    assert (found.functions, found.texts) == (3, (1 + 2 + 4) * 2 * (2 + 4) * 4)
    assert found.representatives == [AllocationFunction((), "mean", spread=0.1)] and found.sharing.tolist() == [3]
    assert found.counts.shape == (1, 4) and int(found.counts.sum()) == round(0.7 * sum(resolver.sizes.values()))


def test_allocations_of_a_pattern_of_whole_n_are_those_that_prune_makes():
    model, calibration = tiny_llama(num_hidden_layers=4), Calibration({"input_ids": tokens()}, "x")
    config = DSAConfig(0.7, pattern="mixed:8")
    resolver = Resolver(model, realise(model, calibration, config), calibration, config, ())
    found = enumerate_space(SPACE, resolver)
    assert len(found.counts.unique(dim=0)) == len(found) and int(found.sharing.sum()) == found.functions
    assert ((found.counts * 8) % block_sizes(resolver).long() == 0).all()
    blocks = list(resolver.units["block"].values())
    for function, counts in zip(found.representatives, found.counts.tolist()):
        removed = dict(zip(resolver.sizes, resolver.removed(Candidate(str(function)))))
        assert counts == [sum(removed[weight.name] for weight in weights) for weights in blocks]
