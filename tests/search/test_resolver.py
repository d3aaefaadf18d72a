"""Candidates become counts per matrix, in the model's order, at the budget."""

import pytest
import torch

from optimum_dsa import Allocation, AllocationFunction, Calibration, DSAConfig, allocate
from optimum_dsa.search.realise import realise
from optimum_dsa.search.resolver import Resolver
from optimum_dsa.search.space import Candidate

from ..tiny import same_state, state, tiny_llama, tokens


CALIBRATION = Calibration({"input_ids": tokens()}, "x")
QUERY, UP = "self_attn.q_proj", "mlp.up_proj"


def make(config, named=(), **changes):
    model = tiny_llama(**changes)
    return Resolver(model, realise(model, CALIBRATION, config), CALIBRATION, config, named)


@pytest.fixture(scope="module")
def resolver():
    return make(DSAConfig(0.5, max_sparsity=0.9))


def shares(resolver, candidate):
    return dict(zip(resolver.sizes, (c / s for c, s in zip(resolver.counts(candidate), resolver.sizes.values()))))


def test_a_resolver_changes_nothing_and_keeps_no_gram():
    model = tiny_llama()
    before = state(model)
    resolver = Resolver(model, realise(model, CALIBRATION, DSAConfig(0.5)), CALIBRATION, DSAConfig(0.5), ["lsa"])
    assert same_state(model, before)
    assert {kept.gram for kept in resolver.statistics.values()} == {None}
    assert resolver.allocators.keys() == {"uniform", "atp", "lsa"}
    assert resolver.measured["lsa"].keys() == resolver.units["block"].keys()


def test_counts_that_are_given_are_the_answer(resolver):
    counts = tuple(range(len(resolver.sizes)))
    assert resolver.counts(Candidate("anything", counts=counts)) == counts


def test_spread_granularity_and_offsets_do_what_they_say(resolver):
    narrow, wide = (shares(resolver, Candidate("atp", spread)) for spread in (0.05, 0.2))
    first, last = "model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"
    assert narrow[last] - narrow[first] == pytest.approx(0.1, abs=2e-3)
    assert wide[last] - wide[first] == pytest.approx(0.4, abs=2e-3)
    plain, moved = shares(resolver, Candidate("atp")), shares(resolver, Candidate("atp", offsets=((QUERY, 0.2),)))
    queries = [name for name in plain if QUERY in name]
    others = [name for name in plain if QUERY not in name]
    by = {name: moved[name] - plain[name] for name in plain}
    lowered = by[others[0]]
    assert lowered < 0 and [by[name] for name in others] == pytest.approx([lowered] * len(others), abs=2e-3)
    assert [by[name] for name in queries] == pytest.approx([lowered + 0.2] * len(queries), abs=2e-3)


def test_a_function_per_block_and_per_matrix_is_what_allocate_gives(resolver):
    text = "abs/var/atan/no_op@-0.1"
    for granularity in ("block", "matrix"):
        config = DSAConfig(0.5, allocation=text, granularity=granularity, max_sparsity=0.9)
        exact = allocate(tiny_llama(), CALIBRATION, config)
        found = resolver.allocation(resolver.counts(Candidate(text, granularity=granularity)), text)
        assert found.sizes == exact.sizes
        assert found.sparsity == pytest.approx(exact.sparsity, abs=3e-3)
    gram = Candidate("abs/gram/atan/no_op@-0.1", granularity="matrix")
    one = AllocationFunction.parse(gram.function)
    name, weights = next(iter(resolver.units["matrix"].items()))
    with resolver.unit(name, weights) as unit:
        assert resolver._measure(one.pre_process, "gram", "matrix")[0] == one.measure(unit)
    assert sum(resolver.counts(gram)) == round(0.5 * sum(resolver.sizes.values()))


def test_the_bounds_of_the_config_hold():
    resolver = make(DSAConfig(0.5, min_sparsity=0.45, max_sparsity=0.56))
    found = resolver.allocation(resolver.counts(Candidate("atp", 0.5)), "atp")
    assert list(found.sparsity.values()) == pytest.approx([0.45, 0.49, 0.56], abs=1e-3)


def test_counts_of_one_sparsity_per_block_are_an_allocation_of_blocks_and_others_one_of_matrices(resolver):
    counts = resolver.counts(Candidate("atp"))
    blocks = resolver.allocation(counts, "mine")
    assert blocks.name == "mine" and blocks.sizes.keys() == resolver.units["block"].keys()
    assert sum(blocks.counts().values()) == sum(counts)
    odd = (counts[0] - 7, counts[1] + 7, *counts[2:])
    matrices = resolver.allocation(odd, "mine")
    assert matrices.sizes == resolver.sizes and tuple(matrices.counts().values()) == odd
    assert isinstance(matrices, Allocation)


def test_a_wish_per_matrix_is_fitted_in_the_models_order(resolver):
    wish = {name: 0.3 if QUERY in name else 0.6 if UP in name else 0.5 for name in resolver.sizes}
    counts = resolver.fit(dict(reversed(wish.items())))
    assert counts == resolver.fit(wish) and sum(counts) == round(0.5 * sum(resolver.sizes.values()))
    found = dict(zip(resolver.sizes, (c / s for c, s in zip(counts, resolver.sizes.values()))))
    queries = [found[name] for name in found if QUERY in name]
    ups = [found[name] for name in found if UP in name]
    assert [up - query for up, query in zip(ups, queries)] == pytest.approx([0.3] * 3, abs=2e-3)


def test_kinds_and_depths_are_those_of_the_model(resolver):
    assert set(resolver.kinds.values()) == {
        *(f"self_attn.{name}_proj" for name in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
    }  # fmt: skip
    assert list(resolver.depths.values()) == [0.0, 0.5, 1.0]
    assert all(torch.isfinite(kept.squared_sum).all() for kept in resolver.statistics.values())
