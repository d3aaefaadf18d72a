import pytest
import torch
from torch import nn

from optimum_dsa.model.architecture import UnprunableError, find_architecture
from optimum_dsa.model.observer import Observer


@pytest.fixture
def observer():
    return Observer(gram=True)


@pytest.fixture
def pair():
    model = nn.ModuleDict(
        {"layers": nn.ModuleList([nn.ModuleDict({"query": nn.Linear(4, 4), "key": nn.Linear(4, 4)})])}
    )
    return find_architecture(model).weights


def test_maps_of_one_input_share_their_statistics(observer, pair):
    query, key = pair
    for _ in range(2):
        observer.start_batch(1)
        x = torch.randn(3, 4)
        observer.observe(query, x)
        observer.observe(key, x)
    assert observer.statistics[query.name] is observer.statistics[key.name]
    assert observer.statistics[key.name].tokens == 6


@pytest.mark.parametrize("between", [False, True])
def test_maps_part_where_one_sees_more(observer, pair, between):
    """As in a decoder whose keys come from its own tokens and from an encoder's."""
    query, key = pair
    seen = {query.name: [], key.name: []}
    for _ in range(2):
        observer.start_batch(1)
        own, encoded = torch.randn(3, 4), torch.randn(5, 4)
        for weight, x in [(query, own), (key, own), (key, encoded)]:
            if between:
                x.mul_(2)  # a change in place makes it another input
            observer.observe(weight, x)
            seen[weight.name].append(x.clone())
    for weight in pair:
        rows = torch.cat(seen[weight.name])
        torch.testing.assert_close(observer.statistics[weight.name].gram, rows.t() @ rows)


def test_maps_that_part_too_late_are_refused(observer, pair):
    query, key = pair
    observer.start_batch(1)
    x = torch.randn(3, 4)
    observer.observe(query, x)
    observer.observe(key, x)
    observer.observe(query, torch.randn(3, 4))
    with pytest.raises(UnprunableError, match="exclude="):
        observer.start_batch(1)
