import pytest

from optimum_dsa.common.ranks import Ranks
from optimum_dsa.model.architecture import Weight
from optimum_dsa.model.walked import Group
from optimum_dsa.pruning.owners import owners


def groups(*shapes):
    """Groups of weights of these shapes, (rows, columns) each."""
    names = iter(range(100))
    return [Group(tuple(Weight(f"w{next(names)}", "m", "weight", shape) for shape in group), {}) for group in shapes]


LLAMA = groups([(64, 64)] * 3, [(64, 64)], [(192, 64)] * 2, [(64, 192)])
EXPERTS = groups(*[[(48, 64)], [(64, 24)]] * 8)


@pytest.mark.parametrize("made", [LLAMA, EXPERTS], ids=["llama", "experts"])
@pytest.mark.parametrize("count", [1, 2, 3, 40])
@pytest.mark.parametrize("solves", [False, True])
def test_every_matrix_has_one_owner_and_the_division_is_the_same_everywhere(made, count, solves):
    found = [owners(made, Ranks(rank, count), solves) for rank in {0, count - 1}]
    assert all(each == found[0] for each in found)
    assert found[0].keys() == {weight.name for group in made for weight in group.weights}
    assert {*found[0].values()} <= {*range(count)}


def test_cheap_matrices_are_divided_by_size():
    found = owners(EXPERTS, Ranks(0, 2), False)
    sizes = {weight.name: weight.size for group in EXPERTS for weight in group.weights}
    loads = [sum(sizes[name] for name, rank in found.items() if rank == index) for index in (0, 1)]
    assert abs(loads[0] - loads[1]) <= max(sizes.values())


def test_a_factor_is_made_where_its_group_is():
    small = groups([(2, 512)] * 2, [(2, 512)] * 2)  # the factor is all there is to do
    found = owners(small, Ranks(0, 2), True)
    assert found["w0"] == found["w1"] != found["w2"] == found["w3"]
