import pytest
import torch
from torch import nn
from transformers import DebertaV2Config, DebertaV2ForMaskedLM

from optimum_dsa import DSAConfig, prune
from optimum_dsa.model.architecture import UnprunableError, find_architecture
from optimum_dsa.model.observer import Observer

from ..tiny import tokens


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


def test_maps_that_part_in_the_first_batch_have_statistics_of_their_own(observer, pair):
    """A query's matrix may be given more later than the key's with which it began."""
    query, key = pair
    seen = {query.name: [], key.name: []}
    for _ in range(2):
        observer.start_batch(1)
        own, more = torch.randn(3, 4), torch.randn(5, 4)
        for weight, x in [(query, own), (key, own), (query, more)]:
            observer.observe(weight, x)
            seen[weight.name].append(x)
    observer.start_batch(1)
    for weight in pair:
        rows = torch.cat(seen[weight.name])
        torch.testing.assert_close(observer.statistics[weight.name].gram, rows.t() @ rows)


def test_maps_that_part_too_late_are_refused(observer, pair):
    query, key = pair
    for part in (False, True):
        observer.start_batch(1)
        x = torch.randn(3, 4)
        observer.observe(query, x)
        observer.observe(key, x)
        if part:
            observer.observe(query, torch.randn(3, 4))
    with pytest.raises(UnprunableError, match="exclude="):
        observer.start_batch(1)


def test_a_table_that_all_sequences_share_is_not_counted(observer, pair):
    """It comes once in a batch, so that the size of the batch would change the result."""
    query, key = pair
    own, table = torch.randn(2, 3, 4), torch.randn(1, 8, 4)
    observer.start_batch(2)
    for weight, x in [(query, own), (key, own), (query, table), (key, table)]:
        observer.observe(weight, x)
    assert observer.statistics[query.name] is observer.statistics[key.name]
    rows = own.flatten(0, 1)
    torch.testing.assert_close(observer.statistics[key.name].gram, rows.t() @ rows)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_attention_that_shares_its_matrices_with_relative_positions_is_pruned(method):
    config = DebertaV2Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        relative_attention=True, share_att_key=True, pos_att_type=["p2c", "c2p"], position_buckets=4,
    )  # fmt: skip
    found = []
    for size in (1, 4):
        torch.manual_seed(0)
        model = DebertaV2ForMaskedLM(config).eval()
        texts = {"input_ids": tokens(4, 12) % 64, "attention_mask": (torch.arange(12) < 10).expand(4, 12).long()}
        prune(model, texts, DSAConfig(0.5, method, "uniform", batch_size=size))
        found.append(torch.cat([(weight == 0).flatten() for weight in model.deberta.encoder.parameters()]))
    assert (found[0] == found[1]).float().mean() > 0.99
